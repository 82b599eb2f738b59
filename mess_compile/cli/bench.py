"""The command `bench`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import print_hint, print_json, print_table, reporting, say, warn
from mess_compile.cli.options import (
    BOUNDS,
    BUNDLE,
    TARGET,
    data_options,
    dry_run_option,
    gathered,
    json_option,
    print_plan,
    rates,
    verbose_option,
)
from mess_compile.data_folder import DataFolder

if TYPE_CHECKING:
    from mess_compile.bench.run import Bench
    from mess_compile.steps.bench import BenchOptions
    from mess_compile.workspace import Workspace


@dataclass(frozen=True)
class BenchArguments:
    """How `bench` measures, and what it prints."""

    passes: int
    deadline: str | None
    strict: bool
    target: str | None
    dry_run: bool
    verbose: bool
    as_json: bool


@click.command(short_help="Compare measured figures with predicted ones and the baseline.")
@click.argument("bundle", type=BUNDLE, shell_complete=completion.bundles)
@data_options("Labelled images; the workspace's data by default.")
@click.option(
    "--split",
    default="val",
    show_default=True,
    shell_complete=completion.splits,
    help="Split to measure on; choose one that nothing was tuned on.",
)
@click.option("--passes", default=3, show_default=True, help="How often to measure each image.")
@click.option("--deadline", help="Per-image deadline, such as 20ms; prints mIoU and miss rate.")
@click.option("--strict", is_flag=True, help="End with exit code 3 if a bound of the plan is missed.")
@TARGET
@dry_run_option
@verbose_option
@json_option
@click.pass_obj
@gathered(BenchArguments)
def bench(workspace: Workspace, bundle: Path, data: DataFolder | None, split: str, arguments: BenchArguments) -> None:
    """Measure a bundle and its single-exit baseline on labelled images, in the same run.

    Each bound that the plan was searched with (`search --max-err 1%`) is compared with the measurement: held or MISSED.
    """
    from mess_compile import steps
    from mess_compile.search.requirement import parse_milliseconds

    deadline, strict, as_json = arguments.deadline, arguments.strict, arguments.as_json
    options = steps.BenchOptions(data, split, arguments.passes, arguments.target)
    if strict and deadline is not None:
        raise click.UsageError("--strict checks the bounds that the plan was searched with: drop --deadline.")
    if arguments.dry_run:
        deadline_ms = None if deadline is None else parse_milliseconds(deadline)
        return print_plan(steps.plan_bench(workspace, bundle, options, deadline_ms).steps, as_json)
    if deadline is not None:
        return _bench_deadline(workspace, bundle, options, deadline, as_json)
    with reporting(as_json) as reporter:
        result = steps.bench(workspace, bundle, options, reporter)
    if as_json:
        print_json(asdict(result))
        return _exit_if_missed(result, strict)
    _print_bench(result, bundle)
    if arguments.verbose:
        _print_details(result)
    for warning in result.doubts if arguments.verbose else ():
        warn(f"predicted latencies: {warning}")
    if result.tuned_on:
        warn(
            f"the plan was chosen on {result.tuned_on} of these {result.images} images, which flatters its figures: "
            "name another split with --split"
        )
    print_hint(*_after_bench(result, bundle))
    return _exit_if_missed(result, strict)


_COLUMNS = {
    "predicted": "predicted (tuning images)",
    "replayed": "replayed (computed)",
    "measured": "measured",
}
"""How the columns of a bench are called: of the plan; of the plan on these images, computed and really run."""


def _print_bench(result: Bench, bundle: Path) -> None:
    from mess_compile.runtime.bundle.manifest import against
    from mess_compile.search.display import baseline_label, interval_sentence, network_label, speed, work

    say(
        f"{bundle.name} against the {network_label(result.baseline_name, result.retrained)} on "
        f"{result.images} images of {result.split}{against(result.truth)}: {speed(result.latency_ratio)}, "
        f"{work(result.workload_ratio)}, "
        f"{result.miou_difference:+.2f} pp mIoU"
    )
    columns = {baseline_label(result.baseline_name, result.retrained): result.baseline}
    columns |= {title: getattr(result, name) for name, title in _COLUMNS.items()}
    changes = any(column.change is not None for column in columns.values())
    rows = [
        [
            name,
            f"{c.miou:.2f}",
            f"{c.latency_ms:.2f}",
            f"{c.gmacs:.3f}",
            *([("-" if c.change is None else f"{c.change:.2f}")] if changes else []),
            rates(c.exit_rates) if len(c.exit_rates) > 1 else "",
        ]
        for name, c in columns.items()
    ]
    print_table("", ["", "mIoU %", "latency ms", "GMACs", *(["changed %"] if changes else []), "images per exit"], rows)
    if result.plan_truth != result.truth:
        say(f"the column predicted is against {result.plan_truth}, the others are against {result.truth}")
    say(interval_sentence(result.expected, result.without_expected))
    for promise in result.promises:
        say(promise.sentence)
    if result.disagreements:
        count = len(result.disagreements)
        say(f"{count} images left at another stage than computed, near its threshold (-v lists them)")


def _print_details(result: Bench) -> None:
    from mess_compile.search.display import network_label, speed

    if result.passes > 1:
        low, high = map(speed, result.latency_ratio_range)
        say(f"{result.passes} passes of baseline and plan in turn: the slowest pass {low}, the fastest {high}")
    for other in result.other_baselines:
        say(
            f"the {network_label(other.name, result.retrained)} has {other.miou:.2f} % mIoU, less than the baseline: "
            f"the {network_label(result.baseline_name, result.retrained)}"
        )
    for near in result.disagreements:
        say(
            f"{near.image}: computed stage {near.replayed_exit}, measured {near.measured_exit}, "
            f"{near.counts_from_cut} cells from the threshold"
        )


MISSED = 3
"""The exit code of `bench --strict` where a bound was missed."""


def _exit_if_missed(result: Bench, strict: bool) -> None:
    if strict and result.missed:
        raise click.exceptions.Exit(MISSED)


_LOSSES = ("err_pp", "change", "class_err_pp")


def _after_bench(result: Bench, bundle: Path) -> list[str]:
    """The commands that follow: a safer search or a new profile where a bound was missed, else report and ship."""
    from mess_compile.search.requirement import safer_max_err

    report = hints.for_device("report", result.device)
    if not result.missed:
        return [report, *filter(None, [hints.ship_to_host(bundle, result.device)])]
    steps = []
    safer = {
        each: float(f"{safer_max_err(each.asked, each.found or 0.0):.2g}")
        for each in result.missed
        if each.quantity in _LOSSES and each.asked > 0  # nothing is safer than 0
    }
    if safer:
        bounds = [(each, safer.get(each, each.asked)) for each in result.promises]
        options = [BOUNDS[each.quantity].format(value, name=each.class_name) for each, value in bounds]
        steps.append(" ".join([hints.for_device("search", result.device), *options]))
    if {each.quantity for each in result.missed} & {"latency_ms", "p95_ms", "worst_ms"}:
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
    from mess_compile.runtime.bundle.manifest import against
    from mess_compile.search.requirement import parse_milliseconds

    deadline_ms = parse_milliseconds(deadline)
    with reporting(as_json) as reporter:
        found = steps.bench_deadline(workspace, bundle, deadline_ms, options, reporter)
    if as_json:
        return print_json(asdict(found))
    say(
        f"{bundle.name} on {found.images} images of {found.split}{against(found.truth)} with a deadline of "
        f"{found.deadline_ms:g} ms: {found.miou:.2f} % mIoU"
    )
    say(
        f"misses: {found.missed_first:.2%} of the images had no result in time, {found.missed_later:.2%} a later one "
        f"too late; last exits {rates(found.exit_rates)}"
    )
    say(f"last result after {found.p50_ms:.2f} ms (median), {found.p99_ms:.2f} ms (p99)")
    return hints.print_known(hints.run_on_an_image(bundle, f" --deadline {deadline_ms:g}ms"))
