"""Chooses the thresholds of a bundle's plan again on the device that will run it, by the device's own engines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mess_compile.array_types import Floats, Ints, Pixels
from mess_compile.bundle.stage_costs import confidence_histograms
from mess_compile.bundle.write import write_retuned
from mess_compile.data.dataset import ALWAYS_IGNORED, Data, DataSet, Sample, open_dataset, samples
from mess_compile.device.client import PythonSession
from mess_compile.device.remote import Remote
from mess_compile.evaluate.policies import with_rows
from mess_compile.evaluate.record import BLOCK, countable
from mess_compile.evaluate.statistics import ExitStatistics, class_iou, miou, stacked_counts
from mess_compile.network import BASELINE_ALONE, CandidateNetwork, Gate
from mess_compile.reporter import Reporter
from mess_compile.runtime.base.errors import EngineError, InputError
from mess_compile.runtime.bundle import manifest
from mess_compile.runtime.bundle.archive import Archive
from mess_compile.runtime.bundle.plan_choice import named_plans
from mess_compile.runtime.serve.scoring import HeadEngines, Score, ScoredExits
from mess_compile.search.groups import ENVIRONMENT_KEY, groups_of_ids
from mess_compile.search.hold_out import tuning_rows
from mess_compile.search.metrics import change_of, exit_macs, exits_taken, mixture_miou, mixture_pixels, percentile
from mess_compile.search.operating_points import thresholds_front
from mess_compile.search.plan import Stage


@dataclass(frozen=True)
class Choice:
    """What to choose with: labelled images, the network of the bundle's graphs, and a key to sign with."""

    data: Data
    candidate: CandidateNetwork
    key: Path | None


@dataclass(frozen=True)
class Retuned:
    """Results on the images that the plan was chosen on, mIoU in percent: `promised` by the plan, `found` on the device
    with the plan's thresholds, `chosen` with the new ones. `changed` is whether they differ."""

    images: int
    promised_miou: float
    found_miou: float
    chosen_miou: float
    promised_ms: float
    chosen_ms: float
    changed: bool


def retune(
    opened: Archive, choice: Choice, target: str | None, remote: Remote, path: Path, reporter: Reporter
) -> tuple[Path | None, Retuned]:
    """Run every exit of a bundle's plan (named by `target`) on the device, on the images that the plan was chosen on,
    and choose the thresholds again.

    Thresholds that reach the plan's mIoU and latency stay. Otherwise the fastest ones that reach the mIoU are chosen,
    or the most accurate ones when none does, and a bundle with them is written to `path`. Latencies are those of the
    bundle. Raises InputError, EngineError, RemoteError.
    """
    plan = _plan(opened.manifest, choice.candidate, target)
    data = _images(choice.data, plan, opened.manifest)
    statistics = with_rows(_record_statistics(opened, plan, data, remote, reporter), plan.policy_rows)
    stages = tuple(Stage(stage.exit_point, stage.head, stage.row, stage.cut) for stage in plan.stages)
    chosen = chosen_stages(statistics, plan, stages)
    found, new = (_figures(statistics, plan, each, choice.candidate) for each in (stages, chosen))
    result = Retuned(
        statistics.images,
        plan.predicted.miou,
        found.miou,
        new.miou,
        plan.predicted.latency_ms,
        new.latency_ms,
        chosen != stages,
    )
    if chosen == stages:
        return None, result
    if opened.signature is not None and choice.key is None:
        raise InputError("the bundle is signed, and new thresholds change it: sign it again with --sign KEY")
    changed = _with_stages(plan, chosen, statistics, choice.candidate)
    write_retuned(path, opened, changed, choice.key)
    return path, result


def _plan(described: manifest.Manifest, candidate: CandidateNetwork, target: str | None) -> manifest.BundlePlan:
    if described.network.identity != candidate.identity:
        raise InputError(
            f"the bundle {described.name} has another network than this workspace: name its own workspace with -C DIR"
        )
    plans = list(described.plans) if target is None else named_plans(described.plans, target)
    if len(plans) != 1:
        names = ", ".join(plan.name for plan in described.plans)
        raise InputError(
            f"the bundle {described.name} has the plans {names}: name the one that --data is for, such as "
            f"--target {described.plans[0].name}"
        )
    return plans[0]


