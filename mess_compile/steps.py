"""The Python API: one function per command, working in a workspace, from artefact to artefact."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mess_compile import __version__, extras, latency, launcher, scenes, statistics
from mess_compile.candidates import CandidateNetwork, Gate, GraphSet, check_graphs, read_graph_set, verify_graph_set
from mess_compile.dataset import DataSet, open_dataset, read_frame, read_labels
from mess_compile.engines import EngineFiles, plain_files
from mess_compile.runtime import cascade as runtime_cascade
from mess_compile.runtime import frames, machine, power
from mess_compile.runtime.engine import FP32, PRECISIONS, open_library
from mess_compile.runtime.errors import InputError, MessError, StaleError
from mess_compile.runtime.manifest import Manifest
from mess_compile.runtime.manifest import Plan as ManifestPlan
from mess_compile.search import plan as plans
from mess_compile.search.requirement import Requirement
from mess_compile.targets import (
    Target,
    find_target,
    known_targets,
    refuse_unless_here,
    refuse_unless_there,
    targets_here,
)
from mess_compile.workspace import HOST, Workspace

if TYPE_CHECKING:
    from mess_compile.bench import Bench
    from mess_compile.building import EngineSet
    from mess_compile.evaluation import Share
    from mess_compile.graph.recipe import Fallback
    from mess_compile.nets.network import Architecture
    from mess_compile.recipes import PreciseGraphs
    from mess_compile.remote import Remote
    from mess_compile.runtime.profile import Effort
    from mess_compile.sessions import Session
    from mess_compile.sparing import Subject
    from mess_compile.training.parallel import Machines
    from mess_compile.training.recipe import Recipe
    from mess_compile.trtexec_session import TrtexecSession

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
    device: str | None = None,
    precision: str = FP32,
    host: str | None = None,
) -> statistics.ExitStatistics | None:
    """Run every head on a labelled split and write its exit statistics; both are remembered for `search`.

    Here by ONNX Runtime, on the `cpu` or by its `cuda` provider, then a GPU for each process; or by the engines of
    `device`, which this machine is, or which is at `host` (ssh://user@host; the one remembered for it by default).
    `devices` processes on each of `nodes` machines share the images, also under torchrun or SLURM; of several the first
    returns the statistics, the others None.
    """
    library = {"cpu": "onnxruntime", "cuda": "onnxruntime-cuda"}[accelerator]
    counts = launcher.counts() or (devices, nodes)
    if host is None and device in (None, HOST):
        graph_set = _verified_graphs(workspace)
        made = _recipe(workspace, graph_set, precision, PRECISIONS, data, progress)
        return _evaluated_here(workspace, made.graph_set, data, split, progress, library, *counts)
    if device is None:
        raise InputError(f"--host {host} says where a device is: say which it is with --device NAME")
    if accelerator != "cpu" or counts != (1, 1):
        raise InputError(f"--device {device} says what runs the graphs: drop --accelerator, --devices and --nodes")
    target = find_target(device, workspace.root)
    if host is None and not targets_here((target,), machine.this_machine()):
        host = workspace.memory().hosts.get(target.name)
    if host is not None:
        return _evaluated_there(workspace, target, precision, data, split, progress, host)
    refuse_unless_here(target, workspace.root, "reach it with --host ssh://user@host, or run this command on it")
    (engines,) = _engine_files(workspace, target, (precision,), data, None, progress)
    return _evaluated(workspace, engines, data, split, progress, target.library, 1, 1, target.name)


def _evaluated_here(
    workspace: Workspace,
    graph_set: GraphSet,
    data: Path | None,
    split: str | None,
    progress: Progress,
    library: str,
    devices: int,
    nodes: int,
) -> statistics.ExitStatistics | None:
    """By ONNX Runtime on this machine, which computes fp16 as a GPU would."""
    from mess_compile import recipes

    with TemporaryDirectory(prefix="mess-") as folder:
        engines = recipes.reference_files(graph_set, Path(folder))
        return _evaluated(workspace, engines, data, split, progress, library, devices, nodes, HOST)


def _evaluated(
    workspace: Workspace,
    engines: EngineFiles,
    data: Path | None,
    split: str | None,
    progress: Progress,
    library: str,
    devices: int,
    nodes: int,
    device: str,
) -> statistics.ExitStatistics | None:
    from mess_compile import evaluation

    root, folder = _labelled(workspace, engines.graph_set.candidate, data, split)
    threads = max(1, (os.cpu_count() or 1) // devices) if devices > 1 else None
    with _shared(devices, nodes) as share:
        found = evaluation.evaluate_data(
            engines,
            open_library(library, threads, share.gpu if library == "onnxruntime-cuda" else 0),
            folder,
            workspace.statistics(folder.split, engines.graph_set.recipe, device),
            share,
            device=device,
            progress=lambda done: progress("evaluate", min(done, len(folder.items)), len(folder.items)),
        )
    if found is not None:
        workspace.remember(data=root, split=folder.split)
    return found


def _evaluated_there(
    workspace: Workspace,
    target: Target,
    precision: str,
    data: Path | None,
    split: str | None,
    progress: Progress,
    host: str,
) -> statistics.ExitStatistics:
    from mess_compile import evaluation
    from mess_compile.remote import Remote, parse_host

    root, folder = _labelled(workspace, read_graph_set(workspace.graphs).candidate, data, split)
    with Remote(parse_host(host)) as remote:
        (forms,) = _forms_there(workspace, target, (precision,), data, progress)
        session = _session(remote, target, forms.graph_set, progress)
        found = evaluation.evaluate_there(
            session,
            evaluation.built_there(session, forms),
            folder,
            workspace.statistics(folder.split, forms.graph_set.recipe, target.name),
            device=target.name,
            progress=lambda done: progress("evaluate", done, len(folder.items)),
        )
    workspace.remember(data=root, split=folder.split)
    return found


def _labelled(
    workspace: Workspace, candidate: CandidateNetwork, data: Path | None, split: str | None
) -> tuple[Path, DataSet]:
    """The data folder, and its split, given or remembered. Raises InputError when its classes are not the network's."""
    root = workspace.data_folder(data)
    folder = open_dataset(root, split or workspace.memory().split or "val")
    if folder.classes.names != candidate.classes:
        raise InputError(
            f"{root} has {len(folder.classes.names)} classes ({', '.join(folder.classes.names)}), the network "
            f"{len(candidate.classes)} ({', '.join(candidate.classes)}): use its own class list"
        )
    return root, folder


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

    graph_set: GraphSet
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
    target = _target(workspace, device)
    if target.library == "tensorrt":
        refuse_unless_here(target, workspace.root)
    return tuple(_builds(workspace, target, precisions, data, jobs, progress))


def _builds(
    workspace: Workspace,
    target: Target,
    precisions: Sequence[str],
    data: Path | None,
    jobs: int | None,
    progress: Progress,
) -> Iterator[RecipeBuild]:
    from mess_compile import building

    graph_set = read_graph_set(workspace.graphs)
    check_graphs(graph_set)
    _refuse_other_precisions(target, precisions)
    building.library_version(target)
    for precision in precisions:
        made = _recipe(workspace, graph_set, precision, target.precisions, data, progress)
        folder = workspace.engines(target.name, made.graph_set.recipe)
        processes = jobs or len(os.sched_getaffinity(0))
        engines = building.build_engines(made.graph_set, target, folder, processes, progress)
        yield RecipeBuild(made.graph_set, engines, made.fallbacks)


def _refuse_other_precisions(target: Target, precisions: Sequence[str]) -> None:
    unknown = [precision for precision in precisions if precision not in target.precisions]
    if unknown:
        raise InputError(f"{target.name} computes in {', '.join(target.precisions)}, not in {unknown[0]!r}")


def _recipe(
    workspace: Workspace,
    graph_set: GraphSet,
    precision: str,
    allowed: Sequence[str],
    data: Path | None,
    progress: Progress,
) -> PreciseGraphs:
    """The graphs in a precision; settled on the workspace's images, or anew on those of `data` when it is named."""
    from mess_compile import recipes

    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is not one of {', '.join(reversed(PRECISIONS))}")
    images = partial(_real_images, workspace, data, graph_set.candidate.input_hw)
    tune = workspace.memory().split or "val"
    return recipes.precise_graphs(
        graph_set, precision, allowed, workspace.recipes, tune, images, progress, renewed=data is not None
    )


def _engine_files(
    workspace: Workspace,
    target: Target,
    precisions: Sequence[str],
    data: Path | None,
    jobs: int | None,
    progress: Progress,
) -> tuple[EngineFiles, ...]:
    """What the target's library loads, in each precision; engines are built where they are missing."""
    if target.library.startswith("onnxruntime"):
        graph_set = _verified_graphs(workspace)
        _refuse_other_precisions(target, precisions)
        made = (_recipe(workspace, graph_set, p, target.precisions, data, progress) for p in precisions)
        return tuple(plain_files(each.graph_set) for each in made)
    from mess_compile import building

    return tuple(
        building.engine_files(made.graph_set, made.engines, workspace.engines(target.name, made.graph_set.recipe))
        for made in _builds(workspace, target, precisions, data, jobs, progress)
    )


def _real_images(workspace: Workspace, data: Path | None, hw: tuple[int, int], split: str) -> list[NDArray[np.uint8]]:
    """Images from all over a split, at the network's input size. Raises InputError when no data are known."""
    if data is None and workspace.memory().data is None:
        raise InputError("fp16 and int8 are judged on real images: name a data folder with --data DIR")
    items = open_dataset(workspace.data_folder(data), split).items
    places = np.unique(np.linspace(0, len(items) - 1, PRECISION_FRAMES).round().astype(int))
    return [frames.resize(read_frame(items[place].image), hw) for place in places]


def profile(
    workspace: Workspace,
    device: str | None,
    progress: Progress,
    precisions: Sequence[str] = (FP32,),
    data: Path | None = None,
    effort: Effort | None = None,
    host: str | None = None,
    thrift: Thrift | None = None,
    tell: Callable[[str], None] = lambda words: None,
    lock_clocks: bool = False,
) -> latency.LatencyTable:
    """Measure every graph in each precision on the device and write its latency table; the device is remembered.

    The device is this machine, or at `host` (ssh://user@host), which is remembered with it. Engines that are missing
    are built there first; a graph that has none is noted in the table. With `thrift`, over SSH, only what could change
    the answer is built and measured, and the rest estimated; `tell` hears what comes next, and how long it should take,
    and when trtexec measures in place of a Python that cannot be used at `host`. With `lock_clocks` the clocks are held
    while it is measured, and put back whatever happens.
    """
    target = _target(workspace, device)
    if host is None and target not in targets_here((target,), machine.this_machine()):
        host = workspace.memory().hosts.get(target.name)
    if host is None:
        table = _profile_here(workspace, target, precisions, data, progress, effort, lock_clocks)
    else:
        table = _profile_there(workspace, target, precisions, data, progress, effort, host, thrift, tell, lock_clocks)
    workspace.remember(device=target.name, host=host)
    return table


@dataclass(frozen=True)
class Thrift:
    """What a sparing profile is for: `requirements` that plans are searched by, and the seconds that it may take."""

    requirements: tuple[Requirement, ...] = (Requirement(max_err_pp=1.0),)
    budget_s: float = math.inf


def estimate(
    workspace: Workspace,
    device: str | None,
    progress: Progress,
    precisions: Sequence[str] = (FP32,),
    data: Path | None = None,
) -> latency.LatencyTable:
    """Write a latency table without the device: what was measured of these graphs is kept, the rest is estimated.

    Calibrated by what was measured on it, or of this network on other devices of its sort in this workspace.
    """
    from mess_compile.forecast import forecast

    target = _target(workspace, device)
    plain = _verified_graphs(workspace)
    _refuse_other_precisions(target, precisions)
    made = [_recipe(workspace, plain, p, target.precisions, data, progress).graph_set for p in precisions]
    tables = dict(_tables(workspace))
    known = tables.get(target.name)
    others = [(find_target(name, workspace.root), table) for name, table in tables.items()]
    table = forecast(made, target, known, others, plain)
    latency.write_latency_table(workspace.latency(target.name), table)
    workspace.remember(device=target.name)
    return table


def _tables(workspace: Workspace) -> Iterator[tuple[str, latency.LatencyTable]]:
    """Those that can be read, by the name of a known device."""
    for name in known_targets(workspace.root):
        path = workspace.latency(name)
        if path.is_file():
            with suppress(InputError):
                yield name, latency.read_latency_table(path)


def _profile_here(
    workspace: Workspace,
    target: Target,
    precisions: Sequence[str],
    data: Path | None,
    progress: Progress,
    effort: Effort | None,
    lock_clocks: bool,
) -> latency.LatencyTable:
    from mess_compile import profiling
    from mess_compile.runtime import clocks

    ways = "reach it with --host ssh://user@host, run this command on it, or go without it by --estimate"
    refuse_unless_here(target, workspace.root, ways)
    engines = _engine_files(workspace, target, precisions, data, None, progress)
    keep = workspace.clocks(target.name)
    with clocks.lock_clocks(keep) if lock_clocks else nullcontext(), closing(open_library(target.library)) as library:
        place = profiling.here(library, target.name, engines[0].graph_set)
        return profiling.profile_graphs(engines, place, workspace.latency(target.name), progress, effort)


def _profile_there(
    workspace: Workspace,
    target: Target,
    precisions: Sequence[str],
    data: Path | None,
    progress: Progress,
    effort: Effort | None,
    host: str,
    thrift: Thrift | None,
    tell: Callable[[str], None],
    lock_clocks: bool,
) -> latency.LatencyTable:
    from mess_compile import profiling, trtexec_session
    from mess_compile.remote import Remote, parse_host

    started, path = time.monotonic(), workspace.latency(target.name)
    if thrift and len(precisions) > 1 and any(wish.setting == "anytime" for wish in thrift.requirements):
        raise InputError("the anytime setting compares plans of one recipe: profile one --precision for it")
    with Remote(parse_host(host)) as remote:
        forms = _forms_there(workspace, target, precisions, data, progress)
        session = _measuring_session(workspace, remote, target, forms[0].graph_set, progress, tell)
        by_trtexec = isinstance(session, trtexec_session.TrtexecSession)
        if isinstance(session, trtexec_session.TrtexecSession):
            if lock_clocks:
                raise InputError("clocks are locked by the Python there, which cannot be used: lock them there by hand")
        else:
            session.lock_clocks = lock_clocks
        transfers = trtexec_session.transfers(read_graph_set(workspace.graphs), target) if by_trtexec else None
        place = profiling.there(session, target.name, transfers)
        if thrift is None:
            return profiling.profile_graphs(profiling.built_there(session, forms), place, path, progress, effort)
        subject = _subject(workspace, target, forms, thrift.requirements, progress)
        if not subject.requirements:
            tell("no statistics, nor data to record them by (`mess-compile evaluate --data`): a fair share is measured")
        return profiling.profile_sparingly(
            forms,
            place,
            partial(profiling.build_there, session),
            subject,
            path,
            progress,
            lambda: time.monotonic() - started < thrift.budget_s,
            tell,
            effort,
        )


def _subject(
    workspace: Workspace,
    target: Target,
    forms: Sequence[EngineFiles],
    requirements: tuple[Requirement, ...],
    progress: Progress,
) -> Subject:
    """What a sparing profile goes by. Without statistics, and data to record them by, no requirement can guide it."""
    from mess_compile import forecast, sparing

    graph_sets = tuple(each.graph_set for each in forms)
    precisions = [spec.precision for each in graph_sets for spec in each.graphs.values()]
    found = {}
    with suppress(InputError, StaleError):
        for each in graph_sets:
            found[each.recipe] = _current_statistics(workspace, each, target.name, None, progress)
    twins = {twin: first for each in graph_sets for twin, first in sparing.twins(each).items()}
    priors = forecast.priors_of(read_graph_set(workspace.graphs), target, precisions)
    return sparing.Subject(graph_sets, priors, found, requirements if found else (), twins)


def _measuring_session(
    workspace: Workspace,
    remote: Remote,
    target: Target,
    graph_set: GraphSet,
    progress: Progress,
    tell: Callable[[str], None],
) -> Session | TrtexecSession:
    """A device that has shown that it is the target; by trtexec where its Python cannot be used."""
    from mess_compile import trtexec_session

    try:
        return _session(remote, target, graph_set, progress)
    except MessError as error:
        caches = workspace.engines(target.name, FP32).parent
        session = trtexec_session.in_place_of_python(remote, target, caches, progress, error)
        if session is None:
            raise
        tell(f"note: {error}; until then trtexec measures there, by a protocol of its own that the table names")
    refuse_unless_there(target, session.greet().machine, remote.host.text)
    return session


def _session(remote: Remote, target: Target, graph_set: GraphSet, progress: Progress) -> Session:
    """A device that has shown that it is the target."""
    from mess_compile import profiling
    from mess_compile.sessions import Session

    session = Session(remote, target.library, *profiling.fed(graph_set), progress)
    refuse_unless_there(target, session.greet().machine, remote.host.text)
    return session


def _forms_there(
    workspace: Workspace, target: Target, precisions: Sequence[str], data: Path | None, progress: Progress
) -> tuple[EngineFiles, ...]:
    """The graphs as the library there takes them."""
    graph_set = _verified_graphs(workspace)
    _refuse_other_precisions(target, precisions)
    made = [_recipe(workspace, graph_set, p, target.precisions, data, progress).graph_set for p in precisions]
    if target.library.startswith("onnxruntime"):
        return tuple(map(plain_files, made))
    from mess_compile import building

    return tuple(building.target_forms(each, target, workspace.forms(target.name), progress) for each in made)


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
    workspace: Workspace,
    device: str | None,
    split: str | None,
    requirement: Requirement,
    progress: Progress,
    precisions: Sequence[str] | None = None,
) -> plans.SearchResult:
    """Find the best plan for the device under `requirement` and write it; evaluates first when statistics are stale.

    Every recipe that was profiled there is searched, or those named by `precisions`.
    """
    from mess_compile.search.figures import Evidence
    from mess_compile.search.solver import search_recipes

    target = _target(workspace, device)
    table = latency.read_latency_table(workspace.latency(target.name))
    known = {recipe.partition("-")[0]: recipe for recipe in table.recipes}
    absent = [precision for precision in precisions or () if precision not in known]
    if absent:
        raise InputError(
            f"{target.name} was profiled in {', '.join(known)}, not in {absent[0]!r}: run `mess-compile profile "
            f"--device {target.name} --precision {','.join([*known, absent[0]])}`"
        )
    _check_power_mode(table, target, workspace)
    evidences = []
    for recipe in map(known.__getitem__, precisions or known):
        graph_set = _settled(workspace, recipe, target.name)
        latency.check_current(table, graph_set)
        found = _current_statistics(workspace, graph_set, target.name, split, progress)
        evidences.append(Evidence(graph_set, table, found))
    result = search_recipes(evidences, requirement, lambda done, total: progress("search", done, total))
    plans.write_result(workspace.plan(target.name), result)
    workspace.remember(device=target.name)
    return result


