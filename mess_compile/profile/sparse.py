"""Measures the graphs that could still change the plan, batch by batch, and estimates the rest of the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mess_compile.engines.files import EngineFiles
from mess_compile.engines.jobs import job_name, reference_of, with_feeders, without
from mess_compile.latency.table import LatencyTable, write_latency_table
from mess_compile.profile import selection
from mess_compile.profile.backends import Backend, Task
from mess_compile.profile.full import empty_table, measurable_jobs, measured_table, open_sample_log, windows_done
from mess_compile.profile.selection import Selection, Subject
from mess_compile.reporter import Reporter
from mess_compile.runtime.measure import measure
from mess_compile.runtime.measure.job_pool import PSEUDO_GRAPHS, Job
from mess_compile.runtime.measure.measure import Effort

BUILDING_S = {"tensorrt": 60.0, "tensorrt_rtx": 1.0}
"""Expected time to build an engine on a small device, by library, until the device's own times are known."""


@dataclass(frozen=True)
class SubsetJob:
    """What to profile: `forms` are the graphs as `backend` builds them, `path` is that of the latency table.

    Measuring goes on while `in_time()`. Before each batch a note gives its purpose and its expected time.
    """

    forms: tuple[EngineFiles, ...]
    backend: Backend
    subject: Subject
    path: Path
    reporter: Reporter
    in_time: Callable[[], bool]
    effort: Effort = field(default_factory=lambda: measure.Effort())


def profile_subset(job: SubsetJob) -> LatencyTable:
    """Build and measure the graphs that could still change the plan; write the table, the rest of it estimated.

    Samples are logged as by `profile_graphs`. Raises InputError, EngineError.
    """
    run = SubsetRun(job)
    complete = run.measure_all()
    whole = run.whole_table(job.subject)
    write_latency_table(job.path, whole)
    if complete:  # otherwise time ran out, and the next call resumes
        run.samples.path.unlink()
    return whole


class SubsetRun:
    """A subset job in progress: its engines, the jobs requested so far, and the `table` so far."""

    def __init__(self, job: SubsetJob) -> None:
        self.job = job
        self.table = empty_table(job.forms, job.backend)
        self._every = measurable_jobs(job.backend, job.forms)
        self.samples = open_sample_log(job.forms, job.backend, job.path, job.effort, self._every)
        self._before, self._engines = job.backend.state(), job.forms
        self._requested: dict[str, None] = {}
        self._pace_s = BUILDING_S.get(job.backend.library, 0.0) + job.effort.max_s / 2
        self._started = time.monotonic()

    def measure_all(self) -> bool:
        """Measure until nothing could change the plan; False when time ran out first."""
        while (wanted := selection.next_batch(self.job.subject, self.table)) is not None:
            if not self.job.in_time():
                return False
            self.measure(wanted)
        return True

    def measure(self, wanted: Selection) -> None:
        """Build and measure the selected graphs, and build all that must run before them."""
        count, total = len(wanted.graphs), len(self._every)
        minutes = max(1, round(count * self._pace_s / 60))
        self.job.reporter.note(f"{count} of {total} graphs: {wanted.why}; about {minutes} min")
        names = [name if name in PSEUDO_GRAPHS else job_name(name, precision) for name, precision in wanted.graphs]
        jobs = self._built(names)
        again = [name for name in self._undone() if name in jobs]
        self._requested |= dict.fromkeys(name for name in names if name in jobs)
        self._time(_task(self.samples.run, jobs, [*names, *again]))
        unreached = {name: "no graph that runs leads to it" for name in names if name not in jobs}
        self._engines = tuple(without(each, unreached) for each in self._engines)
        self.table = self._table([jobs[name] for name in self._requested if name in jobs])
        self._pace_s = (time.monotonic() - self._started) / len(self._requested)

    def whole_table(self, subject: Subject) -> LatencyTable:
        """The table with estimates of the graphs that were not measured."""
        whole = selection.expected_table(subject, self.table)
        return replace(whole, environment={**whole.environment, "coverage": selection.coverage(subject, self.table)})

    def _built(self, names: Sequence[str]) -> dict[str, Job]:
        """Name -> job, after building all that the named jobs need; other graphs replace those that fail to build."""
        requested: set[str] = set()
        while True:
            jobs = {job.name: job for job in measurable_jobs(self.job.backend, self._engines)}
            needed = set(with_feeders(list(jobs.values()), [*names, reference_of(list(jobs.values()))])) - requested
            if not needed:
                return jobs
            self._engines = self.job.backend.build(self._engines, needed)
            requested |= needed

    def _undone(self) -> list[str]:
        """The measured jobs that lack windows at full speed, by what is now known of full speed."""
        full_ms = measure.full_speed_ms(self.samples.in_order)
        taken = {name: self.samples.windows.get(name, []) for name in self._requested}
        return [name for name, windows in taken.items() if not measure.is_done(windows, self.job.effort, full_ms)]

    def _time(self, task: Task) -> None:
        job, samples = self.job, self.samples
        label = f"graphs {len(self._requested)}/{len(self._every)}, measurements"
        for event in job.backend.measure(task, job.effort, samples.in_order):
            samples.append(event)
            job.reporter.progress(label, *windows_done(samples, task.measured, job.effort))

    def _table(self, jobs: Sequence[Job]) -> LatencyTable:
        backend, effort = self.job.backend, self.job.effort
        return measured_table(self._engines, jobs, backend, self.samples, effort, self._before, backend.state())


def _task(run: str, jobs: dict[str, Job], names: Sequence[str]) -> Task:
    """A task that measures the named jobs that exist, with what runs before them."""
    reference, measured = reference_of(list(jobs.values())), tuple(name for name in names if name in jobs)
    chosen = with_feeders(list(jobs.values()), [*measured, reference])
    return Task(run, tuple(jobs[name] for name in chosen), measured, reference)
