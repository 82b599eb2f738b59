"""The anytime setting looks at every chain of heads at once: each must report and cost what it does one by one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile.search.requirement import Requirement
from mess_compile.search.rows import rows_of_plans
from tests.search.brute_force import all_plans
from tests.search.cases import evidence

FIGURES = ("cost_ns", "p95_ns", "worst_ns", "macs", "energy_nj", "memory_bytes", "graphs", "miou", "score")


def quiet(done: int, total: int) -> None:
    pass


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(0, 10**6),
    st.integers(0, 2),
    st.one_of(st.none(), st.integers(1, 60)),
)
def test_every_chain_has_the_figures_it_has_alone(heads: list[int], seed: int, exits: int, us: int | None) -> None:
    case = evidence(tuple(heads), 2, 5, seed)
    requirement = Requirement(setting="anytime", max_exits=exits, deadline_ms=None if us is None else us / 1000)
    rows = rows_of_plans(case, requirement, quiet)
    found = {rows.chains[plan["chain"]]: tuple(plan[name].item() for name in FIGURES) for plan in rows.plans}
    plans = all_plans(case, "anytime", exits, None if us is None else us * 1000)
    assert found == {
        p.heads: (p.cost_ns, p.p95_ns, p.worst_ns, p.macs, p.energy_nj, p.memory, p.graphs, p.miou, p.score)
        for p in plans
    }
