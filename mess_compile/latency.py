"""The latency table of one target, and what a path through the cascade costs by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mess_compile import files
from mess_compile.candidates import CandidateNetwork, GraphSet, head_graph_name, output_name, segment_name
from mess_compile.runtime.errors import InputError, StaleError

UPLOAD, DOWNLOAD, NULL = "upload", "download", "null"
PSEUDO_GRAPHS = (UPLOAD, DOWNLOAD, NULL)
SOURCES = ("measured", "estimated")
Quantity = Literal["mean_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms"]
_MOST_MS = 1e9  # sums over a data set, in ns, must fit 64 bits
_QUANTITIES: tuple[Quantity, ...] = ("mean_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms")


@dataclass(frozen=True)
class Latency:
    """What one graph costs in one precision. `sha256` is that of the graph measured, empty for pseudo graphs."""

    graph: str
    sha256: str
    precision: str
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    runs: int
    source: str


@dataclass(frozen=True)
class LatencyTable:
    """All latencies of one target, by (graph, precision).

    Beside the graphs there are three pseudo graphs: `upload` (frame to device), `download` (labels back) and `null`
    (what a decision costs beside its head: on a CPU a read of the counts and a comparison). `network` is the candidate
    network's identity, `environment` what the measurement depended on (machine, cores, spread).
    """

    device: str
    library: str
    library_version: str
    network: str
    environment: dict[str, str]
    source: str
    entries: dict[tuple[str, str], Latency]

    def latency(self, graph: str, precision: str) -> Latency:
        """Raises InputError naming the graph and what to run."""
        entry = self.entries.get((graph, precision))
        if entry is None:
            raise InputError(f"the latency table of {self.device} has no {precision} entry for {graph}: {self.remedy}")
        return entry

    def cost_ns(self, graph: str, precision: str, quantity: Quantity = "mean_ms") -> int:
        milliseconds: float = getattr(self.latency(graph, precision), quantity)
        return round(milliseconds * 1e6)

    @property
    def precisions(self) -> tuple[str, ...]:
        return tuple(sorted({precision for _, precision in self.entries}))

    @property
    def remedy(self) -> str:
        return _remedy(self.device)


def _remedy(device: str) -> str:
    return f"run `mess-compile profile --device {device}`"


@dataclass(frozen=True)
class StageGraphs:
    """The names of the graphs that one stage of a cascade runs."""

    segment: str
    head: str
    output: str


def stage_graphs(candidate: CandidateNetwork, heads: Sequence[str]) -> tuple[StageGraphs, ...]:
    """The graphs of a cascade that leaves through `heads`, named in running order.

    Raises InputError when the heads do not lie at ever deeper exit points.
    """
    stages, previous = [], 0
    for name in heads:
        point = candidate.head(name).exit_point
        if point <= previous:
            raise InputError(f"the heads {', '.join(heads)} are not at ever deeper exit points")
        output = output_name(candidate.exit_point(point).hw)
        stages.append(StageGraphs(segment_name(previous, point), head_graph_name(name), output))
        previous = point
    return tuple(stages)


def path_costs_ns(
    table: LatencyTable,
    candidate: CandidateNetwork,
    heads: Sequence[str],
    precision: str,
    quantity: Quantity = "mean_ms",
) -> tuple[int, ...]:
    """What an image costs that leaves at each of the plan's exits, in ns.

    Upload + segments + gated heads up to the exit taken + one null stage per decision + output graph + download; the
    last exit decides nothing. Source: DESIGN.md, Latency of a plan. Raises InputError when the table lacks a graph.
    """
    costs: list[int] = []
    spent = table.cost_ns(UPLOAD, precision, quantity)
    download = table.cost_ns(DOWNLOAD, precision, quantity)
    stages = stage_graphs(candidate, heads)
    for stage in stages:
        spent += table.cost_ns(stage.segment, precision, quantity) + table.cost_ns(stage.head, precision, quantity)
        if stage is not stages[-1]:
            spent += table.cost_ns(NULL, precision, quantity)
        costs.append(spent + table.cost_ns(stage.output, precision, quantity) + download)
    return tuple(costs)


def report_times_ns(
    table: LatencyTable,
    candidate: CandidateNetwork,
    heads: Sequence[str],
    precision: str,
    quantity: Quantity = "mean_ms",
) -> tuple[int, ...]:
    """When each exit's labels are there in the anytime setting, in ns: every report pays output graph and download."""
    times: list[int] = []
    now = table.cost_ns(UPLOAD, precision, quantity)
    for stage in stage_graphs(candidate, heads):
        for graph in (stage.segment, stage.head, stage.output, DOWNLOAD):
            now += table.cost_ns(graph, precision, quantity)
        times.append(now)
    return tuple(times)


