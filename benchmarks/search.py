"""How long the search takes on made-up statistics: by default the size of the CamVid example.

Usage: python benchmarks/search.py [--images 50] [--points 5] [--heads 5] [--classes 11] [--rows 12]
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np

from mess_compile.candidates import (
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
)
from mess_compile.latency import PSEUDO_GRAPHS, Latency, LatencyTable
from mess_compile.search.figures import Evidence
from mess_compile.search.requirement import Requirement
from mess_compile.search.solver import search
from mess_compile.statistics import ExitStatistics, threshold_table

HW, CELLS_HW = (180, 240), (23, 30)


def made_up_network(points: int, heads: int, classes: int) -> CandidateNetwork:
    configs = [config.name for config in head_grid()[:heads]]
    early = (Head(p, config, 5_000_000 * (j + 1)) for p in range(1, points + 1) for j, config in enumerate(configs))
    return CandidateNetwork(
        backbone="made-up",
        classes=tuple(f"class{k}" for k in range(classes)),
        colours=((0, 0, 0),) * classes,
        input_hw=HW,
        exit_points=tuple(
            ExitPoint(f"exit{p}", f"block{p}", 64, CELLS_HW, 150_000_000 * p) for p in range(1, points + 2)
        ),
        heads=(*early, Head(points + 1, configs[0], 20_000_000)),
        baseline=f"exit{points + 1}.{configs[0]}",
        identity="made-up",
    )


def made_up_graphs(candidate: CandidateNetwork, rows: int) -> tuple[GraphSet, LatencyTable]:
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


def made_up_statistics(graphs: GraphSet, images: int, seed: int = 0) -> ExitStatistics:
    """Images differ in difficulty, deeper exits are better and surer, and each head has a taste of its own."""
    rng = np.random.default_rng(seed)
    candidate, pixels, cells = graphs.candidate, HW[0] * HW[1], CELLS_HW[0] * CELLS_HW[1]
    classes = len(candidate.classes)
    difficulty = rng.normal(size=images)[:, None]
    depth = np.array([head.exit_point for head in candidate.heads])
    shape = (images, len(depth))
    quality = 1 + 0.5 * depth + rng.normal(0, 0.2, len(depth)) - 0.6 * difficulty + rng.normal(0, 0.3, shape)
    thresholds = np.array(graphs.gate.thresholds)
    sure = 1.5 * quality[:, :, None] - 8 * (thresholds - 0.6) + rng.normal(0, 0.1, (*shape, len(thresholds)))
    labelled = (rng.dirichlet(np.full(classes, 0.8), images) * pixels).astype(np.int64)
    accuracy = 1 / (1 + np.exp(-0.6 * quality[:, :, None] - rng.normal(0, 0.3, (*shape, classes))))
    intersection = (labelled[:, None] * accuracy).astype(np.int64)
    missed = (labelled[:, None] - intersection).sum(axis=2, keepdims=True)
    return ExitStatistics(
        heads=tuple(head.name for head in candidate.heads),
        classes=candidate.classes,
        cells=(cells,) * len(depth),
        thresholds=threshold_table(graphs.gate, classes),
        counts=np.round(cells / (1 + np.exp(-sure))).astype(np.int32),
        intersection=intersection,
        predicted=intersection + missed * labelled[:, None] // pixels,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 50), ("points", 5), ("heads", 5), ("classes", 11), ("rows", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = parser.parse_args()
    graphs, table = made_up_graphs(made_up_network(sizes.points, sizes.heads, sizes.classes), sizes.rows)
    evidence = Evidence(graphs, table, made_up_statistics(graphs, sizes.images))
    start = time.perf_counter()
    result = search(evidence, Requirement(max_err_pp=1.0))
    seconds = time.perf_counter() - start
    proof, plan = result.certificate, result.plan
    print(f"{sizes.points} early exit points x {sizes.heads} heads, {sizes.images} images, {sizes.rows} rows")
    print(f"space      {proof.space:,} plans; {proof.evaluated:,} evaluated, {proof.duplicates:,} duplicates")
    print(f"time       {seconds:.1f} s, {proof.space / seconds:,.0f} plans per second")
    print(f"memory     {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB at most")
    print(f"front      {len(result.front)} plans")
    print(f"plan       {' -> '.join(stage.head for stage in plan.stages)}")
    print(f"           {plan.predicted.latency_ms:.2f} ms against {plan.baseline.latency_ms:.2f} ms")
    print(f"           {plan.predicted.miou:.2f} % mIoU against {plan.baseline.miou:.2f} %")


if __name__ == "__main__":
    main()
