"""Frames: what a user loses when these fail is the same picture on every device, or the reason why one is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.images import frames

SIDES = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 1000))
def test_resizing_on_the_device_equals_pillow_to_the_bit_in_each_pass(
    height: int, width: int, h: int, w: int, seed: int
) -> None:
    frame = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    bilinear = Image.Resampling.BILINEAR
    wanted = np.asarray(Image.fromarray(frame).resize((width, h), bilinear).resize((w, h), bilinear))
    np.testing.assert_array_equal(frames.resize(frame, (h, w)), wanted)


def test_a_frame_of_the_right_size_is_not_copied() -> None:
    frame = np.zeros((4, 6, 3), np.uint8)
    assert frames.resize(frame, (4, 6)) is frame


def test_a_view_of_a_larger_picture_is_resized_like_its_copy() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    view = picture[::2, 5:25, ::-1]
    np.testing.assert_array_equal(frames.resize(view, (7, 9)), frames.resize(view.copy(), (7, 9)))


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES)
def test_labels_are_mapped_back_to_the_nearest_cell(height: int, width: int, h: int, w: int) -> None:
    labels = np.arange(height * width).reshape(height, width)
    mapped = frames.resize_labels(labels, (h, w))
    wanted = [[labels[int((i + 0.5) * height / h), int((j + 0.5) * width / w)] for j in range(w)] for i in range(h)]
    np.testing.assert_array_equal(mapped, wanted)


@settings(max_examples=80, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES)
def test_a_letterboxed_frame_keeps_its_proportions_and_its_labels_come_back(
    height: int, width: int, h: int, w: int
) -> None:
    """Where the frame lies is measured in the picture: a white frame among the padding."""
    image = frames.to_input(np.full((height, width, 3), 255, np.uint8), (h, w), "letterbox")
    assert image.shape == (h, w, 3)
    rows, columns = np.nonzero((image == 255).all(axis=2))
    inside = (image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] == 255).all()
    assert inside
    assert (image[image != 255] == frames.PADDING).all()
    inner_h, inner_w = np.ptp(rows) + 1, np.ptp(columns) + 1
    scale = min(h / height, w / width)
    assert abs(inner_h - max(height * scale, 1)) <= 0.5
    assert abs(inner_w - max(width * scale, 1)) <= 0.5
    for first, last, size in ((rows.min(), rows.max(), h), (columns.min(), columns.max(), w)):
        assert 0 <= (size - 1 - last) - first <= 1  # in the middle
    labels = np.zeros((h, w), np.uint8)
    labels[rows, columns] = 7
    back = frames.from_input(labels, (height, width), "letterbox")
    assert back.shape == (height, width)
    assert (back == 7).all()


def test_stretching_is_resizing_both_ways() -> None:
    frame = np.random.default_rng(3).integers(0, 256, (10, 20, 3), dtype=np.uint8)
    np.testing.assert_array_equal(frames.to_input(frame, (8, 8), "stretch"), frames.resize(frame, (8, 8)))
    labels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    back = frames.from_input(labels, (10, 20), "stretch")
    np.testing.assert_array_equal(back, frames.resize_labels(labels, (10, 20)))


def test_a_letterboxed_label_comes_back_where_its_pixel_was() -> None:
    """A 4 x 8 frame in an 8 x 8 input lies in rows 2 to 5: nothing is scaled, so every label keeps its place."""
    frame = np.random.default_rng(4).integers(0, 100, (4, 8, 3), dtype=np.uint8)
    image = frames.to_input(frame, (8, 8), "letterbox")
    np.testing.assert_array_equal(image[2:6], frame)
    np.testing.assert_array_equal(frames.from_input(image[:, :, 0], (4, 8), "letterbox"), frame[:, :, 0])


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (np.zeros((4, 6), np.uint8), r"uint8 \(4, 6\)"),
        (np.zeros((4, 6, 4), np.uint8), r"uint8 \(4, 6, 4\)"),
        (np.zeros((3, 4, 6), np.uint8), r"uint8 \(3, 4, 6\)"),
        (np.zeros((4, 6, 3), np.float32), r"float32 \(4, 6, 3\)"),
        (np.zeros((0, 6, 3), np.uint8), r"\(0, 6, 3\)"),
        ([[1, 2, 3]], "not a list"),
        (None, "not a NoneType"),
    ],
)
def test_anything_but_an_8_bit_rgb_frame_is_refused_by_dtype_and_shape(frame: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        frames.check_frame(frame)


def test_the_overlay_mixes_frame_and_colour_half_and_half() -> None:
    frame = np.full((1, 2, 3), 100, np.uint8)
    mixed = frames.overlay(frame, np.array([[0, 1]], np.uint8), ((0, 0, 0), (200, 255, 0)))
    np.testing.assert_array_equal(mixed, [[[50, 50, 50], [150, 178, 50]]])


def test_the_overlay_reaches_both_ends_without_wrapping() -> None:
    white = np.full((1, 1, 3), 255, np.uint8)
    label = np.zeros((1, 1), np.uint8)
    for opacity in (0.0, 0.3, 1.0):
        assert (frames.overlay(white, label, ((255, 255, 255),), opacity) == 255).all()


def test_an_overlay_of_labels_that_do_not_fit_is_refused() -> None:
    frame = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(InputError, match="label 3 has no colour"):
        frames.overlay(frame, np.full((2, 2), 3, np.uint8), ((0, 0, 0),))
    with pytest.raises(InputError, match="do not fit"):
        frames.overlay(frame, np.zeros((2, 3), np.uint8), ((0, 0, 0),))
