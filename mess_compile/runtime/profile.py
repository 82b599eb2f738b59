"""How long each graph takes on this device, in context: its predecessor in a cascade runs just before it, untimed."""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

import numpy as np

from mess_compile.runtime.engine import Engine, Library, Tensor
from mess_compile.runtime.errors import InputError
from mess_compile.runtime.frames import check_frame

UPLOAD, DOWNLOAD, NULL = "upload", "download", "null"
_PSEUDO_GRAPHS = (UPLOAD, DOWNLOAD, NULL)
_ENGINES_KEPT = 64
_REHEARSALS = 2


@dataclass(frozen=True)
class Job:
    """One thing to time: the graph at `path`, or without a path a pseudo graph.

    `upload` moves a frame to the device, `download` the labels back; `null` is what a decision costs: reading the
    counts and comparing one. `predecessor` names the job that runs just before; it must produce what this one reads,
    directly or through its own predecessors.
    """

    name: str
    path: Optional[Path]
    predecessor: Optional[str] = None


@dataclass(frozen=True)
class Effort:
    """How long to measure: each job is visited `visits` times, in a new order each time.

    In all, a job runs at least `min_runs` times and `min_s` seconds, its predecessor's time included, but no more than
    `max_s` seconds or `max_runs` times (and once per visit). A graph just loaded warms up first.
    """

    visits: int = 5
    min_runs: int = 30
    min_s: float = 1.0
    max_s: float = 5.0
    max_runs: int = 3000
    warm_up_s: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Visit:
    """The samples of one visit to a job."""

    name: str
    samples_ms: Tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """`spread` tells how far the visits' medians lie apart, as a share of the overall median: about 0 when steady."""

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    runs: int
    spread: float


