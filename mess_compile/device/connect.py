"""Connects to a target over SSH, by its Python or by trtexec, and checks that it is the target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mess_compile.network import GraphSet
from mess_compile.reporter import Progress, Reporter
from mess_compile.runtime.base.errors import InputError, MessError
from mess_compile.runtime.engines.engine import FP32
from mess_compile.runtime.serve.worker import Hello, describe_machine
from mess_compile.targets import Target, refuse_unless_there
from mess_compile.workspace import HOST, Workspace

if TYPE_CHECKING:
    from mess_compile.device.client import PythonSession
    from mess_compile.device.remote import Remote
    from mess_compile.device.session import DeviceSession


def remote_for(workspace: Workspace, host: str, python: str | None) -> Remote:
    """The device at `host`, with the Python that is named, or that was named when it was last connected."""
    from mess_compile.device.remote import PYTHON, Remote, parse_host

    return Remote(parse_host(host, python or workspace.known_python(host) or PYTHON))


def python_session(remote: Remote, target: Target, graph_set: GraphSet, progress: Progress) -> PythonSession:
    """A session with the target by its Python. Raises InputError when the device is not the target."""
    from mess_compile.data.scenes import profiling_inputs
    from mess_compile.device.client import PythonSession

    session = PythonSession(remote, target.library, *profiling_inputs(graph_set), progress)
    _refuse_other_machine(target, session.greet(), remote.host.text)
    return session


def device_session(
    workspace: Workspace,
    remote: Remote,
    target: Target,
    graph_set: GraphSet,
    reporter: Reporter,
) -> DeviceSession:
    """A session with the target, by trtexec where its Python cannot be used. Raises InputError for another device."""
    from mess_compile.device import trtexec_client

    try:
        return python_session(remote, target, graph_set, reporter.progress)
    except MessError as error:
        caches = workspace.engines(target.name, FP32).parent
        trtexec = trtexec_client.trtexec_instead_of_python(remote, target, caches, reporter.progress, error)
        if trtexec is None:
            raise
        reporter.warn(f"{error}; until then trtexec builds and measures there (the table names its protocol)")
    _refuse_other_machine(target, trtexec.greet(), remote.host.text)
    return trtexec


def _refuse_other_machine(target: Target, hello: Hello, host: str) -> None:
    """Raises InputError when the machine at `host` is not the target; the target `host` is always this machine."""
    refuse_unless_there(target, hello.machine, host)
    if target.name == HOST and hello.facts.get("identity") != describe_machine()["identity"]:
        raise InputError(
            f"--device host is this machine, and {host} is another one, whose latencies would replace those of this "
            "machine: describe it in profiles/NAME.toml, and use --device NAME"
        )
