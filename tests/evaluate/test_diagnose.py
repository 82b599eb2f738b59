"""Whoever is told to train better heads, or to mend the gate, spends weeks on it: the figures must be right."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile.evaluate.diagnose import (
    Diagnosis,
    ExitLimit,
    HeadDiagnosis,
    auroc,
    diagnose,
    final_head,
    image_mious,
    limiting_factors,
    weak_final_exit,
)
from mess_compile.evaluate.statistics import ExitStatistics, head_miou, read_statistics, write_statistics
from mess_compile.network import Gate, threshold_table
from mess_compile.runtime.base.errors import InputError
from tests.commands import done, printed_json, run
from tests.search.cases import candidate_network, exit_statistics, graph_set

ERRORS = (20.0, 5.0, 1.0, 0.0)
SMALL = 1e-9  # percentage points: what rounding may move


def statistics(images: int, seed: int = 0, heads_per_point: tuple[int, ...] = (1, 2)) -> ExitStatistics:
    return exit_statistics(graph_set(candidate_network(heads_per_point), rows=3), images, seed)


def one_class(
    intersection: list[list[int]],
    counts: list[list[list[int]]],
    names: tuple[str, ...] = ("exit1.a", "exit2.b"),
    pixels: int = 10,
) -> ExitStatistics:
    """Statistics of a single class: `intersection` (n, heads) of as many labelled as predicted pixels an image."""
    right = np.array(intersection, np.int64)[:, :, None]
    n, gate = len(right), Gate(thresholds=tuple(0.5 + 0.1 * row for row in range(len(counts[0][0]))))
    return dataclasses.replace(
        statistics(n),
        heads=names,
        classes=("thing",),
        cells=(100,) * len(names),
        gate=gate,
        thresholds=threshold_table(gate, 1),
        counts=np.array(counts, np.int32),
        intersection=right,
        predicted=np.full_like(right, pixels),
        labelled=np.full((n, 1), pixels, np.int64),
    )


TINY = one_class(  # the final exit has 8 of 10 right in every image: IoU 24 / 36
    [[8, 8], [7, 8], [2, 8]],
    [[[30, 10], [0, 0]], [[20, 20], [0, 0]], [[10, 30], [0, 0]]],  # row 0 is sure of the right images, row 1 not
)


def test_a_hand_computed_example() -> None:
    found = diagnose(TINY, max_errs_pp=(30.0, 5.0, 1.0))
    assert found.final == "exit2.b"
    assert [one.head for one in found.heads] == ["exit1.a"]
    head = found.heads[0]
    # image 0 costs nothing; with image 1 it is 23 / 37, 4.5 pp less; with image 2 17 / 43, 27.1 pp less
    assert head.oracle_share == head.gate_share == (1.0, 2 / 3, 1 / 3)
    assert head.oracle_miou == pytest.approx(100 * 24 / 36)
    assert head.coverage == pytest.approx(1 / 3)  # 8/12, 7/13 and 2/18 against 8/12
    assert (head.auroc, head.auroc_row, head.auroc_middle) == (1.0, 0, 0.0)


def test_a_gate_that_is_sure_of_the_wrong_images_is_told_from_bad_heads() -> None:
    misled = dataclasses.replace(TINY, counts=TINY.counts[:, :, 1:], gate=Gate(thresholds=(0.5,)))
    head = diagnose(misled, max_errs_pp=(30.0, 5.0, 1.0)).heads[0]
    assert head.gate_share == (1.0, 0.0, 0.0)  # image 2 is the first to leave: 18 / 42
    assert head.oracle_share == (1.0, 2 / 3, 1 / 3)
    assert head.auroc == 0.0


def test_the_oracle_counts_false_alarms_as_losses() -> None:
    found = one_class([[8, 8], [7, 8]], [[[20], [0]], [[10], [0]]])  # 16 / 24 at the final exit
    found.predicted[0, 0] = 14
    head = diagnose(found, max_errs_pp=(7.0,)).heads[0]
    assert head.oracle_share == (0.5,)  # image 1: 15 / 25 is 6.7 pp less; image 0: 16 / 28 is 9.5 pp less
    assert head.gate_share == (0.0,)


def test_a_head_as_good_as_the_final_exit_lets_everyone_leave() -> None:
    twin = statistics(7, heads_per_point=(1,))
    for array in (twin.intersection, twin.predicted):
        array[:, 0] = array[:, 1]
    head = diagnose(twin, max_errs_pp=(0.0,), tolerance_pp=0.0).heads[0]
    assert (head.coverage, head.gate_share, head.oracle_share) == (1.0, (1.0,), (1.0,))
    assert (head.auroc, head.auroc_row, head.auroc_middle) == (None, None, None)
    assert head.oracle_miou == head_miou(twin, twin.heads[1])  # to the last bit, or 0 pp would refuse it


pairs = st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=25)


@settings(max_examples=150, deadline=None)
@given(pairs)
def test_auroc_is_the_share_of_pairs_in_the_right_order(images: list[tuple[bool, int, int]]) -> None:
    good = np.array([image[0] for image in images])
    found = auroc(good, np.array([image[1:] for image in images], np.int32))
    if len({image[0] for image in images}) == 1:
        assert found is None
        return
    assert found is not None
    for column, area in enumerate(found.tolist(), start=1):
        above = [a[column] for a in images if a[0]]
        below = [b[column] for b in images if not b[0]]
        points = [(a > b) + (a == b) / 2 for a in above for b in below]
        assert area == pytest.approx(sum(points) / len(points))


def exact_miou(found: ExitStatistics, heads: list[int]) -> Fraction:
    """In percent, when image i leaves at `heads[i]`: pixel by pixel sums, no rounding."""
    ious = []
    for k in range(len(found.classes)):
        labelled = sum(int(value) for value in found.labelled[:, k])
        if labelled:
            right = sum(int(found.intersection[i, head, k]) for i, head in enumerate(heads))
            predicted = sum(int(found.predicted[i, head, k]) for i, head in enumerate(heads))
            ious.append(Fraction(right, predicted + labelled - right))
    return 100 * sum(ious, Fraction()) / len(ious)


def mixture(found: ExitStatistics, head: int, leaving: set[int]) -> Fraction:
    final = len(found.heads) - 1
    return exact_miou(found, [head if i in leaving else final for i in range(found.images)])


def every_choice(found: ExitStatistics, head: int) -> list[tuple[int, Fraction]]:
    """How many leave and the mIoU then, of every set of images: the true oracle's choices."""
    n = found.images
    sets = [set(chosen) for size in range(n + 1) for chosen in combinations(range(n), size)]
    return [(len(leaving), mixture(found, head, leaving)) for leaving in sets]


