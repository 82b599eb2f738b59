"""Branch and bound over the plans with up to two early heads, for spaces too large to enumerate: the optimum, proven.

Plans are grouped by their heads. Every triple of heads gets a lower bound on what its best plan could cost (kernels);
those that may still hold the optimum are settled plan by plan, the most promising first, until none is left.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from mess_compile.search import kernels
from mess_compile.search.clock import Clock
from mess_compile.search.figures import Evidence
from mess_compile.search.problem import UNBOUNDED, Array, Problem, problem_of
from mess_compile.search.requirement import Requirement

Progress = Callable[[int, int], None]
_TOLERANCE = 1e-9
_TUNED, _NEAR, _PAIRS, _SECONDS, _SETTLED = 2048, 8, 512, 8, 64


@dataclass(frozen=True)
class Best:
    """A plan: `heads` in running order, the (row, cut) of early ones; `goal` is the objective summed over images, or
    bytes of memory, or 0 where mIoU is the objective."""

    goal: int
    miou: float
    heads: tuple[str, ...]
    decisions: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Proof:
    """How the optimum was found: chains of heads put away by their bounds, or settled plan by plan, and the plans
    `evaluated`. `gap` is what a better plan could still gain in the objective (a mean over images, pp, or bytes);
    infinite when none was found, and not all of them were looked at."""

    bounded: int
    settled: int
    evaluated: int
    gap: float


def branch_and_bound(
    evidence: Evidence, requirement: Requirement, progress: Progress, clock: Clock | None = None
) -> tuple[Best | None, Proof]:
    """The best plan, or the best when the `clock` was up; None when none satisfies the requirement.

    Without a clock Ctrl-C raises KeyboardInterrupt.
    """
    search = _Search(problem_of(evidence, requirement), clock)
    with suppress(_TimeIsUp), nullcontext() if clock is None else clock.ends_by_interrupt():
        search.run(requirement.early_exits, progress)
    return search.best, search.proof()


@dataclass(frozen=True, eq=False)
class _Bounded:
    """`triples` (m, 3) of heads whose plans have cost - slope * mIoU of at least `least` (m,)."""

    triples: Array
    least: Array
    slope: Array

    def price(self, aim: float) -> Array:
        """What a plan with an mIoU of `aim` costs at least, (m,)."""
        price: Array = self.least + self.slope * aim
        return price

    def part(self, which: Any) -> _Bounded:
        return _Bounded(self.triples[which], self.least[which], self.slope[which])

    def from_cheapest(self, aim: float) -> _Bounded:
        return self.part(np.argsort(self.price(aim), kind="stable"))


class _TimeIsUp(Exception):
    pass


class _Search:
    def __init__(self, problem: Problem, clock: Clock | None) -> None:
        self._problem, self._clock = problem, clock
        self._images = problem.field.scores.shape[1]
        self._nobody = len(problem.names)
        self._slope = 0.0
        self.best: Best | None = None
        self._open: list[_Bounded] = []
        self._tried = np.empty((0, 3), np.int64)  # triples that were settled before all had bounds
        self._unknown = True  # until every group of plans has its bound
        self._bounded = self._settled = self._evaluated = 0

    def run(self, early_exits: int, progress: Progress) -> None:
        self._singles()
        if early_exits >= 1:
            pairs = self._pairs()
            self._open = [pairs]
            self._unknown = early_exits > 1
            self._settle_best_first(pairs)
        if early_exits >= 2:
            self._try_near(pairs)
            chains = list(itertools.combinations(sorted(set(self._problem.points.tolist())), 3))
            left = []
            for done, points in enumerate(chains, start=1):
                left.append(self._chain(points))
                progress(done, len(chains) + 1)
            self._open = [_joined(left)]
            self._unknown = False
            self._settle_best_first(self._open[0])
        self._unknown = False

    def _check_time(self) -> None:
        if self._clock is not None and self._clock.up:
            raise _TimeIsUp

    def proof(self) -> Proof:
        return Proof(self._bounded, self._settled, self._evaluated, self._gap())

    def _gap(self) -> float:
        """What a better plan could still gain in the objective, as a mean over images, in pp or in bytes; infinite when
        there is no plan yet, and one may be found."""
        if self.best is None:
            return np.inf if self._unknown or self._open else 0.0
        if self._problem.by_memory:
            sizes = [self._problem.memory(each.triples[self._may_win(each)]) for each in self._open]
            smallest = 0 if self._unknown else min(size.min(initial=self.best.goal) for size in (*sizes, np.empty(0)))
            return float(self.best.goal - smallest)
        if self._problem.wanted.objective < 0:
            limit = self._limit if self._weight else 0.0
            gains = [((limit - each.price(self._aim)) / each.slope).max(initial=0.0) for each in self._open]
            return float(100.0 - self.best.miou if self._unknown else max(gains, default=0.0))
        least = [each.price(self._aim).min(initial=self.best.goal) for each in self._open]
        reached = self._paid_anyhow() if self._unknown else min(least, default=self.best.goal)
        return float((self.best.goal - reached) / self._images / self._problem.unit)

    def _paid_anyhow(self) -> int:
        """What no plan can save of the objective: every image passes a first head, and leaves."""
        path = self._problem.paths[self._problem.wanted.objective]
        first = path.step[0][path.step[0] >= 0].min()
        return int((path.start + first + path.leave[1:].min()) * self._images)

    # what a plan must beat

    @property
    def _aim(self) -> float:
        """The mIoU below which no plan is wanted; 0 when any is."""
        wanted = self._problem.wanted
        by_miou = wanted.objective < 0 and not self._problem.by_memory
        reached = self.best.miou if self.best is not None and by_miou else 0.0
        return max(wanted.floor, reached, 0.0)

    @property
    def _limit(self) -> int:
        """The priced quantity, summed over images, above which no plan is wanted."""
        bound = int(self._problem.wanted.bounds[self._priced])
        if self._problem.wanted.objective >= 0 and self.best is not None:
            return min(bound, self.best.goal)
        return bound

    @property
    def _priced(self) -> int:
        """The quantity that is weighed against mIoU: the objective, or for mIoU the first that has a bound."""
        wanted = self._problem.wanted
        return wanted.objective if wanted.objective >= 0 else int((wanted.bounds < UNBOUNDED).argmax())

    @property
    def _weight(self) -> float:
        """0 when only mIoU counts: then prices are in pp."""
        return float(self._limit < UNBOUNDED or self._problem.wanted.objective >= 0)

    @property
    def _ceiling(self) -> float:
        """What cost - slope * mIoU must not exceed for a plan to be wanted."""
        limit = float(self._limit) if self._weight else 0.0
        return limit + _TOLERANCE * max(limit, 1.0) - self._slope * self._aim

    def _may_win(self, bounded: _Bounded) -> Array:
        limit = float(self._limit) if self._weight else 0.0
        within: Array = bounded.price(self._aim) <= limit + _TOLERANCE * max(limit, 1.0)
        return within & self._fits(bounded.triples)

    def _fits(self, triples: Array) -> Array:
        """Whether heads (m, 3) take no more memory than a plan that is wanted."""
        most = self._problem.most_memory
        if self._problem.by_memory and self.best is not None:
            most = min(most, self.best.goal)
        return np.ones(len(triples), np.bool_) if most == UNBOUNDED else self._problem.memory(triples) <= most

    def _costs(self, quantity: int, h1: Array, h2: Array, h3: Array) -> Array:
        return self._problem.paths[quantity].of_exits(self._problem.points, h1, h2, h3)

    # from bounds to plans

    def _singles(self) -> None:
        problem, wanted, heads = self._problem, self._problem.wanted, np.arange(self._nobody)
        costs = np.stack([p.start + p.step[0] + p.leave[problem.points] for p in problem.paths])  # (q, heads)
        runs = np.array([path.step[0] >= 0 for path in problem.paths]).all(axis=0)
        mious = np.array([kernels.mean_iou(totals, problem.field.labelled) for totals in problem.field.totals])
        kept = runs & (costs * self._images <= wanted.bounds[:, None]).all(axis=0) & (costs[0] <= wanted.percentile[1])
        for h in heads[kept & (mious >= wanted.floor)]:
            goal = int(costs[wanted.objective, h]) * self._images if wanted.objective >= 0 else 0
            goal = self._goal(np.array([self._nobody, self._nobody, h]), goal)
            self._offer(Best(goal, float(mious[h]), (problem.names[h],), ()))
        self._evaluated += int(runs.sum())
        spread = max(0.1, float(mious.max() - np.median(mious)))
        self._slope = (
            float(costs[self._priced, runs].mean()) * self._images / spread if self._weight * runs.any() else 1.0
        )

    def _offer(self, found: Best) -> None:
        if self._problem.allowed(found.heads) and (self.best is None or self._order(found) < self._order(self.best)):
            self.best = found

    def _order(self, found: Best) -> Any:
        """By objective, mIoU (greatest), number of graphs and text (issue 5)."""
        points = [str(self._problem.points[self._problem.names.index(head)]) for head in found.heads]
        rows, cuts = ([str(decision[i]) for decision in found.decisions] for i in (0, 1))
        return found.goal, -found.miou, self._problem.graphs(found.heads), points, found.heads, rows, cuts

    def _settle(self, triples: Array, limit: float) -> Array:
        """Settle triples (m, 3) up to a bound and keep the best plan; returns each one's least bound (m,)."""
        wanted = self._problem.wanted
        costs = np.stack([self._costs(q, *triples.T).T for q in range(len(self._problem.paths))], axis=1)  # (m, q, 3)
        prices = self._weight * costs[:, self._priced].astype(np.float64)
        floor = max(wanted.floor, self._aim)
        found, evaluated = kernels.settle_all(
            triples, prices, limit, self._slope, costs, wanted._replace(floor=floor), self._problem.field
        )
        self._evaluated += int(evaluated.sum())
        for triple, one in zip(triples, found, strict=True):
            if one[2] >= 0:
                self._offer(self._plan(triple, one))
        least: Array = found[:, 6]
        return least

    def _plan(self, triple: Array, found: Array) -> Best:
        options = [(int(found[2]), int(found[3])), (int(found[4]), int(found[5]))]
        early = [(h, option) for h, option in zip(triple[:2], options, strict=True) if h != self._nobody]
        decisions = tuple((row, self._problem.grid[h][row][cut]) for h, (row, cut) in early)
        return Best(self._goal(triple, int(found[0])), float(found[1]), self._names(triple), decisions)

    def _goal(self, triple: Array, summed: int) -> int:
        return int(self._problem.memory(triple[None])[0]) if self._problem.by_memory else summed

    def _names(self, triple: Array) -> tuple[str, ...]:
        return tuple(self._problem.names[h] for h in triple if h != self._nobody)

    def _settle_best_first(self, bounded: _Bounded) -> None:
        """Settle what its bound leaves, the most promising (or smallest) first, until nothing left can be better."""
        rest = bounded.from_cheapest(self._aim)
        if self._problem.by_memory:
            rest = rest.part(np.argsort(self._problem.memory(rest.triples), kind="stable"))
        while len(rest.least):
            self._open = [rest]
            self._check_time()
            some = rest.part(slice(_SETTLED))
            some = some.part(self._may_win(some))
            if not len(some.least) and not self._may_win(rest).any():
                break
            triples = some.triples[np.array([self._problem.allowed(self._names(t)) for t in some.triples], np.bool_)]
            if len(triples):
                self._settle(triples, self._ceiling)
                self._settled += len(triples)
            self._bounded += min(_SETTLED, len(rest.least)) - len(triples)
            rest = rest.part(slice(_SETTLED, None))
        self._bounded += len(rest.least)
        self._open = []

    # bounds

    def _pairs(self) -> _Bounded:
        points = self._problem.points
        first, last = np.nonzero(points[:, None] < points[None, :])
        triples = np.stack([first, np.full(len(first), self._nobody), last], axis=1)
        triples = triples[(self._costs(0, *triples.T)[0] >= 0) & self._fits(triples)]
        self._tune(triples[:: len(triples) // _TUNED + 1], (8.0, 4.0, 2.0, 1.4, 1.2, 1.1))
        least = [np.empty(0)]
        for part in np.array_split(triples, len(triples) // _PAIRS + 1):
            self._check_time()
            least.append(self._settle(part, -np.inf))
        return _Bounded(triples, np.concatenate(least), np.full(len(triples), self._slope))

    def _try_near(self, pairs: _Bounded) -> None:
        """Settle triples that hold a promising pair, at the slope that they ask for: a good plan to beat the others."""
        heads = np.arange(self._nobody)
        found = []
        for first, _, last in pairs.from_cheapest(self._aim).triples[:_SETTLED]:
            points = self._problem.points
            more = heads[(points < points[last]) & (points != points[first])]
            more = more[:: len(more) // _NEAR + 1]
            chains = np.stack([np.full(len(more), first), more, np.full(len(more), last)], axis=1)
            found.append(np.where((points[more] < points[first])[:, None], chains[:, [1, 0, 2]], chains))
        triples = np.unique(np.concatenate([np.empty((0, 3), np.int64), *found]), axis=0)
        triples = triples[(self._costs(0, *triples.T)[0] >= 0) & self._fits(triples)]
        best = self._tune(triples, (2.0, 1.4, 1.2, 1.1))
        if len(best):
            self._check_time()
            self._settle(best[:_SETTLED], self._ceiling)
            self._tried = best[:_SETTLED]
            self._settled += len(self._tried)

    def _tune(self, sample: Array, spans: tuple[float, ...]) -> Array:
        """Take the slope at which the least of some bounds is highest: the multiplier of the floor, or of the bound.

        Returns those of the `sample` (m, 3) that are left, from the most promising."""
        if not self._weight or not len(sample):
            return sample
        if not self._aim:
            self._slope *= self._problem.wanted.objective < 0  # without a plan to beat in mIoU, any slope is as good
            return sample

        def dual(slope: float) -> tuple[float, float, Array]:
            self._check_time()
            self._slope = slope
            least = self._settle(sample, -np.inf)
            return float(least.min()) + slope * self._aim, slope, least

        for span in spans:
            middle = self._slope
            _, self._slope, least = max(
                (dual(middle * factor) for factor in (1 / span, 1, span)), key=lambda each: each[0]
            )
            sample = sample[np.argsort(least, kind="stable")[: max(_SETTLED, len(sample) // 4)]]
        return sample

    def _chain(self, chain: tuple[int, int, int]) -> _Bounded:
        """The triples of heads at these points that may still be best."""
        field, slope = self._problem.field, self._slope
        h1, h2, h3 = (np.flatnonzero(self._problem.points == point) for point in chain)
        shape = h1[:, None, None], h2[None, :, None], h3[None, None, :]
        costs = self._costs(self._priced, *shape)  # (3, firsts, seconds, lasts)
        alive = (self._costs(0, *shape)[0] >= 0) & (costs[0] >= 0)
        if self._limit < UNBOUNDED:
            alive &= costs.min(axis=0) <= self._limit // self._images
        chains = np.stack(np.broadcast_arrays(*shape), axis=-1)
        alive &= self._fits(chains.reshape(-1, 3)).reshape(alive.shape)
        coefficients = self._envelope(h1, h2, h3)
        added = np.zeros(field.scores.shape[:2])  # (heads, n)
        for h in (*h1, *h2, *h3):
            kernels.additions(field.scores[h], coefficients, added[h])
        prices = np.ascontiguousarray(np.moveaxis(self._weight * costs, 2, 0))  # (seconds, 3, firsts, lasts)
        alive = np.ascontiguousarray(np.moveaxis(alive, 1, 0))
        least = [np.empty((0, len(h1), len(h3)))]
        for part in (slice(start, start + _SECONDS) for start in range(0, len(h2), _SECONDS)):
            self._check_time()
            rest = (self._ceiling, slope, added, field, coefficients)
            least.append(kernels.bound_triples(h2[part], h1, h3, prices[part], alive[part], *rest))
        second, first, last = np.nonzero(alive)
        bounds = np.concatenate(least)[second, first, last]
        triples = np.stack([h1[first], h2[second], h3[last]], axis=1)
        place = np.array([self._nobody**2, self._nobody, 1])
        tried = np.isin(triples @ place, self._tried @ place)
        left = self._may_win(_Bounded(triples, bounds, np.full(len(bounds), slope))) & ~tried
        self._bounded += int((~left & ~tried).sum())
        return _Bounded(triples[left], bounds[left], np.full(int(left.sum()), slope))

    def _envelope(self, h1: Array, h2: Array, h3: Array) -> Array:
        """Coefficients for all triples of these heads: those of a box such as one of them has."""
        field = self._problem.field
        spans = field.spans[:, h1][:, :, h2].mean(axis=(1, 2)) + field.spans[:, h2][:, :, h3].mean(axis=(1, 2))
        near = field.totals[h3].mean(axis=0)
        found: Array = np.empty_like(near)
        kernels.envelope(np.maximum(0.0, near - spans[1]), near + spans[0], near, field.labelled, found)
        return found


def _joined(parts: list[_Bounded]) -> _Bounded:
    if not parts:
        return _Bounded(np.empty((0, 3), np.int64), np.empty(0), np.empty(0))
    return _Bounded(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("triples", "least", "slope"))
    )
