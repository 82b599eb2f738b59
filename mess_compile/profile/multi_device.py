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

from mess_compile.latency import table as latency
from mess_compile.latency.roofline import Estimate
from mess_compile.latency.table import LatencyTable
from mess_compile.profile import selection
from mess_compile.profile.backends import Backend
from mess_compile.profile.selection import Key, Selection, Subject
from mess_compile.profile.sparse import Course, Errand
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


def profile_shared(errand: Errand, places: Mapping[str, Backend], everything: bool) -> LatencyTable:
    """Profile the devices `places` (by host), the first of which is the errand's, and write a table for each.

    With `everything` every graph is measured on one of them; else what could still change the first one's answer. The
    first table goes to the errand's path, the others beside it, named by the device's identity. Samples are kept until
    all are written. Raises InputError when two hosts are one device, RemoteError, EngineError.
    """
    _refuse_the_same(places)
    courses = _courses(errand, places)
    first = next(iter(courses.values()))
    start = selection.next_batch(errand.subject, first.table)
    assert start is not None, "an empty table lacks everything"
    _together([(course, start) for course in courses.values()])
    settled = _share(errand, list(courses.values()), everything)
    tables = [_table_of(host, courses) for host in courses]
    for course, table in zip(courses.values(), tables, strict=True):
        latency.write_latency_table(course.errand.path, table)
    for course in courses.values() if settled else ():
        course.samples.path.unlink()
    return tables[0]


def _refuse_the_same(places: Mapping[str, Backend]) -> None:
    known: dict[str, str] = {}
    for host, place in places.items():
        other = known.setdefault(place.facts.get("identity", host), host)
        if other != host:
            raise InputError(f"{host} is the same device as {other}: name each device once")


def _courses(errand: Errand, places: Mapping[str, Backend]) -> dict[str, Course]:
    speaking = threading.Lock()
    courses: dict[str, Course] = {}
    for host, place in places.items():
        path = _beside(errand.path, place) if courses else errand.path
        courses[host] = Course(_heard(replace(errand, place=place, path=path), host, speaking))
    return courses


def _beside(path: Path, place: Backend) -> Path:
    return path.with_name(f"{path.stem}@{place.facts['identity']}.json")


def _heard(errand: Errand, host: str, speaking: threading.Lock) -> Errand:
    """One device at a time is heard, by its name."""

    def tell(words: str) -> None:
        with speaking:
            errand.tell(f"{host}: {words}")

    def progress(label: str, done: int, total: int) -> None:
        with speaking:
            errand.progress(label, done, total)

    return replace(errand, tell=tell, progress=progress)


def _share(errand: Errand, courses: Sequence[Course], everything: bool) -> bool:
    """Deal out what is wanted until nothing is, or time is up; whether it was the former."""
    while wanted := _wanted(errand.subject, courses, everything):
        if not errand.in_time():
            return False
        portions = _dealt(wanted.graphs[: PORTION * len(courses)], courses)
        dealt = zip(courses, portions, strict=True)
        _together([(course, replace(wanted, graphs=tuple(portion))) for course, portion in dealt if portion])
    return True


def _wanted(subject: Subject, courses: Sequence[Course], everything: bool) -> Selection | None:
    first = courses[0]
    if everything:
        wanted = Selection(tuple(subject.specs), "every graph on one of the devices")
    else:
        known = replace(subject, elsewhere=_from_others(first, courses))
        batch = selection.next_batch(known, first.table)
        if batch is None or subject.requirements:
            return batch  # what a plan rests on is measured on the first device itself
        wanted = batch
    left = tuple(key for key in wanted.graphs if not any(_is_known(course, key) for course in courses))
    return replace(wanted, graphs=left) if left else None


def _is_known(course: Course, key: Key) -> bool:
    return key in course.table.entries or key in course.table.failed


def _dealt(graphs: Sequence[Key], courses: Sequence[Course]) -> list[list[Key]]:
    """A portion for each device; what another one has measured is left to the first."""
    portions: list[list[Key]] = [[] for _ in courses]
    fresh = [key for key in graphs if not any(_is_known(course, key) for course in courses[1:])]
    portions[0] += [key for key in graphs if key not in fresh]
    for place, key in enumerate(fresh):
        portions[place % len(courses)].append(key)
    return portions


def _together(work: Sequence[tuple[Course, Selection]]) -> None:
    """On all devices at once; one that fails does not stop the others, and is told of when they are done."""
    with ThreadPoolExecutor(len(work)) as pool:
        running = [pool.submit(course.measure, wanted) for course, wanted in work]
    for each in running:
        each.result()


def _from_others(course: Course, courses: Sequence[Course]) -> dict[Key, Estimate]:
    """What other devices measured, as estimates for this one."""
    found: dict[Key, Estimate] = {}
    for other in courses:
        ratio = None if other is course else ratio_of(other.table, course.table)
        if ratio is None:
            continue
        for key in other.table.entries.keys() - course.table.entries.keys():
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


def _table_of(host: str, courses: Mapping[str, Course]) -> LatencyTable:
    """What was measured there, the rest estimated; how the others differ is among what the table tells."""
    course = courses[host]
    elsewhere = _from_others(course, list(courses.values()))
    whole = course.whole_table(replace(course.errand.subject, elsewhere=elsewhere))
    told = [_difference(other, courses[other].table, course.table) for other in courses if other != host]
    return replace(whole, environment={**whole.environment, "host": host, "beside": "; ".join(told)})


def _difference(host: str, other: LatencyTable, table: LatencyTable) -> str:
    device = f"{host} ({other.environment.get('identity', 'unknown')}, {other.library} {other.library_version})"
    ratio = ratio_of(table, other)
    if ratio is None:
        return f"{device} measured too few of the same graphs to compare"
    return (
        f"{device} takes {ratio.middle:.2f}x as long ({ratio.low:.2f} to {ratio.high:.2f}, {ratio.graphs} graphs that "
        "both measured)"
    )
