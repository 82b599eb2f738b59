"""An engine that fails costs its user one frame's time, not the stream: what is left computes the frame."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mess_compile import runtime
from mess_compile.runtime.base.errors import EngineError, InputError, NotFiniteError
from mess_compile.runtime.cascade.cascade import Cascade, Prediction
from mess_compile.runtime.cascade.fallback import PAUSE_FRAMES
from mess_compile.runtime.engines import onnxruntime_engine
from mess_compile.runtime.engines.engine import open_library
from tests import small_network
from tests.runtime.faults import FaultyLibrary
from tests.small_network import frame

SEGMENTS = ("segment-0-1", "segment-1-2")
HEADS = tuple(f"head-{name}" for name in small_network.HEADS)
Fault = Callable[[str], "str | None"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny.mess"
    small_network.write_bundle(path)
    return path


@contextmanager
def loaded(bundle: Path, fault: Fault, on_failure: str = "fallback", concurrent: bool = True) -> Iterator[Cascade]:
    library = FaultyLibrary(open_library("onnxruntime", threads=1), fault, concurrent)
    with runtime.load(bundle, library=library, threads=1, on_failure=on_failure) as cascade:
        yield cascade
    assert library.closed


def check(prediction: Prediction, seed: int) -> None:
    """Against the small network by matrix products."""
    results = small_network.expected(frame(seed))
    exit_taken = 1 if results[0][0][2] >= 18 else 2
    counts, labels = results[exit_taken - 1]
    assert prediction.exit == exit_taken
    assert prediction.confidence == pytest.approx(counts[2] / 24)
    np.testing.assert_array_equal(prediction.labels, labels)


@pytest.mark.parametrize("concurrent", [True, False])
@pytest.mark.parametrize(
    ("graph", "kind"),
    [(name, kind) for name in (*SEGMENTS, *HEADS) for kind in ("error", "nan")] + [("output-4x6", "error")],
)
def test_whatever_fails_the_frame_is_computed_all_the_same(
    bundle: Path, graph: str, kind: str, concurrent: bool
) -> None:
    broken: list[str] = []
    with loaded(bundle, lambda name: kind if name in broken else None, concurrent=concurrent) as cascade:
        for seed in range(12):
            broken[:] = [graph] if seed % 3 == 0 else []
            check(cascade(frame(seed)), seed)
        found = cascade.metrics()
    late = sum(small_network.expected(frame(seed))[0][0][2] < 18 for seed in (0, 3, 6, 9))
    hit = late if graph in (SEGMENTS[1], HEADS[1]) else 4
    assert found.failures == {"error": hit if kind == "error" else 0, "not-finite": hit if kind == "nan" else 0}
    assert (found.frames, found.fallback_frames, found.lost_results) == (12, hit, 0)


def test_without_a_fallback_the_failure_is_reported_and_the_next_frame_runs(bundle: Path) -> None:
    fault: list[str | None] = ["error"]
    with loaded(bundle, lambda name: fault[0] if name in HEADS else None, on_failure="raise") as cascade:
        with pytest.raises(EngineError, match=r"head-exit1\.fcn-crm1-b0 failed"):
            cascade(frame(0))
        fault[0] = "nan"
        with pytest.raises(NotFiniteError, match="exit1"):
            cascade(frame(0))
        fault[0] = None
        check(cascade(frame(0)), 0)
        found = cascade.metrics()
    assert (found.failures, found.lost_results) == ({"error": 1, "not-finite": 1}, 2)


def test_an_unknown_way_to_take_failures_is_refused(bundle: Path) -> None:
    with pytest.raises(InputError, match="on_failure is 'ignore', not one of fallback, raise"):
        runtime.load(bundle, on_failure="ignore")


def test_an_engine_that_keeps_failing_is_left_alone_for_a_while_and_tried_again(bundle: Path) -> None:
    tried: list[int] = []
    number, broken = 0, True

    def fault(name: str) -> str | None:
        if name == SEGMENTS[0]:
            tried.append(number)
        return "error" if broken else None

    with loaded(bundle, fault) as cascade:
        for number in range(3 + PAUSE_FRAMES + 1):
            check(cascade(frame(number % 4)), number % 4)
        assert tried == [0, 1, 2, 3 + PAUSE_FRAMES]  # the one failure more, and it rests again
        tried.clear()
        broken = False
        for number in range(PAUSE_FRAMES + 5):
            check(cascade(frame(number % 4)), number % 4)
        assert tried == list(range(PAUSE_FRAMES, PAUSE_FRAMES + 5))
        assert cascade.metrics().fallback_frames == 3 + PAUSE_FRAMES + 1 + PAUSE_FRAMES


def test_when_nothing_can_compute_the_frame_both_reasons_are_told(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(**options: object) -> object:
        raise EngineError("ONNX Runtime cannot be imported: run `pip install onnxruntime`")

    library = FaultyLibrary(open_library("onnxruntime", threads=1), lambda n: "error" if n == SEGMENTS[0] else None)
    monkeypatch.setattr(onnxruntime_engine, "open_library", missing)
    with runtime.load(bundle, library=library, on_failure="fallback") as cascade:
        (refusal,) = cascade.refusals
        assert refusal.startswith("host:fp32 on ONNX Runtime's plain kernels: ONNX Runtime cannot be imported")
        for _ in range(2):
            with pytest.raises(EngineError, match=r"segment-0-1 failed.*; then, falling back: .*pip install onnxrunt"):
                cascade(frame(0))
        assert cascade.metrics().lost_results == 2


def test_what_could_not_be_opened_is_tried_again_after_a_rest(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that another program had taken when the cascade was loaded may be free by now."""
    asked, real = 0, onnxruntime_engine.open_library

    def full(**options: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise EngineError("out of memory")
        return real(**options)

    opened = open_library("onnxruntime", threads=1)
    monkeypatch.setattr(onnxruntime_engine, "open_library", full)
    library = FaultyLibrary(opened, lambda name: "error")
    computed = 0
    with runtime.load(bundle, library=library, threads=1, on_failure="fallback") as cascade:
        for _ in range(3 + PAUSE_FRAMES + 1):
            with suppress(EngineError):
                check(cascade(frame(0)), 0)
                computed += 1
        assert (computed, asked, cascade.refusals) == (2, 2, ())


def test_lanes_that_count_a_rest_together_end_it_together(bundle: Path) -> None:
    """Below nothing it would never end."""
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with runtime.load(bundle, threads=1) as cascade, ThreadPoolExecutor(4) as pool:
            (executor,) = cascade._chain._executors
            for _ in range(20):
                for _ in range(3):
                    executor.failed()
                paused = pool.map(lambda _: sum(executor.is_paused() for _ in range(PAUSE_FRAMES)), range(4))
                assert sum(paused) == PAUSE_FRAMES
                assert not executor.is_paused()
    finally:
        sys.setswitchinterval(switching)


def test_safer_plans_of_the_target_come_before_the_cpu_one_after_the_other(tmp_path: Path) -> None:
    """Their graphs are the same here; which of them computes is seen by how often the library was asked."""
    graphs = small_network.graph_set(tmp_path / "graphs")
    plans = [small_network.part(graphs, small_network.plan(), recipe) for recipe in ("int8", "fp32", "fp16")]
    others = [
        small_network.part(graphs, replace(small_network.plan(), device="elsewhere")),
        small_network.part(graphs, small_network.plan(None, (2,), "budgeted"), "fp16-2"),
    ]
    small_network.write_parts(tmp_path / "several.mess", [*plans, *others])
    runs, failing = 0, 0

    def first_runs_fail(name: str) -> str | None:
        nonlocal runs
        runs += name == SEGMENTS[0]
        return "error" if runs <= failing else None

    library = FaultyLibrary(open_library("onnxruntime", threads=1), first_runs_fail)
    with runtime.load(tmp_path / "several.mess", "host", library, threads=1, on_failure="fallback") as cascade:
        assert [executor.name for executor in cascade._chain._executors] == [
            *(f"host:{precision} on onnxruntime" for precision in ("int8", "fp16", "fp32")),
            "host:fp32 on ONNX Runtime's plain kernels",
        ]
        loaded_at_first = len(library.loaded)
        assert loaded_at_first == 3 * len(set(library.loaded)), "all three are there before the first frame"
        for failing in (0, 1, 2, 3):
            runs = 0
            check(cascade(frame(0)), 0)
            assert runs == min(failing, 2) + 1
        assert len(library.loaded) == loaded_at_first
        assert cascade.metrics().failures["error"] == 0 + 1 + 2 + 3


@pytest.mark.parametrize("failing", [*SEGMENTS, *HEADS])
def test_a_safer_plan_may_have_other_exits(tmp_path: Path, failing: str) -> None:
    """It was searched for by itself: here it has the last exit alone, by the fused segment."""
    graphs = small_network.graph_set(tmp_path / "graphs")
    safe = small_network.plan(None, (2,))
    parts = [small_network.part(graphs, small_network.plan(), "fp16"), small_network.part(graphs, safe)]
    small_network.write_parts(tmp_path / "two.mess", parts)
    library = FaultyLibrary(open_library("onnxruntime", threads=1), lambda n: "error" if n == failing else None)
    with runtime.load(tmp_path / "two.mess", "host:fp16", library, threads=1, on_failure="fallback") as cascade:
        for seed in range(8):
            early = small_network.expected(frame(seed))[0][0][2] >= 18
            prediction = cascade(frame(seed))
            deep = 2 if failing in (SEGMENTS[0], HEADS[0]) or not early else 1
            assert (prediction.exit, prediction.exit_point) == (deep, deep)
            np.testing.assert_array_equal(prediction.labels, small_network.expected(frame(seed))[deep - 1][1])
            exits = [each.exit_point for each in cascade.refine(frame(seed))]
            assert exits == ([2] if failing in (SEGMENTS[0], HEADS[0]) else [1, 2])
        assert sum(cascade.metrics().exits) == 16


def test_a_refinement_goes_on_where_an_engine_failed_unless_it_has_a_deadline(bundle: Path) -> None:
    with loaded(bundle, lambda name: "error" if name == SEGMENTS[1] else None) as cascade:
        for deadline_ms, wanted in ((None, [1, 2]), (1e6, [1, 2]), (None, [1, 2])):
            predictions = list(cascade.refine(frame(0), deadline_ms))
            assert [p.exit for p in predictions] == wanted
            for prediction, (_, labels) in zip(predictions, small_network.expected(frame(0)), strict=True):
                np.testing.assert_array_equal(prediction.labels, labels)
    with loaded(bundle, lambda name: "error" if name == SEGMENTS[0] else None) as cascade:
        assert [p.exit for p in cascade.refine(frame(0), 1e6)] == [1]  # how long the others take is not known
        assert [p.exit for p in cascade.refine(frame(0))] == [1, 2]
