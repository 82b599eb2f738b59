"""Applies the EXIF orientation of a picture to its pixels.

Source: EXIF 2.32 (CIPA DC-008), 4.6.4; PNG specification, third edition, eXIf.
"""

from __future__ import annotations

import struct

import numpy as np

_HEADER = b"Exif\0\0"
_BYTE_ORDERS = {b"II": "<", b"MM": ">"}
_TAG = 274
_FORMS = {1: "B", 3: "H", 4: "I"}
"""Struct formats by EXIF type."""
UPRIGHT = 1


def orientation_of(exif: bytes) -> int:
    """The orientation, 1 to 8, in EXIF data; 1 if it is missing or unreadable, as viewers assume."""
    data = exif[len(_HEADER) :] if exif.startswith(_HEADER) else exif
    order = _BYTE_ORDERS.get(data[:2])
    if order is None:
        return UPRIGHT
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (entries,) = struct.unpack_from(f"{order}H", data, start)
        for place in range(start + 2, start + 2 + 12 * entries, 12):
            tag, form = struct.unpack_from(f"{order}HH", data, place)
            if tag == _TAG and form in _FORMS:
                (value,) = struct.unpack_from(order + _FORMS[form], data, place + 8)
                return value if 1 <= value <= 8 else UPRIGHT
    except struct.error:
        pass
    return UPRIGHT


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels (H, W, ...) upright; orientations 5 to 8 swap height and width."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels[::rows, ::columns])
