"""Calls the CUDA driver through ctypes: the few functions that engines need and every driver and JetPack has.

Everything happens on one stream in the device's primary context, which TensorRT, PyTorch and pycuda's `autoprimaryctx`
share. The context is current only inside `with cuda:`, so that other code's current context stays.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

from mess_compile.runtime.base.errors import EngineError

_UINT, _INT, _SIZE, _FLOAT, _POINTER = ctypes.c_uint, ctypes.c_int, ctypes.c_size_t, ctypes.c_float, ctypes.c_void_p
_ADDRESS = ctypes.c_uint64
_out = ctypes.POINTER
CALLS: Dict[str, Tuple[Any, ...]] = {
    "cuInit": (_UINT,),
    "cuDriverGetVersion": (_out(_INT),),
    "cuGetErrorName": (_INT, _out(ctypes.c_char_p)),
    "cuDeviceGet": (_out(_INT), _INT),
    "cuDeviceGetName": (ctypes.c_char_p, _INT, _INT),
    "cuDeviceGetAttribute": (_out(_INT), _INT, _INT),
    "cuDeviceTotalMem_v2": (_out(_SIZE), _INT),
    "cuDevicePrimaryCtxRetain": (_out(_POINTER), _INT),
    "cuDevicePrimaryCtxRelease_v2": (_INT,),
    "cuCtxPushCurrent_v2": (_POINTER,),
    "cuCtxPopCurrent_v2": (_out(_POINTER),),
    "cuMemGetInfo_v2": (_out(_SIZE), _out(_SIZE)),
    "cuMemAlloc_v2": (_out(_ADDRESS), _SIZE),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemHostAlloc": (_out(_POINTER), _SIZE, _UINT),
    "cuMemFreeHost": (_POINTER,),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, _POINTER, _SIZE, _POINTER),
    "cuMemcpyDtoHAsync_v2": (_POINTER, _ADDRESS, _SIZE, _POINTER),
    "cuStreamCreate": (_out(_POINTER), _UINT),
    "cuStreamSynchronize": (_POINTER,),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuEventCreate": (_out(_POINTER), _UINT),
    "cuEventRecord": (_POINTER, _POINTER),
    "cuEventElapsedTime": (_out(_FLOAT), _POINTER, _POINTER),
    "cuEventDestroy_v2": (_POINTER,),
    "cuStreamBeginCapture_v2": (_POINTER, _INT),
    "cuStreamEndCapture": (_POINTER, _out(_POINTER)),
    "cuGraphInstantiate_v2": (_out(_POINTER), _POINTER, _out(_POINTER), ctypes.c_char_p, _SIZE),
    "cuGraphLaunch": (_POINTER, _POINTER),
    "cuGraphExecDestroy": (_POINTER,),
    "cuGraphDestroy": (_POINTER,),
}
"""Argument types by exported name, from cuda.h; all return an int, 0 for success. Exported since CUDA 11.0."""

_NON_BLOCKING, _CAPTURE_THREAD_LOCAL = 1, 1
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_OUT_OF_MEMORY = 2
_RESTART = "the device cannot go on in this process: restart the program"
_REMEDIES = {
    34: "this libcuda is the toolkit's stub: install the NVIDIA driver, and remove `stubs` from LD_LIBRARY_PATH",
    100: "there is no CUDA device, or CUDA_VISIBLE_DEVICES hides it: check the list of `nvidia-smi`",
    700: _RESTART,
    719: _RESTART,
    803: "the driver was updated while the system was running: restart the machine",
}
_MIB = 1 << 20


@dataclass(frozen=True)
class CudaDevice:
    """The GPU; `cuda` is the newest CUDA that its driver supports, such as 11.4."""

    name: str
    capability: Tuple[int, int]
    memory_bytes: int
    cuda: str

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.capability[0]}{self.capability[1]}, CUDA {self.cuda})"


def open_cuda() -> Cuda:
    """Open the first CUDA device. Raises EngineError when there is no driver or no device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        remedy = "install the NVIDIA driver (JetPack includes it)"
        raise EngineError(f"the CUDA driver libcuda.so.1 cannot be loaded ({error}): {remedy}") from error
    return Cuda(driver)


