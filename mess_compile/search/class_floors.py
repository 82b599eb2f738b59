"""Bounds on single classes: the least IoU that a plan may have of each, counted from the baseline's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mess_compile.evaluate.statistics import ExitStatistics, head_class_iou
from mess_compile.runtime.base.errors import InputError, did_you_mean
from mess_compile.search.requirement import ClassBound


@dataclass(frozen=True)
class ClassFloor:
    """The least IoU (percent) of the class `name`, which has the number `index`."""

    name: str
    index: int
    least_iou: float

    def __str__(self) -> str:
        return f"IoU of {self.name} >= {self.least_iou:.4g} %"


def class_floors(statistics: ExitStatistics, baseline: str, bounds: Sequence[ClassBound]) -> tuple[ClassFloor, ...]:
    """The floors by the baseline's IoU on these images. A class without labelled pixels has none.

    Raises InputError for a class that the network does not know.
    """
    if not bounds:
        return ()
    of_baseline, found = head_class_iou(statistics, baseline), []
    for bound in bounds:
        index = _index(statistics, bound)
        reference = of_baseline[index] if bound.baseline_iou is None else bound.baseline_iou
        if not np.isnan(of_baseline[index]):
            found.append(ClassFloor(bound.name, index, float(reference) - bound.most_pp))
    return tuple(found)


def with_baseline(statistics: ExitStatistics, baseline: str, bounds: Sequence[ClassBound]) -> tuple[ClassBound, ...]:
    """The bounds counted from this single-exit network, where they do not say otherwise."""
    iou = head_class_iou(statistics, baseline) if bounds else np.zeros(0)
    return tuple(
        bound if bound.baseline_iou is not None else replace(bound, baseline_iou=float(iou[_index(statistics, bound)]))
        for bound in bounds
    )


def refuse_unlabelled(statistics: ExitStatistics, bounds: Sequence[ClassBound]) -> None:
    """Raises InputError for a bound on a class that no image shows: any plan would keep it."""
    for bound in bounds:
        if not statistics.labelled[:, _index(statistics, bound)].any():
            raise InputError(
                f"--max-class-err {bound.name}={bound.most_pp:g}%: none of the {statistics.images} images that the "
                f"plan is chosen on has a labelled pixel of {bound.name}: evaluate images that show it, or leave it out"
            )


def _index(statistics: ExitStatistics, bound: ClassBound) -> int:
    if bound.name not in statistics.classes:
        known = did_you_mean(bound.name, statistics.classes) or f": the classes are {', '.join(statistics.classes)}"
        raise InputError(f"--max-class-err: there is no class {bound.name!r}{known}")
    return statistics.classes.index(bound.name)
