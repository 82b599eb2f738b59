"""Measure every graph on a device, in context, and continue after a break; then the latency table."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile import latency, scenes, sparing
from mess_compile.candidates import BASELINE, GraphSet, head_graph_name, output_name, segment_name
from mess_compile.engines import EngineFiles
from mess_compile.latency import PSEUDO_GRAPHS, Failure, Latency, LatencyTable
from mess_compile.runtime import power, profile, summary
from mess_compile.runtime.engine import FP32, Library
from mess_compile.runtime.errors import InputError
from mess_compile.runtime.power import DeviceState
from mess_compile.runtime.profile import Effort, Job, Opened, Window
from mess_compile.runtime.session import describe_machine
from mess_compile.runtime.summary import Drift, Summary
from mess_compile.samples import Samples
from mess_compile.sessions import Session
from mess_compile.sparing import Subject
from mess_compile.statistics import threshold_table
from mess_compile.trtexec_session import TrtexecSession

Progress = Callable[[str, int, int], None]
Measure = Callable[["Task", Effort, Sequence[Window]], Iterator[Opened | Window]]
"""What, how long, what is known already -> what is measured now."""
Transfers = Callable[[Mapping[tuple[str, str], Latency]], dict[tuple[str, str], Latency]]
"""Entries that were measured -> those of upload, download and null stage, estimated."""
BUILDING_S = {"tensorrt": 60.0, "tensorrt_rtx": 1.0}
"""What an engine may take to build on a small device, before this one has shown its pace."""
UNSTEADY = 0.1
"""Share of the graphs that may stay unsteady before the whole run is called unstable."""


@dataclass(frozen=True)
class Task:
    """Jobs of one `run`, those among them to be `measured`, and the `reference` that opens every round."""

    run: str
    jobs: tuple[Job, ...]
    measured: tuple[str, ...]
    reference: str


@dataclass(frozen=True)
class Place:
    """A device that can be measured on: its name as a target, its library, what `facts` tell of it, and how to look.

    Where the pseudo graphs cannot be measured, `transfers` estimates them.
    """

    device: str
    library: str
    version: str
    facts: dict[str, str]
    measure: Measure
    state: Callable[[], DeviceState]
    transfers: Transfers | None = None


def here(library: Library, device: str, graph_set: GraphSet) -> Place:
    """This machine."""
    frame, thresholds = fed(graph_set)

    def measure(task: Task, effort: Effort, earlier: Sequence[Window]) -> Iterator[Opened | Window]:
        meter = power.power_meter()
        return profile.measure(
            library, task.jobs, frame, thresholds, task.reference, effort, earlier, meter, measured=task.measured
        )

    return Place(device, library.name, library.version, describe_machine(), measure, power.read_state)


def there(session: Session | TrtexecSession, device: str, transfers: Transfers | None = None) -> Place:
    """A device over SSH, which has said hello."""
    assert session.hello is not None, "whoever builds there first hears it"

    def measure(task: Task, effort: Effort, earlier: Sequence[Window]) -> Iterator[Opened | Window]:
        precisions = {job.name: job.name.partition("@")[2] or FP32 for job in task.jobs}
        return session.measure(task.run, task.jobs, precisions, task.measured, task.reference, effort, earlier)

    hello = session.hello
    return Place(device, hello.library, hello.version, hello.facts, measure, lambda: session.states[-1], transfers)


def built_there(session: Session | TrtexecSession, forms: Sequence[EngineFiles]) -> tuple[EngineFiles, ...]:
    """Have an engine of every graph there; those that do not build are failed. Raises what `Session.build` does."""
    failed = build_there(session, forms, None)
    return tuple(_without(each, failed) for each in forms)


def build_there(
    session: Session | TrtexecSession, forms: Sequence[EngineFiles], jobs: Collection[str] | None
) -> dict[str, str]:
    """Have engines there of some jobs' graphs, or of all; why those that failed did."""
    wanted = {}
    for each in forms:
        for name, path in each.paths.items():
            precision = each.graph_set.spec(name).precision
            if jobs is None or job_name(name, precision) in jobs:
                wanted[job_name(name, precision)] = path, precision
    return session.build(wanted)


