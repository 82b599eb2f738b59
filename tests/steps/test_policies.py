"""What a search learns of the images that it holds out needs the rows of its plans, whichever policy they are of."""

from __future__ import annotations

import sys
from fractions import Fraction

import numpy as np
import pytest

from mess_compile.reporter import SILENT
from mess_compile.runtime.base.policy import LEARNED
from mess_compile.search.hold_out import split_images
from mess_compile.search.metrics import Evidence
from mess_compile.search.requirement import Requirement
from mess_compile.steps import SearchOptions
from tests.search.cases import by_class, candidate_network, exit_statistics, graph_set, latency_table

POLICIES = ("plain", "class", "learned", "agreement")


@pytest.mark.parametrize("share", [Fraction(0), Fraction(1, 3)])
def test_all_images_have_the_rows_and_those_chosen_by_keep_what_is_out_of_fold(share: Fraction) -> None:
    graphs = graph_set(candidate_network((2, 1)), rows=4)
    recorded = by_class(exit_statistics(graphs, 90, 3, distinct=40), 3)
    part = split_images([Evidence(graphs, latency_table(graphs, 3), recorded)], share)
    step = sys.modules["mess_compile.steps.search"]
    made = step._with_policies(part, Requirement(max_err_pp=1.0), SearchOptions(policies=POLICIES), SILENT)
    (chosen,), (whole,) = made.chosen, made.whole
    rows = chosen.statistics.policy_rows
    assert {row.policy for row in rows} == {*POLICIES} - {"plain"}
    assert any(row.policy == LEARNED for row in rows)
    assert all(each.statistics.policy_rows == rows for each in (whole, *made.held))
    place = [whole.statistics.image_id.index(name) for name in chosen.statistics.image_id]
    np.testing.assert_array_equal(whole.statistics.counts[place], chosen.statistics.counts)
    for held in made.held:
        others = [whole.statistics.image_id.index(name) for name in held.statistics.image_id]
        np.testing.assert_array_equal(whole.statistics.counts[others], held.statistics.counts)
