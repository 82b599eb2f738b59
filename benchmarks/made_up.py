"""Networks, latency tables and exit statistics of any size, made up by the figures of the CamVid example (`fit`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mess_compile.evaluate.statistics import ExitStatistics, head_miou, miou
from mess_compile.latency.table import Latency, LatencyTable
from mess_compile.network import (
    BASELINE,
    DEFAULT_THRESHOLDS,
    CandidateNetwork,
    ExitPoint,
    Gate,
    GraphSet,
    GraphSpec,
    Head,
    head_graph_name,
    head_grid,
    output_name,
    segment_name,
    threshold_table,
)
from mess_compile.runtime.measure.job_pool import PSEUDO_GRAPHS
from mess_compile.search.metrics import Evidence

Array = NDArray[np.float64]

HW, CELLS_HW = (360, 480), (45, 60)
COVERAGE = (0.997, 0.988, 0.968, 0.925, 0.892, 0.85, 0.803, 0.732, 0.682, 0.604, 0.522, 0.446)  # by threshold row
COVERAGE_SD = (0.002, 0.006, 0.013, 0.015, 0.016, 0.016, 0.017, 0.019, 0.02, 0.02, 0.018, 0.019)
ROWS = len(COVERAGE)
SURE, SURE_SD = 2.65, 0.17
"""The share of pixels that the last exit has right, as a logit: mean and standard deviation over images."""


@dataclass(frozen=True)
class Size:
    images: int = 1000
    points: int = 5
    heads: int = 56
    classes: int = 21
    rows: int = ROWS


def made_up(size: Size, seed: int = 0, independent: bool = False) -> Evidence:
    """`size.points` exit points with `size.heads` heads each, and the final one; of `independent` exits none tells
    anything of another."""
    candidate = _network(size)
    graphs, table = _graphs(candidate, size.rows)
    return Evidence(graphs, table, _statistics(graphs, size.images, np.random.default_rng(seed), independent))


def _network(size: Size) -> CandidateNetwork:
    points, configs = size.points, [config.name for config in head_grid()[: size.heads]]
    early = (Head(p, config, 5_000_000 * (j + 1)) for p in range(1, points + 1) for j, config in enumerate(configs))
    return CandidateNetwork(
        backbone="made-up",
        classes=tuple(f"class{k}" for k in range(size.classes)),
        colours=((0, 0, 0),) * size.classes,
        input_hw=HW,
        exit_points=tuple(
            ExitPoint(f"exit{p}", f"block{p}", 64, CELLS_HW, 150_000_000 * p) for p in range(1, points + 2)
        ),
        heads=(*early, Head(points + 1, configs[0], 20_000_000)),
        baseline=f"exit{points + 1}.{configs[0]}",
        identity="made-up",
    )


def _graphs(candidate: CandidateNetwork, rows: int) -> tuple[GraphSet, LatencyTable]:
    """Latencies follow the workload: 10 ms per GMAC and 0.1 ms per graph."""
    macs = {segment_name(a, b): candidate.segment_macs(a, b) for a, b in candidate.segments()}
    macs |= {head_graph_name(head.name): head.macs for head in candidate.heads}
    macs |= {output_name(CELLS_HW): 100_000_000, BASELINE: candidate.baseline_macs + 100_000_000}
    specs = {
        name: GraphSpec(name, f"{name}.onnx", name, (), (), count, count // 100, 1000) for name, count in macs.items()
    }
    costs = {**{name: 0.1 + count / 1e8 for name, count in macs.items()}, **dict.fromkeys(PSEUDO_GRAPHS, 0.02)}
    entries = {
        (name, "fp32"): Latency(name, name if name in macs else "", "fp32", ms, ms, ms, ms, ms, 30, "estimated")
        for name, ms in costs.items()
    }
    gate = Gate(thresholds=tuple(np.linspace(DEFAULT_THRESHOLDS[0], DEFAULT_THRESHOLDS[-1], rows).tolist()))
    table = LatencyTable(
        "made-up", "none", "0", candidate.identity, {}, "estimated", entries, {"fp32": candidate.identity}
    )
    return GraphSet(Path("graphs"), candidate, gate, specs), table


def _statistics(graphs: GraphSet, images: int, rng: np.random.Generator, independent: bool) -> ExitStatistics:
    candidate = graphs.candidate
    points = np.array([head.exit_point for head in candidate.heads])
    depth = (points - 1) / max(1, points.max() - 1)
    final = depth == 1
    ease = np.zeros((images, 1)) if independent else rng.normal(size=(images, 1))  # of the image, at any head
    own = _along(rng, points, images, 0.0 if independent else 0.85)
    right = 0.7 * ease + 0.7 * own  # (n, heads), as all that follows
    sure = 0.1 * ease + 0.9 * own + 0.6 * (0 if independent else rng.normal(size=(images, 1)))
    sure += 0.2 * rng.normal(size=own.shape)
    behind = np.where(final, 0.0, 0.3 * (1 - depth) ** 1.5 + np.abs(rng.normal(0, 0.15, len(points))))
    labelled, intersection, predicted = _pixels(rng, len(candidate.classes), behind, right / right.std())
    cells = CELLS_HW[0] * CELLS_HW[1]
    return ExitStatistics(
        heads=tuple(head.name for head in candidate.heads),
        classes=candidate.classes,
        cells=(cells,) * len(points),
        thresholds=threshold_table(graphs.gate, len(candidate.classes)),
        counts=_counts(rng, sure / sure.std(), depth, len(graphs.gate.thresholds), cells, independent),
        intersection=intersection,
        predicted=predicted,
        labelled=labelled,
        image_id=tuple(f"image{i}" for i in range(images)),
        group=("made-up",) * images,
        network=candidate.identity,
        gate=graphs.gate,
        precision="fp32",
        device="made-up",
        library="none",
        split="val",
    )


def _along(rng: np.random.Generator, points: NDArray[np.int64], images: int, kept: float) -> Array:
    """(images, heads): of one image, alike at neighbouring exit points, and more so at heads of the same."""
    steps = rng.normal(size=(points.max(), images))
    for p in range(1, len(steps)):
        steps[p] = kept * steps[p - 1] + np.sqrt(1 - kept**2) * steps[p]
    alike = 0.95 if kept else 0.0
    found: Array = alike * steps[points - 1].T + np.sqrt(1 - alike**2) * rng.normal(size=(images, len(points)))
    return found


def _pixels(
    rng: np.random.Generator, classes: int, behind: Array, right: Array
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Labelled (n, classes), intersection and predicted (n, heads, classes): rare classes are hard, and not in every
    image; heads that are `behind` (heads,), in logits, lose in every class."""
    images, pixels = len(right), HW[0] * HW[1]
    share = np.geomspace(0.3, 0.004, classes)
    rank = np.linspace(0, 1, classes)
    present = rng.random((images, classes)) < np.clip(0.5 + 10 * share, 0, 1)
    weight = rng.gamma(4.0, share / 4.0, (images, classes)) * present
    labelled = (weight / weight.sum(axis=1, keepdims=True) * pixels).astype(np.int64)

    better = SURE_SD * right - 0.8 * behind  # (n, heads)
    of_image = rng.normal(0, 0.2, (images, 1, classes))
    recall = 3.4 - 4.0 * rank**1.5 + rng.normal(0, 0.6, classes) + better[:, :, None] + of_image
    recall += rng.normal(0, 0.12, (len(behind), classes)) + rng.normal(0, 0.05, (*right.shape, classes))
    intersection = (labelled[:, None] / (1 + np.exp(-recall))).astype(np.int64)

    wrong = np.exp(-3.6 + 3.4 * rank + rng.normal(0, 0.5, classes)) * labelled.mean(axis=0)
    spread = of_image + rng.normal(0, 0.06, (len(behind), classes)) + rng.normal(0, 0.05, (*right.shape, classes))
    false = wrong * np.exp(spread - better[:, :, None]) * present[:, None]
    return labelled, intersection, intersection + false.astype(np.int64)


