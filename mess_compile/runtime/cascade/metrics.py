"""Counts what a cascade has done since it was loaded, in bounded memory; exports numbers and Prometheus text."""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from dataclasses import asdict, dataclass
from typing import Deque, Dict, Iterator, List, Optional, Sequence, Tuple

from mess_compile.runtime.base.errors import EngineError, NotFiniteError
from mess_compile.runtime.bundle.manifest import CONFIDENCE_BINS, BundlePlan

PER_OCTAVE = 16
"""Latencies are counted in bins from 2^((n-1)/16) to 2^(n/16) ms: percentiles are exact to 2.2 %."""
_LOWEST, _HIGHEST = -6 * PER_OCTAVE, 17 * PER_OCTAVE  # 2^-6 ms to 2^17 ms
_EXPORTED = range(-4, 14)  # bucket bounds for Prometheus, powers of two in ms: 62.5 us to 8.2 s
RECENT = 1000
"""Drift covers the last so many frames that reached an exit."""
MIN_FRAMES = 100
"""Fewer frames give no drift."""
_Z_OF_99_PERCENT = 2.3263


@dataclass(frozen=True)
class LatencySummary:
    """Latencies of the frames' last results, in ms; percentiles are exact to 2.2 %, None before the first frame.

    `buckets` counts the frames that took at most so many ms.
    """

    mean_ms: Optional[float]
    p50_ms: Optional[float]
    p90_ms: Optional[float]
    p95_ms: Optional[float]
    p99_ms: Optional[float]
    sum_ms: float
    buckets: Tuple[Tuple[float, int], ...]


@dataclass(frozen=True)
class Drift:
    """How far the confidence of recent frames at one exit lies from that of the tuning images.

    `index` is the population stability index over bins of confidence, sum((p - q) ln(p / q)) with half an image added
    to each bin. With so few images it exceeds `by_chance` in 1 % of the cases where nothing has changed. An index above
    that, and above 0.2, means that the plan no longer fits the scene.
    """

    exit: int
    index: float
    by_chance: float
    frames: int
    tuning_images: int


