"""Turns a gate's counts into the integers that a plan compares with its cuts: one for each row of a policy.

The policy `plain` has a row for each threshold: the confident cells of all classes. The rows of other policies follow
these; they are arithmetic on counts by class, so that search, plan and device need not know them apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional, Sequence, Tuple

import numpy as np

from mess_compile.runtime.base import decode

EDGES, CELLS = -2, -1
"""The last rows of a gate's counts by class: cells beside another label, and all cells whose logits are finite."""
MORE_ROWS = 2
"""So many rows a gate by class counts beyond one for each threshold."""
PLAIN, CLASS, LEARNED, AGREEMENT = "plain", "class", "learned", "agreement"
POLICIES = (PLAIN, CLASS, LEARNED, AGREEMENT)
HIGHEST = 1000
"""The greatest integer of a learned row: it is sure."""
MOST_WEIGHT, MOST_SCORE = 1 << 24, 1 << 60
MOST_ROWS = 26
"""The most rows of a head, of all policies."""


@dataclass(frozen=True)
class PolicyRow:
    """Row number `row` of `head`, beyond those of the thresholds: its integer of a gate's counts, its `name` in tables.

    `class`: `class_rows` has the threshold row of each class, and the confident cells of each class at its own row are
    added up (Goermez and Koyuncu). `agreement`: the cells that are beside no other label. `learned`: the features of
    `counts_of_features` times `feature_weights`, a score, of which `levels` has the integer: the first of them below
    the first of the ascending `steps`, the next from there on.
    """

    head: str
    row: int
    policy: str = field(metadata=decode.entry(check=decode.one_of(POLICIES[1:])))
    name: str
    class_rows: Tuple[int, ...] = field(default=(), metadata=decode.OPTIONAL)
    feature_weights: Tuple[int, ...] = field(default=(), metadata=decode.OPTIONAL)
    steps: Tuple[int, ...] = field(default=(), metadata=decode.OPTIONAL)
    levels: Tuple[int, ...] = field(default=(), metadata=decode.OPTIONAL)

    def top(self, cells: int) -> int:
        """The greatest integer, for a map of so many cells."""
        return HIGHEST if self.policy == LEARNED else cells

    def weights(self, thresholds: int, classes: int) -> np.ndarray:
        """What the integer, or the score of `learned`, takes each count by class (T + 2, K) times."""
        weights = np.zeros((thresholds + MORE_ROWS, classes), np.int64)
        if self.policy == CLASS:
            weights[self.class_rows, range(classes)] = 1
        elif self.policy == LEARNED:
            features = counts_of_features(thresholds, classes)
            weights += np.tensordot(np.array(self.feature_weights, np.int64), features, 1)
        else:
            weights[CELLS], weights[EDGES] = 1, -1
        return weights


def plain_values(counts: np.ndarray) -> np.ndarray:
    """The confident cells (..., T) of each threshold row: sums over classes of counts (..., T + 2, K)."""
    values: np.ndarray = counts[..., :EDGES, :].sum(axis=-1, dtype=np.int32)
    return values


class RowValues:
    """Computes the integers of a head's rows: of the thresholds, and of the policy `rows` at their numbers, 0 between
    them. They are sums of the counts by class, each times a weight."""

    def __init__(self, rows: Sequence[PolicyRow], thresholds: int, classes: int) -> None:
        size = max([row.row + 1 for row in rows], default=thresholds)
        weights = np.zeros((size, thresholds + MORE_ROWS, classes), np.int64)
        for index in range(thresholds):
            weights[index, index] = 1
        for row in rows:
            weights[row.row] = row.weights(thresholds, classes)
        self._weights = np.ascontiguousarray(weights.reshape(size, -1).T)
        self._learned = tuple(
            (row.row, np.array(row.steps, np.int64), np.array(row.levels, np.int64))
            for row in rows
            if row.policy == LEARNED
        )

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """The integers (..., R) of counts by class (..., T + 2, K)."""
        flat = counts.reshape(*counts.shape[:-2], -1).astype(np.int64)
        values: np.ndarray = flat @ self._weights
        for row, steps, levels in self._learned:
            values[..., row] = levels[np.searchsorted(steps, values[..., row], side="right")]
        return values


