"""Reads the TOML of another framework's model: its input, exit points and heads, by tensor name."""

from __future__ import annotations

import colorsys
import difflib
import math
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mess_compile import files
from mess_compile.graph.recompose_check import Array
from mess_compile.runtime.base.errors import InputError

SCALES = {"0-1": (0.0, 1.0), "0-255": (0.0, 255.0), "-1-1": (-1.0, 1.0)}
"""The values of the bytes 0 and 255, before mean and std."""
LAYOUTS = ("NCHW", "NHWC")
CHANNELS = ("RGB", "BGR", "GREY")
GREY = (0.299, 0.587, 0.114)
"""Weights of R, G and B in a model with one channel (ITU-R BT.601)."""
_HEAD_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_BACKGROUND = "background"
_REMEDY = "docs/own-network.md has an example"

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class InputRule:
    """How a frame, uint8 RGB (H, W, 3), becomes the model's input: (scaled - mean) / std, in the model's layout.

    `mean` and `std` are in units of the scale and in the order of `channels`, the first ones alone for "GREY", one
    channel; `tensor` None: the only input.
    """

    tensor: str | None
    scale: str
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    layout: str = "NCHW"
    channels: str = "RGB"

    @property
    def neutral(self) -> bool:
        """Whether the model's input is the frame itself."""
        unscaled = (self.scale, self.mean, self.std) == ("0-255", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return unscaled and self.layout == "NHWC" and self.channels == "RGB"

    @property
    def of_bytes(self) -> tuple[Array, Array]:
        """Mean and std f64 (3,) in units of a frame's bytes, in the order of `channels`."""
        low, high = SCALES[self.scale]
        step = (high - low) / 255
        mean: Array = (np.array(self.mean) - low) / step
        std: Array = np.array(self.std) / step
        return mean, std

    def hw(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of the model's input, from its shape."""
        return shape[self.layout.index("H")], shape[self.layout.index("W")]

    def of_frame(self, frame: Array) -> Array:
        """The model's input f32 (1, 3, H, W) or (1, H, W, 3), computed in float64, independent of the graph's nodes."""
        low, high = SCALES[self.scale]
        pixels = (frame[..., ::-1] if self.channels == "BGR" else frame).astype(np.float64)
        mean, std = np.array(self.mean), np.array(self.std)
        if self.channels == "GREY":
            pixels, mean, std = pixels @ np.array(GREY)[:, None], mean[:1], std[:1]
        values: Array = ((low + pixels * (high - low) / 255 - mean) / std).astype(np.float32)
        return values[None] if self.layout == "NHWC" else values.transpose(2, 0, 1)[None]


PREPROCESSING = {
    "imagenet": InputRule(None, "0-1", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0-1": InputRule(None, "0-1"),
    "-1-1": InputRule(None, "-1-1"),
    "0-255": InputRule(None, "0-255"),
    "caffe-bgr": InputRule(None, "0-255", (103.939, 116.779, 123.68), channels="BGR"),
}
"""How networks usually want a frame; in "caffe-bgr" the means are those of B, G and R."""


def read_input_rule(path: Path) -> InputRule:
    """Read the table [input] of the TOML file `path`. Raises InputError."""
    try:
        return _input(files.read_toml(path).get("input"))
    except (InputError, ValueError) as error:
        raise InputError(f"{path}: {error}; {_REMEDY}") from error


@dataclass(frozen=True)
class HeadRule:
    """A head begins at its exit point's tensor and ends at `logits`."""

    name: str
    logits: str


@dataclass(frozen=True)
class ExitRule:
    """An exit point: everything computed after it depends on `tensor` alone."""

    tensor: str
    heads: tuple[HeadRule, ...]


@dataclass(frozen=True)
class ExitsFile:
    """The whole file. `points` are in running order, the last is the final exit; `baseline` is a head there.

    `single`: the file names one class, which one channel separates from the background.
    """

    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    input: InputRule
    points: tuple[ExitRule, ...]
    baseline: str
    single: bool = False

    @property
    def heads(self) -> dict[str, HeadRule]:
        """Every head by its name in the candidate network, `exitN.NAME`."""
        points = enumerate(self.points, start=1)
        return {f"exit{number}.{head.name}": head for number, point in points for head in point.heads}


def read_exits(path: Path) -> ExitsFile:
    """Read the TOML file `path`. Raises InputError naming the entry, its value and the expected one."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: it must name the tensors of exit points and heads; {_REMEDY}")
    try:
        return _exits(files.read_toml(path))
    except (InputError, ValueError) as error:
        raise InputError(f"{path}: {error}; {_REMEDY}") from error


def nearest(name: str, known: list[str]) -> str:
    """The known names most like `name`, as the end of a message."""
    near = difflib.get_close_matches(name, known, 3, 0.4)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(known[:8])}"


def _exits(content: dict[str, Any]) -> ExitsFile:
    _table(content, "the file", ("classes", "input", "exit"), ("colours", "baseline"))
    classes = _classes(content["classes"])
    single = len(content["classes"]) == 1
    points = tuple(_point(point, number) for number, point in enumerate(_list(content["exit"], "exit"), start=1))
    return ExitsFile(
        classes=classes,
        colours=_colours(content.get("colours"), classes, single),
        input=_input(content["input"]),
        points=points,
        baseline=_baseline(content.get("baseline"), points),
        single=single,
    )


def _classes(value: Any) -> tuple[str, ...]:
    """Class names; a single one gets the background in front."""
    names = tuple(_text(name, "a name in classes") for name in _list(value, "classes"))
    if len(names) == 1:
        if names[0] == _BACKGROUND:
            raise InputError(f"classes is {_BACKGROUND!r} alone: name the class that the network finds")
        return (_BACKGROUND, *names)
    if not 2 <= len(names) <= 255 or len(set(names)) != len(names):
        raise InputError(
            f"classes has {len(names)} names, {len(set(names))} of them distinct: give 1 to 255 distinct names"
        )
    return names


def _colours(value: Any, classes: tuple[str, ...], single: bool) -> tuple[tuple[int, int, int], ...]:
    if value is None:
        return tuple(_made_up(index) for index in range(len(classes)))
    colours = _list(value, "colours")
    if single and len(colours) == 1:
        colours = [[0, 0, 0], *colours]
    if len(colours) != len(classes):
        raise InputError(f"colours has {len(colours)} entries for the classes {', '.join(classes)}")
    return tuple(_colour(colour) for colour in colours)


def _colour(value: Any) -> tuple[int, int, int]:
    channels = value if isinstance(value, list) else []
    if len(channels) != 3 or not all(type(part) is int and 0 <= part <= 255 for part in channels):
        raise InputError(f"a colour is {_as_text(value)}, not [R, G, B] of 0 to 255")
    return channels[0], channels[1], channels[2]


def _made_up(index: int) -> tuple[int, int, int]:
    """A colour, distinct for 255 classes and far apart for the first: hues a golden angle apart, three brightnesses."""
    parts = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, 1 - index % 3 * 0.25)
    red, green, blue = (round(255 * part) for part in parts)
    return red, green, blue


def _input(value: Any) -> InputRule:
    optional = ("tensor", "mean", "std", "layout", "channels")
    table = _table(value, "[input]", ("scale",), optional)
    rule = InputRule(
        tensor=_text(table["tensor"], "tensor of [input]") if "tensor" in table else None,
        scale=_choice(table["scale"], "scale of [input]", tuple(SCALES)),
        mean=_triple(table.get("mean", [0, 0, 0]), "mean of [input]"),
        std=_triple(table.get("std", [1, 1, 1]), "std of [input]"),
        layout=_choice(table.get("layout", "NCHW"), "layout of [input]", LAYOUTS),
        channels=_choice(table.get("channels", "RGB"), "channels of [input]", CHANNELS),
    )
    _check_units(rule)
    return rule


def _check_units(rule: InputRule) -> None:
    """Mean and std in units of another scale are a common mistake, which would only show as poor labels."""
    low, high = SCALES[rule.scale]
    if not all(low <= mean <= high for mean in rule.mean):
        raise InputError(f"mean of [input] is {rule.mean}, but scale is {rule.scale!r}: give mean and std in its units")
    smallest, largest = (1.0, math.inf) if rule.scale == "0-255" else (1e-6, high - low)
    if not all(smallest <= std <= largest for std in rule.std):
        raise InputError(f"std of [input] is {rule.std}, but scale is {rule.scale!r}: give mean and std in its units")


def _point(value: Any, number: int) -> ExitRule:
    where = f"[[exit]] {number}"
    table = _table(value, where, ("tensor", "head"))
    heads = tuple(_head(head, where) for head in _list(table["head"], f"[[exit.head]] of {where}"))
    names = [head.name for head in heads]
    if len(set(names)) != len(names):
        raise InputError(f"{where} has two heads of the same name among {', '.join(names)}")
    return ExitRule(_text(table["tensor"], f"tensor of {where}"), heads)


def _head(value: Any, where: str) -> HeadRule:
    table = _table(value, f"a head of {where}", ("name", "logits"))
    name = _text(table["name"], f"the name of a head of {where}")
    if not _HEAD_NAME.fullmatch(name):
        raise InputError(
            f"{where} has a head {_as_text(name)}: files are named after it, so give it 1 to 64 letters (A-Z), "
            "digits, '_', '-' and '.'"
        )
    return HeadRule(name, _text(table["logits"], f"logits of head {name!r} of {where}"))


def _baseline(value: Any, points: tuple[ExitRule, ...]) -> str:
    names = [head.name for head in points[-1].heads]
    name = names[0] if value is None else _text(value, "baseline").removeprefix(f"exit{len(points)}.")
    if name not in names:
        raise InputError(f"baseline is {_as_text(value)}, not a head of the last exit: {', '.join(names)}")
    return f"exit{len(points)}.{name}"


def _table(value: Any, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} is {_as_text(value)}, not a table of {', '.join(required)}")
    for key in value:
        if key not in (*required, *optional):
            raise InputError(f"{where} has an entry {_as_text(key)}: {nearest(key, [*required, *optional])}")
    for key in required:
        if key not in value:
            raise InputError(f"{where} lacks the entry {key!r}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} is {_as_text(value)}, not a list of one or more")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise InputError(f"{where} is {_as_text(value)}, not a text")
    return value


def _choice(value: Any, where: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise InputError(f"{where} is {_as_text(value)}, not one of {', '.join(map(repr, known))}")
    return str(value)


def _triple(value: Any, where: str) -> Triple:
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 3 or not all(type(part) in (int, float) and abs(part) <= 1e6 for part in numbers):
        raise InputError(f"{where} is {_as_text(value)}, not three numbers")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


def _as_text(value: Any) -> str:
    """A value from outside, short enough for a message."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return "a number of thousands of digits"
