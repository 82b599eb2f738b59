"""The first thing a newcomer runs: it must end well, show a cascade at work, and leave pictures to look at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mess_compile.cli import main
from mess_compile.data import scenes
from mess_compile.nets.checkpoint import load_candidate, read_architecture
from mess_compile.steps import demo
from tests.commands import edit, overwrite

PROGRAM = Path(sys.executable).parent / "mess-compile"


@pytest.mark.slow
def test_the_demo_ends_with_a_cascade_at_work(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    done = subprocess.run([PROGRAM, "demo", folder], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    plan = json.loads((folder / "plans" / "host.json").read_text())["plan"]
    assert sum(rate >= 0.1 for rate in plan["predicted"]["exit_rates"]) >= 2
    assert plan["predicted"]["miou"] >= plan["baseline"]["miou"] - 1
    lines = done.stdout.splitlines()
    assert {
        line.split()[0] for line in lines if line.startswith(("baseline ", "predicted ", "replayed ", "measured "))
    } == {
        "baseline",
        "predicted",
        "replayed",
        "measured",
    }
    pictures = [Path(line.strip()) for line in lines if line.endswith(".progressive.png")]
    named = [picture for picture in pictures if picture.parent == folder / "predictions"]
    assert len(named) >= 4
    for picture in named:
        with Image.open(picture) as image:
            panels = 2 + len(plan["stages"])  # input and truth beside every exit
            assert image.convert("RGB").width > 300 * panels
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "Missing: " not in report
    assert lines[-1].endswith(str(folder / "report.html"))


def played(folder: Path, monkeypatch: pytest.MonkeyPatch, train: bool = False) -> list[str]:
    """The commands that a demo runs before its search, where all else is left out."""
    ran: list[str] = []
    monkeypatch.setattr(scenes, "write_scenes", lambda data, counts, *how, **more: ran.append(" ".join(counts)))
    monkeypatch.setattr(demo, "_run", lambda program, line: ran.append(line[2]))
    monkeypatch.setattr(demo, "_shows_two_exits", lambda folder: True)
    monkeypatch.setattr(demo, "_commands_after_search", lambda folder: [])
    demo.run_demo(folder, main, train)
    assert ran.pop() == "search"
    return ran


def test_a_second_demo_keeps_what_fits_and_makes_again_what_does_not(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = workspace / "latency" / "host.json"
    edit(table, lambda content: content["environment"].update(verdict="stable"))
    assert played(workspace, monkeypatch) == []
    told = capsys.readouterr().out
    assert told.count("unchanged: ") == 4
    assert f"(remove {workspace} to start over)" in told
    edit(table, lambda content: content["environment"].update(identity="another machine"))
    assert played(workspace, monkeypatch) == ["profile"]
    edit(workspace / "statistics" / "val" / "statistics.json", lambda content: content.update(network="0" * 64))
    assert played(workspace, monkeypatch) == ["profile", "evaluate"]
    graph = workspace / "graphs" / "baseline.onnx"
    overwrite(graph, graph.read_bytes()[:-1])
    assert played(workspace, monkeypatch) == ["export", "profile", "evaluate"]


def test_the_demo_begins_with_the_network_that_is_brought_and_trains_it_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    assert played(folder, monkeypatch) == ["val test train", "export", "profile", "evaluate"]
    brought = load_candidate(folder / "candidate")
    assert [point.block for point in brought.candidate.exit_points] == ["features.6", "features.10", "features.17"]
    assert "(demo --train trains it from scratch)" in capsys.readouterr().out
    assert played(folder, monkeypatch, train=True) == ["val test train", "train", "export", "profile", "evaluate"]


def test_demo_train_keeps_a_network_that_it_trained(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "train" not in played(workspace, monkeypatch, train=True)


def test_the_network_that_is_brought_is_what_demo_train_makes(tmp_path: Path) -> None:
    options = demo.train_command(tmp_path)
    told = {name: options[options.index(name) + 1] for name in ("--input", "--width", "--exits", "--heads")}
    architecture = read_architecture(demo.NETWORK)
    assert "{}x{}".format(*architecture.input_hw) == told["--input"]
    assert architecture.width == float(told["--width"])
    assert ",".join(architecture.exit_blocks) == told["--exits"]
    early = {config.name for number, config in architecture.heads if number < len(architecture.exit_blocks)}
    assert early == set(told["--heads"].split(","))
    assert architecture.classes == scenes.SCENE_CLASSES.names


def test_the_network_that_is_brought_weighs_little() -> None:
    """Every clone, wheel and container carries it."""
    assert sum(path.stat().st_size for path in demo.NETWORK.iterdir()) <= 1.5e6
