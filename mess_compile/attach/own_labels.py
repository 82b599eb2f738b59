"""Makes a data set of images without labels: the network's own output is their truth."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mess_compile import files
from mess_compile.data.class_list import ALWAYS_IGNORED, read_class_list
from mess_compile.data.dataset import read_frame, read_labels
from mess_compile.data.layouts import by_stem, listed_files, sequence_of
from mess_compile.data.truth import write_mark
from mess_compile.data_folder import IMAGES, LABELS
from mess_compile.reporter import Reporter
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.images import frames
from mess_compile.runtime.images.png import write_png

HELD_BACK = 0.2
"""The share of the images that is never taught on."""
RARE = 0.001
"""Classes with a smaller share of the pixels are left out of mIoU."""
FEWEST_IMAGES = 10

Image8 = NDArray[np.uint8]


def find_images(folder: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The images in a folder, by name, and notes on the files that are not read. Raises InputError for too few."""
    if not folder.is_dir():
        raise InputError(f"--images {folder} does not exist: name a folder of images like those the network will see")
    found = listed_files(folder)
    by_stem(found.paths)
    if len(found.paths) < FEWEST_IMAGES:
        notes = f" ({'; '.join(found.notes)})" if found.notes else ""
        raise InputError(
            f"--images {folder} has {len(found.paths)} images{notes}: exits are taught on {FEWEST_IMAGES} or more; "
            "some hundreds are better"
        )
    return found.paths, found.notes


def split_images(paths: Sequence[Path], hold_back: str | None = None) -> dict[str, tuple[Path, ...]]:
    """The images to teach on (train), and those that are never taught on (val): those whose names match the pattern
    `hold_back`, by default a fifth in whole sequences.

    Images whose names differ in their last number are a sequence. A single one is cut where its last fifth begins.
    Raises InputError for a pattern that matches no image, or leaves too few.
    """
    if hold_back is not None:
        return _held_by(paths, hold_back)
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(sequence_of(path.stem), []).append(path)
    wanted = max(1, round(len(paths) * HELD_BACK))
    if len(groups) < 1 / HELD_BACK:
        return {"train": tuple(paths[:-wanted]), "val": tuple(paths[-wanted:])}
    held: list[Path] = []
    for name in sorted(groups)[:: round(1 / HELD_BACK)]:
        held += groups[name]
    rest = [path for path in paths if path not in set(held)]
    return {"train": tuple(rest), "val": tuple(held)}


def _held_by(paths: Sequence[Path], hold_back: str) -> dict[str, tuple[Path, ...]]:
    try:
        pattern = re.compile(hold_back)
    except re.error as error:
        raise InputError(f"--hold-back {hold_back!r} is not a regular expression: {error}") from error
    held = tuple(path for path in paths if pattern.search(path.name))
    rest = tuple(path for path in paths if not pattern.search(path.name))
    some = ", ".join(path.name for path in paths[:3])
    if not hold_back or not held:
        raise InputError(f"--hold-back {hold_back!r} matches no file name of --images, such as {some}")
    if len(rest) < FEWEST_IMAGES:
        raise InputError(
            f"--hold-back {hold_back!r} leaves {len(rest)} of {len(paths)} images to teach on: {FEWEST_IMAGES} or more "
            f"are needed; names are such as {some}"
        )
    return {"train": rest, "val": held}


def held_back_text(splits: dict[str, tuple[Path, ...]], hold_back: str | None = None) -> str:
    """Which images are never taught on, by some names, and how to choose others."""
    held, total = splits["val"], sum(map(len, splits.values()))
    names = sorted({sequence_of(path.stem) for path in held})
    if (
        hold_back is None
        and len(names) < len(held)
        and not set(names) & {sequence_of(path.stem) for path in splits["train"]}
    ):
        which = f"the sequences {_some(names)}"
    else:
        which = _some([path.name for path in held])
    how = "--hold-back REGEX chooses others" if hold_back is None else f"--hold-back {hold_back}"
    return f"held back, never taught on: {len(held)} of {total} images, {which} ({how})"


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def write_own_labels(
    root: Path,
    splits: dict[str, tuple[Path, ...]],
    classes: Sequence[str],
    labels_of: Callable[[Image8], Image8],
    reporter: Reporter,
) -> tuple[str, ...]:
    """Write the data set in the folder `root`: images as links, and the network's labels of each at its own size.

    `labels_of` gives labels uint8 (h, w) of a frame (H, W, 3). Returns the classes with fewer than RARE of the pixels
    of `val`, whose pixels there are void.
    """
    total = sum(map(len, splits.values()))
    counts, done = np.zeros(256, np.int64), 0
    with files.replaced_folder(root) as folder:
        for split, paths in splits.items():
            for kind in (IMAGES, LABELS):
                (folder / split / kind).mkdir(parents=True)
            for path in paths:
                _link(path, folder / split / IMAGES / path.name)
                frame = read_frame(path)
                labels = frames.resize_labels(labels_of(frame), (frame.shape[0], frame.shape[1]))
                (folder / split / LABELS / f"{path.stem}.png").write_bytes(write_png(labels))
                if split == "val":
                    counts += np.bincount(labels.ravel(), minlength=256)
                done += 1
                reporter.progress("labels by the network", done, total)
        rare = [index for index in range(len(classes)) if 0 < counts[index] < RARE * counts.sum()]
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
        _blank(folder, rare)
        names = [classes[index] for index in rare]
        write_mark(folder, tuple(names))
    return tuple(names)


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(os.path.abspath(source))
    except OSError:
        shutil.copyfile(source, target)


def _blank(root: Path, rare: Sequence[int]) -> None:
    """Make the pixels of rare classes void in the labels of `val`."""
    classes = read_class_list(root / "classes.txt")
    for path in sorted((root / "val" / LABELS).iterdir()) if rare else ():
        labels = read_labels(path, classes)
        if np.isin(labels, rare).any():
            path.write_bytes(write_png(np.where(np.isin(labels, rare), np.uint8(ALWAYS_IGNORED), labels)))
