"""Reads the TOML of another framework's model: its input, exit points and heads, by tensor name."""

from __future__ import annotations

import colorsys
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mess_compile import files
from mess_compile.array_types import Array
from mess_compile.runtime.base import decode
from mess_compile.runtime.base.errors import InputError

SCALES = {"0-1": (0.0, 1.0), "0-255": (0.0, 255.0), "-1-1": (-1.0, 1.0)}
"""The values of the bytes 0 and 255, before mean and std."""
LAYOUTS = ("NCHW", "NHWC")
CHANNELS = ("RGB", "BGR", "GREY")
GREY = (0.299, 0.587, 0.114)
"""Weights of R, G and B in a model with one channel (ITU-R BT.601)."""
_BACKGROUND = "background"
_REMEDY = "docs/own-network.md has an example"

Triple = tuple[float, float, float]
Colour = tuple[int, int, int]


def _are_numbers(value: Any) -> bool:
    parts = value if type(value) is list else []
    return len(parts) == 3 and all(type(part) in (int, float) and abs(part) <= 1e6 for part in parts)


def _is_colour(value: Any) -> bool:
    return type(value) is list and len(value) == 3 and all(type(part) is int and 0 <= part <= 255 for part in value)


def _is_text(value: Any) -> bool:
    return type(value) is str and bool(value.strip()) and value.isprintable()


_TEXT = decode.Check(_is_text, "text")
_SOME = decode.Check(lambda value: type(value) is list and bool(value), "a list of one or more")
_TRIPLE = decode.entry(check=decode.Check(_are_numbers, "three numbers"), optional=True)
_COLOUR = decode.Check(_is_colour, "[R, G, B] of 0 to 255")
_NAME = decode.matches(
    r"[A-Za-z0-9_.-]{1,64}", "1 to 64 letters (A-Z), digits, '_', '-' and '.': files are named after it"
)


@dataclass(frozen=True)
class InputRule:
    """How a frame, uint8 RGB (H, W, 3), becomes the model's input: (scaled - mean) / std, in the model's layout.

    `mean` and `std` are in units of the scale and in the order of `channels`, the first ones alone for "GREY", one
    channel; `tensor` None: the only input.
    """

    tensor: str | None = field(default=None, metadata=decode.entry(check=_TEXT, optional=True))
    scale: str = field(kw_only=True, metadata=decode.entry(check=decode.one_of(SCALES)))
    mean: Triple = field(default=(0.0, 0.0, 0.0), metadata=_TRIPLE)
    std: Triple = field(default=(1.0, 1.0, 1.0), metadata=_TRIPLE)
    layout: str = field(default="NCHW", metadata=decode.entry(check=decode.one_of(LAYOUTS), optional=True))
    channels: str = field(default="RGB", metadata=decode.entry(check=decode.one_of(CHANNELS), optional=True))

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
    "imagenet": InputRule(scale="0-1", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "0-1": InputRule(scale="0-1"),
    "-1-1": InputRule(scale="-1-1"),
    "0-255": InputRule(scale="0-255"),
    "caffe-bgr": InputRule(scale="0-255", mean=(103.939, 116.779, 123.68), channels="BGR"),
}
"""How networks usually want a frame; in "caffe-bgr" the means are those of B, G and R."""


def read_input_rule(path: Path) -> InputRule:
    """Read the table [input] of the TOML file `path`. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: it must hold a table [input]; {_REMEDY}")
    try:
        rule: InputRule = decode.decode(InputRule, files.read_toml(path).get("input"), "input", toml=True)
        _check_units(rule)
    except (InputError, ValueError, decode.DecodeError) as error:
        raise InputError(f"{path}: {error}; {_REMEDY}") from error
    return rule


@dataclass(frozen=True)
class HeadRule:
    """A head begins at its exit point's tensor and ends at `logits`."""

    name: str = field(metadata=decode.entry(check=_NAME))
    logits: str = field(metadata=decode.entry(check=_TEXT))


@dataclass(frozen=True)
class ExitRule:
    """An exit point: everything computed after it depends on `tensor` alone."""

    tensor: str = field(metadata=decode.entry(check=_TEXT))
    heads: tuple[HeadRule, ...] = field(metadata=decode.entry(key="head", check=_SOME))