class Cuda:
    """The first device's primary context and one stream in it; addresses and handles are integers.

    Every call but `close` belongs inside `with cuda:`. Failed calls raise EngineError; entering, leaving and releasing
    never raise: after a fault on the device the next real call reports it, and nothing can be released.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        _declare(driver)
        self._call("cuInit", 0)
        self._ordinal = self._new(_INT, "cuDeviceGet", 0)
        self.device = self._described()
        self._context = self._new(_POINTER, "cuDevicePrimaryCtxRetain", self._ordinal)
        try:
            with self:
                self.stream: int = self._new(_POINTER, "cuStreamCreate", _NON_BLOCKING)
        except BaseException:
            self._quietly("cuDevicePrimaryCtxRelease_v2", self._ordinal)
            raise

    def __enter__(self) -> Cuda:
        self._quietly("cuCtxPushCurrent_v2", self._context)
        return self

    def __exit__(self, *error: object) -> None:
        self._quietly("cuCtxPopCurrent_v2", ctypes.byref(_POINTER()))

    def _described(self) -> CudaDevice:
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, len(name), self._ordinal)
        major, minor = (
            self._new(_INT, "cuDeviceGetAttribute", which, self._ordinal)
            for which in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR)
        )
        version = self._new(_INT, "cuDriverGetVersion")
        memory = self._new(_SIZE, "cuDeviceTotalMem_v2", self._ordinal)
        return CudaDevice(name.value.decode(errors="replace"), (major, minor), memory, _version(version))

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the device, at least one, aligned to 256."""
        address = _ADDRESS()
        code = self._driver.cuMemAlloc_v2(ctypes.byref(address), size)
        if code == _OUT_OF_MEMORY:
            raise EngineError(self._out_of_memory(size))
        self._check("cuMemAlloc_v2", code)
        return address.value

    def _out_of_memory(self, size: int) -> str:
        free, total = _SIZE(), _SIZE()
        self._quietly("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        state = f"{size / _MIB:.1f} MiB requested, {free.value / _MIB:.1f} of {total.value / _MIB:.1f} MiB are free"
        return (
            f"{self.device.name} is out of memory: {state}; stop other programs that use the GPU, or choose a smaller "
            "plan"
        )

    def free(self, address: int) -> None:
        """Waits for the stream first, whose queued work may use the memory."""
        self.free_pending()
        self._quietly("cuMemFree_v2", address)

    def allocate_pinned(self, size: int) -> int:
        """Address of `size` bytes of page-locked host memory."""
        pointer: int = self._new(_POINTER, "cuMemHostAlloc", size, 0)
        return pointer

    def free_pinned(self, pointer: int) -> None:
        """Waits for the stream first, whose queued copies may use the memory."""
        self.free_pending()
        self._quietly("cuMemFreeHost", pointer)

    def copy_to_device(self, address: int, pinned: int, size: int) -> None:
        """Queue a copy: the pinned bytes must not change before the stream has run it."""
        self._call("cuMemcpyHtoDAsync_v2", address, pinned, size, self.stream)

    def copy_from_device(self, pinned: int, address: int, size: int) -> None:
        """Queue a copy: the pinned bytes are valid after `synchronise`."""
        self._call("cuMemcpyDtoHAsync_v2", pinned, address, size, self.stream)

    def synchronise(self) -> None:
        """Wait for all queued work. Raises EngineError for what failed on the device meanwhile."""
        self._call("cuStreamSynchronize", self.stream)

    def free_pending(self) -> None:
        """Wait for all queued work, ignoring its errors, before memory is released."""
        self._quietly("cuStreamSynchronize", self.stream)

    def event(self) -> int:
        event: int = self._new(_POINTER, "cuEventCreate", 0)
        return event

    def record(self, event: int) -> None:
        self._call("cuEventRecord", event, self.stream)

    def elapsed_ms(self, first: int, second: int) -> float:
        """Time between two recorded events that the stream has reached."""
        elapsed: float = self._new(_FLOAT, "cuEventElapsedTime", first, second)
        return elapsed

    def free_event(self, event: int) -> None:
        self._quietly("cuEventDestroy_v2", event)

    def begin_capture(self) -> None:
        """From now on, record queued work as a CUDA graph instead of running it."""
        self._call("cuStreamBeginCapture_v2", self.stream, _CAPTURE_THREAD_LOCAL)

    def end_capture(self) -> Optional[int]:
        """The graph, ready to launch; None if part of it cannot be captured."""
        graph = _POINTER()
        if self._driver.cuStreamEndCapture(self.stream, ctypes.byref(graph)) != 0 or not graph:
            return None
        launchable = _POINTER()
        code = self._driver.cuGraphInstantiate_v2(ctypes.byref(launchable), graph, None, None, 0)
        self._quietly("cuGraphDestroy", graph)
        return None if code != 0 else launchable.value

    def launch(self, graph: int) -> None:
        self._call("cuGraphLaunch", graph, self.stream)

    def free_graph(self, graph: int) -> None:
        self._quietly("cuGraphExecDestroy", graph)

    def close(self) -> None:
        """Release the stream and the context."""
        with self:
            self._quietly("cuStreamDestroy_v2", self.stream)
        self._quietly("cuDevicePrimaryCtxRelease_v2", self._ordinal)

    def _new(self, kind: Any, name: str, *arguments: Any) -> Any:
        """The value that a call writes to its first argument."""
        value = kind()
        self._call(name, ctypes.byref(value), *arguments)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._driver, name)(*arguments))

    def _quietly(self, name: str, *arguments: Any) -> None:
        getattr(self._driver, name)(*arguments)

    def _check(self, name: str, code: int) -> None:
        if code == 0:
            return
        words = ctypes.c_char_p()
        self._quietly("cuGetErrorName", code, ctypes.byref(words))
        known = (words.value or b"error").decode()
        remedy = f": {_REMEDIES[code]}" if code in _REMEDIES else ""
        raise EngineError(f"{name} failed with {known} ({code}){remedy}")


def _declare(driver: Any) -> None:
    for name, arguments in CALLS.items():
        try:
            function = getattr(driver, name)
        except AttributeError as error:
            raise EngineError(f"the CUDA driver has no {name}: update it to one for CUDA 11.4 or newer") from error
        function.argtypes, function.restype = arguments, _INT


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
