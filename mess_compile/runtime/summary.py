"""From the windows of a measurement to its figures, and what the reference job tells of the device's drift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Mapping, Optional, Sequence

import numpy as np

from mess_compile.runtime.errors import InputError
from mess_compile.runtime.profile import Effort, Window, is_steady

CONDEMNED = 0.10
"""Share by which the reference may differ from round to round; beyond it no factor makes a run believable."""
_USUAL = Effort()
_NEGLIGIBLE = 0.01
_FOREIGN = 10.0
"""Times the median from which a sample is put down to other work that fell on this job by chance."""


@dataclass(frozen=True)
class Summary:
    """Figures of one job, in wall time but for `device_mean_ms`; `runs` counts the samples.

    `spread` is how far the windows' medians lie apart, as a share of the overall median; `steady` is said of the last
    windows alone.
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


def summarise(
    windows: Sequence[Window], factors: Optional[Mapping[int, float]] = None, effort: Effort = _USUAL
) -> Summary:
    """Figures over all windows of one job, each multiplied by its round's factor. Raises InputError without samples.

    All windows count, not the last steady ones alone: those were stopped at because they agreed, so they are the quiet
    ones, and the sum of such means lies below what a cascade takes among bursts of other work (in simulations by 4.7 %
    instead of 2.7 % where bursts fill 15 % of the time). Means leave out samples beyond ten medians: one of 10 ms would
    outweigh all that a job of 10 us has, while no plan's mean moves by it. Percentiles leave out nothing.
    """
    if not windows or not all(window.wall_ms for window in windows):
        raise InputError("there are no samples to summarise")
    scales = [(factors or {}).get(window.round, 1.0) for window in windows]
    wall_ms = np.concatenate([np.array(window.wall_ms) * scale for window, scale in zip(windows, scales)])
    device_ms = np.concatenate([np.array(window.device_ms) * scale for window, scale in zip(windows, scales)])
    medians_ms = [window.median_ms * scale for window, scale in zip(windows, scales)]
    p50, p90, p95, p99 = (float(value) for value in np.percentile(wall_ms, (50, 90, 95, 99)))
    return Summary(
        mean_ms=_mean(wall_ms),
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        runs=len(wall_ms),
        spread=(max(medians_ms) - min(medians_ms)) / p50 if p50 else 0.0,
        steady=is_steady(medians_ms[-effort.windows :], effort),
        device_mean_ms=_mean(device_ms) if len(device_ms) == len(wall_ms) else None,
        power_mw=_mean_power(windows),
    )


def _mean(samples_ms: np.ndarray) -> float:
    return float(samples_ms[samples_ms <= _FOREIGN * np.median(samples_ms)].mean())


def _mean_power(windows: Sequence[Window]) -> Optional[float]:
    told = [(window.power_mw, window.spent_s) for window in windows if window.power_mw is not None]
    seconds = sum(spent_s for _, spent_s in told)
    return sum(power_mw * spent_s for power_mw, spent_s in told) / seconds if seconds else None


@dataclass(frozen=True)
class Drift:
    """What the reference tells: the factor for each round's samples, and whether no factor would make them believable.

    `spread` is how far the reference's levels lie apart, as a share of their middle.
    """

    factors: Mapping[int, float]
    spread: float
    condemned: bool


def drift(windows_of_reference: Sequence[Window]) -> Drift:
    """How the device drifted from round to round. Raises InputError without a window.

    A round's level lies midway between the reference's median at its beginning and at the next one's. What clocks and
    heat do lasts for rounds, while a burst of other work hits one window and few of the jobs beside it: single outliers
    are smoothed away. A level is corrected only where it differs from the middle by more than 1 %, and by more than
    twice what the medians scatter about the lines through their neighbours: a factor brings the reference's own noise
    into every job. Levels that spread beyond `CONDEMNED` condemn the run, with all factors 1.
    """
    ordered = sorted(windows_of_reference, key=lambda window: window.round)
    if not ordered:
        raise InputError("there are no windows of the reference")
    rounds, medians_ms = [window.round for window in ordered], [window.median_ms for window in ordered]
    levels = _smoothed(medians_ms)
    middle = float(np.median(levels))
    spread = (max(levels) - min(levels)) / middle if middle else 0.0
    numbers = range(rounds[0], rounds[-1] + 1)
    factors = dict.fromkeys(numbers, 1.0)
    if spread <= CONDEMNED and middle:
        shares = np.interp(np.array(numbers) + 0.5, rounds, levels) / middle
        least = max(_NEGLIGIBLE, 2 * _scatter(medians_ms) / middle)
        factors.update({number: 1 / float(share) for number, share in zip(numbers, shares) if abs(share - 1) > least})
    return Drift(factors, spread, spread > CONDEMNED)


def _smoothed(values: Sequence[float]) -> List[float]:
    """Running medians of three; the ends against the lines through their neighbours (Tukey). Of three, none is odd."""
    if len(values) < 4:
        return list(values)
    inner = [float(np.median(values[i - 1 : i + 2])) for i in range(1, len(values) - 1)]
    first = float(np.median((values[0], inner[0], 3 * inner[0] - 2 * inner[1])))
    last = float(np.median((values[-1], inner[-1], 3 * inner[-1] - 2 * inner[-2])))
    return [first, *inner, last]


def _scatter(values: Sequence[float]) -> float:
    """Standard deviation about a slow course, from the second differences: those of a straight line are 0."""
    if len(values) < 3:
        return 0.0
    return float(1.4826 * np.median(np.abs(np.diff(values, 2))) / 6**0.5)
