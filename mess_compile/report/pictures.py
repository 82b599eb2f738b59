"""Pictures of predictions: palette PNGs, overlays and the strip of progressive refinement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mess_compile import files
from mess_compile.array_types import Pixels
from mess_compile.runtime.images import frames

Colours = Sequence[tuple[int, int, int]]
_VOID = (0, 0, 0)
_CAPTION_HEIGHT = 22
_GAP = 4
_PANEL_WIDTH = 320


def truth_overlay(frame: Pixels, labels: Pixels, colours: Colours) -> Pixels:
    """True labels (H, W) over the frame; void and labels without a colour are black."""
    void = labels >= len(colours)
    overlay = frames.overlay(frame, np.where(void, 0, labels).astype(np.uint8), colours)
    overlay[void] = 0
    return overlay


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG, whole or not at all."""
    with files.replaced(path) as temporary:
        picture.save(temporary, format="PNG")


def label_picture(labels: Pixels, colours: Colours) -> Image.Image:
    """Labels (H, W) as a palette PNG whose pixel values are the labels."""
    picture = Image.fromarray(labels, mode="P")
    palette = [*colours, *[_VOID] * (256 - len(colours))]
    picture.putpalette([value for colour in palette for value in colour])
    return picture


def overlay_picture(frame: Pixels, labels: Pixels, colours: Colours) -> Image.Image:
    """The frame (H, W, 3) with its labels over it."""
    return Image.fromarray(frames.overlay(frame, labels, colours))


def strip_picture(panels: Sequence[tuple[str, Pixels | Image.Image]]) -> Image.Image:
    """Panels side by side, each under its caption."""
    height, width = _shape(panels[0][1])
    scale = _PANEL_WIDTH / width
    size = (_PANEL_WIDTH, round(height * scale))
    strip = Image.new("RGB", (len(panels) * (size[0] + _GAP) - _GAP, size[1] + _CAPTION_HEIGHT), (255, 255, 255))
    draw = ImageDraw.Draw(strip)
    font = _font([caption for caption, _ in panels])
    for index, (caption, content) in enumerate(panels):
        x = index * (size[0] + _GAP)
        picture = content if isinstance(content, Image.Image) else Image.fromarray(content)
        strip.paste(picture.convert("RGB").resize(size, Image.Resampling.NEAREST), (x, _CAPTION_HEIGHT))
        draw.text((x + 2, 3), caption, fill=(20, 20, 20), font=font)
    return strip


def _font(captions: Sequence[str]) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font in which every caption fits above its panel."""
    for size in range(14, 8, -1):
        font = ImageFont.load_default(size=size)
        if max(map(font.getlength, captions)) <= _PANEL_WIDTH - 4:
            break
    return font


def _shape(content: Pixels | Image.Image) -> tuple[int, int]:
    return (content.height, content.width) if isinstance(content, Image.Image) else content.shape[:2]
