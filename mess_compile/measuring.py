"""What the graphs cost on a target: engines built, and a latency table measured here, over SSH or estimated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mess_compile import latency
from mess_compile.candidates import read_graph_set
from mess_compile.compiling import (
    RecipeBuild,
    engine_files,
    engines_of,
    in_precision,
    refuse_other_precisions,
    target_of,
    verified_graphs,
)
from mess_compile.elsewhere import any_session_there, forms_there
from mess_compile.engines import EngineFiles
from mess_compile.recording import current_statistics
from mess_compile.runtime import machine
from mess_compile.runtime.engine import FP32, open_library
from mess_compile.runtime.errors import InputError, StaleError
from mess_compile.search.requirement import Requirement
from mess_compile.targets import Target, find_target, known_targets, refuse_unless_here, targets_here
from mess_compile.workspace import Workspace

if TYPE_CHECKING:
    from mess_compile.runtime.profile import Effort
    from mess_compile.sparing import Subject

Progress = Callable[[str, int, int], None]


def build(
    workspace: Workspace,
    device: str | None,
    precisions: Sequence[str],
    data: Path | None,
    jobs: int | None,
    progress: Progress,
) -> tuple[RecipeBuild, ...]:
    """Build the target's engines of every graph and precision, in `jobs` processes (None: one on each core).

    TensorRT-RTX builds ahead of time on any machine, the classic library on the device itself only. fp16 and int8 are
    settled first, on images of `data`: a graph that loses too much is built in a safer precision.
    """
    target = target_of(workspace, device)
    if target.library == "tensorrt":
        refuse_unless_here(target, workspace.root)
    return tuple(engines_of(workspace, target, precisions, data, jobs, progress))


def profile(
    workspace: Workspace,
    device: str | None,
    progress: Progress,
    precisions: Sequence[str] = (FP32,),
    data: Path | None = None,
    effort: Effort | None = None,
    host: str | None = None,
    thrift: Thrift | None = None,
    tell: Callable[[str], None] = lambda words: None,
    lock_clocks: bool = False,
) -> latency.LatencyTable:
    """Measure every graph in each precision on the device and write its latency table; the device is remembered.

    The device is this machine, or at `host` (ssh://user@host), which is remembered with it. Engines that are missing
    are built there first; a graph that has none is noted in the table. With `thrift`, over SSH, only what could change
    the answer is built and measured, and the rest estimated; `tell` hears what comes next, and how long it should take,
    and when trtexec measures in place of a Python that cannot be used at `host`. With `lock_clocks` the clocks are held
    while it is measured, and put back whatever happens.
    """
    target = target_of(workspace, device)
    if host is None and target not in targets_here((target,), machine.this_machine()):
        host = workspace.memory().hosts.get(target.name)
    if host is None:
        table = _profile_here(workspace, target, precisions, data, progress, effort, lock_clocks)
    else:
        table = _profile_there(workspace, target, precisions, data, progress, effort, host, thrift, tell, lock_clocks)
    workspace.remember(device=target.name, host=host)
    return table


@dataclass(frozen=True)
class Thrift:
    """What a sparing profile is for: `requirements` that plans are searched by, and the seconds that it may take."""

    requirements: tuple[Requirement, ...] = (Requirement(max_err_pp=1.0),)
    budget_s: float = math.inf


def estimate(
    workspace: Workspace,
    device: str | None,
    progress: Progress,
    precisions: Sequence[str] = (FP32,),
    data: Path | None = None,
) -> latency.LatencyTable:
    """Write a latency table without the device: what was measured of these graphs is kept, the rest is estimated.

    Calibrated by what was measured on it, or of this network on other devices of its sort in this workspace.
    """
    from mess_compile.forecast import forecast

    target = target_of(workspace, device)
    plain = verified_graphs(workspace)
    refuse_other_precisions(target, precisions)
    made = [in_precision(workspace, plain, p, target.precisions, data, progress).graph_set for p in precisions]
    tables = dict(_tables(workspace))
    known = tables.get(target.name)
    others = [(find_target(name, workspace.root), table) for name, table in tables.items()]
    table = forecast(made, target, known, others, plain)
    latency.write_latency_table(workspace.latency(target.name), table)
    workspace.remember(device=target.name)
    return table


def _tables(workspace: Workspace) -> Iterator[tuple[str, latency.LatencyTable]]:
    """Those that can be read, by the name of a known device."""
    for name in known_targets(workspace.root):
        path = workspace.latency(name)
        if path.is_file():
            with suppress(InputError):
                yield name, latency.read_latency_table(path)


def _profile_here(
    workspace: Workspace,
    target: Target,
    precisions: Sequence[str],
    data: Path | None,
    progress: Progress,
    effort: Effort | None,
    lock_clocks: bool,
) -> latency.LatencyTable:
    from mess_compile import profiling
    from mess_compile.runtime import clocks

    ways = "reach it with --host ssh://user@host, run this command on it, or go without it by --estimate"
    refuse_unless_here(target, workspace.root, ways)
    engines = engine_files(workspace, target, precisions, data, None, progress)
    keep = workspace.clocks(target.name)
    with clocks.lock_clocks(keep) if lock_clocks else nullcontext(), closing(open_library(target.library)) as library:
        place = profiling.here(library, target.name, engines[0].graph_set)
        return profiling.profile_graphs(engines, place, workspace.latency(target.name), progress, effort)


def _profile_there(
    workspace: Workspace,
    target: Target,
    precisions: Sequence[str],
    data: Path | None,
    progress: Progress,
    effort: Effort | None,
    host: str,
    thrift: Thrift | None,
    tell: Callable[[str], None],
    lock_clocks: bool,
) -> latency.LatencyTable:
    from mess_compile import profiling, trtexec_session
    from mess_compile.remote import Remote, parse_host

    started, path = time.monotonic(), workspace.latency(target.name)
    if thrift and len(precisions) > 1 and any(wish.setting == "anytime" for wish in thrift.requirements):
        raise InputError("the anytime setting compares plans of one recipe: profile one --precision for it")
    with Remote(parse_host(host)) as remote:
        forms = forms_there(workspace, target, precisions, data, progress)
        session = any_session_there(workspace, remote, target, forms[0].graph_set, progress, tell)
        by_trtexec = isinstance(session, trtexec_session.TrtexecSession)
        if isinstance(session, trtexec_session.TrtexecSession):
            if lock_clocks:
                raise InputError("clocks are locked by the Python there, which cannot be used: lock them there by hand")
        else:
            session.lock_clocks = lock_clocks
        transfers = trtexec_session.transfers(read_graph_set(workspace.graphs), target) if by_trtexec else None
        place = profiling.there(session, target.name, transfers)
        if thrift is None:
            return profiling.profile_graphs(profiling.built_there(session, forms), place, path, progress, effort)
        subject = _subject(workspace, target, forms, thrift.requirements, progress)
        if not subject.requirements:
            tell("no statistics, nor data to record them by (`mess-compile evaluate --data`): a fair share is measured")
        return profiling.profile_sparingly(
            forms,
            place,
            partial(profiling.build_there, session),
            subject,
            path,
            progress,
            lambda: time.monotonic() - started < thrift.budget_s,
            tell,
            effort,
        )


def _subject(
    workspace: Workspace,
    target: Target,
    forms: Sequence[EngineFiles],
    requirements: tuple[Requirement, ...],
    progress: Progress,
) -> Subject:
    """What a sparing profile goes by. Without statistics, and data to record them by, no requirement can guide it."""
    from mess_compile import forecast, sparing

    graph_sets = tuple(each.graph_set for each in forms)
    precisions = [spec.precision for each in graph_sets for spec in each.graphs.values()]
    found = {}
    with suppress(InputError, StaleError):
        for each in graph_sets:
            found[each.recipe] = current_statistics(workspace, each, target.name, None, progress)
    twins = {twin: first for each in graph_sets for twin, first in sparing.twins(each).items()}
    priors = forecast.priors_of(read_graph_set(workspace.graphs), target, precisions)
    return sparing.Subject(graph_sets, priors, found, requirements if found else (), twins)
