"""What a plan must satisfy and what to optimise, and how a user writes it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from mess_compile.runtime.base.errors import InputError
from mess_compile.search.plan import FRONT_AXES, FRONT_BY, SETTINGS

OBJECTIVES = ("latency", "accuracy", "workload", "memory", "energy")
MAX_EXITS, DEFAULT_EXITS = 3, 2
_NUMBER = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_MOST = 1e12
"""Greater than any latency in ms, memory in bytes or other quantity in its unit."""
_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Limit:
    """An upper bound: `value` in the quantity's own unit, or as a share of the baseline's when `relative`.

    Raises InputError when it is not a positive number.
    """

    value: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise InputError(f"a bound of {self.value:g}{'x' if self.relative else ''} is not a positive number")

    def resolved(self, baseline: int, unit: float) -> int:
        """The bound in the integers that the search counts in: `unit` of them make one of `value`."""
        return round(self.value * (baseline if self.relative else unit))


@dataclass(frozen=True)
class ClassBound:
    """A bound on the IoU of the class `name`: at most `most_pp` percentage points below the baseline's, or below
    `baseline_iou` (percent) where that is given.

    Raises InputError when `most_pp` is not from 0 to 100.
    """

    name: str
    most_pp: float
    baseline_iou: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.most_pp <= 100:
            raise InputError(f"--max-class-err {self.name}={self.most_pp:g}%: give from 0% to 100%")


@dataclass(frozen=True)
class Requirement:
    """Bounds and objective of a search. None: not bounded.

    `max_err_pp` is in percentage points of mIoU below the baseline's; `max_latency` (mean over images),
    `max_latency_p95` (over images) and `max_latency_worst` (deepest path at p99) in ms or relative; `max_workload` in
    GMACs or relative; `max_energy` in mJ (mean over images) or relative; `baseline_miou` (percent) replaces the
    measured one. `objective` is latency unless given; the anytime setting has its own: the area under mIoU over time,
    or with `deadline_ms` the mIoU at that time. `max_change` is a percentage: the mean over images of the share of
    pixels that are labelled otherwise than by the network itself. `max_class_err` bounds the IoU of single classes.
    Raises InputError for values that contradict each other.
    """

    setting: str = "input-dependent"
    objective: str | None = None
    max_err_pp: float | None = None
    max_latency: Limit | None = None
    max_memory_bytes: int | None = None
    max_workload: Limit | None = None
    baseline_miou: float | None = None
    max_exits: int = DEFAULT_EXITS
    deadline_ms: float | None = None
    max_latency_p95: Limit | None = None
    max_latency_worst: Limit | None = None
    max_energy: Limit | None = None
    max_change: float | None = None
    max_class_err: tuple[ClassBound, ...] = ()

    def __post_init__(self) -> None:
        if self.setting not in SETTINGS:
            raise InputError(f"setting {self.setting!r} is not one of {', '.join(SETTINGS)}")
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise InputError(f"objective {self.objective!r} is not one of {', '.join(OBJECTIVES)}")
        if self.setting == "anytime" and self.objective is not None:
            raise InputError("the anytime setting optimises mIoU over time: give --deadline 20ms, not an objective")
        if self.setting != "anytime" and self.deadline_ms is not None:
            raise InputError(f"the {self.setting} setting has no deadline: use --max-latency, or the anytime setting")
        if self.setting == "anytime" and self.max_change is not None:
            raise InputError("the anytime setting has several results for each image: use --max-err, not --max-change")
        if self.setting == "anytime" and self.max_class_err:
            raise InputError("the anytime setting has several results for each image: leave --max-class-err out")
        names = [bound.name for bound in self.max_class_err]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"--max-class-err names {twice!r} twice: give one bound for each class")
        if not 0 <= self.max_exits <= MAX_EXITS:
            raise InputError(f"--max-exits {self.max_exits}: the search takes 0 to {MAX_EXITS} early exits")
        for name in ("max_err_pp", "max_change", "baseline_miou", "deadline_ms", "max_memory_bytes"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{name} is {value}: give a number that is not negative, or None for no bound")

    @property
    def early_exits(self) -> int:
        return 0 if self.setting == "budgeted" else self.max_exits

    def counts_from(self, baseline_miou: float) -> float:
        """The mIoU in percent that `max_err_pp` counts from, given the baseline's."""
        return baseline_miou if self.baseline_miou is None else self.baseline_miou

    @property
    def needs_energy(self) -> bool:
        """Whether it needs the energies of the latency table."""
        return self.objective == "energy" or self.max_energy is not None


def safer_max_err(asked_pp: float, lost_pp: float) -> float:
    """The `max_err_pp` to try next where `asked_pp`, above 0, was required and more was lost on other images."""
    safer = 2 * asked_pp - lost_pp
    return safer if safer > 0 else asked_pp / 4


def parse_max_err(text: str) -> float:
    """Percentage points from `1%`. Raises InputError."""
    value = _percent(text, "--max-err", "1% for one percentage point of mIoU below the baseline")
    if value > 100:
        raise InputError(f"--max-err {text}: no mIoU is more than 100 percentage points below another")
    return value


