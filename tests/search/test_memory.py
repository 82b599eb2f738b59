"""A plan that does not fit the device must not be chosen, however many chains are looked at together."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mess_compile.search.memory import memory_of_chains
from tests.search.brute_force import memory
from tests.search.cases import evidence


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
