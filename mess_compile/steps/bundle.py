"""Bundles, as a step of the Python API: from plans to the file that a device runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from os.path import realpath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mess_compile import __version__, files
from mess_compile.data import scenes
from mess_compile.engines.prepare import engine_files, graphs_of_recipe
from mess_compile.evaluate import statistics
from mess_compile.latency.table import LatencyTable, check_table_current, read_latency_table, table_content_sha256
from mess_compile.network import GraphSet
from mess_compile.planned_step import PlannedStep
from mess_compile.reporter import SILENT, Progress, Reporter
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.bundle.manifest import EngineFile, Manifest
from mess_compile.runtime.engines.engine import open_library
from mess_compile.runtime.serve.versions import RELEASE
from mess_compile.search.plan import Plan, check_plan_current, check_sources_current, read_result
from mess_compile.steps.device_choice import target_of
from mess_compile.targets import Target, find_target
from mess_compile.workspace import Workspace

if TYPE_CHECKING:
    from mess_compile.bundle.write import Part

SCENES = 16


@dataclass(frozen=True)
class BundleOptions:
    """How a bundle is written: what becomes of frames of another size, an OpenSSH key to sign with, whether engines
    travel along, where to write its plan as one ONNX file, and a number by which `ship` tells an older one."""

    resize: str = "stretch"
    key: Path | None = None
    engines: bool = False
    single_file: Path | None = None
    release: int | None = None


@dataclass(frozen=True)
class _PlannedPart:
    """A plan of a bundle, its target, and what it was made from (statistics None: deleted)."""

    plan: Plan
    target: Target
    graph_set: GraphSet
    table: LatencyTable
    statistics: statistics.ExitStatistics | None


@dataclass(frozen=True)
class PlannedBundle:
    """A bundle whose plans are checked against the workspace, and that may be written to `path`."""

    workspace: Workspace
    sources: tuple[Path, ...]
    path: Path
    options: BundleOptions
    parts: tuple[_PlannedPart, ...]

    @property
    def steps(self) -> tuple[PlannedStep, ...]:
        """What it does, for `--dry-run`."""
        graphs = {
            (graph.name, part.graph_set.identity): part.graph_set.spec(graph.name)
            for part in self.parts
            for graph in part.plan.graphs
        }
        size = sum(spec.bytes for spec in graphs.values()) / 2**20
        what = (
            f"bundle the plans {', '.join(map(str, self.sources))}: {len(graphs)} graphs with {size:.2f} MiB of weights"
        )
        replaced = [f"{self.path} exists, and would be replaced"] if self.path.exists() else []
        notes = (*replaced, *(["missing engines would be built first"] if self.options.engines else []))
        single = self.options.single_file
        writes = (str(self.path), *([] if single is None else [str(single)]))
        return (PlannedStep("bundle", what, writes, None, "no earlier timing", notes),)


def plan_bundle(
    workspace: Workspace,
    plan_files: Sequence[Path | str] | None = None,
    output: Path | None = None,
    options: BundleOptions = BundleOptions(),
) -> PlannedBundle:
    """Check everything that `bundle` needs before anything is written. Raises InputError and StaleError."""
    sources = [workspace.plan_named(plan) for plan in plan_files or ()]
    sources = sources or [workspace.plan(target_of(workspace, None).name)]
    chosen = [read_result(path).plan for path in sources]
    path = output or workspace.bundle(chosen[0].device)
    _check_outputs(sources, path, options.single_file)
    parts = tuple(_planned_part(workspace, plan) for plan in chosen)
    if options.engines:
        for part in parts:
            _refuse_without_engines(part.target)
    return PlannedBundle(workspace, tuple(sources), path, options, parts)


def _planned_part(workspace: Workspace, plan: Plan) -> _PlannedPart:
    """Raises StaleError when the plan was made from other graphs, latencies or statistics."""
    target = find_target(plan.device, workspace.root)
    graph_set = graphs_of_recipe(workspace, plan.precision, plan.device)
    check_plan_current(plan, graph_set)
    table = read_latency_table(workspace.latency(plan.device))
    sources = {"latency table": plan.table_sha256, "statistics": plan.statistics_sha256}
    tuning = workspace.tuning_statistics(plan.predicted.split, plan.precision, plan.tuned_by)
    known = tuning_statistics(table, plan.device, sources, tuning)
    check_table_current(table, graph_set)
    return _PlannedPart(plan, target, graph_set, table, known)


def bundle(
    workspace: Workspace,
    plan_files: Sequence[Path | str] | None = None,
    output: Path | None = None,
    options: BundleOptions = BundleOptions(),
    reporter: Reporter = SILENT,
) -> tuple[Path, Manifest]:
    """Write plans (files or devices; by default that of the device profiled last) as a bundle; the first is preferred.

    Raises InputError rather than overwrite a file of another kind.
    """
    from mess_compile.bundle.write import write_bundle

    planned = plan_bundle(workspace, plan_files, output, options)
    released = {} if options.release is None else {RELEASE: str(options.release)}
    with TemporaryDirectory(prefix="mess-") as folder:
        parts = [
            _part(planned, part, Path(folder, str(number)), reporter.progress)
            for number, part in enumerate(planned.parts)
        ]
        first = parts[0].graph_set
        manifest = write_bundle(
            planned.path,
            parts,
            [scene.frame for scene in scenes.by_difficulty(first.candidate.input_hw, SCENES)],
            {"mess_compile": __version__, "golden_frames": "generated street scenes", **released},
            options.resize,
            options.key,
            reporter.progress,
        )
    if options.single_file is not None:
        from mess_compile.bundle.single_file import write_single_file

        write_single_file(planned.path, manifest.plans[0].name, options.single_file)
    return planned.path, manifest


def _part(planned: PlannedBundle, part: _PlannedPart, folder: Path, progress: Progress) -> Part:
    """The bundle's part for a plan; graphs rewritten for its target go to `folder`.

    Missing statistics leave its histograms empty.
    """
    from mess_compile.bundle.stage_costs import device_costs
    from mess_compile.bundle.write import Part

    plan, target, graph_set = part.plan, part.target, part.graph_set
    folder.mkdir()
    forms = _forms(graph_set, plan, target, folder)
    engines = _engines_to_take(planned.workspace, target, plan, progress) if planned.options.engines else {}
    costs = device_costs(plan, graph_set, part.table, part.statistics)
    return Part(graph_set, plan, costs, target.device, forms, engines)


def _check_outputs(sources: Sequence[Path], bundle: Path, single_file: Path | None) -> None:
    from mess_compile.bundle.single_file import is_single_file
    from mess_compile.runtime.bundle.archive import is_bundle

    if realpath(bundle) in map(realpath, sources):
        raise InputError(f"{bundle} is the plan: name another file for the bundle (-o FILE)")
    if bundle.exists() and not is_bundle(bundle):
        raise InputError(f"refusing to overwrite {bundle}: not a bundle; name another file (-o FILE), or move it away")
    if single_file is None:
        return
    if realpath(single_file) == realpath(bundle):
        raise InputError(f"{single_file} is also the bundle: name another file for --single-file")
    if single_file.exists() and not is_single_file(single_file):
        raise InputError(
            f"refusing to overwrite {single_file}: not written by --single-file; name another file, or move it away"
        )


def _engines_to_take(workspace: Workspace, target: Target, plan: Plan, progress: Progress) -> dict[EngineFile, Path]:
    """The plan's engines, and for classic TensorRT the timing cache of their builds."""
    from mess_compile.engines import build
    from mess_compile.runtime.engines.tensorrt_build import timing_cache_name

    (made,) = engine_files(workspace, target, (plan.precision.partition("-")[0],), None, None, progress)
    version = build.library_version(target)
    name, capability = _gpu(target)

    def engine(file: str, graph: str | None, precision: str) -> EngineFile:
        return EngineFile(f"engines/{file}", graph, precision, target.library, version, name, capability)

    found = {
        engine(f"{graph.name}.engine", f"graphs/{graph.name}.onnx", graph.precision): made.path(graph.name)
        for graph in plan.graphs
    }
    timing = workspace.engines(target.name, made.graph_set.recipe).parent / timing_cache_name(version)
    return found | ({engine(timing.name, None, ""): timing} if timing.is_file() else {})


