"""The step `build`: the target's engines of every graph, here or on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from mess_compile.cores import cores
from mess_compile.data_folder import Data
from mess_compile.engines import recipes
from mess_compile.engines.build import entries_in, refuse_without_engines, reusable_engines
from mess_compile.engines.prepare import RecipeBuild, engines_of, refuse_other_precisions, verified_graphs
from mess_compile.engines.remote_build import build_there
from mess_compile.network import GraphSet
from mess_compile.planned_step import PlannedStep
from mess_compile.profile.sparse import BUILDING_S
from mess_compile.reporter import SILENT, Reporter
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import FP32
from mess_compile.steps.device_choice import host_of, refuse_python_here, target_of
from mess_compile.targets import Target, refuse_unless_here
from mess_compile.workspace import Workspace


@dataclass(frozen=True)
class EngineOptions:
    """`jobs` processes (None: one a core) build engines in `precisions`; `data` has images to choose precisions by.

    `host` (ssh://user@host) is where the device is, the remembered one by default; `python` starts Python there.
    """

    precisions: tuple[str, ...] = (FP32,)
    data: Data | None = None
    jobs: int | None = None
    host: str | None = None
    python: str | None = None


def build(
    workspace: Workspace,
    device: str | None = None,
    options: EngineOptions = EngineOptions(),
    reporter: Reporter = SILENT,
) -> tuple[RecipeBuild, ...]:
    """Build the target's engines of every graph and precision.

    TensorRT-RTX builds ahead of time on any machine, the classic library on the device alone: this machine, or the one
    at the host, one engine at a time. fp16 and int8 are checked first: a graph that loses too much is built in a safer
    precision. Raises InputError, EngineError, RemoteError.
    """
    target = target_of(workspace, device)
    host = build_host(workspace, target, options.host)
    if host is not None:
        return _built_at(workspace, target, host, options, reporter)
    refuse_python_here(options.python)
    if target.library == "tensorrt":
        refuse_unless_here(target, workspace.root, "build there with --host ssh://user@host, or run this command on it")
    made = engines_of(workspace, target, options.precisions, options.data, options.jobs, reporter.progress)
    return tuple(made)


def build_host(workspace: Workspace, target: Target, host: str | None) -> str | None:
    """Where engines are built; None: on this machine. Only the classic library has to build on its device."""
    if host is None and target.library == "tensorrt":
        return host_of(workspace, target)
    return host


def _built_at(
    workspace: Workspace, target: Target, host: str, options: EngineOptions, reporter: Reporter
) -> tuple[RecipeBuild, ...]:
    if options.jobs is not None:
        raise InputError(f"engines are built one at a time at {host}: drop --jobs {options.jobs}")
    built = build_there(workspace, target, options.precisions, options.data, host, options.python, reporter)
    workspace.remember_host(target.name, host)
    workspace.remember_python(host, options.python)
    return built


PlannedRecipe = tuple[GraphSet, tuple[str, ...]]
"""The graphs of a recipe, with notes; those of fp32 under its name until its precisions are chosen."""


def plan_build(
    workspace: Workspace, device: str | None = None, options: EngineOptions = EngineOptions()
) -> tuple[PlannedStep, ...]:
    """What `build` would do, recipe by recipe; no device is asked. Raises InputError and EngineError as `build`."""
    target = target_of(workspace, device)
    found = planned_recipes(workspace, target, verified_graphs(workspace), options.precisions)
    return planned_builds(workspace, target, found, options)


def planned_builds(
    workspace: Workspace, target: Target, found: Sequence[PlannedRecipe], options: EngineOptions
) -> tuple[PlannedStep, ...]:
    refuse_without_engines(target)
    host = build_host(workspace, target, options.host)
    return tuple(_planned(workspace, target, graph_set, options.jobs, host, notes) for graph_set, notes in found)


def planned_recipes(
    workspace: Workspace, target: Target, graph_set: GraphSet, precisions: Sequence[str]
) -> tuple[PlannedRecipe, ...]:
    """Raises InputError for a precision that the target does not compute in."""
    refuse_other_precisions(target, precisions)
    return tuple(_each_recipe(workspace, target, graph_set, precisions))


def _each_recipe(
    workspace: Workspace, target: Target, graph_set: GraphSet, precisions: Sequence[str]
) -> Iterator[PlannedRecipe]:
    for precision in precisions:
        recipe = recipes.recipe_name(precision, target.precisions)
        settled = recipes.stored_recipe(graph_set, recipe, workspace.recipes)
        if settled is not None:
            yield settled.graph_set, ()
        else:
            yield (
                replace(graph_set, recipe=recipe),
                (f"{precision} is checked first, graph by graph, on real images; that is not in the time",),
            )


def _planned(
    workspace: Workspace,
    target: Target,
    graph_set: GraphSet,
    jobs: int | None,
    host: str | None,
    notes: tuple[str, ...],
) -> PlannedStep:
    folder = workspace.engines(target.name, graph_set.recipe)
    there = None if host else () if notes else reusable_engines(graph_set, target, folder)
    names = {entry.graph for entry in there or ()}
    known = {e.graph: e.seconds for place in folder.parent.glob("*") for e in entries_in(place) if not e.error}
    usual = fmean(known.values()) if known else BUILDING_S[target.library]
    at_once = 1 if host or target.library == "tensorrt" else jobs or cores()
    spent = sum(known.get(name, usual) for name in graph_set.graphs if name not in names) / at_once
    basis = f"{len(known)} engines built before" if known else f"{usual:g} s for an engine, a guess"
    place, graphs = host or str(folder), len(graph_set.graphs)
    reused = "" if there is None else f", {len(there)} of them there already"
    return PlannedStep(
        step="build",
        what=f"build {graphs} engines in {graph_set.recipe} for {target.name} at {place}{reused}",
        writes=() if host else (str(folder),),
        least_s=spent,
        most_s=spent,
        basis=basis,
        notes=notes,
        device=target.name,
        precision=graph_set.recipe,
        place=place,
        graphs=graphs,
        there=None if there is None else len(there),
    )
