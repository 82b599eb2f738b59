"""Branch and bound finds the plan that enumeration finds, and the gap of a search that was ended is true."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mess_compile.latency.table import GraphFailure
from mess_compile.runtime.base.errors import InputError, RequirementError
from mess_compile.search import solver
from mess_compile.search.bnb import bounds, kernels
from mess_compile.search.bnb.arrays import Problem, problem_of
from mess_compile.search.bnb.kernels.values import Cutoff, PairGroup, Relaxation, TripleGroup
from mess_compile.search.bnb.search import bounded_search
from mess_compile.search.context import SearchContext, SearchProgress, no_progress
from mess_compile.search.deadline import Clock, UnfinishedError
from mess_compile.search.metrics import Evidence, figures_of_stages
from mess_compile.search.plan import Plan, SearchResult
from mess_compile.search.requirement import Limit, Requirement
from tests.search.brute_force import BrutePlan, all_plans, graphs_of_plan
from tests.search.cases import against_own_output, evidence
from tests.search.test_solver import (
    OBJECTIVES,
    UNITS,
    VALUES,
    brute_identity,
    cases,
    identity,
    key,
    requirement_about,
    satisfies,
)

CHANGES = st.sets(st.sampled_from(["few costs", "cheap below", "failed", "absent class", "undecided", "alike"]))
RELAXED = list(HealthCheck)
PARTS = 10
"""Of tests of thousands of cases: a fifth of the slow tests takes a fifth of the cases. Each part draws its own."""


def searched(
    case: Evidence, requirement: Requirement, clock: Clock | None = None, progress: SearchProgress = no_progress
) -> SearchResult:
    return bounded_search(case, SearchContext(requirement, progress=progress, clock=clock))


@dataclasses.dataclass(frozen=True)
class Hard:
    """A case, and the same case `whole`, before graphs of it failed."""

    case: Evidence
    whole: Evidence

    def plans(self, max_exits: int) -> list[BrutePlan]:
        there = {name for name, _ in self.case.table.entries}
        every = all_plans(self.whole, "input-dependent", max_exits)
        return [plan for plan in every if graphs_of_plan(self.whole, plan) <= there]


@st.composite
def hard_cases(draw: st.DrawFn, drawn: st.SearchStrategy[Evidence]) -> Hard:
    """Random cases with what is difficult for a search: ties, deeper exits that cost less, graphs that failed."""
    case, changes = draw(drawn), draw(CHANGES)
    if "few costs" in changes:
        case = with_costs(case, {name: 0.001 + len(name) % 2 / 1000 for name, _ in case.table.entries})
    if "cheap below" in changes:
        case = with_costs(case, {"output-2x3": 1.0})
    arrays = {
        name: getattr(case.statistics, name).copy() for name in ("intersection", "predicted", "labelled", "counts")
    }
    if "absent class" in changes:
        arrays["intersection"][..., 1] = arrays["labelled"][..., 1] = 0
    if "undecided" in changes:
        arrays["counts"][:, draw(st.integers(0, arrays["counts"].shape[1] - 1))] = 3
    if "alike" in changes:
        arrays["counts"] = np.minimum(arrays["counts"], 3)
        arrays["intersection"] = np.minimum(arrays["intersection"], 1)
    case = dataclasses.replace(case, statistics=dataclasses.replace(case.statistics, **arrays))
    if "failed" not in changes:
        return Hard(case, case)
    names = sorted(name for name in case.graph_set.graphs if name.startswith(("segment", "head")))
    return Hard(without_graphs(case, draw(st.sets(st.sampled_from(names), min_size=1, max_size=3))), case)


def with_costs(case: Evidence, mean_ms: dict[str, float]) -> Evidence:
    entries = {
        key: dataclasses.replace(entry, mean_ms=mean_ms.get(key[0], entry.mean_ms))
        for key, entry in case.table.entries.items()
    }
    return dataclasses.replace(case, table=dataclasses.replace(case.table, entries=entries))


def without_graphs(case: Evidence, names: set[str]) -> Evidence:
    entries = {key: entry for key, entry in case.table.entries.items() if key[0] not in names}
    failed = {key: GraphFailure(key[0], entry.sha256, "fp32", "no") for key, entry in case.table.entries.items()}
    failed = {key: failure for key, failure in failed.items() if key not in entries}
    return dataclasses.replace(case, table=dataclasses.replace(case.table, entries=entries, failed=failed))


def check_against_every_plan(hard: Hard, data: st.DataObject, most_exits: int = 2) -> None:
    case, plans = hard.case, hard.plans(most_exits)
    if all(plan.heads[0].startswith("baseline") for plan in plans):
        found = solver.search(case, Requirement(max_exits=3)).plan
        assert identity(found) == brute_identity(min(plans, key=lambda plan: key(plan, "latency")))
        return
    longest = [plan for plan in plans if len(plan.heads) == most_exits + 1] or plans
    bounding = data.draw(st.sampled_from(data.draw(st.sampled_from([longest, plans]))))
    requirement = requirement_about(bounding, hard.whole, "input-dependent", data, most_exits)
    plans = [plan for plan in plans if len(plan.heads) <= requirement.max_exits + 1]
    feasible = [plan for plan in plans if satisfies(plan, requirement, hard.whole)]
    if not feasible:
        with pytest.raises(RequirementError, match="no plan satisfies"):
            searched(case, requirement)
        return
    best = min(feasible, key=lambda plan: key(plan, requirement.objective or "latency"))
    result = searched(case, requirement)
    assert identity(result.plan) == brute_identity(best)
    assert (result.plan.predicted.miou, result.plan.predicted.latency_ms) == (
        best.miou,
        best.cost_ns / case.statistics.images / 1e6,
    )
    proof = result.certificate
    assert (proof.gap, proof.space, proof.evaluated + proof.bounded) == (0.0, len(plans), len(plans))
    assert 0 < proof.evaluated <= proof.space
    on_front = dataclasses.replace(requirement, max_err_pp=None, max_latency=None)
    among = [plan for plan in plans if satisfies(plan, on_front, hard.whole)]
    assert_front(result.front, among)


def assert_front(front: tuple[Plan, ...], among: list[BrutePlan]) -> None:
    """Each plan is the first of its equals, none of `among` dominates it, and both ends of the front are there."""
    for plan in front:
        equal = next(each for each in among if brute_identity(each) == identity(plan))
        beating = [each for each in among if each.cost_ns <= equal.cost_ns and each.miou >= equal.miou]
        assert min(beating, key=lambda each: key(each, "latency")) is equal
    assert front[0].predicted.latency_ms == min(p.predicted.latency_ms for p in front)
    assert brute_identity(min(among, key=lambda each: key(each, "latency"))) == identity(front[0])
    assert max(each.miou for each in among) == front[-1].predicted.miou


@settings(max_examples=40, deadline=None, suppress_health_check=RELAXED)
@given(hard_cases(cases()), st.data())
def test_the_plan_and_the_front_are_those_of_all_plans(hard: Hard, data: st.DataObject) -> None:
    check_against_every_plan(hard, data)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@settings(max_examples=3000 // PARTS, deadline=None, suppress_health_check=RELAXED)
@given(hard=hard_cases(cases(most_heads=3, most_images=12)), data=st.data())
def test_thousands_of_larger_cases(part: int, hard: Hard, data: st.DataObject) -> None:
    check_against_every_plan(hard, data)


@st.composite
def deep_cases(draw: st.DrawFn) -> Evidence:
    """Cases of four or five exit points, with few cuts: the plans with three early exits can still be enumerated."""
    heads = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2), (1, 1, 1, 1), (1, 2, 1, 1)]))
    rows, images = draw(st.integers(1, 2)), draw(st.integers(3, 9))
    more = draw(st.integers(0, rows - 1))
    seed, distinct = draw(st.integers(0, 10**6)), draw(st.integers(2, 4))
    case = evidence(heads, rows, images, seed, distinct, draw(st.booleans()), more)
    return against_own_output(case) if draw(st.booleans()) else case


def check_three_early_exits(hard: Hard, data: st.DataObject) -> None:
    """Few chains are expanded before all have bounds, so that the bounds decide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "BATCH", data.draw(st.sampled_from([1, 1, 2, 64])))
        check_against_every_plan(hard, data, most_exits=3)


