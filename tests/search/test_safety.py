"""`--safety` takes a plan whose loss on new images stays within --max-err, or says which one comes nearest."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest

from benchmarks import guarantee as benchmark
from mess_compile.report.search_output import warnings_of_plan
from mess_compile.runtime.base.errors import InputError, RequirementError
from mess_compile.search.guarantees import FoldSearches, fold_searches
from mess_compile.search.metrics import Evidence
from mess_compile.search.plan import SearchResult
from mess_compile.search.requirement import Requirement, parse_max_change
from mess_compile.search.safety import parse_safety, refuse_unsafe, safest
from mess_compile.search.solver import search
from tests.search.cases import against_own_output, evidence
from tests.search.test_new_images import found_in, of_groups


@cache
def drawn(max_err_pp: float) -> tuple[Evidence, SearchResult, FoldSearches]:
    """60 images of a population on which deeper heads are better, and what is found in them."""
    graphs, table = benchmark.made_up_graphs()
    known = benchmark.population(graphs, 500, 1)
    case = known.evidence(graphs, table, known.drawn(np.random.default_rng(3), 60))
    requirement = Requirement(max_err_pp=max_err_pp, max_exits=1)
    return case, search(case, requirement), fold_searches([case], requirement)


@pytest.mark.parametrize("level", [0.6, 0.9])
def test_the_plan_keeps_its_bound_and_is_no_faster_than_the_optimum(level: float) -> None:
    case, result, searches = drawn(3.0)
    found = safest([case], Requirement(max_err_pp=3.0, max_exits=1), result, searches, level).plan
    safety, expected = found.safety, found.expected
    assert safety is not None
    assert expected is not None
    assert -expected.miou_pp < (safety.loss_bound_pp or 0.0) <= 3.0
    assert found.predicted.latency_ms > result.plan.predicted.latency_ms
    assert expected.low_pp < expected.miou_pp < expected.high_pp


def test_changed_pixels_are_kept_as_well() -> None:
    case = against_own_output(of_groups(60, 60))
    requirement = Requirement(max_change=95.0)
    found = safest([case], requirement, search(case, requirement), fold_searches([case], requirement), 0.9).plan
    assert found.safety is not None
    assert found.predicted.change is not None
    assert found.predicted.change < (found.safety.change_bound or 0.0) <= 95.0
    assert found.safety.loss_bound_pp is None


def test_where_no_plan_is_safe_the_nearest_is_named() -> None:
    case, result, searches = drawn(0.01)
    with pytest.raises(RequirementError, match=r"none of \d+ plans keeps --max-err 0.01% .* the nearest loses .* here"):
        safest([case], Requirement(max_err_pp=0.01, max_exits=1), result, searches, 0.99)


@pytest.mark.parametrize("text", ["100%", "0%", "50%", "90", "0.9", "-90%", "nan%", "a lot", ""])
def test_other_than_a_percentage_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(InputError, match=r"write 90% \(above 50% and below 100%\)"):
        parse_safety(text)


@pytest.mark.parametrize(
    ("requirement", "groups", "says"),
    [
        (Requirement(), 6, "give --max-err 1% too"),
        (Requirement(max_err_pp=1.0, baseline_miou=50.0), 6, "leave --baseline out"),
        (Requirement(max_err_pp=1.0, setting="anytime"), 6, "anytime setting has none"),
        (Requirement(max_err_pp=1.0), 1, "needs two groups of images or more"),
        (Requirement(max_change=1.0), 6, "against labels"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_the_search(requirement: Requirement, groups: int, says: str) -> None:
    assert parse_safety("90%") == 0.9
    with pytest.raises(InputError, match=says):
        refuse_unsafe([of_groups(12, groups)], requirement)


def test_a_number_without_its_sign_is_repeated_with_it() -> None:
    with pytest.raises(InputError, match="write 80%"):
        parse_safety("80")
    with pytest.raises(InputError, match="write 10%"):
        parse_max_change("10")


def test_of_few_groups_the_interval_is_called_wide() -> None:
    """Where nobody tested how often it holds, nobody should plan with it as if it did."""
    for groups, is_few in ((6, True), (12, False)):
        case = of_groups(24, groups)
        requirement = Requirement(max_err_pp=60.0)
        result, searches, _ = found_in(case, requirement)
        plan = safest([case], requirement, result, searches, 0.9).plan
        warned = any("the interval is wide" in each for each in warnings_of_plan(plan, requirement))
        assert warned == is_few


def test_a_safe_plan_names_the_rows_that_its_operating_points_decide_by() -> None:
    """The bundle of a plan that names fewer cannot be loaded."""
    named = 0
    for seed in range(12):
        case = evidence((1, 1), 6, images=40, seed=seed, more=4)
        groups = tuple(f"group{index}" for index in range(40))
        case = dataclasses.replace(case, statistics=dataclasses.replace(case.statistics, group=groups))
        requirement = Requirement(max_err_pp=80.0, objective="accuracy")
        searches = fold_searches([case], requirement)
        plan = safest([case], requirement, search(case, requirement), searches, 0.6).plan
        used = {
            (stage.head, decision.row)
            for point in plan.operating_points
            for stage, decision in zip(plan.stages, point.decisions, strict=True)
            if decision.cut is not None and decision.row >= len(plan.gate.thresholds)
        }
        assert used <= {(row.head, row.row) for row in plan.policy_rows}
        named += len(used)
    assert named, "some plan has such rows"
