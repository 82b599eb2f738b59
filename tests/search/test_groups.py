"""Groups named by a user's pattern: the right ones, and no pattern that hangs or names nothing."""

from __future__ import annotations

import time

import pytest

from mess_compile.runtime.base.errors import InputError
from mess_compile.search import groups
from mess_compile.search.groups import checked_pattern, grouped, groups_of_ids, rule_of, unmatched
from mess_compile.search.hold_out import tuning_part
from mess_compile.search.plan import HoldOut
from tests.search.cases import evidence

FACADES = ("00_3e9d", "00_a61f", "22_77aa", "x_1")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("^[0-9]+", ("00", "00", "22", "x_1")),
        ("^([0-9])[0-9]_", ("0", "0", "2", "x_1")),
        ("(?:^|_)[0-9]", ("0", "0", "2", "_1")),
        ("[0-9]*", ("00", "00", "22", "x_1")),  # an empty match names nothing
    ],
)
def test_a_group_is_the_first_group_of_the_pattern_or_the_whole_match(pattern: str, names: tuple[str, ...]) -> None:
    assert groups_of_ids(FACADES, pattern) == names


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("[", "is not a regular expression"),
        ("", "--group-by is empty"),
        ("^drive", "matches no image id (the first of 4 is '00_3e9d')"),
        ("a" * 201, "has 201 characters"),
        ("(a{99999999999})", "is not a regular expression"),
    ],
)
def test_a_pattern_that_names_no_group_is_refused_in_a_line(pattern: str, says: str) -> None:
    with pytest.raises(InputError) as refused:
        groups_of_ids(FACADES, checked_pattern(pattern))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_pattern_that_would_hang_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"takes more than 0\.5 s .* give a simpler pattern"):
        groups_of_ids(["a" * 40 + "!"], "^(a+)+$")
    assert time.monotonic() - start < 20


def test_the_same_pattern_finds_the_images_that_a_plan_was_chosen_on() -> None:
    """image0 to image11 by their first digit: the last third of each group is held out."""
    statistics = evidence((1,), 2, 12, seed=1).statistics
    by_digit = grouped(statistics, "[0-9]")
    assert by_digit.group[:3] == ("0", "1", "2")
    assert by_digit.group[10:] == ("1", "1")
    figures = None
    hold_out = HoldOut("1/3", "", "0" * 64, figures, figures)  # type: ignore[arg-type]
    chosen = tuning_part(statistics, hold_out, "image[0-9]")
    assert chosen.image_id != tuning_part(statistics, hold_out).image_id
    assert unmatched(statistics, "1") == 9
    assert unmatched(statistics, ".*") == 0, "a group for each image, by the pattern"
    assert rule_of(by_digit.group, "[0-9]") == "10 groups by --group-by '[0-9]'"
    assert rule_of(statistics.image_id, None) == "12 groups, one an image"
    assert rule_of(statistics.group, None) == "2 sequences by image name"
