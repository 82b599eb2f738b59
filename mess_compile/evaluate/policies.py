"""Fits the rows of policies to an evaluation, and adds what they give to its counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

from mess_compile.array_types import Ints
from mess_compile.evaluate.diagnose import exit_number, final_head
from mess_compile.evaluate.learned import WITHIN_PP, Learned, easy_images, features_of, learned
from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.runtime.base.errors import InputError, did_you_mean
from mess_compile.runtime.base.policy import (
    AGREEMENT,
    CELLS,
    CLASS,
    EDGES,
    LEARNED,
    MOST_ROWS,
    PLAIN,
    POLICIES,
    PolicyRow,
    RowValues,
)

FITTED_POLICIES = (CLASS, LEARNED)
"""The policies whose rows depend on the images that they are fitted to."""
_BLOCK = 256


def parse_policies(text: str) -> tuple[str, ...]:
    """Policies from `plain,class`, each once, in a fixed order. Raises InputError."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in POLICIES:
            near = did_you_mean(name, POLICIES)
            raise InputError(f"--policy {name!r:.40} is not one of {', '.join(POLICIES)}{near}")
    return tuple(policy for policy in POLICIES if policy in names)


def possible_policies(statistics: ExitStatistics) -> tuple[str, ...]:
    """The policies that an evaluation has counts for."""
    return (PLAIN,) if statistics.class_counts is None else POLICIES


def with_policies(statistics: ExitStatistics, policies: Sequence[str]) -> ExitStatistics:
    """The evaluation with a row for each integer of these policies, as a search takes it; without counts by class.

    Learned rows have the levels of gates that were fitted to other images: out of fold. Where `plain` is not among
    them, the threshold rows are 0 throughout, so that nothing is decided by them. Raises InputError for a policy whose
    counts were not recorded.
    """
    needed = [policy for policy in policies if policy != PLAIN]
    if not needed:
        return replace(statistics, class_counts=None)
    _refuse_without_classes(statistics, ", ".join(needed))
    taught = {head: _learned_of_head(statistics, head) for head in _early(statistics)} if LEARNED in needed else {}
    rows = tuple(row for head in statistics.heads for row in _rows_of_head(statistics, head, needed, taught))
    found = _out_of_fold(with_rows(statistics, rows), taught)
    return found if PLAIN in policies or not rows else only(found, needed)


def _early(statistics: ExitStatistics) -> list[str]:
    last = exit_number(final_head(statistics))
    return [head for head in statistics.heads if exit_number(head) < last]


def _learned_of_head(statistics: ExitStatistics, head: str) -> dict[str, Learned]:
    """What can be learned at a head, by the name of its row."""
    final, features = final_head(statistics), features_of(statistics, head)
    found = {}
    for within_pp in WITHIN_PP:
        made = learned(features, easy_images(statistics, head, final, within_pp), statistics.group)
        if made is not None:
            found[f"learned {within_pp:g} pp"] = made
    return found


def _out_of_fold(statistics: ExitStatistics, taught: Mapping[str, Mapping[str, Learned]]) -> ExitStatistics:
    """The evaluation with the levels of learned rows that gates fitted to other images give."""
    if not taught:
        return statistics
    counts = statistics.counts.copy()
    for row in statistics.policy_rows:
        if row.policy == LEARNED:
            counts[:, statistics.head_index(row.head), row.row] = taught[row.head][row.name].levels
    return replace(statistics, counts=counts)


def with_rows(statistics: ExitStatistics, rows: Sequence[PolicyRow]) -> ExitStatistics:
    """The evaluation with the values of these rows among its counts (n, heads, R), each at its number; without counts
    by class. Raises InputError where they were not recorded."""
    rows = tuple(row for row in rows if row.head in statistics.heads)
    if not rows:
        return replace(statistics, class_counts=None)
    found = _refuse_without_classes(statistics, ", ".join(dict.fromkeys(row.policy for row in rows)))
    width = max(row.row for row in rows) + 1
    counts = np.zeros((statistics.images, len(statistics.heads), width), np.int32)
    for index, head in enumerate(statistics.heads):
        own = [row for row in rows if row.head == head]
        of_head = RowValues(own, len(statistics.gate.thresholds), len(statistics.classes))
        for start in range(0, statistics.images, _BLOCK):
            part = slice(start, start + _BLOCK)
            values = of_head(np.asarray(found[part, index]))
            counts[part, index, : values.shape[-1]] = values
    return replace(statistics, counts=counts, class_counts=None, policy_rows=rows)


