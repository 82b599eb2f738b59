"""The compiled part of branch and bound: admissible bounds on groups of plans, and one chain of heads to the end.

A plan with two early heads sends A to the first, B less A to the second, and the rest to the last. With `u` what an
image costs at an exit less `slope` times what it adds to (a linear bound on) mIoU, a plan comes to

    sum(u3) + sum over B of (u2 - u3) + sum over A of (u1 - u2) + sum over A less B of (u2 - u3)

The first two terms need the last two heads, the third the first two, and the last all three. With only the negative
u2 - u3 in it, of whatever does not leave at the second head, it needs the last two as well: that bounds a triple by
two minima. Where this is too little, the sums over A less B are taken for all last heads of a pair at once.

All of it is one file, because numba's cache would not notice a change to what a function calls in another.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from mess_compile.search.space import CUTS

Array = Any
INFINITE = np.inf
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait would spin, and starve those they wait for


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
def left_behind(first: Array, second: Array, values: Array, table: Array) -> None:
    """Sums over the images that a cut of the first row sends away and one of the second does not.

    `first`, `second` (n,) are levels in one row each, `values` (n,); fills `table` (cuts + 1, cuts + 1): the sum for
    cuts j and k is table[j + 1, k].
    """
    table[:] = 0.0
    most = table.shape[0] - 1
    for i in range(values.size):
        table[first[i], second[i]] += values[i]
    for j in range(most - 1, -1, -1):
        for k in range(most + 1):
            table[j, k] += table[j + 1, k]
    for j in range(1, most + 1):
        total = 0.0
        for k in range(most + 1):
            total += table[j, k]
            table[j, k] = total


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
    order: Array, ends: Array, alone: Array, cuts1: int, levels: Array, gains: Array, behind: Array, least: Array
) -> None:
    """Lowers `least` (lasts,) to what options of one row at the first head and one at the second come to at least.

    The images by falling level at the first head are `order`, with `ends`; its `alone` (cuts,) is what an option
    comes to without the second. `levels` (n,) and `gains` (cuts, lasts) are the second's, `behind` (n, lasts) what an
    image adds that leaves at the first head and would not at the second.
    """
    lasts = behind.shape[1]
    columns = np.zeros((CUTS + 1, lasts), np.float32)  # of what leaves at the first head, by level at the second
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
        for k in range(0, CUTS, 4):  # by fours: what is added up stays in registers
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
            least[r] = min(least[r], alone[j] + some[r])


@njit(cache=True)
def bound_pair(
    h1: int, h2: int, alone: Array, limits: Array, gains: Array, lows: Array, behind: Array, field: Field, least: Array
) -> None:
    """What any options of two early heads come to at least, for each of some last heads: `least` (lasts,).

    Two rows whose cheapest options come to more than `limits` (lasts,) for every last head are not looked at closer.
    `alone` (rows, cuts) is the first head's, `gains` (rows, cuts, lasts), their `lows` (rows, lasts) and `behind`
    (n, lasts) the second's.
    """
    rows, n = field.cuts.shape[1], behind.shape[0]
    order, ends = np.empty(n, np.int64), np.empty(CUTS + 2, np.int64)
    least[:] = INFINITE
    for t in range(rows):
        if not field.cuts[h1, t]:
            continue
        in_falling_order(field.levels[h1, t], order, ends)
        lowest = alone[t].min()
        for s in range(rows):
            open_ = False
            for r in range(limits.size):
                open_ |= lowest + lows[s, r] <= limits[r]
            if open_:
                least_of_rows(order, ends, alone[t], field.cuts[h1, t], field.levels[h2, s], gains[s], behind, least)
            else:
                for r in range(limits.size):
                    least[r] = min(least[r], lowest + lows[s, r])


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


@njit(cache=True)
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
            most = most_miou(firsts[a], h2, lasts[r], field, coefficients)
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
def most_miou(h1: int, h2: int, h3: int, field: Field, coefficients: Array) -> float:
    """What the last head adds for all images, and the remainder in the box of the three heads."""
    low, high, linear = np.empty(coefficients.size), np.empty(coefficients.size), 0.0
    for k in range(coefficients.size):
        total = field.totals[h3, k]
        linear += total * coefficients[k]
        high[k] = total + field.spans[0, h2, h3, k] + field.spans[0, h1, h2, k]
        low[k] = max(0.0, total - field.spans[1, h2, h3, k] - field.spans[1, h1, h2, k])
    return float(linear + remainder(low, high, field.labelled, coefficients))


@njit(cache=True, parallel=True)
def bound_triples(
    seconds: Array,
    firsts: Array,
    lasts: Array,
    costs: Array,
    alive: Array,
    limit: float,
    slope: float,
    added: Array,
    field: Field,
    coefficients: Array,
) -> Array:
    """`bound_second` for `seconds`, with `costs` (seconds, 3, firsts, lasts), `alive` (seconds, firsts, lasts)."""
    least = np.empty(alive.shape)
    for b in prange(seconds.size):
        bound_second(seconds[b], firsts, lasts, costs[b], alive[b], limit, slope, added, field, coefficients, least[b])
    return least


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
    """The smallest of three costs that at least `rank` images do not exceed; `at` (3,) counts those that pay each."""
    found = -1
    for a in range(3):
        within = 0
        for b in range(3):
            if costs[b] <= costs[a]:
                within += at[b]
        if at[a] and within >= rank and (found < 0 or costs[a] < found):
            found = costs[a]
    return found


@njit(cache=True)
def least_of_second(levels: Array, cuts: Array, behind: Array, gains: Array) -> Array:
    """What options of each row of a second head come to at least, whatever leaves at the first: (rows,).

    `behind` (n,) is u2 - u3 and `gains` (rows, cuts) its sums over what leaves at the second; of the rest only what is
    below 0 can be left behind.
    """
    below = np.minimum(behind, 0.0)
    saved = np.empty(gains.shape)
    summed(levels, cuts, below, saved)
    total, lows = below.sum(), np.full(gains.shape[0], INFINITE)
    for s in range(gains.shape[0]):
        for k in range(cuts[s]):
            lows[s] = min(lows[s], gains[s, k] + total - saved[s, k])
    return lows


@njit(cache=True)
def settle(
    h1: int,
    h2: int,
    h3: int,
    prices: Array,
    limit: float,
    slope: float,
    costs: Array,
    wanted: Wanted,
    field: Field,
    found: Array,
) -> int:
    """The best plan of one triple of heads, exactly; returns how many plans were evaluated.

    An image that leaves at an exit is priced `prices` (3,) and costs `costs` (q, 3). Plans with price - slope * mIoU
    above `limit` are passed over. Of those that keep what is `wanted` the best is least in the objective, greatest in
    mIoU, first by `ranks`. Fills `found` (7,): objective, mIoU, row, cut, row, cut, and the least bound of any plan.
    """
    last = field.scores[h3]
    first, second = field.scores[h1], last if h2 == field.scores.shape[0] else field.scores[h2]
    levels1, levels2, cuts1, cuts2 = field.levels[h1], field.levels[h2], field.cuts[h1], field.cuts[h2]
    (n, columns), rows, most = last.shape, levels1.shape[0], CUTS
    low, high, coefficients = np.zeros(columns), np.zeros(columns), np.empty(columns)
    for i in range(n):
        for k in range(columns):
            low[k] += min(first[i, k], second[i, k], last[i, k])
            high[k] += max(first[i, k], second[i, k], last[i, k])
    envelope(low, high, field.totals[h3], field.labelled, coefficients)
    added = np.empty((3, n))
    additions(first, coefficients, added[0])
    additions(second, coefficients, added[1])
    additions(last, coefficients, added[2])
    column, behind = np.empty(n), np.empty(n)
    base = n * prices[2] - slope * (added[2].sum() + remainder(low, high, field.labelled, coefficients))
    for i in range(n):
        column[i] = prices[0] - prices[1] - slope * (added[0, i] - added[1, i])
        behind[i] = prices[1] - prices[2] - slope * (added[1, i] - added[2, i])
    alone, gains = np.empty((rows, most)), np.empty((rows, most))
    summed(levels1, cuts1, column, alone)
    summed(levels2, cuts2, behind, gains)
    lows = least_of_second(levels2, cuts2, behind, gains)
    table = np.empty((most + 1, most + 1))
    chosen = np.empty((most, most), np.bool_)
    evaluated = 0
    for t in range(rows):
        lowest = base + alone[t].min()
        for s in range(rows):
            low = lowest + lows[s]
            if low >= found[6] and low > limit:  # or there is no cut
                continue
            left_behind(levels1[t], levels2[s], behind, table)
            least = INFINITE
            for j in range(cuts1[t]):
                for k in range(cuts2[s]):
                    bound = base + alone[t, j] + gains[s, k] + table[j + 1, k]
                    least = min(least, bound)
                    chosen[j, k] = bound <= limit
            found[6] = min(found[6], least)
            if least <= limit:
                evaluated += settle_rows(h1, t, h2, s, h3, chosen, costs, wanted, field, found)
    return evaluated


@njit(cache=True)
def settle_rows(
    h1: int, t: int, h2: int, s: int, h3: int, chosen: Array, costs: Array, wanted: Wanted, field: Field, found: Array
) -> int:
    """The `chosen` (cuts, cuts) plans of row `t` at the first head and row `s` at the second."""
    last = field.scores[h3]
    first, second = field.scores[h1], last if h2 == field.scores.shape[0] else field.scores[h2]
    n, columns = last.shape
    cuts1, cuts2 = field.cuts[h1, t], field.cuts[h2, s]
    leaving = np.zeros((cuts1 + 1, columns))  # at the first exit, by level, against the last
    stepping = np.zeros((cuts1 + 1, cuts2 + 1, columns))  # at the second, by both levels
    ones = np.zeros(cuts1 + 1, np.int64)
    twos = np.zeros((cuts1 + 1, cuts2 + 1), np.int64)
    for i in range(n):
        a, b = field.levels[h1, t, i], field.levels[h2, s, i]
        ones[a] += 1
        twos[a, b] += 1
        for k in range(columns):
            leaving[a, k] += first[i, k] - last[i, k]
            stepping[a, b, k] += second[i, k] - last[i, k]
    for j in range(cuts1 - 1, -1, -1):
        ones[j] += ones[j + 1]
        leaving[j] += leaving[j + 1]
    for j in range(cuts1 + 1):  # those of level j or less at the first, more than k at the second
        for k in range(cuts2 - 1, -1, -1):
            twos[j, k] += twos[j, k + 1]
            stepping[j, k] += stepping[j, k + 1]
        if j:
            twos[j] += twos[j - 1]
            stepping[j] += stepping[j - 1]
    sums, at = np.empty(columns), np.empty(3, np.int64)
    evaluated = 0
    for j in range(cuts1):
        for k in range(cuts2):
            if chosen[j, k]:
                evaluated += 1
                at[0], at[1] = ones[j + 1], twos[j, k + 1]
                at[2] = n - at[0] - at[1]
                if keeps(costs, at, wanted):
                    for c in range(columns):
                        sums[c] = field.totals[h3, c] + leaving[j + 1, c] + stepping[j, k + 1, c]
                    miou = mean_iou(sums, field.labelled)
                    goal = 0
                    for e in range(3):
                        goal += costs[wanted.objective, e] * at[e] if wanted.objective >= 0 else 0
                    if miou >= wanted.floor and is_before(
                        goal, miou, t, j, s, k, field.ranks[h1], field.ranks[h2], found
                    ):
                        found[0], found[1], found[2], found[3], found[4], found[5] = goal, miou, t, j, s, k
    return evaluated


@njit(cache=True)
def keeps(costs: Array, at: Array, wanted: Wanted) -> bool:
    """Whether a plan that sends `at` (3,) images to its exits, at `costs` (q, 3) each, keeps the bounds."""
    for q in range(costs.shape[0]):
        if costs[q, 0] * at[0] + costs[q, 1] * at[1] + costs[q, 2] * at[2] > wanted.bounds[q]:
            return False
    rank = -(-wanted.percentile[0] * at.sum() // 100)
    return percentile_cost(costs[0], at, rank) <= wanted.percentile[1]


@njit(cache=True)
def is_before(
    goal: int, miou: float, t: int, j: int, s: int, k: int, ranks1: Array, ranks2: Array, found: Array
) -> bool:
    """Whether a plan comes before the one found: by objective, mIoU, the texts of rows, then those of cuts."""
    if found[2] < 0:
        return True
    if goal != found[0]:
        return goal < found[0]
    if miou != found[1]:
        return miou > found[1]
    u, i, v, m = int(found[2]), int(found[3]), int(found[4]), int(found[5])
    if ranks1[t, 0] != ranks1[u, 0]:
        return ranks1[t, 0] < ranks1[u, 0]
    if ranks2[s, 0] != ranks2[v, 0]:
        return ranks2[s, 0] < ranks2[v, 0]
    if ranks1[t, j + 1] != ranks1[u, i + 1]:
        return ranks1[t, j + 1] < ranks1[u, i + 1]
    return ranks2[s, k + 1] < ranks2[v, m + 1]


@njit(cache=True, parallel=True)
def settle_all(
    triples: Array, prices: Array, limit: float, slope: float, costs: Array, wanted: Wanted, field: Field
) -> tuple[Array, Array]:
    """`settle` of each of `triples` (m, 3), with `prices` (m, 3) and `costs` (m, q, 3).

    Returns what was found (m, 7), with row -1 where there is nothing, and the evaluated plans (m,).
    """
    found = np.full((triples.shape[0], 7), -1.0)
    found[:, 6] = INFINITE
    evaluated = np.zeros(triples.shape[0], np.int64)
    for m in prange(triples.shape[0]):
        h1, h2, h3 = triples[m]
        evaluated[m] = settle(h1, h2, h3, prices[m], limit, slope, costs[m], wanted, field, found[m])
    return found, evaluated
