"""What a search by branch and bound is about, in arrays: heads, costs, thresholds, and what a plan must keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile.latency.table import Quantity, graph_cost_ns
from mess_compile.network import head_graph_name, segment_name
from mess_compile.runtime.measure.job_pool import DOWNLOAD, NULL, UPLOAD
from mess_compile.search.bnb import kernels
from mess_compile.search.constraints import Bound, bounds_of
from mess_compile.search.memory import memory_of_chains
from mess_compile.search.metrics import Evidence, exit_costs_ns, exit_macs, memory_bytes, plan_graphs, worst_ns
from mess_compile.search.requirement import Requirement
from mess_compile.search.space import CUTS

Array = NDArray[Any]
UNBOUNDED = np.iinfo(np.int64).max


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

        A head one beyond the last stands for none, at the cost of the next.
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
    """A whole network, uncut: what an image costs by each of the problem's `paths`, its mIoU (percent) and memory."""

    name: str
    costs: tuple[int, ...]
    miou: float
    memory: int


@dataclass(frozen=True, eq=False)
class Problem:
    """A search in arrays: heads by index, their exit `points` (from 1), and per head and row the `grid` of cuts.

    `paths` are the quantities that `wanted` counts, the first the latency. `allowed` says of a plan's heads whether
    they keep the bounds that no threshold moves, `graphs` counts their graphs, `names` are theirs. `memory` is what
    chains (m, 4) of heads take in bytes, `most_memory` what they may, and `by_memory` whether it is the objective. One
    `unit` of any other (ms, GMACs, mJ) is so many of the integers. `wholes` are the plans without a head of their own,
    which end at exit point `final`.
    """

    names: tuple[str, ...]
    points: Array
    field: kernels.Field
    grid: tuple[tuple[tuple[int, ...], ...], ...]
    paths: tuple[PathCosts, ...]
    wanted: kernels.Wanted
    allowed: Callable[[tuple[str, ...]], bool]
    graphs: Callable[[tuple[str, ...]], int]
    memory: Callable[[Array], Array]
    most_memory: int
    by_memory: bool
    unit: float
    wholes: tuple[Whole, ...]
    final: int


def problem_of(evidence: Evidence, requirement: Requirement) -> Problem:
    """The arrays of a search. Its bounds are in the integers that the search counts in, summed over images."""
    statistics, images = evidence.statistics, evidence.statistics.images
    names = tuple(head.name for head in evidence.heads)
    points = np.array([head.exit_point for head in evidence.heads])
    labelled = statistics.labelled.sum(axis=0)
    present = np.flatnonzero(labelled)
    heads = [statistics.head_index(name) for name in names]
    scores = np.empty((len(heads), images, 2 * len(present)), np.int32)
    for score, head in zip(scores, heads, strict=True):
        right = statistics.intersection[:, head, present]
        score[:] = np.concatenate([right, statistics.predicted[:, head, present] - right], axis=1)
    levels, cuts, ranks, grid = _thresholds(evidence, names)
    field = kernels.Field(
        scores=scores,
        totals=scores.sum(axis=1, dtype=np.float64),
        spans=kernels.differences(scores, points[:, None] < points[None, :]),
        levels=levels,
        cuts=cuts,
        ranks=ranks,
        labelled=labelled[present].astype(np.float64),
    )
    paths = {"latency": _times(evidence, "mean_ms"), "workload": _workloads(evidence)}
    if requirement.needs_energy:
        paths["energy"] = _times(evidence, "energy_mj")
    bounds = bounds_of(evidence, requirement)
    objective = requirement.objective or "latency"
    wanted = kernels.Wanted(
        bounds=np.array([_most(bounds, f"max_{name}") for name in paths], np.int64),
        percentile=np.array([95, _most(bounds, "max_latency_p95")], np.int64),
        floor=bounds["max_err_pp"].limit if "max_err_pp" in bounds else -np.inf,
        objective=list(paths).index(objective) if objective in paths else -1,
    )
    return Problem(
        names,
        points,
        field,
        grid,
        tuple(paths.values()),
        wanted,
        lambda chain: _is_allowed(evidence, bounds, chain),
        lambda chain: len(plan_graphs(evidence.candidate, chain)),
        memory_of_chains(evidence),
        _most(bounds, "max_memory_bytes"),
        objective == "memory",
        1e9 if objective == "workload" else 1e6,
        tuple(_whole(evidence, name, tuple(paths)) for name in evidence.baselines),
        len(evidence.candidate.exit_points),
    )


def _whole(evidence: Evidence, name: str, paths: tuple[str, ...]) -> Whole:
    costs = {
        "latency": exit_costs_ns(evidence, "budgeted", [name])[-1],
        "workload": exit_macs(evidence.candidate, [name])[-1],
    }
    if "energy" in paths:
        costs["energy"] = exit_costs_ns(evidence, "budgeted", [name], "energy_mj")[-1]
    size = memory_bytes(evidence.graph_set, [name])
    return Whole(name, tuple(costs[path] for path in paths), evidence.baseline_miou(name), size)


def _most(bounds: dict[str, Bound], field: str) -> int:
    return min(int(bounds[field].limit), UNBOUNDED) if field in bounds else UNBOUNDED


def _is_allowed(evidence: Evidence, bounds: dict[str, Bound], heads: tuple[str, ...]) -> bool:
    if memory_bytes(evidence.graph_set, heads) > _most(bounds, "max_memory_bytes"):
        return False
    if "max_latency_worst" not in bounds:
        return True
    return worst_ns(evidence, "input-dependent", heads) <= _most(bounds, "max_latency_worst")


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


def _thresholds(evidence: Evidence, heads: tuple[str, ...]) -> tuple[Array, Array, Array, Any]:
    """Levels, cuts and ranks as in `kernels.Field`, and the grid of cuts by head and row."""
    statistics = evidence.statistics
    rows = statistics.counts.shape[2]
    levels = np.zeros((len(heads) + 1, rows, statistics.images), np.uint8)
    cuts = np.zeros((len(heads) + 1, rows), np.int64)
    cuts[-1, 0] = 1  # the head that is none: one cut, which no image passes
    ranks = np.zeros((len(heads) + 1, rows, CUTS + 1), np.int64)
    by_text = sorted(range(rows), key=str)
    grid = []
    for h, head in enumerate(heads):
        counts = np.asarray(statistics.counts[:, statistics.head_index(head)])  # (n, rows)
        grid.append(evidence.cuts[head])
        texts = sorted({str(cut) for found in grid[-1] for cut in found})
        for row, found in enumerate(grid[-1]):
            levels[h, row] = np.searchsorted(found, counts[:, row], side="right")
            cuts[h, row] = len(found)
            ranks[h, row, : len(found) + 1] = [by_text.index(row), *(texts.index(str(cut)) for cut in found)]
    return levels, cuts, ranks, tuple(grid)
