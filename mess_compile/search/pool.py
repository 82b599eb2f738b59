"""Plans that a search and its folds found, and which of them would have been chosen on other images.

Other images are the same groups with weights. All figures are sums over groups, so that many sets of weights are one
matrix product; docs/guarantees.md says what this is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mess_compile.array_types import Floats, Index, Ints, Mask
from mess_compile.evaluate.statistics import WHOLE, changed_shares
from mess_compile.runtime.bundle.manifest import OWN_OUTPUT
from mess_compile.search.metrics import Evidence, evidence_of_plan, exit_costs_ns, exit_macs, memory_bytes, worst_ns
from mess_compile.search.objectives import MEASURES, bounds_of
from mess_compile.search.plan import Candidate, Plan
from mess_compile.search.requirement import ClassBound, Requirement
from mess_compile.search.risk import drops_pp, final_exits

MOST_PLANS = 2000
EXITS = 4
"""The most exits of a plan."""
_BLOCK_BYTES = 32 << 20
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Pool:
    """`plans`, the search's own choice first; `fronts` are the places of those that the search found, then of those
    that each fold did."""

    plans: tuple[Candidate, ...]
    fronts: tuple[Index, ...]


def candidate_of(plan: Plan) -> Candidate:
    """The plan without its figures."""
    return Candidate(plan.precision, plan.setting, plan.stages)


def pool_of(found: Sequence[tuple[Candidate, Sequence[Candidate]]], most: int = MOST_PLANS) -> Pool:
    """The pool of what the search and its folds found, each with its choice and its front.

    With more than `most` plans each front is cut down to those nearest to its choice, for others are not chosen.
    """
    each = max(1, most // len(found))
    fronts = [[choice, *_nearest(choice, front, each - 1)] for choice, front in found]
    plans = tuple(dict.fromkeys(plan for front in fronts for plan in front))
    place = {plan: i for i, plan in enumerate(plans)}
    return Pool(plans, tuple(np.array(sorted({place[plan] for plan in front}), np.intp) for front in fronts))


def _nearest(choice: Candidate, front: Sequence[Candidate], most: int) -> Sequence[Candidate]:
    """The `most` plans of a front around the choice, or spread over the front where the choice is not on it."""
    if len(front) <= most:
        return front
    if choice not in front:
        return [front[i] for i in np.linspace(0, len(front) - 1, most).round().astype(int)] if most else []
    start = min(max(0, front.index(choice) - most // 2), len(front) - most)
    return front[start : start + most]


@dataclass(frozen=True, eq=False)
class Sums:
    """What the images of each group add up to, (groups, ...), in integers that float64 holds exactly.

    `images` counts them; `pixels` (groups, 3 + 2 * plans, classes) are labelled pixels, then intersection and predicted
    pixels of the baseline and of each plan; `leaving` (groups, plans, EXITS) are the images at each exit, `changed`
    (groups, plans) the shares of changed pixels in billionths, 0 where the truth is labels.
    """

    images: Floats
    pixels: Floats
    leaving: Floats
    changed: Floats

    def drops(self, weights: Floats) -> Floats:
        """mIoU of the baseline less that of each plan, (sets, plans), of sets of groups with weights (sets, groups)."""
        flat = self.pixels.reshape(len(self.pixels), -1)
        step = max(1, _BLOCK_BYTES // (8 * flat.shape[1]))
        parts = [weights[start : start + step] @ flat for start in range(0, len(weights), step)]
        return np.concatenate([drops_pp(part.reshape(-1, *self.pixels.shape[1:])) for part in parts])

    def added(self, weights: Floats, places: Index) -> Floats:
        """The pixels (sets, 5, classes) of labels, baseline and one plan for each set, by its place."""
        found = np.empty((len(weights), 5, self.pixels.shape[2]))
        found[:, :3] = np.einsum("sg,grk->srk", weights, self.pixels[:, :3])
        for place in np.unique(places):
            sets = places == place
            rows = self.pixels[:, 3 + 2 * place : 5 + 2 * place]
            found[sets, 3:] = (weights[sets] @ rows.reshape(len(rows), -1)).reshape(-1, *rows.shape[1:])
        return found


def sums_of(
    part: Sequence[Evidence],
    chosen: Sequence[Evidence],
    plans: Sequence[Candidate],
    baseline: tuple[int, str],
    names: Sequence[str],
) -> Sums:
    """The sums of the images of `part` by the groups of these `names`; plans were chosen on the images of `chosen`, and
    `baseline` names an evidence and a head of it."""
    truth, adding = part[0].statistics, _Adding(part[0].statistics.group, names)
    images, (recipe, head) = np.arange(truth.images), baseline
    pixels = np.zeros((len(names), 3 + 2 * len(plans), truth.labelled.shape[1]))
    leaving, changed = np.zeros((len(names), len(plans), EXITS)), np.zeros((len(names), len(plans)))
    of_baseline = part[recipe].statistics
    column = of_baseline.head_index(head)
    pixels[:, 0] = adding(truth.labelled)
    pixels[:, 1], pixels[:, 2] = adding(of_baseline.intersection[:, column]), adding(of_baseline.predicted[:, column])
    shares = {each.graph_set.recipe: changed_shares(each.statistics) for each in part if truth.truth == OWN_OUTPUT}
    for place, plan in enumerate(plans):
        statistics, taken = evidence_of_plan(part, plan).statistics, final_exits(part, chosen, plan)
        heads = np.array([statistics.head_index(stage.head) for stage in plan.stages])[taken]
        pixels[:, 3 + 2 * place] = adding(statistics.intersection[images, heads])
        pixels[:, 4 + 2 * place] = adding(statistics.predicted[images, heads])
        leaving[:, place] = adding(np.eye(EXITS)[taken])
        if shares:
            changed[:, place] = adding(shares[plan.precision][images, heads])
    return Sums(adding(np.ones(truth.images)), pixels, leaving, changed)


class _Adding:
    """Adds values of images up by group."""

    def __init__(self, group: Sequence[str], names: Sequence[str]) -> None:
        place = {name: i for i, name in enumerate(names)}
        number = np.array([place[name] for name in group], np.intp)
        self._order, self._groups = np.argsort(number, kind="stable"), len(names)
        self._there, self._starts = np.unique(number[self._order], return_index=True)

    def __call__(self, values: Floats | Ints) -> Floats:
        """Sums (groups, ...) of values (n, ...)."""
        sums = np.zeros((self._groups, *values.shape[1:]))
        sums[self._there] = np.add.reduceat(np.asarray(values)[self._order], self._starts, axis=0)
        return sums


@dataclass(frozen=True)
class Tightened:
    """Bounds in place of the requirement's: mIoU points lost, and percent of changed pixels; None: not bounded."""

    err_pp: float | None
    change: float | None