def _check_power_mode(table: latency.LatencyTable, target: Target, workspace: Workspace) -> None:
    """Raises StaleError when this machine is the target, and now runs in another power mode than was measured in."""
    wanted = table.environment.get("power_mode")
    if wanted is None or target.name not in {here.name for here in _targets_here(workspace)}:
        return
    found = power.read_state().power_mode
    if found != wanted:
        raise StaleError(
            f"the latency table of {target.name} was measured in power mode {wanted}, and now it is "
            f"{found or 'unknown'}: set it back, or run `mess-compile profile --device {target.name}`"
        )


def _targets_here(workspace: Workspace) -> tuple[Target, ...]:
    return targets_here(known_targets(workspace.root).values(), machine.this_machine())


def _settled(workspace: Workspace, recipe: str, device: str) -> GraphSet:
    """The graphs of a recipe. Raises StaleError when it has to be settled again."""
    from mess_compile import recipes

    known = recipes.settled_graphs(read_graph_set(workspace.graphs), recipe, workspace.recipes)
    if known is None:
        precision = recipe.partition("-")[0]
        raise StaleError(
            f"the graphs in {recipe} are missing, or of other graphs than {workspace.graphs}: run "
            f"`mess-compile profile --device {device} --precision ...` with {precision} among them"
        )
    return known.graph_set


