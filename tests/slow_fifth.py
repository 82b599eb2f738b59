"""Which of the slow tests a commit runs: a fifth of them, another one for the next number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

FIFTHS = 5
Test = TypeVar("Test")


def fifth_of(commit: str, tests: Sequence[Test]) -> list[Test]:
    """Every fifth of `tests`: neighbours, which are mostly the parts and parameters of one test, take as long.

    `commit`, a hexadecimal number, determines with which to begin.
    """
    return list(tests[int(commit, 16) % FIFTHS :: FIFTHS])
