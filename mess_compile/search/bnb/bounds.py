"""Lower bounds on price - slope * mIoU of the plans of chains of heads, and the choice of the slope."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np
from numba import get_num_threads

from mess_compile.array_types import Array
from mess_compile.search.bnb import kernels
from mess_compile.search.bnb.arrays import PLACES, UNBOUNDED, Problem
from mess_compile.search.bnb.incumbent import BoundedChains, Incumbent
from mess_compile.search.bnb.kernels.values import Cutoff, PairGroup, Relaxation, TripleGroup
from mess_compile.search.deadline import Clock, check_time

Found = TypeVar("Found")
BATCH = 64
"""So many chains are expanded at a time."""
_SAMPLE, _PAIRS = 2048, 512


class Bounds:
    """Bounds by one `slope`, the multiplier of the floor of mIoU or of the bound on the priced quantity.

    mIoU is less its charges for changes, and the floor less what may be charged at most."""

    def __init__(self, problem: Problem, incumbent: Incumbent, clock: Clock | None) -> None:
        self._problem, self._incumbent, self._clock = problem, incumbent, clock
        self.slope = 0.0

    def of_chains(self, chains: Array) -> Array:
        """Lower bounds (m,) of the plans of each of the chains (m, 4), by an envelope for each."""
        return self._of_priced(chains, self._prices(chains))

    def _prices(self, chains: Array) -> Array:
        """What an image costs that leaves at each exit (m, 4) of the chains (m, 4), weighed against mIoU."""
        problem = self._problem
        return in_order(problem.weight * problem.costs(problem.priced, *chains.T).T, np.float64)

    def _of_priced(self, chains: Array, prices: Array) -> Array:
        slope, table = self.slope, self._problem.table
        chains = in_order(chains, np.int64)
        least = np.empty(len(chains))
        for part, found in shared(
            len(chains), lambda part: kernels.bound_chains(chains[part], prices[part], slope, table)
        ):
            least[part] = found
        return least

    def of_pairs(self) -> BoundedChains:
        """Every chain of two heads, by the slope that suits them."""
        points = self._problem.points
        chains = self.existing(self._problem.chains(*np.nonzero(points[:, None] < points[None, :])))
        self.tune(chains[:: len(chains) // _SAMPLE + 1], (8.0, 4.0, 2.0, 1.4, 1.2, 1.1))
        least = [np.empty(0)]
        for part in np.array_split(chains, len(chains) // _PAIRS + 1):
            check_time(self._clock)
            least.append(self.of_chains(part))
        return BoundedChains(chains.astype(np.int16), np.concatenate(least), self.slope)

    def existing(self, chains: Array) -> Array:
        """Those of the chains (m, 4) that the target has the graphs of, and the memory for."""
        runs = self._problem.costs(0, *chains.T)[0] >= 0
        found: Array = chains[runs & self._incumbent.fits(chains)]
        return found

    def tune(self, sample: Array, factors: tuple[float, ...]) -> Array:
        """Choose the slope at which the least of some bounds is highest: the best multiplier of the Lagrangian dual.

        Returns the chains of the `sample` (m, 4) that remain, from the most promising.
        """
        if not self._problem.weight or not len(sample):
            return sample
        if not self._incumbent.min_miou and not self._problem.charges_changes:
            self.slope *= self._problem.constraints.objective < 0  # without a floor or a plan any slope is as good
            return sample

        def dual(slope: float) -> tuple[float, float, Array]:
            check_time(self._clock)
            self.slope = slope
            least = self._of_priced(sample, prices)
            return float(least.min()) + slope * self._incumbent.min_charged, slope, least

        for factor in factors:
            middle, prices = self.slope, self._prices(sample)
            tried = (dual(middle * each) for each in (1 / factor, 1, factor))
            _, self.slope, least = max(tried, key=lambda each: each[0])
            sample = sample[np.argsort(least, kind="stable")[: max(BATCH, len(sample) // 4)]]
        return sample

    def of_group(self, points: tuple[int, ...], seconds: Array) -> BoundedChains:
        """The chains of heads at these exit points, with some heads at the second, by one envelope for all."""
        problem = self._problem
        every = [np.flatnonzero(problem.points == point) for point in points]
        coefficients = self._envelope(every)
        first, *others = every[:1] + every[2:]
        shape = np.ix_(seconds, first, *others)  # (seconds, firsts, ..., lasts)
        heads = [shape[1], shape[0], *shape[2:]]
        costs = problem.costs(problem.priced, *heads)  # (exits, seconds, firsts, ..., lasts)
        alive = (problem.costs(0, *heads)[0] >= 0) & (costs[0] >= 0)
        if self._incumbent.limit < UNBOUNDED:
            alive &= costs.min(axis=0) <= self._incumbent.limit // problem.images
        chains = problem.chains(*(each[alive] for each in np.broadcast_arrays(*heads)))
        fits = self._incumbent.fits(chains)
        chains, alive[alive] = chains[fits], fits
        relaxation = self._relaxation(coefficients, [*seconds, *first, *np.concatenate(others)])
        prices = np.ascontiguousarray(np.moveaxis(problem.weight * costs, 1, 0))  # (seconds, exits, firsts, ..., lasts)
        check_time(self._clock)
        least = np.empty(alive.shape)

        def bound_some(part: Array) -> None:
            for b in part:
                group = (seconds[b], first, *others, prices[b], alive[b])
                if len(points) == 3:
                    kernels.bound_pairs(PairGroup(*group), relaxation, problem.table, least[b])
                else:
                    kernels.bound_triples(TripleGroup(*group), relaxation, problem.table, least[b])

        shared(len(seconds), bound_some)
        return BoundedChains(chains.astype(np.int16), least[alive], self.slope)

    def _relaxation(self, coefficients: Array, heads: list[Any]) -> Relaxation:
        scores = self._problem.table.scores
        added = np.zeros(scores.shape[:2])  # (heads, n)
        for head in heads:
            kernels.additions(scores[head], coefficients, added[head])
            added[head] -= self._problem.table.charges[head]
        return Relaxation(Cutoff(self.slope, self._incumbent.ceiling(self.slope)), coefficients, added)

    def _envelope(self, heads: list[Array]) -> Array:
        """Coefficients for all chains of these heads: those of a box of the mean size."""
        table = self._problem.table
        spans = sum(table.spans[:, a][:, :, b].mean(axis=(1, 2)) for a, b in itertools.pairwise(heads))
        near = table.totals[heads[-1]].mean(axis=0)
        found: Array = np.empty_like(near)
        kernels.envelope(np.maximum(0.0, near - spans[1]), near + spans[0], near, table.labelled, found)
        return found


def joined(parts: list[BoundedChains], slope: float) -> BoundedChains:
    chains = np.concatenate([np.empty((0, PLACES), np.int16), *(part.chains for part in parts)])
    return BoundedChains(chains, np.concatenate([np.empty(0), *(part.least for part in parts)]), slope)


def shared(count: int, work: Callable[[Array], Found]) -> list[tuple[Array, Found]]:
    """The results of `work` on `count` things, given the indices of some of them: a part for each core."""
    cores = get_num_threads()
    parts = [np.arange(first, count, cores) for first in range(min(cores, count))]
    others = [_threads(os.getpid(), cores).submit(work, part) for part in parts[1:]]
    try:
        found = [work(part) for part in parts[:1]]
    finally:
        wait(others)
    return list(zip(parts, [*found, *(other.result() for other in others)], strict=True))


THREADS = "bounds"
"""What the names of the search's threads begin with."""


@functools.lru_cache(maxsize=1)
def _threads(process: int, cores: int) -> ThreadPoolExecutor:
    """The threads of this process: to start some for each call would take longer than most calls. A forked process has
    none of its parent's."""
    return ThreadPoolExecutor(cores, thread_name_prefix=THREADS)


def in_order(array: Array, dtype: type) -> Array:
    """The array in the layout and type that kernels are compiled for: numba compiles anew for each other."""
    return np.ascontiguousarray(array, dtype)
