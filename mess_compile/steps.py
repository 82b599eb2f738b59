"""The Python API: one function per command, working in a workspace, from artefact to artefact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from os.path import realpath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mess_compile import __version__, extras, files, latency, prospects, scenes, statistics
from mess_compile.candidates import CandidateNetwork, Gate, GraphSet, verify_graph_set
from mess_compile.compiling import RecipeBuild
from mess_compile.compiling import engine_files as _engine_files
from mess_compile.compiling import target_of as _target
from mess_compile.dataset import DataSet, open_dataset, read_frame
from mess_compile.foresight import Foresight, foresee_build, foresee_profile
from mess_compile.looking import KnownDevice, compare, devices, doctor, inspect, report, verify
from mess_compile.measuring import Thrift, build, estimate, profile
from mess_compile.prospects import Prospect
from mess_compile.recording import evaluate, foresee_evaluate
from mess_compile.running import ImageResult, RunOptions, VideoResult, run
from mess_compile.runtime import archive, frames
from mess_compile.runtime import cascade as runtime_cascade
from mess_compile.runtime.choice import matching_plans
from mess_compile.runtime.engine import open_library
from mess_compile.runtime.errors import InputError
from mess_compile.runtime.manifest import EngineFile, Manifest
from mess_compile.runtime.manifest import Plan as ManifestPlan
from mess_compile.runtime.versions import RELEASE
from mess_compile.search import plan as plans
from mess_compile.search.requirement import Requirement
from mess_compile.searching import SearchOptions, search, search_and_explain, settled_graphs_of, shared
from mess_compile.ship import Options as ShipOptions
from mess_compile.ship import expected as foresee_ship
from mess_compile.ship import look as ships
from mess_compile.ship import parse_place, rollback, ship
from mess_compile.targets import Target, find_target, refuse_unless_here
from mess_compile.workspace import Progress, Workspace, open_workspace, silent

if TYPE_CHECKING:
    from mess_compile.bench import Bench, DeadlineBench
    from mess_compile.bundle import Part
    from mess_compile.nets.network import Architecture
    from mess_compile.training.parallel import Machines
    from mess_compile.training.recipe import Recipe

__all__ = [
    "BundleOptions",
    "Foresight",
    "Gate",
    "ImageResult",
    "KnownDevice",
    "NetworkChoice",
    "Prospect",
    "RecipeBuild",
    "Requirement",
    "RunOptions",
    "SearchOptions",
    "ShipOptions",
    "Thrift",
    "VideoResult",
    "Workspace",
    "bench",
    "bench_deadline",
    "build",
    "bundle",
    "compare",
    "devices",
    "doctor",
    "estimate",
    "evaluate",
    "export",
    "foresee_bench",
    "foresee_build",
    "foresee_bundle",
    "foresee_evaluate",
    "foresee_profile",
    "foresee_ship",
    "foresee_train",
    "inspect",
    "open_workspace",
    "parse_place",
    "profile",
    "report",
    "rollback",
    "run",
    "search",
    "search_and_explain",
    "shared",
    "ship",
    "ships",
    "train",
    "train_baseline",
    "verify",
]

CHECKED_FRAMES = 3
_GATE = Gate()
SCENES = 16


@dataclass(frozen=True)
class NetworkChoice:
    """What to train: backbone, input size, where the exits are (a count, or block names), and heads at every early
    exit (configuration names, or `exitN.NAME` for one exit alone)."""

    backbone: str
    input_hw: tuple[int, int]
    exits: int | tuple[str, ...]
    heads: tuple[str, ...]
    output_stride: int = 8
    width: float = 1.0


def train(
    workspace: Workspace,
    data: Path,
    choice: NetworkChoice,
    recipe: Recipe,
    report: Callable[[str], None] = print,
    imagenet: Path | None = None,
    machines: Machines | None = None,
    source: Path | None = None,
    teacher: Path | None = None,
    progress: Progress = silent,
) -> CandidateNetwork | None:
    """Train a candidate network on the split train and write it to the workspace; val is looked at on the way.

    `source` is the folder of a candidate network that stage 2 alone starts from; `teacher` that of one whose final exit
    teaches instead of the network's own. Of several processes the first returns the network, the others None.
    """
    if source is not None and source.resolve() == workspace.candidate.resolve():
        raise InputError(f"--from {source} is where the result goes: copy or move that folder first")
    candidate = _trained(
        data, choice, workspace.candidate, recipe, report, imagenet, machines, source, teacher, progress
    )
    if candidate is not None:
        workspace.remember(data=data)
    return candidate


def train_baseline(
    workspace: Workspace,
    data: Path,
    choice: NetworkChoice,
    recipe: Recipe,
    report: Callable[[str], None] = print,
    imagenet: Path | None = None,
    machines: Machines | None = None,
    progress: Progress = silent,
) -> CandidateNetwork | None:
    """Train the single-exit network of `choice` alone, for the epochs of both stages, and write it to `baseline/`.

    `export` puts it beside the candidate network's final exit, and the better of the two is what a plan is held
    against.
    """
    alone, budget = _alone(choice, recipe)
    return _trained(data, alone, workspace.baseline, budget, report, imagenet, machines, None, None, progress)


def _alone(choice: NetworkChoice, recipe: Recipe) -> tuple[NetworkChoice, Recipe]:
    return replace(choice, exits=1, heads=()), replace(recipe, epochs=(sum(recipe.epochs), 0))


def foresee_train(
    workspace: Workspace,
    data: Path,
    choice: NetworkChoice,
    recipe: Recipe,
    baseline: bool = False,
    imagenet: Path | None = None,
    machines: Machines | None = None,
    source: Path | None = None,
    teacher: Path | None = None,
) -> tuple[Prospect, ...]:
    """What `train` would do, or `train_baseline`. Raises InputError where they would."""
    folder = workspace.baseline if baseline else workspace.candidate
    if baseline:
        choice, recipe = _alone(choice, recipe)
    stages = extras.torch_module("training.stages")
    images = open_dataset(data, "train")
    validation = open_dataset(data, "val", images.classes)
    what, notes = stages.foreseen(
        _architecture(choice, images), images, validation, folder, recipe, imagenet, machines, source, teacher
    )
    basis = "how long a batch takes is known when the first ones are done, and stands on the progress line then"
    return (Prospect("train", what, (str(folder), str(workspace.file)), None, basis, notes),)


def _trained(data: Path, choice: NetworkChoice, folder: Path, recipe: Recipe, *how: Any) -> CandidateNetwork | None:
    """Train on the split train and write to `folder`; `how` are the further arguments of `stages.train`."""
    stages = extras.torch_module("training.stages")
    images = open_dataset(data, "train")
    validation = open_dataset(data, "val", images.classes)
    network: CandidateNetwork | None = stages.train(
        _architecture(choice, images), images, validation, folder, recipe, *how
    )
    return network


def _architecture(choice: NetworkChoice, folder: DataSet) -> Architecture:
    network = extras.torch_module("nets.network")
    exits = choice.exits
    if isinstance(exits, int):
        blocks = network.block_workloads(choice.backbone, choice.input_hw, choice.output_stride, choice.width)
        exits = network.place_exits(blocks, exits)
    architecture: Architecture = network.Architecture(
        backbone=choice.backbone,
        classes=folder.classes.names,
        colours=folder.classes.colours,
        input_hw=choice.input_hw,
        exit_blocks=exits,
        heads=network.with_final_head(network.heads_from_names(choice.heads, len(exits)), len(exits)),
        output_stride=choice.output_stride,
        width=choice.width,
    )
    return architecture


def export(
    workspace: Workspace,
    source: Path | None = None,
    gate: Gate = _GATE,
    progress: Progress = silent,
    exits: Path | None = None,
) -> GraphSet:
    """Cut a checkpoint folder or a whole-network ONNX into `graphs/`, checked on frames of the workspace's data.

    `exits` is the TOML that names the tensors of an ONNX which does not describe itself. Without data, or when they
    cannot be read, the frames are generated scenes. The network in `baseline/` becomes a graph beside a checkpoint's.
    """
    if exits is not None and source is None:
        raise InputError(f"{exits} names tensors of a model: `mess-compile export MODEL.onnx --exits {exits}`")
    source = source or workspace.candidate
    baseline = workspace.baseline if (workspace.baseline / "network.json").is_file() else None
    if source.is_file():
        if baseline is not None:
            raise InputError(
                f"{baseline} holds a baseline for a checkpoint of `mess-compile train`, which cannot stand beside "
                f"{source}: export in a workspace of its own (-C DIR), or remove {baseline}"
            )
        from mess_compile.graph import cut, foreign, store

        if exits is not None:
            frames_of = partial(_checked_frames, workspace)
            return foreign.import_with_exits(source, exits, workspace.graphs, gate, frames_of, progress)
        hw = cut.candidate_from_metadata(store.read_model(source), source).input_hw
        return foreign.import_onnx(source, workspace.graphs, gate, _checked_frames(workspace, hw), progress)
    if exits is not None:
        raise InputError(f"{source} is no ONNX file, which --exits {exits} asks for")
    module, checkpoint = extras.torch_module("export"), extras.torch_module("nets.checkpoint")
    hw = checkpoint.read_architecture(source).input_hw
    graph_set: GraphSet = module.export_checkpoint(
        source, workspace.graphs, gate, _checked_frames(workspace, hw), progress, baseline
    )
    return graph_set


def _checked_frames(workspace: Workspace, hw: tuple[int, int]) -> list[NDArray[np.uint8]]:
    if workspace.memory().data is not None:
        try:
            data = open_dataset(workspace.data_folder(None), "val")
            chosen = data.items[:: max(1, len(data.items) // CHECKED_FRAMES)][:CHECKED_FRAMES]
            return [frames.resize(read_frame(item.image), hw) for item in chosen]
        except InputError:
            pass  # the data may have moved since; generated frames check the same arithmetic
    return _scene_frames(hw, CHECKED_FRAMES)


def _scene_frames(hw: tuple[int, int], count: int) -> list[NDArray[np.uint8]]:
    return [scene.frame for scene in scenes.by_difficulty(hw, count)]


@dataclass(frozen=True)
class BundleOptions:
    """How a bundle is written: what becomes of frames of another size, an OpenSSH key to sign with, whether engines
    travel along, where to write its plan as one ONNX file, and a number by which `ship` tells an older one."""

    resize: str = "stretch"
    key: Path | None = None
    engines: bool = False
    single_file: Path | None = None
    release: int | None = None


def bundle(
    workspace: Workspace,
    plan_files: Sequence[Path | str] | None = None,
    output: Path | None = None,
    options: BundleOptions = BundleOptions(),
    progress: Progress = silent,
) -> tuple[Path, Manifest]:
    """Write the plan of the device profiled last, or those of files or devices, as a bundle; the first is preferred.

    Raises InputError when that would overwrite what is no bundle, for `options.single_file` no such ONNX file.
    """
    from mess_compile import bundle as bundles

    _, path, chosen = _sources_of(workspace, plan_files, output, options)
    released = {} if options.release is None else {RELEASE: str(options.release)}
    with TemporaryDirectory(prefix="mess-") as folder:
        parts = [
            _part(workspace, plan, Path(folder, str(number)), options, progress) for number, plan in enumerate(chosen)
        ]
        first = parts[0].graph_set
        manifest = bundles.write_bundle(
            path,
            parts,
            statistics.threshold_table(first.gate, len(first.candidate.classes)),
            _scene_frames(first.candidate.input_hw, SCENES),
            {"mess_compile": __version__, "golden_frames": "generated street scenes", **released},
            options.resize,
            options.key,
            progress,
        )
    if options.single_file is not None:
        from mess_compile.graph.single_file import write_single_file

        write_single_file(path, manifest.plans[0].name, options.single_file)
    return path, manifest


def _sources_of(
    workspace: Workspace, plan_files: Sequence[Path | str] | None, output: Path | None, options: BundleOptions
) -> tuple[list[Path], Path, list[plans.Plan]]:
    """Where the plans are, where the bundle goes, and the plans."""
    sources = [workspace.plan_named(plan) for plan in plan_files or ()]
    sources = sources or [workspace.plan(_target(workspace, None).name)]
    chosen = [plans.read_result(path).plan for path in sources]
    path = output or workspace.bundle(chosen[0].device)
    _check_outputs(sources, path, options.single_file)
    return sources, path, chosen


def foresee_bundle(
    workspace: Workspace,
    plan_files: Sequence[Path | str] | None = None,
    output: Path | None = None,
    options: BundleOptions = BundleOptions(),
) -> tuple[Prospect, ...]:
    """What `bundle` would write. Raises InputError and StaleError where it would."""
    sources, path, chosen = _sources_of(workspace, plan_files, output, options)
    graph_sets = [_basis(workspace, plan)[0] for plan in chosen]
    if options.engines:
        for plan in chosen:
            _refuse_without_engines(find_target(plan.device, workspace.root))
    names = {
        (g.name, each.identity): each.spec(g.name)
        for plan, each in zip(chosen, graph_sets, strict=True)
        for g in plan.graphs
    }
    size = sum(spec.bytes for spec in names.values()) / 2**20
    what = f"bundle the plans {', '.join(map(str, sources))}: {len(names)} graphs with {size:.2f} MiB of weights"
    replaced = [f"{path} is there, and would be replaced"] if path.exists() else []
    notes = (*replaced, *(["engines that are missing would be built first"] if options.engines else []))
    writes = (str(path), *([] if options.single_file is None else [str(options.single_file)]))
    return (Prospect("bundle", what, writes, None, "nothing of it was ever timed here", notes),)


def _part(workspace: Workspace, plan: plans.Plan, folder: Path, options: BundleOptions, progress: Progress) -> Part:
    """A plan that is current, with what a bundle takes of it; graphs rewritten for its target lie in `folder`.

    Statistics that are gone leave a gap in what it rests on, latencies may not.
    """
    from mess_compile.bundle import Part
    from mess_compile.measurements import measurements_of

    target = find_target(plan.device, workspace.root)
    graph_set, table, known = _basis(workspace, plan)
    folder.mkdir()
    forms = _forms(graph_set, plan, target, folder)
    engines = _engines_to_take(workspace, target, plan, progress) if options.engines else {}
    return Part(graph_set, plan, measurements_of(plan, graph_set, table, known), target.device, forms, engines)


def _basis(
    workspace: Workspace, plan: plans.Plan
) -> tuple[GraphSet, latency.LatencyTable, statistics.ExitStatistics | None]:
    """Graphs, latencies and statistics (None: they are gone) of a plan. Raises StaleError when it is of others."""
    graph_set = settled_graphs_of(workspace, plan.precision, plan.device)
    plans.check_plan_current(plan, graph_set)
    table = latency.read_latency_table(workspace.latency(plan.device))
    sources = {"latency table": plan.table_sha256, "statistics": plan.statistics_sha256}
    tuning = workspace.tuning_statistics(plan.predicted.split, plan.precision, plan.tuned_by)
    known = _tuning_statistics(table, plan.device, sources, tuning)
    latency.check_current(table, graph_set)
    return graph_set, table, known


def _check_outputs(sources: Sequence[Path], bundle: Path, single_file: Path | None) -> None:
    from mess_compile.graph.single_file import is_single_file
    from mess_compile.runtime.archive import is_bundle

    if realpath(bundle) in map(realpath, sources):
        raise InputError(f"{bundle} is the plan: name another file for the bundle (-o FILE)")
    if bundle.exists() and not is_bundle(bundle):
        raise InputError(f"{bundle} is there and is no bundle: name another file (-o FILE), or move it away")
    if single_file is None:
        return
    if realpath(single_file) == realpath(bundle):
        raise InputError(f"{single_file} would be the bundle and the ONNX file: name another --single-file")
    if single_file.exists() and not is_single_file(single_file):
        raise InputError(
            f"{single_file} is there and was not written by --single-file: name another file, or move it away"
        )


def _engines_to_take(
    workspace: Workspace, target: Target, plan: plans.Plan, progress: Progress
) -> dict[EngineFile, Path]:
    """The plan's engines, and for classic TensorRT the timing cache that their builds left."""
    _refuse_without_engines(target)
    from mess_compile import building
    from mess_compile.runtime.tensorrt_build import timing_cache_name

    (made,) = _engine_files(workspace, target, (plan.precision.partition("-")[0],), None, None, progress)
    version = building.library_version(target)
    name, capability = _gpu(target)

    def engine(file: str, graph: str | None, precision: str) -> EngineFile:
        return EngineFile(f"engines/{file}", graph, precision, target.library, version, name, capability)

    found = {
        engine(f"{graph.name}.engine", f"graphs/{graph.name}.onnx", graph.precision): made.path(graph.name)
        for graph in plan.graphs
    }
    timing = workspace.engines(target.name, made.graph_set.recipe).parent / timing_cache_name(version)
    return found | ({engine(timing.name, None, ""): timing} if timing.is_file() else {})


