"""What is in a backbone, a bundle or an artefact of the workspace: as JSON for programs, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mess_compile import extras, latency, statistics
from mess_compile.candidates import CandidateNetwork, GraphSet, head_grid, read_graph_set, segment_name
from mess_compile.runtime.archive import open_archive
from mess_compile.runtime.errors import InputError
from mess_compile.search import plan as plans
from mess_compile.workspace import Workspace

BACKBONES = ("resnet50", "mobilenetv2")
ARTEFACTS = ("graphs", "statistics", "latency", "plan")


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Inspection:
    """`content` is what `--json` prints."""

    content: dict[str, Any]
    tables: tuple[Table, ...]


def inspect(workspace: Workspace, thing: str, classes: int, hw: tuple[int, int], exits: int) -> Inspection:
    """Describe a backbone by name, an artefact of the workspace by name, or a bundle by path. Raises InputError."""
    if thing in BACKBONES:
        return inspect_backbone(thing, classes, hw, exits)
    if thing == "graphs":
        return inspect_graphs(read_graph_set(workspace.graphs))
    if thing == "statistics":
        split = workspace.memory().split or "val"
        return inspect_statistics(statistics.read_statistics(workspace.statistics(split)))
    if thing in ("latency", "plan"):
        device = workspace.memory().device
        if device is None:
            raise InputError("no device was profiled in this workspace yet: run `mess-compile profile --device host`")
        if thing == "latency":
            return inspect_latency(latency.read_latency_table(workspace.latency(device)))
        return inspect_plan(plans.read_result(workspace.plan(device)))
    if not Path(thing).is_file():
        raise InputError(f"{thing!r} is no file, and none of {', '.join((*BACKBONES, *ARTEFACTS))}")
    return inspect_bundle(Path(thing))


def inspect_backbone(backbone: str, classes: int, hw: tuple[int, int], exits: int) -> Inspection:
    """Workloads of a backbone with the paper's head space: convolution MACs + 2 per BatchNorm element (facts: MESS)."""
    network = extras.torch_module("nets.network")
    blocks = network.place_exits(network.block_workloads(backbone, hw), exits)
    heads = [(number, config) for number in range(1, exits) for config in head_grid()]
    candidate = network.described(
        network.Architecture(
            backbone=backbone,
            classes=tuple(f"class{index}" for index in range(classes)),
            colours=((0, 0, 0),) * classes,
            input_hw=hw,
            exit_blocks=blocks,
            heads=network.with_final_head(heads, exits),
        )
    )
    return inspect_candidate(candidate)


def inspect_candidate(candidate: CandidateNetwork) -> Inspection:
    """Workload of every exit point, segment and head of a candidate network."""
    return Inspection(_workloads(candidate), _workload_tables(candidate))


def _gmacs(macs: int) -> float:
    return macs / 1e9


def _workloads(candidate: CandidateNetwork) -> dict[str, Any]:
    return {
        "backbone": candidate.backbone,
        "classes": len(candidate.classes),
        "input_hw": list(candidate.input_hw),
        "baseline": {"head": candidate.baseline, "gmacs": _gmacs(candidate.baseline_macs)},
        "exit_points": [asdict(point) | {"gmacs": _gmacs(point.macs)} for point in candidate.exit_points],
        "segments": [
            {"name": segment_name(a, b), "gmacs": _gmacs(candidate.segment_macs(a, b))} for a, b in candidate.segments()
        ],
        "heads": [{"name": h.name, "exit_point": h.exit_point, "gmacs": _gmacs(h.macs)} for h in candidate.heads],
    }


def _workload_tables(candidate: CandidateNetwork) -> tuple[Table, ...]:
    total = candidate.exit_points[-1].macs or 1
    points = tuple(
        (p.name, p.block, str(p.channels), f"{p.hw[0]}x{p.hw[1]}", f"{_gmacs(p.macs):.3f}", f"{p.macs / total:.1%}")
        for p in candidate.exit_points
    )
    height, width = candidate.input_hw
    title = (
        f"{candidate.backbone}, {len(candidate.classes)} classes, {height}x{width}: "
        f"baseline {_gmacs(candidate.baseline_macs):.3f} GMACs"
    )
    heads = tuple((h.name, f"{_gmacs(h.macs):.4f}") for h in candidate.heads)
    return (
        Table(title, ("exit point", "block", "channels", "map", "GMACs", "of backbone"), points),
        Table(f"{len(heads)} heads", ("head", "GMACs"), heads),
    )


