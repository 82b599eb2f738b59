"""Measuring less must not give another plan than measuring everything would."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from mess_compile.latency.roofline import TERMS, Roofline
from mess_compile.latency.table import GraphFailure, LatencyTable
from mess_compile.network import BASELINE, BASELINE_ALONE, GraphSet
from mess_compile.profile import selection
from mess_compile.profile.selection import Key, Selection, Subject
from mess_compile.runtime.base.errors import RequirementError
from mess_compile.runtime.measure.job_pool import PSEUDO_GRAPHS
from mess_compile.search.metrics import Evidence
from mess_compile.search.requirement import Limit, Requirement
from mess_compile.search.solver import search, search_recipes
from tests import small_network
from tests.graph.tiny import tiny_network
from tests.search.brute_force import BrutePlan, all_plans, baseline_of, ns
from tests.search.cases import evidence, exit_statistics
from tests.search.test_solver import brute_identity, cases, identity, key

FP32 = "fp32"
SURE = 1e6
"""So much slack that no bar lies."""


def priors(case: Evidence) -> dict[str, dict[str, Roofline]]:
    """That know nothing but that every graph takes a while."""
    graph = Roofline(0.002, (0.002 / len(TERMS),) * len(TERMS))
    return {FP32: dict.fromkeys([*case.graph_set.graphs, *PSEUDO_GRAPHS], graph)}


def subject(case: Evidence, *requirements: Requirement, slack: float = SURE, **more: dict[Key, Key]) -> Subject:
    return Subject((case.graph_set,), priors(case), {FP32: case.statistics}, requirements, slack=slack, **more)


def nothing_of(table: LatencyTable) -> LatencyTable:
    return replace(table, entries={})


def measured(table: LatencyTable, of: LatencyTable, wanted: Selection) -> LatencyTable:
    """What a device does: each graph once."""
    assert not set(wanted.graphs) & (table.entries.keys() | table.failed.keys())
    assert len(set(wanted.graphs)) == len(wanted.graphs) > 0
    return replace(table, entries=table.entries | {key: of.entries[key] for key in wanted.graphs})


def settled(about: Subject, of: LatencyTable) -> LatencyTable:
    """What a caller with time enough has in the end."""
    table = nothing_of(of)
    while wanted := selection.next_batch(about, table):
        table = measured(table, of, wanted)
    return table


def best(case: Evidence, objective: str, kept: Callable[[BrutePlan], bool]) -> BrutePlan | None:
    plans = [plan for plan in all_plans(case, "input-dependent", 2) if kept(plan)]
    return min(plans, key=lambda plan: key(plan, objective), default=None)


# Lower ends of bars that hold


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(["latency", "accuracy", "workload", "memory"]), st.integers(0, 10**6), st.data())
def test_a_plan_of_measured_graphs_that_is_best_by_lower_bounds_is_the_best(
    case: Evidence, objective: str, seed: int, data: st.DataObject
) -> None:
    """Bounds are some plan's own figures, so that plans of equal cost stand on the edge."""
    n, truth = case.statistics.images, case.table
    bounding = data.draw(st.sampled_from(list(all_plans(case, "input-dependent", 2))))
    limit_ns = bounding.cost_ns // n + 1
    requirement = Requirement(
        objective=objective, max_err_pp=0.0, baseline_miou=bounding.miou, max_latency=Limit(limit_ns / 1e6)
    )
    shares = np.random.default_rng(seed).choice([1.0, 0.8, 0.5], len(truth.entries))
    low = {
        key: replace(entry, mean_ms=entry.mean_ms * share, source="estimated")
        for (key, entry), share in zip(truth.entries.items(), shares, strict=True)
    }
    known = {(name, FP32): truth.latency(name) for name in (*case.graph_set.baselines, *PSEUDO_GRAPHS)}
    for _ in low:
        table = replace(truth, entries=low | known)
        wanted = [key for key in selection.contenders(subject(case, requirement), table) if key not in known]
        if not wanted:
            break
        known |= {key: truth.entries[key] for key in wanted}
    plan = search(replace(case, table=table), requirement).plan
    expected = best(case, objective, lambda plan: plan.miou >= bounding.miou and plan.cost_ns <= limit_ns * n)
    assert expected is not None
    assert identity(plan) == brute_identity(expected)
    assert plan.predicted.latency_ms == expected.cost_ns / n / 1e6


