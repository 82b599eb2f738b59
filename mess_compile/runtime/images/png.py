"""Reads and writes the PNGs that cameras and label tools make, in numpy and zlib, without an imaging library.

Source: PNG specification, third edition, https://www.w3.org/TR/png-3/
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Iterator, List, Optional, Sequence, Tuple

import numpy as np

from mess_compile.runtime.base.errors import InputError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_SIDE = 1 << 15
MAX_PIXELS = 1 << 26
MAX_BYTES = 4 * MAX_PIXELS
_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGBA = 0, 2, 3, 4, 6
_CHANNELS = {_GREY: 1, _RGB: 3, _PALETTE: 1, _GREY_ALPHA: 2, _RGBA: 4}
_DEPTHS = {_GREY: (1, 2, 4, 8, 16), _RGB: (8, 16), _PALETTE: (1, 2, 4, 8), _GREY_ALPHA: (8, 16), _RGBA: (8, 16)}
"""The sample depths in bits that each colour type allows."""
_PAETH = 4


_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""The seven passes of an interlaced picture: first row and column, and the steps in both."""
DARK = 1 << 12
"""If all 16-bit samples lie below this, the source has 10 or 12 bits; their upper 8 bits are nearly black."""


@dataclass(frozen=True)
class _Header:
    width: int
    height: int
    depth: int
    colour_type: int
    interlaced: bool = False

    @property
    def step(self) -> int:
        """The offset in bytes to the pixel that row filters refer to; 1 if a byte holds several pixels."""
        return max(1, _CHANNELS[self.colour_type] * self.depth // 8)

    @property
    def row_bytes(self) -> int:
        return (self.width * _CHANNELS[self.colour_type] * self.depth + 7) // 8


@dataclass(frozen=True)
class Png:
    """A PNG whose chunks are valid; `rows` are inflated, but still filtered."""

    header: _Header
    palette: np.ndarray
    exif: bytes
    frames: int
    rows: bytes

    @property
    def is_palette(self) -> bool:
        return self.header.colour_type == _PALETTE

    @property
    def depth(self) -> int:
        """Bits per sample."""
        return self.header.depth

    @property
    def is_grey(self) -> bool:
        """Whether there is one channel of grey, with or without transparency."""
        return self.header.colour_type in (_GREY, _GREY_ALPHA)

    @property
    def has_alpha(self) -> bool:
        """Whether the last channel is transparency."""
        return self.header.colour_type in (_GREY_ALPHA, _RGBA)

    @property
    def shape(self) -> Tuple[int, int, int]:
        """Height, width and channels of the samples."""
        return self.header.height, self.header.width, _CHANNELS[self.header.colour_type]


def opened(content: bytes) -> Png:
    """Parse a PNG. Raises InputError for a damaged one, before memory is allocated for pixels that the file lacks."""
    chunks = list(_chunks(content))
    if not chunks or chunks[0][0] != b"IHDR" or chunks[-1][0] != b"IEND":
        raise InputError("the PNG does not begin with IHDR and end with IEND: it is truncated or damaged")
    header = _header(chunks[0][1])
    _refuse_unknown(kind for kind, _ in chunks)
    rows = _inflated(header, b"".join(data for kind, data in chunks if kind == b"IDAT"))
    palettes = [data for kind, data in chunks if kind == b"PLTE"]
    animations = [data for kind, data in chunks if kind == b"acTL" and len(data) == 8]
    return Png(
        header=header,
        palette=_palette(palettes) if header.colour_type == _PALETTE else np.zeros((0, 3), np.uint8),
        exif=next((data for kind, data in chunks if kind == b"eXIf"), b""),
        frames=max((int.from_bytes(data[:4], "big") for data in animations), default=1),
        rows=rows,
    )


def read_png(content: bytes) -> np.ndarray:
    """The picture as stored, uint8 RGB (H, W, 3), without transparency; the upper 8 bits of 16-bit samples.

    Raises InputError for a damaged one.
    """
    picture = opened(content)
    return rgb(picture, samples_of(picture))


def rgb(picture: Png, samples: np.ndarray) -> np.ndarray:
    """Convert samples (H, W, channels) to pixels: uint8 RGB (H, W, 3), without transparency.

    Takes the upper 8 bits of 16-bit samples. Raises InputError for a palette index without a colour.
    """
    if picture.is_palette:
        return _painted(samples[..., 0], picture.palette)
    if samples.dtype == np.uint16:
        samples = (samples >> 8).astype(np.uint8)
    if picture.is_grey:
        white = (1 << min(picture.depth, 8)) - 1
        return np.repeat(samples[..., :1] * np.uint8(255 // white), 3, axis=2)
    return np.ascontiguousarray(samples[..., :3])


def samples_of(picture: Png) -> np.ndarray:
    """The stored samples, (H, W, channels): uint8, or uint16 for 16 bits; palette indices as they are."""
    header = picture.header
    stored = _deinterlaced(picture) if header.interlaced else _pixels(header, picture.rows)
    if header.depth < 16:
        return stored
    wide: np.ndarray = stored[..., 0::2].astype(np.uint16) << 8 | stored[..., 1::2]
    return wide


def _painted(indices: np.ndarray, palette: np.ndarray) -> np.ndarray:
    if int(indices.max()) >= len(palette):
        raise InputError(
            f"the PNG uses the index {indices.max()} in a palette of {len(palette)} colours: it is damaged"
        )
    painted: np.ndarray = palette[indices]
    return painted


def write_png(pixels: np.ndarray, palette: Optional[Sequence[Tuple[int, int, int]]] = None) -> bytes:
    """Encode RGB (H, W, 3), grey (H, W), or indices (H, W) into a `palette` of up to 256 colours; uint8.

    The same pixels give the same bytes with the same zlib.
    """
    height, width = pixels.shape[:2]
    colour_type = _RGB if pixels.ndim == 3 else _GREY if palette is None else _PALETTE
    rows = np.zeros((height, 1 + width * _CHANNELS[colour_type]), np.uint8)  # each row after its filter type, 0
    rows[:, 1:] = pixels.reshape(height, -1)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0))]
    if palette is not None:
        parts.append((b"PLTE", bytes(value for colour in palette for value in colour)))
    parts += [(b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b"")]
    return SIGNATURE + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _chunks(content: bytes) -> Iterator[Tuple[bytes, bytes]]:
    if not content.startswith(SIGNATURE):
        raise InputError("not a PNG: its first bytes are not a PNG's")
    position = len(SIGNATURE)
    while position < len(content):
        if position + 12 > len(content):
            raise InputError("the PNG is truncated")
        size, kind = struct.unpack_from(">I4s", content, position)
        end = position + 8 + size
        if end + 4 > len(content):
            raise InputError(
                f"the PNG's chunk {_word(kind)} claims {size} bytes, more than the file has: it is truncated"
            )
        data = content[position + 8 : end]
        if struct.unpack_from(">I", content, end)[0] != zlib.crc32(kind + data):
            raise InputError(f"the PNG's chunk {_word(kind)} is damaged: its checksum differs")
        yield kind, data
        position = end + 4
        if kind == b"IEND":
            return


