"""What this machine can train, build and run, and the line that would install what it lacks."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mess_compile import machine as machines
from mess_compile.machine import Machine, dotted
from mess_compile.runtime import onnxruntime_engine
from mess_compile.runtime.errors import InputError
from mess_compile.targets import RTX_CAPABILITIES, known_targets, targets_here


@dataclass(frozen=True)
class Finding:
    what: str
    possible: bool
    detail: str


def examine(workspace: Path | None = None) -> tuple[Finding, ...]:
    """Import each optional library, ask the driver, and say what that makes possible."""
    machine = machines.this_machine()
    return (
        Finding("cores for this process", True, str(len(os.sched_getaffinity(0)))),
        _gpu(machine),
        Finding("clocks and power", True, machines.power_in_words()),
        _target(machine, workspace),
        _module("run and profile on the CPU", "onnxruntime", "pip install 'mess-compile[cpu]'", _no_more),
        _provider(machine, "onnxruntime-cuda"),
        _provider(machine, "onnxruntime-tensorrt"),
        _module("train and export networks", "torch", "pip install 'mess-compile[torch]'", _torch_device),
        _module("build engines ahead of time", "tensorrt_rtx", "pip install 'mess-compile[rtx]'", _capabilities),
        _classic(machine),
    )


def _no_more(module: object) -> str:
    return ""


def _torch_device(module: object) -> str:
    cuda = module.cuda  # type: ignore[attr-defined]
    return f", on {cuda.get_device_name()}" if cuda.is_available() else ", on the CPU"


def _capabilities(module: object) -> str:
    return f" for compute capability {', '.join(map(dotted, RTX_CAPABILITIES))}"


def _module(what: str, name: str, remedy: str, more: Callable[[object], str]) -> Finding:
    try:
        module = importlib.import_module(name)
        return Finding(what, True, f"{name} {module.__version__}{more(module)}")
    except Exception as error:  # an ill driver raises what it likes, and this is the command for ill machines
        return Finding(what, False, f"{name} cannot be used ({' '.join(str(error).split())[:200]}): {remedy}")


def _gpu(machine: Machine) -> Finding:
    if machine.gpus:
        return Finding("GPU", True, machines.in_words(machine))
    return Finding("GPU", False, "no NVIDIA driver answers; where there is a card: sudo ubuntu-drivers install")


def _target(machine: Machine, workspace: Path | None) -> Finding:
    try:
        names = [target.name for target in targets_here(known_targets(workspace).values(), machine)]
    except InputError as error:
        return Finding("known targets that this machine is", False, str(error))
    return Finding(
        "known targets that this machine is", bool(names), ", ".join(names) or "none: write profiles/NAME.toml"
    )


def _provider(machine: Machine, library: str) -> Finding:
    what, provider = f"run on the GPU by {library}", onnxruntime_engine.PROVIDERS[library][0]
    try:
        available = importlib.import_module("onnxruntime").get_available_providers()
    except (ImportError, OSError, AttributeError):
        available = []
    if provider not in available:
        remedy = "pip uninstall -y onnxruntime && pip install 'mess-compile[gpu]'"
        return Finding(what, False, f"{provider} is not in this ONNX Runtime: {remedy}")
    return Finding(what, bool(machine.gpus), provider if machine.gpus else f"{provider}, but there is no GPU")


def _classic(machine: Machine) -> Finding:
    remedy = "JetPack's own (sudo apt install python3-libnvinfer), else pip install 'mess-compile[tensorrt]'"
    found = _module("build and run classic TensorRT engines here", "tensorrt", remedy, _no_more)
    if found.possible and not machine.gpus:
        return Finding(found.what, False, f"{found.detail}, but there is no GPU to build for")
    return found
