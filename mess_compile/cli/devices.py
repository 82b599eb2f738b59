"""The command `devices`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mess_compile.cli.console import print_hint, print_json, print_table, say
from mess_compile.cli.options import json_option

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@click.command(short_help="List the known devices, and mark this machine.")
@json_option
@click.pass_obj
def devices(workspace: Workspace, as_json: bool) -> None:
    """List the known devices (those of mess-compile and of the workspace's profiles/), and mark this machine."""
    from mess_compile import steps, targets
    from mess_compile.runtime.machine import machine
    from mess_compile.runtime.machine.device_names import HOST

    found_here, known = machine.this_machine(), steps.devices(workspace)
    here = targets.targets_here([each.target for each in known], found_here)
    if as_json:
        found = [{**asdict(each.target), "here": each.here, "differences": each.differences} for each in known]
        return print_json({"devices": found, "machine": asdict(found_here)})
    rows = [["yes" if each.here else "", *targets.in_cells(each.target)] for each in known]
    header = ["device", "here", "library", "precisions", "capability", "peak TFLOP/s, TOP/s", "GB/s", "description"]
    print_table("", header, [[name, mark, *rest] for mark, name, *rest in rows])
    say(f"this machine: {machine.describe(found_here)}")
    names = [target.name for target in here if target.name != HOST]
    return print_hint(f"profile --device {names[0] if names else 'cpu'}")
