"""TensorRT behind the seam: over a stand-in of five versions, and, marked gpu, over the real thing.

What a user would lose: right labels, memory that grows frame by frame, or the process, to a segmentation fault.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from mess_compile import runtime
from mess_compile.runtime.base.errors import EngineError, InputError
from mess_compile.runtime.cascade.cascade import Cascade
from mess_compile.runtime.engines import tensorrt_engine, tensorrt_module
from mess_compile.runtime.engines.cuda import Cuda, open_cuda
from mess_compile.runtime.engines.engine import TensorSpec, open_library
from mess_compile.runtime.engines.tensorrt_engine import TensorRt
from mess_compile.runtime.measure import job_pool as pool
from mess_compile.runtime.measure import measure
from tests import skips, small_network
from tests.runtime import tensorrt_standin
from tests.runtime.cuda_standin import Driver
from tests.runtime.tensorrt_standin import COST_MS, NAMES, RTX, write_engine
from tests.small_network import frame

VERSIONS = tuple(NAMES)
V10 = "10.16.1.11"
REAL = ("tensorrt", "tensorrt_rtx")
Open = Callable[..., TensorRt]


@dataclass(frozen=True)
class Place:
    """Where the tests run: `engines` holds one for every graph of the small network."""

    open: Open
    engines: Path
    exact: bool


@dataclass
class Built:
    """A bundle names ONNX files; this library loads the engines that were built of them."""

    library: TensorRt
    engines: Path
    name: str = "built"
    version: str = "1"
    builds_for: None = None
    concurrent: bool = False

    def load(self, path: Path) -> tensorrt_engine.TensorRtEngine:
        return self.library.load(self.engines / f"{path.stem}.engine")

    def upload(self, array: np.ndarray) -> Any:
        return self.library.upload(array)

    def download(self, tensor: Any) -> np.ndarray:
        return self.library.download(tensor)

    def close(self) -> None:
        self.library.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, and its graphs beside it."""
    path = tmp_path_factory.mktemp("bundle") / "tiny.mess"
    small_network.write_bundle(path)
    return path


@pytest.fixture
def driver() -> Iterator[Driver]:
    """Afterwards nothing has gone wrong on the device, and all of it is given back."""
    driver = Driver()
    yield driver
    gc.collect()
    assert driver.faults == []
    assert not driver.left()


@pytest.fixture
def stand_in(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TensorRt]:
    """Opens the library of a version over the stand-ins."""
    monkeypatch.setattr(tensorrt_engine, "open_cuda", lambda: Cuda(driver))

    def opened(version: str = V10, cuda_graphs: bool = False) -> TensorRt:
        module = tensorrt_standin.make_module(version, driver)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return tensorrt_engine.open_library(module.__name__, cuda_graphs)

    return opened


def write_engines(bundle: Path, folder: Path, version: str, **facts: Any) -> Path:
    for number, graph in enumerate(sorted((bundle.parent / "graphs").glob("*.onnx"))):
        write_engine(folder / f"{graph.stem}.engine", graph, version, **{"scratch": 100 * number, **facts})
    return folder


def real_engines(name: str, bundle: Path, folder: Path, capability: str) -> Path:
    from mess_compile.runtime.engines.tensorrt_build import BuildOptions, build_engine

    for graph in sorted((bundle.parent / "graphs").glob("*.onnx")):
        engine = build_engine(graph, BuildOptions(name, "fp32", capability)).engine
        (folder / f"{graph.stem}.engine").write_bytes(engine)
    return folder


def real_place(name: str, bundle: Path, folder: Path) -> Place:
    pytest.importorskip(name, reason=f"{name} is not installed")
    try:
        cuda = open_cuda()
        major, minor = cuda.device.capability
        cuda.close()
        engines = real_engines(name, bundle, folder, f"SM{major}{minor}")
    except (EngineError, InputError) as error:
        pytest.skip(str(error))
    return Place(lambda cuda_graphs=False: tensorrt_engine.open_library(name, cuda_graphs), engines, False)


