"""Manages tensors in device memory, and all memory that a library allocates for them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Set, Tuple

import numpy as np

from mess_compile.runtime.base.errors import EngineError
from mess_compile.runtime.engines.cuda import Cuda


@dataclass(eq=False)
class Block:
    """Bytes on the device."""

    address: int
    size: int


class DeviceTensor:
    """Values on the device: C order, dtype by numpy's name. An uploaded tensor returns its block when destroyed."""

    __slots__ = ("_home", "block", "dtype", "shape")

    def __init__(self, block: Block, dtype: str, shape: Tuple[int, ...], home: Optional[List[Block]] = None) -> None:
        self.block, self.dtype, self.shape, self._home = block, dtype, shape, home

    def __del__(self) -> None:
        if self._home is not None:
            self._home.append(self.block)


class DeviceMemory:
    """Blocks by owner, one scratch block for all engines, one pinned buffer for both directions.

    Everything is used in the order of one stream: the next queued work may write to a returned block.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._blocks: Set[Block] = set()
        self._idle: Dict[int, List[Block]] = {}
        self._scratch: Optional[Block] = None
        self._pinned, self._pinned_size = 0, 0
        self._uploading = False

    def allocate(self, size: int) -> Block:
        """Raises EngineError when the device is out of memory."""
        with self._cuda as cuda:
            block = Block(cuda.allocate(size), size)
        self._blocks.add(block)
        return block

    def free(self, block: Block) -> None:
        self._blocks.discard(block)
        with self._cuda as cuda:
            cuda.free(block.address)

    def holds(self, tensor: Any) -> bool:
        """Whether the tensor is in this memory and its block has not been freed."""
        return isinstance(tensor, DeviceTensor) and tensor.block in self._blocks

    def scratch(self, size: int) -> Block:
        """The block that all engines share, of at least this size; a bigger one replaces it."""
        if self._scratch is None or self._scratch.size < size:
            if self._scratch is not None:
                self.free(self._scratch)
                self._scratch = None
            self._scratch = self.allocate(max(size, 1))
        return self._scratch

    def upload(self, array: np.ndarray) -> DeviceTensor:
        values = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        idle = self._idle.setdefault(values.nbytes, [])
        block = idle.pop() if idle else self.allocate(values.nbytes)
        tensor = DeviceTensor(block, values.dtype.name, values.shape, idle)
        if self._uploading:
            self.synchronise()
        with self._cuda as cuda:
            ctypes.memmove(self._staging(values.nbytes), values.ctypes.data, values.nbytes)
            cuda.copy_to_device(block.address, self._pinned, values.nbytes)
        self._uploading = True
        return tensor

    def download(self, tensor: Any) -> np.ndarray:
        """Waits for all queued work. Raises EngineError for a tensor whose memory is gone."""
        if not self.holds(tensor):
            raise EngineError(f"{_described(tensor)} is not on the device: its engine or library is closed, or another")
        values = np.empty(tensor.shape, tensor.dtype)
        with self._cuda as cuda:
            cuda.copy_from_device(self._staging(values.nbytes), tensor.block.address, values.nbytes)
            self.synchronise()
        ctypes.memmove(values.ctypes.data, self._pinned, values.nbytes)
        return values

    def synchronise(self) -> None:
        with self._cuda as cuda:
            cuda.synchronise()
        self._uploading = False

    def _staging(self, size: int) -> int:
        """The pinned buffer, grown to at least `size` bytes."""
        if self._pinned_size < size:
            self._free_pinned()
            self._pinned = self._cuda.allocate_pinned(size)
            self._pinned_size = size
        return self._pinned

    def _free_pinned(self) -> None:
        if self._pinned_size:
            self._cuda.free_pinned(self._pinned)
        self._pinned, self._pinned_size = 0, 0

    def close(self) -> None:
        for block in tuple(self._blocks):
            self.free(block)
        with self._cuda:
            self._free_pinned()
        self._idle.clear()


def _described(tensor: Any) -> str:
    return f"a {tensor.dtype} tensor {tensor.shape}" if isinstance(tensor, DeviceTensor) else f"{tensor!r:.60}"
