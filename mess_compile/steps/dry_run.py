"""What `build` and `profile` would do and how long it should take: nothing is written, and no device is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from mess_compile.cores import cores
from mess_compile.engines import build, recipes
from mess_compile.engines.files import plain_files
from mess_compile.engines.jobs import job_name, profiling_jobs
from mess_compile.engines.prepare import refuse_other_precisions, verified_graphs
from mess_compile.latency import estimate
from mess_compile.latency import table as latency
from mess_compile.latency.table import LatencyTable
from mess_compile.network import GraphSet
from mess_compile.profile import selection
from mess_compile.profile.sparse import BUILDING_S
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import FP32
from mess_compile.runtime.measure import measure
from mess_compile.runtime.measure.measure import Effort
from mess_compile.runtime.serve.worker import event_from_line
from mess_compile.steps.device_choice import host_of, target_of
from mess_compile.steps.profile import Thrift, subject_of
from mess_compile.targets import Target
from mess_compile.workspace import Workspace


@dataclass(frozen=True)
class Foresight:
    """One step that would be taken: of `graphs`, so many are `there` (None: only the device knows) and would be kept.

    It should take from `least_s` to `most_s`: estimates by `basis`. `notes` are what is to be known beside.
    """

    step: str
    device: str
    precision: str
    place: str
    graphs: int
    there: int | None
    least_s: float
    most_s: float
    basis: str
    notes: tuple[str, ...] = ()


_Recipe = tuple[GraphSet, tuple[str, ...]]
"""The graphs of a recipe, and what is to be known; where it is not settled yet those of fp32, under its name."""


def foresee_build(
    workspace: Workspace,
    device: str | None = None,
    precisions: Sequence[str] = (FP32,),
    jobs: int | None = None,
    host: str | None = None,
) -> tuple[Foresight, ...]:
    """What `build` would do, recipe by recipe. Raises InputError and EngineError where it would."""
    target = target_of(workspace, device)
    build.refuse_without_engines(target)
    return _builds(workspace, target, _recipes(workspace, target, verified_graphs(workspace), precisions), jobs, host)


def _builds(
    workspace: Workspace, target: Target, found: Sequence[_Recipe], jobs: int | None, host: str | None
) -> tuple[Foresight, ...]:
    if host is None and target.library == "tensorrt":
        host = host_of(workspace, target)
    return tuple(_build(workspace, target, graph_set, jobs, host, notes) for graph_set, notes in found)


def _recipes(
    workspace: Workspace, target: Target, graph_set: GraphSet, precisions: Sequence[str]
) -> tuple[_Recipe, ...]:
    refuse_other_precisions(target, precisions)
    return tuple(_each_recipe(workspace, target, graph_set, precisions))


def _each_recipe(
    workspace: Workspace, target: Target, graph_set: GraphSet, precisions: Sequence[str]
) -> Iterator[_Recipe]:
    for precision in precisions:
        recipe = recipes.recipe_name(precision, target.precisions)
        settled = recipes.settled_graphs(graph_set, recipe, workspace.recipes)
        if settled is not None:
            yield settled.graph_set, ()
        else:
            yield (
                replace(graph_set, recipe=recipe),
                (f"{precision} is settled first, graph by graph, on real images; that is not in the time",),
            )


def _build(
    workspace: Workspace,
    target: Target,
    graph_set: GraphSet,
    jobs: int | None,
    host: str | None,
    notes: tuple[str, ...],
) -> Foresight:
    folder = workspace.engines(target.name, graph_set.recipe)
    there = None if host else () if notes else build.engines_there(graph_set, target, folder)
    names = {entry.graph for entry in there or ()}
    known = {e.graph: e.seconds for place in folder.parent.glob("*") for e in build.entries_in(place) if not e.error}
    usual = fmean(known.values()) if known else BUILDING_S[target.library]
    at_once = 1 if host or target.library == "tensorrt" else jobs or cores()
    spent = sum(known.get(name, usual) for name in graph_set.graphs if name not in names) / at_once
    basis = f"{len(known)} engines built before" if known else f"{usual:g} s for an engine, a guess"
    return Foresight(
        step="build",
        device=target.name,
        precision=graph_set.recipe,
        place=host or str(folder),
        graphs=len(graph_set.graphs),
        there=None if there is None else len(there),
        least_s=spent,
        most_s=spent,
        basis=basis,
        notes=notes,
    )


def foresee_profile(
    workspace: Workspace,
    device: str | None = None,
    precisions: Sequence[str] = (FP32,),
    host: str | Sequence[str] | None = None,
    thrift: Thrift | None = None,
    effort: Effort | None = None,
) -> tuple[Foresight, ...]:
    """What `profile` would do: engines that are missing, then what is measured. Raises as `foresee_build`."""
    target, effort = target_of(workspace, device), effort or measure.Effort()
    known = host_of(workspace, target) if host is None else host
    first = known if known is None or isinstance(known, str) else next(iter(known), None)
    if thrift is not None and thrift.by_default and first is None:
        thrift = None
    graphs = verified_graphs(workspace)
    builds: tuple[Foresight, ...] = ()
    found = _recipes(workspace, target, graphs, precisions)
    if not target.library.startswith("onnxruntime"):
        build.refuse_without_engines(target)
        builds = _builds(workspace, target, found, None, first)
    sets = [graph_set for graph_set, _ in found]
    table = _forecast(workspace, target, sets, graphs)
    jobs = [job.name for job in profiling_jobs([plain_files(each) for each in sets])]
    times = {job_name(*key): entry.mean_ms for key, entry in table.entries.items()}
    steady = {name: min(_settled_s(times.get(name, 0.0), effort), effort.max_s) for name in jobs}
    wanted, notes = set(jobs), _begun(workspace.latency(target.name), effort)
    if thrift is not None:
        wanted, sparingly = _first_batch(subject_of(workspace, target, sets), table, jobs)
        notes += sparingly
        builds = tuple(replace(each, least_s=each.least_s * len(wanted) / len(jobs)) for each in builds)
    measured = sum(entry.source == "measured" for entry in table.entries.values())
    basis = f"{measured} latencies measured before, {len(table.entries) - measured} estimated"
    return (
        *builds,
        Foresight(
            step="profile",
            device=target.name,
            precision=",".join(each.recipe for each in sets),
            place=first or "this machine",
            graphs=len(jobs),
            there=None,
            least_s=effort.warm_up_s + sum(steady[name] for name in wanted),
            most_s=effort.warm_up_s + len(jobs) * effort.max_s,
            basis=f"{basis}; from all settling at once to none",
            notes=notes,
        ),
    )


def _settled_s(mean_ms: float, effort: Effort) -> float:
    """Of a job that is steady at once: its windows, in which what runs before it takes about as long."""
    return effort.windows * max(effort.window_s, effort.window_runs * 2 * mean_ms / 1e3)


def _forecast(workspace: Workspace, target: Target, sets: Sequence[GraphSet], graphs: GraphSet) -> LatencyTable:
    known = None
    with suppress(InputError):
        known = latency.read_latency_table(workspace.latency(target.name))
    return estimate.forecast(sets, target, known, (), graphs)


def _begun(path: Path, effort: Effort) -> tuple[str, ...]:
    """What a measurement that broke off has left."""
    try:
        lines = path.with_suffix(".samples.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    events = [event for event in map(event_from_line, lines) if isinstance(event, measure.Window)]
    timed = Counter(event.job for event in events)
    done = sum(count >= effort.windows for count in timed.values())
    return (f"it would go on where one broke off that had timed {done} of them, if machine and graphs are the same",)


def _first_batch(
    subject: selection.Subject, table: LatencyTable, jobs: Sequence[str]
) -> tuple[set[str], tuple[str, ...]]:
    """What a sparing profile begins with."""
    batch = selection.next_batch(subject, replace(table, entries={}, failed={}))
    names = {job_name(*key) for key in batch.graphs} & {*jobs} if batch else set()
    note = f"sparing: {len(names)} of them first, then only what could still change the answer (--all: everything)"
    return names, (note,)
