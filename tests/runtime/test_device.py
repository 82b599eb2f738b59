"""The runtime travels to a device with Python 3.8 and numpy alone: what is lost otherwise is the device."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mess_compile
from mess_compile.runtime import __main__ as command
from tests import small_network
from tests.runtime.old_names import complaints

PACKAGE = Path(mess_compile.__file__).parent
FILES = sorted((PACKAGE / "runtime").glob("*.py"))
WINDOWS = "numpy.lib.stride_tricks.sliding_window_view"
OUTSIDE = {"onnxruntime_engine.py": "onnxruntime", "pictures.py": "PIL"}


@pytest.mark.parametrize("path", [PACKAGE / "__init__.py", *FILES], ids=lambda path: path.name)
def test_python_3_8_reads_it(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_imports_numpy_the_standard_library_and_itself_alone(path: Path) -> None:
    allowed = {"numpy", OUTSIDE.get(path.name, "numpy")} | set(sys.stdlib_module_names)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.startswith("mess_compile.runtime") or name.split(".")[0] in allowed, f"{path.name}: {name}"


@pytest.mark.parametrize("path", [PACKAGE / "__init__.py", *FILES], ids=lambda path: path.name)
def test_python_3_8_and_numpy_1_17_have_every_name_it_uses(path: Path) -> None:
    """What JetPack 5 brings. A module that is not in the list: add it to `list_names.py`, and run that."""
    assert complaints(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import tomllib", "import tomllib"),
        ("from zoneinfo import ZoneInfo", "from zoneinfo"),
        ("from functools import cache, partial", "functools.cache"),
        ("import math\nmath.lcm(2, 3)", "math.lcm"),
        ("import itertools as it\nit.pairwise([])", "itertools.pairwise"),
        ("'ab'.removeprefix('a')", ".removeprefix"),
        ("from pathlib import Path\nPath('a').is_relative_to('b')", ".is_relative_to"),
        ("anext", "anext"),
        ("zip([], [], strict=True)", "zip(strict=)"),
        ("pairs: list[int] = []", "list[...]"),
        ("x = {'a': 1} | y", "{'a': 1} | y: a union"),
        ("def f(x: int | None): ...", "int | None: a union"),
        ("import numpy as np\nnp.concat([a, b])", "numpy.concat"),
        ("import numpy as np\nnp.broadcast_shapes((1,), (2,))", "numpy.broadcast_shapes"),
        ("import numpy as np\nnp.lib.stride_tricks.sliding_window_view(a)", WINDOWS),
        ("from numpy.lib.stride_tricks import sliding_window_view", WINDOWS),
        ("import numpy as np\nnp.percentile(a, 50, method='linear')", "numpy.percentile(method=)"),
        ("import numpy as np\nnp.mean(a, where=b)", "numpy.mean(where=)"),
        ("import numpy.typing", "import numpy.typing"),
        ("import numpy as np\nx: np.typing.NDArray", "numpy.typing"),
    ],
)
def test_what_is_too_new_is_noticed(code: str, told: str) -> None:
    assert told in complaints(code)


def test_what_they_have_is_let_through() -> None:
    code = """
import os.path, numpy as np
from typing import Dict, Optional
x = np.bool_(True) | np.median([1.0]).astype(bool) | (1 << 2)
np.lib.stride_tricks.as_strided(np.stack([x, x], axis=0), shape=(2,))
os.path.join("a", "b"); os.O_RDONLY | os.O_CLOEXEC
np.lib.format.write_array(stream, x, version=(1, 0))
"""
    assert complaints(code) == []


def test_importing_the_errors_does_not_import_numpy() -> None:
    script = "import sys, mess_compile.runtime.base.errors; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_python_3_8_imports_it(tmp_path: Path) -> None:
    python = shutil.which("python3.8")
    has_numpy = python and subprocess.run([python, "-c", "import numpy"], capture_output=True, check=False)
    if not python or not has_numpy or has_numpy.returncode:
        pytest.skip("no python3.8 with numpy on PATH")
    shutil.copy(PACKAGE / "__init__.py", tmp_path)
    shutil.copytree(PACKAGE / "runtime", tmp_path / "mess_compile" / "runtime")
    shutil.copy(PACKAGE / "__init__.py", tmp_path / "mess_compile")
    modules = ", ".join(f"mess_compile.runtime.{path.stem}" for path in FILES if not path.stem.startswith("__"))
    subprocess.run([python, "-c", f"import {modules}"], cwd=tmp_path, check=True)


def test_the_command_tells_what_a_bundle_is_and_that_it_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.mess"
    small_network.write_bundle(path)
    assert command.main(["info", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "tiny: tiny, 3 classes, 8 x 12" in shown
    assert "stage 2: exit2.fcn-crm1-b0" in shown
    assert command.main(["verify", str(path)]) == 0
    assert capsys.readouterr().out.count("ok  ") == 5


def test_the_command_refuses_a_damaged_bundle_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.mess"
    path.write_bytes(b"PK" + bytes(1000))
    assert command.main(["verify", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_it_starts_without_what_few_runs_need() -> None:
    """A device starts it anew with each version; package metadata alone takes longer than the cascade."""
    code = """
import sys, numpy
known = set(sys.modules)
import mess_compile.runtime.__main__
print(*sorted(set(sys.modules) - known))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mess_compile.runtime.cascade.cascade" in found
    later = {"difflib", "html", "importlib.metadata", "mess_compile.runtime.images.notebook", "onnxruntime"}
    assert not later & set(found)