def inspect_graphs(graph_set: GraphSet) -> Inspection:
    """The graphs that export left: tensors, workload, weights."""
    graphs = [asdict(spec) for spec in graph_set.graphs.values()]
    content = _workloads(graph_set.candidate) | {"gate": asdict(graph_set.gate), "graphs": graphs}
    rows = tuple(
        (s.name, f"{_gmacs(s.macs):.4f}", f"{s.bytes / 2**20:.2f}", f"{s.workspace_bytes / 2**20:.2f}")
        for s in graph_set.graphs.values()
    )
    table = Table(f"{len(rows)} graphs", ("graph", "GMACs", "weights MiB", "activations MiB"), rows)
    return Inspection(content, (*_workload_tables(graph_set.candidate)[:1], table))


def inspect_statistics(found: statistics.ExitStatistics) -> Inspection:
    """mIoU of every head on its own, and how often it is sure at the middle threshold row."""
    row = len(found.gate.thresholds) // 2
    heads = [
        {"name": head, "miou": statistics.head_miou(found, head), "sure": _mean_confidence(found, index, row)}
        for index, head in enumerate(found.heads)
    ]
    content = {
        "split": found.split,
        "images": found.images,
        "device": found.device,
        "library": found.library,
        "precision": found.precision,
        "threshold": found.gate.thresholds[row],
        "heads": heads,
    }
    rows = tuple((str(h["name"]), f"{h['miou']:.2f}", f"{h['sure']:.1%}") for h in heads)
    title = f"{found.images} images of {found.split}, {found.library} {found.precision} on {found.device}"
    sure = f"cells sure at {found.gate.thresholds[row]:g}"
    return Inspection(content, (Table(title, ("head", "mIoU %", sure), rows),))


def _mean_confidence(found: statistics.ExitStatistics, index: int, row: int) -> float:
    return float(found.counts[:, index, row].mean()) / found.cells[index]


def inspect_latency(table: latency.LatencyTable) -> Inspection:
    """Every entry of a latency table."""
    entries = [asdict(entry) for entry in table.entries.values()]
    content = {
        "device": table.device,
        "library": table.library,
        "library_version": table.library_version,
        "source": table.source,
        "environment": table.environment,
        "entries": entries,
    }
    rows = tuple(
        (
            e.graph,
            e.precision,
            f"{e.mean_ms:.3f}",
            f"{e.p50_ms:.3f}",
            f"{e.p95_ms:.3f}",
            f"{e.p99_ms:.3f}",
            str(e.runs),
            e.source,
        )
        for e in table.entries.values()
    )
    title = (
        f"{table.device}: {table.library} {table.library_version}, {table.environment.get('cpu', 'unknown processor')}"
    )
    header = ("graph", "precision", "mean ms", "p50", "p95", "p99", "runs", "source")
    return Inspection(content, (Table(title, header, rows),))


def inspect_plan(result: plans.SearchResult) -> Inspection:
    """The front of a search, fastest first; the chosen plan is marked."""
    rows = tuple(
        (
            "chosen" if point.stages == result.plan.stages else "",
            f"{point.predicted.latency_ms:.3f}",
            f"{point.predicted.miou:.2f}",
            f"{point.predicted.gmacs:.3f}",
            " ".join(f"{rate:.0%}" for rate in point.predicted.exit_rates),
            " -> ".join(stage.head for stage in point.stages),
        )
        for point in result.front
    )
    title = f"front for {result.plan.device}, {result.plan.predicted.source} latency"
    header = ("", "latency ms", "mIoU %", "GMACs", "exits", "heads")
    return Inspection(plans.result_to_json(result), (Table(title, header, rows),))


def inspect_bundle(path: Path) -> Inspection:
    """The manifest of a bundle, after its bytes are verified. Raises BundleError."""
    archive = open_archive(path)
    archive.close()
    manifest = archive.manifest
    tables = []
    for plan in manifest.plans:
        figures = plan.predicted
        title = (
            f"{plan.target}, {plan.library} {plan.precision}, {plan.setting}: predicted {figures.latency_ms:.2f} ms, "
            f"{figures.miou:.2f} % mIoU ({figures.source}, {figures.images} images of {figures.split}); "
            f"baseline {plan.baseline.latency_ms:.2f} ms, {plan.baseline.miou:.2f} %"
        )
        tables.append(Table(title, ("exit", "head", "row", "leaves at count"), _stage_rows(plan.stages)))
    return Inspection(asdict(manifest), tuple(tables))


def _stage_rows(stages: Sequence[Any]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (str(number), stage.head, str(stage.row), "-" if stage.cut is None else f"{stage.cut} of {stage.cells}")
        for number, stage in enumerate(stages, start=1)
    )
