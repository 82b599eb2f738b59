"""Where the figures of a report come from."""

from __future__ import annotations

from mess_compile import __version__
from mess_compile.latency.table import LatencyTable
from mess_compile.report.model import Missing
from mess_compile.report.search_output import certified_bounds
from mess_compile.search.display import expected_on_new_images, interval_sentence, network_label
from mess_compile.search.hold_out import held_out_sentence
from mess_compile.search.plan import Guarantee, SearchResult


def provenance_of(result: SearchResult | None, table: LatencyTable | Missing) -> tuple[tuple[str, str], ...]:
    """Names and values, of a search and the latency table as far as they are there."""
    origins: list[tuple[str, str]] = [("mess-compile", __version__)]
    if isinstance(table, LatencyTable):
        origins += [("engine library", f"{table.library} {table.library_version}"), ("latencies", table.source)]
        origins += [(name.replace("_", " "), value) for name, value in table.environment.items() if value]
    if result is not None:
        origins += _origin_of(result)
    return tuple(origins)


def _origin_of(result: SearchResult) -> list[tuple[str, str]]:
    plan = result.plan
    origins = [
        ("network", plan.network),
        ("gate", f"{plan.gate.confidence}, {'edge-aware' if plan.gate.edge_aware else 'plain'}"),
        ("baseline", network_label(plan.baseline_name, plan.retrained)),
        ("chosen on", f"{plan.predicted.images} images of {plan.predicted.split} ({plan.tuned_by})"),
        ("held out", held_out_sentence(result, None)),
        ("latency table, SHA-256", plan.table_sha256),
        ("statistics, SHA-256", plan.statistics_sha256),
        ("search", _proof(result)),
    ]
    if plan.power_mode is not None:
        origins.append(("power mode", plan.power_mode))
    if plan.absent_classes:
        origins.append(("classes without a labelled pixel, in no mIoU", ", ".join(plan.absent_classes)))
    if plan.optimism is not None:
        origins.append(("on new images of this kind", expected_on_new_images(plan.optimism)))
    elif result.without_optimism:
        origins.append(("on new images of this kind", f"no estimate: {result.without_optimism}"))
    origins.append(("interval", _interval(result)))
    if plan.guarantee is not None:
        origins.append((f"certified at {100 * plan.guarantee.confidence:g} %", _certified(plan.guarantee)))
    return origins


def _interval(result: SearchResult) -> str:
    expected = result.plan.expected
    if expected is None:
        return interval_sentence(None, result.without_expected)
    return f"{interval_sentence(expected, '')}: {expected.method}"


def _proof(result: SearchResult) -> str:
    proof, held = result.certificate, result.plan.guarantee
    if proof.gap > 0:
        return f"best found of {proof.space:,} plans; a better one could gain up to {proof.gap:.3g} in the objective"
    if result.plan.safety is not None:
        return f"the best of {result.plan.safety.candidates:,} plans found by search and folds that --safety allows"
    if held is not None and held.place > 1:
        return f"candidate {held.place} of {held.candidates}, fastest to safest, over {proof.space:,} plans"
    return f"proved optimal over {proof.space:,} plans"


def _certified(found: Guarantee) -> str:
    return (
        f"{certified_bounds(found)}; on {found.images_certified} images that it was not chosen on; {found.assumption}"
    )
