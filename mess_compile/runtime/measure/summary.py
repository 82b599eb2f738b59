"""Summarises the windows of a measurement as figures, and the machine's speed from its ticks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Sequence

import numpy as np

from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.measure import full_speed
from mess_compile.runtime.measure.measure import (
    Effort,
    Window,
    at_full_speed,
    full_speed_ms,
    is_steady,
    scaled_medians_ms,
)

_USUAL = Effort()
STALLED = 3.0
"""A sample of so many times the median is attributed to other work that hit this job by chance."""


@dataclass(frozen=True)
class Summary:
    """Figures of one job, in wall time except `device_mean_ms`; `runs` counts the samples.

    `spread` is the range of the windows' medians, as a share of the overall median; `steady` is about the last windows
    alone. All figures are from windows at full speed; a job that is not steady may have too few, then from all.
    """

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    runs: int
    spread: float
    steady: bool
    device_mean_ms: Optional[float]
    power_mw: Optional[float]


def summarise(windows: Sequence[Window], full_ms: Optional[float] = None, effort: Effort = _USUAL) -> Summary:
    """Figures over all windows of one job at full speed, each scaled to it. Raises InputError without samples.

    All of these count, not only the last steady ones: measuring stopped because those agreed, so they are the quiet
    ones, and the sum of such means lies below what a cascade takes among bursts of other work (in simulations by 4.7 %
    instead of 2.7 % where bursts fill 15 % of the time). Means exclude samples beyond three medians: a core that is
    taken away for 100 ms would outweigh all runs of a job of 3 ms. Percentiles exclude nothing.
    """
    if not windows or not all(window.wall_ms for window in windows):
        raise InputError("there are no samples to summarise")
    used = at_full_speed(windows, full_ms)
    counted = used if len(used) >= effort.windows else windows
    scales = [full_speed.factor(window.ticks_ms, full_ms) for window in counted]
    wall_ms = np.concatenate([np.array(window.wall_ms) * scale for window, scale in zip(counted, scales)])
    device_ms = np.concatenate([np.array(window.device_ms) * scale for window, scale in zip(counted, scales)])
    medians_ms = scaled_medians_ms(counted, full_ms)
    p50, p90, p95, p99 = (float(value) for value in np.percentile(wall_ms, (50, 90, 95, 99)))
    return Summary(
        mean_ms=mean_without_stalls(wall_ms),
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        runs=len(wall_ms),
        spread=(max(medians_ms) - min(medians_ms)) / p50 if p50 else 0.0,
        steady=counted is used and is_steady(medians_ms[-effort.windows :], effort),
        device_mean_ms=mean_without_stalls(device_ms) if len(device_ms) == len(wall_ms) else None,
        power_mw=_mean_power(counted),
    )


def mean_without_stalls(samples_ms: np.ndarray) -> float:
    return float(samples_ms[samples_ms <= STALLED * np.median(samples_ms)].mean())


def _mean_power(windows: Sequence[Window]) -> Optional[float]:
    readings = [(window.power_mw, window.spent_s) for window in windows if window.power_mw is not None]
    seconds = sum(spent_s for _, spent_s in readings)
    return sum(power_mw * spent_s for power_mw, spent_s in readings) / seconds if seconds else None


@dataclass(frozen=True)
class Speed:
    """The machine's speed: a tick at full speed, the share of the time in which the machine was slower, and by how
    much.

    `slow_by` is the median factor by which ticks took longer then; 1 if the machine never was slower.
    """

    full_ms: Optional[float]
    slow_share: float
    slow_by: float


def speed(windows: Sequence[Window]) -> Speed:
    """Over all windows of a measurement, and the waiting before them."""
    full_ms = full_speed_ms(windows)
    slow_s, slow_ms = 0.0, []
    for window in windows:
        slow = [tick for tick in window.ticks_ms if full_speed.is_slow(tick, full_ms)]
        slow_ms += slow
        slow_s += window.spent_s * len(slow) / max(1, len(window.ticks_ms))
        if full_speed.is_slow(window.waited_tick_ms or 0.0, full_ms):
            slow_s += window.waited_s
    total_s = sum(window.spent_s + window.waited_s for window in windows)
    by = float(np.median(slow_ms)) / full_ms if slow_ms and full_ms else 1.0
    return Speed(full_ms, slow_s / total_s if total_s else 0.0, by)
