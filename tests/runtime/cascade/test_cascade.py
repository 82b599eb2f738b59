"""The cascade does what the plan says and no more: a user would otherwise pay for stages that no image needed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mess_compile import runtime
from mess_compile.runtime.base.errors import BundleError, EngineError, InputError
from mess_compile.runtime.bundle import plan_choice
from mess_compile.runtime.bundle.archive import open_archive
from mess_compile.runtime.bundle.manifest import Decision, Manifest, StageCost
from mess_compile.runtime.cascade import cascade as cascade_module
from mess_compile.runtime.cascade.cascade import Cascade
from mess_compile.runtime.engines.engine import TensorSpec, open_library
from mess_compile.runtime.engines.engine_fake import FakeGraph, FakeLibrary
from tests import small_network
from tests.runtime.clock import Clock, cheap
from tests.runtime.faults import FaultyLibrary
from tests.small_network import CELLS_HW, CLASSES, HW, ROWS, frame
from tests.threads import own_threads

ROW = 2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny.mess"
    small_network.write_bundle(path)
    return path


@pytest.fixture(scope="module")
def cascade(bundle: Path) -> Iterator[Cascade]:
    with runtime.load(bundle, threads=1) as loaded:
        yield loaded


def test_an_image_leaves_where_its_count_reaches_the_cut(cascade: Cascade) -> None:
    exits = []
    for seed in range(40):
        (first, first_labels), (second, second_labels) = small_network.expected(frame(seed))
        early = first[ROW] >= 18
        prediction = cascade(frame(seed))
        exits.append(prediction.exit)
        assert prediction.exit == prediction.exit_point == (1 if early else 2)
        assert prediction.confidence == pytest.approx((first if early else second)[ROW] / 24)
        np.testing.assert_array_equal(prediction.labels, first_labels if early else second_labels)
        assert prediction.labels.dtype == np.uint8
        assert prediction.latency_ms > 0
    assert set(exits) == {1, 2}


def test_a_count_at_the_cut_leaves_and_one_below_stays(tmp_path: Path) -> None:
    count = int(small_network.expected(frame(0))[0][0][ROW])
    for cut, wanted in ((count, 1), (count + 1, 2), (0, 1), (25, 2)):
        small_network.write_bundle(tmp_path / "cut.mess", small_network.plan(cut))
        with runtime.load(tmp_path / "cut.mess", threads=1) as loaded:
            assert loaded(frame(0)).exit == wanted


def test_refining_gives_every_exit_in_order_with_growing_time(cascade: Cascade) -> None:
    predictions = list(cascade.refine(frame(0)))
    assert [p.exit for p in predictions] == [1, 2]
    for prediction, (counts, labels) in zip(predictions, small_network.expected(frame(0)), strict=True):
        np.testing.assert_array_equal(prediction.labels, labels)
        assert prediction.confidence == pytest.approx(counts[ROW] / 24)
    assert predictions[0].latency_ms < predictions[1].latency_ms


def test_a_later_stage_starts_only_if_its_p99_still_fits(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage is said to take 30 ms and its report 5 ms at p99; the clock stands still at 10 ms."""

    def costly(manifest: Manifest) -> Manifest:
        plan = manifest.plans[0]
        costs = (StageCost(1.0, 2.0, 1.0, 2.0), StageCost(1.0, 30.0, 1.0, 5.0))
        return replace(manifest, plans=(replace(plan, costs=costs),))

    times: Iterator[float] = iter([])
    monkeypatch.setattr(cascade_module, "_ms_since", lambda start: next(times))
    path = small_network.changed_bundle(bundle, tmp_path / "costly.mess", costly)
    with runtime.load(path, threads=1) as loaded:
        for deadline_ms, wanted in ((0, [1]), (44.9, [1]), (45.1, [1, 2]), (None, [1, 2])):
            times = iter([8.0, 10.0, 11.0] if deadline_ms is not None else [8.0, 11.0])
            assert [p.exit for p in loaded.refine(frame(0), deadline_ms)] == wanted