def _images(root: Data, plan: manifest.BundlePlan, described: manifest.Manifest) -> DataSet:
    """The images that the plan was chosen on; its mIoU holds for these."""
    if manifest.CERTIFIED in plan.environment:
        raise InputError(
            f"the plan for {plan.name} is certified (`search --confidence`), and other thresholds would not be: ship "
            "it without --data, or ship a plan that was searched without --confidence"
        )
    data = open_dataset(root, plan.predicted.split)
    groups, pattern = [item.group for item in data.items], plan.environment.get(ENVIRONMENT_KEY)
    if pattern is not None:
        groups = list(groups_of_ids([item.id for item in data.items], pattern))
    tuning = tuning_rows(groups, plan.environment.get(manifest.HELD_OUT))
    data = replace(data, items=tuple(data.items[index] for index in tuning))
    if data.classes.names != described.network.classes or len(data.items) != plan.predicted.images:
        raise InputError(
            f"{data.root} has {len(data.items)} images of {len(data.classes.names)} classes in "
            f"{plan.predicted.split}, and the plan was chosen on {plan.predicted.images} of "
            f"{len(described.network.classes)}: name the same data"
        )
    if data.truth != plan.truth:
        raise InputError(
            f"{data.root} is against {data.truth}, and the plan was chosen against {plan.truth}: name the same data"
        )
    return data


def _record_statistics(
    opened: Archive, plan: manifest.BundlePlan, data: DataSet, remote: Remote, reporter: Reporter
) -> ExitStatistics:
    """Record the statistics of a plan's exits with the device's engines."""
    network, gate = opened.manifest.network, opened.manifest.gate
    thresholds, classes = np.array(gate.thresholds, np.float32), len(network.classes)
    blank = np.zeros((*network.input_hw, 3), np.uint8)
    session = PythonSession(remote, plan.library, blank, thresholds, reporter.progress)
    jobs = {graph: (opened.folder / graph, plan.precisions[graph].used) for graph in plan.graphs()}
    reporter.note("building the engines of the exits")
    failed = session.build(jobs)
    if failed:
        raise EngineError(f"{next(iter(failed))} cannot be built on the device: {next(iter(failed.values()))}")
    scores: list[Score] = []
    items: list[Sample] = []

    def counted(block: Sequence[Sample]) -> Iterator[tuple[Pixels, Pixels, NDArray[np.bool_]]]:
        for each in block:
            known = countable(each.id, each.frame, each.labels, classes, frozenset({ALWAYS_IGNORED}))
            yield each.frame, each.labels, known

    with session.scoring(jobs, _exits(plan, network, gate.by_class)) as score:
        for start in range(0, len(data.items), BLOCK):
            block = list(samples(replace(data, items=data.items[start : start + BLOCK])))
            items += block
            scores += score(counted(block))
            reporter.note(f"scoring the exits: {len(scores)} of {len(data.items)} images")
    gated = [stage for stage in plan.stages if not stage.is_whole]
    return ExitStatistics(
        heads=tuple(stage.head for stage in gated),
        classes=network.classes,
        cells=tuple(stage.cells for stage in gated),
        thresholds=thresholds,
        **stacked_counts([each.counts for each in scores]),
        intersection=np.stack([each.intersection for each in scores]),
        predicted=np.stack([each.predicted for each in scores]),
        labelled=np.stack([each.labelled for each in scores]),
        image_id=tuple(each.id for each in items),
        group=tuple(each.group for each in items),
        network=network.identity,
        gate=Gate(gate.confidence, gate.edge_aware, tuple(row[0] for row in gate.thresholds), gate.by_class),
        precision=plan.precision,
        device=plan.target,
        library=plan.library,
        split=plan.predicted.split,
        truth=plan.truth,
        baseline_alone=None if gated else network.identity,
        final_head=None if gated else BASELINE_ALONE,
    )


def _exits(plan: manifest.BundlePlan, network: manifest.Network, by_class: bool) -> ScoredExits:
    if plan.stages[0].is_whole:
        return ScoredExits(network.input_hw, len(network.classes), (), (), plan.stages[0].segment, by_class)
    points = [0, *(stage.exit_point for stage in plan.stages)]
    return ScoredExits(
        network.input_hw,
        len(network.classes),
        tuple((a, b, stage.segment) for a, b, stage in zip(points, points[1:], plan.stages, strict=False)),
        tuple(HeadEngines(str(stage.head_graph), stage.exit_point, str(stage.output)) for stage in plan.stages),
        None,
        by_class,
    )


def chosen_stages(
    statistics: ExitStatistics, plan: manifest.BundlePlan, stages: tuple[Stage, ...]
) -> tuple[Stage, ...]:
    """The plan's stages, or these with other thresholds, by the statistics of the device."""
    costs = _costs(plan)
    if plan.setting != "input-dependent" or len(stages) == 1:
        return stages
    present = _candidate(statistics, stages, costs)
    most_changed = min((each.limit for each in plan.promises if each.quantity == "change"), default=math.inf)
    floors = [
        (statistics.classes.index(each.class_name), each.least_iou)
        for each in plan.promises
        if each.least_iou is not None
    ]
    promised_ns = plan.predicted.latency_ms * (1 + 1e-6) * 1e6 * statistics.images

    def is_good(candidate: _Candidate) -> bool:
        enough = candidate.miou >= plan.predicted.miou and candidate.change <= most_changed
        return enough and all(candidate.class_iou[index] >= least for index, least in floors)

    if is_good(present) and present.cost_ns <= promised_ns:
        return stages
    candidates = list(_candidates(statistics, plan, stages, costs))
    good = [candidate for candidate in candidates if is_good(candidate)]
    if good:
        return min(good, key=lambda candidate: (candidate.cost_ns, -candidate.miou)).stages
    return min(candidates, key=lambda candidate: (-candidate.miou, candidate.cost_ns)).stages


