"""A stand-in for libcuda: C functions of the prototypes in cuda.h, in front of Python.

What is queued is done at the next synchronisation, as late as a device may. Freed or foreign memory, host memory that
is not pinned, a wrong stream or a missing context is a fault: it is kept in `faults`, and the device is lost.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROTOTYPES = {
    "cuInit": "unsigned int Flags",
    "cuDriverGetVersion": "int *driverVersion",
    "cuGetErrorName": "CUresult error, const char **pStr",
    "cuDeviceGet": "CUdevice *device, int ordinal",
    "cuDeviceGetName": "char *name, int len, CUdevice dev",
    "cuDeviceGetAttribute": "int *pi, CUdevice_attribute attrib, CUdevice dev",
    "cuDeviceTotalMem_v2": "size_t *bytes, CUdevice dev",
    "cuDevicePrimaryCtxRetain": "CUcontext *pctx, CUdevice dev",
    "cuDevicePrimaryCtxRelease_v2": "CUdevice dev",
    "cuCtxPushCurrent_v2": "CUcontext ctx",
    "cuCtxPopCurrent_v2": "CUcontext *pctx",
    "cuMemGetInfo_v2": "size_t *free, size_t *total",
    "cuMemAlloc_v2": "CUdeviceptr *dptr, size_t bytesize",
    "cuMemFree_v2": "CUdeviceptr dptr",
    "cuMemHostAlloc": "void **pp, size_t bytesize, unsigned int Flags",
    "cuMemFreeHost": "void *p",
    "cuMemcpyHtoDAsync_v2": "CUdeviceptr dstDevice, const void *srcHost, size_t ByteCount, CUstream hStream",
    "cuMemcpyDtoHAsync_v2": "void *dstHost, CUdeviceptr srcDevice, size_t ByteCount, CUstream hStream",
    "cuStreamCreate": "CUstream *phStream, unsigned int Flags",
    "cuStreamSynchronize": "CUstream hStream",
    "cuStreamDestroy_v2": "CUstream hStream",
    "cuEventCreate": "CUevent *phEvent, unsigned int Flags",
    "cuEventRecord": "CUevent hEvent, CUstream hStream",
    "cuEventElapsedTime": "float *pMilliseconds, CUevent hStart, CUevent hEnd",
    "cuEventDestroy_v2": "CUevent hEvent",
    "cuStreamBeginCapture_v2": "CUstream hStream, CUstreamCaptureMode mode",
    "cuStreamEndCapture": "CUstream hStream, CUgraph *phGraph",
    "cuGraphInstantiate_v2": "CUgraphExec *phGraphExec, CUgraph hGraph, CUgraphNode *phErrorNode, char *logBuffer, "
    "size_t bufferSize",
    "cuGraphLaunch": "CUgraphExec hGraphExec, CUstream hStream",
    "cuGraphExecDestroy": "CUgraphExec hGraphExec",
    "cuGraphDestroy": "CUgraph hGraph",
}
_PLAIN: dict[str, Any] = {
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "size_t": ctypes.c_size_t,
    "float": ctypes.c_float,
    "char": ctypes.c_char,
    "CUdevice": ctypes.c_int,
    "CUresult": ctypes.c_int,
    "CUdevice_attribute": ctypes.c_int,
    "CUstreamCaptureMode": ctypes.c_int,
    "CUdeviceptr": ctypes.c_ulonglong,
}
_WITHOUT_CONTEXT = ("cuInit", "cuDriver", "cuGetError", "cuDevice", "cuCtx")
OUT_OF_MEMORY, INVALID_CONTEXT, NOT_READY, ILLEGAL_ADDRESS, UNKNOWN = 2, 201, 600, 700, 999
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 900, 901
_ERRORS = {
    2: b"CUDA_ERROR_OUT_OF_MEMORY",
    34: b"CUDA_ERROR_STUB_LIBRARY",
    100: b"CUDA_ERROR_NO_DEVICE",
    700: b"CUDA_ERROR_ILLEGAL_ADDRESS",
}


class Fault(Exception):
    """What would be undefined on a real device."""


def c_types(prototype: str) -> tuple[Any, ...]:
    return tuple(_c_type(declaration) for declaration in prototype.split(", "))


def _c_type(declaration: str) -> Any:
    words = declaration.replace("const ", "").replace("*", " * ").split()
    stars, base = words.count("*"), " ".join(words[: words.index("*")] if "*" in words else words[:-1])
    kind = _PLAIN.get(base, ctypes.c_void_p)
    if base == "void" or (base, stars) == ("char", 2):
        kind, stars = ctypes.c_void_p if base == "void" else ctypes.c_char_p, stars - 1
    for _ in range(stars):
        kind = ctypes.POINTER(kind)
    return kind


@dataclass
class Region:
    """Device memory; `holds` is the type and shape that a kernel last wrote, None for bytes from the host."""

    values: NDArray[np.uint8]
    holds: tuple[str, tuple[int, ...]] | None = None


class Driver:
    """`log` names every call but the context's; `copies` are (direction, bytes) as they are queued."""

    def __init__(self, memory_bytes: int = 1 << 28, fail: dict[str, int] | None = None) -> None:
        self.memory_bytes = memory_bytes
        self.fail = fail or {}
        self.log: list[str] = []
        self.copies: list[tuple[str, int]] = []
        self.faults: list[str] = []
        self.now_ms = 0.0
        self.retained = 0
        self.stacks: dict[int, list[int]] = {}
        self.regions: dict[int, Region] = {}
        self.pinned: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.events: dict[int, float | None] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.capturing: list[Callable[[], None]] | None = None
        self.capture_broken = False
        self._queue: list[Callable[[], None]] = []
        self._addresses = itertools.count(0x7F0000000000, 1 << 24)  # none twice, so that a stale one is found
        self._handles = itertools.count(0x1000, 0x10)
        self._primary = next(self._handles)
        for name, prototype in PROTOTYPES.items():
            c_function = ctypes.CFUNCTYPE(ctypes.c_int, *c_types(prototype))
            setattr(self, name, c_function(self._exported(name, getattr(self, f"_{name}"))))

    def _exported(self, name: str, function: Callable[..., int | None]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if not name.startswith(("cuCtx", "cuGetError")):
                self.log.append(name)
            if name in self.fail:
                return self.fail[name]
            if self.faults and not name.startswith(_WITHOUT_CONTEXT):
                return ILLEGAL_ADDRESS
            try:
                if not name.startswith(_WITHOUT_CONTEXT):
                    self.check_context()
                return function(*arguments) or 0
            except Exception as error:
                self.faults.append(f"{name}: {error!r}")
                return ILLEGAL_ADDRESS

        return call

    def check_context(self) -> None:
        stack = self.stacks.get(threading.get_ident(), [])
        if not self.retained or not stack or stack[-1] != self._primary:
            raise Fault("the primary context is not current")

    def enqueue(self, stream: int | None, work: Callable[[], None]) -> None:
        if stream not in self.streams:
            raise Fault(f"there is no stream {stream}")
        (self._queue if self.capturing is None else self.capturing).append(work)

    def region(self, address: int, size: int) -> Region:
        """The memory that begins at an address; it must hold `size` bytes."""
        if address not in self.regions:
            raise Fault(f"nothing is allocated at {address:#x}")
        if self.regions[address].values.size < size:
            raise Fault(f"{self.regions[address].values.size} bytes are at {address:#x}, not {size}")
        return self.regions[address]

    def left(self) -> Counter[str]:
        """What has not been given back."""
        counts = {
            "device memory": len(self.regions),
            "pinned memory": len(self.pinned),
            "streams": len(self.streams),
            "events": len(self.events),
            "graphs": len(self.graphs),
            "contexts": self.retained + sum(map(len, self.stacks.values())),
        }
        return +Counter(counts)

    def _handle(self, out: Any) -> int:
        out[0] = next(self._handles)
        return int(out[0])

    def _cuInit(self, flags: int) -> None:
        pass

    def _cuDriverGetVersion(self, out: Any) -> None:
        out[0] = 11040

    def _cuGetErrorName(self, code: int, out: Any) -> None:
        out[0] = _ERRORS.get(code, b"CUDA_ERROR_UNKNOWN")

    def _cuDeviceGet(self, out: Any, ordinal: int) -> None:
        out[0] = ordinal

    def _cuDeviceGetName(self, out: Any, size: int, device: int) -> None:
        ctypes.memmove(out, b"Stand-in\0", min(size, 9))

    def _cuDeviceGetAttribute(self, out: Any, which: int, device: int) -> None:
        out[0] = {75: 7, 76: 2}[which]

    def _cuDeviceTotalMem_v2(self, out: Any, device: int) -> None:
        out[0] = self.memory_bytes

    def _cuDevicePrimaryCtxRetain(self, out: Any, device: int) -> None:
        self.retained += 1
        out[0] = self._primary

    def _cuDevicePrimaryCtxRelease_v2(self, device: int) -> None:
        self.retained -= 1

    def _cuCtxPushCurrent_v2(self, context: int) -> None:
        if not self.retained:
            raise Fault("a context is made current after it was given back")
        self.stacks.setdefault(threading.get_ident(), []).append(context)

    def _cuCtxPopCurrent_v2(self, out: Any) -> None:
        out[0] = self.stacks[threading.get_ident()].pop()

    def _cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        free[0], total[0] = self.memory_bytes - self._taken(), self.memory_bytes

    def _taken(self) -> int:
        return sum(region.values.size for region in self.regions.values())

    def _cuMemAlloc_v2(self, out: Any, size: int) -> int:
        if self.capturing is not None or size == 0:
            return CAPTURE_UNSUPPORTED if size else 1
        if self._taken() + size > self.memory_bytes:
            return OUT_OF_MEMORY
        out[0] = next(self._addresses)
        self.regions[int(out[0])] = Region(np.full(size, 0xA5, np.uint8))
        return 0

    def _cuMemFree_v2(self, address: int) -> None:
        if self._queue:
            raise Fault("device memory is freed while work is queued")
        del self.regions[address]

    def _cuMemHostAlloc(self, out: Any, size: int, flags: int) -> None:
        buffer = ctypes.create_string_buffer(size)
        out[0] = ctypes.addressof(buffer)
        self.pinned[int(out[0])] = buffer

    def _cuMemFreeHost(self, pointer: int) -> None:
        if self._queue:
            raise Fault("pinned memory is freed while work is queued")
        del self.pinned[pointer]

    def _check_pinned(self, pointer: int, size: int) -> None:
        if pointer not in self.pinned or len(self.pinned[pointer]) < size:
            raise Fault(f"no {size} pinned bytes at {pointer:#x}")

    def _cuMemcpyHtoDAsync_v2(self, address: int, pointer: int, size: int, stream: int) -> None:
        self._check_pinned(pointer, size)
        self.copies.append(("to device", size))

        def work() -> None:
            self._check_pinned(pointer, size)
            region = self.region(address, size)
            ctypes.memmove(region.values.ctypes.data, pointer, size)
            region.holds = None

        self.enqueue(stream, work)

    def _cuMemcpyDtoHAsync_v2(self, pointer: int, address: int, size: int, stream: int) -> None:
        self._check_pinned(pointer, size)
        self.copies.append(("from device", size))

        def work() -> None:
            self._check_pinned(pointer, size)
            ctypes.memmove(pointer, self.region(address, size).values.ctypes.data, size)

        self.enqueue(stream, work)

    def _cuStreamCreate(self, out: Any, flags: int) -> None:
        self.streams.add(self._handle(out))

    def _cuStreamSynchronize(self, stream: int) -> int:
        if stream not in self.streams:
            raise Fault(f"there is no stream {stream}")
        if self.capturing is not None:
            self.capture_broken = True
            return CAPTURE_UNSUPPORTED
        queue, self._queue = self._queue, []
        for work in queue:
            work()
        return 0

    def _cuStreamDestroy_v2(self, stream: int) -> None:
        self.streams.remove(stream)

    def _cuEventCreate(self, out: Any, flags: int) -> None:
        self.events[self._handle(out)] = None

    def _cuEventRecord(self, event: int, stream: int) -> None:
        self.events[event] = None
        self.enqueue(stream, lambda: self.events.update({event: self.now_ms}))

    def _cuEventElapsedTime(self, out: Any, first: int, second: int) -> int:
        start, end = self.events[first], self.events[second]
        if start is None or end is None:
            return NOT_READY
        out[0] = end - start
        return 0

    def _cuEventDestroy_v2(self, event: int) -> None:
        del self.events[event]

    def _cuStreamBeginCapture_v2(self, stream: int, mode: int) -> None:
        if stream not in self.streams or self.capturing is not None or mode != 1:
            raise Fault("a capture begins on no stream, twice, or in a mode that stops other threads")
        self.capturing, self.capture_broken = [], False

    def _cuStreamEndCapture(self, stream: int, out: Any) -> int:
        captured, self.capturing = self.capturing, None
        if captured is None:
            raise Fault("a capture ends that never began")
        if self.capture_broken:
            out[0] = None
            return CAPTURE_INVALIDATED
        self.graphs[self._handle(out)] = captured
        return 0

    def _cuGraphInstantiate_v2(self, out: Any, graph: int, node: Any, text: Any, size: int) -> None:
        self.graphs[self._handle(out)] = list(self.graphs[graph])

    def _cuGraphLaunch(self, graph: int, stream: int) -> None:
        for work in self.graphs[graph]:
            self.enqueue(stream, work)

    def _cuGraphExecDestroy(self, graph: int) -> None:
        del self.graphs[graph]

    def _cuGraphDestroy(self, graph: int) -> None:
        del self.graphs[graph]
