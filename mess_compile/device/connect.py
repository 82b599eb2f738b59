"""A target that is reached over SSH: the graphs as its library takes them, a session on it, and engines built there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mess_compile.data_folder import Data
from mess_compile.engines.files import EngineFiles, plain_files
from mess_compile.engines.jobs import job_name
from mess_compile.engines.prepare import RecipeBuild, precise_graphs
from mess_compile.network import GraphSet
from mess_compile.runtime.base.errors import InputError, MessError
from mess_compile.runtime.engines.engine import FP32
from mess_compile.runtime.serve.worker import Hello, describe_machine
from mess_compile.targets import Target, refuse_unless_there
from mess_compile.workspace import HOST, Workspace

if TYPE_CHECKING:
    from mess_compile.device.client import Session
    from mess_compile.device.remote import Remote
    from mess_compile.device.trtexec_client import TrtexecSession
    from mess_compile.engines.build import EngineEntry, EngineSet

Progress = Callable[[str, int, int], None]


def reached(workspace: Workspace, host: str, python: str | None) -> Remote:
    """The device at `host`, with the Python that is named, or was when it was reached before."""
    from mess_compile.device.remote import PYTHON, Remote, parse_host

    return Remote(parse_host(host, python or workspace.memory().pythons.get(host, PYTHON)))


def refuse_python_here(python: str | None) -> None:
    """Raises InputError when a Python is named and no host."""
    if python is not None:
        raise InputError(f"--python {python} is of a device elsewhere: add --host ssh://user@host")


def forms_there(
    workspace: Workspace, target: Target, precisions: Sequence[str], data: Data | None, progress: Progress
) -> tuple[EngineFiles, ...]:
    """The graphs as the library there takes them."""
    made = precise_graphs(workspace, target, precisions, data, progress)
    return tuple(_form(workspace, target, each.graph_set, progress) for each in made)


def _form(workspace: Workspace, target: Target, graph_set: GraphSet, progress: Progress) -> EngineFiles:
    if target.library.startswith("onnxruntime"):
        return plain_files(graph_set)
    from mess_compile.engines import build

    return build.target_forms(graph_set, target, workspace.forms(target.name), progress)


def build_there(
    workspace: Workspace,
    target: Target,
    precisions: Sequence[str],
    data: Data | None,
    host: str,
    progress: Progress,
    tell: Callable[[str], None],
    python: str | None = None,
) -> tuple[RecipeBuild, ...]:
    """Have the target's engines of every graph and precision at `host`; what is there and unchanged is kept.

    A call that was cut is continued by the next. Raises RemoteError, InputError, EngineError.
    """
    from mess_compile.device.client import STORE
    from mess_compile.engines import build
    from mess_compile.profile import backends
    from mess_compile.runtime.serve import worker as device_side

    build.refuse_without_engines(target)
    with reached(workspace, host, python) as remote:
        made = precise_graphs(workspace, target, precisions, data, progress)
        forms = [_form(workspace, target, each.graph_set, progress) for each in made]
        session = any_session_there(workspace, remote, target, made[0].graph_set, progress, tell)
        built = backends.built_there(session, forms)
    folder = f"{host}, ~/{STORE}/{device_side.ENGINES}"
    return tuple(
        RecipeBuild(each.graph_set, _engines_there(target, session, files), each.fallbacks, folder)
        for each, files in zip(made, built, strict=True)
    )


def _engines_there(target: Target, session: Session | TrtexecSession, files: EngineFiles) -> EngineSet:
    from mess_compile.engines.build import EngineSet

    assert session.hello is not None, "it has said hello before it built"
    entries = tuple(_entry(session, files, name) for name in files.graph_set.graphs)
    names = {job_name(entry.graph, entry.precision) for entry in entries if entry.error is None}
    count = sum(session.built[name].now for name in names)
    return EngineSet(target.name, files.graph_set.recipe, target.library, session.hello.version, count, entries)


def _entry(session: Session | TrtexecSession, files: EngineFiles, graph: str) -> EngineEntry:
    from mess_compile.engines.build import EngineEntry

    precision = files.graph_set.spec(graph).precision
    if graph in files.failed:
        return EngineEntry(graph, precision, "", "", 0, 0.0, (), files.failed[graph])
    its = session.built[job_name(graph, precision)]
    return EngineEntry(graph, precision, its.key, "", its.bytes, its.seconds, (), None)


def session_there(remote: Remote, target: Target, graph_set: GraphSet, progress: Progress) -> Session:
    """A device that has shown that it is the target."""
    from mess_compile.device.client import Session
    from mess_compile.profile import backends

    session = Session(remote, target.library, *backends.fed(graph_set), progress)
    _refuse_another(target, session.greet(), remote.host.text)
    return session


def any_session_there(
    workspace: Workspace,
    remote: Remote,
    target: Target,
    graph_set: GraphSet,
    progress: Progress,
    tell: Callable[[str], None],
) -> Session | TrtexecSession:
    """A device that has shown that it is the target; by trtexec where its Python cannot be used."""
    from mess_compile.device import trtexec_client

    try:
        return session_there(remote, target, graph_set, progress)
    except MessError as error:
        caches = workspace.engines(target.name, FP32).parent
        session = trtexec_client.in_place_of_python(remote, target, caches, progress, error)
        if session is None:
            raise
        tell(f"note: {error}; until then trtexec builds and measures there, by a protocol that the table names")
    _refuse_another(target, session.greet(), remote.host.text)
    return session


def _refuse_another(target: Target, hello: Hello, host: str) -> None:
    """Raises InputError when the machine at `host` is not the target; there is one `host`, and it is here."""
    refuse_unless_there(target, hello.machine, host)
    if target.name == HOST and hello.facts.get("identity") != describe_machine()["identity"]:
        raise InputError(
            f"--device host is the machine that mess-compile runs on, and {host} is another, whose latencies would "
            "take the place of this one's: describe it in profiles/NAME.toml, and name it by --device NAME"
        )
