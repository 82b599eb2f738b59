"""A table without the device: what was measured stays, what failed stays failed; of another network nothing does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mess_compile.latency.estimate import forecast, starting_calibration
from mess_compile.latency.roofline import USUAL
from mess_compile.latency.table import GraphFailure, LatencyTable, check_table_current
from mess_compile.network import GraphSet
from mess_compile.runtime.measure.job_pool import PSEUDO_GRAPHS
from mess_compile.targets import Target, find_target
from tests import small_network

XAVIER = find_target("xavier", Path())
ORIN = find_target("orin", Path())


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> GraphSet:
    return small_network.graph_set(tmp_path_factory.mktemp("graphs"))


def table_of(graphs: GraphSet, known: LatencyTable | None = None, target: Target = XAVIER) -> LatencyTable:
    return forecast([graphs], target, known, [], graphs)


def measured(table: LatencyTable, *names: str) -> LatencyTable:
    """The table after these graphs were measured, at 7 ms each."""
    entries = {
        key: replace(entry, mean_ms=7.0, source="measured", error=None, runs=30) if key[0] in names else entry
        for key, entry in table.entries.items()
    }
    return replace(table, entries=entries, library_version="8.5.2.2")


def test_every_entry_is_marked_and_says_by_how_much_it_may_be_wrong(graphs: GraphSet) -> None:
    table = table_of(graphs)
    check_table_current(table, graphs)
    assert {name for name, _ in table.entries} == {*graphs.graphs, *PSEUDO_GRAPHS}
    assert {entry.source for entry in table.entries.values()} == {table.source} == {"estimated"}
    assert all(entry.error is not None and entry.error > 1 and entry.runs == 0 for entry in table.entries.values())
    assert table.environment["estimated_from"] == "its data sheet"


def test_what_was_measured_stays_and_narrows_the_rest(graphs: GraphSet) -> None:
    before = table_of(graphs)
    known = measured(before, "segment-0-1", "segment-0-2")
    after = table_of(graphs, known)
    for name in ("segment-0-1", "segment-0-2"):
        assert after.entries[name, "fp32"] == known.entries[name, "fp32"]
    assert after.environment["estimated_from"] == "2 of its graphs measured"
    assert after.library_version == "8.5.2.2"
    other = ("segment-1-2", "fp32")
    assert (after.entries[other].error or 0) < (before.entries[other].error or 0)


def test_a_graph_that_failed_on_the_device_is_not_estimated_into_a_plan(graphs: GraphSet) -> None:
    key = ("segment-1-2", "fp32")
    known = measured(table_of(graphs), "segment-0-1")
    failure = GraphFailure(key[0], graphs.spec(key[0]).sha256, "fp32", "no kernel for it")
    known = replace(known, entries={k: e for k, e in known.entries.items() if k != key}, failed={key: failure})
    after = table_of(graphs, known)
    assert after.failed == {key: failure}
    assert key not in after.entries
    check_table_current(after, graphs)


def test_nothing_measured_of_another_network_stays(graphs: GraphSet) -> None:
    known = replace(measured(table_of(graphs), "segment-0-1", *PSEUDO_GRAPHS), network="another")
    assert {entry.source for entry in table_of(graphs, known).entries.values()} == {"estimated"}


def test_a_gpu_is_calibrated_by_gpus_alone(graphs: GraphSet) -> None:
    table = measured(table_of(graphs, target=ORIN), *graphs.graphs)
    host = find_target("host", Path())
    assert starting_calibration([(host, replace(table, device="host"))], graphs, XAVIER) is USUAL
    assert starting_calibration([(ORIN, table)], graphs, XAVIER) is not USUAL
    assert starting_calibration([(XAVIER, replace(table, device="xavier"))], graphs, XAVIER) is USUAL, (
        "its own are no other's"
    )
