"""Runs serialised engines of TensorRT (8.5 to 11) and TensorRT-RTX on the first CUDA device."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import numpy as np

from mess_compile.runtime.base import fork_guard
from mess_compile.runtime.base.errors import EngineError, one_line
from mess_compile.runtime.engines import tensorrt_module
from mess_compile.runtime.engines.cuda import Cuda, open_cuda
from mess_compile.runtime.engines.device_memory import Block, DeviceMemory, DeviceTensor
from mess_compile.runtime.engines.engine import Tensor, TensorSpec, Timing

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}


def open_library(name: str, cuda_graphs: bool = False) -> TensorRt:
    """Open `tensorrt` or `tensorrt_rtx`; with `cuda_graphs`, a stage that runs on the same tensors again is one launch.

    Raises EngineError when the library is not installed, or there is no driver or device.
    """
    module = tensorrt_module.import_module(name)
    cuda = open_cuda()  # before any call of TensorRT, which ends the process if there is no CUDA
    try:
        return TensorRt(name, module, cuda, cuda_graphs)
    except BaseException:
        cuda.close()
        raise


class TensorRt:
    """Engines of one device: one stream, one scratch block for all. Use it from one thread at a time."""

    concurrent = False

    def __init__(self, name: str, module: Any, cuda: Cuda, cuda_graphs: bool) -> None:
        self.name = name
        self.version = str(module.__version__)
        self.builds_for = cuda.device.name, cuda.device.capability
        self._module, self._cuda, self._cuda_graphs = module, cuda, cuda_graphs
        self._memory = DeviceMemory(cuda)
        self._engines: weakref.WeakSet[TensorRtEngine] = weakref.WeakSet()
        self._closed = False
        self._listener = tensorrt_module.listener(module)
        fork_guard.never_destroy_in_children(self)  # a CUDA context does not survive a fork
        with cuda:
            self._runtime: Any = self._started()

    def _started(self) -> Any:
        try:
            return self._module.Runtime(self._listener)
        except (RuntimeError, TypeError) as error:
            words = f"{one_line(error)}: {self._listener.words()}"
            raise EngineError(f"{self.name} {self.version} does not start on {self._cuda.device}: {words}") from error

    def load(self, path: Path) -> TensorRtEngine:
        """Load an engine that this library wrote for this device. Raises EngineError naming the file."""
        self._check_open()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise EngineError(f"there is no engine {path}: {error.strerror}") from error
        with self._cuda:
            engine = TensorRtEngine(path, lambda: self._deserialised(path, content), self._tools())
        self._engines.add(engine)
        fork_guard.never_destroy_in_children(engine)
        return engine

    def _deserialised(self, path: Path, content: bytes) -> Any:
        self._listener.errors.clear()
        engine = self._runtime.deserialize_cuda_engine(content) if content else None
        if engine is None:
            words = self._listener.words() if content else "it is empty"
            here = f"{self.name} {self.version} on {self._cuda.device}"
            raise EngineError(f"the engine {path} does not load with {here}: {words}; {_remedy(words)}")
        return engine

    def _tools(self) -> _Tools:
        return _Tools(self._module, self._cuda, self._memory, self._listener, self._cuda_graphs)

    def upload(self, array: np.ndarray) -> DeviceTensor:
        self._check_open()
        return self._memory.upload(array)

    def download(self, tensor: Tensor) -> np.ndarray:
        self._check_open()
        return self._memory.download(tensor)

    def synchronise(self) -> None:
        """Wait for every upload and run so far; their calls return before the work is done."""
        self._check_open()
        self._memory.synchronise()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(f"the library {self.name} is closed")

    def close(self) -> None:
        """Close the engines, then release all memory, the stream and the context."""
        if self._closed:
            return
        self._closed = True
        for loaded in tuple(self._engines):
            loaded.close()
        with self._cuda:
            self._runtime = None
        self._memory.close()
        self._cuda.close()


@dataclass(frozen=True)
class _Tools:
    """What a library shares with its engines."""

    module: Any
    cuda: Cuda
    memory: DeviceMemory
    listener: Any
    cuda_graphs: bool


class TensorRtEngine:
    """One engine and its execution context; outputs are in its own memory, scratch in the library's block.

    Only this object references TensorRT's objects, not even the frames of an error: they must be released before the
    context.
    """

    def __init__(self, path: Path, deserialise: Callable[[], Any], tools: _Tools) -> None:
        self._path, self._tools = path, tools
        self._engine: Any = None
        self._context: Any = None
        self._results: Dict[str, DeviceTensor] = {}
        self._bound: Dict[str, int] = {}
        self._scratch: Optional[Block] = None
        self._scratch_size = 0
        self._graph = _Graph(tools.cuda)
        self._closed = False
        try:
            self._engine = deserialise()
            self.inputs, self.outputs = self._specs()
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _specs(self) -> Tuple[Dict[str, TensorSpec], Dict[str, TensorSpec]]:
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs: Dict[str, TensorSpec] = {}
        outputs: Dict[str, TensorSpec] = {}
        for name in names:
            is_input = self._engine.get_tensor_mode(name) == self._tools.module.TensorIOMode.INPUT
            (inputs if is_input else outputs)[name] = self._spec(name)
        return inputs, outputs

    def _spec(self, name: str) -> TensorSpec:
        dtype, shape = self._engine.get_tensor_dtype(name).name, tuple(self._engine.get_tensor_shape(name))
        on_device = self._engine.get_tensor_location(name) == self._tools.module.TensorLocation.DEVICE
        if dtype not in DTYPES or min(shape, default=1) < 1 or not on_device:
            raise EngineError(f"{self._path}: {name} is {dtype} {shape}; tensors need static shapes, on the device")
        return TensorSpec(name, DTYPES[dtype], shape)

    @property
    def scratch_bytes(self) -> int:
        """Device memory that a run needs besides weights, inputs and outputs, from the block that all engines share."""
        return self._scratch_size

    def _prepare(self) -> None:
        """Everything that can run out of memory happens here, not in the first run."""
        memory = self._tools.memory
        self._scratch_size = tensorrt_module.scratch_size(self._engine)
        memory.scratch(self._scratch_size)
        self._context = tensorrt_module.create_context(self._tools.module, self._engine)
        if self._context is None:
            words = self._tools.listener.words()
            raise EngineError(f"the engine {self._path} cannot be prepared: {words}; {_remedy(words)}")
        for spec in self.outputs.values():
            size = int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
            self._results[spec.name] = DeviceTensor(memory.allocate(size), spec.dtype, spec.shape)
            self._bind(spec.name, self._results[spec.name].block.address)

    def run(self, feeds: Mapping[str, Tensor]) -> Dict[str, Tensor]:
        """Queue the run and return; `download` waits for it."""
        self._check_open()
        with self._tools.cuda:
            self._feed(feeds)
            self._enqueue()
        return dict(self._results)

    def run_timed(self, feeds: Mapping[str, Tensor]) -> Timing:
        """Like `run`, but wait for earlier work, and then for this run."""
        self._check_open()
        memory = self._tools.memory
        with self._tools.cuda as cuda:
            first, second = cuda.event(), cuda.event()
            try:
                memory.synchronise()
                start = time.perf_counter_ns()
                self._feed(feeds)
                cuda.record(first)
                self._enqueue()
                cuda.record(second)
                memory.synchronise()
                return Timing((time.perf_counter_ns() - start) / 1e6, cuda.elapsed_ms(first, second))
            finally:
                cuda.free_event(first)
                cuda.free_event(second)

    def _feed(self, feeds: Mapping[str, Tensor]) -> None:
        if set(feeds) != set(self.inputs):
            raise EngineError(f"{self._path.name} is fed {sorted(feeds)}, but needs {sorted(self.inputs)}")
        for name, spec in self.inputs.items():
            tensor = feeds[name]
            if not self._tools.memory.holds(tensor):
                raise EngineError(
                    f"{self._path.name}: the tensor fed as {name} is not in this library's memory, or was freed"
                )
            if (tensor.dtype, tensor.shape) != (spec.dtype, spec.shape):
                found = f"{tensor.dtype} {tensor.shape}"
                raise EngineError(f"{self._path.name}: {name} is {found}, not {spec.dtype} {spec.shape}")
            if self._bound.get(name) != tensor.block.address:
                self._bind(name, tensor.block.address)

    def _bind(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise EngineError(f"{self._path.name} does not accept {name}: {self._tools.listener.words()}")
        self._bound[name] = address

    def _enqueue(self) -> None:
        scratch = self._tools.memory.scratch(self._scratch_size)
        if scratch is not self._scratch:
            tensorrt_module.set_scratch(self._context, scratch.address, scratch.size)
            self._scratch = scratch
        place = (scratch.address, *self._bound.values())
        if not (self._graph.run(place, self._execute) if self._tools.cuda_graphs else self._execute()):
            raise EngineError(f"the engine {self._path.name} failed to run: {self._tools.listener.words()}")

    def _execute(self) -> bool:
        return bool(self._context.execute_async_v3(self._tools.cuda.stream))

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(f"the engine of {self._path.name} is closed")

    def close(self) -> None:
        """Waits for the current run."""
        if self._closed:
            return
        self._closed = True
        with self._tools.cuda as cuda:
            cuda.free_pending()
            self._graph.close()
            self._context = None  # before its engine
            self._engine = None
        for tensor in self._results.values():
            self._tools.memory.free(tensor.block)
        self._results.clear()


class _Graph:
    """An engine's run as one CUDA graph, captured when it runs at the same addresses for the second time."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._addresses: Tuple[int, ...] = ()
        self._handle: Optional[int] = None
        self._capturable = True

    def run(self, addresses: Tuple[int, ...], execute: Callable[[], bool]) -> bool:
        """False if the engine fails. Runs without a graph at new addresses, and if the run cannot be captured."""
        if addresses != self._addresses:
            self.close()
            self._addresses = addresses
            return execute()  # the first run at new addresses does work that no graph can contain
        if self._handle is None and self._capturable:
            self._capture(execute)
        if self._handle is None:
            return execute()
        self._cuda.launch(self._handle)
        return True

    def _capture(self, execute: Callable[[], bool]) -> None:
        self._cuda.begin_capture()
        queued = execute()
        self._handle = self._cuda.end_capture()
        if not queued:
            self.close()
        self._capturable = self._handle is not None

    def close(self) -> None:
        if self._handle is not None:
            self._cuda.free_graph(self._handle)
        self._handle = None


def _remedy(words: str) -> str:
    short = "outofmemory" in words.lower().replace(" ", "")
    return "free memory of the GPU" if short else "build it again on this device, with this version"
