"""The anytime setting: reports and costs of every chain of heads, for all heads of the same exit points at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mess_compile.array_types import Array
from mess_compile.evaluate.statistics import head_miou
from mess_compile.latency.table import Quantity, graph_cost_ns
from mess_compile.network import Head, head_graph_name, segment_name
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import FP32
from mess_compile.runtime.measure.job_pool import DOWNLOAD, UPLOAD
from mess_compile.search.metrics import Evidence, memory_bytes, worst_ns
from mess_compile.search.requirement import Requirement

_MOST_CHAINS = 5_000_000
ExitOutput = tuple[int, str]
"""An exit point, and the output graph that heads there share."""


@dataclass(frozen=True, eq=False)
class Chains:
    """Chains of heads at the same exit points, with their costs and mIoU as columns in the order of `heads`."""

    heads: tuple[tuple[str, ...], ...]
    columns: dict[str, Array]


def anytime_chains(evidence: Evidence, requirement: Requirement) -> list[Chains]:
    """Every chain of at most `early_exits` + 1 heads at ever deeper exit points that the target has the graphs of, and
    the whole networks, each of which reports once.

    Their `score` is the best mIoU (percent) reported by the deadline or, without one, its mean from 0 to the baseline's
    latency; zero before the first report. Raises InputError when they are too many.
    """
    found = [_whole(evidence, requirement, name) for name in evidence.baselines]
    at = _heads_by_place(evidence)
    points = sorted({point for point, _ in at})
    heads_of = [sum(len(heads) for (there, _), heads in at.items() if there == point) for point in points]
    _refuse_too_many(requirement.early_exits, heads_of)
    mious = {head.name: head_miou(evidence.statistics, head.name) for head in evidence.heads}
    for size in range(1, requirement.early_exits + 2):
        for places in itertools.combinations(at, size):
            ascending = all(a < b for (a, _), (b, _) in itertools.pairwise(places))
            if ascending and evidence.runs(_fixed_graphs(places)):
                found.append(_chains(evidence, requirement, places, [at[place] for place in places], mious))
    return found


def _whole(evidence: Evidence, requirement: Requirement, name: str) -> Chains:
    images = evidence.statistics.images
    time, miou = evidence.path_cost_ns(name), evidence.baseline_miou(name)
    columns: dict[str, Array] = {
        "cost_ns": np.array([time * images]),
        "p95_ns": np.array([time]),
        "worst_ns": np.array([worst_ns(evidence, "anytime", [name])]),
        "macs": np.array([evidence.candidate.baseline_macs * images]),
        "memory_bytes": np.array([memory_bytes(evidence.graph_set, [name])]),
        "graphs": np.array([1]),
        "miou": np.array([miou]),
        "score": _score(evidence, requirement, [np.array([time])], [np.array([miou])]),
    }
    if not evidence.without_energy:
        columns["energy_nj"] = np.array([evidence.path_cost_ns(name, "energy_mj") * images])
    return Chains(((name,),), columns)


def _refuse_too_many(early_exits: int, heads: Sequence[int]) -> None:
    count = sum(math.prod(some) for size in range(early_exits + 1) for some in itertools.combinations(heads, size + 1))
    if count > _MOST_CHAINS:
        raise InputError(
            f"the anytime setting would enumerate {count} chains of heads, more than fit into memory: use --max-exits "
            f"{early_exits - 1}"
        )


def _heads_by_place(evidence: Evidence) -> dict[ExitOutput, list[Head]]:
    """The heads that share an exit point and an output graph, in the order of exit points."""
    found: dict[ExitOutput, list[Head]] = {}
    for head in sorted(evidence.heads, key=lambda head: head.exit_point):
        found.setdefault((head.exit_point, evidence.candidate.output_of(head)), []).append(head)
    return found


def _segments(places: Sequence[ExitOutput]) -> list[str]:
    return [segment_name(a, b) for a, b in itertools.pairwise((0, *(point for point, _ in places)))]


def _fixed_graphs(places: Sequence[ExitOutput]) -> list[str]:
    """Segments and output graphs of a cascade that leaves at these places, each once."""
    return list(dict.fromkeys([*_segments(places), *(output for _, output in places)]))


def _chains(
    evidence: Evidence,
    requirement: Requirement,
    places: Sequence[ExitOutput],
    heads: Sequence[Sequence[Head]],
    mious: dict[str, float],
) -> Chains:
    images = evidence.statistics.images
    times = _report_times(evidence, places, heads, "mean_ms")
    best = _best_so_far(heads, mious)
    macs: Array = np.array(evidence.candidate.exit_point(places[-1][0]).macs)
    for i, stage in enumerate(heads):
        macs = macs + _along(np.array([head.macs for head in stage], np.int64), i, len(heads))
    columns: dict[str, Array] = {
        "cost_ns": times[-1] * images,
        "p95_ns": times[-1],
        "worst_ns": _worst_ns(evidence, places, heads),
        "macs": macs * images,
        "memory_bytes": _memory_bytes(evidence, places, heads),
        "graphs": np.array(len(_fixed_graphs(places)) + len(places)),
        "miou": best[-1],
        "score": _score(evidence, requirement, times, best),
    }
    if not evidence.without_energy:
        columns["energy_nj"] = _report_times(evidence, places, heads, "energy_mj")[-1] * images
    shape = tuple(map(len, heads))
    flat = {name: np.broadcast_to(column, shape).reshape(-1) for name, column in columns.items()}
    return Chains(tuple(itertools.product(*([head.name for head in stage] for stage in heads))), flat)


def _along(values: Array, axis: int, axes: int) -> Array:
    """A vector along one of many axes."""
    return values.reshape([-1 if i == axis else 1 for i in range(axes)])


def _report_times(
    evidence: Evidence, places: Sequence[ExitOutput], heads: Sequence[Sequence[Head]], quantity: Quantity
) -> list[Array]:
    """When each exit reports, as `latency.report_times_ns` computes it, by the heads up to it."""
    table, graph_set = evidence.table, evidence.graph_set
    now: Array = np.array(table.cost_ns(UPLOAD, quantity=quantity), np.int64)
    times = []
    for i, (segment, (_, output)) in enumerate(zip(_segments(places), places, strict=True)):
        own = [graph_cost_ns(table, graph_set, head_graph_name(head.name), quantity) for head in heads[i]]
        every = sum(graph_cost_ns(table, graph_set, graph, quantity) for graph in (segment, output))
        fixed = every + table.cost_ns(DOWNLOAD, quantity=quantity)
        now = now + (_along(np.array(own, np.int64), i, len(heads)) + fixed)
        times.append(now)
    return times


def _worst_ns(evidence: Evidence, places: Sequence[ExitOutput], heads: Sequence[Sequence[Head]]) -> Array:
    """As `latency.path_p99_ns` with every report, in the same order of sums."""
    table, graph_set = evidence.table, evidence.graph_set

    def square(graph: str, precision: str = FP32) -> float:
        return float(max(0, table.cost_ns(graph, precision, "p99_ms") - table.cost_ns(graph, precision))) ** 2

    def square_of(graph: str) -> float:
        return square(graph, graph_set.spec(graph).precision)

    squares: Array = np.array(square(UPLOAD))
    for i, (segment, (_, output)) in enumerate(zip(_segments(places), places, strict=True)):
        own = np.array([square_of(head_graph_name(head.name)) for head in heads[i]])
        squares = squares + square_of(segment) + _along(own, i, len(heads)) + square_of(output) + square(DOWNLOAD)
    last: Array = _report_times(evidence, places, heads, "mean_ms")[-1] + np.rint(np.sqrt(squares)).astype(np.int64)
    return last


def _best_so_far(heads: Sequence[Sequence[Head]], mious: dict[str, float]) -> list[Array]:
    """The best mIoU (percent) that any exit has reached, by the heads up to it."""
    best: list[Array] = []
    for i, stage in enumerate(heads):
        own = _along(np.array([mious[head.name] for head in stage]), i, len(heads))
        best.append(np.maximum(best[-1], own) if best else own)
    return best


def _score(evidence: Evidence, requirement: Requirement, times: list[Array], best: list[Array]) -> Array:
    score: Array = np.zeros(())
    if requirement.deadline_ms is not None:
        deadline = round(requirement.deadline_ms * 1e6)
        for time, reached in zip(times, best, strict=True):
            score = np.where(time <= deadline, reached, score)
        return score
    horizon = evidence.baseline_cost_ns()
    for time, end, reached in zip(times, [*times[1:], np.array(horizon)], best, strict=True):
        score = score + reached * np.maximum(0, np.minimum(end, horizon) - time)
    return score / horizon


def _memory_bytes(evidence: Evidence, places: Sequence[ExitOutput], heads: Sequence[Sequence[Head]]) -> Array:
    """As `metrics.memory_bytes`: weights + the largest workspace + inputs and outputs, each tensor once."""
    spec = evidence.graph_set.spec
    fixed = [spec(name) for name in _fixed_graphs(places)]
    weights: Array = np.array(sum(each.bytes for each in fixed))
    workspace: Array = np.array(max(each.workspace_bytes for each in fixed))
    shapes: list[tuple[list[frozenset[Any]], list[int]]] = []
    for i, stage in enumerate(heads):
        specs = [spec(head_graph_name(head.name)) for head in stage]
        weights = weights + _along(np.array([each.bytes for each in specs]), i, len(heads))
        workspace = np.maximum(workspace, _along(np.array([each.workspace_bytes for each in specs]), i, len(heads)))
        tensors = [frozenset((*each.inputs, *each.outputs)) for each in specs]
        kinds = list(dict.fromkeys(tensors))
        shapes.append((kinds, [kinds.index(each) for each in tensors]))
    common = frozenset(tensor for each in fixed for tensor in (*each.inputs, *each.outputs))
    buffers = np.array(
        [
            sum(tensor.bytes for tensor in common.union(*chosen))
            for chosen in itertools.product(*(kinds for kinds, _ in shapes))
        ]
    ).reshape([len(kinds) for kinds, _ in shapes])
    sizes: Array = weights + workspace + buffers[np.ix_(*(numbers for _, numbers in shapes))]
    return sizes
