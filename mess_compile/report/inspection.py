"""What is in a backbone, a bundle or an artefact of the workspace: as JSON for programs, as tables for people."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mess_compile import extras
from mess_compile.backbone_names import BACKBONES
from mess_compile.evaluate import diagnose, statistics
from mess_compile.evaluate.policy_gates import PolicyGate, policy_gates
from mess_compile.latency.checks import known_warnings
from mess_compile.latency.table import LatencyTable, read_latency_table
from mess_compile.network import (
    BASELINE_ALONE,
    OWN,
    CandidateNetwork,
    GraphSet,
    head_grid,
    read_graph_set,
    segment_name,
)
from mess_compile.report.search_output import details
from mess_compile.runtime.base.errors import InputError, MessError, did_you_mean
from mess_compile.runtime.base.policy import is_learned, name_of_row
from mess_compile.runtime.bundle.archive import read_manifest
from mess_compile.runtime.bundle.manifest import MANIFEST, BundlePlan, Figures, against
from mess_compile.runtime.images.notebook import table_html, text_html
from mess_compile.runtime.machine.device_names import stored_name
from mess_compile.search.display import (
    NO_CELLS,
    baseline_label,
    exits_table,
    figures_table,
    needed_text,
    network_label,
    stage_text,
    top_of,
)
from mess_compile.search.explain import Explanation, Outcome
from mess_compile.search.hold_out import held_out_sentence, held_out_table
from mess_compile.search.plan import Plan, SearchResult, read_result, result_to_json
from mess_compile.workspace import Workspace

BACKBONE_HW, BACKBONE_EXITS, MODEL_EXITS = (512, 512), 6, 5
"""What is described unless given: the paper's size and exit points of a backbone, and the exits of `attach`."""
ARTEFACTS = ("graphs", "statistics", "latency", "plan")
FRONT_ROWS = 15
_CONCLUSIONS = {
    "gate": "a better exit rule would help more than better heads",
    "heads": "better heads would help more than a better exit rule",
    "both": "a better exit rule and better heads would help alike",
    "neither": "a better exit rule or better heads would bring little",
}


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Inspection:
    """`content` is what `--json` prints; `notes` are sentences that follow the tables, `warnings` come last."""

    content: dict[str, Any]
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        tables = (table_html(table.title, table.header, table.rows) for table in self.tables)
        return "".join(tables) + text_html(*self.notes, *(f"warning: {each}" for each in self.warnings))


def inspect(
    workspace: Workspace,
    thing: str,
    classes: int,
    hw: tuple[int, int] | None,
    exits: int | None,
    whole_front: bool = False,
) -> Inspection:
    """Describe a backbone or artefact of the workspace by name, a plan by file or device, a bundle or model by path.

    Of a long front a part is in the table, unless it is asked for `whole_front`. Raises InputError.
    """
    if thing in BACKBONES:
        return inspect_backbone(thing, classes, hw or BACKBONE_HW, exits or BACKBONE_EXITS)
    if thing == "graphs":
        return inspect_graphs(read_graph_set(workspace.graphs))
    if thing == "statistics":
        split = workspace.memory().split or "val"
        return inspect_statistics(statistics.read_statistics(workspace.statistics(split)))
    if thing in ("latency", "plan"):
        device = workspace.memory().device
        if device is None:
            raise InputError("no device was profiled in this workspace yet: run `mess-compile profile --device cpu`")
        if thing == "latency":
            table = read_latency_table(workspace.latency(device))
            return inspect_latency(table, known_warnings(workspace, table))
        return inspect_plan(read_result(workspace.plan(device)), whole_front, cells_of_heads(workspace))
    is_there = Path(thing).is_file() or Path(thing, MANIFEST).is_file()
    if thing.endswith(".json") or (not is_there and workspace.plan(stored_name(thing)).is_file()):
        return inspect_plan(read_result(workspace.plan_named(thing)), whole_front, cells_of_heads(workspace))
    if not is_there:
        near = did_you_mean(thing, (*BACKBONES, *ARTEFACTS))
        raise InputError(f"{thing!r} is no file{near}, and none of {', '.join((*BACKBONES, *ARTEFACTS))}")
    if thing.endswith(".onnx"):
        return inspect_model(Path(thing), exits or MODEL_EXITS, hw)
    return inspect_bundle(Path(thing))


