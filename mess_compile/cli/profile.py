"""The command `profile`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import print_hint, print_json, reporting, say, warn
from mess_compile.cli.options import (
    JUDGED,
    PRECISIONS,
    PYTHON,
    Command,
    dry_run_option,
    gathered,
    json_option,
    print_plan,
    verbose_option,
)
from mess_compile.cli.search import subset_of
from mess_compile.data_folder import DataFolder
from mess_compile.runtime.base.errors import InputError

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


_FAILURES = 3
"""Graphs that failed, of which the output says why without --verbose."""


@dataclass(frozen=True)
class ProfileArguments:
    """What `profile` measures and how, and what it prints."""

    hosts: tuple[str, ...]
    python: str | None
    everything: bool
    requirements: tuple[str, ...]
    budget: str | None
    seconds: float | None
    lock_clocks: bool
    estimate: bool
    dry_run: bool
    verbose: bool
    as_json: bool


@click.command(cls=Command, formerly={"--for": "--requirement"}, short_help="Measure the graphs on the device.")
@click.option(
    "--device",
    shell_complete=completion.devices,
    help="What to measure on: `cpu`, this machine, or a name that `mess-compile devices` lists. Remembered.",
)
@click.option(
    "--host",
    "hosts",
    shell_complete=completion.hosts,
    multiple=True,
    help="The device's address, ssh://user@host[:port] or a name from ~/.ssh/config. Remembered. Repeat it for several "
    "devices of one kind, which share the work; plans are made for the first.",
)
@PYTHON
@click.option("--all", "everything", is_flag=True, help="Measure every graph, also over SSH.")
@click.option(
    "--requirement",
    "requirements",
    multiple=True,
    help='Measure only graphs that could change the plan for this requirement; over SSH "--max-err 1%" by default.',
)
@click.option("--budget", help="Stop measuring after this time, such as 30min, and estimate the rest.")
@click.option(
    "--seconds", type=float, help="Longest time per graph, if its latency does not settle earlier; 5 by default."
)
@click.option(
    "--lock-clocks", is_flag=True, help="Lock the clocks while measuring; they are restored on exit and after a crash."
)
@click.option(
    "--estimate", is_flag=True, help="Measure nothing: estimate every latency that was not measured, and mark it."
)
@PRECISIONS
@JUDGED
@dry_run_option
@verbose_option
@json_option
@click.pass_obj
@gathered(ProfileArguments)
def profile(
    workspace: Workspace, device: str | None, precision: str, data: DataFolder | None, arguments: ProfileArguments
) -> None:
    """Measure the latency of the graphs on a device.

    On this machine all graphs are measured, over SSH those that could change the plan.

    The same command continues an interrupted measurement.
    """
    from mess_compile import steps
    from mess_compile.latency.checks import known_warnings
    from mess_compile.report import inspection
    from mess_compile.runtime.measure.measure import Effort

    hosts, python, seconds = arguments.hosts, arguments.python, arguments.seconds
    lock_clocks, estimate, as_json = arguments.lock_clocks, arguments.estimate, arguments.as_json
    if seconds is not None and not 0 < seconds <= 3600:
        raise InputError(f"--seconds {seconds:g} is not between 0 and 3600")
    _refuse_contradictions(arguments)
    options = steps.ProfileOptions(
        precisions=tuple(precision.split(",")),
        data=data,
        effort=None if seconds is None else replace(Effort(), max_s=seconds),
        hosts=hosts,
        subset=None if arguments.everything else subset_of(arguments.requirements, arguments.budget),
        lock_clocks=lock_clocks,
        python=python,
    )
    if arguments.dry_run:
        return print_plan(steps.plan_profile(workspace, device, options), as_json)
    with reporting(as_json, notes_aside=True) as reporter:
        if estimate:
            table = steps.estimate(workspace, device, options.precisions, data, reporter)
        else:
            table = steps.profile(workspace, device, options, reporter)
    warnings = known_warnings(workspace, table)
    if as_json:
        return print_json(inspection.inspect_latency(table, warnings).content)
    _print_summary(table, arguments.verbose)
    for warning in warnings:
        warn(warning)
    if any(workspace.root.glob("statistics/*")) or workspace.memory().data is not None:
        return print_hint(hints.search_for(table.device))
    return say("hint: no labelled images are known yet: `mess-compile evaluate --data DIR`, with their folder for DIR")


def _refuse_contradictions(arguments: ProfileArguments) -> None:
    measured_by = {
        "--host": arguments.hosts,
        "--python": arguments.python,
        "--all": arguments.everything,
        "--requirement": arguments.requirements,
        "--budget": arguments.budget,
        "--seconds": arguments.seconds,
        "--lock-clocks": arguments.lock_clocks,
    }
    given = [name for name, value in measured_by.items() if value]
    if arguments.estimate and given:
        raise click.UsageError(f"--estimate does without the device: drop {', '.join(given)}, or measure there.")
    if arguments.estimate and arguments.dry_run:
        raise click.UsageError("--estimate measures nothing and takes a moment: drop --dry-run.")
    if arguments.everything and (arguments.requirements or arguments.budget):
        raise click.UsageError("--all measures everything: drop --requirement and --budget.")


def _print_summary(table: Any, verbose: bool) -> None:
    estimated = [entry for entry in table.entries.values() if entry.source == "estimated"]
    measured = len(table.entries) - len(estimated)
    if measured:
        baselines = [entry for (graph, _), entry in table.entries.items() if graph == "baseline"]
        figures = ", ".join(f"{e.mean_ms:.2f} ms in {e.precision} (p99 {e.p99_ms:.2f})" for e in baselines)
        say(f"{measured} entries measured on {table.device}: baseline {figures or 'not among them'}")
    if estimated:
        widest = max(entry.error for entry in estimated)
        say(
            f"{len(estimated)} of {len(table.entries)} entries ESTIMATED for {table.device}, each off by a factor "
            f"of up to {widest:.1f}"
        )
    if "coverage" in table.environment:
        say(table.environment["coverage"])
    for failure in list(table.failed.values())[: None if verbose else _FAILURES]:
        say(f"FAILED  {failure.graph} ({failure.precision}), in no plan: {failure.error}")
    if not verbose and len(table.failed) > _FAILURES:
        say(f"FAILED  {len(table.failed) - _FAILURES} more graphs (see `inspect latency`)")
    for line in _details(table, bool(measured)) if verbose else ():
        say(line)


def _details(table: Any, measured: bool) -> Iterator[str]:
    """How the table was made."""
    environment = table.environment
    if "estimated_from" in environment:
        yield f"estimated from {environment['estimated_from']}"
    if not measured:
        return
    yield f"{table.library} {table.library_version} on {environment['cpu']}, {environment['cores']} cores"
    if "protocol" in environment:
        yield f"protocol: {environment['protocol']}"
    if "beside" in environment:
        yield f"also measured beside {environment['host']} (separate table): {environment['beside']}"
    slow, times, unsteady = (float(environment[name]) for name in ("slow_share", "slow_by", "unsteady"))
    again = f" ({times:.1f}x, measured again)" if slow else ""
    verdict = "noisy measurement" if environment["verdict"] == "unstable" else environment["verdict"]
    yield (
        f"{verdict}: the machine was slower {slow:.0%} of the time{again}, {unsteady:.0%} of the graphs did not settle"
    )
