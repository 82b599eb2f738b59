"""Arrows point down only: a user of the device side must never need torch, ONNX or click."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mess_compile"
ROOMS = (
    *("runtime", "", "data", "graph", "device", "engines", "latency", "evaluate", "nets", "training", "attach"),
    *("search", "profile", "bundle", "bench", "ship", "report", "steps", "cli"),
)
"""From the bottom; a room imports itself and those below. "" is the package's own files."""
RUNTIME_ROOMS = ("base", "images", "machine", "engines", "measure", "bundle", "cascade", "serve", "")
ALONE = {
    "torch": (
        *("nets", "training"),
        *(f"attach/{name}.py" for name in ("network", "teaching", "torch_source", "written")),
    ),
    "safetensors": ("nets", "training"),
    "tensorrt": ("runtime/engines",),
    "onnxruntime": ("runtime/engines", "graph/precision.py"),  # the latter for its quantiser
    "cv2": ("data/video.py",),
}
"""Libraries that one place imports."""


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(parts: tuple[str, ...], inside: Path = PACKAGE) -> str:
    return parts[0] if parts and (inside / parts[0]).is_dir() else ""


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or not path.name.startswith("__")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    mine = room(relative.parts)
    for name in imports(path):
        top, *parts = name.split(".")
        if top == "mess_compile":
            theirs = room(tuple(parts))
            assert ROOMS.index(theirs) <= ROOMS.index(mine), f"{relative} imports {name}"
            if mine == theirs == "runtime" and relative.name != "__init__.py":
                inside = [room(tuple(each), PACKAGE / "runtime") for each in (relative.parts[1:], parts[1:])]
                assert RUNTIME_ROOMS.index(inside[1]) <= RUNTIME_ROOMS.index(inside[0]), f"{relative} imports {name}"
        elif top in ALONE:
            assert relative.as_posix().startswith(ALONE[top]), f"{relative} imports {name}"
        elif mine == "runtime" and (relative.name, name) != ("pictures.py", "PIL.Image"):  # where it is installed
            assert top in {*sys.stdlib_module_names, "numpy"}, f"{relative} imports {name}"


def test_a_user_does_not_wait_for_heavy_imports_to_read_the_help() -> None:
    code = (
        "import sys; from mess_compile.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('numpy', 'torch', 'onnx', 'onnxruntime', 'rich', 'PIL') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip().endswith("[]")


def test_a_missing_extra_is_named_with_its_install_line() -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom mess_compile.cli import main\nmain(['inspect', 'resnet50'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: torch is not installed: run `pip install 'mess-compile[torch]'`\n"


def test_all_but_training_and_export_runs_without_torch() -> None:
    names = [path.relative_to(PACKAGE.parent).with_suffix("") for path in MODULES if path.name != "__main__.py"]
    names = [".".join(name.parts) for name in names if not f"{'/'.join(name.parts[1:])}.py".startswith(ALONE["torch"])]
    code = f"import importlib, sys; sys.modules['torch'] = None; [importlib.import_module(name) for name in {names}]"
    subprocess.run([sys.executable, "-c", code], check=True)
