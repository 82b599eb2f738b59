"""The plan the search returns is the best there is: checked against a plain enumeration of every plan."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile.runtime.errors import RequirementError
from mess_compile.search.figures import Evidence
from mess_compile.search.plan import Plan
from mess_compile.search.requirement import Limit, Requirement
from mess_compile.search.solver import search
from tests.search.brute_force import BrutePlan, all_plans, baseline_of, ns
from tests.search.cases import evidence, with_baseline_alone

OBJECTIVES = {
    "latency": lambda plan: plan.cost_ns,
    "accuracy": lambda plan: -plan.miou,
    "workload": lambda plan: plan.macs,
    "memory": lambda plan: plan.memory,
    "anytime": lambda plan: -plan.score,
}


def key(plan: BrutePlan, objective: str) -> tuple[object, ...]:
    return OBJECTIVES[objective](plan), -plan.miou, plan.graphs, plan.text


def identity(plan: Plan) -> tuple[tuple[object, ...], ...]:
    early = [stage for stage in plan.stages if stage.cut is not None]
    return (
        tuple(stage.exit_point for stage in plan.stages),
        tuple(stage.head for stage in plan.stages),
        tuple(stage.row for stage in early),
        tuple(stage.cut for stage in early),
    )


def brute_identity(plan: BrutePlan) -> tuple[tuple[object, ...], ...]:
    return plan.points, plan.heads, plan.rows, plan.cuts


def front_of(case: Evidence) -> list[BrutePlan]:
    """The fastest plan, then each that is more accurate than all faster ones."""
    front: list[BrutePlan] = []
    for plan in sorted(all_plans(case, "input-dependent", 2), key=lambda plan: key(plan, "latency")):
        if not front or plan.miou > front[-1].miou:
            front.append(plan)
    return front


@st.composite
def cases(draw: st.DrawFn) -> Evidence:
    heads = tuple(draw(st.lists(st.integers(1, 2), min_size=1, max_size=3)))
    rows = draw(st.integers(1, 3 if len(heads) < 3 else 2))
    images, seed, levels = draw(st.integers(3, 9)), draw(st.integers(0, 10**6)), draw(st.integers(2, 5))
    case = evidence(heads, rows, images, seed, levels, twins=draw(st.booleans()))
    return with_baseline_alone(case, draw(st.integers(1, 9)) / 1000, seed) if draw(st.booleans()) else case


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(["latency", "accuracy", "workload", "memory"]), st.integers(0, 2), st.data())
def test_the_plan_is_the_best_of_all_plans_that_satisfy(
    case: Evidence, objective: str, max_exits: int, data: st.DataObject
) -> None:
    plans = list(all_plans(case, "input-dependent", max_exits))
    n = case.statistics.images
    bounding = data.draw(st.sampled_from(plans))  # some plan's own figures: bounds are met with equality
    latency_ns = bounding.cost_ns // n + 1
    requirement = Requirement(
        objective=objective,
        max_err_pp=0.0,
        baseline_miou=bounding.miou,
        max_latency=Limit(latency_ns / 1e6),
        max_workload=data.draw(st.sampled_from([None, Limit(0.9, relative=True)])),
        max_memory_bytes=data.draw(st.sampled_from([None, bounding.memory])),
        max_exits=max_exits,
    )
    candidate = case.graph_set.candidate
    baseline_macs = candidate.exit_points[-1].macs + candidate.heads[-1].macs
    feasible = [
        plan
        for plan in plans
        if plan.miou >= bounding.miou
        and plan.cost_ns <= latency_ns * n
        and (requirement.max_workload is None or plan.macs <= round(0.9 * baseline_macs) * n)
        and (requirement.max_memory_bytes is None or plan.memory <= requirement.max_memory_bytes)
    ]
    if not feasible:
        with pytest.raises(RequirementError, match="best reachable"):
            search(case, requirement)
        return
    best = min(feasible, key=lambda plan: key(plan, objective))
    result = search(case, requirement)
    assert identity(result.plan) == brute_identity(best)
    assert result.plan.predicted.miou == best.miou
    assert result.plan.predicted.latency_ms == best.cost_ns / n / 1e6
    assert result.plan.predicted.gmacs == best.macs / n / 1e9
    assert result.plan.predicted.memory_bytes == best.memory
    assert result.certificate.space == len(plans)
    assert result.certificate.gap == 0.0


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([0.0, 1.0, 10.0]), st.sampled_from([0.5, 1.0, 2.0]))
def test_a_plan_is_held_against_the_better_baseline(case: Evidence, max_err_pp: float, share: float) -> None:
    """A network trained alone that beats the final exit raises what a plan must reach, else savings are flattered."""
    name, miou = baseline_of(case)
    n, cost_ns = case.statistics.images, ns(case, "upload") + ns(case, name) + ns(case, "download")
    requirement = Requirement(max_err_pp=max_err_pp, max_latency=Limit(share, relative=True))
    feasible = [
        plan
        for plan in all_plans(case, "input-dependent", 2)
        if plan.miou >= miou - max_err_pp and plan.cost_ns <= round(share * cost_ns) * n
    ]
    if not feasible:
        with pytest.raises(RequirementError, match=f"mIoU >= {miou - max_err_pp:.4g} %"):
            search(case, requirement)
        return
    plan = search(case, requirement).plan
    assert identity(plan) == brute_identity(min(feasible, key=lambda plan: key(plan, "latency")))
    assert (plan.baseline_name, plan.baseline_alone) == (name, case.graph_set.baseline_alone)
    assert (plan.baseline.miou, plan.baseline.latency_ms) == (miou, cost_ns / 1e6)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_the_front_misses_no_plan_and_holds_no_beaten_one(case: Evidence) -> None:
    result = search(case, Requirement())
    assert [identity(plan) for plan in result.front] == [brute_identity(plan) for plan in front_of(case)]


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from(["budgeted", "anytime"]), st.one_of(st.none(), st.integers(1, 60)))
def test_budgeted_and_anytime_plans_are_the_best_too(case: Evidence, setting: str, microseconds: int | None) -> None:
    deadline = microseconds if setting == "anytime" else None
    plans = list(all_plans(case, setting, 2, None if deadline is None else deadline * 1000))
    best = min(plans, key=lambda plan: key(plan, "anytime" if setting == "anytime" else "latency"))
    result = search(case, Requirement(setting=setting, deadline_ms=None if deadline is None else deadline / 1000))
    assert identity(result.plan) == brute_identity(best)
    assert result.plan.predicted.latency_ms == best.cost_ns / case.statistics.images / 1e6
    assert result.plan.predicted.miou == best.miou
    assert result.certificate.space == len(plans)


def test_many_distinct_counts_fall_back_to_the_stated_grid_of_cuts() -> None:
    case = evidence((1,), 1, images=80, seed=3, levels=300)
    best = min(all_plans(case, "input-dependent", 1), key=lambda plan: key(plan, "accuracy"))
    assert identity(search(case, Requirement(objective="accuracy")).plan) == brute_identity(best)


def test_more_than_64_images_are_told_apart() -> None:
    case = evidence((1, 1), 2, images=70, seed=5, levels=4)
    plans = list(all_plans(case, "input-dependent", 2))
    best = min(plans, key=lambda plan: key(plan, "accuracy"))
    result = search(case, Requirement(objective="accuracy"))
    assert identity(result.plan) == brute_identity(best)
    assert result.certificate.evaluated + result.certificate.duplicates == result.certificate.space == len(plans)


@pytest.mark.parametrize("seed", range(4))
def test_deeper_exits_that_cost_less_are_not_thrown_away(seed: int) -> None:
    """Where a small output graph makes the deeper exit cheaper, sending fewer images away early is cheaper."""
    case = evidence((1, 1), 2, images=8, seed=seed)
    entries = dict(case.table.entries)
    entries["output-2x3", "fp32"] = dataclasses.replace(entries["output-2x3", "fp32"], mean_ms=1.0)  # exit 1, final
    case = dataclasses.replace(case, table=dataclasses.replace(case.table, entries=entries))
    plans = list(all_plans(case, "input-dependent", 2))
    for bound in sorted(plan.miou for plan in plans)[::-7]:
        best = min((plan for plan in plans if plan.miou >= bound), key=lambda plan: key(plan, "latency"))
        result = search(case, Requirement(max_err_pp=0.0, baseline_miou=bound))
        assert identity(result.plan) == brute_identity(best)


def test_equal_plans_are_ordered_by_text_with_row_10_before_row_2() -> None:
    case = evidence((1,), 12, images=6, seed=6)
    counts = np.full_like(case.statistics.counts, 5)
    counts[:, 0, [2, 10]] = np.array([1, 2, 7, 8, 10, 12])[:, None]
    case = dataclasses.replace(case, statistics=dataclasses.replace(case.statistics, counts=counts))
    for objective in ("latency", "accuracy"):
        best = min(all_plans(case, "input-dependent", 1), key=lambda plan: key(plan, objective))
        assert identity(search(case, Requirement(objective=objective)).plan) == brute_identity(best)
    assert {stage.row for plan in search(case, Requirement()).front for stage in plan.stages if stage.cut} == {10}


@pytest.mark.parametrize("seed", range(4))
def test_when_images_are_all_alike_the_order_by_text_decides(seed: int) -> None:
    case = evidence((2, 1), 3, images=7, seed=seed)
    alike = {
        name: np.repeat(getattr(case.statistics, name)[:1], 7, axis=0)
        for name in ("intersection", "predicted", "labelled")
    }
    case = dataclasses.replace(case, statistics=dataclasses.replace(case.statistics, **alike))
    result = search(case, Requirement())
    assert [identity(plan) for plan in result.front] == [brute_identity(plan) for plan in front_of(case)]


def test_a_head_that_is_equally_sure_of_every_image_decides_nothing() -> None:
    case = evidence((1,), 2, images=5, seed=0, levels=1)
    assert search(case, Requirement()).certificate.space == len(case.graph_set.candidate.heads)


def test_a_refusal_names_the_bounds_and_the_best_reachable() -> None:
    case = evidence((1, 2), 2, images=6, seed=2)
    plans = list(all_plans(case, "input-dependent", 2))
    fastest = min(plan.cost_ns for plan in plans) / 6 / 1e6
    with pytest.raises(RequirementError) as refusal:
        search(case, Requirement(max_latency=Limit(fastest / 2)))
    assert f"best reachable: latency {fastest:.4g} ms" in str(refusal.value)
    best = max(plan.miou for plan in plans)
    limit = Limit(1e-6)
    with pytest.raises(RequirementError) as refusal:
        search(case, Requirement(max_err_pp=0.0, baseline_miou=best + 1, max_latency=limit))
    assert f"mIoU {best:.4g} % alone, or latency {fastest:.4g} ms alone" in str(refusal.value)
    slowest = next(plan for plan in plans if plan.miou == best)
    with pytest.raises(RequirementError) as refusal:
        search(case, Requirement(max_err_pp=0.0, baseline_miou=best, max_latency=limit))
    assert f"latency {slowest.cost_ns / 6 / 1e6:.4g} ms with mIoU >= {best:.4g} %" in str(refusal.value)


def test_a_relative_latency_bound_is_a_share_of_the_baseline() -> None:
    case = evidence((1, 2), 2, images=6, seed=4)
    baseline = ns(case, "upload") + ns(case, "baseline") + ns(case, "download")
    limit = round(1.5 * baseline)
    feasible = [p for p in all_plans(case, "input-dependent", 2) if p.cost_ns <= limit * 6]
    best = min(feasible, key=lambda plan: key(plan, "accuracy"))
    result = search(case, Requirement(objective="accuracy", max_latency=Limit(1.5, relative=True)))
    assert identity(result.plan) == brute_identity(best)


def test_the_same_search_twice_gives_the_same_result() -> None:
    assert search(evidence((2, 2), 3, 9, 11), Requirement()) == search(evidence((2, 2), 3, 9, 11), Requirement())
