"""The same picture is taken or refused everywhere, with the pixels that a viewer shows; Pillow is the judge."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mess_compile.data.dataset import read_frame
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.images import pictures, png
from mess_compile.runtime.images.orientation import orientation_of

FRAME = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(form: str, orientation: int | None = None, mode: str = "RGB", **options: Any) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(FRAME).convert(mode).save(stream, form, exif=exif, **options)
    return stream.getvalue()


def as_shown(content: bytes) -> NDArray[np.uint8]:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_has_the_pixels_that_a_viewer_shows(tmp_path: Path, form: str, orientation: int) -> None:
    path = tmp_path / "picture"
    path.write_bytes(encoded(form, orientation))
    for read in (pictures.read_picture, read_frame):
        np.testing.assert_array_equal(read(path), as_shown(path.read_bytes()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_device_without_pillow_turns_a_png_alike(monkeypatch: pytest.MonkeyPatch, orientation: int) -> None:
    content = encoded("PNG", orientation)
    expected = as_shown(content)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    np.testing.assert_array_equal(pictures.decoded(content), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_modes_of_png_are_alike_with_and_without_pillow(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    content = encoded("PNG", mode=mode)
    expected = as_shown(content)
    np.testing.assert_array_equal(pictures.decoded(content), expected)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    np.testing.assert_array_equal(pictures.decoded(content), expected)


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"MM\0*",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
        b"nonsense" * 9,
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0",
    ],
)
def test_exif_data_that_are_damaged_turn_nothing(exif: bytes) -> None:
    assert orientation_of(exif) == 1
    content = io.BytesIO()
    Image.fromarray(FRAME).save(content, "JPEG", exif=exif)
    assert pictures.decoded(content.getvalue()).shape == FRAME.shape


def deep(values: NDArray[np.uint16]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("has_pillow", [True, False])
def test_of_16_bits_the_upper_8_count_unless_nearly_black_would_be_left(
    monkeypatch: pytest.MonkeyPatch, has_pillow: bool
) -> None:
    wide, camera = np.array([[0, 255, 256, 65535]], np.uint16), np.array([[0, 100, 4095]], np.uint16)
    contents = deep(wide), deep(camera), deep(np.zeros((2, 2), np.uint16))
    if not has_pillow:
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert pictures.decoded(contents[0])[..., 0].tolist() == [[0, 0, 1, 255]]
    with pytest.raises(InputError, match=r"reach only 4095 of 65535.*scale them"):
        pictures.decoded(contents[1])
    assert not pictures.decoded(contents[2]).any()


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_no_picture(form: str) -> None:
    stream = io.BytesIO()
    first, second = Image.fromarray(FRAME), Image.fromarray(255 - FRAME)
    first.save(stream, form, save_all=True, append_images=[second])
    with pytest.raises(InputError, match=r"holds 2 pictures .*: save the one you want"):
        pictures.decoded(stream.getvalue())


def test_of_the_pictures_in_a_jpeg_the_photograph_is_taken() -> None:
    stream = io.BytesIO()
    preview = Image.fromarray(FRAME).resize((3, 2))
    Image.fromarray(FRAME).save(stream, "MPO", save_all=True, append_images=[preview])
    content = stream.getvalue()
    np.testing.assert_array_equal(pictures.decoded(content), as_shown(content))


def test_an_animated_png_is_refused_without_pillow_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    Image.fromarray(FRAME).save(stream, "PNG", save_all=True, append_images=[Image.fromarray(255 - FRAME)])
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(InputError, match="holds 2 pictures"):
        pictures.decoded(stream.getvalue())


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "I", "F", "I;16"])
def test_a_mode_that_is_no_8_bit_rgb_is_refused_alike(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tif"
    Image.new(mode, (4, 4)).save(path)
    for read in (pictures.read_picture, read_frame):
        with pytest.raises(InputError, match=rf"picture\.tif cannot be read: it has mode {mode}: convert it to 8-bit"):
            read(path)


def test_a_picture_too_large_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "MAX_PIXELS", 30)
    for form in ("JPEG", "PNG"):
        with pytest.raises(InputError, match="30"):
            pictures.decoded(encoded(form))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n", "Git LFS pointer.*git lfs pull"),
        (b"/annex/objects/SHA256E-s31390--f50d7ac4.jpg\n", "git-annex pointer.*git annex get"),
        (b"<html>404</html>", "not a picture"),
        (b"", "not a picture"),
    ],
)
def test_what_stands_for_a_picture_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    for read in (pictures.read_picture, read_frame):
        with pytest.raises(InputError, match=rf"picture\.jpg .*{words}"):
            read(path)
