"""Selects what to measure on a slow device: only graphs that could still change the plan.

A graph that was not measured takes at least the lower bound of its estimate. A table of measurements, with lower bounds
in place of the missing ones, is optimistic: it overstates the cost of no plan. The best plan by this table may contain
graphs that were not measured; these are measured next. Once all its graphs are measured, its cost is exact, every other
plan costs at least what the table says, which is no better, and a table of measurements alone gives the same plan. This
holds for objectives and bounds for which less latency is never worse. All are of this kind once the baseline is
measured, since relative bounds and the horizon of the anytime setting refer to it.

An estimate's interval holds for 90 of 100 graphs: the best plan is missed when one of its graphs is faster than its
lower bound.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import onnx

from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.graph.store import read_model
from mess_compile.graph.workload import activations
from mess_compile.latency.roofline import Estimate, Roofline, calibrated, choose_calibration
from mess_compile.latency.table import Latency, LatencyTable
from mess_compile.network import CandidateNetwork, GraphSet, GraphSpec, segment_name
from mess_compile.runtime.base.errors import RequirementError
from mess_compile.runtime.engines.engine import FP32
from mess_compile.runtime.measure.job_pool import PSEUDO_GRAPHS
from mess_compile.search.hold_out import split_images
from mess_compile.search.metrics import Evidence
from mess_compile.search.requirement import Requirement
from mess_compile.search.solver import search_recipes

Key = tuple[str, str]
"""A graph and its precision, as in a latency table."""
CALIBRATION, FEWEST = 0.05, 5
"""Share of a precision's graphs that calibrate estimates, and the least number of them."""
FAIR = 0.25
"""Share of heads and long segments that is measured when there is no requirement."""
SAMPLED = 0.05
"""Share of the twins that are measured, too, to check that twins agree."""
SAME = 0.05
"""Largest relative difference between measurements of equal graphs."""
NESTED = 0.1
"""Largest relative difference between a segment and the sum of its parts: engines choose kernels for each anew."""


@dataclass(frozen=True)
class Selection:
    """The graphs to measure next, in this order, and the reason for the user."""

    graphs: tuple[Key, ...]
    why: str


@dataclass(frozen=True, eq=False)
class Subject:
    """What is profiled: the graph sets of some recipes of one network, and what is known before any measurement.

    `priors` has the roofline of each graph and pseudo graph, for each precision of a graph and for fp32; `statistics`
    are by recipe; `twins` are those of all graph sets; `other_devices` has estimates from measurements on other devices
    of the kind, used in place of the roofline's. Lower bounds are divided by `slack`: above 1, the best plan is missed
    less often and more is measured.
    """

    graph_sets: tuple[GraphSet, ...]
    priors: Mapping[str, Mapping[str, Roofline]]
    statistics: Mapping[str, ExitStatistics] = field(default_factory=dict)
    requirements: tuple[Requirement, ...] = ()
    twins: Mapping[Key, Key] = field(default_factory=dict)
    slack: float = 1.0
    other_devices: Mapping[Key, Estimate] = field(default_factory=dict)

    @cached_property
    def specs(self) -> dict[Key, GraphSpec]:
        """Every graph, in order, once."""
        return {(spec.name, spec.precision): spec for graphs in self.graph_sets for spec in graphs.graphs.values()}


def _key(graph_set: GraphSet, graph: str) -> Key:
    return graph, graph_set.spec(graph).precision


def twins(*graph_sets: GraphSet) -> dict[Key, Key]:
    """Graph -> the first graph of the same structure and precision, for every graph but those first ones.

    Recipes share graphs that are the same in both. The structure is operators, attributes, shapes and dtypes, those of
    weights included; names and the weights' values are not compared.
    """
    first: dict[str, Key] = {}
    found: dict[Key, Key] = {}
    paths = {_key(graphs, name): graphs.path(name) for graphs in reversed(graph_sets) for name in graphs.graphs}
    for key in dict.fromkeys(_key(graphs, name) for graphs in graph_sets for name in graphs.graphs):
        structure = f"{key[1]} {structure_of(read_model(paths[key]))}"
        if first.setdefault(structure, key) != key:
            found[key] = first[structure]
    return found


