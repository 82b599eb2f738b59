"""Data sets of labelled images: a split opened, its class list, its frames and labels decoded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mess_compile.coco import Outlines, draw_labels
from mess_compile.cores import cores
from mess_compile.layouts import (
    ALWAYS_IGNORED,
    CAMVID,
    AstrayError,
    ClassList,
    Item,
    LabelFile,
    default_colour,
    find_layout,
    is_camvid,
)
from mess_compile.nearby import did_you_mean_folder
from mess_compile.runtime.errors import InputError

__all__ = [
    "ALWAYS_IGNORED",
    "CAMVID",
    "ClassList",
    "DataSet",
    "Item",
    "LabelFile",
    "Outlines",
    "Sample",
    "check_trainable",
    "count_labels",
    "default_colour",
    "open_dataset",
    "read_class_list",
    "read_frame",
    "read_labels",
    "read_sample",
    "samples",
]
_SPLIT = re.compile(r"([\w-]+)(?:\[(\d{0,9}):(\d{0,9})\])?")


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
    """Open a split of a data set in one of the layouts of `layouts.LAYOUTS`, recognised from what lies in `root`.

    `split` may carry a slice in the order of file names, or of PASCAL VOC's list: `val[:50]`, `val[60:]`. In a plain
    folder without splits the last fifth of the files is `val` and the rest `train`: neighbouring video frames then
    stay together. There, classes come from `ROOT/classes.txt` unless given. Raises InputError.
    """
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise InputError(f"split {split!r} is not of the form NAME or NAME[START:STOP], such as val or val[:50]")
    if not root.is_dir():
        raise InputError(f"data folder {root} does not exist: --data names the folder that the data set lies in")
    start, stop = (int(text) if text else None for text in (match[2], match[3]))
    try:
        layout = find_layout(root)
        found = tuple(layout.find_items(root, match[1]))
        items = found[start:stop]
        if not items:
            reason = f"the slice leaves none of {len(found)}" if found else f"expected {layout.expected}"
            raise InputError(f"split {split!r} of {root} has no images: {reason}")
        return DataSet(root, split, _class_list(root, items, layout.classes, classes), items)
    except OSError as error:
        raise InputError(f"{root} cannot be looked into ({error}): give yourself read access") from error
    except AstrayError as error:
        meant = did_you_mean_folder(root)
        raise InputError(f"{error.brief}{meant}" if meant else str(error)) from error


def _class_list(root: Path, items: tuple[Item, ...], known: ClassList | None, given: ClassList | None) -> ClassList:
    if known is not None:
        if given is not None and given.names != known.names:
            raise InputError(f"{root} has the classes {', '.join(known.names)}, not {', '.join(given.names)}")
        return known
    if given is not None:
        return given
    path = root / "classes.txt"
    if path.is_file():
        return read_class_list(path)
    if is_camvid(items):
        return CAMVID
    raise AstrayError(
        f"{path} does not exist: write one class per line, in the order of label values: NAME or NAME R G B",
        f"{path} does not exist",
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
        numbers = [int(word) for word in words[1:] if word.isdecimal() and len(word) <= 3 and int(word) <= 255]
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


def read_frame(path: Path) -> NDArray[np.uint8]:
    """An image file as uint8 (H, W, 3). Raises InputError for what is not an 8-bit image."""
    with _opened(path, "image") as image:
        if image.mode not in ("RGB", "L", "P", "RGBA"):
            raise InputError(f"{path} has mode {image.mode}: convert it to 8-bit RGB")
        return np.asarray(image.convert("RGB"))


def read_labels(label: Path | LabelFile | Outlines, classes: ClassList) -> NDArray[np.uint8]:
    """An item's labels, or those in a PNG, as uint8 (H, W); ignored values become 255.

    Safe to call from several threads. Raises InputError for values that stand for no class.
    """
    if isinstance(label, Outlines):
        return draw_labels(label)
    path = label.path if isinstance(label, LabelFile) else label
    with _opened(path, "label") as image:
        if image.mode not in ("L", "P"):
            raise InputError(f"label {path} has mode {image.mode}: labels are 8-bit single-channel PNGs of values")
        stored = np.asarray(image)
    table = np.array(label.classes if isinstance(label, LabelFile) else _classes_of_values(classes))
    wrong = np.flatnonzero((np.bincount(stored.ravel(), minlength=256) > 0) & (table < 0))
    if wrong.size:
        raise InputError(f"label {path} holds the value {wrong[0]}, but {_remedy(label, classes, int(wrong[0]))}")
    labels: NDArray[np.uint8] = table.astype(np.uint8)[stored]
    return labels


def _classes_of_values(classes: ClassList) -> tuple[int, ...]:
    """The class of each of the 256 label values; 255 for void, -1 for what is neither."""
    void = classes.ignored | {ALWAYS_IGNORED}
    return tuple(
        ALWAYS_IGNORED if value in void else value if value < len(classes.names) else -1 for value in range(256)
    )


def _remedy(label: Path | LabelFile, classes: ClassList, value: int) -> str:
    if isinstance(label, LabelFile):
        return f"this data set uses 0 to {max(np.flatnonzero(np.array(label.classes[:255]) >= 0))} and 255: correct it"
    return (
        f"the {len(classes.names)} classes are 0 to {len(classes.names) - 1}: correct classes.txt (add "
        f"`ignore {value}` for a void value) or the label"
    )


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise InputError(f"{kind} {path} does not exist") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error})") from error


def read_sample(item: Item, classes: ClassList) -> Sample:
    """Frame and labels of one item. Raises InputError, also when their sizes differ."""
    frame, labels = read_frame(item.image), read_labels(item.label, classes)
    if frame.shape[:2] != labels.shape:
        label = f"its label {item.label_path} is" if item.label_path else "by its annotations"
        raise InputError(f"{item.image} is {_size(frame)}, but {label} {_size(labels)}")
    return Sample(item.id, item.group, frame, labels)


def samples(data: DataSet) -> Iterator[Sample]:
    """All samples of a data set, in the order of its items."""
    for item in data.items:
        yield read_sample(item, data.classes)


def count_labels(data: DataSet) -> NDArray[np.int64]:
    """Labelled pixels of each class, (K,), over the whole split. Raises InputError for a label that cannot be read."""

    def counted(item: Item) -> NDArray[np.int64]:
        return np.bincount(read_labels(item.label, data.classes).ravel(), minlength=256)

    counts = np.zeros(256, np.int64)
    with ThreadPoolExecutor(max_workers=max(1, cores() // 2)) as pool:
        for found in pool.map(counted, data.items):
            counts += found
    return counts[: len(data.classes.names)]


def check_trainable(data: DataSet) -> NDArray[np.int64]:
    """Labelled pixels of each class, (K,), over the whole split.

    Raises InputError when fewer than two classes have labelled pixels: a network would learn to say one thing.
    """
    counts = count_labels(data)
    labelled = [name for name, count in zip(data.classes.names, counts, strict=True) if count]
    if len(labelled) < 2:
        found = f"of {labelled[0]} alone" if labelled else "of no class"
        raise InputError(
            f"split {data.split!r} of {data.root} has labelled pixels {found} in its {len(data.items)} images: "
            "training needs two classes or more; correct the labels or the class list"
        )
    return counts


def _size(array: NDArray[np.uint8]) -> str:
    return f"{array.shape[0]} x {array.shape[1]}"
