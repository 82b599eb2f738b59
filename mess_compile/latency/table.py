"""Stores the latency table of one target, and computes the cost of paths through the cascade from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mess_compile import files
from mess_compile.network import CandidateNetwork, GraphSet, head_graph_name, is_whole, segment_name
from mess_compile.runtime.base.errors import InputError, StaleError
from mess_compile.runtime.engines.engine import FP32
from mess_compile.runtime.images.notebook import table_html
from mess_compile.runtime.measure.job_pool import DOWNLOAD, NULL, PSEUDO_GRAPHS, UPLOAD

SOURCES = ("measured", "estimated")
Quantity = Literal["mean_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "energy_mj"]
_MOST_MS = 1e9  # sums over a data set, in ns, must fit 64 bits
_MEAN_AND_P99: tuple[Quantity, Quantity] = ("mean_ms", "p99_ms")
_QUANTITIES: tuple[Quantity, ...] = ("mean_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms")


@dataclass(frozen=True)
class Latency:
    """The wall time of one graph in one precision. `sha256` is that of the graph, empty for pseudo graphs.

    `steady` says that its last windows agree. Figures that the library or the device does not report are None:
    `device_ms`, the mean between events on the GPU; `file_bytes` of the loaded file, `scratch_bytes` that a run needs;
    `energy_mj` of a run, the module's mean power in these windows times `mean_ms`. An estimate has an `error`, the
    factor by which it may be too low or too high (true for 90 % of the estimates that were checked). `shared_with`
    names the graph of equal structure whose measurement this is.
    """

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
    steady: bool = True
    device_ms: float | None = None
    file_bytes: int | None = None
    scratch_bytes: int | None = None
    energy_mj: float | None = None
    error: float | None = None
    shared_with: str | None = None

    @property
    def origin(self) -> str:
        """Measured or estimated; an estimate with the factor of its error."""
        return self.source if self.error is None else f"{self.source}, x{self.error:.1f}"


@dataclass(frozen=True)
class GraphFailure:
    """A graph that has no engine on the target, with the error of lint, parser or builder."""

    graph: str
    sha256: str
    precision: str
    error: str


@dataclass(frozen=True)
class LatencyTable:
    """All latencies of one target, by (graph, precision), and the graphs that `failed` there.

    There are three pseudo graphs: `upload` (frame to device), `download` (labels back) and `null` (the cost of a
    decision besides its head: on a CPU, reading the counts and comparing). `network` is the candidate network's
    identity, `recipes` maps each profiled recipe to the identity of its graphs, and `environment` describes the
    conditions of the measurement (machine, cores, spread). A plan's latency is computed from wall times.
    """

    device: str
    library: str
    library_version: str
    network: str
    environment: dict[str, str]
    source: str
    entries: dict[tuple[str, str], Latency]
    recipes: dict[str, str] = field(default_factory=dict)
    failed: dict[tuple[str, str], GraphFailure] = field(default_factory=dict)

    def latency(self, graph: str, precision: str = FP32) -> Latency:
        """Raises InputError naming the graph and what to run."""
        entry = self.entries.get((graph, precision))
        if entry is None:
            raise InputError(f"the latency table of {self.device} has no {precision} entry for {graph}: {self.remedy}")
        return entry

    def cost_ns(self, graph: str, precision: str = FP32, quantity: Quantity = "mean_ms") -> int:
        """The quantity in ns, `energy_mj` in nJ. Raises InputError when the table lacks it."""
        thousandths: float | None = getattr(self.latency(graph, precision), quantity)
        if thousandths is None:
            raise InputError(f"the latency table of {self.device} has no energy for {graph}")
        return round(thousandths * 1e6)

    @property
    def remedy(self) -> str:
        return _remedy(self.device)

    def __repr__(self) -> str:
        recipes, failed = ", ".join(self.recipes), f", {len(self.failed)} failed" if self.failed else ""
        return f"<latencies of {self.device} ({self.library}, {recipes}): {len(self.entries)} {self.source}{failed}>"

    def _repr_html_(self) -> str:
        rows = [
            (
                e.graph,
                e.precision,
                f"{e.mean_ms:.3f}",
                f"{e.p50_ms:.3f}",
                f"{e.p95_ms:.3f}",
                f"{e.p99_ms:.3f}",
                e.origin,
            )
            for e in self.entries.values()
        ]
        failed = [(f.graph, f.precision, "", "", "", "", f"failed: {f.error}") for f in self.failed.values()]
        header = ("graph", "precision", "mean ms", "p50", "p95", "p99", "source")
        return table_html(f"{self.device}: {self.library} {self.library_version}", header, rows + failed)


def _remedy(device: str, more: str = "") -> str:
    return f"run `mess-compile profile --device {device}{more}`"


@dataclass(frozen=True)
class StageGraphs:
    """The graphs that one stage of a cascade runs; a whole network is one graph, from image to labels."""

    segment: str
    head: str | None
    output: str | None

    @property
    def passed(self) -> tuple[str, ...]:
        """The graphs that every image that reaches the stage runs."""
        return (self.segment,) if self.head is None else (self.segment, self.head)

    @property
    def leaving(self) -> tuple[str, ...]:
        """The graphs that an image runs in addition when it leaves here."""
        return () if self.output is None else (self.output,)

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.passed, *self.leaving)


def stage_graphs(candidate: CandidateNetwork, heads: Sequence[str]) -> tuple[StageGraphs, ...]:
    """The graphs of a cascade that exits at `heads`, in running order.

    A whole network has a single exit and is the only entry. Raises InputError when the heads are not at ever deeper
    exit points.
    """
    if len(heads) == 1 and is_whole(heads[0]):
        return (StageGraphs(heads[0], None, None),)
    stages, previous = [], 0
    for name in heads:
        head = candidate.head(name)
        point = head.exit_point
        if point <= previous:
            raise InputError(f"the heads {', '.join(heads)} are not in the order of their exit points: sort them")
        stages.append(StageGraphs(segment_name(previous, point), head_graph_name(name), candidate.output_of(head)))
        previous = point
    return tuple(stages)


def path_costs_ns(
    table: LatencyTable, graph_set: GraphSet, heads: Sequence[str], quantity: Quantity = "mean_ms"
) -> tuple[int, ...]:
    """The cost in ns of an image that leaves at each of the plan's exits, in the precisions of `graph_set`.

    Upload + segments + gated heads up to the exit taken + one null stage per decision + output graph + download; the
    last exit makes no decision. See docs/definitions.md. Raises InputError when the table lacks a graph.
    """
    costs: list[int] = []
    spent = table.cost_ns(UPLOAD, quantity=quantity)
    download = table.cost_ns(DOWNLOAD, quantity=quantity)
    stages = stage_graphs(graph_set.candidate, heads)
    for stage in stages:
        spent += sum(graph_cost_ns(table, graph_set, graph, quantity) for graph in stage.passed)
        if stage is not stages[-1]:
            spent += table.cost_ns(NULL, quantity=quantity)
        leaving = sum(graph_cost_ns(table, graph_set, graph, quantity) for graph in stage.leaving)
        costs.append(spent + leaving + download)
    return tuple(costs)


def report_times_ns(
    table: LatencyTable, graph_set: GraphSet, heads: Sequence[str], quantity: Quantity = "mean_ms"
) -> tuple[int, ...]:
    """The time in ns of each exit's labels in the anytime setting; every report pays output graph and download."""
    times: list[int] = []
    now = table.cost_ns(UPLOAD, quantity=quantity)
    for stage in stage_graphs(graph_set.candidate, heads):
        for graph in stage.all:
            now += graph_cost_ns(table, graph_set, graph, quantity)
        now += table.cost_ns(DOWNLOAD, quantity=quantity)
        times.append(now)
    return tuple(times)


