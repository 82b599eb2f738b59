"""All plans of one setting worth choosing from, as rows of an array, and the way back from a row to a plan's stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile.runtime.errors import RequirementError
from mess_compile.search.enumeration import Outcomes, Scores, best_outcomes, merged, states_of_pair, undominated
from mess_compile.search.figures import Evidence, exit_costs_ns, exit_macs, memory_bytes, plan_graphs
from mess_compile.search.plan import Stage
from mess_compile.search.requirement import Requirement
from mess_compile.search.space import Options, chains, head_options, last_heads, nobody
from mess_compile.statistics import head_miou

NO_OPTION = -1
ROW = np.dtype(
    [
        ("chain", np.int64),  # index into Rows.chains
        ("first", np.int64),  # options of the early heads; of a single one only `second` is used
        ("second", np.int64),
        ("cost_ns", np.int64),  # sums over all images
        ("macs", np.int64),
        ("memory_bytes", np.int64),
        ("graphs", np.int64),
        ("miou", np.float64),  # percent
        ("score", np.float64),  # what the anytime setting maximises
    ]
)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Rows:
    """Plans as `plans`, a structured array of ROW; `chains` are heads in running order, the last exit's included.

    `space` counts the plans these rows were chosen from, `evaluated` those without duplicates.
    """

    chains: tuple[tuple[str, ...], ...]
    options: dict[str, Options]
    plans: NDArray[np.void]
    space: int
    evaluated: int


def rows_of_plans(evidence: Evidence, requirement: Requirement, progress: Progress) -> Rows:
    """Evaluate every plan of the requirement's setting; `progress` is told (chains done, chains in all)."""
    beginnings = list(chains(evidence.heads, len(evidence.candidate.exit_points), requirement.early_exits))
    if requirement.setting == "anytime":
        whole = [(*early, last) for early in beginnings for last in _lasts(evidence, early)]
        _refuse_without_plans(evidence, whole)
        return _anytime_rows(evidence, requirement, whole)
    ledger = _Ledger(evidence)
    for done, early in enumerate(beginnings, start=1):
        ledger.add(early)
        progress(done, len(beginnings))
    _refuse_without_plans(evidence, ledger.chains)
    return ledger.rows()


def _refuse_without_plans(evidence: Evidence, found: Sequence[tuple[str, ...]]) -> None:
    if not found:
        device = evidence.table.device
        raise RequirementError(
            f"no plan has all its graphs on {device}: see what failed with `mess-compile inspect latency`"
        )


def _lasts(evidence: Evidence, early: tuple[str, ...]) -> tuple[str, ...]:
    """The last heads of the plans that begin with `early`, as far as the target has all their graphs."""
    lasts = last_heads(evidence.heads, early)
    return tuple(last for last in lasts if evidence.has_graphs_of((*early, last)))


def _anytime_rows(evidence: Evidence, requirement: Requirement, whole: list[tuple[str, ...]]) -> Rows:
    horizon = evidence.baseline_cost_ns()
    deadline = None if requirement.deadline_ms is None else round(requirement.deadline_ms * 1e6)
    mious = {head: head_miou(evidence.statistics, head) for head in evidence.statistics.heads}
    plans = np.concatenate([_fixed_columns(evidence, "anytime", index, heads) for index, heads in enumerate(whole)])
    for plan, heads in zip(plans, whole, strict=True):
        times = exit_costs_ns(evidence, "anytime", heads)
        best = np.maximum.accumulate([mious[head] for head in heads]).tolist()
        plan["miou"] = best[-1]
        plan["score"] = area(times, best, horizon) if deadline is None else _reached(times, best, deadline)
    return Rows(tuple(whole), {}, plans, len(whole), len(whole))


def area(times_ns: Sequence[int], best_mious: Sequence[float], horizon_ns: int) -> float:
    """Mean over 0 to `horizon_ns` of the best mIoU (percent) reported by then; zero before the first report."""
    ends = (*times_ns[1:], horizon_ns)
    total = 0.0
    for start, end, best in zip(times_ns, ends, best_mious, strict=True):
        total += best * max(0, min(end, horizon_ns) - start)
    return total / horizon_ns


def _reached(times_ns: Sequence[int], best_mious: Sequence[float], deadline_ns: int) -> float:
    return max((best for time, best in zip(times_ns, best_mious, strict=True) if time <= deadline_ns), default=0.0)


