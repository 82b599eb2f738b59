"""Diagnoses whether better heads or a better gate would help: exits by confidence against an ideal exit rule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mess_compile.array_types import Floats, Ints, Mask
from mess_compile.evaluate.statistics import ExitStatistics, head_miou
from mess_compile.network import OWN
from mess_compile.runtime.base.errors import InputError

MAX_ERRS_PP = (1.0, 0.1)
TOLERANCE_PP = 1.0
NEGLIGIBLE = 0.05
"""Share of images that is too small for a verdict."""
CLEARLY_PP = 0.1
"""Lead of an early head over the final exit, in percentage points of mIoU, above which it is reported."""
LimitedBy = Literal["gate", "heads", "both", "neither"]


@dataclass(frozen=True)
class HeadDiagnosis:
    """One early head as the only exit before the final one. Shares are of images, 0 to 1.

    `coverage`: the share of labelled images on which this head is as good as the final exit (by `image_mious`, within
    the tolerance). `auroc`: how well its confidence separates these images from the others, at the threshold index
    that separates best (`auroc_row`, chosen on the same images), and `auroc_middle` at the middle index; None when all
    images are of one kind. `gate_share` and `oracle_share`: the share that may leave here within each of the
    diagnosis's `max_errs_pp`, with the best threshold and cut, and with an ideal exit rule; `oracle_miou` (percent):
    the best mIoU of the ideal rule. The ideal rule is found greedily and is a lower bound: see `diagnose`.
    """

    head: str
    coverage: float
    auroc: float | None
    auroc_row: int | None
    auroc_middle: float | None
    gate_share: tuple[float, ...]
    oracle_share: tuple[float, ...]
    oracle_miou: float


@dataclass(frozen=True)
class Diagnosis:
    """`heads` are the early ones, compared with `final`; errors and tolerance in percentage points of mIoU."""

    final: str
    max_errs_pp: tuple[float, ...]
    tolerance_pp: float
    heads: tuple[HeadDiagnosis, ...]


@dataclass(frozen=True)
class ExitLimit:
    """The shares that may leave at an early exit's best head: by its gate, and by the ideal exit rule."""

    exit_point: int
    head: str
    gate_share: float
    oracle_share: float

    @property
    def limit(self) -> LimitedBy:
        return _limit(self.gate_share, self.oracle_share)


@dataclass(frozen=True)
class LimitingFactor:
    """What limits the network within `max_err_pp`, by the mean shares of the early exits' best heads."""

    max_err_pp: float
    exits: tuple[ExitLimit, ...]

    @property
    def gate_share(self) -> float:
        return sum(found.gate_share for found in self.exits) / len(self.exits)

    @property
    def oracle_share(self) -> float:
        return sum(found.oracle_share for found in self.exits) / len(self.exits)

    @property
    def limit(self) -> LimitedBy:
        return _limit(self.gate_share, self.oracle_share)


def _limit(gate_share: float, oracle_share: float) -> LimitedBy:
    """A better gate can gain oracle - gate, better heads 1 - oracle; less than one image in twenty is negligible."""
    by_gate, by_heads = round(oracle_share - gate_share, 9), round(1 - oracle_share, 9)  # so that equal shares tie
    if max(by_gate, by_heads) < NEGLIGIBLE:
        return "neither"
    if by_gate == by_heads:
        return "both"
    return "gate" if by_gate > by_heads else "heads"


def diagnose(
    statistics: ExitStatistics, max_errs_pp: Sequence[float] = MAX_ERRS_PP, tolerance_pp: float = TOLERANCE_PP
) -> Diagnosis:
    """Compare every early head with the final exit's head, or with its best head when the final exit has several.

    "oracle, greedy": images are sorted by the change in mIoU when they leave early, to first order around the final
    exit's sums. The mIoU of every prefix of that order is exact, and the largest prefix within the error counts. mIoU
    is not additive, so that another choice of images may do better: the result is a lower bound. A gate that does
    better raises it, since its images are such a choice, too. Raises InputError when mIoU is undefined or a head's name
    has no exit point.
    """
    if not all(error >= 0 for error in max_errs_pp):
        raise InputError(f"errors of {max_errs_pp} percentage points: give numbers that are not negative")
    final = final_head(statistics)
    early = [head for head in statistics.heads if exit_number(head) < exit_number(final)]
    heads = tuple(_diagnosed(statistics, head, final, max_errs_pp, tolerance_pp) for head in early)
    return Diagnosis(final, tuple(max_errs_pp), tolerance_pp, heads)


def final_head(statistics: ExitStatistics) -> str:
    """The head of the deepest exit point, the best one when it has several. Raises InputError."""
    last = max((exit_number(head) for head in statistics.heads), default=0)
    final = [head for head in statistics.heads if exit_number(head) == last]
    if not final:
        raise InputError("the evaluation has no heads: run `mess-compile evaluate`")
    return max(final, key=lambda head: head_miou(statistics, head))


