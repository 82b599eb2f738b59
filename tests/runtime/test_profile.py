"""Latencies are measured in context and survive a break: else a user plans on numbers that no cascade shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mess_compile.runtime.engine import TensorSpec, open_library
from mess_compile.runtime.engine_fake import FakeGraph, FakeLibrary
from mess_compile.runtime.errors import InputError
from mess_compile.runtime.profile import Effort, Job, Visit, measure, summarise
from tests import small_network

MS = 1_000_000
EFFORT = Effort(visits=2, min_runs=6, min_s=0.0, warm_up_s=0.0)
FRAME = np.zeros((2, 2, 3), np.uint8)
THRESHOLDS = np.zeros((4, 2), np.float32)


def scripted() -> FakeLibrary:
    image, first = TensorSpec("image", "uint8", (1, 2, 2, 3)), TensorSpec("exit1", "float32", (1, 1))
    second, thresholds = TensorSpec("exit2", "float32", (1, 1)), TensorSpec("thresholds", "float32", (4, 2))
    counts, labels = TensorSpec("counts", "int32", (4,)), TensorSpec("labels", "uint8", (1, 2, 2))

    def graph(sources: tuple[TensorSpec, ...], targets: tuple[TensorSpec, ...], cost_ms: int) -> FakeGraph:
        out = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in targets}
        return FakeGraph(sources, targets, lambda feeds: out, cost_ms * MS)

    return FakeLibrary(
        {
            "a": graph((image,), (first,), 1),
            "b": graph((first,), (second,), 2),
            "head": graph((second, thresholds), (counts, labels), 4),
        }
    )


def jobs() -> list[Job]:
    return [
        Job("a", Path("a.onnx")),
        Job("b", Path("b.onnx"), "a"),
        Job("head", Path("head.onnx"), "b"),
        Job("upload", None),
        Job("download", None, "head"),
        Job("null", None, "head"),
    ]


def visits(library: FakeLibrary, effort: Effort = EFFORT, visited: dict[str, int] | None = None) -> list[Visit]:
    # A clock that also moves by itself: a transfer costs nothing in the script, and a loop must still end.
    def clock() -> int:
        library.now_ns += 1
        return library.now_ns

    return list(measure(library, jobs(), FRAME, THRESHOLDS, effort, visited, clock))


@pytest.mark.parametrize("queued", [False, True])
def test_each_graph_is_timed_without_its_predecessor(queued: bool) -> None:
    """Also on a GPU, where a run that returns has only begun."""
    found: dict[str, list[float]] = {}
    for visit in visits(replace(scripted(), queued=queued)):
        found.setdefault(visit.name, []).extend(visit.samples_ms)
    for name, cost_ms in (("a", 1), ("b", 2), ("head", 4), ("upload", 0), ("download", 0), ("null", 0)):
        assert len(found[name]) == 6
        np.testing.assert_allclose(found[name], cost_ms, atol=1e-5)


def test_the_predecessor_runs_just_before_every_timed_run() -> None:
    library = scripted()
    iterator = measure(library, jobs()[:2], FRAME, THRESHOLDS, EFFORT, {"a": 2}, library.clock_ns)
    visit = next(iterator)
    assert visit.name == "b"
    ran = [name for verb, name in library.log if verb == "run"]
    assert ran == ["a"] + ["a", "b"] * ((len(ran) - 1) // 2)


def test_visits_are_shuffled_the_same_way_each_time() -> None:
    orders = [[visit.name for visit in visits(scripted())] for _ in range(2)]
    assert orders[0] == orders[1]
    assert sorted(orders[0][:6]) == sorted(orders[0][6:]) == sorted(job.name for job in jobs())
    assert orders[0][:6] != orders[0][6:]
    assert [v.name for v in visits(scripted(), Effort(2, 6, 0.0, warm_up_s=0.0, seed=1))] != orders[0]


def test_a_broken_measurement_continues_with_what_is_missing() -> None:
    whole = [visit.name for visit in visits(scripted())]
    done: dict[str, int] = {}
    for name in whole[:8]:
        done[name] = done.get(name, 0) + 1
    assert [visit.name for visit in visits(scripted(), visited=done)] == whole[8:]


def test_the_effort_is_kept() -> None:
    library = scripted()
    by_time = Effort(visits=1, min_runs=1, min_s=0.1, warm_up_s=0.0)
    found = {visit.name: len(visit.samples_ms) for visit in visits(library, by_time)}
    assert found["a"] == 100  # 1 ms each
    assert found["b"] in (33, 34)  # 1 + 2 ms each
    limited = Effort(visits=1, min_runs=10**9, max_s=0.05, max_runs=20, warm_up_s=0.0)
    found = {visit.name: len(visit.samples_ms) for visit in visits(scripted(), limited)}
    assert found == {"a": 20, "b": 17, "head": 9, "upload": 20, "download": 13, "null": 13}


def test_a_graph_warms_up_when_it_is_loaded_and_only_then() -> None:
    library = scripted()
    effort = Effort(visits=2, min_runs=2, min_s=0.0, warm_up_s=0.05)
    list(measure(library, jobs()[:1], FRAME, THRESHOLDS, effort, clock_ns=library.clock_ns))
    assert library.log.count(("run", "a")) == 50 + 1 + 2 + 1  # warm-up, a sample, two rehearsals, a sample


def test_all_engines_are_closed_also_when_the_caller_stops() -> None:
    library = scripted()
    iterator = measure(library, jobs(), FRAME, THRESHOLDS, EFFORT, clock_ns=library.clock_ns)
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    loaded = sorted(name for verb, name in library.log if verb == "load")
    assert loaded == sorted(name for verb, name in library.log if verb == "close")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([Job("b", Path("b.onnx"))], r"job b: nothing produces exit1 \(1, 1\)"),
        ([Job("b", Path("b.onnx"), "a")], "no job 'a'"),
        ([Job("null", None)], "job null: nothing produces counts"),
        ([Job("download", None, "a"), Job("a", Path("a.onnx"))], "job download: nothing produces labels"),
        ([Job("mystery", None)], "no job 'mystery'"),
        ([Job("a", Path("a.onnx"), "upload"), Job("upload", None)], "job upload is no graph"),
    ],
)
def test_a_job_that_cannot_be_fed_is_named(wrong: list[Job], words: str) -> None:
    with pytest.raises(InputError, match=words):
        list(measure(scripted(), wrong, FRAME, THRESHOLDS, EFFORT))


def test_more_graphs_than_are_kept_open_are_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mess_compile.runtime.profile._ENGINES_KEPT", 2)
    library = scripted()
    assert len(visits(library)) == 12
    open_now = 0
    for verb, _ in library.log:
        open_now += {"load": 1, "close": -1}.get(verb, 0)
        assert 0 <= open_now <= 2


def test_real_graphs_are_measured(tmp_path: Path) -> None:
    graphs = small_network.graph_set(tmp_path)
    head = f"head-{small_network.HEADS[1]}"
    chain = [("segment-0-1", None), ("segment-1-2", "segment-0-1"), ("segment-0-2", None), (head, "segment-1-2")]
    todo = [Job(name, graphs.path(name), before) for name, before in [*chain, ("output-4x6", head)]]
    todo += [Job("upload", None), Job("download", None, "output-4x6"), Job("null", None, head)]
    effort = Effort(visits=2, min_runs=10, min_s=0.0, warm_up_s=0.001)
    library = open_library("onnxruntime", threads=1)
    found = list(measure(library, todo, small_network.frame(0), small_network.thresholds(), effort))
    assert len(found) == 16
    assert all(len(visit.samples_ms) == 5 and min(visit.samples_ms) > 0 for visit in found)


def test_a_summary_is_that_of_all_samples() -> None:
    summary = summarise([(1.0, 2.0, 3.0), (4.0, 5.0)])
    assert (summary.mean_ms, summary.p50_ms, summary.runs) == (3.0, 3.0, 5)
    assert summary.p90_ms == pytest.approx(4.6)  # linear between the fourth and fifth of five
    assert summary.p99_ms == pytest.approx(4.96)
    assert summary.spread == pytest.approx((4.5 - 2.0) / 3.0)
    with pytest.raises(InputError, match="no samples"):
        summarise([])
