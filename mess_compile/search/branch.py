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
from numpy.typing import NDArray

from mess_compile.candidates import head_graph_name, output_name, segment_name
from mess_compile.latency import DOWNLOAD, NULL, UPLOAD, Quantity, graph_cost_ns
from mess_compile.search import kernels
from mess_compile.search.clock import Clock
from mess_compile.search.figures import Evidence, exit_costs_ns, memory_bytes, plan_graphs
from mess_compile.search.memory import memory_of_chains
from mess_compile.search.requirement import Limit, Requirement
from mess_compile.search.space import CUTS, cut_grid

Array = NDArray[Any]
Progress = Callable[[int, int], None]
UNBOUNDED = np.iinfo(np.int64).max
_TOLERANCE = 1e-9
_TUNED, _NEAR, _PAIRS, _SECONDS, _SETTLED = 2048, 8, 512, 8, 64


@dataclass(frozen=True, eq=False)
class PathCosts:
    """What an image pays, in integers: `start`, then `step[p, h]` from exit point p (0: the image) to head h and
    through it, `decide` after each early head, and `leave[p]` at exit point p. Below 0 is a step that the target cannot
    take."""

    start: int
    step: Array
    decide: int
    leave: Array

    def of_exits(self, points: Array, h1: Array, h2: Array, h3: Array) -> Array:
        """(3, ...): what an image costs that leaves at each of three heads, -1 where the target lacks a graph.

        A second head one beyond the last stands for none, at the cost of the third.
        """
        none = h2 == len(points)
        p1, p2, p3 = points[h1], np.append(points, 0)[h2], points[h3]
        before = np.where(none, p1, p2)
        one, two, three = self.step[0, h1], self.step[p1, np.where(none, h3, h2)], self.step[before, h3]
        first = self.start + one + self.decide
        second = first + np.where(none, 0, two + self.decide)
        last = second + three + self.leave[p3]
        found = np.stack(
            np.broadcast_arrays(first + self.leave[p1], np.where(none, last, second + self.leave[before]), last)
        )
        return np.where((one < 0) | (two < 0) | (three < 0), -1, found)


@dataclass(frozen=True, eq=False)
class Problem:
    """A search in arrays: heads by index, their exit `points` (from 1), and per head and row the `grid` of cuts.

    `paths` are the quantities that `wanted` counts, the first the latency. `allowed` says of a plan's heads whether
    they keep the bounds that no threshold moves, `graphs` counts their graphs, `names` are theirs. `memory` is what
    chains (m, 3) of heads take in bytes, `most_memory` what they may, and `by_memory` whether it is the objective. One
    `unit` of any other (ms, GMACs, mJ) is so many of the integers.
    """

    names: tuple[str, ...]
    points: Array
    field: kernels.Field
    grid: tuple[tuple[tuple[int, ...], ...], ...]
    paths: tuple[PathCosts, ...]
    wanted: kernels.Wanted
    allowed: Callable[[tuple[str, ...]], bool]
    graphs: Callable[[tuple[str, ...]], int]
    memory: Callable[[Array], Array]
    most_memory: int
    by_memory: bool
    unit: float


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


def problem_of(evidence: Evidence, requirement: Requirement) -> Problem:
    """The arrays of a search. Its bounds are in the integers that the search counts in, summed over images."""
    statistics, images = evidence.statistics, evidence.statistics.images
    names = tuple(head.name for head in evidence.heads)
    points = np.array([head.exit_point for head in evidence.heads])
    labelled = statistics.labelled.sum(axis=0)
    present = np.flatnonzero(labelled)
    heads = [statistics.head_index(name) for name in names]
    scores = np.empty((len(heads), images, 2 * len(present)), np.int32)
    for score, head in zip(scores, heads, strict=True):
        right = statistics.intersection[:, head, present]
        score[:] = np.concatenate([right, statistics.predicted[:, head, present] - right], axis=1)
    levels, cuts, ranks, grid = _thresholds(evidence, names)
    field = kernels.Field(
        scores=scores,
        totals=scores.sum(axis=1, dtype=np.float64),
        spans=kernels.differences(scores, points[:, None] < points[None, :]),
        levels=levels,
        cuts=cuts,
        ranks=ranks,
        labelled=labelled[present].astype(np.float64),
    )
    paths = {"latency": _times(evidence, "mean_ms"), "workload": _workloads(evidence)}
    baseline = evidence.baseline_cost_ns()
    bounds = [
        _summed(requirement.max_latency, baseline, 1e6, images),
        _summed(requirement.max_workload, evidence.candidate.baseline_macs, 1e9, images),
    ]
    if requirement.needs_energy:
        paths["energy"] = _times(evidence, "energy_mj")
        bounds.append(_summed(requirement.max_energy, evidence.baseline_cost_ns("energy_mj"), 1e6, images))
    floor = -np.inf
    if requirement.max_err_pp is not None:
        floor = requirement.counts_from(evidence.baseline_miou(evidence.baseline)) - requirement.max_err_pp
    objective = requirement.objective or "latency"
    wanted = kernels.Wanted(
        bounds=np.array(bounds, np.int64),
        percentile=np.array([95, _summed(requirement.max_latency_p95, baseline, 1e6, 1)], np.int64),
        floor=floor,
        objective=list(paths).index(objective) if objective in paths else -1,
    )
    return Problem(
        names,
        points,
        field,
        grid,
        tuple(paths.values()),
        wanted,
        lambda chain: _is_allowed(evidence, requirement, chain),
        lambda chain: len(plan_graphs(evidence.candidate, chain)),
        memory_of_chains(evidence),
        UNBOUNDED if requirement.max_memory_bytes is None else requirement.max_memory_bytes,
        objective == "memory",
        1e9 if objective == "workload" else 1e6,
    )


