"""The network as it came, uncut, is a plan: searched, bundled, run, verified and refined like any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mess_compile.bench.run import CheckedPromise, Column, _checked, _MeasuredRun
from mess_compile.bundle.single_file import write_single_file
from mess_compile.graph.gate import append_sound
from mess_compile.report.search_output import headline
from mess_compile.runtime.base.errors import InputError, NotFiniteError, StaleError
from mess_compile.runtime.bundle import archive, manifest
from mess_compile.runtime.cascade.cascade import load
from mess_compile.runtime.serve.verify import verify_bundle
from mess_compile.search.display import (
    by_name,
    estimate_sentence,
    exits_table,
    kind_of_plan,
    speed,
    tail_sentence,
    what_would_cut,
    work,
)
from mess_compile.search.objectives import promises_of
from mess_compile.search.plan import Plan, read_result, write_result
from mess_compile.search.requirement import Limit, Requirement
from mess_compile.search.solver import search
from tests import small_network
from tests.search.cases import evidence


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    graphs = small_network.graph_set(tmp_path / "graphs", whole=True)
    path = tmp_path / "whole.mess"
    small_network.write_parts(path, [small_network.part(graphs, small_network.whole_plan())])
    return path


def test_its_labels_are_those_of_the_last_exit_and_it_claims_no_confidence(bundle: Path) -> None:
    frame = small_network.frame(5)
    _, wanted = small_network.expected(frame)[1]
    with load(bundle) as cascade:
        prediction = cascade(frame)
        refined = list(cascade.refine(frame))
        together = cascade.batch([frame, frame])
        np.testing.assert_array_equal(prediction.labels, wanted)
        assert (prediction.exit, prediction.exit_point, prediction.confidence) == (1, 2, None)
        assert [each.exit for each in refined] == [1]
        assert all((each.labels == wanted).all() for each in (*refined, *together))
        with pytest.raises(InputError, match="has no confidence map"):
            cascade.confidence_map(cascade(frame))
        assert cascade.metrics().exits == (5,)


def test_verify_compares_labels(bundle: Path, tmp_path: Path) -> None:
    checks = verify_bundle(bundle)
    golden = [check for check in checks if check.name.startswith("golden")]
    assert golden
    assert all(
        check.passed and check.detail == "the full network; 100.000 % of the labels are equal" for check in golden
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_network_that_gives_no_numbers_raises_instead_of_labelling(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = small_network.CLASSIFIERS.copy()
    broken[1, 0, 0] = value
    monkeypatch.setattr(small_network, "CLASSIFIERS", broken)
    graphs = small_network.graph_set(tmp_path / "graphs", whole=True)
    with pytest.raises(NotFiniteError, match="baseline gave NaN or infinities on onnxruntime"):
        small_network.write_parts(tmp_path / "w.mess", [small_network.part(graphs, small_network.whole_plan())])


@pytest.mark.parametrize(("cell", "sound"), [([0.0, 1.0, 2.0], 4), ([np.nan, 1.0, 2.0], 3), ([np.inf, 1.0, 2.0], 3),
                                             ([-np.inf, 1.0, 2.0], 4), ([-np.inf] * 3, 3)])  # fmt: skip
def test_cells_without_a_finite_best_logit_are_not_sound(cell: list[float], sound: int) -> None:
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 3, 2, 2))
    model = helper.make_model(helper.make_graph([], "g", [logits], []), opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    append_sound(model)
    onnx.checker.check_model(model)
    values = np.random.default_rng(0).normal(0, 5, (1, 3, 2, 2)).astype(np.float32)
    values[0, :, 1, 0] = cell
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(["sound"], {"logits": values})[0].tolist() == [sound]


def test_one_onnx_file_gives_its_labels_and_no_confidence(bundle: Path, tmp_path: Path) -> None:
    write_single_file(bundle, "host:fp32", tmp_path / "whole.onnx")
    frame = small_network.frame(3)
    session = onnxruntime.InferenceSession(str(tmp_path / "whole.onnx"), providers=["CPUExecutionProvider"])
    labels, exit_, confidence = session.run(["labels", "exit", "confidence"], {"image": frame[None]})
    np.testing.assert_array_equal(labels[0], small_network.expected(frame)[1][1])
    assert exit_.tolist() == [1]
    assert np.isnan(confidence).all()


def test_graphs_of_an_earlier_release_are_refused_with_what_to_run(tmp_path: Path) -> None:
    graphs = small_network.graph_set(tmp_path / "graphs", whole=True)
    spec = graphs.graphs["baseline"]
    graphs.graphs["baseline"] = replace(spec, outputs=spec.outputs[:1])
    with pytest.raises(StaleError, match=r"was exported by an earlier release.*run `mess-compile export`"):
        small_network.write_parts(tmp_path / "w.mess", [small_network.part(graphs, small_network.whole_plan())])


def test_a_bundle_of_the_last_release_reads_as_before(tmp_path: Path) -> None:
    written = small_network.write_bundle(tmp_path / "cut.mess")
    content = json.loads(manifest.manifest_to_json(written))
    content["version"] = 5
    for plan in content["plans"]:
        del plan["promises"]
        for figures in (plan["predicted"], plan["baseline"], *(each["predicted"] for each in plan["operating_points"])):
            del figures["error"]
    assert manifest.manifest_from_json(json.dumps(content)) == written
    content["version"] = 4
    with pytest.raises(archive.BundleError, match="has version 4; this release reads 5, 6 and 7"):
        manifest.manifest_from_json(json.dumps(content))


def slow_parts(seed: int = 4) -> Plan:
    """The plan of a target on which every graph takes a fixed time, as small networks on a CPU do."""
    case = evidence((1, 1), 2, 6, seed)
    entries = {key: replace(entry, mean_ms=1.0, p99_ms=1.0) for key, entry in case.table.entries.items()}
    return search(replace(case, table=replace(case.table, entries=entries)), Requirement(max_err_pp=0.0)).plan


def test_it_wins_where_cutting_costs_more_than_it_saves() -> None:
    plan = slow_parts()
    assert [stage.head for stage in plan.stages] == ["baseline"]
    assert (plan.predicted.latency_ms, plan.predicted.exit_rates) == (3.0, (1.0,))  # upload, one graph, download
    assert plan.predicted == plan.baseline
    assert kind_of_plan(plan) == (
        "the plan is the full network: no plan with early exits is better under this requirement"
    )


def test_a_network_before_and_after_attach_has_two_names() -> None:
    """Both were called the full network, so that nobody knew whether the plan is the network that they brought."""
    plan = slow_parts()
    after = replace(plan, retrained=True, baseline_name="baseline-alone")
    came = replace(after, stages=(replace(plan.stages[0], head="baseline-alone"),))
    for each, name in ((after, "network after attach"), (came, "network as it came")):
        assert f"the {name}: no plan" in headline(each)
        assert f"the plan is the {name}: " in str(kind_of_plan(each))
        assert exits_table(each)[1][0][0] == name
        assert by_name(each)[0][0] == "baseline (network as it came)"
        assert "full network" not in repr(each)


def test_what_would_let_a_cut_plan_win_is_told() -> None:
    case = evidence((1, 1), 2, 6, seed=7)
    result = search(case, Requirement(max_err_pp=0.0))
    cheap = replace(result, front=(result.plan,))
    assert what_would_cut(cheap, Requirement(max_err_pp=0.0)).startswith("no plan with exits is faster on host")
    faster = replace(
        result.plan,
        stages=(replace(result.plan.stages[0], head="exit1.fcn-crm1-b0", exit_point=1),),
        predicted=replace(
            result.plan.predicted,
            latency_ms=result.plan.predicted.latency_ms / 2,
            miou=result.plan.baseline.miou - 3.04,
        ),
    )
    either = replace(result, front=(faster, result.plan))
    ends = " would allow a plan with exits that is 2.00x faster"
    assert what_would_cut(either, Requirement(max_err_pp=0.0)) == f"--max-err 3.1%{ends}"
    by_memory = Requirement(max_err_pp=5.0, objective="memory")  # the error asked for is not what stands in the way
    assert what_would_cut(either, by_memory) == f"--optimise latency{ends}"
    assert what_would_cut(either, Requirement(objective="accuracy")) == f"--optimise latency --max-err 3.1%{ends}"
    changed = replace(either, front=(replace(faster, predicted=replace(faster.predicted, change=4.21)), result.plan))
    assert what_would_cut(changed, Requirement(max_change=4.0)) == f"--max-change 4.3%{ends}"
    assert what_would_cut(cheap, Requirement(max_change=0.5)).startswith(
        "no plan with exits that keeps --max-change 0.5% is faster on host"
    )
    anytime = replace(either, plan=replace(result.plan, setting="anytime"))
    told = what_would_cut(anytime, Requirement(setting="anytime", deadline_ms=20.0))
    assert told.startswith(f"a shorter --deadline below {result.plan.predicted.latency_ms:.2f} ms")


def test_a_plan_and_its_promises_come_back_from_disk(tmp_path: Path) -> None:
    case = evidence((1, 1), 2, 6, seed=2)
    requirement = Requirement(max_err_pp=50.0, max_latency=Limit(1.5, relative=True), max_memory_bytes=1 << 20)
    result = search(case, requirement)
    result = replace(result, plan=replace(result.plan, promises=promises_of(requirement, result.plan)))
    write_result(tmp_path / "plan.json", result)
    found = read_result(tmp_path / "plan.json").plan.promises
    assert [(each.quantity, each.limit, each.relative) for each in found] == [
        ("err_pp", 50.0, False),
        ("latency_ms", 1.5, True),
        ("memory_bytes", float(1 << 20), False),
    ]


@pytest.mark.parametrize(
    ("ratio", "told"), [(3.5, "3.50x faster"), (0.84, "19 % slower"), (1.002, "as fast"), (0.992, "0.8 % slower")]
)
def test_slower_is_said_as_slower(ratio: float, told: str) -> None:
    assert speed(ratio) == told


def test_more_work_is_said_as_more() -> None:
    assert (work(6.45), work(0.8), work(1.0)) == ("6.45x less work", "25 % more work", "as much work")


def figures_with(plan: Plan, **changes: float) -> Plan:
    return replace(plan, predicted=replace(plan.predicted, **changes))


def test_an_early_exit_that_every_image_takes_is_called_a_shorter_network() -> None:
    plan = small_network.plan()
    assert (kind_of_plan(plan) or "").startswith(
        "the plan is a shorter network: every image leaves at exit1.fcn-crm1-b0"
    )
    assert kind_of_plan(replace(plan, predicted=replace(plan.predicted, exit_rates=(0.7, 0.3)))) is None
    assert (kind_of_plan(replace(plan, setting="budgeted")) or "").endswith("as in every plan of the budgeted setting")


def test_a_tail_that_is_worse_than_the_baselines_is_told_beside_the_mean() -> None:
    plan = small_network.plan()
    assert tail_sentence(plan) is None
    worse = figures_with(plan, latency_ms=1.0, p95_ms=2.4, worst_ms=3.1)
    assert tail_sentence(worse) == (
        "the slowest images take longer than with the baseline: p95 2.40 ms against 2.00 ms, "
        "worst case 3.10 ms against 2.50 ms"
    )


def test_a_saving_within_the_estimates_error_is_not_sold() -> None:
    plan = figures_with(small_network.plan(), latency_ms=1.2, error=1.6)
    told = estimate_sentence(plan) or ""
    assert "off by a factor of up to 1.6: 1.25x faster is within that error" in told
    assert "within" not in (estimate_sentence(figures_with(plan, latency_ms=0.5, error=1.6)) or "")
    assert estimate_sentence(small_network.plan()) is None


def test_a_bench_holds_every_promise_against_what_it_measured() -> None:
    baseline, measured = Column(60.0, 10.0, 1.0, (1.0,)), Column(57.09, 6.0, 0.4, (0.5, 0.5))
    lost = np.array([np.nan, 0.75])
    run = _MeasuredRun((1, 2), np.array([[[4.0, 8.0]], [[10.0, 10.0]]]), 57.09, 60.0, 4.0, 0.0, lost)
    asked = (
        manifest.Promise("err_pp", 2.0, False, 0.0),
        manifest.Promise("err_pp", 2.0, False, -1.0),  # counted from one point less than the baseline has
        manifest.Promise("latency_ms", 0.5, True, 0.0),
        manifest.Promise("latency_ms", 7.0, False, 0.0),
        manifest.Promise("worst_ms", 8.5, False, 0.0),
        manifest.Promise("energy_mj", 5.0, False, 0.0),
        manifest.Promise("class_err_pp", 0.5, False, 0.0, "crack", 39.5),
        manifest.Promise("class_err_pp", 0.5, False, 0.0, "good", 89.5),
    )
    network = SimpleNamespace(classes=("good", "crack"))
    plan = SimpleNamespace(promises=asked, truth="labels")
    promising: Any = SimpleNamespace(plan=plan, manifest=SimpleNamespace(network=network))
    found = _checked(promising, measured, baseline, run, "labels")
    assert [each.held for each in found] == [False, True, False, True, True, None, False, None]
    assert found[6].sentence == "MISSED: IoU of crack: at most 0.5 pp asked, 0.75 pp lost on these images"
    assert found[0].sentence == "MISSED: at most 2 pp asked, 2.91 lost on these images"
    assert found[2].sentence == "MISSED: at most 5.00 ms mean latency asked, 6.00 measured"
    assert found[5] == CheckedPromise("energy_mj", 5.0, None, None)
    assert _checked(promising, measured, baseline, run, "the network's own output")[0].held is None, "of another truth"


def test_what_a_program_prints_is_short() -> None:
    case = evidence((1, 2), 3, 8, seed=1)
    result = search(case, Requirement())
    for thing in (result, result.plan, case.table, case.statistics):
        assert len(repr(thing)) < 320, repr(thing)
        assert "\n" not in repr(thing)


def test_the_error_of_an_estimate_is_that_of_the_graphs_by_their_time() -> None:
    case = evidence((1,), 2, 5, seed=1)
    entries = dict(case.table.entries)
    for name, mean_ms, source, error in (("baseline", 3.0, "estimated", 2.0), ("segment-0-1", 1.0, "measured", None)):
        entries[name, "fp32"] = replace(entries[name, "fp32"], mean_ms=mean_ms, source=source, error=error)
    case = replace(case, table=replace(case.table, entries=entries))
    assert case.error(["baseline"]) == 2.0
    assert case.error(["segment-0-1"]) is None
    assert case.error(["baseline", "segment-0-1"]) == pytest.approx((3.0 * 2.0 + 1.0) / 4.0)