def inspect_model(path: Path, exits: int, hw: tuple[int, int] | None) -> Inspection:
    """The places of a trained single-exit ONNX model where exits can attach; those that `exits` would take are marked.

    `hw` fixes an input of dynamic size. Raises InputError for a model that cannot be taken.
    """
    from mess_compile.attach.opened import open_network
    from mess_compile.attach.whole_form import early_frontiers
    from mess_compile.graph.exits_toml import PREPROCESSING
    from mess_compile.graph.frontiers import best_frontiers

    with tempfile.TemporaryDirectory(prefix="mess-") as folder:
        opened = open_network(path, PREPROCESSING["0-1"], Path(folder), None, hw)
    frontiers = opened.frontiers
    chosen = early_frontiers(opened, exits)
    places = sorted({*best_frontiers(frontiers), *chosen}, key=lambda each: each.position)
    content = {
        "input": asdict(opened.image),
        "output": asdict(opened.end.output),
        "logits": asdict(opened.end.logits),
        "closing": list(opened.end.closing),
        "classes": opened.end.classes,
        "gmacs": _gmacs(frontiers.macs),
        "places": [
            {
                "tensor": each.map.name,
                "shape": list(each.map.shape),
                "share": frontiers.share(each),
                "gmacs": _gmacs(each.macs),
                "carried": [asdict(tensor) for tensor in each.carried],
                "bytes": each.bytes,
                "chosen": each in chosen,
            }
            for each in places
        ],
    }
    rows = tuple(
        (
            "yes" if each in chosen else "",
            f"{frontiers.share(each):.0%}",
            each.map.name,
            " x ".join(map(str, each.map.shape[1:])),
            str(len(each.carried)),
            f"{each.bytes / 2**20:.2f}",
        )
        for each in places
    )
    title = f"places for exits in {path.name}, {_gmacs(frontiers.macs):.3f} GMACs with MatMul"
    header = ("--exits " + str(exits), "work done", "tensor", "map", "carried", "MiB alive")
    end = opened.end
    notes = (f"logits: {end.logits.name} {end.logits.shape}, then {' '.join(end.closing) or 'nothing'}",)
    return Inspection(content, (Table(title, header, rows),), notes)


def inspect_backbone(backbone: str, classes: int, hw: tuple[int, int], exits: int) -> Inspection:
    """Workloads of a backbone with the paper's head space: convolution MACs + 2 per BatchNorm element (facts: MESS)."""
    network = extras.torch_module("nets.network")
    blocks = network.place_exits(network.block_workloads(backbone, hw), exits)
    heads = [(number, config) for number in range(1, exits) for config in head_grid()]
    candidate = network.described(
        network.Architecture(
            backbone=backbone,
            classes=tuple(f"class{index}" for index in range(classes)),
            colours=((0, 0, 0),) * classes,
            input_hw=hw,
            exit_blocks=blocks,
            heads=network.with_final_head(heads, exits),
        )
    )
    return inspect_candidate(candidate)


def inspect_candidate(candidate: CandidateNetwork) -> Inspection:
    """Workload of every exit point, segment and head of a candidate network."""
    return Inspection(_workloads(candidate), _workload_tables(candidate))


def _gmacs(macs: int) -> float:
    return macs / 1e9


def _workloads(candidate: CandidateNetwork) -> dict[str, Any]:
    return {
        "backbone": candidate.backbone,
        "classes": len(candidate.classes),
        "input_hw": list(candidate.input_hw),
        "baseline": {"head": candidate.baseline, "gmacs": _gmacs(candidate.baseline_macs)},
        "exit_points": [
            asdict(point) | {"gmacs": _gmacs(point.macs), "frontier_bytes": _frontier_bytes(candidate, number)}
            for number, point in enumerate(candidate.exit_points, start=1)
        ],
        "segments": [
            {"name": segment_name(a, b), "gmacs": _gmacs(candidate.segment_macs(a, b))} for a, b in candidate.segments()
        ],
        "heads": [{"name": h.name, "exit_point": h.exit_point, "gmacs": _gmacs(h.macs)} for h in candidate.heads],
    }


