"""Prepares a workspace's graphs in each precision for an engine library on this machine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mess_compile.cores import cores
from mess_compile.data.dataset import Data, open_dataset, read_frame
from mess_compile.engines.files import EngineFiles, plain_files
from mess_compile.engines.jobs import job_names
from mess_compile.network import GraphSet, check_graphs, read_graph_set, verify_graph_set
from mess_compile.reporter import Progress
from mess_compile.runtime.base.errors import InputError, StaleError, did_you_mean
from mess_compile.runtime.engines.engine import PRECISIONS
from mess_compile.runtime.images import frames
from mess_compile.targets import Target
from mess_compile.workspace import Workspace

if TYPE_CHECKING:
    from mess_compile.engines.build import EngineSet
    from mess_compile.engines.recipes import PreciseGraphs
    from mess_compile.graph.choose_precision import Fallback

PRECISION_FRAMES = 24
"""Images on which fp16 and int8 are checked, and as many to calibrate int8."""


@dataclass(frozen=True)
class RecipeBuild:
    """The engines of one recipe, their location, and the graphs that fell back to a safer precision."""

    graph_set: GraphSet
    engines: EngineSet
    fallbacks: tuple[Fallback, ...]
    place: str


def engines_of(
    workspace: Workspace,
    target: Target,
    precisions: Sequence[str],
    data: Data | None,
    jobs: int | None,
    progress: Progress,
) -> Iterator[RecipeBuild]:
    """Build the target's engines of every graph in each precision; yield them recipe by recipe."""
    from mess_compile.engines import build

    graph_set = read_graph_set(workspace.graphs)
    check_graphs(graph_set)
    refuse_other_precisions(target, precisions)
    build.library_version(target)
    for precision in precisions:
        made = in_precision(workspace, graph_set, precision, target.precisions, data, progress)
        folder = workspace.engines(target.name, made.graph_set.recipe)
        processes = jobs or cores()
        engines = build.build_engines(made.graph_set, target, folder, processes, progress)
        yield RecipeBuild(made.graph_set, engines, made.fallbacks, str(folder))


def refuse_other_precisions(target: Target, precisions: Sequence[str]) -> None:
    """Raises InputError for a precision that the target does not support."""
    unknown = [precision for precision in precisions if precision not in target.precisions]
    if unknown:
        near = did_you_mean(unknown[0], () if unknown[0] in PRECISIONS else target.precisions)
        raise InputError(f"{target.name} computes in {', '.join(target.precisions)}, not in {unknown[0]!r}{near}")


def refuse_unknown_precision(precision: str) -> None:
    """Raises InputError for a precision that no target supports."""
    if precision not in PRECISIONS:
        near = did_you_mean(precision, PRECISIONS)
        raise InputError(f"precision {precision!r}{near} is not one of {', '.join(reversed(PRECISIONS))}")


def precise_graphs(
    workspace: Workspace, target: Target, precisions: Sequence[str], data: Data | None, progress: Progress
) -> tuple[PreciseGraphs, ...]:
    """The workspace's graphs in each of the named precisions of the target; see `in_precision`."""
    graph_set = verified_graphs(workspace)
    refuse_other_precisions(target, precisions)
    return tuple(in_precision(workspace, graph_set, p, target.precisions, data, progress) for p in precisions)


def in_precision(
    workspace: Workspace,
    graph_set: GraphSet,
    precision: str,
    allowed: Sequence[str],
    data: Data | None,
    progress: Progress,
) -> PreciseGraphs:
    """The graphs in a precision, chosen on the workspace's images; chosen anew on the images of `data` when given."""
    from mess_compile.engines import recipes

    refuse_unknown_precision(precision)
    images = partial(_real_images, workspace, data, graph_set.candidate.input_hw)
    tune = workspace.memory().split or "val"
    request = recipes.RecipeRequest(precision, tuple(allowed), tune, renewed=data is not None)
    return recipes.make_recipe(graph_set, request, workspace.recipes, images, progress)


def engine_files(
    workspace: Workspace,
    target: Target,
    precisions: Sequence[str],
    data: Data | None,
    jobs: int | None,
    progress: Progress,
) -> tuple[EngineFiles, ...]:
    """The files that the target's library loads, in each precision; missing engines are built."""
    if target.library.startswith("onnxruntime"):
        made = precise_graphs(workspace, target, precisions, data, progress)
        return tuple(plain_files(each.graph_set) for each in made)
    from mess_compile.engines import build

    return tuple(
        build.built_files(made.graph_set, made.engines, workspace.engines(target.name, made.graph_set.recipe))
        for made in engines_of(workspace, target, precisions, data, jobs, progress)
    )


def built_here(
    workspace: Workspace,
    target: Target,
    progress: Progress,
    forms: Sequence[EngineFiles],
    jobs: Collection[str] | None,
) -> tuple[EngineFiles, ...]:
    """Build the engines of some jobs' graphs (None: all) in the workspace; a `Build` of `profile.backends`."""
    from mess_compile.engines import build

    built, processes = [], cores()
    for each in forms:
        folder = workspace.engines(target.name, each.graph_set.recipe)
        wanted = {graph for graph, job in job_names(each).items() if jobs is None or job in jobs}
        engines = build.build_engines(each.graph_set, target, folder, processes, progress, wanted)
        found = build.built_files(each.graph_set, engines, folder)
        paths = {name: path for name, path in (each.paths | found.paths).items() if name not in found.failed}
        built.append(EngineFiles(each.graph_set, paths, each.failed | found.failed))
    return tuple(built)


def _real_images(workspace: Workspace, data: Data | None, hw: tuple[int, int], split: str) -> list[NDArray[np.uint8]]:
    """Images spread over a split, at the network's input size. Raises InputError when the workspace names no data."""
    if data is None and workspace.memory().data is None:
        raise InputError("fp16 and int8 are checked on real images: name a data folder with --data DIR")
    items = open_dataset(workspace.data_folder(data), split).items
    indices = np.unique(np.linspace(0, len(items) - 1, PRECISION_FRAMES).round().astype(int))
    return [frames.resize(read_frame(items[index].image), hw) for index in indices]


def verified_graphs(workspace: Workspace) -> GraphSet:
    """The workspace's graphs, each verified against the hash that export wrote. Raises InputError, StaleError."""
    graph_set = read_graph_set(workspace.graphs)
    verify_graph_set(graph_set)
    return graph_set


def graphs_of_recipe(workspace: Workspace, recipe: str, device: str) -> GraphSet:
    """The graphs of a recipe. Raises StaleError when the recipe is missing or was made from other graphs."""
    from mess_compile.engines import recipes

    known = recipes.stored_recipe(read_graph_set(workspace.graphs), recipe, workspace.recipes)
    if known is None:
        precision = recipe.partition("-")[0]
        raise StaleError(
            f"the graphs in {recipe} are missing, or were made from other graphs than {workspace.graphs}: run "
            f"`mess-compile profile --device {device} --precision ...` with {precision} among them"
        )
    return known.graph_set
