"""Write a bundle from a plan and its graphs."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.external_data_helper import uses_external_data

from mess_compile import device_files, files
from mess_compile.candidates import CandidateNetwork, GraphSet, check_hash
from mess_compile.latency import StageGraphs, stage_graphs
from mess_compile.measurements import Measurements
from mess_compile.runtime import archive, cascade, manifest, signature
from mess_compile.runtime.engine import open_library
from mess_compile.runtime.errors import InputError
from mess_compile.search.plan import Figures, OperatingPoint, Plan, Stage, check_plan_current

GOLDEN_FRAMES = 4
_FOLDER = "graphs"
_REFERENCE = "onnxruntime"
_WEIGHT = re.compile(r"weights/([0-9a-f]{64})")
_EXPORT = "run `mess-compile export`"
_Sources = dict[str, Path | bytes]


def write_bundle(
    path: Path,
    graph_set: GraphSet,
    plan: Plan,
    thresholds: NDArray[np.float32],
    golden_frames: Sequence[NDArray[np.uint8]],
    measurements: Measurements,
    provenance: Mapping[str, str],
    forms: Mapping[str, Path] | None = None,
    resize: str = "stretch",
    engines: Mapping[manifest.EngineFile, Path] | None = None,
    key: Path | None = None,
) -> manifest.Manifest:
    """Write the plan's graphs, the weights they name, the runtime and golden frames to one file; all of it or nothing.

    `forms` are graphs as the target's parser takes them, where it does not take their own. `thresholds` is (T, K);
    `golden_frames` are uint8 (H, W, 3) to choose from, and what they must give is computed here, in ONNX Runtime.
    `resize` is what becomes of frames of another size, `engines` are built ones to take along, `key` is an OpenSSH key
    to sign with. Equal content gives equal bytes. Raises StaleError when the plan was made from other graphs,
    InputError when a graph or weight is missing or damaged or there is no golden frame.
    """
    check_plan_current(plan, graph_set)
    if not golden_frames:
        raise InputError("a bundle needs at least one golden frame to verify itself by")
    names = stage_graphs(graph_set.candidate, [stage.head for stage in plan.stages])
    sources = _graph_sources(graph_set, names, forms or {})
    sources.update({engine.file: built for engine, built in (engines or {}).items()})
    described = manifest.Manifest(
        name=path.stem,
        network=_network(graph_set.candidate, resize),
        gate=_gate(graph_set, thresholds),
        plans=(_plan(graph_set, plan, names, measurements),),
        golden=(),
        engines=tuple(engines or ()),
        files=_files(sources),
        provenance=dict(provenance),
    )
    with files.replaced(path) as temporary:
        archive.write_archive(temporary, described, sources)
        golden, arrays = _golden(temporary, plan.device, golden_frames)
        sources.update({**arrays, **device_files.runtime_files(), device_files.README: device_files.readme(described)})
        complete = replace(described, golden=golden, files=_files(sources))
        signed = None if key is None else lambda content: signature.sign(content, key)
        archive.write_archive(temporary, complete, sources, signed)
    return complete


def _graph_sources(graph_set: GraphSet, names: Sequence[StageGraphs], forms: Mapping[str, Path]) -> _Sources:
    """Paths in the bundle -> files: every graph once, and the weights that they name."""
    sources: _Sources = {}
    for name in dict.fromkeys(graph for stage in names for graph in (stage.segment, stage.head, stage.output)):
        path = graph_set.path(name)
        check_hash(path, graph_set.graphs[name].sha256)
        key, path = f"{_FOLDER}/{path.name}", forms.get(name, path)
        sources[key] = path
        for location in _weight_locations(path):
            weight = path.parent / location
            if f"{_FOLDER}/{location}" not in sources:
                check_hash(weight, weight.name)
            sources[f"{_FOLDER}/{location}"] = weight
    return sources


def _weight_locations(path: Path) -> Iterator[str]:
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            location = {entry.key: entry.value for entry in tensor.external_data}["location"]
            if not _WEIGHT.fullmatch(location):
                raise InputError(f"{path} keeps {tensor.name} in {location!r}, outside its weight store: {_EXPORT}")
            yield location


def _gate(graph_set: GraphSet, thresholds: NDArray[np.float32]) -> manifest.Gate:
    gate = graph_set.gate
    return manifest.Gate(gate.confidence, gate.edge_aware, tuple(tuple(map(float, row)) for row in thresholds))


def _plan(graph_set: GraphSet, plan: Plan, names: Sequence[StageGraphs], measurements: Measurements) -> manifest.Plan:
    stages = tuple(_stage(stage, graphs, graph_set) for stage, graphs in zip(plan.stages, names, strict=True))
    precisions = {
        f"{_FOLDER}/{graph_set.path(graph.name).name}": manifest.GraphPrecision(graph.precision, graph.wanted)
        for graph in plan.graphs
    }
    return manifest.Plan(
        target=plan.device,
        library=plan.library,
        precision=plan.precision,
        setting=plan.setting,
        stages=stages,
        predicted=_figures(plan.predicted),
        baseline=_figures(plan.baseline),
        baseline_name=plan.baseline_name,
        precisions=precisions,
        tuned_by=plan.tuned_by,
        power_mode=plan.power_mode,
        operating_points=tuple(map(_operating_point, plan.operating_points)),
        costs=measurements.costs,
        upload_mean_ms=measurements.upload_mean_ms,
        upload_p99_ms=measurements.upload_p99_ms,
        confidence=measurements.confidence,
        environment=dict(measurements.environment),
    )


def _operating_point(point: OperatingPoint) -> manifest.OperatingPoint:
    decisions = tuple(manifest.Decision(decision.row, decision.cut) for decision in point.decisions)
    return manifest.OperatingPoint(point.name, decisions, _figures(point.predicted))


def _figures(figures: Figures) -> manifest.Figures:
    return manifest.Figures(**{each.name: getattr(figures, each.name) for each in fields(manifest.Figures)})


def _network(candidate: CandidateNetwork, resize: str) -> manifest.Network:
    return manifest.Network(
        backbone=candidate.backbone,
        identity=candidate.identity,
        classes=candidate.classes,
        colours=candidate.colours,
        input_hw=candidate.input_hw,
        gmacs=candidate.baseline_macs / 1e9,
        resize=resize,
    )


def _stage(stage: Stage, graphs: StageGraphs, graph_set: GraphSet) -> manifest.Stage:
    height, width = graph_set.candidate.exit_point(stage.exit_point).hw
    segment, head, output = (
        f"{_FOLDER}/{graph_set.path(name).name}" for name in (graphs.segment, graphs.head, graphs.output)
    )
    return manifest.Stage(
        exit_point=stage.exit_point,
        head=stage.head,
        segment=segment,
        head_graph=head,
        output=output,
        row=stage.row,
        cut=stage.cut,
        cells=height * width,
    )


def _files(sources: _Sources) -> dict[str, manifest.File]:
    return {name: archive.file_of(source) for name, source in sorted(sources.items())}


@dataclass(frozen=True, eq=False)
class _Run:
    """A frame and what the cascade made of it; `margin` is how far the counts on the way were from their cuts, at the
    least, in shares of the cells."""

    frame: NDArray[np.uint8]
    prediction: cascade.Prediction
    margin: float


def _golden(
    bundle: Path, target: str, frames: Sequence[NDArray[np.uint8]]
) -> tuple[tuple[manifest.Golden, ...], dict[str, bytes]]:
    """What the cascade makes of the frames it is to be verified by, and the arrays to keep beside."""
    cases: list[manifest.Golden] = []
    arrays: dict[str, bytes] = {}
    with cascade.load(bundle, target, open_library(_REFERENCE)) as loaded:
        for number, run in enumerate(_chosen([_run(loaded, frame) for frame in frames])):
            exit_ = run.prediction.exit
            count = round(run.prediction.confidence * loaded.plan.stages[exit_ - 1].cells)
            case = manifest.Golden(target, f"golden/{number}.npy", f"golden/{number}.labels.npy", exit_, count)
            cases.append(case)
            arrays[case.frame], arrays[case.labels] = _npy(run.frame), _npy(run.prediction.labels)
    return tuple(cases), arrays


def _run(loaded: cascade.Cascade, frame: NDArray[np.uint8]) -> _Run:
    taken = loaded(frame)
    margins = [
        abs(each.confidence - stage.cut / stage.cells)
        for stage, each in zip(loaded.plan.stages[: taken.exit], loaded.refine(frame), strict=False)
        if stage.cut is not None
    ]
    return _Run(frame, taken, min(margins, default=1.0))


def _chosen(runs: Sequence[_Run]) -> list[_Run]:
    """A frame for each exit that any takes, then others, the clearest decisions first; in the order they came in.

    A decision on the edge says little: another engine's rounding may turn it.
    """
    clearest = sorted(runs, key=lambda run: -run.margin)
    first = {run.prediction.exit: run for run in reversed(clearest)}
    most = max(GOLDEN_FRAMES, len(first))
    kept = [*first.values(), *(run for run in clearest if run not in first.values())][:most]
    return [run for run in runs if run in kept]


def _npy(array: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()