def structure_of(model: onnx.ModelProto) -> str:
    """A SHA-256 over a model without names and weight values; 64-bit integers count as structure."""
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in activations(model).items()}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    numbers: dict[str, int] = {"": 0}

    def described(name: str) -> object:
        number = numbers.setdefault(name, len(numbers))
        return (number, _weight(weights[name]) if name in weights else shapes.get(name))

    digest = hashlib.sha256()
    for value in model.graph.input:
        digest.update(repr(described(value.name)).encode())
    for node in model.graph.node:
        attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
        names = [described(name) for name in (*node.input, "", *node.output)]
        digest.update(repr((node.domain, node.op_type, attributes, names)).encode())
    digest.update(repr([described(value.name) for value in model.graph.output]).encode())
    return digest.hexdigest()


def _weight(tensor: onnx.TensorProto) -> object:
    values = b""
    if tensor.data_type == onnx.TensorProto.INT64:  # shapes, axes and indices: they decide what is computed
        nameless = onnx.TensorProto()
        nameless.CopyFrom(tensor)
        nameless.ClearField("name")
        values = nameless.SerializeToString(deterministic=True)
    return tensor.data_type, tuple(tensor.dims), values


def next_batch(subject: Subject, table: LatencyTable) -> Selection | None:
    """The graphs to measure next; `table` has the measurements and failures so far. None when nothing is missing.

    First come the baselines and the graphs that calibrate the estimates. Then, for each requirement, the unmeasured
    graphs of the best plan by `optimistic_table`, until all of them are measured. A twin's measurement stands in for a
    graph's own, except for the graphs of that plan. Last come some twins, to check that they agree. Without statistics
    or requirements, a representative subset is measured instead. Graphs in `table` are not selected again: callers
    measure until they get None or run out of time, and then take the `expected_table`.
    """
    for choose, why in (
        (_start, "baselines, and the graphs that calibrate the estimates best"),
        (_decisive, "those that could still change the plan"),
        (_samples, "a check that graphs of equal structure take equally long"),
    ):
        missing = tuple(key for key in choose(subject, table) if not _is_known(table, key))
        if missing:
            return Selection(tuple(dict.fromkeys(missing)), why)
    return None


def _is_known(table: LatencyTable, key: Key) -> bool:
    return key in table.entries or key in table.failed


def _start(subject: Subject, table: LatencyTable) -> list[Key]:
    baselines = [_key(graphs, name) for graphs in subject.graph_sets for name in graphs.baselines]
    pseudo = [(name, FP32) for name in PSEUDO_GRAPHS]
    return [key for key in baselines if key not in subject.twins] + pseudo + _most_informative(subject, CALIBRATION)


def _most_informative(subject: Subject, share: float, besides: Collection[Key] = ()) -> list[Key]:
    chosen, excluded = [], {*subject.twins, *besides}
    for precision, prior in subject.priors.items():
        distinct = [name for name, its in subject.specs if its == precision and (name, its) not in excluded]
        count = max(FEWEST, math.ceil(share * len(distinct)))
        chosen += [(name, precision) for name in choose_calibration({name: prior[name] for name in distinct}, count)]
    return chosen


def _decisive(subject: Subject, table: LatencyTable) -> Sequence[Key]:
    return (
        contenders(subject, optimistic_table(subject, table))
        if subject.requirements
        else _representative_subset(subject)
    )


def contenders(subject: Subject, optimistic: LatencyTable) -> tuple[Key, ...]:
    """The graphs of the best plans by `optimistic` that are only estimated there; if all are measured, all of them.

    A representative subset when no recipe has both statistics and a baseline that runs. When no plan satisfies a
    requirement, the plan nearest to it in latency counts, if any. Raises InputError, StaleError as `Evidence` and
    `search_recipes` do.
    """
    evidences = [
        Evidence(graphs, optimistic, subject.statistics[graphs.recipe])
        for graphs in subject.graph_sets
        if graphs.recipe in subject.statistics
        and any(_key(graphs, name) in optimistic.entries for name in graphs.baselines)
    ]
    if not evidences:
        return tuple(_representative_subset(subject))
    chosen = split_images(evidences, None).chosen  # as `search` chooses by default
    keys = dict.fromkeys(key for requirement in subject.requirements for key in _best_plan(chosen, requirement))
    estimated = tuple(key for key in keys if optimistic.entries[key].source != "measured")
    return estimated or tuple(keys)