def _without(engines: EngineFiles, failed: dict[str, str]) -> EngineFiles:
    """`failed` names jobs."""
    names = {name: job_name(name, engines.graph_set.spec(name).precision) for name in engines.paths}
    paths = {name: path for name, path in engines.paths.items() if names[name] not in failed}
    broken = {name: failed[job] for name, job in names.items() if job in failed}
    return EngineFiles(engines.graph_set, paths, {**engines.failed, **broken})


def fed(graph_set: GraphSet) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """What graphs are measured on: a generated frame at the network's input size, and the gate's thresholds."""
    frame = scenes.make_scene(0, graph_set.candidate.input_hw).frame
    return frame, threshold_table(graph_set.gate, len(graph_set.candidate.classes))


def profile_graphs(
    engines: Sequence[EngineFiles], place: Place, path: Path, progress: Progress, effort: Effort | None = None
) -> LatencyTable:
    """Measure all graphs of some recipes of one network and write the latency table to `path`.

    Samples are kept beside it after each window; a killed call continues there, unless graphs, library or device
    changed. Raises InputError, EngineError.
    """
    effort = effort or profile.Effort()
    jobs = _jobs_at(place, engines)
    header = _header(engines, place, effort)
    samples = Samples(path.with_suffix(".samples.jsonl"), header, {job.name for job in jobs})
    before = place.state()
    done = {name for name, windows in samples.windows.items() if profile.is_done(windows, effort)}
    names = tuple(job.name for job in jobs)
    for event in place.measure(Task(samples.run, tuple(jobs), names, _reference(jobs)), effort, samples.in_order):
        samples.append(event)
        if profile.is_done(samples.windows.get(event.job, []), effort):
            done.add(event.job)
        progress("profile", len(done), len(jobs))
    table = _table(engines, jobs, place, samples, effort, before, place.state())
    latency.write_latency_table(path, table)
    samples.path.unlink()
    return table


def profile_sparingly(
    forms: Sequence[EngineFiles],
    place: Place,
    build: Callable[[Sequence[EngineFiles], Collection[str]], dict[str, str]],
    subject: Subject,
    path: Path,
    progress: Progress,
    in_time: Callable[[], bool],
    tell: Callable[[str], None],
    effort: Effort | None = None,
) -> LatencyTable:
    """Build and measure what could still change the answer, while `in_time`; the rest of the table is estimated.

    Before each batch `tell` hears what it is for, and how long it should take. `build` has the engines of jobs made
    there, and says of which not. Samples are kept as by `profile_graphs`. Raises InputError, EngineError.
    """
    effort = effort or profile.Effort()
    every = _jobs_at(place, forms)
    samples = Samples(path.with_suffix(".samples.jsonl"), _header(forms, place, effort), {job.name for job in every})
    before, engines, table = place.state(), tuple(forms), _empty_table(forms, place)
    asked: dict[str, None] = {}
    pace_s, started = BUILDING_S.get(place.library, 0.0) + effort.max_s / 2, time.monotonic()
    while (wanted := sparing.next_batch(subject, table)) is not None and in_time():
        count = len(wanted.graphs)
        tell(f"{count} of {len(every)} graphs: {wanted.why}; about {max(1, round(count * pace_s / 60))} min")
        names = [name if name in PSEUDO_GRAPHS else job_name(name, precision) for name, precision in wanted.graphs]
        engines, jobs = _with_engines(place, engines, names, build)
        asked |= dict.fromkeys(name for name in (_reference(list(jobs.values())), *names) if name in jobs)
        task = _task(samples.run, jobs, names)
        for event in place.measure(task, effort, samples.of((*task.measured, task.reference))):
            samples.append(event)
            progress(
                f"measure: {len(asked)} of {len(every)}", _done(samples, task.measured, effort), len(task.measured)
            )
        unreached = {name: "nothing that runs leads there" for name in names if name not in jobs}
        engines = tuple(_without(each, unreached) for each in engines)
        known = [jobs[name] for name in asked if name in jobs]
        table = _table(engines, known, place, samples, effort, before, place.state())
        pace_s = (time.monotonic() - started) / len(asked)
    whole = sparing.expected_table(subject, table)
    whole = replace(whole, environment={**whole.environment, "coverage": sparing.coverage(subject, table)})
    latency.write_latency_table(path, whole)
    if wanted is None:  # else the budget ended it, and a further call goes on
        samples.path.unlink()
    return whole


