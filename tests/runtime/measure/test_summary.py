"""Figures that a plan is chosen by: one burst of other work, or a device that grows warm, must not decide it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.measure.measure import Effort, Window
from mess_compile.runtime.measure.summary import Speed, speed, summarise


def between(*ticks_ms: float, wall_ms: float = 1.0, spent_s: float = 0.1) -> Window:
    return Window("a", 0, (wall_ms,), spent_s=spent_s, ticks_ms=ticks_ms)


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


def test_a_stall_does_not_make_the_mean() -> None:
    summary = summarise([Window("head", 0, (3.0,) * 98 + (8.9, 80.0))])
    assert summary.mean_ms == pytest.approx((98 * 3.0 + 8.9) / 99)
    assert summary.p99_ms > 8.9


def test_windows_beside_a_slow_tick_do_not_count() -> None:
    usual = [between(10.0, 10.0, wall_ms=2.0)] * 3
    slow = [between(*ticks, wall_ms=3.5) for ticks in ((10.0, 18.0), (18.0, 10.0), (18.0, 18.0), (8.0, 10.0))]
    summary = summarise([*slow, *usual], 10.0)
    assert (summary.mean_ms, summary.runs, summary.steady) == (2.0, 3, True)
    assert summary.p99_ms == 2.0


def test_a_window_is_brought_to_full_speed() -> None:
    found = [
        Window("a", 0, (2.0, 2.0), (1.0, 1.0), 1000.0, 1.0, (10.0, 10.0)),
        Window("a", 1, (2.1, 2.1), (1.05, 1.05), 2000.0, 3.0, (10.2, 10.8)),
    ]
    summary = summarise(found, 10.0, Effort(windows=2))
    assert summary.mean_ms == pytest.approx(2.0)
    assert summary.device_mean_ms == pytest.approx(1.0)
    assert summary.steady
    assert summary.spread == pytest.approx(0.0)
    assert summary.power_mw == pytest.approx(1750.0)  # by time
    assert summarise(found).mean_ms == pytest.approx(2.05)


def test_a_job_without_enough_windows_at_full_speed_has_a_figure_and_is_not_steady() -> None:
    """Each by its ticks: twice as long where they took twice as long."""
    found = [between(10.0, 10.0, wall_ms=2.0), *[between(20.0, 20.0, wall_ms=4.0)] * 4]
    summary = summarise(found, 10.0)
    assert summary.mean_ms == pytest.approx(2.0)
    assert summary.runs == 5
    assert not summary.steady


def test_a_microsecond_makes_nothing_unsteady() -> None:
    """Else reading a count would be measured for all the seconds allowed, on any machine."""
    found = [Window("null", number, (median,)) for number, median in enumerate((0.005, 0.0055, 0.006))]
    assert summarise(found).steady
    assert not summarise([replace(each, wall_ms=(100 * each.wall_ms[0],)) for each in found]).steady


def test_how_often_the_machine_was_slow_and_how_much_is_told() -> None:
    usual = [between(10.0, 10.1, spent_s=0.2)] * 20
    slow = [between(10.0, 18.0, spent_s=0.3), between(19.0, 18.5, spent_s=0.5)]
    waited = replace(usual[0], waited_s=1.2, waited_tick_ms=17.0)
    found = speed([*usual, *slow, waited])
    assert found.full_ms == pytest.approx(10.0, rel=0.01)
    assert found.slow_share == pytest.approx((0.3 / 2 + 0.5 + 1.2) / (4.0 + 0.8 + 0.2 + 1.2))
    assert found.slow_by == pytest.approx(1.85)


def test_a_machine_that_never_was_slow_is_told_so() -> None:
    assert speed([between(10.0, 10.5), between(10.5, 9.9)]).slow_share == 0.0
    assert speed([Window("a", 0, (1.0,), spent_s=1.0)]) == Speed(None, 0.0, 1.0)
