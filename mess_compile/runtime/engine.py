"""The seam between the cascade and an engine library: upload, load, run, download, close.

Tensors are opaque: an OrtValue for ONNX Runtime, a device buffer for TensorRT. Only `upload` and `download` cross
between them and numpy, so nothing is copied between the stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Protocol, Tuple

import numpy as np

from mess_compile.runtime.errors import InputError

Tensor = Any
LIBRARIES = ("onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class TensorSpec:
    """An engine's input or output: numpy dtype name and static shape."""

    name: str
    dtype: str
    shape: Tuple[int, ...]


class Engine(Protocol):
    """One compiled graph."""

    @property
    def inputs(self) -> Dict[str, TensorSpec]: ...

    @property
    def outputs(self) -> Dict[str, TensorSpec]: ...

    def run(self, feeds: Mapping[str, Tensor]) -> Dict[str, Tensor]:
        """Compute every output. An output tensor is valid until the same engine runs again. Raises EngineError."""
        ...

    def close(self) -> None: ...


class Library(Protocol):
    """An engine library on one device."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def load(self, path: Path) -> Engine:
        """The engine of one ONNX file, for TensorRT of one serialised engine. Raises EngineError naming the file."""
        ...

    def upload(self, array: np.ndarray) -> Tensor:
        """A tensor of the array's values; the array must not change while the tensor is in use."""
        ...

    def download(self, tensor: Tensor) -> np.ndarray:
        """The tensor's values as an array of the caller's own; waits for the runs that produce them."""
        ...

    def synchronise(self) -> None:
        """Wait for every upload and run so far; a GPU's go on behind the caller's back."""
        ...

    def close(self) -> None: ...


def open_library(name: str, threads: Optional[int] = None, gpu: int = 0) -> Library:
    """Open an engine library by its name; `threads` is for the CPU (None: every core), `gpu` which of several.

    Raises InputError for an unknown name, EngineError when the library is not installed.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}, not a number from 1")
    if name.startswith("onnxruntime") and name in LIBRARIES:
        from mess_compile.runtime import onnxruntime_engine

        return onnxruntime_engine.open_library(name, threads, gpu)
    if name in LIBRARIES:
        if gpu:
            raise InputError(f"{name} runs on the first GPU: put number {gpu} first with CUDA_VISIBLE_DEVICES")
        from mess_compile.runtime import tensorrt_engine

        return tensorrt_engine.open_library(name)
    raise InputError(f"engine library {name!r} is not one of {', '.join(LIBRARIES)}")
