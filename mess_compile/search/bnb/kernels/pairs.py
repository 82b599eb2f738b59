"""Lower bounds on groups of plans with two early heads.

A plan with two early heads sends A to the first, B less A to the second, and the rest to the last. With `u` what an
image costs at an exit less `slope` times what it adds to (a linear bound on) mIoU, a plan comes to

    sum(u3) + sum over B of (u2 - u3) + sum over A of (u1 - u2) + sum over A less B of (u2 - u3)

The first two terms need the last two heads, the third the first two, and the last all three. With only the negative
u2 - u3 in it, of whatever does not leave at the second head, it needs the last two as well: that bounds a triple by
two minima. Where this bound is not tight enough, the sums over A less B are taken for all last heads of a pair at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mess_compile.search.bnb.kernels.compiled import inlined, kernel
from mess_compile.search.bnb.kernels.sums import (
    column_sums_of_leaving,
    max_miou,
    order_by_cuts_passed,
    sums_of_leaving,
)
from mess_compile.search.bnb.kernels.values import INFINITE, Array, HeadTable, PairGroup, Relaxation
from mess_compile.search.space import CUTS


class SecondHead(NamedTuple):
    """A second early `head`: `behind` (n, lasts) is u2 - u3, `gains` (rows, cuts, lasts) its sums over B, and `lows`
    (rows, lasts) the least of a row's options if the images left behind were as cheap as they can be."""

    head: int
    gains: Array
    lows: Array
    behind: Array


@kernel
def min_over_rows(
    order: Array, ends: Array, cut_count: int, passed: Array, gains: Array, behind: Array, least: Array
) -> None:
    """Lowers `least` (cuts, lasts) to what each option of one row at a head comes to with the best of a row at another.

    `order` has the images by falling number of cuts passed at the one head, with `ends`. `passed` (n,) and `gains` (a
    multiple of four cuts, lasts) are the other's, `behind` (n, lasts) what an image adds that passes the one head's cut
    and not the other's.
    """
    most, lasts = gains.shape
    columns = np.zeros((most + 1, lasts), np.float32)  # of what passes the one head's cut, by cuts passed at the other
    total, best = np.empty(lasts, np.float32), np.empty(lasts, np.float32)
    done = 0
    for cut in range(cut_count - 1, -1, -1):
        for place in range(done, ends[cut + 1]):
            image = order[place]
            count = passed[image]
            for last in range(lasts):
                columns[count, last] += behind[image, last]
        done = ends[cut + 1]
        total[:] = 0
        best[:] = INFINITE
        for other in range(0, most, 4):  # by fours: the running sums stay in registers
            for last in range(lasts):
                sum1 = total[last] + columns[other, last]
                sum2 = sum1 + columns[other + 1, last]
                sum3 = sum2 + columns[other + 2, last]
                sum4 = sum3 + columns[other + 3, last]
                total[last] = sum4
                low = min(sum1 + gains[other, last], sum2 + gains[other + 1, last])
                high = min(sum3 + gains[other + 2, last], sum4 + gains[other + 3, last])
                best[last] = min(best[last], min(low, high))
        for last in range(lasts):
            least[cut, last] = min(least[cut, last], best[last])


@inlined
def _bound_pair(first: int, second: SecondHead, alone: Array, limits: Array, table: HeadTable, least: Array) -> None:
    """Lower bounds `least` (lasts,) on any options of two early heads, for each of some last heads.

    Two rows whose cheapest options come to more than `limits` (lasts,) for every last head are not examined further.
    `alone` (rows, cuts) is the contribution of the first head's options without the second.
    """
    rows, (n, lasts) = table.cut_counts.shape[1], second.behind.shape
    order, ends = np.empty(n, np.int64), np.empty(CUTS + 2, np.int64)
    least[:] = INFINITE
    for row1 in range(rows):
        count = table.cut_counts[first, row1]
        if not count:
            continue
        order_by_cuts_passed(table.passed[first, row1], order, ends)
        lowest = alone[row1].min()
        with_second = np.full((CUTS, lasts), np.float32(INFINITE))
        for row2 in range(rows):
            is_open = False
            for last in range(lasts):
                is_open |= lowest + second.lows[row2, last] <= limits[last]
            if is_open:
                passed, gains = table.passed[second.head, row2], second.gains[row2]
                min_over_rows(order, ends, count, passed, gains, second.behind, with_second)
            else:
                for last in range(lasts):
                    least[last] = min(least[last], lowest + second.lows[row2, last])
        for cut in range(count):
            for last in range(lasts):
                least[last] = min(least[last], alone[row1, cut] + with_second[cut, last])


