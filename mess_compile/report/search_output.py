"""What `search` prints of a plan: the plan against its baseline, its proof, what to expect on new images; details."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mess_compile.runtime.base.policy import is_learned
from mess_compile.runtime.bundle.manifest import LABELS, Figures
from mess_compile.search.display import (
    by_name,
    estimate_sentence,
    expected_on_new_images,
    interval_sentence,
    interval_text,
    network_label,
    sentences_of,
    speed,
    tail_sentence,
)
from mess_compile.search.plan import FEW_IMAGES, ONE_GROUP, REFINED_POINT, Guarantee, Plan, Safety, SearchResult
from mess_compile.search.requirement import Requirement
from mess_compile.search.safety import FEW_GROUPS

_Column = tuple[str, Callable[[Figures], str]]
_FIGURES: tuple[_Column, ...] = (
    ("mIoU %", lambda one: f"{one.miou:.2f}"),
    ("latency ms", lambda one: f"{one.latency_ms:.2f}"),
    ("p95 ms", lambda one: f"{one.p95_ms:.2f}"),
    ("GMACs", lambda one: f"{one.gmacs:.3f}"),
)
_WORST: _Column = ("worst ms", lambda one: f"{one.worst_ms:.2f}")
_CHANGE: _Column = ("changed %", lambda one: "-" if one.change is None else f"{one.change:.2f}")
_MEMORY: _Column = ("memory MiB", lambda one: f"{one.memory_bytes / 2**20:.1f}")
_ENERGY: _Column = ("mJ", lambda one: "-" if one.energy_mj is None else f"{one.energy_mj:.1f}")


def headline(plan: Plan) -> str:
    """The plan against its baseline, in a line."""
    estimated = [name for name, figures in by_name(plan) if figures.source == "estimated"]
    marks = [plan.precision, *([] if plan.setting == "input-dependent" else [plan.setting])]
    if estimated:
        marks.append(f"ESTIMATED latency{'' if len(estimated) == 2 else f' of {estimated[0]}'}")
    return f"Plan for {plan.device} ({', '.join(marks)}): {', '.join([_kind(plan), *_changes(plan)])}"


def _kind(plan: Plan) -> str:
    if plan.is_whole:
        return f"the {network_label(plan.stages[0].head, plan.retrained)}: no plan with early exits is better"
    if plan.only_exit is not None:
        return f"a shorter network, ending at {plan.stages[plan.only_exit - 1].head}"
    return f"{len(plan.stages)} exits"


def _changes(plan: Plan) -> list[str]:
    own = plan.predicted.latency_ms
    ratio = plan.baseline.latency_ms / own if own else math.inf
    found = [] if plan.is_whole else [speed(ratio), f"{_difference(plan):+.2f} pp mIoU"]
    if plan.reference_miou is not None:
        found.append(f"{plan.predicted.miou - plan.reference_miou:+.2f} pp vs. --baseline {plan.reference_miou:.2f} %")
    if plan.predicted.change is not None:
        found.append(f"changed pixels {plan.predicted.change:.1f} %")
    return found


def _difference(plan: Plan) -> float:
    return plan.predicted.miou - plan.baseline.miou


def summary_title(plan: Plan) -> str:
    """What the table's mIoU is against, where that is not labels."""
    return "" if plan.truth == LABELS else f"mIoU is against {plan.truth}"


