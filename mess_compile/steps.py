"""The Python API: one function per command, working in a workspace, from artefact to artefact."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mess_compile import __version__, extras, latency, launcher, scenes, statistics
from mess_compile.candidates import CandidateNetwork, Gate, GraphSet, check_hash, read_graph_set, verify_graph_set
from mess_compile.dataset import DataSet, open_dataset, read_frame, read_labels
from mess_compile.runtime import cascade as runtime_cascade
from mess_compile.runtime import frames
from mess_compile.runtime.engine import open_library
from mess_compile.runtime.errors import InputError, StaleError
from mess_compile.runtime.manifest import Manifest
from mess_compile.search import plan as plans
from mess_compile.search.requirement import Requirement
from mess_compile.targets import Target, find_target, refuse_unless_here
from mess_compile.workspace import Workspace

if TYPE_CHECKING:
    from mess_compile.bench import Bench
    from mess_compile.building import EngineSet
    from mess_compile.evaluation import Share
    from mess_compile.graph.recipe import Fallback
    from mess_compile.nets.network import Architecture
    from mess_compile.runtime.profile import Effort
    from mess_compile.training.parallel import Machines
    from mess_compile.training.recipe import Recipe

Progress = Callable[[str, int, int], None]
CHECKED_FRAMES = 3
GOLDEN_FRAMES = 4
PRECISION_FRAMES = 24


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
    report: Callable[[str], None],
    imagenet: Path | None = None,
    machines: Machines | None = None,
    source: Path | None = None,
    teacher: Path | None = None,
) -> CandidateNetwork | None:
    """Train a candidate network on the split train and write it to the workspace; val is looked at on the way.

    `source` is the folder of a candidate network that stage 2 alone starts from; `teacher` that of one whose final exit
    teaches instead of the network's own. Of several processes the first returns the network, the others None.
    """
    if source is not None and source.resolve() == workspace.candidate.resolve():
        raise InputError(f"--from {source} is where the result goes: copy or move that folder first")
    candidate = _trained(data, choice, workspace.candidate, recipe, report, imagenet, machines, source, teacher)
    if candidate is not None:
        workspace.remember(data=data)
    return candidate


def train_baseline(
    workspace: Workspace,
    data: Path,
    choice: NetworkChoice,
    recipe: Recipe,
    report: Callable[[str], None],
    imagenet: Path | None = None,
    machines: Machines | None = None,
) -> CandidateNetwork | None:
    """Train the single-exit network of `choice` alone, for the epochs of both stages, and write it to `baseline/`.

    `export` puts it beside the candidate network's final exit, and the better of the two is what a plan is held
    against.
    """
    alone, budget = replace(choice, exits=1, heads=()), replace(recipe, epochs=(sum(recipe.epochs), 0))
    return _trained(data, alone, workspace.baseline, budget, report, imagenet, machines)


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
    workspace: Workspace, source: Path | None, gate: Gate, progress: Progress, exits: Path | None = None
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
    return [scenes.make_scene(seed, hw, seed / max(1, count - 1)).frame for seed in range(count)]


def evaluate(
    workspace: Workspace,
    data: Path | None,
    split: str | None,
    progress: Progress,
    devices: int = 1,
    nodes: int = 1,
    accelerator: str = "cpu",
) -> statistics.ExitStatistics | None:
    """Run every head on a labelled split and write its exit statistics; both are remembered for `search`.

    On the `cpu`, or by ONNX Runtime's `cuda` provider, then a GPU for each process. `devices` processes on each of
    `nodes` machines share the images, also under torchrun or SLURM; of several the first returns the statistics, the
    others None.
    """
    library = {"cpu": "onnxruntime", "cuda": "onnxruntime-cuda"}[accelerator]
    return _evaluated(workspace, data, split, progress, library, *(launcher.counts() or (devices, nodes)))


def _evaluated(
    workspace: Workspace,
    data: Path | None,
    split: str | None,
    progress: Progress,
    library: str,
    devices: int,
    nodes: int,
) -> statistics.ExitStatistics | None:
    from mess_compile import evaluation

    graph_set = _verified_graphs(workspace)
    root = workspace.data_folder(data)
    split = split or workspace.memory().split or "val"
    folder = open_dataset(root, split)
    if folder.classes.names != graph_set.candidate.classes:
        raise InputError(
            f"{root} has {len(folder.classes.names)} classes ({', '.join(folder.classes.names)}), the network "
            f"{len(graph_set.candidate.classes)} ({', '.join(graph_set.candidate.classes)}): use its own class list"
        )
    threads = max(1, (os.cpu_count() or 1) // devices) if devices > 1 else None
    with _shared(devices, nodes) as share:
        found = evaluation.evaluate_data(
            graph_set,
            open_library(library, threads, share.gpu if library == "onnxruntime-cuda" else 0),
            folder,
            workspace.statistics(split),
            share,
            device="host",
            progress=lambda done: progress("evaluate", min(done, len(folder.items)), len(folder.items)),
        )
    if found is not None:
        workspace.remember(data=root, split=split)
    return found


@contextmanager
def _shared(devices: int, nodes: int) -> Iterator[Share]:
    from mess_compile.evaluation import Share

    if devices * nodes == 1:
        yield Share()
        return
    parallel = extras.torch_module("training.parallel")
    fabric = parallel.launch(parallel.Machines("cpu", devices, nodes))
    with parallel.lost_process_named(fabric):
        yield Share(fabric.global_rank, fabric.world_size, fabric.local_rank, fabric.barrier)


@dataclass(frozen=True)
class RecipeBuild:
    """The engines of one recipe, and the graphs that are in a safer precision than was wanted."""

    engines: EngineSet
    fallbacks: tuple[Fallback, ...]


def build(
    workspace: Workspace,
    device: str | None,
    precisions: Sequence[str],
    data: Path | None,
    jobs: int | None,
    progress: Progress,
) -> tuple[RecipeBuild, ...]:
    """Build the target's engines of every graph and precision, in `jobs` processes (None: one on each core).

    TensorRT-RTX builds ahead of time on any machine, the classic library on the device itself only. fp16 and int8 are
    settled first, on images of `data`: a graph that loses too much is built in a safer precision.
    """
    from mess_compile import building, recipes

    target = _target(workspace, device)
    if target.library == "tensorrt":
        refuse_unless_here(target, workspace.root)
    graph_set = read_graph_set(workspace.graphs)
    for name, spec in graph_set.graphs.items():
        check_hash(graph_set.path(name), spec.sha256)
    unknown = [precision for precision in precisions if precision not in target.precisions]
    if unknown:
        raise InputError(f"{target.name} computes in {', '.join(target.precisions)}, not in {unknown[0]!r}")
    images = partial(_real_images, workspace, data, graph_set.candidate.input_hw)
    tune = workspace.memory().split or "val"
    building.library_version(target)
    found = []
    for precision in precisions:
        made = recipes.precise_graphs(
            graph_set, precision, target.precisions, workspace.recipes, tune, images, progress
        )
        folder = workspace.engines(target.name, made.recipe.name)
        processes = jobs or len(os.sched_getaffinity(0))
        engines = building.build_engines(made.graph_set, made.recipe, target, folder, processes, progress)
        found.append(RecipeBuild(engines, made.fallbacks))
    return tuple(found)


def _real_images(workspace: Workspace, data: Path | None, hw: tuple[int, int], split: str) -> list[NDArray[np.uint8]]:
    """Images from all over a split, at the network's input size. Raises InputError when no data are known."""
    if data is None and workspace.memory().data is None:
        raise InputError("fp16 and int8 are judged on real images: name a data folder with --data DIR")
    items = open_dataset(workspace.data_folder(data), split).items
    places = np.unique(np.linspace(0, len(items) - 1, PRECISION_FRAMES).round().astype(int))
    return [frames.resize(read_frame(items[place].image), hw) for place in places]


