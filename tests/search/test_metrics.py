"""A plan's figures on paper: latency, workload, memory and mIoU of a case worked out by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.latency.table import GraphFailure, Latency, LatencyTable
from mess_compile.network import CandidateNetwork, ExitPoint, Gate, GraphSet, GraphSpec, Head
from mess_compile.runtime.base.errors import InputError, StaleError
from mess_compile.runtime.engines.engine import TensorSpec
from mess_compile.search.metrics import (
    Evidence,
    anytime_reports,
    baseline_figures,
    faded_classes,
    figures_of_stages,
    replay,
)
from mess_compile.search.plan import AnytimeReport, FadedClass, Stage
from mess_compile.search.requirement import Limit, Requirement
from mess_compile.search.solver import search_recipes
from tests.search.cases import against_own_output, evidence

HEADS = ("exit1.fcn-crm1-b0", "exit2.fcn-crm1-b0")
STAGES = (Stage(1, HEADS[0], 0, 5), Stage(2, HEADS[1], 0, None))
COSTS_MS = {
    "upload": 1.0,
    "segment-0-1": 2.0,
    "segment-1-2": 4.0,
    "segment-0-2": 5.5,
    f"head-{HEADS[0]}": 0.5,
    f"head-{HEADS[1]}": 0.7,
    "output-2x2": 0.3,
    "download": 0.1,
    "null": 0.05,
    "baseline": 7.0,
}


def by_hand() -> Evidence:
    """Two exit points, two classes, four images of 10 pixels; images 0 and 2 are easy."""
    points = (ExitPoint("exit1", "b1", 3, (2, 2), 1000), ExitPoint("exit2", "b2", 3, (2, 2), 3000))
    heads = (Head(1, "fcn-crm1-b0", 10), Head(2, "fcn-crm1-b0", 20))
    candidate = CandidateNetwork("tiny", ("road", "sky"), ((0, 0, 0), (1, 1, 1)), (4, 4), points, heads, HEADS[1], "id")
    gate = Gate(thresholds=(0.5,))
    image = TensorSpec("image", "uint8", (1, 4, 4, 3))  # 48 bytes
    exit1, exit2 = (TensorSpec(f"exit{b}", "float32", (1, 3, 2, 2)) for b in (1, 2))  # 48 bytes each
    thresholds = TensorSpec("thresholds", "float32", (1, 2))  # 8 bytes
    logits, counts = TensorSpec("logits", "float32", (1, 2, 2, 2)), TensorSpec("counts", "int32", (1,))  # 32, 4
    labels = TensorSpec("labels", "uint8", (1, 4, 4))  # 16 bytes
    ends = {
        "segment-0-1": ((image,), (exit1,), 100, 7),
        "segment-1-2": ((exit1,), (exit2,), 200, 9),
        "segment-0-2": ((image,), (exit2,), 300, 9),
        f"head-{HEADS[0]}": ((exit1, thresholds), (logits, counts), 10, 50),
        f"head-{HEADS[1]}": ((exit2, thresholds), (logits, counts), 20, 60),
        "output-2x2": ((logits,), (labels,), 0, 40),
        "baseline": ((image,), (labels,), 320, 70),
    }
    specs = {n: GraphSpec(n, f"{n}.onnx", n, i, o, 0, weights, space) for n, (i, o, weights, space) in ends.items()}
    entries = {
        (n, "fp32"): Latency(n, n if n in ends else "", "fp32", ms, ms, ms, ms, 2 * ms, 30, "measured")
        for n, ms in COSTS_MS.items()
    }
    statistics = ExitStatistics(
        heads=HEADS,
        classes=candidate.classes,
        cells=(4, 4),
        thresholds=np.full((1, 2), 0.5, np.float32),
        counts=np.array([[[9], [9]], [[1], [9]], [[5], [9]], [[4], [9]]], np.int32),
        intersection=np.array([[[5, 3], [5, 4]], [[1, 2], [4, 4]], [[6, 2], [6, 3]], [[0, 1], [3, 5]]]),
        predicted=np.array([[[6, 4], [5, 5]], [[5, 5], [5, 5]], [[7, 3], [6, 4]], [[6, 4], [4, 6]]]),
        labelled=np.array([[5, 5], [5, 5], [6, 4], [4, 6]]),
        image_id=("a", "b", "c", "d"),
        group=("g",) * 4,
        network="id",
        gate=gate,
        precision="fp32",
        device="host",
        library="onnxruntime",
        split="val[:4]",
    )
    table = LatencyTable("host", "onnxruntime", "1", "id", {}, "measured", entries, {"fp32": "id"})
    return Evidence(GraphSet(Path("graphs"), candidate, gate, specs), table, statistics)


def test_figures_of_a_plan_by_hand() -> None:
    figures = figures_of_stages(by_hand(), "input-dependent", STAGES)
    early, late = 1 + 2 + 0.5 + 0.05 + 0.3 + 0.1, 1 + 2 + 0.5 + 0.05 + 4 + 0.7 + 0.3 + 0.1
    assert figures.latency_ms == pytest.approx((early + late) / 2)
    assert figures.p95_ms == pytest.approx(late)
    excesses = (1, 2, 0.5, 0.05, 4, 0.7, 0.3, 0.1)  # every p99 is twice the mean
    assert figures.worst_ms == pytest.approx(late + sum(each**2 for each in excesses) ** 0.5, abs=1e-6)
    assert figures.gmacs == pytest.approx((1010 + 3030) / 2 / 1e9)
    assert figures.memory_bytes == (100 + 200 + 10 + 20) + 60 + (48 + 48 + 48 + 8 + 32 + 4 + 16)
    assert figures.exit_rates == (0.5, 0.5)
    road, sky = (5 + 4 + 6 + 3) / (6 + 5 + 7 + 4 + 20 - 18), (3 + 4 + 2 + 5) / (4 + 5 + 3 + 6 + 20 - 14)
    assert figures.miou == pytest.approx(100 * (road + sky) / 2)
    assert (figures.images, figures.split, figures.source) == (4, "val[:4]", "measured")


def test_figures_of_the_baseline_by_hand() -> None:
    figures = baseline_figures(by_hand())
    assert figures.latency_ms == pytest.approx(8.1)
    assert figures.worst_ms == pytest.approx(8.1 + (1**2 + 7**2 + 0.1**2) ** 0.5, abs=1e-6)
    assert figures.gmacs == pytest.approx(3020 / 1e9)
    assert figures.memory_bytes == 320 + 70 + 48 + 16
    assert figures.miou == pytest.approx(100 * (18 / (20 + 20 - 18) + 16 / (20 + 20 - 16)) / 2)


def with_alone(case: Evidence, right: tuple[int, int]) -> Evidence:
    """A baseline trained alone at 6.5 ms that is right on so many pixels of each class on every image, and no other."""
    pixels = np.tile(right, (4, 1, 1))
    table, graphs, statistics = case.table, case.graph_set, case.statistics
    spec = dataclasses.replace(graphs.graphs["baseline"], name="baseline-alone", bytes=310)
    entry = dataclasses.replace(table.entries["baseline", "fp32"], graph="baseline-alone", mean_ms=6.5, p99_ms=13.0)
    return dataclasses.replace(
        case,
        table=dataclasses.replace(table, entries={**table.entries, ("baseline-alone", "fp32"): entry}),
        graph_set=dataclasses.replace(
            graphs, graphs={**graphs.graphs, "baseline-alone": spec}, baseline_alone="alone-id"
        ),
        statistics=dataclasses.replace(
            statistics,
            intersection=np.concatenate([statistics.intersection, pixels], axis=1),
            predicted=np.concatenate([statistics.predicted, pixels], axis=1),
            baseline_alone="alone-id",
        ),
    )


def test_a_better_baseline_trained_alone_takes_the_place_of_the_final_exit() -> None:
    case = with_alone(by_hand(), (5, 4))
    figures = baseline_figures(case)
    assert case.baseline == "baseline-alone"
    assert figures.miou == pytest.approx(100 * (20 / 20 + 16 / 20) / 2)
    assert figures.latency_ms == pytest.approx(1 + 6.5 + 0.1)
    assert figures.worst_ms == pytest.approx(7.6 + (1**2 + 6.5**2 + 0.1**2) ** 0.5, abs=1e-6)
    assert figures.gmacs == pytest.approx(3020 / 1e9)
    assert figures.memory_bytes == 310 + 70 + 48 + 16


def test_a_worse_baseline_trained_alone_changes_nothing() -> None:
    case = with_alone(by_hand(), (4, 3))
    assert case.baseline == "baseline"
    assert baseline_figures(case) == baseline_figures(by_hand())


def test_a_fused_segment_and_no_decision_when_there_is_one_exit() -> None:
    figures = figures_of_stages(by_hand(), "budgeted", (Stage(2, HEADS[1], 0, None),))
    assert figures.latency_ms == pytest.approx(1 + 5.5 + 0.7 + 0.3 + 0.1)
    assert figures.exit_rates == (1.0,)


def test_an_anytime_plan_pays_for_every_report() -> None:
    case = by_hand()
    first = 1 + 2 + 0.5 + 0.3 + 0.1
    second = first + 4 + 0.7 + 0.3 + 0.1
    final = 100 * (18 / 22 + 16 / 24) / 2
    early = 100 * (12 / (24 + 20 - 12) + 8 / (16 + 20 - 8)) / 2
    assert anytime_reports(case, HEADS) == (
        AnytimeReport(pytest.approx(first), pytest.approx(early)),
        AnytimeReport(pytest.approx(second), pytest.approx(final)),
    )
    figures = figures_of_stages(case, "anytime", [dataclasses.replace(stage, cut=None) for stage in STAGES])
    assert (figures.latency_ms, figures.miou) == (pytest.approx(second), pytest.approx(final))
    assert figures.exit_rates == (0.0, 1.0)


def test_energy_is_asked_of_tables_that_tell_it() -> None:
    case = evidence((1,), 2, 4, seed=0)
    graphs = ("upload", "segment-0-2", "head-exit2.fcn-crm1-b0", "output-4x6", "download")
    energy = sum(case.table.entries[graph, "fp32"].energy_mj or 0.0 for graph in graphs)
    figures = figures_of_stages(case, "budgeted", (Stage(2, "exit2.fcn-crm1-b0", 0, None),))
    assert figures.energy_mj == pytest.approx(energy)
    silent = dataclasses.replace(case.table.latency("head-exit2.fcn-crm1-b0"), energy_mj=None)
    entries = {**case.table.entries, ("head-exit2.fcn-crm1-b0", "fp32"): silent}
    lacking = dataclasses.replace(case, table=dataclasses.replace(case.table, entries=entries))
    assert figures_of_stages(lacking, "budgeted", (Stage(2, "exit2.fcn-crm1-b0", 0, None),)).energy_mj is None
    for requirement in (Requirement(objective="energy"), Requirement(max_energy=Limit(0.5, relative=True))):
        with pytest.raises(
            InputError, match=r"energy of head-exit2.fcn-crm1-b0: run `mess-compile profile --device host --all`"
        ):
            search_recipes([lacking], requirement)
    nothing = {key: dataclasses.replace(entry, energy_mj=None) for key, entry in case.table.entries.items()}
    silent_device = dataclasses.replace(case, table=dataclasses.replace(case.table, entries=nothing))
    with pytest.raises(InputError, match="profile where the device reports its power"):
        search_recipes([silent_device], Requirement(objective="energy"))


def test_a_replay_takes_the_exits_that_other_images_take() -> None:
    case = by_hand()
    exits, figures = replay(case, "input-dependent", STAGES)
    assert exits.tolist() == [1, 2, 1, 2]
    others = dataclasses.replace(case, statistics=case.statistics.select([3, 1, 0]))
    exits, figures = replay(others, "input-dependent", STAGES)
    assert exits.tolist() == [2, 2, 1]
    assert figures.exit_rates == (1 / 3, 2 / 3)
    assert figures.images == 3


def test_statistics_and_latencies_of_two_recipes_make_no_plan() -> None:
    case = by_hand()
    with pytest.raises(StaleError, match="another recipe"):
        dataclasses.replace(case, statistics=dataclasses.replace(case.statistics, precision="fp16"))
    with pytest.raises(
        StaleError, match="has fp16, not fp32: run `mess-compile profile --device host --precision fp16"
    ):
        dataclasses.replace(case, table=dataclasses.replace(case.table, recipes={"fp16": "id"}))


def test_evidence_without_images_or_of_other_graphs_is_refused() -> None:
    case = evidence((1,), 2, 4, seed=0)
    with pytest.raises(InputError, match="no images"):
        dataclasses.replace(case, statistics=case.statistics.select([]))
    with pytest.raises(StaleError, match="another network"):
        dataclasses.replace(case, statistics=dataclasses.replace(case.statistics, network="other"))
    with pytest.raises(StaleError, match="profile --device host"):
        dataclasses.replace(case, table=dataclasses.replace(case.table, network="other"))


def test_recipes_that_saw_different_images_are_not_compared() -> None:
    case = by_hand()
    other = dataclasses.replace(case, statistics=case.statistics.select([0, 1]))
    with pytest.raises(StaleError, match="evaluations of the precisions are of different images"):
        search_recipes([case, other], Requirement())


def test_recipes_of_different_truth_are_not_compared() -> None:
    case = by_hand()
    with pytest.raises(StaleError, match="fp32 against labels, fp32 against the network's own output"):
        search_recipes([case, against_own_output(case)], Requirement())


def test_a_target_that_has_no_plan_with_exits_runs_the_whole_network() -> None:
    case = evidence((1,), 2, 4, seed=0)
    left = {key: entry for key, entry in case.table.entries.items() if not key[0].startswith("output-")}
    gone = {key: GraphFailure(key[0], f"sha-{key[0]}", "fp32", "no") for key in case.table.entries if key not in left}
    lacking = dataclasses.replace(case, table=dataclasses.replace(case.table, entries=left, failed=gone))
    for setting in ("input-dependent", "anytime"):
        plan = search_recipes([lacking], Requirement(setting=setting, max_exits=3)).plan
        assert [graph.name for graph in plan.graphs] == ["baseline"]


def test_a_class_that_nearly_vanishes_is_named_with_what_is_left_of_it() -> None:
    """3 % of changed pixels may be all of a rare class."""
    case = against_own_output(by_hand())
    statistics, early = case.statistics, case.statistics.head_index(HEADS[0])
    predicted = statistics.predicted.copy()
    predicted[:, early] = statistics.labelled
    predicted[:, early, 1] = [0, 0, 1, 0]
    changed = dataclasses.replace(statistics, predicted=predicted)
    own = int(statistics.labelled[:, 1].sum())
    alone = (Stage(1, HEADS[0], 0, None),)
    assert faded_classes(changed, "budgeted", alone) == (FadedClass(statistics.classes[1], 1 / own),)
    assert faded_classes(dataclasses.replace(changed, truth="labels"), "budgeted", alone) == ()
