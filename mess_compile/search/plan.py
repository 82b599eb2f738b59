"""A plan: which exits, heads and thresholds, and its figures; on disk as `plans/<device>.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from mess_compile import files
from mess_compile.network import BASELINE, Gate, GraphSet, is_whole
from mess_compile.runtime.base import decode
from mess_compile.runtime.base.errors import InputError, StaleError
from mess_compile.runtime.base.policy import PolicyRow, check_rows, name_of_row, named_row
from mess_compile.runtime.bundle.manifest import (
    LABELS,
    PROMISED,
    SOURCES,
    TRUTHS,
    Decision,
    Figures,
    OperatingPoint,
    Promise,
    complete_figures,
)

SETTINGS = ("input-dependent", "budgeted", "anytime")
FRONT_AXES = ("latency", "miou", "memory")
FRONT_BY = ("latency", "miou")
DEFAULT_POINT = "default"
REFINED_POINT = "refined"
POINT_NAMES = ("fastest", "fast", DEFAULT_POINT, "accurate", "most-accurate", REFINED_POINT)
VERSION = 7
_READABLE = (5, 6, VERSION)
FEW_IMAGES = 40
"""With fewer images cross-validation is a rough estimate: of 20 images its figure had a standard deviation of 0.7 pp,
of 40 one of 0.3 pp (docs/guarantees.md), and `--max-err` is about a point."""
ONE_GROUP = "one group of images: expect this of more of this sequence; other places are not covered"
"""Why there is no interval where all images belong together."""
_FRONT_FIELDS = (
    *("precision", "network", "stages", "graphs", "predicted", "baseline", "baseline_name", "reference_miou"),
    *("statistics_sha256", "operating_points", "reports", "optimism", "guarantee", "doubts", "promises", "hold_out"),
    *("truth", "expected", "safety", "group_by", "policy_rows", "class_iou"),
)
_REMEDY = "run `mess-compile search`"
_SHA256 = decode.entry(check=decode.SHA256)


@dataclass(frozen=True)
class Stage:
    """One exit of a plan.

    An image leaves here when the count of row `row` (an index into the gate's threshold rows, from 0, or the number of
    one of the plan's policy rows, beyond them) is at least `cut`; `cut` is None where no decision is made: at the last
    exit, and at every exit in the anytime setting. There `row` only says which row's confidence is reported.
    """

    exit_point: int
    head: str
    row: int
    cut: int | None


@dataclass(frozen=True)
class Optimism:
    """By how much the figures of a plan are too good because it was chosen on the images that they are computed on.

    By cross-validation over `folds`, as `method` says: expect `miou_pp` percentage points less mIoU, with a spread of
    `spread_pp` between folds, and `latency_percent` more latency. It is based on `images` of independent `groups`:
    sequences, or images that belong to none.
    """

    miou_pp: float
    latency_percent: float
    folds: int
    spread_pp: float
    method: str
    images: int
    groups: int

    @property
    def few(self) -> bool:
        """Whether the figures are a rough estimate."""
        return self.images < FEW_IMAGES


@dataclass(frozen=True)
class Guarantee:
    """What is certified for unseen images, on images that the plan was not chosen on; all bounds with `confidence`.

    `risk_bound_pp` bounds the mean per-image risk by `risk_method`, which holds in finite samples, `miou_drop_bound_pp`
    the drop of mIoU below the baseline by `miou_method`, a bootstrap; the limits are those that were asked for.
    `change_bound` bounds the percentage of pixels that are labelled otherwise than by the network, as the risk is. What
    was not asked for has no limit (None). `tested` counts the plans that were tested in turn, `groups` the sequences
    that the images certified on belong to. Of `candidates`, from the fastest to the safest where they were chosen, this
    plan is number `place`; 1 is the optimum there.
    """

    confidence: float
    seed: int
    images_chosen: int
    images_certified: int
    groups: int
    risk_bound_pp: float | None
    risk_limit_pp: float | None
    risk_method: str
    miou_drop_bound_pp: float
    miou_drop_limit_pp: float | None
    miou_method: str
    assumption: str
    tested: int
    place: int
    candidates: int
    change_bound: float | None = field(default=None, metadata=decode.OPTIONAL)
    change_limit: float | None = field(default=None, metadata=decode.OPTIONAL)


@dataclass(frozen=True)
class Expected:
    """The difference of mIoU to the baseline to expect on new images, in pp, with an interval; docs/guarantees.md.

    With the probability `confidence` the difference on the images that the groups were drawn from is from `low_pp` to
    `high_pp`. It is based on `images` of so many independent `groups`, which `rule` names with what made them, by
    `method`. `optimism_pp` was taken off the difference on these images, since the plan was chosen on them. `change` is
    the percentage of pixels labelled otherwise than by the network itself, from `change_low` to `change_high`; None
    where the truth is labels.
    """

    miou_pp: float
    low_pp: float
    high_pp: float
    confidence: float
    images: int
    groups: int
    rule: str
    optimism_pp: float
    method: str
    change: float | None = field(default=None, metadata=decode.OPTIONAL)
    change_low: float | None = field(default=None, metadata=decode.OPTIONAL)
    change_high: float | None = field(default=None, metadata=decode.OPTIONAL)


@dataclass(frozen=True)
class Safety:
    """What `--safety` asked for: with the probability `level` at most `loss_bound_pp` of mIoU is lost against the
    baseline and `change_bound` percent of the pixels changed, by a bootstrap that repeats the choice.

    The limits are those that were asked for; what was not asked for is None. Of the `candidates` in the pool it is the
    fastest (or what else was optimised) whose bounds are within the limits.
    """

    level: float
    loss_bound_pp: float | None
    loss_limit_pp: float | None
    change_bound: float | None
    change_limit: float | None
    candidates: int


@dataclass(frozen=True)
class Candidate:
    """A plan by its stages, and the recipe whose statistics they refer to; its figures are not computed."""

    precision: str
    setting: str
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class HoldOut:
    """The images of the searched split that a plan was not chosen on, and its figures there.

    `share` (such as 1/3) and `rule` say which were held out; `image_ids_sha256` is a hash of their ids, one a line.
    `predicted` are the plan's figures on them, `baseline` those of the single-exit network that is the best there.
    """

    share: str
    rule: str
    image_ids_sha256: str = field(metadata=_SHA256)
    predicted: Figures
    baseline: Figures


@dataclass(frozen=True)
class AnytimeReport:
    """One report of an anytime plan: when its labels are ready, and the best mIoU (percent) so far."""

    latency_ms: float
    miou: float


@dataclass(frozen=True)
class ClassIou:
    """IoU in percent of the class `name`, of the plan and of its baseline."""

    name: str
    plan: float
    baseline: float


@dataclass(frozen=True)
class FadedClass:
    """A class, and how many pixels a plan gives it, as a share of those that the network itself gives."""

    name: str
    share: float


@dataclass(frozen=True)
class PlanGraph:
    """A graph of a plan, the precision that it runs in, and the one that its recipe asked for."""

    name: str
    precision: str
    wanted: str


@dataclass(frozen=True)
class Plan:
    """Chosen exits for one target, with predicted figures beside the baseline's.

    `precision` names the recipe that `graphs` (each once, in the order of their first run) belong to. `network` is the
    identity of the recipe's graphs and `gate` the gate whose rows the stages name; `baseline` are the figures of the
    single-exit graph `baseline_name`, and `baseline_alone` the identity of the one trained alone, if there was one to
    choose. `tuned_by` says where the statistics were recorded: on another target exits and thresholds may behave
    differently. `power_mode` is the one that latencies were measured in, where the device reports it. `reports` is
    empty but for the anytime setting. `reference_miou` (percent) replaces the baseline's own as what the error counts
    from: a figure that was given, or the baseline of another recipe. `doubts` are warnings about its latencies,
    `promises` the bounds that it was required to satisfy. `hold_out` are the images that were held out of the search;
    `predicted` is of the others. `truth` is what every mIoU of the plan is against. `expected` is what to expect on new
    images, `group_by` the pattern that named the groups of images (None: those of the evaluation). `policy_rows` are
    the rows beyond the gate's thresholds that its stages and operating points name. `retrained` is whether `attach`
    trained the network further; `baseline-alone` is then the network as it came. Against the network's own output,
    `faded_classes` are those that the plan gives less than half of the pixels that the network gives. `class_iou` is of
    the classes with labelled pixels; it is empty in the anytime setting.
    """

    device: str
    library: str
    precision: str
    setting: str = field(metadata=decode.entry(check=decode.one_of(SETTINGS)))
    network: str
    gate: Gate
    stages: tuple[Stage, ...]
    graphs: tuple[PlanGraph, ...]
    predicted: Figures
    baseline: Figures
    tuned_by: str
    table_sha256: str = field(metadata=_SHA256)
    statistics_sha256: str = field(metadata=_SHA256)
    operating_points: tuple[OperatingPoint, ...]
    power_mode: str | None = None
    baseline_name: str = field(default=BASELINE, metadata=decode.OPTIONAL)
    baseline_alone: str | None = field(default=None, metadata=decode.OPTIONAL)
    reports: tuple[AnytimeReport, ...] = ()
    optimism: Optimism | None = None
    guarantee: Guarantee | None = None
    absent_classes: tuple[str, ...] = ()
    reference_miou: float | None = None
    doubts: tuple[str, ...] = ()
    promises: tuple[Promise, ...] = field(default=(), metadata=decode.OPTIONAL)
    hold_out: HoldOut | None = field(default=None, metadata=decode.OPTIONAL)
    truth: str = field(default=LABELS, metadata=decode.entry(optional=True, check=decode.one_of(TRUTHS)))
    expected: Expected | None = field(default=None, metadata=decode.OPTIONAL)
    safety: Safety | None = field(default=None, metadata=decode.OPTIONAL)
    group_by: str | None = field(default=None, metadata=decode.OPTIONAL)
    policy_rows: tuple[PolicyRow, ...] = field(default=(), metadata=decode.OPTIONAL)
    class_iou: tuple[ClassIou, ...] = field(default=(), metadata=decode.OPTIONAL)
    retrained: bool = field(default=False, metadata=decode.OPTIONAL)
    faded_classes: tuple[FadedClass, ...] = field(default=(), metadata=decode.OPTIONAL)

    @property
    def is_whole(self) -> bool:
        """Whether it is the single-exit network as one graph, uncut."""
        return is_whole(self.stages[0].head)

    def row_name(self, head: str, row: int) -> str:
        """A row of a head in tables: its threshold, or what the policy calls it."""
        return name_of_row(self.policy_rows, head, row, self.gate.thresholds)

    @property
    def offset_pp(self) -> float:
        """By how much the mIoU that its error counts from is above its baseline's."""
        return 0.0 if self.reference_miou is None else self.reference_miou - self.baseline.miou

    @property
    def only_exit(self) -> int | None:
        """The exit (from 1) that every tuning image leaves at, None when they leave at several exits."""
        taken = [number for number, rate in enumerate(self.predicted.exit_rates, start=1) if rate]
        return taken[0] if len(taken) == 1 and self.setting != "anytime" else None

    def __repr__(self) -> str:
        from mess_compile.search.display import plan_text

        return f"<{plan_text(self)}>"

    def _repr_html_(self) -> str:
        from mess_compile.search.display import plan_html

        return plan_html(self)


@dataclass(frozen=True)
class Certificate:
    """What the search covered: of the plans of its `space` those `evaluated`, `duplicates`, and those pruned by their
    bounds, `bounded`.

    A duplicate sends every image to the same exit as a plan that was evaluated; when none is pruned the search is
    `exhaustive`. `gap` is what a better plan could still gain in the objective, in ms, pp, GMACs or mJ: 0 unless the
    search was stopped early.
    """

    space: int
    evaluated: int
    duplicates: int
    bounded: int
    gap: float
    exhaustive: bool


@dataclass(frozen=True)
class SearchResult:
    """The chosen plan, the front of latency and mIoU (and what else `front_by` names) it stands on, and the proof.

    `front_complete` says whether the front has all its points, `without_optimism`, `without_hold_out` and
    `without_expected` why the plan has no such figures, `what_would_cut` what would let a plan with exits win where the
    whole network did.
    """

    plan: Plan
    front: tuple[Plan, ...]
    certificate: Certificate
    front_by: tuple[str, ...] = FRONT_BY
    front_complete: bool = True
    without_optimism: str = ""
    without_hold_out: str = field(default="", metadata=decode.OPTIONAL)
    what_would_cut: str = field(default="", metadata=decode.OPTIONAL)
    without_expected: str = field(default="not computed", metadata=decode.OPTIONAL)

    def __repr__(self) -> str:
        from mess_compile.search.display import result_text

        return f"<{result_text(self)}>"

    def _repr_html_(self) -> str:
        from mess_compile.search.display import result_html

        return result_html(self)


def decisions_of(stages: Sequence[Stage]) -> tuple[Decision, ...]:
    """The decision of each stage."""
    return tuple(Decision(stage.row, stage.cut) for stage in stages)


def default_point(stages: Sequence[Stage], predicted: Figures) -> OperatingPoint:
    """The plan with these stages itself, as an operating point."""
    return OperatingPoint(DEFAULT_POINT, decisions_of(stages), predicted)


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
            raise StaleError(f"the plan for {plan.device} was made for another {what} than {graph_set.root}: {_REMEDY}")
    for stage in plan.stages:
        if graph_set.candidate.point_of(stage.head) != stage.exit_point:
            raise InputError(f"the plan for {plan.device} has {stage.head} at exit point {stage.exit_point}: {_REMEDY}")
        is_policy = named_row(plan.policy_rows, stage.head, stage.row) is not None
        if not 0 <= stage.row < len(plan.gate.thresholds) and not is_policy:
            raise InputError(f"the plan for {plan.device} has row {stage.row}, which its gate lacks: {_REMEDY}")


def rows_in_use(
    rows: Sequence[PolicyRow], stages: Sequence[Stage], points: Sequence[OperatingPoint] = ()
) -> tuple[PolicyRow, ...]:
    """Those of `rows` that stages, or operating points with the same heads, decide by."""
    used = {(stage.head, stage.row) for stage in stages}
    used |= {
        (stage.head, decision.row) for point in points for stage, decision in zip(stages, point.decisions, strict=True)
    }
    return tuple(row for row in rows if (row.head, row.row) in used)


def check_sources_current(device: str, known: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raises StaleError naming a source of a plan that has changed; `known` and `found` are hashes by source."""
    for what, sha256 in found.items():
        if known.get(what, sha256) != sha256:
            raise StaleError(f"the {what} changed since the plan for {device} was searched: {_REMEDY}")


def result_to_json(result: SearchResult) -> dict[str, Any]:
    """`plan`, `front`, `certificate` and `source`; points of the front have only what may differ from the chosen plan.

    `source` is "estimated" when the latency of the plan or of its baseline is.
    """
    return {
        "source": source_of(result.plan),
        "plan": asdict(result.plan),
        "front_by": list(result.front_by),
        "front": [{name: _plain(getattr(point, name)) for name in _FRONT_FIELDS} for point in result.front],
        "front_complete": result.front_complete,
        "certificate": asdict(result.certificate),
        "without_optimism": result.without_optimism,
        "without_hold_out": result.without_hold_out,
        "what_would_cut": result.what_would_cut,
        "without_expected": result.without_expected,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def share_of(text: str) -> Fraction:
    """A share of the images, such as 1/3, as a plan or a bundle records it. Raises InputError."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise InputError(f"{text!r:.40} is not a share of images held out, such as 1/3: {_REMEDY}, and bundle its plan")
    return Fraction(text)


def source_of(plan: Plan) -> str:
    """ "estimated" when the latency of the plan or of the baseline beside it is, "measured" otherwise."""
    sources = {plan.predicted.source, plan.baseline.source}
    return sources.pop() if len(sources) == 1 else "estimated"


def write_result(path: Path, result: SearchResult) -> None:
    """Write `plans/<device>.json` atomically."""
    files.write_json(path, "mess-plan", VERSION, result_to_json(result))


def read_result(path: Path) -> SearchResult:
    """Read what `write_result` wrote. Raises InputError when it is missing or damaged."""
    content = _completed(files.read_json(path, "mess-plan", _READABLE, _REMEDY))
    document: _ResultDocument = files.decode_document(path, _ResultDocument, content, _REMEDY, _check_result)
    return SearchResult(**{each.name: getattr(document, each.name) for each in fields(SearchResult)})


@dataclass(frozen=True)
class _ResultDocument(SearchResult):
    """The content of the file; every plan of its front is complete."""

    source: str = field(default="", metadata=decode.entry(check=decode.one_of(SOURCES)))


def _completed(content: dict[str, Any]) -> dict[str, Any]:
    """Every plan of the front with what it shares with the chosen one, and figures as this release writes them."""
    plan, front = content.get("plan"), content.get("front")
    if isinstance(plan, dict) and isinstance(front, list):
        front = [{**plan, **point} if isinstance(point, dict) else point for point in front]
        for each in (plan, *front):
            if isinstance(each, dict):
                complete_figures(each)
    return {**content, "front": front}


def _check_result(document: SearchResult) -> None:
    if not set(FRONT_BY) <= set(document.front_by) <= set(FRONT_AXES):
        axes = ", ".join(FRONT_AXES)
        raise InputError(f"front_by is {list(document.front_by)}, not {' and '.join(FRONT_BY)} or more of {axes}")
    _check_plan(document.plan, "plan")
    for index, plan in enumerate(document.front):
        _check_plan(plan, f"front[{index}]")


def _check_plan(plan: Plan, where: str) -> None:
    """Raises InputError when stages and operating points do not fit together."""
    try:
        check_rows(plan.policy_rows, len(plan.gate.thresholds), None, where)
    except decode.DecodeError as error:
        raise InputError(str(error)) from error
    if not plan.stages or plan.stages[-1].cut is not None:
        raise InputError(f"{where}.stages do not end in a stage without cut")
    names = [point.name for point in plan.operating_points]
    if names != [name for name in POINT_NAMES if name in names]:
        raise InputError(f"{where}.operating_points are {names}, not some of {', '.join(POINT_NAMES)} in this order")
    if [point.decisions for point in plan.operating_points if point.name == DEFAULT_POINT] != [
        decisions_of(plan.stages)
    ]:
        raise InputError(f"{where}.operating_points have no {DEFAULT_POINT!r} with the decisions of the stages")
    uncut = [stage.cut is None for stage in plan.stages]
    if any([decision.cut is None for decision in point.decisions] != uncut for point in plan.operating_points):
        raise InputError(f"{where}.operating_points decide at other stages than the plan")
    for promise in plan.promises:
        if promise.quantity not in PROMISED:
            raise InputError(f"{where}.promises has quantity {promise.quantity!r}, not one of {', '.join(PROMISED)}")
    if plan.hold_out is not None:
        share_of(plan.hold_out.share)
