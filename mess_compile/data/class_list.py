"""Reads `classes.txt`: the class names of a data set, in the order of label values, with colours and void."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mess_compile import files
from mess_compile.runtime.base.errors import InputError

ALWAYS_IGNORED = 255
FORM = "NAME, NAME R G B, ignore VALUE or ignore R G B"
Colour = tuple[int, int, int]
_HEADERS = frozenset(
    (
        *("name", "names", "class", "classes", "label", "labels", "category", "categories", "classname"),
        *("value", "id", "index"),
    )
)
_COLUMNS = _HEADERS | {"color", "colour", "rgb", "r", "g", "b", "red", "green", "blue"}
_COMMENT = re.compile(r"(?:^|\s)#.*")
_HEX_COLOUR = re.compile(r"\S\s+#[0-9a-fA-F]{6}\s*$")
_NUMBERED = re.compile(r"\d+(?:[\s:.)]|$)")
_FOREIGN = re.compile(r"[,;|=\"\\<>\[\]{}\ufffd]")
_MARKS = ("//", "--", "%", "-", "*", ":", "'")


@dataclass(frozen=True)
class ClassList:
    """Class names and colours by label value; pixels with `ignored` label values are not counted.

    `is_coloured`: the colours are the data set's own, so that coloured labels can be looked up; pixels in
    `void_colours` are not counted. With a `label_offset` of N the first class has the label value N, and smaller values
    are void.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    ignored: frozenset[int] = frozenset({ALWAYS_IGNORED})
    is_coloured: bool = False
    void_colours: tuple[Colour, ...] = ()
    label_offset: int = 0


def default_colour(index: int) -> Colour:
    """The PASCAL VOC palette's colour of a label value: its bits dealt to red, green and blue from the top."""
    red = green = blue = 0
    value = index + 1
    for bit in range(7, -1, -1):
        red |= (value & 1) << bit
        green |= (value >> 1 & 1) << bit
        blue |= (value >> 2 & 1) << bit
        value >>= 3
    return red, green, blue


@dataclass(frozen=True)
class _Line:
    """A parsed line: a name with or without colour, or a void value or colour, which has no name."""

    number: int
    name: str
    numbers: tuple[int, ...]


def read_class_list(path: Path) -> ClassList:
    """Read lines `NAME` or `NAME R G B`, in the order of label values; a line `ignore VALUE` names a void label value,
    `ignore R G B` a void colour. A `#` at the beginning of a word starts a comment.

    Raises InputError naming file and line for anything else, or for text that is not UTF-8.
    """
    if not path.is_file():
        raise InputError(f"class list {path} does not exist")
    lines: list[_Line] = []
    for number, text in enumerate(files.read_lines(path), 1):
        line = _read(path, number, text, is_first=not lines)
        lines += [line] if line else []
    classes = [line for line in lines if line.name]
    void = [line.numbers for line in lines if not line.name]
    _check_distinct(path, classes)
    if not 2 <= len(classes) <= ALWAYS_IGNORED:
        raise InputError(f"{path} lists {len(classes)} classes: give 2 to {ALWAYS_IGNORED}, one name per line")
    colours = tuple(_colour(line.numbers) or default_colour(index) for index, line in enumerate(classes))
    return ClassList(
        names=tuple(line.name for line in classes),
        colours=colours,
        ignored=frozenset({ALWAYS_IGNORED, *(numbers[0] for numbers in void if len(numbers) == 1)}),
        is_coloured=all(line.numbers for line in classes),
        void_colours=tuple(colour for numbers in void if (colour := _colour(numbers))),
    )


def _colour(numbers: tuple[int, ...]) -> Colour | None:
    return (numbers[0], numbers[1], numbers[2]) if len(numbers) == 3 else None


def _read(path: Path, number: int, text: str, is_first: bool) -> _Line | None:
    """The parsed line; None for an empty one or a comment."""

    def refuse(reason: str) -> NoReturn:
        raise InputError(f"{path}, line {number}: {text.strip()!r:.80} {reason}")

    plain = _COMMENT.sub("", text).strip()
    if not plain:
        return None
    if _HEX_COLOUR.search(text):
        refuse("has a hexadecimal colour: write it as three numbers of 0 to 255, NAME R G B")
    words = plain.split()
    numbers = _numbers_at_end(words)
    if words[0] == "ignore":
        if len(words) - 1 != len(numbers) or len(numbers) not in (1, 3) or max(numbers) > 255:
            refuse(f"is not {FORM}, with numbers of 0 to 255")
        return _Line(number, "", numbers)
    if len(numbers) not in (0, 3):
        refuse(
            f"ends in {len(numbers)} number{'s' * (len(numbers) > 1)}, and is not {FORM}: give a name that ends in a "
            "number a colour, too"
        )
    if numbers and max(numbers) > 255:
        refuse(f"has a colour beyond 255: it is not {FORM}")
    name = " ".join(words[: len(words) - len(numbers)])
    _check_name(name, refuse, is_first)
    return _Line(number, name, numbers)


def _numbers_at_end(words: list[str]) -> tuple[int, ...]:
    """At most three; a number longer than any colour's counts as 256."""
    count = 0
    while count < 3 and count < len(words) - 1 and words[-1 - count].isascii() and words[-1 - count].isdecimal():
        count += 1
    return tuple(int(word) if len(word) <= 3 else 256 for word in words[len(words) - count :])


def _check_name(name: str, refuse: Callable[[str], NoReturn], is_first: bool) -> None:
    """Raises InputError for a line of another kind of file."""
    if "," in name or ";" in name:
        refuse(f"looks like a table (CSV): write {FORM}, separated by spaces, and no header")
    columns = {word.casefold() for word in re.split(r"[\s:_]+", name)}
    if is_first and columns <= _COLUMNS and columns & _HEADERS:
        refuse(f"looks like a header, and would be the first class: remove it; every line is {FORM}")
    if _NUMBERED.match(name):
        refuse("begins with a number: remove it, the order of lines gives the label value")
    if name.startswith(_MARKS):
        refuse(f"does not begin with a name: write {FORM}; comments begin with #")
    found = _FOREIGN.search(name)
    if found or name.endswith((":", "'")):
        refuse(f"contains {found[0] if found else name[-1]!r}: write the name as it is, without quotes or escapes")
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Co", "Cn") for letter in name):
        refuse("contains invisible characters: type the name again")


def _check_distinct(path: Path, lines: list[_Line]) -> None:
    known: dict[str, int] = {}
    for line in lines:
        if line.name in known:
            raise InputError(
                f"{path}, line {line.number}: {line.name!r:.80} is already the class of line {known[line.name]}: give "
                "every class its own name"
            )
        known[line.name] = line.number