@dataclass(frozen=True)
class WeakFinalExit:
    """A final exit that is worse than an early head; mIoU in percent."""

    final: str
    final_miou: float
    better: str
    better_miou: float

    @property
    def sentence(self) -> str:
        compared = (
            f"the final exit ({self.final}, {self.final_miou:.2f} % mIoU) does worse than the early head {self.better} "
            f"({self.better_miou:.2f} %)"
        )
        if self.final.endswith(f".{OWN}"):
            return (
                f"{compared}: that head has learnt from labels like these, the network itself has not; it may do "
                "better once it is trained on them, and every plan compared with it looks better than it is"
            )
        return (
            f"{compared}: was it trained long enough (`train --epochs`), from a trained backbone (`--weights`)? Every "
            "plan compared with it looks better than it is"
        )


def weak_final_exit(statistics: ExitStatistics) -> WeakFinalExit | None:
    """The final exit, when an early head is better by more than `CLEARLY_PP`; None otherwise."""
    final = final_head(statistics)
    early = [head for head in statistics.heads if exit_number(head) < exit_number(final)]
    mious = {head: head_miou(statistics, head) for head in (final, *early)}
    best = max(mious, key=mious.__getitem__)
    if mious[best] - mious[final] <= CLEARLY_PP:
        return None
    return WeakFinalExit(final, mious[final], best, mious[best])


def exit_number(head: str) -> int:
    """The exit point of `exit3.fcn-crm1-b0`: 3. Raises InputError."""
    match = re.match(r"exit([0-9]{1,9})\.", head)
    if match is None:
        raise InputError(f"head {head!r} of the evaluation is not named exitN.NAME: run `mess-compile evaluate`")
    return int(match[1])


def limiting_factors(diagnosis: Diagnosis) -> tuple[LimitingFactor, ...]:
    """For each error, what limits the network; an exit's best head is the one where most images could leave."""
    points = sorted({exit_number(found.head) for found in diagnosis.heads})
    if not points:
        return ()
    return tuple(
        LimitingFactor(error, tuple(_exit_limit(diagnosis, point, index) for point in points))
        for index, error in enumerate(diagnosis.max_errs_pp)
    )


def _exit_limit(diagnosis: Diagnosis, point: int, error: int) -> ExitLimit:
    heads = [found for found in diagnosis.heads if exit_number(found.head) == point]
    best = max(heads, key=lambda found: (found.oracle_share[error], found.gate_share[error]))
    return ExitLimit(point, best.head, best.gate_share[error], best.oracle_share[error])


