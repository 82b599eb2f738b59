"""Stage costs and confidence histograms for the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mess_compile.evaluate.policies import with_rows
from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.latency.table import LatencyTable, StageGraphs, graph_cost_ns, stage_graphs
from mess_compile.network import GraphSet, is_whole
from mess_compile.runtime.base.policy import top_of_row
from mess_compile.runtime.bundle import manifest
from mess_compile.runtime.measure.job_pool import DOWNLOAD, NULL, UPLOAD
from mess_compile.search.groups import ENVIRONMENT_KEY
from mess_compile.search.hold_out import tuning_part
from mess_compile.search.metrics import exits_taken
from mess_compile.search.plan import Plan, Stage


@dataclass(frozen=True)
class DeviceCosts:
    """As the manifest's plan has them."""

    costs: tuple[manifest.StageCost, ...]
    upload_mean_ms: float
    upload_p99_ms: float
    confidence: tuple[tuple[int, ...], ...]
    environment: Mapping[str, str]


def device_costs(
    plan: Plan, graph_set: GraphSet, table: LatencyTable, statistics: ExitStatistics | None
) -> DeviceCosts:
    """Costs and histograms of a plan; `statistics` are those it was searched on, None if they no longer exist.

    Raises InputError when the table or the statistics lack a graph.
    """
    graphs = stage_graphs(graph_set.candidate, [stage.head for stage in plan.stages])
    pairs = zip(plan.stages, graphs, strict=True)
    tuned = (
        None
        if statistics is None
        else with_rows(tuning_part(statistics, plan.hold_out, plan.group_by), plan.policy_rows)
    )
    return DeviceCosts(
        costs=tuple(_cost(table, graph_set, names, stage) for stage, names in pairs),
        upload_mean_ms=table.cost_ns(UPLOAD) / 1e6,
        upload_p99_ms=table.cost_ns(UPLOAD, quantity="p99_ms") / 1e6,
        confidence=((),) * len(plan.stages) if tuned is None else confidence_histograms(plan.stages, tuned),
        environment={**table.environment, "library_version": table.library_version, **_doubts(plan), **_images(plan)},
    )


def _doubts(plan: Plan) -> dict[str, str]:
    return {f"{manifest.DOUBT}_{number}": doubt for number, doubt in enumerate(plan.doubts, start=1)}


def _images(plan: Plan) -> dict[str, str]:
    """What names the groups of images, and which images the plan was not chosen on."""
    groups = {} if plan.group_by is None else {ENVIRONMENT_KEY: plan.group_by}
    if plan.guarantee is not None:
        return {**groups, manifest.CERTIFIED: f"{plan.guarantee.confidence:g}"}
    return groups if plan.hold_out is None else {**groups, manifest.HELD_OUT: plan.hold_out.share}


def _cost(table: LatencyTable, graph_set: GraphSet, graphs: StageGraphs, stage: Stage) -> manifest.StageCost:
    decision = 0 if stage.cut is None else table.cost_ns(NULL)
    mean, p99 = (
        sum(graph_cost_ns(table, graph_set, name, quantity) for name in graphs.passed)
        for quantity in ("mean_ms", "p99_ms")
    )
    report_mean, report_p99 = (
        sum(graph_cost_ns(table, graph_set, name, quantity) for name in graphs.leaving)
        + table.cost_ns(DOWNLOAD, quantity=quantity)
        for quantity in ("mean_ms", "p99_ms")
    )
    p99 += table.cost_ns(NULL, quantity="p99_ms")
    return manifest.StageCost((mean + decision) / 1e6, p99 / 1e6, report_mean / 1e6, report_p99 / 1e6)


def confidence_histograms(stages: Sequence[Stage], statistics: ExitStatistics) -> tuple[tuple[int, ...], ...]:
    """For each stage a histogram of the images that reach it by their confidence; empty for a whole network."""
    taken = exits_taken(statistics, stages)  # (n,)
    return tuple(
        ()
        if is_whole(stage.head)
        else _histogram(statistics, stage, [image for image, exit_ in enumerate(taken) if exit_ >= index])
        for index, stage in enumerate(stages)
    )


def _histogram(statistics: ExitStatistics, stage: Stage, images: list[int]) -> tuple[int, ...]:
    head = statistics.head_index(stage.head)
    top = top_of_row(statistics.policy_rows, stage.head, stage.row, statistics.cells[head])
    bins = [0] * manifest.CONFIDENCE_BINS
    for image in images:
        sure = int(statistics.counts[image, head, stage.row]) * manifest.CONFIDENCE_BINS // top
        bins[min(sure, manifest.CONFIDENCE_BINS - 1)] += 1
    return tuple(bins)
