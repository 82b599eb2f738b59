"""What a plan is said to do must also be seen on images that it was not chosen on, the same ones the next time."""

from __future__ import annotations

import dataclasses
import hashlib
from fractions import Fraction
from pathlib import Path

import pytest

from mess_compile.profile.selection import Subject, contenders
from mess_compile.runtime.base.errors import InputError
from mess_compile.search.hold_out import (
    LEAST_IMAGES,
    THIRD,
    held_out_sentence,
    held_rows,
    parse_hold_out,
    split_images,
    tuning_part,
    tuning_rows,
)
from mess_compile.search.metrics import Evidence
from mess_compile.search.plan import SearchResult, read_result, write_result
from mess_compile.search.requirement import Requirement
from mess_compile.search.solver import search
from tests.search.brute_force import miou_of
from tests.search.cases import evidence


@pytest.mark.parametrize(
    ("groups", "share", "held", "rule"),
    [
        ("aaabbbbbb", THIRD, [2, 7, 8], "the last third of each sequence"),
        ("abababab", Fraction(1, 4), [6, 7], "the last 25 % of each sequence"),  # of two cameras in turn
        ("aaaaaaa", THIRD, [5, 6], "the last third of each sequence"),
        ("abcdefg", THIRD, [2, 5], "every third image"),
        ("aabbccdd", THIRD, [4, 5], "every third sequence"),  # too short to be split
        ("abcdefghij", Fraction(1, 5), [4, 9], "20 % of the images, at even distances"),
    ],
)
def test_the_end_of_each_sequence_is_held_out_or_whole_ones(
    groups: str, share: Fraction, held: list[int], rule: str
) -> None:
    rows, words = held_rows(groups, share)
    assert (rows.tolist(), words) == (held, rule)


@pytest.mark.parametrize(("text", "share"), [("none", 0), ("33%", Fraction(33, 100)), (" 12.5 % ", Fraction(1, 8))])
def test_shares_are_read(text: str, share: Fraction) -> None:
    assert parse_hold_out(text) == share


@pytest.mark.parametrize("text", ["", "0.3", "a third", "0%", "91%", "-5%", "nan%", "1e1%", "33.3333333%"])
def test_other_shares_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match=r"write 33% \(from 1% to 90%\), or none"):
        parse_hold_out(text)


def case(images: int) -> Evidence:
    made = evidence((1, 2), 2, images, seed=3)
    statistics = dataclasses.replace(made.statistics, labelled=made.statistics.labelled + 1)
    return dataclasses.replace(made, statistics=statistics)


def found(whole: Evidence, share: Fraction | None = None) -> SearchResult:
    parts = split_images([whole], share)
    return parts.evaluated(search(parts.chosen[0], Requirement(max_err_pp=5)))


def leaves_at(statistics_of: Evidence, result: SearchResult, image: int) -> str:
    """The head at which an image leaves, by the plan's own numbers."""
    statistics, stages = statistics_of.statistics, result.plan.stages
    for stage in stages[:-1]:
        count = int(statistics.counts[image, statistics.heads.index(stage.head), stage.row])
        if stage.cut is not None and count >= stage.cut:
            return stage.head
    return stages[-1].head


def test_both_figures_are_those_of_their_own_images() -> None:
    whole = case(66)  # two sequences in turn: image 0, 2, ... and image 1, 3, ...
    result = found(whole)
    held, chosen = list(range(44, 66)), list(range(44))
    hold_out = result.plan.hold_out
    assert hold_out is not None
    for images, figures in ((chosen, result.plan.predicted), (held, hold_out.predicted)):
        some = dataclasses.replace(whole, statistics=whole.statistics.select(images))
        heads = [leaves_at(some, result, image) for image in range(len(images))]
        assert figures.images == len(images)
        assert figures.miou == pytest.approx(miou_of(some, heads), abs=1e-9)
        rates = [heads.count(stage.head) / len(heads) for stage in result.plan.stages]
        assert figures.exit_rates == pytest.approx(rates)
    ids = "\n".join(f"image{number}" for number in held)
    assert hold_out.image_ids_sha256 == hashlib.sha256(ids.encode()).hexdigest()
    assert tuning_part(whole.statistics, hold_out).image_id == tuple(f"image{number}" for number in chosen)


def test_the_plan_is_the_one_that_the_other_images_give_and_names_the_statistics_that_are_there() -> None:
    whole = case(66)
    rest = dataclasses.replace(whole, statistics=whole.statistics.select(list(range(44))))
    alone, result = search(rest, Requirement(max_err_pp=5)), found(whole)
    assert result.plan.stages == alone.plan.stages
    assert [plan.stages for plan in result.front] == [plan.stages for plan in alone.front]
    assert {plan.statistics_sha256 for plan in (result.plan, *result.front)} == {whole.statistics_sha256}


