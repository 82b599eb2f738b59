"""The search of a space too large to enumerate: the same optimum by branch and bound, and some points of the front."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from mess_compile.runtime.base.errors import InputError, RequirementError
from mess_compile.search.bnb import driver
from mess_compile.search.constraints import bounds_of
from mess_compile.search.deadline import Clock, UnfinishedError
from mess_compile.search.exhaustive.plan_table import plans_in_space
from mess_compile.search.metrics import Evidence, plan_of_stages
from mess_compile.search.plan import FRONT_BY, Certificate, Plan, SearchResult, Stage
from mess_compile.search.requirement import Requirement

_FRONT_POINTS, _FRONT_SIZE = 12, 2e13
"""So many points of the front are searched for, where the space (plans times images) is no larger."""


def search(
    evidence: Evidence,
    requirement: Requirement,
    progress: driver.Progress,
    front_by: tuple[str, ...] = FRONT_BY,
    clock: Clock | None = None,
) -> SearchResult:
    """The optimum, or when the `clock` was up the best plan so far and what a better one could still gain.

    The front are plans that nothing beats in mean latency and mIoU: in a space of moderate size a dozen from the
    fastest to the most accurate, else the chosen one alone where it is sure to be one of them. Raises RequirementError
    naming the best that can be reached, UnfinishedError when the time was too short to tell, InputError for a front by
    memory.
    """
    if not set(front_by) <= set(FRONT_BY):
        where = "with three early exits" if requirement.early_exits > 2 else "in a space as large as this"
        raise InputError(
            f"a front by {', '.join(front_by)} is not searched for {where}: leave --front out, and bound memory by "
            "--max-memory"
        )
    best, proof = driver.branch_and_bound(evidence, requirement, progress, clock)
    if best is None:
        raise UnfinishedError() if proof.gap > 0 else RequirementError(_refusal(evidence, requirement, clock))
    plan = _plan(evidence, requirement, best)
    space = plans_in_space(evidence, requirement.early_exits)
    front = _front(evidence, requirement, space, clock) if front_by else ()
    return SearchResult(
        plan=plan,
        front=front or _front_of_one(requirement, plan, proof),
        certificate=Certificate(space, proof.evaluated, 0, space - proof.evaluated, proof.gap, exhaustive=False),
        front_complete=False,
    )


def _plan(evidence: Evidence, requirement: Requirement, best: driver.Best) -> Plan:
    middle = len(evidence.graph_set.gate.thresholds) // 2
    decisions = (*best.decisions, (middle, None))
    stages = tuple(
        Stage(evidence.candidate.point_of(head), head, row, cut)
        for head, (row, cut) in zip(best.heads, decisions, strict=True)
    )
    return plan_of_stages(evidence, requirement.setting, stages, requirement.baseline_miou)


def _front(evidence: Evidence, requirement: Requirement, space: int, clock: Clock | None) -> tuple[Plan, ...]:
    """The fastest plans of a few levels of mIoU, by the same bounds but those on latency and mIoU; as far as they were
    found in time."""
    if space * evidence.statistics.images > _FRONT_SIZE:
        return ()
    free = replace(requirement, objective="latency", max_err_pp=None, max_latency=None)
    found: dict[tuple[int, float], driver.Best] = {}
    for point in _points_of_front(evidence, free, clock):
        found[point.goal, point.miou] = point
    return tuple(_plan(evidence, requirement, found[key]) for key in sorted(found))


def _points_of_front(evidence: Evidence, free: Requirement, clock: Clock | None) -> Iterator[driver.Best]:
    fastest = _found(evidence, free, clock)
    most_accurate = fastest and _found(evidence, replace(free, objective="accuracy"), clock)
    if fastest is None or most_accurate is None:
        return
    yield fastest
    for floor in np.linspace(fastest.miou, most_accurate.miou, _FRONT_POINTS)[1:]:
        point = _found(evidence, replace(free, max_err_pp=0.0, baseline_miou=float(floor)), clock)
        if point is None:
            return
        yield point


def _front_of_one(requirement: Requirement, plan: Plan, proof: driver.Proof) -> tuple[Plan, ...]:
    """The fastest plan is on the front; the best by another objective need not be."""
    return (plan,) if requirement.objective in (None, "latency") and not proof.gap else ()


def _found(evidence: Evidence, requirement: Requirement, clock: Clock | None) -> driver.Best | None:
    """The optimum; None when there is none, or it could not be proven in time."""
    if clock is not None and clock.up:
        return None
    best, proof = driver.branch_and_bound(evidence, requirement, lambda done, total: None, clock)
    return None if proof.gap else best


def _refusal(evidence: Evidence, requirement: Requirement, clock: Clock | None) -> str:
    """The bounds, and what could be reached in place of each that is an objective too, where the others hold."""
    bounds = bounds_of(evidence, requirement)
    reachable = []
    for field, bound in bounds.items():
        objective = bound.objective
        best = _found(evidence, _without(requirement, field, objective), clock) if objective else None
        if best is not None:
            reachable.append(bound.measure.text(_plan(evidence, requirement, best).predicted))
    told = f"; best reachable: {', or '.join(reachable)}" if reachable else ""
    return f"no plan satisfies {' and '.join(map(str, bounds.values()))}{told}"


def _without(requirement: Requirement, bound: str, objective: str) -> Requirement:
    changes: dict[str, Any] = {bound: None, "objective": objective}
    return replace(requirement, **changes)
