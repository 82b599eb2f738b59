"""What this machine can train, build and run."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    what: str
    possible: bool
    detail: str


_MODULES = (
    ("run and profile on the CPU", "onnxruntime", "pip install 'mess-compile[cpu]'"),
    ("train and export networks", "torch", "pip install 'mess-compile[torch]'"),
    ("parse and build TensorRT-RTX engines", "tensorrt_rtx", "pip install 'mess-compile[rtx]'"),
    ("run classic TensorRT engines", "tensorrt", "pip install 'mess-compile[tensorrt]', or JetPack's own"),
)


def examine() -> tuple[Finding, ...]:
    """Import each optional library and say what it makes possible."""
    cores = len(os.sched_getaffinity(0))
    findings = [Finding("cores for this process", True, str(cores))]
    return (*findings, *(_examine_module(*entry) for entry in _MODULES))


def _examine_module(what: str, module: str, remedy: str) -> Finding:
    try:
        version = importlib.import_module(module).__version__
    except (ImportError, OSError, AttributeError) as error:
        return Finding(what, False, f"{module} cannot be imported ({error}): {remedy}")
    return Finding(what, True, f"{module} {version}")