def _current_statistics(
    workspace: Workspace, graph_set: GraphSet, device: str, split: str | None, progress: Progress
) -> statistics.ExitStatistics:
    """Of the device itself where there are some, else of this machine, which records them when it can."""
    memory = workspace.memory()
    split = split or memory.split or "val"
    for place in dict.fromkeys((device, HOST)):
        try:
            found = statistics.read_statistics(workspace.statistics(split, graph_set.recipe, place))
            statistics.check_current(found, graph_set)
            return found
        except (InputError, StaleError):
            if place == HOST and memory.data is None:
                raise
    verify_graph_set(graph_set)
    made = _evaluated_here(workspace, graph_set, None, split, progress, "onnxruntime", 1, 1)
    assert made is not None, "a search is one process"
    return made


def bundle(workspace: Workspace, plan: Path | None, output: Path | None) -> tuple[Path, Manifest]:
    """Write the plan of the device profiled last, or of the file `plan`, as a bundle."""
    from mess_compile import bundle as bundles

    chosen = plans.read_result(plan or workspace.plan(_target(workspace, None).name)).plan
    target, graph_set = find_target(chosen.device, workspace.root), _settled(workspace, chosen.precision, chosen.device)
    path = output or workspace.bundle(chosen.device)
    with TemporaryDirectory(prefix="mess-") as folder:
        manifest = bundles.write_bundle(
            path,
            graph_set,
            chosen,
            statistics.threshold_table(graph_set.gate, len(graph_set.candidate.classes)),
            _scene_frames(graph_set.candidate.input_hw, GOLDEN_FRAMES),
            {"mess_compile": __version__, "golden_frames": "generated street scenes"},
            _forms(graph_set, chosen, target, Path(folder)),
        )
    return path, manifest


