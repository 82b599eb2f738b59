"""Why a plan was chosen: what each exit contributes, what each bound costs, and what would help most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mess_compile.array_types import Ints
from mess_compile.evaluate.diagnose import WeakFinalExit, weak_final_exit
from mess_compile.evaluate.policies import only
from mess_compile.evaluate.statistics import ExitStatistics, miou
from mess_compile.latency.table import Latency, LatencyTable, stage_graphs
from mess_compile.runtime.base.errors import RequirementError
from mess_compile.runtime.base.policy import PLAIN
from mess_compile.search.context import SearchProgress, no_progress
from mess_compile.search.metrics import Evidence, evidence_of_plan, exit_costs_ns, exit_macs, exits_taken
from mess_compile.search.objectives import MEASURES
from mess_compile.search.plan import Plan, SearchResult
from mess_compile.search.requirement import DEFAULT_EXITS, Limit, Requirement

STEP = 0.1
"""The share by which each bound is moved, and a graph is made faster."""
GRAPHS = 3
"""For how many of the plan's graphs a faster one is tried."""
Find = Callable[[Sequence[Evidence], Requirement], SearchResult]
_LIMITS = ("max_latency", "max_latency_p95", "max_latency_worst", "max_workload", "max_energy")
_TIMES = ("mean_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms")
_FASTER = f"{STEP:.0%} faster"


@dataclass(frozen=True)
class ExitShare:
    """One exit: the share of images that leave there, their mIoU (percent) there and by the baseline, and the cost of
    each. An exit that no image takes has no mIoU."""

    exit: int
    exit_point: int
    head: str
    images: int
    coverage: float
    miou: float | None
    baseline_miou: float | None
    gain_pp: float | None
    latency_ms: float
    saved_ms: float
    gmacs: float


@dataclass(frozen=True)
class Outcome:
    """The best plan after a change; `value` is that of the objective."""

    value: float
    latency_ms: float
    miou: float
    heads: tuple[str, ...]


@dataclass(frozen=True)
class BoundCost:
    """A bound, and the best plans with it a tenth `tighter` and `looser`; None: no plan satisfies."""

    bound: str
    limit: str
    tighter_limit: str
    tighter: Outcome | None
    looser_limit: str
    looser: Outcome | None


@dataclass(frozen=True)
class PolicyWorth:
    """The best plan with the rows of some policies alone, None where none satisfies the requirement, and the share of
    the objective that it gains over the thresholds alone."""

    policies: tuple[str, ...]
    outcome: Outcome | None
    gain: float | None


@dataclass(frozen=True)
class Help:
    """A change, the best plan after it, and the share of the objective that it gains."""

    what: str
    outcome: Outcome
    gain: float


@dataclass(frozen=True)
class Explanation:
    """`value` is the plan's in its `objective`; `helps` is in the order of gain."""

    objective: str
    value: float
    exits: tuple[ExitShare, ...]
    bounds: tuple[BoundCost, ...]
    helps: tuple[Help, ...]
    weak_final: WeakFinalExit | None
    policies: tuple[PolicyWorth, ...] = ()


def explain(
    evidences: Sequence[Evidence],
    requirement: Requirement,
    plan: Plan,
    find: Find,
    find_changed: Find,
    progress: SearchProgress = no_progress,
) -> Explanation:
    """Explain the `plan` that `find` found for `requirement` among `evidences`.

    It searches again for each bound and each change, by `find_changed` where the evidence is changed. `progress` is
    called with (searches done, in all).
    """
    bounds, changes = list(_moved_bounds(requirement)), list(_changes(evidences, requirement, plan))
    sets = _sets_of_policies(evidences)
    total = 2 * len(bounds) + len(changes) + len(sets)
    costs, helps = [], []
    for number, (name, limit, tighter, looser) in enumerate(bounds):
        progress(2 * number, total)
        found = [_outcome(find, evidences, each) for each in (tighter, looser)]
        limits = [_limit_text(each, name) for each in (tighter, looser)]
        costs.append(BoundCost(name, limit, limits[0], found[0], limits[1], found[1]))
    value = objective_value(plan, requirement)
    for number, (what, changed, changed_requirement) in enumerate(changes, start=2 * len(bounds)):
        progress(number, total)
        outcome = _outcome(find if changed is evidences else find_changed, changed, changed_requirement)
        if outcome is not None:
            better = outcome.value - value if _is_maximised(requirement) else value - outcome.value
            helps.append(Help(what, outcome, better / abs(value) if value else 0.0))
    found_by_policy = []
    for number, policies in enumerate(sets, start=2 * len(bounds) + len(changes)):
        progress(number, total)
        limited = [replace(each, statistics=only(each.statistics, policies)) for each in evidences]
        found_by_policy.append((policies, _outcome(find_changed, limited, requirement)))
    worth = _worths(found_by_policy, _is_maximised(requirement))
    ordered = sorted(helps, key=lambda each: -each.gain)
    evidence = evidence_of_plan(evidences, plan)
    weak = weak_final_exit(evidence.statistics)
    return Explanation(
        _objective(requirement), value, _exit_shares(evidence, plan), tuple(costs), tuple(ordered), weak, worth
    )


