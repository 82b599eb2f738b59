"""Reads label maps: PNGs of values, of palette indices, or in the colours of a class list, and COCO's outlines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile.data.class_list import ALWAYS_IGNORED, ClassList, Colour
from mess_compile.data.coco import Outlines, draw_labels
from mess_compile.data.layouts import LabelFile
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.images import pictures, png
from mess_compile.runtime.images.orientation import orientation_of, upright

_MAX_VALUE = 255
_SHOWN_VALUES = 12


class LabelValueError(InputError):
    """A label has a value of no class; `value` is None if the class list cannot help."""

    def __init__(self, path: Path, value: int, remedy: str, can_be_listed: bool) -> None:
        super().__init__(f"label {path} has the value {value}, but {remedy}")
        self.path, self.value = path, value if can_be_listed else None


def read_labels(label: Path | LabelFile | Outlines, classes: ClassList) -> NDArray[np.uint8]:
    """Read an item's labels, or those in a PNG, as uint8 (H, W); void becomes 255.

    Values count from the list's `label_offset`. RGB masks are looked up in the class list's colours; if it gives none,
    masks with three equal channels hold values. Safe to call from several threads. Raises InputError for values and
    colours of no class.
    """
    if isinstance(label, Outlines):
        return draw_labels(label)
    stored = _stored(label.path if isinstance(label, LabelFile) else label)
    if isinstance(label, LabelFile):
        return _of_values(stored, _values(stored, None), label.classes, _remedy_of_file(label))
    if stored.is_rgb and classes.is_coloured:
        return _of_colours(stored, classes)
    values = _values(stored, classes)
    _check_palette(stored, values, classes)
    return _of_values(stored, values, classes_of_values(classes), classes)


def label_values(label: Path | LabelFile | Outlines) -> NDArray[np.bool_]:
    """Which of the values 0 to 255 a label has, as it is stored; none for one without values."""
    found = np.zeros(_MAX_VALUE + 1, bool)
    if not isinstance(label, Outlines):
        stored = _stored(label.path if isinstance(label, LabelFile) else label)
        if not stored.is_rgb:
            found[np.unique(np.minimum(stored.samples[..., 0], _MAX_VALUE))] = True
    return found


@dataclass(frozen=True)
class _Stored:
    """The content of a label PNG: `samples` (H, W, channels), without transparency."""

    path: Path
    samples: NDArray[Any]
    palette: NDArray[np.uint8]

    @property
    def is_rgb(self) -> bool:
        return len(self.samples[0, 0]) == 3


def _stored(path: Path) -> _Stored:
    if not path.is_file():
        raise InputError(f"label {path} does not exist")
    content = pictures.read_content(path)
    if not content.startswith(png.SIGNATURE):
        raise InputError(
            f"label {path} cannot be read: labels must be PNG files, since other formats may change their values"
        )
    try:
        picture = png.opened(content)
        samples = pictures.samples_of(picture, content)
    except InputError as error:
        raise InputError(f"label {path} cannot be read: {error}") from error
    if picture.has_alpha:
        samples = _without_alpha(path, samples)
    return _Stored(path, upright(samples, orientation_of(picture.exif)), picture.palette)


def _without_alpha(path: Path, samples: NDArray[Any]) -> NDArray[Any]:
    """Transparent pixels may have any value; black is assumed to be what a program left empty."""
    hidden = (samples[..., -1] == 0) & samples[..., :-1].any(axis=2)
    if hidden.any():
        row, column = np.argwhere(hidden)[0]
        raise InputError(
            f"label {path} is transparent at row {row}, column {column}, over a value that is not 0: save it without "
            "transparency"
        )
    return samples[..., :-1]


def _values(stored: _Stored, classes: ClassList | None) -> NDArray[Any]:
    """Label values (H, W) of a label with one channel, or with three that are equal."""
    samples = stored.samples
    if stored.is_rgb and not (samples == samples[..., :1]).all():
        row, column = np.argwhere((samples != samples[..., :1]).any(axis=2))[0]
        remedy = "give the colours in classes.txt, NAME R G B for every class, or save one channel of values"
        raise InputError(
            f"label {stored.path} is an RGB mask (colour {_as_text(samples[row, column])} at row {row}, "
            f"column {column}): "
            f"{'labels of this data set are single-channel PNGs of values' if classes is None else remedy}"
        )
    if int(samples.max()) > _MAX_VALUE:
        raise LabelValueError(stored.path, int(samples.max()), "label values are 0 to 255: correct it", False)
    values: NDArray[Any] = samples[..., 0]
    return values


def classes_of_values(classes: ClassList) -> tuple[int, ...]:
    """The class of each of the 256 label values; 255 for void, -1 for unused values."""
    void, first = classes.ignored | {ALWAYS_IGNORED}, classes.label_offset
    return tuple(
        ALWAYS_IGNORED
        if value in void or value < first
        else value - first
        if value - first < len(classes.names)
        else -1
        for value in range(_MAX_VALUE + 1)
    )


def _of_values(
    stored: _Stored, values: NDArray[Any], meaning: tuple[int, ...], known: ClassList | str
) -> NDArray[np.uint8]:
    table = np.array(meaning)
    wrong = np.flatnonzero((np.bincount(values.ravel(), minlength=_MAX_VALUE + 1) > 0) & (table < 0))
    if wrong.size:
        remedy = known if isinstance(known, str) else remedy_of_value(known, int(wrong[0]))
        raise LabelValueError(stored.path, int(wrong[0]), remedy, known is not remedy)
    labels: NDArray[np.uint8] = table.astype(np.uint8)[values]
    return labels


def _remedy_of_file(label: LabelFile) -> str:
    return f"this data set uses 0 to {max(np.flatnonzero(np.array(label.classes[:255]) >= 0))} and 255: correct it"


def remedy_of_value(classes: ClassList, value: int, seen: NDArray[np.bool_] | None = None) -> str:
    """The remedy for a value of no class; `seen` are the values that all labels of the data have."""
    count, first = len(classes.names), classes.label_offset
    are = f"the {count} classes are {first} to {first + count - 1}" + (f" (--label-offset {first})" if first else "")
    listed = f"list every class in classes.txt, or add `ignore {value}` where it is void"
    if first or value != count or (seen is not None and np.flatnonzero(seen[:_MAX_VALUE]).max() > value):
        return f"{are}{_found(seen)}: {listed}"
    begin = f"--label-offset 1 if labels begin at 1, {classes.names[0]} being 1 and 0 unlabelled"
    is_void = 0 in classes.ignored or (seen is not None and not seen[0])
    if is_void:
        why = "0 is void" if 0 in classes.ignored else "no label holds 0"
        return f"{are}, and {why}: labels begin at 1 here, so add --label-offset 1, with which {classes.names[0]} is 1"
    return f"{are}{_found(seen)}: add {begin}; if {classes.names[0]} is 0 and {value} is void, write `ignore {value}`"


def _found(seen: NDArray[np.bool_] | None) -> str:
    if seen is None:
        return ""
    values = np.flatnonzero(seen)
    if len(values) > _SHOWN_VALUES:
        return f", and the labels have {len(values)} values from {values[0]} to {values[-1]}"
    return f", and the labels have {', '.join(map(str, values))}"


def _check_palette(stored: _Stored, values: NDArray[Any], classes: ClassList) -> None:
    """Raises InputError for an index whose colour belongs to another class: the palette was made from a mask."""
    used = np.unique(values)
    if not classes.is_coloured or len(used) < 2 or used[-1] >= len(stored.palette):
        return
    meant = [_class_of_colour(_colour(stored.palette[index]), classes) for index in range(int(used[-1]) + 1)]
    if any(number is None for number in meant):
        return
    meaning = classes_of_values(classes)
    for index in map(int, used):
        if meant[index] != meaning[index]:
            raise InputError(
                f"label {stored.path} shows its value {index} in {_as_text(stored.palette[index])}, the colour of "
                f"{_name(classes, meant[index])}, but {index} is {_name(classes, meaning[index])}: save it as RGB to "
                "have its colours read, or with the values of classes.txt"
            )


def _name(classes: ClassList, number: int | None) -> str:
    return classes.names[number] if number is not None and 0 <= number < len(classes.names) else "no class"


def _class_of_colour(colour: Colour, classes: ClassList) -> int | None:
    """The class of a colour, 255 for void, None for an unknown one."""
    if colour in classes.void_colours:
        return ALWAYS_IGNORED
    return classes.colours.index(colour) if colour in classes.colours else None


@lru_cache(maxsize=4)
def _table(classes: ClassList) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """The colours as numbers, in ascending order, and the class of each. Raises InputError for equal ones."""
    colours = [*classes.colours, *classes.void_colours]
    names = [*classes.names, *("ignore" for _ in classes.void_colours)]
    for index, colour in enumerate(colours):
        if colour in colours[:index]:
            raise InputError(
                f"{names[colours.index(colour)]} and {names[index]} have the same colour {_as_text(colour)} in "
                "classes.txt, so coloured masks cannot distinguish them: change one"
            )
    numbers = _packed(np.array(colours, np.uint8))
    order = np.argsort(numbers)
    meant = np.array([*range(len(classes.names)), *(ALWAYS_IGNORED for _ in classes.void_colours)], np.uint8)
    return numbers[order], meant[order]


def _packed(colours: NDArray[Any]) -> NDArray[np.int64]:
    """Colours (..., 3) as one number each."""
    wide = colours.astype(np.int64)
    packed: NDArray[np.int64] = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    return packed


def _of_colours(stored: _Stored, classes: ClassList) -> NDArray[np.uint8]:
    if int(stored.samples.max()) > _MAX_VALUE:
        raise InputError(f"label {stored.path} has 16 bits per sample: save coloured masks with 8")
    numbers, meant = _table(classes)
    packed = _packed(stored.samples)
    places = np.minimum(np.searchsorted(numbers, packed), len(numbers) - 1)
    unknown = numbers[places] != packed
    if unknown.any():
        raise InputError(_unknown_colour(stored, unknown, classes))
    labels: NDArray[np.uint8] = meant[places]
    return labels


def _unknown_colour(stored: _Stored, unknown: NDArray[np.bool_], classes: ClassList) -> str:
    row, column = np.argwhere(unknown)[0]
    colour = stored.samples[row, column]
    distances = ((np.array(classes.colours, int) - colour.astype(int)) ** 2).sum(axis=1)
    nearest = int(distances.argmin())
    return (
        f"label {stored.path} has the colour {_as_text(colour)} at row {row}, column {column}, which is no class of "
        f"classes.txt; the nearest is {classes.names[nearest]} {_as_text(classes.colours[nearest])}: "
        f"{_remedy_of_colours(stored, unknown, classes)}"
    )


def _remedy_of_colours(stored: _Stored, unknown: NDArray[np.bool_], classes: ClassList) -> str:
    samples = stored.samples
    if np.isin(_packed(samples[..., ::-1]), _table(classes)[0]).all():
        return "its channels are in the order blue, green, red: save it as RGB"
    if (samples == samples[..., :1]).all():
        return (
            "its three channels are equal: for values, save it with one channel or remove the colours from classes.txt"
        )
    if unknown.mean() < 0.2:
        return "save masks without smoothing or JPEG compression, or add the colour to classes.txt"
    return "add the colour to classes.txt (NAME R G B, or ignore R G B for void)"


def _colour(values: NDArray[Any]) -> Colour:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


def _as_text(colour: Any) -> str:
    return f"({', '.join(str(int(value)) for value in colour)})"
