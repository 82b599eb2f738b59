"""Measures how long each graph takes on this device, in context: its predecessor in a cascade runs just before,
untimed.

A cascade runs a graph once per frame, and all others in between, so the graph finds cold caches. A timed run of a small
graph finds them, too: another graph runs between two runs, the first in the list (as a rule the baseline) or the
reference. Without it, the early exits of a network of 5 ms come out 25 % too fast relative to its baseline, with it 6
%. It is left out where power is read, since a window's power should be that of its job.

Jobs are visited in rounds, in a new order each round, so that drift of the device spreads over all. A reference graph
ticks before and after every window: windows at full speed count, scaled by their ticks; the others are measured again.
In a replay of 330 s on two cores of a shared host, slow for 18 % of the time, sums of means were thus 1.4 % wrong in
the median and 2.7 % in the worst of ten cascades (3.3 % and 15 % when all windows count unscaled, 2.1 % and 6 % when
all are scaled by their ticks, 1.4 % and 3.7 % when those at full speed count unscaled).
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Union

import numpy as np

from mess_compile.runtime.base.errors import EngineError, InputError
from mess_compile.runtime.base.policy import plain_values
from mess_compile.runtime.engines.engine import Engine, Library, Tensor, Timing
from mess_compile.runtime.images.frames import check_frame
from mess_compile.runtime.measure import full_speed
from mess_compile.runtime.measure.job_pool import DOWNLOAD, UPLOAD, Job, Opened, Pool

MOST_OPEN = 400
_WARM_UP_RUNS = 2
_WARM_UP_SHARE = 0.1
"""The share of a window after which no further warm-up run starts."""
_BETWEEN = 0.5
"""The share of a run's part of a window that a small graph's run may take, with its predecessor and other work."""
_SKIP_FACTOR = 5
"""A graph that takes so many times the time for other work is not tried again."""
_TICK = 0.2
"""About the share of a window that a tick may take."""
_WAITING_SHARE = 0.5
"""The share of the time spent on windows that may be spent on waiting for full speed, over all."""
_GIVE_UP_FACTORS = 2, 8
"""A job is given up when all its windows took so many times `max_s`, or so many times `windows` of them were slow."""
_POWER_EVERY_S = 0.02
_RESOLUTION_MS = 0.001


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    A window lasts `window_s`, its predecessor's runs included, and at least `window_runs` runs. A job is steady, and
    done, when the medians of its last `windows` windows differ by no more than the share `steady` of their median (or a
    microsecond); otherwise it is given up as unsteady after `max_s` of windows. Only windows at full speed count; when
    too many others occur, all count, and the job is unsteady. A slow job's windows are cut to `max_s / windows`, so
    that it has that many. The reference runs for `warm_up_s` first.
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
    """One visit to a job: its runs' wall times and, if the library has events, the device's times of the same runs.

    `power_mw` is the mean over the window, predecessor included; `spent_s` is its length, without warm-up runs.
    `ticks_ms` are the reference's just before and just after. Before those, `waited_s` passed at another speed,
    `waited_tick_ms`.
    """

    job: str
    round: int
    wall_ms: Tuple[float, ...]
    device_ms: Tuple[float, ...] = ()
    power_mw: Optional[float] = None
    spent_s: float = 0.0
    ticks_ms: Tuple[float, ...] = ()
    waited_s: float = 0.0
    waited_tick_ms: Optional[float] = None

    @cached_property
    def median_ms(self) -> float:
        return float(np.median(self.wall_ms))


Power = Callable[[], Optional[float]]


@dataclass(frozen=True, eq=False)
class MeasureTask:
    """What to measure, and with which inputs.

    Only the jobs `measured` (None: all) are timed; the others run before those. `reference` should be a graph that
    takes little time, and as many cores as the others. `frame` is uint8 (H, W, 3) of the network's input size,
    `thresholds` (T, K) float32. `earlier` are the windows of an interrupted call, which this one continues.
    """

    jobs: Sequence[Job]
    frame: np.ndarray
    thresholds: np.ndarray
    reference: str
    measured: Optional[Sequence[str]] = None
    earlier: Sequence[Window] = ()


def measure(
    library: Library,
    task: MeasureTask,
    effort: Effort = Effort(),
    power: Optional[Power] = None,
    most_open: int = MOST_OPEN,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> Iterator[Union[Opened, Window]]:
    """Time every job until it is steady or given up; yields each window, so that the caller can save it.

    `power` gives milliwatts, or None. At most `most_open` engines (three or more) stay open, fewer when memory is
    scarce. Raises InputError for a job that cannot be fed, EngineError.
    """
    by_name = {job.name: job for job in task.jobs}
    if task.reference not in by_name:
        raise InputError(f"the reference {task.reference!r} is not among the {len(by_name)} jobs")
    taken: Dict[str, List[Window]] = {name: [] for name in by_name if task.measured is None or name in task.measured}
    others = [window for window in task.earlier if window.job not in taken]
    for window in task.earlier:
        taken.get(window.job, []).append(window)
    image, pool = check_frame(task.frame)[None], Pool(library, by_name, most_open, clock_ns)
    pool.offer({"image": image, "thresholds": task.thresholds.astype(np.float32)})
    timer = _WindowTimer(pool, library, task.reference, image, clock_ns)
    ticks_ms: Optional[List[float]] = None
    try:
        for name, number in schedule(taken, effort, others):
            if ticks_ms is None:
                timer.warm_up(effort.warm_up_s)
                ticks_ms = _ticks_of(task.earlier)
            window = timer.visit(name, number, effort, power, full_speed.full_speed_ms(ticks_ms))
            yield from pool.newly_opened()
            taken[name].append(window)
            ticks_ms += window.ticks_ms
            yield window
    finally:
        pool.close()


def schedule(
    taken: Mapping[str, Sequence[Window]], effort: Effort, others: Sequence[Window] = (), first: Optional[str] = None
) -> Iterator[Tuple[str, int]]:
    """The job to visit next, and its round; `taken` grows between the steps.

    The ticks of `others` also count for the machine's speed. The job `first` opens every round.
    """
    number = max((window.round for windows in taken.values() for window in windows), default=0)
    while True:
        before = {name: [window for window in windows if window.round < number] for name, windows in taken.items()}
        full_ms = full_speed_ms([*others, *(window for windows in before.values() for window in windows)])
        order = [name for name in taken if not is_done(before[name], effort, full_ms)]
        if not order:
            return
        random.Random(f"{effort.seed}-{number}").shuffle(order)
        if first is not None:
            order = [first, *(name for name in order if name != first)]
        for name in order:
            if all(window.round != number for window in taken[name]):
                yield name, number
        number += 1


def full_speed_ms(windows: Iterable[Window]) -> Optional[float]:
    """The time of a tick at full speed, by the ticks of all these windows; None when they have none."""
    return full_speed.full_speed_ms(_ticks_of(windows))


def _ticks_of(windows: Iterable[Window]) -> List[float]:
    return [tick for window in windows for tick in window.ticks_ms]


def is_done(windows: Sequence[Window], effort: Effort, full_ms: Optional[float]) -> bool:
    """Whether a job with these windows is not visited again: it is steady, or given up."""
    used = at_full_speed(windows, full_ms)
    if is_steady(scaled_medians_ms(used, full_ms)[-effort.windows :], effort):
        return True
    spent_s, all_s = (sum(window.spent_s for window in some) for some in (used, windows))
    if len(used) >= effort.windows and spent_s >= effort.max_s:
        return True
    times, slow_windows = _GIVE_UP_FACTORS
    too_long = len(windows) >= times * effort.windows and all_s >= times * effort.max_s
    return too_long or len(windows) - len(used) >= slow_windows * effort.windows


def at_full_speed(windows: Sequence[Window], full_ms: Optional[float]) -> List[Window]:
    return [window for window in windows if full_speed.is_full_speed(window.ticks_ms, full_ms)]


def scaled_medians_ms(windows: Sequence[Window], full_ms: Optional[float]) -> List[float]:
    """Each window's median, scaled to full speed."""
    return [window.median_ms * full_speed.factor(window.ticks_ms, full_ms) for window in windows]


