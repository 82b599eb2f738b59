"""Reads and writes arrays as `.npy` files; golden files do not go through numpy's parser, which evaluates headers."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np

_START = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(rb"\{'descr': '\|u1', 'fortran_order': False, 'shape': \((\d{1,5}), (\d{1,5})(?:, (3))?\), \}\s*")


def read_uint8(path: Path) -> np.ndarray:
    """Read uint8 (H, W) or (H, W, 3). Raises ValueError for any other content, before it allocates memory."""
    content = path.read_bytes()
    start = len(_START) + 2
    end = start + int.from_bytes(content[len(_START) : start], "little")
    header = _HEADER.fullmatch(content[start:end])
    if not content.startswith(_START) or header is None:
        raise ValueError("not an .npy file of version 1 with uint8 (H, W) or (H, W, 3)")
    shape = tuple(int(size) for size in header.groups() if size is not None)
    if int(np.prod(shape)) != len(content) - end:
        raise ValueError(f"the header says {shape}, but {len(content) - end} bytes follow")
    values: np.ndarray = np.frombuffer(content, np.uint8, offset=end).reshape(shape).copy()
    return values


def content_of(array: np.ndarray) -> bytes:
    """The bytes of an array's `.npy` file, which `read_uint8` and numpy read."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()