def _frontier_bytes(candidate: CandidateNetwork, number: int) -> int:
    """The bytes of all tensors that are alive at an exit point."""
    return sum(tensor.bytes for tensor in candidate.frontier(number))


def _carried_cells(candidate: CandidateNetwork, number: int) -> tuple[str, str]:
    """What is carried past an exit point besides its map, and the size of all together."""
    names = ", ".join(f"{t.name} ({t.bytes / 1024:.0f} KiB)" for t in candidate.exit_point(number).carried)
    return f"{_frontier_bytes(candidate, number) / 1024:.0f}", names or "-"


def _workload_tables(candidate: CandidateNetwork) -> tuple[Table, ...]:
    total = candidate.exit_points[-1].macs or 1
    carries = any(point.carried for point in candidate.exit_points)
    points = tuple(
        (
            p.name,
            p.block,
            str(p.channels),
            f"{p.hw[0]}x{p.hw[1]}",
            f"{_gmacs(p.macs):.3f}",
            f"{p.macs / total:.1%}",
            *(_carried_cells(candidate, number) if carries else ()),
        )
        for number, p in enumerate(candidate.exit_points, start=1)
    )
    height, width = candidate.input_hw
    title = (
        f"{candidate.backbone}, {len(candidate.classes)} classes, {height}x{width}: "
        f"baseline {_gmacs(candidate.baseline_macs):.3f} GMACs"
    )
    heads = tuple((h.name, f"{_gmacs(h.macs):.4f}") for h in candidate.heads)
    columns = ("exit point", "block", "channels", "map", "GMACs", "of backbone")
    more = ("alive KiB", "carried besides the map") if carries else ()
    return (
        Table(title, (*columns, *more), points),
        Table(f"{len(heads)} heads", ("head", "GMACs"), heads),
    )


def inspect_graphs(graph_set: GraphSet) -> Inspection:
    """The graphs that export left: tensors, workload, weights."""
    graphs = [asdict(spec) for spec in graph_set.graphs.values()]
    content = _workloads(graph_set.candidate) | {"gate": asdict(graph_set.gate), "graphs": graphs}
    content["baseline_alone"] = _identified(graph_set.baseline_alone, gmacs=content["baseline"]["gmacs"])
    rows = tuple(
        (s.name, f"{_gmacs(s.macs):.4f}", f"{s.bytes / 2**20:.2f}", f"{s.workspace_bytes / 2**20:.2f}")
        for s in graph_set.graphs.values()
    )
    table = Table(f"{len(rows)} graphs", ("graph", "GMACs", "weights MiB", "activations MiB"), rows)
    return Inspection(content, (*_workload_tables(graph_set.candidate)[:1], table))


_LIMITS = {"gate": "exit rule", "heads": "heads", "both": "both", "neither": "neither"}


def inspect_statistics(found: statistics.ExitStatistics) -> Inspection:
    """Every head on its own: mIoU, its confident cells at the middle threshold, and what limits leaving there."""
    diagnosed = diagnose.diagnose(found)
    early = {one.head: one for one in diagnosed.heads}
    heads = [_head_content(found, head, early.get(head), diagnosed.max_errs_pp) for head in found.heads]
    verdicts = diagnose.limiting_factors(diagnosed)
    policies = policy_gates(found, diagnosed)
    alone = None if found.baseline_alone is None else statistics.head_miou(found, BASELINE_ALONE)
    weak = diagnose.weak_final_exit(found)
    content = {
        "split": found.split,
        "images": found.images,
        "truth": found.truth,
        "device": found.device,
        "library": found.library,
        "precision": found.precision,
        "threshold": found.gate.thresholds[_middle_row(found)],
        "tolerance_pp": diagnosed.tolerance_pp,
        "heads": heads,
        "policies": [asdict(one) for one in policies],
        "limits": [_verdict_content(verdict) for verdict in verdicts],
        "baseline_alone": _identified(found.baseline_alone, miou=alone),
        "weak_final": None if weak is None else asdict(weak),
    }
    title = (
        f"{found.images} images of {found.split}, {found.library} {found.precision} on {found.device}: "
        f"what search tunes on, not a test result{against(found.truth)}"
    )
    table = _statistics_table(title, heads, diagnosed.max_errs_pp)
    notes = (*_legend(found, diagnosed), *map(_verdict_sentence, verdicts)) if verdicts else ()
    if alone is not None:
        retrained = found.heads[-1].endswith(f".{OWN}")
        notes = (f"{network_label(BASELINE_ALONE, retrained)}: {alone:.2f} % mIoU", *notes)
    return Inspection(
        content, (table, *_policies_table(policies, diagnosed)), notes, () if weak is None else (weak.sentence,)
    )


