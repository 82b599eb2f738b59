"""`--explain` says why, in figures that a plain recount of every plan confirms."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mess_compile.runtime.base.errors import RequirementError
from mess_compile.search.explain import BoundCost, Explanation, explain
from mess_compile.search.metrics import Evidence
from mess_compile.search.plan import Plan
from mess_compile.search.requirement import Limit, Requirement
from mess_compile.search.solver import search_recipes
from tests.search.brute_force import BrutePlan, all_plans, miou_of, ns, path_cost
from tests.search.cases import evidence


def explained(case: Evidence, requirement: Requirement) -> tuple[Plan, Explanation]:
    plan = search_recipes([case], requirement).plan
    return plan, explain([case], requirement, plan, search_recipes, search_recipes)


def cheapest(case: Evidence, miou: float, exits: int = 2) -> BrutePlan:
    among = (plan for plan in all_plans(case, "input-dependent", exits) if plan.miou >= miou)
    return min(among, key=lambda plan: (plan.cost_ns, -plan.miou))


@pytest.mark.parametrize("seed", range(5))
def test_each_exit_with_its_images_gain_and_cost(seed: int) -> None:
    case = evidence((2, 1), 3, images=12, seed=seed)
    plan, found = explained(case, Requirement(objective="accuracy"))
    statistics, candidate = case.statistics, case.graph_set.candidate
    heads = tuple(candidate.head(stage.head) for stage in plan.stages)
    left = np.zeros(12, bool)
    for i, (stage, share) in enumerate(zip(plan.stages, found.exits, strict=True)):
        counts = statistics.counts[:, statistics.heads.index(stage.head), stage.row]
        here = ~left & (np.ones(12, bool) if stage.cut is None else counts >= stage.cut)
        left |= here
        only = dataclasses.replace(case, statistics=statistics.select(np.flatnonzero(here).tolist()))
        own, baseline = (miou_of(only, [head] * int(here.sum())) for head in (stage.head, candidate.baseline))
        assert (share.exit, share.head, share.images) == (i + 1, stage.head, int(here.sum()))
        assert share.coverage == here.mean() == plan.predicted.exit_rates[i]
        assert (share.miou, share.baseline_miou, share.gain_pp) == (own, baseline, own - baseline)
        cost = path_cost(case, heads, i)
        assert share.latency_ms == cost / 1e6
        single = sum(ns(case, graph) for graph in ("upload", "baseline", "download"))
        assert share.saved_ms == pytest.approx((single - cost) / 1e6)


@pytest.mark.parametrize("seed", range(4))
def test_what_the_accuracy_costs(seed: int) -> None:
    case = evidence((2, 1), 2, images=9, seed=seed)
    baseline = sorted(plan.miou for plan in all_plans(case, "input-dependent", 2))[-3] + 1.0
    _, found = explained(case, Requirement(max_err_pp=1.0, baseline_miou=baseline))
    (bound,) = found.bounds
    assert (bound.bound, bound.limit, bound.tighter_limit, bound.looser_limit) == ("max_err", "1%", "0.9%", "1.1%")
    for outcome, err in ((bound.tighter, 0.9), (bound.looser, 1.1)):
        best = cheapest(case, baseline - err)
        assert outcome is not None
        assert (outcome.value, outcome.miou) == (best.cost_ns / 9 / 1e6, best.miou)
        assert outcome.heads == best.heads


def test_a_bound_that_cannot_be_tighter_says_so() -> None:
    case = evidence((1, 1), 2, images=6, seed=2)
    fastest = min(plan.cost_ns for plan in all_plans(case, "input-dependent", 2)) / 6 / 1e6
    limits = {"max_latency": Limit(fastest * 1.05), "max_latency_p95": Limit(9.0), "max_latency_worst": Limit(9.0)}
    requirement = Requirement(objective="accuracy", max_memory_bytes=1 << 30, max_workload=Limit(5.0, True), **limits)
    _, found = explained(case, requirement)
    bounds = {bound.bound: bound for bound in found.bounds}
    assert list(bounds) == ["max_latency", "max_latency_p95", "max_latency_worst", "max_workload", "max_memory"]
    assert bounds["max_latency"].tighter is None
    assert bounds["max_latency"].looser is not None
    assert bounds["max_workload"].tighter_limit == "4.5x"
    assert isinstance(bounds["max_memory"], BoundCost)
    assert bounds["max_memory"].looser_limit == "1126MiB"


@pytest.mark.parametrize("seed", range(4))
def test_what_would_help_is_found_by_searching_again(seed: int) -> None:
    case = evidence((2, 1), 2, images=9, seed=seed)
    mious = sorted(plan.miou for plan in all_plans(case, "input-dependent", 2))
    wanted = mious[len(mious) * 3 // 4]
    plan, found = explained(case, Requirement(max_err_pp=0.0, baseline_miou=wanted, max_exits=1))
    assert found.value == plan.predicted.latency_ms == cheapest(case, wanted, 1).cost_ns / 9 / 1e6
    gains = [each.gain for each in found.helps]
    assert gains == sorted(gains, reverse=True)
    assert len([each for each in found.helps if each.what.endswith(" 10% faster")]) == 3
    for each in found.helps:
        if each.what == "--max-exits 2":
            best = cheapest(case, wanted, 2)
        else:
            graph = each.what.removesuffix(" 10% faster")
            assert graph in {each.name for each in plan.graphs}
            entry = case.table.entries[graph, "fp32"]
            entries = {**case.table.entries, (graph, "fp32"): dataclasses.replace(entry, mean_ms=entry.mean_ms * 0.9)}
            table = dataclasses.replace(case.table, entries=entries)
            best = cheapest(dataclasses.replace(case, table=table), wanted, 1)
        assert each.outcome.value == best.cost_ns / 9 / 1e6
        assert each.gain == pytest.approx(1 - each.outcome.value / found.value)


def test_the_anytime_setting_is_explained_in_its_own_terms() -> None:
    case = evidence((2, 1), 2, images=9, seed=1)
    plan, found = explained(case, Requirement(setting="anytime"))
    best = max(all_plans(case, "anytime", 2), key=lambda each: each.score)
    assert (found.objective, found.value) == ("mIoU over time", pytest.approx(best.score))
    assert [share.coverage for share in found.exits] == [1.0] * len(plan.stages)
    _, found = explained(case, Requirement(setting="anytime", deadline_ms=0.03))
    best = max(all_plans(case, "anytime", 2, 30_000), key=lambda each: each.score)
    assert (found.objective, found.value) == ("mIoU at the deadline", best.score)


def test_a_budgeted_plan_hears_what_deciding_per_image_would_bring() -> None:
    case = evidence((2, 1), 2, images=9, seed=1)
    _, found = explained(case, Requirement(setting="budgeted", objective="accuracy"))
    (helped,) = found.helps
    best = max(plan.miou for plan in all_plans(case, "input-dependent", 2))
    assert (helped.what, helped.outcome.value) == ("--setting input-dependent", best)


def test_nothing_is_explained_that_was_not_found() -> None:
    with pytest.raises(RequirementError):
        explained(evidence((1,), 2, 6, seed=2), Requirement(max_latency=Limit(1e-6)))
