"""The step `bench`: a bundle measured on labelled images, beside the baseline."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mess_compile.data.dataset import Data, DataSet, open_dataset, survey_labels
from mess_compile.engines.prepare import engine_files, graphs_of_recipe
from mess_compile.latency.table import LatencyTable, check_table_current, read_latency_table
from mess_compile.network import GraphSet, verify_graph_set
from mess_compile.planned_step import PlannedStep
from mess_compile.reporter import SILENT, Reporter
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.bundle import archive
from mess_compile.runtime.bundle.manifest import HELD_OUT, BundlePlan
from mess_compile.runtime.bundle.plan_choice import first_that_opens, matching_plans
from mess_compile.runtime.cascade.cascade import load
from mess_compile.search.groups import ENVIRONMENT_KEY, grouped
from mess_compile.search.hold_out import tuning_rows
from mess_compile.steps import dry_run
from mess_compile.steps.bundle import tuning_statistics
from mess_compile.steps.taught import refuse_taught
from mess_compile.targets import Target, find_target, refuse_unless_here
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


@dataclass(frozen=True)
class _Comparison:
    """What a plan is compared with: latencies and graphs of the workspace, and the ids of its tuning images."""

    table: LatencyTable
    graph_set: GraphSet
    tuned_on: frozenset[str]


@dataclass(frozen=True)
class PlannedBench:
    """A bench whose inputs are checked; `comparison` is None for the one until a deadline, which has none."""

    workspace: Workspace
    bundle: Path
    options: BenchOptions
    folder: DataSet
    plan: BundlePlan
    target: Target
    deadline_ms: float | None
    comparison: _Comparison | None

    @property
    def steps(self) -> tuple[PlannedStep, ...]:
        """What it does, for `--dry-run`."""
        images, passes, plan = len(self.folder.items), self.options.passes, self.plan
        if self.comparison is None:
            assert self.deadline_ms is not None, "a bench has a deadline or a comparison"
            path_ms = plan.upload_mean_ms + sum(cost.mean_ms for cost in plan.costs) + plan.costs[-1].report_mean_ms
            return (dry_run.of_deadline(images, passes, self.bundle, self.deadline_ms, path_ms),)
        table, graph_set = self.comparison.table, self.comparison.graph_set
        result, plan_ms = self.workspace.bench(plan.target), plan.predicted.latency_ms
        return (dry_run.of_bench(graph_set, table, plan_ms, images, passes, self.bundle, result),)


def plan_bench(
    workspace: Workspace,
    bundle: Path,
    options: BenchOptions = BenchOptions(),
    deadline_ms: float | None = None,
) -> PlannedBench:
    """Check everything that `bench` needs, or `bench_deadline`, before anything is measured.

    Raises InputError, BundleError, EngineError and StaleError.
    """
    if options.passes < 1:
        raise InputError(f"passes is {options.passes}: at least 1 is needed")
    folder = open_dataset(workspace.data_folder(options.data), options.split)
    refuse_taught(folder)
    manifest = archive.read_manifest(bundle)
    plan, library = first_that_opens(matching_plans(manifest, options.target, None))
    library.close()
    target = find_target(plan.target, workspace.root)
    refuse_unless_here(target, workspace.root)
    comparison = None if deadline_ms is not None else _comparison(workspace, plan, manifest.network.identity)
    return PlannedBench(workspace, bundle, options, folder, plan, target, deadline_ms, comparison)


def _comparison(workspace: Workspace, plan: BundlePlan, network: str) -> _Comparison:
    table = read_latency_table(workspace.latency(plan.target))
    graph_set = graphs_of_recipe(workspace, plan.precision, plan.target)
    verify_graph_set(graph_set)
    check_table_current(table, graph_set)
    known = None
    if network == graph_set.candidate.identity:  # otherwise `bench` refuses the bundle
        tuning = workspace.tuning_statistics(plan.predicted.split, plan.precision, plan.tuned_by)
        known = tuning_statistics(table, plan.target, plan.sources, tuning)
    if known is None:
        return _Comparison(table, graph_set, frozenset())
    groups = grouped(known, plan.environment.get(ENVIRONMENT_KEY)).group
    rows = tuning_rows(groups, plan.environment.get(HELD_OUT))
    return _Comparison(table, graph_set, frozenset(known.image_id[row] for row in rows))


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

    planned = plan_bench(workspace, bundle, options)
    plan, compared, progress = planned.plan, planned.comparison, reporter.progress
    assert compared is not None, "only a bench until a deadline has no comparison"
    _report_data(planned.folder, reporter)
    with load(bundle, plan.name) as cascade:
        (engines,) = engine_files(workspace, planned.target, (plan.precision.partition("-")[0],), None, None, progress)
        found = run.bench(cascade, engines, compared.table, planned.folder, compared.tuned_on, options.passes, progress)
    with suppress(OSError):  # a workspace that cannot be written is measured all the same
        write_bench(workspace.bench(plan.target), found, plan)
    return found


def bench_deadline(
    workspace: Workspace,
    bundle: Path,
    deadline_ms: float,
    options: BenchOptions = BenchOptions(),
    reporter: Reporter = SILENT,
) -> DeadlineBench:
    """Refine every image of a labelled split with a bundle until a deadline. Notes as those of `bench`."""
    from mess_compile.bench import run

    planned = plan_bench(workspace, bundle, options, deadline_ms)
    _report_data(planned.folder, reporter)
    with load(bundle, planned.plan.name) as cascade:
        return run.bench_deadline(cascade, planned.folder, deadline_ms, options.passes, reporter.progress)


def _report_data(folder: DataSet, reporter: Reporter) -> None:
    for warning in folder.notes:
        reporter.warn(warning)
    survey_labels(folder).report(reporter)