@settings(max_examples=25, deadline=None)
@given(cases(), st.sampled_from(["latency", "accuracy", "workload", "memory"]), st.sampled_from([0.5, 1.0, 2.0]))
def test_the_same_plan_as_with_everything_measured_under_a_bound_relative_to_the_baseline(
    case: Evidence, objective: str, share: float
) -> None:
    cost_ns = ns(case, "upload") + ns(case, baseline_of(case)[0]) + ns(case, "download")
    n = case.statistics.images
    expected = best(case, objective, lambda plan: plan.cost_ns <= round(share * cost_ns) * n)
    about = subject(case, Requirement(objective=objective, max_latency=Limit(share, relative=True)))
    table = settled(about, case.table)
    whole = replace(case, table=selection.expected_table(about, table))
    if expected is None:
        fastest = min(plan.cost_ns for plan in all_plans(case, "input-dependent", 2))
        assert search(whole, Requirement()).plan.predicted.latency_ms == fastest / n / 1e6
        return
    plan = search(replace(case, table=selection.optimistic_table(about, table)), about.requirements[0]).plan
    assert identity(plan) == brute_identity(expected)
    assert {(graph.name, graph.precision) for graph in plan.graphs} <= table.entries.keys()


@settings(max_examples=15, deadline=None)
@given(cases(), st.one_of(st.none(), st.integers(1, 60)))
def test_an_anytime_plan_is_the_same_too(case: Evidence, microseconds: int | None) -> None:
    deadline = None if microseconds is None else microseconds * 1000
    expected = min(all_plans(case, "anytime", 2, deadline), key=lambda plan: key(plan, "anytime"))
    requirement = Requirement(setting="anytime", deadline_ms=None if deadline is None else deadline / 1e6)
    about = subject(case, requirement)
    table = selection.optimistic_table(about, settled(about, case.table))
    if deadline is not None and not expected.score:
        with pytest.raises(RequirementError, match="no plan reports by"):
            search(replace(case, table=table), requirement)
        return
    assert identity(search(replace(case, table=table), requirement).plan) == brute_identity(expected)


# Several recipes


small_cases = st.builds(
    evidence,
    st.lists(st.integers(1, 2), min_size=1, max_size=2).map(tuple),
    rows=st.integers(1, 2),
    images=st.integers(3, 7),
    seed=st.integers(0, 10**6),
    distinct=st.integers(2, 5),
)


def in_fp16(case: Evidence, seed: int) -> tuple[Evidence, LatencyTable]:
    """The network in a second recipe, where some graphs fell back to fp32, with statistics of its own; and what
    everything takes, which the plain enumeration reads by the names of fp32."""
    rng = np.random.default_rng(seed)
    graphs, truth = case.graph_set, case.table
    lowered = {name: spec for name, spec in graphs.graphs.items() if rng.random() < 0.7}
    specs = {
        name: replace(spec, precision="fp16", sha256=f"half-{name}") if name in lowered else spec
        for name, spec in graphs.graphs.items()
    }
    half = replace(graphs, graphs=specs, recipe="fp16")
    taken = {name: int(rng.integers(1, 6)) / 1000 for name in lowered}
    entries = {
        (name, "fp16"): replace(
            truth.latency(name), mean_ms=ms, precision="fp16", sha256=f"half-{name}", p50_ms=ms, p95_ms=ms, p99_ms=ms
        )
        for name, ms in taken.items()
    }
    recipes = {**truth.recipes, "fp16": half.identity}
    whole = replace(truth, entries={**truth.entries, **entries}, recipes=recipes)
    seen = exit_statistics(graphs, case.statistics.images, seed)
    seen = replace(seen, network=half.identity, precision="fp16", labelled=case.statistics.labelled)
    seen = replace(seen, intersection=np.minimum(seen.intersection, seen.labelled[:, None]))
    as_fp32 = {
        (name, FP32): replace(truth.latency(name), mean_ms=taken.get(name, entry.mean_ms))
        for (name, _), entry in truth.entries.items()
    }
    return Evidence(half, whole, seen), replace(truth, entries=as_fp32)


