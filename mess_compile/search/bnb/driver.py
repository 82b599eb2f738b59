"""Branch and bound over the plans with up to three early heads, for spaces too large to enumerate: the optimum, proven.

Plans are grouped by their heads. Every chain of heads gets a lower bound on what its best plan could cost (kernels);
those that may still hold the optimum are settled plan by plan, the most promising first, until none is left. So it goes
for one early head, for two, and for three: what was found with fewer is what more have to beat.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numba import get_num_threads

from mess_compile.network import is_whole
from mess_compile.search.bnb import kernels
from mess_compile.search.bnb.arrays import UNBOUNDED, Array, Problem, problem_of
from mess_compile.search.deadline import Clock
from mess_compile.search.metrics import Evidence
from mess_compile.search.requirement import Requirement

Progress = Callable[[int, int], None]
Found = TypeVar("Found")
_TOLERANCE = 1e-9
_TUNED, _NEAR, _PAIRS, _SECONDS, _SETTLED = 2048, 8, 512, 8, 64
_PLACES = 4
"""Of a chain: three early heads, and the last; those of a shorter one come last."""


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
    """`chains` (m, 4) of heads, in int16 for there may be millions, whose plans have cost - slope * mIoU of at least
    `least` (m,)."""

    chains: Array
    least: Array
    slope: float

    def price(self, aim: float) -> Array:
        """What a plan with an mIoU of `aim` costs at least, (m,)."""
        price: Array = self.least + self.slope * aim
        return price

    def part(self, which: Any) -> _Bounded:
        return _Bounded(self.chains[which], self.least[which], self.slope)

    def from_cheapest(self) -> _Bounded:
        """The aim does not change the order."""
        return self.part(np.argsort(self.least, kind="stable"))


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
        self._tried = np.empty((0, _PLACES), np.int64)  # chains that were settled before all had bounds
        self._unknown = True  # until every group of plans has its bound
        self._bounded = self._settled = self._evaluated = 0

    def run(self, early_exits: int, progress: Progress) -> None:
        self._singles()
        if early_exits >= 1:
            least = self._pairs().from_cheapest()
            self._open, self._unknown = [least], early_exits > 1
            self._settle_best_first(least)
        every = sorted(set(self._problem.points.tolist()))
        parts = {exits: list(self._parts(every, exits)) for exits in range(3, early_exits + 2)}
        done, total = 0, sum(map(len, parts.values())) + 1
        for exits, some in parts.items():
            self._try(self._near(least, exits), tuned=exits == 3)
            left = []
            for points, seconds in some:
                left.append(self._group(points, seconds))
                done += 1
                progress(done, total)
            least = _joined(left, self._slope).from_cheapest()
            self._open, self._unknown = [least], exits <= early_exits
            self._settle_best_first(least)
        self._unknown = False

    def _parts(self, every: list[int], exits: int) -> Iterator[tuple[tuple[int, ...], Array]]:
        """Exit points of chains, and second heads there, a few at a time."""
        for points in itertools.combinations(every, exits):
            seconds = np.flatnonzero(self._problem.points == points[1])
            step = _SECONDS if exits == 3 else get_num_threads()
            for start in range(0, len(seconds), step):
                yield points, seconds[start : start + step]

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
            sizes = [self._problem.memory(each.chains[self._may_win(each)]) for each in self._open]
            smallest = 0 if self._unknown else min(size.min(initial=self.best.goal) for size in (*sizes, np.empty(0)))
            return float(self.best.goal - smallest)
        if self._problem.wanted.objective < 0:
            gains = [((self._most - each.price(self._aim)) / each.slope).max(initial=0.0) for each in self._open]
            return float(100.0 - self.best.miou if self._unknown else max(gains, default=0.0))
        least = [each.price(self._aim).min(initial=self.best.goal) for each in self._open]
        reached = self._paid_anyhow() if self._unknown else min(least, default=self.best.goal)
        return float((self.best.goal - max(reached, self._paid_anyhow())) / self._images / self._problem.unit)

    def _paid_anyhow(self) -> int:
        """What no plan can save of the objective: every image passes a first head, or a whole network, and leaves."""
        objective = self._problem.wanted.objective
        path = self._problem.paths[objective]
        first = path.step[0][path.step[0] >= 0].min()
        uncut = min(whole.costs[objective] for whole in self._problem.wholes)
        return int(min(path.start + first + path.leave.min(), uncut) * self._images)

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
    def _most(self) -> float:
        """The price above which no plan is wanted, but for what rounding may add to it."""
        return float(self._limit) if self._weight else 0.0

    @property
    def _ceiling(self) -> float:
        """What cost - slope * mIoU must not exceed for a plan to be wanted."""
        return self._most + _TOLERANCE * max(self._most, 1.0) - self._slope * self._aim

    def _may_win(self, bounded: _Bounded) -> Array:
        within: Array = bounded.price(self._aim) <= self._most + _TOLERANCE * max(self._most, 1.0)
        found: Array = within & self._fits(bounded.chains)
        return found

    def _fits(self, chains: Array) -> Array:
        """Whether heads (m, 4) take no more memory than a plan that is wanted."""
        most = self._problem.most_memory
        if self._problem.by_memory and self.best is not None:
            most = min(most, self.best.goal)
        return np.ones(len(chains), np.bool_) if most == UNBOUNDED else self._problem.memory(chains) <= most

    def _costs(self, quantity: int, *heads: Array) -> Array:
        return self._problem.paths[quantity].of_exits(self._problem.points, *heads)

    def _there(self, chains: Array) -> Array:
        """Those of the chains (m, 4) that the target has the graphs of, and the memory for."""
        found: Array = chains[(self._costs(0, *chains.T)[0] >= 0) & self._fits(chains)]
        return found

    def _allowed(self, chains: Array) -> Array:
        """Those of the chains (m, 4) that keep the bounds which no threshold moves."""
        found: Array = chains[np.array([self._problem.allowed(self._names(chain)) for chain in chains], np.bool_)]
        return found

    def _chains(self, *heads: Array) -> Array:
        """Chains (m, 4) of these heads (m,), with none before them."""
        none = [np.full(len(heads[0]), self._nobody)] * (_PLACES - len(heads))
        return np.stack([*none, *heads], axis=1)

    # from bounds to plans

    def _singles(self) -> None:
        problem, wanted, heads = self._problem, self._problem.wanted, np.arange(self._nobody)
        costs = np.stack([p.start + p.step[0] + p.leave for p in problem.paths])  # (q, heads)
        runs = np.array([path.step[0] >= 0 for path in problem.paths]).all(axis=0)
        mious = np.array([kernels.mean_iou(totals, problem.field.labelled) for totals in problem.field.totals])
        kept = runs & (costs * self._images <= wanted.bounds[:, None]).all(axis=0) & (costs[0] <= wanted.percentile[1])
        for h in heads[kept & (mious >= wanted.floor)]:
            goal = int(costs[wanted.objective, h]) * self._images if wanted.objective >= 0 else 0
            self._offer(Best(self._goal(self._chains(heads[[h]])[0], goal), float(mious[h]), (problem.names[h],), ()))
        self._evaluated += int(runs.sum())
        self._wholes()
        spread = max(0.1, float(mious.max() - np.median(mious)))
        self._slope = (
            float(costs[self._priced, runs].mean()) * self._images / spread if self._weight * runs.any() else 1.0
        )

    def _wholes(self) -> None:
        """The networks as they are, which every other plan has to beat."""
        wanted = self._problem.wanted
        for whole in self._problem.wholes:
            costs = np.array(whole.costs)
            self._evaluated += 1
            if (
                (costs * self._images <= wanted.bounds).all()
                and costs[0] <= wanted.percentile[1]
                and (whole.miou >= wanted.floor)
            ):
                goal = int(costs[wanted.objective]) * self._images if wanted.objective >= 0 else 0
                goal = whole.memory if self._problem.by_memory else goal
                self._offer(Best(goal, whole.miou, (whole.name,), ()))

    def _offer(self, found: Best) -> None:
        if self._problem.allowed(found.heads) and (self.best is None or self._order(found) < self._order(self.best)):
            self.best = found

    def _order(self, found: Best) -> Any:
        """By objective, mIoU (greatest), number of graphs and text (issue 5)."""
        known = self._problem
        points = [str(known.final if is_whole(head) else known.points[self._index(head)]) for head in found.heads]
        rows, cuts = ([str(decision[i]) for decision in found.decisions] for i in (0, 1))
        return found.goal, -found.miou, self._problem.graphs(found.heads), points, found.heads, rows, cuts

    def _index(self, head: str) -> int:
        return self._problem.names.index(head)

    def _least(self, chains: Array) -> Array:
        """What cost - slope * mIoU comes to at least in the plans of each of the chains (m, 4), (m,)."""
        prices = _in_order(self._weight * self._costs(self._priced, *chains.T).T, np.float64)  # (m, 4)
        chains, slope, field = _in_order(chains, np.int64), self._slope, self._problem.field
        least = np.empty(len(chains))
        for part, found in _shared(
            len(chains), lambda part: kernels.least_of_chains(chains[part], prices[part], slope, field)
        ):
            least[part] = found
        return least

    def _settle(self, chains: Array) -> None:
        """Settle chains (m, 4): of their plans that may be wanted keep the best."""
        wanted, chains = self._problem.wanted, _in_order(chains, np.int64)
        each = [self._costs(q, *chains.T).T for q in range(len(self._problem.paths))]
        costs = _in_order(np.stack(each, axis=1), np.int64)  # (m, q, 4)
        prices = _in_order(self._weight * costs[:, self._priced], np.float64)
        wanted = wanted._replace(floor=max(wanted.floor, self._aim))
        limit, slope, field = self._ceiling, self._slope, self._problem.field

        def settle(part: Array) -> tuple[Array, Array]:
            return kernels.settle_all(chains[part], prices[part], limit, slope, costs[part], wanted, field)

        for part, (found, evaluated) in _shared(len(chains), settle):
            self._evaluated += int(evaluated.sum())
            for chain, one in zip(chains[part], found, strict=True):
                if one[2] >= 0:
                    self._offer(self._plan(chain, one))

    def _plan(self, chain: Array, found: Array) -> Best:
        options = found[2:].astype(int).reshape(-1, 2).tolist()
        early = [(h, option) for h, option in zip(chain[:-1], options, strict=True) if h != self._nobody]
        decisions = tuple((row, self._problem.grid[h][row][cut]) for h, (row, cut) in early)
        return Best(self._goal(chain, int(found[0])), float(found[1]), self._names(chain), decisions)

    def _goal(self, chain: Array, summed: int) -> int:
        return int(self._problem.memory(chain[None])[0]) if self._problem.by_memory else summed

    def _names(self, chain: Array) -> tuple[str, ...]:
        return tuple(self._problem.names[h] for h in chain if h != self._nobody)

    def _settle_best_first(self, bounded: _Bounded) -> None:
        """Settle what its bound leaves, the most promising (or smallest) first, until nothing left can be better."""
        rest = bounded
        if self._problem.by_memory:
            rest = rest.part(np.argsort(self._problem.memory(rest.chains), kind="stable"))
        while len(rest.least):
            self._open = [rest]
            self._check_time()
            some = rest.part(slice(_SETTLED))
            some = some.part(self._may_win(some))
            if not len(some.least) and not self._may_win(rest).any():
                break
            chains = self._allowed(some.chains)
            if len(chains):
                self._settle(chains)
                self._settled += len(chains)
            self._bounded += min(_SETTLED, len(rest.least)) - len(chains)
            rest = rest.part(slice(_SETTLED, None))
        self._bounded += len(rest.least)
        self._open = []

    # bounds

    def _pairs(self) -> _Bounded:
        points = self._problem.points
        chains = self._there(self._chains(*np.nonzero(points[:, None] < points[None, :])))
        self._tune(chains[:: len(chains) // _TUNED + 1], (8.0, 4.0, 2.0, 1.4, 1.2, 1.1))
        least = [np.empty(0)]
        for part in np.array_split(chains, len(chains) // _PAIRS + 1):
            self._check_time()
            least.append(self._least(part))
        return _Bounded(chains.astype(np.int16), np.concatenate(least), self._slope)

    def _near(self, bounded: _Bounded, exits: int) -> Array:
        """Chains (m, 4) of so many exits that hold a promising one, or that of the best plan, and a head more."""
        points, found = np.append(self._problem.points, 0), [np.empty((0, _PLACES), np.int64)]
        best = [self._index(head) for head in self.best.heads if not is_whole(head)] if self.best else []
        as_long = len(best) == exits - 1
        promising = [np.array([self._nobody] * (_PLACES - len(best)) + best)] if as_long else []
        for chain in (*promising, *bounded.chains[:_SETTLED]):
            more = np.flatnonzero((points[:-1] < points[chain[-1]]) & ~np.isin(points[:-1], points[chain]))
            for head in more[:: len(more) // _NEAR + 1]:
                longer = np.array([*chain[1:], head], np.int64)
                found.append(longer[np.argsort(points[longer], kind="stable")][None])
        return self._there(np.unique(np.concatenate(found), axis=0))

    def _try(self, chains: Array, tuned: bool) -> None:
        """Settle the most promising of some chains, for a good plan to beat the others: `tuned`, at the slope that they
        ask for. What three early exits ask for cannot be told from their bounds, which are less close."""
        self._check_time()
        best = self._tune(chains, (2.0, 1.4, 1.2, 1.1)) if tuned else chains[np.argsort(self._least(chains))]
        self._tried = self._allowed(best[:_SETTLED])
        self._check_time()
        self._settle(self._tried)
        self._settled += len(self._tried)

    def _tune(self, sample: Array, spans: tuple[float, ...]) -> Array:
        """Take the slope at which the least of some bounds is highest: the multiplier of the floor, or of the bound.

        Returns those of the `sample` (m, 4) that are left, from the most promising."""
        if not self._weight or not len(sample):
            return sample
        if not self._aim:
            self._slope *= self._problem.wanted.objective < 0  # without a plan to beat in mIoU, any slope is as good
            return sample

        def dual(slope: float) -> tuple[float, float, Array]:
            self._check_time()
            self._slope = slope
            least = self._least(sample)
            return float(least.min()) + slope * self._aim, slope, least

        for span in spans:
            middle = self._slope
            _, self._slope, least = max(
                (dual(middle * factor) for factor in (1 / span, 1, span)), key=lambda each: each[0]
            )
            sample = sample[np.argsort(least, kind="stable")[: max(_SETTLED, len(sample) // 4)]]
        return sample

    def _group(self, points: tuple[int, ...], second: Array) -> _Bounded:
        """The chains of heads at these exit points, with some heads at the second, that may still be best."""
        field = self._problem.field
        every = [np.flatnonzero(self._problem.points == point) for point in points]
        coefficients = self._envelope(every)
        first, *others = every[:1] + every[2:]
        shape = np.ix_(second, first, *others)  # (seconds, firsts, ..., lasts)
        heads = [shape[1], shape[0], *shape[2:]]
        costs = self._costs(self._priced, *heads)  # (exits, seconds, firsts, ..., lasts)
        alive = (self._costs(0, *heads)[0] >= 0) & (costs[0] >= 0)
        if self._limit < UNBOUNDED:
            alive &= costs.min(axis=0) <= self._limit // self._images
        chains = self._chains(*(each[alive] for each in np.broadcast_arrays(*heads)))
        fits = self._fits(chains)
        chains, alive[alive] = chains[fits], fits
        added = np.zeros(field.scores.shape[:2])  # (heads, n)
        for h in (*second, *first, *np.concatenate(others)):
            kernels.additions(field.scores[h], coefficients, added[h])
        prices = np.ascontiguousarray(np.moveaxis(self._weight * costs, 1, 0))  # (seconds, exits, firsts, ..., lasts)
        self._check_time()
        bound: Any = kernels.bound_second if len(points) == 3 else kernels.bound_second_of_three
        rest, least = (self._ceiling, self._slope, added, field, coefficients), np.empty(alive.shape)

        def bound_some(part: Array) -> None:
            for b in part:
                bound(second[b], first, *others, prices[b], alive[b], *rest, least[b])

        _shared(len(second), bound_some)
        place = (self._nobody + 1) ** np.arange(_PLACES)
        tried = np.isin(chains @ place, self._tried @ place)
        bounded = _Bounded(chains.astype(np.int16), least[alive], self._slope)
        left = self._may_win(bounded) & ~tried
        self._bounded += int((~left & ~tried).sum())
        return bounded.part(left)

    def _envelope(self, heads: list[Array]) -> Array:
        """Coefficients for all chains of these heads: those of a box such as one of them has."""
        field = self._problem.field
        spans = sum(field.spans[:, a][:, :, b].mean(axis=(1, 2)) for a, b in itertools.pairwise(heads))
        near = field.totals[heads[-1]].mean(axis=0)
        found: Array = np.empty_like(near)
        kernels.envelope(np.maximum(0.0, near - spans[1]), near + spans[0], near, field.labelled, found)
        return found


def _shared(count: int, work: Callable[[Array], Found]) -> list[tuple[Array, Found]]:
    """What `work` does of so many things, given the indices of some of them: a part for each core."""
    cores = get_num_threads()
    parts = [np.arange(first, count, cores) for first in range(min(cores, count))]
    with ThreadPoolExecutor(cores) as pool:
        return list(zip(parts, pool.map(work, parts), strict=True))


def _in_order(array: Array, dtype: type) -> Array:
    """The array as numba has its functions compiled for; for each other layout or type it would do so anew."""
    return np.ascontiguousarray(array, dtype)


def _joined(parts: list[_Bounded], slope: float) -> _Bounded:
    chains = np.concatenate([np.empty((0, _PLACES), np.int16), *(part.chains for part in parts)])
    return _Bounded(chains, np.concatenate([np.empty(0), *(part.least for part in parts)]), slope)
