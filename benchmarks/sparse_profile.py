"""How little a sparse profile measures, and whether the plan is the one that all measurements give.

    mess-compile -C WORKSPACE profile --device host
    python benchmarks/sparse_profile.py WORKSPACE [--device host] [--split 'val[:50]']

Pretends that nothing was measured, and replays the entries of the latency table when they are asked for. Plans are
compared by exits, heads and thresholds, or by their refusal. Exit code 1 unless every requirement gets the same answer
with at most 40 % of the measurements.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mess_compile.evaluate.statistics import ExitStatistics, read_statistics
from mess_compile.latency import roofline
from mess_compile.latency.table import LatencyTable, check_table_current, read_latency_table
from mess_compile.network import GraphSet, read_graph_set
from mess_compile.profile import selection
from mess_compile.profile.selection import Subject
from mess_compile.runtime.base.errors import RequirementError
from mess_compile.runtime.measure.job_pool import PSEUDO_GRAPHS
from mess_compile.search.metrics import Evidence
from mess_compile.search.requirement import Requirement, parse_max_err, parse_max_latency
from mess_compile.search.solver import search
from mess_compile.targets import find_target
from mess_compile.workspace import Workspace

GOAL = 0.4
REQUIREMENTS = {
    "--max-err 1%": Requirement(max_err_pp=parse_max_err("1%")),
    "--max-err 0.5%": Requirement(max_err_pp=parse_max_err("0.5%")),
    "--max-latency 0.5x --optimise accuracy": Requirement(objective="accuracy", max_latency=parse_max_latency("0.5x")),
    "--max-latency 0.25x --optimise accuracy": Requirement(
        objective="accuracy", max_latency=parse_max_latency("0.25x")
    ),
}


@dataclass(frozen=True)
class Replay:
    """What was asked for, in how many batches, and how long the searches took that named it."""

    table: LatencyTable
    batches: int
    seconds: float


def replayed(subject: Subject, whole: LatencyTable) -> Replay:
    table, batches, start = replace(whole, entries={}), 0, time.perf_counter()
    while wanted := selection.next_batch(subject, table):
        table = replace(table, entries=table.entries | {key: whole.entries[key] for key in wanted.graphs})
        batches += 1
    return Replay(table, batches, time.perf_counter() - start)


def answer(graph_set: GraphSet, table: LatencyTable, statistics: ExitStatistics, requirement: Requirement) -> object:
    """The plan's stages; None when there is no plan."""
    try:
        return search(Evidence(graph_set, table, statistics), requirement).plan.stages
    except RequirementError:
        return None


def outside(subject: Subject, found: LatencyTable, whole: LatencyTable) -> str:
    """How many of the graphs that were not measured are not within the bars of their estimates."""
    bars: Mapping[selection.Key, roofline.Estimate] = selection.estimates(subject, found)
    open_ = [key for key in whole.entries if key not in found.entries]
    wrong = sum(not bars[key].low_ms <= whole.entries[key].mean_ms <= bars[key].high_ms for key in open_)
    return f"{wrong} of {len(open_)} outside their bars"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--device", default="host")
    parser.add_argument("--table", help="another table below latency/ than the device's")
    parser.add_argument("--split", default="val[:50]")
    given = parser.parse_args()
    workspace = Workspace(given.workspace)
    graph_set = read_graph_set(workspace.graphs)
    statistics = read_statistics(workspace.statistics(given.split))
    whole = read_latency_table(workspace.latency(given.table or given.device))
    check_table_current(whole, graph_set)
    graphs = roofline.features(graph_set) | roofline.pseudo_features(graph_set.candidate)
    priors = {"fp32": roofline.roofline(graphs, find_target(given.device, workspace.root), "fp32")}
    twins, good = selection.twins(graph_set), True
    print(f"{given.workspace}: {len(graph_set.graphs)} graphs, of which {len(twins)} equal others in structure")
    for name, requirement in REQUIREMENTS.items():
        subject = Subject((graph_set,), priors, {"fp32": statistics}, (requirement,), twins)
        replay = replayed(subject, whole)
        table = selection.expected_table(subject, replay.table)
        same = answer(graph_set, table, statistics, requirement) == answer(graph_set, whole, statistics, requirement)
        measured = sum(key[0] not in PSEUDO_GRAPHS for key in replay.table.entries)
        good &= same and measured <= GOAL * len(graph_set.graphs)
        share = f"{selection.coverage(subject, replay.table)} ({measured / len(graph_set.graphs):.0%})"
        print(f"{name}: {share}; {'the same' if same else 'ANOTHER'} plan")
        print(
            f"  {replay.batches} batches, {replay.seconds:.0f} s of searches, {outside(subject, replay.table, whole)}"
        )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