def every_cut(found: ExitStatistics, head: int) -> list[tuple[int, Fraction]]:
    choices = []
    for row in range(found.counts.shape[2]):
        for cut in range(int(found.counts.max()) + 2):
            leaving = {i for i in range(found.images) if found.counts[i, head, row] >= cut}
            choices.append((len(leaving), mixture(found, head, leaving)))
    return choices


def largest_share(choices: list[tuple[int, Fraction]], images: int, error: float) -> float:
    floor = choices[[size for size, _ in choices].index(0)][1] - Fraction(error)
    return max((size for size, miou in choices if miou >= floor), default=0) / images


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(0, 10**6))
def test_gate_and_oracle_are_bounded_by_every_cut_and_every_choice(images: int, seed: int) -> None:
    found = statistics(images, seed)
    diagnosis = diagnose(found, max_errs_pp=ERRORS)
    assert [one.head for one in diagnosis.heads] == list(found.heads[:-1])
    for index, head in enumerate(diagnosis.heads):
        choices, cuts = every_choice(found, index), every_cut(found, index)
        for error, gate, oracle in zip(ERRORS, head.gate_share, head.oracle_share, strict=True):
            assert largest_share(cuts, images, error - SMALL) <= gate <= largest_share(cuts, images, error + SMALL)
            assert gate <= oracle <= largest_share(choices, images, error + SMALL)
        best = max(miou for _, miou in choices)
        assert choices[0][1] - SMALL <= head.oracle_miou <= best + SMALL


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 10**6))
def test_shares_are_shares_and_grow_with_the_error_allowed(images: int, seed: int) -> None:
    found = statistics(images, seed)
    for head in diagnose(found, max_errs_pp=ERRORS).heads:
        shares = (*head.gate_share, *head.oracle_share, head.coverage)
        assert all(0 <= share <= 1 for share in shares)
        assert list(head.gate_share) == sorted(head.gate_share, reverse=True)
        assert list(head.oracle_share) == sorted(head.oracle_share, reverse=True)
        if head.auroc is not None and head.auroc_middle is not None:
            assert 0 <= head.auroc_middle <= head.auroc <= 1
        else:
            assert head.coverage in (0, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 900), min_size=1, max_size=12, unique=True), st.floats(0, 60))