def _with_engines(
    place: Place,
    engines: tuple[EngineFiles, ...],
    names: Sequence[str],
    build: Callable[[Sequence[EngineFiles], Collection[str]], dict[str, str]],
) -> tuple[tuple[EngineFiles, ...], dict[str, Job]]:
    """The jobs by name once all that the named ones need is built; another takes the place of what does not build."""
    asked: set[str] = set()
    while True:
        jobs = {job.name: job for job in _jobs_at(place, engines)}
        needed = set(_with_feeders(list(jobs.values()), [*names, _reference(list(jobs.values()))])) - asked
        if not needed:
            return engines, jobs
        failed = build(engines, needed)
        asked |= needed
        engines = tuple(_without(each, failed) for each in engines)


def _task(run: str, jobs: dict[str, Job], names: Sequence[str]) -> Task:
    """To measure the named jobs, as far as there are such, with what runs before them."""
    reference, measured = _reference(list(jobs.values())), tuple(name for name in names if name in jobs)
    chosen = _with_feeders(list(jobs.values()), [*measured, reference])
    return Task(run, tuple(jobs[name] for name in chosen), measured, reference)


def _done(samples: Samples, names: Collection[str], effort: Effort) -> int:
    return sum(profile.is_done(samples.windows.get(name, []), effort) for name in names)


def _with_feeders(jobs: Sequence[Job], names: Sequence[str]) -> list[str]:
    """The named jobs, what runs before each, and what feeds those, from the image on."""
    by_name = {job.name: job for job in jobs}
    needed = dict.fromkeys(name for name in names if name in by_name)
    fed: set[str] = set()

    def feed(name: str | None) -> None:
        if name is not None and name not in fed:
            fed.add(name)
            needed[name] = None
            if not name.startswith(("segment-0-", BASELINE)):  # these read the image
                feed(by_name[name].predecessor)

    for name in list(needed):
        feed(by_name[name].predecessor)
    return list(needed)


def job_name(graph: str, precision: str) -> str:
    return f"{graph}@{precision}"


def profiling_jobs(engines: Sequence[EngineFiles]) -> list[Job]:
    """Every graph that runs, once, with what runs before it in a cascade: the previous frame, the segment, or a head.

    Raises InputError when there is no path through the network at all.
    """
    jobs: dict[str, Job] = {}
    for each in engines:
        for job in _jobs_of(each) if each.heads else ():
            jobs.setdefault(job.name, job)
    if not jobs:
        each = engines[0]
        raise InputError(f"no head runs in {each.graph_set.recipe}: {'; '.join(each.failed.values())[:300]}")
    return list(jobs.values())


def _jobs_at(place: Place, engines: Sequence[EngineFiles]) -> list[Job]:
    """Those of `profiling_jobs` that can be measured there."""
    return [job for job in profiling_jobs(engines) if job.path is not None or place.transfers is None]


