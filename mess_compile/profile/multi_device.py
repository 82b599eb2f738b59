"""Shares the work of a profile among several devices of one kind; each device gets its own table.

Every device measures the baselines and the graphs that calibrate estimates; each other graph is measured on one device.
In the other tables that measurement becomes an estimate: the time, scaled by the ratio of the two devices over the
graphs that both measured, with the spread of that ratio as its error. The first device's table is the result: the
graphs of its plan are measured on that device itself.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from mess_compile.latency.roofline import Estimate
from mess_compile.latency.table import LatencyTable, write_latency_table
from mess_compile.profile import selection
from mess_compile.profile.backends import Backend
from mess_compile.profile.selection import Key, Selection, Subject
from mess_compile.profile.sparse import SubsetJob, SubsetRun
from mess_compile.reporter import Reporter
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.measure.job_pool import PSEUDO_GRAPHS

PORTION = 16
"""Graphs that a device measures between two checks of the time limit."""
_FEWEST_COMMON = 3
"""Graphs that two devices must both have measured before their ratio is used."""
_T_90 = {2: 2.92, 3: 2.35, 4: 2.13, 5: 2.02, 6: 1.94, 7: 1.89, 8: 1.86, 9: 1.83}
"""Two-sided 90 % quantile of Student's t by degrees of freedom; 1.81 beyond."""


@dataclass(frozen=True)
class Ratio:
    """How many times as long one device takes as another, over the `graphs` that both measured.

    `middle` is the geometric mean, `low` and `high` are the extremes; 90 % of graphs lie within `factor` of `middle`.
    """

    middle: float
    low: float
    high: float
    factor: float
    graphs: int


def profile_shared(job: SubsetJob, backends: Mapping[str, Backend], everything: bool) -> LatencyTable:
    """Profile the devices `backends` (by host), the first of which is the job's, and write a table for each.

    With `everything` each graph is measured on one of them; otherwise only graphs that could still change the first
    device's plan. The first table goes to the job's path, the others beside it, named by the device's identity. The
    sample logs stay until all tables are written. Raises InputError when two hosts are one device, RemoteError,
    EngineError.
    """
    _refuse_duplicates(backends)
    runs = _runs(job, backends)
    first = next(iter(runs.values()))
    start = selection.next_batch(job.subject, first.table)
    assert start is not None, "an empty table lacks everything"
    _together([(run, start) for run in runs.values()])
    complete = _share(job, list(runs.values()), everything)
    tables = [_table_of(host, runs) for host in runs]
    for run, table in zip(runs.values(), tables, strict=True):
        write_latency_table(run.job.path, table)
    for run in runs.values() if complete else ():
        run.samples.path.unlink()
    return tables[0]


def _refuse_duplicates(backends: Mapping[str, Backend]) -> None:
    known: dict[str, str] = {}
    for host, backend in backends.items():
        other = known.setdefault(backend.facts.get("identity", host), host)
        if other != host:
            raise InputError(f"{host} is the same device as {other}: name each device once")


def _runs(job: SubsetJob, backends: Mapping[str, Backend]) -> dict[str, SubsetRun]:
    lock = threading.Lock()
    runs: dict[str, SubsetRun] = {}
    for host, backend in backends.items():
        path = _beside(job.path, backend) if runs else job.path
        runs[host] = SubsetRun(_reporting_for(replace(job, backend=backend, path=path), host, lock))
    return runs


def _beside(path: Path, backend: Backend) -> Path:
    return path.with_name(f"{path.stem}@{backend.facts['identity']}.json")


def _reporting_for(job: SubsetJob, host: str, lock: threading.Lock) -> SubsetJob:
    """The job with a reporter that names the host; the lock keeps messages of several devices apart."""

    def note(sentence: str) -> None:
        with lock:
            job.reporter.note(f"{host}: {sentence}")

    def warn(sentence: str) -> None:
        with lock:
            job.reporter.warn(f"{host}: {sentence}")

    def progress(label: str, done: int, total: int) -> None:
        with lock:
            job.reporter.progress(label, done, total)

    return replace(job, reporter=Reporter(progress, note, warn))


def _share(job: SubsetJob, runs: Sequence[SubsetRun], everything: bool) -> bool:
    """Distribute graphs to the devices until none is missing; False when time ran out first."""
    while wanted := _wanted(job.subject, runs, everything):
        if not job.in_time():
            return False
        portions = _distributed(wanted.graphs[: PORTION * len(runs)], runs)
        pairs = zip(runs, portions, strict=True)
        _together([(run, replace(wanted, graphs=tuple(portion))) for run, portion in pairs if portion])
    return True


