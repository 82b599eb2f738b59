"""The command `evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion
from mess_compile.cli.console import print_json, print_next, reporting
from mess_compile.cli.options import (
    PRECISION,
    PYTHON,
    data_options,
    dry_run_option,
    json_option,
    print_inspection,
    print_plan,
)
from mess_compile.data_folder import DataFolder

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@click.command(short_help="Record how sure and how right every head is.")
@data_options("Labelled images; remembered.")
@click.option(
    "--split", shell_complete=completion.splits, help="val by default; val[:50] takes the first 50 files. Remembered."
)
@click.option(
    "--device", shell_complete=completion.devices, help="Run the engines of this device instead of ONNX Runtime here."
)
@click.option(
    "--host",
    shell_complete=completion.hosts,
    help="Where the device is: ssh://user@host[:port]; the one that it was profiled at by default.",
)
@PYTHON
@PRECISION
@click.option("--accelerator", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--devices", default=1, show_default=True, help="Processes (GPUs) on each machine that share the images.")
@click.option("--nodes", default=1, show_default=True, help="Machines; torchrun and SLURM set both themselves.")
@click.option(
    "--threads", type=click.IntRange(1), help="CPU threads of each process; by default its share of the cores."
)
@dry_run_option
@json_option
@click.pass_obj
def evaluate(
    workspace: Workspace, /, data: DataFolder | None, split: str | None, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Record how sure and how right every head is on labelled images."""
    from mess_compile import steps
    from mess_compile.report import inspection

    how = steps.EvaluateOptions(data=data, split=split, **options)
    if dry_run:
        return print_plan(steps.plan_evaluate(workspace, how), as_json)
    with reporting(as_json) as reporter:
        found = steps.evaluate(workspace, how, reporter)
    if found is None:  # one of many processes; the first one speaks
        return None
    described = inspection.inspect_statistics(found)
    if as_json:
        return print_json(described.content)
    print_inspection(described)
    return print_next("search --max-err 1%")