def counts_of_features(thresholds: int, classes: int) -> np.ndarray:
    """Which counts by class the features of `learned` add up, (features, T + 2, K) of zeros and ones: the confident
    cells of each threshold row, the edge cells, the cells of each class, and those confident at the middle row."""
    whole = np.zeros((thresholds + 1, thresholds + MORE_ROWS, classes), np.int64)
    whole[range(thresholds + 1), range(thresholds + 1)] = 1
    by_class = np.zeros((2, classes, thresholds + MORE_ROWS, classes), np.int64)
    by_class[0, range(classes), CELLS, range(classes)] = 1
    by_class[1, range(classes), thresholds // 2, range(classes)] = 1
    return np.concatenate([whole, by_class.reshape(2 * classes, *whole.shape[1:])])


def named_row(rows: Sequence[PolicyRow], head: str, row: int) -> Optional[PolicyRow]:
    """The row of a head by its number; None for one of the thresholds."""
    return next((each for each in rows if (each.head, each.row) == (head, row)), None) if rows else None


def is_learned(rows: Sequence[PolicyRow], head: str, row: int) -> bool:
    """Whether the integer of a row is a learned score, and no number of cells."""
    found = named_row(rows, head, row)
    return found is not None and found.policy == LEARNED


def name_of_row(rows: Sequence[PolicyRow], head: str, row: int, thresholds: Sequence[float]) -> str:
    """A row of a head in tables: its threshold, or what its policy calls it."""
    found = named_row(rows, head, row)
    return f"{thresholds[row]:.2f}" if found is None else found.name


def top_of_row(rows: Sequence[PolicyRow], head: str, row: int, cells: int) -> int:
    """The greatest integer of a row: the number of cells, but for policies whose integers are no cells."""
    found = named_row(rows, head, row)
    return cells if found is None else found.top(cells)


def check_rows(rows: Sequence[PolicyRow], thresholds: int, classes: Optional[int], where: str) -> None:
    """Raises DecodeError for rows that counts of so many thresholds and classes (None: any) cannot give."""
    numbers = [(row.head, row.row) for row in rows]
    decode.need(len(set(numbers)) == len(numbers), f"{where}.policy_rows", numbers, "one of each head and number")
    for row in rows:
        decode.need(thresholds <= row.row < MOST_ROWS, f"{where}.policy_rows: row", row.row, "after the thresholds")
        wanted = 0 if row.policy != CLASS else len(row.class_rows) if classes is None else classes
        fits = len(row.class_rows) == wanted and all(0 <= each < thresholds for each in row.class_rows)
        decode.need(fits, f"{where}.policy_rows: class_rows", row.class_rows, f"{wanted} numbers below {thresholds}")
        _check_learned(row, thresholds, classes, f"{where}.policy_rows")


def _check_learned(row: PolicyRow, thresholds: int, classes: Optional[int], where: str) -> None:
    weights, steps, levels = row.feature_weights, row.steps, row.levels
    wanted = len(weights) if classes is None else thresholds + 1 + 2 * classes
    if row.policy != LEARNED:
        wanted = 0
    fits = len(weights) == wanted and all(abs(weight) <= MOST_WEIGHT for weight in weights)
    decode.need(fits, f"{where}: feature_weights", weights, f"{wanted} integers up to {MOST_WEIGHT}")
    rising = list(steps) == sorted(set(steps)) and all(abs(step) <= MOST_SCORE for step in steps)
    decode.need(rising, f"{where}: steps", steps, "ascending integers")
    known = len(levels) == (len(steps) + 1 if row.policy == LEARNED else 0)
    within = list(levels) == sorted(levels) and all(0 <= level <= HIGHEST for level in levels)
    decode.need(
        known and within, f"{where}: levels", levels, f"rising integers from 0 to {HIGHEST}, one more than steps"
    )