@pytest.fixture(params=[*VERSIONS, *(pytest.param(name, marks=pytest.mark.gpu) for name in REAL)])
def place(request: pytest.FixtureRequest, bundle: Path, tmp_path: Path) -> Place:
    if request.param in REAL:
        return real_place(request.param, bundle, tmp_path)
    opened = request.getfixturevalue("stand_in")
    engines = write_engines(bundle, tmp_path, request.param)
    return Place(lambda cuda_graphs=False: opened(request.param, cuda_graphs), engines, True)


def cascade_over(place: Place, bundle: Path, cuda_graphs: bool = False) -> Cascade:
    return runtime.load(bundle, "host", Built(place.open(cuda_graphs=cuda_graphs), place.engines))


def assert_same(found: runtime.Prediction, wanted: runtime.Prediction, exact: bool) -> None:
    """On a real device sums are in another order: a cell in a hundred may fall on the other side."""
    if exact:
        np.testing.assert_array_equal(found.labels, wanted.labels)
        assert (found.exit, found.exit_point, found.confidence) == (wanted.exit, wanted.exit_point, wanted.confidence)
    elif found.exit == wanted.exit or abs(wanted.confidence - 18 / 24) > 1 / 24:
        assert found.exit == wanted.exit
        assert found.confidence == pytest.approx(wanted.confidence, abs=1.01 / 24)
        assert (found.labels == wanted.labels).mean() >= 0.95


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_cascade_gives_the_labels_exits_and_counts_of_onnx_runtime(
    place: Place, bundle: Path, cuda_graphs: bool
) -> None:
    exits = set()
    with runtime.load(bundle, threads=1) as reference, cascade_over(place, bundle, cuda_graphs) as cascade:
        for seed in range(30):
            wanted = reference(frame(seed))
            assert_same(cascade(frame(seed)), wanted, place.exact)
            exits.add(wanted.exit)
    assert exits == {1, 2}


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_refining_gives_every_exit_of_onnx_runtime(place: Place, bundle: Path, cuda_graphs: bool) -> None:
    with runtime.load(bundle, threads=1) as reference, cascade_over(place, bundle, cuda_graphs) as cascade:
        for seed in range(5):
            found, wanted = list(cascade.refine(frame(seed))), list(reference.refine(frame(seed)))
            assert [prediction.exit for prediction in found] == [1, 2]
            for one, other in zip(found, wanted, strict=True):
                assert_same(one, other, place.exact)


@pytest.mark.parametrize(("version", "cuda_graphs"), [("8.5.2.2", False), (V10, True), (RTX, False)])
def test_a_bundle_that_carries_tensors_gives_what_the_network_gives_run_whole(
    stand_in: Open, driver: Driver, tmp_path: Path, version: str, cuda_graphs: bool
) -> None:
    """Carried tensors stay in their engines' memory: no frame takes more, and all engines share one scratch block."""
    path, _ = skips.write_bundle(tmp_path, skips.imported(tmp_path))
    engines = tmp_path / "engines"
    engines.mkdir()
    for number, graph in enumerate(sorted((tmp_path / "graphs").glob("*.onnx"))):
        write_engine(engines / f"{graph.stem}.engine", graph, version, scratch=100_000 + number)
    taken, cuts = set(), (90, 14, 0)
    with runtime.load(path, "host", Built(stand_in(version, cuda_graphs), engines)) as cascade:
        for seed in range(12):
            results = skips.expected(skips.frame(seed))
            for exit_, prediction in enumerate(cascade.refine(skips.frame(seed)), start=1):
                np.testing.assert_array_equal(prediction.labels, results[exit_ - 1][1])
            found = cascade(skips.frame(seed))
            wanted = next(n for n, (counts, _) in enumerate(results) if counts[1] >= cuts[n]) + 1
            assert found.exit == wanted
            np.testing.assert_array_equal(found.labels, results[wanted - 1][1])
            taken.add(driver._taken())
        scratch = [region for region in driver.regions.values() if region.values.size >= 100_000]
        assert len(scratch) == 1
    assert len(taken) == 1


