"""The exact figures of any plan, computed from latency table, statistics and graphs. No network runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mess_compile.array_types import Ints
from mess_compile.evaluate.statistics import (
    WHOLE,
    ExitStatistics,
    changed_shares,
    check_statistics_current,
    class_iou,
    head_class_iou,
    head_miou,
    miou,
    statistics_content_sha256,
)
from mess_compile.latency.checks import warnings_of
from mess_compile.latency.table import (
    LatencyTable,
    Quantity,
    check_table_current,
    has_engine,
    path_costs_ns,
    path_p99_ns,
    report_times_ns,
    stage_graphs,
    table_content_sha256,
)
from mess_compile.network import BASELINE, CandidateNetwork, GraphSet, Head, head_graph_name, is_whole
from mess_compile.runtime.base.errors import InputError, StaleError
from mess_compile.runtime.bundle.manifest import OWN_OUTPUT, Figures
from mess_compile.runtime.engines.engine import FP32
from mess_compile.runtime.measure.job_pool import PSEUDO_GRAPHS
from mess_compile.search.plan import (
    AnytimeReport,
    Candidate,
    ClassIou,
    FadedClass,
    Plan,
    PlanGraph,
    Stage,
    default_point,
    rows_in_use,
)
from mess_compile.search.space import Grids, cut_grids

FADED = 0.5
"""A class has nearly vanished that a plan gives a smaller share of the pixels that the network itself gives."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """Everything that a plan's figures depend on: the graphs of one recipe, their latencies, and the exit statistics.

    Raises InputError when the evaluation has no images or no baseline runs on the target, StaleError when table or
    statistics are of other graphs.
    """

    graph_set: GraphSet
    table: LatencyTable
    statistics: ExitStatistics

    def __post_init__(self) -> None:
        if not self.statistics.images:
            raise InputError("the evaluation has no images: run `mess-compile evaluate` on data with labels")
        check_statistics_current(self.statistics, self.graph_set)
        check_table_current(self.table, self.graph_set)
        _refuse_no_numbers(self.table)
        if self.statistics.final_head is None:
            object.__setattr__(self, "statistics", replace(self.statistics, final_head=self.candidate.baseline))
        if not self.baselines:
            raise InputError(
                f"no baseline in {self.graph_set.recipe} runs on {self.table.device}, so there is nothing to "
                f"compare plans with: see `mess-compile build --device {self.table.device}`"
            )

    @property
    def candidate(self) -> CandidateNetwork:
        return self.graph_set.candidate

    @cached_property
    def heads(self) -> tuple[Head, ...]:
        """The heads that run on the target and have statistics, in the network's order."""
        known = set(self.statistics.heads)
        return tuple(
            head for head in self.candidate.heads if head.name in known and self.runs([head_graph_name(head.name)])
        )

    @cached_property
    def cuts(self) -> dict[str, Grids]:
        """The cuts of each of `heads`."""
        return {head.name: cut_grids(self.statistics, head.name) for head in self.heads}

    def runs(self, graphs: Iterable[str]) -> bool:
        """Whether the target has every one of these graphs."""
        return all(has_engine(self.table, self.graph_set, graph) for graph in graphs)

    def source(self, graphs: Iterable[str]) -> str:
        """ "estimated" when the latency of any of these graphs, or of a pseudo graph, is."""
        keys = [(graph, self.graph_set.spec(graph).precision) for graph in graphs]
        keys += [(pseudo, FP32) for pseudo in PSEUDO_GRAPHS]
        return "estimated" if any(self.table.entries[key].source == "estimated" for key in keys) else "measured"

    def error(self, graphs: Iterable[str]) -> float | None:
        """The factor by which the latency of these graphs together may be wrong, where any of it is an estimate.

        The mean of the graphs' factors, by the time that they take; that of a measured one is 1. None where all of
        them were measured.
        """
        entries = [self.table.entries[graph, self.graph_set.spec(graph).precision] for graph in graphs]
        if all(entry.source != "estimated" or entry.error is None for entry in entries):
            return None
        spent = sum(entry.mean_ms for entry in entries)
        return sum(entry.mean_ms * (entry.error or 1.0) for entry in entries) / spent if spent else None

    def of_images(self, rows: NDArray[np.intp]) -> Evidence:
        """The same of these images alone."""
        return replace(self, statistics=self.statistics.select(rows.tolist()))

    @cached_property
    def without_energy(self) -> tuple[str, ...]:
        """The graphs, pseudo graphs included, that the target runs and the latency table has no energy of."""
        graphs = [(name, spec.precision) for name, spec in self.graph_set.graphs.items()]
        keys = [*graphs, *((pseudo, FP32) for pseudo in PSEUDO_GRAPHS)]
        entries = self.table.entries
        return tuple(key[0] for key in keys if key in entries and entries[key].energy_mj is None)

    def has_graphs_of(self, heads: Sequence[str]) -> bool:
        """Whether the target has every graph of a cascade with these heads."""
        return self.runs(plan_graphs(self.candidate, heads))

    @cached_property
    def baselines(self) -> tuple[str, ...]:
        """The single-exit graphs that run on the target and have statistics."""
        known = self.statistics.scored
        return tuple(name for name in self.graph_set.baselines if self.scored_as(name) in known and self.runs([name]))

    @cached_property
    def baseline(self) -> str:
        """The single-exit graph that plans are compared with: the best in mIoU on these images, of equals the first."""
        return max(self.baselines, key=self.baseline_miou)

    def baseline_miou(self, name: str) -> float:
        """mIoU in percent of a single-exit graph."""
        return head_miou(self.statistics, self.scored_as(name))

    def scored_as(self, name: str) -> str:
        """The name of a single-exit graph in the statistics; that of the candidate network is its final exit."""
        return self.candidate.baseline if name == BASELINE else name

    @cached_property
    def absent_classes(self) -> tuple[str, ...]:
        """The classes without a labelled pixel in these images; no mIoU counts them."""
        pixels = self.statistics.labelled.sum(axis=0)
        return tuple(name for name, count in zip(self.statistics.classes, pixels, strict=True) if not count)

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Warnings that travel with every figure of the latency table."""
        return warnings_of(self.table, (self.graph_set,))

    @cached_property
    def table_sha256(self) -> str:
        return table_content_sha256(self.table)

    @cached_property
    def statistics_sha256(self) -> str:
        return statistics_content_sha256(self.statistics)

    def path_cost_ns(self, name: str, quantity: Quantity = "mean_ms") -> int:
        """The cost of an image on a whole network, in ns: upload, one graph, download."""
        return path_costs_ns(self.table, self.graph_set, [name], quantity)[-1]

    def baseline_cost_ns(self, quantity: Quantity = "mean_ms") -> int:
        """The cost of an image on the baseline, in ns."""
        return self.path_cost_ns(self.baseline, quantity)


def _refuse_no_numbers(table: LatencyTable) -> None:
    for entry in table.entries.values():
        if not (math.isfinite(entry.mean_ms) and math.isfinite(entry.p99_ms)):
            raise InputError(
                f"the latency table of {table.device} has {entry.mean_ms} ms (p99 {entry.p99_ms}) for {entry.graph}: "
                f"{table.remedy}"
            )


def evidence_of_plan(evidences: Sequence[Evidence], plan: Plan | Candidate) -> Evidence:
    """The evidence of the recipe that `plan` was searched in."""
    return next(evidence for evidence in evidences if evidence.graph_set.recipe == plan.precision)


def best_baseline(evidences: Sequence[Evidence]) -> tuple[int, str]:
    """The best single-exit network on these images: the place of its evidence, and its name among what is scored."""
    place = max(range(len(evidences)), key=lambda i: evidences[i].baseline_miou(evidences[i].baseline))
    return place, evidences[place].scored_as(evidences[place].baseline)


def refuse_different_images(evidences: Sequence[Evidence]) -> None:
    """Raises StaleError when the recipes' statistics are not of the same images, or not against the same truth."""
    if len({evidence.statistics.truth for evidence in evidences}) > 1:
        named = ", ".join(f"{each.graph_set.recipe} against {each.statistics.truth}" for each in evidences)
        raise StaleError(
            f"the evaluations of the precisions cannot be compared ({named}): run `mess-compile evaluate --precision "
            "...` on the same data for each"
        )
    if len({evidence.statistics.image_id for evidence in evidences}) > 1:
        raise StaleError(
            "the evaluations of the precisions are of different images, so their figures cannot be compared: run "
            "`mess-compile evaluate --precision ...` on the same data for each"
        )


