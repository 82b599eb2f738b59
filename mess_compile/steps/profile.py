"""What the graphs cost on a target: engines built, and a latency table measured here, over SSH or estimated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mess_compile.data_folder import Data
from mess_compile.device.connect import device_session, refuse_python_here, remote_for
from mess_compile.engines.files import EngineFiles, plain_files
from mess_compile.engines.prepare import RecipeBuild, built_here, engine_files, engines_of, precise_graphs
from mess_compile.engines.remote_build import build_there, forms_there
from mess_compile.latency import table as latency
from mess_compile.network import GraphSet, read_graph_set
from mess_compile.runtime.base.errors import InputError, StaleError
from mess_compile.runtime.engines.engine import FP32, open_library
from mess_compile.search.requirement import Requirement
from mess_compile.steps.device_choice import host_of, target_of
from mess_compile.steps.evaluate import current_statistics
from mess_compile.targets import Target, find_target, known_targets, refuse_unless_here
from mess_compile.workspace import Progress, Workspace, silent

if TYPE_CHECKING:
    from mess_compile.device.remote import Remote
    from mess_compile.profile.backends import Backend
    from mess_compile.profile.selection import Subject
    from mess_compile.profile.sparse import Errand
    from mess_compile.runtime.measure.measure import Effort


def build(
    workspace: Workspace,
    device: str | None = None,
    precisions: Sequence[str] = (FP32,),
    data: Data | None = None,
    jobs: int | None = None,
    progress: Progress = silent,
    host: str | None = None,
    tell: Callable[[str], None] = lambda words: None,
    python: str | None = None,
) -> tuple[RecipeBuild, ...]:
    """Build the target's engines of every graph and precision, in `jobs` processes (None: one on each core).

    TensorRT-RTX builds ahead of time on any machine, the classic library on the device alone: this machine, or the one
    at `host` (ssh://user@host; the one remembered for it by default), where `python` starts Python, one at a time. fp16
    and int8 are settled first, on images of `data`: a graph that loses too much is built in a safer precision.
    """
    target = target_of(workspace, device)
    if host is None and target.library == "tensorrt":
        host = host_of(workspace, target)
    if host is not None:
        if jobs is not None:
            raise InputError(f"engines are built one at a time at {host}: drop --jobs {jobs}")
        built = build_there(workspace, target, precisions, data, host, progress, tell, python)
        workspace.remember_host(target.name, host)
        workspace.remember_python(host, python)
        return built
    refuse_python_here(python)
    if target.library == "tensorrt":
        refuse_unless_here(target, workspace.root, "build there with --host ssh://user@host, or run this command on it")
    return tuple(engines_of(workspace, target, precisions, data, jobs, progress))


@dataclass(frozen=True)
class Thrift:
    """What a sparing profile is for: `requirements` that plans are searched by, and the seconds that it may take.

    One that nobody asked for, `by_default`, is for devices over SSH, where measuring everything takes hours.
    """

    requirements: tuple[Requirement, ...] = (Requirement(max_err_pp=1.0),)
    budget_s: float = math.inf
    by_default: bool = False


@dataclass(frozen=True)
class _Order:
    """What `profile` was asked for, and who hears of it."""

    workspace: Workspace
    target: Target
    precisions: Sequence[str]
    data: Data | None
    progress: Progress
    tell: Callable[[str], None]
    effort: Effort | None
    thrift: Thrift | None
    lock_clocks: bool
    started: float
    python: str | None

    @property
    def path(self) -> Path:
        return self.workspace.latency(self.target.name)

    def in_time(self) -> bool:
        return self.thrift is None or time.monotonic() - self.started < self.thrift.budget_s


def profile(
    workspace: Workspace,
    device: str | None = None,
    progress: Progress = silent,
    precisions: Sequence[str] = (FP32,),
    data: Data | None = None,
    effort: Effort | None = None,
    host: str | Sequence[str] | None = None,
    thrift: Thrift | None = None,
    tell: Callable[[str], None] = lambda words: None,
    lock_clocks: bool = False,
    python: str | None = None,
) -> latency.LatencyTable:
    """Measure every graph in each precision on the device and write its latency table; the device is remembered.

    The device is this machine, or at `host` (ssh://user@host), which is remembered with it. Engines that are missing
    are built there first; a graph that has none is noted in the table. With `thrift` only what could change the answer
    is built and measured, and the rest estimated; `tell` hears what comes next, and how long it should take, and when
    trtexec measures in place of a Python that cannot be used at `host`. Of several hosts, devices of one kind, the
    first is the one that the table is of: the others share its work, and have tables beside it. With `lock_clocks` the
    clocks are held while it is measured, and put back whatever happens. `python` is what starts Python at `host`, a
    path there; remembered with it.
    """
    target = target_of(workspace, device)
    known = host_of(workspace, target) if host is None else host
    hosts = [known] if isinstance(known, str) else [*(known or ())]
    if len(set(hosts)) < len(hosts):
        raise InputError(f"--host {max(hosts, key=hosts.count)} is named twice: name each device once")
    if thrift is not None and thrift.by_default and not hosts:
        thrift = None
    if thrift and len(precisions) > 1 and any(wish.setting == "anytime" for wish in thrift.requirements):
        raise InputError("the anytime setting compares plans of one recipe: profile one --precision for it")
    started = time.monotonic()
    if not hosts:
        refuse_python_here(python)
    order = _Order(workspace, target, precisions, data, progress, tell, effort, thrift, lock_clocks, started, python)
    table = _profile_there(order, hosts) if hosts else _profile_here(order)
    workspace.remember(device=target.name, host=hosts[0] if hosts else None)
    for each in hosts:
        workspace.remember_python(each, python)
    return table


def _profile_here(order: _Order) -> latency.LatencyTable:
    from mess_compile.profile import backends, full
    from mess_compile.profile import sparse as thrift
    from mess_compile.runtime.machine import clocks

    workspace, target = order.workspace, order.target
    ways = "reach it with --host ssh://user@host, run this command on it, or go without it by --estimate"
    refuse_unless_here(target, workspace.root, ways)
    if order.thrift is None:
        engines = engine_files(workspace, target, order.precisions, order.data, None, order.progress)
    else:
        made = precise_graphs(workspace, target, order.precisions, order.data, order.progress)
        engines = tuple(plain_files(each.graph_set) for each in made)
    compiled = target.library.startswith("onnxruntime")
    build = backends.as_they_are if compiled else partial(built_here, workspace, target, order.progress)
    locked = clocks.lock_clocks(workspace.clocks(target.name)) if order.lock_clocks else nullcontext()
    with locked, closing(open_library(target.library)) as library:
        place = backends.here(library, target.name, engines[0].graph_set, build)
        if order.thrift is None:
            return full.profile_graphs(engines, place, order.path, order.progress, order.effort)
        return thrift.profile_sparingly(_errand(order, engines, place))


def _profile_there(order: _Order, hosts: Sequence[str]) -> latency.LatencyTable:
    from mess_compile.profile import full, multi_device
    from mess_compile.profile import sparse as thrift

    with ExitStack() as connected:
        remotes = [connected.enter_context(remote_for(order.workspace, host, order.python)) for host in hosts]
        forms = forms_there(order.workspace, order.target, order.precisions, order.data, order.progress)
        found = [_place_at(order, remote, forms[0].graph_set) for remote in remotes]
        if len(hosts) > 1:
            errand = _errand(order, forms, found[0])
            return multi_device.profile_shared(errand, dict(zip(hosts, found, strict=True)), order.thrift is None)
        (place,) = found
        if order.thrift is None:
            return full.profile_graphs(place.build(forms, None), place, order.path, order.progress, order.effort)
        return thrift.profile_sparingly(_errand(order, forms, place))


def _place_at(order: _Order, remote: Remote, graph_set: GraphSet) -> Backend:
    """The device there, by its Python or by trtexec."""
    from mess_compile.latency.estimate import transfer_estimates
    from mess_compile.profile import backends

    session = device_session(order.workspace, remote, order.target, graph_set, order.progress, order.tell)
    if order.lock_clocks:
        session.lock_clocks_while_measuring()
    transfers = None
    if not session.measures_transfers:
        transfers = transfer_estimates(read_graph_set(order.workspace.graphs), order.target)
    return backends.there(session, order.target.name, transfers)


def _errand(order: _Order, forms: Sequence[EngineFiles], place: Backend) -> Errand:
    from mess_compile.profile import sparse as thrift
    from mess_compile.runtime.measure import measure as measuring

    requirements = order.thrift.requirements if order.thrift else ()
    graph_sets = [each.graph_set for each in forms]
    subject = subject_of(order.workspace, order.target, graph_sets, requirements, order.progress)
    if requirements and not subject.requirements:
        order.tell(
            "no statistics, nor data to record them by (`mess-compile evaluate --data`): a fair share is measured"
        )
    effort = order.effort or measuring.Effort()
    return thrift.Errand(tuple(forms), place, subject, order.path, order.progress, order.tell, order.in_time, effort)


def subject_of(
    workspace: Workspace,
    target: Target,
    graph_sets: Sequence[GraphSet],
    requirements: tuple[Requirement, ...] = (),
    progress: Progress = silent,
) -> Subject:
    """What a sparing profile goes by. Without statistics, and data to record them by, no requirement can guide it."""
    from mess_compile.latency import estimate as forecast
    from mess_compile.profile import selection

    precisions = [spec.precision for each in graph_sets for spec in each.graphs.values()]
    found = {}
    for each in graph_sets if requirements else ():
        with suppress(InputError, StaleError):
            found[each.recipe] = current_statistics(workspace, each, target.name, None, progress)
    priors = forecast.priors_of(read_graph_set(workspace.graphs), target, precisions)
    twins = selection.twins(*graph_sets)
    return selection.Subject(tuple(graph_sets), priors, found, requirements if found else (), twins)


def estimate(
    workspace: Workspace,
    device: str | None = None,
    progress: Progress = silent,
    precisions: Sequence[str] = (FP32,),
    data: Data | None = None,
) -> latency.LatencyTable:
    """Write a latency table without the device: what was measured of these graphs is kept, the rest is estimated.

    The device does not become the default: that is the one measured last. Recipes of which something was measured stay
    in the table, whichever are named. Calibrated by what was measured on it, or
    of this network on other devices of its sort in this workspace.
    """
    from mess_compile.latency.estimate import forecast

    target = target_of(workspace, device)
    made = [each.graph_set for each in precise_graphs(workspace, target, precisions, data, progress)]
    plain = read_graph_set(workspace.graphs)
    tables = dict(_tables(workspace))
    known = tables.get(target.name)
    others = [(find_target(name, workspace.root), table) for name, table in tables.items()]
    table = forecast([*made, *_measured_besides(workspace, plain, known, made)], target, known, others, plain)
    latency.write_latency_table(workspace.latency(target.name), table)
    return table


def _measured_besides(
    workspace: Workspace, plain: GraphSet, known: latency.LatencyTable | None, made: Sequence[GraphSet]
) -> Iterator[GraphSet]:
    """The recipes other than `made` of which `known` holds measurements that are none of theirs, if still current."""
    from mess_compile.engines import recipes

    if known is None:
        return
    told = {(name, spec.precision) for each in made for name, spec in each.graphs.items()}
    for recipe, identity in known.recipes.items():
        settled = recipes.settled_graphs(plain, recipe, workspace.recipes)
        if settled is None or settled.graph_set.identity != identity or recipe in {each.recipe for each in made}:
            continue
        keys = {(name, spec.precision) for name, spec in settled.graph_set.graphs.items()} - told
        if any(known.entries[key].source == "measured" for key in keys & known.entries.keys()):
            yield settled.graph_set


def _tables(workspace: Workspace) -> Iterator[tuple[str, latency.LatencyTable]]:
    """Those that can be read, by the name of a known device."""
    for name in known_targets(workspace.root):
        path = workspace.latency(name)
        if path.is_file():
            with suppress(InputError):
                yield name, latency.read_latency_table(path)
