"""Checks a latency table: the warnings that travel with every figure computed from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from mess_compile.engines.prepare import graphs_of_recipe
from mess_compile.latency.table import LatencyTable, check_current, mean_ms_of
from mess_compile.network import GraphSet, head_graph_name, segment_name
from mess_compile.runtime.base.errors import MessError
from mess_compile.runtime.engines.engine import FP32
from mess_compile.workspace import Workspace

CHEAPER, DEARER = 0.15, 0.35
"""How much less or more the sum of the parts may take than the network as one graph, as a share.

More is normal: more tensors are handed over, and the head has its gate. Steady tables had 5 % more at 63 ms and 31 %
more at 0.8 ms (ONNX Runtime, two cores). Less is suspicious: graphs measured at different speeds of the machine gave 26
to 71 %.
"""


def warnings_of(table: LatencyTable, graph_sets: Sequence[GraphSet] = ()) -> tuple[str, ...]:
    """Warnings about a table, and about its entries for the graphs of these recipes."""
    warnings = [_unstable(table)] if table.environment.get("verdict") == "unstable" else []
    return (*warnings, *(warning for each in graph_sets for warning in _implausible_sums(table, each)))


def _unstable(table: LatencyTable) -> str:
    cause = table.environment.get("likely_cause", "unknown")
    return (
        f"{table.device} was unstable when it was profiled (likely cause: {cause}): profile again when that is gone, "
        "before you trust these latencies"
    )


def _implausible_sums(table: LatencyTable, graph_set: GraphSet) -> Iterator[str]:
    parts_ms = mean_ms_of(table, graph_set, _parts(graph_set), measured=True)
    for name in graph_set.baselines if parts_ms is not None else ():
        whole_ms = mean_ms_of(table, graph_set, [name], measured=True)
        if not whole_ms or parts_ms is None:
            continue
        more = parts_ms / whole_ms - 1
        if -CHEAPER <= more <= DEARER:
            continue
        why = "cutting costs that much here, or part of this" if more > 0 else "part of this"
        recipe = "" if graph_set.recipe == FP32 else f" in {graph_set.recipe}"
        yield (
            f"on {table.device} the parts of the network{recipe} (segments, final head, output) take {parts_ms:.2f} ms "
            f"one after the other, {abs(more):.0%} {'more' if more > 0 else 'less'} than {name} as one graph "
            f"({whole_ms:.2f} ms): {why} was measured at another speed of the machine; profile again before you trust "
            "a ratio"
        )


def _parts(graph_set: GraphSet) -> list[str]:
    """The graphs of the candidate network's final exit, cut at every exit point."""
    candidate = graph_set.candidate
    last = len(candidate.exit_points)
    segments = [segment_name(point, point + 1) for point in range(last)]
    return [*segments, head_graph_name(candidate.baseline), candidate.output_of(candidate.head(candidate.baseline))]


def known_warnings(workspace: Workspace, table: LatencyTable) -> tuple[str, ...]:
    """Warnings about a table, and about its recipes whose graphs are still in the workspace and unchanged."""
    graph_sets = []
    for recipe in table.recipes:
        with suppress(MessError):
            graph_set = graphs_of_recipe(workspace, recipe, table.device)
            check_current(table, graph_set)
            graph_sets.append(graph_set)
    return warnings_of(table, graph_sets)
