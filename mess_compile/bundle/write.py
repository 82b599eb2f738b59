"""Writes a bundle from plans and their graphs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mess_compile import files
from mess_compile.bundle.stage_costs import DeviceCosts
from mess_compile.device import payload
from mess_compile.graph.store import WEIGHTS, stored_weights
from mess_compile.latency.table import StageGraphs, stage_graphs
from mess_compile.network import SOUND, CandidateNetwork, GraphSet, check_hash, is_whole, threshold_table
from mess_compile.reporter import Progress
from mess_compile.runtime.base.errors import InputError, StaleError
from mess_compile.runtime.bundle import archive, manifest, signature
from mess_compile.runtime.cascade import cascade
from mess_compile.runtime.engines.engine import open_library
from mess_compile.runtime.images import npy
from mess_compile.search.plan import Plan, Stage, check_plan_current

GOLDEN_FRAMES = 4
_FOLDER = "graphs"
_REFERENCE = "onnxruntime"


@dataclass(frozen=True)
class Part:
    """A plan, and what the bundle holds for it.

    `device` distinguishes its target from other machines. `forms` are rewritten graphs, where the parser rejects the
    original; `engines` are built engines to include.
    """

    graph_set: GraphSet
    plan: Plan
    costs: DeviceCosts
    device: manifest.DeviceMatch = field(default_factory=manifest.DeviceMatch)
    forms: Mapping[str, Path] = field(default_factory=dict)
    engines: Mapping[manifest.EngineFile, Path] = field(default_factory=dict)


def write_bundle(
    path: Path,
    parts: Sequence[Part],
    golden_frames: Sequence[NDArray[np.uint8]],
    provenance: Mapping[str, str],
    resize: str = "stretch",
    key: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> manifest.Manifest:
    """Write plans of one network, their graphs, weights, the runtime and golden frames to one file, atomically.

    Plans share equal files. Golden frames are chosen from `golden_frames`, uint8 (H, W, 3), and their expected labels
    computed by ONNX Runtime here. `resize` says how frames of another size are resized, `key` is an OpenSSH key to
    sign with. Equal content gives equal bytes. Raises StaleError when a plan was made from other graphs, InputError
    when plans do not belong together, a graph or weight is missing or damaged, or there is no golden frame.
    """
    _check_parts(parts)
    if not golden_frames:
        raise InputError("a bundle needs at least one golden frame to verify itself by")
    sources = _Sources()
    described = [_described(part, sources) for part in parts]
    plans = tuple(plan for plan, _ in described)
    content = manifest.Manifest(
        name=path.stem,
        network=_network(parts[0].graph_set.candidate, resize),
        gate=_gate(parts[0].graph_set),
        plans=plans,
        golden=(),
        engines=tuple(dict.fromkeys(engine for _, engines in described for engine in engines)),
        files=sources.listed(),
        provenance=dict(provenance),
    )
    with files.replaced(path) as temporary:
        archive.write_archive(temporary, content, sources.files)
        golden = tuple(
            case for plan in plans for case in _golden(temporary, plan.name, golden_frames, sources, progress)
        )
        for name, text in payload.runtime_files().items():
            sources.add(name, text)
        return _completed(temporary, content, golden, sources, key)


def write_retuned(
    path: Path, opened: archive.Archive, plan: manifest.BundlePlan, key: Path | None = None
) -> manifest.Manifest:
    """Write an open bundle again with `plan` in place of its plan of that name; graphs and golden frames stay.

    Raises InputError.
    """
    known = opened.manifest
    others = tuple(golden for golden in known.golden if golden.plan != plan.name)
    shared = {name for golden in others for name in (golden.frame, golden.labels)}
    made = {name for golden in known.golden_of(plan) for name in (golden.frame, golden.labels)} - shared
    sources = _Sources()
    for name in known.files:
        if name not in made | {payload.README}:
            sources.add(name, opened.folder / name)
    plans = tuple(plan if each.name == plan.name else each for each in known.plans)
    content = replace(known, plans=plans, golden=(), files=sources.listed())
    frames = [opened.array(golden.frame) for golden in known.golden_of(plan)]
    with files.replaced(path) as temporary:
        archive.write_archive(temporary, content, sources.files)
        golden = (*others, *_golden(temporary, plan.name, frames, sources, lambda what, done, total: None))
        return _completed(temporary, content, golden, sources, key)


def _completed(
    path: Path, content: manifest.Manifest, golden: tuple[manifest.Golden, ...], sources: _Sources, key: Path | None
) -> manifest.Manifest:
    """Write the bundle in `path` again, with golden frames, README and signature."""
    sources.add(payload.README, payload.readme(content))
    complete = replace(content, golden=golden, files=sources.listed())
    signed = None if key is None else lambda content: signature.sign(content, key)
    archive.write_archive(path, complete, sources.files, signed)
    return complete


def _check_parts(parts: Sequence[Part]) -> None:
    """Raises StaleError, InputError."""
    first, seen = parts[0], set()
    for part in parts:
        check_plan_current(part.plan, part.graph_set)
        _refuse_unguarded(part)
        name = f"{part.plan.device} in {part.plan.precision}"
        if name in seen:
            raise InputError(f"two of the plans are for {name}: a bundle holds one for a target and precision")
        seen.add(name)
        if part.graph_set.candidate.identity != first.graph_set.candidate.identity:
            raise InputError(f"the plan for {name} is of another network than the one for {first.plan.device}")
        if part.plan.gate != first.plan.gate:
            raise InputError(f"the plan for {name} has another gate than the one for {first.plan.device}")


def _refuse_unguarded(part: Part) -> None:
    """Raises StaleError for a whole network exported by an earlier release, whose graph does not count sound cells."""
    for stage in part.plan.stages:
        if is_whole(stage.head) and SOUND not in {each.name for each in part.graph_set.spec(stage.head).outputs}:
            raise StaleError(
                f"graph {stage.head} of {part.graph_set.root} was exported by an earlier release, and cannot run "
                f"alone: run `mess-compile export`, and `mess-compile profile --device {part.plan.device}` after it"
            )


class _Sources:
    """Files of the bundle by path; equal content is stored once."""

    def __init__(self) -> None:
        self.files: dict[str, Path | bytes] = {}
        self._listed: dict[str, manifest.File] = {}

    def add(self, wanted: str, source: Path | bytes) -> str:
        """The path given to `source`: the wanted one, or if other content has it, one with the hash in its name."""
        entry = archive.file_of(source)
        stem, _, ending = wanted.rpartition(".")
        name = wanted if self.has_room(wanted, source) else f"{stem}.{entry.sha256[:16]}.{ending}"
        self.files.setdefault(name, source)
        self._listed[name] = entry
        return name

    def has_room(self, name: str, source: Path | bytes) -> bool:
        """Whether the name is free, or has the same content."""
        return name not in self._listed or self._listed[name] == archive.file_of(source)

    def listed(self) -> dict[str, manifest.File]:
        return dict(sorted(self._listed.items()))


def _described(part: Part, sources: _Sources) -> tuple[manifest.BundlePlan, list[manifest.EngineFile]]:
    """The manifest's entries for a plan and its engines; adds their files to `sources`."""
    names = stage_graphs(part.graph_set.candidate, [stage.head for stage in part.plan.stages])
    places = _add_graphs(part, names, sources)
    engines = [
        replace(
            engine,
            file=sources.add(engine.file, built),
            graph=None if engine.graph is None else places[Path(engine.graph).stem],
        )
        for engine, built in part.engines.items()
    ]
    return _plan(part, names, places), engines


