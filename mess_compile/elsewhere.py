"""A target that is reached over SSH: the graphs as its library takes them, and a session on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mess_compile.candidates import GraphSet
from mess_compile.compiling import in_precision, refuse_other_precisions, verified_graphs
from mess_compile.engines import EngineFiles, plain_files
from mess_compile.runtime.engine import FP32
from mess_compile.runtime.errors import MessError
from mess_compile.targets import Target, refuse_unless_there
from mess_compile.workspace import Workspace

if TYPE_CHECKING:
    from mess_compile.remote import Remote
    from mess_compile.sessions import Session
    from mess_compile.trtexec_session import TrtexecSession

Progress = Callable[[str, int, int], None]


def forms_there(
    workspace: Workspace, target: Target, precisions: Sequence[str], data: Path | None, progress: Progress
) -> tuple[EngineFiles, ...]:
    """The graphs as the library there takes them."""
    graph_set = verified_graphs(workspace)
    refuse_other_precisions(target, precisions)
    made = [in_precision(workspace, graph_set, p, target.precisions, data, progress).graph_set for p in precisions]
    if target.library.startswith("onnxruntime"):
        return tuple(map(plain_files, made))
    from mess_compile import building

    return tuple(building.target_forms(each, target, workspace.forms(target.name), progress) for each in made)


def session_there(remote: Remote, target: Target, graph_set: GraphSet, progress: Progress) -> Session:
    """A device that has shown that it is the target."""
    from mess_compile import profiling
    from mess_compile.sessions import Session

    session = Session(remote, target.library, *profiling.fed(graph_set), progress)
    refuse_unless_there(target, session.greet().machine, remote.host.text)
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
    from mess_compile import trtexec_session

    try:
        return session_there(remote, target, graph_set, progress)
    except MessError as error:
        caches = workspace.engines(target.name, FP32).parent
        session = trtexec_session.in_place_of_python(remote, target, caches, progress, error)
        if session is None:
            raise
        tell(f"note: {error}; until then trtexec measures there, by a protocol of its own that the table names")
    refuse_unless_there(target, session.greet().machine, remote.host.text)
    return session
