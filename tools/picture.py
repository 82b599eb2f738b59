"""The picture at the top of the README, from the demo's bundle and its test scenes.

    mess-compile demo demo && python tools/picture.py demo docs/pictures/refinement.png

Two scenes: the one that the first exit is surest of, and the one that it is least sure of among those that leave last.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mess_compile.data.dataset import open_dataset, read_sample
from mess_compile.runtime.cascade.cascade import Cascade, load
from mess_compile.runtime.images import frames

Pixels = NDArray[np.uint8]
PANEL = (320, 240)
GAP, CAPTION, FONT = 6, 62, 24
NOT_RUN = 235
COLOURS = 128


def row(cascade: Cascade, name: str, frame: Pixels, truth: Pixels) -> Image.Image:
    """The frame, the labels of every exit that it comes to, and the truth."""
    colours, taken = cascade.manifest.network.colours, cascade(frame).exit
    panels = [(name, frame)]
    for prediction in cascade.refine(frame):
        right = (prediction.labels == truth)[truth < 255].mean()
        sure = f"{prediction.confidence:.0%} sure, {'leaves' if prediction.exit == taken else 'goes on'}"
        shown = frames.overlay(frame, prediction.labels, colours)
        if prediction.exit > taken:
            panels.append((f"exit {prediction.exit}\nnot run", np.full_like(frame, NOT_RUN)))
        else:
            panels.append((f"exit {prediction.exit}: {right:.0%} right\n{sure}", shown))
    return side_by_side([*panels, ("truth", frames.overlay(frame, truth, colours))])


def side_by_side(panels: Sequence[tuple[str, Pixels]]) -> Image.Image:
    """Panels under captions that can be read when the picture is shown at half its size."""
    width, height = PANEL
    strip = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height + CAPTION), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(size=FONT)
    for number, (caption, pixels) in enumerate(panels):
        shown = Image.fromarray(pixels).resize(PANEL, Image.Resampling.NEAREST)
        strip.paste(shown, (number * (width + GAP), CAPTION))
        draw.multiline_text((number * (width + GAP) + 2, 4), caption, fill=(20, 20, 20), font=font)
    return strip


def main(demo: Path, output: Path) -> None:
    with load(demo / "host.mess") as cascade:
        data = open_dataset(demo / "data", "test")
        samples = [read_sample(item, data.classes) for item in data.items]
        sure = [next(cascade.refine(sample.frame)).confidence for sample in samples]
        exits = [cascade(sample.frame).exit for sample in samples]
        easy = max(range(len(samples)), key=lambda index: sure[index])
        hard = min(range(len(samples)), key=lambda index: (-exits[index], sure[index]))
        rows = [
            row(cascade, name, samples[index].frame, samples[index].labels)
            for name, index in (("an easy scene", easy), ("a hard scene", hard))
        ]
    picture = Image.new("RGB", (rows[0].width, sum(each.height for each in rows)), "white")
    for number, each in enumerate(rows):
        picture.paste(each, (0, number * each.height))
    output.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(output, optimize=True)
    print(f"{output}: {output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
