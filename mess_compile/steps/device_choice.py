"""Which device a command means, and at which host it is."""

from __future__ import annotations

from contextlib import suppress

from mess_compile.latency.table import read_latency_table
from mess_compile.runtime.base.errors import InputError, MessError
from mess_compile.runtime.machine import machine
from mess_compile.targets import Target, find_target, known_targets, targets_here
from mess_compile.workspace import Workspace


def target_of(workspace: Workspace, device: str | None) -> Target:
    """The device that is named, or the one measured last. Raises InputError when there is neither."""
    name = device or workspace.memory().device
    if name is not None:
        return find_target(name, workspace.root)
    estimated = [name for name in known_targets(workspace.root) if _is_estimated(workspace, name)]
    if estimated:
        raise InputError(
            f"no device was measured in this workspace yet; only estimates exist ({', '.join(estimated)}): name one, "
            f"as in `search --device {estimated[0]}` or `bundle {estimated[0]}`"
        )
    raise InputError("no device was profiled in this workspace yet: run `mess-compile profile --device cpu`")


def host_of(workspace: Workspace, target: Target) -> str | None:
    """The remembered host of the target; None when this machine is the target, or no host is known."""
    if targets_here((target,), machine.this_machine()):
        return None
    return workspace.known_host(target.name)


def refuse_python_here(python: str | None) -> None:
    """Raises InputError when a Python is named but no host."""
    if python is not None:
        raise InputError(f"--python {python} needs a device over SSH: add --host ssh://user@host")


def _is_estimated(workspace: Workspace, device: str) -> bool:
    with suppress(MessError):
        return read_latency_table(workspace.latency(device)).source == "estimated"
    return False
