"""The compiled part of branch and bound: admissible bounds on groups of plans, and one chain of heads to the end.

A plan with two early heads sends A to the first, B less A to the second, and the rest to the last. With `u` what an
image costs at an exit less `slope` times what it adds to (a linear bound on) mIoU, a plan comes to

    sum(u3) + sum over B of (u2 - u3) + sum over A of (u1 - u2) + sum over A less B of (u2 - u3)

The first two terms need the last two heads, the third the first two, and the last all three. With only the negative
u2 - u3 in it, of whatever does not leave at the second head, it needs the last two as well: that bounds a triple by
two minima. Where this is too little, the sums over A less B are taken for all last heads of a pair at once.

With a third early head, where C would leave, a plan comes to

    sum(u4) + sum over A (u1 - u2) + sum over A or B (u2 - u3) + sum over A or B or C (u3 - u4)

and only the last term needs all four heads. Of an image that is not in B it needs u3 - u4 if it is in A or C. The third
head's options are parted by how many leave there; for each part the images are, too, into those that the third head
mostly finds easy, of which C is to account for the term, and the others, of which A is, at the cheapest last head.
What may be too much is taken off where C is not as foreseen. So given the second head's option, the least over the
first's options and the least over the third's are found apart, and added up.

Chains of heads have four places; a shorter one begins with the head that stands for none, by which no image leaves.

All of it is one file, because numba's cache would not notice a change to what a function calls in another. What takes
long lets go of Python's lock, for threads to share the work: loops that numba shares out take it twice as long to
compile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from mess_compile.cores import wait_without_spinning
from mess_compile.search.space import CUTS

Array = Any
INFINITE = np.inf
PARTS = 2
"""Of the options of a third early head, by how many images leave there."""
wait_without_spinning()


class Field(NamedTuple):
    """What is known of the heads: `scores` (heads, n, 2 * classes) are intersections and false positives, `totals`
    (heads, 2 * classes) their sums, `spans` what `differences` gives, `labelled` (classes,) pixels.

    `levels` (heads + 1, rows, n) counts the cuts that an image passes, `cuts` (heads + 1, rows) those that there are,
    `ranks` (heads + 1, rows, cuts + 1) orders rows and cuts as text. The head after the last stands for none.
    """

    scores: Array
    totals: Array
    spans: Array
    levels: Array
    cuts: Array
    ranks: Array
    labelled: Array


class Wanted(NamedTuple):
    """What a plan must keep: `bounds` (q,) on sums of costs, `percentile` (percent, bound) of the first of these, and
    the `floor` of mIoU. `objective` indexes the costs, -1 for mIoU."""

    bounds: Array
    percentile: Array
    floor: float
    objective: int


@njit(cache=True)
def envelope(low: Array, high: Array, near: Array, labelled: Array, coefficients: Array) -> None:
    """A linear function of (intersections, false positives) that lies closely above mIoU in percent in a box.

    I / (L + F) with 1 / (L + F) replaced by its chord is a product of two bounded variables: of its two upper
    envelopes (McCormick, 1976) the one that is lower at `near` is taken, class by class. All are (2 * classes,); what
    the function lacks of lying above is `remainder`.
    """
    classes = labelled.size
    for k in range(classes):
        f = classes + k
        y_high, y_low = 1.0 / (labelled[k] + low[f]), 1.0 / (labelled[k] + high[f])
        tilt = (y_low - y_high) / (high[f] - low[f]) if high[f] > low[f] else -y_low * y_high
        chord = y_high + tilt * (near[f] - low[f])
        above = high[k] * chord + y_low * near[k] - high[k] * y_low
        below = low[k] * chord + y_high * near[k] - low[k] * y_high
        bound, other = (high[k], y_low) if above <= below else (low[k], y_high)
        coefficients[k] = 100.0 / classes * other
        coefficients[f] = 100.0 / classes * bound * tilt


@njit(cache=True)
def remainder(low: Array, high: Array, labelled: Array, coefficients: Array) -> float:
    """The most by which mIoU in percent exceeds the linear function with these coefficients in the box low to high.

    I / (L + F) is linear in I and convex in F, so that each class is at its most at a corner.
    """
    classes = labelled.size
    total = 0.0
    for k in range(classes):
        f = classes + k
        y_low, y_high = 100.0 / classes / (labelled[k] + high[f]), 100.0 / classes / (labelled[k] + low[f])
        few = max(low[k] * (y_high - coefficients[k]), high[k] * (y_high - coefficients[k])) - coefficients[f] * low[f]
        many = max(low[k] * (y_low - coefficients[k]), high[k] * (y_low - coefficients[k])) - coefficients[f] * high[f]
        total += max(few, many)
    return total


@njit(cache=True)
def additions(scores: Array, coefficients: Array, out: Array) -> None:
    """What each image adds to the bound at one head: `scores` (n, 2 * classes) -> `out` (n,)."""
    for i in range(scores.shape[0]):
        total = 0.0
        for k in range(scores.shape[1]):
            total += scores[i, k] * coefficients[k]
        out[i] = total


@njit(cache=True)
def summed(levels: Array, cuts: Array, values: Array, out: Array) -> None:
    """Sums of `values` (n,) over the images that each option sends away; `out` (rows, cuts), infinite without option.

    `levels` (rows, n) counts the cuts that an image passes, `cuts` (rows,) those that there are.
    """
    most = out.shape[1]
    bins = np.empty(most + 1)
    for t in range(levels.shape[0]):
        bins[:] = 0.0
        for i in range(values.size):
            bins[levels[t, i]] += values[i]
        total = 0.0
        for j in range(most - 1, -1, -1):
            total += bins[j + 1]
            out[t, j] = total if j < cuts[t] else INFINITE


@njit(cache=True)
def summed_for_all(levels: Array, cuts: Array, values: Array, out: Array) -> None:
    """As `summed` for several columns at once: `values` (n, columns), `out` (rows, cuts, columns)."""
    most, columns = out.shape[1], values.shape[1]
    bins = np.empty((most + 1, columns))
    for t in range(levels.shape[0]):
        bins[:] = 0.0
        for i in range(values.shape[0]):
            row = bins[levels[t, i]]
            for c in range(columns):
                row[c] += values[i, c]
        for j in range(most - 1, -1, -1):
            for c in range(columns):
                bins[j, c] += bins[j + 1, c]
                out[t, j, c] = bins[j + 1, c] if j < cuts[t] else INFINITE


@njit(cache=True)
def staying(first: Array, second: Array, values: Array, table: Array) -> None:
    """Sums of `values` (n,) over the images that pass neither cut j of one row nor cut k of another.

    `first`, `second` (n,) are levels in the rows; fills `table` (levels, levels).
    """
    table[:] = 0.0
    for i in range(values.size):
        table[first[i], second[i]] += values[i]
    for j in range(table.shape[0]):
        total = 0.0
        for k in range(table.shape[1]):
            total += table[j, k]
            table[j, k] = total
        if j:
            table[j] += table[j - 1]


@njit(cache=True)
def staying_of_three(first: Array, second: Array, third: Array, values: Array, table: Array) -> None:
    """As `staying` for three rows; fills `table` (levels, levels, levels)."""
    table[:] = 0.0
    for i in range(values.size):
        line = table[first[i], second[i]]
        for m in range(third[i], line.size):
            line[m] += values[i]
    for j in range(table.shape[0]):
        for k in range(1, table.shape[1]):
            table[j, k] += table[j, k - 1]
        if j:
            table[j] += table[j - 1]


@njit(cache=True, parallel=True)
def differences(scores: Array, later: Array) -> Array:
    """How far each head may exceed each later one in a sum over any images, and fall short of it.

    `scores` (heads, n, 2 * classes), `later` (heads, heads); returns (2, heads, heads, 2 * classes).
    """
    heads, n, columns = scores.shape
    found = np.zeros((2, heads, heads, columns))
    for a in prange(heads):
        for b in range(heads):
            if later[a, b]:
                for i in range(n):
                    for k in range(columns):
                        more = scores[a, i, k] - scores[b, i, k]
                        found[0, a, b, k] += max(more, 0)
                        found[1, a, b, k] += max(-more, 0)
    return found


@njit(cache=True)
def in_falling_order(levels: Array, order: Array, ends: Array) -> None:
    """Fills `order` (n,) with the images by falling level; of level l or more are the first `ends[l]` (cuts + 2,)."""
    ends[:] = 0
    for level in levels:
        ends[level] += 1
    for level in range(ends.size - 2, -1, -1):
        ends[level] += ends[level + 1]
    at = ends[1:].copy()
    for i in range(levels.size):
        order[at[levels[i]]] = i
        at[levels[i]] += 1


@njit(cache=True)
def least_of_rows(
    order: Array, ends: Array, cuts1: int, levels: Array, gains: Array, behind: Array, least: Array
) -> None:
    """Lowers `least` (cuts, lasts) to what each option of one row at a head comes to with the best of a row at another.

    The images by falling level at the one head are `order`, with `ends`. `levels` (n,) and `gains` (a multiple of four
    cuts, lasts) are the other's, `behind` (n, lasts) what an image adds that passes the one head's cut and not the
    other's.
    """
    most, lasts = gains.shape
    columns = np.zeros((most + 1, lasts), np.float32)  # of what passes the one head's cut, by level at the other
    total, some = np.empty(lasts, np.float32), np.empty(lasts, np.float32)
    done = 0
    for j in range(cuts1 - 1, -1, -1):
        for at in range(done, ends[j + 1]):
            i = order[at]
            level = levels[i]
            for r in range(lasts):
                columns[level, r] += behind[i, r]
        done = ends[j + 1]
        total[:] = 0
        some[:] = INFINITE
        for k in range(0, most, 4):  # by fours: what is added up stays in registers
            for r in range(lasts):
                a = total[r] + columns[k, r]
                b = a + columns[k + 1, r]
                c = b + columns[k + 2, r]
                d = c + columns[k + 3, r]
                total[r] = d
                few = min(a + gains[k, r], b + gains[k + 1, r])
                many = min(c + gains[k + 2, r], d + gains[k + 3, r])
                some[r] = min(some[r], min(few, many))
        for r in range(lasts):
            least[j, r] = min(least[j, r], some[r])


@njit(cache=True)
def bound_pair(
    h1: int, h2: int, alone: Array, limits: Array, gains: Array, lows: Array, behind: Array, field: Field, least: Array
) -> None:
    """What any options of two early heads come to at least, for each of some last heads: `least` (lasts,).

    Two rows whose cheapest options come to more than `limits` (lasts,) for every last head are not looked at closer.
    `alone` (rows, cuts) is what the first head's come to without the second, `gains` (rows, cuts, lasts), their `lows`
    (rows, lasts) and `behind` (n, lasts) are the second's.
    """
    rows, (n, lasts) = field.cuts.shape[1], behind.shape
    order, ends = np.empty(n, np.int64), np.empty(CUTS + 2, np.int64)
    least[:] = INFINITE
    for t in range(rows):
        if not field.cuts[h1, t]:
            continue
        in_falling_order(field.levels[h1, t], order, ends)
        lowest = alone[t].min()
        with_second = np.full((CUTS, lasts), np.float32(INFINITE))
        for s in range(rows):
            open_ = False
            for r in range(lasts):
                open_ |= lowest + lows[s, r] <= limits[r]
            if open_:
                least_of_rows(order, ends, field.cuts[h1, t], field.levels[h2, s], gains[s], behind, with_second)
            else:
                for r in range(lasts):
                    least[r] = min(least[r], lowest + lows[s, r])
        for j in range(field.cuts[h1, t]):
            for r in range(lasts):
                least[r] = min(least[r], alone[t, j] + with_second[j, r])


@njit(cache=True)
def gains_of(
    h2: int, lasts: Array, further: Array, slope: float, added: Array, field: Field, gains: Array, behind: Array
) -> tuple[Array, Array]:
    """Fills `behind` (n, lasts) with u2 - u3, `gains` (rows, cuts, lasts) with its sums over B.

    `further` (lasts,) is what the last exit costs beyond the second. Returns (rows, lasts) the least that an option of
    a row comes to, were those left behind the cheapest that they can be, and (lasts,) by how much sums in float32 may
    be too high.
    """
    n, rows = behind.shape[0], gains.shape[0]
    values, below = np.empty(behind.shape), np.empty(behind.shape)
    total, mass = np.zeros(lasts.size), np.zeros(lasts.size)
    for i in range(n):
        for r in range(lasts.size):
            values[i, r] = -further[r] - slope * (added[h2, i] - added[lasts[r], i])
            below[i, r] = min(0.0, values[i, r])
            behind[i, r] = values[i, r]
            total[r] += below[i, r]
            mass[r] += abs(values[i, r])
    sums, saved = np.empty(gains.shape), np.empty(gains.shape)
    summed_for_all(field.levels[h2], field.cuts[h2], values, sums)
    summed_for_all(field.levels[h2], field.cuts[h2], below, saved)
    lows = np.full((rows, lasts.size), INFINITE)
    for s in range(rows):
        for k in range(CUTS):
            for r in range(lasts.size):
                gains[s, k, r] = sums[s, k, r]
                if k < field.cuts[h2, s]:
                    lows[s, r] = min(lows[s, r], sums[s, k, r] + total[r] - saved[s, k, r])
    return lows, mass * (n + 2 * CUTS) * 2.0**-24


@njit(cache=True, nogil=True)
def bound_second(
    h2: int,
    firsts: Array,
    lasts: Array,
    costs: Array,
    alive: Array,
    limit: float,
    slope: float,
    added: Array,
    field: Field,
    coefficients: Array,
    least: Array,
) -> None:
    """Lower bounds `least` (firsts, lasts) on cost - slope * mIoU of all plans with this second head, where `alive`.

    `costs` (3, firsts, lasts): what an image costs that leaves at each exit; `added` (heads, n) what it adds to mIoU by
    `coefficients`. Bounds above `limit` may be less close.
    """
    n = added.shape[1]
    least[:] = INFINITE
    if not alive.any():
        return
    further = np.zeros(lasts.size)
    for a in range(firsts.size):
        for r in range(lasts.size):
            if alive[a, r]:
                further[r] = costs[2, a, r] - costs[1, a, r]
    gains = np.empty((field.cuts.shape[1], CUTS, lasts.size), np.float32)
    behind = np.empty((n, lasts.size), np.float32)
    lows, error = gains_of(h2, lasts, further, slope, added, field, gains, behind)
    column, alone = np.empty(n), np.empty(gains.shape[:2])
    for a in range(firsts.size):
        if not alive[a].any():
            continue
        step = (costs[1, a] - costs[0, a])[alive[a]][0]
        for i in range(n):
            column[i] = -step - slope * (added[firsts[a], i] - added[h2, i])
        summed(field.levels[firsts[a]], field.cuts[firsts[a]], column, alone)
        cheapest = alone.min()
        others = np.empty(lasts.size)  # of what a plan comes to: all that its options do not change
        for r in range(lasts.size):
            spans = field.spans[:, firsts[a], h2] + field.spans[:, h2, lasts[r]]
            most = most_miou(lasts[r], spans, field, coefficients)
            others[r] = n * costs[2, a, r] - slope * most - error[r]
            if alive[a, r]:
                least[a, r] = others[r] + cheapest + lows[:, r].min()
        close = np.flatnonzero(alive[a] & (least[a] <= limit))
        if close.size:
            found = np.empty(close.size)
            some = np.ascontiguousarray(gains[:, :, close]), lows[:, close], np.ascontiguousarray(behind[:, close])
            bound_pair(firsts[a], h2, alone, limit - others[close], *some, field, found)
            least[a][close] = others[close] + found


@njit(cache=True)
def most_miou(last: int, spans: Array, field: Field, coefficients: Array) -> float:
    """What the `last` head adds for all images, and the remainder in the box that `spans` (2, 2 * classes) lie about
    it."""
    low, high, linear = np.empty(coefficients.size), np.empty(coefficients.size), 0.0
    for k in range(coefficients.size):
        total = field.totals[last, k]
        linear += total * coefficients[k]
        high[k] = total + spans[0, k]
        low[k] = max(0.0, total - spans[1, k])
    return float(linear + remainder(low, high, field.labelled, coefficients))


@njit(cache=True)
def from_hardest(h: int, field: Field) -> Array:
    """The place of each image (n,), from the one that a head is least sure of, over all rows."""
    levels = np.zeros(field.levels.shape[2], np.int64)
    for t in range(field.levels.shape[1]):
        levels += field.levels[h, t]
    places = np.empty(levels.size, np.int64)
    places[np.argsort(levels, kind="mergesort")] = np.arange(levels.size)
    return places


@njit(cache=True)
def is_easy(places: Array, part: int) -> Array:
    """Whether images, by their `places` from the hardest, may leave where one of this part of the options is taken."""
    n = places.shape[-1]
    return places >= n - n * (2 * part + 1) // (2 * PARTS)


@njit(cache=True)
def parts_of_options(h: int, field: Field) -> Array:
    """Which of PARTS each option (rows, cuts) of a head is in, by how many images leave; -1 where there is none."""
    rows, n = field.levels.shape[1:]
    found = np.full((rows, CUTS), -1)
    for t in range(rows):
        for j in range(field.cuts[h, t]):
            found[t, j] = min(PARTS * (field.levels[h, t] > j).sum() // n, PARTS - 1)
    return found


@njit(cache=True)
def best_before(
    firsts: Array, h2: int, entering: Array, values: Array, behind: Array, slope: float, added: Array, field: Field
) -> tuple[Array, Array]:
    """What the options of a second head come to up to the third, with the best of each first head's.

    `entering` (firsts,) is what the second head's exit costs beyond the first's (infinite: no plan has it), `values`
    (n, thirds) u2 - u3, `behind` (n, thirds) the same and what leaving at the first saves further on. Returns (firsts,
    rows, cuts, thirds), and (firsts,) the sums of |u1 - u2|.
    """
    (n, thirds), rows = values.shape, field.cuts.shape[1]
    levels, cuts = field.levels[h2], field.cuts[h2]
    gains, alone = np.empty((rows, CUTS, thirds)), np.empty((rows, CUTS))
    summed_for_all(levels, cuts, values, gains)
    found = np.full((firsts.size, rows, CUTS, thirds), np.float32(INFINITE))
    mass = np.zeros(firsts.size)
    order, ends = np.empty(n, np.int64), np.empty(CUTS + 2, np.int64)
    column, least = np.empty(n), np.empty((CUTS, thirds), np.float32)
    passed = np.empty((rows, n), np.uint8)  # cuts that an image does not pass at the first head, from the largest
    options = np.empty((rows, CUTS, thirds), np.float32)
    for a in range(firsts.size):
        if entering[a] == INFINITE:
            continue
        for i in range(n):
            column[i] = -entering[a] - slope * (added[firsts[a], i] - added[h2, i])
            mass[a] += abs(column[i])
        summed(field.levels[firsts[a]], field.cuts[firsts[a]], column, alone)
        options[:] = INFINITE
        for t in range(rows):
            count = field.cuts[firsts[a], t]
            passed[t] = count - field.levels[firsts[a], t]
            for j in range(count):
                options[t, count - 1 - j] = alone[t, j]
        for s in range(rows):
            in_falling_order(cuts[s] - levels[s], order, ends)
            least[:] = INFINITE
            for t in range(rows):
                if field.cuts[firsts[a], t]:
                    least_of_rows(order, ends, cuts[s], passed[t], options[t], behind, least)
            for k in range(cuts[s]):
                for c in range(thirds):
                    found[a, s, k, c] = gains[s, k, c] + least[cuts[s] - 1 - k, c]
    return found, mass


@njit(cache=True)
def best_after(
    h2: int, h3: int, values: Array, saving: Array, easy: Array, among: Array, field: Field, found: Array
) -> None:
    """What the options of a second head come to from the third on, with the best of some of the third's.

    `values` (n, lasts) are u3 - u4, `saving` (n,) what leaving at the first head saves of them where an image is not
    `easy` (n,). `among` (rows, cuts) are the third head's options to be looked at; fills `found` (rows, cuts, lasts).
    """
    (n, lasts), rows = values.shape, field.cuts.shape[1]
    nowhere, third, second = np.empty((n, lasts)), np.empty((n, lasts)), np.empty((n, lasts))
    fixed = np.zeros(lasts)
    for i in range(n):
        saved = 0.0 if easy[i] else saving[i]
        for r in range(lasts):
            x = values[i, r]
            nowhere[i, r] = min(0.0, x - saved)
            leaving = min(x, x - saved)
            third[i, r] = leaving - nowhere[i, r]
            second[i, r] = x - leaving
            fixed[r] += nowhere[i, r]
    sums, behind = np.empty((rows, CUTS, lasts)), third.astype(np.float32)
    summed_for_all(field.levels[h3], field.cuts[h3], third, sums)
    gains, levels = np.full((rows, CUTS, lasts), np.float32(INFINITE)), np.empty((rows, n), np.int64)
    widths = np.zeros(rows, np.int64)
    for v in range(rows):  # its options among them are neighbours: the others need no place
        cuts = np.flatnonzero(among[v])
        if cuts.size:
            levels[v] = np.minimum(np.maximum(field.levels[h3, v], cuts[0]), cuts[-1] + 1) - cuts[0]
            gains[v, : cuts.size] = sums[v, cuts[0] : cuts[-1] + 1]
            widths[v] = -(-cuts.size // 4) * 4
    summed_for_all(field.levels[h2], field.cuts[h2], second, sums)
    order, ends = np.empty(n, np.int64), np.empty(CUTS + 2, np.int64)
    found[:] = INFINITE
    for s in range(rows):
        in_falling_order(field.levels[h2, s], order, ends)
        for v in range(rows):
            if widths[v]:
                some = gains[v, : widths[v]]
                least_of_rows(order, ends, field.cuts[h2, s], levels[v], some, behind, found[s])
        for k in range(field.cuts[h2, s]):
            for r in range(lasts):
                found[s, k, r] += fixed[r] + sums[s, k, r]


@njit(cache=True, nogil=True)
def bound_second_of_three(
    h2: int,
    firsts: Array,
    thirds: Array,
    lasts: Array,
    costs: Array,
    alive: Array,
    limit: float,
    slope: float,
    added: Array,
    field: Field,
    coefficients: Array,
    least: Array,
) -> None:
    """As `bound_second` for plans with three early heads: `costs` (4, firsts, thirds, lasts), `alive` and `least`
    (firsts, thirds, lasts)."""
    n, rows = added.shape[1], field.cuts.shape[1]
    least[:] = INFINITE
    if not alive.any():
        return
    entering, further = np.full(firsts.size, INFINITE), np.zeros((2, max(thirds.size, lasts.size)))
    widest, ends = np.zeros((2, coefficients.size)), np.zeros(lasts.size, np.bool_)
    for a, c, r in np.ndindex(alive.shape):
        if alive[a, c, r]:
            entering[a] = costs[1, a, c, r] - costs[0, a, c, r]
            further[0, c] = costs[2, a, c, r] - costs[1, a, c, r]
            further[1, r] = costs[3, a, c, r] - costs[2, a, c, r]
            widest = np.maximum(widest, field.spans[:, firsts[a], h2])
            ends[r] = True
    totals = np.full(lasts.size, INFINITE)  # what all images come to beyond the third head, but for what that adds
    for r in np.flatnonzero(ends):
        totals[r] = n * further[1, r] - slope * added[lasts[r]].sum()
    cheapest = totals.argmin()
    values, saving = np.empty((n, thirds.size)), np.empty((n, thirds.size))
    mass, entered = np.zeros((thirds.size, lasts.size)), np.empty(0)
    for i in range(n):
        typical = slope * added[lasts[cheapest], i] - further[1, cheapest]
        for c in range(thirds.size):
            values[i, c] = -further[0, c] - slope * (added[h2, i] - added[thirds[c], i])
            saving[i, c] = typical - slope * added[thirds[c], i]
            for r in range(lasts.size):
                step = further[1, r] + slope * (added[thirds[c], i] - added[lasts[r], i])
                mass[c, r] += 2 * abs(values[i, c]) + 6 * abs(saving[i, c]) + 4 * abs(step)
    places, parts = np.empty((thirds.size, n), np.int64), np.empty((thirds.size, rows, CUTS), np.int64)
    for c in range(thirds.size):
        places[c], parts[c] = from_hardest(thirds[c], field), parts_of_options(thirds[c], field)
    best = np.full(alive.shape, np.float32(INFINITE))
    steps, after = np.empty((n, lasts.size)), np.empty((rows, CUTS, lasts.size), np.float32)
    behind = np.empty(values.shape, np.float32)
    for part in range(PARTS):
        easy = is_easy(places, part)
        for i in range(n):
            for c in range(thirds.size):
                behind[i, c] = values[i, c] + (0.0 if easy[c, i] else saving[i, c])
        before, entered = best_before(firsts, h2, entering, values, behind, slope, added, field)
        for c in range(thirds.size):
            if not alive[:, c].any():
                continue
            for i in range(n):
                for r in range(lasts.size):
                    steps[i, r] = -further[1, r] - slope * (added[thirds[c], i] - added[lasts[r], i])
            best_after(h2, thirds[c], steps, saving[:, c], easy[c], parts[c] == part, field, after)
            for a in range(firsts.size):
                for s in range(rows):
                    for k in range(field.cuts[h2, s]):
                        for r in range(lasts.size):
                            best[a, c, r] = min(best[a, c, r], before[a, s, k, c] + after[s, k, r])
    for c in range(thirds.size):
        for r in range(lasts.size):
            spans = field.spans[:, h2, thirds[c]] + field.spans[:, thirds[c], lasts[r]]
            most = most_miou(lasts[r], widest + spans, field, coefficients)
            for a in range(firsts.size):
                if not alive[a, c, r]:
                    continue
                error = (entered[a] + mass[c, r]) * (n + 4 * CUTS) * 2.0**-24
                others = n * costs[3, a, c, r] + best[a, c, r] - error
                least[a, c, r] = others - slope * most
                if least[a, c, r] <= limit:
                    narrower = spans + field.spans[:, firsts[a], h2]
                    least[a, c, r] = others - slope * most_miou(lasts[r], narrower, field, coefficients)


@njit(cache=True)
def mean_iou(sums: Array, labelled: Array) -> float:
    """mIoU in percent, added up class by class as `statistics.miou` does, to the same last bit."""
    classes = labelled.size
    total = 0.0
    for k in range(classes):
        total += sums[k] / (sums[classes + k] + labelled[k])
    return float(100.0 * (total / classes))


@njit(cache=True)
def percentile_cost(costs: Array, at: Array, rank: int) -> int:
    """The smallest of the costs that at least `rank` images do not exceed; `at` counts those that pay each."""
    found = -1
    for a in range(at.size):
        within = 0
        for b in range(at.size):
            if costs[b] <= costs[a]:
                within += at[b]
        if at[a] and within >= rank and (found < 0 or costs[a] < found):
            found = costs[a]
    return found


@njit(cache=True)
def keeps(costs: Array, at: Array, wanted: Wanted) -> bool:
    """Whether a plan that sends `at` (4,) images to its exits, at `costs` (q, 4) each, keeps the bounds."""
    for q in range(costs.shape[0]):
        total = 0
        for e in range(at.size):
            total += costs[q, e] * at[e]
        if total > wanted.bounds[q]:
            return False
    rank = -(-wanted.percentile[0] * at.sum() // 100)
    return percentile_cost(costs[0], at, rank) <= wanted.percentile[1]


@njit(cache=True)
def is_before(goal: int, miou: float, chain: Array, options: Array, field: Field, found: Array) -> bool:
    """Whether a plan comes before the one found: by objective, mIoU, the texts of rows, then those of cuts.

    `options` (3, 2) are row and cut at each early head of the `chain` (4,).
    """
    if found[2] < 0:
        return True
    if goal != found[0]:
        return goal < found[0]
    if miou != found[1]:
        return miou > found[1]
    for cuts in range(2):
        for e in range(3):
            mine, other = options[e], found[2 + 2 * e : 4 + 2 * e].astype(np.int64)
            a = field.ranks[chain[e], mine[0], cuts * (mine[1] + 1)]
            b = field.ranks[chain[e], other[0], cuts * (other[1] + 1)]
            if a != b:
                return bool(a < b)
    return False


@njit(cache=True)
def scores_of(h: int, last: int, field: Field) -> Array:
    """The scores (n, 2 * classes) of a head; of none those of the last."""
    return field.scores[last if h == field.scores.shape[0] else h]


@njit(cache=True)
def steps_of(chain: Array, prices: Array, slope: float, field: Field, steps: Array) -> float:
    """Fills `steps` (3, n) with u1 - u2, u2 - u3, u3 - u4 by an envelope for this chain alone; returns sum(u4) less
    what mIoU may exceed the envelope by."""
    last = field.scores[chain[3]]
    n, columns = last.shape
    low, high, coefficients = np.zeros(columns), np.zeros(columns), np.empty(columns)
    one, two = scores_of(chain[0], chain[3], field), scores_of(chain[1], chain[3], field)
    three = scores_of(chain[2], chain[3], field)
    for i in range(n):
        for k in range(columns):
            low[k] += min(min(one[i, k], two[i, k]), min(three[i, k], last[i, k]))
            high[k] += max(max(one[i, k], two[i, k]), max(three[i, k], last[i, k]))
    envelope(low, high, field.totals[chain[3]], field.labelled, coefficients)
    added = np.empty((4, n))
    for e in range(4):
        additions(scores_of(chain[e], chain[3], field), coefficients, added[e])
    for e in range(3):
        for i in range(n):
            steps[e, i] = prices[e] - prices[e + 1] - slope * (added[e, i] - added[e + 1, i])
    return float(n * prices[3] - slope * (added[3].sum() + remainder(low, high, field.labelled, coefficients)))


@njit(cache=True)
def lows_of_rows(chain: Array, steps: Array, alone: Array, field: Field) -> Array:
    """What any options of three rows come to at least, (rows, rows, rows), infinite where a row has none.

    `alone` (rows, cuts) is what the first head's come to without the others. With one or two early heads it is exact.
    """
    rows, most = alone.shape
    short = chain[0] == field.scores.shape[0]
    n, lows = steps.shape[1], np.full((rows, rows, rows), INFINITE)
    places, parts = from_hardest(chain[2], field), parts_of_options(chain[2], field)
    before, after = np.empty((rows, rows, most)), np.empty((rows, rows, most))
    for part in range(1 if short else PARTS):
        saved, nowhere, leaving, among = np.zeros(n), np.zeros(n), steps[2].copy(), parts >= 0
        if not short:
            among, easy = parts == part, is_easy(places, part)
            for i in range(n):
                if easy[i]:
                    nowhere[i] = min(steps[2, i], 0.0)
                else:
                    saved[i], leaving[i] = steps[2, i], min(steps[2, i], 0.0)
        up_to_third(chain, steps, saved, alone, field, before)
        from_third(chain, steps[2], nowhere, leaving, among, field, after)
        for t in range(rows):
            for s in range(rows):
                for v in range(rows):
                    for k in range(field.cuts[chain[1], s]):
                        lows[t, s, v] = min(lows[t, s, v], before[t, s, k] + after[s, v, k])
    return lows


@njit(cache=True)
def up_to_third(chain: Array, steps: Array, saved: Array, alone: Array, field: Field, before: Array) -> None:
    """Fills `before` (rows, rows, cuts): what options of the second head come to up to the third with the best of each
    row of the first, when who leaves at the first alone also adds what it has `saved` (n,)."""
    one, two, cuts1, cuts2 = field.levels[chain[0]], field.levels[chain[1]], field.cuts[chain[0]], field.cuts[chain[1]]
    rows, most = alone.shape
    table, sums = np.empty((most + 1, most + 1)), np.empty((rows, most))
    summed(two, cuts2, saved, sums)
    both = steps[1] + saved
    whole = both.sum()
    before[:] = INFINITE
    for s in range(rows):
        for t in range(rows):
            if not cuts1[t] or not cuts2[s]:
                continue
            staying(one[t], two[s], both, table)
            for k in range(cuts2[s]):
                fixed = whole - sums[s, k]
                for j in range(cuts1[t]):
                    before[t, s, k] = min(before[t, s, k], fixed + alone[t, j] - table[j, k])


@njit(cache=True)
def from_third(
    chain: Array, values: Array, nowhere: Array, leaving: Array, among: Array, field: Field, after: Array
) -> None:
    """Fills `after` (rows, rows, cuts): what options of the second head come to from the third on, with the best in
    each row of those `among` (rows, cuts) the third's.

    An image adds its `values` (n,) where it leaves at the second head, else `leaving` at the third or `nowhere`.
    """
    two, three, cuts2, cuts3 = (
        field.levels[chain[1]],
        field.levels[chain[2]],
        field.cuts[chain[1]],
        field.cuts[chain[2]],
    )
    rows, most = among.shape
    table, sums = np.empty((most + 1, most + 1)), np.empty((rows, most))
    summed(two, cuts2, values - leaving, sums)
    apart, whole = leaving - nowhere, leaving.sum()
    after[:] = INFINITE
    for s in range(rows):
        for v in range(rows):
            if not cuts2[s] or not among[v].any():
                continue
            staying(two[s], three[v], apart, table)
            for k in range(cuts2[s]):
                stay = -INFINITE
                for m in range(cuts3[v]):
                    if among[v, m]:
                        stay = max(stay, table[k, m])
                after[s, v, k] = whole + sums[s, k] - stay


@njit(cache=True, nogil=True)
def least_of_chains(chains: Array, prices: Array, slope: float, field: Field) -> Array:
    """Lower bounds (m,) on price - slope * mIoU of all plans of each of `chains` (m, 4), with `prices` (m, 4)."""
    least, (rows, n) = np.empty(chains.shape[0]), field.levels.shape[1:]
    for m in range(chains.shape[0]):
        steps, alone = np.empty((3, n)), np.empty((rows, CUTS))
        base = steps_of(chains[m], prices[m], slope, field, steps)
        summed(field.levels[chains[m, 0]], field.cuts[chains[m, 0]], steps[0], alone)
        least[m] = base + lows_of_rows(chains[m], steps, alone, field).min()
    return least


@njit(cache=True)
def settle(
    chain: Array, prices: Array, limit: float, slope: float, costs: Array, wanted: Wanted, field: Field, found: Array
) -> int:
    """The best plan of one chain of heads (4,), exactly; returns how many plans were evaluated.

    An image that leaves at an exit is priced `prices` (4,) and costs `costs` (q, 4). Plans with price - slope * mIoU
    above `limit` are passed over. Of those that keep what is `wanted` the best is least in the objective, greatest in
    mIoU, first by `ranks`. Fills `found` (8,): objective, mIoU, row and cut at each early head.
    """
    rows, n = field.levels.shape[1:]
    steps, alone = np.empty((3, n)), np.empty((rows, CUTS))
    base = steps_of(chain, prices, slope, field, steps)
    summed(field.levels[chain[0]], field.cuts[chain[0]], steps[0], alone)
    lows = base + lows_of_rows(chain, steps, alone, field)
    by_bound = np.argsort(lows.reshape(-1))
    all_two, all_three = steps[1].sum(), steps[2].sum()
    evaluated = 0
    for at in by_bound:
        t, s, v = at // rows**2, at // rows % rows, at % rows
        if lows[t, s, v] > limit or lows[t, s, v] == INFINITE:
            break
        one, two, three = field.levels[chain[0], t], field.levels[chain[1], s], field.levels[chain[2], v]
        cuts = field.cuts[chain[0], t], field.cuts[chain[1], s], field.cuts[chain[2], v]
        pairs = np.empty((cuts[0] + 1, cuts[1] + 1))
        staying(one, two, steps[1], pairs)
        table = np.empty((cuts[0] + 1, cuts[1] + 1, cuts[2] + 1))
        staying_of_three(one, two, three, steps[2], table)
        fixed = base + all_two + all_three
        for j in range(cuts[0]):
            chosen, some = np.zeros((cuts[1], cuts[2]), np.bool_), False
            for k in range(cuts[1]):
                least = fixed + alone[t, j] - pairs[j, k]
                if least - table[j, k, : cuts[2]].max() <= limit:
                    chosen[k] = least - table[j, k, : cuts[2]] <= limit
                    some = True
            if some:
                evaluated += settle_rows(chain, (t, s, v), j, chosen, costs, wanted, field, found)
    return evaluated


@njit(cache=True)
def settle_rows(
    chain: Array,
    rows: tuple[int, int, int],
    j: int,
    chosen: Array,
    costs: Array,
    wanted: Wanted,
    field: Field,
    found: Array,
) -> int:
    """The `chosen` (cuts, cuts) plans of three rows, with cut `j` at the first head."""
    t, s, v = rows
    last = field.scores[chain[3]]
    first, second = scores_of(chain[0], chain[3], field), scores_of(chain[1], chain[3], field)
    third = scores_of(chain[2], chain[3], field)
    n, columns = last.shape
    cuts2, cuts3 = chosen.shape
    leaving = np.zeros((cuts2 + 1, columns))  # at the second exit, by level, against the last
    stepping = np.zeros((cuts2 + 1, cuts3 + 1, columns))  # at the third, by both levels
    gone, fixed = 0, field.totals[chain[3]].copy()  # at the first
    ones = np.zeros(cuts2 + 1, np.int64)
    twos = np.zeros((cuts2 + 1, cuts3 + 1), np.int64)
    for i in range(n):
        if field.levels[chain[0], t, i] > j:
            gone += 1
            for c in range(columns):
                fixed[c] += first[i, c] - last[i, c]
            continue
        a, b = field.levels[chain[1], s, i], field.levels[chain[2], v, i]
        ones[a] += 1
        twos[a, b] += 1
        for c in range(columns):
            leaving[a, c] += second[i, c] - last[i, c]
            stepping[a, b, c] += third[i, c] - last[i, c]
    for k in range(cuts2 - 1, -1, -1):
        ones[k] += ones[k + 1]
        leaving[k] += leaving[k + 1]
    for k in range(cuts2 + 1):  # those of level k or less at the second, more than m at the third
        for m in range(cuts3 - 1, -1, -1):
            twos[k, m] += twos[k, m + 1]
            stepping[k, m] += stepping[k, m + 1]
        if k:
            twos[k] += twos[k - 1]
            stepping[k] += stepping[k - 1]
    sums, at = np.empty(columns), np.empty(4, np.int64)
    options = np.array([[t, j], [s, 0], [v, 0]])
    evaluated = 0
    for k in range(cuts2):
        for m in range(cuts3):
            if not chosen[k, m]:
                continue
            evaluated += 1
            at[0], at[1], at[2] = gone, ones[k + 1], twos[k, m + 1]
            at[3] = n - at[0] - at[1] - at[2]
            if not keeps(costs, at, wanted):
                continue
            for c in range(columns):
                sums[c] = fixed[c] + leaving[k + 1, c] + stepping[k, m + 1, c]
            miou = mean_iou(sums, field.labelled)
            goal = 0
            for e in range(4):
                goal += costs[wanted.objective, e] * at[e] if wanted.objective >= 0 else 0
            options[1, 1], options[2, 1] = k, m
            if miou >= wanted.floor and is_before(goal, miou, chain, options, field, found):
                found[0], found[1] = goal, miou
                found[2:8] = options.reshape(-1)
    return evaluated


@njit(cache=True, nogil=True)
def settle_all(
    chains: Array, prices: Array, limit: float, slope: float, costs: Array, wanted: Wanted, field: Field
) -> tuple[Array, Array]:
    """`settle` of each of `chains` (m, 4), with `prices` (m, 4) and `costs` (m, q, 4).

    Returns what was found (m, 8), with row -1 where there is nothing, and the evaluated plans (m,).
    """
    found = np.full((chains.shape[0], 8), -1.0)
    evaluated = np.zeros(chains.shape[0], np.int64)
    for m in range(chains.shape[0]):
        evaluated[m] = settle(chains[m], prices[m], limit, slope, costs[m], wanted, field, found[m])
    return found, evaluated
