"""The search of a space too large to enumerate: the same optimum by branch and bound, and some points of the front."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from mess_compile.runtime.errors import RequirementError
from mess_compile.search import branch
from mess_compile.search.figures import Evidence, baseline_figures, plan_of_stages
from mess_compile.search.plan import Certificate, Plan, SearchResult, Stage
from mess_compile.search.points import operating_points
from mess_compile.search.requirement import Requirement
from mess_compile.search.rows import plans_in_space, refuse_without_plans

_FRONT_POINTS, _FRONT_SIZE = 12, 2e13
"""So many points of the front are searched for, where the space (plans times images) is no larger."""


def search(
    evidence: Evidence, requirement: Requirement, progress: branch.Progress, time_limit_s: float | None = None
) -> SearchResult:
    """The optimum, or at the time limit or Ctrl-C the best plan so far and what a better one could still gain.

    The front are plans that nothing beats in mean latency and mIoU: in a space of moderate size a dozen from the
    fastest to the most accurate, else the chosen one alone where it is sure to be one of them. Raises RequirementError
    naming the best that can be reached, or that the time was too short to tell; InputError for the objective memory.
    """
    deadline = np.inf if time_limit_s is None else time.monotonic() + time_limit_s
    refuse_without_plans(evidence, [head.name for head in evidence.heads if evidence.has_graphs_of([head.name])])
    best, proof = branch.branch_and_bound(evidence, requirement, progress, deadline)
    if best is None:
        if proof.gap > 0:
            raise RequirementError(
                f"in {time_limit_s:g} s no plan was found that satisfies the requirement, and that there is none is not"
                " proved: give --time-limit more, or leave it out"
            )
        raise RequirementError(_refusal(evidence, requirement, deadline))
    plan = _plan(evidence, requirement, best)
    space = plans_in_space(evidence, requirement.early_exits)
    return SearchResult(
        plan=replace(plan, operating_points=operating_points(evidence, plan.setting, plan.stages, plan.predicted)),
        front=_front(evidence, requirement, space, deadline) or _front_of_one(requirement, plan, proof),
        certificate=Certificate(space, proof.evaluated, 0, space - proof.evaluated, proof.gap, exhaustive=False),
    )


def _plan(evidence: Evidence, requirement: Requirement, best: branch.Best) -> Plan:
    middle = len(evidence.graph_set.gate.thresholds) // 2
    decisions = (*best.decisions, (middle, None))
    stages = tuple(
        Stage(evidence.candidate.head(head).exit_point, head, row, cut)
        for head, (row, cut) in zip(best.heads, decisions, strict=True)
    )
    return plan_of_stages(evidence, requirement.setting, stages, requirement.baseline_miou)


def _front(evidence: Evidence, requirement: Requirement, space: int, deadline: float) -> tuple[Plan, ...]:
    """The fastest plans of a few levels of mIoU, by the same bounds but those on latency and mIoU; as far as they were
    found by the deadline or Ctrl-C."""
    if space * evidence.statistics.images > _FRONT_SIZE:
        return ()
    free = replace(requirement, objective="latency", max_err_pp=None, max_latency=None)
    found: dict[tuple[int, float], branch.Best] = {}
    with suppress(KeyboardInterrupt):
        for point in _points_of_front(evidence, free, deadline):
            found[point.goal, point.miou] = point
    return tuple(_plan(evidence, requirement, found[key]) for key in sorted(found))


def _points_of_front(evidence: Evidence, free: Requirement, deadline: float) -> Iterator[branch.Best]:
    fastest = _found(evidence, free, deadline)
    most_accurate = fastest and _found(evidence, replace(free, objective="accuracy"), deadline)
    if fastest is None or most_accurate is None:
        return
    yield fastest
    for floor in np.linspace(fastest.miou, most_accurate.miou, _FRONT_POINTS)[1:]:
        point = _found(evidence, replace(free, max_err_pp=0.0, baseline_miou=float(floor)), deadline)
        if point is None:
            return
        yield point


def _front_of_one(requirement: Requirement, plan: Plan, proof: branch.Proof) -> tuple[Plan, ...]:
    """The fastest plan is on the front; the best by another objective need not be."""
    return (plan,) if requirement.objective in (None, "latency") and not proof.gap else ()


def _found(evidence: Evidence, requirement: Requirement, deadline: float) -> branch.Best | None:
    """The optimum; None when there is none, or it could not be proven in time."""
    if time.monotonic() > deadline:
        return None
    best, proof = branch.branch_and_bound(evidence, requirement, lambda done, total: None, deadline)
    return None if proof.gap else best


def _refusal(evidence: Evidence, requirement: Requirement, deadline: float) -> str:
    """Each bound that a plan can be held against, and the best that it could be where the others hold."""
    wanted, reachable = [], []
    baseline = baseline_figures(evidence, requirement.baseline_miou)
    for name, objective, text, column, unit in (
        ("max_err_pp", "accuracy", "mIoU", "miou", "%"),
        ("max_latency", "latency", "latency", "latency_ms", "ms"),
        ("max_workload", "workload", "workload", "gmacs", "GMACs"),
        ("max_energy", "energy", "energy", "energy_mj", "mJ"),
    ):
        bound = getattr(requirement, name)
        if bound is None:
            continue
        limit = baseline.miou - bound if name == "max_err_pp" else bound.value
        if name != "max_err_pp" and bound.relative:
            limit *= getattr(baseline, column)
        wanted.append(f"{text} {'>=' if name == 'max_err_pp' else '<='} {limit:.4g} {unit}")
        best = _found(evidence, _without(requirement, name, objective), deadline)
        if best is not None:
            value = getattr(_plan(evidence, requirement, best).predicted, column)
            reachable.append(f"{text} {value:.4g} {unit}")
    others = "" if wanted else "the bounds"
    return f"no plan satisfies {others or ' and '.join(wanted)}; best reachable: {', or '.join(reachable) or 'none'}"


def _without(requirement: Requirement, bound: str, objective: str) -> Requirement:
    changes: dict[str, Any] = {bound: None, "objective": objective}
    return replace(requirement, **changes)
