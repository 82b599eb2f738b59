"""How long each graph takes on this device, in context: its predecessor in a cascade runs just before it, untimed.

Jobs are visited in rounds, in a new order each round, so that drift of the device spreads over all. A reference job
opens every round: its windows tell by how much the device has drifted, and whether a run can be believed.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Union

import numpy as np

from mess_compile.runtime.engine import Engine, Library, Tensor, TensorSpec, Timing
from mess_compile.runtime.errors import EngineError, InputError
from mess_compile.runtime.frames import check_frame

UPLOAD, DOWNLOAD, NULL = "upload", "download", "null"
_PSEUDO_GRAPHS = (UPLOAD, DOWNLOAD, NULL)
KEPT_OPEN = 400
_REHEARSALS = 2
_REHEARSED = 0.1
"""Share of a window that a rehearsal may take before it is the last."""
_POWER_EVERY_S = 0.02
_RESOLUTION_MS = 0.001
_SCARCE = 1 / 8


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
    """How long to measure.

    A window lasts `window_s`, its predecessor's runs included, and at least `window_runs` runs. A job is steady, and
    done, when its last `windows` windows have medians that differ by no more than the share `steady` of their middle
    (or a microsecond); else it is given up as unsteady after `max_s` of windows. A slow job's windows are cut to
    `max_s / windows`, so that it has that many. The reference runs for `warm_up_s` first.
    """

    window_s: float = 0.1
    window_runs: int = 5
    windows: int = 3
    steady: float = 0.03
    max_s: float = 5.0
    warm_up_s: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Window:
    """One visit to a job: its runs' wall times, and where the library has events the device's times of the same runs.

    `power_mw` is the mean over the window, predecessor included; `spent_s` its length, without rehearsals.
    """

    job: str
    round: int
    wall_ms: Tuple[float, ...]
    device_ms: Tuple[float, ...] = ()
    power_mw: Optional[float] = None
    spent_s: float = 0.0

    @cached_property
    def median_ms(self) -> float:
        return float(np.median(self.wall_ms))


@dataclass(frozen=True)
class Opened:
    """A graph that was opened for the first time in a call. `file_bytes` leaves out weights that lie in other files."""

    job: str
    load_ms: float
    file_bytes: int
    scratch_bytes: Optional[int]


Power = Callable[[], Optional[float]]


def measure(
    library: Library,
    jobs: Sequence[Job],
    frame: np.ndarray,
    thresholds: np.ndarray,
    reference: str,
    effort: Effort = Effort(),
    earlier: Sequence[Window] = (),
    power: Optional[Power] = None,
    kept_open: int = KEPT_OPEN,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
    measured: Optional[Sequence[str]] = None,
) -> Iterator[Union[Opened, Window]]:
    """Time every job until it is steady or given up; yields each window, so that a caller can keep it.

    `frame` is uint8 (H, W, 3) of the network's input size, `thresholds` (T, K) float32. With the windows that `earlier`
    calls have yielded, the call continues where they ended. `power` gives milliwatts, or None. At most `kept_open`
    engines (two or more) stay open, fewer when memory is short. Only the jobs `measured` (None: all) and the reference
    are timed; the others run before those. Raises InputError for a job that cannot be fed, EngineError.
    """
    by_name = {job.name: job for job in jobs}
    if reference not in by_name:
        raise InputError(f"the reference {reference!r} is not among the {len(by_name)} jobs")
    timed = by_name if measured is None else {*measured, reference}
    taken: Dict[str, List[Window]] = {name: [] for name in by_name if name in timed}
    for window in earlier:
        if window.job in taken:
            taken[window.job].append(window)
    bench = _Bench(library, by_name, check_frame(frame)[None], kept_open, clock_ns)
    bench.offer({"thresholds": thresholds.astype(np.float32)})
    warm = False
    try:
        for name, number in schedule(taken, reference, effort):
            if not warm:
                bench.warm_up(reference, effort.warm_up_s)
                warm = True
            window = bench.visit(name, number, effort, power)
            yield from bench.newly_opened()
            taken[name].append(window)
            yield window
    finally:
        bench.close()


def schedule(taken: Mapping[str, Sequence[Window]], reference: str, effort: Effort) -> Iterator[Tuple[str, int]]:
    """Which job to visit next, and in which round; `taken` grows between the steps."""
    number = max((window.round for windows in taken.values() for window in windows), default=0)
    while True:
        before = {name: [window for window in windows if window.round < number] for name, windows in taken.items()}
        left = [name for name in taken if name == reference or not is_done(before[name], effort)]
        order = left[:]
        random.Random(f"{effort.seed}-{number}").shuffle(order)
        order.sort(key=lambda name: name != reference)
        for name in order:
            if all(window.round != number for window in taken[name]):
                yield name, number
        if left == [reference] and is_done(before[reference], effort):
            return
        number += 1


def is_done(windows: Sequence[Window], effort: Effort) -> bool:
    """Whether a job with these windows is not visited again: it is steady, or given up."""
    if len(windows) < effort.windows:
        return False
    spent_s = sum(window.spent_s for window in windows)
    return spent_s >= effort.max_s or is_steady([window.median_ms for window in windows[-effort.windows :]], effort)


def is_steady(medians_ms: Sequence[float], effort: Effort) -> bool:
    allowed = max(effort.steady * float(np.median(medians_ms)), _RESOLUTION_MS)
    return len(medians_ms) >= effort.windows and max(medians_ms) - min(medians_ms) <= allowed


class _Bench:
    """Open engines, and a pool of tensors by name and shape that feeds them."""

    def __init__(
        self,
        library: Library,
        jobs: Mapping[str, Job],
        image: np.ndarray,
        kept_open: int,
        clock_ns: Callable[[], int],
    ) -> None:
        self._library, self._jobs, self._image, self._clock_ns = library, jobs, image, clock_ns
        self._kept_open = max(kept_open, 2)  # a job's own and its predecessor's
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        self._opened: Dict[str, Opened] = {}
        self._told: Set[str] = set()
        self._slow: Set[str] = set()
        self._pool: Dict[Tuple[str, Tuple[int, ...]], Tensor] = {}
        self._primed: Set[str] = set()
        self.offer({"image": image})

    def offer(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Put tensors into the pool; they are copies, since an engine's outputs last only until its next run."""
        for name, array in arrays.items():
            self._pool.setdefault((name, array.shape), self._library.upload(array))

    def newly_opened(self) -> List[Opened]:
        """What was opened since the last call, and never before."""
        found = [opened for name, opened in self._opened.items() if name not in self._told]
        self._told.update(self._opened)
        return found

    def warm_up(self, name: str, seconds: float) -> None:
        """Caches fill, and clocks rise, before the first window."""
        run = self._runner(self._job(name))
        start = self._clock_ns()
        while (self._clock_ns() - start) / 1e9 < seconds:
            run()

    def visit(self, name: str, number: int, effort: Effort, power: Optional[Power]) -> Window:
        job = self._job(name)
        try:
            return self._window(job, number, effort, power)
        except EngineError:
            if not self._engines:
                raise
        # The engines that are open may take the memory that this one lacks; whatever else it is fails again.
        self._kept_open = max(len(self._engines) // 2, 2)
        self.close()
        return self._window(job, number, effort, power)

    def _window(self, job: Job, number: int, effort: Effort, power: Optional[Power]) -> Window:
        run = self._runner(job)
        if job.name not in self._slow:
            self._rehearse(run, effort)
        timings: List[Timing] = []
        readings: List[float] = []
        start = now = read = self._clock_ns()
        while not _is_full(len(timings), (now - start) / 1e9, effort):
            timings.append(run())
            now = self._clock_ns()
            if power is not None and (now - read) / 1e9 >= _POWER_EVERY_S:
                reading = power()
                readings += [] if reading is None else [reading]
                read = now = self._clock_ns()
        device_ms = tuple(timing.device_ms for timing in timings if timing.device_ms is not None)
        power_mw = sum(readings) / len(readings) if readings else None
        wall_ms = tuple(timing.wall_ms for timing in timings)
        if len(timings) <= effort.window_runs:
            self._slow.add(job.name)
        return Window(job.name, number, wall_ms, device_ms, power_mw, (now - start) / 1e9)

    def _rehearse(self, run: Callable[[], object], effort: Effort) -> None:
        """An engine just opened takes memory in its first run; one not used for long finds cold caches.

        Those cost a run of some milliseconds a tenth and more, but one of 20 ms a hundredth: a slow job is rehearsed
        only when its engine is new, else rehearsals would take a fifth of all time.
        """
        start = self._clock_ns()
        for _ in range(_REHEARSALS):
            run()
            if (self._clock_ns() - start) / 1e9 > _REHEARSED * effort.window_s:
                return

    def _runner(self, job: Job) -> Callable[[], Timing]:
        """One run of the predecessor, and then a timed one."""
        if job.predecessor is not None:
            self._prime(job.predecessor)
        before = self._before(job)
        timed = self._transfer(job) if job.path is None else self._graph(job)
        return lambda: timed(before())

    def _before(self, job: Job) -> Callable[[], Mapping[str, Tensor]]:
        """The predecessor's run, giving its outputs."""
        if job.predecessor is None:
            return dict
        engine = self._engine(job.predecessor)
        feeds = self._feeds(job.predecessor, engine)
        return lambda: engine.run(feeds)

    def _graph(self, job: Job) -> Callable[[Mapping[str, Tensor]], Timing]:
        engine = self._engine(job.name)
        pooled = self._feeds(job.name, engine)
        fresh = self._outputs_read(job.predecessor, engine)
        return lambda produced: engine.run_timed({**pooled, **{name: produced[name] for name in fresh}})

    def _outputs_read(self, predecessor: Optional[str], engine: Engine) -> Tuple[str, ...]:
        """The inputs that come straight from the predecessor, as they do in a cascade, still in the caches."""
        if predecessor is None:
            return ()
        given = self._engine(predecessor).outputs
        return tuple(name for name, spec in engine.inputs.items() if given.get(name) == spec)

    def _transfer(self, job: Job) -> Callable[[Mapping[str, Tensor]], Timing]:
        action = self._transfer_action(job)

        def timed(produced: Mapping[str, Tensor]) -> Timing:
            self._library.synchronise()
            start = self._clock_ns()
            action(produced)
            self._library.synchronise()
            return Timing((self._clock_ns() - start) / 1e6)

        return timed

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
        """Run a job, and first whatever feeds it, once; its outputs go into the pool.

        Jobs may follow each other in a circle, as frames do in a cascade: only who lacks an input asks for more.
        """
        job = self._job(name)
        if name in self._primed or job.path is None:
            return
        self._primed.add(name)
        if job.predecessor is not None and self._missing(self._engine(name)):
            self._prime(job.predecessor)
        engine = self._engine(name)  # which the others may have closed, for want of memory
        outputs = engine.run(self._feeds(name, engine))
        self.offer({key: self._library.download(tensor) for key, tensor in outputs.items()})

    def _missing(self, engine: Engine) -> List[TensorSpec]:
        return [spec for spec in engine.inputs.values() if (spec.name, spec.shape) not in self._pool]

    def _feeds(self, name: str, engine: Engine) -> Dict[str, Tensor]:
        missing = self._missing(engine)
        if missing:
            raise InputError(
                f"job {name}: nothing produces {missing[0].name} {missing[0].shape}; give it a predecessor that does"
            )
        return {spec.name: self._pool[spec.name, spec.shape] for spec in engine.inputs.values()}

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            path = self._job(name).path
            if path is None:
                raise InputError(f"job {name} is no graph, and cannot come before another")
            self._make_room()
            self._open(name, path)
        self._engines.move_to_end(name)
        return self._engines[name]

    def _make_room(self) -> None:
        """Close the engine not used for longest when there are too many; one for one, however short memory stays."""
        crowded = len(self._engines) >= self._kept_open
        if crowded or (len(self._engines) >= 2 and _memory_is_scarce()):
            oldest, engine = self._engines.popitem(last=False)
            engine.close()
            self._slow.discard(oldest)

    def _open(self, name: str, path: Path) -> None:
        start = self._clock_ns()
        engine = self._engines[name] = self._library.load(path)
        load_ms = (self._clock_ns() - start) / 1e6
        self._opened.setdefault(name, Opened(name, load_ms, path.stat().st_size, engine.scratch_bytes))

    def _job(self, name: str) -> Job:
        job = self._jobs.get(name)
        if job is None or (job.path is None and name not in _PSEUDO_GRAPHS):
            raise InputError(f"there is no job {name!r} with a graph")
        return job

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self._primed.clear()
        self._slow.clear()


def _is_full(runs: int, spent_s: float, effort: Effort) -> bool:
    if runs == 0:
        return False
    enough = runs >= effort.window_runs and spent_s >= effort.window_s
    return enough or spent_s >= effort.max_s / effort.windows


def _memory_is_scarce(meminfo: Path = Path("/proc/meminfo")) -> bool:
    """Whether less than an eighth of the machine's memory is left. Linux tells; the GPU of a Jetson shares it."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        left, total = (int(lines[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    except (OSError, ValueError, KeyError, IndexError):
        return False
    return left < _SCARCE * total
