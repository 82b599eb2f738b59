"""Labelled images in folders: class lists, splits, groups, frames and labels. numpy and Pillow only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mess_compile.runtime.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
ALWAYS_IGNORED = 255
VALIDATION_SHARE = 0.2
_CAMVID_NAME = re.compile(r"(0001TP|0006R0|0016E5|Seq05VD)_f?\d+")
_SPLIT = re.compile(r"([\w-]+)(?:\[(\d*):(\d*)\])?")


@dataclass(frozen=True)
class ClassList:
    """Class names and colours by label value; `ignored` label values count nowhere."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    ignored: frozenset[int] = frozenset({ALWAYS_IGNORED})


CAMVID = ClassList(
    names=("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),
    colours=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (0, 0, 192),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
    ignored=frozenset({11, ALWAYS_IGNORED}),
)


@dataclass(frozen=True)
class Item:
    """One labelled image; `group` is its sequence (the name before its last number)."""

    id: str
    group: str
    image: Path
    label: Path


@dataclass(frozen=True)
class DataSet:
    """One split of a folder of labelled images."""

    root: Path
    split: str
    classes: ClassList
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Sample:
    """A frame (H, W, 3) uint8 and its labels (H, W) uint8."""

    id: str
    group: str
    frame: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def open_dataset(root: Path, split: str, classes: ClassList | None = None) -> DataSet:
    """Open `ROOT/SPLIT/images` + `ROOT/SPLIT/labels`, or `ROOT/images` + `ROOT/labels`, or CamVid as distributed.

    `split` may carry a slice in the order of file names: `val[:50]`, `val[60:]`. In a folder without splits the last
    fifth of the files is `val` and the rest `train`: neighbouring video frames then stay together. Classes come from
    `ROOT/classes.txt` unless given. Raises InputError.
    """
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise InputError(f"split {split!r} is not of the form NAME or NAME[START:STOP], such as val or val[:50]")
    if not root.is_dir():
        raise InputError(f"data folder {root} does not exist: --data names a folder with images/ and labels/ in it")
    folder, share = _split_folder(root, match[1])
    items = _items(folder)
    if share is not None:
        border = len(items) - max(1, round(len(items) * VALIDATION_SHARE))
        items = items[border:] if share == "val" else items[:border]
    start, stop = (int(text) if text else None for text in (match[2], match[3]))
    items = items[start:stop]
    if not items:
        raise InputError(f"split {split!r} of {root} has no images")
    return DataSet(root, split, classes or _class_list(root, items), items)


def _split_folder(root: Path, split: str) -> tuple[Path, str | None]:
    if (root / split / "images").is_dir():
        return root / split, None
    if (root / "images").is_dir() and split in ("train", "val"):
        return root, split
    found = sorted(path.parent.name for path in root.glob("*/images")) or ["none"]
    raise InputError(f"{root} has no split {split!r} (found: {', '.join(found)}): expected {root / split / 'images'}")


def _items(folder: Path) -> tuple[Item, ...]:
    labels = folder / "labels"
    if not labels.is_dir():
        raise InputError(f"{labels} does not exist: every image needs a label PNG of the same name there")
    images = sorted(p for p in (folder / "images").iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    missing = [path.name for path in images if not (labels / f"{path.stem}.png").is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} images in {folder} have no label, first {missing[0]}: put its PNG in {labels}"
        )
    return tuple(Item(p.stem, _group(p.stem), p, labels / f"{p.stem}.png") for p in images)


def _group(stem: str) -> str:
    return re.sub(r"[_-]?[a-z]?\d+$", "", stem) or "all"


def _class_list(root: Path, items: tuple[Item, ...]) -> ClassList:
    path = root / "classes.txt"
    if path.is_file():
        return read_class_list(path)
    if all(_CAMVID_NAME.fullmatch(item.id) for item in items):
        return CAMVID
    raise InputError(
        f"{path} does not exist: write one class per line, in the order of label values: NAME or NAME R G B"
    )


def read_class_list(path: Path) -> ClassList:
    """Read lines `NAME` or `NAME R G B`, in the order of label values; a line `ignore VALUE` names a void label.

    Raises InputError naming file and line.
    """
    if not path.is_file():
        raise InputError(f"class list {path} does not exist")
    names: list[str] = []
    colours: list[tuple[int, int, int]] = []
    ignored = {ALWAYS_IGNORED}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        numbers = [int(word) for word in words[1:] if word.isdecimal() and int(word) <= 255]
        if len(numbers) != len(words) - 1 or len(numbers) not in ((1,) if words[0] == "ignore" else (0, 3)):
            raise InputError(f"{path}, line {number}: {line.strip()!r} is not NAME, NAME R G B or ignore VALUE")
        if words[0] == "ignore":
            ignored.add(numbers[0])
            continue
        names.append(words[0])
        colours.append((numbers[0], numbers[1], numbers[2]) if numbers else default_colour(len(names) - 1))
    if not 2 <= len(names) <= ALWAYS_IGNORED or len(set(names)) != len(names):
        raise InputError(
            f"{path} lists {len(names)} classes, {len(set(names))} of them distinct: 2 to 255 are possible"
        )
    return ClassList(tuple(names), tuple(colours), frozenset(ignored))


def default_colour(index: int) -> tuple[int, int, int]:
    """The PASCAL VOC palette's colour of a label value: its bits dealt to red, green and blue from the top."""
    red = green = blue = 0
    value = index + 1
    for bit in range(7, -1, -1):
        red |= (value & 1) << bit
        green |= (value >> 1 & 1) << bit
        blue |= (value >> 2 & 1) << bit
        value >>= 3
    return red, green, blue


def read_frame(path: Path) -> NDArray[np.uint8]:
    """An image file as uint8 (H, W, 3). Raises InputError for what is not an 8-bit image."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("RGB", "L", "P", "RGBA"):
                raise InputError(f"{path} has mode {image.mode}: convert it to 8-bit RGB")
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise InputError(f"image {path} does not exist") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error})") from error


def read_labels(path: Path, classes: ClassList) -> NDArray[np.uint8]:
    """A label PNG as uint8 (H, W); ignored values become 255. Raises InputError for values outside the class list."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P"):
                raise InputError(f"label {path} has mode {image.mode}: labels are 8-bit single-channel PNGs of values")
            labels = np.array(image)
    except FileNotFoundError as error:
        raise InputError(f"label {path} does not exist") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error})") from error
    labels[np.isin(labels, sorted(classes.ignored))] = ALWAYS_IGNORED
    wrong = np.unique(labels[(labels >= len(classes.names)) & (labels != ALWAYS_IGNORED)])
    if wrong.size:
        raise InputError(
            f"label {path} holds the value {wrong[0]}, but the {len(classes.names)} classes are 0 to "
            f"{len(classes.names) - 1}: correct classes.txt (add `ignore {wrong[0]}` for a void value) or the label"
        )
    return labels


def read_sample(item: Item, classes: ClassList) -> Sample:
    """Frame and labels of one item. Raises InputError, also when their sizes differ."""
    frame, labels = read_frame(item.image), read_labels(item.label, classes)
    if frame.shape[:2] != labels.shape:
        raise InputError(f"{item.image} is {_size(frame)}, but its label {item.label} is {_size(labels)}")
    return Sample(item.id, item.group, frame, labels)


def samples(data: DataSet) -> Iterator[Sample]:
    """All samples of a data set, in the order of file names."""
    for item in data.items:
        yield read_sample(item, data.classes)


def _size(array: NDArray[np.uint8]) -> str:
    return f"{array.shape[0]} x {array.shape[1]}"
