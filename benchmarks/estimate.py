"""How well latencies are estimated on this machine after a part of the graphs was measured, beside MACs alone.

    mess-compile -C WORKSPACE profile --device host
    python benchmarks/estimate.py WORKSPACE [WORKSPACE...] [--device host] [--part 0.1] [--seeds 20]

Three figures: rank correlation over all graphs, the mean of those among the heads of each exit point, and the median
relative error of the graphs that were not measured. MACs alone are scaled by a straight line through the same
measurements in the logarithm; graphs without convolutions count as the fastest of those that have some. The measured
graphs are drawn at random, or those that `choose_calibration` names. Exit code 1 unless estimates are better on all
three, by their means over the seeds and for the chosen graphs; a perfect rank need not be better than another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mess_compile.latency import roofline
from mess_compile.latency.roofline import Estimate, Features
from mess_compile.latency.table import read_latency_table
from mess_compile.network import CandidateNetwork, head_graph_name, read_graph_set
from mess_compile.targets import find_target
from mess_compile.workspace import Workspace

FEWEST_HEADS = 3
"""Among two heads a rank correlation is 1 or -1."""


@dataclass(frozen=True)
class Score:
    """Rank correlation over all graphs and among heads (NaN where no exit point has enough), median relative error."""

    rank: float
    rank_of_heads: float
    error: float


@dataclass(frozen=True)
class Trial:
    """One choice of graphs to measure: estimates, MACs alone, and the share of graphs within their bars."""

    ours: Score
    macs: Score
    covered: float


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 0; equal values share their mean."""
    return np.array([((values < value).sum() + (values <= value).sum() - 1) / 2 for value in values])


def spearman(found: Mapping[str, float], table: Mapping[str, float], names: Sequence[str]) -> float:
    first, second = (ranks(np.array([values[name] for name in names])) for values in (found, table))
    return float(np.corrcoef(first, second)[0, 1]) if np.ptp(first) and np.ptp(second) else 0.0


def score(
    candidate: CandidateNetwork, found: Mapping[str, float], table: Mapping[str, float], known: Collection[str]
) -> Score:
    heads = [
        [head_graph_name(head.name) for head in candidate.heads_at(number + 1)]
        for number in range(len(candidate.exit_points))
    ]
    of_heads = [spearman(found, table, names) for names in heads if len(names) >= FEWEST_HEADS]
    errors = [abs(found[name] / ms - 1) for name, ms in table.items() if name not in known]
    mean = float(np.mean(of_heads)) if of_heads else np.nan
    return Score(spearman(found, table, list(table)), mean, float(np.median(errors)))


def by_macs(graphs: Mapping[str, Features], known: Mapping[str, float]) -> dict[str, float]:
    """A power of the MACs, by least squares in the logarithm; in proportion to them where that is not positive."""
    fitted = [(np.log(graphs[name].macs), np.log(ms)) for name, ms in known.items() if graphs[name].macs]
    x, y = np.array(fitted or [(0.0, 0.0)]).T
    slope = float(np.polyfit(x, y, 1)[0]) if np.ptp(x) else 1.0
    slope = slope if slope > 0 else 1.0
    least = min(graph.macs for graph in graphs.values() if graph.macs)
    scale = float((y - slope * x).mean())
    return {name: float(np.exp(scale + slope * np.log(max(least, graph.macs)))) for name, graph in graphs.items()}


@dataclass(frozen=True)
class Measured:
    """A workspace's graphs and what they took, in ms."""

    name: str
    candidate: CandidateNetwork
    graphs: dict[str, Features]
    prior: dict[str, roofline.Roofline]
    table: dict[str, float]


def read_measured(root: Path, device: str) -> Measured:
    workspace = Workspace(root)
    graph_set = read_graph_set(workspace.graphs)
    graphs = roofline.features(graph_set)
    found = read_latency_table(workspace.latency(device)).entries
    entries = {graph: entry for (graph, precision), entry in found.items() if precision == "fp32"}
    table = {name: entries[name].mean_ms for name in graphs if name in entries and entries[name].source == "measured"}
    prior = roofline.roofline(graphs, find_target(device, root), "fp32")
    return Measured(str(root), graph_set.candidate, graphs, prior, table)


def trial(measured: Measured, names: Sequence[str]) -> Trial:
    table = measured.table
    known = {name: table[name] for name in names}
    found = roofline.calibrated(known, measured.prior)
    within = [found[name].low_ms <= ms <= found[name].high_ms for name, ms in table.items() if name not in known]
    ours = score(measured.candidate, means(found), table, known)
    return Trial(ours, score(measured.candidate, by_macs(measured.graphs, known), table, known), float(np.mean(within)))


def means(found: Mapping[str, Estimate]) -> dict[str, float]:
    return {name: each.mean_ms for name, each in found.items()}


def report(label: str, trials: Sequence[Trial]) -> bool:
    """Prints two lines; whether estimates are better on all three figures, by their means."""
    ours = np.array([figures(trial.ours) for trial in trials])
    macs = np.array([figures(trial.macs) for trial in trials])
    covered = np.mean([trial.covered for trial in trials])
    print(line(label, "estimate", ours.mean(axis=0)), f"  within their bars {covered:.0%}")
    wins = [(ours > macs)[:, 0].sum(), (ours > macs)[:, 1].sum(), (ours < macs)[:, 2].sum()]
    print(line("", "MACs alone", macs.mean(axis=0)), "  estimate better in", *wins, f"of {len(trials)}")
    gains = (ours - macs).mean(axis=0) * (1, 1, -1)
    perfect = (ours.min(axis=0) >= 1) | np.isnan(ours).any(axis=0)
    return bool(((gains > 0) | perfect).all())


def figures(score: Score) -> tuple[float, float, float]:
    return score.rank, score.rank_of_heads, score.error


def line(label: str, what: str, figures: Sequence[float] | NDArray[np.float64]) -> str:
    rank, of_heads, error = figures
    return f"  {label:18} {what:11} {rank:8.3f} {of_heads:8.3f} {error:8.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspaces", nargs="+", type=Path)
    parser.add_argument("--device", default="host")
    parser.add_argument("--part", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=20)
    given = parser.parse_args()
    good = True
    for root in given.workspaces:
        measured = read_measured(root, given.device)
        names, count = sorted(measured.table), max(1, round(given.part * len(measured.table)))
        print(f"{measured.name}: {len(names)} graphs on {given.device}, {count} of them measured")
        print(f"  {'measured':18} {'':11} {'rank':>8} {'heads':>8} {'error':>8}")
        drawn = [np.random.default_rng(seed).permutation(names)[:count].tolist() for seed in range(given.seeds)]
        good &= report(f"{given.seeds} random choices", [trial(measured, each) for each in drawn])
        chosen = roofline.choose_calibration({name: measured.prior[name] for name in names}, count)
        good &= report("choose_calibration", [trial(measured, chosen)])
        unmeasured = {name: graph.ms for name, graph in measured.prior.items()}
        print(line("none", "roofline", figures(score(measured.candidate, unmeasured, measured.table, ()))))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