def _summed(limit: Limit | None, baseline: int, unit: float, images: int) -> int:
    return UNBOUNDED if limit is None else min(limit.resolved(baseline, unit) * images, UNBOUNDED)


def _is_allowed(evidence: Evidence, requirement: Requirement, heads: tuple[str, ...]) -> bool:
    most = requirement.max_memory_bytes
    if most is not None and memory_bytes(evidence.graph_set, heads) > most:
        return False
    if requirement.max_latency_worst is None:
        return True
    limit = requirement.max_latency_worst.resolved(evidence.baseline_cost_ns("p99_ms"), 1e6)
    return exit_costs_ns(evidence, "input-dependent", heads, "p99_ms")[-1] <= limit


def _times(evidence: Evidence, quantity: Quantity) -> PathCosts:
    table, graph_set, candidate = evidence.table, evidence.graph_set, evidence.candidate
    points = len(candidate.exit_points)
    outputs = {point: output_name(candidate.exit_point(point).hw) for point in range(1, points + 1)}

    def cost(*graphs: str) -> int:
        return sum(graph_cost_ns(table, graph_set, graph, quantity) for graph in graphs)

    step = np.full((points, len(evidence.heads)), -1, np.int64)
    for (point, column), _ in np.ndenumerate(step):
        head = evidence.heads[column]
        graphs = (segment_name(point, head.exit_point), head_graph_name(head.name))
        if point < head.exit_point and evidence.runs((*graphs, outputs[head.exit_point])):
            step[point, column] = cost(*graphs)
    download = table.cost_ns(DOWNLOAD, quantity=quantity)
    leave = [0] + [cost(name) + download if evidence.runs([name]) else 0 for name in outputs.values()]
    start, decide = (table.cost_ns(pseudo, quantity=quantity) for pseudo in (UPLOAD, NULL))
    return PathCosts(start, step, decide, np.array(leave, np.int64))


def _workloads(evidence: Evidence) -> PathCosts:
    candidate = evidence.candidate
    points = range(len(candidate.exit_points))
    step = [
        [candidate.segment_macs(p, h.exit_point) + h.macs if p < h.exit_point else -1 for h in evidence.heads]
        for p in points
    ]
    return PathCosts(0, np.array(step, np.int64), 0, np.zeros(len(points) + 1, np.int64))


def _thresholds(evidence: Evidence, heads: tuple[str, ...]) -> tuple[Array, Array, Array, Any]:
    """Levels, cuts and ranks as in `kernels.Field`, and the grid of cuts by head and row."""
    statistics = evidence.statistics
    rows = statistics.counts.shape[2]
    levels = np.zeros((len(heads) + 1, rows, statistics.images), np.uint8)
    cuts = np.zeros((len(heads) + 1, rows), np.int64)
    cuts[-1, 0] = 1  # the head that is none: one cut, which no image passes
    ranks = np.zeros((len(heads) + 1, rows, CUTS + 1), np.int64)
    by_text = sorted(range(rows), key=str)
    grid = []
    for h, head in enumerate(heads):
        counts = np.asarray(statistics.counts[:, statistics.head_index(head)])  # (n, rows)
        grid.append(tuple(cut_grid(counts[:, row]) for row in range(rows)))
        texts = sorted({str(cut) for found in grid[-1] for cut in found})
        for row, found in enumerate(grid[-1]):
            levels[h, row] = np.searchsorted(found, counts[:, row], side="right")
            cuts[h, row] = len(found)
            ranks[h, row, : len(found) + 1] = [by_text.index(row), *(texts.index(str(cut)) for cut in found)]
    return levels, cuts, ranks, tuple(grid)


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
        triples = triples[self._costs(0, *triples.T)[0] >= 0]
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
        triples = triples[self._costs(0, *triples.T)[0] >= 0]
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