def test_a_miss_is_a_result_after_the_deadline(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime.load(bundle, threads=1) as loaded:
        for clock_ms in ([60.0, 60.1], [20.0, 21.0, 99.0], [20.0, 21.0, 79.0]):
            times = iter(clock_ms)
            monkeypatch.setattr(cascade_module, "_ms_since", lambda start, times=times: next(times))
            list(loaded.refine(frame(0), deadline_ms=59.0 if clock_ms[0] == 60.0 else 80.0))
        found = loaded.metrics()
    assert (found.deadline_frames, found.missed_first, found.missed_later) == (3, 1, 1)
    assert found.exits == (1, 2)


@pytest.mark.parametrize(
    ("deadline_ms", "wanted"),
    [(None, [(1, 18.0), (2, 25.0)]), (27.1, [(1, 18.0), (2, 25.0)]), (26.9, [(1, 18.0)]), (17.9, [(1, 18.0)])],
)
def test_a_deadline_counts_resizing_and_mapping_the_labels_back(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    deadline_ms: float | None,
    wanted: list[tuple[int, float]],
) -> None:
    """Resizing takes 11 ms, mapping back 7 ms, graphs nothing: the first result comes after 18 ms, and a second one is
    expected 2 + 7 ms later."""
    path = small_network.changed_bundle(bundle, tmp_path / "cheap.mess", cheap)
    with runtime.load(path, threads=1) as loaded:
        clock = Clock(monkeypatch, to_input=11.0, from_input=7.0)
        delivered = []
        for prediction in loaded.refine(frame(0, (30, 50)), deadline_ms):
            delivered.append((prediction.exit, clock.ms))
            assert prediction.latency_ms == pytest.approx(clock.ms)
            assert prediction.labels.shape == (30, 50)
        found = loaded.metrics()
    assert delivered == [(exit_taken, pytest.approx(ms)) for exit_taken, ms in wanted]
    assert found.deadline_frames == (deadline_ms is not None)
    assert found.missed_first == (deadline_ms == 17.9)
    assert found.missed_later == 0


def test_a_size_that_takes_long_to_map_back_does_not_count_against_another(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_network.changed_bundle(bundle, tmp_path / "cheap.mess", cheap)
    with runtime.load(path, threads=1) as loaded:
        Clock(monkeypatch, from_input=7.0)
        for hw, deadline_ms, wanted in (((30, 50), 15.9, 1), (HW, 2.1, 2), ((30, 50), 16.1, 2)):
            assert len(list(loaded.refine(frame(0, hw), deadline_ms))) == wanted


def test_waiting_for_another_threads_frame_counts_too(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage would fit when its turn is asked for, and no longer when it comes."""
    path = small_network.changed_bundle(bundle, tmp_path / "cheap.mess", cheap)
    with runtime.load(path, threads=1) as loaded, ThreadPoolExecutor(1) as pool:
        clock = Clock(monkeypatch)
        refinement = loaded.refine(frame(0), deadline_ms=10.0)
        next(refinement)
        with loaded._lock:
            rest = pool.submit(list, refinement)
            time.sleep(0.05)
            clock.ms = 9.0
        assert rest.result() == []


def test_a_refinement_does_not_depend_on_the_callers_buffer(bundle: Path) -> None:
    """A camera fills it again while the first result is looked at; then the engine of the second stage fails."""
    broken = False
    library = FaultyLibrary(open_library("onnxruntime", threads=1), lambda name: "error" if broken else None)
    with runtime.load(bundle, library=library, threads=1, on_failure="fallback") as loaded:
        buffer = frame(0)
        refinement = loaded.refine(buffer)
        next(refinement)
        broken = True
        buffer[:] = frame(1)
        np.testing.assert_array_equal(next(refinement).labels, small_network.expected(frame(0))[1][1])
        assert loaded.metrics().failures["error"] == 1


def test_values_out_of_range_are_refused_by_name(cascade: Cascade, bundle: Path) -> None:
    def refused(words: str, call: Callable[[], object]) -> None:
        with pytest.raises(InputError, match=words):
            call()

    for deadline, shown in ((float("nan"), "nan"), ("20", "'20'")):
        refused(
            rf"deadline_ms is {shown}: give a number of milliseconds", lambda d=deadline: cascade.refine(frame(0), d)
        )
    assert [p.exit for p in cascade.refine(frame(0), -1)] == [1]  # what a loop is left with when it is late already
    assert [p.exit for p in cascade.refine(frame(0), np.float32(np.inf))] == [1, 2]
    refused("frames is 5, not a list", lambda: cascade.stream(5))  # type: ignore[arg-type]
    for ahead in ("x", 0, 1.5, 10**6, True):
        refused(f"ahead is {ahead!r}, not a whole number from 1 to 1024", lambda a=ahead: cascade.stream([], a))
    most = 4 * (os.cpu_count() or 1)
    for threads in ("2", 0, 10**6):
        words = f"threads is {threads!r}, not a whole number from 1 to {most}"
        refused(words, lambda t=threads: runtime.load(bundle, threads=t))
    prediction = cascade(frame(0))
    for opacity in (2.0, -0.1, float("nan"), "x"):
        refused(f"opacity is {opacity!r}", lambda o=opacity: cascade.overlay(frame(0), prediction, o))
    assert own_threads() == 1


def test_what_a_program_has_to_name_is_where_it_looks(cascade: Cascade) -> None:
    assert isinstance(cascade(frame(0)), runtime.Prediction)
    assert isinstance(cascade.metrics(), runtime.Metrics)
    with cascade.stream([]) as stream:
        assert isinstance(stream, runtime.Stream)
    for error in (runtime.NotFiniteError, runtime.BatchError):
        assert issubclass(error, runtime.EngineError)


def with_points(manifest: Manifest) -> Manifest:
    """The operating points "fast", where every image leaves at once, and "sure", by another row and a higher cut."""
    plan = manifest.plans[0]
    fast, sure = (
        replace(plan.operating_points[0], name=name, decisions=(first, plan.operating_points[0].decisions[1]))
        for name, first in (("fast", Decision(0, 0)), ("sure", Decision(3, 20)))
    )
    return replace(manifest, plans=(replace(plan, operating_points=(*plan.operating_points, fast, sure)),))


def test_switching_the_operating_point_changes_decisions_and_builds_nothing(bundle: Path, tmp_path: Path) -> None:
    path = small_network.changed_bundle(bundle, tmp_path / "points.mess", with_points)
    rows = {"default": (2, 18), "fast": (0, 0), "sure": (3, 20)}
    library = FaultyLibrary(open_library("onnxruntime", threads=1), lambda name: None)
    with runtime.load(path, library=library) as loaded:
        built = list(library.loaded)
        assert loaded.operating_point == "default"
        assert loaded.operating_points == ("default", "fast", "sure")
        exits: dict[str, list[int]] = {name: [] for name in rows}
        for name, (row, cut) in rows.items():
            loaded.operating_point = name
            assert loaded.operating_point == name
            for seed in range(12):
                first = small_network.expected(frame(seed))[0][0]
                prediction = loaded(frame(seed))
                exits[name].append(prediction.exit)
                assert prediction.exit == (1 if first[row] >= cut else 2)
                if prediction.exit == 1:
                    assert prediction.confidence == pytest.approx(first[row] / 24)
        assert set(exits["fast"]) == {1}
        assert exits["sure"] != exits["default"]
        with pytest.raises(InputError, match=r"no operating point 'slow'; it has default, fast, sure"):
            loaded.operating_point = "slow"
        assert loaded.operating_point == "sure"
        assert library.loaded == built


def test_a_letterboxed_bundle_keeps_the_proportions_of_frames(bundle: Path, tmp_path: Path) -> None:
    """A tall frame lies in the middle of the input; what the network says of the padding is cut away."""

    def letterbox(manifest: Manifest) -> Manifest:
        return replace(manifest, network=replace(manifest.network, resize="letterbox"))

    tall = frame(5, (8, 4))
    image = np.full((*HW, 3), 127, np.uint8)
    image[:, 4:8] = tall
    counts, labels = small_network.expected(image)[0]
    path = small_network.changed_bundle(bundle, tmp_path / "letterbox.mess", letterbox)
    with runtime.load(path, threads=1) as loaded:
        prediction = next(loaded.refine(tall))
        assert prediction.confidence == pytest.approx(counts[ROW] / 24)
        np.testing.assert_array_equal(prediction.labels, labels[:, 4:8])
        assert loaded.confidence_map(prediction).shape == (8, 4)


def test_the_confidence_map_is_that_of_the_exit_taken(cascade: Cascade) -> None:
    for seed in range(6):
        prediction = cascade(frame(seed))
        shown = cascade.confidence_map(prediction)
        assert shown.shape == HW
        sure = (shown[::2, ::2] >= ROWS[ROW]).sum()
        assert sure == round(prediction.confidence * 24)
        np.testing.assert_array_equal(shown, shown[::2, ::2].repeat(2, axis=0).repeat(2, axis=1))
    older, newer = cascade(frame(0)), cascade(frame(1))
    cascade.confidence_map(newer)
    with pytest.raises(InputError, match="only the last prediction"):
        cascade.confidence_map(older)


def test_no_confidence_map_of_another_frame_where_that_came_in_between(bundle: Path) -> None:
    """Another thread has the engines when the map is asked for; its frame overwrites what the map is made of."""
    library = FaultyLibrary(open_library("onnxruntime", threads=1), lambda name: None, concurrent=False)
    with runtime.load(bundle, library=library) as loaded, ThreadPoolExecutor(1) as pool:
        prediction = loaded(frame(0))
        with loaded._lock:
            asked = pool.submit(loaded.confidence_map, prediction)
            time.sleep(0.05)  # it waits for the engines
            loaded._segmented(frame(1)[None], 0)
        with pytest.raises(InputError, match="only the last prediction"):
            asked.result()


def test_a_closed_cascade_has_no_confidence_map(bundle: Path) -> None:
    loaded = runtime.load(bundle, threads=1)
    prediction = loaded(frame(0))
    loaded.close()
    with pytest.raises(InputError, match="the cascade is closed"):
        loaded.confidence_map(prediction)


def test_the_overlay_has_the_colours_of_the_classes(cascade: Cascade) -> None:
    assert cascade.class_names == CLASSES
    prediction = cascade(frame(0))
    painted = cascade.overlay(frame(0), prediction, opacity=1.0)
    colours = np.array(small_network.candidate().colours, np.uint8)
    np.testing.assert_array_equal(painted, colours[prediction.labels])


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_batch_gives_what_single_frames_give_in_their_order(bundle: Path, concurrent: bool) -> None:
    ran: list[str] = []
    library = FaultyLibrary(open_library("onnxruntime", threads=1), ran.append, concurrent)
    given = [frame(seed, (8, 12) if seed % 2 else (5, 7)) for seed in range(8)]
    with runtime.load(bundle, library=library) as loaded:
        single = [loaded(each) for each in given]
        ran.clear()
        batch = loaded.batch(iter(given))
        assert loaded.batch([]) == []
        assert loaded.metrics().frames == 16
    assert [p.exit for p in batch] == [p.exit for p in single]
    assert {p.exit for p in batch} == {1, 2}
    for one, other in zip(batch, single, strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)
        assert one.confidence == other.confidence
    late = sum(p.exit == 2 for p in batch)
    assert ran.count("segment-0-1") == 8
    assert ran.count("segment-1-2") == late  # those that left make room
    first_late = ran.index("segment-1-2")
    assert ("segment-0-1" in ran[first_late:]) == (not concurrent)  # stage by stage where outputs survive


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_frame_of_a_batch_that_fails_costs_the_others_nothing(bundle: Path, concurrent: bool) -> None:
    runs = 0

    def fault(name: str) -> str | None:
        nonlocal runs
        runs += name == "segment-0-1"
        return "error" if name == "segment-0-1" and runs in (2, 5) else None

    library = FaultyLibrary(open_library("onnxruntime", threads=1), fault, concurrent)
    with runtime.load(bundle, library=library) as loaded:
        with pytest.raises(
            runtime.BatchError, match=r"2 of the 6 frames .* number 1 \(from 0\): segment-0-1 fail"
        ) as told:
            loaded.batch([frame(seed) for seed in range(6)])
        found = loaded.metrics()
        assert len(loaded.batch([frame(0)])) == 1
    assert [isinstance(each, EngineError) for each in told.value.results] == [False, True, False, False, True, False]
    for seed in (0, 2, 3, 5):
        prediction = told.value.results[seed]
        np.testing.assert_array_equal(prediction.labels, small_network.expected(frame(seed))[prediction.exit - 1][1])
    assert (found.frames, found.lost_results, found.failures["error"]) == (4, 2, 2)


def test_a_second_thread_waits_its_turn(bundle: Path) -> None:
    """With engines that would notice two runs at once, as a GPU's buffers would."""
    running = threading.Lock()

    def alone(name: str) -> None:
        assert running.acquire(blocking=False), "two runs at once"
        time.sleep(0.0005)
        running.release()

    library = FaultyLibrary(open_library("onnxruntime", threads=1), alone, concurrent=False)
    wanted = {seed: small_network.expected(frame(seed)) for seed in range(4)}

    def work(seed: int) -> None:
        for _ in range(25):
            prediction = loaded(frame(seed))
            np.testing.assert_array_equal(prediction.labels, wanted[seed][prediction.exit - 1][1])

    with runtime.load(bundle, library=library) as loaded, ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
        assert loaded.metrics().frames == 100


def test_a_refinement_that_another_frame_overtook_is_refused_where_outputs_are_overwritten(bundle: Path) -> None:
    for concurrent in (True, False):
        library = FaultyLibrary(open_library("onnxruntime", threads=1), lambda name: None, concurrent)
        with runtime.load(bundle, library=library) as loaded:
            refinement = loaded.refine(frame(0))
            first = next(refinement)
            loaded(frame(1))
            if concurrent:
                np.testing.assert_array_equal(next(refinement).labels, small_network.expected(frame(0))[1][1])
                continue
            with pytest.raises(InputError, match="another frame was segmented since"):
                next(refinement)
            with pytest.raises(InputError, match="only the last prediction"):
                loaded.confidence_map(first)
            assert [p.exit for p in loaded.refine(frame(0))] == [1, 2]


def test_a_closed_cascade_says_so_and_closes_once(bundle: Path) -> None:
    loaded = runtime.load(bundle, threads=1)
    loaded.close()
    loaded.close()
    with pytest.raises(EngineError, match="the cascade is closed"):
        loaded(frame(0))


def test_a_program_that_forgets_to_close_leaves_nothing_behind(bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys, itertools, numpy as np\n"
        "from mess_compile import runtime\n"
        "cascade = runtime.load(sys.argv[1], threads=1)\n"
        "frame = np.zeros((8, 12, 3), np.uint8)\n"
        "stream = cascade.stream(itertools.repeat(frame))\n"
        "next(stream), cascade(frame)\n"
        "refinement = cascade.refine(frame); next(refinement)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code, str(bundle)], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.glob("mess-*")) == []


def test_a_frame_of_another_size_comes_back_at_its_own(cascade: Cascade) -> None:
    large = frame(0).repeat(4, axis=0).repeat(4, axis=1)
    prediction = cascade(large)
    assert prediction.labels.shape == (32, 48)
    assert [p.labels.shape for p in cascade.refine(large)] == [(32, 48)] * 2
    assert cascade(frame(1, (5, 7))).labels.shape == (5, 7)


def test_the_same_frame_gives_the_same_answer_after_others(cascade: Cascade) -> None:
    first = cascade(frame(1))
    kept = first.labels.copy()
    for seed in range(5):
        cascade(frame(seed))
    np.testing.assert_array_equal(first.labels, kept)
    np.testing.assert_array_equal(cascade(frame(1)).labels, kept)


@pytest.mark.parametrize("wrong", [np.zeros((8, 12), np.uint8), np.zeros((8, 12, 3), np.float32), None])
def test_what_is_no_frame_is_refused(cascade: Cascade, wrong: object) -> None:
    for call in (cascade, lambda f: list(cascade.refine(f))):
        with pytest.raises(InputError, match="a frame is"):
            call(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "exits", "wanted"), [("budgeted", (1,), [1]), ("budgeted", (2,), [2]), ("anytime", (1, 2), [1, 2])]
)
def test_the_other_settings_run_from_the_same_class(
    tmp_path: Path, setting: str, exits: tuple[int, ...], wanted: list[int]
) -> None:
    path = tmp_path / "other.mess"
    small_network.write_bundle(path, small_network.plan(None, exits, setting))
    with runtime.load(path, threads=1) as loaded:
        assert [p.exit_point for p in loaded.refine(frame(0))] == wanted
        prediction = loaded(frame(0))
        assert prediction.exit_point == wanted[-1]
        np.testing.assert_array_equal(prediction.labels, small_network.expected(frame(0))[wanted[-1] - 1][1])


def test_a_plan_is_found_by_its_target_or_refused_with_those_there_are(bundle: Path) -> None:
    with runtime.load(bundle, target="host", threads=1) as loaded:
        assert loaded.plan.target == "host"
    with pytest.raises(InputError, match=r"no plan for the target xavier; it has host:fp32 \(onnxruntime\)"):
        runtime.load(bundle, target="xavier")


def test_nothing_stays_on_disk_after_closing_or_failing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with runtime.load(bundle, threads=1):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(plan_choice, "open_library", lambda name, threads, cuda_graphs: FakeLibrary({}))
    with pytest.raises(runtime.EngineError):
        runtime.load(bundle)
    assert list(tmp_path.iterdir()) == []


def fake(first_count: int, cells: int = 24) -> FakeLibrary:
    """The small network scripted: exit 1 has `first_count` sure cells, its labels are all 1, those of exit 2 all 2."""
    image = TensorSpec("image", "uint8", (1, *HW, 3))
    exits = [TensorSpec(f"exit{n}", "float32", (1, 4, *CELLS_HW)) for n in (1, 2)]
    thresholds = TensorSpec("thresholds", "float32", (len(ROWS), len(CLASSES)))
    counts = TensorSpec("counts", "int32", (len(ROWS),))
    logits = TensorSpec("logits", "float32", (1, len(CLASSES), 4, cells // 4))
    labels = TensorSpec("labels", "uint8", (1, *HW))
    heads = [f"head-{name}" for name in small_network.HEADS]

    def features(value: int) -> FakeGraph:
        source = image if value == 1 else exits[0]
        values = np.full(exits[0].shape, value, np.float32)
        return FakeGraph((source,), (exits[value - 1],), lambda feeds: {exits[value - 1].name: values})

    def head(value: int, count: int) -> FakeGraph:
        values = np.full(logits.shape, value, np.float32)

        def gated(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            lowest = feeds["thresholds"].max(axis=1) < 0  # which every cell reaches
            return {"logits": values, "counts": np.where(lowest, cells, count).astype(np.int32)}

        return FakeGraph((exits[value - 1], thresholds), (logits, counts), gated)

    def upsample(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"labels": np.full(labels.shape, int(feeds["logits"][0, 0, 0, 0]), np.uint8)}

    return FakeLibrary(
        {
            "segment-0-1": features(1),
            "segment-1-2": features(2),
            heads[0]: head(1, first_count),
            heads[1]: head(2, 0),
            "output-4x6": FakeGraph((logits,), (labels,), upsample),
        },
        name="onnxruntime",
    )


def test_an_early_exit_pays_for_nothing_behind_it_and_the_output_graph_runs_once(bundle: Path) -> None:
    early, late = ["segment-0-1", "head-1"], ["segment-1-2", "head-2"]
    for count, wanted in ((18, [*early, "output"]), (17, [*early, *late, "output"])):
        library = fake(count)
        with runtime.load(bundle, library=library) as loaded:
            prediction = loaded(frame(0))
        ran = [name.replace("exit", "").split(".")[0] for verb, name in library.log if verb == "run"]
        assert [name.split("-4x6")[0] for name in ran] == wanted
        assert (prediction.labels == prediction.exit).all()
        assert library.log.count(("load", "output-4x6")) == 1
        assert {name for verb, name in library.log if verb == "close"} == {*library.graphs, ""}


def test_every_report_pays_its_own_output_graph(bundle: Path) -> None:
    library = fake(0)
    with runtime.load(bundle, library=library) as loaded:
        assert [int(p.labels[0, 0]) for p in loaded.refine(frame(0))] == [1, 2]
    assert library.log.count(("run", "output-4x6")) == 2


def test_graphs_that_do_not_fit_the_manifest_are_refused_before_they_run(bundle: Path) -> None:
    library = fake(0, cells=20)
    with pytest.raises(BundleError, match=r"logits \(1, 3, 4, 5\)"):
        runtime.load(bundle, library=library)
    other = fake(0)
    wrong = replace(other.graphs["segment-0-1"], outputs=(TensorSpec("exit2", "float32", (1, 4, 4, 6)),))
    with pytest.raises(BundleError, match="segment-0-1"):
        runtime.load(bundle, library=replace(other, graphs={**other.graphs, "segment-0-1": wrong}))
    assert not [verb for verb, _ in library.log + other.log if verb == "run"]


def test_the_archive_is_a_private_copy(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.mess"
    copy.write_bytes(bundle.read_bytes())
    with runtime.load(copy, threads=1) as loaded:
        copy.unlink()
        assert loaded(frame(0)).exit == 1
    archive = open_archive(bundle)
    archive.close()
    assert not archive.folder.exists()