@dataclass(frozen=True)
class ExitsFile:
    """The whole file. `points` are in running order, the last is the final exit; `baseline` is a head there.

    `single`: the file names one class, which one channel separates from the background.
    """

    classes: tuple[str, ...]
    colours: tuple[Colour, ...]
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
        document: _ExitsDocument = decode.decode(_ExitsDocument, files.read_toml(path), "", toml=True)
        return _exits(document)
    except (InputError, ValueError, decode.DecodeError) as error:
        raise InputError(f"{path}: {error}; {_REMEDY}") from error


def nearest(name: str, known: list[str]) -> str:
    """The known names most like `name`, as the end of a message."""
    near = difflib.get_close_matches(name, known, 3, 0.4)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(known[:8])}"


def _exits(document: _ExitsDocument) -> ExitsFile:
    classes, points = _classes(document.classes), document.exit
    _check_units(document.input)
    for number, point in enumerate(points, start=1):
        names = [head.name for head in point.heads]
        if len(set(names)) != len(names):
            raise InputError(f"exit[{number}] has two heads of the same name among {', '.join(names)}")
    single = len(document.classes) == 1
    return ExitsFile(
        classes=classes,
        colours=_colours(document.colours, classes, single),
        input=document.input,
        points=points,
        baseline=_baseline(document.baseline, points),
        single=single,
    )


def _classes(names: tuple[str, ...]) -> tuple[str, ...]:
    """Class names; a single one gets the background in front."""
    if len(names) == 1:
        if names[0] == _BACKGROUND:
            raise InputError(f"classes is {_BACKGROUND!r} alone: name the class that the network finds")
        return (_BACKGROUND, *names)
    if not 2 <= len(names) <= 255 or len(set(names)) != len(names):
        raise InputError(
            f"classes has {len(names)} names, {len(set(names))} of them distinct: give 1 to 255 distinct names"
        )
    return names


def _colours(colours: tuple[Colour, ...] | None, classes: tuple[str, ...], single: bool) -> tuple[Colour, ...]:
    if colours is None:
        return tuple(_made_up(index) for index in range(len(classes)))
    if single and len(colours) == 1:
        colours = ((0, 0, 0), *colours)
    if len(colours) != len(classes):
        raise InputError(f"colours has {len(colours)} entries for the classes {', '.join(classes)}")
    return colours


def _made_up(index: int) -> Colour:
    """A colour, distinct for 255 classes and far apart for the first: hues a golden angle apart, three brightnesses."""
    parts = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, 1 - index % 3 * 0.25)
    red, green, blue = (round(255 * part) for part in parts)
    return red, green, blue


def _check_units(rule: InputRule) -> None:
    """Mean and std in units of another scale are a common mistake, which would only show as poor labels."""
    low, high = SCALES[rule.scale]
    if not all(low <= mean <= high for mean in rule.mean):
        raise InputError(f"input.mean is {rule.mean}, but scale is {rule.scale!r}: give mean and std in its units")
    smallest, largest = (1.0, math.inf) if rule.scale == "0-255" else (1e-6, high - low)
    if not all(smallest <= std <= largest for std in rule.std):
        raise InputError(f"input.std is {rule.std}, but scale is {rule.scale!r}: give mean and std in its units")


def _baseline(given: str | None, points: tuple[ExitRule, ...]) -> str:
    names = [head.name for head in points[-1].heads]
    name = names[0] if given is None else given.removeprefix(f"exit{len(points)}.")
    if name not in names:
        raise InputError(f"baseline is {given!r}, not a head of the last exit: {', '.join(names)}")
    return f"exit{len(points)}.{name}"


@dataclass(frozen=True)
class _ExitsDocument:
    """The content of the file, by its own names."""

    classes: tuple[str, ...] = field(metadata=decode.entry(check=_SOME, each=_TEXT))
    input: InputRule
    exit: tuple[ExitRule, ...] = field(metadata=decode.entry(check=_SOME))
    colours: tuple[Colour, ...] | None = field(default=None, metadata=decode.entry(each=_COLOUR, optional=True))
    baseline: str | None = field(default=None, metadata=decode.entry(check=_TEXT, optional=True))
