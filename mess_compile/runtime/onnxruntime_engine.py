"""The engine library ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional

import numpy as np

from mess_compile.runtime.engine import Tensor, TensorSpec
from mess_compile.runtime.errors import EngineError

if TYPE_CHECKING:
    import onnxruntime

_DTYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8", "tensor(int32)": "int32", "tensor(int64)": "int64"}
_FATAL = 4  # what goes wrong is raised; the log would say it a second time


def open_library(threads: Optional[int] = None) -> OnnxRuntime:
    """Raises EngineError when onnxruntime is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(f"ONNX Runtime cannot be imported ({error}): run `pip install onnxruntime`") from error
    return OnnxRuntime(onnxruntime, threads)


class OnnxRuntime:
    """Sessions of one process; each has its own thread pool, which sleeps between runs."""

    name = "onnxruntime"

    def __init__(self, module: Any, threads: Optional[int]) -> None:
        self._module = module
        self._threads = threads
        self.version: str = module.__version__

    def load(self, path: Path) -> OnnxRuntimeEngine:
        if not path.is_file():
            raise EngineError(f"there is no graph {path}")
        try:
            session = self._module.InferenceSession(
                str(path), self._options(), providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:
            raise EngineError(f"ONNX Runtime {self.version} cannot load {path}: {_one_line(error)}") from error
        return OnnxRuntimeEngine(session, path)

    def _options(self) -> Any:
        options = self._module.SessionOptions()
        options.log_severity_level = _FATAL
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # A pool that spins after its run slows the next session down up to eight times. Stopping the spin at the end of
        # the run gains 10 % on an idle machine, but takes twice as long when other processes want the cores; one global
        # pool would forbid the process any session with its own.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options

    def upload(self, array: np.ndarray) -> Tensor:
        return self._module.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def download(self, tensor: Tensor) -> np.ndarray:
        values: np.ndarray = tensor.numpy()
        return values

    def close(self) -> None:
        pass


class OnnxRuntimeEngine:
    """One session."""

    def __init__(self, session: onnxruntime.InferenceSession, path: Path) -> None:
        self._session: Optional[onnxruntime.InferenceSession] = session
        self._path = path
        self.inputs = {spec.name: spec for spec in map(self._spec, session.get_inputs())}
        self.outputs = {spec.name: spec for spec in map(self._spec, session.get_outputs())}
        self._names = list(self.outputs)

    def _spec(self, node: Any) -> TensorSpec:
        shape = tuple(node.shape)
        if node.type not in _DTYPES or not all(isinstance(size, int) for size in shape):
            raise EngineError(f"{self._path}: {node.name} is {node.type} {shape}; graphs have static shapes")
        return TensorSpec(node.name, _DTYPES[node.type], shape)

    def run(self, feeds: Mapping[str, Tensor]) -> Dict[str, Tensor]:
        if self._session is None:
            raise EngineError(f"the engine of {self._path.name} is closed")
        try:
            return dict(zip(self._names, self._session.run_with_ort_values(self._names, feeds)))
        except Exception as error:
            raise EngineError(f"ONNX Runtime cannot run {self._path.name}: {_one_line(error)}") from error

    def close(self) -> None:
        self._session = None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