def profile(
    workspace: Workspace, device: str | None, progress: Progress, effort: Effort | None = None
) -> latency.LatencyTable:
    """Measure every graph on the device and write its latency table; the device is remembered."""
    from mess_compile import profiling

    target = _target(workspace, device)
    refuse_unless_here(target, workspace.root)
    if not target.library.startswith("onnxruntime"):
        raise InputError(f"{target.name} runs engines of {target.library}, which `profile` does not measure yet")
    graph_set = _verified_graphs(workspace)
    library = open_library(target.library)
    table = profiling.profile_graphs(graph_set, library, target.name, workspace.latency(target.name), progress, effort)
    workspace.remember(device=target.name)
    return table


def _verified_graphs(workspace: Workspace) -> GraphSet:
    """The graphs whose bytes are still those that export wrote."""
    graph_set = read_graph_set(workspace.graphs)
    verify_graph_set(graph_set)
    return graph_set


def _target(workspace: Workspace, device: str | None) -> Target:
    name = device or workspace.memory().device
    if name is None:
        raise InputError("no device was profiled in this workspace yet: run `mess-compile profile --device host`")
    return find_target(name, workspace.root)


def search(
    workspace: Workspace, device: str | None, split: str | None, requirement: Requirement, progress: Progress
) -> plans.SearchResult:
    """Find the best plan for the device under `requirement` and write it; evaluates first when statistics are stale."""
    from mess_compile.search.figures import Evidence
    from mess_compile.search.solver import search as solve

    target = _target(workspace, device)
    graph_set = read_graph_set(workspace.graphs)
    table = latency.read_latency_table(workspace.latency(target.name))
    latency.check_current(table, graph_set)
    found = _current_statistics(workspace, graph_set, split, progress)
    result = solve(Evidence(graph_set, table, found), requirement, lambda done, total: progress("search", done, total))
    plans.write_result(workspace.plan(target.name), result)
    workspace.remember(device=target.name)
    return result


def _current_statistics(
    workspace: Workspace, graph_set: GraphSet, split: str | None, progress: Progress
) -> statistics.ExitStatistics:
    memory = workspace.memory()
    split = split or memory.split or "val"
    try:
        found = statistics.read_statistics(workspace.statistics(split))
        statistics.check_current(found, graph_set)
        return found
    except (InputError, StaleError):
        if memory.data is None:
            raise
        made = _evaluated(workspace, None, split, progress, "onnxruntime", 1, 1)
        assert made is not None, "a search is one process"
        return made