def _refuse_without_engines(target: Target) -> None:
    if target.library.startswith("onnxruntime"):
        raise InputError(f"{target.name} runs graphs by ONNX Runtime, which has no engines: leave --engines out")


def _gpu(target: Target) -> tuple[str, tuple[int, int]]:
    """What engines are for: any GPU of the target's capability, or for classic TensorRT the one that is here."""
    if target.library == "tensorrt_rtx" and target.compute_capability is not None:
        return "", target.compute_capability
    with closing(open_library(target.library)) as library:
        if library.builds_for is None:
            raise InputError(f"{target.library} here builds no engines for {target.name}")
        return library.builds_for


def _forms(graph_set: GraphSet, plan: plans.Plan, target: Target, folder: Path) -> dict[str, Path]:
    """The plan's graphs that the target's parser does not take as they are, rewritten for it in `folder`, their weights
    in a store there."""
    if target.library.startswith("onnxruntime"):
        return {}
    from mess_compile import building
    from mess_compile.graph.store import move_weights_out

    parser, forms = building.parser_of(target), {}
    for graph in plan.graphs:
        path = folder / graph_set.path(graph.name).name
        if building.prepare_graph(graph_set.path(graph.name), graph.precision, parser, path):
            move_weights_out(path)
            forms[graph.name] = path
    return forms


