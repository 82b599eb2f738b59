"""What a reader sees of a plan must be what its statistics and latencies say, added up by hand."""

from __future__ import annotations

import dataclasses

import pytest

from mess_compile.latency.table import Latency
from mess_compile.report.model import Missing, Report, SearchFound
from mess_compile.report.page import report_page
from mess_compile.report.published import paper_rows
from mess_compile.report.views import classes_of, costs_of, plan_view, plan_views
from mess_compile.search.metrics import Evidence, plan_of_stages
from mess_compile.search.plan import Certificate, Plan, SearchResult, Stage
from tests.search import cases

HEADS = ("exit1.fcn-crm1-b0", "exit3.fcn-crm1-b0")
IMAGES = 40


@pytest.fixture
def evidence() -> Evidence:
    return cases.evidence((2, 1), rows=4, images=IMAGES, seed=3, distinct=30)


def plan(evidence: Evidence, row: int = 1, cut: int = 45, setting: str = "input-dependent") -> Plan:
    stages = (Stage(1, HEADS[0], row, None if setting == "anytime" else cut), Stage(3, HEADS[1], 2, None))
    return plan_of_stages(evidence, setting, stages, None)


def leaves_first(evidence: Evidence, row: int = 1, cut: int = 45) -> list[bool]:
    head = evidence.statistics.heads.index(HEADS[0])
    return [int(evidence.statistics.counts[image, head, row]) >= cut for image in range(IMAGES)]


def mean(evidence: Evidence, graph: str) -> float:
    return evidence.table.entries[graph, "fp32"].mean_ms


def test_the_times_of_the_stages_add_up_to_what_an_image_waits(evidence: Evidence) -> None:
    view = plan_view(plan(evidence), evidence, chosen=True)
    first, second = (stage.times for stage in view.stages)
    assert first is not None
    assert second is not None
    assert view.upload_ms == pytest.approx(mean(evidence, "upload"))
    assert first.segment == "segment-0-1"
    assert first.segment_ms == pytest.approx(mean(evidence, "segment-0-1"))
    assert first.head_ms == pytest.approx(mean(evidence, f"head-{HEADS[0]}"))
    assert second.segment == "segment-1-3"
    output = "output-2x3"  # of both exit points
    spent = mean(evidence, "upload") + mean(evidence, "segment-0-1") + mean(evidence, f"head-{HEADS[0]}")
    spent += mean(evidence, "null")
    assert first.done_ms == pytest.approx(spent + mean(evidence, output) + mean(evidence, "download"))
    spent += mean(evidence, "segment-1-3") + mean(evidence, f"head-{HEADS[1]}")
    assert second.done_ms == pytest.approx(spent + mean(evidence, output) + mean(evidence, "download"))
    assert (second.decision_ms, first.decision_ms) == (0.0, pytest.approx(mean(evidence, "null")))


def test_the_histograms_hold_each_image_on_its_side_of_the_cut(evidence: Evidence) -> None:
    view, left = plan_view(plan(evidence), evidence, chosen=True), leaves_first(evidence)
    assert 0 < sum(left) < IMAGES, "the case should have images on both sides"
    sure = view.stages[0].sure
    assert sure is not None
    assert (sure.cells, sure.cut) == (90, 0.5)
    assert (sum(sure.left), sum(sure.went_on)) == (sum(left), IMAGES - sum(left))
    head = evidence.statistics.heads.index(HEADS[0])
    shares = [int(count) / 90 for count in evidence.statistics.counts[:, head, 1]]
    for i in range(len(sure.left)):
        low, high = sure.start + i * sure.width, sure.start + (i + 1) * sure.width
        inside = [n for n in range(IMAGES) if low - 1e-9 <= shares[n] < high - 1e-9]
        assert sure.left[i] == sum(left[n] for n in inside)
        assert sure.went_on[i] == sum(not left[n] for n in inside)
    last = view.stages[1].sure
    assert last is not None
    assert (sum(last.left), sum(last.went_on), last.cut) == (IMAGES - sum(left), 0, None)
    assert [stage.arriving for stage in view.stages] == [1.0, pytest.approx(1 - sum(left) / IMAGES)]


def test_an_exit_that_no_image_reaches_has_no_histogram(evidence: Evidence) -> None:
    view = plan_view(plan(evidence, cut=0), evidence, chosen=True)
    assert view.stages[1].sure is None
    assert view.stages[0].sure is not None


def test_the_iou_of_a_class_is_that_of_the_exits_taken(evidence: Evidence) -> None:
    view, left, found = plan_view(plan(evidence), evidence, chosen=True), leaves_first(evidence), evidence.statistics
    heads = [found.heads.index(HEADS[0] if early else HEADS[1]) for early in left]
    for k, iou in enumerate(view.iou):
        right = sum(int(found.intersection[n, heads[n], k]) for n in range(IMAGES))
        guessed = sum(int(found.predicted[n, heads[n], k]) for n in range(IMAGES))
        labelled = sum(int(found.labelled[n, k]) for n in range(IMAGES))
        assert iou == pytest.approx(100 * right / (guessed + labelled - right))
    last, final = classes_of(evidence), found.heads.index(HEADS[1])
    right, guessed = (int(array[:, final, 0].sum()) for array in (found.intersection, found.predicted))
    assert last.baseline[0] == pytest.approx(100 * right / (guessed + int(found.labelled[:, 0].sum()) - right))