def _diagnosed(
    statistics: ExitStatistics, head: str, final: str, max_errs_pp: Sequence[float], tolerance_pp: float
) -> HeadDiagnosis:
    counts = np.asarray(statistics.counts[:, statistics.head_index(head)])  # (n, thresholds)
    mious, labelled = image_mious(statistics, head), statistics.labelled.any(axis=1)
    good = mious[labelled] >= image_mious(statistics, final)[labelled] - tolerance_pp
    areas = auroc(good, counts[labelled])
    row = None if areas is None else int(areas.argmax())
    swap = _swap(statistics, head, final)
    gate = _gate_curve(swap, counts)
    oracle = np.maximum(gate, _mious_of_prefixes(swap, np.argsort(-_first_order(swap), kind="stable")))
    return HeadDiagnosis(
        head=head,
        coverage=float(good.mean()),
        auroc=None if areas is None else float(areas[row]),
        auroc_row=row,
        auroc_middle=None if areas is None else float(areas[len(areas) // 2]),
        gate_share=tuple(_largest_share(gate, error) for error in max_errs_pp),
        oracle_share=tuple(_largest_share(oracle, error) for error in max_errs_pp),
        oracle_miou=float(oracle.max()),
    )


def image_mious(statistics: ExitStatistics, head: str) -> Floats:
    """Each image's own mIoU (n,) in percent at `head`, over the classes labelled in it; 0 without labelled pixels.

    Pixel accuracy would not do, since frequent classes dominate it: errors are allowed in mIoU, which a lost rare class
    lowers as much as a lost road. On CamVid's heads the difference in image mIoU between early and final exit ranks the
    images almost as their share in the set's mIoU does (rank correlation 0.92); accuracy does less well (0.73). Scores
    of single images: Csurka et al., What is a good evaluation measure for semantic segmentation?, BMVC 2013.
    """
    index = statistics.head_index(head)
    right, labelled = statistics.intersection[:, index], statistics.labelled
    union = statistics.predicted[:, index] + labelled - right
    ious = np.where(labelled > 0, right / np.maximum(union, 1), 0.0)  # (n, classes)
    mious: Floats = 100 * ious.sum(axis=1) / np.maximum((labelled > 0).sum(axis=1), 1)
    return mious


def auroc(good: Mask, confidence: NDArray[np.int32]) -> Floats | None:
    """The area under the ROC curve, per column of `confidence` (n, thresholds), by the Mann-Whitney rank sum.

    It is the probability that a good image has a higher confidence than another one; ties count half. None when all
    values of `good` (n,) are equal.
    """
    total, positive = good.size, int(good.sum())
    if not 0 < positive < total:
        return None
    order = np.argsort(confidence, axis=0, kind="stable")
    ordered = np.take_along_axis(confidence, order, axis=0)
    new = np.concatenate([np.ones((1, ordered.shape[1]), np.bool_), ordered[1:] != ordered[:-1]])
    first, after = _runs(new)
    ranks = (first + after + 1) / 2  # the mean rank, from 1, of each run of equal values
    rank_sum = np.where(good[order], ranks, 0.0).sum(axis=0)
    area: Floats = (rank_sum - positive * (positive + 1) / 2) / (positive * (total - positive))
    return area


def _runs(new: Mask) -> tuple[Ints, Ints]:
    """Start and end (exclusive) of the run that each element of a column belongs to."""
    total = len(new)
    position = np.arange(total)[:, None]
    first = np.maximum.accumulate(np.where(new, position, 0))
    last = np.concatenate([new[1:], np.ones((1, new.shape[1]), np.bool_)])
    after = np.minimum.accumulate(np.where(last, position + 1, total)[::-1])[::-1]
    return first, after


@dataclass(frozen=True, eq=False)
class _Swap:
    """The final exit's sums over the set (1, classes), and the change in them when an image leaves early (n, classes).

    Only classes with labelled pixels.
    """

    intersection: Ints
    union: Ints
    intersection_change: Ints
    union_change: Ints


def _swap(statistics: ExitStatistics, head: str, final: str) -> _Swap:
    present = np.flatnonzero(statistics.labelled.sum(axis=0))
    (early_right, early_predicted), (right, predicted) = (
        (statistics.intersection[:, index][:, present], statistics.predicted[:, index][:, present])
        for index in (statistics.head_index(head), statistics.head_index(final))
    )
    union = predicted + statistics.labelled[:, present] - right
    change = early_right - right
    return _Swap(
        right.sum(axis=0, keepdims=True), union.sum(axis=0, keepdims=True), change, early_predicted - predicted - change
    )


def _first_order(swap: _Swap) -> Floats:
    """The change (n,) of the set's mean IoU when each image leaves early, linearised at the final exit's sums."""
    iou = swap.intersection / swap.union
    change: Floats = ((swap.intersection_change - iou * swap.union_change) / swap.union).mean(axis=1)
    return change


def _mious_of_prefixes(swap: _Swap, order: NDArray[np.intp]) -> Floats:
    """mIoU (n + 1,) in percent when the first 0, 1, ..., n images of `order` leave early.

    Summed from the first class to the last, so that it equals `statistics.miou` to the last bit.
    """
    intersection = np.concatenate([swap.intersection, swap.intersection_change[order]]).cumsum(axis=0)
    union = np.concatenate([swap.union, swap.union_change[order]]).cumsum(axis=0)
    ious = intersection / union  # (n + 1, classes)
    mious: Floats = 100.0 * (ious.cumsum(axis=1)[:, -1] / ious.shape[1])
    return mious


def _gate_curve(swap: _Swap, counts: NDArray[np.int32]) -> Floats:
    """The best mIoU (n + 1,) in percent when a threshold and a cut of `counts` (n, thresholds) let 0 to n images leave.

    Minus infinity where no cut lets so many images leave: images with equal counts leave together.
    """
    best = np.full(len(counts) + 1, -np.inf)
    for column in counts.T:
        order = np.argsort(column, kind="stable")[::-1]
        ordered = column[order]
        separable = np.concatenate([[True], ordered[1:] != ordered[:-1], [True]])
        best = np.maximum(best, np.where(separable, _mious_of_prefixes(swap, order), -np.inf))
    return best


def leaving_shares(
    statistics: ExitStatistics, head: str, final: str, counts: NDArray[np.int32], max_errs_pp: Sequence[float]
) -> tuple[float, ...]:
    """The share of images that may leave at `head` within each error, by the best column of `counts` (n, rows)."""
    curve = _gate_curve(_swap(statistics, head, final), counts)
    return tuple(_largest_share(curve, error) for error in max_errs_pp)


def _largest_share(curve: Floats, max_err_pp: float) -> float:
    """The largest share within the error. `curve[0]` is the final exit's mIoU: no image leaves early."""
    return int(np.flatnonzero(curve >= curve[0] - max_err_pp)[-1]) / (len(curve) - 1)
