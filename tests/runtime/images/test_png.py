"""A frame read on the device is the frame that was read where the plan was tuned; Pillow is the judge."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.images import pictures, png


def smooth(height: int, width: int, channels: int, seed: int) -> NDArray[np.uint8]:
    """Slopes and noise, so that an encoder uses every row filter."""
    random = np.random.default_rng(seed)
    slope = np.add.outer(np.arange(height) * 3, np.arange(width) * 5)[..., None] * np.arange(1, channels + 1)
    return np.asarray((slope + random.integers(0, 9, (height, width, channels))) % 256, np.uint8)


def encoded(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def as_rgb(content: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 99),
    mode=st.sampled_from(["L", "LA", "RGB", "RGBA", "P256", "P16", "P4", "P2", "1"]),
)  # fmt: skip
def test_what_pillow_writes_is_read_as_pillow_reads_it(height: int, width: int, mode: str, seed: int) -> None:
    channels = {"L": 1, "1": 1, "LA": 2, "RGBA": 4}.get(mode, 3)
    pixels = smooth(height, width, channels, seed)
    if mode.startswith("P"):  # few colours: Pillow packs them into fewer bits
        image = Image.fromarray(pixels).quantize(int(mode[1:]))
    elif mode == "1":
        image = Image.fromarray(pixels[..., 0]).convert("1")
    else:
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode)
    content = encoded(image)
    np.testing.assert_array_equal(png.read_png(content), as_rgb(content))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("width", [1, 7, 8, 9])
def test_grey_of_any_depth_is_spread_from_black_to_white(depth: int, width: int) -> None:
    """By the specification: the largest sample is white; of 16 bits the upper byte counts."""
    samples = np.random.default_rng(depth).integers(0, 1 << depth, (3, width))
    rows = b""
    for row in samples:
        bits = "".join(f"{sample:0{depth}b}" for sample in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    expected = samples >> 8 if depth == 16 else samples * 255 // ((1 << depth) - 1)
    read = png.read_png(made(width, 3, 0, zlib.compress(rows), depth))
    np.testing.assert_array_equal(read, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_of_16_bits_the_upper_8_are_read_as_pillow_does(colour: int, channels: int) -> None:
    random = np.random.default_rng(colour)
    filters = np.array([[0], [1], [2], [4]], np.uint8)
    rows = np.concatenate([filters, random.integers(0, 256, (4, 5 * channels * 2), np.uint8)], axis=1)
    content = made(5, 4, colour, zlib.compress(rows.tobytes()), depth=16)
    np.testing.assert_array_equal(png.read_png(content), as_rgb(content))


def by_the_book(residues: NDArray[np.uint8], filters: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The specification's reconstruction, byte by byte."""
    height, width, channels = residues.shape
    out = np.zeros_like(residues)
    for y, x, k in np.ndindex(height, width, channels):
        a = int(out[y, x - 1, k]) if x else 0
        b = int(out[y - 1, x, k]) if y else 0
        c = int(out[y - 1, x - 1, k]) if x and y else 0
        estimate = a + b - c
        near = min((abs(estimate - v), order, v) for order, v in enumerate((a, b, c)))[2]
        out[y, x, k] = (int(residues[y, x, k]) + (0, a, b, (a + b) // 2, near)[filters[y]]) % 256
    return out


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), colour=st.sampled_from([0, 2, 4, 6]), seed=st.integers(0, 999)
)
def test_every_row_filter_is_undone(height: int, width: int, colour: int, seed: int) -> None:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    random = np.random.default_rng(seed)
    filters = random.integers(0, 5, height, dtype=np.uint8)
    residues = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
    rows = np.concatenate([filters[:, None], residues.reshape(height, -1)], axis=1)
    content = made(width, height, colour, zlib.compress(rows.tobytes()))
    expected = by_the_book(residues, filters)
    np.testing.assert_array_equal(
        png.read_png(content), expected[..., :3] if colour in (2, 6) else expected[..., [0] * 3]
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def made(
    width: int, height: int, colour: int, data: bytes, depth: int = 8, interlace: int = 0, more: bytes = b""
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return png.SIGNATURE + chunk(b"IHDR", header) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("palette", [None, [(0, 0, 0), (128, 64, 0), (0, 0, 255)]])
def test_pillow_reads_what_is_written(palette: list[tuple[int, int, int]] | None) -> None:
    labels = np.random.default_rng(1).integers(0, 3, (7, 5), dtype=np.uint8)
    image = Image.open(io.BytesIO(png.write_png(labels, palette)))
    np.testing.assert_array_equal(np.asarray(image), labels)
    if palette is not None:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.array(palette, np.uint8)[labels])
    frame = smooth(6, 9, 3, 2)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png.write_png(frame)))), frame)
    np.testing.assert_array_equal(png.read_png(png.write_png(frame)), frame)