def test_a_class_without_labels_has_no_iou(evidence: Evidence) -> None:
    found = evidence.statistics
    labelled, right = found.labelled.copy(), found.intersection.copy()
    labelled[:, 2] = right[:, :, 2] = 0
    without = dataclasses.replace(
        evidence, statistics=dataclasses.replace(found, labelled=labelled, intersection=right)
    )
    assert plan_view(plan(without), without, chosen=True).iou[2] is None
    assert classes_of(without).baseline[2] is None


def test_every_plan_stands_once_the_most_accurate_first_and_the_chosen_one_among_them(evidence: Evidence) -> None:
    front = tuple(plan(evidence, cut=cut) for cut in (30, 45, 60))
    off = plan(evidence, cut=50)
    proof = Certificate(10, 10, 0, 0, 0.0, True)
    views = plan_views(SearchResult(off, front, proof), {"fp32": evidence})
    assert len(views) == 4
    assert [view.predicted.miou for view in views] == sorted(
        (one.predicted.miou for one in (*front, off)), reverse=True
    )
    assert [view.stages[0].cut for view in views if view.chosen] == [50]
    assert [view.stages[0].cut for view in views if not view.on_front] == [50]
    for view in views:
        assert view.max_err_pp == pytest.approx(off.baseline.miou - view.predicted.miou)
    assert len(plan_views(SearchResult(front[0], front, proof), {})) == 3
    bare = plan_views(SearchResult(front[0], front, proof), {})[0]
    assert (bare.iou, bare.upload_ms, bare.stages[0].times, bare.stages[0].sure) == ((), None, None, None)


def test_every_exit_of_an_anytime_plan_is_reached_by_all(evidence: Evidence) -> None:
    view = plan_view(plan(evidence, setting="anytime"), evidence, chosen=True)
    assert [stage.arriving for stage in view.stages] == [1.0, 1.0]
    times = [stage.times for stage in view.stages]
    assert times[0] is not None
    assert times[0].decision_ms == 0.0


def test_estimates_and_borrowed_measurements_are_told_apart_in_the_costs(evidence: Evidence) -> None:
    table, key = evidence.table, ("segment-0-1", "fp32")
    guess = dataclasses.replace(table.entries[key], source="estimated", error=1.4, shared_with="segment-1-3")
    other = Latency("segment-0-1", "x", "fp16", *(0.5,) * 5, 9, "measured")
    entries = {**table.entries, key: guess, ("segment-0-1", "fp16"): other}
    costs = costs_of(dataclasses.replace(table, entries=entries), "fp32")
    by_ends = {(start, end): cost for start, end, cost in costs.segments}
    assert set(by_ends) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
    shown = by_ends[0, 1]
    assert (shown.source, shown.error, shown.shared_with) == ("estimated", 1.4, "segment-1-3")
    assert by_ends[0, 2].source == "measured"
    assert {cost.graph for cost in costs.others} >= {"upload", "download", "null", "baseline"}


def test_the_papers_rows_are_the_ratios_that_are_known_of_them() -> None:
    """The ratios as others worked them out from the published table: rows iii, iv and viii."""
    rows = {row.row: row for row in paper_rows()}
    assert rows["iv"].workload_ratio == pytest.approx(4.01, abs=0.005)
    assert rows["iv"].latency_ratio == pytest.approx(2.64, abs=0.005)
    assert rows["viii"].workload_ratio == pytest.approx(2.52, abs=0.005)
    assert rows["viii"].latency_ratio == pytest.approx(1.73, abs=0.005)
    assert rows["iii"].workload_ratio == pytest.approx(3.37, abs=0.005)
    assert rows["iii"].latency_ratio == pytest.approx(2.23, abs=0.005)
    assert rows["viii"].miou_pp == pytest.approx(-1.0)
    assert rows["iii"].miou_pp == pytest.approx(-0.11)


def test_a_page_with_hundreds_of_plans_stays_below_six_megabytes(evidence: Evidence) -> None:
    """Beside pictures, which take less than 300 kB in base64: three images of five panels, 400 pixels wide."""
    chosen = plan(evidence)
    proof = Certificate(10, 10, 0, 0, 0.0, True)
    view = plan_view(chosen, evidence, chosen=True)
    found = SearchFound(SearchResult(chosen, (chosen,) * 300, proof), (view,) * 300, None)
    gone = Missing("run `this`")
    page = report_page(Report("host", found, classes_of(evidence), gone, gone, gone, ()))
    assert len(page.encode()) < 5_700_000