def _policies_table(found: Sequence[PolicyGate], diagnosed: diagnose.Diagnosis) -> tuple[Table, ...]:
    """Each policy, as means over the early heads; none where only one was recorded."""
    rows = []
    for policy in dict.fromkeys(one.policy for one in found):
        own = [one for one in found if one.policy == policy]
        areas = [one.auroc for one in own if one.auroc is not None]
        shares = [sum(one.gate_share[index] for one in own) / len(own) for index in range(len(diagnosed.max_errs_pp))]
        area = f"{sum(areas) / len(areas):.2f}" if areas else "-"
        rows.append((policy, area, *(f"{share:.1%}" for share in shares)))
    if len(rows) < 2:
        return ()
    ideal = [
        sum(one.oracle_share[index] for one in diagnosed.heads) / len(diagnosed.heads)
        for index in range(len(diagnosed.max_errs_pp))
    ]
    rows.append(("ideal", "1.00", *(f"{share:.1%}" for share in ideal)))
    title = (
        "policies, mean over early heads (AUROC of pixel accuracy within a point of the last exit's; learned: out of "
        "fold)"
    )
    return (
        Table(title, ("", "AUROC", *(f"leave within {error:g} pp" for error in diagnosed.max_errs_pp)), tuple(rows)),
    )


def _identified(identity: str | None, **figures: float | None) -> dict[str, Any] | None:
    """What there is to say of the baseline trained alone, None without one."""
    return None if identity is None else {"identity": identity, **figures}


def _middle_row(found: statistics.ExitStatistics) -> int:
    return len(found.gate.thresholds) // 2


def _head_content(
    found: statistics.ExitStatistics, head: str, early: diagnose.HeadDiagnosis | None, errors: Sequence[float]
) -> dict[str, Any]:
    index = found.head_index(head)
    sure = float(found.counts[:, index, _middle_row(found)].mean()) / found.cells[index]
    content: dict[str, Any] = {"name": head, "miou": statistics.head_miou(found, head), "sure": sure}
    if early is None:
        names = ("coverage", "auroc", "auroc_threshold", "auroc_middle", "gate_share", "oracle_share", "oracle_miou")
        return content | dict.fromkeys(names)
    return content | {
        "coverage": early.coverage,
        "auroc": early.auroc,
        "auroc_threshold": None if early.auroc_row is None else found.gate.thresholds[early.auroc_row],
        "auroc_middle": early.auroc_middle,
        "gate_share": {f"{error:g}": share for error, share in zip(errors, early.gate_share, strict=True)},
        "oracle_share": {f"{error:g}": share for error, share in zip(errors, early.oracle_share, strict=True)},
        "oracle_miou": early.oracle_miou,
    }


def _verdict_content(verdict: diagnose.LimitingFactor) -> dict[str, Any]:
    return {
        "max_err_pp": verdict.max_err_pp,
        "gate_share": verdict.gate_share,
        "oracle_share": verdict.oracle_share,
        "limit": verdict.limit,
        "exits": [asdict(one) | {"limit": one.limit} for one in verdict.exits],
    }


def _statistics_table(title: str, heads: Sequence[dict[str, Any]], errors: Sequence[float]) -> Table:
    shares = [(f"{kind}_share", f"{error:g}") for error in errors for kind in ("gate", "oracle")]
    rows = tuple(
        (
            head["name"],
            f"{head['miou']:.2f}",
            f"{head['sure']:.0%}",
            _share(head["coverage"]),
            "-" if head["auroc"] is None else f"{head['auroc']:.2f}",
            *(_share((head[kind] or {}).get(error)) for kind, error in shares),
        )
        for head in heads
    )
    columns = tuple(f"{_RULES[kind]} {error}%" for kind, error in shares)
    return Table(title, ("head", "mIoU %", "confident", "coverage", "AUROC", *columns), rows)