def test_an_engine_tells_its_tensors(place: Place) -> None:
    with closing(place.open()) as library:
        engine = library.load(place.engines / "segment-0-1.engine")
        assert engine.inputs == {"image": TensorSpec("image", "uint8", (1, 8, 12, 3))}
        assert engine.outputs == {"exit1": TensorSpec("exit1", "float32", (1, 4, 4, 6))}
        head = library.load(place.engines / "head-exit1.fcn-crm1-b0.engine")
        assert head.inputs["thresholds"] == TensorSpec("thresholds", "float32", (4, 3))
        assert head.outputs["counts"] == TensorSpec("counts", "int32", (4,))


def test_a_timed_run_tells_the_device_from_the_wall(place: Place) -> None:
    with closing(place.open()) as library:
        engine = library.load(place.engines / "segment-0-1.engine")
        feeds = {"image": library.upload(frame(0)[None])}
        engine.run(feeds)
        timing = engine.run_timed(feeds)
        assert timing.wall_ms > 0
        assert timing.device_ms is not None
        assert timing.device_ms == pytest.approx(COST_MS) if place.exact else 0 < timing.device_ms <= timing.wall_ms
        library.synchronise()


def test_a_timed_run_does_not_count_what_came_before(
    stand_in: Open, driver: Driver, bundle: Path, tmp_path: Path
) -> None:
    write_engines(bundle, tmp_path, V10)
    with closing(stand_in()) as library:
        engine = library.load(tmp_path / "segment-0-1.engine")
        feeds = {"image": library.upload(frame(0)[None])}
        driver.log.clear()
        engine.run_timed(feeds)
        events = ["cuEventCreate"] * 2 + ["cuStreamSynchronize", "cuEventRecord", "run segment-0-1", "cuEventRecord"]
        assert driver.log[:7] == [*events, "cuStreamSynchronize"]


def test_a_cascade_may_run_in_another_thread_than_it_was_loaded_in(place: Place, bundle: Path) -> None:
    with cascade_over(place, bundle) as cascade, ThreadPoolExecutor(1) as pool:
        assert pool.submit(cascade, frame(0)).result().exit == cascade(frame(0)).exit


def test_the_profiler_measures_every_stage(place: Place) -> None:
    names = ("segment-0-1", f"head-{small_network.HEADS[0]}", "output-4x6")
    jobs = [
        pool.Job(name, place.engines / f"{name}.engine", before)
        for name, before in zip(names, (None, *names), strict=False)
    ]
    jobs += [pool.Job(pool.NULL, None, names[1]), pool.Job(pool.UPLOAD, None)]
    effort = measure.Effort(window_s=0, window_runs=2, windows=1, warm_up_s=0)
    with closing(place.open()) as library:
        task = measure.MeasureTask(jobs, frame(0), small_network.thresholds(), names[0])
        events = list(measure.measure(library, task, effort))
    found = [event for event in events if isinstance(event, measure.Window)]
    assert {window.job for window in found} == {*names, pool.NULL, pool.UPLOAD}
    for window in found:
        assert len(window.device_ms) == (len(window.wall_ms) if window.job in names else 0)
    opened = [event for event in events if isinstance(event, pool.Opened)]
    assert {event.job for event in opened} == set(names)
    assert all(event.file_bytes > 0 and event.scratch_bytes is not None for event in opened)


def test_a_wrong_feed_is_an_engine_error_that_names_the_graph(place: Place) -> None:
    with closing(place.open()) as library:
        engine = library.load(place.engines / "segment-0-1.engine")
        with pytest.raises(EngineError, match=r"segment-0-1.engine is fed \[\], but needs \['image'\]"):
            engine.run({})
        for wrong in (np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 8, 12, 3), np.float32)):
            with pytest.raises(EngineError, match=r"segment-0-1.engine: image is .* not uint8 \(1, 8, 12, 3\)"):
                engine.run({"image": library.upload(wrong)})
        with pytest.raises(EngineError, match="image is not in this library's memory, or was freed"):
            engine.run({"image": frame(0)[None]})


