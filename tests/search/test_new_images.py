"""The interval on new images must be what a plain loop over resamples gives, cover the truth, and promise nothing where
there is one place alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import guarantee as benchmark
from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.search import new_images
from mess_compile.search.display import interval_sentence
from mess_compile.search.guarantees import FoldSearches, fold_searches
from mess_compile.search.hold_out import HoldOutSplit
from mess_compile.search.metrics import Evidence
from mess_compile.search.new_images import (
    Bootstrap,
    bootstrap_of,
    choice_and_front,
    expected_of_one,
    resampled,
    t_quantile,
    with_expected,
)
from mess_compile.search.plan import ONE_GROUP, Candidate, Expected, SearchResult, read_result, write_result
from mess_compile.search.pool import Tightened, candidate_of
from mess_compile.search.requirement import Limit, Requirement
from mess_compile.search.solver import search
from tests.search.brute_force import miou_of
from tests.search.cases import against_own_output, evidence
from tests.search.test_guarantees import part, with_groups

ERR_PP = 3.0


def of_groups(images: int, groups: int, seed: int = 5) -> Evidence:
    case = evidence((2, 1), 2, images=images, seed=seed)
    return with_groups(case, [f"drive{i % groups}" for i in range(images)])


def found_in(case: Evidence, requirement: Requirement) -> tuple[SearchResult, FoldSearches, Bootstrap]:
    result, searches = search(case, requirement), fold_searches([case], requirement)
    return result, searches, bootstrap_of([case], [case], requirement, choice_and_front(result), searches)


def head_taken(statistics: ExitStatistics, plan: Candidate, image: int) -> str:
    for stage in plan.stages[:-1]:
        if statistics.counts[image, statistics.heads.index(stage.head), stage.row] >= (stage.cut or 0):
            return stage.head
    return plan.stages[-1].head


def gain(case: Evidence, heads: list[str], images: list[int]) -> float:
    """mIoU of the images, each answered by its head, above the baseline's; image by image."""
    some = part(case, images)
    return miou_of(some, [heads[i] for i in images]) - miou_of(some, [case.candidate.baseline] * len(images))


def costs_of(case: Evidence, plan: Candidate) -> dict[str, int]:
    from mess_compile.latency.table import path_costs_ns

    heads = [stage.head for stage in plan.stages]
    return dict(zip(heads, path_costs_ns(case.table, case.graph_set, heads), strict=True))


def test_the_bootstrap_is_what_a_plain_loop_over_resamples_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_images, "RESAMPLES", 25)
    case = of_groups(18, 6)
    requirement = Requirement(max_err_pp=ERR_PP)
    _, searches, bootstrap = found_in(case, requirement)
    drawn = bootstrap.drawn(0, Tightened(ERR_PP, None))
    statistics, plans = case.statistics, bootstrap.pool.plans
    heads = [[head_taken(statistics, plan, i) for i in range(18)] for plan in plans]
    costs = [costs_of(case, plan) for plan in plans]

    def chosen(images: list[int], among: list[int]) -> int:
        gains = {p: gain(case, heads[p], images) for p in among}
        allowed = [p for p in among if gains[p] >= -ERR_PP - 1e-9] or [max(among, key=lambda p: gains[p])]
        return min(allowed, key=lambda p: (sum(costs[p][heads[p][i]] for i in images), -gains[p], p))

    whole = [gain(case, each, list(range(18))) for each in heads]
    errors, fixed, optimism = [], [], []
    for weights in resampled(6, 0).astype(int).tolist():
        images = [i for g in range(6) for i in range(g, 18, 6) for _ in range(weights[g])]
        best = chosen(images, list(range(len(plans))))
        inside = gain(case, heads[best], images)
        errors.append(whole[best] - inside)
        fixed.append(gain(case, heads[0], images))
        answers, left = [""] * 18, []
        for k, held in enumerate(searches.parts):
            unseen = [i for i in held.tolist() if not weights[i % 6]]
            other = chosen(images, bootstrap.pool.fronts[1 + k].tolist())
            left += unseen
            for i in unseen:
                answers[i] = heads[other][i]
        if left:
            optimism.append(inside - gain(case, answers, sorted(left)))
    assert drawn.lost == pytest.approx(-whole[0], abs=1e-9)
    assert drawn.optimism == pytest.approx(np.mean(optimism), abs=1e-9)
    spread = max(np.std(errors), np.std(fixed))
    assert drawn.errors.std() == pytest.approx(spread, abs=1e-9)


@pytest.mark.parametrize(
    "requirement",
    [
        Requirement(objective="accuracy", max_latency=Limit(0.9, True)),
        Requirement(objective="workload", max_err_pp=20.0, max_latency_p95=Limit(1.0, True)),
        Requirement(objective="memory", max_err_pp=20.0, max_latency_worst=Limit(3.0, True)),
        Requirement(setting="budgeted", max_err_pp=20.0, max_memory_bytes=1 << 30),
        Requirement(setting="anytime"),
    ],
)
def test_on_its_own_images_the_pool_chooses_what_the_search_chose(requirement: Requirement) -> None:
    case = of_groups(18, 6, seed=3)
    result, _, bootstrap = found_in(case, requirement)
    plan = bootstrap.pool.plans[bootstrap.chosen(Tightened(requirement.max_err_pp, None))]
    found = search(case, requirement).plan
    assert plan.stages == found.stages == result.plan.stages


