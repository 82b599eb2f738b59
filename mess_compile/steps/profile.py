"""The step `profile`: a latency table, measured here or over SSH, or estimated."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mess_compile.data_folder import Data
from mess_compile.device.connect import device_session, remote_for
from mess_compile.engines.files import EngineFiles, plain_files
from mess_compile.engines.jobs import job_name, profiling_jobs
from mess_compile.engines.prepare import built_here, engine_files, precise_graphs, verified_graphs
from mess_compile.engines.remote_build import forms_there
from mess_compile.latency.table import LatencyTable, read_latency_table, write_latency_table
from mess_compile.network import GraphSet, read_graph_set
from mess_compile.planned_step import PlannedStep
from mess_compile.reporter import SILENT, Reporter
from mess_compile.runtime.base.errors import InputError, StaleError
from mess_compile.runtime.engines.engine import FP32, open_library
from mess_compile.runtime.machine import clocks
from mess_compile.runtime.measure import measure
from mess_compile.runtime.measure.measure import Effort
from mess_compile.runtime.serve.worker import event_from_line
from mess_compile.search.requirement import Requirement
from mess_compile.steps.build import EngineOptions, planned_builds, planned_recipes
from mess_compile.steps.device_choice import host_of, refuse_python_here, target_of
from mess_compile.steps.evaluate import current_statistics
from mess_compile.targets import Target, find_target, known_targets, refuse_unless_here
from mess_compile.workspace import Workspace

if TYPE_CHECKING:
    from mess_compile.device.remote import Remote
    from mess_compile.profile.backends import Backend
    from mess_compile.profile.selection import Subject
    from mess_compile.profile.sparse import SubsetJob


@dataclass(frozen=True)
class Subset:
    """Measures only what could change the plan that `requirements` ask for, within `budget_s` seconds.

    A subset that nobody asked for, `by_default`, is for devices over SSH, where measuring everything takes hours.
    """

    requirements: tuple[Requirement, ...] = (Requirement(max_err_pp=1.0),)
    budget_s: float = math.inf
    by_default: bool = False


@dataclass(frozen=True)
class ProfileOptions:
    """What to measure, and where.

    `hosts` (ssh://user@host) are where the device is: none for this machine or the remembered host; of several devices
    of one kind the first is the one that the table is of, and the others share its work. `data` has images to choose
    precisions by, `effort` says how long to measure (None: the default), `subset` what (None: every graph).
    `lock_clocks` holds the clocks while measuring. `python` starts Python at the hosts.
    """

    precisions: tuple[str, ...] = (FP32,)
    data: Data | None = None
    effort: Effort | None = None
    hosts: tuple[str, ...] = ()
    subset: Subset | None = None
    lock_clocks: bool = False
    python: str | None = None


@dataclass(frozen=True)
class _ProfileRequest:
    """A profile whose device, hosts and subset are known."""

    workspace: Workspace
    target: Target
    options: ProfileOptions
    reporter: Reporter
    started: float

    @property
    def path(self) -> Path:
        return self.workspace.latency(self.target.name)

    def in_time(self) -> bool:
        subset = self.options.subset
        return subset is None or time.monotonic() - self.started < subset.budget_s


def resolved(workspace: Workspace, target: Target, options: ProfileOptions) -> ProfileOptions:
    """The options with the hosts that are remembered, and without a default subset on this machine.

    Raises InputError when options do not go together.
    """
    known = host_of(workspace, target)
    hosts = options.hosts or (() if known is None else (known,))
    if len(set(hosts)) < len(hosts):
        raise InputError(f"--host {max(hosts, key=hosts.count)} is named twice: name each device once")
    subset = None if options.subset is not None and options.subset.by_default and not hosts else options.subset
    if subset and len(options.precisions) > 1 and any(each.setting == "anytime" for each in subset.requirements):
        raise InputError("the anytime setting compares plans of one precision: profile one --precision for it")
    if not hosts:
        refuse_python_here(options.python)
    return replace(options, hosts=hosts, subset=subset)


def profile(
    workspace: Workspace,
    device: str | None = None,
    options: ProfileOptions = ProfileOptions(),
    reporter: Reporter = SILENT,
) -> LatencyTable:
    """Measure every graph in each precision on the device and write its latency table; the device is remembered.

    Engines that are missing are built there first; a graph that has none is noted in the table. With a subset the rest
    of the table is estimated. Notes say what comes next, about how long it takes, and when trtexec measures in place
    of a Python that cannot be used. Raises InputError, EngineError, RemoteError.
    """
    started = time.monotonic()
    target = target_of(workspace, device)
    options = resolved(workspace, target, options)
    request = _ProfileRequest(workspace, target, options, reporter, started)
    table = _profile_there(request) if options.hosts else _profile_here(request)
    workspace.remember(device=target.name, host=options.hosts[0] if options.hosts else None)
    for host in options.hosts:
        workspace.remember_python(host, options.python)
    return table


def _profile_here(request: _ProfileRequest) -> LatencyTable:
    from mess_compile.profile import backends

    workspace, target, options = request.workspace, request.target, request.options
    ways = "reach it with --host ssh://user@host, run this command on it, or go without it by --estimate"
    refuse_unless_here(target, workspace.root, ways)
    engines = _files_here(request)
    compiled = target.library.startswith("onnxruntime")
    build = backends.nothing_to_build if compiled else partial(built_here, workspace, target, request.reporter.progress)
    locked = clocks.lock_clocks(workspace.clocks(target.name)) if options.lock_clocks else nullcontext()
    with locked, closing(open_library(target.library)) as library:
        backend = backends.local_backend(library, target.name, engines[0].graph_set, build)
        return _measured(request, engines, backend)


def _files_here(request: _ProfileRequest) -> tuple[EngineFiles, ...]:
    """Engines of every graph; of a subset the ONNX files, engines are built as they are needed."""
    options, progress = request.options, request.reporter.progress
    if options.subset is None:
        return engine_files(request.workspace, request.target, options.precisions, options.data, None, progress)
    made = precise_graphs(request.workspace, request.target, options.precisions, options.data, progress)
    return tuple(plain_files(each.graph_set) for each in made)


def _profile_there(request: _ProfileRequest) -> LatencyTable:
    from mess_compile.profile import multi_device

    options, hosts = request.options, request.options.hosts
    with ExitStack() as connected:
        remotes = [connected.enter_context(remote_for(request.workspace, host, options.python)) for host in hosts]
        forms = forms_there(
            request.workspace, request.target, options.precisions, options.data, request.reporter.progress
        )
        found = [_backend_at(request, remote, forms[0].graph_set) for remote in remotes]
        if len(hosts) > 1:
            job = _subset_job(request, forms, found[0])
            return multi_device.profile_shared(job, dict(zip(hosts, found, strict=True)), options.subset is None)
        engines = forms if options.subset is not None else found[0].build(forms, None)
        return _measured(request, engines, found[0])


def _measured(request: _ProfileRequest, engines: Sequence[EngineFiles], backend: Backend) -> LatencyTable:
    from mess_compile.profile import full, sparse

    if request.options.subset is None:
        progress, effort = request.reporter.progress, request.options.effort
        return full.profile_graphs(engines, backend, request.path, progress, effort)
    return sparse.profile_subset(_subset_job(request, engines, backend))


def _backend_at(request: _ProfileRequest, remote: Remote, graph_set: GraphSet) -> Backend:
    """The device there, by its Python or by trtexec."""
    from mess_compile.latency.estimate import transfer_estimates
    from mess_compile.profile import backends

    workspace, target, reporter = request.workspace, request.target, request.reporter
    session = device_session(workspace, remote, target, graph_set, reporter)
    if request.options.lock_clocks:
        session.lock_clocks_while_measuring()
    transfers = None
    if not session.measures_transfers:
        transfers = transfer_estimates(read_graph_set(workspace.graphs), target)
    return backends.remote_backend(session, target.name, transfers)


def _subset_job(request: _ProfileRequest, forms: Sequence[EngineFiles], backend: Backend) -> SubsetJob:
    from mess_compile.profile import sparse

    subset, reporter = request.options.subset, request.reporter
    requirements = subset.requirements if subset else ()
    graph_sets = [each.graph_set for each in forms]
    subject = subject_of(request.workspace, request.target, graph_sets, requirements, reporter)
    if requirements and not subject.requirements:
        reporter.warn(
            "no evaluation, and no labelled images to make one (`mess-compile evaluate --data DIR`): measuring a "
            "representative subset of the graphs, whatever the requirement"
        )
    effort = request.options.effort or measure.Effort()
    return sparse.SubsetJob(tuple(forms), backend, subject, request.path, reporter, request.in_time, effort)


def subject_of(
    workspace: Workspace,
    target: Target,
    graph_sets: Sequence[GraphSet],
    requirements: tuple[Requirement, ...] = (),
    reporter: Reporter = SILENT,
) -> Subject:
    """What a subset is selected by. Without statistics, and data to record them by, no requirement can guide it."""
    from mess_compile.latency.estimate import priors_of
    from mess_compile.profile import selection

    precisions = [spec.precision for each in graph_sets for spec in each.graphs.values()]
    found = {}
    for each in graph_sets if requirements else ():
        with suppress(InputError, StaleError):
            found[each.recipe] = current_statistics(workspace, each, target.name, None, Reporter(reporter.progress))
    priors = priors_of(read_graph_set(workspace.graphs), target, precisions)
    twins = selection.twins(*graph_sets)
    return selection.Subject(tuple(graph_sets), priors, found, requirements if found else (), twins)


def estimate(
    workspace: Workspace,
    device: str | None = None,
    precisions: Sequence[str] = (FP32,),
    data: Data | None = None,
    reporter: Reporter = SILENT,
) -> LatencyTable:
    """Write a latency table without the device: measurements of these graphs stay, the rest is estimated.

    The device does not become the default. Recipes with measurements stay in the table, whichever are named. The
    estimate is calibrated by measurements on the device, or of this network on similar devices in this workspace.
    """
    from mess_compile.latency.estimate import forecast

    target = target_of(workspace, device)
    made = [each.graph_set for each in precise_graphs(workspace, target, precisions, data, reporter.progress)]
    plain = read_graph_set(workspace.graphs)
    tables = dict(_tables(workspace))
    known = tables.get(target.name)
    others = [(find_target(name, workspace.root), table) for name, table in tables.items()]
    table = forecast([*made, *_measured_besides(workspace, plain, known, made)], target, known, others, plain)
    write_latency_table(workspace.latency(target.name), table)
    return table


def _measured_besides(
    workspace: Workspace, plain: GraphSet, known: LatencyTable | None, made: Sequence[GraphSet]
) -> Iterator[GraphSet]:
    """The recipes other than `made` that `known` has further measurements of, if they are current."""
    from mess_compile.engines import recipes

    if known is None:
        return
    covered = {(name, spec.precision) for each in made for name, spec in each.graphs.items()}
    for recipe, identity in known.recipes.items():
        settled = recipes.stored_recipe(plain, recipe, workspace.recipes)
        if settled is None or settled.graph_set.identity != identity or recipe in {each.recipe for each in made}:
            continue
        keys = {(name, spec.precision) for name, spec in settled.graph_set.graphs.items()} - covered
        if any(known.entries[key].source == "measured" for key in keys & known.entries.keys()):
            yield settled.graph_set


def _tables(workspace: Workspace) -> Iterator[tuple[str, LatencyTable]]:
    """The readable latency tables, by device."""
    for name in known_targets(workspace.root):
        path = workspace.latency(name)
        if path.is_file():
            with suppress(InputError):
                yield name, read_latency_table(path)


def plan_profile(
    workspace: Workspace, device: str | None = None, options: ProfileOptions = ProfileOptions()
) -> tuple[PlannedStep, ...]:
    """What `profile` would do: build engines that are missing, then measure; no device is asked. Raises as it does."""
    target = target_of(workspace, device)
    options = resolved(workspace, target, options)
    graphs = verified_graphs(workspace)
    found = planned_recipes(workspace, target, graphs, options.precisions)
    compiled = target.library.startswith("onnxruntime")
    builds = (
        ()
        if compiled
        else planned_builds(workspace, target, found, EngineOptions(host=next(iter(options.hosts), None)))
    )
    sets = [graph_set for graph_set, _ in found]
    table = _forecast(workspace, target, sets, graphs)
    jobs = [job.name for job in profiling_jobs([plain_files(each) for each in sets])]
    measured, notes = set(jobs), _unfinished(workspace.latency(target.name), options)
    if options.subset is not None:
        measured, note = _first_batch(subject_of(workspace, target, sets), table, jobs)
        notes += (note,)
        builds = tuple(replace(each, least_s=(each.least_s or 0.0) * len(measured) / len(jobs)) for each in builds)
    return (*builds, _planned(target, sets, table, jobs, measured, options, notes))


def _planned(
    target: Target,
    sets: Sequence[GraphSet],
    table: LatencyTable,
    jobs: Sequence[str],
    measured: Collection[str],
    options: ProfileOptions,
    notes: tuple[str, ...],
) -> PlannedStep:
    effort = options.effort or measure.Effort()
    times = {job_name(*key): entry.mean_ms for key, entry in table.entries.items()}
    steady_s = {name: min(_settled_s(times.get(name, 0.0), effort), effort.max_s) for name in jobs}
    known = sum(entry.source == "measured" for entry in table.entries.values())
    precision, place = ",".join(each.recipe for each in sets), next(iter(options.hosts), "this machine")
    return PlannedStep(
        step="profile",
        what=f"profile {len(jobs)} graphs in {precision} for {target.name} at {place}",
        writes=(),
        least_s=effort.warm_up_s + sum(steady_s[name] for name in measured),
        most_s=effort.warm_up_s + len(jobs) * effort.max_s,
        basis=(
            f"{known} latencies measured before, {len(table.entries) - known} estimated; least if every "
            "graph is steady at once"
        ),
        notes=notes,
        device=target.name,
        precision=precision,
        place=place,
        graphs=len(jobs),
    )


def _settled_s(mean_ms: float, effort: Effort) -> float:
    """Time of a job that settles at once; the job before it takes about as long."""
    return effort.windows * max(effort.window_s, effort.window_runs * 2 * mean_ms / 1e3)


def _forecast(workspace: Workspace, target: Target, sets: Sequence[GraphSet], graphs: GraphSet) -> LatencyTable:
    from mess_compile.latency.estimate import forecast

    known = None
    with suppress(InputError):
        known = read_latency_table(workspace.latency(target.name))
    return forecast(sets, target, known, (), graphs)


def _unfinished(path: Path, options: ProfileOptions) -> tuple[str, ...]:
    """A note on a measurement that was interrupted."""
    try:
        lines = path.with_suffix(".samples.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    events = [event for event in map(event_from_line, lines) if isinstance(event, measure.Window)]
    timed = Counter(event.job for event in events)
    windows = (options.effort or measure.Effort()).windows
    done = sum(count >= windows for count in timed.values())
    return (f"continues an interrupted measurement that timed {done} of them, if machine and graphs are the same",)


def _first_batch(subject: Subject, table: LatencyTable, jobs: Sequence[str]) -> tuple[set[str], str]:
    """What a subset begins with."""
    from mess_compile.profile import selection

    batch = selection.next_batch(subject, replace(table, entries={}, failed={}))
    names = {job_name(*key) for key in batch.graphs} & {*jobs} if batch else set()
    note = f"subset: {len(names)} of them first, then only what could still change the answer (--all: everything)"
    return names, note
