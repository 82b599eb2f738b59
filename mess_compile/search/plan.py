"""A plan: which exits, heads and thresholds, and its figures; on disk as `plans/<device>.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mess_compile import files
from mess_compile.candidates import BASELINE, Gate, GraphSet
from mess_compile.runtime.errors import InputError, StaleError

SETTINGS = ("input-dependent", "budgeted", "anytime")
_FRONT_FIELDS = ("precision", "network", "stages", "graphs", "predicted", "baseline", "baseline_name", "reports")
_REMEDY = "run `mess-compile search`"


@dataclass(frozen=True)
class Stage:
    """One exit of a plan.

    An image leaves here when the count of row `row` (an index into the gate's threshold rows, from 0) is at least
    `cut`; `cut` is None where no decision is taken: at the last exit, and at every exit in the anytime setting. There
    `row` only says which row's confidence is reported.
    """

    exit_point: int
    head: str
    row: int
    cut: int | None


@dataclass(frozen=True)
class Figures:
    """What a plan, or the baseline, costs and reaches on the `images` of `split`.

    `latency_ms` is the mean over images, `p95_ms` the percentile of their path costs, `worst_ms` the deepest path at
    p99; `miou` in percent; `gmacs` the mean over images; `exit_rates` the share of images that end at each exit;
    `source` tells measured from estimated latencies.
    """

    latency_ms: float
    p95_ms: float
    worst_ms: float
    miou: float
    gmacs: float
    memory_bytes: int
    exit_rates: tuple[float, ...]
    images: int
    split: str
    source: str


@dataclass(frozen=True)
class Report:
    """One report of an anytime plan: when its labels are there, and the best mIoU (percent) up to then."""

    latency_ms: float
    miou: float


@dataclass(frozen=True)
class PlanGraph:
    """A graph of a plan, the precision that it runs in, and the one that its recipe wanted."""

    name: str
    precision: str
    wanted: str


@dataclass(frozen=True)
class Plan:
    """Chosen exits for one target, with predicted figures beside the baseline's.

    `precision` names the recipe that `graphs` (each once, in the order of their first run) belong to. `network` is the
    identity of the recipe's graphs and `gate` the gate whose rows the stages name; `baseline` are the figures of the
    single-exit graph `baseline_name`, and `baseline_alone` the identity of the one trained alone, if there was one to
    choose. `tuned_by` says where the statistics were recorded: exits and thresholds may do otherwise on a target that
    is not that. `power_mode` is the one that latencies were measured in, where the device tells it. `reports` is empty
    but for the anytime setting.
    """

    device: str
    library: str
    precision: str
    setting: str
    network: str
    gate: Gate
    stages: tuple[Stage, ...]
    graphs: tuple[PlanGraph, ...]
    predicted: Figures
    baseline: Figures
    tuned_by: str
    power_mode: str | None = None
    baseline_name: str = BASELINE
    baseline_alone: str | None = None
    reports: tuple[Report, ...] = ()


@dataclass(frozen=True)
class Certificate:
    """What the search looked at: every plan of its `space` is `evaluated`, or is one of `duplicates`.

    A duplicate sends every image to the same exit as a plan that was evaluated. `gap` is what a better plan could
    still gain in the objective.
    """

    space: int
    evaluated: int
    duplicates: int
    gap: float
    exhaustive: bool


@dataclass(frozen=True)
class SearchResult:
    """The chosen plan, the front of latency and mIoU it stands on, and the proof."""

    plan: Plan
    front: tuple[Plan, ...]
    certificate: Certificate


def check_plan_current(plan: Plan, graph_set: GraphSet) -> None:
    """Raises StaleError when `plan` was made for another network, baseline or gate than `graph_set`, InputError when
    its stages do not fit these."""
    for what, different in (
        ("recipe", plan.precision != graph_set.recipe),
        ("network", plan.network != graph_set.identity),
        ("baseline", plan.baseline_alone != graph_set.baseline_alone),
        ("gate", plan.gate != graph_set.gate),
    ):
        if different:
            raise StaleError(f"the plan for {plan.device} is of another {what} than {graph_set.root}: {_REMEDY}")
    for stage in plan.stages:
        if graph_set.candidate.head(stage.head).exit_point != stage.exit_point:
            raise InputError(f"the plan for {plan.device} has {stage.head} at exit point {stage.exit_point}: {_REMEDY}")
        if not 0 <= stage.row < len(plan.gate.thresholds):
            raise InputError(f"the plan for {plan.device} has threshold row {stage.row}, not in its gate: {_REMEDY}")


def result_to_json(result: SearchResult) -> dict[str, Any]:
    """`plan`, `front`, `certificate` and `source`; a point of the front is what may differ from the chosen plan."""
    return {
        "source": result.plan.predicted.source,
        "plan": asdict(result.plan),
        "front": [{name: asdict(point)[name] for name in _FRONT_FIELDS} for point in result.front],
        "certificate": asdict(result.certificate),
    }


def write_result(path: Path, result: SearchResult) -> None:
    """Write `plans/<device>.json`; all of it or nothing."""
    files.write_json(path, "mess-plan", 2, result_to_json(result))


def read_result(path: Path) -> SearchResult:
    """Read what `write_result` wrote. Raises InputError when it is missing or damaged."""
    content = files.read_json(path, "mess-plan", 2, _REMEDY)
    result: SearchResult = files.decoded(path, _REMEDY, lambda: _result_from_json(content))
    return result


def _result_from_json(content: dict[str, Any]) -> SearchResult:
    plan = _plan_from_json(content["plan"])
    front = tuple(_plan_from_json({**content["plan"], **point}) for point in content["front"])
    proof = content["certificate"]
    counts = {name: int(proof[name]) for name in ("space", "evaluated", "duplicates")}
    certificate = Certificate(**counts, gap=float(proof["gap"]), exhaustive=bool(proof["exhaustive"]))
    return SearchResult(plan, front, certificate)


def _plan_from_json(content: dict[str, Any]) -> Plan:
    if content["setting"] not in SETTINGS:
        raise ValueError(f"setting {content['setting']!r}")
    gate, alone = content["gate"], content.get("baseline_alone")
    return Plan(
        device=str(content["device"]),
        library=str(content["library"]),
        precision=str(content["precision"]),
        setting=str(content["setting"]),
        network=str(content["network"]),
        gate=Gate(gate["confidence"], bool(gate["edge_aware"]), tuple(float(t) for t in gate["thresholds"])),
        stages=_stages_from_json(content["stages"]),
        graphs=tuple(PlanGraph(str(g["name"]), str(g["precision"]), str(g["wanted"])) for g in content["graphs"]),
        predicted=_figures_from_json(content["predicted"]),
        baseline=_figures_from_json(content["baseline"]),
        tuned_by=str(content["tuned_by"]),
        power_mode=None if content["power_mode"] is None else str(content["power_mode"]),
        baseline_name=str(content.get("baseline_name", BASELINE)),
        baseline_alone=None if alone is None else str(alone),
        reports=_reports_from_json(content["reports"]),
    )


def _stages_from_json(content: Any) -> tuple[Stage, ...]:
    stages = tuple(
        Stage(int(s["exit_point"]), str(s["head"]), int(s["row"]), None if s["cut"] is None else int(s["cut"]))
        for s in content
    )
    if not stages or stages[-1].cut is not None:
        raise ValueError("a plan has stages, and the last one no cut")
    return stages


def _figures_from_json(content: dict[str, Any]) -> Figures:
    return Figures(
        latency_ms=float(content["latency_ms"]),
        p95_ms=float(content["p95_ms"]),
        worst_ms=float(content["worst_ms"]),
        miou=float(content["miou"]),
        gmacs=float(content["gmacs"]),
        memory_bytes=int(content["memory_bytes"]),
        exit_rates=tuple(float(rate) for rate in content["exit_rates"]),
        images=int(content["images"]),
        split=str(content["split"]),
        source=str(content["source"]),
    )


def _reports_from_json(content: Any) -> tuple[Report, ...]:
    return tuple(Report(float(report["latency_ms"]), float(report["miou"])) for report in content)
