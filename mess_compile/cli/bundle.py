"""The command `bundle`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import print_json, reporting, say
from mess_compile.cli.options import FILE, dry_run_option, json_option, print_doubts, print_plan

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@click.command(short_help="Write plan, graphs and runtime as one file.")
@click.argument("plans", nargs=-1, metavar="[PLAN|DEVICE]...", shell_complete=completion.plans)
@click.option("-o", "--output", type=FILE, help="DEVICE.mess in the workspace by default.")
@click.option("--letterbox", is_flag=True, help="Frames of another shape keep their proportions; stretched otherwise.")
@click.option("--sign", type=FILE, metavar="KEY", help="An OpenSSH private key, such as ~/.ssh/id_ed25519.")
@click.option("--engines", is_flag=True, help="Take built engines along; used where the bundle is signed.")
@click.option(
    "--single-file",
    type=FILE,
    metavar="MODEL.onnx",
    help="Also the first plan as one ONNX with If, for ONNX Runtime alone.",
)
@click.option("--release", type=click.IntRange(0, 999_999_999), help="A growing number: `ship` refuses an older one.")
@dry_run_option
@json_option
@click.pass_obj
def bundle(
    workspace: Workspace,
    plans: tuple[str, ...],
    output: Path | None,
    letterbox: bool,
    sign: Path | None,
    engines: bool,
    single_file: Path | None,
    release: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the chosen plan, its graphs and the runtime as one file for the device.

    A plan is named by the file that `search` wrote, or by its device; by default it is that of the device profiled
    last. Several make one bundle: for several devices, each of which takes its own plan, or for one in several
    precisions, of which the first runs and a safer one takes over where it fails.
    """
    from mess_compile import steps

    options = steps.BundleOptions("letterbox" if letterbox else "stretch", sign, engines, single_file, release)
    if dry_run:
        return print_plan(steps.plan_bundle(workspace, plans, output, options), as_json)
    with reporting(as_json) as reporter:
        path, manifest = steps.bundle(workspace, plans, output, options, reporter)
    size = path.stat().st_size
    doubts = list(dict.fromkeys(doubt for plan in manifest.plans for doubt in plan.doubts))
    if as_json:
        names = [plan.name for plan in manifest.plans]
        told = {"bundle": str(path), "bytes": size, "files": len(manifest.files), "plans": names, "doubts": doubts}
        return print_json(told)
    frames = len({golden.frame for golden in manifest.golden})
    say(f"{path}: {size / 2**20:.2f} MiB, {len(manifest.files)} files, {frames} golden frames")
    if len(manifest.plans) > 1:
        say(f"plans: {', '.join(plan.name for plan in manifest.plans)}; the first for a device runs there")
    print_doubts(doubts)
    return hints.after_a_bundle(path, manifest.plans)
