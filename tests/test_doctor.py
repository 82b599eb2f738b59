"""Somebody whose machine lacks something is told the line that installs it, and nothing that is not so."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import onnxruntime
import pytest

from mess_compile import doctor, machine
from mess_compile.machine import Gpu, Machine

ADA = Machine((Gpu("NVIDIA GeForce RTX 4090", (8, 9), 23.5),))


def found(what: str) -> doctor.Finding:
    return next(finding for finding in doctor.examine() if what in finding.what)


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "this_machine", lambda: Machine())


@pytest.fixture
def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "this_machine", lambda: ADA)


@pytest.mark.parametrize(
    ("what", "module", "line"),
    [
        ("on the CPU", "onnxruntime", "pip install 'mess-compile[cpu]'"),
        ("train and export", "torch", "pip install 'mess-compile[torch]'"),
        ("ahead of time", "tensorrt_rtx", "pip install 'mess-compile[rtx]'"),
        ("classic TensorRT", "tensorrt", "sudo apt install python3-libnvinfer"),
        ("onnxruntime-cuda", "onnxruntime", "pip install 'mess-compile[gpu]'"),
    ],
)
def test_what_is_missing_comes_with_its_line(
    what: str, module: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert not found(what).possible
    assert line in found(what).detail


def test_a_library_for_gpus_is_of_no_use_without_one(without_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.16.1"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    for what in ("classic TensorRT", "onnxruntime-cuda", "GPU"):
        assert not found(what).possible
    assert "10.16.1, but there is no GPU" in found("classic TensorRT").detail
    assert found("known targets").detail == "host"


def test_a_machine_with_its_gpu_and_libraries_is_told_what_it_is(
    with_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert found("onnxruntime-cuda").possible
    assert found("known targets").detail == "rtx-4090, host"
    assert "NVIDIA GeForce RTX 4090 (compute capability 8.9, 23.5 GiB)" in found("GPU").detail
