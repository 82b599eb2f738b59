"""The paper's exit policy at full resolution, Eq. 1-3, in plain numpy and OpenCV.

An independent yardstick for the gate, which works at feature resolution. Two readings are ours: Eq. 2 erodes the edge
map, which deletes an edge of one pixel, while its stated intent needs the map *grown*, so it is dilated here; and the
windows of Eq. 3 are mirrored at the border.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
CHUNK = 4096
"""Edge pixels whose windows are in memory at a time."""


@dataclass(frozen=True)
class Agreement:
    """How often both policies decide alike, and the images (by position) on which they do not."""

    share: float
    images: int
    differing: tuple[int, ...]


def agreement(
    logits: Iterable[Array],
    counts: Sequence[int],
    cut: int,
    threshold: float,
    input_hw: tuple[int, int],
    confidence: str = "top1",
) -> Agreement:
    """Compare one exit's decisions on a set of images.

    `logits` are the head's maps f32 (K, h, w); `counts` the gate's counts for the row of `threshold`, which exits
    where count >= `cut`. The paper's policy exits where its confident share of the pixels reaches cut / (h * w).
    """
    differing, images = [], 0
    for index, (values, count) in enumerate(zip(logits, counts, strict=True)):
        images += 1
        cells = values.shape[1] * values.shape[2]
        paper_exits = image_confidence(values, threshold, input_hw, confidence) >= cut / cells
        if paper_exits != (count >= cut):
            differing.append(index)
    return Agreement(1 - len(differing) / max(1, images), images, tuple(differing))


def image_confidence(
    logits: Array, threshold: float, input_hw: tuple[int, int], confidence: str = "top1", edge_aware: bool = True
) -> float:
    """c_img of Eq. 1 for logits (K, h, w): the share of the input's pixels whose confidence reaches `threshold`."""
    size = (input_hw[1], input_hw[0])
    planes = np.stack([cv2.resize(plane, size, interpolation=cv2.INTER_LINEAR) for plane in logits])  # (K, H, W)
    values = pixel_confidence(planes, confidence)
    if edge_aware:
        stride = round(input_hw[0] / logits.shape[1])
        edges = edge_mask(planes.argmax(axis=0).astype(np.uint8), stride)
        values = smoothed(values, edges, stride)
    return float((values >= threshold).mean())


def pixel_confidence(logits: Array, kind: str) -> Array:
    """Confidence per pixel (H, W) in 0..1 from logits (K, H, W)."""
    powers = np.exp(logits - logits.max(axis=0))
    p = np.sort(powers / powers.sum(axis=0), axis=0)
    if kind == "top1":
        return p[-1]
    if kind == "margin":
        return p[-1] - p[-2]
    return 1 + (p * np.log(np.maximum(p, 1e-30))).sum(axis=0) / np.log(len(p))


def edge_mask(labels: Array, grow: int) -> Array:
    """Eq. 2 with the edges grown: pixels (H, W) within `grow` pixels of a semantic edge of labels uint8 (H, W)."""
    # Classes are names, not intensities: spread apart, any two make an edge for Canny.
    spread = (labels.astype(np.int64) * 97 % 256).astype(np.uint8)
    edges = cv2.Canny(spread, 1, 2)
    return cv2.dilate(edges, np.ones((2 * grow + 1, 2 * grow + 1), np.uint8)) > 0


def smoothed(values: Array, edges: Array, stride: int) -> Array:
    """Eq. 3: at edge pixels the median over the window of +-2 output strides, elsewhere the value itself."""
    reach = 2 * stride
    padded = cv2.copyMakeBorder(values.astype(np.float32), reach, reach, reach, reach, cv2.BORDER_REFLECT_101)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
    result = values.astype(np.float32)
    rows, columns = np.nonzero(edges)
    for start in range(0, len(rows), CHUNK):
        at = (rows[start : start + CHUNK], columns[start : start + CHUNK])
        result[at] = np.median(windows[at].reshape(len(at[0]), -1), axis=1)
    return result
