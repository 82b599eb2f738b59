"""Measure every graph on a device, in context, and continue after a break; then the latency table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mess_compile.engines.files import EngineFiles
from mess_compile.engines.jobs import job_name, profiling_jobs, reference_of
from mess_compile.latency import table as latency
from mess_compile.latency.table import GraphFailure, Latency, LatencyTable
from mess_compile.profile.backends import Backend, Task
from mess_compile.profile.sample_log import SampleLog
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import FP32
from mess_compile.runtime.machine import power
from mess_compile.runtime.machine.power import DeviceState
from mess_compile.runtime.measure import measure, summary
from mess_compile.runtime.measure.job_pool import Job, Opened
from mess_compile.runtime.measure.measure import Effort
from mess_compile.runtime.measure.summary import Speed, Summary

Progress = Callable[[str, int, int], None]
UNSTEADY = 0.1
"""Share of the graphs that may stay unsteady before the whole run is called unstable."""
SLOW = 0.5
"""Share of the time that the machine may be slower than the figures say, likewise."""


def profile_graphs(
    engines: Sequence[EngineFiles], place: Backend, path: Path, progress: Progress, effort: Effort | None = None
) -> LatencyTable:
    """Measure all graphs of some recipes of one network and write the latency table to `path`.

    Samples are kept beside it after each window; a killed call continues there, unless graphs, library or device
    changed. Raises InputError, EngineError.
    """
    effort = effort or measure.Effort()
    jobs = jobs_at(place, engines)
    samples = kept_samples(engines, place, path, effort, jobs)
    before = place.state()
    names = tuple(job.name for job in jobs)
    for event in place.measure(Task(samples.run, tuple(jobs), names, reference_of(jobs)), effort, samples.in_order):
        samples.append(event)
        progress("measurements", *windows_done(samples, names, effort))
    table = table_of(engines, jobs, place, samples, effort, before, place.state())
    latency.write_latency_table(path, table)
    samples.path.unlink()
    return table


def windows_done(samples: SampleLog, names: Collection[str], effort: Effort) -> tuple[int, int]:
    """How many of the visits that these jobs need at least are done, and how many these are.

    All jobs are visited in turn, so that jobs that are done would say nothing for most of the time. The last visit of a
    job counts when it is steady or given up.
    """
    full_ms = measure.full_speed_ms(samples.in_order)
    taken = [samples.windows.get(name, []) for name in names]
    done = 0
    for windows in taken:
        whole = len(windows) >= effort.windows and measure.is_done(windows, effort, full_ms)
        done += effort.windows if whole else min(len(windows), effort.windows - 1)
    return done, effort.windows * len(taken)


def jobs_at(place: Backend, engines: Sequence[EngineFiles]) -> list[Job]:
    """Those of `profiling_jobs` that can be measured there."""
    return [job for job in profiling_jobs(engines) if job.path is not None or place.transfers is None]


def kept_samples(
    engines: Sequence[EngineFiles], place: Backend, path: Path, effort: Effort, jobs: Sequence[Job]
) -> SampleLog:
    """What was timed of these graphs there, by this protocol, before a measurement for the table `path` broke off."""
    names = {job.name for job in jobs}
    return SampleLog(path.with_suffix(".samples.jsonl"), _header(engines, place, effort), names)


def _header(engines: Sequence[EngineFiles], place: Backend, effort: Effort) -> dict[str, Any]:
    return {
        "library": f"{place.library} {place.version}",
        "power_mode": place.state().power_mode,
        "machine": {name: fact for name, fact in place.facts.items() if name != "load_average"},
        "recipes": {each.graph_set.recipe: each.graph_set.identity for each in engines},
        "graphs": {
            job_name(name, spec.precision): spec.sha256
            for each in engines
            for name, spec in sorted(each.graph_set.graphs.items())
        },
        "effort": repr(effort),
    }


def table_of(
    engines: Sequence[EngineFiles],
    jobs: Sequence[Job],
    place: Backend,
    samples: SampleLog,
    effort: Effort,
    before: DeviceState,
    after: DeviceState,
) -> LatencyTable:
    lacking = [job.name for job in jobs if not samples.windows.get(job.name)]
    if lacking:
        raise InputError(f"{len(lacking)} graphs were not measured ({lacking[0]} ...): run the same command again")
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
    environment = place.facts | _environment(before, after) | verdict
    empty = empty_table(engines, place)
    # A graph that two recipes share may have failed in one of them, for want of memory.
    empty = replace(empty, failed={key: failure for key, failure in empty.failed.items() if key not in entries})
    if place.transfers is None:
        return replace(empty, environment=environment, entries=entries)
    return replace(empty, environment=environment, entries=entries | place.transfers(entries), source="estimated")


def empty_table(engines: Sequence[EngineFiles], place: Backend) -> LatencyTable:
    """Of a device on which nothing was measured yet; what has no engine there has failed."""
    failed = {
        (name, spec.precision): GraphFailure(name, spec.sha256, spec.precision, error)
        for each in engines
        for name, error in each.failed.items()
        for spec in [each.graph_set.spec(name)]
    }
    return LatencyTable(
        device=place.device,
        library=place.library,
        library_version=place.version,
        network=engines[0].graph_set.candidate.identity,
        environment=place.facts,
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
    """Whether the table can be believed, and if not the likely cause."""
    unstable = speed.slow_share > SLOW or unsteady > UNSTEADY
    told = {
        "slow_share": f"{speed.slow_share:.3f}",
        "slow_by": f"{speed.slow_by:.2f}",
        "unsteady": f"{unsteady:.3f}",
    }
    if not unstable:
        return {"verdict": "steady", **told}
    cause = power.likely_cause(before, after) or "probably other programs"
    return {"verdict": "unstable", "likely_cause": cause, **told}


def _environment(before: DeviceState, after: DeviceState) -> dict[str, str]:
    """Power mode, clocks and temperatures as text, as far as the device tells them."""
    clocks = ", ".join(
        f"{name} {mhz:.0f} of {dict(after.limits_mhz).get(name, mhz):.0f} MHz" for name, mhz in after.clocks_mhz
    )
    hot = [
        f"{name} {start:.0f} to {dict(after.temperatures_c)[name]:.0f} C"
        for name, start in before.temperatures_c
        if name in dict(after.temperatures_c)
    ]
    told = {"power_mode": after.power_mode or "", "clocks": clocks, "temperatures": ", ".join(hot)}
    return {name: text for name, text in told.items() if text}
