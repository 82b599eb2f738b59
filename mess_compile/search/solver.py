"""The search: the best plan under a requirement, the front it stands on, and the certificate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile.latency import Quantity
from mess_compile.runtime.errors import InputError, RequirementError, StaleError
from mess_compile.search.clock import Clock, UnfinishedError
from mess_compile.search.figures import Evidence, plan_of_stages, refuse_without_energy
from mess_compile.search.front import front_groups
from mess_compile.search.kept import kept_rows
from mess_compile.search.plan import (
    FRONT_BY,
    REFINED_POINT,
    Certificate,
    OperatingPoint,
    Plan,
    SearchResult,
    decisions_of,
)
from mess_compile.search.points import operating_points
from mess_compile.search.requirement import Requirement
from mess_compile.search.rows import (
    Progress,
    Rows,
    is_large,
    least_cost_of_plans,
    plans_in_space,
    rows_near,
    stages_of_row,
    text_of_stages,
)

Mask = NDArray[np.bool_]
_AXES = {"latency": "cost_ns", "miou": "miou", "memory": "memory_bytes"}


def search(
    evidence: Evidence,
    requirement: Requirement,
    progress: Progress = lambda done, total: None,
    front_by: tuple[str, ...] = FRONT_BY,
    kept: Path | None = None,
    clock: Clock | None = None,
) -> SearchResult:
    """The optimum over the whole space, by enumeration, or by branch and bound where the space is large.

    Space and order of equals are those of the search issue (5).
    The front is by mean latency, mIoU and what else `front_by` names, of the plans that keep the bounds on what it is
    not by; of nothing: no front, and no operating points. What does not follow from the requirement is kept in the
    folder `kept`. `progress` is told (chains of heads done, in all). When the `clock` is up, or with one at Ctrl-C, the
    best so far is returned, with its gap. Raises RequirementError naming the best that can be reached when no plan
    satisfies the requirement, UnfinishedError when none was found in time, InputError when it needs energies that the
    latency table lacks.
    """
    if requirement.needs_energy:
        refuse_without_energy(evidence)
    if requirement.setting == "input-dependent" and is_large(evidence, requirement.early_exits):
        from mess_compile.search import large  # compiles when it is first used

        found = large.search(evidence, requirement, progress, front_by, clock)
        return _with_points(evidence, requirement, found) if front_by else found
    rows = kept_rows(evidence, requirement, progress, kept, clock)
    bounds = _bounds(evidence, requirement, rows.plans)
    feasible = _kept(rows, bounds)
    if not feasible.any():
        raise UnfinishedError() if rows.left else RequirementError(_refusal(rows, bounds))
    objective = _objective(rows.plans, requirement)
    chosen = _best(evidence, rows, np.flatnonzero(feasible), objective[feasible])
    if requirement.deadline_ms is not None and not objective[chosen]:
        raise RequirementError(_too_early(evidence, requirement, rows))
    fixed = _kept(rows, [bound for bound in bounds if bound.column not in {_AXES[axis] for axis in front_by}])
    front = _front(evidence, rows, fixed, front_by) if front_by else []
    result = SearchResult(
        plan=_plan_of_row(evidence, requirement, rows, chosen),
        front=tuple(_plan_of_row(evidence, requirement, rows, index) for index in front),
        certificate=_certificate(evidence, requirement, rows, chosen),
        front_by=front_by or FRONT_BY,
        front_complete=bool(front_by) and not rows.left,
    )
    return _with_points(evidence, requirement, result) if front_by else result


def _with_points(evidence: Evidence, requirement: Requirement, result: SearchResult) -> SearchResult:
    plan = result.plan
    points = operating_points(evidence, plan.setting, plan.stages, plan.predicted)
    refined = _refined(evidence, requirement, plan)
    return replace(result, plan=replace(plan, operating_points=points + refined))


def _refined(evidence: Evidence, requirement: Requirement, plan: Plan) -> tuple[OperatingPoint, ...]:
    """The plan with cuts off the grid, where that is better; nothing is proven about it."""
    if plan.setting != "input-dependent" or len(plan.stages) == 1:
        return ()
    rows = rows_near(evidence, plan.stages)
    feasible = _kept(rows, _bounds(evidence, requirement, rows.plans))
    best = _best(evidence, rows, np.flatnonzero(feasible), _objective(rows.plans, requirement)[feasible])
    found = _plan_of_row(evidence, requirement, rows, best)
    if _order(found, requirement)[:2] >= _order(plan, requirement)[:2]:
        return ()
    return (OperatingPoint(REFINED_POINT, decisions_of(found.stages), found.predicted),)


def _certificate(evidence: Evidence, requirement: Requirement, rows: Rows, chosen: int) -> Certificate:
    duplicates = rows.space - rows.evaluated
    if not rows.left:
        return Certificate(rows.space, rows.evaluated, duplicates, bounded=0, gap=0.0, exhaustive=True)
    gap = _gap(evidence, requirement, rows, chosen)
    space = plans_in_space(evidence, requirement.early_exits)
    return Certificate(space, rows.evaluated, duplicates, bounded=0, gap=gap, exhaustive=False)


def _gap(evidence: Evidence, requirement: Requirement, rows: Rows, chosen: int) -> float:
    """What a plan that was left out could gain at the most over the `chosen` one."""
    plan = _plan_of_row(evidence, requirement, rows, chosen)
    value = abs(_order(plan, requirement)[0])
    quantities: dict[str, Quantity] = {"latency": "mean_ms", "energy": "energy_mj"}
    quantity = quantities.get(requirement.objective or "latency")
    if quantity is None:  # no more is known of what is left than that mIoU ends at 100, and the others at 0
        return 100.0 - value if requirement.objective == "accuracy" else value
    least = min(least_cost_of_plans(evidence, early, quantity) for early in rows.left)
    return max(0.0, value - least / 1e6)


def _too_early(evidence: Evidence, requirement: Requirement, rows: Rows) -> str:
    first = int(rows.plans["cost_ns"].min()) / evidence.statistics.images / 1e6
    return f"no plan reports by {requirement.deadline_ms:g} ms: the first that can report does so after {first:.4g} ms"


def search_recipes(
    evidences: Sequence[Evidence],
    requirement: Requirement,
    progress: Progress = lambda done, total: None,
    front_by: tuple[str, ...] = FRONT_BY,
    kept: Path | None = None,
    clock: Clock | None = None,
) -> SearchResult:
    """The optimum over the plans of several precision recipes of one network; of equals that of the first.

    The error counts from the best baseline of any of them, latency and workload relative to each recipe's own: an
    int8 plan near a poor int8 baseline satisfies nobody. Raises as `search` does, and InputError for the anytime
    setting, whose area ends at the baseline's latency, when there are several.
    """
    if len(evidences) > 1 and requirement.setting == "anytime":
        names = ", ".join(evidence.graph_set.recipe for evidence in evidences)
        raise InputError(f"the anytime setting compares plans of one recipe: name one of {names} with --precision")
    if len({evidence.statistics.image_id for evidence in evidences}) > 1:
        raise StaleError(
            "the recipes' statistics are of different images, so that their figures cannot be compared: run "
            "`mess-compile evaluate --precision ...` on the same data for each"
        )
    if requirement.baseline_miou is None and len(evidences) > 1:
        best = max(evidence.baseline_miou(evidence.baseline) for evidence in evidences)
        requirement = replace(requirement, baseline_miou=best)
    found, refusals, unfinished = [], [], False
    for evidence in evidences:
        try:
            found.append(search(evidence, requirement, progress, front_by, kept, clock))
        except UnfinishedError:
            unfinished = True
        except RequirementError as error:
            refusals.append(f"{evidence.graph_set.recipe}: {error}" if len(evidences) > 1 else str(error))
    if not found:
        raise UnfinishedError() if unfinished else RequirementError("; ".join(refusals))
    plan = min((result.plan for result in found), key=lambda plan: _order(plan, requirement))
    value = abs(_order(plan, requirement)[0])
    unknown = (100.0 - value if requirement.objective == "accuracy" else value) if unfinished else 0.0
    proofs = [result.certificate for result in found]
    return SearchResult(
        plan=plan,
        front=_merged([plan for result in found for plan in result.front], front_by),
        front_by=front_by or FRONT_BY,
        front_complete=not unfinished and all(result.front_complete for result in found),
        certificate=replace(
            proofs[0],
            **{name: sum(getattr(p, name) for p in proofs) for name in ("space", "evaluated", "duplicates", "bounded")},
            gap=max(unknown, *(proof.gap for proof in proofs)),
            exhaustive=all(proof.exhaustive for proof in proofs) and not unfinished,
        ),
    )


def _order(plan: Plan, requirement: Requirement) -> tuple[float, float, int]:
    """By objective, then mIoU (greatest), then number of graphs."""
    figures = plan.predicted
    objectives: dict[str, float] = {
        "latency": figures.latency_ms,
        "accuracy": -figures.miou,
        "workload": figures.gmacs,
        "memory": figures.memory_bytes,
        "energy": figures.energy_mj or 0.0,
    }
    return objectives[requirement.objective or "latency"], -figures.miou, len(plan.graphs)


def _merged(plans: list[Plan], front_by: tuple[str, ...]) -> tuple[Plan, ...]:
    """Those that no other beats in what the front is by, from the fastest to the most accurate; of equals the first."""
    if not plans:
        return ()
    cost, miou, memory = (
        np.array([getattr(plan.predicted, name) for plan in plans]) for name in ("latency_ms", "miou", "memory_bytes")
    )
    groups = front_groups(cost, miou, memory if "memory" in front_by else None)
    return tuple(plans[min(group)] for group in groups)


@dataclass(frozen=True, eq=False)
class _Bound:
    """A bound on one column: at least `limit` for mIoU, at most for the others. `unit` of them make one in messages."""

    column: str
    name: str
    limit: float
    unit: float
    suffix: str

    @property
    def sign(self) -> int:
        return -1 if self.column == "miou" else 1

    def kept(self, plans: NDArray[np.void]) -> Mask:
        kept: Mask = self.sign * plans[self.column] <= self.sign * self.limit
        return kept

    def text(self, value: float) -> str:
        return f"{self.name} {value / self.unit:.4g} {self.suffix}"

    def __str__(self) -> str:
        return f"{self.name} {'>=' if self.sign < 0 else '<='} {self.limit / self.unit:.4g} {self.suffix}"


def _bounds(evidence: Evidence, requirement: Requirement, plans: NDArray[np.void]) -> list[_Bound]:
    images = evidence.statistics.images
    bounds = []
    if requirement.max_err_pp is not None:
        reference = requirement.counts_from(evidence.baseline_miou(evidence.baseline))
        bounds.append(_Bound("miou", "mIoU", reference - requirement.max_err_pp, 1, "%"))
    if requirement.max_latency is not None:
        limit = requirement.max_latency.resolved(evidence.baseline_cost_ns(), 1e6)
        bounds.append(_Bound("cost_ns", "latency", float(limit * images), 1e6 * images, "ms"))
    if requirement.max_latency_p95 is not None:
        limit = requirement.max_latency_p95.resolved(evidence.baseline_cost_ns(), 1e6)
        bounds.append(_Bound("p95_ns", "p95 latency", limit, 1e6, "ms"))
    if requirement.max_latency_worst is not None:
        limit = requirement.max_latency_worst.resolved(evidence.baseline_cost_ns("p99_ms"), 1e6)
        bounds.append(_Bound("worst_ns", "worst-case latency", limit, 1e6, "ms"))
    if requirement.max_energy is not None:
        limit = requirement.max_energy.resolved(evidence.baseline_cost_ns("energy_mj"), 1e6)
        bounds.append(_Bound("energy_nj", "energy", float(limit * images), 1e6 * images, "mJ"))
    if requirement.max_workload is not None:
        limit = requirement.max_workload.resolved(evidence.candidate.baseline_macs, 1e9)
        bounds.append(_Bound("macs", "workload", float(limit * images), 1e9 * images, "GMACs"))
    if requirement.max_memory_bytes is not None:
        bounds.append(_Bound("memory_bytes", "memory", requirement.max_memory_bytes, 1 << 20, "MiB"))
    return bounds


def _kept(rows: Rows, bounds: list[_Bound]) -> Mask:
    kept = np.ones(len(rows.plans), np.bool_)
    for bound in bounds:
        kept &= bound.kept(rows.plans)
    return kept


def _refusal(rows: Rows, bounds: list[_Bound]) -> str:
    wanted = " and ".join(map(str, bounds))
    reachable = []
    for bound in bounds:
        others = [other for other in bounds if other is not bound]
        values = rows.plans[bound.column][_kept(rows, others)]
        if values.size:
            best = bound.text((bound.sign * values).min() * bound.sign)
            reachable.append(best + (f" with {' and '.join(map(str, others))}" if others else ""))
    if not reachable:
        best_alone = (bound.text((bound.sign * rows.plans[bound.column]).min() * bound.sign) for bound in bounds)
        reachable = [f"{text} alone" for text in best_alone]
    return f"no plan satisfies {wanted}; best reachable: {', or '.join(reachable)}"


def _objective(plans: NDArray[np.void], requirement: Requirement) -> NDArray[Any]:
    """What is to be minimised."""
    if requirement.setting == "anytime":
        return -plans["score"]
    if requirement.objective == "accuracy":
        return -plans["miou"]
    columns = {"latency": "cost_ns", "workload": "macs", "memory": "memory_bytes", "energy": "energy_nj"}
    return plans[columns[requirement.objective or "latency"]]


def _best(evidence: Evidence, rows: Rows, among: NDArray[np.intp], objective: NDArray[Any]) -> int:
    """The row of `among` least by its `objective`, then by mIoU (greatest), number of graphs and text."""
    among = among[objective == objective.min()]
    among = among[rows.plans["miou"][among] == rows.plans["miou"][among].max()]
    among = among[rows.plans["graphs"][among] == rows.plans["graphs"][among].min()]
    return min(map(int, among), key=lambda i: text_of_stages(stages_of_row(evidence, rows, rows.plans[i])))


def _front(evidence: Evidence, rows: Rows, kept: Mask, front_by: tuple[str, ...]) -> list[int]:
    """The rows that no other beats in what the front is by, from the fastest to the most accurate."""
    among = np.flatnonzero(kept)
    cost, miou, memory = (rows.plans[name][among] for name in ("cost_ns", "miou", "memory_bytes"))
    groups = front_groups(cost, miou, memory if "memory" in front_by else None)
    return [_best(evidence, rows, among[group], cost[group]) for group in groups]


def _plan_of_row(evidence: Evidence, requirement: Requirement, rows: Rows, index: int) -> Plan:
    stages = stages_of_row(evidence, rows, rows.plans[index])
    return plan_of_stages(evidence, requirement.setting, stages, requirement.baseline_miou)
