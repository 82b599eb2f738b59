"""Arrows point down only: a user of the device side must never need torch, ONNX or click."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mess_compile"
TOP = ("__main__", "extras", "cli", "demo", "steps", "inspection", "bench", "doctor", "looking", "reporting")
ALLOWED = {
    "candidates": {"files", "runtime"},
    "progress_lines": set(),
    "console": {"launcher", "progress_lines", "runtime"},
    "files": {"runtime"},
    "cores": set(),
    "launcher": {"runtime"},
    "coco": {"files", "runtime"},
    "data_folder": {"runtime"},
    "class_list": {"files", "runtime"},
    "layouts": {"class_list", "coco", "data_folder", "files", "runtime"},
    "nearby": {"data_folder", "layouts"},
    "labels": {"class_list", "coco", "layouts", "runtime"},
    "dataset": {"class_list", "coco", "cores", "data_folder", "labels", "layouts", "nearby", "runtime"},
    "scenes": {"files", "dataset", "runtime"},
    "workspace": {"data_folder", "files", "runtime"},
    "shipped": set(),
    "targets": {"files", "shipped", "runtime"},
    "latency": {"files", "candidates", "runtime"},
    "doubts": {"candidates", "latency", "runtime"},
    "statistics": {"files", "candidates", "runtime"},
    "diagnosis": {"statistics", "runtime"},
    "engines": {"candidates", "runtime"},
    "jobs": {"candidates", "engines", "latency", "runtime"},
    "places": {
        *("candidates", "engines", "jobs", "latency", "scenes", "sessions", "statistics", "trtexec_session", "runtime"),
    },
    "profiling": {"engines", "jobs", "latency", "places", "samples", "runtime"},
    "thrift": {"engines", "jobs", "latency", "places", "profiling", "samples", "sparing", "runtime"},
    "sharing": {"estimate", "latency", "places", "sparing", "thrift", "runtime"},
    "evaluation": {"candidates", "dataset", "engines", "sessions", "statistics", "runtime"},
    "recipes": {"files", "candidates", "engines", "graph", "runtime"},
    "compiling": {
        "latency",
        *("building", "candidates", "cores", "dataset", "engines", "graph", "jobs", "recipes", "targets", "workspace"),
        *("runtime",),
    },
    "elsewhere": {
        *("building", "candidates", "compiling", "data_folder", "engines", "jobs", "places", "remote", "sessions"),
        *("targets", "trtexec_session", "workspace", "runtime"),
    },
    "prospects": {"candidates", "latency", "runtime"},
    "recording": {
        "prospects",
        *(
            "candidates",
            "cores",
            "compiling",
            "dataset",
            "elsewhere",
            "engines",
            "evaluation",
            "extras",
            "launcher",
            "recipes",
        ),
        *("remote", "statistics", "targets", "workspace", "runtime"),
    },
    "measuring": {
        *("candidates", "compiling", "data_folder", "elsewhere", "engines", "forecast", "latency", "places"),
        *("profiling", "recipes", "recording", "remote", "search", "sharing", "sparing", "targets", "thrift"),
        *("trtexec_session", "workspace"),
        *("runtime",),
    },
    "foresight": {
        *(
            "building",
            "candidates",
            "cores",
            "compiling",
            "engines",
            "forecast",
            "jobs",
            "latency",
            "measuring",
            "recipes",
        ),
        *("sparing", "targets", "thrift", "workspace", "runtime"),
    },
    "searching": {
        *("candidates", "common_graphs", "compiling", "doubts", "latency", "recipes", "recording", "search"),
        *("targets", "workspace", "runtime"),
    },
    "bundling": {
        *(
            "building",
            "bundle",
            "candidates",
            "compiling",
            "files",
            "graph",
            "latency",
            "measurements",
            "prospects",
            "scenes",
        ),
        *("search", "searching", "statistics", "targets", "workspace", "runtime"),
    },
    "workers": set(),
    "building": {"files", "workers", "candidates", "engines", "graph", "targets", "runtime"},
    "samples": {"files", "runtime"},
    "estimate": {"candidates", "graph", "latency", "targets", "runtime"},
    "forecast": {"candidates", "estimate", "latency", "targets", "runtime"},
    "sparing": {"candidates", "estimate", "graph", "latency", "search", "statistics", "runtime"},
    "trtexec": {"runtime"},
    "ssh": {"runtime"},
    "remote": {"files", "ssh", "runtime"},
    "sessions": {"device_files", "files", "graph", "remote", "runtime"},
    "retuning": {
        *("bundle", "candidates", "dataset", "evaluation", "measurements", "remote", "search", "sessions"),
        *("statistics", "runtime"),
    },
    "ship": {"device_files", "remote", "retuning", "sessions", "runtime"},
    "trtexec_session": {
        *("candidates", "device_files", "files", "forecast", "graph", "latency", "remote", "sessions", "targets"),
        *("trtexec", "runtime"),
    },
    "search": {"files", "candidates", "cores", "diagnosis", "doubts", "latency", "statistics", "search", "runtime"},
    "common_graphs": {"candidates", "graph", "search", "runtime"},
    "graph": {"files", "candidates", "graph", "runtime"},
    "measurements": {"candidates", "latency", "search", "statistics", "runtime"},
    "device_files": {"runtime"},
    "bundle": {"device_files", "files", "candidates", "latency", "measurements", "search", "graph", "runtime"},
    "nets": {"files", "candidates", "nets", "runtime"},
    "training": {"files", "launcher", "candidates", "cores", "dataset", "nets", "statistics", "training", "runtime"},
    "export": {"files", "candidates", "graph", "nets", "runtime"},
    "benched": {"bench", "files", "runtime"},
    "media": {"files", "runtime"},
    "running": {"dataset", "extras", "files", "layouts", "report", "workspace", "runtime"},
    "report": {"files", "benched", "candidates", "latency", "report", "search", "statistics", "runtime"},
    "runtime": {"runtime"},
}
TORCH = {"nets", "training", "export"}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.name != "__init__.py" or len(relative.parts) > 1:
            yield relative.parts[0].removesuffix(".py"), path


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "mess_compile":
            yield from (f"mess_compile.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize(("part", "path"), list(modules()), ids=lambda value: str(value)[-40:])
def test_arrows_point_down(part: str, path: Path) -> None:
    for name in imports(path):
        words = name.split(".")
        if words[0] == "mess_compile" and len(words) > 1 and words[1] != "__version__":
            assert part in TOP or words[1] in ALLOWED[part], f"{path.name} imports {name}"
        if words[0] in ("torch", "safetensors"):
            assert part in TORCH, f"{path.name} imports {name}"
        if words[0] == "onnxruntime":
            assert path.name in ("onnxruntime_engine.py", "precision.py"), "the latter for its quantiser"
        if words[0] == "cv2":
            assert part == "media", "the extra `video` is imported at one place"
        if part == "runtime" and (path.name, name) != ("pictures.py", "PIL.Image"):  # where it is installed
            assert words[0] in {*sys.stdlib_module_names, "numpy", "mess_compile", "onnxruntime"}, f"{path} {name}"


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


def test_the_command_line_runs_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from mess_compile import steps, inspection, bench, profiling, demo, doctor, bundle, evaluation"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
