"""Labels are read as they were meant, or refused: a class that is shifted or painted over is never taken in silence."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mess_compile.data.class_list import ClassList
from mess_compile.data.labels import read_labels
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.images import png

NAMES = ("sky", "road", "tree")
PLAIN = ClassList(NAMES, ((1, 0, 0), (2, 0, 0), (3, 0, 0)))
COLOURED = ClassList(NAMES, ((110, 160, 220), (120, 90, 140), (60, 140, 60)), is_coloured=True)
WITH_VOID = ClassList(NAMES, COLOURED.colours, is_coloured=True, void_colours=((0, 0, 0),))
MAP = np.array([[0, 1, 2, 2], [1, 1, 0, 2]], np.uint8)


def in_colours(classes: ClassList = COLOURED, labels: NDArray[np.uint8] = MAP) -> NDArray[np.uint8]:
    return np.array(classes.colours, np.uint8)[labels]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "label.png"


def refusal(path: Path, classes: ClassList) -> str:
    with pytest.raises(InputError) as refused:
        read_labels(path, classes)
    assert "label.png" in str(refused.value) or "classes.txt" in str(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def write_grey(path: Path, values: Any, depth: int) -> None:
    """A grey PNG of so many bits a sample, which Pillow does not write."""
    rows = b""
    for row in values:
        bits = "".join(f"{value:0{depth}b}" for value in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    header = struct.pack(">IIBBBBB", len(values[0]), len(values), depth, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(
        png.SIGNATURE
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )


@pytest.mark.parametrize("depth", [2, 4, 8, 16])
def test_values_are_those_stored_whatever_the_bits(path: Path, depth: int) -> None:
    write_grey(path, MAP.tolist(), depth)
    assert read_labels(path, PLAIN).tolist() == MAP.tolist()


def test_a_mask_of_one_bit_has_classes_0_and_1(path: Path) -> None:
    Image.fromarray(MAP == 1).save(path)
    assert read_labels(path, PLAIN).tolist() == (MAP == 1).astype(int).tolist()


def test_a_value_beyond_8_bits_is_named(path: Path) -> None:
    write_grey(path, [[0, 26000]], 16)
    assert "has the value 26000, but label values are 0 to 255" in refusal(path, PLAIN)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_grey_saved_with_more_channels_holds_values(path: Path, mode: str) -> None:
    Image.fromarray(MAP).convert(mode).save(path)
    assert read_labels(path, PLAIN).tolist() == MAP.tolist()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_are_looked_up_in_the_class_list(path: Path, mode: str) -> None:
    Image.fromarray(in_colours()).convert(mode).save(path)
    assert read_labels(path, COLOURED).tolist() == MAP.tolist()


def test_a_void_colour_counts_nowhere(path: Path) -> None:
    pixels = in_colours()
    pixels[1, 2] = 0
    Image.fromarray(pixels).save(path)
    expected = MAP.copy()
    expected[1, 2] = 255
    assert read_labels(path, WITH_VOID).tolist() == expected.tolist()


def test_an_unknown_colour_names_pixel_and_nearest_class(path: Path) -> None:
    pixels = in_colours()
    pixels[1, 3] = (61, 141, 62)
    Image.fromarray(pixels).save(path)
    told = refusal(path, COLOURED)
    assert "has the colour (61, 141, 62) at row 1, column 3" in told
    assert "nearest is tree (60, 140, 60)" in told
    assert "JPEG" in told


def test_channels_in_the_order_of_opencv_are_named(path: Path) -> None:
    Image.fromarray(np.ascontiguousarray(in_colours()[..., ::-1])).save(path)
    assert "blue, green, red" in refusal(path, COLOURED)


def test_grey_where_colours_are_expected_is_named(path: Path) -> None:
    Image.fromarray(MAP).convert("RGB").save(path)
    assert "three channels are equal" in refusal(path, COLOURED)


def test_two_classes_of_one_colour_cannot_be_told_apart(path: Path) -> None:
    Image.fromarray(in_colours()).save(path)
    same = ClassList(NAMES, (*COLOURED.colours[:2], COLOURED.colours[0]), is_coloured=True)
    assert "sky and tree have the same colour (110, 160, 220)" in refusal(path, same)


def test_what_is_transparent_over_a_class_is_refused(path: Path) -> None:
    pixels = np.dstack([in_colours(), np.full(MAP.shape, 255, np.uint8)])
    pixels[0, 1, 3] = 0
    Image.fromarray(pixels).save(path)
    assert "transparent at row 0, column 1" in refusal(path, COLOURED)
    pixels[0, 1] = 0  # as a program leaves it where nothing was painted
    Image.fromarray(pixels).save(path)
    assert read_labels(path, WITH_VOID)[0, 1] == 255


def paletted(colours: list[tuple[int, int, int]], values: NDArray[np.uint8] = MAP) -> Image.Image:
    image = Image.fromarray(values, "P")
    image.putpalette([part for colour in colours for part in colour])
    return image


def test_a_palette_image_holds_values(path: Path) -> None:
    for colours in ([(0, 0, 0), (128, 0, 0), (0, 128, 0)], list(COLOURED.colours)):
        paletted(colours).save(path)
        assert read_labels(path, COLOURED).tolist() == MAP.tolist()


def test_a_palette_that_was_made_of_a_mask_in_colours_is_not_read_by_its_numbers(path: Path) -> None:
    order = [2, 0, 1]  # as a program that saves space sorts them
    paletted([COLOURED.colours[number] for number in order]).save(path)
    told = refusal(path, COLOURED)
    assert "shows its value 0 in (60, 140, 60), the colour of tree, but 0 is sky" in told
    assert "save it as RGB" in told


def test_labels_that_begin_at_1_are_read_with_an_offset(path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 2, 3, 255]], np.uint8)).save(path)
    classes = ClassList(NAMES, PLAIN.colours, label_offset=1)
    assert read_labels(path, classes).tolist() == [[255, 0, 1, 2, 255]]
    Image.fromarray(np.array([[4]], np.uint8)).save(path)
    assert "the value 4, but the 3 classes are 1 to 3 (--label-offset 1)" in refusal(path, classes)


def test_the_remedy_for_a_value_too_many_never_shifts_classes_by_itself(path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8)).save(path)
    both = refusal(path, PLAIN)
    assert "--label-offset 1 if labels begin at 1, sky being 1" in both
    assert "if sky is 0 and 3 is void, write `ignore 3`" in both
    sure = refusal(path, ClassList(NAMES, PLAIN.colours, frozenset({0, 255})))
    assert "0 is void: labels begin at 1 here, so add --label-offset 1" in sure
    assert "ignore 3" not in sure


def test_a_label_is_turned_as_its_own_exif_data_say(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(np.ascontiguousarray(MAP[::-1, ::-1])).save(path, exif=exif)
    assert read_labels(path, PLAIN).tolist() == MAP.tolist()


@pytest.mark.parametrize("form", ["JPEG", "BMP", "TIFF"])
def test_only_png_holds_labels(path: Path, form: str) -> None:
    content = io.BytesIO()
    Image.fromarray(MAP).save(content, form)
    path.write_bytes(content.getvalue())
    assert "labels must be PNG files" in refusal(path, PLAIN)
