"""The steps `devices`, `doctor` and `inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mess_compile import targets
from mess_compile.report.collect import compare, report
from mess_compile.runtime.machine import machine
from mess_compile.runtime.serve.verify import verify_bundle as verify
from mess_compile.targets import Target

if TYPE_CHECKING:
    from mess_compile.doctor import Finding
    from mess_compile.report.inspection import Inspection
    from mess_compile.workspace import Workspace

__all__ = ["KnownDevice", "compare", "devices", "doctor", "inspect", "report", "verify"]


@dataclass(frozen=True)
class KnownDevice:
    """A target, whether this machine is it, and if not, in what it differs."""

    target: Target
    here: bool
    differences: tuple[str, ...]


def devices(workspace: Workspace) -> tuple[KnownDevice, ...]:
    """Known targets, ours and the workspace's own, and which of them this machine is."""
    this = machine.this_machine()
    known = tuple(targets.known_targets(workspace.root).values())
    here = targets.targets_here(known, this)
    return tuple(KnownDevice(target, target in here, targets.differences(target, this)) for target in known)


def doctor(workspace: Workspace | None = None) -> tuple[Finding, ...]:
    """What this machine can train, build and run, and the line that would install what it lacks."""
    from mess_compile.doctor import examine

    return examine(None if workspace is None else workspace.root)


def inspect(
    workspace: Workspace,
    thing: str,
    classes: int = 21,
    hw: tuple[int, int] = (512, 512),
    exits: int = 6,
    whole_front: bool = False,
) -> Inspection:
    """What is in a backbone (resnet50, mobilenetv2), a bundle, a plan (its file or device), or the workspace's graphs,
    statistics, latency or plan.

    `classes`, `hw` and `exits` are those of a backbone; `whole_front` is for a plan. Shows itself in a notebook.
    Raises InputError.
    """
    from mess_compile.report import inspection

    return inspection.inspect(workspace, thing, classes, hw, exits, whole_front)