def test_a_gate_that_knows_the_loss_reaches_the_oracle(losses: list[int], error: float) -> None:
    """Of one class, as many pixels predicted as labelled: mIoU falls with the sum of losses, greedy is optimal."""
    found = one_class([[900 - x, 900] for x in losses], [[[900 - x], [0]] for x in losses], pixels=1000)
    head = diagnose(found, max_errs_pp=(error,)).heads[0]

    def leaving(allowed: float) -> int:
        right, total = 900 * len(losses), 2000 * len(losses)
        lost = np.cumsum([0, *sorted(losses)])
        return int(np.sum(100 * (right / (total - right) - (right - lost) / (total - right + lost)) <= allowed)) - 1

    assert head.gate_share == head.oracle_share
    assert leaving(error - SMALL) <= round(head.oracle_share[0] * len(losses)) <= leaving(error + SMALL)


def test_an_images_miou_is_that_of_a_set_of_one() -> None:
    found = statistics(9, seed=4)
    for index, head in enumerate(found.heads):
        mious = image_mious(found, head)
        for i in np.flatnonzero(found.labelled.any(axis=1)).tolist():
            assert mious[i] == pytest.approx(float(mixture(found.select([i]), index, {0})))


def test_images_without_labels_say_nothing_of_a_head() -> None:
    blank = dataclasses.replace(TINY, labelled=np.array([[0], [10], [10]]), intersection=TINY.intersection.copy())
    blank.intersection[0] = 0
    head = diagnose(blank).heads[0]
    assert (head.coverage, head.auroc) == (0.0, None)
    with pytest.raises(InputError, match="no image has a labelled pixel"):
        diagnose(dataclasses.replace(TINY, labelled=np.zeros_like(TINY.labelled)))


def test_several_heads_at_the_final_exit_are_no_early_ones() -> None:
    heads = ("exit2.first", "exit10.weak", "exit10.strong")
    found = one_class([[8, 5, 9], [7, 6, 9]], [[[1], [1], [1]], [[2], [1], [1]]], heads)
    assert final_head(found) == "exit10.strong"
    diagnosis = diagnose(found)
    assert [one.head for one in diagnosis.heads] == ["exit2.first"]
    assert not limiting_factors(diagnose(dataclasses.replace(found, heads=("exit1.a", "exit1.b", "exit1.c"))))


def test_what_cannot_be_diagnosed_is_named() -> None:
    with pytest.raises(InputError, match=r"'head7' of the evaluation is not named exitN\.NAME"):
        diagnose(dataclasses.replace(TINY, heads=("head7", "exit2.b")))
    with pytest.raises(InputError, match="has no heads"):
        diagnose(dataclasses.replace(TINY, heads=()))
    for error in (-1.0, float("nan")):
        with pytest.raises(InputError, match="not negative"):
            diagnose(TINY, max_errs_pp=(error,))


@pytest.mark.parametrize(
    ("gate", "oracle", "limit"),
    [
        (0.61, 0.83, "gate"),  # 22 points against 17
        (0.61, 0.75, "heads"),  # 14 against 25
        (0.5, 0.75, "both"),
        (0.1 + 0.2, 0.65, "both"),  # 35 points each, whatever 0.1 + 0.2 is
        (0.97, 0.98, "neither"),
        (1.0, 1.0, "neither"),
        (0.0, 0.0, "heads"),
        (0.0, 1.0, "gate"),
    ],
)
def test_the_larger_of_the_two_gaps_is_the_limit(gate: float, oracle: float, limit: str) -> None:
    assert ExitLimit(1, "exit1.a", gate, oracle).limit == limit


def test_the_verdict_is_on_the_best_head_of_each_exit() -> None:
    def head(name: str, gate: float, oracle: float) -> HeadDiagnosis:
        return HeadDiagnosis(name, 0.5, None, None, None, (gate,), (oracle,), 60.0)

    heads = (head("exit1.a", 0.3, 0.4), head("exit1.b", 0.2, 0.6), head("exit3.a", 0.4, 1.0), head("exit3.b", 0.5, 1.0))
    (verdict,) = limiting_factors(Diagnosis("exit4.a", (1.0,), 1.0, heads))
    assert [found.head for found in verdict.exits] == ["exit1.b", "exit3.b"]
    assert verdict.gate_share == pytest.approx(0.35)  # means of 0.2 and 0.5, of 0.6 and 1
    assert verdict.oracle_share == pytest.approx(0.8)
    assert verdict.limit == "gate"


