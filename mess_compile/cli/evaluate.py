"""The command `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion
from mess_compile.cli.console import print_hint, print_json, print_table, reporting, say, warn
from mess_compile.cli.options import (
    PRECISION,
    PYTHON,
    data_options,
    dry_run_option,
    gathered,
    json_option,
    picked,
    print_inspection,
    print_plan,
    verbose_option,
)
from mess_compile.data_folder import DataFolder

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@dataclass(frozen=True)
class EvaluateArguments:
    """What runs the graphs, and what `evaluate` prints."""

    device: str | None
    host: str | None
    python: str | None
    precision: str
    accelerator: str
    devices: int
    nodes: int
    threads: int | None
    dry_run: bool
    verbose: bool
    as_json: bool


@click.command(short_help="Record confidence and accuracy of every head.")
@data_options("Labelled images; remembered.")
@click.option(
    "--split", shell_complete=completion.splits, help="val by default; val[:50] takes the first 50 images. Remembered."
)
@click.option(
    "--device", shell_complete=completion.devices, help="Run the engines of this device instead of ONNX Runtime here."
)
@click.option(
    "--host",
    shell_complete=completion.hosts,
    help="Where the device is: ssh://user@host[:port]; where it was profiled by default.",
)
@PYTHON
@PRECISION
@click.option("--accelerator", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--devices", default=1, show_default=True, help="Processes (GPUs) on each machine that share the images.")
@click.option("--nodes", default=1, show_default=True, help="Machines; torchrun and SLURM set both.")
@click.option(
    "--threads", type=click.IntRange(1), help="CPU threads of each process; by default its share of the cores."
)
@dry_run_option
@verbose_option
@json_option
@click.pass_obj
@gathered(EvaluateArguments)
def evaluate(workspace: Workspace, data: DataFolder | None, split: str | None, arguments: EvaluateArguments) -> None:
    """Record confidence and accuracy of every head on labelled images, which `search` chooses by.

    `inspect statistics` prints the whole of it again.
    """
    from mess_compile import steps
    from mess_compile.report import inspection

    as_json = arguments.as_json
    where = picked(arguments, "device host python precision accelerator devices nodes threads")
    options = steps.EvaluateOptions(data, split, **where)
    if arguments.dry_run:
        return print_plan(steps.plan_evaluate(workspace, options), as_json)
    with reporting(as_json) as reporter:
        found = steps.evaluate(workspace, options, reporter)
    if found is None:  # another process than the first of several, which prints
        return None
    described = inspection.inspect_statistics(found)
    if as_json:
        return print_json(described.content)
    if arguments.verbose:
        print_inspection(described)
    else:
        _print_summary(described)
    return print_hint("search --max-err 1%")


def _print_summary(described: Any) -> None:
    """The final exit beside the best early head, and the warnings."""
    found = described.content
    *early, final = found["heads"]
    best = max(early, key=lambda head: head["miou"], default=None)
    say(f"{found['images']} images of {found['split']}, {found['library']} {found['precision']} on {found['device']}")
    rows = [[f"final exit ({final['name']})", f"{final['miou']:.2f}"]]
    rows += [] if best is None else [[f"best of {len(early)} early heads ({best['name']})", f"{best['miou']:.2f}"]]
    print_table("", ["", "mIoU %"], rows)
    for warning in described.warnings:
        warn(warning)