def bench(
    workspace: Workspace,
    bundle: Path,
    data: Path | None = None,
    split: str = "val",
    passes: int = 3,
    progress: Progress = silent,
    target: str | None = None,
) -> Bench:
    """Measure a bundle made in this workspace on a labelled split, beside the baseline; kept for `report`."""
    from mess_compile import bench as benches
    from mess_compile.benched import write_bench

    folder = open_dataset(workspace.data_folder(data), split)
    with runtime_cascade.load(bundle, target) as cascade:
        plan = cascade.plan
        device = find_target(plan.target, workspace.root)
        table = latency.read_latency_table(workspace.latency(device.name))
        refuse_unless_here(device, workspace.root)
        graph_set = _benched_graphs(workspace, plan, table)
        known = None
        if cascade.manifest.network.identity == graph_set.candidate.identity:  # else `bench` refuses the bundle
            known = _tuning_of_bundle(workspace, plan, table)
        tuned_on = frozenset(known.image_id if known else ())
        (engines,) = _engine_files(workspace, device, (plan.precision.partition("-")[0],), None, None, progress)
        found = benches.bench(cascade, engines, table, folder, tuned_on, passes, progress)
        with suppress(OSError):  # a workspace that cannot be written is measured all the same
            write_bench(workspace.bench(plan.target), found, plan)
        return found


