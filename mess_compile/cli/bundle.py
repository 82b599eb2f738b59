"""The command `bundle`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import print_json, reporting, say
from mess_compile.cli.options import (
    FILE,
    dry_run_option,
    gathered,
    json_option,
    print_plan,
    promise_option,
    verbose_option,
)

if TYPE_CHECKING:
    from mess_compile.runtime.bundle.manifest import BundlePlan
    from mess_compile.workspace import Workspace


@dataclass(frozen=True)
class BundleArguments:
    """What goes into a bundle, and what `bundle` prints."""

    letterbox: bool
    sign: Path | None
    engines: bool
    single_file: Path | None
    release: int | None
    dry_run: bool
    verbose: bool
    as_json: bool


@click.command(short_help="Write plan, graphs and runtime as one file.")
@click.argument("plans", nargs=-1, metavar="[PLAN|DEVICE]...", shell_complete=completion.plans)
@click.option("-o", "--output", type=FILE, help="File for the bundle; DEVICE.mess in the workspace by default.")
@click.option("--letterbox", is_flag=True, help="Pad frames of other proportions instead of stretching them.")
@click.option(
    "--sign", type=FILE, metavar="KEY", help="Sign the bundle with this OpenSSH private key, such as ~/.ssh/id_ed25519."
)
@click.option("--engines", is_flag=True, help="Include built engines; devices use them only if the bundle is signed.")
@click.option(
    "--single-file",
    type=FILE,
    metavar="MODEL.onnx",
    help="Also write the first plan as one ONNX file with If nodes, for ONNX Runtime alone.",
)
@click.option(
    "--release",
    type=click.IntRange(0, 999_999_999),
    help="Release number; `ship` refuses to replace a bundle by one with a lower number.",
)
@dry_run_option
@verbose_option
@json_option
@click.pass_obj
@gathered(BundleArguments)
def bundle(workspace: Workspace, plans: tuple[str, ...], output: Path | None, arguments: BundleArguments) -> None:
    """Write the chosen plan, its graphs and the runtime as one file for the device.

    Name a plan by its device or by the file that `search` wrote; the default is the plan of the device profiled last.
    One bundle can hold several plans: one per device, or several for one device in different precisions. There the
    first one runs, and a safer one takes over if it fails.
    """
    from mess_compile import steps

    as_json = arguments.as_json
    options = steps.BundleOptions(
        "letterbox" if arguments.letterbox else "stretch",
        arguments.sign,
        arguments.engines,
        arguments.single_file,
        arguments.release,
    )
    if arguments.dry_run:
        return print_plan(steps.plan_bundle(workspace, plans, output, options).steps, as_json)
    with reporting(as_json) as reporter:
        path, manifest = steps.bundle(workspace, plans, output, options, reporter)
    size = path.stat().st_size
    doubts = list(dict.fromkeys(doubt for plan in manifest.plans for doubt in plan.doubts))
    if as_json:
        names = [plan.name for plan in manifest.plans]
        content = {"bundle": str(path), "bytes": size, "files": len(manifest.files), "plans": names}
        return print_json({**content, "doubts": doubts})
    frames = len({golden.frame for golden in manifest.golden})
    say(f"{path}: {size / 2**20:.2f} MiB for {', '.join(plan.name for plan in manifest.plans)}")
    for plan in manifest.plans:
        say(f"{plan.name}: {_plan_line(plan)}")
    if arguments.single_file is not None:
        say(f"{arguments.single_file}: {manifest.plans[0].name} as one ONNX file")
    if arguments.verbose:
        say(f"{len(manifest.files)} files, {frames} golden frames that `verify` runs")
        say("the first plan that fits a device runs there")
    return hints.after_a_bundle(path, manifest.plans)


def _plan_line(plan: BundlePlan) -> str:
    """A plan and the requirement that it was made for."""
    from mess_compile.search.display import speed

    own, other = plan.predicted, plan.baseline
    heads = ", ".join(f"{stage.head} {rate:.0%}" for stage, rate in zip(plan.stages, own.exit_rates, strict=True))
    ratio = other.latency_ms / own.latency_ms if own.latency_ms else float("inf")
    bounds = [promise_option(promise) for promise in plan.promises]
    asked = f"searched with {' '.join(bounds)}" if bounds else "searched without bounds"
    return f"{heads}; {speed(ratio)}, {own.miou - other.miou:+.2f} pp mIoU; {asked}"
