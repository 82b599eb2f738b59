"""Small candidate networks, latency tables and statistics for the tests of the search, made up number by number."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.latency.table import Latency, LatencyTable
from mess_compile.network import (
    BASELINE,
    BASELINE_ALONE,
    CandidateNetwork,
    ExitPoint,
    Gate,
    GraphSet,
    GraphSpec,
    Head,
    head_graph_name,
    output_name,
    segment_name,
    threshold_table,
)
from mess_compile.runtime.base.policy import PolicyRow
from mess_compile.runtime.bundle.manifest import OWN_OUTPUT
from mess_compile.runtime.engines.engine import TensorSpec
from mess_compile.runtime.measure.job_pool import PSEUDO_GRAPHS
from mess_compile.search.metrics import Evidence

CONFIGS = ("fcn-crm1-b0", "dlb-crm2-b0", "fcn-crm4-b2-rdi")
HW = (4, 6)


def candidate_network(heads_per_point: tuple[int, ...], classes: int = 3, seed: int = 0) -> CandidateNetwork:
    """A network of `len(heads_per_point)` early exit points and the final one, with random workloads.

    By every fourth seed the second head of an exit point upsamples inside: its logits have a size of their own.
    """
    rng = np.random.default_rng(seed)
    counts = (*heads_per_point, 1)
    macs = np.cumsum(rng.integers(1, 5, len(counts)) * 1000)
    sizes = [(4, 6) if i % 2 else (2, 3) for i in range(len(counts))]
    return CandidateNetwork(
        backbone="made-up",
        classes=tuple(f"class{k}" for k in range(classes)),
        colours=((0, 0, 0),) * classes,
        input_hw=(8, 12),
        exit_points=tuple(
            ExitPoint(f"exit{i + 1}", f"block{i}", 4, sizes[i], int(macs[i])) for i in range(len(counts))
        ),
        heads=tuple(
            Head(i + 1, CONFIGS[j], int(rng.integers(1, 4)) * 500, (8, 12) if j == 1 and seed % 4 == 3 else None)
            for i, count in enumerate(counts)
            for j in range(count)
        ),
        baseline=f"exit{len(counts)}.{CONFIGS[0]}",
        identity="made-up-identity",
    )


def graph_set(candidate: CandidateNetwork, rows: int, seed: int = 0) -> GraphSet:
    """Graph specs with random sizes; no file exists."""
    rng = np.random.default_rng(seed)
    gate = Gate(thresholds=tuple(np.linspace(0.4, 0.9, rows).tolist()))
    image = TensorSpec("image", "uint8", (1, *candidate.input_hw, 3))
    labels = TensorSpec("labels", "uint8", (1, *candidate.input_hw))
    specs: dict[str, GraphSpec] = {}

    def add(name: str, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> None:
        sizes = [int(size) for size in rng.integers(1, 4, 2) * 1000]
        specs[name] = GraphSpec(name, f"{name}.onnx", f"sha-{name}", tuple(inputs), tuple(outputs), 0, *sizes)

    def feature(b: int) -> TensorSpec:
        point = candidate.exit_point(b)
        return TensorSpec(point.name, "float32", (1, point.channels, *point.hw))

    for a, b in candidate.segments():
        add(segment_name(a, b), [feature(a) if a else image], [feature(b)])
    for head in candidate.heads:
        hw = head.hw or candidate.exit_point(head.exit_point).hw
        logits = TensorSpec("logits", "float32", (1, len(candidate.classes), *hw))
        thresholds = TensorSpec("thresholds", "float32", (rows, len(candidate.classes)))
        counts = TensorSpec("counts", "int32", (rows,))
        add(head_graph_name(head.name), [feature(head.exit_point), thresholds], [logits, counts])
        if output_name(hw) not in specs:
            add(output_name(hw), [logits], [labels])
    add(BASELINE, [image], [labels])
    return GraphSet(Path("graphs"), candidate, gate, specs)


def latency_table(graphs: GraphSet, seed: int = 0) -> LatencyTable:
    """Whole microseconds from a small range, so that different plans cost the same now and then."""
    rng, others = np.random.default_rng(seed), np.random.default_rng(seed + 1)

    def entry(name: str, sha256: str) -> Latency:
        mean_us = int(rng.integers(1, 6))
        p99_us, energy_uj = (int(value) for value in others.integers((mean_us, 1), (12, 6)))
        more_us = 6 * (seed % 4) if name == BASELINE else 0  # about what its parts cost, so that cutting pays at times
        mean_ms, p99_ms, energy_mj = (mean_us + more_us) / 1000, (p99_us + more_us) / 1000, energy_uj / 1000
        times = (mean_ms, mean_ms, mean_ms, mean_ms, p99_ms)
        return Latency(name, sha256, "fp32", *times, 30, "measured", energy_mj=energy_mj)

    names = {**{name: spec.sha256 for name, spec in graphs.graphs.items()}, **dict.fromkeys(PSEUDO_GRAPHS, "")}
    entries = {(name, "fp32"): entry(name, sha256) for name, sha256 in names.items()}
    recipes = {graphs.recipe: graphs.identity}
    return LatencyTable("host", "onnxruntime", "1.0", graphs.candidate.identity, {}, "measured", entries, recipes)


def with_baseline_alone(case: Evidence, mean_ms: float, seed: int = 0) -> Evidence:
    """The same case with a network trained alone: random pixels, and the latency given."""
    graphs, statistics, table = case.graph_set, case.statistics, case.table
    spec = dataclasses.replace(graphs.spec(BASELINE), name=BASELINE_ALONE, sha256="sha-alone", bytes=12345)
    rng = np.random.default_rng(seed)
    right = np.minimum(rng.integers(0, 6, statistics.labelled.shape), statistics.labelled)
    predicted = right + rng.integers(0, 2, right.shape)
    entry = dataclasses.replace(
        table.latency(BASELINE, "fp32"), graph=BASELINE_ALONE, sha256="sha-alone", mean_ms=mean_ms
    )
    return dataclasses.replace(
        case,
        graph_set=dataclasses.replace(
            graphs, graphs={**graphs.graphs, BASELINE_ALONE: spec}, baseline_alone="alone-identity"
        ),
        table=dataclasses.replace(table, entries={**table.entries, (BASELINE_ALONE, "fp32"): entry}),
        statistics=dataclasses.replace(
            statistics,
            intersection=np.concatenate([statistics.intersection, right[:, None]], axis=1),
            predicted=np.concatenate([statistics.predicted, predicted[:, None]], axis=1),
            baseline_alone="alone-identity",
        ),
    )


def against_own_output(case: Evidence) -> Evidence:
    """The same case, evaluated against the network's own output."""
    return dataclasses.replace(case, statistics=dataclasses.replace(case.statistics, truth=OWN_OUTPUT))


