"""Commands around the device: build, profile, devices, doctor."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import fail, print_json, print_next, print_table, progress_bar, say
from mess_compile.cli.options import JUDGED, PRECISIONS, PYTHON, dry_run_option, json_option, print_foresight
from mess_compile.cli.searching import thrift_of
from mess_compile.data_folder import DataFolder
from mess_compile.runtime.base.errors import InputError

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

    precisions, tell = tuple(precision.split(",")), partial(say, err=True)
    if dry_run:
        return print_foresight(steps.foresee_build(workspace, device, precisions, jobs, host), as_json)
    with progress_bar(as_json) as progress:
        builds = steps.build(workspace, device, precisions, data, jobs, progress, host, tell, python)
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
    from mess_compile.latency.checks import known_doubts
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
    thrift = None if everything else thrift_of(wishes, budget)
    precisions, tell = tuple(precision.split(",")), partial(say, err=True)
    effort = None if seconds is None else replace(measuring.Effort(), max_s=seconds)
    if dry_run and estimate:
        raise click.UsageError("--estimate measures nothing, and takes a moment: drop --dry-run.")
    if dry_run:
        foreseen = steps.foresee_profile(workspace, device, precisions, hosts or None, thrift, effort)
        return print_foresight(foreseen, as_json)
    with progress_bar(as_json) as progress:
        if estimate:
            table = steps.estimate(workspace, device, progress, precisions, data)
        else:
            table = steps.profile(
                workspace, device, progress, precisions, data, effort, hosts or None, thrift, tell, lock_clocks, python
            )
    doubts = known_doubts(workspace, table)
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


@click.command(short_help="Known targets, and which of them this machine is.")
@json_option
@click.pass_obj
def devices(workspace: Workspace, as_json: bool) -> None:
    """Known targets, ours and the workspace's own, and which of them this machine is."""
    from mess_compile import steps, targets
    from mess_compile.runtime.machine import machine as machines

    machine, known = machines.this_machine(), steps.devices(workspace)
    here = targets.targets_here([each.target for each in known], machine)
    if as_json:
        found = [{**asdict(each.target), "here": each.here, "differences": each.differences} for each in known]
        return print_json({"devices": found, "machine": asdict(machine)})
    rows = [["yes" if each.here else "", *targets.in_cells(each.target)] for each in known]
    header = ["device", "here", "library", "precisions", "capability", "peak TFLOP/s, TOP/s", "GB/s", "description"]
    print_table("", header, [[name, mark, *rest] for mark, name, *rest in rows])
    say(f"this machine: {machines.in_words(machine)}")
    return print_next(f"profile --device {here[0].name if here else 'host'}")


@click.command()
@json_option
@click.pass_obj
def doctor(workspace: Workspace, as_json: bool) -> None:
    """What this machine can train, build and run."""
    from mess_compile.doctor import examine

    with progress_bar(as_json) as progress:
        progress("look at this machine", 0, 0)
        findings = examine(workspace.root)
    if as_json:
        return print_json({"findings": [asdict(finding) for finding in findings]})
    for finding in findings:
        say(f"{'yes' if finding.possible else 'no '}  {finding.what}: {finding.detail}")
    return print_next("demo")