def refuse_without_energy(evidence: Evidence) -> None:
    """Raises InputError when the latency table lacks the energy of anything that a plan may run."""
    lacking, table = evidence.without_energy, evidence.table
    if not lacking:
        return
    if all(entry.energy_mj is None for entry in table.entries.values()):
        remedy = f"profile where the device reports its power (`mess-compile profile --device {table.device}`)"
    else:
        remedy = f"run `mess-compile profile --device {table.device} --all`"
    names = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
    raise InputError(f"the latency table of {table.device} has no energy of {names}: {remedy}, or leave energy out")


def figures_of_stages(evidence: Evidence, setting: str, stages: Sequence[Stage]) -> Figures:
    """Figures of the plan with these `stages`; see docs/definitions.md. Raises InputError when evidence lacks."""
    statistics = evidence.statistics
    heads = [stage.head for stage in stages]
    exits = exits_taken(statistics, stages)
    costs = np.array(exit_costs_ns(evidence, setting, heads), np.int64)[exits]  # (n,)
    workload = np.array(exit_macs(evidence.candidate, heads), np.int64)[exits]  # (n,)
    return Figures(
        latency_ms=int(costs.sum()) / statistics.images / 1e6,
        p95_ms=percentile(costs, 95) / 1e6,
        worst_ms=worst_ns(evidence, setting, heads) / 1e6,
        miou=_best_report(statistics, heads) if setting == "anytime" else mixture_miou(statistics, heads, exits),
        gmacs=int(workload.sum()) / statistics.images / 1e9,
        memory_bytes=memory_bytes(evidence.graph_set, heads),
        exit_rates=tuple(int((exits == i).sum()) / statistics.images for i in range(len(stages))),
        images=statistics.images,
        split=statistics.split,
        source=evidence.source(plan_graphs(evidence.candidate, heads)),
        energy_mj=_energy_mj(evidence, setting, heads, exits),
        error=evidence.error(plan_graphs(evidence.candidate, heads)),
        change=change_of(statistics, setting, heads, exits),
    )