def exit_statistics(
    graphs: GraphSet, images: int, seed: int = 0, distinct: int = 6, twins: bool = False, more: int = 0
) -> ExitStatistics:
    """Random statistics; counts take `distinct` values, pixels few, so that ties are frequent. There are so many `more`
    rows than thresholds, of other policies.

    Of `twins`, every second image has the pixels of the one before: which of them leaves makes no difference.
    """
    rng = np.random.default_rng(seed)
    candidate = graphs.candidate
    heads, classes, rows = len(candidate.heads), len(candidate.classes), len(graphs.gate.thresholds) + more
    labelled = rng.integers(0, 5, (images, classes))
    labelled[0, 0] += 1
    intersection = np.minimum(rng.integers(0, 5, (images, heads, classes)), labelled[:, None])
    predicted = intersection + rng.integers(0, 3, (images, heads, classes))
    if twins:
        odd = np.arange(1, images, 2)
        for array in (labelled, intersection, predicted):
            array[odd] = array[odd - 1]
    counts = np.sort(rng.integers(0, distinct, (images, heads, rows)), axis=2)[:, :, ::-1] * 3
    return ExitStatistics(
        heads=tuple(head.name for head in candidate.heads),
        classes=candidate.classes,
        cells=tuple(distinct * 3 for _ in range(heads)),
        thresholds=threshold_table(graphs.gate, classes),
        counts=np.ascontiguousarray(counts, np.int32),
        intersection=intersection.astype(np.int64),
        predicted=predicted.astype(np.int64),
        labelled=labelled.astype(np.int64),
        image_id=tuple(f"image{i}" for i in range(images)),
        group=tuple(f"drive{i % 2}" for i in range(images)),
        network=candidate.identity,
        gate=graphs.gate,
        precision="fp32",
        device="host",
        library="onnxruntime",
        split="val",
        policy_rows=tuple(
            PolicyRow(head.name, row, "agreement", f"row {row}")
            for head in candidate.heads
            for row in range(rows - more, rows)
        ),
    )


def by_class(found: ExitStatistics, seed: int = 0) -> ExitStatistics:
    """Random counts by class, of every image and head fewer cells in every row, and the sums that belong to them."""
    rng = np.random.default_rng(seed)
    thresholds, classes = found.thresholds.shape
    shape = (found.images, len(found.heads), classes)
    cells = rng.integers(0, 9, shape)
    cells[..., 0] += np.array(found.cells)[:, None].repeat(found.images, 1).T - cells.sum(axis=2)
    edges = rng.integers(0, cells + 1)
    sure = [cells]
    for _ in range(thresholds):
        sure.append(rng.integers(sure[-1] // 2, sure[-1] + 1))
    counts = np.stack([*sure[1:], edges, cells], axis=2)
    return dataclasses.replace(
        found,
        counts=counts[:, :, :thresholds].sum(axis=3).astype(np.int32),
        class_counts=counts.astype(np.uint16),
        gate=dataclasses.replace(found.gate, by_class=True),
    )


def evidence(
    heads_per_point: tuple[int, ...],
    rows: int,
    images: int,
    seed: int,
    distinct: int = 6,
    twins: bool = False,
    more: int = 0,
) -> Evidence:
    """A case with so many `rows` a head, the last `more` of them of other policies than the thresholds."""
    graphs = graph_set(candidate_network(heads_per_point, seed=seed), rows - more, seed)
    statistics = exit_statistics(graphs, images, seed, distinct, twins, more)
    return Evidence(graphs, latency_table(graphs, seed), statistics)
