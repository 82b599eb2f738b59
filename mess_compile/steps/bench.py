"""The step `bench`: a bundle measured on labelled images, beside the baseline."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mess_compile.data.dataset import Data, DataSet, open_dataset, survey_labels
from mess_compile.engines.prepare import engine_files, graphs_of_recipe
from mess_compile.evaluate import statistics
from mess_compile.latency.table import LatencyTable, check_current, read_latency_table
from mess_compile.network import GraphSet, verify_graph_set
from mess_compile.reporter import SILENT, Reporter
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.bundle import archive
from mess_compile.runtime.bundle.manifest import HELD_OUT, BundlePlan
from mess_compile.runtime.bundle.plan_choice import matching_plans
from mess_compile.runtime.cascade.cascade import load
from mess_compile.steps import dry_run
from mess_compile.steps.bundle import tuning_statistics
from mess_compile.steps.dry_run import PlannedStep
from mess_compile.targets import find_target, refuse_unless_here
from mess_compile.workspace import Workspace

if TYPE_CHECKING:
    from mess_compile.bench.run import Bench, DeadlineBench


@dataclass(frozen=True)
class BenchOptions:
    """Every image of `split` of `data` (None: the remembered folder) is measured `passes` times; `target` names one of
    several plans."""

    data: Data | None = None
    split: str = "val"
    passes: int = 3
    target: str | None = None


def bench(
    workspace: Workspace,
    bundle: Path,
    options: BenchOptions = BenchOptions(),
    reporter: Reporter = SILENT,
) -> Bench:
    """Measure a bundle made in this workspace on a labelled split, beside the baseline; kept for `report`.

    Notes say what is left out of the data, and what there is to know of their labels.
    """
    from mess_compile.bench import run
    from mess_compile.bench.result import write_bench
    from mess_compile.search.hold_out import tuning_rows

    folder = _opened(workspace, options, reporter)
    with load(bundle, options.target) as cascade:
        plan = cascade.plan
        device = find_target(plan.target, workspace.root)
        table = read_latency_table(workspace.latency(device.name))
        refuse_unless_here(device, workspace.root)
        graph_set = _benched_graphs(workspace, plan, table)
        known = None
        if cascade.manifest.network.identity == graph_set.candidate.identity:  # else `bench` refuses the bundle
            known = _tuning_of_bundle(workspace, plan, table)
        rows = tuning_rows(known.group, plan.environment.get(HELD_OUT)) if known else ()
        tuned_on = frozenset(known.image_id[row] for row in rows) if known else frozenset()
        (engines,) = engine_files(workspace, device, (plan.precision.partition("-")[0],), None, None, reporter.progress)
        found = run.bench(cascade, engines, table, folder, tuned_on, options.passes, reporter.progress)
        with suppress(OSError):  # a workspace that cannot be written is measured all the same
            write_bench(workspace.bench(plan.target), found, plan)
        return found


def _opened(workspace: Workspace, options: BenchOptions, reporter: Reporter) -> DataSet:
    folder = open_dataset(workspace.data_folder(options.data), options.split)
    for warning in folder.notes:
        reporter.warn(warning)
    survey_labels(folder).report(reporter)
    return folder


def plan_bench(
    workspace: Workspace,
    bundle: Path,
    options: BenchOptions = BenchOptions(),
    deadline_ms: float | None = None,
) -> tuple[PlannedStep, ...]:
    """What `bench` would do, or `bench_deadline`. Raises InputError, BundleError and StaleError where they would."""
    passes = options.passes
    if passes < 1:
        raise InputError(f"passes is {passes}: at least 1 is needed")
    folder = open_dataset(workspace.data_folder(options.data), options.split)
    manifest = archive.read_manifest(bundle)
    plan, *_ = matching_plans(manifest, options.target, None)
    device = find_target(plan.target, workspace.root)
    refuse_unless_here(device, workspace.root)
    if deadline_ms is not None:
        path_ms = plan.upload_mean_ms + sum(cost.mean_ms for cost in plan.costs) + plan.costs[-1].report_mean_ms
        return (dry_run.of_deadline(len(folder.items), passes, bundle, deadline_ms, path_ms),)
    table = read_latency_table(workspace.latency(device.name))
    graph_set = _benched_graphs(workspace, plan, table)
    if manifest.network.identity == graph_set.candidate.identity:
        _tuning_of_bundle(workspace, plan, table)
    result, plan_ms = workspace.bench(plan.target), plan.predicted.latency_ms
    return (dry_run.of_bench(graph_set, table, plan_ms, len(folder.items), passes, bundle, result),)


def _benched_graphs(workspace: Workspace, plan: BundlePlan, table: LatencyTable) -> GraphSet:
    graph_set = graphs_of_recipe(workspace, plan.precision, plan.target)
    verify_graph_set(graph_set)
    check_current(table, graph_set)  # now, rather than after minutes of measuring
    return graph_set


def _tuning_of_bundle(workspace: Workspace, plan: BundlePlan, table: LatencyTable) -> statistics.ExitStatistics | None:
    tuning = workspace.tuning_statistics(plan.predicted.split, plan.precision, plan.tuned_by)
    return tuning_statistics(table, plan.target, plan.sources, tuning)


def bench_deadline(
    workspace: Workspace,
    bundle: Path,
    deadline_ms: float,
    options: BenchOptions = BenchOptions(),
    reporter: Reporter = SILENT,
) -> DeadlineBench:
    """Refine every image of a labelled split with a bundle until a deadline. Notes as those of `bench`."""
    from mess_compile.bench import run

    folder = _opened(workspace, options, reporter)
    with load(bundle, options.target) as cascade:
        refuse_unless_here(find_target(cascade.plan.target, workspace.root), workspace.root)
        return run.bench_deadline(cascade, folder, deadline_ms, options.passes, reporter.progress)
