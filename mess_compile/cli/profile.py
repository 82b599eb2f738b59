"""The command `profile`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import print_json, print_next, reporting, say
from mess_compile.cli.options import JUDGED, PRECISIONS, PYTHON, dry_run_option, json_option, print_plan
from mess_compile.cli.search import subset_of
from mess_compile.data_folder import DataFolder
from mess_compile.runtime.base.errors import InputError

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@click.command(short_help="Measure the graphs on the device.")
@click.option(
    "--device", shell_complete=completion.devices, help="A known device (see `mess-compile devices`); remembered."
)
@click.option(
    "--host",
    "hosts",
    shell_complete=completion.hosts,
    multiple=True,
    help="Where the device is: ssh://user@host[:port], or a name of ~/.ssh/config; remembered. Of several devices of "
    "one kind that share the work the first is the one that plans are for.",
)
@PYTHON
@click.option("--all", "everything", is_flag=True, help="Every graph; over SSH not only what could change the answer.")
@click.option(
    "--for",
    "wishes",
    multiple=True,
    help='Only what could change the answer to this, such as "--max-err 1%", the default over SSH.',
)
@click.option("--budget", help="The time that it may take, such as 30min; what is left then is estimated.")
@click.option("--seconds", type=float, help="The time that a graph which never is steady may take; 5 by default.")
@click.option(
    "--lock-clocks", is_flag=True, help="Hold the clocks while measuring; they are put back whatever happens."
)
@click.option("--estimate", is_flag=True, help="Without the device: what was not measured is estimated, and marked.")
@PRECISIONS
@JUDGED
@dry_run_option
@json_option
@click.pass_obj
def profile(
    workspace: Workspace,
    device: str | None,
    hosts: tuple[str, ...],
    python: str | None,
    everything: bool,
    wishes: tuple[str, ...],
    budget: str | None,
    seconds: float | None,
    lock_clocks: bool,
    estimate: bool,
    precision: str,
    data: DataFolder | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure the graphs on the device: all of them here, over SSH what could change the answer, unless told otherwise.

    A measurement that was broken off continues with the same command.
    """
    from mess_compile import steps
    from mess_compile.latency.checks import known_warnings
    from mess_compile.report import inspection
    from mess_compile.runtime.measure import measure as measuring

    if seconds is not None and not 0 < seconds <= 3600:
        raise InputError(f"--seconds {seconds:g} is not between 0 and 3600")
    measured_by = {
        "--host": hosts,
        "--python": python,
        "--all": everything,
        "--for": wishes,
        "--budget": budget,
        "--seconds": seconds,
    }
    asked = [option for option, value in {**measured_by, "--lock-clocks": lock_clocks}.items() if value]
    if estimate and asked:
        raise click.UsageError(f"--estimate goes without the device: drop {', '.join(asked)}, or measure there.")
    if everything and (wishes or budget):
        raise click.UsageError("--all measures everything: drop --for and --budget.")
    effort = None if seconds is None else replace(measuring.Effort(), max_s=seconds)
    options = steps.ProfileOptions(
        precisions=tuple(precision.split(",")),
        data=data,
        effort=effort,
        hosts=hosts,
        subset=None if everything else subset_of(wishes, budget),
        lock_clocks=lock_clocks,
        python=python,
    )
    if dry_run and estimate:
        raise click.UsageError("--estimate measures nothing, and takes a moment: drop --dry-run.")
    if dry_run:
        return print_plan(steps.plan_profile(workspace, device, options), as_json)
    with reporting(as_json) as reporter:
        if estimate:
            table = steps.estimate(workspace, device, options.precisions, data, reporter)
        else:
            table = steps.profile(workspace, device, options, reporter)
    doubts = known_warnings(workspace, table)
    if as_json:
        return print_json(inspection.inspect_latency(table, doubts).content)
    _print_table_made(table)
    for doubt in doubts:
        say(f"mind: {doubt}")
    if any(workspace.root.glob("statistics/*")) or workspace.memory().data is not None:
        return print_next(hints.search_for(table.device))
    return say("then evaluate it on labelled images: `mess-compile evaluate --data DIR`, with their folder for DIR")


def _print_table_made(table: Any) -> None:
    told = table.environment
    estimated = [entry for entry in table.entries.values() if entry.source == "estimated"]
    if estimated:
        widest = max(entry.error for entry in estimated)
        say(
            f"{len(estimated)} of {len(table.entries)} entries for {table.device} ESTIMATED from "
            f"{told.get('estimated_from', 'those that were measured')}: each may be wrong by a factor, up to "
            f"{widest:.1f} (`inspect latency`)"
        )
    if "coverage" in told:
        say(told["coverage"])
    if len(estimated) == len(table.entries):
        return
    baselines = [entry for (graph, _), entry in table.entries.items() if graph == "baseline"]
    figures = ", ".join(f"{e.mean_ms:.2f} ms in {e.precision} (p99 {e.p99_ms:.2f})" for e in baselines)
    say(
        f"{len(table.entries) - len(estimated)} entries measured on {table.device} ({table.library} "
        f"{table.library_version}, {told['cpu']}, {told['cores']} cores): baseline {figures or 'not among them'}"
    )
    if "protocol" in told:
        say(f"protocol: {told['protocol']}")
    if "beside" in told:
        say(f"beside {told['host']}, apart from this table: {told['beside']}")
    for failure in table.failed.values():
        say(f"FAILED  {failure.graph} ({failure.precision}), not in any plan: {failure.error}")
    slow, times, unsteady = (float(told[name]) for name in ("slow_share", "slow_by", "unsteady"))
    say(
        f"{told['verdict']}: the machine was slower {slow:.0%} of the time"
        + (f" ({times:.1f}x, measured again)" if slow else "")
        + f", {unsteady:.0%} of the graphs did not settle"
    )