def path_p99_ns(table: LatencyTable, graph_set: GraphSet, heads: Sequence[str], every_report: bool = False) -> int:
    """The p99 of the deepest path through `heads`, in ns: sum of the means + root of the sum of (p99 - mean)^2.

    p99s do not add: all graphs are slow at once far more rarely than one is, so that a sum of many p99s cannot be
    compared with the single p99 of a whole network. Graphs are assumed independent. With `every_report` the reports of
    earlier exits count, too. Raises InputError when the table lacks a graph.
    """
    stages = stage_graphs(graph_set.candidate, heads)
    mean, square = 0, 0.0

    def passes(cost: int, slowest: int) -> None:
        nonlocal mean, square
        mean += cost
        square += float(max(0, slowest - cost)) ** 2

    def passes_pseudo(graph: str) -> None:
        passes(*(table.cost_ns(graph, quantity=quantity) for quantity in _MEAN_AND_P99))

    passes_pseudo(UPLOAD)
    for stage in stages:
        last = stage is stages[-1]
        graphs = stage.all if last or every_report else stage.passed
        for graph in graphs:
            passes(*(graph_cost_ns(table, graph_set, graph, quantity) for quantity in _MEAN_AND_P99))
        if last or every_report:
            passes_pseudo(DOWNLOAD)
        else:
            passes_pseudo(NULL)
    return mean + round(math.sqrt(square))


def graph_cost_ns(table: LatencyTable, graph_set: GraphSet, graph: str, quantity: Quantity = "mean_ms") -> int:
    """The cost of a graph in its precision in `graph_set`. Raises InputError when the table lacks it.

    Single-exit graphs of equal work (a network before and after its weights were trained further) share the mean of
    their measurements, so that no plan is chosen for the noise between them.
    """
    precision = graph_set.spec(graph).precision
    own = table.cost_ns(graph, precision, quantity)
    if not is_whole(graph):
        return own
    source = table.entries[graph, precision].source
    others = [table.entries.get((name, precision)) for name in _of_equal_work(graph_set, graph)]
    costs = [table.cost_ns(each.graph, precision, quantity) for each in others if each and each.source == source]
    return round(sum([own, *costs]) / (1 + len(costs)))


