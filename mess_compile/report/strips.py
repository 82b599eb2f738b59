"""The easiest, the median and the hardest image on their way through a cascade."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mess_compile.report.model import Picture, Strip
from mess_compile.report.pictures import truth_overlay
from mess_compile.runtime.cascade.cascade import Cascade
from mess_compile.runtime.images import frames
from mess_compile.runtime.images.confidence import confidence_text

TITLES = ("easiest", "median", "hardest")
_WIDTH, _QUALITY = 400, 82


def extremes(sure: Sequence[float]) -> tuple[int, ...]:
    """The images of highest, median and lowest confidence; fewer where there are fewer images."""
    order = sorted(range(len(sure)), key=lambda index: (-sure[index], index))
    return tuple(dict.fromkeys((order[0], order[(len(order) - 1) // 2], order[-1])))


def strip_of(
    cascade: Cascade, title: str, name: str, frame: NDArray[np.uint8], truth: NDArray[np.uint8] | None
) -> Strip:
    """The frame (H, W, 3), the labels of every exit over it, and the truth (H, W), which is not all void (255)."""
    taken = cascade(frame).exit
    pictures = [picture("input", f"the image {name}", frame)]
    colours = cascade.manifest.network.colours
    for prediction in cascade.refine(frame):
        mark = ", taken" if prediction.exit == taken else ""
        sure = confidence_text(prediction.confidence, prediction.needed, prediction.policy)
        caption = f"stage {prediction.exit}{mark}{': ' if sure else ''}{sure}"
        caption += "" if truth is None else _right(prediction.labels, truth)
        described = f"labels of stage {prediction.exit} laid over {name}"
        pictures.append(picture(caption, described, frames.overlay(frame, prediction.labels, colours)))
    if truth is not None:
        pictures.append(picture("truth", f"true labels laid over {name}", truth_overlay(frame, truth, colours)))
    return Strip(f"{title}: {name}", tuple(pictures))


def _right(labels: NDArray[np.uint8], truth: NDArray[np.uint8]) -> str:
    return f", {(labels == truth)[truth < 255].mean():.1%} of the pixels right"


def picture(caption: str, described: str, pixels: NDArray[np.uint8]) -> Picture:
    """Pixels (H, W, 3) as a JPEG of at most `_WIDTH` pixels' width."""
    image = Image.fromarray(pixels)
    image.thumbnail((_WIDTH, _WIDTH * 4))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=_QUALITY)
    return Picture(caption, described, stream.getvalue(), image.width, image.height)
