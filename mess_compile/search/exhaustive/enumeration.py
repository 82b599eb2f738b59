"""Every plan with early exits, evaluated exactly: counts and costs in integers, mIoU in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mess_compile.array_types import Floats, Index, Ints
from mess_compile.evaluate.statistics import ExitStatistics, changed_shares
from mess_compile.search.class_floors import ClassFloor
from mess_compile.search.space import Decisions

STATES = 8192
UNTHREADED_SIZE = 1 << 18


class PlanScores(NamedTuple):
    """Of plans (plans,): mIoU in percent, what is `changed`, summed over images, and the `margin`: by how much the IoU
    of a class with a floor is above it, in pp, of the class that is nearest to it. 0 for what is not counted."""

    miou: Floats
    changed: Floats
    margin: Floats

    def select(self, which: Index | NDArray[np.bool_]) -> PlanScores:
        return PlanScores(*(values[which] for values in self))


@dataclass(frozen=True)
class Selection:
    """Which of several plans at the same cost a table has: of those that satisfy the bounds the best by what is
    `best`.

    Bounds are `floor` (percent of mIoU), `most_changed` (summed over images, None: no bound) and the floors of
    `classes`; that on what is best itself is left out.
    """

    most_changed: int | None = None
    classes: tuple[ClassFloor, ...] = ()
    best: Literal["miou", "changed", "margin"] = "miou"
    floor: float = -math.inf

    @property
    def counts_changes(self) -> bool:
        return self.best == "changed" or self.most_changed is not None

    def values(self, found: PlanScores) -> Floats:
        """What is greatest for the plan to take, -inf for those that are not wanted."""
        wanted = np.ones(len(found.miou), np.bool_)
        if self.best != "miou":
            wanted &= found.miou >= self.floor
        if self.best != "changed" and self.most_changed is not None:
            wanted &= found.changed <= self.most_changed
        if self.best != "margin":
            wanted &= found.margin >= 0
        value = {"miou": found.miou, "changed": -found.changed, "margin": found.margin}[self.best]
        return np.where(wanted, value, -np.inf)


BY_MIOU = Selection()


class Scores:
    """Intersections and false positives of every head, (n, 2 * classes), of the classes that have labelled pixels.

    They are integers below 2^53, so that float64 sums of them are exact in any order. So is what each head changes, the
    last column where the `selection` counts changes.
    """

    def __init__(self, statistics: ExitStatistics, selection: Selection = BY_MIOU) -> None:
        self.selection = selection
        labelled = statistics.labelled.sum(axis=0)
        present = np.flatnonzero(labelled)
        right = statistics.intersection[:, :, present]  # (n, heads, classes)
        wrong = statistics.predicted[:, :, present] - right
        parts = [right, wrong, *([changed_shares(statistics)[..., None]] if selection.counts_changes else [])]
        both = np.concatenate(parts, axis=2).astype(np.float64)
        self.of_head = {head: np.ascontiguousarray(both[:, i]) for i, head in enumerate(statistics.scored)}
        self.labelled = labelled[present].astype(np.float64)[:, None]  # (classes, 1)
        place = {int(index): row for row, index in enumerate(present)}
        self._floors = [(place[floor.index], floor.least_iou) for floor in selection.classes if floor.index in place]

    def of_plans(self, sums: Floats) -> PlanScores:
        """The scores of plans (states,) from sums over images (columns, states), which are overwritten.

        mIoU adds up class by class like `statistics.miou`, to the same last bit.
        """
        changed = sums[-1].copy() if self.selection.counts_changes else np.zeros(sums.shape[1])
        classes = len(self.labelled)
        iou, union = sums[:classes], sums[classes : 2 * classes]
        union += self.labelled
        iou /= union
        total: Floats = iou[0].copy()
        for row in iou[1:]:
            total += row
        total /= classes
        total *= 100.0
        return PlanScores(total, changed, self._margin(iou))

    def _margin(self, iou: Floats) -> Floats:
        """The margin (states,) of IoU (classes, states) from 0 to 1."""
        if not self._floors:
            return np.zeros(iou.shape[1])
        least: Floats = np.min([100.0 * iou[row] - floor for row, floor in self._floors], axis=0)
        return least


@dataclass(frozen=True, eq=False)
class States:
    """Decisions of two early heads, sorted by images at the first exit, images at the second, then text.

    `first` and `second` (states,) index the heads' options, `leaves` (n, states) is 1.0 where an image leaves at the
    second exit. Each `group` of states that send as many images to each exit begins at `starts` and has `at_first`
    and `at_second` images.
    """

    first: Index
    second: Index
    leaves: Floats
    starts: Index
    at_first: Ints
    at_second: Ints


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Evaluated decisions: options `taken` and images `at` each early exit (rows, exits), and `scores` (rows,)."""

    taken: Index
    at: Ints
    scores: PlanScores

    def select(self, which: Index | NDArray[np.bool_]) -> Outcomes:
        return Outcomes(self.taken[which], self.at[which], self.scores.select(which))

    def of_last(self, early: int) -> Outcomes:
        """The same without the heads before the last `early` ones, which stand for no head."""
        return Outcomes(self.taken[:, -early:], self.at[:, -early:], self.scores)


