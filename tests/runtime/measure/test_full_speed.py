"""Which speed of a machine counts as its own: else one graph is told at one speed, and the next at another."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mess_compile.runtime.engines.engine import Timing
from mess_compile.runtime.measure.full_speed import factor, full_speed_ms, is_full_speed, is_slow, tick_ms


@pytest.mark.parametrize(("share", "expected"), [(0.0, 10.0), (0.2, 10.0), (0.6, 10.0), (0.75, 18.0), (1.0, 18.0)])
def test_full_speed_is_the_fastest_that_is_kept_for_a_third_of_the_time(share: float, expected: float) -> None:
    rng = random.Random(0)
    ticks = [rng.gauss(18.0 if place < share * 400 else 10.0, 0.15) for place in range(400)]
    rng.shuffle(ticks)
    assert full_speed_ms(ticks) == pytest.approx(expected, rel=0.02)


def test_a_few_lucky_ticks_are_not_full_speed() -> None:
    assert full_speed_ms([5.0] * 10 + [10.0] * 30) == 10.0


def test_without_ticks_that_tell_everything_counts() -> None:
    assert full_speed_ms([]) is None
    assert full_speed_ms([0.0, 0.0]) is None
    assert is_full_speed((3.0, 90.0), None)
    assert not is_slow(90.0, None)
    assert is_full_speed((), 10.0)
    assert (factor((), 10.0), factor((3.0,), None)) == (1.0, 1.0)


def test_both_ticks_must_be_within_a_tenth() -> None:
    assert is_full_speed((9.1, 10.9), 10.0)
    for ticks in ((11.1, 10.0), (10.0, 11.1), (8.9, 10.0)):
        assert not is_full_speed(ticks, 10.0)
    assert is_slow(11.1, 10.0)
    assert not is_slow(8.0, 10.0)


@given(ticks=st.lists(st.floats(0.01, 1e4), min_size=1, max_size=60))
def test_some_tick_is_at_full_speed(ticks: list[float]) -> None:
    full = full_speed_ms(ticks)
    assert full is not None
    assert min(ticks) <= full <= max(ticks)
    assert any(abs(tick - full) <= 0.11 * full for tick in ticks)


def test_a_tick_is_the_fastest_of_a_few_runs() -> None:
    times, now = [30.0, 7.0, 9.0, 1.0, 15.0], 0

    def clock() -> int:
        return now

    def run() -> Timing:
        nonlocal now
        now += int(times[0] * 1e6)
        return Timing(times.pop(0))

    assert tick_ms(run, 0.02, clock) == 7.0  # the first took all the time there is, and a second one is due
    assert tick_ms(run, 0.02, clock) == 1.0
    assert not times