@dataclass(frozen=True, eq=False)
class Chooser:
    """Chooses from the plans of a pool as the search chooses from all plans.

    `sums` are of the images that plans are chosen on. Bounds and objective refer to costs `per_exit` (plans, EXITS) of
    an image at each exit, and to `fixed` values (plans,), by the column of a plan table; `most` are the bounds for one
    image (plans,), `classes` those on single classes, by their numbers.
    """

    requirement: Requirement
    sums: Sums
    per_exit: dict[str, Floats]
    fixed: dict[str, Floats]
    most: dict[str, Floats] = field(default_factory=dict)
    classes: tuple[tuple[int, ClassBound], ...] = ()

    def choices(self, weights: Floats, drops: Floats, front: Index, tightened: Tightened) -> Index:
        """The place (sets,) of the plan of the `front` that is chosen on each set of groups, with weights (sets,
        groups) and `drops` (sets, plans). Where none satisfies it is the one that loses least."""
        if self.requirement.setting == "anytime":  # its own figure, mIoU over time, is not counted by group
            return np.full(len(weights), front[0], np.intp)
        drops, met = drops[:, front], self._met(weights, front)
        lost = drops + self._offset(weights)
        if tightened.err_pp is not None:
            met &= lost <= tightened.err_pp + _ROUNDING
        if tightened.change is not None:
            met &= self._mean(weights, self.sums.changed[:, front]) <= tightened.change / 100 * WHOLE + _ROUNDING
        value = np.where(met, self._objective(weights, drops, front), np.inf)
        best = met & (value <= value.min(axis=1, keepdims=True))
        place = np.where(best, -drops, -np.inf).argmax(axis=1)
        chosen: Index = front[np.where(met.any(axis=1), place, drops.argmin(axis=1))]
        return chosen

    def _offset(self, weights: Floats) -> Floats:
        """By how much the mIoU that the error counts from is above the baseline's, (sets, 1)."""
        given = self.requirement.baseline_miou
        if given is None:
            return np.zeros((len(weights), 1))
        pixels = np.einsum("sg,grk->srk", weights, self.sums.pixels[:, :3])
        nothing = np.concatenate([pixels, np.zeros_like(pixels[:, :2])], axis=1)
        return given - drops_pp(nothing)

    def _met(self, weights: Floats, front: Index) -> Mask:
        met = np.ones((len(weights), len(front)), np.bool_)
        for column, most in self.most.items():
            met &= self._column(column, weights, front) <= most[front] * (1 + _ROUNDING)
        for index, bound in self.classes:
            met &= self._class_losses(index, weights, front) <= bound.most_pp + _ROUNDING
        return met

    def _class_losses(self, index: int, weights: Floats, front: Index) -> Floats:
        """IoU of the baseline less that of each plan, in pp, of one class; 0 where it has no labelled pixel."""
        pixels = weights @ self.sums.pixels[:, :, index]  # (sets, 3 + 2 * plans)
        labelled, right, predicted = pixels[:, :1], pixels[:, 1::2], pixels[:, 2::2]
        iou = 100 * right / np.maximum(1, labelled + predicted - right)
        losses: Floats = np.where(labelled > 0, iou[:, :1] - iou[:, 1:][:, front], 0.0)
        return losses

    def _objective(self, weights: Floats, drops: Floats, front: Index) -> Floats:
        objective = self.requirement.objective or "latency"
        return drops if objective == "accuracy" else self._column(MEASURES[objective].column, weights, front)

    def _column(self, column: str, weights: Floats, front: Index) -> Floats:
        """The value of a column, for one image, (sets, plans of the front)."""
        if column in self.fixed:
            return np.broadcast_to(self.fixed[column][front], (len(weights), len(front)))
        costs, leaving = self.per_exit["cost_ns" if column == "p95_ns" else column][front], self.sums.leaving[:, front]
        if column != "p95_ns":
            return self._mean(weights, (leaving * costs).sum(axis=2))
        order = np.argsort(costs, axis=1, kind="stable")
        at = np.take_along_axis(leaving, order[None], axis=2)
        counts = np.tensordot(weights, at, axes=1).cumsum(axis=2)  # (sets, plans, EXITS)
        reached = (counts >= 0.95 * counts[:, :, -1:] - _ROUNDING).argmax(axis=2)
        return np.take_along_axis(np.take_along_axis(costs, order, axis=1)[None], reached[..., None], axis=2)[..., 0]

    def _mean(self, weights: Floats, values: Floats) -> Floats:
        """The means over images of values (groups, plans) that are sums over the images of a group."""
        means: Floats = weights @ values / np.maximum(1, weights @ self.sums.images)[:, None]
        return means


