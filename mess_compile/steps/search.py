"""The step `search`: from latency table and exit statistics to plans."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mess_compile.engines.prepare import graphs_of_recipe
from mess_compile.evaluate.policies import FITTED_POLICIES, with_policies, with_rows_of
from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.latency.table import LatencyTable, check_table_current, read_latency_table
from mess_compile.reporter import SILENT, Reporter
from mess_compile.runtime.base.errors import InputError, RequirementError, StaleError, did_you_mean
from mess_compile.runtime.base.policy import AGREEMENT, PLAIN
from mess_compile.runtime.machine import machine, power
from mess_compile.search.deadline import Clock
from mess_compile.search.plan import FRONT_BY, SearchResult, read_result, source_of, write_result
from mess_compile.search.requirement import Requirement
from mess_compile.steps.device_choice import target_of
from mess_compile.steps.evaluate import current_statistics
from mess_compile.targets import Target, targets_here
from mess_compile.workspace import Workspace

if TYPE_CHECKING:
    from mess_compile.bundle.shared_graphs import SharedGraphs
    from mess_compile.search.explain import Explanation
    from mess_compile.search.hold_out import HoldOutSplit
    from mess_compile.search.metrics import Evidence

FASTEST = Requirement()
"""No bounds."""


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    `precisions` restrict it to these (None: all that were profiled), `front_by` names the axes of the front,
    `time_limit_s` ends it early. With `confidence` (such as 0.95) the plan is certified on sequences drawn by `seed`.
    `output` is the plan's file, for one device. `hold_out` is the share of images that the plan is judged by and not
    chosen on: None for a third where there are enough, 0 for none. With `safety` (such as 0.9) it is the fastest plan
    that keeps the bounds on new images with this probability. `group_by` is the pattern that names groups of images,
    `none` for those of the evaluation, None for what the workspace remembers.
    `policies` say how counts become decisions.
    """

    precisions: tuple[str, ...] | None = None
    front_by: tuple[str, ...] = FRONT_BY
    time_limit_s: float | None = None
    confidence: float | None = None
    seed: int = 0
    output: Path | None = None
    hold_out: Fraction | None = None
    safety: float | None = None
    group_by: str | None = None
    policies: tuple[str, ...] = (PLAIN,)


def search(
    workspace: Workspace,
    devices: Sequence[str] = (),
    split: str | None = None,
    requirement: Requirement = FASTEST,
    options: SearchOptions = SearchOptions(),
    reporter: Reporter = SILENT,
) -> tuple[SearchResult, ...]:
    """Find the best plan for each device (none: the one profiled last), and write all plans or none.

    Evaluates first when statistics are stale. Ctrl-C ends the search with the best plan so far, and skips the rest of
    the cross-validation.
    """
    return tuple(_found(workspace, devices, split, requirement, options, reporter)[0])


def search_and_explain(
    workspace: Workspace,
    devices: Sequence[str] = (),
    split: str | None = None,
    requirement: Requirement = FASTEST,
    options: SearchOptions = SearchOptions(),
    reporter: Reporter = SILENT,
) -> tuple[tuple[SearchResult, Explanation], ...]:
    """As `search`, and explain each plan.

    Explanations compare optima: with a time limit or a confidence in `options` the plan may be another one.
    """
    from mess_compile.search.explain import explain
    from mess_compile.search.solver import search_recipes

    results, evidences = _found(workspace, devices, split, requirement, options, reporter)
    find = partial(search_recipes, front_by=(), cache_folder=workspace.searches)
    otherwise = partial(search_recipes, front_by=())
    progress = partial(reporter.progress, "explain")
    return tuple(
        (result, explain(each, requirement, result.plan, find, otherwise, progress))
        for result, each in zip(results, evidences, strict=True)
    )