def _fixed_columns(evidence: Evidence, setting: str, index: int, heads: tuple[str, ...]) -> NDArray[np.void]:
    """One row of what a chain of heads costs when every image leaves at its last exit."""
    row = np.zeros(1, ROW)
    row["chain"], row["first"], row["second"] = index, NO_OPTION, NO_OPTION
    row["cost_ns"] = exit_costs_ns(evidence, setting, heads)[-1] * evidence.statistics.images
    row["macs"] = exit_macs(evidence.candidate, heads)[-1] * evidence.statistics.images
    row["memory_bytes"] = memory_bytes(evidence.graph_set, heads)
    row["graphs"] = len(plan_graphs(evidence.candidate, heads))
    return row


class _Ledger:
    """Collects the rows of the budgeted and the input-dependent setting, chain by chain."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._scores = Scores(evidence.statistics)
        self._options: dict[str, Options] = {}
        self._nobody = nobody(evidence.statistics.images)
        self.chains: list[tuple[str, ...]] = []
        self._rows: list[NDArray[np.void]] = []
        self._space = 0
        self._evaluated = 0

    def add(self, early: tuple[str, ...]) -> None:
        """Evaluate every plan whose early heads are these."""
        lasts = _lasts(self._evidence, early)
        if not lasts:
            return
        if not early:
            for last in lasts:
                self._add_single(last)
            return
        options = [self._option(head) for head in early]
        first, second = options if len(options) == 2 else (self._nobody, *options)
        self._space += first.total * second.total * len(lasts)
        if not first.total * second.total:  # a head that is equally sure of every image decides nothing
            return
        best: dict[str, list[Outcomes]] = {last: [] for last in lasts}
        for states in states_of_pair(first, second):
            self._evaluated += len(states.first) * len(lasts)
            for last, found in best.items():
                found.append(best_outcomes(self._scores, (early[0], early[-1]), last, first.leaves, states))
        for last, found in best.items():
            self._add_outcomes((*early, last), merged(found))

    def _option(self, head: str) -> Options:
        if head not in self._options:
            self._options[head] = head_options(self._evidence.statistics, head)
        return self._options[head]

    def _add_single(self, head: str) -> None:
        row = _fixed_columns(self._evidence, "budgeted", len(self.chains), (head,))
        row["miou"] = head_miou(self._evidence.statistics, head)
        self.chains.append((head,))
        self._rows.append(row)
        self._space += 1
        self._evaluated += 1

    def _add_outcomes(self, heads: tuple[str, ...], best: Outcomes) -> None:
        costs = exit_costs_ns(self._evidence, "input-dependent", heads)
        macs = exit_macs(self._evidence.candidate, heads)
        if list(costs) == sorted(costs):
            best = undominated(best)
        fixed = _fixed_columns(self._evidence, "input-dependent", len(self.chains), heads)
        rows = np.repeat(fixed, len(best.miou))
        rows["first"], rows["second"], rows["miou"] = best.first, best.second, best.miou
        for at, index in ((best.at_first, 0), (best.at_second, len(heads) - 2)):
            rows["cost_ns"] -= at * (costs[-1] - costs[index])
            rows["macs"] -= at * (macs[-1] - macs[index])
        self.chains.append(heads)
        self._rows.append(rows)

    def rows(self) -> Rows:
        plans = np.concatenate(self._rows)
        return Rows(tuple(self.chains), self._options, plans, self._space, self._evaluated)


def stages_of_row(evidence: Evidence, rows: Rows, plan: Any) -> tuple[Stage, ...]:
    """The stages of one row of `rows.plans`."""
    heads = rows.chains[plan["chain"]]
    taken = (plan["first"], plan["second"]) if len(heads) == 3 else (plan["second"],)
    middle = len(evidence.graph_set.gate.thresholds) // 2
    stages = []
    for head, option in zip(heads, (*taken, NO_OPTION), strict=False):
        row, cut = middle, None
        if option != NO_OPTION and head is not heads[-1]:
            row, cut = int(rows.options[head].rows[option]), int(rows.options[head].cuts[option])
        stages.append(Stage(evidence.candidate.head(head).exit_point, head, row, cut))
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
