"""A plan that does not fit the device must not be chosen, however many chains are looked at together."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mess_compile.search.memory import memory_of_chains
from mess_compile.search.metrics import memory_bytes
from tests import skips
from tests.search.brute_force import memory
from tests.search.cases import candidate_network, evidence, graph_set


@pytest.mark.parametrize("seed", range(3))
def test_of_many_chains_of_heads_each_takes_what_it_takes_alone(seed: int) -> None:
    case = evidence((2, 3, 2), 2, images=3, seed=seed)
    chains = [
        (*(None,) * (3 - size), *heads)
        for size in (1, 2, 3)
        for heads in itertools.combinations(case.heads, size)
        if all(a.exit_point < b.exit_point for a, b in itertools.pairwise(heads))
    ]
    index = {head: i for i, head in enumerate(case.heads)} | {None: len(case.heads)}
    found = memory_of_chains(case)(np.array([[index[head] for head in chain] for chain in chains]))
    assert found.tolist() == [memory(case, tuple(filter(None, chain))) for chain in chains]


def test_heads_of_one_shape_with_other_output_graphs_take_what_each_takes_alone() -> None:
    """The network's own end beside another final head: only the way from logits to labels differs."""
    known = candidate_network((1,))
    own, other = replace(known.heads[1], labels="own"), replace(known.heads[1], config="other")
    candidate = replace(known, heads=(known.heads[0], own, other))
    made = graph_set(candidate, 2)
    output = made.graphs[candidate.output_of(other)]
    both = replace(made, graphs={**made.graphs, "output-own": replace(output, name="output-own", bytes=777)})
    case = SimpleNamespace(graph_set=both, candidate=candidate, heads=candidate.heads)
    found = memory_of_chains(case)(np.array([[1, 3], [2, 3]]))  # type: ignore[arg-type]
    assert found.tolist() == [memory_bytes(both, [head.name]) for head in (own, other)]
    assert found[0] - found[1] + both.graphs[f"head-{other.name}"].bytes - both.graphs[f"head-{own.name}"].bytes == (
        777 - output.bytes
    )


def test_a_carried_tensor_is_counted_once_and_no_release_is_credited(tmp_path: Path) -> None:
    """Maps and what is carried, in float32, with the image, thresholds, counts, logits and labels of a plan."""
    graphs = skips.imported(tmp_path)
    heads = ("exit2.small", "exit3.own")
    names = ("segment-0-2", "segment-2-3", *(f"head-{head}" for head in heads), "output-4x6", "output-own")
    specs = [graphs.graphs[name] for name in names]
    image, exit1, exit2, exit3, skip1 = 16 * 24 * 3, 8 * 96 * 4, 12 * 24 * 4, 12 * 24 * 4, 12 * 96 * 4
    ends = 4 * 4 * 4 + (4 + 2) * 4 * 4 + (24 + 96) * 4 * 4 + 16 * 24
    held = sum(spec.bytes for spec in specs) + max(spec.workspace_bytes for spec in specs)
    assert memory_bytes(graphs, heads) == held + image + exit1 + exit2 + exit3 + skip1 + ends
