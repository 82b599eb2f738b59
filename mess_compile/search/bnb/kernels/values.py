"""What kernels are called with: arrays under names."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = Any
INFINITE = np.inf


class HeadTable(NamedTuple):
    """What is known of the heads: `scores` (heads, n, 2 * classes) are intersections and false positives, `totals`
    (heads, 2 * classes) their sums, `spans` the result of `differences`, `labelled` (classes,) pixels.

    `passed` (heads + 1, rows, n) counts the cuts that an image passes at a threshold row, `cut_counts` (heads + 1,
    rows) the cuts that there are, `text_ranks` (heads + 1, rows, cuts + 1) orders rows and cuts as text. The head after
    the last stands for no head.

    `changed` (heads, n) are the shares of an image's pixels that a head labels otherwise than the network itself, in
    integers. Where their sum is bounded, or the IoU of a class, mIoU is charged for what is lost: `charges` (heads, n)
    in pp, `charge_totals` (heads,) their sums. What bounds then call mIoU is mIoU less its charges.
    """

    scores: Array
    totals: Array
    spans: Array
    passed: Array
    cut_counts: Array
    text_ranks: Array
    labelled: Array
    changed: Array
    charges: Array
    charge_totals: Array


class Constraints(NamedTuple):
    """What a plan must satisfy: `bounds` (q,) on sums of costs, `percentile` (percent, bound) of the first of these,
    the `floor` of mIoU, `most_changed` as a sum over images, and the `least_iou` (classes,) of each class in percent,
    -inf where it is not bounded. `objective` indexes the costs, -1 for mIoU."""

    bounds: Array
    percentile: Array
    floor: float
    most_changed: int
    least_iou: Array
    objective: int


class Cutoff(NamedTuple):
    """Plans whose price - `slope` * mIoU exceeds `ceiling` are pruned."""

    slope: float
    ceiling: float


class Relaxation(NamedTuple):
    """A linear function above mIoU: `coefficients` (2 * classes,) of scores, and what each image adds to it at each
    head, `added` (heads, n). Bounds above the cutoff's ceiling may be less tight."""

    cutoff: Cutoff
    coefficients: Array
    added: Array


class PairGroup(NamedTuple):
    """Chains with two early heads that share the `second`: one of `firsts` before it, one of `lasts` after it.

    `prices` (3, firsts, lasts) are paid by an image that leaves at each exit; only chains that are `alive` (firsts,
    lasts) are bounded.
    """

    second: int
    firsts: Array
    lasts: Array
    prices: Array
    alive: Array


class TripleGroup(NamedTuple):
    """As `PairGroup` with a third early head: `prices` (4, firsts, thirds, lasts), `alive` (firsts, thirds, lasts)."""

    second: int
    firsts: Array
    thirds: Array
    lasts: Array
    prices: Array
    alive: Array


class ChainBatch(NamedTuple):
    """Chains of `heads` (m, 4); an image that leaves at an exit is priced `prices` (m, 4) and costs `costs` (m, q,
    4)."""

    heads: Array
    prices: Array
    costs: Array
