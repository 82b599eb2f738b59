"""A bundle against the truth: predicted, replayed and measured, beside the best single-exit graph in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mess_compile.data.dataset import DataSet, Sample, samples
from mess_compile.engines.files import EngineFiles
from mess_compile.evaluate.record import evaluate
from mess_compile.evaluate.statistics import ExitStatistics, Ints, miou
from mess_compile.latency.table import LatencyTable
from mess_compile.network import GraphSet
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.bundle import manifest
from mess_compile.runtime.cascade import cascade as runtime_cascade
from mess_compile.runtime.engines.engine import Engine, Library
from mess_compile.runtime.images import frames
from mess_compile.search.metrics import Evidence, exit_macs, replay
from mess_compile.search.plan import Figures, Stage

WARM_UP_FRAMES = 5
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Column:
    """mIoU in percent, mean latency, mean workload, share of images per exit."""

    miou: float
    latency_ms: float
    gmacs: float
    exit_rates: tuple[float, ...]


@dataclass(frozen=True)
class NearCut:
    """An image whose measured exit differs from the replayed one, with its distance from the cut in counts."""

    image: str
    replayed_exit: int
    measured_exit: int
    counts_from_cut: int


@dataclass(frozen=True)
class OtherBaseline:
    """A single-exit graph that is no better on these images; mIoU in percent."""

    name: str
    miou: float


@dataclass(frozen=True)
class Held:
    """A bound that the plan was asked to keep, and what was found here: `asked` in the unit of the `quantity`.

    `held` is None where a bench cannot measure it (energy, memory).
    """

    quantity: str
    asked: float
    found: float | None
    held: bool | None

    @property
    def sentence(self) -> str:
        """What was asked, what was found, and whether that is within it."""
        if self.held is None or self.found is None:
            return f"not measured here: {_QUANTITIES[self.quantity].format(self.asked)}"
        verdict = "held" if self.held else "MISSED"
        if self.quantity == "err_pp":
            lost = f"{self.found:.2f} lost" if self.found >= 0 else f"{-self.found:.2f} gained"
            return f"{verdict}: at most {self.asked:g} pp asked, {lost} on these images"
        asked, found = (_QUANTITIES[self.quantity].format(value) for value in (self.asked, self.found))
        return f"{verdict}: at most {asked} asked, {found.partition(' ')[0]} measured"


_QUANTITIES = {
    "err_pp": "{:.2f} pp of mIoU",
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

    `baseline` is of the graph `baseline_name`, the best single-exit graph in mIoU on these images. `tuned_on` counts
    the images among these that the plan was chosen on. `promises` hold what the plan was asked to keep against the
    measurement. `doubts` say what speaks against the latencies of the table,
    which are those predicted and replayed.
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
    promises: tuple[Held, ...]
    doubts: tuple[str, ...]

    def __repr__(self) -> str:
        from mess_compile.search.display import speed

        return (
            f"<bench of {self.bundle} on {self.images} images of {self.split}: {speed(self.latency_ratio)} (against "
            f"{self.baseline_name}), {self.miou_difference:+.2f} pp of mIoU, {len(self.missed)} promises missed>"
        )

    @property
    def missed(self) -> tuple[Held, ...]:
        """The promises that did not hold on these images."""
        return tuple(each for each in self.promises if each.held is False)


@dataclass(frozen=True)
class DeadlineBench:
    """What refining under a deadline gives.

    `miou` (percent) and `confidence` (mean; None of a whole network) are of the labels that were there at the deadline;
    where none were, of the first ones after it. `exit_rates` are shares of images by their last result. Shares of
    misses: `missed_first` of the images had nothing at the deadline, `missed_later` had a result in time, and the last
    one after it. All times run from the frame as it comes to the labels at its own size. `doubts` say what speaks
    against the latencies that refining goes by.
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