def _refuse_without_engines(target: Target) -> None:
    if target.library.startswith("onnxruntime"):
        raise InputError(f"{target.name} runs on ONNX Runtime, which has no engines: drop --engines")


def _gpu(target: Target) -> tuple[str, tuple[int, int]]:
    """The GPU that engines are for: any of the target's capability, or for classic TensorRT the one here."""
    if target.library == "tensorrt_rtx" and target.compute_capability is not None:
        return "", target.compute_capability
    with closing(open_library(target.library)) as library:
        if library.builds_for is None:
            raise InputError(f"{target.library} here builds no engines for {target.name}")
        return library.builds_for


def _forms(graph_set: GraphSet, plan: Plan, target: Target, folder: Path) -> dict[str, Path]:
    """Graphs that the target's parser rejects as they are, rewritten in `folder` with a store of their weights."""
    if target.library.startswith("onnxruntime"):
        return {}
    from mess_compile.engines import build
    from mess_compile.graph.store import move_weights_out

    parser, forms = build.parser_of(target), {}
    for graph in plan.graphs:
        path = folder / graph_set.path(graph.name).name
        if build.prepare_graph(graph_set.path(graph.name), graph.precision, parser, path):
            move_weights_out(path)
            forms[graph.name] = path
    return forms


def tuning_statistics(
    table: LatencyTable, device: str, known: Mapping[str, str], tuning: Path
) -> statistics.ExitStatistics | None:
    """The statistics that a plan was chosen on, None when they do not exist.

    Raises StaleError when their hash or that of the table is not among the plan's `known` sources.
    """
    files.recovered(tuning)
    found, read = {"latency table": table_content_sha256(table)}, None
    if tuning.is_dir():
        read = statistics.read_statistics(tuning)
        found["statistics"] = statistics.statistics_content_sha256(read)
    check_sources_current(device, known, found)
    return read
