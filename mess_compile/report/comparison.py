"""Plans of several devices, files or bundles side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mess_compile.network import is_whole
from mess_compile.runtime.base.policy import name_of_row
from mess_compile.runtime.bundle import manifest
from mess_compile.runtime.bundle.manifest import LABELS, OWN_OUTPUT, Figures
from mess_compile.runtime.engines.engine import FP32
from mess_compile.search.display import NO_CELLS, network_label, speed, top_of, work
from mess_compile.search.plan import HoldOut, Plan, SearchResult


@dataclass(frozen=True)
class Point:
    """Where a plan of the front, or an operating point, lies."""

    name: str
    latency_ms: float
    miou: float


@dataclass(frozen=True)
class Compared:
    """One plan, `name` as the user gave it; `front` is empty for a bundle, which holds none."""

    name: str
    kind: str
    device: str
    library: str
    precision: str
    setting: str
    network: str
    heads: tuple[str, ...]
    decisions: tuple[str, ...]
    predicted: Figures
    baseline: Figures
    baseline_name: str
    tuned_by: str
    operating_points: tuple[Point, ...]
    front: tuple[Point, ...]
    doubts: tuple[str, ...]
    held_out: str = "-"
    truth: str = LABELS
    retrained: bool = False

    @property
    def what(self) -> str:
        """What kind of network the plan is."""
        if is_whole(self.heads[0]):
            return f"the {network_label(self.heads[0], self.retrained)}"
        alone = self.setting != "anytime" and max(self.predicted.exit_rates) == 1
        return "a shorter network: all images leave at one exit" if alone else f"a cascade of {len(self.heads)} exits"

    @property
    def latency_ratio(self) -> float:
        return self.baseline.latency_ms / self.predicted.latency_ms

    @property
    def workload_ratio(self) -> float:
        return self.baseline.gmacs / self.predicted.gmacs

    @property
    def miou_pp(self) -> float:
        return self.predicted.miou - self.baseline.miou


def of_result(name: str, result: SearchResult, cells: Mapping[str, int] = NO_CELLS) -> Compared:
    """The chosen plan of a search, and its front; `cells` are those of a head's map, by its name."""
    plan = result.plan
    front = (
        Point(" → ".join(stage.head for stage in one.stages), one.predicted.latency_ms, one.predicted.miou)
        for one in result.front
    )
    return _compared(name, "plan", plan, plan.device, plan.network, plan.gate.thresholds, cells, tuple(front))


def of_bundle(name: str, content: manifest.Manifest) -> tuple[Compared, ...]:
    """Every plan that a bundle holds."""
    lowest = [min(row) for row in content.gate.thresholds]
    single = len(content.plans) == 1
    return tuple(
        _compared(
            *(name if single else f"{name} ({plan.target})", "bundle", plan, plan.target, content.network.identity),
            *(lowest, {stage.head: stage.cells for stage in plan.stages}),
        )
        for plan in content.plans
    )


def _compared(
    name: str,
    kind: str,
    plan: Plan | manifest.BundlePlan,
    device: str,
    network: str,
    thresholds: Sequence[float],
    cells: Mapping[str, int],
    front: tuple[Point, ...] = (),
) -> Compared:
    return Compared(
        name=name,
        kind=kind,
        device=device,
        library=plan.library,
        precision=plan.precision,
        setting=plan.setting,
        network=network,
        heads=tuple(stage.head for stage in plan.stages),
        decisions=tuple(
            _decision(
                name_of_row(plan.policy_rows, stage.head, stage.row, thresholds),
                stage.cut,
                top_of(plan, stage.head, stage.row, cells),
            )
            for stage in plan.stages
        ),
        predicted=plan.predicted,
        baseline=plan.baseline,
        baseline_name=plan.baseline_name,
        tuned_by=plan.tuned_by,
        operating_points=tuple(
            Point(one.name, one.predicted.latency_ms, one.predicted.miou) for one in plan.operating_points
        ),
        front=front,
        doubts=plan.doubts,
        held_out=_held_out(plan.hold_out if isinstance(plan, Plan) else None),
        truth=plan.truth,
        retrained=plan.retrained,
    )