def test_what_is_closed_is_not_used(place: Place) -> None:
    library = place.open()
    first, second = (library.load(place.engines / f"segment-{name}.engine") for name in ("0-1", "1-2"))
    image = library.upload(frame(0)[None])
    features = first.run({"image": image})
    first.close()
    first.close()
    with pytest.raises(EngineError, match=r"the engine of segment-0-1.engine is closed"):
        first.run({"image": image})
    with pytest.raises(EngineError, match="the tensor fed as exit1 is not in this library's memory, or was freed"):
        second.run(features)
    with pytest.raises(EngineError, match="its engine or library is closed"):
        library.download(features["exit1"])
    library.close()
    library.close()
    for use in (lambda: second.run(features), lambda: library.upload(frame(0)), lambda: library.download(image)):
        with pytest.raises(EngineError, match="closed"):
            use()
    with pytest.raises(EngineError, match="closed"):
        library.load(place.engines / "segment-0-1.engine")


@pytest.mark.parametrize("size", [0, 1, 40])
def test_a_truncated_engine_is_named_with_the_remedy(place: Place, tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.engine"
    path.write_bytes((place.engines / "segment-0-1.engine").read_bytes()[:size])
    with closing(place.open()) as library, pytest.raises(EngineError, match=r"short.engine does not load") as caught:
        library.load(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("build it again on this device, with this version")


def test_a_missing_engine_is_named(place: Place) -> None:
    with closing(place.open()) as library, pytest.raises(EngineError, match=r"no engine .*gone.engine: No such file"):
        library.load(place.engines / "gone.engine")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"version": "8.4.1"}, r"Version tag does not match: 8.4.1 and 10.16.1.11.*; build it again on this device"),
        ({"capability": [8, 6]}, r"on Stand-in \(sm_72, CUDA 11.4\): .*incompatible device; build it again"),
        ({"weights": 1 << 40}, r"OutOfMemory \(Requested size was 1099511627776 bytes.\); free memory of the GPU$"),
        ({"no_context": True}, r"cannot be prepared: .*\(no room for the context\); free memory of the GPU$"),
        ({"location": "HOST"}, r"tensors need static shapes, on the device"),
        ({"accepts": False}, r"does not accept exit1: Error Code 3"),
        ({"scratch": 1 << 40}, r"Stand-in is out of memory: 1048576.0 MiB requested"),
    ],
)
def test_an_engine_that_does_not_fit_says_why_and_what_to_do(
    stand_in: Open, bundle: Path, tmp_path: Path, facts: dict[str, Any], words: str
) -> None:
    graph = bundle.parent / "graphs" / "segment-0-1.onnx"
    with closing(stand_in()) as library:
        with pytest.raises(EngineError, match=words) as caught:
            library.load(write_engine(tmp_path / "one.engine", graph, **{"version": V10, **facts}))
        assert "not for the user" not in str(caught.value)
        fine = library.load(write_engine(tmp_path / "two.engine", graph, V10))
        assert fine.run({"image": library.upload(frame(0)[None])})


def test_an_engine_is_not_blamed_for_what_was_logged_before(stand_in: Open, bundle: Path, tmp_path: Path) -> None:
    with closing(stand_in()) as library:
        tensorrt_module.listener(sys.modules["tensorrt"]).log(tensorrt_standin.ILogger.ERROR, "of another time")
        with pytest.raises(EngineError) as caught:
            library.load(write_engine(tmp_path / "old.engine", bundle, "8.4.1"))
        assert "of another time" not in str(caught.value)


def test_dynamic_shapes_are_refused(stand_in: Open, tmp_path: Path) -> None:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, "n")) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", tensors[:1], tensors[1:])
    path = tmp_path / "dynamic.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    with closing(stand_in()) as library, pytest.raises(EngineError, match=r"y is FLOAT \(1, -1\); tensors need static"):
        library.load(write_engine(tmp_path / "dynamic.engine", path, V10))


def test_a_run_that_the_engine_refuses_is_told_in_its_words(stand_in: Open, bundle: Path, tmp_path: Path) -> None:
    write_engines(bundle, tmp_path, V10, refuses=True)
    with closing(stand_in()) as library:
        engine = library.load(tmp_path / "segment-0-1.engine")
        with pytest.raises(EngineError, match=r"segment-0-1.engine failed to run: Error Code 1: Myelin \(no kernel\)"):
            engine.run({"image": library.upload(frame(0)[None])})