def _found(
    workspace: Workspace,
    devices: Sequence[str],
    split: str | None,
    requirement: Requirement,
    options: SearchOptions,
    reporter: Reporter,
) -> tuple[list[SearchResult], list[Sequence[Evidence]]]:
    """For each device the result, and the evidence it was found from."""
    from mess_compile.search.class_floors import refuse_unlabelled
    from mess_compile.search.display import what_would_cut
    from mess_compile.search.objectives import promises_of

    targets = [target_of(workspace, device) for device in dict.fromkeys(devices or (None,))]
    _refuse_to_overwrite(options.output, len(targets))
    clock = Clock(math.inf if options.time_limit_s is None else options.time_limit_s)
    pattern = _pattern(workspace, options)
    as_recorded = {t.name: _evidences(workspace, t, split, options, reporter) for t in targets}
    whole = {name: _grouped(each, pattern, reporter) for name, each in as_recorded.items()}
    parts = {
        name: _with_policies(_split(each, options), requirement, options, reporter) for name, each in whole.items()
    }
    evidences = {name: part.chosen for name, part in parts.items()}
    for each in evidences.values():
        refuse_unlabelled(each[0].statistics, requirement.max_class_err)
    results = []
    for name, each in evidences.items():
        try:
            found = _searched(each, requirement, options, workspace.searches, reporter, clock, pattern)
            plan = replace(found.plan, promises=promises_of(requirement, found.plan), group_by=pattern)
            found = replace(found, plan=plan)
            if options.safety is not None:
                found = _safest(each, found, requirement, options, workspace.searches, reporter)
            results.append(found)
        except RequirementError as error:
            raise RequirementError(f"{name}: {error}" if len(evidences) > 1 else str(error)) from error
    results = [part.evaluated(result) for part, result in zip(parts.values(), results, strict=True)]
    recorded = list(as_recorded.values())
    results = [
        replace(result, what_would_cut=what_would_cut(result, requirement, len(each[0].table.failed)))
        if result.plan.is_whole
        else result
        for result, each in zip(results, evidences.values(), strict=True)
    ]
    results = [_with_sources(result, each) for result, each in zip(results, recorded, strict=True)]
    _write(workspace, results, options.output)
    if options.confidence is None and options.safety is None:
        results = list(_expected(list(parts.values()), results, requirement, options, workspace.searches, reporter))
        _write(workspace, results, options.output)
    workspace.remember_groups(pattern)
    return results, list(evidences.values())


def _pattern(workspace: Workspace, options: SearchOptions) -> str | None:
    """What names groups of images: the pattern given, or the one remembered."""
    from mess_compile.search.groups import NO_PATTERN, checked_pattern

    pattern = workspace.memory().group_by if options.group_by is None else options.group_by
    return None if pattern in (None, NO_PATTERN) else checked_pattern(pattern)


def _grouped(evidences: Sequence[Evidence], pattern: str | None, reporter: Reporter) -> list[Evidence]:
    """The evidence with the groups that the pattern names."""
    from mess_compile.search.groups import grouped, unmatched

    if pattern is None:
        return list(evidences)
    found = [replace(each, statistics=grouped(each.statistics, pattern)) for each in evidences]
    alone = unmatched(found[0].statistics, pattern)
    if alone:
        reporter.note(f"--group-by {pattern!r} does not match {alone} images: each is a group of its own")
    return found


def _with_sources(result: SearchResult, evidences: Sequence[Evidence]) -> SearchResult:
    """The result with the hashes of the statistics as they were recorded: a search may name other groups."""
    known = {each.graph_set.recipe: each.statistics_sha256 for each in evidences}
    plan = replace(result.plan, statistics_sha256=known[result.plan.precision])
    front = tuple(replace(each, statistics_sha256=known[each.precision]) for each in result.front)
    return replace(result, plan=plan, front=front)


def _split(evidences: Sequence[Evidence], options: SearchOptions) -> HoldOutSplit:
    """The images to choose by and those to judge by; `--confidence` splits the images itself."""
    from mess_compile.search import hold_out

    if options.safety is not None and options.hold_out is None:
        return hold_out.HoldOutSplit(evidences, evidences, without="--safety chooses by five folds of all images")
    if options.confidence is None:
        return hold_out.split_images(evidences, options.hold_out)
    return hold_out.HoldOutSplit(evidences, evidences, without="--confidence tests on images of its own")


def _refuse_to_overwrite(output: Path | None, devices: int) -> None:
    """Raises InputError when one file is given for several devices, or a file that is not a plan exists there."""
    if output is None:
        return
    if devices > 1:
        raise InputError(f"{output} holds the plan of one device, and {devices} are given: drop -o")
    if output.exists():
        try:
            read_result(output)
        except InputError as error:
            raise InputError(
                f"refusing to overwrite {output}: not a plan; name another file, or move it away"
            ) from error


def _write(workspace: Workspace, results: Sequence[SearchResult], output: Path | None) -> None:
    for result in results:
        write_result(output or workspace.plan(result.plan.device), result)
    first = results[0].plan
    if source_of(first) == "measured":
        workspace.remember(device=first.device)


def _searched(
    evidences: Sequence[Evidence],
    requirement: Requirement,
    options: SearchOptions,
    cache: Path,
    reporter: Reporter,
    clock: Clock,
    pattern: str | None,
) -> SearchResult:
    from mess_compile.search.guarantees import certify
    from mess_compile.search.safety import refuse_unsafe
    from mess_compile.search.solver import search_recipes

    if options.safety is not None:
        refuse_unsafe(evidences, requirement)
    progress = partial(reporter.progress, "search")
    if options.confidence is None:
        return search_recipes(evidences, requirement, progress, options.front_by, cache, clock)
    return certify(evidences, requirement, options.confidence, options.seed, progress, options.front_by, cache, pattern)


