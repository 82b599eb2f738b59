"""Opens a split of a data set, decodes its frames and labels, and surveys its labels."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mess_compile.cores import cores
from mess_compile.data.class_list import ALWAYS_IGNORED, ClassList, default_colour, read_class_list
from mess_compile.data.coco import Outlines
from mess_compile.data.labels import LabelValueError, label_values, read_labels, remedy_of_value
from mess_compile.data.layouts import (
    CAMVID,
    AstrayError,
    Item,
    LabelFile,
    Layout,
    NoLayoutError,
    find_layout,
    is_camvid,
)
from mess_compile.data.suggest import did_you_mean_folder, nearest_layout
from mess_compile.data.truth import truth_of
from mess_compile.data_folder import Data, DataFolder, data_folder
from mess_compile.reporter import Reporter
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.bundle.manifest import LABELS
from mess_compile.runtime.images.pictures import read_picture

__all__ = [
    "ALWAYS_IGNORED",
    "CAMVID",
    "ClassList",
    "Data",
    "DataFolder",
    "DataSet",
    "Item",
    "LabelFile",
    "Outlines",
    "Sample",
    "Survey",
    "check_trainable",
    "count_labels",
    "default_colour",
    "open_dataset",
    "read_class_list",
    "read_frame",
    "read_labels",
    "read_sample",
    "refuse_untrainable",
    "samples",
    "survey_labels",
]
_SPLIT = re.compile(r"([\w-]+)(?:\[(\d{0,9}):(\d{0,9})\])?")
_MUCH_VOID = 0.5
read_frame = read_picture


@dataclass(frozen=True)
class DataSet:
    """One split of a folder of labelled images; `notes` are sentences about files there that are not read.

    `truth` says what the labels are: LABELS, or OWN_OUTPUT where a network made them.
    """

    root: Path
    split: str
    classes: ClassList
    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()
    truth: str = LABELS


@dataclass(frozen=True)
class Sample:
    """A frame (H, W, 3) uint8 and its labels (H, W) uint8."""

    id: str
    group: str
    frame: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def open_dataset(data: Data, split: str, classes: ClassList | None = None) -> DataSet:
    """Open a split of a data set; its layout, one of `layouts.LAYOUTS`, is recognised from its folder.

    `split` may end in a slice in the order of file names, or of PASCAL VOC's list: `val[:50]`, `val[60:]`. In a plain
    folder without splits the last fifth of the files is `val` and the rest `train`: neighbouring video frames then stay
    together. There, classes come from `ROOT/classes.txt` unless given. Raises InputError.
    """
    folder = data_folder(data)
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise InputError(f"split {split!r} does not have the form NAME or NAME[START:STOP], such as val or val[:50]")
    root = folder.root
    if root is None or not root.is_dir():
        raise InputError(f"data folder {root} does not exist: give --data the folder of the data set")
    start, stop = (int(text) if text else None for text in (match[2], match[3]))
    try:
        layout = find_layout(root, folder.names)
        found = layout.find_items(root, match[1])
        items = found.items[start:stop]
        if not items:
            reason = f"the slice selects none of {len(found.items)}" if found.items else f"expected {layout.expected}"
            raise InputError(f"split {split!r} of {root} has no images: {reason}")
        _check_ids(root, items)
        chosen = _class_list(folder, root, items, layout, classes)
        return DataSet(root, split, chosen, items, found.notes, truth_of(root))
    except OSError as error:
        raise InputError(f"{root} cannot be listed ({error}): give yourself read access") from error
    except AstrayError as error:
        meant = did_you_mean_folder(root)
        if not meant and isinstance(error, NoLayoutError):
            raise InputError(f"{error.brief}{nearest_layout(root)}") from error
        raise InputError(f"{error.brief}{meant}" if meant else str(error)) from error


def _check_ids(root: Path, items: tuple[Item, ...]) -> None:
    (name, often), *_ = Counter(item.id for item in items).most_common(1)
    if often > 1:
        twice = [item.image for item in items if item.id == name][:2]
        raise InputError(f"{root} has two images named {name} ({twice[0]}, {twice[1]}): rename one of them")


def _class_list(
    folder: DataFolder, root: Path, items: tuple[Item, ...], layout: Layout, given: ClassList | None
) -> ClassList:
    if layout.classes is not None:
        if given is not None and given.names != layout.classes.names:
            raise InputError(f"{root} has the classes {', '.join(layout.classes.names)}, not {', '.join(given.names)}")
        if folder.label_offset:
            raise InputError(f"{root} is {layout.name}, which defines its label values itself: drop --label-offset")
        return layout.classes
    if given is not None:
        return given
    return replace(_own_class_list(root, items), label_offset=folder.label_offset or 0)


def _own_class_list(root: Path, items: tuple[Item, ...]) -> ClassList:
    path = root / "classes.txt"
    if path.is_file():
        return read_class_list(path)
    if is_camvid(items):
        return CAMVID
    raise AstrayError(
        f"{path} does not exist: write one class per line, in the order of label values: NAME or NAME R G B",
        f"{path} does not exist",
    )


def read_sample(item: Item, classes: ClassList) -> Sample:
    """Frame and labels of one item. Raises InputError, also when their sizes differ."""
    frame, labels = read_frame(item.image), read_labels(item.label, classes)
    if frame.shape[:2] != labels.shape:
        label = f"its label {item.label_path} is" if item.label_path else "by its annotations"
        turned = ", as EXIF data turn it" if frame.shape[:2] == labels.shape[::-1] else ""
        raise InputError(f"{item.image} is {_size(frame)}{turned}, but {label} {_size(labels)}")
    return Sample(item.id, item.group, frame, labels)


def samples(data: DataSet) -> Iterator[Sample]:
    """All samples of a data set, in the order of its items."""
    for item in data.items:
        yield read_sample(item, data.classes)


@dataclass(frozen=True)
class Survey:
    """All labels of a split: labelled `pixels` of each class (K,), the count of `void` ones, a digest of all maps."""

    data: DataSet
    pixels: NDArray[np.int64]
    void: int
    sha256: str

    @property
    def void_share(self) -> float:
        return self.void / max(1, int(self.pixels.sum()) + self.void)

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes without a labelled pixel."""
        return tuple(name for name, count in zip(self.data.classes.names, self.pixels, strict=True) if not count)

    def notes(self) -> tuple[str, ...]:
        """The share of void pixels, if there are any, as a sentence."""
        void = f"{self.void_share:.1%} of the pixels of {self.data.split} are void and are not counted"
        return (void,) if self.void else ()

    def warnings(self) -> tuple[str, ...]:
        """Sentences on classes that never occur, and on labels that are probably wrong."""
        sentences = []
        if self.absent:
            one = len(self.absent) == 1
            sentences.append(
                f"{', '.join(self.absent)} never occur{'s' if one else ''} in the labels of {self.data.split}, and "
                f"{'is' if one else 'are'} left out of its mIoU"
            )
        if len(self.pixels) - len(self.absent) < 2 or self.void_share > _MUCH_VOID:
            sentences.append(f"these labels carry little information: {self.suspicion()}")
        return tuple(sentences)

    def report(self, reporter: Reporter) -> None:
        for note in self.notes():
            reporter.note(note)
        for warning in self.warnings():
            reporter.warn(warning)

    def suspicion(self) -> str:
        """The probable error in labels that are mostly void, or all of one class."""
        names = self.data.classes.names
        if self.void and len(names) == 2 and not self.pixels[1]:
            return f"255 is void; in masks of 0 and 255, {names[1]} has to be stored as 1 instead of 255"
        if self.void_share > _MUCH_VOID:
            return "255 and each `ignore` of classes.txt are void; store what should count as a class"
        return "correct the labels or the class list"


