"""`classes.txt`: the class names of a data set, in the order of label values, with colours and void."""

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
    """Class names and colours by label value; `ignored` label values count nowhere.

    `is_coloured`: the colours are the data set's own, so that labels in colours can be looked up; `void_colours` are
    those that count nowhere. With a `label_offset` of N the first class has the label value N, and smaller ones are
    void.
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
    """What a line says: a name with or without colour, or a void value or colour, which has no name."""

    number: int
    name: str
    numbers: tuple[int, ...]


def read_class_list(path: Path) -> ClassList:
    """Read lines `NAME` or `NAME R G B`, in the order of label values; a line `ignore VALUE` names a void label value,
    `ignore R G B` a void colour. What follows a `#` is a comment, where it begins a word.

    Raises InputError naming file and line for what is not such a list in UTF-8.
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
        raise InputError(f"{path} lists {len(classes)} classes: 2 to {ALWAYS_IGNORED} are possible, one name a line")
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
    """The line, None for one that says nothing."""

    def refuse(reason: str) -> NoReturn:
        raise InputError(f"{path}, line {number}: {text.strip()!r:.80} {reason}")

    plain = _COMMENT.sub("", text).strip()
    if not plain:
        return None
    if _HEX_COLOUR.search(text):
        refuse("has a colour in hexadecimal: write it as three numbers of 0 to 255, NAME R G B")
    words = plain.split()
    numbers = _numbers_at_end(words)
    if words[0] == "ignore":
        if len(words) - 1 != len(numbers) or len(numbers) not in (1, 3) or max(numbers) > 255:
            refuse(f"is not {FORM}, with numbers of 0 to 255")
        return _Line(number, "", numbers)
    if len(numbers) not in (0, 3):
        refuse(
            f"ends in {len(numbers)} number{'s' * (len(numbers) > 1)}, and is not {FORM}: give a name that ends in "
            "a number its colour as well"
        )
    if numbers and max(numbers) > 255:
        refuse(f"has a colour beyond 255: it is not {FORM}")
    name = " ".join(words[: len(words) - len(numbers)])
    _check_name(name, refuse, is_first)
    return _Line(number, name, numbers)


def _numbers_at_end(words: list[str]) -> tuple[int, ...]:
    """At most three; a longer one than any colour has counts as 256."""
    count = 0
    while count < 3 and count < len(words) - 1 and words[-1 - count].isascii() and words[-1 - count].isdecimal():
        count += 1
    return tuple(int(word) if len(word) <= 3 else 256 for word in words[len(words) - count :])


def _check_name(name: str, refuse: Callable[[str], NoReturn], is_first: bool) -> None:
    """Raises InputError for what is a line of another kind of file rather than a name."""
    if "," in name or ";" in name:
        refuse(f"looks like a table (CSV): write {FORM}, separated by spaces, and no header")
    columns = {word.casefold() for word in re.split(r"[\s:_]+", name)}
    if is_first and columns <= _COLUMNS and columns & _HEADERS:
        refuse(f"looks like a header, and would be the first class: leave it out; every line is {FORM}")
    if _NUMBERED.match(name):
        refuse("begins with a number: leave it out, the order of lines says the label value")
    if name.startswith(_MARKS):
        refuse(f"does not begin with a name: write {FORM}; comments begin with #")
    found = _FOREIGN.search(name)
    if found or name.endswith((":", "'")):
        refuse(f"has {found[0] if found else name[-1]!r} in it: write the name as it is, without quotes or escapes")
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Co", "Cn") for letter in name):
        refuse("has characters that cannot be seen: type the name again")


def _check_distinct(path: Path, lines: list[_Line]) -> None:
    known: dict[str, int] = {}
    for line in lines:
        if line.name in known:
            raise InputError(
                f"{path}, line {line.number}: {line.name!r:.80} is the class of line {known[line.name]} already: "
                "every class has its own name"
            )
        known[line.name] = line.number
