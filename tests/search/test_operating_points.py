"""Operating points let a user trade speed for accuracy on the graphs that are already there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile.runtime.bundle.manifest import OperatingPoint
from mess_compile.search.metrics import Evidence, figures_of_stages
from mess_compile.search.operating_points import operating_points
from mess_compile.search.plan import Plan, Stage, read_result, write_result
from mess_compile.search.requirement import Requirement
from mess_compile.search.solver import search
from tests.search.brute_force import BrutePlan, all_plans
from tests.search.cases import evidence


def plans_of_same_heads(case: Evidence, plan: Plan) -> list[BrutePlan]:
    heads = tuple(stage.head for stage in plan.stages)
    return [each for each in all_plans(case, "input-dependent", 2) if each.heads == heads]


def brute_of(point: OperatingPoint, among: list[BrutePlan]) -> BrutePlan:
    early = point.decisions[:-1]
    rows, cuts = tuple(d.row for d in early), tuple(d.cut for d in early)
    (found,) = (plan for plan in among if (plan.rows, plan.cuts) == (rows, cuts))
    return found


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 2), min_size=1, max_size=2),
    st.integers(4, 10),
    st.integers(0, 10**6),
    st.sampled_from(["latency", "accuracy", "workload", "memory"]),
)
def test_points_are_what_no_other_thresholds_beat(heads: list[int], images: int, seed: int, objective: str) -> None:
    case = evidence(tuple(heads), 2, images, seed)
    for plan in search(case, Requirement()).front:
        requirement = Requirement(objective=objective, max_err_pp=0.0, baseline_miou=plan.predicted.miou)
        chosen = search(case, requirement).plan
        among = plans_of_same_heads(case, chosen)
        points = {point.name: point for point in chosen.operating_points}
        assert points["default"].predicted == chosen.predicted
        others = [point for name, point in points.items() if name != "default"]
        for point in others:
            brute = brute_of(point, among)
            assert point.predicted.miou == brute.miou
            assert point.predicted.latency_ms == brute.cost_ns / images / 1e6
            assert not any(p.cost_ns <= brute.cost_ns and p.miou > brute.miou for p in among)
            assert not any(p.cost_ns < brute.cost_ns and p.miou >= brute.miou for p in among)
        figures = [(p.predicted.latency_ms, p.predicted.miou) for p in chosen.operating_points]
        assert figures == sorted(set(figures))
        assert [miou for _, miou in figures] == sorted(miou for _, miou in figures)


@settings(max_examples=10, deadline=None)
@given(st.integers(4, 10), st.integers(0, 10**6), st.data())
def test_three_early_exits_have_points_at_the_rows_of_the_plan(images: int, seed: int, data: st.DataObject) -> None:
    case = evidence((1, 1, 1), 2, images, seed, distinct=4)
    brute = data.draw(
        st.sampled_from([p for p in all_plans(case, "input-dependent", 3) if len(p.heads) == 4] or [None])
    )
    if brute is None:  # every head is equally sure of all images
        return
    among = [p for p in all_plans(case, "input-dependent", 3) if (p.heads, p.rows) == (brute.heads, brute.rows)]
    decisions = zip(brute.points, brute.heads, (*brute.rows, 1), (*brute.cuts, None), strict=True)
    stages = tuple(Stage(*decision) for decision in decisions)
    predicted = figures_of_stages(case, "input-dependent", stages)
    assert predicted.miou == brute.miou
    points = {point.name: point for point in operating_points(case, "input-dependent", stages, predicted)}
    ends = {"fastest": min(p.cost_ns for p in among), "most-accurate": max(p.miou for p in among)}
    for name, point in points.items():
        found = brute_of(point, among)
        assert (point.predicted.miou, point.predicted.latency_ms) == (found.miou, found.cost_ns / images / 1e6)
        if name != "default":
            assert not any(p.cost_ns <= found.cost_ns and p.miou > found.miou for p in among)
    if "fastest" in points:
        assert brute_of(points["fastest"], among).cost_ns == ends["fastest"]
    if "most-accurate" in points:
        assert points["most-accurate"].predicted.miou == ends["most-accurate"]


def test_a_plan_in_the_middle_has_points_on_both_sides() -> None:
    case = evidence((1,), 6, images=40, seed=11, distinct=30)
    front = [plan for plan in search(case, Requirement()).front if len(plan.stages) == 2]
    middle = front[len(front) // 2].predicted
    requirement = Requirement(max_err_pp=0.0, baseline_miou=middle.miou)
    plan = search(case, requirement).plan
    among = plans_of_same_heads(case, plan)
    names = [point.name for point in plan.operating_points]
    assert names == ["fastest", "fast", "default", "accurate", "most-accurate"]
    best = max(among, key=lambda each: each.miou)
    assert plan.operating_points[-1].predicted.miou == best.miou
    cheapest = min(among, key=lambda each: each.cost_ns)
    assert plan.operating_points[0].predicted.latency_ms == cheapest.cost_ns / 40 / 1e6


@pytest.mark.parametrize("setting", ["budgeted", "anytime"])
def test_a_plan_that_decides_nothing_has_itself_alone(setting: str) -> None:
    (point,) = search(evidence((1,), 2, 6, seed=4), Requirement(setting=setting)).plan.operating_points
    assert point.name == "default"


def test_points_survive_the_way_to_disk(tmp_path: Path) -> None:
    case = evidence((1, 1), 4, images=12, seed=8)
    result = search(case, Requirement(objective="accuracy"))
    assert len(result.plan.operating_points) > 1
    write_result(tmp_path / "host.json", result)
    assert read_result(tmp_path / "host.json") == result
