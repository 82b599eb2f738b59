"""The compiled part of branch and bound: admissible bounds on groups of plans, and one chain of heads to the end.

A plan with two early heads sends A to the first, B less A to the second, and the rest to the last. With `u` what an
image costs at an exit less `slope` times what it adds to (a linear bound on) mIoU, a plan comes to

    sum(u3) + sum over B of (u2 - u3) + sum over A of (u1 - u2) + sum over A less B of (u2 - u3)

The first two terms need the last two heads, the third the first two, and the last, in which few images are, takes the
smallest u2 - u3 of any last head of the group: so every pair of heads is looked at once, and a triple costs one
minimum over the second head's options.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from mess_compile.search.space import CUTS

Array = Any
INFINITE = np.inf
KNOTS = 5
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


@njit(cache=True)
def joined(
    first: Array,
    first_cuts: Array,
    second: Array,
    second_cuts: Array,
    alone: Array,
    behind: Array,
    knots: Array,
    out: Array,
) -> None:
    """For each option of the second head the least of any option of the first: its `alone` (rows, cuts) and what it
    leaves `behind` (n,), summed over the images that leave at the first and would not at the second, each of which
    costs one of `knots` (q,) more. Fills `out` (q, rows, cuts)."""
    most = alone.shape[1]
    table, count = np.empty((most + 1, most + 1)), np.empty((most + 1, most + 1))
    ones = np.ones(behind.size)
    out[:] = INFINITE
    for t in range(first.shape[0]):
        for s in range(second.shape[0]):
            if first_cuts[t] and second_cuts[s]:
                left_behind(first[t], second[s], behind, table)
                left_behind(first[t], second[s], ones, count)
                for q in range(knots.size):
                    for j in range(first_cuts[t]):
                        for k in range(most):
                            found = alone[t, j] + table[j + 1, k] + knots[q] * count[j + 1, k]
                            out[q, s, k] = min(out[q, s, k], found)


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


@njit(cache=True, parallel=True)
def gains_of(seconds: Array, costs: Array, slope: float, added: Array, last: Array, field: Field) -> Array:
    """Sums of u2 - u3 over the images that each option of the second heads sends away, (seconds, rows, cuts, lasts).

    `costs` (seconds, lasts) is what the last exit costs beyond the second, `added` (heads, n) what images add to mIoU,
    `last` (n, lasts) the same of the last heads.
    """
    found = np.empty((seconds.size, field.levels.shape[1], CUTS, last.shape[1]))
    for s in prange(seconds.size):
        h2 = seconds[s]
        values = np.empty(last.shape)
        for i in range(last.shape[0]):
            for r in range(last.shape[1]):
                values[i, r] = -costs[s, r] - slope * (added[h2, i] - last[i, r])
        summed_for_all(field.levels[h2], field.cuts[h2], values, found[s])
    return found


@njit(cache=True)
def bound_pair(
    h1: int,
    h2: int,
    lasts: Array,
    alive: Array,
    costs: Array,
    slope: float,
    added: Array,
    usual: Array,
    offsets: Array,
    gains: Array,
    field: Field,
    coefficients: Array,
    least: Array,
) -> None:
    """Lower bounds `least` (lasts,) on cost - slope * mIoU of all plans with these early heads, where `alive` (lasts,).

    `costs` (3, lasts): what an image costs that leaves at each exit; `added` (heads, n) what it adds to mIoU at each
    head by `coefficients`, which at none of `lasts` is less than `usual` (n,) and that head's of `offsets`; `gains`
    (rows, cuts, lasts) of `gains_of`.

    What images left behind would cost more at a last head than usual is one number for all of them, and the least of
    functions linear in it is concave: it is computed at a few knots, and lies above the chords between.
    """
    n, levels, cuts, totals, spans = added.shape[1], field.levels, field.cuts, field.totals, field.spans
    rows = levels.shape[1]
    step, lowest, highest = 0.0, INFINITE, -INFINITE
    extra = np.empty(lasts.size)
    for r in range(lasts.size):
        if alive[r]:
            step = costs[1, r] - costs[0, r]
            extra[r] = costs[1, r] - costs[2, r] + slope * offsets[r]
            lowest, highest = min(lowest, extra[r]), max(highest, extra[r])
    knots = np.linspace(lowest, highest, KNOTS if highest > lowest else 1)
    column, behind = np.empty(n), np.empty(n)
    for i in range(n):
        column[i] = -step - slope * (added[h1, i] - added[h2, i])
        behind[i] = slope * (usual[i] - added[h2, i])
    alone, best = np.empty((rows, CUTS)), np.empty((knots.size, rows, CUTS))
    summed(levels[h1], cuts[h1], column, alone)
    joined(levels[h1], cuts[h1], levels[h2], cuts[h2], alone, behind, knots, best)
    low, high = np.empty(coefficients.size), np.empty(coefficients.size)
    for r in range(lasts.size):
        least[r] = INFINITE
        if not alive[r]:
            continue
        place = (extra[r] - lowest) / (highest - lowest) * (knots.size - 1) if knots.size > 1 else 0.0
        knot = min(int(place), max(knots.size - 2, 0))
        after, share = min(knot + 1, knots.size - 1), place - knot
        for t in range(rows):
            for j in range(cuts[h2, t]):
                chord = (1 - share) * best[knot, t, j] + share * best[after, t, j]
                least[r] = min(least[r], chord + gains[t, j, r])
        h3, linear = lasts[r], 0.0
        for k in range(coefficients.size):
            linear += totals[h3, k] * coefficients[k]
            high[k] = totals[h3, k] + spans[0, h2, h3, k] + spans[0, h1, h2, k]
            low[k] = max(0.0, totals[h3, k] - spans[1, h2, h3, k] - spans[1, h1, h2, k])
        most = linear + remainder(low, high, field.labelled, coefficients)
        least[r] += n * costs[2, r] - slope * most


@njit(cache=True, parallel=True)
def bound_pairs(
    pairs: Array,
    second: Array,
    lasts: Array,
    alive: Array,
    costs: Array,
    slope: float,
    added: Array,
    usual: Array,
    offsets: Array,
    gains: Array,
    field: Field,
    coefficients: Array,
) -> Array:
    """`bound_pair` of `pairs` (m, 2), with `alive` (m, lasts), `costs` (m, 3, lasts); `second` (m,) indexes `gains`."""
    least = np.empty(alive.shape)
    for m in prange(pairs.shape[0]):
        bound_pair(
            pairs[m, 0],
            pairs[m, 1],
            lasts,
            alive[m],
            costs[m],
            slope,
            added,
            usual,
            offsets,
            gains[second[m]],
            field,
            coefficients,
            least[m],
        )
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
    table = np.empty((most + 1, most + 1))
    chosen = np.empty((most, most), np.bool_)
    evaluated = 0
    for t in range(rows):
        for s in range(rows):
            if not cuts1[t] or not cuts2[s]:
                continue
            left_behind(levels1[t], levels2[s], behind, table)
            some = False
            for j in range(cuts1[t]):
                for k in range(cuts2[s]):
                    bound = base + alone[t, j] + gains[s, k] + table[j + 1, k]
                    found[6] = min(found[6], bound)
                    chosen[j, k] = bound <= limit
                    some |= chosen[j, k]
            if some:
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
