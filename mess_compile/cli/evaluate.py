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
    "--split",
    shell_complete=completion.splits,
    help="Which split of the data, val by default; val[:50] is its first 50 images. Remembered.",
)
@click.option(
    "--device",
    shell_complete=completion.devices,
    help="Run the graphs with the engines of this device; by default with ONNX Runtime here.",
)
@click.option(
    "--host",
    shell_complete=completion.hosts,
    help="The device's address, ssh://user@host[:port]; by default the one that `profile` used.",
)
@PYTHON
@PRECISION
@click.option(
    "--accelerator",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="What ONNX Runtime runs on.",
)
@click.option("--devices", default=1, show_default=True, help="Processes (GPUs) per machine; they share the images.")
@click.option(
    "--nodes",
    default=1,
    show_default=True,
    help="Machines that share the images; torchrun and SLURM set --devices and --nodes.",
)
@click.option(
    "--threads", type=click.IntRange(1), help="CPU threads of each process; by default its share of the cores."
)
@dry_run_option
@verbose_option
@json_option
@click.pass_obj
@gathered(EvaluateArguments)
def evaluate(workspace: Workspace, data: DataFolder | None, split: str | None, arguments: EvaluateArguments) -> None:
    """Run every head on labelled images, and record its confidence and accuracy for `search`.

    `inspect statistics` prints all results again.
    """
    from mess_compile import steps
    from mess_compile.report import inspection
    from mess_compile.runtime.bundle.manifest import LABELS

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
    return print_hint("search --max-err 1%" if found.truth == LABELS else "search --max-change 3%")


def _print_summary(described: Any) -> None:
    """The final exit beside the best early head, and the warnings."""
    from mess_compile.runtime.bundle.manifest import against

    found = described.content
    *early, final = found["heads"]
    best = max(early, key=lambda head: head["miou"], default=None)
    where = f"{found['library']} {found['precision']} on {found['device']}"
    say(f"{found['images']} images of {found['split']}{against(found['truth'])}, {where}")
    rows = [[f"final exit ({final['name']})", f"{final['miou']:.2f}"]]
    rows += [] if best is None else [[f"best of {len(early)} early heads ({best['name']})", f"{best['miou']:.2f}"]]
    print_table("", ["", "mIoU %"], rows)
    for warning in described.warnings:
        warn(warning)
