"""Reports what this machine can train, build and run, and the line that installs what it lacks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mess_compile.cores import cores
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines import onnxruntime_engine
from mess_compile.runtime.machine import machine
from mess_compile.runtime.machine.machine import Machine, dotted
from mess_compile.targets import RTX_CAPABILITIES, known_targets, targets_here

_NEWER_DRIVER = "sudo ubuntu-drivers install"
_JETPACK = "sudo apt install nvidia-jetpack"


@dataclass(frozen=True)
class Finding:
    what: str
    possible: bool
    detail: str


def examine(workspace: Path | None = None) -> tuple[Finding, ...]:
    """Import each optional library, query the driver, and report what that makes possible."""
    here = machine.this_machine()
    return (
        Finding("cores for this process", True, str(cores())),
        _gpu(here),
        _driver(here),
        _toolkit(here),
        Finding("clocks and power", True, machine.describe_power()),
        _target(here, workspace),
        _module("run and profile on the CPU", "onnxruntime", "pip install 'mess-compile[cpu]'", _no_more),
        _provider(here, "onnxruntime-cuda"),
        _provider(here, "onnxruntime-tensorrt"),
        _module("train and export networks", "torch", "pip install 'mess-compile[torch]'", _torch_device),
        _module("run on videos and cameras", "cv2", "pip install 'mess-compile[video]'", _no_more),
        _module("build engines ahead of time", "tensorrt_rtx", "pip install 'mess-compile[rtx]'", _capabilities),
        _ahead_of_time(here),
        _classic(here),
        _trtexec(here),
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
    except Exception as error:  # a broken driver may raise anything, and this command is for such machines
        return Finding(what, False, f"{name} cannot be used ({' '.join(str(error).split())[:200]}): {remedy}")


def _gpu(here: Machine) -> Finding:
    if here.gpus:
        return Finding("GPU", True, machine.describe(here))
    return Finding("GPU", False, f"no NVIDIA driver answers; if there is a card: {_NEWER_DRIVER}")


def _driver(here: Machine) -> Finding:
    what = "NVIDIA driver"
    if here.driver is None and here.cuda is None:
        return Finding(what, False, f"there is none; if there is a card: {_JETPACK if here.l4t else _NEWER_DRIVER}")
    return Finding(what, True, f"{here.driver or 'of unknown version'}, runs CUDA up to {here.cuda or 'unknown'}")


def _toolkit(here: Machine) -> Finding:
    found = machine.toolkit()
    remedy = _JETPACK if here.l4t else "sudo apt install nvidia-cuda-toolkit"
    return Finding(
        "CUDA toolkit", found is not None, found or f"there is none, and only pycuda is built with it: {remedy}"
    )


def _target(here: Machine, workspace: Path | None) -> Finding:
    try:
        names = [target.name for target in targets_here(known_targets(workspace).values(), here)]
    except InputError as error:
        return Finding("known targets that this machine is", False, str(error))
    return Finding(
        "known targets that this machine is", bool(names), ", ".join(names) or "none: write profiles/NAME.toml"
    )


def _provider(here: Machine, library: str) -> Finding:
    what, provider = f"run on the GPU by {library}", onnxruntime_engine.PROVIDERS[library][0]
    try:
        available = importlib.import_module("onnxruntime").get_available_providers()
    except (ImportError, OSError, AttributeError):
        available = []
    if provider not in available:
        remedy = "pip uninstall -y onnxruntime && pip install 'mess-compile[gpu]'"
        return Finding(what, False, f"{provider} is not in this ONNX Runtime: {remedy}")
    return Finding(what, bool(here.gpus), provider if here.gpus else f"{provider}, but there is no GPU")


def _classic(here: Machine) -> Finding:
    what, remedy = "build and run classic TensorRT engines here", "pip install 'mess-compile[tensorrt]'"
    system = machine.system_tensorrt()
    if here.l4t or system:  # JetPack's module is for the system's Python
        see = "and make the environment with `python3 -m venv --system-site-packages`"
        has = f"; the system has {system}" if system else ""
        remedy = f"sudo apt install python3-libnvinfer, {see}{has}"
    return _on_gpu(here, _module(what, "tensorrt", remedy, _no_more), "tensorrt")


def _ahead_of_time(here: Machine) -> Finding:
    found = _module("run engines built ahead of time", "tensorrt_rtx", "pip install 'mess-compile[rtx]'", _no_more)
    found = _on_gpu(here, found, "tensorrt_rtx")
    capability = here.gpus[0].compute_capability if here.gpus else None
    if found.possible and capability and capability not in RTX_CAPABILITIES:
        return replace(found, possible=False, detail=f"{found.detail}, which does not support {dotted(capability)}")
    return found


def _on_gpu(here: Machine, found: Finding, library: str) -> Finding:
    """A library that is installed, but useless without a GPU and a driver that is new enough."""
    if found.possible and not here.gpus:
        return replace(found, possible=False, detail=f"{found.detail}, but there is no GPU")
    wanted, newest = machine.cuda_of(library), here.cuda
    if found.possible and wanted and newest and int(newest.partition(".")[0]) < wanted:
        words = f"{found.detail} is for CUDA {wanted}, but the driver supports up to {newest}: {_NEWER_DRIVER}"
        return replace(found, possible=False, detail=words)
    return found


def _trtexec(here: Machine) -> Finding:
    found = machine.trtexec()
    remedy = "sudo apt install libnvinfer-bin"
    if not here.l4t:
        remedy += ", from NVIDIA's repository of packages"
    return Finding("measure with trtexec, where Python cannot", found is not None, found or f"it is not here: {remedy}")
