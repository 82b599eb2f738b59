"""Each command that the program proposes next is run as it is printed: a newcomer copies it."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mess_compile import scenes, workspace
from mess_compile.runtime.verify import Demands
from tests.commands import TRAIN, run
from tests.graph import foreign_network

MOST = 30
"""Commands that a flow proposes at the most."""


def proposed(output: str) -> list[list[str]]:
    """The arguments of the commands after `next:`."""
    found, following = [], False
    for line in output.splitlines():
        following = line.startswith("next: ") or (following and line.startswith("      mess-compile "))
        if following:
            found.append(shlex.split(line.removeprefix("next: "))[1:])
    return found


def walked(first: list[str]) -> list[str]:
    """The names of the commands, from the first one on, each proposal run once as it was printed."""
    waiting, seen = [first], []
    while waiting:
        arguments = waiting.pop(0)
        if arguments in seen:
            continue
        seen.append(arguments)
        assert len(seen) <= MOST
        assert not any(part.isupper() and len(part) > 2 for part in arguments), f"a placeholder in {arguments}"
        result = run(*arguments)
        assert result.exit_code == 0, f"{shlex.join(arguments)}: {result.stderr}"
        waiting += proposed(result.stdout)
    return [next(part for part in arguments if part.isalpha() and part.islower()) for arguments in seen]


@pytest.fixture(autouse=True)
def at_any_speed(monkeypatch: pytest.MonkeyPatch, brief_profile: None) -> None:
    monkeypatch.setattr(Demands.__init__, "__defaults__", (None, False, float("inf")))


def test_from_own_images_to_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scenes.write_scenes(tmp_path / "data", {"train": 8, "val": 6, "test": 4}, (64, 96))
    names = walked([*TRAIN, "--data", "data"])
    assert {"train", "export", "profile", "search", "bundle", "run", "bench", "report"} <= {*names}


def test_from_an_own_network_to_a_plan_for_an_orin_by_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    foreign_network.saved(tmp_path)
    random = np.random.default_rng(0)
    for split, count in (("val", 12), ("test", 4)):
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for number in range(count):
            frame = random.integers(0, 256, (*foreign_network.HW, 3), dtype=np.uint8)
            labels = random.integers(0, foreign_network.CLASSES, foreign_network.HW, dtype=np.uint8)
            Image.fromarray(frame).save(tmp_path / "data" / split / "images" / f"{number}.png")
            Image.fromarray(labels).save(tmp_path / "data" / split / "labels" / f"{number}.png")
    (tmp_path / "data" / "classes.txt").write_text("road\ncar\ntree\nsky\n")
    assert walked(["export", "model.onnx", "--exits", "exits.toml"])[:2] == ["export", "profile"]
    names = walked(["evaluate", "--data", "data"])
    names += walked(["profile", "--device", "orin", "--estimate", "--precision", "fp16"])
    assert {"search", "bundle", "inspect"} <= {*names}
    assert Path("plans/orin.json").is_file()
    assert workspace.open_workspace(tmp_path).memory().device == "host", "an estimated device became the default"
