"""Exit statistics of a workspace: recorded here or on a device, and those that are current."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mess_compile import extras, launcher
from mess_compile.cores import share_of_cores
from mess_compile.data.dataset import Data, DataFolder, DataSet, open_dataset, survey_labels
from mess_compile.device.connect import python_session, refuse_python_here, remote_for
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
from mess_compile.runtime.base.checks import check_threads
from mess_compile.runtime.base.errors import InputError, StaleError
from mess_compile.runtime.engines.engine import FP32, PRECISIONS, open_library
from mess_compile.runtime.machine import machine
from mess_compile.steps import prospects
from mess_compile.steps.prospects import Prospect
from mess_compile.targets import Target, find_target, refuse_unless_here, targets_here
from mess_compile.workspace import HOST, Progress, Workspace, silent

if TYPE_CHECKING:
    from mess_compile.evaluate.record import Share


_WAYS = "reach it with --host ssh://user@host, or run this command on it"


def evaluate(
    workspace: Workspace,
    data: Data | None = None,
    split: str | None = None,
    progress: Progress = silent,
    devices: int = 1,
    nodes: int = 1,
    accelerator: str = "cpu",
    device: str | None = None,
    precision: str = FP32,
    host: str | None = None,
    python: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
    threads: int | None = None,
) -> statistics.ExitStatistics | None:
    """Run every head on a labelled split and write its exit statistics; both are remembered for `search`.

    Here by ONNX Runtime, on the `cpu` or by its `cuda` provider, then a GPU for each process; or by the engines of
    `device`, which this machine is, or which is at `host` (ssh://user@host; the one remembered for it by default), and
    `python` starts Python there. `devices` processes on each of `nodes` machines share the images, also under torchrun
    or SLURM; of several the first returns the statistics, the others None. `tell` is told what is left out of the data,
    and what there is to know of their labels. `threads` are the CPU threads of each process, an even share of the cores
    by default.
    """
    check_threads(threads)
    library = {"cpu": "onnxruntime", "cuda": "onnxruntime-cuda"}[accelerator]
    counts = launcher.counts() or (devices, nodes)
    if host is None and device in (None, HOST):
        refuse_python_here(python)
        graph_set = verified_graphs(workspace)
        made = in_precision(workspace, graph_set, precision, PRECISIONS, data, progress)
        return _evaluated_here(workspace, made.graph_set, data, split, progress, library, *counts, tell, threads)
    if device is None:
        raise InputError(f"--host {host} says where a device is: say which it is with --device NAME")
    if accelerator != "cpu" or counts != (1, 1) or threads is not None:
        raise InputError(
            f"--device {device} says what runs the graphs: drop --accelerator, --devices, --nodes and --threads"
        )
    target = find_target(device, workspace.root)
    if host is None and not targets_here((target,), machine.this_machine()):
        host = workspace.memory().hosts.get(target.name)
    if host is not None:
        return _evaluated_there(workspace, target, precision, data, split, progress, host, python, tell)
    refuse_python_here(python)
    refuse_unless_here(target, workspace.root, _WAYS)
    (engines,) = engine_files(workspace, target, (precision,), data, None, progress)
    return _evaluated(workspace, engines, data, split, progress, target.library, 1, 1, target.name, tell)


def foresee_evaluate(
    workspace: Workspace,
    data: Data | None = None,
    split: str | None = None,
    device: str | None = None,
    precision: str = FP32,
    host: str | None = None,
) -> tuple[Prospect, ...]:
    """What `evaluate` would do; no device is asked. Raises InputError where it would."""
    from mess_compile.engines import recipes

    graph_set, target = verified_graphs(workspace), None
    if host is not None or device not in (None, HOST):
        if device is None:
            raise InputError(f"--host {host} says where a device is: say which it is with --device NAME")
        target = find_target(device, workspace.root)
        refuse_other_precisions(target, (precision,))
        if host is None and not targets_here((target,), machine.this_machine()):
            host = workspace.memory().hosts.get(target.name)
        if host is None:
            refuse_unless_here(target, workspace.root, _WAYS)
    refuse_unknown_precision(precision)
    _, folder = _labelled(workspace, graph_set.candidate, data, split)
    recipe = recipes.recipe_name(precision, PRECISIONS if target is None else target.precisions)
    settled = recipes.settled_graphs(graph_set, recipe, workspace.recipes)
    graphs = replace(graph_set, recipe=recipe) if settled is None else settled.graph_set
    unsettled = f"{precision} is settled first, graph by graph, on real images; that is not in the time"
    notes = (*folder.notes, unsettled) if settled is None else folder.notes
    name = HOST if target is None else target.name
    writes, place = (workspace.statistics(folder.split, recipe, name), workspace.file), host or "this machine"
    found = prospects.of_evaluation(graphs, len(folder.items), writes, workspace.latency(name), place, notes)
    return (found,)


def _evaluated_here(
    workspace: Workspace,
    graph_set: GraphSet,
    data: Data | None,
    split: str | None,
    progress: Progress,
    library: str,
    devices: int,
    nodes: int,
    tell: Callable[[str], None] = lambda line: None,
    threads: int | None = None,
) -> statistics.ExitStatistics | None:
    """By ONNX Runtime on this machine, which computes fp16 as a GPU would."""
    from mess_compile.engines import recipes

    with TemporaryDirectory(prefix="mess-") as folder:
        engines = recipes.reference_files(graph_set, Path(folder))
        return _evaluated(workspace, engines, data, split, progress, library, devices, nodes, HOST, tell, threads)


def _evaluated(
    workspace: Workspace,
    engines: EngineFiles,
    data: Data | None,
    split: str | None,
    progress: Progress,
    library: str,
    devices: int,
    nodes: int,
    device: str,
    tell: Callable[[str], None],
    threads: int | None = None,
) -> statistics.ExitStatistics | None:
    from mess_compile.evaluate import record

    root, folder = _labelled(workspace, engines.graph_set.candidate, data, split)
    _tell_of(folder, tell)
    with _shared(devices, nodes, threads) as share:
        found = record.evaluate_data(
            engines,
            open_library(
                library, threads or share_of_cores(devices), share.gpu if library == "onnxruntime-cuda" else 0
            ),
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
    data: Data | None,
    split: str | None,
    progress: Progress,
    host: str,
    python: str | None,
    tell: Callable[[str], None],
) -> statistics.ExitStatistics:
    from mess_compile.evaluate import record

    root, folder = _labelled(workspace, read_graph_set(workspace.graphs).candidate, data, split)
    _tell_of(folder, tell)
    with remote_for(workspace, host, python) as remote:
        (forms,) = forms_there(workspace, target, (precision,), data, progress)
        session = python_session(remote, target, forms.graph_set, progress)
        found = record.evaluate_there(
            session,
            record.built_there(session, forms),
            folder,
            workspace.statistics(folder.split, forms.graph_set.recipe, target.name),
            device=target.name,
            progress=lambda done: progress("evaluate", done, len(folder.items)),
        )
    workspace.remember(data=root, split=folder.split)
    workspace.remember_python(host, python)
    return found


def _labelled(
    workspace: Workspace, candidate: CandidateNetwork, data: Data | None, split: str | None
) -> tuple[DataFolder, DataSet]:
    """The data folder, and its split, given or remembered. Raises InputError when its classes are not the network's."""
    root = workspace.data_folder(data)
    folder = open_dataset(root, split or workspace.memory().split or "val")
    if folder.classes.names != candidate.classes:
        raise InputError(
            f"{root.root} has {len(folder.classes.names)} classes ({', '.join(folder.classes.names)}), the network "
            f"{len(candidate.classes)} ({', '.join(candidate.classes)}): use its own class list"
        )
    return root, folder


def _tell_of(folder: DataSet, tell: Callable[[str], None]) -> None:
    """What is left out and what labels hold, once; labels that cannot be read are found before anything runs."""
    if not launcher.is_child():
        for sentence in (*folder.notes, *survey_labels(folder).sentences()):
            tell(sentence)


@contextmanager
def _shared(devices: int, nodes: int, threads: int | None) -> Iterator[Share]:
    from mess_compile.evaluate.record import Share

    if devices * nodes == 1:
        yield Share()
        return
    parallel = extras.torch_module("training.parallel")
    fabric = parallel.launch(parallel.Machines("cpu", devices, nodes, threads=threads))
    with parallel.lost_process_named(fabric):
        yield Share(fabric.global_rank, fabric.world_size, fabric.local_rank, fabric.barrier)


def current_statistics(
    workspace: Workspace,
    graph_set: GraphSet,
    device: str,
    split: str | None,
    progress: Progress,
    tell: Callable[[str], None] = lambda line: None,
) -> statistics.ExitStatistics:
    """Of the device itself where there are some, else of this machine, which records them when it can, and `tell`s."""
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
    _, folder = _labelled(workspace, graph_set.candidate, None, split)
    tell(
        f"there are no current statistics of {split} in {graph_set.recipe}: evaluating first, on the "
        f"{len(folder.items)} images of {split} in {folder.root}"
    )
    made = _evaluated_here(workspace, graph_set, None, split, progress, "onnxruntime", 1, 1)
    assert made is not None, "a search is one process"
    return made
