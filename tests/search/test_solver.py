"""The plan the search returns is the best there is: checked against a plain enumeration of every plan."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mess_compile.runtime.base.errors import InputError, RequirementError
from mess_compile.runtime.bundle.manifest import OWN_OUTPUT
from mess_compile.search.deadline import Clock, UnfinishedError
from mess_compile.search.metrics import Evidence, figures_of_stages
from mess_compile.search.plan import Plan
from mess_compile.search.requirement import ClassBound, Limit, Requirement
from mess_compile.search.solver import search
from tests.search.brute_force import BrutePlan, all_plans, baseline_of, class_ious_of, ns, slowest
from tests.search.cases import against_own_output, evidence, with_baseline_alone

OBJECTIVES = {
    "latency": lambda plan: plan.cost_ns,
    "accuracy": lambda plan: -plan.miou,
    "workload": lambda plan: plan.macs,
    "memory": lambda plan: plan.memory,
    "energy": lambda plan: plan.energy_nj,
    "anytime": lambda plan: -plan.score,
}

VALUES = {
    "latency": lambda plan: plan.predicted.latency_ms,
    "accuracy": lambda plan: -plan.predicted.miou,
    "workload": lambda plan: plan.predicted.gmacs,
    "memory": lambda plan: plan.predicted.memory_bytes,
    "energy": lambda plan: plan.predicted.energy_mj,
}
UNITS = {"latency": 1e6, "workload": 1e9, "energy": 1e6}


def key(plan: BrutePlan, objective: str) -> tuple[object, ...]:
    return OBJECTIVES[objective](plan), -plan.miou, plan.graphs, plan.text


def identity(plan: Plan) -> tuple[tuple[object, ...], ...]:
    early = [stage for stage in plan.stages if stage.cut is not None]
    return (
        tuple(stage.exit_point for stage in plan.stages),
        tuple(stage.head for stage in plan.stages),
        tuple(stage.row for stage in early),
        tuple(stage.cut for stage in early),
    )


def brute_identity(plan: BrutePlan) -> tuple[tuple[object, ...], ...]:
    return plan.points, plan.heads, plan.rows, plan.cuts


def front_of(case: Evidence) -> list[BrutePlan]:
    """The fastest plan, then each that is more accurate than all faster ones."""
    front: list[BrutePlan] = []
    for plan in sorted(all_plans(case, "input-dependent", 2), key=lambda plan: key(plan, "latency")):
        if not front or plan.miou > front[-1].miou:
            front.append(plan)
    return front


@st.composite
def cases(draw: st.DrawFn, most_heads: int = 2, most_images: int = 9) -> Evidence:
    heads = tuple(draw(st.lists(st.integers(1, most_heads), min_size=1, max_size=3)))
    rows = draw(st.integers(1, 3 if len(heads) < 3 else 2))
    images, seed, distinct = draw(st.integers(3, most_images)), draw(st.integers(0, 10**6)), draw(st.integers(2, 5))
    more = draw(st.integers(0, rows - 1))
    case = evidence(heads, rows, images, seed, distinct, draw(st.booleans()), more)
    case = with_baseline_alone(case, draw(st.integers(1, 9)) / 1000, seed) if draw(st.booleans()) else case
    return against_own_output(case) if draw(st.booleans()) else case


def requirement_about(
    bounding: BrutePlan, case: Evidence, setting: str, data: st.DataObject, most_exits: int = 2
) -> Requirement:
    """Bounds on some figures, met by the plan `bounding` with equality (or nearly: a relative one is drawn anyhow)."""
    n = case.statistics.images
    exact: dict[str, Limit] = {
        "max_latency": Limit((bounding.cost_ns // n + 1) / 1e6),
        "max_latency_p95": Limit(bounding.p95_ns / 1e6),
        "max_latency_worst": Limit(bounding.worst_ns / 1e6),
        "max_energy": Limit((bounding.energy_nj // n + 1) / 1e6),
        "max_workload": Limit((bounding.macs // n + 1) / 1e9),
    }
    limits = {}
    for name in data.draw(st.sets(st.sampled_from(sorted(exact)), max_size=3)):
        share = Limit(data.draw(st.sampled_from([0.5, 0.9, 1.5])), relative=True)
        limits[name] = data.draw(st.sampled_from([exact[name], exact[name], share]))
    objectives = [None] if setting == "anytime" else [None, "latency", "accuracy", "workload", "memory", "energy"]
    accurate = data.draw(st.booleans())
    may_change = setting != "anytime" and case.statistics.truth == OWN_OUTPUT and data.draw(st.booleans())
    most = Fraction(bounding.changed, n * 10**7)
    percents = [round(most + Fraction(1, 10**8), 8), most / 2]
    return Requirement(
        max_class_err=data.draw(class_bounds(bounding, case)) if setting != "anytime" else (),
        max_change=float(data.draw(st.sampled_from(percents))) if may_change else None,
        setting=setting,
        objective=data.draw(st.sampled_from(objectives)),
        max_err_pp=0.0 if accurate else None,
        baseline_miou=bounding.miou if accurate else None,
        max_memory_bytes=data.draw(st.sampled_from([None, bounding.memory])),
        max_exits=data.draw(st.integers(0, most_exits)),
        deadline_ms=data.draw(st.sampled_from([None, 0.004, 0.015, 0.03])) if setting == "anytime" else None,
        **limits,
    )


@st.composite
def class_bounds(draw: st.DrawFn, bounding: BrutePlan, case: Evidence) -> tuple[ClassBound, ...]:
    """Bounds on up to two classes, met by the plan `bounding` with equality (or nearly), or hard to meet."""
    known = bounding.class_ious
    of_baseline = class_ious_of(case, [baseline_of(case)[0]] * case.statistics.images)
    bounds = []
    for name in draw(st.sets(st.sampled_from(sorted(known)), max_size=2)) if draw(st.booleans()) else ():
        lost = max(0.0, 100 * of_baseline[name] - 100 * known[name])
        bounds.append(ClassBound(name, draw(st.sampled_from([lost, min(100.0, lost + 1e-6), lost / 2]))))
    return tuple(bounds)


def satisfies(plan: BrutePlan, requirement: Requirement, case: Evidence) -> bool:
    n, candidate = case.statistics.images, case.graph_set.candidate
    name = baseline_of(case)[0]
    path = ["upload", name, "download"]
    mean, energy = (sum(ns(case, graph, quantity) for graph in path) for quantity in ("mean_ms", "energy_mj"))
    worst = slowest(case, path)
    macs = candidate.exit_points[-1].macs + candidate.heads[-1].macs
    for limit, value, baseline, unit in (
        (requirement.max_latency, plan.cost_ns / n, mean, 1e6),
        (requirement.max_latency_p95, plan.p95_ns, mean, 1e6),
        (requirement.max_latency_worst, plan.worst_ns, worst, 1e6),
        (requirement.max_energy, plan.energy_nj / n, energy, 1e6),
        (requirement.max_workload, plan.macs / n, macs, 1e9),
    ):
        if limit is not None and value > round(limit.value * (baseline if limit.relative else unit)):
            return False
    if requirement.max_memory_bytes is not None and plan.memory > requirement.max_memory_bytes:
        return False
    if requirement.max_change is not None and plan.changed > Fraction(str(requirement.max_change)) * n * 10**7:
        return False
    of_baseline = class_ious_of(case, [name] * n)
    for bound in requirement.max_class_err:
        if 100 * plan.class_ious[bound.name] < 100 * of_baseline[bound.name] - bound.most_pp:
            return False
    return requirement.max_err_pp is None or plan.miou >= (requirement.baseline_miou or 0.0)


def check_against_every_plan(case: Evidence, setting: str, data: st.DataObject) -> None:
    plans = list(all_plans(case, setting, 2))
    requirement = requirement_about(data.draw(st.sampled_from(plans)), case, setting, data)
    deadline = None if requirement.deadline_ms is None else round(requirement.deadline_ms * 1e6)
    plans = list(all_plans(case, setting, requirement.max_exits, deadline))
    feasible = [plan for plan in plans if satisfies(plan, requirement, case)]
    if not feasible:
        with pytest.raises(RequirementError, match="best reachable"):
            search(case, requirement)
        return
    objective = "anytime" if setting == "anytime" else requirement.objective or "latency"
    best = min(feasible, key=lambda plan: key(plan, objective))
    if deadline is not None and not best.score:
        with pytest.raises(RequirementError, match=f"no plan reports by {requirement.deadline_ms:g} ms: the earliest"):
            search(case, requirement)
        return
    n, result = case.statistics.images, search(case, requirement)
    figures = result.plan.predicted
    assert identity(result.plan) == brute_identity(best)
    assert (figures.miou, figures.memory_bytes) == (best.miou, best.memory)
    assert (figures.latency_ms, figures.gmacs) == (best.cost_ns / n / 1e6, best.macs / n / 1e9)
    assert (figures.p95_ms, figures.worst_ms) == (best.p95_ns / 1e6, best.worst_ns / 1e6)
    assert figures.energy_mj == best.energy_nj / n / 1e6
    if case.statistics.truth != OWN_OUTPUT:
        assert figures.change is None
    elif setting != "anytime":
        assert figures.change == 100 * best.changed / n / 1e9
    assert result.certificate.space == len(plans)
    assert result.certificate.gap == 0.0


SETTINGS = st.sampled_from(["input-dependent"] * 3 + ["budgeted", "anytime"])


@settings(max_examples=80, deadline=None)
@given(cases(), SETTINGS, st.data())
def test_the_plan_is_the_best_of_all_plans_that_satisfy(case: Evidence, setting: str, data: st.DataObject) -> None:
    check_against_every_plan(case, setting, data)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(most_heads=3, most_images=12), SETTINGS, st.data())
def test_thousands_of_larger_cases(case: Evidence, setting: str, data: st.DataObject) -> None:
    check_against_every_plan(case, setting, data)


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([0.0, 1.0, 10.0]), st.sampled_from([0.5, 1.0, 2.0]))
def test_a_plan_is_held_against_the_better_baseline(case: Evidence, max_err_pp: float, share: float) -> None:
    """A network trained alone that beats the final exit raises what a plan must reach, else savings are flattered."""
    name, miou = baseline_of(case)
    n, cost_ns = case.statistics.images, ns(case, "upload") + ns(case, name) + ns(case, "download")
    requirement = Requirement(max_err_pp=max_err_pp, max_latency=Limit(share, relative=True))
    feasible = [
        plan
        for plan in all_plans(case, "input-dependent", 2)
        if plan.miou >= miou - max_err_pp and plan.cost_ns <= round(share * cost_ns) * n
    ]
    if not feasible:
        with pytest.raises(RequirementError, match=f"mIoU >= {miou - max_err_pp:.4g} %"):
            search(case, requirement)
        return
    plan = search(case, requirement).plan
    assert identity(plan) == brute_identity(min(feasible, key=lambda plan: key(plan, "latency")))
    assert (plan.baseline_name, plan.baseline_alone) == (name, case.graph_set.baseline_alone)
    assert (plan.baseline.miou, plan.baseline.latency_ms) == (miou, cost_ns / 1e6)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_the_front_misses_no_plan_and_holds_no_beaten_one(case: Evidence) -> None:
    result = search(case, Requirement())
    assert [identity(plan) for plan in result.front] == [brute_identity(plan) for plan in front_of(case)]


@settings(max_examples=25, deadline=None)
@given(cases(), st.sampled_from([None, "worst", "energy"]))
def test_the_front_with_memory_holds_every_plan_that_no_other_beats(case: Evidence, bound: str | None) -> None:
    """Bounds on what the front is not by hold for each of its plans."""
    plans = list(all_plans(case, "input-dependent", 1))
    n, limits = case.statistics.images, {}
    if bound == "worst":
        limits["max_latency_worst"] = Limit(sorted(plan.worst_ns for plan in plans)[len(plans) // 2] / 1e6)
    if bound == "energy":
        limits["max_energy"] = Limit((sorted(plan.energy_nj for plan in plans)[len(plans) // 2] // n + 1) / 1e6)
    requirement = Requirement(max_exits=1, max_err_pp=100.0, **limits)
    best: dict[tuple[float, ...], BrutePlan] = {}
    for plan in plans:
        if satisfies(plan, dataclasses.replace(requirement, max_err_pp=None), case):
            point = plan.cost_ns, -plan.miou, plan.memory
            best[point] = min((plan, best.get(point, plan)), key=lambda each: (each.graphs, each.text))
    front = [
        plan
        for point, plan in sorted(best.items(), key=lambda item: item[0])
        if not any(o != point and all(a <= b for a, b in zip(o, point, strict=True)) for o in best)
    ]
    result = search(case, requirement, front_by=("latency", "miou", "memory"))
    assert [identity(plan) for plan in result.front] == [brute_identity(plan) for plan in front]
    assert result.front_by == ("latency", "miou", "memory")


def test_many_distinct_counts_fall_back_to_the_stated_grid_of_cuts() -> None:
    case = evidence((1,), 1, images=80, seed=3, distinct=300)
    best = min(all_plans(case, "input-dependent", 1), key=lambda plan: key(plan, "accuracy"))
    assert identity(search(case, Requirement(objective="accuracy")).plan) == brute_identity(best)


def test_more_than_64_images_are_distinguished() -> None:
    case = evidence((1, 1), 2, images=70, seed=5, distinct=4)
    plans = list(all_plans(case, "input-dependent", 2))
    best = min(plans, key=lambda plan: key(plan, "accuracy"))
    result = search(case, Requirement(objective="accuracy"))
    assert identity(result.plan) == brute_identity(best)
    assert result.certificate.evaluated + result.certificate.duplicates == result.certificate.space == len(plans)


@pytest.mark.parametrize("seed", range(4))
def test_deeper_exits_that_cost_less_are_not_thrown_away(seed: int) -> None:
    """Where a small output graph makes the deeper exit cheaper, sending fewer images away early is cheaper."""
    case = evidence((1, 1), 2, images=8, seed=seed)
    entries = dict(case.table.entries)
    entries["output-2x3", "fp32"] = dataclasses.replace(entries["output-2x3", "fp32"], mean_ms=1.0)  # exit 1, final
    case = dataclasses.replace(case, table=dataclasses.replace(case.table, entries=entries))
    plans = list(all_plans(case, "input-dependent", 2))
    for bound in sorted(plan.miou for plan in plans)[::-7]:
        best = min((plan for plan in plans if plan.miou >= bound), key=lambda plan: key(plan, "latency"))
        result = search(case, Requirement(max_err_pp=0.0, baseline_miou=bound))
        assert identity(result.plan) == brute_identity(best)


def test_equal_plans_are_ordered_by_text_with_row_10_before_row_2() -> None:
    case = evidence((1,), 12, images=6, seed=6)
    counts = np.full_like(case.statistics.counts, 5)
    counts[:, 0, [2, 10]] = np.array([1, 2, 7, 8, 10, 12])[:, None]
    case = dataclasses.replace(case, statistics=dataclasses.replace(case.statistics, counts=counts))
    for objective in ("latency", "accuracy"):
        best = min(all_plans(case, "input-dependent", 1), key=lambda plan: key(plan, objective))
        assert identity(search(case, Requirement(objective=objective)).plan) == brute_identity(best)
    assert {stage.row for plan in search(case, Requirement()).front for stage in plan.stages if stage.cut} == {10}


@pytest.mark.parametrize("seed", range(4))
def test_when_images_are_all_alike_the_order_by_text_decides(seed: int) -> None:
    case = evidence((2, 1), 3, images=7, seed=seed)
    alike = {
        name: np.repeat(getattr(case.statistics, name)[:1], 7, axis=0)
        for name in ("intersection", "predicted", "labelled")
    }
    case = dataclasses.replace(case, statistics=dataclasses.replace(case.statistics, **alike))
    result = search(case, Requirement())
    assert [identity(plan) for plan in result.front] == [brute_identity(plan) for plan in front_of(case)]


def test_a_head_that_is_equally_sure_of_every_image_decides_nothing() -> None:
    case = evidence((1,), 2, images=5, seed=0, distinct=1)
    whole = 1
    assert search(case, Requirement()).certificate.space == len(case.graph_set.candidate.heads) + whole


def test_a_refusal_names_the_bounds_and_the_best_reachable() -> None:
    case = evidence((1, 2), 2, images=6, seed=2)
    plans = list(all_plans(case, "input-dependent", 2))
    fastest = min(plan.cost_ns for plan in plans) / 6 / 1e6
    with pytest.raises(RequirementError) as refusal:
        search(case, Requirement(max_latency=Limit(fastest / 2)))
    assert f"best reachable: latency {fastest:.4g} ms" in str(refusal.value)
    best = max(plan.miou for plan in plans)
    limit = Limit(1e-6)
    with pytest.raises(RequirementError) as refusal:
        search(case, Requirement(max_err_pp=0.0, baseline_miou=best + 1, max_latency=limit))
    assert f"mIoU {best:.4g} % alone, or latency {fastest:.4g} ms alone" in str(refusal.value)
    slowest = next(plan for plan in plans if plan.miou == best)
    with pytest.raises(RequirementError) as refusal:
        search(case, Requirement(max_err_pp=0.0, baseline_miou=best, max_latency=limit))
    assert f"latency {slowest.cost_ns / 6 / 1e6:.4g} ms with mIoU >= {best:.4g} %" in str(refusal.value)


def test_a_refusal_names_the_least_that_can_change() -> None:
    """Under the other bounds; the most accurate plans, which a table has without it, need not change least."""
    case = against_own_output(evidence((1, 2), 2, images=6, seed=2))
    plans = list(all_plans(case, "input-dependent", 2))
    fastest = min(plan.cost_ns for plan in plans)
    floor = sorted(plan.miou for plan in plans if plan.cost_ns == fastest)[0]
    limit = Limit((fastest // 6 + 1) / 1e6)
    within = [plan for plan in plans if plan.cost_ns <= round(limit.value * 1e6) * 6 and plan.miou >= floor]
    least = min(plan.changed for plan in within) / 6 / 1e7
    best = min(plan.cost_ns for plan in plans if plan.changed <= 0.9 * least * 6e7 and plan.miou >= floor)
    with pytest.raises(RequirementError) as refusal:
        search(case, Requirement(max_change=0.9 * least, max_latency=limit, max_err_pp=0.0, baseline_miou=floor))
    others = f"mIoU >= {floor:.4g} % and latency <= {limit.value:.4g} ms"
    assert f"changed pixels {least:.4g} % with {others}" in str(refusal.value)
    assert f"latency {best / 6 / 1e6:.4g} ms with " in str(refusal.value)
    with pytest.raises(RequirementError) as refusal:
        search(case, Requirement(max_change=0.0, max_latency=Limit(1e-6)))
    least = min(plan.changed for plan in plans) / 6 / 1e7
    assert f"changed pixels {least:.4g} % alone, or latency {fastest / 6 / 1e6:.4g} ms alone" in str(refusal.value)


def test_a_refusal_names_what_is_lost_of_a_class() -> None:
    """Under the other bounds; the most accurate plans need not be best in one class."""
    case = evidence((1, 2), 2, images=6, seed=2)
    plans = list(all_plans(case, "input-dependent", 2))
    limit = Limit((min(plan.cost_ns for plan in plans) // 6 + 1) / 1e6)
    within = [plan for plan in plans if plan.cost_ns <= round(limit.value * 1e6) * 6]
    best = max(100 * plan.class_ious["class1"] for plan in within)
    bound = ClassBound("class1", 5.0, baseline_iou=best + 10)
    with pytest.raises(RequirementError) as refusal:
        search(case, Requirement(max_class_err=(bound,), max_latency=limit))
    assert f"IoU of class1 >= {best + 5:.4g} %" in str(refusal.value)
    assert "IoU of class1 5 pp below with latency <= " in str(refusal.value)


def test_a_bound_on_a_class_needs_one_that_is_there() -> None:
    for most_exits in (2, 3):
        requirement = Requirement(max_class_err=(ClassBound("clas1", 1.0),), max_exits=most_exits)
        with pytest.raises(InputError, match=r"there is no class 'clas1' \(did you mean 'class1'\?\)"):
            search(evidence((1, 2, 1), 2, images=6, seed=2), requirement)


def test_a_bound_on_changes_needs_the_network_s_own_output_as_truth() -> None:
    for bound in (Requirement(max_change=3.0), Requirement(max_change=3.0, max_exits=3)):
        with pytest.raises(InputError, match="the evaluation is against labels: use --max-err"):
            search(evidence((1, 2, 1), 2, images=6, seed=2), bound)


def test_a_relative_latency_bound_is_a_share_of_the_baseline() -> None:
    case = evidence((1, 2), 2, images=6, seed=4)
    baseline = ns(case, "upload") + ns(case, "baseline") + ns(case, "download")
    limit = round(1.5 * baseline)
    feasible = [p for p in all_plans(case, "input-dependent", 2) if p.cost_ns <= limit * 6]
    best = min(feasible, key=lambda plan: key(plan, "accuracy"))
    result = search(case, Requirement(objective="accuracy", max_latency=Limit(1.5, relative=True)))
    assert identity(result.plan) == brute_identity(best)


class Ended(Clock):
    """Time that is up at the given look, or Ctrl-C then."""

    def __init__(self, at: int, by_hand: bool) -> None:
        super().__init__()
        self._left, self._by_hand = at, by_hand

    @property
    def up(self) -> bool:
        self._left -= 1
        if not self._left and self._by_hand:
            raise KeyboardInterrupt
        return self._left <= 0


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(1, 4), st.booleans(), st.sampled_from(sorted(VALUES)), st.data())
def test_an_enumeration_that_is_ended_says_what_a_better_plan_could_gain(
    case: Evidence, at: int, by_hand: bool, objective: str, data: st.DataObject
) -> None:
    plans, n = list(all_plans(case, "input-dependent", 2)), case.statistics.images
    bounding = data.draw(st.sampled_from(plans))
    requirement = Requirement(objective=objective, max_err_pp=0.0, baseline_miou=bounding.miou)
    feasible = [plan for plan in plans if satisfies(plan, requirement, case)]
    best = min(OBJECTIVES[objective](plan) for plan in feasible)
    best = best / n / UNITS[objective] if objective in UNITS else best
    try:
        result = search(case, requirement, clock=Ended(at, by_hand))
    except UnfinishedError:
        return
    assert identity(result.plan) in map(brute_identity, feasible)
    assert result.certificate.gap >= VALUES[objective](result.plan) - best - 1e-12


def test_cuts_off_the_grid_are_reported_apart() -> None:
    """With more images than cuts on the grid the better cut may lie between two of them."""
    case = evidence((1,), 2, images=120, seed=3)
    counts = np.random.default_rng(0).integers(0, 5000, case.statistics.counts.shape).astype(np.int32)
    case = dataclasses.replace(case, statistics=dataclasses.replace(case.statistics, counts=counts))
    found = 0
    for floor in np.linspace(30.0, 60.0, 12):
        try:
            plan = search(case, Requirement(max_err_pp=0.0, baseline_miou=float(floor))).plan
        except RequirementError:
            continue
        refined = [point for point in plan.operating_points if point.name == "refined"]
        for point in refined:
            found += 1
            stages = [
                dataclasses.replace(stage, row=decision.row, cut=decision.cut)
                for stage, decision in zip(plan.stages, point.decisions, strict=True)
            ]
            assert point.predicted == figures_of_stages(case, plan.setting, stages)
            assert point.predicted.miou >= floor
            assert point.predicted.latency_ms < plan.predicted.latency_ms
            assert [stage.row for stage in stages] == [stage.row for stage in plan.stages]
    assert found


def test_the_same_search_twice_gives_the_same_result() -> None:
    assert search(evidence((2, 2), 3, 9, 11), Requirement()) == search(evidence((2, 2), 3, 9, 11), Requirement())
