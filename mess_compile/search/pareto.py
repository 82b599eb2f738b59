"""The Pareto front of latency and mIoU, and optionally of memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mess_compile.array_types import Array, Index


def front_groups(cost: Array, miou: Array, memory: Array | None = None) -> list[Index]:
    """The indices of the plans (n,) on the front, from the fastest, then the most accurate; equal plans in one group.

    A plan dominates another that costs as much or more, has no greater mIoU and takes no less memory, and differs in
    one of these.
    """
    memory = np.zeros(len(cost), np.int64) if memory is None else memory
    order = np.lexsort((memory, -miou, cost))
    columns = cost[order], miou[order], memory[order]
    new = np.ones(len(order), np.bool_)
    new[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(order))
    best = _undominated(*(column[starts] for column in columns))
    return [order[starts[i] : ends[i]] for i in best]


def _undominated(cost: Array, miou: Array, memory: Array) -> Index:
    """Which of different points, sorted by cost, then by mIoU from the greatest, are not dominated."""
    stairs = (
        np.zeros(0, cost.dtype),
        np.zeros(0, miou.dtype),
    )  # the front in less memory: mIoU rises with cost
    found = [np.zeros(0, np.intp)]
    for size in np.unique(memory):
        among = np.flatnonzero(memory == size)
        own = among[_rising(miou[among])]
        place = np.searchsorted(stairs[0], cost[own], side="right") - 1
        own = own[(place < 0) | (miou[own] > np.append(stairs[1], -np.inf)[place])]
        found.append(own)
        costs, mious = np.concatenate([stairs[0], cost[own]]), np.concatenate([stairs[1], miou[own]])
        order = np.lexsort((-mious, costs))
        order = order[_rising(mious[order])]
        stairs = costs[order], mious[order]
    return np.sort(np.concatenate(found))


def _rising(values: Array) -> NDArray[np.bool_]:
    """Which values are greater than every one before."""
    before = np.concatenate([[-np.inf], np.maximum.accumulate(values)[:-1]])
    rising: NDArray[np.bool_] = values > before
    return rising