@settings(max_examples=40, deadline=None)
@given(
    small_cases, st.sampled_from(["latency", "accuracy", "workload", "memory"]), st.integers(0, 10**6), st.floats(0, 30)
)
def test_the_best_plan_of_several_recipes_is_found_too(
    case: Evidence, objective: str, seed: int, max_err_pp: float
) -> None:
    half, as_fp32 = in_fp16(case, seed)
    plain = replace(case, table=half.table)
    requirement = Requirement(objective=objective, max_err_pp=max_err_pp)
    prior = priors(case)[FP32]
    about = Subject(
        (case.graph_set, half.graph_set),
        {FP32: prior, "fp16": prior},
        {"fp32": case.statistics, "fp16": half.statistics},
        (requirement,),
        slack=SURE,
    )
    table = settled(about, half.table)
    enumerated = {
        "fp32": case,
        "fp16": replace(
            half,
            graph_set=case.graph_set,
            table=as_fp32,
            statistics=replace(half.statistics, network=case.statistics.network, precision=FP32),
        ),
    }
    least = max(baseline_of(each)[1] for each in enumerated.values()) - max_err_pp
    found = {recipe: best(each, objective, lambda plan: plan.miou >= least) for recipe, each in enumerated.items()}
    ordered = sorted((key(plan, objective)[:3], recipe == "fp16") for recipe, plan in found.items() if plan)
    assert ordered, "a baseline that is the best of all satisfies"
    recipe = "fp16" if ordered[0][1] else "fp32"
    optimistic = selection.optimistic_table(about, table)
    plan = search_recipes([replace(each, table=optimistic) for each in (plain, half)], requirement).plan
    expected = found[recipe]
    assert expected is not None
    assert (plan.precision, identity(plan)) == (recipe, brute_identity(expected))
    assert {(graph.name, graph.precision) for graph in plan.graphs} <= table.entries.keys()


def test_every_recipe_has_its_baseline_and_calibration_measured_first() -> None:
    case = evidence((2, 2), 2, images=5, seed=11)
    half, _ = in_fp16(case, seed=11)
    prior = priors(case)[FP32]
    about = Subject((case.graph_set, half.graph_set), {FP32: prior, "fp16": prior})
    wanted = selection.next_batch(about, nothing_of(half.table))
    assert wanted is not None
    assert {key for key in wanted.graphs if key[0] == BASELINE} == {
        (BASELINE, graphs.spec(BASELINE).precision) for graphs in about.graph_sets
    }
    for precision in (FP32, "fp16"):
        assert sum(key[1] == precision and key[0] not in PSEUDO_GRAPHS for key in wanted.graphs) >= selection.FEWEST


def test_a_kind_of_equal_graphs_is_one_in_all_recipes(tmp_path: Path) -> None:
    """In fp16 the first head of the kind is another graph, the others fell back to fp32."""
    graphs = small_network.graph_set(tmp_path)
    third = replace(graphs.spec(HEADS[1][0]), name="head-third")
    graphs = replace(graphs, graphs={**graphs.graphs, third.name: third})
    specs = graphs.graphs | {HEADS[0][0]: replace(graphs.spec(HEADS[0][0]), precision="fp16")}
    half = replace(graphs, graphs=specs, recipe="fp16")
    found = selection.twins(graphs, half)
    assert found == {HEADS[1]: HEADS[0], (third.name, FP32): HEADS[0]}
    assert not found.keys() & set(found.values())


def test_good_estimates_leave_most_graphs_unmeasured() -> None:
    case = evidence((3, 3, 3), 2, images=6, seed=1)
    graph = {name: entry.mean_ms for (name, _), entry in case.table.entries.items()}
    exact = {FP32: {name: Roofline(ms, (ms / len(TERMS),) * len(TERMS)) for name, ms in graph.items()}}
    requirement = Requirement(max_err_pp=1.0)
    about = replace(subject(case, requirement, slack=1.0), priors=exact)
    table = settled(about, case.table)
    whole = replace(case, table=selection.expected_table(about, table))
    assert identity(search(whole, requirement).plan) == identity(search(case, requirement).plan)
    assert len(table.entries) < len(case.table.entries) * 0.7