@inlined
def _second_head(
    head: int, lasts: Array, further: Array, relaxation: Relaxation, table: HeadTable
) -> tuple[SecondHead, Array]:
    """The options of a second head before each of `lasts`, and (lasts,) by how much sums in float32 may be too high.

    `further` (lasts,) is what the last exit costs beyond the second.
    """
    added, slope = relaxation.added, relaxation.cutoff.slope
    n, rows = added.shape[1], table.cut_counts.shape[1]
    gains, behind = np.empty((rows, CUTS, lasts.size), np.float32), np.empty((n, lasts.size), np.float32)
    values, below = np.empty(behind.shape), np.empty(behind.shape)
    total, mass = np.zeros(lasts.size), np.zeros(lasts.size)
    for image in range(n):
        for last in range(lasts.size):
            values[image, last] = -further[last] - slope * (added[head, image] - added[lasts[last], image])
            below[image, last] = min(0.0, values[image, last])
            behind[image, last] = values[image, last]
            total[last] += below[image, last]
            mass[last] += abs(values[image, last])
    sums, saved = np.empty(gains.shape), np.empty(gains.shape)
    column_sums_of_leaving(table.passed[head], table.cut_counts[head], values, sums)
    column_sums_of_leaving(table.passed[head], table.cut_counts[head], below, saved)
    lows = np.full((rows, lasts.size), INFINITE)
    for row in range(rows):
        for cut in range(CUTS):
            for last in range(lasts.size):
                gains[row, cut, last] = sums[row, cut, last]
                if cut < table.cut_counts[head, row]:
                    low = sums[row, cut, last] + total[last] - saved[row, cut, last]
                    lows[row, last] = min(lows[row, last], low)
    return SecondHead(head, gains, lows, behind), mass * (n + 2 * CUTS) * 2.0**-24


@kernel(nogil=True)
def bound_pairs(group: PairGroup, relaxation: Relaxation, table: HeadTable, least: Array) -> None:
    """Lower bounds `least` (firsts, lasts) on price - slope * mIoU of the plans of each chain that is alive."""
    least[:] = INFINITE
    if not group.alive.any():
        return
    firsts, lasts, prices, alive = group.firsts, group.lasts, group.prices, group.alive
    further = np.zeros(lasts.size)
    for first in range(firsts.size):
        for last in range(lasts.size):
            if alive[first, last]:
                further[last] = prices[2, first, last] - prices[1, first, last]
    second, error = _second_head(group.second, lasts, further, relaxation, table)
    for first in range(firsts.size):
        if not alive[first].any():
            continue
        step = (prices[1, first] - prices[0, first])[alive[first]][0]
        alone = _first_alone(firsts[first], group.second, step, relaxation, table)
        cheapest = alone.min()
        others = _fixed_part(group, first, error, relaxation, table)
        for last in range(lasts.size):
            if alive[first, last]:
                least[first, last] = others[last] + cheapest + second.lows[:, last].min()
        close = np.flatnonzero(alive[first] & (least[first] <= relaxation.cutoff.ceiling))
        if close.size:
            found = np.empty(close.size)
            gains, behind = second.gains[:, :, close], second.behind[:, close]
            some = SecondHead(
                group.second, np.ascontiguousarray(gains), second.lows[:, close], np.ascontiguousarray(behind)
            )
            limits = relaxation.cutoff.ceiling - others[close]
            _bound_pair(firsts[first], some, alone, limits, table, found)
            least[first][close] = others[close] + found


@inlined
def _first_alone(first: int, second: int, step: float, relaxation: Relaxation, table: HeadTable) -> Array:
    """Sums of u1 - u2 over A, (rows, cuts), by the first head's options; the second exit costs `step` more."""
    added, slope = relaxation.added, relaxation.cutoff.slope
    column, alone = np.empty(added.shape[1]), np.empty((table.cut_counts.shape[1], CUTS))
    for image in range(column.size):
        column[image] = -step - slope * (added[first, image] - added[second, image])
    sums_of_leaving(table.passed[first], table.cut_counts[first], column, alone)
    return alone


@inlined
def _fixed_part(group: PairGroup, first: int, error: Array, relaxation: Relaxation, table: HeadTable) -> Array:
    """The part (lasts,) of a plan's price that its options do not change."""
    n, others = relaxation.added.shape[1], np.empty(group.lasts.size)
    head = group.firsts[first]
    for last in range(group.lasts.size):
        spans = table.spans[:, head, group.second] + table.spans[:, group.second, group.lasts[last]]
        most = max_miou(group.lasts[last], spans, table, relaxation.coefficients)
        others[last] = n * group.prices[2, first, last] - relaxation.cutoff.slope * most - error[last]
    return others