def is_steady(medians_ms: Sequence[float], effort: Effort) -> bool:
    if len(medians_ms) < effort.windows:
        return False
    allowed = max(effort.steady * float(np.median(medians_ms)), _RESOLUTION_MS)
    return max(medians_ms) - min(medians_ms) <= allowed


class _WindowTimer:
    """Measures windows of jobs between ticks of the reference."""

    def __init__(
        self, pool: Pool, library: Library, reference: str, image: np.ndarray, clock_ns: Callable[[], int]
    ) -> None:
        self._pool, self._library, self._image, self._clock_ns = pool, library, image, clock_ns
        self._reference = reference
        self._ticked: Optional[Tuple[float, float]] = None
        self._spent_s = self._waited_s = 0.0
        self._slow: Dict[str, Engine] = {}
        self._long: Set[str] = set()

    def warm_up(self, seconds: float) -> None:
        """Run the reference before the first window, so that caches fill and clocks rise."""
        run = self._runner(self._pool.job(self._reference))
        start = self._now_s()
        while self._now_s() - start < seconds:
            run()

    def visit(self, name: str, number: int, effort: Effort, power: Optional[Power], full_ms: Optional[float]) -> Window:
        """Measure a window, after waiting a limited time for full speed."""
        job = self._pool.job(name)
        try:
            return self._between_ticks(job, number, effort, power, full_ms)
        except EngineError:
            # Open engines may occupy the memory that this one lacks; any other error occurs again.
            if not self._pool.make_room():
                raise
        return self._between_ticks(job, number, effort, power, full_ms)

    def _between_ticks(
        self, job: Job, number: int, effort: Effort, power: Optional[Power], full_ms: Optional[float]
    ) -> Window:
        self._pool.prime(self._reference)
        run = self._runner(job)
        start = self._now_s()
        before_ms = self._tick_before(effort)
        wait_limit_s = min(effort.max_s, _WAITING_SHARE * self._spent_s - self._waited_s)
        waited_s, slow_ms = 0.0, None
        while full_speed.is_slow(before_ms, full_ms) and waited_s < wait_limit_s:
            slow_ms, before_ms = before_ms, self._tick(effort)
            waited_s = self._now_s() - start
        window = self._window(job, run, number, effort, power)
        self._waited_s += waited_s
        self._spent_s += window.spent_s
        ticks_ms = before_ms, self._tick(effort)
        return replace(window, ticks_ms=ticks_ms, waited_s=waited_s, waited_tick_ms=slow_ms)

    def _tick_before(self, effort: Effort) -> float:
        """The tick after the previous window, if that has just ended."""
        if self._ticked is not None and self._now_s() - self._ticked[0] < effort.window_s:
            return self._ticked[1]
        return self._tick(effort)

    def _tick(self, effort: Effort) -> float:
        engine = self._pool.engine(self._reference)
        feeds = self._pool.feeds(self._reference, engine)
        found_ms = full_speed.tick_ms(lambda: engine.run_timed(feeds), _TICK * effort.window_s, self._clock_ns)
        self._ticked = self._now_s(), found_ms
        return found_ms

    def _now_s(self) -> float:
        return self._clock_ns() / 1e9

    def _window(
        self, job: Job, run: Callable[[], Timing], number: int, effort: Effort, power: Optional[Power]
    ) -> Window:
        engine = None if job.path is None else self._pool.engine(job.name)
        if engine is None or self._slow.get(job.name) is not engine:
            run_s = self._warm_up_runs(run, effort)
            if power is None:
                run = self._runner(job, self._other_work(job, run_s, effort))
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
        if engine is not None and len(timings) <= effort.window_runs:
            self._slow[job.name] = engine
        return Window(job.name, number, wall_ms, device_ms, power_mw, (now - start) / 1e9)

    def _warm_up_runs(self, run: Callable[[], object], effort: Effort) -> float:
        """Run a job before its window: a new engine allocates memory in its first run, an unused one finds cold caches.

        The warm-up costs a run of some milliseconds a tenth and more, but one of 20 ms a hundredth: a slow job has
        warm-up runs only when its engine is new; otherwise they would take a fifth of all time. Returns the last one's
        seconds.
        """
        start = now = self._clock_ns()
        last_s = 0.0
        for _ in range(_WARM_UP_RUNS):
            run()
            before, now = now, self._clock_ns()
            last_s = (now - before) / 1e9
            if (now - start) / 1e9 > _WARM_UP_SHARE * effort.window_s:
                break
        return last_s

    def _other_work(self, job: Job, run_s: float, effort: Effort) -> Optional[Callable[[], object]]:
        """Work to run between two runs of a job that take `run_s`, such that half of a window's time remains.

        A slow graph evicts its own data from the caches: nothing runs between its runs.
        """
        whole_s = _BETWEEN * effort.window_s / effort.window_runs
        for name in (self._pool.unrelated_job(job), None if job.name == self._reference else self._reference):
            if name is None or name in self._long or run_s > whole_s / 2:
                continue
            self._pool.prime(name)
            engine = self._pool.engine(name)
            run = partial(engine.run_timed, self._pool.feeds(name, engine))
            took_s = run().wall_ms / 1e3
            if run_s + took_s <= whole_s:
                return run
            if took_s > _SKIP_FACTOR * whole_s:
                self._long.add(name)
        return None

    def _runner(self, job: Job, between: Optional[Callable[[], object]] = None) -> Callable[[], Timing]:
        """One run of the predecessor, and then a timed one.

        `between` runs between frames: before the predecessor, or after it if the predecessor ended a frame.
        """
        if job.predecessor is not None:
            self._pool.prime(job.predecessor)
        before = self._before(job)
        timed = self._transfer(job) if job.path is None else self._graph(job)
        other_work: Callable[[], object] = between or (lambda: None)
        begins_frame = self._begins_frame(job)

        def run() -> Timing:
            if not begins_frame:
                other_work()
            produced = before()
            if begins_frame:
                other_work()
            return timed(produced)

        return run

    def _begins_frame(self, job: Job) -> bool:
        """Whether the job reads nothing from its predecessor."""
        if job.path is None:
            return job.name == UPLOAD
        return not self._outputs_read(job.predecessor, self._pool.engine(job.name))

    def _before(self, job: Job) -> Callable[[], Mapping[str, Tensor]]:
        """The predecessor's run, which returns its outputs."""
        if job.predecessor is None:
            return dict
        engine = self._pool.engine(job.predecessor)
        feeds = self._pool.feeds(job.predecessor, engine)
        return lambda: engine.run(feeds)

    def _graph(self, job: Job) -> Callable[[Mapping[str, Tensor]], Timing]:
        engine = self._pool.engine(job.name)
        pooled = self._pool.feeds(job.name, engine)
        fresh = self._outputs_read(job.predecessor, engine)
        return lambda produced: engine.run_timed({**pooled, **{name: produced[name] for name in fresh}})

    def _outputs_read(self, predecessor: Optional[str], engine: Engine) -> Tuple[str, ...]:
        """The inputs that come straight from the predecessor, as in a cascade, still in the caches."""
        if predecessor is None:
            return ()
        given = self._pool.engine(predecessor).outputs
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
        if job.predecessor is None or source not in self._pool.engine(job.predecessor).outputs:
            raise InputError(f"job {job.name}: nothing produces {source}; give it a predecessor that does")
        if job.name == DOWNLOAD:
            return lambda produced: library.download(produced[source])
        return lambda produced: _is_decided(library.download(produced[source]))


def _is_decided(counts: np.ndarray) -> bool:
    """What a cascade does at an exit, with counts by class or, of an earlier release's gate, without."""
    return int((counts if counts.ndim == 1 else plain_values(counts))[0]) >= 1


def _is_full(runs: int, spent_s: float, effort: Effort) -> bool:
    if runs == 0:
        return False
    enough = runs >= effort.window_runs and spent_s >= effort.window_s
    return enough or spent_s >= effort.max_s / effort.windows