def test_wrong_lower_bounds_lose_the_best_plan() -> None:
    """Known and stated: what is measured is settled by lower ends, and one that is too high hides a plan."""
    case = evidence((3, 3, 3), 2, images=6, seed=2)
    about = subject(case, Requirement(), slack=1e-6)
    found = search(replace(case, table=selection.optimistic_table(about, settled(about, case.table))), Requirement())
    assert found.plan.predicted.latency_ms > search(case, Requirement()).plan.predicted.latency_ms


# What is asked for, and when


def test_baselines_and_transfers_are_measured_first() -> None:
    case = evidence((2, 1), 2, images=5, seed=0)
    wanted = selection.next_batch(subject(case, Requirement()), nothing_of(case.table))
    assert wanted is not None
    assert wanted.graphs[:4] == ((BASELINE, FP32), *((name, FP32) for name in PSEUDO_GRAPHS))


def test_a_graph_that_fails_to_build_is_not_asked_for_again_and_costs_only_its_plans() -> None:
    case = evidence((2, 2), 2, images=6, seed=3)
    plan = search(case, Requirement()).plan
    lost = (plan.graphs[1].name, FP32)
    about, table = subject(case, Requirement()), nothing_of(case.table)
    while wanted := selection.next_batch(about, table):
        if lost in wanted.graphs:
            failed = {lost: GraphFailure(*lost[:1], case.graph_set.spec(lost[0]).sha256, FP32, "out of memory")}
            table, wanted = replace(table, failed=failed), Selection(tuple(set(wanted.graphs) - {lost}), wanted.why)
            if not wanted.graphs:
                continue
        table = measured(table, case.table, wanted)
    found = search(replace(case, table=selection.optimistic_table(about, table)), Requirement()).plan
    expected = best(case, "latency", lambda plan: lost[0] not in {f"head-{head}" for head in plan.heads})
    assert table.failed
    assert expected is not None
    assert identity(found) == brute_identity(expected)


def test_a_call_that_ends_early_continues_with_what_it_has() -> None:
    case = evidence((2, 2), 2, images=6, seed=4)
    about, table = subject(case, Requirement(max_err_pp=1.0)), nothing_of(case.table)
    whole = settled(about, case.table)
    wanted = selection.next_batch(about, table)
    assert wanted is not None
    half = measured(table, case.table, Selection(wanted.graphs[:2], ""))
    again = selection.next_batch(about, half)
    assert again is not None
    assert again.graphs == wanted.graphs[2:]
    assert selection.next_batch(about, whole) is None


def test_several_requirements_are_all_answered() -> None:
    case = evidence((2, 2), 2, images=6, seed=5)
    requirements = (Requirement(), Requirement(objective="accuracy"))
    about = subject(case, *requirements)
    table = selection.optimistic_table(about, settled(about, case.table))
    for requirement in requirements:
        plan = search(replace(case, table=table), requirement).plan
        assert identity(plan) == identity(search(case, requirement).plan)


@pytest.mark.parametrize("without", ["statistics", "requirements"])
def test_without_a_requirement_a_representative_subset_is_measured(without: str) -> None:
    case = evidence((3, 3, 3), 2, images=5, seed=6)
    about = subject(case, Requirement())
    about = replace(about, statistics={}) if without == "statistics" else replace(about, requirements=())
    table = settled(about, case.table)
    names = {name for name, _ in table.entries}
    assert {BASELINE, *PSEUDO_GRAPHS, "output-2x3", "output-4x6"} <= names
    assert {"segment-0-1", "segment-0-2", "segment-0-3", "segment-0-4", "segment-2-3"} <= names
    assert len(names) < len(case.table.entries)
    assert 0 < sum(name.startswith("head-") for name in names) < 10


# The table at the end


