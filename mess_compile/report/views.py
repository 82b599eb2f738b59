"""What the page shows of a workspace: every plan of the front with its path, its classes and its confidences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mess_compile.array_types import Ints
from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.latency.table import LatencyTable, graph_cost_ns, stage_graphs
from mess_compile.network import is_whole
from mess_compile.runtime.base.policy import top_of_row
from mess_compile.runtime.bundle.manifest import Figures, OperatingPoint
from mess_compile.runtime.measure.job_pool import DOWNLOAD, NULL, UPLOAD
from mess_compile.search.metrics import Evidence, exit_costs_ns, exits_taken
from mess_compile.search.plan import AnytimeReport, Plan, SearchResult, Stage

BINS = 20


@dataclass(frozen=True)
class StageTimes:
    """The time of an image at one exit, in ms: `leave_ms` if it leaves there, `done_ms` from the upload on."""

    segment: str
    segment_ms: float
    head_ms: float
    decision_ms: float
    leave_ms: float
    done_ms: float


@dataclass(frozen=True)
class Histogram:
    """Images that reach an exit by their share of confident cells: about `BINS` bins of `width` from `start` on, one of
    which begins at the `cut`. All are shares of `cells`."""

    cells: int
    start: float
    width: float
    left: tuple[int, ...]
    went_on: tuple[int, ...]
    cut: float | None


@dataclass(frozen=True)
class StageView:
    """One exit of a plan; `leaving` and `arriving` are shares of all images. Without the plan's own graphs and latency
    table there are no times, without its statistics no histogram."""

    exit: int
    head: str
    threshold: float | None
    row: str
    cut: int | None
    arriving: float
    leaving: float
    times: StageTimes | None
    sure: Histogram | None


@dataclass(frozen=True)
class PlanView:
    """One stop of the slider; a chosen plan need not be `on_front`.

    `max_err_pp` is the least `--max-err` that allows the plan, negative when it is better than the baseline; `iou` in
    percent by class, None where the class has no labelled pixel, and empty where the statistics are not those of the
    plan; `reports` is empty but for the anytime setting.
    """

    stages: tuple[StageView, ...]
    predicted: Figures
    precision: str
    chosen: bool
    on_front: bool
    max_err_pp: float
    latency_ratio: float
    workload_ratio: float
    upload_ms: float | None
    operating_points: tuple[OperatingPoint, ...]
    reports: tuple[AnytimeReport, ...]
    iou: tuple[float | None, ...]

    @property
    def heads(self) -> str:
        return " → ".join(stage.head for stage in self.stages)


@dataclass(frozen=True)
class Classes:
    """IoU in percent of the baseline by class, None where the class has no labelled pixel."""

    names: tuple[str, ...]
    baseline: tuple[float | None, ...]


@dataclass(frozen=True)
class Cost:
    """An entry of the latency table; `error` is an estimate's factor, `shared_with` the graph that was measured."""

    graph: str
    precision: str
    mean_ms: float
    p99_ms: float
    source: str
    error: float | None
    shared_with: str | None


@dataclass(frozen=True)
class GraphCosts:
    """A latency table in the precision of a plan: segments by their exit points, heads, and other graphs.

    `doubts` are the warnings about it.
    """

    segments: tuple[tuple[int, int, Cost], ...]
    heads: tuple[Cost, ...]
    others: tuple[Cost, ...]
    failed: tuple[str, ...]
    doubts: tuple[str, ...]


def plan_views(result: SearchResult, evidences: Mapping[str, Evidence]) -> tuple[PlanView, ...]:
    """The front and the chosen plan, most accurate first; `evidences` by recipe, of those that are current."""
    points = {_identity(plan): plan for plan in (*result.front, result.plan)}
    ordered = sorted(points.values(), key=lambda plan: (-plan.predicted.miou, plan.predicted.latency_ms))
    chosen, front = _identity(result.plan), {_identity(plan) for plan in result.front}
    return tuple(
        plan_view(plan, evidences.get(plan.precision), _identity(plan) == chosen, _identity(plan) in front)
        for plan in ordered
    )


def _identity(plan: Plan) -> tuple[object, ...]:
    return plan.stages, plan.precision, plan.setting


def plan_view(plan: Plan, evidence: Evidence | None, chosen: bool, on_front: bool = True) -> PlanView:
    """A plan, with what its file does not hold and its `evidence` does."""
    found = plan.predicted
    exits = None if evidence is None else exits_taken(evidence.statistics, plan.stages)
    return PlanView(
        stages=tuple(_stage_view(plan, index, evidence, exits) for index in range(len(plan.stages))),
        predicted=found,
        precision=plan.precision,
        chosen=chosen,
        on_front=on_front,
        max_err_pp=plan.baseline.miou - found.miou,
        latency_ratio=plan.baseline.latency_ms / found.latency_ms,
        workload_ratio=plan.baseline.gmacs / found.gmacs,
        upload_ms=None if evidence is None else evidence.table.cost_ns(UPLOAD) / 1e6,
        operating_points=plan.operating_points,
        reports=plan.reports,
        iou=() if evidence is None or exits is None else _mixed_iou(evidence.statistics, plan.stages, exits),
    )


