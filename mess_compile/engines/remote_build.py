"""Builds engines on a device over SSH, from graphs in the form that its library accepts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mess_compile.data_folder import Data
from mess_compile.device.connect import device_session, remote_for
from mess_compile.device.session import STORE, DeviceSession
from mess_compile.engines import build
from mess_compile.engines.build import EngineEntry, EngineSet
from mess_compile.engines.files import EngineFiles, plain_files
from mess_compile.engines.jobs import job_name, job_names, without
from mess_compile.engines.prepare import RecipeBuild, precise_graphs
from mess_compile.network import GraphSet
from mess_compile.reporter import Progress, Reporter
from mess_compile.runtime.serve.worker import ENGINES
from mess_compile.targets import Target
from mess_compile.workspace import Workspace


def forms_there(
    workspace: Workspace, target: Target, precisions: Sequence[str], data: Data | None, progress: Progress
) -> tuple[EngineFiles, ...]:
    """The graphs of each precision in the form that the target's library accepts."""
    made = precise_graphs(workspace, target, precisions, data, progress)
    return tuple(_form(workspace, target, each.graph_set, progress) for each in made)


def _form(workspace: Workspace, target: Target, graph_set: GraphSet, progress: Progress) -> EngineFiles:
    if target.library.startswith("onnxruntime"):
        return plain_files(graph_set)
    return build.target_forms(graph_set, target, workspace.forms(target.name), progress)


def build_there(
    workspace: Workspace,
    target: Target,
    precisions: Sequence[str],
    data: Data | None,
    host: str,
    python: str | None,
    reporter: Reporter,
) -> tuple[RecipeBuild, ...]:
    """Build the target's engines of every graph and precision on `host`; unchanged engines there are reused.

    After a broken connection the next call resumes. Raises RemoteError, InputError, EngineError.
    """
    build.refuse_without_engines(target)
    with remote_for(workspace, host, python) as remote:
        made = precise_graphs(workspace, target, precisions, data, reporter.progress)
        forms = [_form(workspace, target, each.graph_set, reporter.progress) for each in made]
        session = device_session(workspace, remote, target, made[0].graph_set, reporter)
        built = built_there(session, forms)
    folder = f"{host}, ~/{STORE}/{ENGINES}"
    return tuple(
        RecipeBuild(each.graph_set, _remote_engines(target, session, files), each.fallbacks, folder)
        for each, files in zip(made, built, strict=True)
    )


def _remote_engines(target: Target, session: DeviceSession, files: EngineFiles) -> EngineSet:
    assert session.hello is not None, "the session connects before it builds"
    entries = tuple(_entry(session, files, name) for name in files.graph_set.graphs)
    names = {job_name(entry.graph, entry.precision) for entry in entries if entry.error is None}
    count = sum(session.built[name].now for name in names)
    return EngineSet(target.name, files.graph_set.recipe, target.library, session.hello.version, count, entries)


def _entry(session: DeviceSession, files: EngineFiles, graph: str) -> EngineEntry:
    precision = files.graph_set.spec(graph).precision
    if graph in files.failed:
        return EngineEntry(graph, precision, "", "", 0, 0.0, (), files.failed[graph])
    built = session.built[job_name(graph, precision)]
    return EngineEntry(graph, precision, built.key, "", built.bytes, built.seconds, (), None)


def built_there(
    session: DeviceSession, forms: Sequence[EngineFiles], jobs: Collection[str] | None = None
) -> tuple[EngineFiles, ...]:
    """Build the engines of some jobs' graphs (None: all) on the device. Raises what `DeviceSession.build` does."""
    wanted = {}
    for each in forms:
        for name, job in job_names(each).items():
            if jobs is None or job in jobs:
                wanted[job] = each.paths[name], each.graph_set.spec(name).precision
    failed = session.build(wanted)
    return tuple(without(each, failed) for each in forms)
