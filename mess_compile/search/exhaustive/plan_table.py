"""All plans of one setting worth choosing from, as rows of an array, and the way back from a row to a plan's stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile.evaluate.statistics import head_miou
from mess_compile.latency.table import Quantity
from mess_compile.network import segment_name
from mess_compile.search.anytime import anytime_chains
from mess_compile.search.deadline import Clock
from mess_compile.search.exhaustive.enumeration import (
    Outcomes,
    Scores,
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
)

NO_OPTION = -1
ROW = np.dtype(
    [
        ("chain", np.int64),  # index into Rows.chains
        ("taken", np.int64, (3,)),  # options of the early heads, NO_OPTION where there are fewer
        ("cost_ns", np.int64),  # sums over all images
        ("macs", np.int64),
        ("energy_nj", np.int64),  # 0 where the latency table does not tell
        ("p95_ns", np.int64),  # of one image
        ("worst_ns", np.int64),
        ("memory_bytes", np.int64),
        ("graphs", np.int64),
        ("miou", np.float64),  # percent
        ("score", np.float64),  # what the anytime setting maximises
    ]
)
Progress = Callable[[int, int], None]
ENUMERATED = 6e9
"""Plans times images up to which all are enumerated, in about ten seconds on two cores."""


class HeadDecisions(dict[str, Decisions]):
    """The options of each early head, found when they are first asked for."""

    def __init__(self, evidence: Evidence) -> None:
        super().__init__()
        self._evidence = evidence

    def __missing__(self, head: str) -> Decisions:
        self[head] = head_options(self._evidence.statistics, head, self._evidence.cuts[head])
        return self[head]


@dataclass(frozen=True, eq=False)
class Rows:
    """Plans as `plans`, a structured array of ROW; `chains` are heads in running order, the last exit's included.

    `space` counts the plans these rows were chosen from, `evaluated` those without duplicates. `left` are the early
    heads whose plans were not evaluated, for want of time.
    """

    chains: tuple[tuple[str, ...], ...]
    options: dict[str, Decisions]
    plans: NDArray[np.void]
    space: int
    evaluated: int
    left: tuple[tuple[str, ...], ...] = ()


def plans_in_space(evidence: Evidence, early_exits: int) -> int:
    """How many plans there are: for each chain of heads every pair of a row and a cut at each early one, and the whole
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


def is_large(evidence: Evidence, early_exits: int) -> bool:
    """Whether branch and bound takes less time than an enumeration, which knows two early exits at most."""
    if not any(evidence.has_graphs_of([head.name]) for head in evidence.heads):
        return False  # the whole networks alone are left
    if min(early_exits, len(evidence.candidate.exit_points) - 1) > ENUMERATED_EXITS:
        return True
    return plans_in_space(evidence, early_exits) * evidence.statistics.images > ENUMERATED


def rows_of_plans(evidence: Evidence, requirement: Requirement, progress: Progress, clock: Clock | None = None) -> Rows:
    """Evaluate every plan of the requirement's setting, or as many as the `clock` leaves time for.

    `progress` is told (chains done, chains in all). Without a clock Ctrl-C raises KeyboardInterrupt.
    """
    if requirement.setting == "anytime":
        return _anytime_rows(evidence, requirement)
    beginnings = tuple(chains(evidence.heads, len(evidence.candidate.exit_points), requirement.early_exits))
    ledger, done = _Ledger(evidence, HeadDecisions(evidence)), 0
    with nullcontext() if clock is None else clock.ends_by_interrupt():
        for early in beginnings:
            ledger.add(early, _lasts(evidence, early))
            done += 1
            progress(done, len(beginnings))
            if clock is not None and clock.up:
                break
    return ledger.rows(beginnings[done:])


def rows_near(evidence: Evidence, stages: Sequence[Stage]) -> Rows:
    """The plan with these `stages`, and those that differ from it in cuts between its neighbours on the grid alone."""
    early, last = [stage.head for stage in stages[:-1]], stages[-1].head
    most = NEAR if len(early) <= ENUMERATED_EXITS else NEAR_OF_THREE
    options = {s.head: options_near(evidence.statistics, s.head, s.row, s.cut or 0, most) for s in stages[:-1]}
    ledger = _Ledger(evidence, options)
    ledger.add(tuple(early), (last,))
    return ledger.rows()


def least_cost_of_plans(evidence: Evidence, early: tuple[str, ...], quantity: Quantity) -> float:
    """What an image costs at the least in plans that begin with `early`, in ns; infinite when there are none."""
    costs = (exit_costs_ns(evidence, "input-dependent", (*early, last), quantity) for last in _lasts(evidence, early))
    return min(map(min, costs), default=np.inf)


def _lasts(evidence: Evidence, early: tuple[str, ...]) -> tuple[str, ...]:
    """The last heads of the plans that begin with `early`, as far as the target has all their graphs; where nothing is
    early, also the whole networks."""
    lasts = last_heads(evidence.heads, early)
    found = tuple(last for last in lasts if evidence.has_graphs_of((*early, last)))
    return found if early else (*found, *evidence.baselines)


