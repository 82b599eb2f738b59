"""Each command that the program proposes next is run as it is printed: a newcomer copies it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from mess_compile import workspace
from mess_compile.bench.run import Bench, CheckedPromise
from mess_compile.cli import bench, hints, main
from mess_compile.data import scenes
from mess_compile.runtime.serve.verify import VerifyOptions
from mess_compile.ship.client import parse_place
from mess_compile.workspace import Workspace, open_workspace
from tests.commands import TRAIN, run
from tests.graph import foreign_network

MOST = 30
"""Commands that a flow proposes at the most."""


def proposed(output: str) -> list[list[str]]:
    """The arguments of the commands after `hint:`; a hint without a data folder is a sentence."""
    found, following = [], False
    for line in output.splitlines():
        following = line.startswith("hint: mess-compile ") or (following and line.startswith("      mess-compile "))
        if following:
            found.append(shlex.split(line.removeprefix("hint: "))[1:])
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
    monkeypatch.setattr(VerifyOptions.__init__, "__defaults__", (None, False, float("inf")))


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


@pytest.fixture
def used(tmp_path: Path) -> Iterator[Workspace]:
    """A workspace whose default device is the host, and that reached an Orin."""
    found = open_workspace(tmp_path)
    found.remember(device="orin", host="ssh://me@orin:2222")
    found.remember(device="host")
    with click.Context(main, obj=found):
        yield found


def benched(device: str, *missed: CheckedPromise) -> Bench:
    found = object.__new__(Bench)
    for name, value in (("device", device), ("promises", missed)):
        object.__setattr__(found, name, value)
    return found


def test_after_a_missed_promise_the_device_that_was_benched_is_searched_again(used: Workspace) -> None:
    lost, slow = CheckedPromise("err_pp", 2.0, 2.5, False), CheckedPromise("latency_ms", 5.0, 6.0, False)
    assert bench._after_bench(benched("orin", lost, slow), Path("a.mess")) == [
        "search --device orin --max-err 1.5% --max-latency 5ms",
        "profile --device orin",
        "report --device orin",
    ]
    assert bench._after_bench(benched("host", lost), Path("a.mess")) == ["search --max-err 1.5%", "report"]


def test_a_search_that_allowed_no_error_is_not_proposed_again(used: Workspace) -> None:
    lost = CheckedPromise("err_pp", 0.0, 0.5, False)
    assert bench._after_bench(benched("host", lost), Path("a.mess")) == ["report"]


def test_a_bundle_of_any_name_is_shipped_into_a_folder_that_ship_takes(used: Workspace) -> None:
    command = hints.ship_to_host(Path("my street (2).mess"), "orin")
    assert command == "ship 'my street (2).mess' ssh://me@orin:2222:~/my-street--2-"
    assert parse_place(shlex.split(command)[-1]).folder == "my-street--2-"
