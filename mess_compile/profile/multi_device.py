"""Several devices of one kind share the work of a profile: each is measured apart, and no two are pooled.

All measure what plans are held against and what calibrates estimates; of the rest each graph is measured on one. What
another device measured stands in a table as an estimate: its time, by the ratio of the two devices over the graphs that
both measured, within the spread of that ratio. The table that answers is the first device's: what its plan rests on is
measured on that device itself.
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
"""Graphs that a device measures at once: between two portions the time is looked at."""
_FEWEST_COMMON = 3
_T_90 = {2: 2.92, 3: 2.35, 4: 2.13, 5: 2.02, 6: 1.94, 7: 1.89, 8: 1.86, 9: 1.83}
"""Two-sided 90 % of Student's t by degrees of freedom; 1.81 beyond."""


@dataclass(frozen=True)
class Ratio:
    """How many times as long as one device another takes, over `graphs` that both measured; `factor` is how far a
    graph's own ratio lies from it, 90 of 100 times."""

    middle: float
    low: float
    high: float
    factor: float
    graphs: int


def profile_shared(job: SubsetJob, backends: Mapping[str, Backend], everything: bool) -> LatencyTable:
    """Profile the devices `backends` (by host), the first of which is the job's, and write a table for each.

    With `everything` every graph is measured on one of them; else what could still change the first one's answer. The
    first table goes to the job's path, the others beside it, named by the device's identity. Samples are kept until
    all are written. Raises InputError when two hosts are one device, RemoteError, EngineError.
    """
    _refuse_the_same(backends)
    runs = _runs(job, backends)
    first = next(iter(runs.values()))
    start = selection.next_batch(job.subject, first.table)
    assert start is not None, "an empty table lacks everything"
    _together([(run, start) for run in runs.values()])
    settled = _share(job, list(runs.values()), everything)
    tables = [_table_of(host, runs) for host in runs]
    for run, table in zip(runs.values(), tables, strict=True):
        write_latency_table(run.job.path, table)
    for run in runs.values() if settled else ():
        run.samples.path.unlink()
    return tables[0]


def _refuse_the_same(backends: Mapping[str, Backend]) -> None:
    known: dict[str, str] = {}
    for host, backend in backends.items():
        other = known.setdefault(backend.facts.get("identity", host), host)
        if other != host:
            raise InputError(f"{host} is the same device as {other}: name each device once")


def _runs(job: SubsetJob, backends: Mapping[str, Backend]) -> dict[str, SubsetRun]:
    speaking = threading.Lock()
    runs: dict[str, SubsetRun] = {}
    for host, backend in backends.items():
        path = _beside(job.path, backend) if runs else job.path
        runs[host] = SubsetRun(_reporting_for(replace(job, backend=backend, path=path), host, speaking))
    return runs


def _beside(path: Path, backend: Backend) -> Path:
    return path.with_name(f"{path.stem}@{backend.facts['identity']}.json")


def _reporting_for(job: SubsetJob, host: str, speaking: threading.Lock) -> SubsetJob:
    """The job with a reporter that names the host; the lock keeps messages of several devices apart."""

    def note(sentence: str) -> None:
        with speaking:
            job.reporter.note(f"{host}: {sentence}")

    def progress(label: str, done: int, total: int) -> None:
        with speaking:
            job.reporter.progress(label, done, total)

    return replace(job, reporter=Reporter(progress, note))


def _share(job: SubsetJob, runs: Sequence[SubsetRun], everything: bool) -> bool:
    """Deal out what is wanted until nothing is, or time is up; whether it was the former."""
    while wanted := _wanted(job.subject, runs, everything):
        if not job.in_time():
            return False
        portions = _dealt(wanted.graphs[: PORTION * len(runs)], runs)
        dealt = zip(runs, portions, strict=True)
        _together([(run, replace(wanted, graphs=tuple(portion))) for run, portion in dealt if portion])
    return True


def _wanted(subject: Subject, runs: Sequence[SubsetRun], everything: bool) -> Selection | None:
    first = runs[0]
    if everything:
        wanted = Selection(tuple(subject.specs), "every graph on one of the devices")
    else:
        known = replace(subject, other_devices=_from_others(first, runs))
        batch = selection.next_batch(known, first.table)
        if batch is None or subject.requirements:
            return batch  # what a plan rests on is measured on the first device itself
        wanted = batch
    left = tuple(key for key in wanted.graphs if not any(_is_known(run, key) for run in runs))
    return replace(wanted, graphs=left) if left else None


def _is_known(run: SubsetRun, key: Key) -> bool:
    return key in run.table.entries or key in run.table.failed


def _dealt(graphs: Sequence[Key], runs: Sequence[SubsetRun]) -> list[list[Key]]:
    """A portion for each device; what another one has measured is left to the first."""
    portions: list[list[Key]] = [[] for _ in runs]
    fresh = [key for key in graphs if not any(_is_known(run, key) for run in runs[1:])]
    portions[0] += [key for key in graphs if key not in fresh]
    for number, key in enumerate(fresh):
        portions[number % len(runs)].append(key)
    return portions


def _together(work: Sequence[tuple[SubsetRun, Selection]]) -> None:
    """On all devices at once; one that fails does not stop the others, and is told of when they are done."""
    with ThreadPoolExecutor(len(work)) as pool:
        running = [pool.submit(run.measure, wanted) for run, wanted in work]
    for each in running:
        each.result()


def _from_others(run: SubsetRun, runs: Sequence[SubsetRun]) -> dict[Key, Estimate]:
    """What other devices measured, as estimates for this one."""
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
    """How many times as long as by the table `of` graphs take by `to`; None when too few were measured in both."""
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
    """What was measured there, the rest estimated; how the others differ is among what the table tells."""
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
        f"{device} takes {ratio.middle:.2f}x as long ({ratio.low:.2f} to {ratio.high:.2f}, {ratio.graphs} graphs that "
        "both measured)"
    )
