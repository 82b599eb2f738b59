"""The step `evaluate`: exit statistics, recorded here or on a device, and those that are current."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mess_compile import extras, launcher
from mess_compile.cores import share_of_cores
from mess_compile.data.dataset import Data, DataFolder, DataSet, open_dataset, survey_labels
from mess_compile.device.connect import python_session, remote_for
from mess_compile.engines.files import EngineFiles
from mess_compile.engines.prepare import (
    engine_files,
    in_precision,
    refuse_other_precisions,
    refuse_unknown_precision,
    verified_graphs,
)
from mess_compile.engines.remote_build import forms_there
from mess_compile.evaluate import statistics
from mess_compile.network import CandidateNetwork, GraphSet, read_graph_set, verify_graph_set
from mess_compile.planned_step import PlannedStep
from mess_compile.reporter import SILENT, Reporter
from mess_compile.runtime.base.checks import check_threads
from mess_compile.runtime.base.errors import InputError, StaleError
from mess_compile.runtime.engines.engine import FP32, PRECISIONS, open_library
from mess_compile.steps import dry_run
from mess_compile.steps.device_choice import host_of, refuse_python_here
from mess_compile.steps.taught import refuse_taught
from mess_compile.targets import Target, find_target, refuse_unless_here
from mess_compile.workspace import HOST, Workspace

if TYPE_CHECKING:
    from mess_compile.evaluate.record import Share

_WAYS = "reach it with --host ssh://user@host, or run this command on it"


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate on, and where.

    `data` and `split` are the remembered ones by default. Without `device` ONNX Runtime evaluates on this machine, on
    the `cpu` or by its `cuda` provider: `devices` processes on each of `nodes` machines share the images, with
    `threads` CPU threads each (None: an even share of the cores). With `device` its own engines evaluate in
    `precision`, here or at `host` (ssh://user@host; None: the remembered one), where `python` starts Python.
    """

    data: Data | None = None
    split: str | None = None
    device: str | None = None
    precision: str = FP32
    host: str | None = None
    python: str | None = None
    accelerator: str = "cpu"
    devices: int = 1
    nodes: int = 1
    threads: int | None = None


@dataclass(frozen=True)
class _EvaluateRequest:
    """An evaluation of known data: by a target's own engines, at `host` or here, or (None) by ONNX Runtime here."""

    workspace: Workspace
    options: EvaluateOptions
    reporter: Reporter
    target: Target | None
    host: str | None

    def split_of(self, candidate: CandidateNetwork) -> tuple[DataFolder, DataSet]:
        return _labelled(self.workspace, candidate, self.options.data, self.options.split)

    def progress(self, images: int) -> Callable[[int], None]:
        return lambda done: self.reporter.progress("evaluate", min(done, images), images)


def _request(workspace: Workspace, options: EvaluateOptions, reporter: Reporter = SILENT) -> _EvaluateRequest:
    """Raises InputError when options do not go together, or the device is neither here nor reachable."""
    check_threads(options.threads)
    target = None if options.device is None else find_target(options.device, workspace.root)
    if options.host is None and (target is None or target.name == HOST):
        refuse_python_here(options.python)
        return _EvaluateRequest(workspace, options, reporter, None, None)
    if target is None:
        raise InputError(f"--host {options.host} needs --device NAME")
    if options.accelerator != "cpu" or (options.devices, options.nodes) != (1, 1) or options.threads is not None:
        raise InputError(
            f"--device {options.device} chooses what runs the graphs: drop --accelerator, --devices, --nodes and "
            "--threads"
        )
    refuse_other_precisions(target, (options.precision,))
    host = options.host or host_of(workspace, target)
    if host is None:
        refuse_python_here(options.python)
        refuse_unless_here(target, workspace.root, _WAYS)
    return _EvaluateRequest(workspace, options, reporter, target, host)


