"""How plans show themselves: rows of their tables, and those tables in a notebook."""

from __future__ import annotations

from mess_compile.runtime.notebook import table_html, text_html
from mess_compile.search.plan import FEW_IMAGES, Figures, Optimism, Plan, SearchResult, Stage

FIGURES = ("", "mIoU %", "latency ms", "p95 ms", "worst ms", "GMACs", "memory MiB")


def exits_table(plan: Plan) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and a row for each exit; without early exits nothing is held against a threshold, and none is shown."""
    gated = len(plan.stages) > 1
    rows = [
        (f"exit {number}", stage.head, *(_decision(plan, stage) if gated else ()), f"{rate:.0%}")
        for number, (stage, rate) in enumerate(zip(plan.stages, plan.predicted.exit_rates, strict=True), start=1)
    ]
    return ("", "head", *(("pixels sure at", "leaves at count") if gated else ()), "images"), rows


def _decision(plan: Plan, stage: Stage) -> tuple[str, str]:
    return f"{plan.gate.thresholds[stage.row]:.2f}", "-" if stage.cut is None else str(stage.cut)


def expected_elsewhere(told: Optimism) -> str:
    """What to expect on other images than those that the plan was chosen on; of few, that it is a guess."""
    basis = told.method
    if told.groups < told.images:
        basis += f"; {told.images} images of {told.groups} {'sequence' if told.groups == 1 else 'sequences'}"
    if told.groups < told.folds:
        basis += ", which say nothing of others"
    if told.few:
        return (
            f"{told.images} images hardly tell; as a guess, its mIoU relative to the baseline's changes by about "
            f"{round(-told.miou_pp, 1) + 0.0:+.1f} pp (folds differ by {told.spread_pp:.1f} pp), and its latency by "
            f"about {told.latency_percent:+.0f} %: evaluate {FEW_IMAGES} images or more ({basis})"
        )
    return (
        f"expect its mIoU, relative to the baseline's, to change by {-told.miou_pp:+.2f} pp (spread over folds "
        f"{told.spread_pp:.2f} pp), and its latency by {told.latency_percent:+.1f} %: {basis}"
    )


def plan_html(plan: Plan) -> str:
    """Where images leave, and the plan's figures beside the baseline's."""
    figures = [
        figures_row(plan.baseline_name, plan.baseline),
        *(figures_row(p.name, p.predicted) for p in plan.operating_points),
    ]
    sources = sorted({plan.baseline.source, plan.predicted.source})
    return (
        table_html(
            f"plan for {plan.device}, {plan.setting}, {plan.precision}",
            *exits_table(plan),
        )
        + table_html(
            f"{' and '.join(sources)} latency, {plan.predicted.images} images of {plan.predicted.split}",
            FIGURES,
            figures,
        )
        + text_html(*(f"mind: {doubt}" for doubt in plan.doubts))
    )


def result_html(result: SearchResult) -> str:
    """The chosen plan, and of how many it is the best."""
    certificate = result.certificate
    proof = "the best" if certificate.gap == 0 else f"not proved the best (gap {certificate.gap:.3g})"
    front = f"{len(result.front)} plans of the front" if not result.front_complete else f"front of {len(result.front)}"
    return plan_html(result.plan) + text_html(f"{proof} of {certificate.space:,} plans; {front}")


def figures_row(name: str, figures: Figures) -> tuple[str, ...]:
    """The cells below FIGURES."""
    return (
        name,
        f"{figures.miou:.2f}",
        f"{figures.latency_ms:.2f}",
        f"{figures.p95_ms:.2f}",
        f"{figures.worst_ms:.2f}",
        f"{figures.gmacs:.3f}",
        f"{figures.memory_bytes / 2**20:.1f}",
    )