def baseline_cost_ns(table: LatencyTable, baseline: str, precision: str, quantity: Quantity = "mean_ms") -> int:
    """What an image costs on a single-exit network: upload + the graph `baseline` + download, in ns."""
    return sum(table.cost_ns(graph, precision, quantity) for graph in (UPLOAD, baseline, DOWNLOAD))


def check_current(table: LatencyTable, graph_set: GraphSet) -> None:
    """Raises StaleError naming the graphs that changed since `table` was made, or that it lacks."""
    precisions = table.precisions or ("fp32",)
    wanted = {**{name: spec.sha256 for name, spec in graph_set.graphs.items()}, **dict.fromkeys(PSEUDO_GRAPHS, "")}
    changed: dict[str, None] = {}
    missing: dict[str, None] = {}
    for name, sha256 in wanted.items():
        for precision in precisions:
            entry = table.entries.get((name, precision))
            if entry is None:
                missing[name] = None
            elif entry.sha256 != sha256:
                changed[name] = None
    for verb, names in (("was made from other graphs than these", changed), ("lacks graphs", missing)):
        if names:
            raise StaleError(f"the latency table of {table.device} {verb} ({_listed(list(names))}): {table.remedy}")
    if table.network != graph_set.candidate.identity:
        raise StaleError(f"the latency table of {table.device} was made from another network: {table.remedy}")


def _listed(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def write_latency_table(path: Path, table: LatencyTable) -> None:
    """Write `latency/<device>.json`; all of it or nothing."""
    content = {name: getattr(table, name) for name in _TABLE_FIELDS}
    entries = [asdict(entry) for _, entry in sorted(table.entries.items())]
    files.write_json(path, "mess-latency", 1, {**content, "entries": entries})


_TABLE_FIELDS = ("device", "library", "library_version", "network", "environment", "source")


def read_latency_table(path: Path) -> LatencyTable:
    """Read `latency/<device>.json`. Raises InputError when it is missing or damaged."""
    remedy = _remedy(path.stem)
    content = files.read_json(path, "mess-latency", 1, remedy)
    table: LatencyTable = files.decoded(path, remedy, lambda: _table_from_json(content))
    return table


def _table_from_json(content: dict[str, Any]) -> LatencyTable:
    entries = [_latency_from_json(entry) for entry in content["entries"]]
    by_key = {(entry.graph, entry.precision): entry for entry in entries}
    if len(by_key) != len(entries):
        raise ValueError("a graph is there twice")
    return LatencyTable(
        device=str(content["device"]),
        library=str(content["library"]),
        library_version=str(content["library_version"]),
        network=str(content["network"]),
        environment={str(key): str(value) for key, value in content["environment"].items()},
        source=_source(content["source"]),
        entries=by_key,
    )


def _latency_from_json(content: dict[str, Any]) -> Latency:
    milliseconds = {name: float(content[name]) for name in _QUANTITIES}
    for name, value in milliseconds.items():
        if not 0 <= value <= _MOST_MS:
            raise ValueError(f"{name} of {content['graph']} is {value}")
    return Latency(
        graph=str(content["graph"]),
        sha256=str(content["sha256"]),
        precision=str(content["precision"]),
        runs=int(content["runs"]),
        source=_source(content["source"]),
        **milliseconds,
    )


def _source(text: Any) -> str:
    if text not in SOURCES:
        raise ValueError(f"source {text!r} is neither measured nor estimated")
    return str(text)