_RULES = {"gate_share": "rule", "oracle_share": "ideal"}


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _legend(found: statistics.ExitStatistics, diagnosed: diagnose.Diagnosis) -> tuple[str, ...]:
    errors = " or ".join(f"{error:g}" for error in diagnosed.max_errs_pp)
    return (
        f"confident: the share of cells whose confidence reaches {found.gate.thresholds[_middle_row(found)]:g}",
        f"coverage: images on which the head is as good as {diagnosed.final}, to {diagnosed.tolerance_pp:g} pp of mIoU",
        "AUROC: how well confidence separates these from the others, at the best threshold; 0.5 is chance",
        f"rule: images that the exit rule with its best thresholds lets leave there, within {errors} pp of mIoU",
        "ideal: images that an ideal exit rule, which knows the labels, lets leave there (greedy: at least so many)",
    )


def _verdict_sentence(verdict: diagnose.LimitingFactor) -> str:
    exits = ", ".join(f"exit {one.exit_point} {_LIMITS[one.limit]}" for one in verdict.exits)
    return (
        f"at {verdict.max_err_pp:g}%, an ideal exit rule would let {verdict.oracle_share:.0%} of images leave at the "
        f"best head of an early exit (mean over exits), the exit rule lets {verdict.gate_share:.0%}: "
        f"{_CONCLUSIONS[verdict.limit]} (limited by: {exits})"
    )


def inspect_latency(table: LatencyTable, warnings: Sequence[str] = ()) -> Inspection:
    """Every entry of a latency table, and the warnings about it."""
    entries = [asdict(entry) for entry in table.entries.values()]
    content = {
        "device": table.device,
        "library": table.library,
        "library_version": table.library_version,
        "source": table.source,
        "environment": table.environment,
        "recipes": list(table.recipes),
        "entries": entries,
        "failed": [asdict(failure) for failure in table.failed.values()],
        "doubts": list(warnings),
    }
    rows = tuple(
        (
            e.graph,
            e.precision,
            f"{e.mean_ms:.3f}",
            f"{e.p50_ms:.3f}",
            f"{e.p95_ms:.3f}",
            f"{e.p99_ms:.3f}",
            str(e.runs),
            e.origin,
        )
        for e in table.entries.values()
    )
    title = (
        f"{table.device}: {table.library} {table.library_version}, {table.environment.get('cpu', 'unknown processor')}"
    )
    header = ("graph", "precision", "mean ms", "p50", "p95", "p99", "runs", "source")
    failed = tuple(f"{f.graph} in {f.precision} is in no plan: {f.error}" for f in table.failed.values())
    return Inspection(content, (Table(title, header, rows),), failed, tuple(warnings))


def cells_of_heads(workspace: Workspace) -> Mapping[str, int]:
    """The number of cells of every head's map, by its name; empty without graphs."""
    with suppress(MessError):
        candidate = read_graph_set(workspace.graphs).candidate
        return {head.name: math.prod(candidate.logits_hw(head)) for head in candidate.heads}
    return NO_CELLS


def inspect_plan(result: SearchResult, whole_front: bool = False, cells: Mapping[str, int] = NO_CELLS) -> Inspection:
    """The chosen plan with all that the search found out about it, and the front, fastest first."""
    plan, front = result.plan, result.front
    choice = inspect_choice(result, cells)
    chosen = next((i for i, p in enumerate(front) if (p.stages, p.precision) == (plan.stages, plan.precision)), None)
    indices = range(len(front)) if whole_front else _shown_of_front(len(front), chosen)
    left = len(front) - len(indices)
    less = (f"{left} of the front's {len(front)} plans are left out: `inspect plan --all` shows them, as does --json",)
    tables = (*choice.tables, _front_table(result, indices, chosen))
    return Inspection(result_to_json(result), tables, (*choice.notes, *(less if left else ())), tuple(plan.doubts))