def chooser_of(
    evidences: Sequence[Evidence], requirement: Requirement, plans: Sequence[Candidate], sums: Sums
) -> Chooser:
    """What chooses from `plans` by the requirement on the images of `evidences`, whose sums these are."""
    of_recipe = {each.graph_set.recipe: each for each in evidences}
    rows = [_costs(of_recipe[plan.precision], plan) for plan in plans]
    per_exit = {name: np.array([row[0][name] for row in rows]) for name in rows[0][0]}
    fixed = {name: np.array([row[1][name] for row in rows]) for name in rows[0][1]}
    most = {recipe: dict(_most(each, requirement)) for recipe, each in of_recipe.items()}
    columns = next(iter(most.values()))
    limits = {name: np.array([most[plan.precision][name] for plan in plans]) for name in columns}
    names = evidences[0].statistics.classes
    classes = tuple((names.index(bound.name), bound) for bound in requirement.max_class_err)
    return Chooser(requirement, sums, per_exit, fixed, limits, classes)


def _costs(evidence: Evidence, plan: Candidate) -> tuple[dict[str, Floats], dict[str, float]]:
    """Costs (EXITS,) of an image at each exit, and what does not depend on images."""
    heads, setting = [stage.head for stage in plan.stages], plan.setting
    costs = {"cost_ns": exit_costs_ns(evidence, setting, heads), "macs": exit_macs(evidence.candidate, heads)}
    if not evidence.without_energy:
        costs["energy_nj"] = exit_costs_ns(evidence, setting, heads, "energy_mj")
    padded = {name: np.array([*each, *[0] * (EXITS - len(heads))], np.float64) for name, each in costs.items()}
    fixed = {"worst_ns": worst_ns(evidence, setting, heads), "memory_bytes": memory_bytes(evidence.graph_set, heads)}
    return padded, {name: float(value) for name, value in fixed.items()}


def _most(evidence: Evidence, requirement: Requirement) -> Iterator[tuple[str, float]]:
    """The bounds for one image by column, but for those on mIoU, classes and changes."""
    for name, bound in bounds_of(evidence, requirement).items():
        if name not in ("max_err_pp", "max_change", "max_class_err"):
            yield bound.measure.column, bound.limit / (bound.images if bound.measure.is_sum else 1)