def measure(
    library: Library,
    jobs: Sequence[Job],
    frame: np.ndarray,
    thresholds: np.ndarray,
    effort: Effort = Effort(),
    visited: Optional[Mapping[str, int]] = None,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> Iterator[Visit]:
    """Time every job; yields after each visit, so that a caller can keep what is there and continue after a break.

    `frame` is uint8 (H, W, 3) of the network's input size, `thresholds` (T, K) float32; `visited` says how many visits
    to each job an earlier call has yielded. Raises InputError for a job that cannot be fed, EngineError.
    """
    bench = _Bench(library, {job.name: job for job in jobs}, check_frame(frame)[None], clock_ns)
    bench.offer({"thresholds": thresholds.astype(np.float32)})
    try:
        for name in _schedule([job.name for job in jobs], effort, visited or {}):
            yield Visit(name, bench.visit(name, effort))
    finally:
        bench.close()


def _schedule(names: Sequence[str], effort: Effort, visited: Mapping[str, int]) -> Iterator[str]:
    for number in range(effort.visits):
        order = list(names)
        random.Random(f"{effort.seed}-{number}").shuffle(order)
        yield from (name for name in order if visited.get(name, 0) <= number)


class _Bench:
    """Open engines, and a pool of tensors by name and shape that feeds them."""

    def __init__(
        self, library: Library, jobs: Mapping[str, Job], image: np.ndarray, clock_ns: Callable[[], int]
    ) -> None:
        self._library, self._jobs, self._image, self._clock_ns = library, jobs, image, clock_ns
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        self._pool: Dict[Tuple[str, Tuple[int, ...]], Tensor] = {}
        self._primed: Set[str] = set()
        self._warm: Set[str] = set()
        self.offer({"image": image})

    def offer(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Put tensors into the pool; they are copies, since an engine's outputs last only until its next run."""
        for name, array in arrays.items():
            self._pool.setdefault((name, array.shape), self._library.upload(array))

    def visit(self, name: str, effort: Effort) -> Tuple[float, ...]:
        job = self._job(name)
        if job.predecessor is not None:
            self._prime(job.predecessor)
        before = self._before(job)
        timed = self._transfer(job) if job.path is None else self._graph(job)
        self._rehearse(name, lambda: timed(before()), effort)
        samples: List[float] = []
        start = now = self._clock_ns()
        while self._goes_on(len(samples), (now - start) / 1e9, effort):
            samples.append(timed(before()) / 1e6)
            now = self._clock_ns()
        return tuple(samples)

    def _goes_on(self, runs: int, spent_s: float, effort: Effort) -> bool:
        share = effort.visits
        if runs == 0:
            return True
        if spent_s * share >= effort.max_s or runs * share >= effort.max_runs:
            return False
        return runs * share < effort.min_runs or spent_s * share < effort.min_s

    def _rehearse(self, name: str, run: Callable[[], object], effort: Effort) -> None:
        start = self._clock_ns()
        for _ in range(_REHEARSALS):
            run()
        while name not in self._warm and (self._clock_ns() - start) / 1e9 < effort.warm_up_s:
            run()
        self._warm.add(name)

    def _before(self, job: Job) -> Callable[[], Mapping[str, Tensor]]:
        """The predecessor's run, giving its outputs."""
        if job.predecessor is None:
            return dict
        engine = self._engine(job.predecessor)
        feeds = self._feeds(job.predecessor, engine)
        return lambda: engine.run(feeds)

    def _graph(self, job: Job) -> Callable[[Mapping[str, Tensor]], int]:
        engine = self._engine(job.name)
        pooled = self._feeds(job.name, engine)
        fresh = self._outputs_read(job.predecessor, engine)

        def timed(produced: Mapping[str, Tensor]) -> int:
            feeds = {**pooled, **{name: produced[name] for name in fresh}}
            return self._spent_ns(lambda: engine.run(feeds))

        return timed

    def _outputs_read(self, predecessor: Optional[str], engine: Engine) -> Tuple[str, ...]:
        """The inputs that come straight from the predecessor, as they do in a cascade, still in the caches."""
        if predecessor is None:
            return ()
        given = self._engine(predecessor).outputs
        return tuple(name for name, spec in engine.inputs.items() if given.get(name) == spec)

    def _transfer(self, job: Job) -> Callable[[Mapping[str, Tensor]], int]:
        action = self._transfer_action(job)

        return lambda produced: self._spent_ns(lambda: action(produced))

    def _spent_ns(self, action: Callable[[], object]) -> int:
        """From what ran before being done, until this is."""
        self._library.synchronise()
        start = self._clock_ns()
        action()
        self._library.synchronise()
        return self._clock_ns() - start

    def _transfer_action(self, job: Job) -> Callable[[Mapping[str, Tensor]], object]:
        library, image = self._library, self._image
        if job.name == UPLOAD:
            return lambda produced: library.upload(image)
        source = "labels" if job.name == DOWNLOAD else "counts"
        if job.predecessor is None or source not in self._engine(job.predecessor).outputs:
            raise InputError(f"job {job.name}: nothing produces {source}; give it a predecessor that does")
        if job.name == DOWNLOAD:
            return lambda produced: library.download(produced[source])
        return lambda produced: int(library.download(produced[source])[0]) >= 1

    def _prime(self, name: str) -> None:
        """Run a job, and first whatever feeds it, once; its outputs go into the pool."""
        if name in self._primed:
            return
        self._primed.add(name)
        job = self._job(name)
        if job.predecessor is not None:
            self._prime(job.predecessor)
        if job.path is not None:
            engine = self._engine(name)
            outputs = engine.run(self._feeds(name, engine))
            self.offer({key: self._library.download(tensor) for key, tensor in outputs.items()})

    def _feeds(self, name: str, engine: Engine) -> Dict[str, Tensor]:
        missing = [spec for spec in engine.inputs.values() if (spec.name, spec.shape) not in self._pool]
        if missing:
            raise InputError(
                f"job {name}: nothing produces {missing[0].name} {missing[0].shape}; give it a predecessor that does"
            )
        return {spec.name: self._pool[spec.name, spec.shape] for spec in engine.inputs.values()}

    def _engine(self, name: str) -> Engine:
        if name in self._engines:
            self._engines.move_to_end(name)
            return self._engines[name]
        path = self._job(name).path
        if path is None:
            raise InputError(f"job {name} is no graph, and cannot come before another")
        while len(self._engines) >= _ENGINES_KEPT:
            oldest, engine = self._engines.popitem(last=False)
            engine.close()
            self._warm.discard(oldest)
        self._engines[name] = self._library.load(path)
        return self._engines[name]

    def _job(self, name: str) -> Job:
        job = self._jobs.get(name)
        if job is None or (job.path is None and name not in _PSEUDO_GRAPHS):
            raise InputError(f"there is no job {name!r} with a graph")
        return job

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()


def summarise(visits: Sequence[Sequence[float]]) -> Summary:
    """Figures of one job from its visits' samples in ms. Raises InputError when there is none."""
    if not visits or not all(visits):
        raise InputError("there are no samples to summarise")
    samples = np.concatenate([np.asarray(visit, np.float64) for visit in visits])
    p50, p90, p95, p99 = (float(value) for value in np.percentile(samples, (50, 90, 95, 99)))
    medians = [float(np.median(visit)) for visit in visits]
    spread = (max(medians) - min(medians)) / p50 if p50 else 0.0
    return Summary(float(samples.mean()), p50, p90, p95, p99, len(samples), spread)
