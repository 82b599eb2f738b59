"""Counts the graphs and weights that plans for several devices share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mess_compile.graph.store import stored_weights
from mess_compile.network import GraphSet
from mess_compile.search.plan import Plan


@dataclass(frozen=True)
class SharedGraphs:
    """`graphs` are byte-identical in every plan. Bytes of the weights that every plan needs, of all weights counted
    once, and of the weights counted once per plan."""

    graphs: tuple[str, ...]
    shared_bytes: int
    together_bytes: int
    apart_bytes: int


def shared_graphs(plans: Sequence[tuple[GraphSet, Plan]]) -> SharedGraphs:
    """Raises InputError when a graph or weight is missing."""
    weights = [_weights(graph_set, plan) for graph_set, plan in plans]
    hashes = [{graph_set.spec(graph.name).sha256 for graph in plan.graphs} for graph_set, plan in plans]
    first_set, first = plans[0]
    in_all = [g.name for g in first.graphs if all(first_set.spec(g.name).sha256 in each for each in hashes)]
    every = {name: size for each in weights for name, size in each.items()}
    return SharedGraphs(
        graphs=tuple(in_all),
        shared_bytes=sum(size for name, size in every.items() if all(name in each for each in weights)),
        together_bytes=sum(every.values()),
        apart_bytes=sum(size for each in weights for size in each.values()),
    )


def _weights(graph_set: GraphSet, plan: Plan) -> dict[str, int]:
    """The size in bytes of every weight in the store that the plan's graphs name."""
    paths = (graph_set.path(graph.name) for graph in plan.graphs)
    return {weight.name: weight.stat().st_size for path in paths for weight in stored_weights(path)}