def _wanted(subject: Subject, runs: Sequence[SubsetRun], everything: bool) -> Selection | None:
    first = runs[0]
    if everything:
        wanted = Selection(tuple(subject.specs), "every graph, each on one of the devices")
    else:
        known = replace(subject, other_devices=_from_others(first, runs))
        batch = selection.next_batch(known, first.table)
        if batch is None or subject.requirements:
            return batch  # the graphs of the plan are measured on the first device itself
        wanted = batch
    missing = tuple(key for key in wanted.graphs if not any(_is_known(run, key) for run in runs))
    return replace(wanted, graphs=missing) if missing else None


def _is_known(run: SubsetRun, key: Key) -> bool:
    return key in run.table.entries or key in run.table.failed


def _distributed(graphs: Sequence[Key], runs: Sequence[SubsetRun]) -> list[list[Key]]:
    """A portion for each device; graphs that another device has measured go to the first."""
    portions: list[list[Key]] = [[] for _ in runs]
    fresh = [key for key in graphs if not any(_is_known(run, key) for run in runs[1:])]
    portions[0] += [key for key in graphs if key not in fresh]
    for number, key in enumerate(fresh):
        portions[number % len(runs)].append(key)
    return portions


def _together(work: Sequence[tuple[SubsetRun, Selection]]) -> None:
    """Measure on all devices at once; an error on one is raised after the others are done."""
    with ThreadPoolExecutor(len(work)) as pool:
        running = [pool.submit(run.measure, wanted) for run, wanted in work]
    for each in running:
        each.result()


def _from_others(run: SubsetRun, runs: Sequence[SubsetRun]) -> dict[Key, Estimate]:
    """The measurements of other devices as estimates for this one."""
    found: dict[Key, Estimate] = {}
    for other in runs:
        ratio = None if other is run else ratio_of(other.table, run.table)
        if ratio is None:
            continue
        for key in other.table.entries.keys() - run.table.entries.keys():
            ms = other.table.entries[key].mean_ms * ratio.middle
            found[key] = Estimate(ms, ms / ratio.factor, ms * ratio.factor)
    return found


def ratio_of(of: LatencyTable, to: LatencyTable) -> Ratio | None:
    """The ratio of the times in `to` to those in `of`; None when too few graphs were measured in both."""
    logs = list(_log_ratios(of, to))
    if len(logs) < _FEWEST_COMMON:
        return None
    middle, spread = statistics.fmean(logs), statistics.stdev(logs)
    reach = _T_90.get(len(logs) - 1, 1.81) * spread * math.sqrt(1 + 1 / len(logs))
    return Ratio(
        math.exp(middle), math.exp(min(logs)), math.exp(max(logs)), max(1 + selection.SAME, math.exp(reach)), len(logs)
    )


def _log_ratios(of: LatencyTable, to: LatencyTable) -> Iterator[float]:
    for key in of.entries.keys() & to.entries.keys():
        if key[0] not in PSEUDO_GRAPHS and of.entries[key].mean_ms > 0 and to.entries[key].mean_ms > 0:
            yield math.log(to.entries[key].mean_ms / of.entries[key].mean_ms)


def _table_of(host: str, runs: Mapping[str, SubsetRun]) -> LatencyTable:
    """The table of one device, the rest estimated; its `environment` says how the other devices differ."""
    run = runs[host]
    others = _from_others(run, list(runs.values()))
    whole = run.whole_table(replace(run.job.subject, other_devices=others))
    differences = [_difference(other, runs[other].table, run.table) for other in runs if other != host]
    return replace(whole, environment={**whole.environment, "host": host, "beside": "; ".join(differences)})


def _difference(host: str, other: LatencyTable, table: LatencyTable) -> str:
    device = f"{host} ({other.environment.get('identity', 'unknown')}, {other.library} {other.library_version})"
    ratio = ratio_of(table, other)
    if ratio is None:
        return f"{device} measured too few of the same graphs to compare"
    return (
        f"{device} takes {ratio.middle:.2f}x as long ({ratio.low:.2f} to {ratio.high:.2f}, {ratio.graphs} graphs "
        "measured on both)"
    )