def _anytime_rows(evidence: Evidence, requirement: Requirement) -> Rows:
    found = anytime_chains(evidence, requirement)
    whole = tuple(chain for each in found for chain in each.heads)
    plans = np.zeros(len(whole), ROW)
    plans["chain"] = np.arange(len(whole))
    plans["taken"] = NO_OPTION
    for name in found[0].columns:
        plans[name] = np.concatenate([each.columns[name] for each in found])
    return Rows(whole, HeadDecisions(evidence), plans, len(whole), len(whole))


def _rows_of_chain(evidence: Evidence, index: int, heads: tuple[str, ...], found: Outcomes) -> NDArray[np.void]:
    """What a chain of heads costs and reaches by `found`, pruned where no requirement could choose what is left out."""
    statistics = evidence.statistics
    costs = {
        "cost_ns": exit_costs_ns(evidence, "input-dependent", heads),
        "macs": exit_macs(evidence.candidate, heads),
        "energy_nj": _energies_nj(evidence, heads),
    }
    early = len(heads) - 1
    if 0 < early <= ENUMERATED_EXITS and all(list(each) == sorted(each) for each in costs.values()):
        found = undominated(found)
    rows = np.zeros(len(found.miou), ROW)
    rows["chain"], rows["taken"], rows["miou"] = index, NO_OPTION, found.miou
    rows["taken"][:, :early] = found.taken
    rows["memory_bytes"] = memory_bytes(evidence.graph_set, heads)
    rows["graphs"] = len(plan_graphs(evidence.candidate, heads))
    rows["worst_ns"] = worst_ns(evidence, "input-dependent", heads)
    leave = np.append(found.at, statistics.images - found.at.sum(axis=1, keepdims=True), axis=1)  # (rows, exits)
    for name, each in costs.items():
        rows[name] = leave @ np.array(each, np.int64)
    rows["p95_ns"] = _p95(leave, np.array(costs["cost_ns"], np.int64))
    return rows


def _energies_nj(evidence: Evidence, heads: tuple[str, ...]) -> tuple[int, ...]:
    """What an image takes that leaves at each exit; nothing where the latency table does not tell."""
    if evidence.without_energy:
        return (0,) * len(heads)
    return exit_costs_ns(evidence, "input-dependent", heads, "energy_mj")


def _p95(leave: NDArray[np.int64], costs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The smallest cost (rows,) that at least 95 % of the images do not exceed."""
    order = np.argsort(costs, kind="stable")
    enough = -(-95 * int(leave[0].sum()) // 100)
    reached: NDArray[np.int64] = costs[order][(leave[:, order].cumsum(axis=1) >= enough).argmax(axis=1)]
    return reached


class _Ledger:
    """Collects the rows of the budgeted and the input-dependent setting, chain by chain."""

    def __init__(self, evidence: Evidence, options: dict[str, Decisions]) -> None:
        self._evidence = evidence
        self._scores = Scores(evidence.statistics)
        self._options = options
        self._nobody = nobody(evidence.statistics.images)
        self._rows: dict[tuple[str, ...], NDArray[np.void]] = {}
        self._space = 0
        self._evaluated = 0

    @property
    def chains(self) -> tuple[tuple[str, ...], ...]:
        return tuple(self._rows)

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
        if not plans:  # a head that is equally sure of every image decides nothing
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
        miou = np.array([head_miou(self._evidence.statistics, head)])
        self._add_outcomes((head,), Outcomes(np.zeros((1, 0), np.intp), np.zeros((1, 0), np.int64), miou))
        self._space += 1
        self._evaluated += 1

    def _add_outcomes(self, heads: tuple[str, ...], found: Outcomes) -> None:
        self._rows[heads] = _rows_of_chain(self._evidence, len(self._rows), heads, found)

    def rows(self, left: tuple[tuple[str, ...], ...] = ()) -> Rows:
        plans = np.concatenate([np.zeros(0, ROW), *self._rows.values()])
        return Rows(self.chains, self._options, plans, self._space, self._evaluated, left)


def stages_of_row(evidence: Evidence, rows: Rows, plan: Any) -> tuple[Stage, ...]:
    """The stages of one row of `rows.plans`."""
    heads = rows.chains[plan["chain"]]
    middle = len(evidence.graph_set.gate.thresholds) // 2
    stages = []
    for head, option in zip(heads, (*plan["taken"], NO_OPTION), strict=False):
        row, cut = middle, None
        if option != NO_OPTION and head is not heads[-1]:
            row, cut = int(rows.options[head].rows[option]), int(rows.options[head].cuts[option])
        stages.append(Stage(evidence.candidate.point_of(head), head, row, cut))
    return tuple(stages)


def text_of_stages(stages: Sequence[Stage]) -> tuple[tuple[str, ...], ...]:
    """What decides between equals: exit points, head names, threshold rows, cuts, as text (issue 5)."""
    early = [stage for stage in stages if stage.cut is not None]
    return (
        tuple(str(stage.exit_point) for stage in stages),
        tuple(stage.head for stage in stages),
        tuple(str(stage.row) for stage in early),
        tuple(str(stage.cut) for stage in early),
    )
