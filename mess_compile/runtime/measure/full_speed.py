"""Checks by ticks whether the machine ran at full speed; a tick is a short run of one graph before or after a window.

A core of a shared or hot machine can be slower by half for seconds at a time. Times measured then do not compare with
times measured before.
"""

from __future__ import annotations

import time
from typing import Callable, List, Optional, Sequence

import numpy as np

from mess_compile.runtime.engines.engine import Timing

OFF = 0.10
"""A tick at full speed differs by at most this share; a window beside a tick that differs more is not used."""
_FULL_SPEED_SHARE = 1 / 3
"""The share of the time for which a speed must last to count as the full one."""

_FEWEST_RUNS, _MOST_RUNS = 2, 5


def tick_ms(run: Callable[[], Timing], limit_s: float, clock_ns: Callable[[], int] = time.perf_counter_ns) -> float:
    """The fastest of a few runs, two or more, within about `limit_s`: a burst of other work seldom hits them all."""
    times_ms: List[float] = []
    end_ns = clock_ns() + 1e9 * limit_s
    while len(times_ms) < _FEWEST_RUNS or (len(times_ms) < _MOST_RUNS and clock_ns() < end_ns):
        times_ms.append(run().wall_ms)
    return min(times_ms)


def full_speed_ms(ticks_ms: Sequence[float]) -> Optional[float]:
    """The time of a tick at full speed: the median of the ticks near the slowest of the fastest third; None without
    usable ticks.
    """
    if not ticks_ms:
        return None
    ticks = np.sort(ticks_ms)
    edge = ticks[int(_FULL_SPEED_SHARE * (len(ticks) - 1))]
    return float(np.median(ticks[np.abs(ticks - edge) <= OFF * edge])) or None


def is_full_speed(ticks_ms: Sequence[float], full_ms: Optional[float]) -> bool:
    """Whether times measured between these ticks may be used; without ticks they may."""
    return full_ms is None or all(abs(tick - full_ms) <= OFF * full_ms for tick in ticks_ms)


def is_slow(tick_ms: float, full_ms: Optional[float]) -> bool:
    return full_ms is not None and tick_ms > (1 + OFF) * full_ms


def factor(ticks_ms: Sequence[float], full_ms: Optional[float]) -> float:
    """The factor that scales times measured between these ticks to full speed."""
    mean = sum(ticks_ms) / len(ticks_ms) if ticks_ms else 0.0
    return full_ms / mean if full_ms and mean else 1.0
