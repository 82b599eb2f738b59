"""The command `build`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion
from mess_compile.cli.console import fail, print_hint, print_json, reporting, say
from mess_compile.cli.options import (
    JUDGED,
    PRECISIONS,
    PYTHON,
    dry_run_option,
    gathered,
    json_option,
    print_plan,
    verbose_option,
)
from mess_compile.data_folder import DataFolder

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


_NAMED = 3
"""Graphs that are named without --verbose."""


@dataclass(frozen=True)
class BuildArguments:
    """Where `build` builds, and what it prints."""

    jobs: int | None
    host: str | None
    python: str | None
    dry_run: bool
    verbose: bool
    as_json: bool


@click.command(short_help="Build engines for a device, here or on it.")
@click.option(
    "--device",
    shell_complete=completion.devices,
    help="Device to build for, as `mess-compile devices` lists it; by default the one profiled last.",
)
@PRECISIONS
@JUDGED
@click.option("--jobs", type=click.IntRange(1), help="Processes that build in parallel; one per core by default.")
@click.option(
    "--host",
    shell_complete=completion.hosts,
    help="Build on the device at this address, ssh://user@host[:port]. Remembered.",
)
@PYTHON
@dry_run_option
@verbose_option
@json_option
@click.pass_obj
@gathered(BuildArguments)
def build(
    workspace: Workspace, device: str | None, precision: str, data: DataFolder | None, arguments: BuildArguments
) -> None:
    """Build an engine of every graph for a device, here or on the device.

    Current engines are not built again, so the same command continues an interrupted build.
    """
    from mess_compile import steps

    as_json = arguments.as_json
    options = steps.EngineOptions(tuple(precision.split(",")), data, arguments.jobs, arguments.host, arguments.python)
    if arguments.dry_run:
        return print_plan(steps.plan_build(workspace, device, options), as_json)
    with reporting(as_json, notes_aside=True) as reporter:
        builds = steps.build(workspace, device, options, reporter)
    if as_json:
        contents = [
            {"engines": asdict(e.engines), "fallbacks": [asdict(f) for f in e.fallbacks], "place": e.place}
            for e in builds
        ]
        print_json({"builds": contents})
    for each in () if as_json else builds:
        _print_engines(each.engines, each.place, arguments.verbose)
        _print_fallbacks(each.fallbacks, arguments.verbose)
    if all(len(each.engines.failed) == len(each.engines.entries) for each in builds):
        fail(f"no graph builds for {builds[0].engines.device}")
    return None if as_json else print_hint(f"profile --device {builds[0].engines.device}")


def _print_fallbacks(fallbacks: Sequence[Any], verbose: bool) -> None:
    """Each with its reason, or by default the names."""
    for one in fallbacks if verbose else ():
        say(f"{one.graph} is {one.used}, not {one.wanted}: {one.reason}")
    if fallbacks and not verbose:
        names = ", ".join(one.graph for one in fallbacks[:_NAMED]) + (", ..." if len(fallbacks) > _NAMED else "")
        say(f"{len(fallbacks)} graphs fell back to a safer precision: {names} (-v for reasons)")


def _print_engines(engines: Any, place: str, verbose: bool) -> None:
    made = [entry for entry in engines.entries if entry.error is None]
    say(
        f"{len(made)} engines of {len(engines.entries)} graphs in {engines.recipe} for {engines.device}, "
        f"{engines.built} built now, {sum(entry.bytes for entry in made) / 2**20:.1f} MiB, in {place}"
    )
    if verbose:
        say(f"built by {engines.library} {engines.library_version}")
    for name in dict.fromkeys(name for entry in made for name in entry.rewrites) if verbose else ():
        count = sum(name in entry.rewrites for entry in made)
        say(f"{count} graphs rewritten for this target with equal outputs: {name}")
    for entry in engines.failed:
        say(f"FAILED  {entry.graph} ({entry.precision}): {entry.error}")