def _stage_view(plan: Plan, index: int, evidence: Evidence | None, exits: NDArray[np.intp] | None) -> StageView:
    stage, rates = plan.stages[index], plan.predicted.exit_rates
    return StageView(
        exit=index + 1,
        head=stage.head,
        threshold=plan.gate.thresholds[stage.row] if stage.row < len(plan.gate.thresholds) else None,
        row=plan.row_name(stage.head, stage.row),
        cut=stage.cut,
        arriving=max(0.0, 1.0 - sum(rates[:index])) if plan.setting != "anytime" else 1.0,
        leaving=rates[index],
        times=None if evidence is None else _stage_times(plan, index, evidence),
        sure=None if evidence is None or exits is None else _histogram(evidence.statistics, stage, index, exits),
    )


def _stage_times(plan: Plan, index: int, evidence: Evidence) -> StageTimes:
    heads = [stage.head for stage in plan.stages]
    graphs, table = stage_graphs(evidence.candidate, heads)[index], evidence.table
    segment, head, output = (
        0.0 if name is None else graph_cost_ns(table, evidence.graph_set, name) / 1e6
        for name in (graphs.segment, graphs.head, graphs.output)
    )
    decided = index < len(heads) - 1 and plan.setting != "anytime"
    return StageTimes(
        segment=graphs.segment,
        segment_ms=segment,
        head_ms=head,
        decision_ms=table.cost_ns(NULL) / 1e6 if decided else 0.0,
        leave_ms=output + table.cost_ns(DOWNLOAD) / 1e6,
        done_ms=exit_costs_ns(evidence, plan.setting, heads)[index] / 1e6,
    )


def _histogram(statistics: ExitStatistics, stage: Stage, index: int, exits: NDArray[np.intp]) -> Histogram | None:
    """None where no image reaches the stage, and for a whole network."""
    if is_whole(stage.head):
        return None
    head = statistics.head_index(stage.head)
    cells = top_of_row(statistics.policy_rows, stage.head, stage.row, statistics.cells[head])
    counts = statistics.counts[:, head, stage.row].astype(np.int64)
    here = counts[exits >= index]
    if not here.size:
        return None
    low, high = int(here.min()), int(here.max())
    width = (high - low) // BINS + 1
    start = low if stage.cut is None else stage.cut - -(-(stage.cut - low) // width) * width
    bins = (high - start) // width + 1
    left, went_on = (
        tuple(int(n) for n in np.bincount((counts[chosen] - start) // width, minlength=bins))
        for chosen in (exits == index, exits > index)
    )
    cut = None if stage.cut is None else stage.cut / cells
    return Histogram(cells, start / cells, width / cells, left, went_on, cut)


def _mixed_iou(
    statistics: ExitStatistics, stages: Sequence[Stage], exits: NDArray[np.intp]
) -> tuple[float | None, ...]:
    heads = np.array([statistics.head_index(stage.head) for stage in stages])[exits]
    return _iou(statistics, heads)


def _iou(statistics: ExitStatistics, heads: NDArray[np.intp]) -> tuple[float | None, ...]:
    """IoU in percent by class when `heads[i]` labels image i."""
    images = np.arange(statistics.images)
    right: Ints = statistics.intersection[images, heads].sum(axis=0)
    guessed: Ints = statistics.predicted[images, heads].sum(axis=0)
    labelled: Ints = statistics.labelled.sum(axis=0)
    return tuple(100 * int(r) / int(g + n - r) if n else None for r, g, n in zip(right, guessed, labelled, strict=True))


def classes_of(evidence: Evidence) -> Classes:
    """The classes and the baseline's IoU of each."""
    head = evidence.statistics.head_index(evidence.scored_as(evidence.baseline))
    index = np.full(evidence.statistics.images, head, np.intp)
    return Classes(evidence.statistics.classes, _iou(evidence.statistics, index))


def costs_of(table: LatencyTable, precision: str, doubts: tuple[str, ...] = ()) -> GraphCosts:
    """Every graph in `precision`, or in the precision it falls back to, and the warnings about the table."""
    by_graph: dict[str, Cost] = {}
    for entry in sorted(table.entries.values(), key=lambda entry: (entry.precision != precision, entry.precision)):
        cost = Cost(
            *(entry.graph, entry.precision, entry.mean_ms, entry.p99_ms, entry.source, entry.error),
            shared_with=entry.shared_with,
        )
        by_graph.setdefault(entry.graph, cost)
    segments = [name for name in by_graph if name.startswith("segment-")]
    heads = [name for name in by_graph if name.startswith("head-")]
    ends = {name: tuple(map(int, name.split("-")[1:])) for name in segments}
    return GraphCosts(
        segments=tuple(
            (ends[name][0], ends[name][1], by_graph[name]) for name in sorted(segments, key=ends.__getitem__)
        ),
        heads=tuple(by_graph[name] for name in sorted(heads)),
        others=tuple(by_graph[name] for name in sorted(by_graph.keys() - {*segments, *heads})),
        failed=tuple(f"{each.graph} ({each.precision}): {each.error}" for each in table.failed.values()),
        doubts=doubts,
    )
