"""Devices of one kind share the work: nobody may take one's milliseconds for another's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mess_compile.engines.files import plain_files
from mess_compile.engines.jobs import job_name
from mess_compile.latency import estimate
from mess_compile.latency.table import LatencyTable, check_table_current, read_latency_table
from mess_compile.network import BASELINE, BASELINE_ALONE, GraphSet
from mess_compile.profile import multi_device, selection
from mess_compile.profile.backends import Backend, Task, nothing_to_build
from mess_compile.profile.sparse import SubsetJob
from mess_compile.reporter import SILENT
from mess_compile.runtime.base.errors import EngineError, InputError
from mess_compile.runtime.machine.power import DeviceState
from mess_compile.runtime.measure import measure
from mess_compile.runtime.measure.job_pool import PSEUDO_GRAPHS, Opened
from mess_compile.runtime.measure.measure import Effort, Window
from mess_compile.targets import find_target
from tests import small_network

SLOWER = 1.25
EFFORT = Effort(windows=3, warm_up_s=0.0)


class Scripted:
    """A device on which a graph takes what `ms` says; after `lasts` windows it breaks down."""

    def __init__(self, identity: str, ms: dict[str, float], lasts: int = 10**6) -> None:
        self.ms, self.lasts, self.timed = ms, lasts, Counter[str]()
        facts = {"identity": identity, "cpu": "scripted", "cores": "1"}
        self.backend = Backend("host", "onnxruntime", "1.0", facts, self.measure, DeviceState, nothing_to_build)

    def measure(self, task: Task, effort: Effort, earlier: Sequence[Window]) -> Iterator[Opened | Window]:
        taken: dict[str, list[Window]] = {name: [] for name in (*task.measured, task.reference)}
        for window in earlier:
            taken.get(window.job, []).append(window)
        for name, number in measure.schedule(taken, effort, first=task.reference):
            if sum(self.timed.values()) == self.lasts:
                raise EngineError("the device broke down")
            self.timed[name] += 1
            taken[name].append(Window(name, number, (self.ms[name],) * 5, spent_s=0.1))
            yield taken[name][-1]


@pytest.fixture
def graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GraphSet:
    """Few enough that calibration as usual would be all of them."""
    monkeypatch.setattr(selection, "FEWEST", 3)
    made = small_network.graph_set(tmp_path / "graphs", baseline_alone="alone")
    specs = dict(made.graphs)
    specs[BASELINE] = replace(specs.pop(BASELINE_ALONE), name=BASELINE)
    return replace(made, graphs=specs, baseline_alone=None)


def devices(graphs: GraphSet) -> tuple[Scripted, Scripted]:
    """The second takes 1.25 times as long, give or take 2 % by graph."""
    names = [*PSEUDO_GRAPHS, *(job_name(name, "fp32") for name in graphs.graphs)]
    first = {name: 1.0 + place for place, name in enumerate(names)}
    second = {name: ms * SLOWER * (1.02 if place % 2 else 0.98) for place, (name, ms) in enumerate(first.items())}
    return Scripted("one", first), Scripted("two", second)


def subset_job(graphs: GraphSet, backend: Backend, path: Path) -> SubsetJob:
    priors = estimate.priors_of(graphs, find_target("host", path.parent), ())
    subject = selection.Subject((graphs,), priors)
    return SubsetJob((plain_files(graphs),), backend, subject, path, SILENT, lambda: True, EFFORT)


def shared(graphs: GraphSet, path: Path, *scripted: Scripted, everything: bool = True) -> LatencyTable:
    backends = {f"ssh://{each.backend.facts['identity']}": each.backend for each in scripted}
    return multi_device.profile_shared(subset_job(graphs, scripted[0].backend, path), backends, everything)


def own(table: LatencyTable) -> dict[str, float]:
    return {graph: entry.mean_ms for (graph, _), entry in table.entries.items() if entry.source == "measured"}


def test_every_graph_is_measured_on_one_and_each_table_holds_its_own(graphs: GraphSet, tmp_path: Path) -> None:
    one, two = devices(graphs)
    table = shared(graphs, tmp_path / "host.json", one, two)
    other = read_latency_table(tmp_path / "host@two.json")
    assert read_latency_table(tmp_path / "host.json") == table
    assert own(table).keys() | own(other).keys() == {*graphs.graphs, *PSEUDO_GRAPHS}
    assert all(max(map(len, (own(table), own(other)))) < len(each.entries) for each in (table, other))
    for each, device in ((table, one), (other, two)):
        check_table_current(each, graphs)
        for name, ms in own(each).items():
            assert ms == pytest.approx(device.ms.get(name, device.ms.get(job_name(name, "fp32"))))
    assert not list(tmp_path.glob("*.samples.jsonl"))


def test_what_the_other_measured_is_an_estimate_by_how_the_devices_differ(graphs: GraphSet, tmp_path: Path) -> None:
    one, two = devices(graphs)
    table = shared(graphs, tmp_path / "host.json", one, two)
    estimated = {graph: entry for (graph, _), entry in table.entries.items() if entry.source == "estimated"}
    assert estimated
    for graph, entry in estimated.items():
        truth = one.ms[job_name(graph, "fp32")]
        assert entry.mean_ms == pytest.approx(truth, rel=0.045), "2 % either way, on both sides"
        assert entry.error is not None
        assert 1.0 < entry.error < 1.15
    told = re.search(
        r"ssh://two \(two, onnxruntime 1.0\) takes (\S+)x as long \((\S+) to (\S+), (\d+) graphs",
        table.environment["beside"],
    )
    assert told is not None
    middle, low, high = map(float, told.groups()[:3])
    assert low <= middle <= high
    assert (low, high) == pytest.approx((SLOWER * 0.98, SLOWER * 1.02), abs=0.011)


def test_a_device_that_breaks_does_not_stop_the_other_and_nothing_is_measured_twice(
    graphs: GraphSet, tmp_path: Path
) -> None:
    path = tmp_path / "host.json"
    one, two = devices(graphs)
    two.lasts = 20
    with pytest.raises(EngineError, match="broke down"):
        shared(graphs, path, one, two)
    assert not path.exists()
    begun = Counter(one.timed), Counter(two.timed)
    assert set(begun[0]) > set(PSEUDO_GRAPHS), "the other went on to the end of its portion"
    two.lasts = 10**6
    shared(graphs, path, one, two)
    whole = devices(graphs)
    shared(graphs, tmp_path / "again.json", *whole)
    for broken, unbroken in zip((one, two), whole, strict=True):
        assert {name: count for name, count in broken.timed.items() if "baseline@" not in name} == {
            name: count for name, count in unbroken.timed.items() if "baseline@" not in name
        }, "but for the reference, which opens every round"


def test_without_a_requirement_a_representative_subset_is_distributed(graphs: GraphSet, tmp_path: Path) -> None:
    one, two = devices(graphs)
    table = shared(graphs, tmp_path / "host.json", one, two, everything=False)
    other = read_latency_table(tmp_path / "host@two.json")
    assert {"output-4x6", "segment-0-1", "segment-0-2"} <= own(table).keys() | own(other).keys()
    check_table_current(table, graphs)


def test_one_device_by_two_names_is_refused(graphs: GraphSet, tmp_path: Path) -> None:
    one, _ = devices(graphs)
    backends = {"ssh://xavier": one.backend, "ssh://10.0.0.7": one.backend}
    with pytest.raises(InputError, match=r"ssh://10.0.0.7 is the same device as ssh://xavier: name each device once"):
        multi_device.profile_shared(subset_job(graphs, one.backend, tmp_path / "host.json"), backends, True)