def change_of(statistics: ExitStatistics, setting: str, heads: Sequence[str], exits: NDArray[np.intp]) -> float | None:
    """The mean over images of the percentage of pixels that are labelled otherwise than by the network itself; in the
    anytime setting at the best report. None where the truth is labels."""
    if statistics.truth != OWN_OUTPUT:
        return None
    if setting == "anytime":
        best = max(range(len(heads)), key=lambda i: head_miou(statistics, heads[i]))
        exits = np.full(statistics.images, best, np.intp)
    index = np.array([statistics.head_index(head) for head in heads])[exits]
    changed = changed_shares(statistics)[np.arange(statistics.images), index]
    return 100 * int(changed.sum()) / statistics.images / WHOLE


def faded_classes(statistics: ExitStatistics, setting: str, stages: Sequence[Stage]) -> tuple[FadedClass, ...]:
    """The classes that a plan gives less than FADED of the pixels that the network itself gives."""
    if statistics.truth != OWN_OUTPUT or setting == "anytime":
        return ()
    heads = [stage.head for stage in stages]
    _, given, own = mixture_pixels(statistics, heads, exits_taken(statistics, stages))
    shares = [(name, int(n) / int(m)) for name, n, m in zip(statistics.classes, given, own, strict=True) if m]
    return tuple(FadedClass(name, share) for name, share in shares if share < FADED)


def refuse_without_own_output(evidence: Evidence) -> None:
    """Raises InputError when the evaluation cannot say what changes of the network's own output."""
    if evidence.statistics.truth != OWN_OUTPUT:
        raise InputError(
            "--max-change counts pixels that are labelled otherwise than by the network itself, but the evaluation is "
            "against labels: use --max-err, or evaluate on images that the network labelled "
            "(`mess-compile attach MODEL.onnx --images DIR`)"
        )