def states_of_pair(first: Decisions, second: Decisions) -> Iterator[States]:
    """All states of two early heads, in blocks; of states that send the same images to each exit only the first."""
    by_size = np.argsort(first.leaves.sum(axis=1), kind="stable")
    step = max(1, STATES // len(second.rows)) if len(second.rows) else 1
    for start in range(0, len(by_size), step):
        yield _states(first, second, by_size[start : start + step])


def _states(first: Decisions, second: Decisions, chosen: Index) -> States:
    n = first.leaves.shape[1]
    left = second.leaves & ~first.leaves[chosen][:, None]  # (chosen, second, n)
    parent, b = _distinct(_words(left))
    a = chosen[parent]
    leaves = left[parent, b]  # (states, n)
    code = first.leaves.sum(axis=1)[a] * (n + 1) + leaves.sum(axis=1)
    key = code
    for number, size in ((first.row_rank[a], 0), (second.row_rank[b], 0), (a, len(first.rows)), (b, len(second.rows))):
        key = key * (size or int(number.max(initial=0)) + 1) + number
    order = np.argsort(key)
    code = code[order]
    starts = np.flatnonzero(np.concatenate([[True], code[1:] != code[:-1]]))
    at_first, at_second = np.divmod(code[starts], n + 1)
    return States(a[order], b[order], leaves[order].T.astype(np.float64, order="C"), starts, at_first, at_second)


def _distinct(words: NDArray[np.uint64]) -> tuple[Index, Index]:
    """Row and column of the first occurrence of every value in each row of `words`."""
    order = np.argsort(words, axis=1, kind="stable")
    ordered = np.take_along_axis(words, order, axis=1)
    new = np.ones(words.shape, np.bool_)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    row, position = np.nonzero(new)
    return row, order[row, position]


def _words(masks: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """A number for each mask (..., n): equal for equal masks only."""
    packed = np.packbits(masks, axis=-1)
    padding = [(0, 0)] * (packed.ndim - 1) + [(0, -packed.shape[-1] % 8)]
    words = np.ascontiguousarray(np.pad(packed, padding)).view(np.uint64)
    if words.shape[-1] == 1:
        return words[..., 0]
    _, inverse = np.unique(words.reshape(-1, words.shape[-1]), axis=0, return_inverse=True)
    return inverse.reshape(masks.shape[:-1]).astype(np.uint64)


def best_outcomes(
    scores: Scores, early: tuple[str, str], last: str, first_leaves: NDArray[np.bool_], states: States
) -> Outcomes:
    """The best state by the selection, then by text, of each group, when images that leave at neither exit leave at
    `last`.

    `first_leaves` (options, n) says which images leave by each of the first head's options.
    """
    base = scores.of_head[last]
    sums = _product(scores.of_head[early[1]] - base, states.leaves)  # (2 * classes, states)
    fixed = _product(scores.of_head[early[0]] - base, first_leaves.T.astype(np.float64)) + base.sum(axis=0)[:, None]
    sums += fixed[:, states.first]
    rated = scores.of_plans(sums)
    value = scores.selection.values(rated)
    best = np.maximum.reduceat(value, states.starts)
    at_best = np.flatnonzero(value == np.repeat(best, np.diff(states.starts, append=len(value))))
    group = np.searchsorted(states.starts, at_best, side="right") - 1
    member = at_best[np.unique(group, return_index=True)[1]]
    taken = np.stack([states.first[member], states.second[member]], axis=1)
    at = np.stack([states.at_first, states.at_second], axis=1)
    return Outcomes(taken, at, rated.select(member)).select(best > -np.inf)


def outcomes_of_three(scores: Scores, early: Sequence[str], last: str, options: Sequence[Decisions]) -> Outcomes:
    """Every choice of the options of three early heads; images that leave at none of them leave at `last`."""
    base = scores.of_head[last]
    first, second, third = options
    pairs = np.stack(np.divmod(np.arange(len(second.rows) * len(third.rows)), max(1, len(third.rows))), axis=1)
    nothing = PlanScores(np.zeros(0), np.zeros(0), np.zeros(0))
    parts = [Outcomes(np.zeros((0, 3), np.intp), np.zeros((0, 3), np.int64), nothing)]
    for a, leaves in enumerate(first.leaves):
        at_second = second.leaves & ~leaves  # (options, n)
        at_third = (third.leaves & ~leaves & ~second.leaves[:, None]).reshape(len(pairs), -1)
        sums = _product(scores.of_head[early[2]] - base, at_third.T.astype(np.float64))  # (2 * classes, pairs)
        sums += _product(scores.of_head[early[1]] - base, at_second.T.astype(np.float64))[:, pairs[:, 0]]
        sums += ((scores.of_head[early[0]] - base)[leaves].sum(axis=0) + base.sum(axis=0))[:, None]
        counts = leaves.sum(), at_second.sum(axis=1)[pairs[:, 0]], at_third.sum(axis=1)
        taken, at = (np.stack(np.broadcast_arrays(*each), axis=1) for each in ((a, *pairs.T), counts))
        found = Outcomes(taken, at, scores.of_plans(sums))
        parts.append(found.select(scores.selection.values(found.scores) > -np.inf))
    return merged(parts)


def _product(weights: Floats, leaves: Floats) -> Floats:
    """`weights.T @ leaves`, in slices that OpenBLAS computes in one thread.

    Two threads gain little on matrices of this size, and when another process uses the cores they wait for each other:
    a product then takes twenty times as long.
    """
    product = np.empty((weights.shape[1], leaves.shape[1]))
    step = max(8, UNTHREADED_SIZE // weights.size)
    for start in range(0, leaves.shape[1], step):
        part = slice(start, start + step)
        np.matmul(weights.T, leaves[:, part], out=product[:, part])
    return product


def merged(parts: list[Outcomes]) -> Outcomes:
    """The outcomes of several blocks of states as one."""
    taken, at = (np.concatenate([getattr(part, name) for part in parts]) for name in ("taken", "at"))
    return Outcomes(taken, at, PlanScores(*map(np.concatenate, zip(*(part.scores for part in parts), strict=True))))


def undominated(outcomes: Outcomes, selection: Selection) -> Outcomes:
    """The outcomes of one or two early exits that are not dominated: no other is better by the selection while as many
    images or more leave early.

    Where deeper exits cost no less, a dominated outcome is worse at no less cost, so it can be neither optimal nor
    on the front. Equal outcomes stay, for the order by text decides between them.
    """
    if not len(outcomes.at):
        return outcomes
    value = selection.values(outcomes.scores)
    row, early = outcomes.at[:, :-1].sum(axis=1), outcomes.at.sum(axis=1)
    row -= row.min()
    grid = np.full((int(row.max()) + 1, int(early.max()) + 1), -np.inf)
    np.maximum.at(grid, (row, early), value)
    for axis in (0, 1):
        grid = np.flip(np.maximum.accumulate(np.flip(grid, axis), axis=axis), axis)
    return outcomes.select(value >= grid[row, early])
