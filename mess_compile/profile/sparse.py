"""Measures the graphs that could still change the answer, batch by batch, and estimates the rest of the table."""

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
"""What an engine may take to build on a small device, before this one has shown its pace."""


@dataclass(frozen=True)
class SubsetJob:
    """Graphs in the `forms` that `backend` builds, what they are measured for, and the `path` of the latency table.

    Measuring goes on while `in_time`. Before each batch a note says what it is for, and about how long it takes.
    """

    forms: tuple[EngineFiles, ...]
    backend: Backend
    subject: Subject
    path: Path
    reporter: Reporter
    in_time: Callable[[], bool]
    effort: Effort = field(default_factory=lambda: measure.Effort())


def profile_subset(job: SubsetJob) -> LatencyTable:
    """Build and measure what could still change the answer; the rest of the table that is written is estimated.

    Samples are kept as by `profile_graphs`. Raises InputError, EngineError.
    """
    run = SubsetRun(job)
    settled = run.settle()
    whole = run.whole_table(job.subject)
    write_latency_table(job.path, whole)
    if settled:  # else the time ended it, and a further call goes on
        run.samples.path.unlink()
    return whole


class SubsetRun:
    """A subset job under way: its engines, the jobs requested so far, and the `table` so far."""

    def __init__(self, job: SubsetJob) -> None:
        self.job = job
        self.table = empty_table(job.forms, job.backend)
        self._every = measurable_jobs(job.backend, job.forms)
        self.samples = open_sample_log(job.forms, job.backend, job.path, job.effort, self._every)
        self._before, self._engines = job.backend.state(), job.forms
        self._asked: dict[str, None] = {}
        self._pace_s = BUILDING_S.get(job.backend.library, 0.0) + job.effort.max_s / 2
        self._started = time.monotonic()

    def settle(self) -> bool:
        """Measure until nothing could change the answer, or time is up; whether it was the former."""
        while (wanted := selection.next_batch(self.job.subject, self.table)) is not None:
            if not self.job.in_time():
                return False
            self.measure(wanted)
        return True

    def measure(self, wanted: Selection) -> None:
        """Build and measure what is wanted, with all that must run before it."""
        count, total = len(wanted.graphs), len(self._every)
        minutes = max(1, round(count * self._pace_s / 60))
        self.job.reporter.note(f"{count} of {total} graphs: {wanted.why}; about {minutes} min")
        names = [name if name in PSEUDO_GRAPHS else job_name(name, precision) for name, precision in wanted.graphs]
        jobs = self._built(names)
        again = [name for name in self._undone() if name in jobs]
        self._asked |= dict.fromkeys(name for name in names if name in jobs)
        self._time(_task(self.samples.run, jobs, [*names, *again]))
        unreached = {name: "nothing that runs leads there" for name in names if name not in jobs}
        self._engines = tuple(without(each, unreached) for each in self._engines)
        self.table = self._table([jobs[name] for name in self._asked if name in jobs])
        self._pace_s = (time.monotonic() - self._started) / len(self._asked)

    def whole_table(self, subject: Subject) -> LatencyTable:
        """With estimates of what was not measured."""
        whole = selection.expected_table(subject, self.table)
        return replace(whole, environment={**whole.environment, "coverage": selection.coverage(subject, self.table)})

    def _built(self, names: Sequence[str]) -> dict[str, Job]:
        """The jobs by name once all that the named ones need is built; another stands in for what does not build."""
        asked: set[str] = set()
        while True:
            jobs = {job.name: job for job in measurable_jobs(self.job.backend, self._engines)}
            needed = set(with_feeders(list(jobs.values()), [*names, reference_of(list(jobs.values()))])) - asked
            if not needed:
                return jobs
            self._engines = self.job.backend.build(self._engines, needed)
            asked |= needed

    def _undone(self) -> list[str]:
        """What was measured, but not at what is now known to be full speed."""
        full_ms = measure.full_speed_ms(self.samples.in_order)
        taken = {name: self.samples.windows.get(name, []) for name in self._asked}
        return [name for name, windows in taken.items() if not measure.is_done(windows, self.job.effort, full_ms)]

    def _time(self, task: Task) -> None:
        job, samples = self.job, self.samples
        label = f"graphs {len(self._asked)}/{len(self._every)}, measurements"
        for event in job.backend.measure(task, job.effort, samples.in_order):
            samples.append(event)
            job.reporter.progress(label, *windows_done(samples, task.measured, job.effort))

    def _table(self, jobs: Sequence[Job]) -> LatencyTable:
        backend, effort = self.job.backend, self.job.effort
        return measured_table(self._engines, jobs, backend, self.samples, effort, self._before, backend.state())


def _task(run: str, jobs: dict[str, Job], names: Sequence[str]) -> Task:
    """To measure the named jobs, as far as there are such, with what runs before them."""
    reference, measured = reference_of(list(jobs.values())), tuple(name for name in names if name in jobs)
    chosen = with_feeders(list(jobs.values()), [*measured, reference])
    return Task(run, tuple(jobs[name] for name in chosen), measured, reference)