def _word(kind: bytes) -> str:
    return repr(kind.decode("latin-1"))


def _refuse_unknown(kinds: Iterator[bytes]) -> None:
    """Refuse unknown critical chunks (their first letter is a capital): they change what the pixels mean."""
    for kind in kinds:
        if not kind[0] & 0x20 and kind not in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            raise InputError(f"the PNG has an unknown critical chunk {_word(kind)}: convert it to plain PNG")


def _header(data: bytes) -> _Header:
    if len(data) != 13:
        raise InputError("the PNG's IHDR is damaged")
    width, height, depth, colour_type, compression, filtering, interlace = struct.unpack(">IIBBBBB", data)
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise InputError(f"the PNG claims {width} x {height} pixels, not 1 to {MAX_SIDE} a side, {MAX_PIXELS} in all")
    if depth not in _DEPTHS.get(colour_type, ()) or compression or filtering or interlace > 1:
        raise InputError("the PNG's IHDR has values that the format does not allow: it is damaged")
    header = _Header(width, height, depth, colour_type, bool(interlace))
    if header.row_bytes * height > MAX_BYTES:
        raise InputError(f"the PNG claims {width} x {height} pixels of {depth} bits per sample: convert it to 8 bits")
    return header


def _inflated(header: _Header, compressed: bytes) -> bytes:
    """The filtered rows. Raises InputError unless they have as many bytes as the header says."""
    size = sum(part.height * (1 + part.row_bytes) for part in _parts(header))
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(compressed, size + 1)
    except zlib.error as error:
        raise InputError(f"the PNG's pixels are damaged: {error}") from error
    if len(raw) != size or not inflater.eof:
        raise InputError(f"the PNG's pixels are not the {size} bytes that its header says: it is truncated or damaged")
    start = 0
    for part in _parts(header):
        stop = start + part.height * (1 + part.row_bytes)
        highest = max(raw[start : stop : 1 + part.row_bytes])
        if highest > _PAETH:
            raise InputError(f"the PNG has a row filter {highest}, not 0 to {_PAETH}: it is damaged")
        start = stop
    return raw