@dataclass(frozen=True)
class _Candidate:
    """Stages with some thresholds: `cost_ns` is summed over images; `miou`, `change`, `class_iou` (K,) in percent."""

    cost_ns: int
    miou: float
    change: float
    class_iou: Floats
    stages: tuple[Stage, ...]


def _candidate(statistics: ExitStatistics, stages: tuple[Stage, ...], costs: Ints) -> _Candidate:
    taken, heads = exits_taken(statistics, stages), [stage.head for stage in stages]
    change = change_of(statistics, "input-dependent", heads, taken) or 0.0
    pixels = mixture_pixels(statistics, heads, taken)
    return _Candidate(int(costs[taken].sum()), miou(*pixels), change, class_iou(*pixels), stages)


def _candidates(
    statistics: ExitStatistics, plan: manifest.BundlePlan, stages: tuple[Stage, ...], costs: Ints
) -> Iterator[_Candidate]:
    """The non-dominated thresholds for each subset of exits that images may leave at: all exits first, and the last one
    alone at the end. A smaller subset helps where an engine has become too confident."""
    early = range(len(stages) - 1)
    shut = tuple(replace(stage, cut=plan.top(own) + 1) for own, stage in zip(plan.stages, stages[:-1], strict=False))
    for used in (used for many in reversed(range(1, len(stages))) for used in combinations(early, many)):
        some = [stages[index] for index in used]
        front = thresholds_front(statistics, [*some, stages[-1]], [*(int(costs[i]) for i in used), int(costs[-1])])
        for members in front[2]:
            decided = dict(zip(used, members, strict=False))
            whole = tuple(decided.get(index, shut[index]) for index in early)
            yield _candidate(statistics, (*whole, stages[-1]), costs)
    yield _candidate(statistics, (*shut, stages[-1]), costs)


def _costs(plan: manifest.BundlePlan) -> Ints:
    before = plan.upload_mean_ms + np.cumsum([cost.mean_ms for cost in plan.costs])
    costs: Ints = np.rint((before + [cost.report_mean_ms for cost in plan.costs]) * 1e6).astype(np.int64)
    return costs


def _figures(
    statistics: ExitStatistics, plan: manifest.BundlePlan, stages: Sequence[Stage], candidate: CandidateNetwork
) -> manifest.Figures:
    heads, exits = [stage.head for stage in stages], exits_taken(statistics, stages)
    costs, macs = _costs(plan)[exits], np.array(exit_macs(candidate, heads), np.int64)[exits]
    return replace(
        plan.predicted,
        latency_ms=int(costs.sum()) / statistics.images / 1e6,
        p95_ms=percentile(costs, 95) / 1e6,
        miou=mixture_miou(statistics, heads, exits),
        gmacs=int(macs.sum()) / statistics.images / 1e9,
        exit_rates=tuple(int((exits == index).sum()) / statistics.images for index in range(len(stages))),
        change=change_of(statistics, plan.setting, heads, exits),
    )


def _with_stages(
    plan: manifest.BundlePlan, stages: tuple[Stage, ...], statistics: ExitStatistics, candidate: CandidateNetwork
) -> manifest.BundlePlan:
    """The plan with other thresholds, and the device's figures for all its operating points."""

    def point(known: manifest.OperatingPoint) -> manifest.OperatingPoint:
        decided = known.decisions
        if known.name == manifest.DEFAULT_POINT:
            decided = tuple(manifest.Decision(stage.row, stage.cut) for stage in stages)
        at = [replace(stage, row=each.row, cut=each.cut) for stage, each in zip(stages, decided, strict=True)]
        return manifest.OperatingPoint(known.name, decided, _figures(statistics, plan, at, candidate))

    return replace(
        plan,
        stages=tuple(
            replace(known, row=stage.row, cut=stage.cut) for known, stage in zip(plan.stages, stages, strict=True)
        ),
        predicted=_figures(statistics, plan, stages, candidate),
        tuned_by=f"{plan.library} on {plan.target}",
        sources={what: sha256 for what, sha256 in plan.sources.items() if what != "statistics"},
        operating_points=tuple(map(point, plan.operating_points)),
        confidence=confidence_histograms(stages, statistics),
    )
