"""How a plan is printed: sentences and tables for the terminal, the report and notebooks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from mess_compile.network import BASELINE, BASELINE_ALONE, is_whole
from mess_compile.runtime.base.policy import PLAIN, is_learned, named_row, top_of_row
from mess_compile.runtime.bundle.manifest import BundlePlan, Figures, against
from mess_compile.runtime.images.notebook import table_html, text_html
from mess_compile.search.plan import FEW_IMAGES, ONE_GROUP, Expected, Optimism, Plan, SearchResult, Stage
from mess_compile.search.requirement import Requirement

NO_CELLS: Mapping[str, int] = MappingProxyType({})
NEARLY = 0.005
"""Ratios as close to 1 as this count as equal."""
FIGURES = ("", "mIoU %", "latency ms", "p95 ms", "worst ms", "GMACs", "memory MiB")


def exits_table(plan: Plan, cells: Mapping[str, int] = NO_CELLS) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and a row for each exit, with its thresholds where there are early exits. `cells` are those of a head's
    map, by its name."""
    gated = len(plan.stages) > 1
    rows = [
        (
            stage_text(number, stage.head, plan.retrained),
            stage.head,
            *(_decision(plan, stage, cells) * gated),
            f"{rate:.0%}",
        )
        for number, (stage, rate) in enumerate(zip(plan.stages, plan.predicted.exit_rates, strict=True), start=1)
    ]
    return ("", "head", *(("policy", "confidence threshold", "confident cells needed") * gated), "images"), rows


def _decision(plan: Plan, stage: Stage, cells: Mapping[str, int]) -> tuple[str, str, str]:
    learned = is_learned(plan.policy_rows, stage.head, stage.row)
    needed = needed_text(stage.cut, top_of(plan, stage.head, stage.row, cells), learned)
    policy = "-" if stage.cut is None else policy_of(plan, stage.head, stage.row)
    return policy, plan.row_name(stage.head, stage.row), needed


def policy_of(plan: Plan | BundlePlan, head: str, row: int) -> str:
    """The policy that a row of a head belongs to."""
    found = named_row(plan.policy_rows, head, row)
    return PLAIN if found is None else found.policy


def policies_sentence(plan: Plan) -> str | None:
    """Which policy decides at each early exit, where it is not plain at all of them."""
    found = [(stage.head, policy_of(plan, stage.head, stage.row)) for stage in plan.stages if stage.cut is not None]
    if all(policy == PLAIN for _, policy in found):
        return None
    return f"decided by {', '.join(f'{policy} at {head}' for head, policy in found)}"


def stage_text(number: int, head: str, retrained: bool = False) -> str:
    """An exit of a plan, and which of the network's exits it is."""
    if is_whole(head):
        return network_label(head, retrained)
    return f"stage {number} = network exit {head.partition('.')[0].removeprefix('exit')}"


def top_of(plan: Plan | BundlePlan, head: str, row: int, cells: Mapping[str, int]) -> int | None:
    """The greatest count of a row: the number of cells, if it is known; of a learned row that of its levels."""
    return top_of_row(plan.policy_rows, head, row, cells.get(head, 0)) or None


def needed_text(cut: int | None, cells: int | None, learned: bool = False) -> str:
    """The confident cells, or the learned score, that an image needs to leave; their share where the number of cells is
    known."""
    if cut is None:
        return "-"
    if learned:
        return f"score {cut} of {cells}"
    return str(cut) if cells is None else f"{100 * cut / cells:.1f} % ({cut} of {cells})"


def baseline_label(name: str, retrained: bool = False) -> str:
    """What tables call the baseline that a plan is compared with."""
    if name == BASELINE_ALONE or retrained:
        return f"baseline ({network_label(name, retrained)})"
    return name


def network_label(name: str, retrained: bool = False) -> str:
    """A single-exit network in words; `retrained` by `attach`, the two are the network before and after."""
    both = (
        ("network after attach", "network as it came")
        if retrained
        else ("full network", "separate single-exit network")
    )
    return dict(zip((BASELINE, BASELINE_ALONE), both, strict=True)).get(name, name)


def speed(ratio: float) -> str:
    """The speed of something that takes 1 / `ratio` of the time, such as `2.00x faster`."""
    if abs(ratio - 1) < NEARLY:
        return "as fast"
    return f"{ratio:.2f}x faster" if ratio > 1 else f"{_percent_more(ratio)} slower"


def work(ratio: float) -> str:
    """The work of something that takes 1 / `ratio` of it, such as `2.00x less work`."""
    if abs(ratio - 1) < NEARLY:
        return "as much work"
    return f"{ratio:.2f}x less work" if ratio > 1 else f"{_percent_more(ratio)} more work"


def _percent_more(ratio: float) -> str:
    more = 100 * (1 / ratio - 1) if ratio > 0 else math.inf
    return f"{more:.0f} %" if more >= 1 else f"{more:.1f} %"