def _parts(header: _Header) -> List[_Header]:
    """The pictures that are stored one after the other: the whole, or the passes of an interlaced one."""
    if not header.interlaced:
        return [header]
    sizes = [
        ((header.width - left + right - 1) // right, (header.height - top + down - 1) // down)
        for top, left, down, right in _PASSES
    ]
    return [_Header(width, height, header.depth, header.colour_type) for width, height in sizes if width and height]


def _deinterlaced(picture: Png) -> np.ndarray:
    header, start = picture.header, 0
    whole = np.zeros((header.height, header.width, 0), np.uint8)
    places = [place for place in _PASSES if place[0] < header.height and place[1] < header.width]
    for part, (top, left, down, right) in zip(_parts(header), places):
        stop = start + part.height * (1 + part.row_bytes)
        pixels = _pixels(part, picture.rows[start:stop])
        if not start:
            whole = np.zeros((header.height, header.width, pixels.shape[2]), np.uint8)
        whole[top::down, left::right] = pixels
        start = stop
    return whole


def _pixels(header: _Header, raw: bytes) -> np.ndarray:
    """The pixels' bytes of a picture that is not interlaced, (H, W, bytes); below 8 bits, samples (H, W, 1)."""
    rows = np.frombuffer(raw, np.uint8).reshape(header.height, -1)  # (H, 1 + row_bytes)
    stored = _unfiltered(rows[:, 0], rows[:, 1:].reshape(header.height, -1, header.step))
    return _unpacked(stored[..., 0], header) if header.depth < 8 else stored


def _unpacked(rows: np.ndarray, header: _Header) -> np.ndarray:
    """Unpack bytes (H, row_bytes) that hold several samples, leftmost in the highest bits, to samples (H, W, 1)."""
    shifts = np.arange(8 - header.depth, -1, -header.depth, dtype=np.uint8)
    samples = (rows[..., None] >> shifts) & ((1 << header.depth) - 1)  # (H, row_bytes, samples of a byte)
    return samples.reshape(header.height, -1)[:, : header.width, None]


def _unfiltered(filters: np.ndarray, residues: np.ndarray) -> np.ndarray:
    """Undo the row filters: each pixel is its residue plus a prediction from its left, upper and upper left neighbours.

    Pixels of one anti-diagonal do not depend on each other. In a flat array of (H + 1) x (W + 1) pixels, the first row
    and column zero, they lie W apart, so that a diagonal and its neighbours are slices.
    """
    height, width, channels = residues.shape
    flat = np.zeros(((height + 1) * (width + 1), channels), np.int16)
    flat.reshape(height + 1, width + 1, channels)[1:, 1:] = residues
    kinds = filters[:, None]  # (H, 1)
    for diagonal in range(height + width - 1):
        first, last = max(0, diagonal - width + 1), min(diagonal, height - 1)
        start = (first + 1) * (width + 1) + diagonal - first + 1
        stop = start + (last - first) * width + 1
        left, up, corner = (flat[start - back : stop - back : width] for back in (1, width + 1, width + 2))
        flat[start:stop:width] += _predicted(kinds[first : last + 1], left, up, corner)
        flat[start:stop:width] &= 255
    return flat.reshape(height + 1, width + 1, channels)[1:, 1:].astype(np.uint8)


def _predicted(kinds: np.ndarray, left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
    nearer = np.where(to_up <= to_corner, up, corner)
    paeth = np.where((to_left <= to_up) & (to_left <= to_corner), left, nearer)
    kinds = np.broadcast_to(kinds, left.shape)
    return np.choose(kinds, [np.zeros_like(left), left, up, (left + up) >> 1, paeth])


def _palette(palettes: List[bytes]) -> np.ndarray:
    """Colours uint8 (n, 3)."""
    if len(palettes) != 1 or not palettes[0] or len(palettes[0]) % 3 or len(palettes[0]) > 768:
        raise InputError("the PNG lacks a palette of 1 to 256 colours: it is damaged")
    return np.frombuffer(palettes[0], np.uint8).reshape(-1, 3)
