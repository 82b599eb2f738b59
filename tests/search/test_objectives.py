"""A bound means what its option says wherever it is counted: in rows of plans, in refusals, in a plan's figures."""

from __future__ import annotations

import numpy as np
import pytest

from mess_compile.runtime.bundle.manifest import Figures
from mess_compile.search.context import SearchContext
from mess_compile.search.exhaustive.plan_table import PLAN_DTYPE, enumerate_plans
from mess_compile.search.metrics import Evidence
from mess_compile.search.objectives import MEASURES, bounds_of
from mess_compile.search.requirement import ClassBound, Limit, Requirement
from tests.search.brute_force import BrutePlan, all_plans, baseline_of, ns, slowest
from tests.search.cases import against_own_output, evidence

IMAGES = 6
LIMITS = ("max_latency", "max_latency_p95", "max_latency_worst", "max_energy", "max_workload")


def quiet(done: int, total: int) -> None:
    pass


def baseline_ns(case: Evidence, quantity: str = "mean_ms") -> int:
    return sum(ns(case, graph, quantity) for graph in ("upload", "baseline", "download"))


def test_a_refusal_says_every_bound_as_it_was_asked_for() -> None:
    requirement = Requirement(
        max_err_pp=1.0,
        baseline_miou=54.24,
        max_latency=Limit(20.0),
        max_latency_p95=Limit(25.0),
        max_latency_worst=Limit(30.0),
        max_energy=Limit(50.0),
        max_workload=Limit(3.5),
        max_memory_bytes=64 << 20,
        max_change=2.5,
        max_class_err=(ClassBound("class1", 0.5, baseline_iou=40.0),),
    )
    case = against_own_output(evidence((1, 2), 2, IMAGES, seed=1))
    assert [str(bound) for bound in bounds_of(case, requirement).values()] == [
        "mIoU >= 53.24 %",
        "changed pixels <= 2.5 %",
        "IoU of class1 >= 39.5 %",
        "latency <= 20 ms",
        "p95 latency <= 25 ms",
        "worst-case latency <= 30 ms",
        "energy <= 50 mJ",
        "workload <= 3.5 GMACs",
        "memory <= 64 MiB",
    ]


def test_no_bound_is_made_up() -> None:
    assert bounds_of(evidence((1,), 2, IMAGES, seed=1), Requirement(objective="energy")) == {}


@pytest.mark.parametrize("seed", range(4))
def test_a_bound_relative_to_the_baseline_parts_plans_where_a_recount_does(seed: int) -> None:
    case = evidence((1, 2), 2, IMAGES, seed)
    limits = dict.fromkeys(LIMITS, Limit(1.1, relative=True))
    plans = list(all_plans(case, "input-dependent", 2))
    most = sorted(plan.memory for plan in plans)[len(plans) // 2]
    bounds = bounds_of(case, Requirement(max_err_pp=3.0, max_memory_bytes=most, **limits))
    final = case.candidate.exit_points[-1].macs + case.candidate.heads[-1].macs
    expected = {
        "max_err_pp": lambda plan: plan.miou >= baseline_of(case)[1] - 3.0,
        "max_latency": lambda plan: plan.cost_ns <= 1.1 * baseline_ns(case) * IMAGES,
        "max_latency_p95": lambda plan: plan.p95_ns <= 1.1 * baseline_ns(case),
        "max_latency_worst": lambda plan: plan.worst_ns <= 1.1 * slowest(case, ["upload", "baseline", "download"]),
        "max_energy": lambda plan: plan.energy_nj <= 1.1 * baseline_ns(case, "energy_mj") * IMAGES,
        "max_workload": lambda plan: plan.macs <= 1.1 * final * IMAGES,
        "max_memory_bytes": lambda plan: plan.memory <= most,
    }
    assert list(bounds) == ["max_err_pp", *limits, "max_memory_bytes"]
    rows = rows_of(plans)
    for field, satisfies in expected.items():
        assert bounds[field].is_met(rows).tolist() == [satisfies(plan) for plan in plans], field
    best = min(plan.cost_ns for plan in plans) / IMAGES / 1e6
    assert bounds["max_latency"].best_of(rows) == f"latency {best:.4g} ms"
    assert bounds["max_err_pp"].best_of(rows) == f"mIoU {max(plan.miou for plan in plans):.4g} %"


def rows_of(plans: list[BrutePlan]) -> np.ndarray:
    rows = np.zeros(len(plans), PLAN_DTYPE)
    for name in ("cost_ns", "macs", "energy_nj", "p95_ns", "worst_ns", "miou"):
        rows[name] = [getattr(plan, name) for plan in plans]
    rows["memory_bytes"] = [plan.memory for plan in plans]
    return rows


def test_rows_and_figures_say_the_same_of_a_plan() -> None:
    """A refusal takes what can be reached from a plan table in a small space, from a plan's figures in a large one."""
    figures = Figures(12.5, 20.0, 31.25, 54.236, 3.4801, 96 << 19, (1.0,), IMAGES, "val", "measured", 7.0)
    row = np.zeros(1, PLAN_DTYPE)
    counted = {"cost_ns": 12_500_000 * IMAGES, "p95_ns": 20_000_000, "worst_ns": 31_250_000, "miou": 54.236}
    counted |= {"macs": 3_480_100_000 * IMAGES, "memory_bytes": 96 << 19, "energy_nj": 7_000_000 * IMAGES}
    for name, value in counted.items():
        row[name] = value
    requirement = Requirement(max_err_pp=1.0, max_memory_bytes=1, **dict.fromkeys(LIMITS, Limit(1.0)))
    bounds = bounds_of(evidence((1,), 2, IMAGES, seed=1), requirement)
    expected = {
        "max_err_pp": ("accuracy", "mIoU 54.24 %"),
        "max_latency": ("latency", "latency 12.5 ms"),
        "max_latency_p95": (None, "p95 latency 20 ms"),
        "max_latency_worst": (None, "worst-case latency 31.25 ms"),
        "max_energy": ("energy", "energy 7 mJ"),
        "max_workload": ("workload", "workload 3.48 GMACs"),
        "max_memory_bytes": ("memory", "memory 48 MiB"),
    }
    for field, (objective, text) in expected.items():
        bound = bounds[field]
        assert (bound.objective, bound.best_of(row), bound.measure.text(figures)) == (objective, text, text)
    assert {bound.objective for bound in bounds.values()} - {None} == MEASURES.keys()


def test_a_bound_that_nothing_reaches_keeps_every_plan() -> None:
    """The largest bound that can be written, over many images, is beyond 64 bits."""
    case = evidence((1,), 2, images=70, seed=1)
    rows = enumerate_plans(case, SearchContext(Requirement())).plans
    (bound,) = bounds_of(case, Requirement(max_latency=Limit(1e12))).values()
    assert bound.limit == 70 * 10**18 > np.iinfo(np.int64).max
    assert bound.is_met(rows).all()
