"""Collects a report from a workspace: every part that is there and current, and for the others what to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mess_compile import extras, files
from mess_compile.bench.result import read_bench
from mess_compile.data import scenes
from mess_compile.data.dataset import Sample, open_dataset, read_sample
from mess_compile.engines.prepare import graphs_of_recipe
from mess_compile.evaluate import statistics
from mess_compile.evaluate.diagnose import weak_final_exit
from mess_compile.evaluate.policies import with_rows
from mess_compile.latency.checks import known_warnings
from mess_compile.latency.table import LatencyTable, read_latency_table
from mess_compile.network import is_whole
from mess_compile.report import comparison, strips, views
from mess_compile.report.inspection import cells_of_heads
from mess_compile.report.model import Benched, Missing, Report, SearchFound, Strip, Strips
from mess_compile.report.provenance import provenance_of
from mess_compile.reporter import SILENT, Progress
from mess_compile.runtime.base.errors import InputError, MessError, StaleError
from mess_compile.runtime.base.policy import PolicyRow
from mess_compile.runtime.bundle import archive
from mess_compile.runtime.bundle.manifest import MANIFEST
from mess_compile.runtime.cascade.cascade import Cascade, load
from mess_compile.search.display import network_label
from mess_compile.search.hold_out import tuning_part
from mess_compile.search.metrics import Evidence
from mess_compile.search.plan import Plan, SearchResult, Stage, check_plan_current, check_sources_current, read_result
from mess_compile.targets import find_target
from mess_compile.workspace import Workspace

SCENES = 24
VOID = 255
_Part = TypeVar("_Part")
_NO_PLAN = Missing("there is no current plan: run `mess-compile search --max-err 1%`")


def report(
    workspace: Workspace, device: str | None = None, output: Path | None = None, progress: Progress = SILENT.progress
) -> tuple[Path, Report]:
    """Write the report of a device, by default the one profiled last; a part that is missing names what to run.

    Raises InputError where there is nothing to report, with the first command to run.
    """
    page = extras.report_module("report.page")
    name = workspace.memory().device if device is None else find_target(device, workspace.root).name
    if name is None:
        raise InputError(f"there is nothing to report yet: {_first_step(workspace)}")
    found = gathered(workspace, name, progress)
    if isinstance(found.search, Missing) and isinstance(found.costs, Missing):
        raise InputError(f"there is nothing to report of {name} yet: {found.costs.reason}")
    path = output or workspace.root / "report.html"
    _write(path, page.report_page(found))
    return path, found


def _first_step(workspace: Workspace) -> str:
    estimated = sorted(path.stem for path in workspace.latency("any").parent.glob("*.json"))
    if estimated and workspace.memory().device is None:
        return f"no device was profiled; name one that was estimated: `mess-compile report --device {estimated[0]}`"
    if (workspace.graphs / "index.json").is_file():
        return "no device was profiled; run `mess-compile profile --device cpu`"
    if any((workspace.candidate / name).is_file() for name in ("network.json", "network.onnx")):
        return "the network is not exported; run `mess-compile export`"
    return (
        "this workspace has no network; train one with `mess-compile train --data DIR`, give one early exits with "
        "`mess-compile attach MODEL.onnx --images DIR`, or see the whole flow with `mess-compile demo`"
    )


def compare(
    workspace: Workspace, things: Sequence[str], output: Path | None = None
) -> tuple[tuple[comparison.Compared, ...], Path | None]:
    """Compare plans of devices of this workspace, plan files or bundles; with `output` write a page, too."""
    found = tuple(one for thing in things for one in _compared(workspace, thing))
    if output is not None:
        _write(output, extras.report_module("report.page").compare_page(found))
    return found, output


def _write(path: Path, text: str) -> None:
    with files.replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _compared(workspace: Workspace, thing: str) -> tuple[comparison.Compared, ...]:
    path = Path(thing)
    if (path / MANIFEST).is_file() or archive.is_bundle(path):
        return comparison.of_bundle(thing, archive.read_manifest(path))
    result = read_result(workspace.plan_named(thing))
    return (comparison.of_result(thing, result, cells_of_heads(workspace)),)


def gathered(workspace: Workspace, device: str, progress: Progress) -> Report:
    """The report of a device."""
    result = _tried(lambda: read_result(workspace.plan(device)))
    table = _tried(lambda: read_latency_table(workspace.latency(device)))
    warnings = () if isinstance(table, Missing) else known_warnings(workspace, table)
    if isinstance(result, Missing):
        costs = table if isinstance(table, Missing) else views.costs_of(table, next(iter(table.recipes)), warnings)
        return Report(device, result, _NO_PLAN, costs, _NO_PLAN, _NO_PLAN, provenance_of(None, table), warnings)
    evidences, unseen = _evidences(workspace, result, table)
    chosen = evidences.get(result.plan.precision)
    return Report(
        device=device,
        search=SearchFound(result, views.plan_views(result, evidences), unseen),
        classes=views.classes_of(chosen) if chosen else unseen or _NO_PLAN,
        costs=table if isinstance(table, Missing) else views.costs_of(table, result.plan.precision, warnings),
        bench=_tried(partial(_benched, workspace, result.plan)),
        strips=_tried(partial(_strips, workspace, result.plan, chosen, progress)),
        provenance=provenance_of(result, table),
        notes=tuple(dict.fromkeys((*result.plan.doubts, *warnings, *_weakness(chosen)))),
    )


def _weakness(chosen: Evidence | None) -> tuple[str, ...]:
    weak = None if chosen is None else weak_final_exit(chosen.statistics)
    return () if weak is None else (weak.sentence,)


def _tried(find: Callable[[], _Part]) -> _Part | Missing:
    try:
        return find()
    except MessError as error:
        return Missing(str(error))


def _evidences(
    workspace: Workspace, result: SearchResult, table: LatencyTable | Missing
) -> tuple[dict[str, Evidence], Missing | None]:
    """The evidence of each recipe that the plans were searched with, as far as it is current; else why it is not."""
    if isinstance(table, Missing):
        return {}, table
    evidences, unseen = {}, None
    plans = (*result.front, result.plan)
    for plan in {plan.precision: plan for plan in plans}.values():
        alike = [each for each in plans if each.precision == plan.precision]
        rows = {(row.head, row.row): row for each in alike for row in each.policy_rows}
        found = _tried(partial(_evidence, workspace, plan, table, tuple(rows.values())))
        if isinstance(found, Missing):
            unseen = found
        else:
            evidences[plan.precision] = found
    return evidences, unseen


def _evidence(workspace: Workspace, plan: Plan, table: LatencyTable, rows: tuple[PolicyRow, ...]) -> Evidence:
    """The evidence of a plan, with all these policy rows. Raises StaleError where it has changed since the search."""
    graph_set = graphs_of_recipe(workspace, plan.precision, plan.device)
    check_plan_current(plan, graph_set)
    tuning = workspace.tuning_statistics(plan.predicted.split, plan.precision, plan.tuned_by)
    evidence = Evidence(graph_set, table, statistics.read_statistics(tuning))
    sources = {"latency table": plan.table_sha256, "statistics": plan.statistics_sha256}
    found = {"latency table": evidence.table_sha256, "statistics": evidence.statistics_sha256}
    check_sources_current(plan.device, sources, found)
    tuned = tuning_part(evidence.statistics, plan.hold_out, plan.group_by)
    return replace(evidence, statistics=with_rows(tuned, rows))


def _benched(workspace: Workspace, plan: Plan) -> Benched:
    path = workspace.bench(plan.device)
    if not path.is_file():
        raise InputError(
            f"the bundle of {plan.device} was not measured yet: run `mess-compile bundle`, then "
            f"`mess-compile bench {workspace.bundle(plan.device).name} --data DIR`"
        )
    bench = read_bench(path)
    now = tuple((stage.head, stage.cut) for stage in plan.stages)
    remarks = []
    if tuple(zip(bench.heads, bench.cuts, strict=True)) != now:
        remarks.append(
            "These figures are of another plan than the one above: run `mess-compile bundle` and `bench` again."
        )
    if bench.found.tuned_on:
        remarks.append(f"The plan was chosen on {bench.found.tuned_on} of these images, which flatters its figures.")
    return Benched(bench, " ".join(remarks))


def _strips(workspace: Workspace, plan: Plan, evidence: Evidence | None, progress: Progress) -> Strips:
    bundle = workspace.bundle(plan.device)
    if not bundle.is_file():
        raise InputError(f"pictures need the bundle {bundle.name}: run `mess-compile bundle`")
    with load(bundle, plan.device) as cascade:
        if [(s.head, s.row, s.cut) for s in cascade.plan.stages] != [(s.head, s.row, s.cut) for s in plan.stages]:
            raise StaleError(f"{bundle.name} is of another plan than the one chosen: run `mess-compile bundle`")
        source, samples = _extreme_samples(workspace, plan, evidence, cascade)
        drawn: list[Strip] = []
        for title, (sample, truth) in zip(strips.TITLES, samples, strict=False):
            drawn.append(strips.strip_of(cascade, title, sample.id, sample.frame, truth))
            progress("pictures", len(drawn), len(samples))
    return Strips(source, tuple(drawn))


def _extreme_samples(
    workspace: Workspace, plan: Plan, evidence: Evidence | None, cascade: Cascade
) -> tuple[str, list[tuple[Sample, NDArray[np.uint8] | None]]]:
    """The images of highest, median and lowest confidence at the first exit, with their true labels where there are
    any; generated ones where the data are gone."""
    first = plan.stages[0]
    if evidence is not None and workspace.memory().data is not None:
        known = evidence.statistics
        try:
            data = open_dataset(workspace.data_folder(None), known.split, None)
            items = {item.id: item for item in data.items}
            chosen = [known.image_id[index] for index in strips.extremes(_confidences(known, first))]
            samples = [read_sample(items[name], data.classes) for name in chosen]
            truths = [each.labels if (each.labels < VOID).any() else None for each in samples]
            whole = f"accuracy of the {network_label(first.head, plan.retrained)}"
            by = whole if is_whole(first.head) else "confidence of the first exit"
            return f"Images of {known.split}, by {by}.", list(zip(samples, truths, strict=True))
        except (InputError, KeyError):
            pass  # the data may have moved or changed since; generated scenes show the same cascade
    hw = cascade.manifest.network.input_hw
    drawn = scenes.by_difficulty(hw, SCENES)
    void = cascade.manifest.network.classes != scenes.SCENE_CLASSES.names
    confidences = [next(cascade.refine(scene.frame)).confidence or 0.0 for scene in drawn]
    return (
        f"Of {SCENES} generated street scenes, since the data are gone, by their confidence at the first stage"
        + (": the network was not trained on such images." if void else "."),
        [(drawn[index], None if void else drawn[index].labels) for index in strips.extremes(confidences)],
    )


def _confidences(known: statistics.ExitStatistics, stage: Stage) -> list[float]:
    """Of each image the confident cells at an exit, or the share of its pixels that a whole network labels right."""
    head = known.head_index(stage.head)
    if not is_whole(stage.head):
        return [float(n) for n in known.counts[:, head, stage.row]]
    right = known.intersection[:, head].sum(axis=1) / np.maximum(1, known.labelled.sum(axis=1))
    return [float(share) for share in right]


def content_of(found: Report) -> dict[str, Any]:
    """What `report --json` prints beside the path: the parts it has, what to run for the others, and warnings."""
    parts = {
        "plan": found.search,
        "classes": found.classes,
        "latencies": found.costs,
        "measured": found.bench,
        "pictures": found.strips,
    }
    missing = {name: part.reason for name, part in parts.items() if isinstance(part, Missing)}
    there = [name for name in parts if name not in missing]
    return {"device": found.device, "parts": there, "missing": missing, "notes": list(found.notes)}