def test_every_entry_says_whether_it_was_measured() -> None:
    case = evidence((2, 1), 2, images=5, seed=7)
    about = subject(case, Requirement())
    known = {key: case.table.entries[key] for key in [(BASELINE, FP32), ("upload", FP32), ("segment-0-1", FP32)]}
    table = selection.expected_table(about, replace(case.table, entries=known))
    Evidence(case.graph_set, table, case.statistics)  # nothing is missing
    assert {key for key, entry in table.entries.items() if entry.source == "measured"} == known.keys()
    assert table.source == "estimated"
    assert all(entry.error is not None and entry.error > 1 for entry in table.entries.values() if not entry.runs)
    assert selection.expected_table(about, case.table) == case.table
    assert (
        selection.coverage(about, table)
        == f"measured {len(case.graph_set.graphs)} of {len(case.graph_set.graphs)} graphs"
    )


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=5, max_size=5), st.floats(0, 0.5), st.integers(0, 10**6))
def test_no_segment_is_outside_what_others_leave_for_it(parts: list[float], launch_ms: float, seed: int) -> None:
    """Where a graph takes what its parts take and a launch, and measurements are exact to 8 %."""
    candidate = evidence((1, 1, 1, 1), 1, images=3, seed=0).candidate
    random = np.random.default_rng(seed)
    truth = {f"segment-{a}-{b}": sum(parts[a:b]) + launch_ms for a, b in candidate.segments()}
    known = {name: ms * random.uniform(0.92, 1.08) for name, ms in truth.items() if random.random() < 0.4}
    for name, (low_ms, high_ms) in selection.segment_bounds(candidate, known).items():
        assert low_ms <= truth[name] * 1.0001
        assert low_ms <= high_ms
        assert high_ms >= truth[name]


def test_a_whole_and_all_but_one_part_tell_the_last_part() -> None:
    candidate = evidence((1, 1), 1, images=3, seed=0).candidate
    low_ms, high_ms = selection.segment_bounds(candidate, {"segment-0-3": 10.0, "segment-0-1": 2.0})["segment-1-3"]
    assert low_ms == pytest.approx(0.9 * 10 - 1.1 * 2)
    assert high_ms == pytest.approx(1.1 * 10)


# Twins


def changed(change: Callable[[onnx.GraphProto], object]) -> onnx.ModelProto:
    model = tiny_network()
    change(model.graph)
    return model


def renamed(graph: onnx.GraphProto) -> None:
    """Every tensor that is neither input nor output, and every node."""
    fixed = {"", *(value.name for value in (*graph.input, *graph.output))}
    for node in graph.node:
        node.name = f"other {node.name}"
        for names in (node.input, node.output):
            names[:] = [name if name in fixed else f"other {name}" for name in names]
    for tensor in graph.initializer:
        tensor.name = f"other {tensor.name}"


def reweighted(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(values * np.float32(2), tensor.name))


@pytest.mark.parametrize("change", [renamed, reweighted, lambda graph: graph.initializer.sort(key=lambda t: t.name)])
def test_names_weights_and_their_order_make_no_difference(change: Callable[[onnx.GraphProto], object]) -> None:
    assert selection.structure_of(changed(change)) == selection.structure_of(tiny_network())


def swapped(graph: onnx.GraphProto) -> None:
    node = next(node for node in graph.node if node.op_type == "Relu")
    node.op_type = "Sigmoid"


def rewired(graph: onnx.GraphProto) -> None:
    """The same operators and shapes, but the last convolution reads the other branch."""
    node = next(node for node in graph.node if node.op_type == "Add" and node.output[0] == "exit3")
    node.input[1] = node.input[0]


@pytest.mark.parametrize("change", [swapped, rewired, lambda graph: graph.output.pop()])
def test_another_operator_connection_or_output_makes_a_difference(change: Callable[[onnx.GraphProto], object]) -> None:
    assert selection.structure_of(changed(change)) != selection.structure_of(tiny_network())


def resized(height: int) -> onnx.ModelProto:
    """What decides a shape is no weight, even when it is stored like one."""
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, (1, 2, 3, 4))
    labels = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    sizes = numpy_helper.from_array(np.array([1, 2, height, 8]), "sizes")
    node = helper.make_node("Resize", ["image", "", "", "sizes"], ["out"], mode="nearest")
    graph = helper.make_graph([node], "resize", [image], [labels], [sizes])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_integers_that_decide_shapes_make_a_difference() -> None:
    structures = [selection.structure_of(resized(size)) for size in (6, 6, 9)]
    assert structures[0] == structures[1] != structures[2]


