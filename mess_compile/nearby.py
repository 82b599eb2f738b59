"""Which folder was meant, where the one that was named holds no data set but one above or below it does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from mess_compile.layouts import LAYOUTS, is_camvid_name

LEVELS_UP = 3
_LOOKED_AT = 200
"""Folders in a folder; who names the root of a disk waits no longer."""
_SHOWN = 4


def did_you_mean_folder(root: Path) -> str:
    """The sentence that a message about `root` ends with; empty where nothing near it looks like a data set."""
    found = _above(root) or ([] if _is_data_set(root) else _below(root))
    if not found:
        return ""
    if len(found) == 1:
        return f": did you mean --data {found[0]}?"
    others = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f": name one of the data sets in it, --data {' or '.join(map(str, found[:_SHOWN]))}{others}"


def _above(root: Path) -> list[Path]:
    """The farthest, for a split of a plain folder looks like a data set of its own."""
    parents = islice(root.resolve().parents, LEVELS_UP)
    found = [parent for parent in parents if _is_data_set(parent)]
    return [_as_written(found[-1], root)] if found else []


def _below(root: Path) -> list[Path]:
    """The nearest level that has some."""
    children = _folders(root)
    deeper = islice(chain.from_iterable(map(_folders, children)), _LOOKED_AT)
    return list(filter(_is_data_set, children)) or list(filter(_is_data_set, deeper))


def _as_written(folder: Path, root: Path) -> Path:
    return folder if root.is_absolute() else Path(os.path.relpath(folder))


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(islice((path for path in folder.iterdir() if path.is_dir()), _LOOKED_AT))
    except OSError:
        return []


def _is_data_set(folder: Path) -> bool:
    """By its marks; folders named images are everywhere, and count with a class list or CamVid's names alone."""
    try:
        if (folder / "classes.txt").is_file():
            return any(any(folder.glob(mark)) for layout in LAYOUTS for mark in layout.marks)
        known = [mark for layout in LAYOUTS if layout.name != "plain folders" for mark in layout.marks]
        return any(any(folder.glob(mark)) for mark in known) or any(map(is_camvid_name, _plain_images(folder)))
    except OSError:
        return False


def _plain_images(folder: Path) -> Iterator[str]:
    """The first name of each split."""
    for place in chain(folder.glob("*/images"), [folder / "images"]):
        yield from (path.stem for path in islice(place.glob("*.png"), 1))
