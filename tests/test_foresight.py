"""Whoever asks what a command would do wants it neither done nor begun, and a figure to plan the afternoon by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mess_compile import compiling, steps
from mess_compile.candidates import GraphSet
from mess_compile.runtime import profile, session
from mess_compile.workspace import Workspace
from tests.commands import contents, done, printed_json, run

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
    effort = profile.Effort()
    assert step["graphs"] == len(table["entries"])
    assert f"{step['graphs']} latencies measured before, 0 estimated" in step["basis"]
    assert step["least_s"] >= 0.999 * (effort.warm_up_s + step["graphs"] * effort.windows * effort.window_s)
    assert step["most_s"] == effort.warm_up_s + step["graphs"] * effort.max_s
    (longer,) = foreseen(workspace, "profile", "--device", "host", "--seconds", "50")
    assert longer["most_s"] > 5 * step["most_s"]


def test_what_a_broken_measurement_left_is_told(workspace: Path) -> None:
    kind, window = session.told(profile.Window("baseline@fp32", 1, (1.0,)))
    lines = [json.dumps({"run": "1"}), *[json.dumps({kind: window})] * profile.Effort().windows]
    (workspace / "latency" / "host.samples.jsonl").write_text("\n".join(lines))
    (step,) = foreseen(workspace, "profile", "--device", "host")
    assert "had timed 1 of them" in step["notes"][0]


def test_a_device_elsewhere_is_not_asked(workspace: Path) -> None:
    build, sparing = foreseen(workspace, "profile", "--device", "xavier", "--host", NOWHERE)
    everything = foreseen(workspace, "profile", "--device", "xavier", "--host", NOWHERE, "--all")
    assert (build["step"], build["place"], build["there"]) == ("build", NOWHERE, None)
    assert "a guess" in build["basis"]
    assert sparing["least_s"] < everything[1]["least_s"]
    assert any("sparing" in note for note in sparing["notes"])
    assert everything[1]["notes"] == []


def test_engines_that_are_there_are_counted(workspace: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: `pip install 'mess-compile[rtx]'`")
    given = ("build", "--device", "rtx-4090")
    (before,) = foreseen(workspace, *given)
    (built,) = printed_json("-C", workspace, *given)["builds"]
    (after,) = foreseen(workspace, *given)
    assert (before["there"], before["graphs"]) == (0, built["engines"]["built"])
    assert (after["there"], after["least_s"]) == (before["graphs"], 0)
    _, fp16 = foreseen(workspace, *given, "--precision", "fp32,fp16")
    assert fp16["there"] == 0
    assert "is settled first" in fp16["notes"][0]
    assert "13 engines built before" in fp16["basis"]


def test_an_estimate_has_nothing_to_foresee(workspace: Path) -> None:
    assert run("-C", workspace, "profile", "--device", "xavier", "--estimate", "--dry-run").exit_code == 2


def test_graphs_are_read_through_once(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of gigabytes take a while, and whoever asks wants to know it now."""
    seen: list[GraphSet] = []

    def verify(graph_set: GraphSet) -> None:
        seen.append(graph_set)

    monkeypatch.setattr(compiling, "verify_graph_set", verify)
    foreseen_once = steps.foresee_profile(Workspace(workspace), "xavier", host=NOWHERE)
    assert [step.step for step in foreseen_once] == ["build", "profile"]
    assert len(seen) == 1
