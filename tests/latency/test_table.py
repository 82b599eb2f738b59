"""Latency tables keep what was measured, and say which graphs they no longer fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mess_compile.latency.table import (
    check_table_current,
    graph_cost_ns,
    path_costs_ns,
    path_p99_ns,
    read_latency_table,
    stage_graphs,
    write_latency_table,
)
from mess_compile.runtime.base.errors import InputError, StaleError
from tests.search.cases import candidate_network, graph_set, latency_table

GRAPHS = graph_set(candidate_network((1, 1)), rows=2)
TABLE = latency_table(GRAPHS)
HEADS = ("exit1.fcn-crm1-b0", "exit3.fcn-crm1-b0")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    table = dataclasses.replace(TABLE, environment={"threads": "2"})
    write_latency_table(tmp_path / "latency" / "host.json", table)
    assert read_latency_table(tmp_path / "latency" / "host.json") == table


@pytest.mark.parametrize(
    ("field", "value"),
    [("mean_ms", float("nan")), ("p99_ms", -1.0), ("source", "guessed"), ("runs", "many"), ("graph", None)],
)
def test_a_damaged_table_is_refused_with_the_remedy(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "xavier.json"
    write_latency_table(path, TABLE)
    content = json.loads(path.read_text())
    if value is None:
        del content["entries"][0][field]
    else:
        content["entries"][0][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="run `mess-compile profile --device xavier`"):
        read_latency_table(path)


def test_a_missing_table_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `mess-compile profile --device xavier`"):
        read_latency_table(tmp_path / "xavier.json")


def test_graphs_that_changed_are_named() -> None:
    check_table_current(TABLE, GRAPHS)
    specs = dict(GRAPHS.graphs)
    specs["segment-1-2"] = dataclasses.replace(specs["segment-1-2"], sha256="another")
    with pytest.raises(StaleError, match=r"\(segment-1-2\): run `mess-compile profile --device host`"):
        check_table_current(TABLE, dataclasses.replace(GRAPHS, graphs=specs))


def test_graphs_that_were_never_measured_are_named() -> None:
    entries = {key: entry for key, entry in TABLE.entries.items() if key[0] not in ("baseline", "null")}
    with pytest.raises(StaleError, match=r"lacks graphs \(baseline, null\)"):
        check_table_current(dataclasses.replace(TABLE, entries=entries), GRAPHS)
    with pytest.raises(StaleError, match="and 9 more"):
        check_table_current(dataclasses.replace(TABLE, entries={}), GRAPHS)


def test_a_table_of_another_network_is_stale() -> None:
    with pytest.raises(StaleError, match="another network"):
        check_table_current(dataclasses.replace(TABLE, network="other"), GRAPHS)


def test_a_path_is_the_sum_of_what_it_runs() -> None:
    def ms(name: str) -> float:
        return TABLE.entries[name, "fp32"].mean_ms

    first = ms("upload") + ms("segment-0-1") + ms("head-exit1.fcn-crm1-b0") + ms("null")
    last = first + ms("segment-1-3") + ms("head-exit3.fcn-crm1-b0")
    ends = ms("output-2x3") + ms("download")
    expected = [round((first + ends) * 1e6), round((last + ends) * 1e6)]
    assert list(path_costs_ns(TABLE, GRAPHS, HEADS)) == expected


def test_what_a_plan_needs_and_the_table_lacks_is_named() -> None:
    specs = {name: dataclasses.replace(spec, precision="fp16") for name, spec in GRAPHS.graphs.items()}
    with pytest.raises(InputError, match="no fp16 entry for segment-0-1: run `mess-compile profile --device host`"):
        path_costs_ns(TABLE, dataclasses.replace(GRAPHS, graphs=specs), HEADS)


def test_exits_out_of_order_are_refused() -> None:
    with pytest.raises(InputError, match="not in the order of their exit points"):
        stage_graphs(GRAPHS.candidate, HEADS[::-1])


def test_graphs_of_equal_work_share_their_measurements() -> None:
    """A network before and after its weights were trained further: what differs between them is noise, so that no plan
    may win by it."""
    spec = dataclasses.replace(GRAPHS.spec("baseline"), name="baseline-alone")
    both = dataclasses.replace(GRAPHS, graphs={**GRAPHS.graphs, spec.name: spec}, baseline_alone="as it came")
    entries = {**TABLE.entries}
    for name, mean_ms, p99_ms in (("baseline", 2.0, 3.0), ("baseline-alone", 2.1, 3.4)):
        entry = dataclasses.replace(TABLE.latency("baseline"), graph=name, mean_ms=mean_ms, p99_ms=p99_ms)
        entries[name, "fp32"] = entry
    table = dataclasses.replace(TABLE, entries=entries)
    assert [graph_cost_ns(table, both, name) for name in both.baselines] == [2_050_000, 2_050_000]
    assert [graph_cost_ns(table, both, name, "p99_ms") for name in both.baselines] == [3_200_000, 3_200_000]
    assert path_p99_ns(table, both, ["baseline"]) == path_p99_ns(table, both, ["baseline-alone"])
    other = dataclasses.replace(both, graphs={**both.graphs, spec.name: dataclasses.replace(spec, macs=1)})
    assert [graph_cost_ns(table, other, name) for name in other.baselines] == [2_000_000, 2_100_000]