def evaluate(
    workspace: Workspace, options: EvaluateOptions = EvaluateOptions(), reporter: Reporter = SILENT
) -> statistics.ExitStatistics | None:
    """Run every head on a labelled split and write its exit statistics; data and split are remembered for `search`.

    Of several processes, also under torchrun or SLURM, the first returns the statistics, the others None. Notes say
    what is left out of the data, and what there is to know of their labels. Raises InputError, EngineError.
    """
    devices, nodes = launcher.counts() or (options.devices, options.nodes)
    request = _request(workspace, replace(options, devices=devices, nodes=nodes), reporter)
    if request.target is None:
        made = in_precision(
            workspace, verified_graphs(workspace), options.precision, PRECISIONS, options.data, reporter.progress
        )
        return _evaluated_here(request, made.graph_set)
    if request.host is not None:
        return _evaluated_there(request, request.target, request.host)
    (engines,) = engine_files(workspace, request.target, (options.precision,), options.data, None, reporter.progress)
    return _evaluated(request, engines, request.target.library)


def plan_evaluate(workspace: Workspace, options: EvaluateOptions = EvaluateOptions()) -> tuple[PlannedStep, ...]:
    """What `evaluate` would do; no device is asked. Raises InputError where it would."""
    from mess_compile.engines import recipes

    request, precision = _request(workspace, options), options.precision
    target, graph_set = request.target, verified_graphs(workspace)
    refuse_unknown_precision(precision)
    _, folder = request.split_of(graph_set.candidate)
    recipe = recipes.recipe_name(precision, PRECISIONS if target is None else target.precisions)
    settled = recipes.stored_recipe(graph_set, recipe, workspace.recipes)
    graphs = replace(graph_set, recipe=recipe) if settled is None else settled.graph_set
    unsettled = f"{precision} is checked first, graph by graph, on real images; that is not in the time"
    notes = (*folder.notes, unsettled) if settled is None else folder.notes
    name = HOST if target is None else target.name
    writes = (workspace.statistics(folder.split, recipe, name), workspace.file)
    place = request.host or "this machine"
    return (dry_run.of_evaluation(graphs, len(folder.items), writes, workspace.latency(name), place, notes),)


def _evaluated_here(request: _EvaluateRequest, graph_set: GraphSet) -> statistics.ExitStatistics | None:
    """By ONNX Runtime on this machine, which computes fp16 as a GPU would."""
    from mess_compile.engines import recipes

    library = {"cpu": "onnxruntime", "cuda": "onnxruntime-cuda"}[request.options.accelerator]
    with TemporaryDirectory(prefix="mess-") as folder:
        return _evaluated(request, recipes.reference_files(graph_set, Path(folder)), library)


def _evaluated(request: _EvaluateRequest, engines: EngineFiles, library: str) -> statistics.ExitStatistics | None:
    from mess_compile.evaluate import record

    workspace, options = request.workspace, request.options
    root, folder = request.split_of(engines.graph_set.candidate)
    _note_data(folder, request.reporter)
    _warn_of_other_images(workspace, folder, request.reporter)
    device = HOST if request.target is None else request.target.name
    with _shared(options) as share:
        threads = options.threads or share_of_cores(options.devices)
        found = record.evaluate_data(
            engines,
            open_library(library, threads, share.gpu if library == "onnxruntime-cuda" else 0),
            folder,
            workspace.statistics(folder.split, engines.graph_set.recipe, device),
            share,
            device=device,
            progress=request.progress(len(folder.items)),
        )
    if found is not None:
        workspace.remember(data=root, split=folder.split)
    return found


