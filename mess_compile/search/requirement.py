"""What a plan must satisfy and what to optimise, and how a user writes it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mess_compile.runtime.errors import InputError
from mess_compile.search.plan import SETTINGS

OBJECTIVES = ("latency", "accuracy", "workload", "memory")
MAX_EXITS = 2
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Limit:
    """An upper bound: `value` in the quantity's own unit, or as a share of the baseline's when `relative`."""

    value: float
    relative: bool = False

    def resolved(self, baseline: int, unit: float) -> int:
        """The bound in the integers the search counts in: `unit` of them make up one of `value`."""
        return round(self.value * (baseline if self.relative else unit))


@dataclass(frozen=True)
class Requirement:
    """Bounds and objective of a search. None: not bounded.

    `max_err_pp` is in percentage points of mIoU below the baseline's; `max_latency` in ms or relative (mean over
    images); `max_workload` in GMACs or relative; `baseline_miou` (percent) replaces the measured one. `objective` is
    latency unless given; the anytime setting has its own: the area under mIoU over time, or with `deadline_ms` the
    mIoU at that time. Raises InputError for values that contradict each other.
    """

    setting: str = "input-dependent"
    objective: str | None = None
    max_err_pp: float | None = None
    max_latency: Limit | None = None
    max_memory_bytes: int | None = None
    max_workload: Limit | None = None
    baseline_miou: float | None = None
    max_exits: int = MAX_EXITS
    deadline_ms: float | None = None

    def __post_init__(self) -> None:
        if self.setting not in SETTINGS:
            raise InputError(f"setting {self.setting!r} is not one of {', '.join(SETTINGS)}")
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise InputError(f"objective {self.objective!r} is not one of {', '.join(OBJECTIVES)}")
        if self.setting == "anytime" and self.objective is not None:
            raise InputError("the anytime setting optimises mIoU over time: give --deadline 20ms, not an objective")
        if self.setting != "anytime" and self.deadline_ms is not None:
            raise InputError(f"a deadline means nothing in the {self.setting} setting: use --max-latency or anytime")
        if not 0 <= self.max_exits <= MAX_EXITS:
            raise InputError(f"--max-exits {self.max_exits}: the search takes 0 to {MAX_EXITS} early exits")

    @property
    def early_exits(self) -> int:
        return 0 if self.setting == "budgeted" else self.max_exits


def parse_max_err(text: str) -> float:
    """Percentage points from `1%`. Raises InputError."""
    return _percent(text, "--max-err", "1% for one percentage point of mIoU below the baseline")


def parse_baseline(text: str) -> float:
    """An mIoU in percent from `54.24%`. Raises InputError."""
    value = _percent(text, "--baseline", "54.24% for the baseline's mIoU")
    if value > 100:
        raise InputError(f"--baseline {text}: an mIoU is at most 100%")
    return value


def parse_milliseconds(text: str, option: str = "--deadline") -> float:
    """Milliseconds from `20ms`. Raises InputError."""
    return _positive(text, rf"{_NUMBER}\s*ms", option, "20ms")


def parse_seconds(text: str, option: str = "--budget") -> float:
    """Seconds from `90s`, `30min` or `2h`. Raises InputError."""
    match = re.fullmatch(rf"{_NUMBER}\s*(s|min|h)", text.strip())
    if match is None or not _usable(match[1]):
        raise InputError(f"{option} {text!r} is not understood: write 30min (units: s, min, h)")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]


def parse_max_latency(text: str) -> Limit:
    """From `20ms`, or `0.5x` of the baseline's latency. Raises InputError."""
    if text.strip().endswith("x"):
        return Limit(_positive(text, rf"{_NUMBER}\s*x", "--max-latency", "0.5x of the baseline"), relative=True)
    return Limit(_positive(text, rf"{_NUMBER}\s*ms", "--max-latency", "20ms, or 0.5x of the baseline"))


def parse_max_workload(text: str) -> Limit:
    """From `3.5` GMACs, or `0.5x` of the baseline's workload. Raises InputError."""
    if text.strip().endswith("x"):
        return Limit(_positive(text, rf"{_NUMBER}\s*x", "--max-workload", "0.5x of the baseline"), relative=True)
    return Limit(_positive(text, _NUMBER, "--max-workload", "3.5 for 3.5 GMACs, or 0.5x of the baseline"))


def parse_max_memory(text: str) -> int:
    """Bytes from `64MiB`. Raises InputError."""
    match = re.fullmatch(rf"{_NUMBER}\s*({'|'.join(_BYTES)})", text.strip())
    if match is None or not _usable(match[1]):
        raise InputError(f"--max-memory {text!r} is not understood: write 64MiB (units: {', '.join(_BYTES)})")
    return int(float(match[1]) * _BYTES[match[2]])


def _percent(text: str, option: str, example: str) -> float:
    match = re.fullmatch(rf"{_NUMBER}\s*%", text.strip())
    if match is None:
        raise InputError(f"{option} {text!r} is not understood: write {example}")
    return float(match[1])


def _positive(text: str, pattern: str, option: str, example: str) -> float:
    match = re.fullmatch(pattern, text.strip())
    if match is None or not _usable(match[1]):
        raise InputError(f"{option} {text!r} is not understood: write {example}")
    return float(match[1])


def _usable(number: str) -> bool:
    return 0 < float(number) < math.inf
