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

PACKAGE = Path(mess_compile.__file__).parent
FILES = sorted((PACKAGE / "runtime").glob("*.py"))
ENGINE_LIBRARIES = {"onnxruntime_engine.py": "onnxruntime"}


@pytest.mark.parametrize("path", [PACKAGE / "__init__.py", *FILES], ids=lambda path: path.name)
def test_python_3_8_reads_it(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_imports_numpy_the_standard_library_and_itself_alone(path: Path) -> None:
    allowed = {"numpy", ENGINE_LIBRARIES.get(path.name, "numpy")} | set(sys.stdlib_module_names)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.startswith("mess_compile.runtime") or name.split(".")[0] in allowed, f"{path.name}: {name}"


def test_importing_the_errors_does_not_import_numpy() -> None:
    script = "import sys, mess_compile.runtime.errors; sys.exit('numpy' in sys.modules)"
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
    assert "exit 2: exit2.fcn-crm1-b0" in shown
    assert command.main(["verify", str(path)]) == 0
    assert capsys.readouterr().out.count("ok  ") == 3


def test_the_command_refuses_a_damaged_bundle_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.mess"
    path.write_bytes(b"PK" + bytes(1000))
    assert command.main(["verify", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
