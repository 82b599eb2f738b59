"""The second search is quick, and never wrong because of what the first one stored."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mess_compile.runtime.base.errors import RequirementError
from mess_compile.search.context import SearchContext
from mess_compile.search.exhaustive import cache, plan_table
from mess_compile.search.exhaustive.enumeration import Selection
from mess_compile.search.metrics import Evidence
from mess_compile.search.requirement import ClassBound, Limit, Requirement
from mess_compile.search.solver import search
from tests.commands import contents
from tests.search.cases import against_own_output, evidence

REQUIREMENTS = [
    Requirement(),
    Requirement(objective="accuracy", max_latency=Limit(1.5, relative=True)),
    Requirement(objective="energy", max_exits=1),
]


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Evidence]:
    """The evidence of every search that did not find its plan table in the cache."""
    searched: list[Evidence] = []

    def enumerate_plans(evidence: Evidence, context: SearchContext, selection: Selection) -> plan_table.PlanTable:
        searched.append(evidence)
        return plan_table.enumerate_plans(evidence, context, selection)

    monkeypatch.setattr(cache, "enumerate_plans", enumerate_plans)
    return searched


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_a_cached_plan_table_gives_the_same_result(
    tmp_path: Path, requirement: Requirement, searches: list[Evidence]
) -> None:
    case = evidence((2, 1), 3, 9, seed=4)
    search(case, dataclasses.replace(Requirement(), max_exits=requirement.max_exits), cache_folder=tmp_path)
    assert search(case, requirement, cache_folder=tmp_path) == search(case, requirement)
    assert len(searches) == 2, "one of them without a folder"


def test_a_table_for_one_bound_on_changes_is_not_used_for_another(tmp_path: Path, searches: list[Evidence]) -> None:
    """It lacks plans that only the looser bound allows."""
    case = against_own_output(evidence((2, 1), 3, 9, seed=4))
    for percent in (60.0, 80.0, None, 60.0):
        requirement = Requirement(max_change=percent)
        assert search(case, requirement, cache_folder=tmp_path) == search(case, requirement)
    assert len(searches) == 3 + 4, "the last was stored, and four were without a folder"


def test_a_table_for_one_bound_on_a_class_is_not_used_for_another(tmp_path: Path, searches: list[Evidence]) -> None:
    case = evidence((2, 1), 3, 9, seed=4)
    name = case.statistics.classes[0]
    for most_pp in (40.0, 80.0, 40.0):
        requirement = Requirement(max_class_err=(ClassBound(name, most_pp),))
        assert search(case, requirement, cache_folder=tmp_path) == search(case, requirement)
    assert len(searches) == 2 + 3, "the last was stored, and three were without a folder"


@pytest.mark.parametrize("setting", ["budgeted", "anytime"])
def test_quick_settings_store_nothing(tmp_path: Path, setting: str) -> None:
    search(evidence((1,), 2, 6, seed=4), Requirement(setting=setting), cache_folder=tmp_path)
    assert not contents(tmp_path)


def test_other_evidence_is_searched_anew(tmp_path: Path, searches: list[Evidence]) -> None:
    case = evidence((1, 1), 2, 6, seed=4)
    search(case, Requirement(), cache_folder=tmp_path)
    slower = dataclasses.replace(case.table.latency("segment-0-1"), mean_ms=0.5)
    table = dataclasses.replace(case.table, entries={**case.table.entries, ("segment-0-1", "fp32"): slower})
    counts = case.statistics.counts.copy()
    counts[0, 0, 0] += 1
    specs = dict(case.graph_set.graphs)
    specs["segment-0-1"] = dataclasses.replace(specs["segment-0-1"], bytes=77)
    others = [
        dataclasses.replace(case, table=table),
        dataclasses.replace(case, statistics=dataclasses.replace(case.statistics, counts=counts)),
        dataclasses.replace(case, graph_set=dataclasses.replace(case.graph_set, graphs=specs)),
    ]
    for number, other in enumerate(others, start=2):
        assert search(other, Requirement(), cache_folder=tmp_path) == search(other, Requirement())
        assert len(searches) == 2 * number - 1
    search(case, Requirement(max_exits=1), cache_folder=tmp_path)
    assert len(searches) == 8


@pytest.mark.parametrize("damage", ["a byte", "cut short", "empty", "gone", "a number", "another key", "not JSON"])
@pytest.mark.parametrize("file", ["plans.npy", "chains.npy", "index.json"])
def test_a_damaged_table_is_computed_again(tmp_path: Path, searches: list[Evidence], damage: str, file: str) -> None:
    case = evidence((2, 1), 2, 8, seed=4)
    result = search(case, Requirement(), cache_folder=tmp_path)
    (folder,) = tmp_path.iterdir()
    path, good = folder / file, contents(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage in ("a number", "another key"):
        content = json.loads((folder / "index.json").read_text())
        content |= {"space": 5} if damage == "a number" else {"key": "0" * 64}
        (folder / "index.json").write_text(json.dumps(content))
    else:
        data[len(data) // 2] ^= 64
        text = {"a byte": bytes(data), "cut short": bytes(data[:-9]), "empty": b"", "not JSON": b"[1, 2"}[damage]
        path.write_bytes(text)
    assert search(case, Requirement(), cache_folder=tmp_path) == result
    assert len(searches) == 2
    assert contents(tmp_path) == good
    assert search(case, Requirement(), cache_folder=tmp_path) == result
    assert len(searches) == 2


def test_a_plan_table_with_wrong_figures_is_not_used(tmp_path: Path, searches: list[Evidence]) -> None:
    """Whole, sealed and wrong: what a release with another idea of the figures would leave."""
    case = evidence((2, 1), 2, 8, seed=4)
    result = search(case, Requirement(), cache_folder=tmp_path)
    (folder,) = tmp_path.iterdir()
    wrong = plan_table.enumerate_plans(case, SearchContext(Requirement()))
    wrong.plans["miou"] += 1.0
    shutil.rmtree(folder)
    cache._store(folder, folder.name, wrong)
    assert search(case, Requirement(), cache_folder=tmp_path) == result
    assert len(searches) == 2


def test_the_folder_does_not_grow_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [evidence((1, 1), 2, 6, seed) for seed in range(4)]
    search(cases[0], Requirement(), cache_folder=tmp_path)
    one = sum(map(len, contents(tmp_path).values()))
    monkeypatch.setattr(cache, "MOST_BYTES", 2 * one + one // 2)
    (tmp_path / "notes").mkdir()
    for case in cases:
        search(case, Requirement(), cache_folder=tmp_path)
    assert sum(map(len, contents(tmp_path).values())) <= 2 * one + one // 2
    assert (tmp_path / "notes").is_dir()
    before = contents(tmp_path)
    search(cases[-1], Requirement(), cache_folder=tmp_path)
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    case = evidence((1,), 2, 6, seed=4)
    assert search(case, Requirement(), cache_folder=tmp_path / "file") == search(case, Requirement())


def test_a_refusal_is_the_same(tmp_path: Path) -> None:
    case = evidence((1,), 2, 6, seed=4)
    for _ in range(2):
        with pytest.raises(RequirementError, match="best reachable: latency"):
            search(case, Requirement(max_latency=Limit(1e-6)), cache_folder=tmp_path)


def test_a_plan_table_is_loaded_as_it_was_stored(tmp_path: Path) -> None:
    case = evidence((2, 1), 2, 8, seed=4)
    context = SearchContext(Requirement(), cache_folder=tmp_path)
    fresh, again = (cache.cached_plan_table(case, context) for _ in range(2))
    assert again.chains == fresh.chains
    assert np.array_equal(again.plans, fresh.plans)
    assert (again.space, again.evaluated) == (fresh.space, fresh.evaluated)
