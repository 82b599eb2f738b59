"""Policies are arithmetic on counts by class: a wrong sum lets other images leave than the search saw."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile.evaluate.policies import class_rows, parse_policies, possible_policies, with_policies, with_rows
from mess_compile.evaluate.statistics import ExitStatistics, stacked_counts
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.base.policy import PolicyRow
from tests.search.cases import by_class, candidate_network, exit_statistics, graph_set

GRAPHS = graph_set(candidate_network((2, 1)), rows=4)


def recorded(images: int = 9, seed: int = 3) -> ExitStatistics:
    return by_class(exit_statistics(GRAPHS, images, seed, distinct=9), seed)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6))
def test_each_class_gets_the_row_whose_share_is_nearest(images: int, seed: int) -> None:
    """By floating-point shares of lists, one class after the other."""
    found = recorded(images, seed)
    for index, head in enumerate(found.heads):
        counts = found.class_counts[:, index].astype(int).tolist()  # images, rows, classes
        total = [[sum(image[row][k] for image in counts) for k in range(3)] for row in range(6)]
        wanted = []
        for row in range(4):
            whole = sum(total[row]) / sum(total[5])
            chosen = []
            for k in range(3):
                shares = [total[r][k] / total[5][k] if total[5][k] else float(r != row) for r in range(4)]
                nearest = [abs(share - whole) if total[5][k] else share for share in shares]
                chosen.append(min(range(4), key=lambda r: round(nearest[r], 12)))
            wanted.append(tuple(chosen))
        distinct = {rows: row for row, rows in reversed(list(enumerate(wanted))) if len(set(rows)) > 1}
        assert {rows: row for row, rows in class_rows(found, head)} == distinct


def test_a_row_of_classes_adds_up_each_class_at_its_own_threshold() -> None:
    found = recorded()
    head = found.heads[1]
    made = with_rows(found, [PolicyRow(head, 4, "class", "x", (2, 0, 3)), PolicyRow(head, 5, "agreement", "y")])
    for image, counts in enumerate(found.class_counts[:, 1].tolist()):
        assert made.counts[image, 1, 4] == counts[2][0] + counts[0][1] + counts[3][2]
        assert made.counts[image, 1, 5] == sum(counts[5]) - sum(counts[4])
    np.testing.assert_array_equal(made.counts[:, :, :4], found.counts)
    assert not made.counts[:, [0, 2, 3], 4:].any()
    assert made.class_counts is None


def test_every_policy_follows_the_thresholds_and_plain_stays_what_it_was() -> None:
    found = recorded()
    made = with_policies(found, ("plain", "class", "agreement"))
    np.testing.assert_array_equal(made.counts[:, :, :4], found.counts)
    for head in found.heads:
        own = [row for row in made.policy_rows if row.head == head]
        assert [row.row for row in own] == list(range(4, 4 + len(own)))
        assert [row.policy for row in own] == ["class"] * (len(own) - 1) + ["agreement"]
    alone = with_policies(found, ("agreement",))
    assert not alone.counts[:, :, :4].any(), "no threshold decides"
    assert (alone.counts[:, :, 4] > 0).any()


def test_a_head_has_at_most_26_rows() -> None:
    graphs = graph_set(candidate_network((1,)), rows=16)
    found = by_class(exit_statistics(graphs, 12, distinct=9))
    assert max(len(class_rows(found, head)) for head in found.heads) > 9
    made = with_policies(found, ("plain", "class", "agreement"))
    assert made.counts.shape[2] == 26
    last = {row.head: row for row in made.policy_rows}
    assert {row.policy for row in last.values()} == {"agreement"}


def test_images_alike_in_their_classes_have_nothing_to_gain_and_stay_with_the_thresholds() -> None:
    found = recorded()
    one = found.class_counts.copy()
    one[..., 1:] = 0
    found = dataclasses.replace(found, class_counts=one, counts=one[:, :, :4, 0].astype(np.int32))
    made = with_policies(found, ("class",))
    assert made.policy_rows == ()
    np.testing.assert_array_equal(made.counts, found.counts)


def test_an_evaluation_by_an_earlier_gate_is_plain_alone() -> None:
    found = exit_statistics(GRAPHS, 5)
    assert possible_policies(found) == ("plain",)
    np.testing.assert_array_equal(with_policies(found, ("plain",)).counts, found.counts)
    with pytest.raises(InputError, match=r"policy class needs counts by class.*run `mess-compile export` and"):
        with_policies(found, ("plain", "class"))
    with pytest.raises(InputError, match="policy agreement needs counts by class"):
        with_rows(found, [PolicyRow(found.heads[0], 4, "agreement", "agreement")])


def test_counts_are_stored_in_two_bytes_where_they_fit() -> None:
    small = np.full((2, 6, 3), 65535, np.int32)
    assert stacked_counts([small])["class_counts"].dtype == np.uint16
    large = stacked_counts([small, small + 1])
    assert large["class_counts"].dtype == np.int32
    assert large["counts"].tolist() == [[[3 * 65535] * 4] * 2, [[3 * 65536] * 4] * 2]


@pytest.mark.parametrize(("text", "policies"), [("class,plain", ("plain", "class")), (" agreement ", ("agreement",))])
def test_policies_are_read_in_any_order(text: str, policies: tuple[str, ...]) -> None:
    assert parse_policies(text) == policies


@pytest.mark.parametrize("text", ["", "plan", "plain,,class", "class;plain"])
def test_an_unknown_policy_is_named_with_those_there_are(text: str) -> None:
    with pytest.raises(InputError, match="is not one of plain, class, learned, agreement"):
        parse_policies(text)