def _counts(
    rng: np.random.Generator, sure: Array, depth: Array, rows: int, cells: int, independent: bool
) -> NDArray[np.int32]:
    """(n, heads, rows): `sure` (n, heads) tells most at the middle row, the others follow it less and less."""
    mean, sd = (np.interp(np.linspace(0, 1, rows), np.linspace(0, 1, ROWS), each) for each in (COVERAGE, COVERAGE_SD))
    level = np.empty((*sure.shape, rows))
    level[:, :, rows // 2] = sure
    for row, before in [(r, r + 1) for r in range(rows // 2 - 1, -1, -1)] + [
        (r, r - 1) for r in range(rows // 2 + 1, rows)
    ]:
        anew = rng.normal(size=sure.shape)
        if not independent:
            anew = 0.8 * rng.normal(size=(len(sure), 1)) + 0.6 * anew
        level[:, :, row] = 0.87 * level[:, :, before] + np.sqrt(1 - 0.87**2) * anew
    centre = 1 / (1 + np.exp(-np.log(mean / (1 - mean)) - 0.3 * (depth[:, None] - 0.5)))
    coverage = np.clip(centre + sd * level, 0, 1)
    return np.minimum.accumulate(np.round(cells * coverage).astype(np.int32), axis=2)


@dataclass(frozen=True)
class Fit:
    """What makes a search hard or easy, of the best head at each exit point: mIoU in percent, and of an oracle that
    sends each image to where most of its pixels are right; coverage over images by threshold row, mean and standard
    deviation; correlations over images of the share of right pixels (logit) with the last exit's and the next exit's,
    of coverage at the middle row with what the last exit gets more of right, and between neighbouring exits."""

    miou: Array
    oracle_gain_pp: float
    coverage: Array
    coverage_sd: Array
    right_with_last: Array
    right_with_next: Array
    gain_sd: Array
    gain_with_coverage: Array
    coverage_with_next: Array


def fit(statistics: ExitStatistics) -> Fit:
    mious = {head: head_miou(statistics, head) for head in statistics.heads}
    points = dict.fromkeys(head.partition(".")[0] for head in statistics.heads)
    best = [max((head for head in mious if head.startswith(f"{point}.")), key=mious.__getitem__) for point in points]
    columns = [statistics.head_index(head) for head in best]
    share = statistics.intersection[:, columns].sum(axis=2) / statistics.labelled.sum(axis=1, keepdims=True)
    logit = np.log(share / (1 - share))  # (n, exits)
    coverage = statistics.counts[:, columns] / np.array(statistics.cells)[columns][:, None]  # (n, exits, rows)
    middle = coverage[:, :, coverage.shape[2] // 2]
    taken, images = np.array(columns)[logit.argmax(axis=1)], np.arange(statistics.images)
    sums = (statistics.intersection[images, taken], statistics.predicted[images, taken], statistics.labelled)
    oracle = miou(*(each.sum(axis=0) for each in sums))
    alike, sure_alike = np.corrcoef(logit.T), np.corrcoef(middle.T)
    gain = logit - logit[:, -1:]
    return Fit(
        miou=np.array([mious[head] for head in best]),
        oracle_gain_pp=oracle - max(mious.values()),
        coverage=coverage.mean(axis=(0, 1)),
        coverage_sd=coverage.std(axis=0).mean(axis=0),
        right_with_last=alike[:-1, -1],
        right_with_next=np.diag(alike, 1),
        gain_sd=gain.std(axis=0)[:-1],
        gain_with_coverage=np.array([np.corrcoef(middle[:, e], gain[:, e])[0, 1] for e in range(len(best) - 1)]),
        coverage_with_next=np.diag(sure_alike, 1),
    )
