"""A plan survives the way to disk and back, and says when it no longer fits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mess_compile.candidates import Gate
from mess_compile.runtime.errors import InputError, StaleError
from mess_compile.search.plan import check_plan_current, read_result, write_result
from mess_compile.search.requirement import Requirement
from mess_compile.search.solver import search
from tests.search.cases import evidence, with_baseline_alone


@pytest.mark.parametrize("setting", ["input-dependent", "budgeted", "anytime"])
@pytest.mark.parametrize("alone", [False, True])
def test_what_is_written_is_read_again(tmp_path: Path, setting: str, alone: bool) -> None:
    case = evidence((2, 1), 3, 8, seed=4)
    result = search(with_baseline_alone(case, 0.002) if alone else case, Requirement(setting=setting))
    write_result(tmp_path / "plans" / "host.json", result)
    assert read_result(tmp_path / "plans" / "host.json") == result


def test_the_file_has_the_keys_other_programs_rely_on(tmp_path: Path) -> None:
    write_result(tmp_path / "host.json", search(evidence((1,), 2, 6, seed=4), Requirement()))
    content = json.loads((tmp_path / "host.json").read_text())
    assert content["format"] == "mess-plan"
    assert content["source"] == "measured"
    assert {"plan", "front", "certificate"} <= content.keys()
    assert content["certificate"].keys() == {"space", "evaluated", "duplicates", "gap", "exhaustive"}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("plan", "stages"), []),
        (("plan", "stages", 0, "exit_point"), "one"),
        (("plan", "setting"), "sometimes"),
        (("plan", "predicted", "miou"), None),
        (("plan", "gate", "confidence"), "hunch"),
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