def test_of_few_images_nothing_is_held_out_unless_asked() -> None:
    assert LEAST_IMAGES == 60, "of 60, two thirds are the 40 below which figures are a guess"
    few = found(case(59))
    assert few.plan.hold_out is None
    assert few.plan.predicted.images == 59
    assert "nothing was held out (59 images are fewer than 60)" in held_out_sentence(few, 1.0)
    assert found(case(60)).plan.predicted.images == 40
    asked = found(case(12), Fraction(1, 3)).plan.hold_out
    assert asked is not None
    assert asked.predicted.images == 4
    assert "nothing was held out (--hold-out none)" in held_out_sentence(found(case(66), Fraction(0)), None)


def test_a_share_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="--hold-out 1% of 8 images: no image with labels would be held out"):
        split_images([case(8)], Fraction(1, 100))
    whole = case(66)
    labelled = whole.statistics.labelled.copy()
    labelled[44:] = 0
    pixels = {name: getattr(whole.statistics, name).copy() for name in ("intersection", "predicted")}
    pixels["intersection"][44:] = 0
    unlabelled = dataclasses.replace(whole.statistics, labelled=labelled, **pixels)
    parts = split_images([dataclasses.replace(whole, statistics=unlabelled)], None)
    assert (parts.held, parts.without) == ((), "no image with labels would be held out")


def test_more_lost_than_asked_for_on_the_images_held_out_is_said() -> None:
    result = found(case(66))
    hold_out = result.plan.hold_out
    assert hold_out is not None
    worse = dataclasses.replace(
        hold_out, predicted=dataclasses.replace(hold_out.predicted, miou=hold_out.baseline.miou - 2.5)
    )
    lost = dataclasses.replace(result, plan=dataclasses.replace(result.plan, hold_out=worse))
    assert "-2.50 pp on the 22 held out, where more than 1 pp is lost" in held_out_sentence(lost, 1.0)
    assert held_out_sentence(lost, 3.0).endswith("-2.50 pp on the 22 held out")
    assert held_out_sentence(lost, 0.0).endswith("where more than 0 pp is lost: evaluate more images")


def test_what_is_lost_counts_from_the_miou_that_was_given() -> None:
    result = found(case(66))
    hold_out = result.plan.hold_out
    assert hold_out is not None
    worse = dataclasses.replace(
        hold_out, predicted=dataclasses.replace(hold_out.predicted, miou=hold_out.baseline.miou - 2.5)
    )
    plan = dataclasses.replace(result.plan, hold_out=worse, reference_miou=result.plan.baseline.miou - 2.0)
    below = dataclasses.replace(result, plan=plan)
    assert held_out_sentence(below, 1.0).endswith("-2.50 pp on the 22 held out")
    assert "where more than 0.4 pp is lost" in held_out_sentence(below, 0.4)


def test_no_loss_has_no_sign_of_one() -> None:
    result = found(case(66))
    hold_out = result.plan.hold_out
    assert hold_out is not None
    same = dataclasses.replace(hold_out, predicted=hold_out.baseline)
    plan = dataclasses.replace(result.plan, hold_out=same, predicted=result.plan.baseline)
    assert "-0.00" not in held_out_sentence(dataclasses.replace(result, plan=plan), 1.0)


def test_a_sparse_profile_asks_what_the_search_will_choose_by() -> None:
    about = next(each for each in map(with_another_plan, range(40)) if each is not None)
    case_, requirement, wanted = about
    subject = Subject((case_.graph_set,), {}, {"fp32": case_.statistics}, (requirement,))
    everything_estimated = {
        key: dataclasses.replace(entry, source="estimated", error=2.0) for key, entry in case_.table.entries.items()
    }
    asked = contenders(subject, dataclasses.replace(case_.table, entries=everything_estimated))
    assert {graph for graph, _ in asked} >= wanted


def with_another_plan(seed: int) -> tuple[Evidence, Requirement, set[str]] | None:
    """A case of which the tuning part has a plan of other graphs than all images, and these graphs."""
    whole, requirement = evidence((2, 1), 2, 66, seed), Requirement(max_err_pp=1.0)
    plans = [search(each, requirement, front_by=()).plan for each in (whole, split_images([whole], None).chosen[0])]
    every, part = ({graph.name for graph in plan.graphs} for plan in plans)
    return None if part <= every else (whole, requirement, part)


@pytest.mark.parametrize("share", ["", "0/3", "3/3", "1/0", "0.5", "1e999999999", "-1/3", "9999999999/99999999999"])
def test_a_forged_record_is_refused_at_once(share: str) -> None:
    with pytest.raises(InputError, match="is not a share of images held out, such as 1/3"):
        tuning_rows(["a", "b", "c"], share)
    assert tuning_rows(["a", "b", "c"], "1/3").tolist() == [0, 1]


def test_the_record_survives_the_file_and_older_plans_have_none(tmp_path: Path) -> None:
    result = found(case(66))
    write_result(tmp_path / "plan.json", result)
    assert read_result(tmp_path / "plan.json") == result
    few = found(case(20))
    write_result(tmp_path / "plan.json", few)
    assert read_result(tmp_path / "plan.json").without_hold_out == "20 images are fewer than 60"