def summary_table(plan: Plan, requirement: Requirement) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and the rows of baseline and plan, with the columns that the requirement is about."""
    memory = requirement.max_memory_bytes is not None or requirement.objective == "memory"
    more = [*([] if requirement.max_latency_worst is None else [_WORST]), *([_MEMORY] if memory else [])]
    more += [] if plan.predicted.change is None else [_CHANGE]
    columns = (*_FIGURES, *more, *([] if plan.predicted.energy_mj is None else [_ENERGY]))
    exits = {"plan": " ".join(f"{rate:.0%}" for rate in plan.predicted.exit_rates)}
    classes = [each for each in plan.class_iou if each.name in {bound.name for bound in requirement.max_class_err}]
    rows = [
        (
            name,
            *(cell(one) for _, cell in columns),
            *(f"{each.plan if name == 'plan' else each.baseline:.2f}" for each in classes),
            exits.get(name, ""),
        )
        for name, one in by_name(plan)
    ]
    return (
        "",
        *(title for title, _ in columns),
        *(f"IoU of {each.name} (%)" for each in classes),
        "images per exit",
    ), rows


def proof(result: SearchResult, requirement: Requirement) -> str:
    """Whether the plan is the optimum, and over how many."""
    certificate, guarantee = result.certificate, result.plan.guarantee
    space = f"{certificate.space:,} plans"
    if certificate.gap > 0:
        gain = f"{certificate.gap:.3g} {unit_of(requirement)}"
        return f"Best found of {space}, not proved optimal: a better one could gain up to {gain}."
    if result.plan.safety is not None:
        best = "fastest" if (requirement.objective or "latency") == "latency" else "best"
        return f"The {best} of the {result.plan.safety.candidates:,} candidate plans that satisfy --safety."
    if guarantee is not None and guarantee.place > 1:
        place = f"Candidate {guarantee.place} of {guarantee.candidates}, fastest to safest"
        return f"{place}; the optimum over {space} could not be certified."
    return f"Proved optimal over {space}."


def _out_of_fold(plan: Plan) -> str:
    """What to add to figures of images that a learned gate was fitted to."""
    learned = any(is_learned(plan.policy_rows, stage.head, stage.row) for stage in plan.stages)
    return ", learned gates out of fold" if learned else ""


def expectation(result: SearchResult) -> str:
    """What to expect on new images: certified, from the images held out, by cross-validation, or unknown."""
    plan = result.plan
    if plan.guarantee is not None:
        found = plan.guarantee
        limits = []
        if found.miou_drop_limit_pp is not None:
            limits.append(f"{found.miou_drop_limit_pp:g} pp of mIoU lost (bound {found.miou_drop_bound_pp:.2f} pp)")
        if found.change_limit is not None:
            limits.append(f"{found.change_limit:g} % of the pixels changed (bound {found.change_bound:.2f} %)")
        certified = f"Certified at {100 * found.confidence:g} % on {found.images_certified} other images"
        interval = "" if plan.expected is None else f"; {interval_sentence(plan.expected, '')}"
        return f"{certified}: at most {' and '.join(limits)}{interval}."
    safety = "" if plan.safety is None else f" {_kept(plan.safety)}"
    images = f"{plan.predicted.images} images of {plan.predicted.split}{_out_of_fold(plan)}"
    return f"Chosen on {images}; {_on_new_images(result)}.{safety}"


def _kept(found: Safety) -> str:
    """What `--safety` keeps."""
    limits = []
    if found.loss_limit_pp is not None:
        limits.append(f"{found.loss_limit_pp:g} pp lost (bound {found.loss_bound_pp:.2f} pp)")
    if found.change_limit is not None:
        limits.append(f"{found.change_limit:g} % of the pixels changed (bound {found.change_bound:.2f} %)")
    return f"Kept at {100 * found.level:.4g} %, by a bootstrap: at most {' and '.join(limits)}."


def _on_new_images(result: SearchResult) -> str:
    plan, optimism = result.plan, result.plan.optimism
    if plan.hold_out is not None:
        held = plan.hold_out.predicted.miou - plan.hold_out.baseline.miou
        change = plan.hold_out.predicted.change
        changed = "" if change is None else f", changed pixels {change:.1f} %"
        interval = interval_sentence(plan.expected, result.without_expected)
        return f"on the {plan.hold_out.predicted.images} held out {held:+.2f} pp{changed}; {interval}"
    if plan.expected is not None:
        if plan.predicted.images >= FEW_IMAGES:
            return interval_sentence(plan.expected, "")
        rough = f"too few images: a rough estimate for new ones is {interval_text(plan.expected)}"
        return f"{rough}; evaluate {FEW_IMAGES} images or more"
    if result.without_expected == ONE_GROUP:
        return ONE_GROUP
    if optimism is None:
        return "no estimate for new images" + (f" ({result.without_optimism})" if result.without_optimism else "")
    expected = f"{_difference(plan) - optimism.miou_pp:+.1f} pp, interval {result.without_expected}"
    if optimism.few:
        return f"too few images: a rough estimate for new ones is {expected}"
    return f"on new images of this kind expect {expected} (spread over folds {optimism.spread_pp:.1f} pp)"


def unit_of(requirement: Requirement) -> str:
    """The unit of the objective."""
    if requirement.setting == "anytime":
        return "pp of mIoU over time"
    units = {"accuracy": "pp of mIoU", "workload": "GMACs", "memory": "bytes", "energy": "mJ"}
    return units.get(requirement.objective or "latency", "ms")


def reports_line(plan: Plan) -> str:
    """When an anytime plan has labels, and how good they are by then; empty for other plans."""
    found = ", ".join(f"{report.latency_ms:.2f} ms ({report.miou:.2f} % mIoU)" for report in plan.reports)
    return f"Labels after {found}" if found else ""


def details(result: SearchResult) -> tuple[str, ...]:
    """The sentences that `search --verbose` and `inspect plan` print beside their tables."""
    plan = result.plan
    fallbacks = (
        f"{graph.name} runs in {graph.precision}: in {graph.wanted} it lost too much"
        for graph in plan.graphs
        if graph.precision != graph.wanted
    )
    refined = (
        f"operating point {point.name}, with thresholds between those of the proof: "
        f"{point.predicted.latency_ms:.2f} ms, {point.predicted.miou:.2f} % mIoU"
        for point in plan.operating_points
        if point.name == REFINED_POINT
    )
    return (
        *sentences_of(plan),
        *fallbacks,
        _searched(result),
        *refined,
        f"tuning-split figures ({plan.tuned_by}{_out_of_fold(plan)}), not a test result",
        *_beyond_these_images(result),
        *([] if plan.guarantee is None else [_certified(plan.guarantee)]),
        *filter(None, [result.what_would_cut]),
    )


def _beyond_these_images(result: SearchResult) -> list[str]:
    """What to expect on new images: the interval where there is one, else the reason, else what cross-validation
    found."""
    plan = result.plan
    if plan.expected is not None:
        return [f"{interval_sentence(plan.expected, '')}: {plan.expected.method}"]
    if result.without_expected == ONE_GROUP:
        return [ONE_GROUP]
    return [] if plan.optimism is None else [f"on new images of this kind: {expected_on_new_images(plan.optimism)}"]


def _searched(result: SearchResult) -> str:
    certificate, found = result.certificate, len(result.front)
    others = "duplicates of these" if certificate.exhaustive else "duplicates or pruned"
    return (
        f"{certificate.evaluated:,} of {certificate.space:,} plans evaluated, the others {others}; "
        f"{found} trade-offs found{'' if result.front_complete else ', not all there are'}"
    )


def _certified(found: Guarantee) -> str:
    return (
        f"certified at {100 * found.confidence:g} % on {found.images_certified} images ({found.groups} independent "
        f"ones) that it was not chosen on: {certified_bounds(found)}; {found.assumption}"
    )


def certified_bounds(found: Guarantee) -> str:
    """What was certified, with bounds, limits and methods."""
    parts = []
    if found.risk_limit_pp is not None:
        parts.append(
            f"pixel error on average at most {found.risk_limit_pp:g} pp above the baseline's (bound "
            f"{found.risk_bound_pp:.2f} pp, {found.risk_method}); mIoU at most {found.miou_drop_limit_pp:g} pp below "
            f"(bound {found.miou_drop_bound_pp:.2f} pp, {found.miou_method})"
        )
    if found.change_limit is not None:
        parts.append(
            f"changed pixels on average at most {found.change_limit:g} % (bound {found.change_bound:.2f} %, "
            f"{found.risk_method})"
        )
    return "; ".join(parts)


def _in_short(doubts: Sequence[str]) -> list[str]:
    """The first warning about the latencies, and how many more there are."""
    more = f" ({len(doubts) - 1} more: `mess-compile inspect latency`)" if len(doubts) > 1 else ""
    return [f"{doubt}{more}" for doubt in doubts[:1]]


def _named(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most + 1} more" if len(names) > most else ""
    return ", ".join(names[: most - 1] if more else names) + more


def warnings_of_plan(plan: Plan, requirement: Requirement) -> tuple[str, ...]:
    """Why the plan's figures may be wrong, or the plan another than was meant."""
    tail = None if plan.setting == "anytime" else tail_sentence(plan)
    found = [*_in_short(plan.doubts), *filter(None, [estimate_sentence(plan), tail])]
    lost = -_difference(plan)
    bounded = requirement.max_err_pp is not None or requirement.max_change is not None
    if not bounded and requirement.objective != "accuracy" and lost > 1:
        found.append(f"the plan loses {lost:.1f} pp of mIoU, and no --max-err was given: add --max-err 1%")
    if plan.safety is not None and plan.expected is not None and plan.expected.groups < FEW_GROUPS:
        found.append(
            f"--safety rests on {plan.expected.groups} groups of images: with fewer than {FEW_GROUPS} the interval is "
            "wide, and how often it holds is untested; evaluate images of more places"
        )
    if plan.absent_classes:
        absent = _named(plan.absent_classes)
        found.append(f"no image has a labelled pixel of {absent}: mIoU is over the other classes")
    if plan.faded_classes:
        faded = _named([f"{each.name} ({each.share:.0%})" for each in plan.faded_classes])
        found.append(
            f"the plan gives {faded} less than half of the pixels that the network gives: lower the bound, or bound "
            "--max-err too"
        )
    if plan.hold_out is not None and requirement.max_err_pp is not None:
        held = plan.hold_out.predicted.miou - plan.hold_out.baseline.miou
        if plan.offset_pp - held > requirement.max_err_pp:
            found.append(
                f"more than {requirement.max_err_pp:.4g} pp is lost on the images held out: evaluate more images, or "
                "give a smaller --max-err"
            )
    changed = None if plan.hold_out is None else plan.hold_out.predicted.change
    if changed is not None and requirement.max_change is not None and changed > requirement.max_change:
        found.append(
            f"{changed:.2f} % of the pixels are changed on the images held out: evaluate more images, or give a "
            "smaller --max-change"
        )
    return tuple(found)