def _sets_of_policies(evidences: Sequence[Evidence]) -> tuple[tuple[str, ...], ...]:
    """The thresholds alone, and with each other policy that there are rows of; nothing where there are none."""
    others = dict.fromkeys(row.policy for each in evidences for row in each.statistics.policy_rows)
    return ((PLAIN,), *((PLAIN, policy) for policy in others)) if others else ()


def _worths(found: Sequence[tuple[tuple[str, ...], Outcome | None]], is_maximised: bool) -> tuple[PolicyWorth, ...]:
    plain = found[0][1] if found else None
    worths = []
    for policies, outcome in found:
        gain = None
        if plain is not None and outcome is not None:
            better = outcome.value - plain.value if is_maximised else plain.value - outcome.value
            gain = better / abs(plain.value) if plain.value else 0.0
        worths.append(PolicyWorth(policies, outcome, gain))
    return tuple(worths)


def _objective(requirement: Requirement) -> str:
    if requirement.setting != "anytime":
        return requirement.objective or "latency"
    return "mIoU over time" if requirement.deadline_ms is None else "mIoU at the deadline"


def _is_maximised(requirement: Requirement) -> bool:
    return requirement.setting == "anytime" or requirement.objective == "accuracy"


def objective_value(plan: Plan, requirement: Requirement) -> float:
    """The value of a plan in the objective: ms, percent of mIoU, GMACs, bytes or mJ."""
    if requirement.setting == "anytime":
        return _anytime_value(plan, requirement.deadline_ms)
    return float(MEASURES[_objective(requirement)].of(plan.predicted))


def _anytime_value(plan: Plan, deadline_ms: float | None) -> float:
    if deadline_ms is not None:
        return max((report.miou for report in plan.reports if report.latency_ms <= deadline_ms), default=0.0)
    horizon = plan.baseline.latency_ms
    ends = [*(report.latency_ms for report in plan.reports[1:]), horizon]
    spans = [max(0.0, min(end, horizon) - r.latency_ms) for r, end in zip(plan.reports, ends, strict=True)]
    return sum(report.miou * span for report, span in zip(plan.reports, spans, strict=True)) / horizon


def _outcome(find: Find, evidences: Sequence[Evidence], requirement: Requirement) -> Outcome | None:
    try:
        plan = find(evidences, requirement).plan
    except RequirementError:
        return None
    heads = tuple(stage.head for stage in plan.stages)
    return Outcome(objective_value(plan, requirement), plan.predicted.latency_ms, plan.predicted.miou, heads)


def _moved_bounds(requirement: Requirement) -> Iterator[tuple[str, str, Requirement, Requirement]]:
    """Each bound: its name and text, and the requirement with it tighter and looser."""
    if requirement.max_err_pp is not None:
        err = requirement.max_err_pp
        step = err * STEP or STEP
        moved = _replaced(requirement, "max_err_pp", max(0.0, err - step), err + step)
        yield "max_err", _limit_text(requirement, "max_err"), *moved
    if requirement.max_change is not None:
        shares = (requirement.max_change * share for share in (1 - STEP, 1 + STEP))
        yield "max_change", _limit_text(requirement, "max_change"), *_replaced(requirement, "max_change", *shares)
    for place, bound in enumerate(requirement.max_class_err):
        step = bound.most_pp * STEP or STEP
        tighter, looser = (_with_class(requirement, place, max(0.0, bound.most_pp + each)) for each in (-step, step))
        yield "max_class_err", f"{bound.name}={bound.most_pp:.4g}%", tighter, looser
    for name in _LIMITS:
        limit: Limit | None = getattr(requirement, name)
        if limit is not None:
            yield (
                name,
                _limit_text(requirement, name),
                *_replaced(
                    requirement, name, *(replace(limit, value=limit.value * share) for share in (1 - STEP, 1 + STEP))
                ),
            )
    if requirement.max_memory_bytes is not None:
        sizes = (round(requirement.max_memory_bytes * share) for share in (1 - STEP, 1 + STEP))
        yield "max_memory", _limit_text(requirement, "max_memory"), *_replaced(requirement, "max_memory_bytes", *sizes)


def _with_class(requirement: Requirement, place: int, most_pp: float) -> Requirement:
    """The requirement with another bound on the class at this place."""
    bounds = list(requirement.max_class_err)
    bounds[place] = replace(bounds[place], most_pp=most_pp)
    return replace(requirement, max_class_err=tuple(bounds))