def survey_labels(data: DataSet) -> Survey:
    """Read all labels of a split. Raises InputError for one that cannot be read, or has a value of no class."""

    def surveyed(item: Item) -> tuple[NDArray[np.int64], bytes]:
        labels = read_labels(item.label, data.classes)
        digest = hashlib.sha256(repr(labels.shape).encode() + np.ascontiguousarray(labels).tobytes()).digest()
        return np.bincount(labels.ravel(), minlength=256), digest

    counts, digests = np.zeros(256, np.int64), hashlib.sha256()
    try:
        with ThreadPoolExecutor(max_workers=max(1, cores() // 2)) as pool:
            for found, digest in pool.map(surveyed, data.items):
                counts += found
                digests.update(digest)
    except LabelValueError as error:
        raise _explained(error, data) from error
    classes = len(data.classes.names)
    return Survey(data, counts[:classes], int(counts[ALWAYS_IGNORED]), digests.hexdigest())


def _explained(error: LabelValueError, data: DataSet) -> InputError:
    """An error with a remedy from all labels: one label alone does not show where values begin."""
    if error.value is None:
        return error
    seen = np.zeros(256, bool)
    for item in data.items:
        try:
            seen |= label_values(item.label)
        except InputError:
            continue
    return InputError(
        f"label {error.path} holds the value {error.value}, but {remedy_of_value(data.classes, error.value, seen)}"
    )


def count_labels(data: DataSet) -> NDArray[np.int64]:
    """Labelled pixels of each class, (K,), over the whole split. Raises InputError for a label that cannot be read."""
    return survey_labels(data).pixels


def check_trainable(data: DataSet) -> NDArray[np.int64]:
    """Labelled pixels of each class, (K,), over the whole split. Raises InputError as `refuse_untrainable` does."""
    survey = survey_labels(data)
    refuse_untrainable(survey)
    return survey.pixels


def refuse_untrainable(survey: Survey) -> None:
    """Raises InputError when fewer than two classes have labelled pixels: a network would learn to give one answer."""
    data = survey.data
    labelled = [name for name in data.classes.names if name not in survey.absent]
    if len(labelled) < 2:
        found = f"of {labelled[0]} alone" if labelled else "of no class"
        void = f" ({survey.void_share:.0%} of the pixels are void)" if survey.void else ""
        raise InputError(
            f"split {data.split!r} of {data.root} has labelled pixels {found} in its {len(data.items)} images{void}: "
            f"training needs two classes or more; {survey.suspicion()}"
        )


def _size(array: NDArray[np.uint8]) -> str:
    return f"{array.shape[0]} x {array.shape[1]}"
