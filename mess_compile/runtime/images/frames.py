"""Checks and resizes frames and label maps, and draws overlays, in numpy alone."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Sequence, Tuple

import numpy as np

from mess_compile.runtime.base.checks import check_share
from mess_compile.runtime.base.errors import InputError

PADDING = 127
"""Fills the border of a letterboxed frame: mid grey, close to the mean that networks subtract."""
_FRACTION_BITS = 22


def check_frame(frame: Any) -> np.ndarray:
    """Return the frame: uint8 RGB (H, W, 3), C-contiguous. Raises InputError naming dtype and shape."""
    if not isinstance(frame, np.ndarray):
        raise InputError(f"a frame is a uint8 numpy array (H, W, 3), not a {type(frame).__name__}")
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise InputError(
            f"a frame is uint8 (H, W, 3), not {frame.dtype} {frame.shape}: convert it to 8-bit RGB, channels last"
        )
    return np.ascontiguousarray(frame)


def to_input(frame: np.ndarray, hw: Tuple[int, int], how: str) -> np.ndarray:
    """Resize a frame uint8 (H, W, 3) to the network's size: `how` is "stretch", or "letterbox", which keeps
    proportions.

    A letterboxed frame touches two opposite sides of the input and is centred between the others, on `PADDING`.
    """
    if frame.shape[:2] == tuple(hw):
        return frame
    rows, columns = _place(frame.shape[:2], hw, how)
    inner = resize(frame, (rows.stop - rows.start, columns.stop - columns.start))
    if inner.shape[:2] == tuple(hw):
        return inner
    image = np.full((*hw, 3), PADDING, np.uint8)
    image[rows, columns] = inner
    return image


def from_input(labels: np.ndarray, hw: Tuple[int, int], how: str) -> np.ndarray:
    """Map labels (or any map) of the network's size back to the frame's (H, W) = `hw`: cut padding, resize nearest."""
    if labels.shape == tuple(hw):
        return labels
    return resize_labels(labels[_place(hw, labels.shape, how)], hw)


def _place(frame_hw: Tuple[int, ...], hw: Tuple[int, ...], how: str) -> Tuple[slice, slice]:
    """The rows and columns of the input that the frame covers."""
    if how == "stretch":
        return slice(0, hw[0]), slice(0, hw[1])
    (height, width), (h, w) = frame_hw, hw
    if height * w <= width * h:  # limited by its width
        h = max((2 * height * w + width) // (2 * width), 1)
    else:
        w = max((2 * width * h + height) // (2 * height), 1)
    top, left = (hw[0] - h) // 2, (hw[1] - w) // 2
    return slice(top, top + h), slice(left, left + w)


def resize(frame: np.ndarray, hw: Tuple[int, int]) -> np.ndarray:
    """Bilinear resize of uint8 (H, W, 3) to uint8 (h, w, 3), antialiased when it shrinks.

    Height first, then width, in fixed point, rounded to 8 bits in between: bit for bit Pillow's BILINEAR in each pass.
    """
    frame = check_frame(frame)
    if frame.shape[:2] == tuple(hw):
        return frame
    columns = _resize_rows(frame, hw[0]).transpose(1, 0, 2)  # (W, h, 3)
    return np.ascontiguousarray(_resize_rows(np.ascontiguousarray(columns), hw[1]).transpose(1, 0, 2))


def _resize_rows(rows: np.ndarray, size: int) -> np.ndarray:
    if rows.shape[0] == size:
        return rows
    first, weights = _triangle(rows.shape[0], size)
    total = np.full((size, *rows.shape[1:]), 1 << (_FRACTION_BITS - 1), np.int32)
    for tap in range(weights.shape[1]):
        source = np.minimum(first + tap, rows.shape[0] - 1)  # beyond the last row the weight is zero
        total += rows[source] * weights[:, tap, None, None]
    return (total >> _FRACTION_BITS).astype(np.uint8)


@lru_cache(maxsize=32)
def _triangle(size_in: int, size_out: int) -> Tuple[np.ndarray, np.ndarray]:
    """The first source index (out,) and the fixed-point weights (out, taps) of a triangle filter."""
    scale = size_in / size_out
    support = max(scale, 1.0)
    centre = (np.arange(size_out) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), size_in)
    index = first[:, None] + np.arange(int(np.max(last - first)))  # (out, taps)
    weights = np.maximum(1.0 - np.abs((index - centre[:, None] + 0.5) / support), 0.0)
    weights *= index < last[:, None]
    weights /= weights.sum(axis=1, keepdims=True)
    return first, (weights * (1 << _FRACTION_BITS) + 0.5).astype(np.int32)


def resize_labels(labels: np.ndarray, hw: Tuple[int, int]) -> np.ndarray:
    """Nearest resize of labels (H, W) to (h, w): row i comes from floor((i + 0.5) * H / h), columns alike."""
    if labels.shape == tuple(hw):
        return labels
    rows, columns = (_nearest(source, size) for source, size in zip(labels.shape, hw))
    return np.ascontiguousarray(labels[rows[:, None], columns])


@lru_cache(maxsize=32)
def _nearest(size_in: int, size_out: int) -> np.ndarray:
    return (2 * np.arange(size_out) + 1) * size_in // (2 * size_out)


def overlay(
    frame: np.ndarray, labels: np.ndarray, colours: Sequence[Tuple[int, int, int]], opacity: float = 0.5
) -> np.ndarray:
    """Blend each label's colour over the frame: uint8 (H, W, 3). Raises InputError."""
    check_share("opacity", opacity)
    frame = check_frame(frame)
    if labels.shape != frame.shape[:2]:
        raise InputError(f"labels of shape {labels.shape} do not fit a frame of {frame.shape[:2]}")
    if int(labels.max()) >= len(colours):
        raise InputError(f"label {int(labels.max())} has no colour; there are {len(colours)}")
    weight = round(opacity * 256)
    paint = (np.asarray(colours, np.uint32) * weight)[labels]  # (H, W, 3)
    mixed: np.ndarray = (frame * np.uint32(256 - weight) + paint + 128) >> 8
    return mixed.astype(np.uint8)
