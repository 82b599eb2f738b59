"""Whether the machine was at full speed: ticks, short runs of one graph before and after all that is timed, tell it.

A core of a shared host, or one that is hot, is slower by half for seconds at a time. What is timed then belongs to
another machine than what was timed before.
"""

from __future__ import annotations

import time
from typing import Callable, List, Optional, Sequence

import numpy as np

from mess_compile.runtime.engines.engine import Timing

OFF = 0.10
"""Share by which a tick may differ from one at full speed; what was timed beside one that differs more is not used."""
_FULL_SPEED_SHARE = 1 / 3
"""Share of the time for which a speed must be kept to be called the full one."""

_FEWEST_RUNS, _MOST_RUNS = 2, 5


def tick_ms(run: Callable[[], Timing], limit_s: float, clock_ns: Callable[[], int] = time.perf_counter_ns) -> float:
    """The fastest of a few runs, two or more, within about `limit_s`: a burst of other work seldom hits them all."""
    times_ms: List[float] = []
    end_ns = clock_ns() + 1e9 * limit_s
    while len(times_ms) < _FEWEST_RUNS or (len(times_ms) < _MOST_RUNS and clock_ns() < end_ns):
        times_ms.append(run().wall_ms)
    return min(times_ms)


def full_speed_ms(ticks_ms: Sequence[float]) -> Optional[float]:
    """A tick at full speed: the middle of those about the fastest third's slowest; None without ticks that tell."""
    if not ticks_ms:
        return None
    ticks = np.sort(ticks_ms)
    edge = ticks[int(_FULL_SPEED_SHARE * (len(ticks) - 1))]
    return float(np.median(ticks[np.abs(ticks - edge) <= OFF * edge])) or None


def is_full_speed(ticks_ms: Sequence[float], full_ms: Optional[float]) -> bool:
    """Whether what stands between these ticks may be used; without ticks there is nothing against it."""
    return full_ms is None or all(abs(tick - full_ms) <= OFF * full_ms for tick in ticks_ms)


def is_slow(tick_ms: float, full_ms: Optional[float]) -> bool:
    return full_ms is not None and tick_ms > (1 + OFF) * full_ms


def factor(ticks_ms: Sequence[float], full_ms: Optional[float]) -> float:
    """What brings times measured between these ticks to full speed."""
    mean = sum(ticks_ms) / len(ticks_ms) if ticks_ms else 0.0
    return full_ms / mean if full_ms and mean else 1.0
