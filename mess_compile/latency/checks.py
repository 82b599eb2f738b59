"""Warnings about a latency table, which travel with every figure made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from mess_compile.engines.prepare import graphs_of_recipe
from mess_compile.latency.table import LatencyTable, check_table_current, mean_ms_of
from mess_compile.network import GraphSet, head_graph_name, segment_name
from mess_compile.runtime.base.errors import MessError
from mess_compile.runtime.engines.engine import FP32
from mess_compile.workspace import Workspace

CHEAPER, DEARER = 0.15, 0.35
"""By what share the parts of the network, run in sequence, may take less or more than the network as one graph.

More is normal: more tensors are handed over, and the head has its gate. Steady tables had 5 % at 63 ms and 31 % at
0.8 ms (ONNX Runtime, two cores). Less is not: tables measured while the machine changed its speed had 26 to 71 %.
"""


def warnings_of(table: LatencyTable, graph_sets: Sequence[GraphSet] = ()) -> tuple[str, ...]:
    """Warnings about a table, and about its entries for the graphs of these recipes."""
    noisy = [_noisy(table)] if table.environment.get("verdict") == "unstable" else []
    return (*noisy, *(warning for each in graph_sets for warning in _inconsistent(table, each)))


def _noisy(table: LatencyTable) -> str:
    cause = table.environment.get("likely_cause")
    why = "" if cause in (None, "unknown") else f" ({cause})"
    return f"latencies of {table.device} are noisy{why}; profile again on an idle machine"


def _inconsistent(table: LatencyTable, graph_set: GraphSet) -> Iterator[str]:
    parts_ms = mean_ms_of(table, graph_set, _parts(graph_set), measured=True)
    for name in graph_set.baselines if parts_ms is not None else ():
        whole_ms = mean_ms_of(table, graph_set, [name], measured=True)
        if not whole_ms or parts_ms is None:
            continue
        more = parts_ms / whole_ms - 1
        if -CHEAPER <= more <= DEARER:
            continue
        why = "cutting costs that much, or the measurement is noisy" if more > 0 else "the measurement is noisy"
        recipe = "" if graph_set.recipe == FP32 else f" in {graph_set.recipe}"
        yield (
            f"{name}{recipe} takes {whole_ms:.2f} ms on {table.device}, its parts in sequence {parts_ms:.2f} ms "
            f"({abs(more):.0%} {'more' if more > 0 else 'less'}): {why}; profile again"
        )


def _parts(graph_set: GraphSet) -> list[str]:
    """The graphs of the candidate network's final exit, cut at every exit point."""
    candidate = graph_set.candidate
    last = len(candidate.exit_points)
    segments = [segment_name(point, point + 1) for point in range(last)]
    return [*segments, head_graph_name(candidate.baseline), candidate.output_of(candidate.head(candidate.baseline))]


def known_warnings(workspace: Workspace, table: LatencyTable) -> tuple[str, ...]:
    """Warnings about a table and those of its recipes whose graphs are still in the workspace."""
    graph_sets = []
    for recipe in table.recipes:
        with suppress(MessError):
            graph_set = graphs_of_recipe(workspace, recipe, table.device)
            check_table_current(table, graph_set)
            graph_sets.append(graph_set)
    return warnings_of(table, graph_sets)