def _of_equal_work(graph_set: GraphSet, whole: str) -> list[str]:
    """The other single-exit graphs of the same workload, sizes and precision."""

    def work(name: str) -> tuple[object, ...]:
        spec = graph_set.spec(name)
        return spec.macs, spec.bytes, spec.workspace_bytes, spec.precision, spec.inputs, spec.outputs

    return [name for name in graph_set.baselines if name != whole and work(name) == work(whole)]


def mean_ms_of(table: LatencyTable, graph_set: GraphSet, graphs: Iterable[str], measured: bool = False) -> float | None:
    """The sum of the graphs' mean latencies; None when the set or the table lacks one of them or has another version.

    With `measured` an estimated entry counts as missing.
    """
    total = 0.0
    for name in graphs:
        spec = graph_set.graphs.get(name)
        entry = None if spec is None else table.entries.get((name, spec.precision))
        if spec is None or entry is None or entry.sha256 != spec.sha256 or (measured and entry.source != "measured"):
            return None
        total += entry.mean_ms
    return total


def has_engine(table: LatencyTable, graph_set: GraphSet, graph: str) -> bool:
    """Whether the target can run a graph in its precision; False when it failed to build."""
    return (graph, graph_set.spec(graph).precision) in table.entries


def check_table_current(table: LatencyTable, graph_set: GraphSet) -> None:
    """Raises StaleError naming the graphs that changed since `table` was made, or that the table lacks."""
    recipes = ",".join(recipe.partition("-")[0] for recipe in (*table.recipes, graph_set.recipe))
    if graph_set.recipe not in table.recipes:
        raise StaleError(
            f"the latency table of {table.device} has {', '.join(table.recipes) or 'no recipe'}, not "
            f"{graph_set.recipe}: {_remedy(table.device, f' --precision {recipes}')}"
        )
    wanted = {(name, spec.precision): spec.sha256 for name, spec in graph_set.graphs.items()}
    known: dict[tuple[str, str], Latency | GraphFailure] = {**table.failed, **table.entries}
    keys = (*wanted, *((pseudo, FP32) for pseudo in PSEUDO_GRAPHS))
    changed = [key[0] for key in keys if key in known and known[key].sha256 != wanted.get(key, "")]
    missing = [key[0] for key in keys if key not in known]
    for verb, names in (("was made from other graphs than these", changed), ("lacks graphs", missing)):
        if names:
            raise StaleError(f"the latency table of {table.device} {verb} ({_listed(names)}): {table.remedy}")
    if table.network != graph_set.candidate.identity or table.recipes[graph_set.recipe] != graph_set.identity:
        raise StaleError(f"the latency table of {table.device} was made from another network: {table.remedy}")


def _listed(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@dataclass(frozen=True)
class _TableDocument:
    """The content of `latency/<device>.json`; keys are in the order in which they are written."""

    device: str
    library: str
    library_version: str
    network: str
    environment: dict[str, str]
    source: str
    recipes: dict[str, str]
    entries: tuple[Latency, ...]
    failed: tuple[GraphFailure, ...]


def write_latency_table(path: Path, table: LatencyTable) -> None:
    """Write `latency/<device>.json`; all of it or nothing."""
    files.write_json(path, "mess-latency", 2, _table_to_json(table))


def table_content_sha256(table: LatencyTable) -> str:
    """A hash of all that the table holds."""
    return files.sha256_of_json(_table_to_json(table))


def _table_to_json(table: LatencyTable) -> dict[str, Any]:
    content = {each.name: getattr(table, each.name) for each in fields(_TableDocument)}
    lists = {name: [asdict(each) for _, each in sorted(content[name].items())] for name in ("entries", "failed")}
    return {**content, **lists}


def read_latency_table(path: Path) -> LatencyTable:
    """Read `latency/<device>.json`. Raises InputError when it is missing or damaged."""
    remedy = _remedy(path.stem)
    content = files.read_json(path, "mess-latency", 2, remedy)
    document: _TableDocument = files.decode_document(path, _TableDocument, content, remedy)
    table: LatencyTable = files.decoded(path, remedy, lambda: _checked_table(document))
    return table


def _checked_table(document: _TableDocument) -> LatencyTable:
    """Raises ValueError for two entries of one graph, an unknown source, or a latency out of range."""
    entries = {(entry.graph, entry.precision): entry for entry in document.entries}
    failed = {(failure.graph, failure.precision): failure for failure in document.failed}
    if len(entries | failed) != len(document.entries) + len(document.failed):
        raise ValueError("a graph has two entries")
    for source in (document.source, *(entry.source for entry in document.entries)):
        if source not in SOURCES:
            raise ValueError(f"source {source!r} is neither measured nor estimated")
    for entry in document.entries:
        _check_range(entry)
    content = {each.name: getattr(document, each.name) for each in fields(document)}
    return LatencyTable(**{**content, "entries": entries, "failed": failed})


def _check_range(entry: Latency) -> None:
    for name in (*_QUANTITIES, "device_ms", "energy_mj", "error"):
        value = getattr(entry, name)
        if value is not None and not 0 <= value <= _MOST_MS:
            raise ValueError(f"{name} of {entry.graph} is {value}")
