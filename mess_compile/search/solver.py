"""The search: the best plan under a requirement, the front it stands on, and the certificate."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mess_compile.array_types import Mask
from mess_compile.latency.table import Quantity
from mess_compile.runtime.base.errors import InputError, RequirementError
from mess_compile.runtime.bundle.manifest import OperatingPoint
from mess_compile.search.class_floors import with_baseline
from mess_compile.search.context import SearchContext, SearchProgress, no_progress
from mess_compile.search.deadline import Clock, UnfinishedError
from mess_compile.search.exhaustive.cache import cached_plan_table
from mess_compile.search.exhaustive.enumeration import Selection
from mess_compile.search.exhaustive.plan_table import (
    PlanTable,
    enumerate_plans,
    least_cost_of_plans,
    needs_branch_and_bound,
    plans_in_space,
    plans_near,
    stages_of_row,
    text_of_stages,
)
from mess_compile.search.metrics import (
    Evidence,
    best_baseline,
    evidence_of_plan,
    plan_of_stages,
    refuse_different_images,
    refuse_without_energy,
)
from mess_compile.search.objectives import MEASURES, Bound, bounds_of, floors_of, objective_of
from mess_compile.search.operating_points import with_operating_points
from mess_compile.search.pareto import front_groups
from mess_compile.search.plan import (
    FRONT_BY,
    REFINED_POINT,
    Candidate,
    Certificate,
    Plan,
    SearchResult,
    decisions_of,
)
from mess_compile.search.requirement import Requirement

_AXES = {"latency": "cost_ns", "miou": "miou", "memory": "memory_bytes"}
_SELECTED: dict[str, Literal["changed", "margin"]] = {"max_change": "changed", "max_class_err": "margin"}
"""What plans at the same cost are chosen by where the bound of this field cannot be satisfied."""
_COUNTS = ("space", "evaluated", "duplicates", "bounded")


def search(
    evidence: Evidence,
    requirement: Requirement,
    progress: SearchProgress = no_progress,
    front_by: tuple[str, ...] = FRONT_BY,
    cache_folder: Path | None = None,
    clock: Clock | None = None,
) -> SearchResult:
    """The optimum over the whole space, by enumeration, or by branch and bound where the space needs it.

    docs/definitions.md defines the space and the order of equal plans. The front is by mean latency, mIoU and what else
    `front_by` names, of the plans that satisfy the other bounds; where it names nothing there is no front, and there
    are no operating points. What does not depend on the requirement is stored in `cache_folder`. `progress` is called
    with (chains of heads done, in all). When the `clock` is up, or with one at Ctrl-C, the best plan so far is
    returned, with its gap. Raises RequirementError naming the best that can be reached when no plan satisfies the
    requirement, UnfinishedError when none was found in time, InputError when it needs energies that the latency table
    lacks.
    """
    context = SearchContext(requirement, front_by, progress, cache_folder, clock)
    result = _search(evidence, context)
    return _with_points(evidence, requirement, result) if front_by else result


def _search(evidence: Evidence, context: SearchContext) -> SearchResult:
    """As `search`, without operating points."""
    requirement, front_by = context.requirement, context.front_by
    if requirement.needs_energy:
        refuse_without_energy(evidence)
    if requirement.setting == "input-dependent" and needs_branch_and_bound(evidence, requirement.early_exits):
        from mess_compile.search.bnb.search import bounded_search  # compiles when it is first used

        return bounded_search(evidence, context)
    table, chosen = _enumerated(evidence, context)
    front = _rows_of_front(evidence, context, table) if front_by else []
    plan = _plan_of_row(evidence, requirement, table, chosen)
    return SearchResult(
        plan=plan,
        front=tuple(_plan_of_row(evidence, requirement, table, index) for index in front),
        certificate=_certificate(evidence, requirement, table, plan),
        front_by=front_by or FRONT_BY,
        front_complete=bool(front_by) and not table.skipped,
    )


def _enumerated(evidence: Evidence, context: SearchContext) -> tuple[PlanTable, int]:
    """The table of all plans, and the row of the optimum."""
    requirement = context.requirement
    bounds = bounds_of(evidence, requirement)
    table = cached_plan_table(evidence, context, _selection(bounds))
    feasible = _feasible(table, bounds.values())
    if not feasible.any():
        raise UnfinishedError() if table.skipped else RequirementError(_refusal(evidence, context, table, bounds))
    objective = objective_of(table.plans, requirement)
    chosen = _best(evidence, table, np.flatnonzero(feasible), objective[feasible])
    if requirement.deadline_ms is not None and not objective[chosen]:
        raise RequirementError(_too_early(evidence, requirement, table))
    return table, chosen


def _rows_of_front(evidence: Evidence, context: SearchContext, table: PlanTable) -> list[int]:
    """The front under the bounds on what it is not by."""
    free = {_AXES[axis] for axis in context.front_by}
    bounds = bounds_of(evidence, context.requirement).values()
    on_front = _feasible(table, [bound for bound in bounds if bound.measure.column not in free])
    return _front(evidence, table, on_front, context.front_by)


def optimum_and_front(evidences: Sequence[Evidence], context: SearchContext) -> tuple[Plan, tuple[Candidate, ...]]:
    """The plan that `search_recipes` chooses, and the plans of every recipe's front.

    Figures of the front's plans, which take most of the time of a small search, are not computed. A space that is not
    enumerated, and the anytime setting, have the optimum alone. Raises RequirementError when no plan satisfies.
    """
    requirement = _of_recipes(evidences, context.requirement)
    context, plans, front = replace(context, requirement=requirement), [], list[Candidate]()
    for evidence in evidences:
        with suppress(RequirementError):
            if requirement.setting == "anytime" or needs_branch_and_bound(evidence, requirement.early_exits):
                plans.append(_search(evidence, replace(context, front_by=())).plan)
                continue
            table, chosen = _enumerated(evidence, context)
            plans.append(_plan_of_row(evidence, requirement, table, chosen))
            for row in _rows_of_front(evidence, context, table):
                stages = stages_of_row(evidence, table, table.plans[row])
                front.append(Candidate(evidence.graph_set.recipe, requirement.setting, stages))
    if not plans:
        raise RequirementError("no plan satisfies the requirement on these images")
    plan = min(plans, key=lambda plan: _order(plan, requirement))
    return plan, tuple(front)


def _with_points(evidence: Evidence, requirement: Requirement, result: SearchResult) -> SearchResult:
    refined = _refined(evidence, requirement, result.plan)
    return replace(result, plan=with_operating_points(evidence, result.plan, refined))


def _refined(evidence: Evidence, requirement: Requirement, plan: Plan) -> tuple[OperatingPoint, ...]:
    """The plan with cuts off the grid, where that is better; nothing is proved about it."""
    if plan.setting != "input-dependent" or len(plan.stages) == 1:
        return ()
    bounds = bounds_of(evidence, requirement)
    table = plans_near(evidence, plan.stages, _selection(bounds))
    feasible = _feasible(table, bounds.values())
    best = _best(evidence, table, np.flatnonzero(feasible), objective_of(table.plans, requirement)[feasible])
    found = _plan_of_row(evidence, requirement, table, best)
    if _order(found, requirement)[:2] >= _order(plan, requirement)[:2]:
        return ()
    return (OperatingPoint(REFINED_POINT, decisions_of(found.stages), found.predicted),)


def _certificate(evidence: Evidence, requirement: Requirement, table: PlanTable, chosen: Plan) -> Certificate:
    duplicates = table.space - table.evaluated
    if not table.skipped:
        return Certificate(table.space, table.evaluated, duplicates, bounded=0, gap=0.0, exhaustive=True)
    gap = _gap(evidence, requirement, table, chosen)
    space = plans_in_space(evidence, requirement.early_exits)
    return Certificate(space, table.evaluated, duplicates, bounded=0, gap=gap, exhaustive=False)


def _gap(evidence: Evidence, requirement: Requirement, table: PlanTable, chosen: Plan) -> float:
    """The most that a skipped plan could gain over the `chosen` one."""
    value = abs(_order(chosen, requirement)[0])
    quantities: dict[str, Quantity] = {"latency": "mean_ms", "energy": "energy_mj"}
    quantity = quantities.get(requirement.objective or "latency")
    if quantity is None:  # of skipped plans it is only known that mIoU is at most 100, and the others at least 0
        return 100.0 - value if requirement.objective == "accuracy" else value
    least = min(least_cost_of_plans(evidence, early, quantity) for early in table.skipped)
    return max(0.0, value - least / 1e6)


def _too_early(evidence: Evidence, requirement: Requirement, table: PlanTable) -> str:
    first = int(table.plans["cost_ns"].min()) / evidence.statistics.images / 1e6
    return f"no plan reports by {requirement.deadline_ms:g} ms: the earliest report of any plan is at {first:.4g} ms"


def search_recipes(
    evidences: Sequence[Evidence],
    requirement: Requirement,
    progress: SearchProgress = no_progress,
    front_by: tuple[str, ...] = FRONT_BY,
    cache_folder: Path | None = None,
    clock: Clock | None = None,
) -> SearchResult:
    """The optimum over the plans of several precision recipes of one network; of equal plans that of the first.

    The error counts from the best baseline of any of them, latency and workload are relative to each recipe's own: an
    int8 plan near a poor int8 baseline helps nobody. Raises as `search` does, and InputError for the anytime setting
    with several recipes, for its area ends at the baseline's latency.
    """
    context = SearchContext(requirement, front_by, progress, cache_folder, clock)
    result = search_without_points(evidences, context)
    if not front_by:
        return result
    return _with_points(evidence_of_plan(evidences, result.plan), _of_recipes(evidences, requirement), result)


def search_without_points(evidences: Sequence[Evidence], context: SearchContext) -> SearchResult:
    """As `search_recipes`, without operating points, which take time."""
    if len(evidences) > 1 and context.requirement.setting == "anytime":
        names = ", ".join(evidence.graph_set.recipe for evidence in evidences)
        raise InputError(f"the anytime setting compares plans of one precision: name one of {names} with --precision")
    refuse_different_images(evidences)
    requirement = _of_recipes(evidences, context.requirement)
    context = replace(context, requirement=requirement)
    found, refusals, unfinished = [], [], False
    for evidence in evidences:
        try:
            found.append(_search(evidence, context))
        except UnfinishedError:
            unfinished = True
        except RequirementError as error:
            refusals.append(f"{evidence.graph_set.recipe}: {error}" if len(evidences) > 1 else str(error))
    if not found:
        raise UnfinishedError() if unfinished else RequirementError("; ".join(refusals))
    plan = min((result.plan for result in found), key=lambda plan: _order(plan, requirement))
    return SearchResult(
        plan=plan,
        front=_merged([plan for result in found for plan in result.front], context.front_by),
        front_by=context.front_by or FRONT_BY,
        front_complete=not unfinished and all(result.front_complete for result in found),
        certificate=_joint_certificate([result.certificate for result in found], requirement, plan, unfinished),
    )


def _joint_certificate(
    proofs: Sequence[Certificate], requirement: Requirement, plan: Plan, unfinished: bool
) -> Certificate:
    """One certificate for all recipes; `unfinished`: of some recipe nothing was found in time."""
    value = abs(_order(plan, requirement)[0])
    unknown = (100.0 - value if requirement.objective == "accuracy" else value) if unfinished else 0.0
    return replace(
        proofs[0],
        **{name: sum(getattr(proof, name) for proof in proofs) for name in _COUNTS},
        gap=max(unknown, *(proof.gap for proof in proofs)),
        exhaustive=all(proof.exhaustive for proof in proofs) and not unfinished,
    )


def _of_recipes(evidences: Sequence[Evidence], requirement: Requirement) -> Requirement:
    """The error of several recipes counts from the best baseline, and so does that of a class."""
    if len(evidences) == 1:
        return requirement
    place, name = best_baseline(evidences)
    miou = evidences[place].baseline_miou(evidences[place].baseline)
    bounds = with_baseline(evidences[place].statistics, name, requirement.max_class_err)
    given = requirement.baseline_miou
    return replace(requirement, baseline_miou=miou if given is None else given, max_class_err=bounds)


def _order(plan: Plan, requirement: Requirement) -> tuple[float, float, int]:
    """By objective, then mIoU (greatest), then number of graphs."""
    objective = requirement.objective or "latency"
    value = MEASURES[objective].of(plan.predicted)
    return -value if objective == "accuracy" else value, -plan.predicted.miou, len(plan.graphs)


def _merged(plans: list[Plan], front_by: tuple[str, ...]) -> tuple[Plan, ...]:
    """The plans that no other dominates in what the front is by, from the fastest to the most accurate; of equal plans
    the first."""
    if not plans:
        return ()
    cost, miou, memory = (
        np.array([getattr(plan.predicted, name) for plan in plans]) for name in ("latency_ms", "miou", "memory_bytes")
    )
    groups = front_groups(cost, miou, memory if "memory" in front_by else None)
    return tuple(plans[min(group)] for group in groups)


def _feasible(table: PlanTable, bounds: Collection[Bound]) -> Mask:
    feasible = np.ones(len(table.plans), np.bool_)
    for bound in bounds:
        feasible &= bound.is_met(table.plans)
    return feasible


def _selection(bounds: Mapping[str, Bound]) -> Selection:
    """The plans that a table needs where changes, or the IoU of classes, are bounded."""
    most = int(bounds["max_change"].limit) if "max_change" in bounds else None
    return Selection(most, floors_of(bounds))


def _refusal(evidence: Evidence, context: SearchContext, table: PlanTable, bounds: Mapping[str, Bound]) -> str:
    """The bounds, and for each the best value under the others; where that is none, the best without them."""
    reachable = []
    for field, bound in bounds.items():
        others = [other for other in bounds.values() if other is not bound]
        known = _best_in(field, evidence, context, bounds) if field in _SELECTED else table
        plans = known.plans[_feasible(known, others)]
        if plans.size:
            reachable.append(bound.best_of(plans) + (f" with {' and '.join(map(str, others))}" if others else ""))
    if not reachable:
        free = enumerate_plans(evidence, context) if bounds.keys() & _SELECTED.keys() else table
        for field, bound in bounds.items():
            alone = {field: bound}
            known = _best_in(field, evidence, context, alone) if field in _SELECTED else free
            reachable.append(f"{bound.best_of(known.plans)} alone")
    required = " and ".join(map(str, bounds.values()))
    return f"no plan satisfies {required}; best reachable: {', or '.join(reachable)}"


def _best_in(field: str, evidence: Evidence, context: SearchContext, bounds: Mapping[str, Bound]) -> PlanTable:
    """The plans that are best at their cost by what `field` bounds, within the other bounds of a selection."""
    floor = bounds["max_err_pp"].limit if "max_err_pp" in bounds else -math.inf
    return enumerate_plans(evidence, context, replace(_selection(bounds), best=_SELECTED[field], floor=floor))


def _best(evidence: Evidence, table: PlanTable, among: NDArray[np.intp], objective: NDArray[Any]) -> int:
    """The row of `among` least by its `objective`, then by mIoU (greatest), number of graphs and text."""
    among = among[objective == objective.min()]
    among = among[table.plans["miou"][among] == table.plans["miou"][among].max()]
    among = among[table.plans["graphs"][among] == table.plans["graphs"][among].min()]
    plain = len(evidence.statistics.gate.thresholds)
    return min(map(int, among), key=lambda i: text_of_stages(stages_of_row(evidence, table, table.plans[i]), plain))


def _front(evidence: Evidence, table: PlanTable, feasible: Mask, front_by: tuple[str, ...]) -> list[int]:
    """The rows that no other dominates in what the front is by, from the fastest to the most accurate."""
    among = np.flatnonzero(feasible)
    cost, miou, memory = (table.plans[name][among] for name in ("cost_ns", "miou", "memory_bytes"))
    groups = front_groups(cost, miou, memory if "memory" in front_by else None)
    return [_best(evidence, table, among[group], cost[group]) for group in groups]


def _plan_of_row(evidence: Evidence, requirement: Requirement, table: PlanTable, index: int) -> Plan:
    stages = stages_of_row(evidence, table, table.plans[index])
    return plan_of_stages(evidence, requirement.setting, stages, requirement.baseline_miou)
