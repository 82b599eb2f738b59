"""Estimates the latency table of a device that cannot be reached, or that was measured only in part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mess_compile.latency.roofline import (
    USUAL,
    Calibration,
    Estimate,
    Roofline,
    calibrate,
    calibrated,
    features,
    for_another_device,
    pseudo_features,
    roofline,
)
from mess_compile.latency.table import Latency, LatencyTable
from mess_compile.network import GraphSet
from mess_compile.runtime.engines.engine import FP32
from mess_compile.runtime.measure.job_pool import PSEUDO_GRAPHS
from mess_compile.targets import Target

Priors = Mapping[str, Mapping[str, Roofline]]
"""Precision -> graph -> roofline."""
Key = tuple[str, str]
"""Graph and precision."""


def priors_of(plain: GraphSet, target: Target, precisions: Sequence[str]) -> Priors:
    """The rooflines of every graph and pseudo graph on the target; `plain` is the network in fp32."""
    found = features(plain) | pseudo_features(plain.candidate)
    return {precision: roofline(found, target, precision) for precision in dict.fromkeys((FP32, *precisions))}


def estimated(
    priors: Priors, measured: Mapping[tuple[str, str], float], start: Calibration = USUAL
) -> dict[tuple[str, str], Estimate]:
    """Estimates of every graph in every precision of `priors`, from mean latencies in ms measured on this target.

    A precision without measurements starts from the calibration of fp32.
    """
    found: dict[tuple[str, str], Estimate] = {}
    for precision, prior in priors.items():
        here = {name: ms for (name, other), ms in measured.items() if other == precision and name not in PSEUDO_GRAPHS}
        for name, estimate in calibrated(here, prior, start).items():
            found[name, precision] = estimate
        if precision == FP32 and here:
            start = for_another_device(calibrate(here, prior, start))
    return found


def starting_calibration(tables: Sequence[tuple[Target, LatencyTable]], plain: GraphSet, target: Target) -> Calibration:
    """The calibration by the same network's measurements on another device of the same sort, with or without GPU."""
    best: dict[str, float] = {}
    source = target
    for other, table in tables:
        known = {
            name: entry.mean_ms
            for name, spec in plain.graphs.items()
            for entry in [table.entries.get((name, FP32))]
            if entry is not None and entry.source == "measured" and entry.sha256 == spec.sha256
        }
        if other.name != target.name and (other.gpu is None) == (target.gpu is None) and len(known) > len(best):
            best, source = known, other
    if not best:
        return USUAL
    return for_another_device(calibrate(best, priors_of(plain, source, ())[FP32]))


def forecast(
    graph_sets: Sequence[GraphSet],
    target: Target,
    known: LatencyTable | None,
    tables: Sequence[tuple[Target, LatencyTable]],
    plain: GraphSet,
) -> LatencyTable:
    """The table of `target` for all recipes of `graph_sets`; measurements in `known` of these graphs are reused.

    `tables` are those of other devices, `plain` is the network in fp32. Raises InputError.
    """
    if known is not None and known.network != plain.candidate.identity:
        known = None
    reused = {} if known is None else {key: e for key, e in known.entries.items() if e.source == "measured"}
    wanted = {(pseudo, FP32): "" for pseudo in PSEUDO_GRAPHS}
    for graph_set in graph_sets:
        wanted |= {(name, spec.precision): spec.sha256 for name, spec in graph_set.graphs.items()}
    reused = {key: entry for key, entry in reused.items() if wanted.get(key) == entry.sha256}
    priors = priors_of(plain, target, [precision for _, precision in wanted])
    measured = {key: entry.mean_ms for key, entry in reused.items()}
    found = estimated(priors, measured, starting_calibration(tables, plain, target))
    failures = {} if known is None else known.failed
    failed = {key: failure for key, failure in failures.items() if wanted.get(key) == failure.sha256}
    entries = {
        key: reused.get(key) or estimated_entry(key, sha256, found[key])
        for key, sha256 in wanted.items()
        if key not in failed
    }
    version = known.library_version if known and reused else " or ".join(target.library_versions)
    graphs = sum(name not in PSEUDO_GRAPHS for name, _ in measured)
    basis = f"{graphs} of its graphs measured" if graphs else "its data sheet"
    return LatencyTable(
        device=target.name,
        library=target.library,
        library_version=version or "unknown",
        network=plain.candidate.identity,
        environment={**(known.environment if known and reused else {}), "estimated_from": basis},
        source="measured" if len(reused) == len(entries) else "estimated",
        entries=entries,
        recipes={graph_set.recipe: graph_set.identity for graph_set in graph_sets},
        failed=failed,
    )


def estimated_entry(key: tuple[str, str], sha256: str, estimate: Estimate) -> Latency:
    """An entry for an estimate. Percentiles are not estimated; they repeat the mean."""
    ms = estimate.mean_ms
    return Latency(
        key[0], sha256, key[1], ms, ms, ms, ms, ms, runs=0, source="estimated", steady=False, error=estimate.factor
    )


def transfer_estimates(plain: GraphSet, target: Target) -> Callable[[Mapping[Key, Latency]], dict[Key, Latency]]:
    """A function that estimates upload, download and null stage from measured graphs: trtexec cannot time these three.

    `plain` is the network in fp32.
    """
    priors = priors_of(plain, target, ())

    def times_of(measured: Mapping[Key, Latency]) -> dict[Key, Latency]:
        times = {key: entry.mean_ms for key, entry in measured.items() if key[1] == FP32}
        found = estimated(priors, times)
        return {(name, FP32): estimated_entry((name, FP32), "", found[name, FP32]) for name in PSEUDO_GRAPHS}

    return times_of
