"""A stand-in for the module `tensorrt` of several versions: their names, and ONNX Runtime to compute.

An engine file of it says which ONNX file to run. What a real engine would answer with a crash or wrong values, such as
an address that is not set or memory that is not there, raises Fault here.
"""

from __future__ import annotations

import enum
import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from tests.runtime.cuda_standin import Driver, Fault, Region

_MODULE = frozenset({"ILogger", "Runtime", "TensorIOMode", "TensorLocation"})
_RUNTIME = frozenset({"deserialize_cuda_engine"})
_ENGINE = frozenset(
    {
        "num_io_tensors",
        "get_tensor_name",
        "get_tensor_mode",
        "get_tensor_shape",
        "get_tensor_dtype",
        "get_tensor_location",
    }
)
_CONTEXT = frozenset({"set_tensor_address", "execute_async_v3", "device_memory"})
Names = Mapping[str, frozenset[str]]


def _names(module: set[str], engine: set[str], context: set[str]) -> Names:
    return {
        "module": _MODULE | module,
        "Runtime": _RUNTIME,
        "ICudaEngine": _ENGINE | engine,
        "IExecutionContext": _CONTEXT | context,
    }


_STRATEGY = {"ExecutionContextAllocationStrategy"}
_WITHOUT = "create_execution_context_without_device_memory"
_RECENT = _names(_STRATEGY, {"create_execution_context", "device_memory_size_v2"}, {"set_device_memory"})
NAMES: Mapping[str, Names] = {
    "8.5.2.2": _names(set(), {_WITHOUT, "device_memory_size"}, set()),
    "10.0.1": _names(_STRATEGY, {"create_execution_context", _WITHOUT, "device_memory_size"}, set()),
    "10.16.1.11": _names(
        _STRATEGY,
        {"create_execution_context", _WITHOUT, "device_memory_size", "device_memory_size_v2"},
        {"set_device_memory"},
    ),
    "11.4.0.106": _RECENT,
    "1.7.1.116": _RECENT,
}
"""By version what there is of what engines are run with; the last is TensorRT-RTX."""
RTX = "1.7.1.116"

_NUMPY = {"FLOAT": "float32", "UINT8": "uint8", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}
_TYPES = {f"tensor({name.lower()})": name for name in _NUMPY}
COST_MS = 1.5
"""Of every run, on the stand-in's clock."""