class _Score:
    """Pixel sums over a set of images."""

    def __init__(self, classes: int) -> None:
        self._sums: Ints = np.zeros((3, classes), np.int64)

    def add(self, guess: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        classes = self._sums.shape[1]
        known = truth < classes
        guessed, labels = guess[known], truth[known]
        for row, values in enumerate((labels[guessed == labels], guessed, labels)):
            self._sums[row] += np.bincount(values, minlength=classes)

    @property
    def miou(self) -> float:
        return miou(*self._sums)


class _Baseline:
    """A single-exit network on the cascade's own engine library; frames are resized as for the cascade."""

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
    cascade: runtime_cascade.Cascade,
    engines: EngineFiles,
    table: LatencyTable,
    data: DataSet,
    tuned_on: frozenset[str],
    passes: int,
    progress: Callable[[str, int, int], None],
) -> Bench:
    """Replay the plan from fresh statistics; run cascade and baseline in turn on every image, `passes` times.

    `table` gives the replayed column its latencies; `tuned_on` holds the ids of the images that the plan was chosen on.
    Raises InputError when bundle, workspace and data do not fit, or the plan is one that takes no decision to compare.
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
        progress=lambda done: progress("replay", done, len(items)),
    )
    evidence = Evidence(graph_set, table, found)
    with closing(cascade.library.load(engines.path(evidence.baseline))) as engine:
        single = _Baseline(engine, cascade.library, cascade.manifest.network)
        run = _measure(cascade, single, items, passes, progress)
    return _compared(cascade, evidence, items, tuned_on, run)


def bench_deadline(
    cascade: runtime_cascade.Cascade,
    data: DataSet,
    deadline_ms: float,
    passes: int,
    progress: Callable[[str, int, int], None],
) -> DeadlineBench:
    """Refine every image under a deadline, `passes` times. Raises InputError when bundle and data do not fit."""
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
    )


def _check_fits(cascade: runtime_cascade.Cascade, graph_set: GraphSet, data: DataSet) -> None:
    name, network = cascade.manifest.name, cascade.manifest.network
    if cascade.plan.setting == "anytime":
        raise InputError(
            f"bundle {name} is of the anytime setting, where every exit reports: give `--deadline 20ms`, or look at it "
            "with `mess-compile run --progressive`; without a deadline bench compares plans whose images leave"
        )
    if network.identity != graph_set.candidate.identity:
        raise InputError(
            f"bundle {name} holds another network than {graph_set.root}: run `mess-compile bundle` here, or bench it "
            "in its own workspace (-C DIR)"
        )
    _check_classes(cascade, data)


def _check_classes(cascade: runtime_cascade.Cascade, data: DataSet) -> None:
    name, network = cascade.manifest.name, cascade.manifest.network
    if data.classes.names != network.classes:
        raise InputError(
            f"{data.root} has the classes {', '.join(data.classes.names)}; bundle {name} was trained on "
            f"{', '.join(network.classes)}"
        )


@dataclass(frozen=True)
class _Run:
    exits: tuple[int, ...]  # (n,), from 1
    latency_ms: NDArray[np.float64]  # (2, passes, n): cascade, baseline
    cascade_miou: float
    baseline_miou: float


def _measure(
    cascade: runtime_cascade.Cascade,
    single: _Baseline,
    items: Sequence[Sample],
    passes: int,
    progress: Callable[[str, int, int], None],
) -> _Run:
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
    return _Run(tuple(exits), latency_ms, scores[0].miou, scores[1].miou)


def _compared(
    cascade: runtime_cascade.Cascade,
    evidence: Evidence,
    items: Sequence[Sample],
    tuned_on: frozenset[str],
    run: _Run,
) -> Bench:
    plan, candidate = cascade.plan, evidence.candidate
    stages = tuple(Stage(stage.exit_point, stage.head, stage.row, stage.cut) for stage in plan.stages)
    replayed_exits, replayed = replay(evidence, plan.setting, stages)
    macs = exit_macs(candidate, [stage.head for stage in stages])
    per_pass = run.latency_ms.mean(axis=2)  # (2, passes)
    ratios = per_pass[1] / per_pass[0]
    measured_ms, baseline_ms = (float(value) for value in run.latency_ms.mean(axis=(1, 2)))
    measured = Column(run.cascade_miou, measured_ms, _mean_at(macs, run.exits) / 1e9, _rates(run.exits, len(stages)))
    baseline = Column(run.baseline_miou, baseline_ms, candidate.baseline_macs / 1e9, (1.0,))
    return Bench(
        bundle=cascade.manifest.name,
        device=plan.target,
        split=evidence.statistics.split,
        images=len(items),
        tuned_on=sum(sample.id in tuned_on for sample in items),
        passes=run.latency_ms.shape[1],
        baseline_name=evidence.baseline,
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
        promises=_held(plan.promises, measured, baseline, run),
        doubts=evidence.warnings,
    )


def _held(promises: Sequence[manifest.Promise], measured: Column, baseline: Column, run: _Run) -> tuple[Held, ...]:
    """Each promise against what was measured; what is relative is so to the baseline of the same run."""
    cascade_ms, single_ms = run.latency_ms
    deepest = cascade_ms[:, np.array(run.exits) == max(run.exits)]
    found = {
        "err_pp": (baseline.miou - measured.miou, 0.0),
        "latency_ms": (measured.latency_ms, baseline.latency_ms),
        "p95_ms": (float(np.percentile(cascade_ms.mean(axis=0), 95)), baseline.latency_ms),
        "worst_ms": (float(np.percentile(deepest, 99)), float(np.percentile(single_ms, 99))),
        "gmacs": (measured.gmacs, baseline.gmacs),
    }
    held = []
    for promise in promises:
        value, of_baseline = found.get(promise.quantity, (None, 0.0))
        asked = promise.limit * of_baseline if promise.relative else promise.limit
        if value is not None:
            value += promise.offset_pp
        within = None if value is None else value <= asked + _ROUNDING
        held.append(Held(promise.quantity, asked, value, within))
    return tuple(held)


def _column(figures: Figures | manifest.Figures) -> Column:
    return Column(figures.miou, figures.latency_ms, figures.gmacs, figures.exit_rates)


def _counts_from_cut(statistics: ExitStatistics, image: int, stages: Sequence[Stage]) -> int:
    """How far the image's count lies from the nearest cut that it was held against."""
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
