"""What plans are bounded and chosen by, under one name in plan tables, figures and messages; a requirement's bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile.evaluate.statistics import WHOLE
from mess_compile.runtime.bundle.manifest import CLASS_ERR, Figures, Promise
from mess_compile.search.class_floors import ClassFloor, class_floors
from mess_compile.search.metrics import Evidence, refuse_without_own_output, worst_ns
from mess_compile.search.plan import Plan
from mess_compile.search.requirement import Limit, Requirement


@dataclass(frozen=True)
class Measure:
    """A quantity of a plan that is bounded, or an objective.

    It is the `column` of a plan table, summed over images where `is_sum`, and the `figure` of a plan's figures.
    Messages give it in `unit`: `column_unit` of the column, or `figure_unit` of the figure, make one.
    """

    name: str
    column: str
    figure: str
    unit: str
    column_unit: float
    is_sum: bool = False
    figure_unit: float = 1

    def of(self, figures: Figures) -> float:
        """The figure; 0 where the latency table lacks it."""
        value: float | None = getattr(figures, self.figure)
        return value or 0.0

    def text(self, figures: Figures) -> str:
        """The value of a plan with these figures, with name and unit."""
        return self.text_of(self.of(figures) / self.figure_unit)

    def text_of(self, value: float, relation: str = "") -> str:
        return f"{self.name}{relation} {value:.4g} {self.unit}"


MEASURES = {
    "latency": Measure("latency", "cost_ns", "latency_ms", "ms", 1e6, is_sum=True),
    "accuracy": Measure("mIoU", "miou", "miou", "%", 1),
    "workload": Measure("workload", "macs", "gmacs", "GMACs", 1e9, is_sum=True),
    "memory": Measure("memory", "memory_bytes", "memory_bytes", "MiB", 1 << 20, figure_unit=1 << 20),
    "energy": Measure("energy", "energy_nj", "energy_mj", "mJ", 1e6, is_sum=True),
}
"""The possible objectives."""
CHANGE = Measure("changed pixels", "changed", "change", "%", WHOLE / 100, is_sum=True)
"""The share of pixels that are labelled otherwise than by the network itself."""
CLASSES = Measure("IoU above the least allowed", "class_margin", "", "pp", 1)
"""By how much the IoU of classes with a bound is above it, of the class that is nearest to it."""
_LIMITED = {
    "max_latency": MEASURES["latency"],
    "max_latency_p95": Measure("p95 latency", "p95_ns", "p95_ms", "ms", 1e6),
    "max_latency_worst": Measure("worst-case latency", "worst_ns", "worst_ms", "ms", 1e6),
    "max_energy": MEASURES["energy"],
    "max_workload": MEASURES["workload"],
}
"""What is bounded by the fields of a requirement that may be relative to the baseline."""


@dataclass(frozen=True)
class Bound:
    """A bound on a measure in the unit of its column, over `images` images: at least `limit` for mIoU and classes, else
    at most. `floors` are those of classes."""

    measure: Measure
    limit: float
    images: int
    floors: tuple[ClassFloor, ...] = ()

    @property
    def sign(self) -> int:
        """1 where less is better, else -1."""
        return -1 if self.measure in (MEASURES["accuracy"], CLASSES) else 1

    @property
    def objective(self) -> str | None:
        """The objective that optimises what is bounded, None when there is none."""
        return next((name for name, measure in MEASURES.items() if measure is self.measure), None)

    def is_met(self, plans: NDArray[np.void]) -> NDArray[np.bool_]:
        """Whether each of these rows of a plan table satisfies the bound."""
        met: NDArray[np.bool_] = self.sign * plans[self.measure.column] <= self.sign * self.limit
        return met

    def best_of(self, plans: NDArray[np.void]) -> str:
        """The best value of what is bounded among these rows of a plan table."""
        best = (self.sign * plans[self.measure.column]).min() * self.sign
        if self.floors:
            names = " and ".join(floor.name for floor in self.floors)
            return f"IoU of {names} {max(0.0, -best):.3g} pp below" if best < 0 else f"IoU of {names} as required"
        return self._text(best)

    def __str__(self) -> str:
        if self.floors:
            return " and ".join(map(str, self.floors))
        return self._text(self.limit, " >=" if self.sign < 0 else " <=")

    def _text(self, value: float, relation: str = "") -> str:
        unit = self.measure.column_unit * (self.images if self.measure.is_sum else 1)
        return self.measure.text_of(value / unit, relation)


def bounds_of(evidence: Evidence, requirement: Requirement) -> dict[str, Bound]:
    """The bounds of a requirement by its fields, in the order of messages; integers but for that on mIoU."""
    images = evidence.statistics.images
    bounds = {}
    if requirement.max_err_pp is not None:
        reference = requirement.counts_from(evidence.baseline_miou(evidence.baseline))
        bounds["max_err_pp"] = Bound(MEASURES["accuracy"], reference - requirement.max_err_pp, images)
    if requirement.max_change is not None:
        refuse_without_own_output(evidence)
        bounds["max_change"] = Bound(CHANGE, most_changed(requirement.max_change, images), images)
    floors = class_floors(evidence.statistics, evidence.scored_as(evidence.baseline), requirement.max_class_err)
    if floors:
        bounds["max_class_err"] = Bound(CLASSES, 0.0, images, floors)
    for field, measure in _LIMITED.items():
        limit: Limit | None = getattr(requirement, field)
        if limit is not None:
            of_one = limit.resolved(_of_baseline(evidence, measure), measure.column_unit)
            bounds[field] = Bound(measure, of_one * images if measure.is_sum else of_one, images)
    if requirement.max_memory_bytes is not None:
        bounds["max_memory_bytes"] = Bound(MEASURES["memory"], requirement.max_memory_bytes, images)
    return bounds


def floors_of(bounds: Mapping[str, Bound]) -> tuple[ClassFloor, ...]:
    """The floors of classes among bounds."""
    return bounds["max_class_err"].floors if "max_class_err" in bounds else ()


def most_changed(max_change: float, images: int) -> int:
    """A bound in percent as the sum over images of shares in billionths."""
    return math.floor(Fraction(str(max_change)) * images * WHOLE / 100)


def promises_of(requirement: Requirement, plan: Plan) -> tuple[Promise, ...]:
    """The bounds that a plan was required to satisfy, as a bundle carries them."""
    found = []
    if requirement.max_err_pp is not None:
        found.append(Promise("err_pp", requirement.max_err_pp, False, plan.offset_pp))
    if requirement.max_change is not None:
        found.append(Promise(CHANGE.figure, requirement.max_change, False, 0.0))
    iou = {each.name: each.baseline for each in plan.class_iou}
    for bound in requirement.max_class_err:
        reference = iou[bound.name] if bound.baseline_iou is None else bound.baseline_iou
        found.append(Promise(CLASS_ERR, bound.most_pp, False, 0.0, bound.name, reference - bound.most_pp))
    for field, measure in _LIMITED.items():
        limit: Limit | None = getattr(requirement, field)
        if limit is not None:
            found.append(Promise(measure.figure, limit.value, limit.relative, 0.0))
    if requirement.max_memory_bytes is not None:
        found.append(Promise("memory_bytes", float(requirement.max_memory_bytes), False, 0.0))
    return tuple(found)


def _of_baseline(evidence: Evidence, measure: Measure) -> int:
    """The baseline's value for one image, in the unit of the column."""
    if measure is MEASURES["workload"]:
        return evidence.candidate.baseline_macs
    if measure is _LIMITED["max_latency_worst"]:
        return worst_ns(evidence, "budgeted", [evidence.baseline])
    return evidence.baseline_cost_ns("energy_mj" if measure is MEASURES["energy"] else "mean_ms")


def objective_of(plans: NDArray[np.void], requirement: Requirement) -> NDArray[Any]:
    """The value to minimise of each row of a plan table."""
    if requirement.setting == "anytime":
        return -plans["score"]
    objective = requirement.objective or "latency"
    values: NDArray[Any] = plans[MEASURES[objective].column]
    return -values if objective == "accuracy" else values
