"""Writes a training folder with as many defects as good parts: `python prepare.py TILES FOLDER`.

Each image of the split train with a defect gets two more beside it, a random part of it around one pixel of the defect;
the split val is as it was.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

COPIES = 2
SHARES = (0.5, 0.8)
"""The least and the greatest share of a side that a part has."""


def write(tiles: Path, folder: Path) -> int:
    """Returns how many images were added."""
    shutil.copytree(tiles, folder)
    added, random = 0, np.random.default_rng(0)
    for path in sorted((tiles / "train" / "labels").glob("*.png")):
        labels = np.asarray(Image.open(path))
        rows, columns = np.nonzero((labels > 0) & (labels < 255))
        for copy in range(COPIES if len(rows) else 0):
            at = random.integers(len(rows))
            part = tuple(
                _span(side, int(middle[at]), random) for side, middle in zip(labels.shape, (rows, columns), strict=True)
            )
            flip = slice(None, None, int(random.choice((1, -1))))
            for kind, suffix in (("images", ".jpg"), ("labels", ".png")):
                pixels = np.asarray(Image.open(tiles / "train" / kind / f"{path.stem}{suffix}"))[part][flip]
                Image.fromarray(pixels).save(folder / "train" / kind / f"{path.stem}_part{copy}{suffix}", quality=95)
            added += 1
    return added


def _span(side: int, middle: int, random: np.random.Generator) -> slice:
    length = round(side * random.uniform(*SHARES))
    start = min(max(0, middle - length // 2), side - length)
    return slice(start, start + length)


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1]), Path(sys.argv[2]))} parts of images with a defect added")
