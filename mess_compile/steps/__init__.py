"""The Python API: one function per command, working in a workspace, from artefact to artefact."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mess_compile import extras, launcher
from mess_compile.data import scenes
from mess_compile.data.dataset import Data, DataFolder, DataSet, open_dataset, read_frame, survey_labels
from mess_compile.engines.prepare import RecipeBuild, settled_graphs_of
from mess_compile.engines.prepare import engine_files as _engine_files
from mess_compile.evaluate import statistics
from mess_compile.latency import table as latency
from mess_compile.network import CandidateNetwork, Gate, GraphSet, verify_graph_set
from mess_compile.runtime.base.errors import InputError, did_you_mean
from mess_compile.runtime.bundle import archive
from mess_compile.runtime.bundle.manifest import HELD_OUT
from mess_compile.runtime.bundle.manifest import BundlePlan as ManifestPlan
from mess_compile.runtime.bundle.plan_choice import matching_plans
from mess_compile.runtime.cascade import cascade as runtime_cascade
from mess_compile.runtime.images import frames
from mess_compile.search.requirement import Requirement
from mess_compile.ship.client import ShipOptions, parse_place, rollback, ship
from mess_compile.ship.client import expected as foresee_ship
from mess_compile.ship.client import look as ships
from mess_compile.steps import prospects
from mess_compile.steps.bundle import BundleOptions, bundle, foresee_bundle, tuning_statistics
from mess_compile.steps.devices import KnownDevice, compare, devices, doctor, inspect, report, verify
from mess_compile.steps.dry_run import Foresight, foresee_build, foresee_profile
from mess_compile.steps.evaluate import evaluate, foresee_evaluate
from mess_compile.steps.profile import Thrift, build, estimate, profile
from mess_compile.steps.prospects import Prospect
from mess_compile.steps.run import ImageFailure, ImageResult, RunError, RunOptions, VideoResult, run
from mess_compile.steps.search import SearchOptions, search, search_and_explain, shared
from mess_compile.targets import find_target, refuse_unless_here
from mess_compile.workspace import Progress, Workspace, open_workspace, silent

if TYPE_CHECKING:
    from mess_compile.bench.run import Bench, DeadlineBench
    from mess_compile.nets.network import Architecture
    from mess_compile.training.parallel import Machines
    from mess_compile.training.recipe import Recipe
    from mess_compile.training.train import TrainOptions

__all__ = [
    "BundleOptions",
    "DataFolder",
    "Foresight",
    "Gate",
    "ImageFailure",
    "ImageResult",
    "KnownDevice",
    "NetworkChoice",
    "Prospect",
    "RecipeBuild",
    "Requirement",
    "RunError",
    "RunOptions",
    "SearchOptions",
    "ShipOptions",
    "Thrift",
    "TrainingData",
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
    "training_data",
    "verify",
]

CHECKED_FRAMES = 3
_GATE = Gate()


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


@dataclass(frozen=True)
class TrainingData:
    """The splits train and val of a data folder, opened before anything heavy is loaded."""

    folder: DataFolder
    images: DataSet
    validation: DataSet


def training_data(workspace: Workspace, data: Data, tell: Callable[[str], None] = print) -> TrainingData:
    """Open what a network is trained and validated on, read as it was last in this workspace unless said otherwise.

    `tell` is told what lies there and is not read. Raises InputError where the folder is no data set, without a wait
    for PyTorch.
    """
    folder = workspace.data_folder(data)
    images = open_dataset(folder, "train")
    validation = open_dataset(folder, "val", images.classes)
    if not launcher.is_child():
        for note in dict.fromkeys((*images.notes, *validation.notes)):
            tell(note)
    return TrainingData(folder, images, validation)


def _opened(workspace: Workspace, data: Data | TrainingData, tell: Callable[[str], None]) -> TrainingData:
    return data if isinstance(data, TrainingData) else training_data(workspace, data, tell)


def train(
    workspace: Workspace,
    data: Data | TrainingData,
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
    opened = _opened(workspace, data, report)
    options = _train_options(opened, choice, workspace.candidate, recipe)
    options = replace(options, imagenet=imagenet, source=source, teacher=teacher, machines=machines or options.machines)
    candidate = _trained(options, report, progress)
    if candidate is not None:
        workspace.remember(data=opened.folder)
    return candidate


def train_baseline(
    workspace: Workspace,
    data: Data | TrainingData,
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
    opened = _opened(workspace, data, report)
    options = _train_options(opened, alone, workspace.baseline, budget)
    options = replace(options, imagenet=imagenet, machines=machines or options.machines)
    return _trained(options, report, progress)


def _alone(choice: NetworkChoice, recipe: Recipe) -> tuple[NetworkChoice, Recipe]:
    return replace(choice, exits=1, heads=()), replace(recipe, epochs=(sum(recipe.epochs), 0))


def foresee_train(
    workspace: Workspace,
    data: Data | TrainingData,
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
    opened = _opened(workspace, data, lambda line: None)
    options = _train_options(opened, choice, folder, recipe)
    options = replace(options, imagenet=imagenet, source=source, teacher=teacher, machines=machines or options.machines)
    what, notes = extras.torch_module("training.train").foreseen(options)
    basis = "how long a batch takes is known when the first ones are done, and stands on the progress line then"
    return (Prospect("train", what, (str(folder), str(workspace.file)), None, basis, notes),)


def _train_options(data: TrainingData, choice: NetworkChoice, folder: Path, recipe: Recipe) -> TrainOptions:
    """A training on the split train that writes to `folder`."""
    architecture = _architecture(choice, data.images)
    options: TrainOptions = extras.torch_module("training.train").TrainOptions(
        architecture, data.images, data.validation, folder, recipe
    )
    return options


def _trained(options: TrainOptions, report: Callable[[str], None], progress: Progress) -> CandidateNetwork | None:
    stages = extras.torch_module("training.train")
    network: CandidateNetwork | None = stages.train(options, report, progress)
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
    if source is not None and not source.exists():
        near = did_you_mean(source.name, sorted(path.name for path in source.parent.glob("*")))
        raise InputError(f"{source} does not exist{near}: name an ONNX file, or the folder of a candidate network")
    source = source or workspace.candidate
    baseline = workspace.baseline if (workspace.baseline / "network.json").is_file() else None
    if source.is_file():
        if baseline is not None:
            raise InputError(
                f"{baseline} holds a baseline for a checkpoint of `mess-compile train`, which cannot stand beside "
                f"{source}: export in a workspace of its own (-C DIR), or remove {baseline}"
            )
        from mess_compile.graph import cut, import_onnx, store

        if exits is not None:
            frames_of = partial(_checked_frames, workspace)
            return import_onnx.import_with_exits(source, exits, workspace.graphs, gate, frames_of, progress)
        hw = cut.candidate_from_metadata(store.read_model(source), source).input_hw
        return import_onnx.import_onnx(source, workspace.graphs, gate, _checked_frames(workspace, hw), progress)
    if exits is not None:
        raise InputError(f"{source} is no ONNX file, which --exits {exits} asks for")
    module, checkpoint = extras.torch_module("nets.export"), extras.torch_module("nets.checkpoint")
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


def bench(
    workspace: Workspace,
    bundle: Path,
    data: Data | None = None,
    split: str = "val",
    passes: int = 3,
    progress: Progress = silent,
    target: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Bench:
    """Measure a bundle made in this workspace on a labelled split, beside the baseline; kept for `report`.

    `tell` is told what is left out of the data, and what there is to know of their labels.
    """
    from mess_compile.bench import run as benches
    from mess_compile.bench.result import write_bench
    from mess_compile.search.hold_out import tuning_rows

    folder = _told_of(open_dataset(workspace.data_folder(data), split), tell)
    with runtime_cascade.load(bundle, target) as cascade:
        plan = cascade.plan
        device = find_target(plan.target, workspace.root)
        table = latency.read_latency_table(workspace.latency(device.name))
        refuse_unless_here(device, workspace.root)
        graph_set = _benched_graphs(workspace, plan, table)
        known = None
        if cascade.manifest.network.identity == graph_set.candidate.identity:  # else `bench` refuses the bundle
            known = _tuning_of_bundle(workspace, plan, table)
        rows = tuning_rows(known.group, plan.environment.get(HELD_OUT)) if known else ()
        tuned_on = frozenset(known.image_id[row] for row in rows) if known else frozenset()
        (engines,) = _engine_files(workspace, device, (plan.precision.partition("-")[0],), None, None, progress)
        found = benches.bench(cascade, engines, table, folder, tuned_on, passes, progress)
        with suppress(OSError):  # a workspace that cannot be written is measured all the same
            write_bench(workspace.bench(plan.target), found, plan)
        return found


def _told_of(folder: DataSet, tell: Callable[[str], None]) -> DataSet:
    for sentence in (*folder.notes, *survey_labels(folder).sentences()):
        tell(sentence)
    return folder


def foresee_bench(
    workspace: Workspace,
    bundle: Path,
    data: Data | None = None,
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
    return tuning_statistics(table, plan.target, plan.sources, tuning)


def bench_deadline(
    workspace: Workspace,
    bundle: Path,
    data: Data | None,
    split: str,
    passes: int,
    deadline_ms: float,
    progress: Progress,
    target: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> DeadlineBench:
    """Refine a labelled split under a deadline with a bundle; `tell` is told what there is to know of the data."""
    from mess_compile.bench import run as benches

    folder = _told_of(open_dataset(workspace.data_folder(data), split), tell)
    with runtime_cascade.load(bundle, target) as cascade:
        refuse_unless_here(find_target(cascade.plan.target, workspace.root), workspace.root)
        return benches.bench_deadline(cascade, folder, deadline_ms, passes, progress)