def _best_plan(evidences: Sequence[Evidence], requirement: Requirement) -> list[Key]:
    """The graphs of the best plan, or of the plan nearest in latency when none is fast enough."""
    nearest = replace(requirement, max_latency=None, objective=None)
    for wanted in dict.fromkeys((requirement, nearest)):
        try:
            plan = search_recipes(evidences, wanted, front_by=()).plan
        except RequirementError:
            continue
        baselines = [_key(each.graph_set, each.baseline) for each in evidences]
        return [*baselines, *((graph.name, graph.precision) for graph in plan.graphs)]
    return []


def _representative_subset(subject: Subject) -> list[Key]:
    """Output graphs, segments from the image and between neighbours, and the most informative quarter of the rest."""
    chosen: list[Key] = []
    for graphs in subject.graph_sets:
        candidate = graphs.candidate
        near = [segment_name(a, b) for a, b in candidate.segments() if a == 0 or b == a + 1]
        outputs = dict.fromkeys(candidate.output_of(head) for head in candidate.heads)
        chosen += [_key(graphs, name) for name in (*near, *outputs) if name in graphs.graphs]
    return chosen + _most_informative(subject, FAIR, besides=chosen)


def _samples(subject: Subject, table: LatencyTable) -> Sequence[Key]:
    return sampled_twins(subject.twins, table.entries, math.ceil(SAMPLED * len(subject.twins)))


def sampled_twins(twins: Mapping[Key, Key], measured: Collection[Key], count: int, seed: int = 0) -> tuple[Key, ...]:
    """Twins to measure so that `count` can be compared with a twin; only of kinds with a `measured` member."""
    members = _members(twins)
    known = {first: sum(key in measured for key in group) for first, group in members.items()}
    compared = sum(max(0, seen - 1) for seen in known.values())
    others = [key for first, group in members.items() if known[first] for key in group if key not in measured]
    return tuple(random.Random(seed).sample(others, min(len(others), max(0, count - compared))))


def _members(twins: Mapping[Key, Key]) -> dict[Key, list[Key]]:
    members = {first: [first] for first in twins.values()}
    for twin, first in twins.items():
        members[first].append(twin)
    return members


def differing_twins(
    entries: Mapping[Key, Latency], twins: Mapping[Key, Key], tolerance: float = SAME
) -> tuple[Key, ...]:
    """The first graph of each kind with two measurements that differ by more than the relative `tolerance`."""
    differing = []
    for first, group in _members(twins).items():
        times = [entries[key].mean_ms for key in group if key in entries]
        if times and max(times) > min(times) * (1 + tolerance):
            differing.append(first)
    return tuple(differing)


def optimistic_table(subject: Subject, table: LatencyTable) -> LatencyTable:
    """Every graph as measured, else its twin's measurement, else the lower bound of its estimate; see `source`."""
    return _whole(subject, table, lambda estimate: estimate.low_ms / subject.slack)


def expected_table(subject: Subject, table: LatencyTable) -> LatencyTable:
    """Every graph as measured, else its twin's measurement, else its estimate with the factor of its error."""
    return _whole(subject, table, lambda estimate: estimate.mean_ms)


def _whole(subject: Subject, table: LatencyTable, taken: Callable[[Estimate], float]) -> LatencyTable:
    """`taken` turns an estimate into the time in ms that the table gets."""
    entries = table.entries | _shared(subject, table)
    for (graph, precision), each in estimates(subject, table).items():
        key = (graph, precision)
        if key not in entries and key not in table.failed:
            sha256 = subject.specs[key].sha256 if key in subject.specs else ""
            times = (taken(each),) * 5
            entries[key] = Latency(graph, sha256, precision, *times, 0, "estimated", error=each.factor)
    source = "measured" if all(entry.source == "measured" for entry in entries.values()) else "estimated"
    return replace(table, entries=entries, source=source)


