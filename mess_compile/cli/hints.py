"""The commands to run next, complete with the workspace's images, data and hosts, so that they can be copied."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mess_compile.cli.console import print_hint, quoted
from mess_compile.runtime.base.errors import MessError

if TYPE_CHECKING:
    from mess_compile.device.ssh import Host
    from mess_compile.runtime.bundle.manifest import BundlePlan
    from mess_compile.workspace import Workspace

_REPORTED, _TUNED = "test", "val"
"""Splits: to report on, where there is one, and to choose plans on."""


def print_known(*commands: str | None) -> None:
    """Print those commands that are known in full, if any."""
    known = [command for command in commands if command is not None]
    if known:
        print_hint(*known)


def workspace_here() -> Workspace:
    """The workspace of the command that runs."""
    found: Workspace = click.get_current_context().find_root().obj
    return found


def data_root() -> Path:
    """The folder of the workspace's data. Raises InputError where none is known."""
    root = workspace_here().data_folder(None).root
    assert root is not None, "data_folder returns a folder"
    return root


def run_on_an_image(bundle: Path, options: str = "") -> str | None:
    """Run a bundle on an image of the workspace's data; None where no data are known."""
    image = _image()
    return None if image is None else f"run {quoted(bundle)} {quoted(image)}{options}"


def bench_on_data(bundle: Path) -> str | None:
    """Bench a bundle on the workspace's data, on a split that nothing was tuned on where there is one."""
    splits = _splits()
    if not splits:
        return None
    return f"bench {quoted(bundle)}" + (f" --split {_REPORTED}" if _REPORTED in splits else "")


def ship_to_host(bundle: Path, device: str) -> str | None:
    """Ship a bundle to its device's host, into a folder called like it; None where no host is known."""
    host = workspace_here().known_host(device)
    folder = re.sub("[^A-Za-z0-9_.+-]", "-", bundle.stem).lstrip(".-") or "bundle"
    return None if host is None else f"ship {quoted(bundle)} {host}:~/{folder}"


def bundle_for(host: Host) -> Path | None:
    """The workspace's newest bundle for the devices at a host; for an unknown host, the newest of all that are for no
    other host."""
    from mess_compile.device.ssh import parse_host

    workspace = workspace_here()
    theirs: dict[Path, bool] = {}
    for device, text in workspace.memory().hosts.items():
        with suppress(MessError):
            known = parse_host(text)
            theirs[workspace.bundle(device)] = (known.destination, known.port) == (host.destination, host.port)
    is_known = any(theirs.values())
    found = [path for path in workspace.root.glob("*.mess") if theirs.get(path, not is_known)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def after_a_bundle(bundle: Path, plans: Sequence[BundlePlan]) -> None:
    """Run it here where this machine can, else ship it, else verify or inspect it."""
    here = any(runs_here(plan.target, plan.library) for plan in plans)
    commands = [run_on_an_image(bundle), bench_on_data(bundle)] if here else []
    commands += [ship_to_host(bundle, plan.target) for plan in plans[:1]]
    if any(command is not None for command in commands):
        return print_known(*commands)
    return print_hint(f"verify {quoted(bundle)}" if here else f"inspect {quoted(bundle)}")


def search_for(device: str, max_err: str = "1%") -> str:
    """Search a plan for a device."""
    return f"{for_device('search', device)} --max-err {max_err}"


def for_device(command: str, device: str) -> str:
    """A command for a device, with --device unless it is the default."""
    return command if workspace_here().memory().device == device else f"{command} --device {device}"


def runs_here(target: str, library: str) -> bool:
    """Whether this machine probably runs a plan: ONNX Runtime runs anywhere, an engine on its device."""
    from mess_compile.runtime.machine.machine import this_machine
    from mess_compile.targets import find_target, targets_here

    if library == "onnxruntime":
        return True
    with suppress(MessError):
        return bool(targets_here((find_target(target, workspace_here().root),), this_machine()))
    return False


def _splits() -> tuple[str, ...]:
    """Those of the two splits that the workspace's data have."""
    from mess_compile.data.dataset import open_dataset

    workspace, found = workspace_here(), []
    for split in (_REPORTED, _TUNED):
        with suppress(MessError, OSError):
            open_dataset(workspace.data_folder(None), split)
            found.append(split)
    return tuple(found)


def _image() -> Path | None:
    """The first image of the workspace's data."""
    from mess_compile.data.dataset import open_dataset

    for split in _splits()[:1]:
        return open_dataset(workspace_here().data_folder(None), split).items[0].image
    return None