def _evaluated_there(request: _EvaluateRequest, target: Target, host: str) -> statistics.ExitStatistics:
    from mess_compile.evaluate import record

    workspace, options, progress = request.workspace, request.options, request.reporter.progress
    root, folder = request.split_of(read_graph_set(workspace.graphs).candidate)
    _note_data(folder, request.reporter)
    _warn_of_other_images(workspace, folder, request.reporter)
    with remote_for(workspace, host, options.python) as remote:
        (forms,) = forms_there(workspace, target, (options.precision,), options.data, progress)
        session = python_session(remote, target, forms.graph_set, progress)
        found = record.evaluate_there(
            session,
            record.build_scored_graphs(session, forms),
            folder,
            workspace.statistics(folder.split, forms.graph_set.recipe, target.name),
            device=target.name,
            progress=request.progress(len(folder.items)),
        )
    workspace.remember(data=root, split=folder.split)
    workspace.remember_python(host, options.python)
    return found


def _labelled(
    workspace: Workspace, candidate: CandidateNetwork, data: Data | None, split: str | None
) -> tuple[DataFolder, DataSet]:
    """The data folder, and its split, given or remembered. Raises InputError when its classes are not the network's."""
    root = workspace.data_folder(data)
    folder = open_dataset(root, split or workspace.memory().split or "val")
    refuse_taught(folder)
    if folder.classes.names != candidate.classes:
        raise InputError(
            f"{root.root} has {len(folder.classes.names)} classes ({', '.join(folder.classes.names)}), the network "
            f"{len(candidate.classes)} ({', '.join(candidate.classes)}): use its own class list"
        )
    return root, folder


def _note_data(folder: DataSet, reporter: Reporter) -> None:
    """What is left out and what labels hold, once; labels that cannot be read are found before anything runs."""
    if not launcher.is_child():
        for warning in folder.notes:
            reporter.warn(warning)
        survey_labels(folder).report(reporter)


def _warn_of_other_images(workspace: Workspace, folder: DataSet, reporter: Reporter) -> None:
    """A slice such as val[:12] selects other images when files were added to the folder, or removed."""
    if "[" not in folder.split or launcher.is_child():
        return
    try:
        known = set(statistics.read_statistics(workspace.statistics(folder.split)).image_id)
    except (InputError, StaleError):
        return
    new = [item.id for item in folder.items if item.id not in known]
    if new or len(known) != len(folder.items):
        some = f", such as {new[0]}" if new else ""
        reporter.warn(
            f"{folder.split} now selects other images than when it was evaluated before: {len(new)} of "
            f"{len(folder.items)} are new{some}; earlier plans were chosen on the former ones: search again"
        )


@contextmanager
def _shared(options: EvaluateOptions) -> Iterator[Share]:
    from mess_compile.evaluate.record import Share

    if options.devices * options.nodes == 1:
        yield Share()
        return
    parallel = extras.torch_module("training.parallel")
    fabric = parallel.launch(parallel.Machines("cpu", options.devices, options.nodes, threads=options.threads))
    with parallel.lost_process_named(fabric):
        yield Share(fabric.global_rank, fabric.world_size, fabric.local_rank, fabric.barrier)


def current_statistics(
    workspace: Workspace, graph_set: GraphSet, device: str, split: str | None, reporter: Reporter
) -> statistics.ExitStatistics:
    """Of the device itself where there are some, else of this machine, which records them when it can."""
    memory = workspace.memory()
    split = split or memory.split or "val"
    for place in dict.fromkeys((device, HOST)):
        try:
            found = statistics.read_statistics(workspace.statistics(split, graph_set.recipe, place))
            statistics.check_statistics_current(found, graph_set)
            return found
        except (InputError, StaleError):
            if place == HOST and memory.data is None:
                raise
    verify_graph_set(graph_set)
    _, folder = _labelled(workspace, graph_set.candidate, None, split)
    reporter.note(
        f"no current evaluation of {split} in {graph_set.recipe}: evaluating first, on the "
        f"{len(folder.items)} images of {split} in {folder.root}"
    )
    _warn_of_other_images(workspace, folder, reporter)
    quiet = _EvaluateRequest(workspace, EvaluateOptions(split=split), Reporter(reporter.progress), None, None)
    made = _evaluated_here(quiet, graph_set)
    assert made is not None, "a search is one process"
    return made
