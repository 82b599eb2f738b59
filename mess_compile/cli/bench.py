"""The command `bench`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import print_json, print_next, print_table, reporting, say
from mess_compile.cli.options import (
    BUNDLE,
    TARGET,
    data_options,
    dry_run_option,
    json_option,
    print_doubts,
    print_plan,
    rates,
)
from mess_compile.data_folder import DataFolder

if TYPE_CHECKING:
    from mess_compile.bench.run import Bench
    from mess_compile.steps.bench import BenchOptions
    from mess_compile.workspace import Workspace


@click.command(short_help="Measured against predicted, and against the baseline.")
@click.argument("bundle", type=BUNDLE, shell_complete=completion.bundles)
@data_options("Labelled images; the workspace's by default.")
@click.option(
    "--split",
    default="val",
    show_default=True,
    shell_complete=completion.splits,
    help="Report on images that nothing was tuned on.",
)
@click.option("--passes", default=3, show_default=True, help="How often every image is measured.")
@click.option("--deadline", help="Refine every image until then, such as 20ms: what is there, and how often too late.")
@click.option("--strict", is_flag=True, help="End with exit code 3 where the plan's promise did not hold.")
@TARGET
@dry_run_option
@json_option
@click.pass_obj
def bench(
    workspace: Workspace,
    bundle: Path,
    data: DataFolder | None,
    split: str,
    passes: int,
    deadline: str | None,
    strict: bool,
    target: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measured against predicted, and against the better single-exit baseline in the same run.

    What the plan was asked to keep (`search --max-err 1%`) is held against the measurement: held, or MISSED.
    """
    from mess_compile import steps
    from mess_compile.search.display import speed, work
    from mess_compile.search.requirement import parse_milliseconds

    if strict and deadline is not None:
        raise click.UsageError("--strict is about the bounds that the plan was searched by: leave --deadline out.")

    options = steps.BenchOptions(data, split, passes, target)
    if dry_run:
        deadline_ms = None if deadline is None else parse_milliseconds(deadline)
        return print_plan(steps.plan_bench(workspace, bundle, options, deadline_ms), as_json)
    if deadline is not None:
        return _bench_deadline(workspace, bundle, options, deadline, as_json)
    with reporting(as_json) as reporter:
        result = steps.bench(workspace, bundle, options, reporter)
    if as_json:
        print_json(asdict(result))
        return _exit_if_missed(result, strict)
    columns = {result.baseline_name: result.baseline}
    columns |= {name: getattr(result, name) for name in ("predicted", "replayed", "measured")}
    rows = [
        [name, f"{c.miou:.2f}", f"{c.latency_ms:.2f}", f"{c.gmacs:.3f}", rates(c.exit_rates)]
        for name, c in columns.items()
    ]
    print_table(
        f"{result.images} images of {result.split}, {result.passes} passes",
        ["", "mIoU %", "latency ms", "GMACs", "exits"],
        rows,
    )
    for other in result.other_baselines:
        say(f"{result.baseline_name} is the better baseline here: {other.name} has {other.miou:.2f} % mIoU")
    low, high = result.latency_ratio_range
    say(
        f"measured against {result.baseline_name} in the same run: {speed(result.latency_ratio)} (passes "
        f"{low:.2f}x to {high:.2f}x), {work(result.workload_ratio)}, {result.miou_difference:+.2f} pp of mIoU"
    )
    for promise in result.promises:
        say(promise.sentence)
    if result.tuned_on:
        say(
            f"the plan was chosen on {result.tuned_on} of these {result.images} images: a result from tuning data; "
            "--split names others"
        )
    for near in result.disagreements:
        say(
            f"{near.image}: replayed exit {near.replayed_exit}, measured {near.measured_exit}, "
            f"{near.counts_from_cut} counts from the cut"
        )
    print_doubts(result.doubts)
    print_next(*_after_bench(result, bundle))
    return _exit_if_missed(result, strict)


MISSED = 3
"""The exit code of `bench --strict` for a bench that was done, and found a promise missed."""


def _exit_if_missed(result: Bench, strict: bool) -> None:
    if strict and result.missed:
        raise click.exceptions.Exit(MISSED)


_BOUNDS = {
    "latency_ms": "--max-latency {:.4g}ms",
    "p95_ms": "--max-latency-p95 {:.4g}ms",
    "worst_ms": "--max-latency-worst {:.4g}ms",
    "gmacs": "--max-workload {:.4g}",
    "energy_mj": "--max-energy {:.4g}mJ",
    "memory_bytes": "--max-memory {:.0f}B",
}
"""How `search` is asked for the bounds that a bench speaks of."""


def _after_bench(result: Bench, bundle: Path) -> list[str]:
    """What follows from the promises: a safer plan, a fresh latency table, or shipping."""
    from mess_compile.search.requirement import safer_max_err

    missed, report = {each.quantity: each for each in result.missed}, hints.for_device("report", result.device)
    if not missed:
        return [report, *filter(None, [hints.ship_to_host(bundle, result.device)])]
    steps = []
    if "err_pp" in missed and missed["err_pp"].asked > 0:  # nothing is safer than 0
        lost = missed["err_pp"]
        safer = safer_max_err(lost.asked, lost.found or 0.0)
        others = [_BOUNDS[each.quantity].format(each.asked) for each in result.promises if each is not lost]
        asked = hints.search_for(result.device, f"{safer:.2g}%")
        steps.append(" ".join([asked, *others]))
    if set(missed) & {"latency_ms", "p95_ms", "worst_ms"}:
        steps.append(f"profile --device {result.device}")
    return [*steps, report]


def _bench_deadline(
    workspace: Workspace,
    bundle: Path,
    options: BenchOptions,
    deadline: str,
    as_json: bool,
) -> None:
    from mess_compile import steps
    from mess_compile.search.requirement import parse_milliseconds

    deadline_ms = parse_milliseconds(deadline)
    with reporting(as_json) as reporter:
        found = steps.bench_deadline(workspace, bundle, deadline_ms, options, reporter)
    if as_json:
        return print_json(asdict(found))
    sure = "" if found.confidence is None else f", {found.confidence:.0%} of the cells sure"
    say(
        f"{found.images} images of {found.split}, {found.passes} passes, at {found.deadline_ms:g} ms: "
        f"{found.miou:.2f} % mIoU{sure}; last exits {rates(found.exit_rates)}"
    )
    say(
        f"misses: {found.missed_later:.2%} of the images had a later result too late, {found.missed_first:.2%} "
        f"even the first; the last result came after {found.p50_ms:.2f} ms (median), {found.p99_ms:.2f} ms (p99)"
    )
    print_doubts(found.doubts)
    return hints.print_known(hints.run_on_an_image(bundle, f" --deadline {deadline_ms:g}ms"))
