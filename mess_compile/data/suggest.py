"""Suggests what a folder without a data set was meant to be: one above or below it, or folders with other names."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from mess_compile.data.layouts import IMAGE_SUFFIXES, LABEL_SUFFIXES, LAYOUTS, PICTURES, PLAIN, is_camvid_name
from mess_compile.data_folder import IMAGES, LABELS

LEVELS_UP = 3
_LOOKED_AT = 200
"""At most so many folders in a folder are searched, so that the root of a disk takes no longer."""
_LISTED = 4


def did_you_mean_folder(root: Path) -> str:
    """The end of a message about `root`; empty if no folder near it looks like a data set."""
    found = _above(root) or ([] if _is_data_set(root) else _below(root))
    if not found:
        return ""
    if len(found) == 1:
        return f": did you mean --data {found[0]}?"
    others = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return f": name one of the data sets in it, --data {' or '.join(map(str, found[:_LISTED]))}{others}"


def _above(root: Path) -> list[Path]:
    """The topmost, since a split of a plain folder looks like a data set of its own."""
    parents = islice(root.resolve().parents, LEVELS_UP)
    found = [parent for parent in parents if _is_data_set(parent)]
    return [_as_written(found[-1], root)] if found else []


def _below(root: Path) -> list[Path]:
    """The nearest folders below that are data sets, all at the same depth."""
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
    """Decides by marks; folders named images are common, and count only with a class list or CamVid's names."""
    try:
        if (folder / "classes.txt").is_file():
            return any(any(folder.glob(mark)) for layout in LAYOUTS for mark in layout.marks)
        known = [mark for layout in LAYOUTS if layout.name != PLAIN for mark in layout.marks]
        return any(any(folder.glob(mark)) for mark in known) or any(map(is_camvid_name, _plain_images(folder)))
    except OSError:
        return False


def _plain_images(folder: Path) -> Iterator[str]:
    """The first name of each split."""
    for place in chain(folder.glob("*/images"), [folder / "images"]):
        yield from (path.stem for path in islice(place.glob("*.png"), 1))


_DEPTH = 3
_LABELLIKE = re.compile(r"label|mask|annot|seg|gt|truth|target|class", re.IGNORECASE)
_ELSE = "CamVid, Cityscapes, PASCAL VOC and COCO are read as they were unpacked"


def nearest_layout(root: Path) -> str:
    """The end of a message that `root` has no known layout: what it contains, and what would make it a data set."""
    found = _pictures_below(root)
    if not found:
        return f": it has no pictures; expected are {IMAGES}/, {LABELS}/ and classes.txt ({_ELSE})"
    listed = ", ".join(f"{_name(folder, root)} ({_kinds(kinds)})" for folder, kinds in list(found.items())[:_LISTED])
    more = " and others" if len(found) > _LISTED else ""
    pair = next((pair for pair in (_pair_with(label, found, root) for label in found) if pair), None)
    if pair is not None:
        return f", but {listed}{more}: if these are images and labels, add --images {pair[0]} --labels {pair[1]}"
    return (
        f", but {listed}{more}; nearest is {PLAIN}: put images into {IMAGES}/, label PNGs of the same names into "
        f"{LABELS}/, and the class names into classes.txt ({_ELSE})"
    )


def _name(folder: Path, root: Path) -> str:
    return "pictures in it" if folder == root else f"{folder.relative_to(root)}/"


def _kinds(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common(3))


def _pictures_below(root: Path) -> dict[Path, Counter[str]]:
    """The folders with pictures, including formats that are not read, and how many of each kind."""
    found: dict[Path, Counter[str]] = {}
    folders = [root]
    for _ in range(_DEPTH):
        for folder in folders:
            kinds = Counter(path.suffix.lower() for path in _entries(folder) if path.suffix.lower() in PICTURES)
            if kinds:
                found[folder] = kinds
        folders = list(islice(chain.from_iterable(map(_folders, folders)), _LOOKED_AT))
    return found


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from (path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return


def _pair_with(labels: Path, found: dict[Path, Counter[str]], root: Path) -> tuple[str, str] | None:
    """The values of --images and --labels if `labels` holds label PNGs of another folder's images."""
    if labels == root or not _is_labels(labels.relative_to(root), found[labels]):
        return None
    stems = {path.stem for path in _entries(labels)}
    for images, kinds in found.items():
        if images in (labels, root) or not kinds.keys() & set(IMAGE_SUFFIXES):
            continue
        names = _names(images.relative_to(root), labels.relative_to(root))
        if names is not None and any(path.stem in stems for path in _entries(images)):
            return names
    return None


def _is_labels(folder: Path, kinds: Counter[str]) -> bool:
    return bool(_LABELLIKE.search(str(folder))) and bool(kinds.keys() & set(LABEL_SUFFIXES))


def _names(images: Path, labels: Path) -> tuple[str, str] | None:
    """The parts in which two folders differ: all but a split in front or behind, `train/frames` or `frames/train`."""
    one, other = images.parts, labels.parts
    while one and other and one[0] == other[0]:
        one, other = one[1:], other[1:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    shared = len(images.parts) - len(one)
    return ("/".join(one), "/".join(other)) if one and other and shared < 2 else None