def parse_max_change(text: str) -> float:
    """A percentage of pixels from `3%`. Raises InputError."""
    value = _percent(text, "--max-change", f"{as_percentage(text, '3%')} for the pixels that may be labelled otherwise")
    if value > 100:
        raise InputError(f"--max-change {text}: no more than 100% of the pixels can be labelled otherwise")
    return value


def parse_class_bound(text: str) -> ClassBound:
    """A bound on one class from `crack=0.5%`. Raises InputError."""
    name, equals, value = text.rpartition("=")
    if not equals or not name.strip():
        raise InputError(f"--max-class-err {_shortened(text)!r} names no class: write crack=0.5%")
    example = f"{name.strip()}=0.5% for half a percentage point of this class's IoU below the baseline's"
    return ClassBound(name.strip(), _percent(value, f"--max-class-err {name.strip()}", example))


def parse_baseline(text: str) -> float:
    """An mIoU in percent from `54.24%`. Raises InputError."""
    value = _percent(text, "--baseline", "54.24% for the baseline's mIoU")
    if value > 100:
        raise InputError(f"--baseline {text}: an mIoU is at most 100%")
    return value


def parse_milliseconds(text: str, option: str = "--deadline") -> float:
    """Milliseconds from `20ms`. Raises InputError."""
    return _positive(text, ("ms",), option, "20ms")[0]


def parse_seconds(text: str, option: str = "--budget") -> float:
    """Seconds from `90s`, `30min` or `2h`. Raises InputError."""
    units = {"s": 1, "min": 60, "h": 3600}
    value, unit = _positive(text, units, option, f"30min (units: {', '.join(units)})")
    return value * units[unit]


def parse_max_latency(text: str, option: str = "--max-latency") -> Limit:
    """From `20ms`, or `0.5x` of the baseline's latency. Raises InputError."""
    return _limit(text, ("ms",), option, "20ms")


def parse_max_workload(text: str) -> Limit:
    """From `3.5` GMACs, or `0.5x` of the baseline's workload. Raises InputError."""
    return _limit(text, ("GMACs", "GMAC", ""), "--max-workload", "3.5 for 3.5 GMACs")


def parse_max_energy(text: str) -> Limit:
    """From `50mJ`, or `0.5x` of the baseline's energy. Raises InputError."""
    return _limit(text, ("mJ",), "--max-energy", "50mJ for 50 millijoules an image")


def parse_max_memory(text: str) -> int:
    """Bytes from `64MiB`. Raises InputError."""
    example = f"64MiB (units: {', '.join(_BYTES)})"
    value, unit = _positive(text, _BYTES, "--max-memory", example)
    return int(value * _BYTES[unit])


def parse_front(text: str) -> tuple[str, ...]:
    """The axes of the front, from `latency,miou,memory`. Raises InputError."""
    named = {name.strip() for name in text.split(",")}
    if not set(FRONT_BY) <= named <= set(FRONT_AXES):
        raise InputError(f"--front {text!r} is not understood: write {','.join(FRONT_BY)} or {','.join(FRONT_AXES)}")
    return tuple(axis for axis in FRONT_AXES if axis in named)


def _limit(text: str, units: Collection[str], option: str, example: str) -> Limit:
    example = f"{example}, or 0.5x of the baseline"
    value, unit = _positive(text, (*units, "x"), option, example)
    return Limit(value, relative=unit == "x")


def as_percentage(text: str, otherwise: str) -> str:
    """A number that lacks its % with it, for messages; `otherwise` where the text is none."""
    return f"{text.strip()}%" if re.fullmatch(_NUMBER, text.strip()) else otherwise


def _percent(text: str, option: str, example: str) -> float:
    match = re.fullmatch(rf"{_NUMBER} *%", text.strip())
    if match is None or float(match[1]) > _MOST:
        raise _refusal(text, option, example)
    return float(match[1])


def _positive(text: str, units: Collection[str], option: str, example: str) -> tuple[float, str]:
    """The number, and which of `units` follows it."""
    match = re.fullmatch(rf"{_NUMBER} *({'|'.join(units)})", text.strip())
    if match is None or not 0 < float(match[1]) <= _MOST:
        raise _refusal(text, option, example)
    return float(match[1]), match[2]


def _refusal(text: str, option: str, example: str) -> InputError:
    """What is wrong with a number, and how to write it."""
    comma = re.fullmatch(r"([0-9]+),([0-9]+)(.*)", text.strip())
    if comma is not None:
        point = f"{comma[1]}.{comma[2]}{comma[3]}"
        return InputError(f"{option} {_shortened(text)!r} has a decimal comma: write {_shortened(point)}")
    match = re.match(rf"(-?){_NUMBER}(.*)", text.strip())
    reason = "is not understood"
    if match is not None and match[1]:
        reason = "is negative"
    elif match is not None and not match[3]:
        reason = "has no unit"
    elif match is not None and float(match[2]) == 0:
        reason = "is not above zero"
    elif match is not None and float(match[2]) > _MOST:
        reason = "is too great"
    return InputError(f"{option} {_shortened(text)!r} {reason}: write {example}")


def _shortened(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[:most] + "..."