def kind_of_plan(plan: Plan) -> str | None:
    """One sentence where early exit adds nothing to a plan; None where images leave at several exits."""
    if plan.is_whole:
        label = network_label(plan.stages[0].head, plan.retrained)
        return f"the plan is the {label}: no plan with early exits is better under this requirement"
    if plan.only_exit is None:
        return None
    shorter = f"the plan is a shorter network: every image leaves at {plan.stages[plan.only_exit - 1].head}"
    if plan.setting == "budgeted":
        return f"{shorter}, as in every plan of the budgeted setting"
    return f"{shorter}, so early exit adds nothing (early exits need more varied images or better early heads)"


def what_would_cut(result: SearchResult, requirement: Requirement, failed: int = 0) -> str:
    """What would have to change for exits to pay, where the whole network won under `requirement`.

    `failed` counts the graphs that the target could not build.
    """
    plan = result.plan
    if failed and all(each.is_whole for each in result.front):
        return (
            f"{failed} graphs failed on {plan.device}, and every plan with exits needs one of them: run "
            "`mess-compile inspect latency` to see which"
        )
    if plan.setting == "anytime":
        what = "a shorter --deadline" if requirement.deadline_ms is not None else "a --deadline"
        return f"{what} below {plan.predicted.latency_ms:.2f} ms, or cheaper heads (`--heads`), would change that"
    faster = [p for p in result.front if not p.is_whole and p.predicted.latency_ms < plan.predicted.latency_ms]
    if not faster and requirement.max_change is not None:
        return (
            f"no plan with exits that keeps --max-change {requirement.max_change:g}% is faster on {plan.device}: a "
            "larger one, or heads that are taught better, would change that"
        )
    if not faster:
        return (
            f"no plan with exits is faster on {plan.device}: cheaper heads (`--heads`), larger images or a deeper "
            "network would change that"
        )
    by_change = requirement.max_change is not None
    nearest = max(faster, key=lambda each: -(each.predicted.change or 0.0) if by_change else each.predicted.miou)
    lost = _tenths(plan.baseline.miou + plan.offset_pp - nearest.predicted.miou)
    changed = _tenths(nearest.predicted.change or 0.0)
    options = [] if requirement.objective in (None, "latency") else ["--optimise latency"]
    if requirement.max_change is not None and changed > requirement.max_change:
        options.append(f"--max-change {changed:.1f}%")
    allowed = requirement.max_err_pp
    if (allowed is None and not by_change) or (allowed is not None and lost > allowed):
        options.append(f"--max-err {lost:.1f}%")
    ratio = plan.predicted.latency_ms / nearest.predicted.latency_ms
    return f"{' '.join(options)} would allow a plan with exits that is {speed(ratio)}"


def _tenths(value: float) -> float:
    """A figure that is asked for, rounded up to tenths, at least 0."""
    return max(0.0, math.ceil(round(10 * value, 6)) / 10)


def tail_sentence(plan: Plan) -> str | None:
    """A sentence where the slowest images take longer than with the baseline."""
    own, other = plan.predicted, plan.baseline
    pairs = (("p95", own.p95_ms, other.p95_ms), ("worst case", own.worst_ms, other.worst_ms))
    slower = [f"{name} {ms:.2f} ms against {base:.2f} ms" for name, ms, base in pairs if ms > base * (1 + NEARLY)]
    return f"the slowest images take longer than with the baseline: {', '.join(slower)}" if slower else None


def estimate_sentence(plan: Plan) -> str | None:
    """The error of estimated latencies, and whether the saving is larger; None of measured ones."""
    errors = [figures.error for figures in (plan.predicted, plan.baseline) if figures.error is not None]
    if not errors:
        return None
    ratio = plan.baseline.latency_ms / plan.predicted.latency_ms if plan.predicted.latency_ms else math.inf
    estimates = f"latencies are estimates, off by a factor of up to {max(errors):.1f}"
    if max(ratio, 1 / ratio) >= max(errors):
        return estimates
    return f"{estimates}: {speed(ratio)} is within that error; profile on the device"


def sentences_of(plan: Plan) -> tuple[str, ...]:
    """The sentences that accompany a plan's figures in full output and in the report."""
    found = (kind_of_plan(plan), tail_sentence(plan), estimate_sentence(plan))
    return tuple(sentence for sentence in found if sentence is not None)


def by_name(plan: Plan) -> tuple[tuple[str, Figures], tuple[str, Figures]]:
    """The figures of baseline and plan."""
    return (baseline_label(plan.baseline_name, plan.retrained), plan.baseline), ("plan", plan.predicted)