def seed_with_exit(wanted: int) -> int:
    return next(seed for seed in range(40) if (small_network.expected(frame(seed))[0][0][2] >= 18) == (wanted == 1))


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("last", [1, 2])
def test_a_frame_is_copied_in_and_counts_and_labels_out_and_nothing_else_happens(
    stand_in: Open, driver: Driver, bundle: Path, tmp_path: Path, cuda_graphs: bool, last: int
) -> None:
    """No copy between stages, nothing allocated, one stream: 288 bytes of image, 4 counts an exit, 96 labels."""
    place = Place(lambda **options: stand_in(V10, **options), write_engines(bundle, tmp_path, V10), True)
    image = frame(seed_with_exit(last))
    with cascade_over(place, bundle, cuda_graphs) as cascade:
        for _ in range(3):
            driver.log.clear()
            driver.copies.clear()
            assert cascade(image).exit == last
        log, copies = list(driver.log), list(driver.copies)
        assert len(driver.streams) == 1

    def run(*graphs: str) -> list[str]:
        return ["cuGraphLaunch" if cuda_graphs else f"run {graph}" for graph in graphs]

    back = ["cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"]
    exits = [(f"segment-{number}-{number + 1}", f"head-{small_network.HEADS[number]}") for number in range(last)]
    decisions = [entry for graphs in exits for entry in (*run(*graphs), *back)]
    assert log == ["cuMemcpyHtoDAsync_v2", *decisions, *run("output-4x6"), *back]
    assert copies == [("to device", 288), *[("from device", 16)] * last, ("from device", 96)]


def test_engines_share_one_scratch_block_as_large_as_the_largest_need(
    stand_in: Open, driver: Driver, bundle: Path, tmp_path: Path
) -> None:
    graph = bundle.parent / "graphs" / "segment-0-1.onnx"
    with closing(stand_in()) as library:
        image = library.upload(frame(0)[None])
        engines = []
        for number, size in enumerate((1000, 5000, 3000)):
            path = write_engine(tmp_path / f"{number}.engine", graph, V10, scratch=size)
            engines.append(library.load(path))
            for engine in engines:  # each also after the block has moved
                engine.run({"image": image})
            library.synchronise()
        assert [engine.scratch_bytes for engine in engines] == [1000, 5000, 3000]
        sizes = [region.values.size for region in driver.regions.values()]
        assert sorted(size for size in sizes if size >= 1000) == [5000]


def test_memory_does_not_grow_with_frames_or_with_engines_opened_and_closed(
    stand_in: Open, driver: Driver, bundle: Path, tmp_path: Path
) -> None:
    write_engines(bundle, tmp_path, V10)
    with closing(stand_in()) as library:
        taken, engines = [], []
        for _ in range(3):
            with closing(library.load(tmp_path / "segment-0-1.engine")) as engine:
                library.download(engine.run({"image": library.upload(frame(0)[None])})["exit1"])
            engines.append(engine)
            taken.append(driver._taken())
        assert taken[0] == taken[1] == taken[2]


def test_a_cascade_that_cannot_be_loaded_gives_everything_back(
    stand_in: Open, driver: Driver, bundle: Path, tmp_path: Path
) -> None:
    write_engines(bundle, tmp_path, V10)
    write_engine(tmp_path / "segment-1-2.engine", bundle, "8.4.1")
    with pytest.raises(EngineError, match=r"segment-1-2.engine does not load"):
        runtime.load(bundle, "host", Built(stand_in(), tmp_path))
    gc.collect()
    assert not driver.left()


def test_an_output_that_does_not_fit_gives_back_what_the_engine_took(
    stand_in: Open, driver: Driver, bundle: Path, tmp_path: Path
) -> None:
    write_engines(bundle, tmp_path, V10, scratch=1000)
    with closing(stand_in()) as library:
        driver.memory_bytes = 64 + 1000 + 288 + 10  # weights, scratch and logits, but not the 16 bytes of counts
        with pytest.raises(EngineError, match=r"out of memory: 0.0 MiB requested"):
            library.load(tmp_path / f"head-{small_network.HEADS[0]}.engine")
        gc.collect()
        assert driver._taken() == 1000