def _replaced(requirement: Requirement, name: str, tighter: Any, looser: Any) -> tuple[Requirement, Requirement]:
    first, second = {name: tighter}, {name: looser}
    return replace(requirement, **first), replace(requirement, **second)


def _limit_text(requirement: Requirement, name: str) -> str:
    """A bound as its option is written."""
    if name == "max_err":
        return f"{requirement.max_err_pp:.4g}%"
    if name == "max_change":
        return f"{requirement.max_change:.4g}%"
    if name == "max_memory":
        return f"{(requirement.max_memory_bytes or 0) / (1 << 20):.4g}MiB"
    limit: Limit = getattr(requirement, name)
    unit = {"max_workload": "", "max_energy": "mJ"}.get(name, "ms")
    return f"{limit.value:.4g}{'x' if limit.relative else unit}"


def _changes(
    evidences: Sequence[Evidence], requirement: Requirement, plan: Plan
) -> Iterator[tuple[str, Sequence[Evidence], Requirement]]:
    """Changes that may help, as (in words, evidences, requirement)."""
    for graph, precision in _costliest(evidences, plan) if _asks_for_speed(requirement) else ():
        table = _with_faster(evidences[0].table, graph, precision)
        yield f"{graph} {_FASTER}", [replace(each, table=table) for each in evidences], requirement
    if requirement.setting != "budgeted" and requirement.max_exits < DEFAULT_EXITS:
        more = requirement.max_exits + 1
        yield f"--max-exits {more}", evidences, replace(requirement, max_exits=more)
    if requirement.setting == "budgeted":
        yield "--setting input-dependent", evidences, replace(requirement, setting="input-dependent")


def _asks_for_speed(requirement: Requirement) -> bool:
    bounds = requirement.max_latency, requirement.max_latency_p95, requirement.max_latency_worst
    return requirement.setting == "anytime" or requirement.objective in (None, "latency") or any(bounds)


def _costliest(evidences: Sequence[Evidence], plan: Plan) -> list[tuple[str, str]]:
    """The graphs of the plan that take the most time over all images, with their precision."""
    evidence, rates = evidence_of_plan(evidences, plan), plan.predicted.exit_rates
    stages = stage_graphs(evidence.candidate, [stage.head for stage in plan.stages])
    spent: dict[tuple[str, str], float] = {}
    for i, stage in enumerate(stages):
        reached = sum(rates[i:])
        leaving = reached if plan.setting == "anytime" else rates[i]
        for graph, share in (*((name, reached) for name in stage.passed), *((name, leaving) for name in stage.leaving)):
            key = graph, evidence.graph_set.spec(graph).precision
            spent[key] = spent.get(key, 0.0) + share * evidence.table.latency(*key).mean_ms
    return sorted(spent, key=lambda key: -spent[key])[:GRAPHS]


def _with_faster(table: LatencyTable, graph: str, precision: str) -> LatencyTable:
    entry = table.latency(graph, precision)
    faster: Latency = replace(entry, **{name: getattr(entry, name) * (1 - STEP) for name in _TIMES})
    return replace(table, entries={**table.entries, (graph, precision): faster})


def _exit_shares(evidence: Evidence, plan: Plan) -> tuple[ExitShare, ...]:
    statistics, heads = evidence.statistics, [stage.head for stage in plan.stages]
    exits = exits_taken(statistics, plan.stages)
    costs, macs = exit_costs_ns(evidence, plan.setting, heads), exit_macs(evidence.candidate, heads)
    baseline = evidence.scored_as(plan.baseline_name)
    shares = []
    for i, stage in enumerate(plan.stages):
        images = np.flatnonzero(exits == i) if plan.setting != "anytime" else np.arange(statistics.images)
        own, other = (_miou_on(statistics, head, images) for head in (stage.head, baseline))
        shares.append(
            ExitShare(
                exit=i + 1,
                exit_point=stage.exit_point,
                head=stage.head,
                images=len(images),
                coverage=len(images) / statistics.images,
                miou=own,
                baseline_miou=other,
                gain_pp=None if own is None or other is None else own - other,
                latency_ms=costs[i] / 1e6,
                saved_ms=plan.baseline.latency_ms - costs[i] / 1e6,
                gmacs=macs[i] / 1e9,
            )
        )
    return tuple(shares)


def _miou_on(statistics: ExitStatistics, head: str, images: Ints) -> float | None:
    """mIoU in percent of a head on some images; None where they have no labelled pixel."""
    labelled: Ints = statistics.labelled[images].sum(axis=0)
    if not labelled.any():
        return None
    index = statistics.head_index(head)
    return miou(
        statistics.intersection[images, index].sum(axis=0), statistics.predicted[images, index].sum(axis=0), labelled
    )
