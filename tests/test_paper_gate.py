"""The gate at feature resolution decides as the paper's equations at full resolution do."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from mess_compile.network import CONFIDENCES, Gate
from tests.graph.test_gate import run_gate
from tests.paper_gate import agreement, edge_mask, image_confidence, pixel_confidence, smoothed

HW = (48, 72)


def scene(seed: int) -> np.ndarray:
    """Logits (4, 12, 18): smooth regions whose sharpness varies from image to image."""
    random = np.random.default_rng(seed)
    coarse = random.standard_normal((4, 4, 6)).astype(np.float32) * np.float32(random.uniform(1, 8))
    return np.stack([cv2.resize(plane, (18, 12), interpolation=cv2.INTER_CUBIC) for plane in coarse])


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_exit_decisions_agree_with_the_paper(confidence: str) -> None:
    """The cut is the median, the hardest there is, and boundaries fill much of these small maps: 87.5, 90 and 90 %
    of the decisions agreed when this was written, and the shares correlated with 0.99."""
    maps = [scene(seed) for seed in range(40)]
    thresholds = np.full((1, 4), 0.7, np.float32)
    counts = [run_gate(Gate(confidence, True, (0.7,)), logits, thresholds)[0] for logits in maps]
    cut = int(np.median(counts)) + 1
    found = agreement(maps, counts, cut, 0.7, HW, confidence)
    assert sum(count >= cut for count in counts) == 20
    assert found.images == 40
    assert found.share == 1 - len(found.differing) / 40 >= 0.85
    shares = [image_confidence(logits, 0.7, HW, confidence) for logits in maps]
    assert np.corrcoef(shares, counts)[0, 1] > 0.98


def test_confidences_by_hand() -> None:
    logits = np.log(np.array([0.2, 0.7, 0.1])).reshape(3, 1, 1)
    entropy = 1 + (0.2 * np.log(0.2) + 0.7 * np.log(0.7) + 0.1 * np.log(0.1)) / np.log(3)
    for kind, expected in {"top1": 0.7, "margin": 0.5, "entropy": entropy}.items():
        assert pixel_confidence(logits, kind)[0, 0] == pytest.approx(expected)


def test_every_boundary_of_classes_is_an_edge_and_grows() -> None:
    labels = np.zeros((40, 60), np.uint8)
    labels[:, 30:] = 1
    mask = edge_mask(labels, 4)
    assert mask[:, 27:33].all()
    assert not mask[:, :20].any()
    assert not mask[:, 40:].any()
    for first in range(21):
        for second in range(first):
            labels[:, :30], labels[:, 30:] = first, second
            assert edge_mask(labels, 1).any()


def test_the_window_of_eq_3_is_four_strides_wide() -> None:
    values = np.zeros((40, 40), np.float32)
    values[:, 20:] = 1.0
    edges = np.zeros((40, 40), bool)
    edges[20, 12:28] = True
    line = smoothed(values, edges, 2)[20]
    assert line.tolist() == [0.0] * 20 + [1.0] * 20
    values[18:23, 18:23] = 0.5  # 25 of 81 pixels: outvoted where the rest agrees
    assert smoothed(values, edges, 2)[20, 24] == 1.0


def test_a_sure_image_is_sure() -> None:
    logits = np.zeros((3, 4, 6), np.float32)
    logits[1] = 9.0
    assert image_confidence(logits, 0.99, (32, 48)) == 1.0
    assert image_confidence(np.zeros((3, 4, 6), np.float32), 0.5, (32, 48)) == 0.0
