"""Measures every graph on a device, each behind its predecessor, and writes the latency table. Resumable."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from mess_compile.engines.files import EngineFiles
from mess_compile.engines.jobs import job_name, profiling_jobs, reference_of
from mess_compile.latency.table import GraphFailure, Latency, LatencyTable, write_latency_table
from mess_compile.profile.backends import Backend, Task
from mess_compile.profile.sample_log import SampleHeader, SampleLog
from mess_compile.reporter import Progress
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import FP32
from mess_compile.runtime.machine import power
from mess_compile.runtime.machine.power import DeviceState
from mess_compile.runtime.measure import measure, summary
from mess_compile.runtime.measure.job_pool import Job, Opened
from mess_compile.runtime.measure.measure import Effort
from mess_compile.runtime.measure.summary import Speed, Summary

UNSTEADY = 0.1
"""Largest share of unsteady graphs in a run that counts as steady."""
SLOW = 0.5
"""Largest share of the time that the machine may run below full speed in a run that counts as steady."""


def profile_graphs(
    engines: Sequence[EngineFiles], backend: Backend, path: Path, progress: Progress, effort: Effort | None = None
) -> LatencyTable:
    """Measure all graphs of some recipes of one network and write the latency table to `path`.

    Samples are logged beside it after each window, so that a killed call resumes unless graphs, library or device
    have changed. Raises InputError, EngineError.
    """
    effort = effort or measure.Effort()
    jobs = measurable_jobs(backend, engines)
    samples = open_sample_log(engines, backend, path, effort, jobs)
    before = backend.state()
    names = tuple(job.name for job in jobs)
    for event in backend.measure(Task(samples.run, tuple(jobs), names, reference_of(jobs)), effort, samples.in_order):
        samples.append(event)
        progress("measurements", *windows_done(samples, names, effort))
    table = measured_table(engines, jobs, backend, samples, effort, before, backend.state())
    write_latency_table(path, table)
    samples.path.unlink()
    return table


def windows_done(samples: SampleLog, names: Collection[str], effort: Effort) -> tuple[int, int]:
    """The windows done, and the least number of windows that these jobs need: progress for the user.

    Jobs take turns, so that a count of finished jobs would stay at 0 for most of the time. A job's last window counts
    when the job is steady, or out of time.
    """
    full_ms = measure.full_speed_ms(samples.in_order)
    taken = [samples.windows.get(name, []) for name in names]
    done = 0
    for windows in taken:
        whole = len(windows) >= effort.windows and measure.is_done(windows, effort, full_ms)
        done += effort.windows if whole else min(len(windows), effort.windows - 1)
    return done, effort.windows * len(taken)


def measurable_jobs(backend: Backend, engines: Sequence[EngineFiles]) -> list[Job]:
    """The profiling jobs that the backend can measure: all, or without the pseudo graphs."""
    return [job for job in profiling_jobs(engines) if job.path is not None or backend.transfers is None]


def open_sample_log(
    engines: Sequence[EngineFiles], backend: Backend, path: Path, effort: Effort, jobs: Sequence[Job]
) -> SampleLog:
    """The sample log for the table `path`, with what an interrupted measurement of the same graphs left."""
    names = {job.name for job in jobs}
    return SampleLog(path.with_suffix(".samples.jsonl"), _header(engines, backend, effort), names)


def _header(engines: Sequence[EngineFiles], backend: Backend, effort: Effort) -> SampleHeader:
    return SampleHeader(
        run="",
        library=f"{backend.library} {backend.version}",
        power_mode=backend.state().power_mode,
        machine={name: fact for name, fact in backend.facts.items() if name != "load_average"},
        recipes={each.graph_set.recipe: each.graph_set.identity for each in engines},
        graphs={
            job_name(name, spec.precision): spec.sha256
            for each in engines
            for name, spec in sorted(each.graph_set.graphs.items())
        },
        effort=repr(effort),
    )


def measured_table(
    engines: Sequence[EngineFiles],
    jobs: Sequence[Job],
    backend: Backend,
    samples: SampleLog,
    effort: Effort,
    before: DeviceState,
    after: DeviceState,
) -> LatencyTable:
    """The table of the jobs' samples; `before` and `after` are the device's states around the measurement.

    Raises InputError when a job has no samples.
    """
    missing = [job.name for job in jobs if not samples.windows.get(job.name)]
    if missing:
        raise InputError(f"{len(missing)} graphs were not measured ({missing[0]} ...): run the same command again")
    speed = summary.speed(samples.in_order)
    specs = {job_name(spec.name, spec.precision): spec for each in engines for spec in each.graph_set.graphs.values()}
    entries, unsteady = {}, 0
    for job in jobs:
        figures = summary.summarise(samples.windows[job.name], speed.full_ms, effort)
        unsteady += not figures.steady
        spec = specs.get(job.name)
        key = (spec.name, spec.precision) if spec else (job.name, FP32)
        entries[key] = _latency(*key, spec.sha256 if spec else "", figures, samples.opened.get(job.name))
    verdict = _verdict(speed, unsteady / len(jobs), before, after)
    environment = backend.facts | _environment(before, after) | verdict
    empty = empty_table(engines, backend)
    # A graph that two recipes share may have failed in one of them, for lack of memory.
    empty = replace(empty, failed={key: failure for key, failure in empty.failed.items() if key not in entries})
    if backend.transfers is None:
        return replace(empty, environment=environment, entries=entries)
    return replace(empty, environment=environment, entries=entries | backend.transfers(entries), source="estimated")


def empty_table(engines: Sequence[EngineFiles], backend: Backend) -> LatencyTable:
    """The table of a device before any measurement; graphs without an engine have failed."""
    failed = {
        (name, spec.precision): GraphFailure(name, spec.sha256, spec.precision, error)
        for each in engines
        for name, error in each.failed.items()
        for spec in [each.graph_set.spec(name)]
    }
    return LatencyTable(
        device=backend.device,
        library=backend.library,
        library_version=backend.version,
        network=engines[0].graph_set.candidate.identity,
        environment=backend.facts,
        source="measured",
        entries={},
        recipes={each.graph_set.recipe: each.graph_set.identity for each in engines},
        failed=failed,
    )


def _latency(graph: str, precision: str, sha256: str, found: Summary, opened: Opened | None) -> Latency:
    energy = None if found.power_mw is None else found.power_mw * found.mean_ms / 1e3
    return Latency(
        graph=graph,
        sha256=sha256,
        precision=precision,
        mean_ms=found.mean_ms,
        p50_ms=found.p50_ms,
        p90_ms=found.p90_ms,
        p95_ms=found.p95_ms,
        p99_ms=found.p99_ms,
        runs=found.runs,
        source="measured",
        steady=found.steady,
        device_ms=found.device_mean_ms,
        file_bytes=None if opened is None else opened.file_bytes,
        scratch_bytes=None if opened is None else opened.scratch_bytes,
        energy_mj=energy,
    )


def _verdict(speed: Speed, unsteady: float, before: DeviceState, after: DeviceState) -> dict[str, str]:
    """Whether the run was steady, and if not, the likely cause."""
    unstable = speed.slow_share > SLOW or unsteady > UNSTEADY
    figures = {
        "slow_share": f"{speed.slow_share:.3f}",
        "slow_by": f"{speed.slow_by:.2f}",
        "unsteady": f"{unsteady:.3f}",
    }
    if not unstable:
        return {"verdict": "steady", **figures}
    cause = power.likely_cause(before, after) or "probably other programs"
    return {"verdict": "unstable", "likely_cause": cause, **figures}


def _environment(before: DeviceState, after: DeviceState) -> dict[str, str]:
    """Power mode, clocks and temperatures as text, as far as the device reports them."""
    clocks = ", ".join(
        f"{name} {mhz:.0f} of {dict(after.limits_mhz).get(name, mhz):.0f} MHz" for name, mhz in after.clocks_mhz
    )
    hot = [
        f"{name} {start:.0f} to {dict(after.temperatures_c)[name]:.0f} C"
        for name, start in before.temperatures_c
        if name in dict(after.temperatures_c)
    ]
    facts = {"power_mode": after.power_mode or "", "clocks": clocks, "temperatures": ", ".join(hot)}
    return {name: text for name, text in facts.items() if text}
