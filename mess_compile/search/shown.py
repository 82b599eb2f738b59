"""How plans show themselves: rows of their tables, and those tables in a notebook."""

from __future__ import annotations

from mess_compile.runtime.notebook import table_html, text_html
from mess_compile.search.plan import Figures, Plan, SearchResult

EXITS = ("", "head", "pixels sure at", "leaves at count", "images")
FIGURES = ("", "mIoU %", "latency ms", "p95 ms", "worst ms", "GMACs", "memory MiB")


def exit_rows(plan: Plan) -> list[tuple[str, ...]]:
    """The cells below EXITS: a row for each exit."""
    return [
        (
            f"exit {number}",
            stage.head,
            f"{plan.gate.thresholds[stage.row]:.2f}",
            "-" if stage.cut is None else str(stage.cut),
            f"{rate:.0%}",
        )
        for number, (stage, rate) in enumerate(zip(plan.stages, plan.predicted.exit_rates, strict=True), start=1)
    ]


def plan_html(plan: Plan) -> str:
    """Where images leave, and the plan's figures beside the baseline's."""
    figures = [
        figures_row(plan.baseline_name, plan.baseline),
        *(figures_row(p.name, p.predicted) for p in plan.operating_points),
    ]
    sources = sorted({plan.baseline.source, plan.predicted.source})
    return table_html(
        f"plan for {plan.device}, {plan.setting}, {plan.precision}",
        EXITS,
        exit_rows(plan),
    ) + table_html(
        f"{' and '.join(sources)} latency, {plan.predicted.images} images of {plan.predicted.split}", FIGURES, figures
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
