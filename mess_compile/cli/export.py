"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mess_compile.cli.console import print_json, print_next, reporting, say
from mess_compile.cli.options import FILE, json_option

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@click.command(short_help="Cut a candidate network into checked graphs.")
@click.argument("source", type=click.Path(path_type=Path), required=False)
@click.option("--exits", type=FILE, help="TOML that names another framework's tensors; with MODEL.onnx.")
@click.option("--confidence", type=click.Choice(["top1", "margin", "entropy"]), default="top1", show_default=True)
@click.option("--plain", is_flag=True, help="Leave the edge-aware step (Eq. 2-3) of the gate out.")
@json_option
@click.pass_obj
def export(
    workspace: Workspace, source: Path | None, exits: Path | None, confidence: str, plain: bool, as_json: bool
) -> None:
    """Cut a candidate network (or a multi-exit ONNX) into checked graphs."""
    from mess_compile import steps
    from mess_compile.network import Gate
    from mess_compile.report import inspection

    with reporting(as_json) as reporter:
        graph_set = steps.export(workspace, source, Gate(confidence, not plain), exits, reporter)
    candidate = graph_set.candidate
    if as_json:
        return print_json(inspection.inspect_graphs(graph_set).content)
    weights = sum(path.stat().st_size for path in (workspace.graphs / "weights").glob("*"))
    say(
        f"{len(graph_set.graphs)} graphs in {workspace.graphs}: {len(candidate.segments())} segments, "
        f"{len(candidate.heads)} heads; weights {weights / 2**20:.1f} MiB; all agree with the whole network"
    )
    if graph_set.baseline_alone is not None:
        say(f"{' and '.join(graph_set.baselines)}: plans are held against the better one in mIoU")
    return print_next("profile --device host")