def _forms(graph_set: GraphSet, plan: plans.Plan, target: Target, folder: Path) -> dict[str, Path]:
    """The plan's graphs that the target's parser does not take as they are, rewritten for it in `folder`."""
    if target.library.startswith("onnxruntime"):
        return {}
    from mess_compile import building

    parser = building.parser_of(target)
    return {
        graph.name: path
        for graph in plan.graphs
        for path in [folder / graph_set.path(graph.name).name]
        if building.prepare_graph(graph_set.path(graph.name), graph.precision, parser, path)
    }


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
    with runtime_cascade.load(bundle) as cascade:
        plan = cascade.plan
        target = find_target(plan.target, workspace.root)
        table = latency.read_latency_table(workspace.latency(target.name))
        refuse_unless_here(target, workspace.root)
        graph_set = _settled(workspace, plan.precision, plan.target)
        verify_graph_set(graph_set)
        latency.check_current(table, graph_set)  # now, rather than after minutes of measuring
        (engines,) = _engine_files(workspace, target, (plan.precision.partition("-")[0],), None, None, progress)
        return benches.bench(cascade, engines, table, folder, _tuned_on(workspace, plan), passes, progress)


def _tuned_on(workspace: Workspace, plan: ManifestPlan) -> frozenset[str]:
    """The images that the plan was chosen on, as far as their statistics are still here."""
    device = plan.tuned_by.rpartition(" on ")[2]
    tuning = workspace.statistics(plan.predicted.split, plan.precision, device)
    return frozenset(statistics.read_statistics(tuning).image_id if tuning.is_dir() else ())