def _energy_mj(evidence: Evidence, setting: str, heads: Sequence[str], exits: NDArray[np.intp]) -> float | None:
    if evidence.without_energy:
        return None
    energies = np.array(exit_costs_ns(evidence, setting, heads, "energy_mj"), np.int64)[exits]  # (n,) nJ
    return int(energies.sum()) / evidence.statistics.images / 1e6


def baseline_figures(evidence: Evidence) -> Figures:
    """Figures of the better single-exit network, which is a plan too. See docs/definitions.md, Baseline."""
    stage = Stage(evidence.candidate.point_of(evidence.baseline), evidence.baseline, 0, None)
    return figures_of_stages(evidence, "budgeted", [stage])


def replay(evidence: Evidence, setting: str, stages: Sequence[Stage]) -> tuple[NDArray[np.intp], Figures]:
    """A plan on the images of `evidence`: the exit (from 1) that each image takes, and the figures."""
    return exits_taken(evidence.statistics, stages) + 1, figures_of_stages(evidence, setting, stages)


def exits_taken(statistics: ExitStatistics, stages: Sequence[Stage]) -> NDArray[np.intp]:
    """The index (n,), from 0, of the first stage whose count reaches its cut; the last stage takes the rest."""
    taken = np.full(statistics.images, len(stages) - 1, np.intp)
    for index in reversed(range(len(stages) - 1)):
        stage = stages[index]
        if stage.cut is not None:
            taken[statistics.counts[:, statistics.head_index(stage.head), stage.row] >= stage.cut] = index
    return taken


def exit_costs_ns(
    evidence: Evidence, setting: str, heads: Sequence[str], quantity: Quantity = "mean_ms"
) -> tuple[int, ...]:
    """The cost of an image that leaves at each exit, in ns (of `energy_mj` in nJ); in the anytime setting it includes
    earlier reports."""
    costs = report_times_ns if setting == "anytime" else path_costs_ns
    return costs(evidence.table, evidence.graph_set, heads, quantity)


def worst_ns(evidence: Evidence, setting: str, heads: Sequence[str]) -> int:
    """The p99 of the deepest path, in ns; of a plan and of a whole network by the same rule."""
    return path_p99_ns(evidence.table, evidence.graph_set, heads, every_report=setting == "anytime")


def exit_macs(candidate: CandidateNetwork, heads: Sequence[str]) -> tuple[int, ...]:
    """The workload of an image that leaves at each exit: the backbone up to it and every head on the way."""
    if len(heads) == 1 and is_whole(heads[0]):
        return (candidate.baseline_macs,)
    macs, spent = [], 0
    for name in heads:
        head = candidate.head(name)
        spent += head.macs
        macs.append(candidate.exit_point(head.exit_point).macs + spent)
    return tuple(macs)


def mixture_miou(statistics: ExitStatistics, heads: Sequence[str], exits: NDArray[np.intp]) -> float:
    """mIoU in percent when image i leaves at `heads[exits[i]]`: the IoU of the summed intersections and unions."""
    return miou(*mixture_pixels(statistics, heads, exits))


def mixture_pixels(
    statistics: ExitStatistics, heads: Sequence[str], exits: NDArray[np.intp]
) -> tuple[Ints, Ints, Ints]:
    """Intersection, predicted and labelled pixels (K,) when image i leaves at `heads[exits[i]]`."""
    images = np.arange(statistics.images)
    index = np.array([statistics.head_index(head) for head in heads])[exits]
    return (
        statistics.intersection[images, index].sum(axis=0),
        statistics.predicted[images, index].sum(axis=0),
        statistics.labelled.sum(axis=0),
    )


def anytime_reports(evidence: Evidence, heads: Sequence[str]) -> tuple[AnytimeReport, ...]:
    """When each exit reports, and the best mIoU (percent) of any exit so far."""
    best, reports = 0.0, []
    for head, time in zip(heads, exit_costs_ns(evidence, "anytime", heads), strict=True):
        best = max(best, head_miou(evidence.statistics, head))
        reports.append(AnytimeReport(time / 1e6, best))
    return tuple(reports)


