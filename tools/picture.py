"""The picture at the top of the README, from the demo's bundle and its test scenes.

    mess-compile demo demo && python tools/picture.py demo docs/pictures/refinement.png

Two scenes: the one that the first exit is surest of, and the one that it is least sure of among those that leave last.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mess_compile.dataset import open_dataset, read_sample
from mess_compile.report.pictures import strip_picture
from mess_compile.runtime import frames
from mess_compile.runtime.cascade import Cascade, load

Pixels = NDArray[np.uint8]
NOT_RUN = 235
COLOURS = 128


def row(cascade: Cascade, name: str, frame: Pixels, truth: Pixels) -> Image.Image:
    """The frame, the labels of every exit that it comes to, and the truth."""
    colours, taken = cascade.manifest.network.colours, cascade(frame).exit
    panels = [(name, frame)]
    for prediction in cascade.refine(frame):
        right = (prediction.labels == truth)[truth < 255].mean()
        leaves = "leaves here" if prediction.exit == taken else "goes on"
        caption = f"exit {prediction.exit}: {prediction.confidence:.0%} sure, {leaves}; {right:.0%} right"
        shown = frames.overlay(frame, prediction.labels, colours)
        if prediction.exit > taken:
            caption, shown = f"exit {prediction.exit} is not run", np.full_like(frame, NOT_RUN)
        panels.append((caption, shown))
    return strip_picture([*panels, ("truth", frames.overlay(frame, truth, colours))])


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
