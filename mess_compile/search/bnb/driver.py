"""Branch and bound over the plans with up to three early heads, for spaces too large to enumerate: the proved optimum.

Plans are grouped by their heads. Every chain of heads gets a lower bound on the price of its best plan; the chains that
may still hold the optimum are expanded, that is evaluated plan by plan, the most promising first, until none is left.
This is done for one early head, for two, and for three: the best plan with fewer is the incumbent for more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numba import get_num_threads

from mess_compile.array_types import Array
from mess_compile.network import is_whole
from mess_compile.search.bnb import bounds, kernels
from mess_compile.search.bnb.arrays import PLACES, Problem, Whole, problem_of
from mess_compile.search.bnb.bounds import Bounds, in_order, joined, shared
from mess_compile.search.bnb.incumbent import BestPlan, BoundedChains, Incumbent
from mess_compile.search.bnb.kernels.values import ChainBatch, Cutoff
from mess_compile.search.context import SearchContext
from mess_compile.search.deadline import Clock, TimeIsUp, check_time, ended_by_interrupt
from mess_compile.search.metrics import Evidence

_NEIGHBOURS, _SECONDS = 8, 8


@dataclass(frozen=True)
class Proof:
    """How the optimum was found: chains of heads `pruned` by their bounds, or `expanded`, and the plans `evaluated`.

    `gap` is what a better plan could still gain in the objective (a mean over images, pp, or bytes); infinite when none
    was found, and not all chains were examined.
    """

    pruned: int
    expanded: int
    evaluated: int
    gap: float


def branch_and_bound(evidence: Evidence, context: SearchContext) -> tuple[BestPlan | None, Proof]:
    """The best plan, or the best when the context's clock was up; None when none satisfies the requirement.

    Without a clock Ctrl-C raises KeyboardInterrupt.
    """
    driver = _Driver(problem_of(evidence, context.requirement), context.clock)
    with suppress(TimeIsUp), ended_by_interrupt(context.clock):
        driver.run(context)
    return driver.incumbent.best, driver.proof()


class _Driver:
    def __init__(self, problem: Problem, clock: Clock | None) -> None:
        self._problem, self._clock = problem, clock
        self.incumbent = Incumbent(problem)
        self._bounds = Bounds(problem, self.incumbent, clock)
        self._open: list[BoundedChains] = []
        self._tried = np.empty((0, PLACES), np.int64)  # chains that were expanded before all had bounds
        self._unknown = True  # until every group of plans has its bound
        self._pruned = self._expanded = self._evaluated = 0

    def run(self, context: SearchContext) -> None:
        early_exits = context.requirement.early_exits
        self._evaluate_single_exits()
        if early_exits >= 1:
            bounded = self._bounds.of_pairs().from_cheapest()
            self._open, self._unknown = [bounded], early_exits > 1
            self._expand_best_first(bounded)
        groups = {exits: list(self._groups(exits)) for exits in range(3, early_exits + 2)}
        done, total = 0, sum(map(len, groups.values())) + 1
        for exits, some in groups.items():
            self._try(self._neighbours(bounded, exits), tuned=exits == 3)
            left = []
            for points, seconds in some:
                left.append(self._bounded_group(points, seconds))
                done += 1
                context.progress(done, total)
            bounded = joined(left, self._bounds.slope).from_cheapest()
            self._open, self._unknown = [bounded], exits <= early_exits
            self._expand_best_first(bounded)
        self._unknown = False

    def _groups(self, exits: int) -> Iterator[tuple[tuple[int, ...], Array]]:
        """Exit points of chains, and second heads there, a few at a time."""
        every = sorted(set(self._problem.points.tolist()))
        for points in itertools.combinations(every, exits):
            seconds = np.flatnonzero(self._problem.points == points[1])
            step = _SECONDS if exits == 3 else get_num_threads()
            for start in range(0, len(seconds), step):
                yield points, seconds[start : start + step]

    def _bounded_group(self, points: tuple[int, ...], seconds: Array) -> BoundedChains:
        """The chains of a group that may have a better plan, but for those that were tried."""
        bounded = self._bounds.of_group(points, seconds)
        place = (self._problem.no_head + 1) ** np.arange(PLACES)
        tried = np.isin(bounded.chains.astype(np.int64) @ place, self._tried @ place)
        left = self.incumbent.may_lose_to(bounded) & ~tried
        self._pruned += int((~left & ~tried).sum())
        return bounded.select(left)

    def proof(self) -> Proof:
        return Proof(self._pruned, self._expanded, self._evaluated, self._gap())

    def _gap(self) -> float:
        """What a better plan could still gain in the objective, as a mean over images, in pp or in bytes; infinite when
        there is no plan yet, and there may be one."""
        best, problem, least_charged = self.incumbent.best, self._problem, self.incumbent.min_charged
        if best is None:
            return np.inf if self._unknown or self._open else 0.0
        if problem.by_memory:
            sizes = [problem.memory(each.chains[self.incumbent.may_lose_to(each)]) for each in self._open]
            smallest = 0 if self._unknown else min(size.min(initial=best.goal) for size in (*sizes, np.empty(0)))
            return float(best.goal - smallest)
        if problem.constraints.objective < 0:
            most = self.incumbent.max_price
            gains = [((most - each.price(least_charged)) / each.slope).max(initial=0.0) for each in self._open]
            return float(100.0 - best.miou if self._unknown else max(gains, default=0.0))
        least = [each.price(least_charged).min(initial=best.goal) for each in self._open]
        reached = problem.least_paid() if self._unknown else min(least, default=best.goal)
        return float((best.goal - max(reached, problem.least_paid())) / problem.images / problem.unit)

    # plans with one exit

    def _evaluate_single_exits(self) -> None:
        """The plans with one exit and the whole networks, which every other plan has to beat; and a first slope."""
        problem, constraints, heads = self._problem, self._problem.constraints, np.arange(self._problem.no_head)
        costs = np.stack([path.start + path.step[0] + path.leave for path in problem.paths])  # (q, heads)
        runs = np.array([path.step[0] >= 0 for path in problem.paths]).all(axis=0)
        mious = np.array([kernels.mean_iou(totals, problem.table.labelled) for totals in problem.table.totals])
        within = (costs * problem.images <= constraints.bounds[:, None]).all(axis=0)
        within &= problem.table.changed.sum(axis=1) <= constraints.most_changed
        labelled, least_iou = problem.table.labelled, constraints.least_iou
        within &= [kernels.keeps_classes(totals, labelled, least_iou) for totals in problem.table.totals]
        feasible = runs & within & (costs[0] <= constraints.percentile[1]) & (mious >= constraints.floor)
        for head in heads[feasible]:
            goal = self._goal(problem.chains(heads[[head]])[0], self._summed(costs[:, head]))
            self.incumbent.offer(BestPlan(goal, float(mious[head]), (problem.names[head],), ()))
        self._evaluated += int(runs.sum())
        for whole in problem.wholes:
            self._evaluate_whole(whole)
        charged = mious - problem.table.charge_totals
        spread = max(0.1, float(charged.max() - np.median(charged)))
        paid = float(costs[problem.priced, runs].mean()) * problem.images if problem.weight * runs.any() else 0.0
        self._bounds.slope = paid / spread if problem.weight * runs.any() else 1.0

    def _evaluate_whole(self, whole: Whole) -> None:
        constraints, costs = self._problem.constraints, np.array(whole.costs)
        self._evaluated += 1
        within = (costs * self._problem.images <= constraints.bounds).all()
        within &= whole.changed <= constraints.most_changed
        within &= bool((whole.class_iou >= constraints.least_iou).all())
        if within and costs[0] <= constraints.percentile[1] and whole.miou >= constraints.floor:
            goal = whole.memory if self._problem.by_memory else self._summed(costs)
            self.incumbent.offer(BestPlan(goal, whole.miou, (whole.name,), ()))

    def _summed(self, costs: Array) -> int:
        """The objective summed over images that all cost `costs` (q,); 0 where it is none of these."""
        objective = self._problem.constraints.objective
        return int(costs[objective]) * self._problem.images if objective >= 0 else 0

    def _goal(self, chain: Array, summed: int) -> int:
        return int(self._problem.memory(chain[None])[0]) if self._problem.by_memory else summed

    # chains of heads

    def _expand_best_first(self, bounded: BoundedChains) -> None:
        """Expand what its bound leaves, the most promising (or smallest) first, until nothing left can be better."""
        rest = bounded
        if self._problem.by_memory:
            rest = rest.select(np.argsort(self._problem.memory(rest.chains), kind="stable"))
        while len(rest.least):
            self._open = [rest]
            check_time(self._clock)
            some = rest.select(slice(bounds.BATCH))
            some = some.select(self.incumbent.may_lose_to(some))
            if not len(some.least) and not self.incumbent.may_lose_to(rest).any():
                break
            chains = self._problem.allowed_of(some.chains)
            if len(chains):
                self._expand(chains)
            self._pruned += min(bounds.BATCH, len(rest.least)) - len(chains)
            rest = rest.select(slice(bounds.BATCH, None))
        self._pruned += len(rest.least)
        self._open = []

    def _expand(self, chains: Array) -> None:
        """Evaluate the plans of chains (m, 4) that may be better, and offer the best of each to the incumbent."""
        problem, chains = self._problem, in_order(chains, np.int64)
        each = [problem.costs(q, *chains.T).T for q in range(len(problem.paths))]
        costs = in_order(np.stack(each, axis=1), np.int64)  # (m, q, 4)
        prices = in_order(problem.weight * costs[:, problem.priced], np.float64)
        floor = max(problem.constraints.floor, self.incumbent.min_miou)
        constraints, slope = problem.constraints._replace(floor=floor), self._bounds.slope
        cutoff = Cutoff(slope, self.incumbent.ceiling(slope))

        def evaluate(part: Array) -> tuple[Array, Array]:
            batch = ChainBatch(chains[part], prices[part], costs[part])
            found: tuple[Array, Array] = kernels.evaluate_chains(batch, cutoff, constraints, problem.table)
            return found

        for part, (found, evaluated) in shared(len(chains), evaluate):
            self._evaluated += int(evaluated.sum())
            for chain, one in zip(chains[part], found, strict=True):
                if one[2] >= 0:
                    self.incumbent.offer(self._plan(chain, one))
        self._expanded += len(chains)

    def _plan(self, chain: Array, found: Array) -> BestPlan:
        options = found[2:].astype(int).reshape(-1, 2).tolist()
        early = [(h, option) for h, option in zip(chain[:-1], options, strict=True) if h != self._problem.no_head]
        decisions = tuple((row, self._problem.cuts[h][row][cut]) for h, (row, cut) in early)
        goal = self._goal(chain, int(found[0]))
        return BestPlan(goal, float(found[1]), self._problem.names_of(chain), decisions)

    def _neighbours(self, bounded: BoundedChains, exits: int) -> Array:
        """Chains (m, 4) of so many exits that hold a promising one, or that of the best plan, and a head more."""
        points, found = np.append(self._problem.points, 0), [np.empty((0, PLACES), np.int64)]
        best = self.incumbent.best.heads if self.incumbent.best else ()
        own = [self._problem.index(head) for head in best if not is_whole(head)]
        first = [np.array([self._problem.no_head] * (PLACES - len(own)) + own)] if len(own) == exits - 1 else []
        for chain in (*first, *bounded.chains[: bounds.BATCH]):
            more = np.flatnonzero((points[:-1] < points[chain[-1]]) & ~np.isin(points[:-1], points[chain]))
            for head in more[:: len(more) // _NEIGHBOURS + 1]:
                longer = np.array([*chain[1:], head], np.int64)
                found.append(longer[np.argsort(points[longer], kind="stable")][None])
        return self._bounds.existing(np.unique(np.concatenate(found), axis=0))

    def _try(self, chains: Array, tuned: bool) -> None:
        """Expand the most promising of some chains, for a good incumbent: `tuned`, at the slope that suits them.

        The slope that suits three early exits cannot be found by their bounds, which are less tight.
        """
        check_time(self._clock)
        best = (
            self._bounds.tune(chains, (2.0, 1.4, 1.2, 1.1))
            if tuned
            else chains[np.argsort(self._bounds.of_chains(chains))]
        )
        self._tried = self._problem.allowed_of(best[: bounds.BATCH])
        check_time(self._clock)
        self._expand(self._tried)
