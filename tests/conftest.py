"""One small finished workspace for every test that needs one."""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mess_compile import steps
from mess_compile.cores import wait_without_spinning
from mess_compile.data import scenes
from mess_compile.network import Gate
from mess_compile.runtime.measure import measure
from mess_compile.search.requirement import Requirement
from mess_compile.workspace import Workspace
from tests.commands import printed_json
from tests.slow_fifth import fifth_of

wait_without_spinning()  # test modules import torch themselves
sys.dont_write_bytecode = False  # hundreds of processes would compile every module again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["MESS_COMPILE_PROGRESS"] = "off"  # however slow the machine, commands print nothing but results
HW = (64, 96)
EFFORT = measure.Effort(window_s=0.002, window_runs=2, windows=2, max_s=0.004, warm_up_s=0.0)
"""A graph is given up after four windows: beside other tests the machine is never at full speed for long."""
CHOICE = steps.NetworkChoice("mobilenetv2", HW, exits=3, heads=("fcn-crm1-b0", "fcn-crm2-b1"), width=0.25)
RTX = "rtx-4090"
HALVES = (
    ("mess_compile.training.train", "mess_compile.nets.export"),
    ("mess_compile.search.bnb.search", "onnxruntime", "hypothesis.strategies", "tensorrt_rtx"),
)
LOCKS = ("conftest.py", "__init__.py")
"""Files whose locks a worker holds while it imports a half."""


@dataclass(frozen=True)
class Engines:
    """What `build --json` wrote to a workspace's `engines`, and `printed`."""

    folder: Path
    printed: dict[str, Any]

    def add_to(self, workspace: Path) -> None:
        """As if they had been built in a workspace that has the same graphs."""
        shutil.copytree(self.folder, workspace / "engines", copy_function=os.link)


def quiet(*told: object) -> None:
    pass


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow-fifth", metavar="COMMIT", help="with -m '': of the slow tests, the fifth of this commit")


def pytest_configure() -> None:
    """Import what every worker imports one worker at a time: the first compiles it to bytecode for the others.

    Workers begin with different halves, so that none waits long.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        for place in (0, 1) if int(worker.removeprefix("gw")) % 2 == 0 else (1, 0):
            with (Path(__file__).parent / LOCKS[place]).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                for module in HALVES[place]:
                    with suppress(ImportError):
                        importlib.import_module(module)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    commit = config.getoption("--slow-fifth")
    if commit is not None:
        slow = [item for item in items if item.get_closest_marker("slow")]
        left_out = {id(item) for item in slow} - {id(item) for item in fifth_of(commit, slow)}
        config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
        items[:] = [item for item in items if id(item) not in left_out]


def pytest_collection_finish() -> None:
    """Leave modules, which live as long as the tests, out of every later garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in used)
    terminalreporter.write_line(f"processor time: {seconds:.0f} s, of workers and their processes too")


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that all workers of a run share: the first that asks for it makes it, and the others wait."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    base = tmp_path_factory.getbasetemp() if alone else tmp_path_factory.getbasetemp().parent
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def make_finished(folder: Path) -> None:
    from mess_compile.training.recipe import Recipe

    workspace = Workspace(folder / "workspace")
    data = workspace.root / "data"
    scenes.write_scenes(data, {"train": 24, "val": 12, "test": 6}, HW)
    steps.train(workspace, data, CHOICE, Recipe(epochs=(6, 3), batch=4, learning_rate=0.02))
    steps.export(workspace, None, Gate())
    steps.evaluate(workspace, steps.EvaluateOptions(split="val"))
    steps.profile(workspace, "host", steps.ProfileOptions(effort=EFFORT))
    (result,) = steps.search(workspace, (), None, Requirement(objective="accuracy"))
    assert len(result.plan.stages) > 1, "the tests of the cascade want a plan with an early exit"
    steps.bundle(workspace, None, None)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace after train, export, evaluate, profile, search and bundle; its plan has two exits or more.

    Look only: `workspace` is a copy to work in.
    """
    return made_once(tmp_path_factory, "finished", make_finished) / "workspace"


def states(folder: Path) -> dict[Path, tuple[int, int, int, int]]:
    """By file, what would differ after it was written to, or another was put in its place."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_ino, stat.st_mode, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished workspace: hard links, for commands never change a file but put another in its place."""
    before = states(finished)
    yield Path(shutil.copytree(finished, tmp_path / "workspace", copy_function=os.link))
    assert states(finished) == before, "a file was changed where it lies: a killed command would leave half of it"


def build_engines(workspace: Path, folder: Path) -> None:
    copy = shutil.copytree(workspace, folder / "workspace", copy_function=os.link)
    printed = printed_json("-C", copy, "build", "--device", RTX)
    (folder / "printed.json").write_text(json.dumps(printed))


@pytest.fixture(scope="session")
def engines(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Engines of every graph of the finished workspace for RTX, in fp32."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: `pip install 'mess-compile[rtx]'`")
    folder = made_once(tmp_path_factory, "engines", lambda folder: build_engines(finished, folder))
    return Engines(folder / "workspace" / "engines", json.loads((folder / "printed.json").read_text()))


@pytest.fixture
def brief_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """`profile` measures for milliseconds."""
    monkeypatch.setattr(measure, "Effort", lambda: EFFORT)


@pytest.fixture
def nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a command unpacks for a moment is gone when it ends."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert not list(place.iterdir())