def foresee_bench(
    workspace: Workspace,
    bundle: Path,
    data: Path | None = None,
    split: str = "val",
    passes: int = 3,
    target: str | None = None,
    deadline_ms: float | None = None,
) -> tuple[Prospect, ...]:
    """What `bench` would do, or `bench_deadline`. Raises InputError, BundleError and StaleError where they would."""
    if passes < 1:
        raise InputError(f"passes is {passes}: at least 1 is needed")
    folder = open_dataset(workspace.data_folder(data), split)
    manifest = archive.read_manifest(bundle)
    plan, *_ = matching_plans(manifest, target, None)
    device = find_target(plan.target, workspace.root)
    refuse_unless_here(device, workspace.root)
    if deadline_ms is not None:
        path_ms = plan.upload_mean_ms + sum(cost.mean_ms for cost in plan.costs) + plan.costs[-1].report_mean_ms
        return (prospects.of_deadline(len(folder.items), passes, bundle, deadline_ms, path_ms),)
    table = latency.read_latency_table(workspace.latency(device.name))
    graph_set = _benched_graphs(workspace, plan, table)
    if manifest.network.identity == graph_set.candidate.identity:
        _tuning_of_bundle(workspace, plan, table)
    kept, plan_ms = workspace.bench(plan.target), plan.predicted.latency_ms
    return (prospects.of_bench(graph_set, table, plan_ms, len(folder.items), passes, bundle, kept),)