@settings(max_examples=25, deadline=None, suppress_health_check=RELAXED)
@given(hard_cases(deep_cases()), st.data())
def test_three_early_exits_are_proved_as_two_are(hard: Hard, data: st.DataObject) -> None:
    check_three_early_exits(hard, data)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@settings(max_examples=1500 // PARTS, deadline=None, suppress_health_check=RELAXED)
@given(hard=hard_cases(deep_cases()), data=st.data())
def test_a_thousand_cases_of_three_early_exits(part: int, hard: Hard, data: st.DataObject) -> None:
    check_three_early_exits(hard, data)


def test_a_deeper_exit_that_costs_less_is_not_pruned() -> None:
    case = with_costs(evidence((1, 1, 1), 1, images=6, seed=168, distinct=4), {"output-2x3": 1.0})
    plans = list(all_plans(case, "input-dependent", 3))
    best = max(plans, key=lambda plan: plan.miou)
    limit = Limit((best.cost_ns // 6 + 1) / 1e6)
    found = searched(case, Requirement(objective="accuracy", max_exits=3, max_latency=limit))
    assert (len(best.heads), found.plan.predicted.miou) == (4, best.miou)


class Ended(Clock):
    """A clock that is up at the given check."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._left = at

    @property
    def up(self) -> bool:
        self._left -= 1
        return self._left < 0


class Interrupted:
    """Ctrl-C in the `call`-th call of a function."""

    def __init__(self, function: Callable[..., object], call: int) -> None:
        self._function, self._left = function, itertools.count(call, -1)

    def __call__(self, *arguments: object) -> object:
        if next(self._left) == 0:
            raise KeyboardInterrupt
        return self._function(*arguments)


def ended(case: Evidence, requirement: Requirement, by_hand: bool, at: int) -> SearchResult | None:
    """The result of a search that the clock or Ctrl-C ends at a step of it; None when it had found nothing by then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "BATCH", 2)
        if by_hand:
            patch.setattr(kernels, "evaluate_chains", Interrupted(kernels.evaluate_chains, at))
        try:
            return searched(case, requirement, Clock() if by_hand else Ended(at))
        except UnfinishedError:
            return None


@settings(max_examples=40, deadline=None, suppress_health_check=RELAXED)
@given(
    cases(),
    st.booleans(),
    st.integers(0, 12),
    st.sampled_from(sorted(VALUES)),
    st.booleans(),
    st.integers(2, 3),
    st.data(),
)
def test_the_gap_of_an_ended_search_covers_every_better_plan(
    case: Evidence, by_hand: bool, at: int, objective: str, bounded: bool, most_exits: int, data: st.DataObject
) -> None:
    plans = list(all_plans(case, "input-dependent", most_exits))
    bounding = data.draw(st.sampled_from(plans))
    n = case.statistics.images
    requirement = Requirement(
        objective=objective,
        max_err_pp=0.0 if bounded else None,
        baseline_miou=bounding.miou if bounded else None,
        max_latency=Limit((bounding.cost_ns // n + 1) / 1e6) if data.draw(st.booleans()) else None,
        max_exits=most_exits,
    )
    feasible = [plan for plan in plans if satisfies(plan, requirement, case)]
    result = ended(case, requirement, by_hand, at)
    if result is None:
        return
    best = min(OBJECTIVES[objective](plan) for plan in feasible)
    best = best / n / UNITS[objective] if objective in UNITS else best
    assert brute_identity_in(identity(result.plan), feasible)
    assert result.certificate.gap >= VALUES[objective](result.plan) - best - 1e-12
    assert result.certificate.gap < np.inf
    for plan in result.front:
        latency, miou = plan.predicted.latency_ms, plan.predicted.miou
        among = [each for each in plans if each.cost_ns / n / 1e6 <= latency and each.miou >= miou]
        assert all((each.cost_ns / n / 1e6, each.miou) == (latency, miou) for each in among)


def brute_identity_in(found: object, plans: list[BrutePlan]) -> bool:
    return any(brute_identity(plan) == found for plan in plans)


@pytest.mark.parametrize("call", range(4))
def test_ctrl_c_between_two_chains_of_exit_points_gives_the_best_so_far(call: int) -> None:
    case = evidence((2, 2, 2), 3, images=9, seed=call)
    calls = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if done == call:
            raise KeyboardInterrupt

    result = searched(case, Requirement(objective="accuracy"), Clock(), progress)
    best = max(plan.miou for plan in all_plans(case, "input-dependent", 2))
    assert calls == list(range(1, call + 1)) if call else len(calls) == 4
    assert (result.certificate.gap > 0) == (call > 0)
    assert result.plan.predicted.miou + result.certificate.gap >= best


def test_a_search_without_end_and_one_with_time_enough_agree() -> None:
    case = evidence((2, 2, 2), 3, images=9, seed=1)
    assert searched(case, Requirement(), Clock(3600)) == searched(case, Requirement())


def test_a_large_space_is_searched_by_its_bounds_and_has_no_front_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case = evidence((1, 2), 2, images=6, seed=4)
    enumerated = solver.search(case, Requirement())
    monkeypatch.setattr(solver, "needs_branch_and_bound", lambda case, early_exits: True)
    result = solver.search(case, Requirement())
    assert result.plan == enumerated.plan
    assert (enumerated.certificate.exhaustive, result.certificate.exhaustive) == (True, False)
    with pytest.raises(InputError, match="leave --front out"):
        solver.search(case, Requirement(), front_by=("latency", "miou", "memory"))


def test_a_bound_beyond_all_numbers_bounds_nothing() -> None:
    case = evidence((1, 2), 2, images=6, seed=4)
    free, bounded = Requirement(), Requirement(max_latency=Limit(1e15))
    assert searched(case, free).plan == searched(case, bounded).plan


def test_a_refusal_names_every_bound_and_what_could_be_reached() -> None:
    case = evidence((1, 2), 2, images=6, seed=2)
    best = max(plan.miou for plan in all_plans(case, "input-dependent", 2))
    hopeless = Limit(1e-6)
    with pytest.raises(RequirementError, match=r"no plan satisfies mIoU >= 101 % and latency <= 1e-06 ms$"):
        searched(case, Requirement(max_err_pp=0.0, baseline_miou=101, max_latency=hopeless))
    with pytest.raises(RequirementError, match=r"no plan satisfies p95 latency <= 1e-06 ms and memory <= 1 MiB$"):
        searched(case, Requirement(max_latency_p95=hopeless, max_memory_bytes=1 << 20))
    smallest = min(plan.memory for plan in all_plans(case, "input-dependent", 2)) / (1 << 20)
    with pytest.raises(RequirementError, match=f"<= 9.537e-07 MiB; best reachable: memory {smallest:.4g} MiB$"):
        searched(case, Requirement(max_memory_bytes=1))
    with pytest.raises(RequirementError, match=f"best reachable: mIoU {best:.4g} %$"):
        searched(case, Requirement(max_err_pp=0.0, baseline_miou=100))


def test_more_than_32_cuts_are_those_of_the_stated_grid() -> None:
    case = evidence((1,), 1, images=80, seed=3, distinct=300)
    best = min(all_plans(case, "input-dependent", 1), key=lambda plan: key(plan, "accuracy"))
    assert identity(searched(case, Requirement(objective="accuracy")).plan) == brute_identity(best)


BOXES = st.integers(1, 4).flatmap(
    lambda classes: st.tuples(
        st.lists(st.integers(1, 50), min_size=classes, max_size=classes),  # labelled
        st.lists(st.integers(0, 40), min_size=2 * classes, max_size=2 * classes),  # low
        st.lists(st.integers(0, 40), min_size=2 * classes, max_size=2 * classes),  # high less low
        st.lists(st.floats(0, 1), min_size=2 * classes, max_size=2 * classes),  # where in the box
        st.one_of(st.none(), st.lists(st.floats(-9, 9), min_size=2 * classes, max_size=2 * classes)),  # coefficients
    )
)


@settings(max_examples=300, deadline=None)
@given(BOXES, st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_no_plan_in_a_box_has_more_miou_than_its_bound(box: tuple[list[float], ...], near: list[float]) -> None:
    """A bound below the mIoU of some plan would prune that plan wrongly."""
    labelled, low, more = (np.array(each, np.float64) for each in box[:3])
    high, point = low + more, low + more * np.array(box[3])
    coefficients = np.empty_like(low)
    if box[4] is None:
        kernels.envelope(low, high, low + more * np.array(near[: len(low)]), labelled, coefficients)
    else:
        coefficients[:] = box[4]
    slack = kernels.remainder(low, high, labelled, coefficients)
    classes = len(labelled)
    most = 0.0
    for k in range(classes):
        corners = [
            100 / classes * right / (labelled[k] + wrong) - coefficients[k] * right - coefficients[classes + k] * wrong
            for right in (low[k], high[k])
            for wrong in (low[classes + k], high[classes + k])
        ]
        most += max(corners)
    assert slack == pytest.approx(most, abs=1e-6)
    miou = 100 / classes * sum(point[k] / (labelled[k] + point[classes + k]) for k in range(classes))
    assert miou <= coefficients @ point + slack + 1e-6


@dataclasses.dataclass(frozen=True)
class Chain:
    """Heads of a case, and the least of price - slope * mIoU, found plan by plan."""

    case: Evidence
    problem: Problem
    heads: tuple[int, ...]

    def true_least(self, prices: np.ndarray, slope: float) -> float:
        statistics, least = self.case.statistics, np.inf
        labelled = statistics.labelled.sum(axis=0)
        present = labelled > 0
        options = [
            [(row, cut) for row, cuts in enumerate(self.problem.cuts[head]) for cut in cuts] for head in self.heads[:-1]
        ]
        for chosen in itertools.product(*options):
            taken = np.full(statistics.images, len(self.heads) - 1)
            for stage in reversed(range(len(chosen))):
                row, cut = chosen[stage]
                taken[statistics.counts[:, self.heads[stage], row] >= cut] = stage
            head, images = np.array(self.heads)[taken], np.arange(len(taken))
            right = statistics.intersection[images, head].sum(axis=0)[present]
            union = statistics.predicted[images, head].sum(axis=0)[present] + labelled[present] - right
            least = min(least, float(prices[taken].sum() - slope * 100 * (right / union).mean()))
        return least


def bounds_of_seconds(
    problem: Problem,
    seconds: np.ndarray,
    others: tuple[np.ndarray, ...],
    prices: np.ndarray,
    alive: np.ndarray,
    relaxation: Relaxation,
) -> np.ndarray:
    least = np.empty(alive.shape)
    for b, second in enumerate(seconds):
        group = (second, *others, prices[b], alive[b])
        if len(others) == 2:
            kernels.bound_pairs(PairGroup(*group), relaxation, problem.table, least[b])
        else:
            kernels.bound_triples(TripleGroup(*group), relaxation, problem.table, least[b])
    return least


def relaxation_of(problem: Problem, slope: float, ceiling: float, coefficients: np.ndarray) -> Relaxation:
    return Relaxation(Cutoff(slope, ceiling), coefficients, problem.table.scores @ coefficients)


@settings(max_examples=12, deadline=None, suppress_health_check=RELAXED)
@given(
    st.integers(0, 10**6), st.floats(0, 100), st.lists(st.integers(0, 30), min_size=10, max_size=10), st.integers(2, 5)
)
def test_no_bound_of_a_group_of_plans_exceeds_the_least_of_them(
    seed: int, slope: float, drawn: list[int], distinct: int
) -> None:
    """Also when groups are pruned by their cheapest options: the ceilings are some of the bounds."""
    case = evidence((2, 2, 3), 2, images=8, seed=seed, distinct=distinct)
    problem = problem_of(case, Requirement())
    table, points = problem.table, problem.points
    h1, h2, h3 = (np.flatnonzero(points == point) for point in (1, 2, 3))
    coefficients = np.random.default_rng(seed).normal(0, 3, 2 * len(table.labelled))
    enter, second, further = np.array(drawn[:2]), np.array(drawn[2:4]), np.array(drawn[4:10]).reshape(2, 3)
    prices = np.empty((2, 3, 2, 3))  # (seconds, exits, firsts, lasts)
    for b, a in itertools.product(range(2), range(2)):
        to_second = enter[a] + second[b]
        prices[b, :, a] = np.stack([np.full(3, enter[a]), np.full(3, to_second), to_second + further[b]])
    alive = np.ones((2, 2, 3), np.bool_)
    ceilings = functools.partial(relaxation_of, problem, slope, coefficients=coefficients)
    bound = functools.partial(bounds_of_seconds, problem, h2, (h1, h3), prices, alive)
    close = bound(ceilings(np.inf))
    found = [close, *(bound(ceilings(limit)) for limit in close[0, 0])]
    for b, a, r in np.ndindex(2, 2, 3):
        heads = (int(h1[a]), int(h2[b]), int(h3[r]))
        price = np.ascontiguousarray(prices[b, :, a, r])
        true = Chain(case, problem, heads).true_least(price, slope)
        assert max(least[b, a, r] for least in found) <= true + 1e-6
        chain = np.array([[len(problem.names), *heads]])  # none comes first
        assert kernels.bound_chains(chain, price[[0, 0, 1, 2]][None], slope, table)[0] <= true + 1e-6


@settings(max_examples=15, deadline=None, suppress_health_check=RELAXED)
@given(
    st.integers(0, 10**6),
    st.floats(0, 100),
    st.lists(st.integers(-15, 30), min_size=8, max_size=8),
    st.sampled_from([(1, 7), (2, 3)]),
    st.lists(st.booleans(), min_size=16, max_size=16),
)
def test_no_bound_of_three_early_exits_exceeds_the_least_of_their_plans(
    seed: int, slope: float, drawn: list[int], size: tuple[int, int], holes: list[bool]
) -> None:
    """Deeper exits may cost less, and some chains lack a graph."""
    rows, distinct = size
    case = evidence((2, 2, 2, 2), rows, images=10, seed=seed, distinct=distinct)
    problem = problem_of(case, Requirement())
    table = problem.table
    h1, h2, h3, h4 = (np.flatnonzero(problem.points == point) for point in (1, 2, 3, 4))
    coefficients = np.random.default_rng(seed).normal(0, 3, 2 * len(table.labelled))
    enter, second, further, last = drawn[:2], drawn[2:4], drawn[4:6], drawn[6:]
    prices = np.empty((2, 4, 2, 2, 2))  # (seconds, exits, firsts, thirds, lasts)
    for b, a, c, r in np.ndindex(2, 2, 2, 2):
        prices[b, :, a, c, r] = np.cumsum([enter[a], second[b], further[c], last[r]])
    ceilings = functools.partial(relaxation_of, problem, slope, coefficients=coefficients)
    alive = ~np.array(holes).reshape(2, 2, 2, 2)
    bound = functools.partial(bounds_of_seconds, problem, h2, (h1, h3, h4), prices, alive)
    close = bound(ceilings(np.inf))
    found = [close, bound(ceilings(close.min()))]
    for b, a, c, r in np.argwhere(alive):
        heads = (int(h1[a]), int(h2[b]), int(h3[c]), int(h4[r]))
        price = np.ascontiguousarray(prices[b, :, a, c, r])
        true = Chain(case, problem, heads).true_least(price, slope)
        assert max(least[b, a, c, r] for least in found) <= true + 1e-6
        assert kernels.bound_chains(np.array([heads]), price[None], slope, table)[0] <= true + 1e-6


def test_three_early_exits_are_searched_by_bounds_however_small_the_space_is() -> None:
    case = evidence((1, 1, 1), 2, images=8, seed=3, distinct=4)
    plans = list(all_plans(case, "input-dependent", 3))
    for objective in ("latency", "accuracy"):
        for floor in (0.0, max(plan.miou for plan in plans)):
            requirement = Requirement(objective=objective, max_exits=3, max_err_pp=0.0, baseline_miou=floor)
            result = solver.search(case, requirement)
            feasible = [plan for plan in plans if plan.miou >= floor]
            assert identity(result.plan) == brute_identity(min(feasible, key=lambda plan: key(plan, objective)))
            assert (result.certificate.space, result.certificate.gap) == (len(plans), 0.0)
            assert {point.name for point in result.plan.operating_points} >= {"default"}


def test_three_early_exits_have_cuts_off_the_grid_too() -> None:
    """With more images than cuts on the grid the better cuts may lie between those of it."""
    case = evidence((1, 1, 1), 1, images=120, seed=0)
    counts = np.random.default_rng(1).integers(0, 5000, case.statistics.counts.shape).astype(np.int32)
    case = dataclasses.replace(case, statistics=dataclasses.replace(case.statistics, counts=counts))
    plan = solver.search(case, Requirement(objective="accuracy", max_exits=3)).plan
    assert len(plan.stages) == 4
    (refined,) = (point for point in plan.operating_points if point.name == "refined")
    decisions = zip(plan.stages, refined.decisions, strict=True)
    stages = [dataclasses.replace(stage, cut=decision.cut) for stage, decision in decisions]
    assert refined.predicted == figures_of_stages(case, "input-dependent", stages)
    assert refined.predicted.miou > plan.predicted.miou