def inspect_choice(result: SearchResult, cells: Mapping[str, int] = NO_CELLS) -> Inspection:
    """The chosen plan: its exits, its figures beside the baseline's, its operating points, and how it was found."""
    plan = result.plan
    header, exits = exits_table(plan, cells)
    title, columns, figures = figures_table(plan)
    tables = [
        Table(f"plan for {plan.device}, {plan.setting}, {plan.precision}", header, tuple(exits)),
        Table(title, columns, tuple(figures)),
    ]
    if plan.hold_out is not None:
        held, columns, figures = held_out_table(
            plan.hold_out, baseline_label(plan.baseline_name, plan.retrained), plan.truth
        )
        tables.append(Table(held, columns, tuple(figures)))
    asked = next((promise.limit for promise in plan.promises if promise.quantity == "err_pp"), None)
    notes = (held_out_sentence(result, asked), *details(result))
    return Inspection({}, (*tables, *points_tables(plan, cells)), notes)


def _shown_of_front(count: int, chosen: int | None) -> Sequence[int]:
    """Both ends, the chosen plan and its neighbours, and the others evenly."""
    if count <= FRONT_ROWS:
        return range(count)
    near = () if chosen is None else range(max(chosen - 1, 0), min(chosen + 2, count))
    spread = (round(i * (count - 1) / (FRONT_ROWS - len(near) - 1)) for i in range(FRONT_ROWS - len(near)))
    return sorted({*near, *spread})


def _front_table(result: SearchResult, indices: Sequence[int], chosen: int | None) -> Table:
    rows = tuple(
        (
            f"{index + 1} chosen" if index == chosen else str(index + 1),
            point.precision,
            f"{point.predicted.latency_ms:.3f}",
            f"{point.predicted.miou:.2f}",
            f"{point.predicted.gmacs:.3f}",
            f"{point.predicted.memory_bytes / 2**20:.1f}",
            _rates(point.predicted),
            " -> ".join(stage.head for stage in point.stages),
        )
        for index in indices
        for point in (result.front[index],)
    )
    title = f"front for {result.plan.device} by {', '.join(result.front_by)}, {result.plan.predicted.source} latency"
    title += against(result.plan.truth)
    header = ("plan", "precision", "latency ms", "mIoU %", "GMACs", "memory MiB", "exits", "heads")
    return Table(title, header, rows)


def _rates(figures: Figures) -> str:
    return " ".join(f"{rate:.0%}" for rate in figures.exit_rates)


def points_tables(plan: Plan, cells: Mapping[str, int] = NO_CELLS) -> tuple[Table, ...]:
    """The operating points of a plan: the same graphs, other thresholds; none where there are no early exits."""
    if len(plan.stages) == 1:
        return ()
    rows = tuple(
        (
            point.name,
            f"{point.predicted.latency_ms:.2f}",
            f"{point.predicted.p95_ms:.2f}",
            f"{point.predicted.miou:.2f}",
            _rates(point.predicted),
            " ".join(
                "-"
                if d.cut is None
                else f"{plan.row_name(stage.head, d.row)}/{_needed(d.cut, top_of(plan, stage.head, d.row, cells))}"
                for stage, d in zip(plan.stages, point.decisions, strict=True)
            ),
        )
        for point in plan.operating_points
    )
    title = f"operating points: the same graphs, switched at run time{against(plan.truth)}"
    return (Table(title, ("", "latency ms", "p95 ms", "mIoU %", "images per exit", "threshold/cells needed"), rows),)


def _needed(cut: int, cells: int | None) -> str:
    return str(cut) if cells is None else f"{100 * cut / cells:.1f}%"


