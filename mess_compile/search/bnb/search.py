"""The search of a space too large to enumerate: the same optimum by branch and bound, and some points of the front."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mess_compile.runtime.base.errors import InputError, RequirementError
from mess_compile.search.bnb.driver import Proof, branch_and_bound
from mess_compile.search.bnb.incumbent import BestPlan
from mess_compile.search.context import SearchContext, no_progress
from mess_compile.search.deadline import UnfinishedError, is_up
from mess_compile.search.exhaustive.plan_table import plans_in_space
from mess_compile.search.metrics import Evidence, plan_of_stages
from mess_compile.search.objectives import bounds_of
from mess_compile.search.plan import FRONT_BY, Certificate, Plan, SearchResult, Stage
from mess_compile.search.requirement import Requirement

_FRONT_POINTS, _FRONT_SIZE = 12, 2e13
"""So many points of the front are searched for, where the space (plans times images) is no larger."""


def bounded_search(evidence: Evidence, context: SearchContext) -> SearchResult:
    """The optimum, or when the context's clock was up the best plan so far and what a better one could still gain.

    The front is made of plans that no other beats in mean latency and mIoU: in a space of moderate size a dozen from
    the fastest to the most accurate, else the chosen one alone where it is sure to be one of them. Raises
    RequirementError naming the best that can be reached, UnfinishedError when the time was too short to know,
    InputError for a front by memory.
    """
    requirement = context.requirement
    if not set(context.front_by) <= set(FRONT_BY):
        where = "with three early exits" if requirement.early_exits > 2 else "in a space of this size"
        raise InputError(
            f"no front by {', '.join(context.front_by)} can be found {where}: leave --front out, and bound memory with "
            "--max-memory"
        )
    best, proof = branch_and_bound(evidence, context)
    if best is None:
        raise UnfinishedError() if proof.gap > 0 else RequirementError(_refusal(evidence, context))
    plan = _plan(evidence, requirement, best)
    space = plans_in_space(evidence, requirement.early_exits)
    front = _front(evidence, context, space) if context.front_by else ()
    return SearchResult(
        plan=plan,
        front=front or _front_of_one(requirement, plan, proof),
        certificate=Certificate(space, proof.evaluated, 0, space - proof.evaluated, proof.gap, exhaustive=False),
        front_complete=False,
    )


def _plan(evidence: Evidence, requirement: Requirement, best: BestPlan) -> Plan:
    middle = len(evidence.graph_set.gate.thresholds) // 2
    decisions = (*best.decisions, (middle, None))
    stages = tuple(
        Stage(evidence.candidate.point_of(head), head, row, cut)
        for head, (row, cut) in zip(best.heads, decisions, strict=True)
    )
    return plan_of_stages(evidence, requirement.setting, stages, requirement.baseline_miou)


def _front(evidence: Evidence, context: SearchContext, space: int) -> tuple[Plan, ...]:
    """The fastest plans above a few floors of mIoU, with no bounds on latency and mIoU; as far as they were found in
    time."""
    if space * evidence.statistics.images > _FRONT_SIZE:
        return ()
    free = context.of(objective="latency", max_err_pp=None, max_latency=None)
    found: dict[tuple[int, float], BestPlan] = {}
    for point in _points_of_front(evidence, free):
        found[point.goal, point.miou] = point
    return tuple(_plan(evidence, context.requirement, found[key]) for key in sorted(found))


def _points_of_front(evidence: Evidence, free: SearchContext) -> Iterator[BestPlan]:
    fastest = _optimum(evidence, free)
    most_accurate = fastest and _optimum(evidence, free.of(objective="accuracy"))
    if fastest is None or most_accurate is None:
        return
    yield fastest
    for floor in np.linspace(fastest.miou, most_accurate.miou, _FRONT_POINTS)[1:]:
        point = _optimum(evidence, free.of(max_err_pp=0.0, baseline_miou=float(floor)))
        if point is None:
            return
        yield point


def _front_of_one(requirement: Requirement, plan: Plan, proof: Proof) -> tuple[Plan, ...]:
    """The fastest plan is on the front; the best by another objective need not be."""
    return (plan,) if requirement.objective in (None, "latency") and not proof.gap else ()


def _optimum(evidence: Evidence, context: SearchContext) -> BestPlan | None:
    """The optimum; None when there is none, or it could not be proved in time."""
    if is_up(context.clock):
        return None
    best, proof = branch_and_bound(evidence, replace(context, progress=no_progress))
    return None if proof.gap else best


def _refusal(evidence: Evidence, context: SearchContext) -> str:
    """The bounds, and for each that is an objective too the best value that could be reached under the others."""
    bounds = bounds_of(evidence, context.requirement)
    reachable = []
    for field, bound in bounds.items():
        objective = bound.objective
        best = _optimum(evidence, context.of(**{field: None, "objective": objective})) if objective else None
        if best is not None:
            reachable.append(bound.measure.text(_plan(evidence, context.requirement, best).predicted))
    suffix = f"; best reachable: {', or '.join(reachable)}" if reachable else ""
    return f"no plan satisfies {' and '.join(map(str, bounds.values()))}{suffix}"
