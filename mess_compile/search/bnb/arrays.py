"""A search by branch and bound as arrays: heads, costs, thresholds, and what a plan must satisfy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mess_compile.array_types import Array
from mess_compile.evaluate.statistics import WHOLE, ExitStatistics, changed_shares, head_class_iou
from mess_compile.latency.table import Quantity, graph_cost_ns
from mess_compile.network import head_graph_name, segment_name
from mess_compile.runtime.measure.job_pool import DOWNLOAD, NULL, UPLOAD
from mess_compile.search.bnb import kernels
from mess_compile.search.bnb.kernels.values import Constraints, HeadTable
from mess_compile.search.memory import memory_of_chains
from mess_compile.search.metrics import Evidence, exit_costs_ns, exit_macs, memory_bytes, plan_graphs, worst_ns
from mess_compile.search.objectives import Bound, bounds_of, floors_of
from mess_compile.search.requirement import Requirement
from mess_compile.search.space import CUTS, row_text

Cuts = tuple[tuple[tuple[int, ...], ...], ...]
"""The cuts by head and threshold row."""
UNBOUNDED = np.iinfo(np.int64).max
_LITTLE, _LEAST_PP, _MUCH_PP = 1e-4, 0.1, 1e6
PLACES = 4
"""Of a chain: three early heads, and the last; the heads of a shorter chain are in the last places."""


@dataclass(frozen=True, eq=False)
class PathCosts:
    """What an image pays, in integers: `start`, then `step[p, h]` from exit point p (0: the image) to head h and
    through it, `decide` after each early head, and `leave[h]` from head h on to the labels. Below 0 is a step that the
    target cannot take."""

    start: int
    step: Array
    decide: int
    leave: Array

    def of_exits(self, points: Array, *heads: Array) -> Array:
        """(exits, ...): what an image costs that leaves at each of these heads, -1 where the target lacks a graph.

        The index after the last head stands for no head, at the cost of the next.
        """
        at, paid, runs = np.zeros((), np.int64), np.array(self.start), np.ones((), np.bool_)
        costs, skipped = [], []
        for head in heads:
            none = head == len(points)
            step = np.where(none, 0, self.step[at, np.where(none, 0, head)])
            at, runs = np.where(none, at, np.append(points, 0)[head]), runs & (step >= 0)
            decide = 0 if head is heads[-1] else np.where(none, 0, self.decide)
            paid = paid + step + decide
            costs.append(paid + np.append(self.leave, 0)[head])
            skipped.append(none)
        for exit_ in range(len(heads) - 2, -1, -1):
            costs[exit_] = np.where(skipped[exit_], costs[exit_ + 1], costs[exit_])
        return np.where(runs, np.stack(np.broadcast_arrays(*costs)), -1)


@dataclass(frozen=True)
class Whole:
    """A whole network, uncut: what an image costs by each of the problem's `paths`, its mIoU (percent) and memory, what
    it changes, summed over images, and the IoU (percent) of each class."""

    name: str
    costs: tuple[int, ...]
    miou: float
    memory: int
    changed: int
    class_iou: Array


@dataclass(frozen=True, eq=False)
class Problem:
    """A search in arrays: heads by index, their exit `points` (from 1), and their `cuts` by threshold row.

    `paths` are the quantities that the `constraints` bound, the first the latency. `allowed` says of a plan's heads
    whether they satisfy the bounds that do not depend on thresholds, `graphs` counts their graphs. `memory` is what
    chains (m, 4) of heads take in bytes, `max_memory` what they may, and `by_memory` whether it is the objective. One
    `unit` of any other objective (ms, GMACs, mJ) is so many of the integers. `wholes` are the whole networks, which end
    at exit point `final`. The first `plain` rows are those of thresholds. No plan that is allowed is charged more than
    the `allowance` (pp) for what it changes.
    """

    names: tuple[str, ...]
    points: Array
    table: HeadTable
    cuts: Cuts
    paths: tuple[PathCosts, ...]
    constraints: Constraints
    allowed: Callable[[tuple[str, ...]], bool]
    graphs: Callable[[tuple[str, ...]], int]
    memory: Callable[[Array], Array]
    max_memory: int
    by_memory: bool
    unit: float
    wholes: tuple[Whole, ...]
    final: int
    plain: int
    allowance: float = 0.0

    @property
    def charges_changes(self) -> bool:
        """Whether lower bounds take into account that changes are bounded, or the IoU of classes."""
        return bool(self.table.charge_totals.any())

    @property
    def images(self) -> int:
        return int(self.table.scores.shape[1])

    @property
    def no_head(self) -> int:
        """The index that stands for no head."""
        return len(self.names)

    @property
    def priced(self) -> int:
        """The quantity that is weighed against mIoU: the objective, or for mIoU the first that has a bound."""
        objective = self.constraints.objective
        return objective if objective >= 0 else int((self.constraints.bounds < UNBOUNDED).argmax())

    @property
    def weight(self) -> float:
        """0 when only mIoU counts: then prices are in pp."""
        return float(self.constraints.objective >= 0 or self.constraints.bounds[self.priced] < UNBOUNDED)

    def index(self, head: str) -> int:
        return self.names.index(head)

    def names_of(self, chain: Array) -> tuple[str, ...]:
        return tuple(self.names[head] for head in chain if head != self.no_head)

    def chains(self, *heads: Array) -> Array:
        """Chains (m, 4) of these heads (m,), with none before them."""
        none = [np.full(len(heads[0]), self.no_head)] * (PLACES - len(heads))
        return np.stack([*none, *heads], axis=1)

    def costs(self, quantity: int, *heads: Array) -> Array:
        """What an image costs that leaves at each of these heads, as `PathCosts.of_exits` gives it."""
        return self.paths[quantity].of_exits(self.points, *heads)

    def allowed_of(self, chains: Array) -> Array:
        """Those of the chains (m, 4) that satisfy the bounds which do not depend on thresholds."""
        found: Array = chains[np.array([self.allowed(self.names_of(chain)) for chain in chains], np.bool_)]
        return found

    def least_paid(self) -> int:
        """What every plan pays of the objective: each image passes a first head, or a whole network, and leaves."""
        objective = self.constraints.objective
        path = self.paths[objective]
        first = path.step[0][path.step[0] >= 0].min()
        uncut = min(whole.costs[objective] for whole in self.wholes)
        return int(min(path.start + first + path.leave.min(), uncut) * self.images)


def problem_of(evidence: Evidence, requirement: Requirement) -> Problem:
    """The arrays of a search. Its bounds are in the integers that the search counts in, summed over images."""
    bounds = bounds_of(evidence, requirement)
    objective = requirement.objective or "latency"
    charges = _charges(evidence, bounds, objective)
    table, cuts = _head_table(evidence, "max_change" in bounds, charges.of_heads)
    paths = {"latency": _times(evidence, "mean_ms"), "workload": _workloads(evidence)}
    if requirement.needs_energy:
        paths["energy"] = _times(evidence, "energy_mj")
    return Problem(
        names=tuple(head.name for head in evidence.heads),
        points=_points(evidence),
        table=table,
        cuts=cuts,
        paths=tuple(paths.values()),
        constraints=_constraints(evidence, bounds, tuple(paths), objective),
        allowed=lambda chain: _is_allowed(evidence, bounds, chain),
        graphs=lambda chain: len(plan_graphs(evidence.candidate, chain)),
        memory=memory_of_chains(evidence),
        max_memory=_max(bounds, "max_memory_bytes"),
        by_memory=objective == "memory",
        unit=1e9 if objective == "workload" else 1e6,
        wholes=tuple(_whole(evidence, name, tuple(paths)) for name in evidence.baselines),
        final=len(evidence.candidate.exit_points),
        plain=len(evidence.statistics.gate.thresholds),
        allowance=charges.allowance,
    )


@dataclass(frozen=True, eq=False)
class _Charges:
    """What each image costs in pp of mIoU at each head, (heads, n), and what no plan that is allowed exceeds, summed
    over images."""

    of_heads: Array
    allowance: float


def _charges(evidence: Evidence, bounds: dict[str, Bound], objective: str) -> _Charges:
    """Charges for changes, and for what is lost of classes, that tighten lower bounds: any price is right, a good one
    is tight.

    Beside a floor of mIoU, what may be lost at most is worth the mIoU that may be lost. Without one it is worth so much
    that mIoU hardly counts; where mIoU is the objective, the best plan so far sets a floor.
    """
    statistics = evidence.statistics
    heads = [statistics.head_index(head.name) for head in evidence.heads]
    charged, allowance = np.zeros((len(heads), statistics.images)), 0.0
    worth_pp = 0.0 if objective == "accuracy" else _MUCH_PP
    if "max_err_pp" in bounds:
        worth_pp = max(_LEAST_PP, evidence.baseline_miou(evidence.baseline) - bounds["max_err_pp"].limit)
    if not worth_pp:
        return _Charges(charged, allowance)
    for lost, most, scale in _bounded_losses(statistics, heads, bounds):
        charged += worth_pp / scale * lost
        allowance += worth_pp / scale * most
    return _Charges(charged, allowance)


def _bounded_losses(
    statistics: ExitStatistics, heads: list[int], bounds: dict[str, Bound]
) -> Iterator[tuple[Array, float, float]]:
    """What each image loses at each head (heads, n), not below 0, the most that a plan may lose in all, and the scale
    of that."""
    if "max_change" in bounds:
        most = bounds["max_change"].limit
        yield changed_shares(statistics)[:, heads].T, most, max(most, _LITTLE * statistics.images * WHOLE)
    for floor in floors_of(bounds):
        right = statistics.intersection[:, heads, floor.index].T.astype(np.float64)  # (heads, n)
        wrong = statistics.predicted[:, heads, floor.index].T - right
        best, least = right.max(axis=0), max(0.0, floor.least_iou / 100)
        lost = best - right + least * wrong  # IoU >= least where right - least * wrong >= least * labelled
        most = float(best.sum() - least * statistics.labelled[:, floor.index].sum())
        yield lost, most, max(most - lost.sum(axis=1).min(), _LITTLE * abs(most), 1.0)


def _points(evidence: Evidence) -> Array:
    return np.array([head.exit_point for head in evidence.heads])


def _head_table(evidence: Evidence, counts_changes: bool, charges: Array) -> tuple[HeadTable, Cuts]:
    statistics, points = evidence.statistics, _points(evidence)
    labelled = statistics.labelled.sum(axis=0)
    present = np.flatnonzero(labelled)
    heads = [statistics.head_index(head.name) for head in evidence.heads]
    scores = np.empty((len(heads), statistics.images, 2 * len(present)), np.int32)
    for score, head in zip(scores, heads, strict=True):
        right = statistics.intersection[:, head, present]
        score[:] = np.concatenate([right, statistics.predicted[:, head, present] - right], axis=1)
    passed, cut_counts, text_ranks, cuts = _thresholds(evidence)
    changed = np.zeros(scores.shape[:2], np.int64)
    if counts_changes:
        changed[:] = changed_shares(statistics)[:, heads].T
    table = HeadTable(
        scores=scores,
        totals=scores.sum(axis=1, dtype=np.float64),
        spans=kernels.differences(scores, points[:, None] < points[None, :]),
        passed=passed,
        cut_counts=cut_counts,
        text_ranks=text_ranks,
        labelled=labelled[present].astype(np.float64),
        changed=changed,
        charges=charges,
        charge_totals=charges.sum(axis=1),
    )
    return table, cuts


def _constraints(evidence: Evidence, bounds: dict[str, Bound], paths: tuple[str, ...], objective: str) -> Constraints:
    least_iou = np.full(len(evidence.statistics.classes), -np.inf)
    for floor in floors_of(bounds):
        least_iou[floor.index] = floor.least_iou
    return Constraints(
        bounds=np.array([_max(bounds, f"max_{name}") for name in paths], np.int64),
        percentile=np.array([95, _max(bounds, "max_latency_p95")], np.int64),
        floor=bounds["max_err_pp"].limit if "max_err_pp" in bounds else -np.inf,
        most_changed=_max(bounds, "max_change"),
        least_iou=least_iou[np.flatnonzero(evidence.statistics.labelled.sum(axis=0))],
        objective=paths.index(objective) if objective in paths else -1,
    )


def _whole(evidence: Evidence, name: str, paths: tuple[str, ...]) -> Whole:
    costs = {
        "latency": exit_costs_ns(evidence, "budgeted", [name])[-1],
        "workload": exit_macs(evidence.candidate, [name])[-1],
    }
    if "energy" in paths:
        costs["energy"] = exit_costs_ns(evidence, "budgeted", [name], "energy_mj")[-1]
    size = memory_bytes(evidence.graph_set, [name])
    statistics = evidence.statistics
    changed = int(changed_shares(statistics)[:, statistics.head_index(evidence.scored_as(name))].sum())
    class_iou = head_class_iou(statistics, evidence.scored_as(name))
    class_iou = class_iou[np.flatnonzero(statistics.labelled.sum(axis=0))]
    return Whole(name, tuple(costs[path] for path in paths), evidence.baseline_miou(name), size, changed, class_iou)


def _max(bounds: dict[str, Bound], field: str) -> int:
    return min(int(bounds[field].limit), UNBOUNDED) if field in bounds else UNBOUNDED


def _is_allowed(evidence: Evidence, bounds: dict[str, Bound], heads: tuple[str, ...]) -> bool:
    if memory_bytes(evidence.graph_set, heads) > _max(bounds, "max_memory_bytes"):
        return False
    if "max_latency_worst" not in bounds:
        return True
    return worst_ns(evidence, "input-dependent", heads) <= _max(bounds, "max_latency_worst")


def _times(evidence: Evidence, quantity: Quantity) -> PathCosts:
    table, graph_set, candidate = evidence.table, evidence.graph_set, evidence.candidate
    points = len(candidate.exit_points)
    outputs = [candidate.output_of(head) for head in evidence.heads]

    def cost(*graphs: str) -> int:
        return sum(graph_cost_ns(table, graph_set, graph, quantity) for graph in graphs)

    step = np.full((points, len(evidence.heads)), -1, np.int64)
    for (point, column), _ in np.ndenumerate(step):
        head = evidence.heads[column]
        graphs = (segment_name(point, head.exit_point), head_graph_name(head.name))
        if point < head.exit_point and evidence.runs((*graphs, outputs[column])):
            step[point, column] = cost(*graphs)
    download = table.cost_ns(DOWNLOAD, quantity=quantity)
    leave = [cost(name) + download if evidence.runs([name]) else 0 for name in outputs]
    start, decide = (table.cost_ns(pseudo, quantity=quantity) for pseudo in (UPLOAD, NULL))
    return PathCosts(start, step, decide, np.array(leave, np.int64))


def _workloads(evidence: Evidence) -> PathCosts:
    candidate = evidence.candidate
    points = range(len(candidate.exit_points))
    step = [
        [candidate.segment_macs(p, h.exit_point) + h.macs if p < h.exit_point else -1 for h in evidence.heads]
        for p in points
    ]
    return PathCosts(0, np.array(step, np.int64), 0, np.zeros(len(evidence.heads), np.int64))


def _thresholds(evidence: Evidence) -> tuple[Array, Array, Array, Cuts]:
    """`passed`, `cut_counts` and `text_ranks` as in `HeadTable`, and the cuts by head and row."""
    statistics, heads = evidence.statistics, [head.name for head in evidence.heads]
    rows = statistics.counts.shape[2]
    passed = np.zeros((len(heads) + 1, rows, statistics.images), np.uint8)
    cut_counts = np.zeros((len(heads) + 1, rows), np.int64)
    cut_counts[-1, 0] = 1  # no head has one cut, which no image passes
    text_ranks = np.zeros((len(heads) + 1, rows, CUTS + 1), np.int64)
    by_text = sorted(range(rows), key=lambda row: row_text(row, len(statistics.gate.thresholds)))
    for h, head in enumerate(heads):
        counts = np.asarray(statistics.counts[:, statistics.head_index(head)])  # (n, rows)
        texts = sorted({str(cut) for cuts in evidence.cuts[head] for cut in cuts})
        for row, cuts in enumerate(evidence.cuts[head]):
            passed[h, row] = np.searchsorted(cuts, counts[:, row], side="right")
            cut_counts[h, row] = len(cuts)
            text_ranks[h, row, : len(cuts) + 1] = [by_text.index(row), *(texts.index(str(cut)) for cut in cuts)]
    return passed, cut_counts, text_ranks, tuple(evidence.cuts[head] for head in heads)