def _shared(subject: Subject, table: LatencyTable) -> dict[Key, Latency]:
    """Measurements of twins under the names of unmeasured graphs, for the kinds whose measurements agree."""
    refused = differing_twins(table.entries, subject.twins)
    shared = {}
    for first, group in _members(subject.twins).items():
        measured = [table.entries[key] for key in group if key in table.entries]
        for graph, precision in group if measured and first not in refused else ():
            if not _is_known(table, (graph, precision)):
                sha256 = subject.specs[graph, precision].sha256
                of = measured[0].graph
                shared[graph, precision] = replace(measured[0], graph=graph, sha256=sha256, shared_with=of)
    return shared


def coverage(subject: Subject, table: LatencyTable) -> str:
    """Such as `measured 41 of 321 graphs, 60 more by their twins`; pseudo graphs are not counted."""
    measured, shared = (len(subject.specs.keys() & found.keys()) for found in (table.entries, _shared(subject, table)))
    return f"measured {measured} of {len(subject.specs)} graphs" + (f", {shared} more by their twins" * bool(shared))


def estimates(subject: Subject, table: LatencyTable) -> dict[Key, Estimate]:
    """Estimates of every graph and pseudo graph, calibrated by the measurements in its precision."""
    found: dict[Key, Estimate] = {}
    for precision, prior in subject.priors.items():
        graphs = {name: prior[name] for name, its in subject.specs if its == precision}
        graphs |= {name: prior[name] for name in PSEUDO_GRAPHS if precision == FP32}
        measured = {
            name: table.entries[name, precision].mean_ms
            for name in graphs
            if name not in PSEUDO_GRAPHS and (name, precision) in table.entries
        }
        within = segment_bounds(subject.graph_sets[0].candidate, measured)
        for name, each in calibrated(measured, graphs).items():
            found[name, precision] = _narrowed(each, *within.get(name, (0.0, math.inf)))
    return found | {key: each for key, each in subject.other_devices.items() if key in found}


def _narrowed(estimate: Estimate, low_ms: float, high_ms: float) -> Estimate:
    mean = min(max(estimate.mean_ms, low_ms), high_ms)
    return Estimate(mean, min(mean, max(estimate.low_ms, low_ms)), max(mean, min(estimate.high_ms, high_ms)))


def segment_bounds(candidate: CandidateNetwork, measured: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Lower and upper bound in ms of each segment, from measurements (ms, by graph); 0 and infinity: unbounded.

    A segment takes no less than any part of it, and no more than the sum of its parts, which need more launches and are
    fused less; both within `NESTED`.
    """
    pairs = candidate.segments()
    within = [(outer, inner) for outer, inner in itertools.product(pairs, pairs) if _is_within(inner, outer)]
    times = {pair: measured[segment_name(*pair)] for pair in pairs if segment_name(*pair) in measured}
    low = {pair: times.get(pair, 0.0) * (1 - NESTED) for pair in pairs}
    high = {pair: times.get(pair, math.inf) * (1 + NESTED) for pair in pairs}
    for _ in candidate.exit_points:  # a tighter bound may tighten others in the next pass
        for outer, inner in within:
            high[inner] = min(high[inner], high[outer])
            ends = (outer[0], inner[0]), (inner[1], outer[1])
            high[outer] = min(high[outer], high[inner] + sum(high.get(end, 0.0) for end in ends))
    for outer, inner in within:
        low[outer] = max(low[outer], low[inner])
    for outer, inner in within:
        ends = (outer[0], inner[0]), (inner[1], outer[1])
        low[inner] = max(low[inner], low[outer] - sum(high.get(end, 0.0) for end in ends))
    return {segment_name(*pair): (min(low[pair], high[pair]), high[pair]) for pair in pairs}


def _is_within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]