def bundle(workspace: Workspace, plan: Path | None, output: Path | None) -> tuple[Path, Manifest]:
    """Write the plan of the device profiled last, or of the file `plan`, as a bundle."""
    from mess_compile import bundle as bundles

    graph_set = read_graph_set(workspace.graphs)
    chosen = plans.read_result(plan or workspace.plan(_target(workspace, None).name)).plan
    find_target(chosen.device, workspace.root)
    path = output or workspace.bundle(chosen.device)
    manifest = bundles.write_bundle(
        path,
        graph_set,
        chosen,
        statistics.threshold_table(graph_set.gate, len(graph_set.candidate.classes)),
        _scene_frames(graph_set.candidate.input_hw, GOLDEN_FRAMES),
        {"mess_compile": __version__, "golden_frames": "generated street scenes"},
    )
    return path, manifest


@dataclass(frozen=True)
class ImageResult:
    """What `run` made of one image, and the pictures it wrote."""

    image: Path
    exit: int
    exit_point: int
    confidence: float
    latency_ms: float
    pictures: tuple[Path, ...]


def run(
    bundle: Path,
    images: Sequence[Path],
    output: Path,
    progressive: bool,
    truth: Path | None,
    done: Callable[[ImageResult], None],
) -> tuple[ImageResult, ...]:
    """Segment images with a bundle: a palette PNG of labels and an overlay each, and on request the refinement strip.

    `truth` is a folder of label PNGs named as the images, shown at the end of the strip. Raises InputError,
    BundleError.
    """
    (stem, often), *_ = Counter(image.stem for image in images).most_common(1) or [("", 0)]
    if often > 1:
        raise InputError(
            f"two images are named {stem}: their pictures would share a name; run them one by one (-o DIR)"
        )
    with runtime_cascade.load(bundle) as cascade:
        results = []
        for image in images:
            results.append(_run_image(cascade, image, output, progressive, truth))
            done(results[-1])
        return tuple(results)


def _run_image(
    cascade: runtime_cascade.Cascade, image: Path, output: Path, progressive: bool, truth: Path | None
) -> ImageResult:
    from mess_compile.report import pictures

    frame = read_frame(image)
    prediction = cascade(frame)
    colours = cascade.manifest.network.colours
    drawn = {
        "labels": pictures.label_picture(prediction.labels, colours),
        "overlay": pictures.overlay_picture(frame, prediction.labels, colours),
    }
    if progressive:
        drawn["progressive"] = pictures.strip_picture(_panels(cascade, frame, prediction.exit, image, truth))
    paths = []
    for kind, picture in drawn.items():
        paths.append(output / f"{image.stem}.{kind}.png")
        pictures.save_picture(paths[-1], picture)
    return ImageResult(
        image, prediction.exit, prediction.exit_point, prediction.confidence, prediction.latency_ms, tuple(paths)
    )


def _panels(
    cascade: runtime_cascade.Cascade, frame: NDArray[np.uint8], taken: int, image: Path, truth: Path | None
) -> list[tuple[str, NDArray[np.uint8]]]:
    from mess_compile.dataset import ClassList

    network = cascade.manifest.network
    panels = [("input", frame)]
    for prediction in cascade.refine(frame):
        mark = " (taken)" if prediction.exit == taken else ""
        caption = f"exit {prediction.exit}{mark}  sure {prediction.confidence:.0%}  {prediction.latency_ms:.1f} ms"
        panels.append((caption, frames.overlay(frame, prediction.labels, network.colours)))
    if truth is not None:
        classes = ClassList(network.classes, network.colours, frozenset(range(len(network.classes), 256)))
        labels = read_labels(truth / f"{image.stem}.png", classes)
        if labels.shape != frame.shape[:2]:
            raise InputError(f"{truth / image.stem}.png is {labels.shape}, but {image} is {frame.shape[:2]}")
        shown = frames.overlay(frame, np.where(labels == 255, 0, labels), network.colours)
        shown[labels == 255] = 0
        panels.append(("truth", shown))
    return panels


def bench(workspace: Workspace, bundle: Path, data: Path | None, split: str, passes: int, progress: Progress) -> Bench:
    """Measure a bundle made in this workspace on a labelled split, beside the baseline."""
    from mess_compile import bench as benches

    folder = open_dataset(workspace.data_folder(data), split)
    graph_set = _verified_graphs(workspace)
    with runtime_cascade.load(bundle) as cascade:
        plan = cascade.plan
        table = latency.read_latency_table(workspace.latency(find_target(plan.target, workspace.root).name))
        latency.check_current(table, graph_set)  # now, rather than after minutes of measuring
        tuning = workspace.statistics(plan.predicted.split)
        tuned_on = statistics.read_statistics(tuning).image_id if tuning.is_dir() else ()
        return benches.bench(cascade, graph_set, table, folder, frozenset(tuned_on), passes, progress)
