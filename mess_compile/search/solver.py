"""The search: the best plan under a requirement, the front it stands on, and the certificate."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile.latency.table import Quantity
from mess_compile.runtime.base.errors import InputError, RequirementError
from mess_compile.search.constraints import MEASURES, Bound, bounds_of, objective_of
from mess_compile.search.deadline import Clock, UnfinishedError
from mess_compile.search.exhaustive.cache import kept_rows
from mess_compile.search.exhaustive.plan_table import (
    Progress,
    Rows,
    is_large,
    least_cost_of_plans,
    plans_in_space,
    rows_near,
    stages_of_row,
    text_of_stages,
)
from mess_compile.search.metrics import (
    Evidence,
    evidence_of_plan,
    plan_of_stages,
    refuse_different_images,
    refuse_without_energy,
)
from mess_compile.search.operating_points import operating_points
from mess_compile.search.pareto import front_groups
from mess_compile.search.plan import (
    FRONT_BY,
    REFINED_POINT,
    Certificate,
    OperatingPoint,
    Plan,
    SearchResult,
    decisions_of,
)
from mess_compile.search.requirement import Requirement

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
    result = _search(evidence, requirement, progress, front_by, kept, clock)
    return _with_points(evidence, requirement, result) if front_by else result


def _search(
    evidence: Evidence,
    requirement: Requirement,
    progress: Progress,
    front_by: tuple[str, ...],
    kept: Path | None,
    clock: Clock | None,
) -> SearchResult:
    """As `search`, but for the operating points."""
    if requirement.needs_energy:
        refuse_without_energy(evidence)
    if requirement.setting == "input-dependent" and is_large(evidence, requirement.early_exits):
        from mess_compile.search.bnb import search as large  # compiles when it is first used

        return large.search(evidence, requirement, progress, front_by, clock)
    rows = kept_rows(evidence, requirement, progress, kept, clock)
    bounds = bounds_of(evidence, requirement).values()
    feasible = _kept(rows, bounds)
    if not feasible.any():
        raise UnfinishedError() if rows.left else RequirementError(_refusal(rows, bounds))
    objective = objective_of(rows.plans, requirement)
    chosen = _best(evidence, rows, np.flatnonzero(feasible), objective[feasible])
    if requirement.deadline_ms is not None and not objective[chosen]:
        raise RequirementError(_too_early(evidence, requirement, rows))
    free = {_AXES[axis] for axis in front_by}
    fixed = _kept(rows, [bound for bound in bounds if bound.measure.column not in free])
    front = _front(evidence, rows, fixed, front_by) if front_by else []
    plan = _plan_of_row(evidence, requirement, rows, chosen)
    return SearchResult(
        plan=plan,
        front=tuple(_plan_of_row(evidence, requirement, rows, index) for index in front),
        certificate=_certificate(evidence, requirement, rows, plan),
        front_by=front_by or FRONT_BY,
        front_complete=bool(front_by) and not rows.left,
    )


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
    feasible = _kept(rows, bounds_of(evidence, requirement).values())
    best = _best(evidence, rows, np.flatnonzero(feasible), objective_of(rows.plans, requirement)[feasible])
    found = _plan_of_row(evidence, requirement, rows, best)
    if _order(found, requirement)[:2] >= _order(plan, requirement)[:2]:
        return ()
    return (OperatingPoint(REFINED_POINT, decisions_of(found.stages), found.predicted),)


def _certificate(evidence: Evidence, requirement: Requirement, rows: Rows, chosen: Plan) -> Certificate:
    duplicates = rows.space - rows.evaluated
    if not rows.left:
        return Certificate(rows.space, rows.evaluated, duplicates, bounded=0, gap=0.0, exhaustive=True)
    gap = _gap(evidence, requirement, rows, chosen)
    space = plans_in_space(evidence, requirement.early_exits)
    return Certificate(space, rows.evaluated, duplicates, bounded=0, gap=gap, exhaustive=False)


def _gap(evidence: Evidence, requirement: Requirement, rows: Rows, chosen: Plan) -> float:
    """What a plan that was left out could gain at the most over the `chosen` one."""
    value = abs(_order(chosen, requirement)[0])
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
    result = search_without_points(evidences, requirement, progress, front_by, kept, clock)
    if not front_by:
        return result
    return _with_points(evidence_of_plan(evidences, result.plan), _of_recipes(evidences, requirement), result)


def search_without_points(
    evidences: Sequence[Evidence],
    requirement: Requirement,
    progress: Progress = lambda done, total: None,
    front_by: tuple[str, ...] = FRONT_BY,
    kept: Path | None = None,
    clock: Clock | None = None,
) -> SearchResult:
    """As `search_recipes`, but that the plan has no operating points beside itself, which take their time."""
    if len(evidences) > 1 and requirement.setting == "anytime":
        names = ", ".join(evidence.graph_set.recipe for evidence in evidences)
        raise InputError(f"the anytime setting compares plans of one recipe: name one of {names} with --precision")
    refuse_different_images(evidences)
    requirement = _of_recipes(evidences, requirement)
    found, refusals, unfinished = [], [], False
    for evidence in evidences:
        try:
            found.append(_search(evidence, requirement, progress, front_by, kept, clock))
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


def _of_recipes(evidences: Sequence[Evidence], requirement: Requirement) -> Requirement:
    """The error of several recipes counts from the best baseline."""
    if requirement.baseline_miou is not None or len(evidences) == 1:
        return requirement
    return replace(requirement, baseline_miou=max(each.baseline_miou(each.baseline) for each in evidences))


def _order(plan: Plan, requirement: Requirement) -> tuple[float, float, int]:
    """By objective, then mIoU (greatest), then number of graphs."""
    objective = requirement.objective or "latency"
    value = MEASURES[objective].of(plan.predicted)
    return -value if objective == "accuracy" else value, -plan.predicted.miou, len(plan.graphs)


def _merged(plans: list[Plan], front_by: tuple[str, ...]) -> tuple[Plan, ...]:
    """Those that no other beats in what the front is by, from the fastest to the most accurate; of equals the first."""
    if not plans:
        return ()
    cost, miou, memory = (
        np.array([getattr(plan.predicted, name) for plan in plans]) for name in ("latency_ms", "miou", "memory_bytes")
    )
    groups = front_groups(cost, miou, memory if "memory" in front_by else None)
    return tuple(plans[min(group)] for group in groups)


def _kept(rows: Rows, bounds: Collection[Bound]) -> Mask:
    kept = np.ones(len(rows.plans), np.bool_)
    for bound in bounds:
        kept &= bound.kept(rows.plans)
    return kept


def _refusal(rows: Rows, bounds: Collection[Bound]) -> str:
    wanted = " and ".join(map(str, bounds))
    reachable = []
    for bound in bounds:
        others = [other for other in bounds if other is not bound]
        plans = rows.plans[_kept(rows, others)]
        if plans.size:
            reachable.append(bound.best_of(plans) + (f" with {' and '.join(map(str, others))}" if others else ""))
    if not reachable:
        reachable = [f"{bound.best_of(rows.plans)} alone" for bound in bounds]
    return f"no plan satisfies {wanted}; best reachable: {', or '.join(reachable)}"


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
