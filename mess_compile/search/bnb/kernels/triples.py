"""Lower bounds on groups of plans with three early heads.

With a third early head, where C would leave, a plan comes to

    sum(u4) + sum over A (u1 - u2) + sum over A or B (u2 - u3) + sum over A or B or C (u3 - u4)

and only the last term needs all four heads. Of an image that is not in B it needs u3 - u4 if it is in A or C. The third
head's options are split into PARTS by how many images leave there. For each part the images are split, too: into those
that the third head mostly finds easy, for which C accounts for the term, and the others, for which A does, at the
cheapest last head. What this may overestimate is taken off where C is not as assumed. So given the second head's
option, the minimum over the first's options and the minimum over the third's are found separately, and added.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mess_compile.search.bnb.kernels.compiled import inlined, kernel
from mess_compile.search.bnb.kernels.pairs import min_over_rows
from mess_compile.search.bnb.kernels.sums import (
    column_sums_of_leaving,
    max_miou,
    order_by_cuts_passed,
    sums_of_leaving,
)
from mess_compile.search.bnb.kernels.values import INFINITE, Array, HeadTable, Relaxation, TripleGroup
from mess_compile.search.space import CUTS

PARTS = 2
"""Into how many parts the options of a third early head are split, by how many images leave there."""


class ExitPrices(NamedTuple):
    """What exits cost beyond the one before: `entering` (firsts,) the second beyond the first, infinite where no plan
    has it, `further` (2, thirds or lasts) the third and the last. `widest` (2, 2 * classes) are the widest spans of a
    first head, `cheapest` indexes the last head that is cheapest for all images together."""

    entering: Array
    further: Array
    widest: Array
    cheapest: int


class ThirdSteps(NamedTuple):
    """By image and third head: `values` (n, thirds) u2 - u3, `saving` (n, thirds) what leaving at the first head saves
    further on, at the cheapest last head. `mass` (thirds, lasts) bounds the magnitudes that are summed in float32."""

    values: Array
    saving: Array
    mass: Array


class ThirdHead(NamedTuple):
    """A third early `head`: what leaving at the first head saves, `saving` (n,), where an image is not `easy` (n,), and
    the options that are examined, `among` (rows, cuts)."""

    head: int
    saving: Array
    easy: Array
    among: Array


@kernel
def from_hardest(head: int, table: HeadTable) -> Array:
    """The place of each image (n,), from the one that a head is least sure of, over all rows."""
    rows, n = table.passed.shape[1:]
    passed, places = np.zeros(n, np.int64), np.empty(n, np.int64)
    starts = np.zeros(rows * CUTS + 2, np.int64)  # a counting sort: numba takes seconds to compile its own
    for image in range(n):
        for row in range(rows):
            passed[image] += table.passed[head, row, image]
        starts[passed[image] + 1] += 1
    for count in range(1, starts.size):
        starts[count] += starts[count - 1]
    for image in range(n):
        places[image] = starts[passed[image]]
        starts[passed[image]] += 1
    return places


@kernel
def is_easy(places: Array, part: int) -> Array:
    """Whether images, by their `places` from the hardest, may leave by an option of this part."""
    n = places.shape[-1]
    return places >= n - n * (2 * part + 1) // (2 * PARTS)


@kernel
def parts_of_options(head: int, table: HeadTable) -> Array:
    """Which of PARTS each option (rows, cuts) of a head is in, by how many images leave; -1 where there is none."""
    rows, n = table.passed.shape[1:]
    found = np.full((rows, CUTS), -1)
    for row in range(rows):
        for cut in range(table.cut_counts[head, row]):
            found[row, cut] = min(PARTS * (table.passed[head, row] > cut).sum() // n, PARTS - 1)
    return found


@inlined
def _best_before(
    group: TripleGroup, entering: Array, values: Array, behind: Array, relaxation: Relaxation, table: HeadTable
) -> tuple[Array, Array]:
    """What the options of the second head come to up to the third, with the best of each first head's.

    `values` (n, thirds) are u2 - u3, `behind` (n, thirds) the same and what leaving at the first saves further on.
    Returns (firsts, rows, cuts, thirds), and (firsts,) the sums of |u1 - u2|.
    """
    (n, thirds), rows, firsts = values.shape, table.cut_counts.shape[1], group.firsts
    passed, cut_counts = table.passed[group.second], table.cut_counts[group.second]
    gains = np.empty((rows, CUTS, thirds))
    column_sums_of_leaving(passed, cut_counts, values, gains)
    found = np.full((firsts.size, rows, CUTS, thirds), np.float32(INFINITE))
    mass = np.zeros(firsts.size)
    order, ends = np.empty(n, np.int64), np.empty(CUTS + 2, np.int64)
    least = np.empty((CUTS, thirds), np.float32)
    not_passed = np.empty((rows, n), np.uint8)
    options = np.empty((rows, CUTS, thirds), np.float32)
    for first in range(firsts.size):
        if entering[first] == INFINITE:
            continue
        mass[first] = _options_reversed(group, first, entering[first], relaxation, table, (not_passed, options))
        for row2 in range(rows):
            order_by_cuts_passed(cut_counts[row2] - passed[row2], order, ends)
            least[:] = INFINITE
            for row1 in range(rows):
                if table.cut_counts[firsts[first], row1]:
                    count = cut_counts[row2]
                    min_over_rows(order, ends, count, not_passed[row1], options[row1], behind, least)
            for cut in range(cut_counts[row2]):
                for third in range(thirds):
                    found[first, row2, cut, third] = gains[row2, cut, third] + least[cut_counts[row2] - 1 - cut, third]
    return found, mass


@inlined
def _options_reversed(
    group: TripleGroup,
    first: int,
    entering: float,
    relaxation: Relaxation,
    table: HeadTable,
    out: tuple[Array, Array],
) -> float:
    """Fills `out` for a first head, both from the largest cut: the cuts that an image does not pass (rows, n), and sums
    of u1 - u2 by option (rows, cuts, thirds). Returns the sum of |u1 - u2|."""
    not_passed, options = out
    head, added, slope, mass = group.firsts[first], relaxation.added, relaxation.cutoff.slope, 0.0
    rows, n = not_passed.shape
    column, alone = np.empty(n), np.empty((rows, CUTS))
    for image in range(n):
        column[image] = -entering - slope * (added[head, image] - added[group.second, image])
        mass += abs(column[image])
    sums_of_leaving(table.passed[head], table.cut_counts[head], column, alone)
    options[:] = INFINITE
    for row in range(rows):
        count = table.cut_counts[head, row]
        not_passed[row] = count - table.passed[head, row]
        for cut in range(count):
            options[row, count - 1 - cut] = alone[row, cut]
    return mass


@inlined
def _best_after(second: int, third: ThirdHead, values: Array, table: HeadTable, found: Array) -> None:
    """What the options of a second head come to from the third on, with the best of some of the third's.

    `values` (n, lasts) are u3 - u4; fills `found` (rows, cuts, lasts).
    """
    (n, lasts), rows = values.shape, table.cut_counts.shape[1]
    at_third, at_second, fixed = _split_steps(third, values)
    sums, behind = np.empty((rows, CUTS, lasts)), at_third.astype(np.float32)
    column_sums_of_leaving(table.passed[third.head], table.cut_counts[third.head], at_third, sums)
    gains, passed = np.full((rows, CUTS, lasts), np.float32(INFINITE)), np.empty((rows, n), np.int64)
    widths = np.zeros(rows, np.int64)
    for row in range(rows):  # the options among a part are neighbours: the others need no place
        cuts = np.flatnonzero(third.among[row])
        if cuts.size:
            lowest, highest = cuts[0], cuts[-1] + 1
            passed[row] = np.minimum(np.maximum(table.passed[third.head, row], lowest), highest) - lowest
            gains[row, : cuts.size] = sums[row, lowest:highest]
            widths[row] = -(-cuts.size // 4) * 4
    column_sums_of_leaving(table.passed[second], table.cut_counts[second], at_second, sums)
    order, ends = np.empty(n, np.int64), np.empty(CUTS + 2, np.int64)
    found[:] = INFINITE
    for row2 in range(rows):
        count = table.cut_counts[second, row2]
        order_by_cuts_passed(table.passed[second, row2], order, ends)
        for row3 in range(rows):
            if widths[row3]:
                some = gains[row3, : widths[row3]]
                min_over_rows(order, ends, count, passed[row3], some, behind, found[row2])
        for cut in range(count):
            for last in range(lasts):
                found[row2, cut, last] += fixed[last] + sums[row2, cut, last]


@inlined
def _split_steps(third: ThirdHead, values: Array) -> tuple[Array, Array, Array]:
    """What an image adds that leaves at the third head, what one adds that leaves at the second (n, lasts), and the sum
    of what each adds anyway (lasts,)."""
    n, lasts = values.shape
    at_third, at_second, fixed = np.empty((n, lasts)), np.empty((n, lasts)), np.zeros(lasts)
    for image in range(n):
        saved = 0.0 if third.easy[image] else third.saving[image]
        for last in range(lasts):
            value = values[image, last]
            anyway = min(0.0, value - saved)
            leaving = min(value, value - saved)
            at_third[image, last] = leaving - anyway
            at_second[image, last] = value - leaving
            fixed[last] += anyway
    return at_third, at_second, fixed


@kernel(nogil=True)
def bound_triples(group: TripleGroup, relaxation: Relaxation, table: HeadTable, least: Array) -> None:
    """Lower bounds `least` (firsts, thirds, lasts) on price - slope * mIoU of the plans of each chain that is alive."""
    least[:] = INFINITE
    if not group.alive.any():
        return
    prices = _exit_prices(group, relaxation, table)
    steps = _third_steps(group, prices, relaxation)
    best, entered = _best_of_parts(group, prices, steps, relaxation, table)
    n, slope, coefficients = relaxation.added.shape[1], relaxation.cutoff.slope, relaxation.coefficients
    for third in range(group.thirds.size):
        for last in range(group.lasts.size):
            last_head = group.lasts[last]
            spans = table.spans[:, group.second, group.thirds[third]] + table.spans[:, group.thirds[third], last_head]
            most = max_miou(last_head, prices.widest + spans, table, coefficients)
            for first in range(group.firsts.size):
                if not group.alive[first, third, last]:
                    continue
                error = (entered[first] + steps.mass[third, last]) * (n + 4 * CUTS) * 2.0**-24
                others = n * group.prices[3, first, third, last] + best[first, third, last] - error
                least[first, third, last] = others - slope * most
                if least[first, third, last] <= relaxation.cutoff.ceiling:
                    narrower = spans + table.spans[:, group.firsts[first], group.second]
                    tighter = max_miou(last_head, narrower, table, coefficients)
                    least[first, third, last] = others - slope * tighter


@inlined
def _exit_prices(group: TripleGroup, relaxation: Relaxation, table: HeadTable) -> ExitPrices:
    prices, lasts, n = group.prices, group.lasts, relaxation.added.shape[1]
    entering = np.full(group.firsts.size, INFINITE)
    further = np.zeros((2, max(group.thirds.size, lasts.size)))
    widest, ends = np.zeros((2, relaxation.coefficients.size)), np.zeros(lasts.size, np.bool_)
    for first, third, last in np.ndindex(group.alive.shape):
        if group.alive[first, third, last]:
            entering[first] = prices[1, first, third, last] - prices[0, first, third, last]
            further[0, third] = prices[2, first, third, last] - prices[1, first, third, last]
            further[1, last] = prices[3, first, third, last] - prices[2, first, third, last]
            widest = np.maximum(widest, table.spans[:, group.firsts[first], group.second])
            ends[last] = True
    totals = np.full(lasts.size, INFINITE)  # of all images beyond the third head, but for what that head adds
    for last in np.flatnonzero(ends):
        totals[last] = n * further[1, last] - relaxation.cutoff.slope * relaxation.added[lasts[last]].sum()
    return ExitPrices(entering, further, widest, int(totals.argmin()))


@inlined
def _third_steps(group: TripleGroup, prices: ExitPrices, relaxation: Relaxation) -> ThirdSteps:
    thirds, lasts, further = group.thirds, group.lasts, prices.further
    added, slope = relaxation.added, relaxation.cutoff.slope
    n = added.shape[1]
    values, saving = np.empty((n, thirds.size)), np.empty((n, thirds.size))
    mass = np.zeros((thirds.size, lasts.size))
    for image in range(n):
        typical = slope * added[lasts[prices.cheapest], image] - further[1, prices.cheapest]
        for third in range(thirds.size):
            at_third = added[thirds[third], image]
            values[image, third] = -further[0, third] - slope * (added[group.second, image] - at_third)
            saving[image, third] = typical - slope * at_third
            for last in range(lasts.size):
                step = further[1, last] + slope * (at_third - added[lasts[last], image])
                mass[third, last] += 2 * abs(values[image, third]) + 6 * abs(saving[image, third]) + 4 * abs(step)
    return ThirdSteps(values, saving, mass)


@inlined
def _best_of_parts(
    group: TripleGroup, prices: ExitPrices, steps: ThirdSteps, relaxation: Relaxation, table: HeadTable
) -> tuple[Array, Array]:
    """The least (firsts, thirds, lasts) that options come to, over the parts of the third head's, and (firsts,) the
    sums of |u1 - u2|."""
    (n, thirds), rows, lasts = steps.values.shape, table.cut_counts.shape[1], group.lasts
    added, slope, second = relaxation.added, relaxation.cutoff.slope, group.second
    places, parts = np.empty((thirds, n), np.int64), np.empty((thirds, rows, CUTS), np.int64)
    for third in range(thirds):
        places[third] = from_hardest(group.thirds[third], table)
        parts[third] = parts_of_options(group.thirds[third], table)
    best, entered = np.full(group.alive.shape, np.float32(INFINITE)), np.empty(0)
    values, after = np.empty((n, lasts.size)), np.empty((rows, CUTS, lasts.size), np.float32)
    behind = np.empty(steps.values.shape, np.float32)
    for part in range(PARTS):
        easy = is_easy(places, part)
        for image in range(n):
            for third in range(thirds):
                saved = 0.0 if easy[third, image] else steps.saving[image, third]
                behind[image, third] = steps.values[image, third] + saved
        before, entered = _best_before(group, prices.entering, steps.values, behind, relaxation, table)
        for third in range(thirds):
            if not group.alive[:, third].any():
                continue
            head = group.thirds[third]
            for image in range(n):
                for last in range(lasts.size):
                    step = slope * (added[head, image] - added[lasts[last], image])
                    values[image, last] = -prices.further[1, last] - step
            one = ThirdHead(head, steps.saving[:, third], easy[third], parts[third] == part)
            _best_after(second, one, values, table, after)
            for first in range(group.firsts.size):
                _lower(before[first, :, :, third], after, table.cut_counts[second], best[first, third])
    return best, entered


@inlined
def _lower(before: Array, after: Array, cut_counts: Array, best: Array) -> None:
    """Lowers `best` (lasts,) to the least of `before` (rows, cuts) + `after` (rows, cuts, lasts)."""
    for row in range(cut_counts.size):
        for cut in range(cut_counts[row]):
            for last in range(best.size):
                best[last] = min(best[last], before[row, cut] + after[row, cut, last])