def _best_report(statistics: ExitStatistics, heads: Sequence[str]) -> float:
    return max(head_miou(statistics, head) for head in heads)


def plan_graphs(candidate: CandidateNetwork, heads: Sequence[str]) -> tuple[str, ...]:
    """The names of all graphs of a plan that leaves through `heads`, each once."""
    stages = stage_graphs(candidate, heads)
    return tuple(dict.fromkeys(name for stage in stages for name in stage.all))


def graphs_of_stages(evidence: Evidence, stages: Sequence[Stage]) -> tuple[PlanGraph, ...]:
    """The graphs of a plan with these stages, in the order of their first run."""
    names = plan_graphs(evidence.candidate, [stage.head for stage in stages])
    specs = [evidence.graph_set.spec(name) for name in names]
    return tuple(PlanGraph(spec.name, spec.precision, spec.wanted) for spec in specs)


def memory_bytes(graph_set: GraphSet, heads: Sequence[str]) -> int:
    """Weights + the largest workspace + inputs and outputs of the graphs of a plan that leaves through `heads`."""
    return _memory_of_graphs(graph_set, plan_graphs(graph_set.candidate, heads))


def _memory_of_graphs(graph_set: GraphSet, names: Iterable[str]) -> int:
    specs = [graph_set.spec(name) for name in names]
    tensors = {tensor for spec in specs for tensor in (*spec.inputs, *spec.outputs)}
    weights = sum(spec.bytes for spec in specs)
    return weights + max(spec.workspace_bytes for spec in specs) + sum(tensor.bytes for tensor in tensors)


def percentile(costs: NDArray[np.int64], percent: int) -> int:
    """The smallest cost that at least `percent` of the images do not exceed."""
    return int(np.sort(costs)[-(-percent * costs.size // 100) - 1])


def plan_of_stages(evidence: Evidence, setting: str, stages: tuple[Stage, ...], reference_miou: float | None) -> Plan:
    """The plan with these `stages`; its error counts from `reference_miou` (percent), None: from the baseline's."""
    anytime = setting == "anytime"
    predicted = figures_of_stages(evidence, setting, stages)
    return Plan(
        device=evidence.table.device,
        library=evidence.table.library,
        precision=evidence.graph_set.recipe,
        setting=setting,
        network=evidence.graph_set.identity,
        gate=evidence.graph_set.gate,
        stages=stages,
        graphs=graphs_of_stages(evidence, stages),
        tuned_by=f"{evidence.statistics.library} on {evidence.statistics.device}",
        power_mode=evidence.table.environment.get("power_mode"),
        predicted=predicted,
        baseline=baseline_figures(evidence),
        reference_miou=reference_miou,
        table_sha256=evidence.table_sha256,
        statistics_sha256=evidence.statistics_sha256,
        operating_points=(default_point(stages, predicted),),
        baseline_name=evidence.baseline,
        baseline_alone=evidence.graph_set.baseline_alone,
        reports=anytime_reports(evidence, [stage.head for stage in stages]) if anytime else (),
        absent_classes=evidence.absent_classes,
        doubts=evidence.warnings,
        truth=evidence.statistics.truth,
        policy_rows=rows_in_use(evidence.statistics.policy_rows, stages),
        retrained=evidence.graph_set.retrained,
        faded_classes=faded_classes(evidence.statistics, setting, stages),
        class_iou=() if anytime else class_iou_of(evidence, stages),
    )


def class_iou_of(evidence: Evidence, stages: Sequence[Stage]) -> tuple[ClassIou, ...]:
    """IoU of each class with labelled pixels, by the plan with these `stages` and by the baseline."""
    statistics = evidence.statistics
    heads = [stage.head for stage in stages]
    own = class_iou(*mixture_pixels(statistics, heads, exits_taken(statistics, stages)))
    of_baseline = head_class_iou(statistics, evidence.scored_as(evidence.baseline))
    return tuple(
        ClassIou(name, float(plan), float(baseline))
        for name, plan, baseline in zip(statistics.classes, own, of_baseline, strict=True)
        if not np.isnan(plan)
    )
