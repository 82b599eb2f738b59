"""A table of all plans of one setting that are worth choosing from, and the stages of each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile.latency.table import Quantity
from mess_compile.network import segment_name
from mess_compile.search.anytime import anytime_chains
from mess_compile.search.context import SearchContext
from mess_compile.search.deadline import ended_by_interrupt, is_up
from mess_compile.search.exhaustive.enumeration import (
    BY_MIOU,
    Outcomes,
    Scores,
    Selection,
    best_outcomes,
    merged,
    outcomes_of_three,
    states_of_pair,
    undominated,
)
from mess_compile.search.metrics import Evidence, exit_costs_ns, exit_macs, memory_bytes, plan_graphs, worst_ns
from mess_compile.search.plan import Stage
from mess_compile.search.requirement import Requirement
from mess_compile.search.space import (
    ENUMERATED_EXITS,
    NEAR,
    NEAR_OF_THREE,
    Decisions,
    chains,
    head_options,
    last_heads,
    nobody,
    options_near,
    row_text,
)

NO_OPTION = -1
PLAN_DTYPE = np.dtype(
    [
        ("chain", np.int64),  # index into PlanTable.chains
        ("taken", np.int64, (3,)),  # options of the early heads, NO_OPTION where there are fewer
        ("cost_ns", np.int64),  # sums over all images
        ("macs", np.int64),
        ("energy_nj", np.int64),  # 0 where the latency table lacks an energy
        ("p95_ns", np.int64),  # of one image
        ("worst_ns", np.int64),
        ("memory_bytes", np.int64),
        ("graphs", np.int64),
        ("changed", np.int64),  # sum over all images, in billionths of an image; 0 where it is not counted
        ("miou", np.float64),  # percent
        ("class_margin", np.float64),  # pp of IoU above its floor, of the class nearest to it; 0 without floors
        ("score", np.float64),  # what the anytime setting maximises
    ]
)
ENUMERATED = 6e9
"""Plans times images up to which all plans are enumerated, in about ten seconds on two cores."""


class HeadDecisions(dict[str, Decisions]):
    """The options of each early head, computed when they are first read."""

    def __init__(self, evidence: Evidence) -> None:
        super().__init__()
        self._evidence = evidence

    def __missing__(self, head: str) -> Decisions:
        self[head] = head_options(self._evidence.statistics, head, self._evidence.cuts[head])
        return self[head]


@dataclass(frozen=True, eq=False)
class PlanTable:
    """Plans as `plans`, a structured array of PLAN_DTYPE; `chains` are heads in running order, with the last exit's.

    `space` counts the plans that the table was chosen from, `evaluated` those without duplicates. `skipped` are the
    early heads whose plans were not evaluated because the time was up.
    """

    chains: tuple[tuple[str, ...], ...]
    options: dict[str, Decisions]
    plans: NDArray[np.void]
    space: int
    evaluated: int
    skipped: tuple[tuple[str, ...], ...] = ()


def plans_in_space(evidence: Evidence, early_exits: int) -> int:
    """The number of plans: for each chain of heads every pair of a row and a cut at each early head, and the whole
    networks, uncut."""
    points = len(evidence.candidate.exit_points)
    heads, options = np.zeros(points + 1, np.int64), np.zeros(points + 1, np.int64)
    for head in evidence.heads:
        if not evidence.runs([evidence.candidate.output_of(head)]):
            continue
        heads[head.exit_point] += 1
        options[head.exit_point] += sum(map(len, evidence.cuts[head.name]))
    after = [[q for q in range(p + 1, points + 1) if evidence.runs([segment_name(p, q)])] for p in range(points + 1)]
    endings = [[sum(int(heads[q]) for q in after[p]) for p in range(points + 1)]]  # from a point on, by early heads
    for _ in range(early_exits):
        endings.append([sum(int(options[q]) * endings[-1][q] for q in after[p]) for p in range(points + 1)])
    return sum(each[0] for each in endings) + len(evidence.baselines)


def needs_branch_and_bound(evidence: Evidence, early_exits: int) -> bool:
    """Whether branch and bound takes less time than an enumeration, which takes two early exits at most."""
    if not any(evidence.has_graphs_of([head.name]) for head in evidence.heads):
        return False  # only the whole networks are left
    if min(early_exits, len(evidence.candidate.exit_points) - 1) > ENUMERATED_EXITS:
        return True
    return plans_in_space(evidence, early_exits) * evidence.statistics.images > ENUMERATED


def enumerate_plans(evidence: Evidence, context: SearchContext, selection: Selection = BY_MIOU) -> PlanTable:
    """Evaluate every plan of the requirement's setting, or as many as the context's clock leaves time for.

    Of plans at the same cost it has those of the `selection`.
    """
    requirement = context.requirement
    if requirement.setting == "anytime":
        return _anytime_table(evidence, requirement)
    beginnings = tuple(chains(evidence.heads, len(evidence.candidate.exit_points), requirement.early_exits))
    builder, done = _TableBuilder(evidence, HeadDecisions(evidence), selection), 0
    with ended_by_interrupt(context.clock):
        for early in beginnings:
            builder.add(early, _lasts(evidence, early))
            done += 1
            context.progress(done, len(beginnings))
            if is_up(context.clock):
                break
    return builder.table(beginnings[done:])


def plans_near(evidence: Evidence, stages: Sequence[Stage], selection: Selection) -> PlanTable:
    """The plan with these `stages`, and the plans that differ from it only in cuts between its neighbours on the
    grid."""
    early, last = [stage.head for stage in stages[:-1]], stages[-1].head
    most = NEAR if len(early) <= ENUMERATED_EXITS else NEAR_OF_THREE
    options = {s.head: options_near(evidence.statistics, s.head, s.row, s.cut or 0, most) for s in stages[:-1]}
    builder = _TableBuilder(evidence, options, selection)
    builder.add(tuple(early), (last,))
    return builder.table()


def least_cost_of_plans(evidence: Evidence, early: tuple[str, ...], quantity: Quantity) -> float:
    """The least that an image costs in plans that begin with `early`, in ns; infinite when there are none."""
    costs = (exit_costs_ns(evidence, "input-dependent", (*early, last), quantity) for last in _lasts(evidence, early))
    return min(map(min, costs), default=np.inf)


def _lasts(evidence: Evidence, early: tuple[str, ...]) -> tuple[str, ...]:
    """The last heads of the plans that begin with `early`, where the target has all their graphs; without early heads
    also the whole networks."""
    lasts = last_heads(evidence.heads, early)
    found = tuple(last for last in lasts if evidence.has_graphs_of((*early, last)))
    return found if early else (*found, *evidence.baselines)


def _anytime_table(evidence: Evidence, requirement: Requirement) -> PlanTable:
    found = anytime_chains(evidence, requirement)
    whole = tuple(chain for each in found for chain in each.heads)
    plans = np.zeros(len(whole), PLAN_DTYPE)
    plans["chain"] = np.arange(len(whole))
    plans["taken"] = NO_OPTION
    for name in found[0].columns:
        plans[name] = np.concatenate([each.columns[name] for each in found])
    return PlanTable(whole, HeadDecisions(evidence), plans, len(whole), len(whole))


def _plans_of_chain(
    evidence: Evidence, index: int, heads: tuple[str, ...], found: Outcomes, selection: Selection
) -> NDArray[np.void]:
    """Costs and mIoU of the plans in `found` of one chain of heads, without those that no requirement could choose."""
    statistics = evidence.statistics
    costs = {
        "cost_ns": exit_costs_ns(evidence, "input-dependent", heads),
        "macs": exit_macs(evidence.candidate, heads),
        "energy_nj": _energies_nj(evidence, heads),
    }
    early = len(heads) - 1
    if 0 < early <= ENUMERATED_EXITS and all(list(each) == sorted(each) for each in costs.values()):
        found = undominated(found, selection)
    plans = np.zeros(len(found.at), PLAN_DTYPE)
    plans["chain"], plans["taken"], plans["miou"] = index, NO_OPTION, found.scores.miou
    plans["taken"][:, :early] = found.taken
    plans["changed"], plans["class_margin"] = found.scores.changed, found.scores.margin
    plans["memory_bytes"] = memory_bytes(evidence.graph_set, heads)
    plans["graphs"] = len(plan_graphs(evidence.candidate, heads))
    plans["worst_ns"] = worst_ns(evidence, "input-dependent", heads)
    leave = np.append(found.at, statistics.images - found.at.sum(axis=1, keepdims=True), axis=1)  # (plans, exits)
    for name, each in costs.items():
        plans[name] = leave @ np.array(each, np.int64)
    plans["p95_ns"] = _p95(leave, np.array(costs["cost_ns"], np.int64))
    return plans


def _energies_nj(evidence: Evidence, heads: tuple[str, ...]) -> tuple[int, ...]:
    """The energy of an image that leaves at each exit; 0 where the latency table lacks energies."""
    if evidence.without_energy:
        return (0,) * len(heads)
    return exit_costs_ns(evidence, "input-dependent", heads, "energy_mj")


def _p95(leave: NDArray[np.int64], costs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The smallest cost (plans,) that at least 95 % of the images do not exceed."""
    order = np.argsort(costs, kind="stable")
    enough = -(-95 * int(leave[0].sum()) // 100)
    reached: NDArray[np.int64] = costs[order][(leave[:, order].cumsum(axis=1) >= enough).argmax(axis=1)]
    return reached


class _TableBuilder:
    """Collects the plans of the budgeted and the input-dependent setting, chain by chain."""

    def __init__(self, evidence: Evidence, options: dict[str, Decisions], selection: Selection) -> None:
        self._evidence = evidence
        self._scores = Scores(evidence.statistics, selection)
        self._options = options
        self._nobody = nobody(evidence.statistics.images)
        self._plans: dict[tuple[str, ...], NDArray[np.void]] = {}
        self._space = 0
        self._evaluated = 0

    @property
    def chains(self) -> tuple[tuple[str, ...], ...]:
        return tuple(self._plans)

    def add(self, early: tuple[str, ...], lasts: Sequence[str]) -> None:
        """Evaluate every plan whose early heads are these, and that ends at one of `lasts`."""
        if not lasts:
            return
        if not early:
            for last in lasts:
                self._add_single(last)
            return
        options = [self._options[head] for head in early]
        plans = math.prod(option.total for option in options)
        self._space += plans * len(lasts)
        if not plans:  # a head with the same count for every image decides nothing
            return
        if len(early) > ENUMERATED_EXITS:
            for last in lasts:
                self._add_outcomes((*early, last), outcomes_of_three(self._scores, early, last, options))
            self._evaluated += plans * len(lasts)
            return
        first, second = options if len(options) == 2 else (self._nobody, *options)
        best: dict[str, list[Outcomes]] = {last: [] for last in lasts}
        for states in states_of_pair(first, second):
            self._evaluated += len(states.first) * len(lasts)
            for last, found in best.items():
                found.append(best_outcomes(self._scores, (early[0], early[-1]), last, first.leaves, states))
        for last, found in best.items():
            self._add_outcomes((*early, last), merged(found).of_last(len(early)))

    def _add_single(self, head: str) -> None:
        sums = self._scores.of_head[self._evidence.scored_as(head)].sum(axis=0)[:, None]
        found = Outcomes(np.zeros((1, 0), np.intp), np.zeros((1, 0), np.int64), self._scores.of_plans(sums))
        self._add_outcomes((head,), found)
        self._space += 1
        self._evaluated += 1

    def _add_outcomes(self, heads: tuple[str, ...], found: Outcomes) -> None:
        if not len(found.at):
            return
        self._plans[heads] = _plans_of_chain(self._evidence, len(self._plans), heads, found, self._scores.selection)

    def table(self, skipped: tuple[tuple[str, ...], ...] = ()) -> PlanTable:
        plans = np.concatenate([np.zeros(0, PLAN_DTYPE), *self._plans.values()])
        return PlanTable(self.chains, self._options, plans, self._space, self._evaluated, skipped)


def stages_of_row(evidence: Evidence, table: PlanTable, plan: Any) -> tuple[Stage, ...]:
    """The stages of `plan`, one row of `table.plans`."""
    heads = table.chains[plan["chain"]]
    middle = len(evidence.graph_set.gate.thresholds) // 2
    stages = []
    for head, option in zip(heads, (*plan["taken"], NO_OPTION), strict=False):
        row, cut = middle, None
        if option != NO_OPTION and head is not heads[-1]:
            row, cut = int(table.options[head].rows[option]), int(table.options[head].cuts[option])
        stages.append(Stage(evidence.candidate.point_of(head), head, row, cut))
    return tuple(stages)


def text_of_stages(stages: Sequence[Stage], plain: int) -> tuple[tuple[str, ...], ...]:
    """What decides between equal plans: exit points, head names, threshold rows (`plain` many, others after them),
    cuts, as text (docs/definitions.md, search order)."""
    early = [stage for stage in stages if stage.cut is not None]
    return (
        tuple(str(stage.exit_point) for stage in stages),
        tuple(stage.head for stage in stages),
        tuple(row_text(stage.row, plain) for stage in early),
        tuple(str(stage.cut) for stage in early),
    )
