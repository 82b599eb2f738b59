"""Figures that a plan is chosen by: one burst of other work, or a device that grows warm, must not decide it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mess_compile.runtime.errors import InputError
from mess_compile.runtime.profile import Effort, Window
from mess_compile.runtime.summary import drift, summarise


def rounds_of(*medians_ms: float) -> list[Window]:
    """A reference with these medians, round by round."""
    return [
        Window("reference", number, (0.9 * median, median, 1.1 * median)) for number, median in enumerate(medians_ms)
    ]


def test_a_summary_is_that_of_all_windows() -> None:
    summary = summarise([Window("a", 0, (1.0, 2.0, 3.0)), Window("a", 1, (4.0, 5.0))])
    assert (summary.mean_ms, summary.p50_ms, summary.runs) == (3.0, 3.0, 5)
    assert summary.p90_ms == pytest.approx(4.6)  # linear between the fourth and fifth of five
    assert summary.p95_ms == pytest.approx(4.8)
    assert summary.p99_ms == pytest.approx(4.96)
    assert summary.spread == pytest.approx((4.5 - 2.0) / 3.0)
    assert not summary.steady
    assert (summary.device_mean_ms, summary.power_mw) == (None, None)
    for empty in ([], [Window("a", 0, ())]):
        with pytest.raises(InputError, match="no samples"):
            summarise(empty)


def test_one_sample_that_other_work_fell_upon_does_not_make_the_mean() -> None:
    summary = summarise([Window("null", 0, (0.01,) * 98 + (0.1, 8.0))])
    assert summary.mean_ms == pytest.approx((98 * 0.01 + 0.1) / 99)
    assert summary.p99_ms > 0.1


def test_rounds_in_which_the_device_was_slow_are_brought_back() -> None:
    found = [Window("a", 0, (2.0, 2.0), (1.0, 1.0), 1000.0, 1.0), Window("a", 1, (2.2, 2.2), (1.1, 1.1), 2000.0, 3.0)]
    summary = summarise(found, {0: 1.0, 1: 1 / 1.1}, Effort(windows=2))
    assert summary.mean_ms == pytest.approx(2.0)
    assert summary.device_mean_ms == pytest.approx(1.0)
    assert summary.steady
    assert summary.spread == pytest.approx(0.0)
    assert summary.power_mw == pytest.approx(1750.0)  # by time
    assert summarise(found).mean_ms == pytest.approx(2.1)


def test_a_microsecond_makes_nothing_unsteady() -> None:
    """Else reading a count would be measured for all the seconds allowed, on any machine."""
    found = [Window("null", number, (median,)) for number, median in enumerate((0.005, 0.0055, 0.006))]
    assert summarise(found).steady
    assert not summarise([replace(each, wall_ms=(100 * each.wall_ms[0],)) for each in found]).steady


def test_a_device_that_slows_down_is_told_round_by_round() -> None:
    found = drift(rounds_of(10.0, 10.2, 10.4, 10.6, 10.8))
    assert not found.condemned
    assert found.spread == pytest.approx(0.8 / 10.4)
    wanted = {0: 10.4 / 10.1, 1: 1.0, 2: 1.0, 3: 10.4 / 10.7, 4: 10.4 / 10.8}  # 10.3 and 10.5 are within 1 % of 10.4
    assert found.factors == pytest.approx(wanted)


def test_one_burst_upon_the_reference_changes_nothing() -> None:
    for place in range(6):
        medians = [10.0] * 6
        medians[place] = 25.0
        found = drift(rounds_of(*medians))
        assert (found.spread, found.condemned) == (0.0, False)
        assert set(found.factors.values()) == {1.0}


def test_the_noise_of_the_reference_is_not_brought_into_every_job() -> None:
    found = drift(rounds_of(10.0, 10.3, 9.9, 10.4, 10.0, 10.2, 9.8, 10.3))
    assert set(found.factors.values()) == {1.0}
    assert 0 < found.spread < 0.1


def test_a_run_on_a_device_that_changed_by_more_than_a_tenth_is_condemned() -> None:
    found = drift(rounds_of(10.0, 10.0, 10.0, 11.2, 11.2, 11.2))
    assert found.condemned
    assert found.spread == pytest.approx(1.2 / 10.6)
    assert found.factors == dict.fromkeys(range(6), 1.0)
    assert not drift(rounds_of(10.0, 10.0, 10.0, 10.9, 10.9, 10.9)).condemned


def test_a_round_whose_reference_was_lost_lies_between_its_neighbours() -> None:
    windows = rounds_of(10.0, 10.2, 10.4, 10.6, 10.8)
    found = drift([windows[0], *windows[2:]])
    assert set(found.factors) == set(range(5))
    assert found.factors[0] == pytest.approx(10.5 / 10.1)  # the middle of the four that are left


def test_few_windows_of_the_reference_are_better_than_none() -> None:
    assert drift(rounds_of(10.0)).factors == {0: 1.0}
    assert drift(rounds_of(10.0, 12.0)).condemned
    with pytest.raises(InputError, match="no windows of the reference"):
        drift([])