def inspect_explanation(found: Explanation, retrained: bool = False) -> Inspection:
    """Why a plan was chosen, of a network that is `retrained` by `attach` or not: what its exits gain, what its
    requirement costs, what would help most."""
    exits = tuple(
        (
            stage_text(share.exit, share.head, retrained),
            share.head,
            f"{share.coverage:.0%}",
            *("-" if value is None else f"{value:.2f}" for value in (share.miou, share.baseline_miou)),
            "-" if share.gain_pp is None else f"{share.gain_pp:+.2f}",
            f"{share.latency_ms:.2f}",
            f"{share.saved_ms:+.2f}",
        )
        for share in found.exits
    )
    header = ("", "head", "images", "mIoU % of these", "baseline's", "gain pp", "latency ms", "saved ms")
    tables = [Table("why: what each exit brings", header, exits)]
    bounds = tuple(
        (bound.bound, limit, *_outcome_cells(outcome, found))
        for bound in found.bounds
        for limit, outcome in ((bound.tighter_limit, bound.tighter), (bound.looser_limit, bound.looser))
    )
    if bounds:
        columns = ("bound", "if it were", found.objective, "latency ms", "mIoU %", "heads")
        tables.append(Table(f"what each requirement costs (now {found.objective} {found.value:.4g})", columns, bounds))
    helps = tuple((each.what, f"{each.gain:.1%}", *_outcome_cells(each.outcome, found)) for each in found.helps)
    if helps:
        columns = ("if", "gain", found.objective, "latency ms", "mIoU %", "heads")
        tables.append(Table("what would help most", columns, helps))
    worths = tuple(
        (
            " + ".join(each.policies),
            "-" if each.gain is None else f"{each.gain:+.1%}",
            *_outcome_cells(each.outcome, found),
        )
        for each in found.policies
    )
    if worths:
        columns = ("policies", "gain", found.objective, "latency ms", "mIoU %", "heads")
        tables.append(Table("what each policy is worth", columns, worths))
    warnings = () if found.weak_final is None else (found.weak_final.sentence,)
    return Inspection(asdict(found), tuple(tables), warnings=warnings)


def _outcome_cells(outcome: Outcome | None, found: Explanation) -> tuple[str, ...]:
    if outcome is None:
        return ("no plan", "-", "-", "-")
    change = outcome.value - found.value
    value = "the same" if change == 0 else f"{outcome.value:.4g} ({change:+.2g})"
    return value, f"{outcome.latency_ms:.2f}", f"{outcome.miou:.2f}", " -> ".join(outcome.heads)


def inspect_bundle(path: Path) -> Inspection:
    """The manifest of a bundle, after its bytes are verified. Raises BundleError."""
    manifest = read_manifest(path)
    tables, notes = [], []
    warnings = [doubt for plan in manifest.plans for doubt in plan.doubts]
    for plan in manifest.plans:
        figures = plan.predicted
        title = (
            f"{plan.target}, {plan.library} {plan.precision}, {plan.setting}: predicted {figures.latency_ms:.2f} ms, "
            f"{figures.miou:.2f} % mIoU ({figures.source}, {figures.images} images of {figures.split}"
            f"{against(plan.truth)}); "
            f"{network_label(plan.baseline_name, plan.retrained)} {plan.baseline.latency_ms:.2f} ms, "
            f"{plan.baseline.miou:.2f} %"
        )
        thresholds = [min(row) for row in manifest.gate.thresholds] if len(plan.stages) > 1 else ()
        decided = ("confidence threshold", "confident cells needed") if thresholds else ()
        tables.append(Table(title, ("", "head", *decided), _stage_rows(plan, thresholds)))
        notes += [
            f"{path} runs in {found.used}: in {found.wanted} it lost too much"
            for path, found in plan.precisions.items()
            if found.used != found.wanted
        ]
    return Inspection(asdict(manifest), tuple(tables), tuple(notes), tuple(dict.fromkeys(warnings)))


def _stage_rows(plan: BundlePlan, thresholds: Sequence[float]) -> tuple[tuple[str, ...], ...]:
    """A row for each exit of a plan, with its decision where there are `thresholds`, of each row of the gate."""
    rows = ((stage_text(number, stage.head, plan.retrained), stage) for number, stage in enumerate(plan.stages, 1))
    if not thresholds:
        return tuple((name, stage.head) for name, stage in rows)
    return tuple(
        (
            name,
            stage.head,
            name_of_row(plan.policy_rows, stage.head, stage.row, thresholds),
            needed_text(stage.cut, plan.top(stage), is_learned(plan.policy_rows, stage.head, stage.row)),
        )
        for name, stage in rows
    )