def _benched_graphs(workspace: Workspace, plan: ManifestPlan, table: latency.LatencyTable) -> GraphSet:
    graph_set = settled_graphs_of(workspace, plan.precision, plan.target)
    verify_graph_set(graph_set)
    latency.check_current(table, graph_set)  # now, rather than after minutes of measuring
    return graph_set


def _tuning_of_bundle(
    workspace: Workspace, plan: ManifestPlan, table: latency.LatencyTable
) -> statistics.ExitStatistics | None:
    tuning = workspace.tuning_statistics(plan.predicted.split, plan.precision, plan.tuned_by)
    return _tuning_statistics(table, plan.target, plan.sources, tuning)


def bench_deadline(
    workspace: Workspace,
    bundle: Path,
    data: Path | None,
    split: str,
    passes: int,
    deadline_ms: float,
    progress: Progress,
    target: str | None = None,
) -> DeadlineBench:
    """Refine a labelled split under a deadline with a bundle."""
    from mess_compile import bench as benches

    folder = open_dataset(workspace.data_folder(data), split)
    with runtime_cascade.load(bundle, target) as cascade:
        refuse_unless_here(find_target(cascade.plan.target, workspace.root), workspace.root)
        return benches.bench_deadline(cascade, folder, deadline_ms, passes, progress)


def _tuning_statistics(
    table: latency.LatencyTable, device: str, known: Mapping[str, str], tuning: Path
) -> statistics.ExitStatistics | None:
    """The statistics that a plan was chosen on, None when they are not here.

    Raises StaleError when they or the table are not what the plan was searched from, by the `known` hashes.
    """
    files.recovered(tuning)
    found, read = {"latency table": latency.content_sha256(table)}, None
    if tuning.is_dir():
        read = statistics.read_statistics(tuning)
        found["statistics"] = statistics.content_sha256(read)
    plans.check_sources_current(device, known, found)
    return read
