"""Operating points: other thresholds for the heads of a plan, with the same graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mess_compile.array_types import Index, Ints
from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.runtime.bundle.manifest import Figures, OperatingPoint
from mess_compile.search.exhaustive.enumeration import (
    Outcomes,
    Scores,
    best_outcomes,
    merged,
    outcomes_of_three,
    states_of_pair,
)
from mess_compile.search.metrics import Evidence, exit_costs_ns, exits_taken, figures_of_stages
from mess_compile.search.pareto import front_groups
from mess_compile.search.plan import POINT_NAMES, Plan, Stage, decisions_of, default_point, rows_in_use
from mess_compile.search.space import ENUMERATED_EXITS, Decisions, Grids, cut_grids, head_options, nobody, row_text

Front = tuple[Ints, NDArray[np.float64], list[tuple[Stage, ...]]]
"""The Pareto front of the thresholds of some heads, from the fastest to the most accurate: cost in ns, summed over
images, mIoU in percent, and the stages."""


def with_operating_points(evidence: Evidence, plan: Plan, refined: tuple[OperatingPoint, ...] = ()) -> Plan:
    """The plan with its operating points, then those that are `refined`, and the policies' rows that they decide by."""
    points = operating_points(evidence, plan.setting, plan.stages, plan.predicted) + refined
    rows = rows_in_use(evidence.statistics.policy_rows, plan.stages, points)
    return replace(plan, operating_points=points, policy_rows=rows)


def operating_points(
    evidence: Evidence, setting: str, stages: Sequence[Stage], predicted: Figures
) -> tuple[OperatingPoint, ...]:
    """Up to five points of a plan with these stages, from the fastest to the most accurate; one is the plan itself.

    The others are on the front of latency and mIoU of its heads: both ends, and between each end and the plan the point
    nearest to the middle in latency. They need not satisfy any bound but that on memory, which is the same for all.
    """
    default = default_point(stages, predicted)
    if setting != "input-dependent" or len(stages) == 1:
        return (default,)
    costs = exit_costs_ns(evidence, "input-dependent", [stage.head for stage in stages])
    cost_ns, mious, members = thresholds_front(evidence.statistics, stages, costs)
    cost = _cost_ns(evidence, stages)
    faster = np.flatnonzero((cost_ns < cost) & (mious < predicted.miou))
    slower = np.flatnonzero((cost_ns > cost) & (mious > predicted.miou))
    chosen = {
        "fastest": faster[:1],
        "fast": _middle(cost_ns, faster[1:], faster[:1], cost),
        "accurate": _middle(cost_ns, slower[:-1], slower[-1:], cost),
        "most-accurate": slower[-1:],
    }
    found = {default.name: default}
    for name, place in chosen.items():
        for member in (members[index] for index in place):
            found[name] = OperatingPoint(name, decisions_of(member), figures_of_stages(evidence, setting, member))
    return tuple(found[name] for name in POINT_NAMES if name in found)


def _middle(cost_ns: Ints, among: Index, end: Index, cost: int) -> Index:
    """The point of `among` whose cost is nearest to the middle between `cost` and that of `end`, if there is one."""
    return among[np.abs(2 * cost_ns[among] - cost - cost_ns[end]).argmin(keepdims=True)] if among.size else among


def _cost_ns(evidence: Evidence, stages: Sequence[Stage]) -> int:
    costs = exit_costs_ns(evidence, "input-dependent", [stage.head for stage in stages])
    return int(np.array(costs, np.int64)[exits_taken(evidence.statistics, stages)].sum())


def thresholds_front(statistics: ExitStatistics, stages: Sequence[Stage], costs: Sequence[int]) -> Front:
    """The front over every threshold row and cut at the early stages, evaluated exactly; of equal points the first by
    text. With three early stages it is over every cut at the rows that they have.

    `costs` are those of an image that leaves at each stage, in ns.
    """
    early, last = stages[:-1], stages[-1]
    options = [head_options(statistics, stage.head, _grids(statistics, stage, len(early))) for stage in early]
    found = _outcomes(Scores(statistics), [stage.head for stage in early], last.head, options)
    leave = np.append(found.at, statistics.images - found.at.sum(axis=1, keepdims=True), axis=1)  # (rows, exits)
    cost_ns = leave @ np.array(costs, np.int64)

    def member(index: int) -> tuple[Stage, ...]:
        decided = [
            replace(stage, row=int(option.rows[taken]), cut=int(option.cuts[taken]))
            for stage, option, taken in zip(early, options, found.taken[index], strict=True)
        ]
        return (*decided, last)

    groups = front_groups(cost_ns, found.scores.miou)
    text = partial(_text, plain=len(statistics.gate.thresholds))
    members = [min((member(int(index)) for index in group), key=text) for group in groups]
    firsts = np.array([group[0] for group in groups], np.intp)
    return cost_ns[firsts], found.scores.miou[firsts], members


def _grids(statistics: ExitStatistics, stage: Stage, early: int) -> Grids:
    grids = cut_grids(statistics, stage.head)
    return (
        grids
        if early <= ENUMERATED_EXITS
        else tuple(grid if row == stage.row else () for row, grid in enumerate(grids))
    )


def _outcomes(scores: Scores, early: Sequence[str], last: str, options: Sequence[Decisions]) -> Outcomes:
    if len(early) > ENUMERATED_EXITS:
        return outcomes_of_three(scores, early, last, options)
    first, second = options if len(options) == 2 else (nobody(options[0].leaves.shape[1]), *options)
    blocks = states_of_pair(first, second)
    found = [best_outcomes(scores, (early[0], early[-1]), last, first.leaves, each) for each in blocks]
    return merged(found).of_last(len(early))


def _text(stages: Sequence[Stage], plain: int) -> tuple[list[str], list[str]]:
    return [row_text(stage.row, plain) for stage in stages], [str(stage.cut) for stage in stages]
