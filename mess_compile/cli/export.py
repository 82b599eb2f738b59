"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mess_compile.cli.console import print_hint, print_json, reporting, say
from mess_compile.cli.options import FILE, Command, json_option, verbose_option

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@click.command(
    cls=Command, formerly={"--plain": "--no-edge-aware"}, short_help="Cut a multi-exit network into checked graphs."
)
@click.argument("source", type=click.Path(path_type=Path), required=False)
@click.option("--exits", type=FILE, help="TOML file that names the exits of an ONNX model (docs/own-network.md).")
@click.option(
    "--confidence",
    type=click.Choice(["top1", "margin", "entropy"]),
    default="top1",
    show_default=True,
    help="How the confidence of a cell is computed (docs/definitions.md).",
)
@click.option(
    "--no-edge-aware",
    is_flag=True,
    help="Leave out the paper's edge-aware step (Eq. 2-3), which smooths confidence at label edges.",
)
@verbose_option
@json_option
@click.pass_obj
def export(
    workspace: Workspace,
    source: Path | None,
    exits: Path | None,
    confidence: str,
    no_edge_aware: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Cut a multi-exit network (a trained one, or an ONNX model) into graphs, and check them against it.

    SOURCE is the folder of a trained network or an ONNX file; by default the network that `train` wrote.
    """
    from mess_compile import steps
    from mess_compile.network import Gate
    from mess_compile.report import inspection
    from mess_compile.search.display import network_label

    with reporting(as_json) as reporter:
        graph_set = steps.export(workspace, source, Gate(confidence, not no_edge_aware), exits, reporter)
    candidate = graph_set.candidate
    if as_json:
        return print_json(inspection.inspect_graphs(graph_set).content)
    say(f"{len(graph_set.graphs)} graphs in {workspace.graphs}, each checked against the whole network")
    if verbose:
        weights = sum(path.stat().st_size for path in (workspace.graphs / "weights").glob("*"))
        segments, heads = len(candidate.segments()), len(candidate.heads)
        say(f"{segments} segments, {heads} heads, {weights / 2**20:.1f} MiB of weights")
    if graph_set.baseline_alone is not None:
        names = " and ".join(network_label(name, graph_set.retrained) for name in graph_set.baselines)
        say(f"search compares plans with the more accurate of {names}")
    return print_hint("profile --device cpu")
