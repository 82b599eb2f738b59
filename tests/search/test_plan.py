"""A plan survives the way to disk and back, and says when it no longer fits."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile.evaluate import statistics
from mess_compile.latency import table as latency
from mess_compile.network import Gate
from mess_compile.runtime.base.errors import InputError, StaleError
from mess_compile.runtime.bundle.manifest import PROMISED, Promise
from mess_compile.search.plan import (
    Guarantee,
    Optimism,
    check_plan_current,
    check_sources_current,
    read_result,
    write_result,
)
from mess_compile.search.requirement import Requirement
from mess_compile.search.solver import search
from tests.search.cases import evidence, with_baseline_alone

OPTIMISM = Optimism(0.4, 1.5, 5, 0.2, "cross-validation over groups", 90, 12)
GUARANTEE = Guarantee(0.95, 0, 500, 500, 40, 0.8, 1.0, "betting", 0.7, 1.0, "bootstrap", "exchangeable groups", 3, 1, 9)


@pytest.mark.parametrize("setting", ["input-dependent", "budgeted", "anytime"])
@pytest.mark.parametrize("alone", [False, True])
def test_what_is_written_is_read_again(tmp_path: Path, setting: str, alone: bool) -> None:
    case = evidence((2, 1), 3, 8, seed=4)
    result = search(with_baseline_alone(case, 0.002) if alone else case, Requirement(setting=setting))
    write_result(tmp_path / "plans" / "host.json", result)
    assert read_result(tmp_path / "plans" / "host.json") == result


def test_what_is_expected_on_unseen_images_survives_too(tmp_path: Path) -> None:
    result = search(evidence((1,), 2, 6, seed=4), Requirement())
    plan = dataclasses.replace(result.plan, optimism=OPTIMISM, guarantee=GUARANTEE)
    result = dataclasses.replace(result, plan=plan, front_by=("latency", "miou", "memory"))
    write_result(tmp_path / "host.json", result)
    assert read_result(tmp_path / "host.json") == result


FINITE, COUNT, TEXT = st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 1 << 60), st.text(max_size=8)
OPTIMISMS = st.builds(Optimism, FINITE, FINITE, COUNT, FINITE, TEXT, COUNT, COUNT)
GUARANTEES = st.builds(
    *(Guarantee, FINITE, COUNT, COUNT, COUNT, COUNT, FINITE, FINITE, TEXT, FINITE, FINITE, TEXT, TEXT),
    *(COUNT, COUNT, COUNT),
)
PROMISES = st.lists(st.builds(Promise, st.sampled_from(PROMISED), FINITE, st.booleans(), FINITE), max_size=3)
FOUND = search(evidence((1,), 2, 6, seed=4), Requirement())


@settings(deadline=None, max_examples=40)
@given(st.none() | OPTIMISMS, st.none() | GUARANTEES, PROMISES, st.none() | FINITE, st.lists(TEXT, max_size=2))
def test_any_figures_of_a_plan_are_read_again(
    tmp_path_factory: pytest.TempPathFactory,
    optimism: Optimism | None,
    guarantee: Guarantee | None,
    promises: list[Promise],
    reference: float | None,
    warnings: list[str],
) -> None:
    figures = dataclasses.replace(FOUND.plan.predicted, energy_mj=reference, error=reference)
    plan = dataclasses.replace(
        FOUND.plan,
        optimism=optimism,
        guarantee=guarantee,
        promises=tuple(promises),
        predicted=figures,
        doubts=tuple(warnings),
    )
    result = dataclasses.replace(FOUND, plan=plan, without_optimism="".join(warnings))
    path = tmp_path_factory.getbasetemp() / "plan.json"
    write_result(path, result)
    found = read_result(path)
    assert (found.plan, found.without_optimism, found.certificate) == (
        plan,
        result.without_optimism,
        result.certificate,
    )


def test_a_plan_carries_the_hashes_of_what_is_on_disk(tmp_path: Path) -> None:
    """Written, read again and hashed, table and statistics must be those that the plan names."""
    case = evidence((1,), 2, 6, seed=4)
    plan = search(case, Requirement()).plan
    latency.write_latency_table(tmp_path / "host.json", case.table)
    statistics.write_statistics(tmp_path / "val", case.statistics)
    table, found = latency.read_latency_table(tmp_path / "host.json"), statistics.read_statistics(tmp_path / "val")
    assert plan.table_sha256 == latency.table_content_sha256(table)
    assert plan.statistics_sha256 == statistics.statistics_content_sha256(found)
    slower = dataclasses.replace(table.latency("baseline"), mean_ms=99.0)
    table = dataclasses.replace(table, entries={**table.entries, ("baseline", "fp32"): slower})
    counts = np.asarray(found.counts).copy()
    counts[0, 0, 0] += 1
    assert plan.table_sha256 != latency.table_content_sha256(table)
    assert plan.statistics_sha256 != statistics.statistics_content_sha256(dataclasses.replace(found, counts=counts))


def test_a_plan_is_stale_when_what_it_was_searched_from_changed() -> None:
    known = {"latency table": "a" * 64, "statistics": "b" * 64}
    check_sources_current("host", known, {"latency table": "a" * 64})
    check_sources_current("host", known, known)
    with pytest.raises(StaleError, match=r"the statistics changed since the plan for host .*run `mess-compile search`"):
        check_sources_current("host", known, {**known, "statistics": "c" * 64})


def test_the_file_has_the_keys_other_programs_rely_on(tmp_path: Path) -> None:
    write_result(tmp_path / "host.json", search(evidence((1,), 2, 6, seed=4), Requirement()))
    content = json.loads((tmp_path / "host.json").read_text())
    assert content["format"] == "mess-plan"
    assert content["source"] == "measured"
    assert {"plan", "front", "certificate"} <= content.keys()
    assert content["certificate"].keys() == {"space", "evaluated", "duplicates", "bounded", "gap", "exhaustive"}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("plan", "stages"), []),
        (("plan", "stages", 0, "exit_point"), "one"),
        (("plan", "setting"), "sometimes"),
        (("plan", "predicted", "miou"), None),
        (("plan", "gate", "confidence"), "hunch"),
        (("plan", "predicted", "energy_mj"), "much"),
        (("plan", "table_sha256"), "abc"),
        (("plan", "operating_points"), []),
        (("plan", "operating_points", 0, "name"), "best"),
        (("plan", "operating_points", 0, "decisions"), []),
        (("plan", "operating_points", 0, "decisions", 0, "row"), 77),
        (("plan", "optimism"), {"miou_pp": 1.0}),
        (("plan", "optimism"), {**dataclasses.asdict(OPTIMISM), "miou_pp": True}),
        (("plan", "optimism"), {**dataclasses.asdict(OPTIMISM), "folds": 2.5}),
        (("plan", "guarantee"), {**dataclasses.asdict(GUARANTEE), "assumption": None}),
        (("plan", "guarantee"), {**dataclasses.asdict(GUARANTEE), "more": 1}),
        (("front_by",), ["latency"]),
        (("front_by",), ["latency", "miou", "beauty"]),
        (("certificate",), 3),
    ],
)
def test_a_damaged_plan_is_refused_with_the_remedy(tmp_path: Path, path: tuple[str | int, ...], value: object) -> None:
    file = tmp_path / "host.json"
    write_result(file, search(evidence((1,), 2, 6, seed=4), Requirement()))
    content = json.loads(file.read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(InputError):
        read_result(file)


def test_a_missing_plan_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mess-compile search"):
        read_result(tmp_path / "host.json")


def test_a_plan_of_another_network_or_gate_is_stale() -> None:
    case = evidence((1,), 2, 6, seed=4)
    plan = search(case, Requirement()).plan
    check_plan_current(plan, case.graph_set)
    with pytest.raises(StaleError, match="another network"):
        check_plan_current(dataclasses.replace(plan, network="other"), case.graph_set)
    with pytest.raises(StaleError, match=r"another baseline than graphs: run `mess-compile search`"):
        check_plan_current(plan, with_baseline_alone(case, 0.002).graph_set)
    with pytest.raises(StaleError, match="another gate"):
        check_plan_current(dataclasses.replace(plan, gate=Gate(confidence="margin")), case.graph_set)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.update(stages=3), "plan.stages is 3, not a list"),
        (lambda plan: plan["stages"][0].update(row="7"), "plan.stages[0].row is '7', not an integer"),
        (
            lambda plan: plan["predicted"].update(miuo=1.0),
            "plan.predicted.miuo is not a known entry (did you mean 'miou'?)",
        ),
        (lambda plan: plan.pop("tuned_by"), "plan.tuned_by is missing"),
        (lambda plan: plan.update(setting="often"), "plan.setting is 'often', not one of input-dependent, budgeted"),
    ],
)
def test_a_wrong_entry_of_a_plan_is_named_with_its_value(tmp_path: Path, change: Any, message: str) -> None:
    file = tmp_path / "host.json"
    write_result(file, search(evidence((1,), 2, 6, seed=4), Requirement()))
    content = json.loads(file.read_text())
    change(content["plan"])
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"host\.json is damaged \({re.escape(message)}.*: run `mess-compile search`"):
        read_result(file)


def test_a_plan_of_the_release_before_is_read(tmp_path: Path) -> None:
    """Version 5 knew neither promises nor images held out, and no error of an estimate."""
    result = search(evidence((1,), 2, 6, seed=4), Requirement())
    write_result(tmp_path / "host.json", result)
    content = json.loads((tmp_path / "host.json").read_text()) | {"version": 5}
    for name in ("without_hold_out", "what_would_cut"):
        del content[name]
    for plan in (content["plan"], *content["front"]):
        del plan["promises"], plan["hold_out"]
        for place in (plan, *plan["operating_points"]):
            for name in ("predicted", "baseline"):
                place.get(name, {}).pop("error", None)
    (tmp_path / "host.json").write_text(json.dumps(content))
    found = read_result(tmp_path / "host.json")
    assert found.plan == dataclasses.replace(result.plan, promises=(), hold_out=None)
    assert found.certificate == result.certificate