HEADS = tuple((f"head-{name}", FP32) for name in small_network.HEADS)


def test_heads_of_equal_architecture_and_shape_are_twins(tmp_path: Path) -> None:
    assert selection.twins(small_network.graph_set(tmp_path)) == {HEADS[1]: HEADS[0]}


def test_the_same_graph_in_another_precision_is_no_twin(tmp_path: Path) -> None:
    graphs = small_network.graph_set(tmp_path)
    specs = graphs.graphs | {HEADS[1][0]: replace(graphs.spec(HEADS[1][0]), precision="fp16")}
    assert selection.twins(replace(graphs, graphs=specs)) == {}


def twin_case() -> tuple[GraphSet, Subject, LatencyTable]:
    """Heads of exit points 1 and 2 that are twins, of which the second is in the best plan."""
    case = evidence((1, 1), 2, images=6, seed=8)
    heads = [f"head-{head.name}" for head in case.candidate.heads]
    entries = {
        k: dataclasses.replace(e, mean_ms=0.003) if k[0] in heads[:2] else e for k, e in case.table.entries.items()
    }
    about = subject(case, Requirement(max_err_pp=100.0), twins={(heads[1], FP32): (heads[0], FP32)})
    return case.graph_set, about, replace(case.table, entries=entries)


def test_twins_share_a_measurement_under_their_own_name_and_hash() -> None:
    graphs, about, truth = twin_case()
    ((twin, first),) = about.twins.items()
    table = selection.expected_table(about, replace(truth, entries={first: truth.entries[first]}))
    shared = table.entries[twin]
    assert (shared.mean_ms, shared.source) == (0.003, "measured")
    assert (shared.graph, shared.sha256) == (twin[0], graphs.spec(twin[0]).sha256)
    assert selection.coverage(about, replace(truth, entries={first: truth.entries[first]})) == (
        f"measured 1 of {len(graphs.graphs)} graphs, 1 more by their twins"
    )


def test_twins_that_differ_do_not_share() -> None:
    _, about, truth = twin_case()
    ((twin, first),) = about.twins.items()
    third = ("head-third", FP32)
    twins = {twin: first, third: first}
    slower = replace(truth.entries[twin], mean_ms=0.00316)
    entries = {first: truth.entries[first], twin: slower}
    assert selection.differing_twins(entries, twins) == (first,)
    assert selection.differing_twins(entries, twins, tolerance=0.06) == ()
    assert selection.differing_twins({twin: slower}, twins) == ()


def test_twins_are_sampled_beside_one_of_their_kind_and_no_more_than_needed() -> None:
    kinds = [[(f"{kind}{i}", FP32) for i in range(10)] for kind in "abc"]
    twins = {key: kind[0] for kind in kinds for key in kind[1:]}
    known = {kinds[0][0], kinds[1][4], kinds[1][5]}
    sampled = selection.sampled_twins(twins, known, count=3)
    assert len(set(sampled)) == 2  # one pair is there
    assert not set(sampled) & (known | set(kinds[2]))
    assert sampled == selection.sampled_twins(twins, known, count=3)
    assert selection.sampled_twins(twins, known, count=1) == ()
    assert len(selection.sampled_twins(twins, known, count=100)) == 17


def test_the_plan_in_the_end_was_measured_itself_not_by_a_twin() -> None:
    _, about, truth = twin_case()
    table = settled(about, truth)
    graphs, statistics = about.graph_sets[0], about.statistics[FP32]
    plan = search(Evidence(graphs, selection.optimistic_table(about, table), statistics), about.requirements[0]).plan
    assert {(graph.name, graph.precision) for graph in plan.graphs} <= table.entries.keys()


def test_a_baseline_trained_alone_is_like_the_other(tmp_path: Path) -> None:
    graphs = small_network.graph_set(tmp_path, baseline_alone="alone")
    again = replace(graphs.spec(BASELINE_ALONE), name=BASELINE)
    both = replace(graphs, graphs={BASELINE: again, **graphs.graphs})
    assert selection.twins(both)[BASELINE_ALONE, FP32] == (BASELINE, FP32)