def with_rows_of(statistics: ExitStatistics, fitted: ExitStatistics) -> ExitStatistics:
    """The evaluation with the rows of another that policies were fitted to, of some of these images perhaps: those keep
    their counts, which are out of fold."""
    found = with_rows(statistics, fitted.policy_rows)
    place = {name: index for index, name in enumerate(fitted.image_id)}
    same = [(index, place[name]) for index, name in enumerate(found.image_id) if name in place]
    if not same or not fitted.policy_rows:
        return found
    counts, (own, others) = found.counts.copy(), np.array(same).T
    counts[own] = fitted.counts[others]
    return replace(found, counts=counts)


def only(statistics: ExitStatistics, policies: Sequence[str]) -> ExitStatistics:
    """The evaluation of a search with the rows of these policies alone: the others are 0 throughout."""
    counts = statistics.counts.copy()
    if PLAIN not in policies:
        counts[:, :, : len(statistics.gate.thresholds)] = 0
    for row in statistics.policy_rows:
        if row.policy not in policies:
            counts[:, statistics.head_index(row.head), row.row] = 0
    return replace(statistics, counts=counts)


def _refuse_without_classes(statistics: ExitStatistics, policies: str) -> NDArray[np.int32]:
    if statistics.class_counts is None:
        raise InputError(
            f"the policy {policies} needs counts by class, which the evaluation of {statistics.split} lacks: run "
            "`mess-compile export` and `mess-compile evaluate`, or search with --policy plain"
        )
    return statistics.class_counts


def _rows_of_head(
    statistics: ExitStatistics, head: str, policies: Sequence[str], taught: Mapping[str, Mapping[str, Learned]]
) -> Iterator[PolicyRow]:
    """The rows of a head, numbered after those of the thresholds, MOST_ROWS in all."""
    gates = taught.get(head, {})
    first, others = len(statistics.gate.thresholds), len(gates) + (AGREEMENT in policies)
    number = first
    if CLASS in policies:
        found = class_rows(statistics, head)
        for plain, rows in _spread(found, max(0, MOST_ROWS - first - others)):
            name = f"class {statistics.gate.thresholds[plain]:.2f}"
            yield PolicyRow(head, number, CLASS, name, rows)
            number += 1
    for name, found_gate in list(gates.items())[: max(0, MOST_ROWS - number)]:
        yield PolicyRow(head, number, LEARNED, name, (), **asdict(found_gate.gate))
        number += 1
    if AGREEMENT in policies and number < MOST_ROWS:
        yield PolicyRow(head, number, AGREEMENT, AGREEMENT)


def _spread(found: list[tuple[int, tuple[int, ...]]], most: int) -> list[tuple[int, tuple[int, ...]]]:
    """At most so many of them, at even distances."""
    if len(found) <= most:
        return found
    return [found[place] for place in np.linspace(0, len(found) - 1, most).round().astype(int)]


def class_rows(statistics: ExitStatistics, head: str) -> list[tuple[int, tuple[int, ...]]]:
    """For each threshold row of a head the row of each class whose share of confident cells, among the cells of that
    class, is nearest to the row's share among all cells; the lowest of equally near ones, and for a class without
    cells the row itself.

    Without those that are a threshold row, or are twice. It depends on no label.
    """
    counted = _sums(statistics, statistics.head_index(head))  # (T + 2, K)
    sure, cells = counted[:EDGES], counted[CELLS]
    found: dict[tuple[int, ...], int] = {}
    for row, whole in enumerate(sure.sum(axis=1).tolist()):
        # |sure / cells - whole / all| times both denominators, in integers
        distance = np.abs(sure * int(cells.sum()) - whole * cells)
        rows = np.where(cells > 0, distance.argmin(axis=0), row)
        if len(set(rows.tolist())) > 1:
            found.setdefault(tuple(rows.tolist()), row)
    return [(row, rows) for rows, row in found.items()]


def _sums(statistics: ExitStatistics, index: int) -> Ints:
    """The counts of a head over all images, (T + 2, K)."""
    found = _refuse_without_classes(statistics, CLASS)
    blocks = (found[start : start + _BLOCK, index] for start in range(0, statistics.images, _BLOCK))
    total: Ints = sum((block.sum(axis=0, dtype=np.int64) for block in blocks), np.zeros(found.shape[2:], np.int64))
    return total
