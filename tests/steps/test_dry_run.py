"""Whoever asks what a command would do wants it neither done nor begun, and a figure to plan the afternoon by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mess_compile import steps
from mess_compile.engines import prepare
from mess_compile.network import GraphSet
from mess_compile.runtime.measure import measure
from mess_compile.runtime.serve import worker
from mess_compile.workspace import Workspace
from tests.commands import TRAIN, contents, done, edit, printed_json, refused, run
from tests.conftest import RTX, Engines
from tests.json_docs import differences

NOWHERE = "ssh://nobody@192.0.2.1"


def foreseen(workspace: Path, *arguments: str) -> list[dict[str, Any]]:
    before = contents(workspace)
    steps = printed_json("-C", workspace, *arguments, "--dry-run")["dry_run"]
    assert "ESTIMATED" in done("-C", workspace, *arguments, "--dry-run")
    assert contents(workspace) == before
    assert all(0 <= step["least_s"] <= step["most_s"] for step in steps)
    return list(steps)


def test_a_profile_tells_how_many_graphs_and_how_long(workspace: Path) -> None:
    (step,) = foreseen(workspace, "profile", "--device", "host")
    table = json.loads((workspace / "latency" / "host.json").read_text())
    effort = measure.Effort()
    assert step["graphs"] == len(table["entries"])
    assert f"{step['graphs']} latencies measured before, 0 estimated" in step["basis"]
    assert step["least_s"] >= 0.999 * (effort.warm_up_s + step["graphs"] * effort.windows * effort.window_s)
    assert step["most_s"] == effort.warm_up_s + step["graphs"] * effort.max_s
    (longer,) = foreseen(workspace, "profile", "--device", "host", "--seconds", "50")
    assert longer["most_s"] > 5 * step["most_s"]


def test_what_a_broken_measurement_left_is_told(workspace: Path) -> None:
    kind, window = worker.event_to_message(measure.Window("baseline@fp32", 1, (1.0,)))
    lines = [json.dumps({"run": "1"}), *[json.dumps({kind: window})] * measure.Effort().windows]
    (workspace / "latency" / "host.samples.jsonl").write_text("\n".join(lines))
    (step,) = foreseen(workspace, "profile", "--device", "host")
    assert "that timed 1 of them" in step["notes"][0]


def test_a_device_elsewhere_is_not_asked(workspace: Path) -> None:
    build, subset = foreseen(workspace, "profile", "--device", "xavier", "--host", NOWHERE)
    everything = foreseen(workspace, "profile", "--device", "xavier", "--host", NOWHERE, "--all")
    assert (build["step"], build["place"], build["there"]) == ("build", NOWHERE, None)
    assert "a guess" in build["basis"]
    assert subset["least_s"] < everything[1]["least_s"]
    assert any("subset" in note for note in subset["notes"])
    assert everything[1]["notes"] == []


def test_engines_that_are_there_are_counted(workspace: Path, engines: Engines) -> None:
    given = ("build", "--device", RTX)
    (before,) = foreseen(workspace, *given)
    (built,) = engines.printed["builds"]
    engines.add_to(workspace)
    (after,) = foreseen(workspace, *given)
    assert (before["there"], before["graphs"]) == (0, built["engines"]["built"])
    assert (after["there"], after["least_s"]) == (before["graphs"], 0)
    _, fp16 = foreseen(workspace, *given, "--precision", "fp32,fp16")
    assert fp16["there"] == 0
    assert "is checked first" in fp16["notes"][0]
    assert "13 engines built before" in fp16["basis"]


def prospect(workspace: Path, *arguments: str | Path) -> dict[str, Any]:
    """What one dry run says, which leaves everything as it was."""
    before = contents(workspace)
    given = ("-C", workspace, *arguments, "--dry-run")
    content = printed_json(*given)
    assert differences(", ".join(f"{name} --dry-run" for name in PROSPECTS), content) == []
    (step,) = content["dry_run"]
    assert step["step"] == arguments[0]
    shown = done(*given)
    assert shown.startswith(f"would {step['what']}\n")
    assert all(f"would write {place}\n" in shown for place in step["writes"])
    assert ("duration unknown" in shown) == (step["least_s"] is None)
    assert ("ESTIMATED" in shown) == (step["least_s"] is not None)
    assert contents(workspace) == before
    return dict(step)


PROSPECTS = ("train", "evaluate", "bundle", "bench")


def all_heads_s(workspace: Path) -> float:
    """Of one image, by the table: backbone point by point, every head, and full-size labels of each."""
    graphs = json.loads((workspace / "graphs" / "index.json").read_text())["candidate"]
    table = json.loads((workspace / "latency" / "host.json").read_text())["entries"]
    ms = {entry["graph"]: entry["mean_ms"] for entry in table}
    points = {number: point["hw"] for number, point in enumerate(graphs["exit_points"], start=1)}
    total = sum(ms[f"segment-{number - 1}-{number}"] for number in points)
    for head in graphs["heads"]:
        height, width = points[head["exit_point"]]
        total += ms[f"head-exit{head['exit_point']}.{head['config']}"] + ms[f"output-{height}x{width}"]
    return float(total) / 1e3


def test_an_evaluation_tells_what_it_records_and_how_long(workspace: Path) -> None:
    step = prospect(workspace, "evaluate", "--split", "test")
    assert step["what"] == "record 5 heads on 6 images, by fp32 at this machine"
    assert step["writes"] == [str(workspace / "statistics" / "test"), str(workspace / "workspace.json")]
    assert step["least_s"] == pytest.approx(6 * all_heads_s(workspace))
    assert "measured latencies of host" in step["basis"]
    assert "is checked first" in prospect(workspace, "evaluate", "--precision", "fp16")["notes"][0]
    there = prospect(workspace, "evaluate", "--device", "xavier", "--host", NOWHERE)
    assert (there["least_s"], NOWHERE in there["what"]) == (None, True)
    (workspace / "latency" / "host.json").unlink()
    assert prospect(workspace, "evaluate")["least_s"] is None


def test_a_bench_tells_how_long_plan_baseline_and_replay_take(workspace: Path) -> None:
    plan = json.loads((workspace / "plans" / "host.json").read_text())["plan"]
    step = prospect(workspace, "bench", workspace / "host.mess", "--split", "test", "--passes", "7")
    both_s = (plan["predicted"]["latency_ms"] + plan["baseline"]["latency_ms"]) / 1e3
    whole_s = 6 * 7 * both_s + 6 * all_heads_s(workspace)
    assert step["least_s"] == pytest.approx(whole_s, rel=0.1), "but for the baseline's upload and download"
    assert step["writes"] == [str(workspace / "bench" / "host.json")]
    late = prospect(workspace, "bench", workspace / "host.mess", "--passes", "2", "--deadline", "0.001ms")
    assert late["least_s"] == pytest.approx(12 * 2 * 0.001e-3)
    assert late["writes"] == []


def test_a_bundle_tells_what_goes_in_and_what_it_would_replace(workspace: Path) -> None:
    step = prospect(workspace, "bundle", "--single-file", workspace / "host.onnx")
    assert step["writes"] == [str(workspace / "host.mess"), str(workspace / "host.onnx")]
    graphs = json.loads((workspace / "plans" / "host.json").read_text())["plan"]["graphs"]
    assert f": {len(graphs)} graphs with " in step["what"]
    assert step["notes"] == [f"{workspace / 'host.mess'} exists, and would be replaced"]
    edit(workspace / "latency" / "host.json", lambda content: content["entries"][0].update(runs=1))
    for options in ((), ("--dry-run",)):
        assert "latency table" in refused(workspace, "bundle", *options)


def test_a_training_tells_its_steps_and_what_becomes_of_the_network_that_is_there(workspace: Path) -> None:
    given = (*TRAIN, "--data", workspace / "data", "--batch", "5")
    step = prospect(workspace, *given)
    assert "on 24 images, validated on 12: stage 1, 1 epochs x 4 batches of 5; stage 2, 1 groups" in step["what"]
    assert step["writes"] == [str(workspace / "candidate"), str(workspace / "workspace.json")]
    assert step["least_s"] is None
    assert "would be kept beside it, as candidate-N" in step["notes"][0]
    alone = prospect(workspace, *given, "--baseline")
    assert alone["writes"][0] == str(workspace / "baseline")
    assert "stage 1, 2 epochs x 4 batches of 5" in alone["what"]
    assert "stage 1 has 0 epochs" in refused(workspace, *given, "--epochs", "0", "1", "--dry-run")


def test_an_estimate_has_nothing_to_foresee(workspace: Path) -> None:
    assert run("-C", workspace, "profile", "--device", "xavier", "--estimate", "--dry-run").exit_code == 2


def test_graphs_are_read_through_once(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of gigabytes take a while, and whoever asks wants to know it now."""
    seen: list[GraphSet] = []

    def verify(graph_set: GraphSet) -> None:
        seen.append(graph_set)

    monkeypatch.setattr(prepare, "verify_graph_set", verify)
    foreseen_once = steps.plan_profile(Workspace(workspace), "xavier", steps.ProfileOptions(hosts=(NOWHERE,)))
    assert [step.step for step in foreseen_once] == ["build", "profile"]
    assert len(seen) == 1