DataType = enum.Enum("DataType", list(_NUMPY))
TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
TensorLocation = enum.Enum("TensorLocation", ["DEVICE", "HOST"])
Strategy = enum.Enum("Strategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])


def write_engine(path: Path, onnx: Path, version: str, **facts: Any) -> Path:
    """An engine file; `facts`: capability, scratch and weights in bytes, capture (works, breaks or is refused) ..."""
    defaults = {"capability": [7, 2], "scratch": 1000, "weights": 64, "capture": "works", "accepts": True}
    content = {"onnx": str(onnx), "version": version, **defaults, **facts}
    path.write_bytes(json.dumps(content).encode())
    return path


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self.made = True

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


class Runtime:
    driver: Driver
    version: str
    engine_class: type[ICudaEngine]

    def __init__(self, logger: ILogger) -> None:
        self.driver.check_context()
        if not logger.made:
            raise Fault("the logger's own __init__ was not called")
        self._logger = logger

    def __del__(self) -> None:
        if not self.driver.retained:
            self.driver.faults.append("a runtime goes after its context was given back")

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        self.driver.check_context()
        if not serialized_engine:
            raise Fault("there is nothing to read")
        try:
            content = json.loads(serialized_engine)
        except ValueError:
            return self._refuse("Error Code 1: Serialization (header.size == blobSize failed.)")
        if content["version"] != self.version:
            words = f"(Version tag does not match: {content['version']} and {self.version})"
            return self._refuse(f"Error Code 1: Serialization\n{words}")
        if content["capability"] != [7, 2]:
            return self._refuse("Error Code 6: the engine plan file is generated on an incompatible device")
        if self.driver.memory_bytes - self.driver._taken() < content["weights"]:
            return self._refuse(f"Error Code 2: OutOfMemory (Requested size was {content['weights']} bytes.)")
        return self.engine_class(self, content)

    def _refuse(self, words: str) -> None:
        self._logger.log(ILogger.WARNING, "not for the user")
        self._logger.log(ILogger.ERROR, f"IRuntime::deserializeCudaEngine: {words}")


class ICudaEngine:
    context_class: type[IExecutionContext]

    def __init__(self, runtime: Runtime, content: dict[str, Any]) -> None:
        self._runtime, self._content = runtime, content
        self._address = next(runtime.driver._addresses)
        runtime.driver.regions[self._address] = Region(np.zeros(content["weights"], np.uint8))
        weakref.finalize(self, runtime.driver.regions.pop, self._address)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(content["onnx"], options, providers=["CPUExecutionProvider"])
        self._tensors = {node.name: node for node in [*self._session.get_outputs(), *self._session.get_inputs()]}
        self._inputs = [node.name for node in self._session.get_inputs()]

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def device_memory_size(self) -> int:
        return int(self._content["scratch"])

    @property
    def device_memory_size_v2(self) -> int:
        return int(self._content["scratch"])

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._tensors[name].shape)

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[_TYPES[self._tensors[name].type]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation[self._content.get("location", "DEVICE")]

    def create_execution_context(self, strategy: Strategy) -> IExecutionContext | None:
        if strategy is not Strategy.USER_MANAGED:
            raise Fault("the context takes scratch memory of its own")
        return self._context()

    def create_execution_context_without_device_memory(self) -> IExecutionContext | None:
        return self._context()

    def _context(self) -> IExecutionContext | None:
        self._runtime.driver.check_context()
        if self._content.get("no_context"):
            self._runtime._logger.log(ILogger.ERROR, "Error Code 2: Out of memory (no room for the context)")
            return None
        return self.context_class(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._driver = engine._runtime.driver
        self._addresses: dict[str, int] = {}
        self._scratch: tuple[int, int] | None = None
        self._ran: dict[str, int] = {}

    def __del__(self) -> None:
        if self._driver._queue:
            self._driver.faults.append("a context goes while work is queued")

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors or not self._engine._content["accepts"]:
            self._engine._runtime._logger.log(ILogger.ERROR, f"Error Code 3: given invalid tensor name: {name}")
            return False
        self._addresses[name] = memory
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = memory, size

    def _set_device_memory(self, memory: int) -> None:
        self._scratch = memory, self._engine._content["scratch"]

    device_memory = property(None, _set_device_memory)

    def execute_async_v3(self, stream_handle: int) -> bool:
        driver, engine = self._driver, self._engine
        driver.check_context()
        driver.log.append(f"run {Path(engine._content['onnx']).stem}")
        if self._scratch is None:
            raise Fault("no scratch memory is set")
        addresses, scratch = dict(self._addresses), self._scratch
        self._regions(addresses, scratch)
        if driver.capturing is not None:
            if self._ran != addresses:
                raise Fault("captured before a plain run at these addresses")
            driver.capture_broken = engine._content["capture"] == "breaks"
            if engine._content["capture"] == "is refused":
                return False
        elif engine._content.get("refuses"):
            engine._runtime._logger.log(ILogger.ERROR, "Error Code 1: Myelin (no kernel)")
            return False
        self._ran = addresses
        driver.enqueue(stream_handle, lambda: self._compute(addresses, scratch))
        return True

    def _compute(self, addresses: Mapping[str, int], scratch: tuple[int, int]) -> None:
        regions = self._regions(addresses, scratch)
        feeds = {name: self._read(name, regions[name]) for name in self._engine._inputs}
        names = [name for name in addresses if name not in feeds]
        self._driver.regions[scratch[0]].values[:] = 0xC3  # whoever keeps values there loses them
        for name, values in zip(names, self._engine._session.run(names, feeds), strict=True):
            regions[name].values[: values.nbytes] = values.view(np.uint8).ravel()
            regions[name].holds = (values.dtype.name, values.shape)
        self._driver.now_ms += COST_MS

    def _regions(self, addresses: Mapping[str, int], scratch: tuple[int, int]) -> dict[str, Region]:
        """Raises Fault for a tensor without an address, or memory that is not there, too small, or shared."""
        missing = set(self._engine._tensors) - set(addresses)
        if missing:
            raise Fault(f"no address is set for {missing}")
        if len({*addresses.values(), scratch[0]}) <= len(addresses):
            raise Fault("two tensors, or one and the scratch memory, share an address")
        self._driver.region(scratch[0], max(self._engine._content["scratch"], 1))
        return {name: self._driver.region(address, self._empty(name).nbytes) for name, address in addresses.items()}

    def _read(self, name: str, region: Region) -> NDArray[Any]:
        empty = self._empty(name)
        if region.holds not in (None, (empty.dtype.name, empty.shape)):
            raise Fault(f"{name} is {empty.dtype} {empty.shape}, and its memory holds {region.holds}")
        return region.values[: empty.nbytes].view(empty.dtype).reshape(empty.shape).copy()

    def _empty(self, name: str) -> NDArray[Any]:
        return np.empty(self._engine.get_tensor_shape(name), _NUMPY[self._engine.get_tensor_dtype(name).name])


_CLASSES = {"Runtime": Runtime, "ICudaEngine": ICudaEngine, "IExecutionContext": IExecutionContext}


def make_module(version: str, driver: Driver) -> ModuleType:
    """The module of a version: nothing is there that its table does not name."""
    names = NAMES[version]
    only = {name: _only(kind, names[name]) for name, kind in _CLASSES.items()}
    only["ICudaEngine"].context_class = only["IExecutionContext"]
    only["Runtime"].engine_class = only["ICudaEngine"]
    only["Runtime"].driver, only["Runtime"].version = driver, version
    module = ModuleType("tensorrt_rtx" if version == RTX else "tensorrt")
    found: dict[str, Any] = {
        "ILogger": ILogger,
        "Runtime": only["Runtime"],
        "TensorIOMode": TensorIOMode,
        "TensorLocation": TensorLocation,
        "ExecutionContextAllocationStrategy": Strategy,
    }
    module.__dict__.update({name: found[name] for name in names["module"]}, __version__=version)
    return module


def _only(kind: type, names: frozenset[str]) -> Any:
    hidden = [name for name in vars(kind) if not name.startswith("_") and name not in names]

    def absent(name: str) -> Callable[..., Any]:
        def get(self: object) -> Any:
            raise AttributeError(f"this version has no {kind.__name__}.{name}")

        return get

    return type(kind.__name__, (kind,), {name: property(absent(name)) for name in hidden})
