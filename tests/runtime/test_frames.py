"""Frames: what a user loses when these fail is the same picture on every device, or the reason why one is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mess_compile.runtime import frames
from mess_compile.runtime.errors import InputError

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