def _safest(
    evidences: Sequence[Evidence],
    result: SearchResult,
    requirement: Requirement,
    options: SearchOptions,
    cache: Path,
    reporter: Reporter,
) -> SearchResult:
    """The result with the plan that `--safety` takes, and what to expect of it."""
    from mess_compile.search.guarantees import fold_searches
    from mess_compile.search.safety import safest

    assert options.safety is not None, "only with --safety"
    progress = partial(reporter.progress, "cross-validation")
    searches = fold_searches(evidences, requirement, progress=progress, cache_folder=cache / "folds")
    return safest(evidences, requirement, result, searches, options.safety)


def _expected(
    parts: Sequence[HoldOutSplit],
    results: Sequence[SearchResult],
    requirement: Requirement,
    options: SearchOptions,
    cache: Path,
    reporter: Reporter,
) -> Iterator[SearchResult]:
    """The results with what to expect on new images, by cross-validation and a bootstrap, or the reason why there is no
    estimate."""
    from mess_compile.search.guarantees import fold_searches, optimism_of
    from mess_compile.search.new_images import with_expected, with_held_out

    progress, without = partial(reporter.progress, "cross-validation"), ""
    if options.time_limit_s is not None:
        without = "no cross-validation under --time-limit"
    for part, result in zip(parts, results, strict=True):
        if not without and result.certificate.gap > 0:
            without = "no cross-validation: the search was stopped"
        try:
            if not without:
                searches = fold_searches(part.chosen, requirement, progress=progress, cache_folder=cache / "folds")
                found = replace(result, plan=replace(result.plan, optimism=optimism_of(part.chosen, searches)))
                yield with_expected(found, part, requirement, searches)
                continue
            reason = without
        except RequirementError as error:
            reason = str(error)
        except KeyboardInterrupt:
            reason = without = "the cross-validation was stopped"
        yield with_held_out(replace(result, without_optimism=reason, without_expected=reason), part)


def shared(workspace: Workspace, results: Sequence[SearchResult]) -> SharedGraphs:
    """The graphs and weights that the plans of several devices share."""
    from mess_compile.bundle import shared_graphs

    chosen = [result.plan for result in results]
    return shared_graphs.shared_graphs(
        [(graphs_of_recipe(workspace, plan.precision, plan.device), plan) for plan in chosen]
    )


def _evidences(
    workspace: Workspace, target: Target, split: str | None, options: SearchOptions, reporter: Reporter
) -> list[Evidence]:
    """The evidence of each recipe."""
    from mess_compile.search.metrics import Evidence

    precisions = options.precisions
    table = read_latency_table(workspace.latency(target.name))
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
        check_table_current(table, graph_set)
        found = current_statistics(workspace, graph_set, target.name, split, reporter)
        evidences.append(Evidence(graph_set, table, found))
    return evidences


def _with_policies(
    part: HoldOutSplit, requirement: Requirement, options: SearchOptions, reporter: Reporter
) -> HoldOutSplit:
    """The images with the rows of the policies that the options name.

    They are fitted to the images that the plan is chosen by. `--confidence` tests on some of these, so that it takes
    only policies that nothing is fitted for.
    """
    fitted = [name for name in options.policies if name in FITTED_POLICIES]
    if fitted and options.confidence is not None:
        raise InputError(
            f"--policy {','.join(fitted)} is fitted to images that --confidence certifies on: drop --confidence, or "
            f"search with --policy {PLAIN},{AGREEMENT}"
        )
    policies = options.policies if requirement.setting == "input-dependent" else (PLAIN,)
    made = [with_policies(evidence.statistics, policies) for evidence in part.chosen]
    for each in made:
        _note_without(each, policies, reporter)
    chosen = [replace(one, statistics=each) for one, each in zip(part.chosen, made, strict=True)]
    if not part.held:
        return replace(part, chosen=chosen, whole=chosen)
    held, whole = (
        [replace(one, statistics=with_rows_of(one.statistics, each)) for one, each in zip(images, made, strict=True)]
        for images in (part.held, part.whole)
    )
    return replace(part, chosen=chosen, whole=whole, held=held)


def _note_without(made: ExitStatistics, wanted: Sequence[str], reporter: Reporter) -> None:
    without = [name for name in wanted if name not in (PLAIN, *(row.policy for row in made.policy_rows))]
    if without:
        reporter.note(
            f"nothing to learn for the policy {', '.join(without)} from these {made.images} images: they are too "
            "alike, or too few; the thresholds decide"
        )


def _check_power_mode(table: LatencyTable, target: Target) -> None:
    """Raises StaleError when this machine is the target, and its power mode is not the one it was measured in."""
    wanted = table.environment.get("power_mode")
    if wanted is None or not targets_here((target,), machine.this_machine()):
        return
    found = power.read_state().power_mode
    if found != wanted:
        raise StaleError(
            f"the latency table of {target.name} was measured in power mode {wanted}, and the mode is now "
            f"{found or 'unknown'}: set it back, or run `mess-compile profile --device {target.name}`"
        )
