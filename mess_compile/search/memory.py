"""The memory of plans, for many chains of heads at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mess_compile.array_types import Array
from mess_compile.network import head_graph_name
from mess_compile.search.metrics import Evidence, memory_bytes, plan_graphs


def memory_of_chains(evidence: Evidence) -> Callable[[Array], Array]:
    """A function from chains (m, exits) of indices into `evidence.heads` to bytes (m,), as `memory_bytes` gives them.

    The index after the last stands for no head. Heads with the same exit point, output graph, inputs and outputs differ
    only in their weights and workspaces.
    """
    graph_set, candidate = evidence.graph_set, evidence.candidate
    specs = [graph_set.spec(head_graph_name(head.name)) for head in evidence.heads]
    weights = np.array([*(spec.bytes for spec in specs), 0], np.int64)
    workspaces = np.array([*(spec.workspace_bytes for spec in specs), 0], np.int64)
    kinds: dict[Any, int] = {None: 0}
    looks = [
        (head.exit_point, candidate.output_of(head), spec.inputs, spec.outputs)
        for head, spec in zip(evidence.heads, specs, strict=True)
    ]
    for look in looks:
        kinds.setdefault(look, len(kinds))
    of_heads = [kinds[look] for look in looks]
    kind = np.array([*of_heads, 0])
    known: dict[int, tuple[int, int]] = {}

    def of_others(chain: Array) -> tuple[int, int]:
        """The memory of a chain without its heads' weights and the largest workspace, and the largest workspace without
        its heads."""
        heads = [evidence.heads[h].name for h in chain if h < len(specs)]
        graphs = [graph_set.spec(name) for name in plan_graphs(graph_set.candidate, heads)]
        apart = {head_graph_name(head) for head in heads}
        largest = max(spec.workspace_bytes for spec in graphs)
        without = memory_bytes(graph_set, heads) - largest - int(weights[chain].sum())
        return without, max(spec.workspace_bytes for spec in graphs if spec.name not in apart)

    def memory(chains: Array) -> Array:
        codes = kind[chains] @ len(kinds) ** np.arange(chains.shape[1])
        some, first, alike = np.unique(codes, return_index=True, return_inverse=True)
        for code, chain in zip(some.tolist(), chains[first], strict=True):
            if code not in known:
                known[code] = of_others(chain)
        others = np.array([known[code] for code in some.tolist()], np.int64).reshape(-1, 2)[alike]
        found: Array = weights[chains].sum(axis=1) + others[:, 0]
        found += np.maximum(workspaces[chains].max(axis=1), others[:, 1])
        return found

    return memory
