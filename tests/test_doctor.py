"""Somebody whose machine lacks something is told the line that installs it, and nothing that is not so."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import onnxruntime
import pytest

from mess_compile import doctor
from mess_compile.runtime.machine import machine
from mess_compile.runtime.machine.machine import Gpu, Machine

ADA = Machine((Gpu("NVIDIA GeForce RTX 4090", (8, 9), 23.5),), driver="550.54.15", cuda="12.4")
HOPPER = Machine((Gpu("NVIDIA H200", (9, 0), 139.8),), driver="580.65.06", cuda="13.0")
XAVIER = Machine((Gpu("Xavier", (7, 2), 31.0),), "Jetson-AGX", "35.4.1", cuda="11.4")


def found(what: str) -> doctor.Finding:
    return next(finding for finding in doctor.examine() if what in finding.what)


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "this_machine", lambda: Machine())


@pytest.fixture
def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on(ADA, monkeypatch)


def on(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "this_machine", lambda: here)


@pytest.mark.parametrize(
    ("what", "module", "line"),
    [
        ("on the CPU", "onnxruntime", "pip install 'mess-compile[cpu]'"),
        ("train and export", "torch", "pip install 'mess-compile[torch]'"),
        ("videos and cameras", "cv2", "pip install 'mess-compile[video]'"),
        ("ahead of time", "tensorrt_rtx", "pip install 'mess-compile[rtx]'"),
        ("classic TensorRT", "tensorrt", "pip install 'mess-compile[tensorrt]'"),
        ("run engines built ahead", "tensorrt_rtx", "pip install 'mess-compile[rtx]'"),
        ("onnxruntime-cuda", "onnxruntime", "pip install 'mess-compile[gpu]'"),
    ],
)
def test_what_is_missing_comes_with_its_line(
    what: str, module: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(machine, "system_tensorrt", lambda: None)
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


def test_driver_and_the_cuda_that_it_runs_are_told(with_a_gpu: None) -> None:
    assert found("NVIDIA driver").detail == "550.54.15, runs CUDA up to 12.4"


def test_a_library_for_a_newer_cuda_than_the_driver_runs_is_of_no_use(
    with_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would fail with a number when the first engine is loaded."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7.1"))
    monkeypatch.setattr(machine, "cuda_of", lambda library: 13)
    refused = found("run engines built ahead")
    assert not refused.possible
    assert "is for CUDA 13, but the driver supports up to 12.4: sudo ubuntu-drivers install" in refused.detail
    assert found("build engines ahead").possible, "which needs no driver"
    monkeypatch.setattr(machine, "cuda_of", lambda library: 12)
    assert found("run engines built ahead").possible


def test_engines_built_ahead_are_not_for_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7.1"))
    monkeypatch.setattr(machine, "cuda_of", lambda library: 13)
    on(HOPPER, monkeypatch)
    assert found("run engines built ahead").detail == "tensorrt_rtx 1.7.1, which does not support 9.0"


def test_an_environment_that_hides_jetpacks_tensorrt_is_told_how_to_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(machine, "system_tensorrt", lambda: "8.5.2")
    monkeypatch.setattr(machine, "toolkit", lambda: None)
    monkeypatch.setattr(machine, "trtexec", lambda: "/usr/src/tensorrt/bin/trtexec")
    on(XAVIER, monkeypatch)
    words = found("classic TensorRT").detail
    assert "python3-libnvinfer" in words
    assert "--system-site-packages" in words
    assert "the system has 8.5.2" in words
    assert found("CUDA toolkit").detail.endswith("sudo apt install nvidia-jetpack")
    assert found("trtexec").detail == "/usr/src/tensorrt/bin/trtexec"


def test_what_nobody_found_comes_with_its_line(without_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("toolkit", "trtexec"):
        monkeypatch.setattr(machine, name, lambda: None)
    for what, line in (
        ("NVIDIA driver", "sudo ubuntu-drivers install"),
        ("CUDA toolkit", "sudo apt install nvidia-cuda-toolkit"),
        ("trtexec", "sudo apt install libnvinfer-bin"),
    ):
        assert not found(what).possible
        assert line in found(what).detail


def test_the_cuda_of_a_package_is_in_its_name() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install mess-compile[rtx]")
    assert machine.cuda_of("tensorrt_rtx") in (12, 13)
    assert machine.cuda_of("onnxruntime") is None
