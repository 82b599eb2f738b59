"""A bundle against the truth: predicted, replayed and measured, beside the single-exit baseline in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mess_compile.candidates import BASELINE, GraphSet
from mess_compile.dataset import DataSet, Sample, samples
from mess_compile.latency import LatencyTable, path_costs_ns
from mess_compile.runtime import cascade as runtime_cascade
from mess_compile.runtime import frames
from mess_compile.runtime.engine import Engine, Library
from mess_compile.runtime.errors import InputError
from mess_compile.search.figures import exit_macs
from mess_compile.statistics import Ints, miou

WARM_UP_FRAMES = 5


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
class Bench:
    """`latency_ratio` and `workload_ratio` are baseline over cascade; `p95_ms` is of the measured cascade.

    `tuned_on` counts the images among these that the plan was chosen on.
    """

    bundle: str
    split: str
    images: int
    tuned_on: int
    passes: int
    baseline: Column
    predicted: Column
    replayed: Column
    measured: Column
    latency_ratio: float
    latency_ratio_range: tuple[float, float]
    workload_ratio: float
    miou_difference: float
    p95_ms: float
    disagreements: tuple[NearCut, ...]


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
    """The single-exit network on the cascade's own engine library."""

    def __init__(self, engine: Engine, library: Library, hw: tuple[int, int]) -> None:
        self._engine, self._library, self._hw = engine, library, hw

    def __call__(self, frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
        image = frames.resize(frame, self._hw)[None]
        start = time.perf_counter_ns()
        outputs = self._engine.run({"image": self._library.upload(image)})
        labels = self._library.download(outputs["labels"])[0]
        latency_ms = (time.perf_counter_ns() - start) / 1e6
        return frames.resize_labels(labels, (frame.shape[0], frame.shape[1])), latency_ms


def bench(
    bundle: Path,
    graph_set: GraphSet,
    table: LatencyTable,
    data: DataSet,
    ids_of_split: Callable[[str], frozenset[str]],
    passes: int,
    progress: Callable[[str, int, int], None],
) -> Bench:
    """Run the cascade and the baseline in turn on every image, `passes` times; score both.

    `table` gives the replayed column its latencies; `ids_of_split` the ids of the images of a split that plans were
    chosen on. Raises InputError when bundle, workspace and data do not fit.
    """
    if passes < 1:
        raise InputError(f"passes is {passes}: at least 1 is needed")
    with runtime_cascade.load(bundle, target=table.device) as cascade:
        _check_fits(cascade, graph_set, data, bundle)
        items = list(samples(data))
        with closing(cascade.library.load(graph_set.path(BASELINE))) as engine:
            single = _Baseline(engine, cascade.library, graph_set.candidate.input_hw)
            run = _measure(cascade, single, items, passes, progress)
        tuned_on = ids_of_split(cascade.plan.predicted.split)
        return _compared(bundle, cascade, graph_set, table, data.split, items, tuned_on, run)


def _check_fits(cascade: runtime_cascade.Cascade, graph_set: GraphSet, data: DataSet, bundle: Path) -> None:
    network = cascade.manifest.network
    if network.identity != graph_set.candidate.identity:
        raise InputError(
            f"{bundle} holds another network than {graph_set.root}: run `mess-compile bundle` here, or bench it in its "
            "own workspace (-C DIR)"
        )
    if data.classes.names != network.classes:
        raise InputError(
            f"{data.root} has the classes {', '.join(data.classes.names)}; {bundle} was trained on "
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
    bundle: Path,
    cascade: runtime_cascade.Cascade,
    graph_set: GraphSet,
    table: LatencyTable,
    split: str,
    items: Sequence[Sample],
    tuned_on: frozenset[str],
    run: _Run,
) -> Bench:
    plan, candidate = cascade.plan, graph_set.candidate
    heads = [stage.head for stage in plan.stages]
    gmacs = [macs / 1e9 for macs in exit_macs(candidate, heads)]
    costs_ms = [cost / 1e6 for cost in path_costs_ns(table, candidate, heads, plan.precision)]
    replayed_exits, margins, replayed_miou = _replay(cascade, items)
    per_pass = run.latency_ms.mean(axis=2)  # (2, passes)
    ratios = per_pass[1] / per_pass[0]
    predicted = plan.predicted
    measured_ms, baseline_ms = (float(value) for value in run.latency_ms.mean(axis=(1, 2)))
    measured = Column(run.cascade_miou, measured_ms, _mean_at(gmacs, run.exits), _rates(run.exits, len(heads)))
    baseline = Column(run.baseline_miou, baseline_ms, candidate.baseline_macs / 1e9, (1.0,))
    return Bench(
        bundle=str(bundle),
        split=split,
        images=len(items),
        tuned_on=sum(sample.id in tuned_on for sample in items),
        passes=run.latency_ms.shape[1],
        baseline=baseline,
        predicted=Column(predicted.miou, predicted.latency_ms, predicted.gmacs, predicted.exit_rates),
        replayed=Column(
            replayed_miou,
            _mean_at(costs_ms, replayed_exits),
            _mean_at(gmacs, replayed_exits),
            _rates(replayed_exits, len(heads)),
        ),
        measured=measured,
        latency_ratio=baseline_ms / measured_ms,
        latency_ratio_range=(float(ratios.min()), float(ratios.max())),
        workload_ratio=baseline.gmacs / measured.gmacs,
        miou_difference=measured.miou - baseline.miou,
        p95_ms=float(np.percentile(run.latency_ms[0].mean(axis=0), 95)),
        disagreements=tuple(
            NearCut(sample.id, replayed, real, margin)
            for sample, replayed, real, margin in zip(items, replayed_exits, run.exits, margins, strict=True)
            if replayed != real
        ),
    )


def _replay(cascade: runtime_cascade.Cascade, items: Sequence[Sample]) -> tuple[list[int], list[int], float]:
    """Exits (from 1), distances from the nearest cut in counts, and mIoU, from every stage's counts and labels."""
    score = _Score(len(cascade.manifest.network.classes))
    exits, margins = [], []
    for sample in items:
        results = cascade.stages(sample.frame)
        decisions = [
            int(result.counts[stage.row]) - stage.cut
            for result, stage in zip(results, cascade.plan.stages, strict=True)
            if stage.cut is not None
        ]
        passed = [number for number, distance in enumerate(decisions, start=1) if distance >= 0]
        exits.append(passed[0] if passed else len(results))
        margins.append(min((abs(distance) for distance in decisions), default=0))
        score.add(results[exits[-1] - 1].labels, sample.labels)
    return exits, margins, score.miou


def _mean_at(values: Sequence[float], exits: Sequence[int]) -> float:
    return sum(values[number - 1] for number in exits) / len(exits)


def _rates(exits: Sequence[int], count: int) -> tuple[float, ...]:
    return tuple(exits.count(number) / len(exits) for number in range(1, count + 1))
