"""Runs graphs in ONNX Runtime, on the CPU or through its CUDA and TensorRT providers."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, Mapping, Optional

import numpy as np

from mess_compile.runtime.base import fork_guard
from mess_compile.runtime.base.errors import EngineError, one_line
from mess_compile.runtime.engines.engine import Tensor, TensorSpec, Timing

if TYPE_CHECKING:
    import onnxruntime

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
_FATAL = 4  # errors are raised; the log would repeat them
# ONNX Runtime 1.29 and newer read this when imported. Otherwise a thread sends usage data to a server, and each forked
# child waits for that thread for ever when it ends.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

PROVIDERS = {
    "onnxruntime": ("CPUExecutionProvider",),
    "onnxruntime-cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "onnxruntime-tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
"""The provider by which each engine library runs graphs, and the provider of the nodes that it does not support."""


def open_library(
    name: str = "onnxruntime", threads: Optional[int] = None, gpu: int = 0, plain: bool = False
) -> OnnxRuntime:
    """With `plain`, graphs run as written except for folded constants, without fused kernels.

    Raises EngineError when onnxruntime is not installed, or lacks the provider.
    """
    package = "onnxruntime" if name == "onnxruntime" else "onnxruntime-gpu"
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(f"ONNX Runtime cannot be imported ({error}): run `pip install {package}`") from error
    provider, available = PROVIDERS[name][0], onnxruntime.get_available_providers()
    if provider not in available:
        raise EngineError(
            f"ONNX Runtime {onnxruntime.__version__} has {', '.join(available)}, but not {provider}: run `pip "
            f"uninstall -y onnxruntime && pip install {package}` on a machine with an NVIDIA GPU"
        )
    return OnnxRuntime(onnxruntime, name, threads, gpu, plain)


def _reason(error: Exception, path: Path) -> str:
    """ONNX Runtime's message without its own name, the file's, and the position in its sources."""
    text = str(error).replace(str(path), path.name)
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed: ?", "", text)
    return one_line(re.sub(r"\S*onnxruntime\S*\.(?:cc|h|cpp):\d+ .*?\)(?: const)? (?=\S)", "", text))


class OnnxRuntime:
    """Sessions of one process; each has its own thread pool, which sleeps between runs."""

    builds_for = None

    def __init__(self, module: Any, name: str, threads: Optional[int], gpu: int, plain: bool) -> None:
        self._module = module
        self._threads = threads
        self._place = ("cpu", 0) if name == "onnxruntime" else ("cuda", gpu)
        self.name = name
        self.concurrent = name == "onnxruntime"  # a GPU's outputs are in buffers that the next run overwrites
        self._plain = plain
        self.version: str = module.__version__

    def load(self, path: Path) -> OnnxRuntimeEngine:
        if not path.is_file():
            raise EngineError(f"there is no graph {path}")
        if any("\udc80" <= letter <= "\udcff" for letter in str(path)):
            raise EngineError(f"{path} is not UTF-8, and ONNX Runtime cannot open such a name: rename the folder")
        wanted = PROVIDERS[self.name]
        options = [{} if name == "CPUExecutionProvider" else {"device_id": str(self._place[1])} for name in wanted]
        try:
            session = self._module.InferenceSession(
                str(path), self._options(), providers=list(zip(wanted, options)), enable_fallback=0
            )
        except Exception as error:
            raise EngineError(f"ONNX Runtime {self.version} cannot load {path}: {_reason(error, path)}") from error
        fork_guard.never_destroy_in_children(session)  # its destructor waits for its thread pool
        if session.get_providers()[0] != wanted[0]:
            raise EngineError(
                f"ONNX Runtime {self.version} could not start {wanted[0]}: check that the CUDA and cuDNN versions "
                "that it was built for are installed, with a driver that fits them"
            )
        return OnnxRuntimeEngine(session, path, self._buffers)

    def _buffers(self, specs: Iterable[TensorSpec]) -> Optional[Dict[str, Tensor]]:
        """The buffers of a GPU's outputs; on the CPU each run makes its own, which is faster."""
        if self._place[0] == "cpu":
            return None
        make = self._module.OrtValue.ortvalue_from_shape_and_type
        return {spec.name: make(spec.shape, np.dtype(spec.dtype), *self._place) for spec in specs}

    def _options(self) -> Any:
        options = self._module.SessionOptions()
        options.log_severity_level = _FATAL
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if self._plain:
            options.graph_optimization_level = self._module.GraphOptimizationLevel.ORT_ENABLE_BASIC
        # A pool that spins after its run slows the next session down up to eight times. Stopping the spin at the end of
        # the run gains 10 % on an idle machine, but takes twice as long when other processes need the cores; one global
        # pool would not allow the process sessions with pools of their own.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options

    def upload(self, array: np.ndarray) -> Tensor:
        return self._module.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *self._place)

    def download(self, tensor: Tensor) -> np.ndarray:
        values: np.ndarray = tensor.numpy()
        return values

    def synchronise(self) -> None:
        """Nothing to wait for: a run returns when its outputs are available."""

    def close(self) -> None:
        pass


class OnnxRuntimeEngine:
    """One session."""

    scratch_bytes: Optional[int] = None  # ONNX Runtime does not report it

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        path: Path,
        buffers: Callable[[Iterable[TensorSpec]], Optional[Dict[str, Tensor]]],
    ) -> None:
        self._session: Optional[onnxruntime.InferenceSession] = session
        self._path = path
        self.inputs = {spec.name: spec for spec in map(self._spec, session.get_inputs())}
        self.outputs = {spec.name: spec for spec in map(self._spec, session.get_outputs())}
        self._names = list(self.outputs)
        self._buffers = buffers(self.outputs.values())

    def _spec(self, node: Any) -> TensorSpec:
        shape = tuple(node.shape)
        if node.type not in _DTYPES or not all(isinstance(size, int) for size in shape):
            raise EngineError(f"{self._path}: {node.name} is {node.type} {shape}; graphs need static shapes")
        return TensorSpec(node.name, _DTYPES[node.type], shape)

    def run(self, feeds: Mapping[str, Tensor]) -> Dict[str, Tensor]:
        if self._session is None:
            raise EngineError(f"the engine of {self._path.name} is closed")
        try:
            if self._buffers is not None:
                return self._run_bound(self._session, feeds, self._buffers)
            return dict(zip(self._names, self._session.run_with_ort_values(self._names, feeds)))
        except Exception as error:
            reason = _reason(error, self._path)
            raise EngineError(f"ONNX Runtime cannot run {self._path.name}: {reason}") from error

    def run_timed(self, feeds: Mapping[str, Tensor]) -> Timing:
        """A run returns when its results are available, on a GPU too; discarding them is part of the time."""
        start = time.perf_counter_ns()
        self.run(feeds)
        return Timing((time.perf_counter_ns() - start) / 1e6)

    @staticmethod
    def _run_bound(
        session: onnxruntime.InferenceSession, feeds: Mapping[str, Tensor], buffers: Dict[str, Tensor]
    ) -> Dict[str, Tensor]:
        """Keep inputs and outputs on the GPU: without binding, every output would be copied to the host."""
        binding = session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in buffers.items():
            binding.bind_ortvalue_output(name, value)
        session.run_with_iobinding(binding)
        return dict(buffers)

    def close(self) -> None:
        self._session = None
        self._buffers = None