def _jobs_of(engines: EngineFiles) -> Iterator[Job]:
    graph_set, candidate = engines.graph_set, engines.graph_set.candidate
    sources, last = engines.sources, len(engines.graph_set.candidate.exit_points)

    def job(graph: str, predecessor: str | None) -> Job:
        known = predecessor in engines.paths
        return Job(named(graph), engines.paths[graph], named(str(predecessor)) if known else None)

    def named(graph: str) -> str:
        return job_name(graph, graph_set.spec(graph).precision)

    heads = [candidate.head(name) for name in engines.heads]
    typical = {point: _typical([h for h in heads if h.exit_point == point]) for point in {h.exit_point for h in heads}}
    outputs = {output_name(candidate.exit_point(point).hw): head for point, head in typical.items()}
    output, head_graph = next(iter(outputs.items()))
    for name in graph_set.baselines:
        if name in engines.paths:
            yield job(name, segment_name(sources.get(last, 0), last))
    for a, b in candidate.segments():
        if segment_name(a, b) in engines.paths and (a == 0 or a in sources):
            before = (typical.get(a) or segment_name(sources[a], a)) if a else output
            yield job(segment_name(a, b), before)
    for head in heads:
        yield job(head_graph_name(head.name), segment_name(sources[head.exit_point], head.exit_point))
    for name, before in outputs.items():
        yield job(name, before)
    yield Job(latency.UPLOAD, None, named(output))
    yield Job(latency.NULL, None, named(head_graph))
    yield Job(latency.DOWNLOAD, None, named(output))


def _typical(heads: Sequence[Any]) -> str:
    ordered = sorted(heads, key=lambda head: head.macs)
    return head_graph_name(ordered[len(ordered) // 2].name)


def _reference(jobs: Sequence[Job]) -> str:
    """The job that is measured in every round: a baseline, else the first."""
    return next((job.name for job in jobs if job.name.startswith(f"{BASELINE}@")), jobs[0].name)


def _header(engines: Sequence[EngineFiles], place: Place, effort: Effort) -> dict[str, Any]:
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


def _table(
    engines: Sequence[EngineFiles],
    jobs: Sequence[Job],
    place: Place,
    samples: Samples,
    effort: Effort,
    before: DeviceState,
    after: DeviceState,
) -> LatencyTable:
    lacking = [job.name for job in jobs if not samples.windows.get(job.name)]
    if lacking:
        raise InputError(f"{len(lacking)} graphs were not measured ({lacking[0]} ...): run the same command again")
    drift = summary.drift(samples.windows[_reference(jobs)])
    specs = {job_name(spec.name, spec.precision): spec for each in engines for spec in each.graph_set.graphs.values()}
    entries, unsteady = {}, 0
    for job in jobs:
        figures = summary.summarise(samples.windows[job.name], drift.factors, effort)
        unsteady += not figures.steady
        spec = specs.get(job.name)
        key = (spec.name, spec.precision) if spec else (job.name, FP32)
        entries[key] = _latency(*key, spec.sha256 if spec else "", figures, samples.opened.get(job.name))
    verdict = _verdict(drift, unsteady / len(jobs), before, after)
    environment = place.facts | _environment(before, after) | verdict
    empty = _empty_table(engines, place)
    # A graph that two recipes share may have failed in one of them, for want of memory.
    empty = replace(empty, failed={key: failure for key, failure in empty.failed.items() if key not in entries})
    if place.transfers is None:
        return replace(empty, environment=environment, entries=entries)
    return replace(empty, environment=environment, entries=entries | place.transfers(entries), source="estimated")


def _empty_table(engines: Sequence[EngineFiles], place: Place) -> LatencyTable:
    """Of a device on which nothing was measured yet; what has no engine there has failed."""
    failed = {
        (name, spec.precision): Failure(name, spec.sha256, spec.precision, error)
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


def _verdict(drift: Drift, unsteady: float, before: DeviceState, after: DeviceState) -> dict[str, str]:
    """Whether the table can be believed, and if not the likely cause."""
    unstable = drift.condemned or unsteady > UNSTEADY
    told = {"reference_spread": f"{drift.spread:.3f}", "unsteady": f"{unsteady:.3f}"}
    if not unstable:
        return {"verdict": "steady", **told}
    cause = power.likely_cause(before, after) or "nothing that this device tells: other programs, most likely"
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
