"""The output graph paints the labels that the user sees."""

from __future__ import annotations

import cv2
import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile.graph.output_graph import output_graph
from mess_compile.runtime.base.errors import InputError


def run_output(logits: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    model = output_graph(logits.shape[0], logits.shape[1:], hw)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (labels,) = session.run(["labels"], {"logits": logits[None]})
    assert labels.dtype == np.uint8
    assert labels.shape == (1, *hw)
    return labels[0]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(2, 6), st.integers(2, 6), st.integers(2, 6)),
    hw=st.tuples(st.integers(8, 50), st.integers(8, 50)),
)
def test_labels_are_those_of_opencvs_bilinear_scaling(
    seed: int, shape: tuple[int, int, int], hw: tuple[int, int]
) -> None:
    logits = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    planes = np.stack([cv2.resize(plane, hw[::-1], interpolation=cv2.INTER_LINEAR) for plane in logits])  # (K, H, W)
    labels = run_output(logits, hw)
    chosen = np.take_along_axis(planes, labels[None].astype(int), axis=0)[0]
    assert (planes.max(axis=0) - chosen).max() < 1e-4


def test_ties_go_to_the_lowest_class_and_byte_labels_reach_255() -> None:
    logits = np.zeros((256, 2, 3), np.float32)
    assert (run_output(logits, (8, 12)) == 0).all()
    logits[255] = 1.0
    assert (run_output(logits, (8, 12)) == 255).all()


def test_more_classes_than_a_byte_holds_are_refused() -> None:
    with pytest.raises(InputError, match="257 classes"):
        output_graph(257, (2, 2), (8, 8))