def _add_graphs(part: Part, names: Sequence[StageGraphs], sources: _Sources) -> dict[str, str]:
    """Adds the plan's graphs and their weights; returns each graph's path in the bundle by name."""
    places: dict[str, str] = {}
    for name in dict.fromkeys(graph for stage in names for graph in stage.all):
        path = part.graph_set.path(name)
        check_hash(path, part.graph_set.graphs[name].sha256)
        form = part.forms.get(name, path)
        places[name] = sources.add(f"{_FOLDER}/{path.name}", form)
        for weight in stored_weights(form):
            location = f"{_FOLDER}/{WEIGHTS}/{weight.name}"
            if location not in sources.files:
                check_hash(weight, weight.name)
                sources.add(location, weight)
    return places


def _gate(graph_set: GraphSet) -> manifest.BundleGate:
    gate = graph_set.gate
    thresholds = threshold_table(gate, len(graph_set.candidate.classes))
    rows = tuple(tuple(map(float, row)) for row in thresholds)
    return manifest.BundleGate(gate.confidence, gate.edge_aware, rows, gate.by_class)


def _plan(part: Part, names: Sequence[StageGraphs], places: Mapping[str, str]) -> manifest.BundlePlan:
    plan, costs = part.plan, part.costs
    stages = (_stage(stage, graphs, part.graph_set, places) for stage, graphs in zip(plan.stages, names, strict=True))
    precisions = {places[graph.name]: manifest.GraphPrecision(graph.precision, graph.wanted) for graph in plan.graphs}
    return manifest.BundlePlan(
        target=plan.device,
        device=part.device,
        library=plan.library,
        precision=plan.precision,
        setting=plan.setting,
        stages=tuple(stages),
        predicted=plan.predicted,
        baseline=plan.baseline,
        baseline_name=plan.baseline_name,
        precisions=precisions,
        tuned_by=plan.tuned_by,
        power_mode=plan.power_mode,
        operating_points=plan.operating_points,
        costs=costs.costs,
        upload_mean_ms=costs.upload_mean_ms,
        upload_p99_ms=costs.upload_p99_ms,
        confidence=costs.confidence,
        environment=dict(costs.environment),
        sources={"latency table": plan.table_sha256, "statistics": plan.statistics_sha256},
        promises=plan.promises,
        truth=plan.truth,
        policy_rows=plan.policy_rows,
        retrained=plan.retrained,
    )


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


