"""The command `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mess_compile.backbone_names import BACKBONES
from mess_compile.cli import completion, hints
from mess_compile.cli.console import print_json, quoted
from mess_compile.cli.options import json_option, print_inspection, size

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@click.command(short_help="Describe a backbone, bundle, plan or artefact.")
@click.argument("thing", shell_complete=completion.inspected)
@click.option(
    "--classes", type=click.IntRange(2, 255), default=21, show_default=True, help="Classes, when THING is a backbone."
)
@click.option(
    "--input", "input_hw", metavar="HxW", help="Input size: of a backbone (512x512), of a model with a dynamic one."
)
@click.option("--exits", type=click.IntRange(1), help="Exit points: of a backbone (6), of a model (5).")
@click.option("--all", "whole_front", is_flag=True, help="All trade-offs, when THING is a plan.")
@json_option
@click.pass_obj
def inspect(
    workspace: Workspace,
    thing: str,
    classes: int,
    input_hw: str | None,
    exits: int | None,
    whole_front: bool,
    as_json: bool,
) -> None:
    """Describe a backbone (mobilenetv2, resnet50, efficientnet-lite0), a bundle, a plan (its file or device), where
    exits can attach to an ONNX model, or the workspace's graphs, statistics, latency or plan."""
    from mess_compile.report import inspection

    found = inspection.inspect(workspace, thing, classes, size(input_hw) if input_hw else None, exits, whole_front)
    if as_json:
        return print_json(found.content)
    print_inspection(found)
    return hints.print_known(_after_inspection(thing, found.content))


def _after_inspection(thing: str, content: dict[str, Any]) -> str | None:
    if thing in BACKBONES:
        known = hints.workspace_here().memory().data is not None
        return f"train --data {quoted(hints.data_root())} --backbone {thing}" if known else None
    if "places" in content:
        return None
    if "certificate" in content:
        return "bundle" if thing == "plan" else f"bundle {quoted(Path(thing))}"
    after = {"graphs": "profile --device cpu"}
    after |= dict.fromkeys(("statistics", "latency"), "search --max-err 1%")
    if thing in after:
        return after[thing]
    here = any(hints.runs_here(plan["target"], plan["library"]) for plan in content["plans"])
    return hints.run_on_an_image(Path(thing)) if here else None
