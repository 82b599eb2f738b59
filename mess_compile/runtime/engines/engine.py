"""Defines the interface between the cascade and an engine library: upload, load, run, download, close.

Tensors are opaque: an OrtValue for ONNX Runtime, a device buffer for TensorRT. Only `upload` and `download` convert
between them and numpy, so nothing is copied between the stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Protocol, Tuple

import numpy as np

from mess_compile.runtime.base.checks import check_threads
from mess_compile.runtime.base.errors import InputError

Tensor = Any
PRECISIONS = ("int8", "fp16", "fp32")
"""From the boldest to the safest; a graph that fails in one falls back to the next."""
FP32 = PRECISIONS[-1]
LIBRARIES = ("onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class TensorSpec:
    """A graph's or engine's input or output: numpy dtype name and static shape."""

    name: str
    dtype: str
    shape: Tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the values; bool takes a byte."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Timing:
    """One run: `wall_ms` from the call until its results are available, `device_ms` between events on the device.

    Device time includes the gaps in which the device waits for its next kernel; None if the library has no events.
    """

    wall_ms: float
    device_ms: Optional[float] = None


class Engine(Protocol):
    """One compiled graph."""

    @property
    def inputs(self) -> Dict[str, TensorSpec]: ...

    @property
    def outputs(self) -> Dict[str, TensorSpec]: ...

    @property
    def scratch_bytes(self) -> Optional[int]:
        """Memory that a run needs besides weights, inputs and outputs; None if the library does not report it."""
        ...

    def run(self, feeds: Mapping[str, Tensor]) -> Dict[str, Tensor]:
        """Compute every output. An output tensor is valid until the same engine runs again. Raises EngineError."""
        ...

    def run_timed(self, feeds: Mapping[str, Tensor]) -> Timing:
        """Wait for earlier work, then time one run until its results are available; they are discarded."""
        ...

    def close(self) -> None: ...


class Library(Protocol):
    """An engine library on one device."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def builds_for(self) -> Optional[Tuple[str, Tuple[int, int]]]:
        """The GPU's name and compute capability if the library builds engines from graphs; None if it loads graphs."""
        ...

    @property
    def concurrent(self) -> bool:
        """Whether threads may run its engines at the same time, and outputs outlive the next run."""
        ...

    def load(self, path: Path) -> Engine:
        """Load one ONNX file, or for TensorRT one serialised engine. Raises EngineError naming the file."""
        ...

    def upload(self, array: np.ndarray) -> Tensor:
        """A tensor with the array's values; the array must not change while the tensor is in use."""
        ...

    def download(self, tensor: Tensor) -> np.ndarray:
        """The tensor's values as an array that the caller owns; waits for the runs that produce them."""
        ...

    def synchronise(self) -> None:
        """Wait for every upload and run so far; on a GPU, calls return before their work is done."""
        ...

    def close(self) -> None: ...


def open_library(name: str, threads: Optional[int] = None, gpu: int = 0, cuda_graphs: bool = False) -> Library:
    """Open an engine library by its name; `threads` is for the CPU (None: every core), `gpu` selects one of several.

    With `cuda_graphs` TensorRT launches a stage that runs on the same tensors again as one CUDA graph. Raises
    InputError for an unknown name, EngineError when the library is not installed.
    """
    check_threads(threads)
    if name.startswith("onnxruntime") and name in LIBRARIES:
        from mess_compile.runtime.engines import onnxruntime_engine

        return onnxruntime_engine.open_library(name, threads, gpu)
    if name in LIBRARIES:
        if gpu:
            raise InputError(f"{name} runs on the first GPU only: put number {gpu} first with CUDA_VISIBLE_DEVICES")
        from mess_compile.runtime.engines import tensorrt_engine

        return tensorrt_engine.open_library(name, cuda_graphs)
    raise InputError(f"engine library {name!r} is not one of {', '.join(LIBRARIES)}")