@dataclass(frozen=True)
class Metrics:
    """Counts since loading: `exits[n - 1]` frames had their last result from exit n. A frame misses its deadline when a
    result came after it: `missed_first` because of the first result, which is always delivered; `missed_later` because
    of a later one.

    `failures` counts runs of engines that failed ("error") or gave NaN or infinities ("not-finite"), `fallback_frames`
    the frames that other engines than the plan's computed, `lost_results` those that none could compute.
    """

    bundle: str
    target: str
    library: str
    operating_point: str
    frames: int
    exits: Tuple[int, ...]
    latency: LatencySummary
    deadline_frames: int
    missed_first: int
    missed_later: int
    failures: Dict[str, int]
    fallback_frames: int
    lost_results: int
    drift: Tuple[Drift, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def to_prometheus(self) -> str:
        """The text exposition format 0.0.4, in seconds as is its convention."""
        return "".join(_lines(self))


class Recorder:
    """Counts events; thread-safe."""

    def __init__(self, plan: BundlePlan) -> None:
        self._lock = threading.Lock()
        self._plan = plan
        self._exits = [0] * len(plan.stages)
        self._bins = [0] * (_HIGHEST - _LOWEST + 1)
        self._sum_ms = 0.0
        self._deadlines = [0, 0, 0]
        self._failures = {"error": 0, "not-finite": 0}
        self._fallback_frames, self._lost_results = 0, 0
        self._recent: Tuple[Deque[int], ...] = tuple(deque(maxlen=RECENT) for _ in plan.stages)

    def finished(self, number: int, latency_ms: float, confidences: Sequence[float], fell_back: bool) -> None:
        """A frame had its last result from exit `number`; `confidences` are those of the first stages, for drift."""
        bins = [min(int(confidence * CONFIDENCE_BINS), CONFIDENCE_BINS - 1) for confidence in confidences]
        with self._lock:
            self._exits[number - 1] += 1
            self._bins[_bin(latency_ms)] += 1
            self._sum_ms += latency_ms
            self._fallback_frames += fell_back
            for recent, found in zip(self._recent, bins):
                recent.append(found)

    def had_deadline(self, missed_first: bool, missed_later: bool) -> None:
        with self._lock:
            self._deadlines = [a + b for a, b in zip(self._deadlines, (1, missed_first, missed_later))]

    def failed(self, error: EngineError) -> None:
        with self._lock:
            self._failures["not-finite" if isinstance(error, NotFiniteError) else "error"] += 1

    def lost(self) -> None:
        with self._lock:
            self._lost_results += 1

    def metrics(self, bundle: str, operating_point: str) -> Metrics:
        with self._lock:
            frames, missed_first, missed_later = self._deadlines
            return Metrics(
                bundle=bundle,
                target=self._plan.target,
                library=self._plan.library,
                operating_point=operating_point,
                frames=sum(self._exits),
                exits=tuple(self._exits),
                latency=_latency(self._bins, self._sum_ms),
                deadline_frames=frames,
                missed_first=missed_first,
                missed_later=missed_later,
                failures=dict(self._failures),
                fallback_frames=self._fallback_frames,
                lost_results=self._lost_results,
                drift=tuple(_drifts(self._plan.confidence, self._recent)),
            )


def _bin(latency_ms: float) -> int:
    exponent = math.ceil(PER_OCTAVE * math.log2(latency_ms)) if latency_ms > 0 else _LOWEST
    return min(max(exponent, _LOWEST), _HIGHEST) - _LOWEST


def _latency(bins: Sequence[int], sum_ms: float) -> LatencySummary:
    frames = sum(bins)
    p50, p90, p95, p99 = (_percentile(bins, frames, share) for share in (0.50, 0.90, 0.95, 0.99))
    buckets = [(2.0**power, sum(bins[: power * PER_OCTAVE - _LOWEST + 1])) for power in _EXPORTED]
    mean_ms = sum_ms / frames if frames else None
    return LatencySummary(mean_ms, p50, p90, p95, p99, sum_ms, tuple(buckets))


def _percentile(bins: Sequence[int], frames: int, share: float) -> Optional[float]:
    """The middle of the bin in which the share is reached."""
    seen = 0
    for index, count in enumerate(bins):
        seen += count
        if count and seen >= share * frames:
            return float(2.0 ** ((index + _LOWEST - 0.5) / PER_OCTAVE))
    return None


def _drifts(tuning: Sequence[Sequence[int]], recent: Sequence[Deque[int]]) -> Iterator[Drift]:
    for number, (tuned, latest) in enumerate(zip(tuning, recent), 1):
        if sum(tuned) and len(latest) >= MIN_FRAMES:
            found = [0] * CONFIDENCE_BINS
            for each in latest:
                found[each] += 1
            yield drift(number, tuned, found)


def drift(number: int, tuning: Sequence[int], recent: Sequence[int]) -> Drift:
    """The drift at exit `number`, from histograms of confidence."""
    used = [(p, q) for p, q in zip(recent, tuning) if p or q]
    frames, images = sum(recent), sum(tuning)
    shares = [((p + 0.5) / (frames + len(used) / 2), (q + 0.5) / (images + len(used) / 2)) for p, q in used]
    index = sum((p - q) * math.log(p / q) for p, q in shares)
    return Drift(number, index, _chi_squared_99(len(used) - 1) * (1 / frames + 1 / images), frames, images)


def _chi_squared_99(freedom: int) -> float:
    """The 99 % quantile, after Wilson and Hilferty: within 3 % from one degree of freedom."""
    if freedom == 0:
        return 0.0
    step = 2 / (9 * freedom)
    return float(freedom * (1 - step + _Z_OF_99_PERCENT * math.sqrt(step)) ** 3)


def _lines(metrics: Metrics) -> Iterator[str]:
    names = {"bundle": metrics.bundle, "target": metrics.target}

    def family(name: str, kind: str, text: str, samples: Sequence[Tuple[str, Dict[str, str], float]]) -> str:
        lines = [f"# HELP {name} {text}\n", f"# TYPE {name} {kind}\n"]
        for suffix, labels, value in samples:
            pairs = ",".join(f'{key}="{_escaped(each)}"' for key, each in {**names, **labels}.items())
            lines.append(f"{name}{suffix}{{{pairs}}} {_number(value)}\n")
        return "".join(lines)

    def counter(name: str, text: str, values: Dict[str, int], label: str = "") -> str:
        return family(name, "counter", text, [("", {label: key} if label else {}, n) for key, n in values.items()])

    about = {"library": metrics.library, "operating_point": metrics.operating_point}
    yield family("mess_cascade_info", "gauge", "The loaded plan.", [("", about, 1)])
    exits = {str(number): count for number, count in enumerate(metrics.exits, 1)}
    yield counter("mess_frames_total", "Frames by the exit of their last result.", exits, "exit")
    yield family("mess_frame_latency_seconds", "histogram", "From upload to the last result.", _histogram(metrics))
    yield counter("mess_deadline_frames_total", "Frames with a deadline.", {"": metrics.deadline_frames})
    missed = {"first": metrics.missed_first, "later": metrics.missed_later}
    yield counter("mess_deadline_misses_total", "Frames with a result after the deadline.", missed, "result")
    yield counter("mess_engine_failures_total", "Runs that failed or gave NaN.", metrics.failures, "reason")
    yield counter(
        "mess_fallback_frames_total", "Frames computed by other engines than the plan's.", {"": metrics.fallback_frames}
    )
    yield counter("mess_lost_results_total", "Results that no engine could compute.", {"": metrics.lost_results})
    if metrics.drift:
        drifts = [({"exit": str(each.exit)}, each) for each in metrics.drift]
        text = "Population stability index of recent confidence against the tuning images."
        yield family("mess_confidence_drift", "gauge", text, [("", labels, each.index) for labels, each in drifts])
        text = "Drift that chance alone exceeds in 1 % of the cases."
        name = "mess_confidence_drift_by_chance"
        yield family(name, "gauge", text, [("", labels, each.by_chance) for labels, each in drifts])


def _histogram(metrics: Metrics) -> List[Tuple[str, Dict[str, str], float]]:
    latency = metrics.latency
    no_labels: Dict[str, str] = {}
    buckets = [("_bucket", {"le": _number(bound_ms / 1e3)}, float(count)) for bound_ms, count in latency.buckets]
    buckets.append(("_bucket", {"le": "+Inf"}, metrics.frames))
    return [*buckets, ("_sum", no_labels, latency.sum_ms / 1e3), ("_count", no_labels, metrics.frames)]


def _number(value: float) -> str:
    return f"{value:.10g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