def figures_table(plan: Plan) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Title, header and rows of all figures, baseline first."""
    estimated = [name for name, figures in by_name(plan) if figures.source == "estimated"]
    source = f"ESTIMATED latency of {' and '.join(estimated)}" if estimated else "measured latency"
    energy = plan.predicted.energy_mj is not None
    rows = [
        (*figures_row(name, figures), *(("-" if figures.energy_mj is None else f"{figures.energy_mj:.1f}",) * energy))
        for name, figures in by_name(plan)
    ]
    title = f"{source}, {plan.predicted.images} images of {plan.predicted.split}{against(plan.truth)}"
    return title, (*figure_names(plan.predicted), *(("mJ",) * energy)), rows


def expected_on_new_images(optimism: Optimism) -> str:
    """What to expect on images that the plan was not chosen on, by cross-validation, and what that rests on."""
    basis = optimism.method
    if optimism.groups < optimism.images:
        basis += (
            f"; {optimism.images} images of {optimism.groups} {'sequence' if optimism.groups == 1 else 'sequences'}"
        )
    if optimism.groups < optimism.folds:
        basis += " (too few sequences to generalise)"
    latency, spread = optimism.latency_percent, optimism.spread_pp
    if optimism.few:
        return (
            f"too few images ({optimism.images}): a rough estimate is {round(-optimism.miou_pp, 1) + 0.0:+.1f} pp of "
            f"mIoU relative to the baseline (folds differ by {spread:.1f} pp) and {latency:+.0f} % latency; evaluate "
            f"{FEW_IMAGES} images or more ({basis})"
        )
    return (
        f"expect {0.0 - optimism.miou_pp:+.2f} pp of mIoU relative to the baseline (spread over folds {spread:.2f} pp) "
        f"and {latency:+.1f} % latency: {basis}"
    )


def interval_text(expected: Expected) -> str:
    """What to expect on new images, with its interval and its groups: the share of changed pixels where the truth is
    the network's own output, and the difference of mIoU to the baseline."""
    figures = (expected.low_pp, expected.miou_pp, expected.high_pp)
    low, miou, high = (f"{round(value, 1) + 0.0:+.1f}" for value in figures)
    confidence = f"{100 * expected.confidence:g} %"
    if expected.change is None or expected.change_low is None or expected.change_high is None:
        return f"{miou} pp mIoU against the baseline ({confidence}: {low} to {high}; {expected.rule})"
    return (
        f"{expected.change:.1f} % of the pixels changed ({confidence}: {expected.change_low:.1f} to "
        f"{expected.change_high:.1f}) and {miou} pp mIoU ({low} to {high}; {expected.rule})"
    )


def interval_sentence(expected: Expected | None, without: str) -> str:
    """A sentence with the interval, or with the reason why there is none."""
    if expected is None:
        return without if without == ONE_GROUP else f"no interval for new images ({without})"
    return f"on new images expect {interval_text(expected)}"


def plan_text(plan: Plan) -> str:
    """A plan in one line."""
    own, other = plan.predicted, plan.baseline
    exits = ", ".join(f"{stage.head} {rate:.0%}" for stage, rate in zip(plan.stages, own.exit_rates, strict=True))
    ratio = other.latency_ms / own.latency_ms if own.latency_ms else math.inf
    return (
        f"plan for {plan.device} ({plan.precision}): {exits}; {own.latency_ms:.2f} ms {own.source}, {speed(ratio)}, "
        f"{own.miou:.2f} % mIoU ({own.miou - other.miou:+.2f} pp of the "
        f"{network_label(plan.baseline_name, plan.retrained)}) on {own.images} images of {own.split}"
        f"{against(plan.truth)}"
    )


def result_text(result: SearchResult) -> str:
    """The chosen plan and its proof in one line."""
    return f"{plan_text(result.plan)}; {_proof_in_short(result)}"


def plan_html(plan: Plan) -> str:
    """Where images leave, and the figures of baseline and operating points."""
    figures = [
        figures_row(baseline_label(plan.baseline_name, plan.retrained), plan.baseline),
        *(figures_row(p.name, p.predicted) for p in plan.operating_points),
    ]
    sources = sorted({plan.baseline.source, plan.predicted.source})
    return (
        table_html(
            f"plan for {plan.device}, {plan.setting}, {plan.precision}",
            *exits_table(plan),
        )
        + table_html(
            f"{' and '.join(sources)} latency, {plan.predicted.images} images of {plan.predicted.split}"
            f"{against(plan.truth)}",
            figure_names(plan.predicted),
            figures,
        )
        + text_html(*sentences_of(plan), *(f"warning: {each}" for each in plan.doubts))
    )


def result_html(result: SearchResult) -> str:
    """The chosen plan and its proof."""
    return plan_html(result.plan) + text_html(_proof_in_short(result))


def _proof_in_short(result: SearchResult) -> str:
    certificate = result.certificate
    found = "proved optimal" if certificate.gap == 0 else f"not proved optimal (gap {certificate.gap:.3g})"
    trade_offs = f"{len(result.front)} trade-offs found" + ("" if result.front_complete else ", there may be more")
    return f"{found} over {certificate.space:,} plans; {trade_offs}"


def figure_names(figures: Figures) -> tuple[str, ...]:
    """The names of a row of figures."""
    return FIGURES if figures.change is None else (*FIGURES, "changed %")


def figures_row(name: str, figures: Figures) -> tuple[str, ...]:
    """The cells below `figure_names`."""
    return (
        name,
        f"{figures.miou:.2f}",
        f"{figures.latency_ms:.2f}",
        f"{figures.p95_ms:.2f}",
        f"{figures.worst_ms:.2f}",
        f"{figures.gmacs:.3f}",
        f"{figures.memory_bytes / 2**20:.1f}",
        *([] if figures.change is None else [f"{figures.change:.2f}"]),
    )