class TestInspect:
    """`mess-compile inspect statistics`, which is where a user reads it."""

    @pytest.fixture
    @staticmethod
    def place(tmp_path: Path) -> Path:
        (tmp_path / "statistics").mkdir()
        write_statistics(tmp_path / "statistics" / "val", TINY)
        return tmp_path

    def test_the_table_fits_and_ends_in_a_verdict(self, place: Path) -> None:
        shown = done("-C", place, "inspect", "statistics").splitlines()
        assert "not a test result" in shown[0]
        assert max(map(len, shown[: 2 + len(TINY.heads)])) <= 100  # test_cli.py has the sentences below it
        names = (
            "head",
            "mIoU %",
            "confident",
            "coverage",
            "AUROC",
            "rule 1%",
            "ideal 1%",
            "rule 0.1%",
            "ideal 0.1%",
        )
        assert shown[1].split() == " ".join(names).split()
        assert shown[2].split() == ["exit1.a", "39.53", "20%", "33.3%", "1.00", *["33.3%"] * 4]
        assert shown[3].split() == ["exit2.b", "66.67", "0%", *"------"]
        assert "the exit rule lets 33%: better heads would help more than a better exit rule" in " ".join(shown)

    def test_programs_find_old_and_new_keys(self, place: Path) -> None:
        content = printed_json("-C", place, "inspect", "statistics")
        assert {"split", "images", "device", "library", "precision", "threshold"} <= content.keys()
        early, final = content["heads"]
        assert (early["name"], early["auroc_threshold"], early["auroc_middle"]) == ("exit1.a", 0.5, 0.0)
        assert early["gate_share"].keys() == early["oracle_share"].keys() == {"1", "0.1"}
        assert early.keys() == final.keys()
        assert (final["name"], final["coverage"], final["oracle_share"]) == ("exit2.b", None, None)
        assert [found["limit"] for found in content["limits"]] == ["heads", "heads"]
        assert content["limits"][0]["exits"][0]["head"] == "exit1.a"

    def test_a_network_of_one_exit_has_no_verdict(self, place: Path) -> None:
        alone = dataclasses.replace(TINY, heads=("exit1.a", "exit1.b"))
        write_statistics(place / "statistics" / "val", alone)
        assert "would help" not in done("-C", place, "inspect", "statistics")
        assert printed_json("-C", place, "inspect", "statistics")["limits"] == []


class TestWeakFinalExit:
    """What is held against a final exit that learned nothing looks good whatever it is."""

    def test_is_told_with_the_head_that_does_better(self) -> None:
        # IoU of one class of 10 labelled and 10 predicted pixels an image: right / (20 - right), summed over two images
        found = one_class([[8, 9, 6], [8, 9, 6]], [[[1], [1], [1]]] * 2, ("exit1.a", "exit1.b", "exit2.c"))
        weak = weak_final_exit(found)
        assert weak is not None
        assert (weak.final, weak.better) == ("exit2.c", "exit1.b")
        assert weak.final_miou == pytest.approx(100 * 12 / 28)
        assert weak.better_miou == pytest.approx(100 * 18 / 22)
        assert "exit2.c, 42.86 % mIoU) does worse than the early head exit1.b (81.82 %)" in weak.sentence

    def test_the_end_of_a_network_that_was_brought_did_not_learn_from_these_labels(self) -> None:
        weak = weak_final_exit(one_class([[8, 6], [8, 6]], [[[1], [1]]] * 2, ("exit1.a", "exit2.own")))
        assert weak is not None
        assert "the network itself has not" in weak.sentence
        assert "train --epochs" not in weak.sentence

    def test_is_none_that_is_the_best_or_hardly_worse(self) -> None:
        assert weak_final_exit(one_class([[8, 9]], [[[1], [1]]])) is None
        assert weak_final_exit(one_class([[9, 9]], [[[1], [1]]])) is None
        assert weak_final_exit(one_class([[9001, 9000]], [[[1], [1]]], pixels=10000)) is None, "0.02 pp are noise"

    def test_is_pointed_out_where_a_network_is_judged(self, workspace: Path) -> None:
        folder = workspace / "statistics" / "val"
        found = read_statistics(folder)
        right = found.intersection.copy()
        right[:, found.head_index(final_head(found))] = 0
        write_statistics(folder, dataclasses.replace(found, intersection=right))
        best = max(found.heads[:-1], key=lambda head: head_miou(found, head))
        words = f"0.00 % mIoU) does worse than the early head {best} ({head_miou(found, best):.2f} %)"
        assert words in run("-C", workspace, "inspect", "statistics").stderr
        assert words in run("-C", workspace, "search", "--explain").stderr
        for content in (
            printed_json("-C", workspace, "inspect", "statistics"),
            printed_json("-C", workspace, "search", "--explain")["explanation"],
        ):
            assert (content["weak_final"]["better"], content["weak_final"]["final_miou"]) == (best, 0.0)
        assert any(words in note for note in printed_json("-C", workspace, "report")["notes"])
        assert words in (workspace / "report.html").read_text(encoding="utf-8")
