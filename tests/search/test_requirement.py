"""A requirement is read the way a user means it, or refused with an example of how to write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mess_compile.runtime.base.errors import InputError
from mess_compile.search.requirement import (
    ClassBound,
    Limit,
    Requirement,
    parse_baseline,
    parse_class_bound,
    parse_front,
    parse_max_energy,
    parse_max_err,
    parse_max_latency,
    parse_max_memory,
    parse_max_workload,
    parse_milliseconds,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_max_err, "1%", 1.0),
        (parse_max_err, " 0.1 % ", 0.1),
        (parse_max_err, "0%", 0.0),
        (parse_baseline, "54.24%", 54.24),
        (parse_class_bound, "crack=0.5%", ClassBound("crack", 0.5)),
        (parse_class_bound, "a=b = 2 %", ClassBound("a=b", 2.0)),
        (parse_milliseconds, "20ms", 20.0),
        (parse_max_latency, "20 ms", Limit(20.0)),
        (parse_max_latency, "0.5x", Limit(0.5, relative=True)),
        (parse_max_latency, ".5x", Limit(0.5, relative=True)),
        (parse_max_workload, "3.5", Limit(3.5)),
        (parse_max_workload, "1x", Limit(1.0, relative=True)),
        (parse_max_memory, "64MiB", 67108864),
        (parse_max_memory, "1.5 GB", 1500000000),
        (parse_max_workload, "3.5 GMACs", Limit(3.5)),
        (parse_max_energy, "50mJ", Limit(50.0)),
        (parse_max_energy, "0.5x", Limit(0.5, relative=True)),
        (parse_max_memory, "512B", 512),
        (parse_seconds, "90s", 90.0),
        (parse_seconds, "1.5 h", 5400.0),
        (parse_front, "memory, miou,latency", ("latency", "miou", "memory")),
    ],
)
def test_values_are_read_in_their_units(parse: Callable[[str], Any], text: str, value: Any) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "example"),
    [
        (parse_max_err, "1", "has no unit: write 1% for one percentage point of mIoU"),
        (parse_max_err, "-1", "is negative: write 1%"),
        (parse_class_bound, "crack", "names no class: write crack=0.5%"),
        (parse_class_bound, "=1%", "names no class: write crack=0.5%"),
        (parse_class_bound, "crack=0.5", "--max-class-err crack '0.5' has no unit: write crack=0.5%"),
        (parse_class_bound, "crack=101%", "--max-class-err crack=101%: give from 0% to 100%"),
        (parse_max_err, "-1%", "is negative: write 1%"),
        (parse_max_err, "nan%", "write 1%"),
        (parse_baseline, "154%", "at most 100%"),
        (parse_baseline, "0.5424", "write 54.24%"),
        (parse_milliseconds, "20", "write 20ms"),
        (parse_milliseconds, "2s", "write 20ms"),
        (parse_max_latency, "20", "write 20ms, or 0.5x of the baseline"),
        (parse_max_latency, "0ms", "write 20ms"),
        (parse_max_latency, "1" + "0" * 400 + "ms", "write 20ms"),
        (parse_max_latency, "-1x", "is negative: write 20ms, or 0.5x"),
        (parse_max_latency, "inf ms", "is not understood: write 20ms"),
        (parse_max_energy, "50", "has no unit: write 50mJ for 50 millijoules"),
        (parse_max_energy, "0x", "is not above zero: write 50mJ"),
        (parse_seconds, "60", "has no unit: write 30min (units: s, min, h)"),
        (parse_front, "memory", "write latency,miou or latency,miou,memory"),
        (parse_front, "latency,miou,beauty", "write latency,miou or latency,miou,memory"),
        (parse_max_workload, "3.5 GFLOPs", "write 3.5 for 3.5 GMACs"),
        (parse_max_memory, "64", "write 64MiB"),
        (parse_max_memory, "64mb", "write 64MiB"),
        (parse_max_memory, "0MiB", "write 64MiB"),
    ],
)
def test_what_is_not_understood_is_refused_with_an_example(
    parse: Callable[[str], Any], text: str, example: str
) -> None:
    with pytest.raises(InputError) as refusal:
        parse(text)
    assert example in str(refusal.value)


def test_limits_become_integers_in_the_units_of_the_search() -> None:
    assert Limit(20.1).resolved(baseline=7, unit=1e6) == 20_100_000
    assert Limit(0.5, relative=True).resolved(baseline=1_000_000, unit=1e6) == 500_000


@pytest.mark.parametrize(
    "fields",
    [
        {"setting": "sometimes"},
        {"objective": "beauty"},
        {"setting": "anytime", "objective": "latency"},
        {"deadline_ms": 20.0},
        {"max_exits": 4},
        {"max_exits": -1},
        {"max_err_pp": -1.0},
        {"max_err_pp": float("nan")},
        {"baseline_miou": float("inf")},
        {"max_memory_bytes": -1},
    ],
)
def test_contradictory_requirements_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Requirement(**fields)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_is_no_positive_number_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="is not a positive number"):
        Limit(value)


@pytest.mark.parametrize(
    ("parse", "text", "meant"),
    [
        (parse_max_err, "0,5%", "0.5%"),
        (parse_milliseconds, "20,5ms", "20.5ms"),
        (parse_max_latency, "0,5x", "0.5x"),
        (parse_max_workload, "3,5", "3.5"),
        (parse_max_memory, "1,5 GB", "1.5 GB"),
        (parse_seconds, "1,5h", "1.5h"),
        (parse_baseline, "54,24%", "54.24%"),
    ],
)
def test_a_decimal_comma_is_named_for_what_it_is(parse: Callable[[str], Any], text: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"'{text}' has a decimal comma: write {meant}$"):
        parse(text)