def test_a_fault_on_the_device_is_one_line_and_closing_still_works(bundle: Path, tmp_path: Path) -> None:
    driver = Driver()
    module = tensorrt_standin.make_module(V10, driver)
    library = TensorRt("tensorrt", module, Cuda(driver), False)
    engine = library.load(write_engine(tmp_path / "a.engine", bundle.parent / "graphs/segment-0-1.onnx", V10))
    result = engine.run({"image": library.upload(frame(0)[None])})
    driver.fail = {"cuStreamSynchronize": 700}
    with pytest.raises(EngineError, match=r"ILLEGAL_ADDRESS \(700\): the device cannot go on in this process"):
        library.download(result["exit1"])
    library.close()


@pytest.mark.parametrize("capture", ["breaks", "is refused"])
def test_what_cannot_be_captured_runs_plainly(
    stand_in: Open, driver: Driver, bundle: Path, tmp_path: Path, capture: str
) -> None:
    write_engines(bundle, tmp_path, V10, capture=capture)
    with closing(stand_in(cuda_graphs=True)) as library:
        engine = library.load(tmp_path / "segment-0-1.engine")
        image = library.upload(frame(1)[None])
        wanted = np.maximum(frame(1)[::2, ::2] @ small_network.FIRST.T, 0).transpose(2, 0, 1)
        for _ in range(4):
            result = library.download(engine.run({"image": image})["exit1"])
            np.testing.assert_allclose(result[0], wanted, atol=1e-4)
        assert driver.log.count("cuStreamBeginCapture_v2") == 1
        assert "cuGraphLaunch" not in driver.log


def test_a_graph_follows_its_tensors(stand_in: Open, driver: Driver, bundle: Path, tmp_path: Path) -> None:
    """A launch holds addresses: fed from elsewhere, or after the scratch block moved, it must be captured anew."""
    write_engines(bundle, tmp_path, V10, scratch=100)
    large = write_engine(tmp_path / "large.engine", bundle.parent / "graphs/segment-0-1.onnx", V10, scratch=9999)
    with closing(stand_in(cuda_graphs=True)) as library:
        engine = library.load(tmp_path / "segment-0-1.engine")
        images = [library.upload(frame(seed)[None]) for seed in range(2)]
        for which in (0, 0, 0, 1, 0, 1, 1, 1):
            result = library.download(engine.run({"image": images[which]})["exit1"])[0]
            wanted = np.maximum(frame(which)[::2, ::2] @ small_network.FIRST.T, 0).transpose(2, 0, 1)
            np.testing.assert_allclose(result, wanted, atol=1e-4)
        library.load(large)
        for _ in range(3):
            engine.run({"image": images[1]})
        library.synchronise()
        assert len(driver.graphs) == 1


@pytest.mark.parametrize("name", REAL)
def test_the_library_is_opened_by_its_name(
    name: str, stand_in: Open, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = RTX if name == "tensorrt_rtx" else "8.5.2.2"
    monkeypatch.setitem(sys.modules, name, tensorrt_standin.make_module(version, driver))
    with closing(open_library(name)) as library:
        assert (library.name, library.version) == (name, version)


def test_a_library_that_does_not_start_gives_the_device_back(
    stand_in: Open, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(logger: Any) -> None:
        logger.log(tensorrt_standin.ILogger.INTERNAL_ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    module = tensorrt_standin.make_module(V10, driver)
    monkeypatch.setattr(module, "Runtime", fails)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(EngineError, match=r"does not start on Stand-in .*nullptr: CUDA initialization failure with"):
        tensorrt_engine.open_library("tensorrt")


def test_the_engines_of_the_gpu_tests_build_here(bundle: Path, tmp_path: Path) -> None:
    """So that a machine with a GPU fails for its own reasons only."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    real_engines("tensorrt_rtx", bundle, tmp_path, "SM86")
    assert len(list(tmp_path.glob("*.engine"))) == 6
