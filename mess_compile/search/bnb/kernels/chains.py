"""The lower bound on one chain of heads, by an envelope for this chain alone.

Chains of heads have four places; a shorter one begins with the head that stands for no head, by which no image leaves.
With three early heads the bound is that of `triples`; with one or two it is exact but for the envelope.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mess_compile.search.bnb.kernels.compiled import inlined, kernel
from mess_compile.search.bnb.kernels.sums import additions, envelope, remainder, sums_of_leaving, sums_of_staying
from mess_compile.search.bnb.kernels.triples import PARTS, from_hardest, is_easy, parts_of_options
from mess_compile.search.bnb.kernels.values import INFINITE, Array, HeadTable
from mess_compile.search.space import CUTS


class ChainBound(NamedTuple):
    """One chain, relaxed: `base` is sum(u4) less the remainder of the envelope, `steps` (3, n) are u1 - u2, u2 - u3, u3
    - u4, `alone` (rows, cuts) the sums of u1 - u2 by the first head's options, and `lows` (rows, rows, rows) what any
    options of three rows come to at least beyond `base`, infinite where a row has none."""

    base: float
    steps: Array
    alone: Array
    lows: Array


@kernel
def place_of(head: int, last: int, table: HeadTable) -> int:
    """The index of a head; of no head that of the last."""
    return last if head == table.scores.shape[0] else head


@kernel
def scores_of(head: int, last: int, table: HeadTable) -> Array:
    """The scores (n, 2 * classes) of a head; of no head those of the last."""
    return table.scores[place_of(head, last, table)]


@inlined
def bound_chain(chain: Array, prices: Array, slope: float, table: HeadTable) -> ChainBound:
    rows, n = table.passed.shape[1:]
    steps, alone = np.empty((3, n)), np.empty((rows, CUTS))
    base = _steps_of(chain, prices, slope, table, steps)
    sums_of_leaving(table.passed[chain[0]], table.cut_counts[chain[0]], steps[0], alone)
    return ChainBound(base, steps, alone, _lows_of_rows(chain, steps, alone, table))


@kernel(nogil=True)
def bound_chains(chains: Array, prices: Array, slope: float, table: HeadTable) -> Array:
    """Lower bounds (m,) on price - slope * mIoU of all plans of each of `chains` (m, 4), with `prices` (m, 4)."""
    least = np.empty(chains.shape[0])
    for m in range(chains.shape[0]):
        bound = bound_chain(chains[m], prices[m], slope, table)
        least[m] = bound.base + bound.lows.min()
    return least


@inlined
def _steps_of(chain: Array, prices: Array, slope: float, table: HeadTable, steps: Array) -> float:
    """Fills `steps` (3, n) as in `ChainBound`; returns its `base`."""
    last = table.scores[chain[3]]
    n, columns = last.shape
    low, high, coefficients = np.zeros(columns), np.zeros(columns), np.empty(columns)
    first, second = scores_of(chain[0], chain[3], table), scores_of(chain[1], chain[3], table)
    third = scores_of(chain[2], chain[3], table)
    for image in range(n):
        for column in range(columns):
            early = min(first[image, column], second[image, column])
            low[column] += min(early, min(third[image, column], last[image, column]))
            early = max(first[image, column], second[image, column])
            high[column] += max(early, max(third[image, column], last[image, column]))
    envelope(low, high, table.totals[chain[3]], table.labelled, coefficients)
    added = np.empty((4, n))
    for place in range(4):
        additions(scores_of(chain[place], chain[3], table), coefficients, added[place])
        added[place] -= table.charges[place_of(chain[place], chain[3], table)]
    for place in range(3):
        for image in range(n):
            gain = slope * (added[place, image] - added[place + 1, image])
            steps[place, image] = prices[place] - prices[place + 1] - gain
    return float(n * prices[3] - slope * (added[3].sum() + remainder(low, high, table.labelled, coefficients)))


@inlined
def _lows_of_rows(chain: Array, steps: Array, alone: Array, table: HeadTable) -> Array:
    """The `lows` of a `ChainBound`."""
    rows, most = alone.shape
    short = chain[0] == table.scores.shape[0]
    n, lows = steps.shape[1], np.full((rows, rows, rows), INFINITE)
    places, parts = from_hardest(chain[2], table), parts_of_options(chain[2], table)
    before, after = np.empty((rows, rows, most)), np.empty((rows, rows, most))
    for part in range(1 if short else PARTS):
        saved, nowhere, leaving, among = np.zeros(n), np.zeros(n), steps[2].copy(), parts >= 0
        if not short:
            among, easy = parts == part, is_easy(places, part)
            for image in range(n):
                if easy[image]:
                    nowhere[image] = min(steps[2, image], 0.0)
                else:
                    saved[image], leaving[image] = steps[2, image], min(steps[2, image], 0.0)
        _up_to_third(chain, steps, saved, alone, table, before)
        _from_third(chain, (steps[2], nowhere, leaving), among, table, after)
        for row1 in range(rows):
            for row2 in range(rows):
                for row3 in range(rows):
                    for cut in range(table.cut_counts[chain[1], row2]):
                        low = before[row1, row2, cut] + after[row2, row3, cut]
                        lows[row1, row2, row3] = min(lows[row1, row2, row3], low)
    return lows


@inlined
def _up_to_third(chain: Array, steps: Array, saved: Array, alone: Array, table: HeadTable, before: Array) -> None:
    """Fills `before` (rows, rows, cuts): what options of the second head come to up to the third with the best of each
    row of the first; an image that leaves at the first alone also adds what it has `saved` (n,)."""
    first, second = table.passed[chain[0]], table.passed[chain[1]]
    counts1, counts2 = table.cut_counts[chain[0]], table.cut_counts[chain[1]]
    rows, most = alone.shape
    staying, sums = np.empty((most + 1, most + 1)), np.empty((rows, most))
    sums_of_leaving(second, counts2, saved, sums)
    both = steps[1] + saved
    whole = both.sum()
    before[:] = INFINITE
    for row2 in range(rows):
        for row1 in range(rows):
            if not counts1[row1] or not counts2[row2]:
                continue
            sums_of_staying(first[row1], second[row2], both, staying)
            for cut2 in range(counts2[row2]):
                fixed = whole - sums[row2, cut2]
                for cut1 in range(counts1[row1]):
                    low = fixed + alone[row1, cut1] - staying[cut1, cut2]
                    before[row1, row2, cut2] = min(before[row1, row2, cut2], low)


@inlined
def _from_third(chain: Array, added: tuple[Array, Array, Array], among: Array, table: HeadTable, after: Array) -> None:
    """Fills `after` (rows, rows, cuts): what options of the second head come to from the third on, with the best in
    each row of those `among` (rows, cuts) the third's.

    `added` (n,) by an image that leaves at the second head, at neither, and at the third.
    """
    values, nowhere, leaving = added
    second, third = table.passed[chain[1]], table.passed[chain[2]]
    counts2, counts3 = table.cut_counts[chain[1]], table.cut_counts[chain[2]]
    rows, most = among.shape
    staying, sums = np.empty((most + 1, most + 1)), np.empty((rows, most))
    sums_of_leaving(second, counts2, values - leaving, sums)
    difference, whole = leaving - nowhere, leaving.sum()
    after[:] = INFINITE
    for row2 in range(rows):
        for row3 in range(rows):
            if not counts2[row2] or not among[row3].any():
                continue
            sums_of_staying(second[row2], third[row3], difference, staying)
            for cut2 in range(counts2[row2]):
                most_staying = -INFINITE
                for cut3 in range(counts3[row3]):
                    if among[row3, cut3]:
                        most_staying = max(most_staying, staying[cut2, cut3])
                after[row2, row3, cut2] = whole + sums[row2, cut2] - most_staying
