"""Search, as a step of the Python API: from table and statistics to plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mess_compile.engines.prepare import graphs_of_recipe
from mess_compile.latency import table as latency
from mess_compile.reporter import SILENT, Reporter
from mess_compile.runtime.base.errors import InputError, RequirementError, StaleError, did_you_mean
from mess_compile.runtime.machine import machine, power
from mess_compile.search import plan as plans
from mess_compile.search.deadline import Clock
from mess_compile.search.requirement import Requirement
from mess_compile.steps.device_choice import target_of
from mess_compile.steps.evaluate import current_statistics
from mess_compile.targets import Target, targets_here
from mess_compile.workspace import Workspace

if TYPE_CHECKING:
    from mess_compile.bundle.shared_graphs import Shared
    from mess_compile.search.explain import Explanation
    from mess_compile.search.hold_out import Parted
    from mess_compile.search.metrics import Evidence

FASTEST = Requirement()
"""No bounds."""


@dataclass(frozen=True)
class SearchOptions:
    """How to search: the recipes (None: all that were profiled), what the front is by, when to end, and whether the
    plan is certified at a `confidence` (0.95), on sequences drawn by `seed`. `output` is where the plan goes instead of
    the workspace's own place, of one device. `hold_out` is the share of the images that the plan is judged by and not
    chosen on: None, a third where they suffice; 0, none."""

    precisions: tuple[str, ...] | None = None
    front_by: tuple[str, ...] = plans.FRONT_BY
    time_limit_s: float | None = None
    confidence: float | None = None
    seed: int = 0
    output: Path | None = None
    hold_out: Fraction | None = None


def search(
    workspace: Workspace,
    devices: Sequence[str] = (),
    split: str | None = None,
    requirement: Requirement = FASTEST,
    options: SearchOptions = SearchOptions(),
    reporter: Reporter = SILENT,
) -> tuple[plans.SearchResult, ...]:
    """Find the best plan for each device, of none for the one profiled last; all plans are written, or none.

    Evaluates first when statistics are stale. Ctrl-C ends the search with the best plan so far, and the
    cross-validation after it without a figure.
    """
    return tuple(_found(workspace, devices, split, requirement, options, reporter)[0])


def search_and_explain(
    workspace: Workspace,
    devices: Sequence[str] = (),
    split: str | None = None,
    requirement: Requirement = FASTEST,
    options: SearchOptions = SearchOptions(),
    reporter: Reporter = SILENT,
) -> tuple[tuple[plans.SearchResult, Explanation], ...]:
    """As `search`, and why each plan was chosen.

    It compares with other optima: `options` with a time limit or a confidence may give another plan.
    """
    from mess_compile.search import explain as explaining
    from mess_compile.search.solver import search_recipes

    results, evidences = _found(workspace, devices, split, requirement, options, reporter)
    find = partial(search_recipes, front_by=(), kept=workspace.searches)
    otherwise = partial(search_recipes, front_by=())
    progress = partial(reporter.progress, "explain")
    return tuple(
        (result, explaining.explain(each, requirement, result.plan, find, otherwise, progress))
        for result, each in zip(results, evidences, strict=True)
    )


def _found(
    workspace: Workspace,
    devices: Sequence[str],
    split: str | None,
    requirement: Requirement,
    options: SearchOptions,
    reporter: Reporter,
) -> tuple[list[plans.SearchResult], list[Sequence[Evidence]]]:
    """For each device what was found, and by what."""
    from mess_compile.search.constraints import promises_of
    from mess_compile.search.display import what_would_cut

    targets = [target_of(workspace, device) for device in dict.fromkeys(devices or (None,))]
    _refuse_to_overwrite(options.output, len(targets))
    clock = Clock(math.inf if options.time_limit_s is None else options.time_limit_s)
    whole = {t.name: _evidences(workspace, t, split, options, reporter) for t in targets}
    parts = {name: _parted(each, options) for name, each in whole.items()}
    evidences = {name: part.chosen for name, part in parts.items()}
    results = []
    for name, each in evidences.items():
        try:
            found = _searched(
                each, requirement, options, workspace.searches, partial(reporter.progress, "search"), clock
            )
            results.append(replace(found, plan=replace(found.plan, promises=promises_of(requirement, found.plan))))
        except RequirementError as error:
            raise RequirementError(f"{name}: {error}" if len(evidences) > 1 else str(error)) from error
    results = [part.judged(result) for part, result in zip(parts.values(), results, strict=True)]
    results = [
        replace(result, what_would_cut=what_would_cut(result, requirement, len(each[0].table.failed)))
        if result.plan.is_whole
        else result
        for result, each in zip(results, evidences.values(), strict=True)
    ]
    _write(workspace, results, options.output)
    if options.confidence is None:
        results = list(_expected(list(evidences.values()), results, requirement, options, workspace.searches, reporter))
        _write(workspace, results, options.output)
    return results, list(evidences.values())


def _parted(evidences: Sequence[Evidence], options: SearchOptions) -> Parted:
    """What to choose by and what to judge by; `--confidence` parts the images by itself."""
    from mess_compile.search import hold_out

    if options.confidence is None:
        return hold_out.parted(evidences, options.hold_out)
    return hold_out.Parted(evidences, evidences, without="--confidence tests on images of its own")


def _refuse_to_overwrite(output: Path | None, devices: int) -> None:
    """Raises InputError when the plans of all devices cannot go there, or something other than a plan is there."""
    if output is None:
        return
    if devices > 1:
        raise InputError(f"{output} takes the plan of one device, and {devices} are given: leave -o out")
    if output.exists():
        try:
            plans.read_result(output)
        except InputError as error:
            raise InputError(f"{output} is there and is no plan: name another file, or move it away") from error


def _write(workspace: Workspace, results: Sequence[plans.SearchResult], output: Path | None) -> None:
    for result in results:
        plans.write_result(output or workspace.plan(result.plan.device), result)
    first = results[0].plan
    if plans.source_of(first) == "measured":
        workspace.remember(device=first.device)


def _searched(
    evidences: Sequence[Evidence],
    requirement: Requirement,
    options: SearchOptions,
    kept: Path,
    progress: Callable[[int, int], None],
    clock: Clock,
) -> plans.SearchResult:
    from mess_compile.search.guarantees import certify
    from mess_compile.search.solver import search_recipes

    if options.confidence is None:
        return search_recipes(evidences, requirement, progress, options.front_by, kept, clock)
    return certify(evidences, requirement, options.confidence, options.seed, progress, options.front_by, kept)


def _expected(
    evidences: Sequence[Sequence[Evidence]],
    results: Sequence[plans.SearchResult],
    requirement: Requirement,
    options: SearchOptions,
    cache: Path,
    reporter: Reporter,
) -> Iterator[plans.SearchResult]:
    """The results with what to expect of their plans on unseen images, by cross-validation, or why that is not told."""
    from mess_compile.search.guarantees import optimism

    progress, without = partial(reporter.progress, "cross-validation"), ""
    if options.time_limit_s is not None:
        without = "no cross-validation under --time-limit"
    for each, result in zip(evidences, results, strict=True):
        if not without and result.certificate.gap > 0:
            without = "no cross-validation, for the search was stopped"
        try:
            expected = None if without else optimism(each, requirement, progress=progress, kept=cache / "folds")
            yield replace(result, plan=replace(result.plan, optimism=expected), without_optimism=without)
        except RequirementError as error:
            yield replace(result, without_optimism=str(error))
        except KeyboardInterrupt:
            without = "the cross-validation was stopped"
            yield replace(result, without_optimism=without)


def shared(workspace: Workspace, results: Sequence[plans.SearchResult]) -> Shared:
    """What the chosen plans of several devices have in common."""
    from mess_compile.bundle import shared_graphs

    chosen = [result.plan for result in results]
    return shared_graphs.shared([(graphs_of_recipe(workspace, plan.precision, plan.device), plan) for plan in chosen])


def _evidences(
    workspace: Workspace, target: Target, split: str | None, options: SearchOptions, reporter: Reporter
) -> list[Evidence]:
    """What a search goes by, for each recipe."""
    from mess_compile.search.metrics import Evidence

    precisions = options.precisions
    table = latency.read_latency_table(workspace.latency(target.name))
    known = {recipe.partition("-")[0]: recipe for recipe in table.recipes}
    absent = [precision for precision in precisions or () if precision not in known]
    if absent:
        if absent[0] not in target.precisions:
            near = did_you_mean(absent[0], known)
            raise InputError(f"{target.name} computes in {', '.join(target.precisions)}, not in {absent[0]!r}{near}")
        raise InputError(
            f"{target.name} was profiled in {', '.join(known)}, not in {absent[0]!r}: run `mess-compile profile "
            f"--device {target.name} --precision {','.join([*known, absent[0]])}`"
        )
    _check_power_mode(table, target)
    evidences = []
    for recipe in map(known.__getitem__, precisions or known):
        graph_set = graphs_of_recipe(workspace, recipe, target.name)
        latency.check_current(table, graph_set)
        found = current_statistics(workspace, graph_set, target.name, split, reporter)
        evidences.append(Evidence(graph_set, table, found))
    return evidences


def _check_power_mode(table: latency.LatencyTable, target: Target) -> None:
    """Raises StaleError when this machine is the target, and now runs in another power mode than was measured in."""
    wanted = table.environment.get("power_mode")
    if wanted is None or not targets_here((target,), machine.this_machine()):
        return
    found = power.read_state().power_mode
    if found != wanted:
        raise StaleError(
            f"the latency table of {target.name} was measured in power mode {wanted}, and now it is "
            f"{found or 'unknown'}: set it back, or run `mess-compile profile --device {target.name}`"
        )
