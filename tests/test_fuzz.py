"""A bundle from anywhere is refused or runs; five hundred forged ones in each run, thousands in the benchmark."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mess_compile.runtime.base.errors import EngineError

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "benchmarks" / "fuzz_bundle.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_bundle", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_bundle"] = module
    spec.loader.exec_module(module)
    return module


def test_five_hundred_forged_bundles_harm_nobody() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, PROGRAM, "--cases", "500", "--seed", "1", "--jobs", "2"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "500 of 500 cases, 0 failed" in done.stdout
    assert "ran" in done.stdout, "forgeries that compute something else are to be reached too"


def test_the_watch_sees_what_a_bundle_must_not_touch(fuzz: ModuleType, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    watch = fuzz.Watch((f"{inside}/",), ("/usr/lib/",), active=True)
    for event, arguments in (
        ("open", (str(inside / "a"), "w", os.O_WRONLY | os.O_CREAT)),
        ("open", ("/usr/lib/python3/x.py", "r", os.O_RDONLY)),
        ("os.remove", (str(inside / "a"), -1)),
        ("os.mkdir", (f"{inside}/b", 0o777, -1)),
        ("import", ("json",)),
    ):
        watch.hook(event, arguments)
    assert watch.faults == []
    (inside / "link").symlink_to(tmp_path)
    for event, arguments in (
        ("open", ("/etc/passwd", "r", os.O_RDONLY)),
        ("open", ("/usr/lib/python3/x.py", "w", os.O_WRONLY)),
        ("open", (str(inside / ".." / "x"), "r", os.O_RDONLY)),
        ("open", (str(inside / "link" / "x"), "r", os.O_RDONLY)),
        ("os.rename", (str(inside / "a"), str(tmp_path / "b"), -1, -1)),
        ("subprocess.Popen", ("sh", ["sh"], None, None)),
        ("socket.connect", (None, ("127.0.0.1", 80))),
        ("ctypes.dlopen", ("/tmp/x.so",)),
    ):
        watch.hook(event, arguments)
        assert len(watch.faults) == 1, event
        watch.faults.clear()


def test_the_stand_in_refuses_an_engine_that_was_not_built_here(fuzz: ModuleType, tmp_path: Path) -> None:
    watch = fuzz.Watch((), ())
    (tmp_path / "foreign.engine").write_bytes(b"code of somebody else")
    with pytest.raises(EngineError):
        fuzz.Builder(watch).load(tmp_path / "foreign.engine")
    assert "not built here" in watch.faults[0]
