"""Sums over the images that leave or stay, and a linear function above mIoU."""

from __future__ import annotations

import numpy as np
from numba import prange

from mess_compile.search.bnb.kernels.compiled import inlined, kernel
from mess_compile.search.bnb.kernels.values import INFINITE, Array, HeadTable


@kernel
def envelope(low: Array, high: Array, near: Array, labelled: Array, coefficients: Array) -> None:
    """A linear function of (intersections, false positives) that lies closely above mIoU in percent in a box.

    I / (L + F) with 1 / (L + F) replaced by its chord is a product of two bounded variables: of its two upper
    envelopes (McCormick, 1976) the one that is lower at `near` is taken, class by class. All are (2 * classes,); the
    function lies above mIoU once `remainder` is added.
    """
    classes = labelled.size
    for right in range(classes):
        wrong = classes + right
        inverse_high = 1.0 / (labelled[right] + low[wrong])
        inverse_low = 1.0 / (labelled[right] + high[wrong])
        if high[wrong] > low[wrong]:
            tilt = (inverse_low - inverse_high) / (high[wrong] - low[wrong])
        else:
            tilt = -inverse_low * inverse_high
        chord = inverse_high + tilt * (near[wrong] - low[wrong])
        by_high = high[right] * chord + inverse_low * near[right] - high[right] * inverse_low
        by_low = low[right] * chord + inverse_high * near[right] - low[right] * inverse_high
        bound, inverse = (high[right], inverse_low) if by_high <= by_low else (low[right], inverse_high)
        coefficients[right] = 100.0 / classes * inverse
        coefficients[wrong] = 100.0 / classes * bound * tilt


@kernel
def remainder(low: Array, high: Array, labelled: Array, coefficients: Array) -> float:
    """The most by which mIoU in percent exceeds the linear function with these coefficients in the box low to high.

    I / (L + F) is linear in I and convex in F, so the maximum of each class is at a corner.
    """
    classes = labelled.size
    total = 0.0
    for right in range(classes):
        wrong = classes + right
        at_high = 100.0 / classes / (labelled[right] + high[wrong])
        at_low = 100.0 / classes / (labelled[right] + low[wrong])
        least, most, weight = low[right], high[right], coefficients[right]
        few = max(least * (at_low - weight), most * (at_low - weight)) - coefficients[wrong] * low[wrong]
        many = max(least * (at_high - weight), most * (at_high - weight)) - coefficients[wrong] * high[wrong]
        total += max(few, many)
    return total


@kernel
def additions(scores: Array, coefficients: Array, out: Array) -> None:
    """What each image adds to the linear function at one head: `scores` (n, 2 * classes) -> `out` (n,)."""
    for image in range(scores.shape[0]):
        total = 0.0
        for column in range(scores.shape[1]):
            total += scores[image, column] * coefficients[column]
        out[image] = total


@kernel
def max_miou(last: int, spans: Array, table: HeadTable, coefficients: Array) -> float:
    """What the `last` head adds for all images less its charges, and the remainder in the box that `spans` (2, 2 *
    classes) lie about it."""
    low, high, linear = np.empty(coefficients.size), np.empty(coefficients.size), 0.0
    for column in range(coefficients.size):
        total = table.totals[last, column]
        linear += total * coefficients[column]
        high[column] = total + spans[0, column]
        low[column] = max(0.0, total - spans[1, column])
    return float(linear - table.charge_totals[last] + remainder(low, high, table.labelled, coefficients))


@kernel
def sums_of_leaving(passed: Array, cut_counts: Array, values: Array, out: Array) -> None:
    """Sums of `values` (n,) over the images that leave by each option; `out` (rows, cuts), infinite without option.

    `passed` (rows, n) counts the cuts that an image passes, `cut_counts` (rows,) those that there are.
    """
    most = out.shape[1]
    bins = np.empty(most + 1)
    for row in range(passed.shape[0]):
        bins[:] = 0.0
        for image in range(values.size):
            bins[passed[row, image]] += values[image]
        total = 0.0
        for cut in range(most - 1, -1, -1):
            total += bins[cut + 1]
            out[row, cut] = total if cut < cut_counts[row] else INFINITE


@kernel
def column_sums_of_leaving(passed: Array, cut_counts: Array, values: Array, out: Array) -> None:
    """As `sums_of_leaving` for several columns at once: `values` (n, columns), `out` (rows, cuts, columns)."""
    most, columns = out.shape[1], values.shape[1]
    bins = np.empty((most + 1, columns))
    for row in range(passed.shape[0]):
        bins[:] = 0.0
        for image in range(values.shape[0]):
            own = bins[passed[row, image]]
            for column in range(columns):
                own[column] += values[image, column]
        for cut in range(most - 1, -1, -1):
            for column in range(columns):
                bins[cut, column] += bins[cut + 1, column]
                out[row, cut, column] = bins[cut + 1, column] if cut < cut_counts[row] else INFINITE


@kernel
def sums_of_staying(first: Array, second: Array, values: Array, sums: Array) -> None:
    """Sums of `values` (n,) over the images that pass neither a cut of one row nor a cut of another.

    `first`, `second` (n,) count the cuts that images pass in these rows; fills `sums` (cuts + 1, cuts + 1).
    """
    sums[:] = 0.0
    for image in range(values.size):
        sums[first[image], second[image]] += values[image]
    for cut1 in range(sums.shape[0]):
        total = 0.0
        for cut2 in range(sums.shape[1]):
            total += sums[cut1, cut2]
            sums[cut1, cut2] = total
        if cut1:
            sums[cut1] += sums[cut1 - 1]


@inlined
def sums_of_staying_at_three(first: Array, second: Array, third: Array, values: Array, sums: Array) -> None:
    """As `sums_of_staying` for three rows; fills `sums` (cuts + 1, cuts + 1, cuts + 1)."""
    sums[:] = 0.0
    for image in range(values.size):
        line = sums[first[image], second[image]]
        for cut3 in range(third[image], line.size):
            line[cut3] += values[image]
    for cut1 in range(sums.shape[0]):
        for cut2 in range(1, sums.shape[1]):
            sums[cut1, cut2] += sums[cut1, cut2 - 1]
        if cut1:
            sums[cut1] += sums[cut1 - 1]


@kernel(parallel=True)
def differences(scores: Array, later: Array) -> Array:
    """How far each head may exceed each later one in a sum over any images, and fall short of it.

    `scores` (heads, n, 2 * classes), `later` (heads, heads); returns (2, heads, heads, 2 * classes).
    """
    heads, n, columns = scores.shape
    found = np.zeros((2, heads, heads, columns))
    for one in prange(heads):
        for other in range(heads):
            if later[one, other]:
                for image in range(n):
                    for column in range(columns):
                        more = scores[one, image, column] - scores[other, image, column]
                        found[0, one, other, column] += max(more, 0)
                        found[1, one, other, column] += max(-more, 0)
    return found


@kernel
def order_by_cuts_passed(passed: Array, order: Array, ends: Array) -> None:
    """Fills `order` (n,) with the images by falling number of cuts passed; the first `ends[k]` (cuts + 2,) of them pass
    k or more."""
    ends[:] = 0
    for count in passed:
        ends[count] += 1
    for count in range(ends.size - 2, -1, -1):
        ends[count] += ends[count + 1]
    place = ends[1:].copy()
    for image in range(passed.size):
        order[place[passed[image]]] = image
        place[passed[image]] += 1
