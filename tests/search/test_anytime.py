"""The anytime setting looks at every chain of heads at once: each must report and cost what it does one by one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile.runtime.base.errors import InputError
from mess_compile.search import anytime
from mess_compile.search.context import SearchContext
from mess_compile.search.exhaustive.plan_table import enumerate_plans
from mess_compile.search.requirement import Requirement
from mess_compile.search.solver import search
from tests.search.brute_force import all_plans
from tests.search.cases import evidence

FIGURES = ("cost_ns", "p95_ns", "worst_ns", "macs", "energy_nj", "memory_bytes", "graphs", "miou", "score")


def test_more_chains_than_memory_holds_are_refused_with_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    case = evidence((2, 2, 2), 2, 5, seed=1)
    chains = sum(1 for _ in all_plans(case, "anytime", 3)) - 1  # the whole network is no chain
    monkeypatch.setattr(anytime, "_MOST_CHAINS", chains - 1)
    with pytest.raises(
        InputError, match=rf"anytime .* {chains} chains of heads, more than fit into memory: use --max-exits 2$"
    ):
        search(case, Requirement(setting="anytime", max_exits=3))
    assert search(case, Requirement(setting="anytime", max_exits=2)).certificate.gap == 0


def quiet(done: int, total: int) -> None:
    pass


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(0, 10**6),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(1, 60)),
)
def test_every_chain_has_the_figures_it_has_alone(heads: list[int], seed: int, exits: int, us: int | None) -> None:
    case = evidence(tuple(heads), 2, 5, seed)
    requirement = Requirement(setting="anytime", max_exits=exits, deadline_ms=None if us is None else us / 1000)
    rows = enumerate_plans(case, SearchContext(requirement))
    found = {rows.chains[plan["chain"]]: tuple(plan[name].item() for name in FIGURES) for plan in rows.plans}
    plans = all_plans(case, "anytime", exits, None if us is None else us * 1000)
    assert found == {
        p.heads: (p.cost_ns, p.p95_ns, p.worst_ns, p.macs, p.energy_nj, p.memory, p.graphs, p.miou, p.score)
        for p in plans
    }