def _stage(stage: Stage, graphs: StageGraphs, graph_set: GraphSet, places: Mapping[str, str]) -> manifest.BundleStage:
    candidate = graph_set.candidate
    head = candidate.head_behind(stage.head)
    # A whole network's guard counts over all of its logits.
    cells = math.prod(candidate.logits_hw(head)) if is_whole(stage.head) else candidate.cells(head)
    return manifest.BundleStage(
        exit_point=stage.exit_point,
        head=stage.head,
        segment=places[graphs.segment],
        head_graph=None if graphs.head is None else places[graphs.head],
        output=None if graphs.output is None else places[graphs.output],
        row=stage.row,
        cut=stage.cut,
        cells=cells,
    )


@dataclass(frozen=True, eq=False)
class _GoldenRun:
    """A frame and its prediction; `margin` is the smallest distance of its counts from their thresholds, as a share of
    the cells."""

    frame: NDArray[np.uint8]
    prediction: cascade.Prediction
    margin: float


def _golden(
    bundle: Path, name: str, frames: Sequence[NDArray[np.uint8]], sources: _Sources, progress: Progress
) -> Iterator[manifest.Golden]:
    """Golden frames of the plan `name` with their expected labels; adds the arrays to `sources`."""
    with cascade.load(bundle, name, open_library(_REFERENCE)) as loaded:
        runs = []
        for frame in frames:
            runs.append(_run(loaded, frame))
            progress("golden frames", len(runs), len(frames))
        for run in _chosen(runs):
            exit_, array = run.prediction.exit, npy.content_of(run.frame)
            confident = round((run.prediction.confidence or 0.0) * loaded.plan.top(loaded.plan.stages[exit_ - 1]))
            number = next(number for number in count() if sources.has_room(f"golden/{number}.npy", array))
            place = sources.add(f"golden/{number}.npy", array)
            labels = sources.add(f"golden/{number}.labels.npy", npy.content_of(run.prediction.labels))
            yield manifest.Golden(name, place, labels, exit_, confident)


def _run(loaded: cascade.Cascade, frame: NDArray[np.uint8]) -> _GoldenRun:
    margins: list[float] = []
    for stage, prediction in zip(loaded.plan.stages, loaded.refine(frame), strict=False):
        if stage.cut is None or prediction.confidence is None:
            continue
        needed = stage.cut / loaded.plan.top(stage)
        margins.append(abs(prediction.confidence - needed))
        if prediction.confidence >= needed:
            break
    return _GoldenRun(frame, prediction, min(margins, default=1.0))


def _chosen(runs: Sequence[_GoldenRun]) -> list[_GoldenRun]:
    """One frame for each exit taken, then more, those with the clearest decisions first; in their original order.

    Close decisions verify little: another engine's rounding may change them.
    """
    clearest = sorted(runs, key=lambda run: -run.margin)
    first = {run.prediction.exit: run for run in reversed(clearest)}
    most = max(GOLDEN_FRAMES, len(first))
    chosen = [*first.values(), *(run for run in clearest if run not in first.values())][:most]
    return [run for run in runs if run in chosen]
