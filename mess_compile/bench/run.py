"""Measures a bundle on labelled images: predicted, replayed and measured, beside the best single-exit graph."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile.array_types import Floats, Ints
from mess_compile.data.dataset import DataSet, Sample, samples
from mess_compile.engines.files import EngineFiles
from mess_compile.evaluate.policies import with_rows
from mess_compile.evaluate.record import evaluate
from mess_compile.evaluate.statistics import WHOLE, ExitStatistics, changed_share, class_iou, miou
from mess_compile.latency.table import LatencyTable
from mess_compile.network import GraphSet
from mess_compile.reporter import Progress
from mess_compile.runtime.base import decode
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.bundle import manifest
from mess_compile.runtime.bundle.manifest import CLASS_ERR, LABELS, OWN_OUTPUT, TRUTHS, Figures
from mess_compile.runtime.cascade.cascade import Cascade
from mess_compile.runtime.engines.engine import Engine, Library
from mess_compile.runtime.images import frames
from mess_compile.search.groups import ENVIRONMENT_KEY, grouped
from mess_compile.search.metrics import Evidence, exit_macs, replay
from mess_compile.search.new_images import expected_of_one
from mess_compile.search.plan import Candidate, Expected, Stage

WARM_UP_FRAMES = 5
_ROUNDING = 1e-9
_TRUTH = decode.entry(optional=True, check=decode.one_of(TRUTHS))


@dataclass(frozen=True)
class Column:
    """mIoU in percent, mean latency and workload of an image, and the share of images that leave at each exit.

    `change` is as in Figures.
    """

    miou: float
    latency_ms: float
    gmacs: float
    exit_rates: tuple[float, ...]
    change: float | None = field(default=None, metadata=decode.OPTIONAL)


@dataclass(frozen=True)
class NearCut:
    """An image whose measured exit differs from the replayed one, and how many counts it is from the threshold."""

    image: str
    replayed_exit: int
    measured_exit: int
    counts_from_cut: int


@dataclass(frozen=True)
class OtherBaseline:
    """A single-exit graph with no higher mIoU (percent) on these images."""

    name: str
    miou: float


@dataclass(frozen=True)
class CheckedPromise:
    """A bound of the plan's search, and the value found here; both in the unit of the `quantity`.

    `held` is None for quantities that a bench does not measure: energy and memory, and what is against another truth
    than these images have.
    """

    quantity: str
    asked: float
    found: float | None
    held: bool | None
    class_name: str = field(default="", metadata=decode.OPTIONAL)

    @property
    def sentence(self) -> str:
        """For the user: whether the bound held, the bound, and the value found."""
        if self.held is None or self.found is None:
            return f"not measured here: {_QUANTITIES[self.quantity].format(self.asked)}"
        verdict = "held" if self.held else "MISSED"
        if self.quantity == "err_pp":
            lost = f"{self.found:.2f} lost" if self.found >= 0 else f"{-self.found:.2f} gained"
            return f"{verdict}: at most {self.asked:g} pp asked, {lost} on these images"
        if self.quantity == CLASS_ERR:
            lost = f"{self.found:.2f} pp lost" if self.found >= 0 else f"{-self.found:.2f} pp gained"
            return f"{verdict}: IoU of {self.class_name}: at most {self.asked:g} pp asked, {lost} on these images"
        if self.quantity == "change":
            return f"{verdict}: {self.found:.2f} % of the pixels changed, at most {self.asked:g} % asked"
        asked, found = (_QUANTITIES[self.quantity].format(value) for value in (self.asked, self.found))
        return f"{verdict}: at most {asked} asked, {found.partition(' ')[0]} measured"


_QUANTITIES = {
    "err_pp": "{:.2f} pp of mIoU",
    "change": "{:.2f} % of the pixels changed",
    CLASS_ERR: "{:.2f} pp of a class's IoU",
    "latency_ms": "{:.2f} ms mean latency",
    "p95_ms": "{:.2f} ms p95 latency",
    "worst_ms": "{:.2f} ms on the deepest path (p99)",
    "gmacs": "{:.3f} GMACs",
    "energy_mj": "{:.1f} mJ",
    "memory_bytes": "{:.0f} bytes of memory",
}


@dataclass(frozen=True)
class Bench:
    """`latency_ratio` and `workload_ratio` are baseline over cascade; `p95_ms` is of the measured cascade.

    `baseline` is the graph `baseline_name`, the single-exit graph with the highest mIoU on these images. `tuned_on`
    counts the images that the plan was chosen on. `promises` compare the bounds of the plan's search with the
    measurement. `doubts` are the warnings about the latency table, which predicted and replayed latencies come from.
    `truth` is what mIoU is against, `plan_truth` the same of the plan, and so of the column `predicted`. `expected` is
    the difference to the baseline on new images, by what these make of the plan; `without_expected` says why there is
    none. `retrained` is whether `attach` trained the network further; `baseline-alone` is then the network as it came.
    """

    bundle: str
    device: str
    split: str
    images: int
    tuned_on: int
    passes: int
    baseline_name: str
    baseline: Column
    other_baselines: tuple[OtherBaseline, ...]
    predicted: Column
    replayed: Column
    measured: Column
    latency_ratio: float
    latency_ratio_range: tuple[float, float]
    workload_ratio: float
    miou_difference: float
    p95_ms: float
    disagreements: tuple[NearCut, ...]
    promises: tuple[CheckedPromise, ...]
    doubts: tuple[str, ...]
    truth: str = field(default=LABELS, metadata=_TRUTH)
    plan_truth: str = field(default=LABELS, metadata=_TRUTH)
    expected: Expected | None = field(default=None, metadata=decode.OPTIONAL)
    without_expected: str = field(default="not computed", metadata=decode.OPTIONAL)
    retrained: bool = field(default=False, metadata=decode.OPTIONAL)

    def __repr__(self) -> str:
        from mess_compile.search.display import speed

        return (
            f"<bench of {self.bundle} on {self.images} images of {self.split}: {speed(self.latency_ratio)} (against "
            f"{self.baseline_name}), {self.miou_difference:+.2f} pp of mIoU, {len(self.missed)} promises missed>"
        )

    @property
    def missed(self) -> tuple[CheckedPromise, ...]:
        """The promises that did not hold on these images."""
        return tuple(each for each in self.promises if each.held is False)


@dataclass(frozen=True)
class DeadlineBench:
    """Results of refining each image until a deadline.

    `miou` (percent) and `confidence` (mean; None for a whole network) are of the labels available at the deadline, or
    else of the first labels after it. `exit_rates` are shares of images by their last result. `missed_first` is the
    share of images without labels at the deadline, `missed_later` of those whose last result came after it. Times run
    from the raw frame to labels of its own size. `doubts` are the warnings about the latencies that refining uses.
    `truth` is what mIoU is against.
    """

    bundle: str
    split: str
    images: int
    passes: int
    deadline_ms: float
    miou: float
    confidence: float | None
    exit_rates: tuple[float, ...]
    missed_first: float
    missed_later: float
    p50_ms: float
    p99_ms: float
    doubts: tuple[str, ...]
    truth: str = field(default=LABELS, metadata=_TRUTH)


class _Score:
    """Intersections and unions summed over a set of images."""

    def __init__(self, classes: int) -> None:
        self._sums: Ints = np.zeros((3, classes), np.int64)
        self._changed = self._images = 0

    def add(self, guess: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        classes = self._sums.shape[1]
        known = truth < classes
        guessed, labels = guess[known], truth[known]
        for row, values in enumerate((labels[guessed == labels], guessed, labels)):
            self._sums[row] += np.bincount(values, minlength=classes)
        self._changed += int(changed_share(int((guessed != labels).sum()), labels.size))
        self._images += 1

    @property
    def miou(self) -> float:
        return miou(*self._sums)

    @property
    def class_iou(self) -> Floats:
        """IoU in percent (classes,); nan for a class without labelled pixels."""
        return class_iou(*self._sums)

    @property
    def change(self) -> float:
        """The mean over images of the percentage of labelled pixels that are labelled otherwise."""
        return 100 * self._changed / self._images / WHOLE


class _Baseline:
    """Runs a single-exit network on the cascade's engine library, with the cascade's resizing."""

    def __init__(self, engine: Engine, library: Library, network: manifest.Network) -> None:
        self._engine, self._library, self._network = engine, library, network

    def __call__(self, frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
        network = self._network
        image = frames.to_input(frame, network.input_hw, network.resize)[None]
        start = time.perf_counter_ns()
        outputs = self._engine.run({"image": self._library.upload(image)})
        labels = self._library.download(outputs["labels"])[0]
        latency_ms = (time.perf_counter_ns() - start) / 1e6
        return frames.from_input(labels, (frame.shape[0], frame.shape[1]), network.resize), latency_ms


def bench(
    cascade: Cascade,
    engines: EngineFiles,
    table: LatencyTable,
    data: DataSet,
    tuned_on: frozenset[str],
    passes: int,
    progress: Progress,
) -> Bench:
    """Replay the plan from fresh statistics; run cascade and baseline in turn on every image, `passes` times.

    `table` gives the latencies of the replayed column; `tuned_on` are the ids of images that the plan was chosen on.
    Raises InputError when bundle, workspace and data do not belong together, or the plan takes no decisions.
    """
    if passes < 1:
        raise InputError(f"passes is {passes}: at least 1 is needed")
    graph_set = engines.graph_set
    _check_fits(cascade, graph_set, data)
    items = list(samples(data))
    images = ((s.id, s.group, s.frame, s.labels) for s in items)
    found = evaluate(
        engines,
        cascade.library,
        images,
        device=table.device,
        split=data.split,
        truth=data.truth,
        progress=lambda done: progress("replay", done, len(items)),
    )
    evidence = Evidence(graph_set, table, with_rows(found, cascade.plan.policy_rows))
    with closing(cascade.library.load(engines.path(evidence.baseline))) as engine:
        single = _Baseline(engine, cascade.library, cascade.manifest.network)
        run = _measure(cascade, single, items, passes, progress)
    return _compared(cascade, evidence, items, tuned_on, run)


def bench_deadline(
    cascade: Cascade,
    data: DataSet,
    deadline_ms: float,
    passes: int,
    progress: Progress,
) -> DeadlineBench:
    """Refine every image until a deadline, `passes` times. Raises InputError when the classes differ."""
    if passes < 1:
        raise InputError(f"passes is {passes}: at least 1 is needed")
    _check_classes(cascade, data)
    items = list(samples(data))
    for sample in items[:WARM_UP_FRAMES]:
        list(cascade.refine(sample.frame))
    score, exits, sure, first_ms, last_ms = _Score(len(data.classes.names)), [], [], [], []
    for number in range(passes):
        for index, sample in enumerate(items):
            results = list(cascade.refine(sample.frame, deadline_ms))
            there = max(sum(result.latency_ms <= deadline_ms for result in results) - 1, 0)
            score.add(results[there].labels, sample.labels)
            sure += [confidence for confidence in [results[there].confidence] if confidence is not None]
            exits.append(results[-1].exit)
            first_ms.append(results[0].latency_ms)
            last_ms.append(results[-1].latency_ms)
            progress("bench", number * len(items) + index + 1, passes * len(items))
    late, late_at_once = np.array(last_ms) > deadline_ms, np.array(first_ms) > deadline_ms
    return DeadlineBench(
        bundle=cascade.manifest.name,
        split=data.split,
        images=len(items),
        passes=passes,
        deadline_ms=deadline_ms,
        miou=score.miou,
        confidence=float(np.mean(sure)) if sure else None,
        exit_rates=_rates(exits, len(cascade.plan.stages)),
        missed_first=float(np.mean(late_at_once)),
        missed_later=float(np.mean(late & ~late_at_once)),
        p50_ms=float(np.percentile(last_ms, 50)),
        p99_ms=float(np.percentile(last_ms, 99)),
        doubts=cascade.plan.doubts,
        truth=data.truth,
    )


def _check_fits(cascade: Cascade, graph_set: GraphSet, data: DataSet) -> None:
    name, network = cascade.manifest.name, cascade.manifest.network
    if cascade.plan.setting == "anytime":
        raise InputError(
            f"bundle {name} has the anytime setting, in which every exit reports: add `--deadline 20ms`, or view it "
            "with `mess-compile run --progressive`"
        )
    if network.identity != graph_set.candidate.identity:
        raise InputError(
            f"bundle {name} holds another network than {graph_set.root}: run `mess-compile bundle` here, or bench it "
            "in its own workspace (-C DIR)"
        )
    _check_classes(cascade, data)


def _check_classes(cascade: Cascade, data: DataSet) -> None:
    name, network = cascade.manifest.name, cascade.manifest.network
    if data.classes.names != network.classes:
        raise InputError(
            f"{data.root} has the classes {', '.join(data.classes.names)}; bundle {name} was trained on "
            f"{', '.join(network.classes)}"
        )


@dataclass(frozen=True)
class _MeasuredRun:
    exits: tuple[int, ...]  # (n,), from 1
    latency_ms: NDArray[np.float64]  # (2, passes, n): cascade, baseline
    cascade_miou: float
    baseline_miou: float
    cascade_change: float
    baseline_change: float
    class_losses: NDArray[np.float64]  # (classes,), IoU of the baseline less that of the cascade, in pp


def _measure(
    cascade: Cascade,
    single: _Baseline,
    items: Sequence[Sample],
    passes: int,
    progress: Progress,
) -> _MeasuredRun:
    classes = len(cascade.manifest.network.classes)
    for sample in items[:WARM_UP_FRAMES]:
        cascade(sample.frame)
        single(sample.frame)
    latency_ms = np.zeros((2, passes, len(items)))
    exits = []
    scores = _Score(classes), _Score(classes)
    for number in range(passes):
        for index, sample in enumerate(items):
            prediction = cascade(sample.frame)
            labels, latency_ms[1, number, index] = single(sample.frame)
            latency_ms[0, number, index] = prediction.latency_ms
            if number == 0:
                exits.append(prediction.exit)
                scores[0].add(prediction.labels, sample.labels)
                scores[1].add(labels, sample.labels)
            progress("bench", number * len(items) + index + 1, passes * len(items))
    return _MeasuredRun(
        exits=tuple(exits),
        latency_ms=latency_ms,
        cascade_miou=scores[0].miou,
        baseline_miou=scores[1].miou,
        cascade_change=scores[0].change,
        baseline_change=scores[1].change,
        class_losses=scores[1].class_iou - scores[0].class_iou,
    )


def _compared(
    cascade: Cascade,
    evidence: Evidence,
    items: Sequence[Sample],
    tuned_on: frozenset[str],
    run: _MeasuredRun,
) -> Bench:
    plan, candidate = cascade.plan, evidence.candidate
    stages = tuple(Stage(stage.exit_point, stage.head, stage.row, stage.cut) for stage in plan.stages)
    replayed_exits, replayed = replay(evidence, plan.setting, stages)
    macs = exit_macs(candidate, [stage.head for stage in stages])
    per_pass = run.latency_ms.mean(axis=2)  # (2, passes)
    ratios = per_pass[1] / per_pass[0]
    measured_ms, baseline_ms = (float(value) for value in run.latency_ms.mean(axis=(1, 2)))
    truth = evidence.statistics.truth
    changes = (run.cascade_change, run.baseline_change) if truth == OWN_OUTPUT else (None, None)
    gmacs, rates = _mean_at(macs, run.exits) / 1e9, _rates(run.exits, len(stages))
    measured = Column(run.cascade_miou, measured_ms, gmacs, rates, changes[0])
    baseline = Column(run.baseline_miou, baseline_ms, candidate.baseline_macs / 1e9, (1.0,), changes[1])
    return Bench(
        bundle=cascade.manifest.name,
        device=plan.target,
        split=evidence.statistics.split,
        images=len(items),
        tuned_on=sum(sample.id in tuned_on for sample in items),
        passes=run.latency_ms.shape[1],
        baseline_name=evidence.baseline,
        retrained=evidence.graph_set.retrained,
        baseline=baseline,
        other_baselines=tuple(
            OtherBaseline(name, evidence.baseline_miou(name))
            for name in evidence.baselines
            if name != evidence.baseline
        ),
        predicted=_column(plan.predicted),
        replayed=_column(replayed),
        measured=measured,
        latency_ratio=baseline_ms / measured_ms,
        latency_ratio_range=(float(ratios.min()), float(ratios.max())),
        workload_ratio=baseline.gmacs / measured.gmacs,
        miou_difference=measured.miou - baseline.miou,
        p95_ms=float(np.percentile(run.latency_ms[0].mean(axis=0), 95)),
        disagreements=tuple(
            NearCut(sample.id, int(expected), real, _counts_from_cut(evidence.statistics, index, stages))
            for index, (sample, expected, real) in enumerate(zip(items, replayed_exits, run.exits, strict=True))
            if expected != real
        ),
        promises=_checked(cascade, measured, baseline, run, truth),
        doubts=evidence.warnings,
        truth=truth,
        plan_truth=plan.truth,
        **_on_new_images(evidence, plan.setting, stages, plan.environment.get(ENVIRONMENT_KEY)),
    )


def _on_new_images(evidence: Evidence, setting: str, stages: tuple[Stage, ...], pattern: str | None) -> dict[str, Any]:
    """What to expect of the plan on new images, by a bootstrap over the groups of these; it was chosen on others."""
    evidence = replace(evidence, statistics=grouped(evidence.statistics, pattern))
    baseline = (0, evidence.scored_as(evidence.baseline))
    found = expected_of_one([evidence], Candidate(evidence.graph_set.recipe, setting, stages), baseline, pattern)
    return (
        {"expected": None, "without_expected": found}
        if isinstance(found, str)
        else {"expected": found, "without_expected": ""}
    )


def _checked(
    cascade: Cascade, measured: Column, baseline: Column, run: _MeasuredRun, truth: str
) -> tuple[CheckedPromise, ...]:
    """Each promise with its measured value; relative bounds refer to the baseline of the same run.

    An error against one truth says nothing about that against another.
    """
    plan, classes = cascade.plan, cascade.manifest.network.classes
    cascade_ms, single_ms = run.latency_ms
    deepest = cascade_ms[:, np.array(run.exits) == max(run.exits)]
    found = {
        "err_pp": (baseline.miou - measured.miou if truth == plan.truth else None, 0.0),
        "change": (measured.change, 0.0),
        "latency_ms": (measured.latency_ms, baseline.latency_ms),
        "p95_ms": (float(np.percentile(cascade_ms.mean(axis=0), 95)), baseline.latency_ms),
        "worst_ms": (float(np.percentile(deepest, 99)), float(np.percentile(single_ms, 99))),
        "gmacs": (measured.gmacs, baseline.gmacs),
    }
    checked = []
    for promise in plan.promises:
        value, of_baseline = found.get(promise.quantity, (None, 0.0))
        if promise.quantity == CLASS_ERR and truth == plan.truth:
            lost = run.class_losses[classes.index(promise.class_name)]
            value = None if np.isnan(lost) else float(lost)
        asked = promise.limit * of_baseline if promise.relative else promise.limit
        if value is not None:
            value += promise.offset_pp
        within = None if value is None else value <= asked + _ROUNDING
        checked.append(CheckedPromise(promise.quantity, asked, value, within, promise.class_name))
    return tuple(checked)


def _column(figures: Figures) -> Column:
    return Column(figures.miou, figures.latency_ms, figures.gmacs, figures.exit_rates, figures.change)


def _counts_from_cut(statistics: ExitStatistics, image: int, stages: Sequence[Stage]) -> int:
    """Distance of the image's count from the nearest threshold that it was compared with."""
    distances = [
        abs(int(statistics.counts[image, statistics.head_index(stage.head), stage.row]) - stage.cut)
        for stage in stages
        if stage.cut is not None
    ]
    return min(distances)


def _mean_at(values: Sequence[int], exits: Sequence[int]) -> float:
    return sum(values[number - 1] for number in exits) / len(exits)


def _rates(exits: Sequence[int], count: int) -> tuple[float, ...]:
    return tuple(exits.count(number) / len(exits) for number in range(1, count + 1))