def _held_out(held_out: HoldOut | None) -> str:
    """The plan's mIoU relative to the baseline's on the images held out, and how many they are."""
    return (
        "-"
        if held_out is None
        else f"{held_out.predicted.miou - held_out.baseline.miou:+.2f} ({held_out.predicted.images} images)"
    )


def _decision(threshold: str, cut: int | None, cells: int | None) -> str:
    """The share of cells with that confidence from which images leave, or their number."""
    if cut is None:
        return "takes the rest"
    return f"{cut} at {threshold}" if cells is None else f"{100 * cut / cells:.1f} % at {threshold}"


_ROWS: tuple[tuple[str, Callable[[Compared], str]], ...] = (
    ("kind", lambda one: one.kind),
    ("device", lambda one: one.device),
    ("library", lambda one: f"{one.library} {one.precision}"),
    ("setting", lambda one: one.setting),
    ("plan", lambda one: one.what),
    ("heads", lambda one: " → ".join(one.heads)),
    ("confident cells needed", lambda one: "; ".join(one.decisions)),
    ("images per stage", lambda one: " ".join(f"{rate:.0%}" for rate in one.predicted.exit_rates)),
    ("mIoU %", lambda one: f"{one.predicted.miou:.2f}"),
    ("mIoU is against", lambda one: one.truth),
    ("changed pixels %", lambda one: "-" if one.predicted.change is None else f"{one.predicted.change:.2f}"),
    ("pp from its baseline", lambda one: f"{one.miou_pp:+.2f}"),
    ("latency ms", lambda one: f"{one.predicted.latency_ms:.2f} {one.predicted.source}"),
    ("baseline ms", lambda one: f"{one.baseline.latency_ms:.2f} ({network_label(one.baseline_name, one.retrained)})"),
    ("speed", lambda one: speed(one.latency_ratio)),
    ("p95 ms", lambda one: f"{one.predicted.p95_ms:.2f}"),
    ("worst ms", lambda one: f"{one.predicted.worst_ms:.2f}"),
    ("GMACs", lambda one: f"{one.predicted.gmacs:.3f}"),
    ("work", lambda one: work(one.workload_ratio)),
    ("memory MiB", lambda one: f"{one.predicted.memory_bytes / 2**20:.1f}"),
    ("energy mJ", lambda one: "-" if one.predicted.energy_mj is None else f"{one.predicted.energy_mj:.1f}"),
    ("chosen on", lambda one: f"{one.predicted.images} images of {one.predicted.split}"),
    ("pp on images held out", lambda one: one.held_out),
)


def rows(compared: Sequence[Compared]) -> tuple[tuple[str, ...], ...]:
    """A row for each figure: its name, then a cell for every plan."""
    found = tuple((label, *(cell(one) for one in compared)) for label, cell in _ROWS)
    return tuple(row for row in found if set(row[1:]) not in ({"-"}, {LABELS}))


def notes(compared: Sequence[Compared]) -> tuple[str, ...]:
    """Why figures side by side may not be comparable, apart from the warnings about each plan."""
    differs = {
        "devices": {one.device for one in compared},
        "networks": {one.network for one in compared if one.precision == FP32},  # a recipe has an identity of its own
        "images": {f"{one.predicted.images} images of {one.predicted.split}" for one in compared},
        "sources of latency": {one.predicted.source for one in compared},
        "truths": {one.truth for one in compared},
    }
    meanings = {
        "devices": "latencies and memory are of different devices",
        "networks": "the networks differ, and with them what a plan could reach",
        "images": "mIoU and exit rates were taken on different images",
        "sources of latency": "some latencies are measured and some are estimated",
        "truths": f"mIoU is against labels for some, and against {OWN_OUTPUT} for others",
    }
    return tuple(meanings[what] for what, found in differs.items() if len(found) > 1)


def warnings(compared: Sequence[Compared]) -> tuple[str, ...]:
    """The warnings about the latencies of each plan, behind the names of the plans that share them."""
    names: dict[str, list[str]] = {}
    for one in compared:
        for doubt in one.doubts:
            names.setdefault(doubt, []).append(one.name)
    return tuple(f"{', '.join(dict.fromkeys(of))}: {doubt}" for doubt, of in names.items())