BOMB = zlib.compress(bytes(50_000_000))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xd8\xff\xe0", "not a PNG"),
        (made(1 << 20, 1, 0, b""), "claims 1048576 x 1 pixels"),
        (made(1 << 15, 1 << 15, 0, b""), "claims 32768 x 32768 pixels"),
        (made(0, 3, 0, b""), "claims 0 x 3"),
        (made(4, 4, 0, BOMB), "not the 20 bytes"),
        (made(4, 4, 0, zlib.compress(bytes(19))), "not the 20 bytes"),
        (made(4, 4, 0, b"nonsense"), "pixels are damaged"),
        (made(4, 4, 0, zlib.compress(b"\x05" + bytes(19))), "row filter 5"),
        (made(4, 4, 2, zlib.compress(bytes(20)), depth=4), "values that the format does not allow"),
        (made(4, 4, 3, zlib.compress(bytes(20)), depth=16), "values that the format does not allow"),
        (made(8192, 8192, 6, b"", depth=16), "claims 8192 x 8192 pixels of 16 bits per sample: convert it"),
        (made(9, 1, 3, zlib.compress(bytes(3)), depth=1), "lacks a palette"),
        (made(9, 1, 0, zlib.compress(bytes(2)), depth=1), "not the 3 bytes"),
        (made(4, 4, 0, zlib.compress(bytes(20)), interlace=1), "not the 23 bytes"),
        (made(4, 4, 5, zlib.compress(bytes(20))), "values that the format does not allow"),
        (made(4, 4, 3, zlib.compress(bytes(20))), "lacks a palette"),
        (made(1, 1, 3, zlib.compress(b"\0\2"), more=chunk(b"PLTE", bytes(6))), "index 2 in a palette of 2"),
        (made(4, 4, 0, zlib.compress(bytes(20)), more=chunk(b"NEWT", b"")), "critical chunk 'NEWT'"),
        (made(4, 4, 0, zlib.compress(bytes(20)))[:-12], "end with IEND"),
        (png.SIGNATURE + struct.pack(">I4s", 1 << 31, b"IHDR") + bytes(20), "claims 2147483648 bytes"),
        (png.SIGNATURE, "begin with IHDR"),
    ],
)
def test_a_damaged_or_unusual_png_is_refused_in_words(content: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        png.read_png(content)


def test_a_changed_byte_is_seen() -> None:
    content = bytearray(png.write_png(smooth(5, 5, 3, 0)))
    for position in range(8, len(content)):
        changed = bytearray(content)
        changed[position] ^= 0x41
        with pytest.raises(InputError):
            png.read_png(bytes(changed))


def test_a_picture_file_is_read_as_the_tuning_set_was(tmp_path: Path) -> None:
    frame = smooth(20, 30, 3, 3)
    Image.fromarray(frame).save(tmp_path / "a.png")
    Image.fromarray(frame).save(tmp_path / "a.jpg", quality=90)
    np.testing.assert_array_equal(pictures.read_picture(tmp_path / "a.png"), frame)
    decoded = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
    np.testing.assert_array_equal(pictures.read_picture(tmp_path / "a.jpg"), decoded)


PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row, first column, and the steps in both, of the seven pictures that an interlaced one consists of."""


def interlaced(pixels: NDArray[np.uint8]) -> bytes:
    parts = [pixels[row::down, column::right] for row, column, down, right in PASSES]
    rows = b"".join(b"\0" + line.tobytes() for part in parts if part.size for line in part)
    return made(pixels.shape[1], pixels.shape[0], 2, zlib.compress(rows), interlace=1)


@pytest.mark.parametrize("hw", [(9, 13), (1, 1), (2, 5), (5, 2)])
def test_an_interlaced_png_is_read_with_and_without_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hw: tuple[int, int]
) -> None:
    frame = smooth(*hw, 3, 4)
    path = tmp_path / "a.png"
    path.write_bytes(interlaced(frame))
    np.testing.assert_array_equal(pictures.read_picture(path), frame)
    path.write_bytes(interlaced(frame)[:-20])
    with pytest.raises(InputError, match="truncated"):
        pictures.read_picture(path)
    path.write_bytes(interlaced(frame))
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    np.testing.assert_array_equal(pictures.read_picture(path), frame)


def test_without_pillow_a_jpeg_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(smooth(5, 5, 3, 0)).save(tmp_path / "a.jpg")
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(
        InputError, match=r"a\.jpg cannot be read: not a PNG; other formats need Pillow: run `pip install Pillow`"
    ):
        pictures.read_picture(tmp_path / "a.jpg")


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    for path, words in (
        (tmp_path / "a.txt", "Pillow can read"),
        (tmp_path / "gone.png", "does not exist"),
        (tmp_path, "read"),
    ):
        with pytest.raises(InputError, match=words):
            pictures.read_picture(path)


def test_pictures_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        pictures.write_picture(tmp_path / "file" / "a.png", smooth(2, 2, 3, 0))
    pictures.write_labels(tmp_path / "new" / "a.png", np.zeros((2, 2), np.uint8), [(1, 2, 3)])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
