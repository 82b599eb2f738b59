"""The command `build`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion
from mess_compile.cli.console import fail, print_json, print_next, reporting, say
from mess_compile.cli.options import JUDGED, PRECISIONS, PYTHON, dry_run_option, json_option, print_plan
from mess_compile.data_folder import DataFolder

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@click.command(short_help="Build the device's engines, here or there.")
@click.option(
    "--device",
    shell_complete=completion.devices,
    help="A known device (see `mess-compile devices`); the one profiled last by default.",
)
@PRECISIONS
@JUDGED
@click.option("--jobs", type=click.IntRange(1), help="Processes that build at once; one on each core by default.")
@click.option(
    "--host", shell_complete=completion.hosts, help="Build on the device itself: ssh://user@host[:port]; remembered."
)
@PYTHON
@dry_run_option
@json_option
@click.pass_obj
def build(
    workspace: Workspace,
    device: str | None,
    precision: str,
    data: DataFolder | None,
    jobs: int | None,
    host: str | None,
    python: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build the device's engines of every graph, here or there; what is there and unchanged is kept.

    A build that was broken off continues with the same command.
    """
    from mess_compile import steps

    options = steps.BuildOptions(tuple(precision.split(",")), data, jobs, host, python)
    if dry_run:
        return print_plan(steps.plan_build(workspace, device, options), as_json)
    with reporting(as_json) as reporter:
        builds = steps.build(workspace, device, options, reporter)
    if as_json:
        told = [
            {"engines": asdict(e.engines), "fallbacks": [asdict(f) for f in e.fallbacks], "place": e.place}
            for e in builds
        ]
        print_json({"builds": told})
    for each in () if as_json else builds:
        _print_engines(each.engines, each.place)
        for fallen in each.fallbacks:
            say(f"{fallen.graph} is {fallen.used}, not {fallen.wanted}: {fallen.reason}")
    if all(len(each.engines.failed) == len(each.engines.entries) for each in builds):
        fail(f"no graph builds for {builds[0].engines.device}")
    return None if as_json else print_next(f"profile --device {builds[0].engines.device}")


def _print_engines(engines: Any, place: str) -> None:
    made = [entry for entry in engines.entries if entry.error is None]
    say(
        f"{len(made)} engines of {len(engines.entries)} graphs in {engines.recipe} for {engines.device} "
        f"({engines.library} {engines.library_version}) in {place}, {engines.built} of them built now, "
        f"{sum(entry.bytes for entry in made) / 2**20:.1f} MiB"
    )
    for name in dict.fromkeys(name for entry in made for name in entry.rewrites):
        count = sum(name in entry.rewrites for entry in made)
        say(f"rewritten for this target, outputs alike: {count} graphs, {name}")
    for entry in engines.failed:
        say(f"FAILED  {entry.graph} ({entry.precision}): {entry.error}")
