"""The slow tests that a commit runs beside the others: none may be left out for good."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests import conftest
from tests.slow_fifth import fifth_of

COMMIT = "ba6f2604c1f6c1d8cdd1b6a4e0a7a1c1b2d3e4f5"
TESTS = [f"tests/device/test_remote.py::test_{number}" for number in range(1000)]


def following(number: int) -> str:
    return f"{int(COMMIT, 16) + number:040x}"


def test_five_consecutive_numbers_take_every_slow_test_once() -> None:
    taken = [test for number in range(5) for test in fifth_of(following(number), TESTS)]
    assert sorted(taken) == sorted(TESTS)


def test_each_takes_a_fifth_of_all_and_of_the_parts_of_each_test() -> None:
    """Parts of one test are neighbours, wherever the first of them stands."""
    for number in range(5):
        taken = set(fifth_of(following(number), TESTS))
        assert len(taken) == 200
        for start in (0, 3, 777):
            assert len(taken.intersection(TESTS[start : start + 10])) == 2


def collected(commit: str | None) -> tuple[set[str], set[str]]:
    """Node ids that a run keeps, and that it reports as deselected, of `TESTS`, which are slow, and a quick one."""

    def item(test: str, slow: bool) -> SimpleNamespace:
        return SimpleNamespace(nodeid=test, get_closest_marker=lambda name: slow or None)

    left_out: list[SimpleNamespace] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config = SimpleNamespace(getoption=lambda name: commit, hook=hook)
    items = [item("quick", False), *(item(test, True) for test in TESTS)]
    conftest.pytest_collection_modifyitems(config, items)  # type: ignore[arg-type]
    return {item.nodeid for item in items}, {item.nodeid for item in left_out}


@pytest.mark.parametrize("number", range(5))
def test_a_run_has_the_quick_tests_and_its_fifth(number: int) -> None:
    kept, left_out = collected(following(number))
    assert kept == {"quick", *fifth_of(following(number), TESTS)}
    assert left_out == {"quick", *TESTS} - kept


def test_without_a_commit_nothing_is_left_out() -> None:
    assert collected(None) == ({"quick", *TESTS}, set())