def test_changed_pixels_bound_the_choice_in_each_resample_too() -> None:
    case = against_own_output(of_groups(18, 6))
    requirement = Requirement(max_change=60.0)
    result, _, bootstrap = found_in(case, requirement)
    drawn = bootstrap.drawn(0, Tightened(None, 60.0))
    assert drawn.changed == pytest.approx(result.plan.predicted.change, abs=1e-6)
    assert drawn.change_errors.std() > 0


def of_its_own(case: Evidence) -> Evidence:
    """The case with the baseline's labels as truth."""
    found, own = case.statistics, case.statistics.head_index(case.candidate.baseline)
    intersection, predicted = found.intersection.copy(), found.predicted.copy()
    intersection[:, own] = predicted[:, own] = found.labelled
    return dataclasses.replace(
        against_own_output(case),
        statistics=dataclasses.replace(
            against_own_output(case).statistics, intersection=intersection, predicted=predicted
        ),
    )


def test_the_interval_holds_possible_values_and_that_of_changed_pixels() -> None:
    """+143.8 pp of mIoU against the network itself is no interval that anybody can plan with."""
    case = of_its_own(of_groups(6, 3))
    result, searches, _ = found_in(case, Requirement(max_change=60.0))
    expected = with_expected(result, HoldOutSplit([case], [case]), Requirement(max_change=60.0), searches).plan.expected
    assert expected is not None
    assert -100 <= expected.low_pp <= expected.miou_pp <= expected.high_pp <= 0
    assert expected.change is not None
    assert expected.change_low is not None
    assert expected.change_high is not None
    assert 0 <= expected.change_low <= expected.change <= expected.change_high <= 100
    assert f"on new images expect {expected.change:.1f} % of the pixels changed (95 %: " in interval_sentence(
        expected, ""
    )


def test_the_interval_of_changed_pixels_is_about_their_mean_over_images() -> None:
    case = of_its_own(of_groups(18, 6))
    plan = candidate_of(search(case, Requirement(max_change=60.0)).plan)
    found = expected_of_one([case], plan, (0, case.candidate.baseline), None)
    assert isinstance(found, Expected)
    statistics = case.statistics
    taken = [statistics.heads.index(head_taken(statistics, plan, image)) for image in range(18)]
    shares = [
        1 - statistics.intersection[i, head].sum() / statistics.labelled[i].sum() if statistics.labelled[i].sum() else 0
        for i, head in enumerate(taken)
    ]
    assert found.change == pytest.approx(100 * float(np.mean(shares)), abs=1e-6)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (10, 2.2281), (99, 1.9842)])
def test_the_quantiles_of_t_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom, 0.975) == pytest.approx(quantile, abs=1e-3)


def test_the_interval_contains_the_truth_of_a_population_that_is_known() -> None:
    graphs, table = benchmark.made_up_graphs()
    known = benchmark.population(graphs, 1000, 1)
    truth = known.evidence(graphs, table, np.arange(1000))
    draws = [benchmark.interval_draw(graphs, table, known, truth, 50, seed, 0.0) for seed in range(5)]
    found = benchmark.interval_summary(draws)
    assert found["covered"] >= 80
    assert 0.5 < found["width_pp"] < 8
    assert found["lost_pp"] > 1  # what --max-err 1% finds is too good on its own images


def expected_in(case: Evidence) -> SearchResult:
    requirement = Requirement(max_err_pp=ERR_PP)
    result, searches, _ = found_in(case, requirement)
    return with_expected(result, HoldOutSplit([case], [case]), requirement, searches)


def test_one_place_promises_nothing_of_others() -> None:
    result = expected_in(of_groups(18, 1))
    assert (result.plan.expected, result.without_expected) == (None, ONE_GROUP)


def alike(statistics: ExitStatistics) -> ExitStatistics:
    return dataclasses.replace(
        statistics,
        **{name: getattr(statistics, name)[[0] * 18] for name in ("counts", "intersection", "predicted", "labelled")},
    )


def test_images_that_are_all_alike_promise_nothing() -> None:
    case = of_groups(18, 6)
    case = dataclasses.replace(case, statistics=alike(case.statistics))
    assert "all alike" in expected_in(case).without_expected


def without(*names: str) -> Callable[[dict[str, object]], None]:
    return lambda plan: [plan.pop(name) for name in names] and None


def test_a_plan_of_an_earlier_release_is_read_and_says_that_it_has_no_interval(tmp_path: Path) -> None:
    result = expected_in(of_groups(18, 6))
    assert result.plan.expected is not None
    path = tmp_path / "host.json"
    write_result(path, result)
    assert read_result(path) == result
    content = json.loads(path.read_text())
    del content["without_expected"]
    for plan in (content["plan"], *content["front"]):
        without("expected", "safety", "group_by")(plan)
    path.write_text(json.dumps(content))
    old = read_result(path)
    assert (old.plan.expected, old.plan.group_by, old.without_expected) == (None, None, "not computed")
