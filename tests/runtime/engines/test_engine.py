"""The engine seam: what a user would lose is a clear reason when a graph or library is not what it should be."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mess_compile.runtime.base.errors import EngineError, InputError
from mess_compile.runtime.engines import onnxruntime_engine
from mess_compile.runtime.engines.engine import TensorSpec, Timing, open_library
from mess_compile.runtime.engines.engine_fake import FakeGraph, FakeLibrary
from tests import small_network


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_network.graph_set(tmp_path_factory.mktemp("graphs")).root


def test_tensors_pass_from_graph_to_graph_without_numpy(root: Path) -> None:
    library = open_library("onnxruntime", threads=1)
    first, second = library.load(root / "segment-0-1.onnx"), library.load(root / "segment-1-2.onnx")
    image = small_network.frame(3)
    outputs = second.run(first.run({"image": library.upload(image[None])}))
    wanted = np.maximum(image[::2, ::2] @ small_network.FIRST.T, 0) @ small_network.SECOND.T
    values = library.download(outputs["exit2"])[0].transpose(1, 2, 0)
    np.testing.assert_allclose(values, np.maximum(wanted, 0), atol=1e-4)


def test_an_engine_tells_its_tensors(root: Path) -> None:
    engine = open_library("onnxruntime").load(root / "segment-0-1.onnx")
    assert engine.inputs == {"image": TensorSpec("image", "uint8", (1, 8, 12, 3))}
    assert engine.outputs == {"exit1": TensorSpec("exit1", "float32", (1, 4, 4, 6))}


def test_a_timed_run_is_a_run(root: Path) -> None:
    library = open_library("onnxruntime", threads=1)
    engine = library.load(root / "segment-0-1.onnx")
    image = library.upload(small_network.frame(3)[None])
    before = library.download(engine.run({"image": image})["exit1"])
    start = time.perf_counter()
    timing = engine.run_timed({"image": image})
    assert 0 < timing.wall_ms <= 1e3 * (time.perf_counter() - start)
    assert (timing.device_ms, engine.scratch_bytes) == (None, None)
    np.testing.assert_array_equal(library.download(engine.run({"image": image})["exit1"]), before)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run_timed({"image": image})


def test_the_array_given_to_upload_may_be_a_view(root: Path) -> None:
    library = open_library("onnxruntime", threads=1)
    array = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
    np.testing.assert_array_equal(library.download(library.upload(array)), array)


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x07" * 50])
def test_an_unreadable_graph_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "segment-0-1.onnx"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=r"cannot load .*segment-0-1.onnx"):
        open_library("onnxruntime").load(path)


def test_a_missing_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no graph .*gone.onnx"):
        open_library("onnxruntime").load(tmp_path / "gone.onnx")


def test_a_missing_weight_is_an_engine_error(tmp_path: Path) -> None:
    graphs = small_network.graph_set(tmp_path)
    for weight in (tmp_path / "weights").iterdir():
        weight.unlink()
    with pytest.raises(EngineError, match=r"segment-0-1.onnx"):
        open_library("onnxruntime").load(graphs.path("segment-0-1"))


def test_a_graph_without_static_shapes_is_refused(tmp_path: Path) -> None:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, "n")) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", tensors[:1], tensors[1:])
    path = tmp_path / "dynamic.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    with pytest.raises(EngineError, match="static shapes"):
        open_library("onnxruntime").load(path)


def test_a_wrong_feed_is_an_engine_error_that_names_the_graph(root: Path) -> None:
    library = open_library("onnxruntime", threads=1)
    engine = library.load(root / "segment-0-1.onnx")
    with pytest.raises(EngineError, match=r"segment-0-1.onnx"):
        engine.run({"image": library.upload(np.zeros((1, 2, 2, 3), np.uint8))})
    with pytest.raises(EngineError, match=r"segment-0-1.onnx"):
        engine.run({})
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run({"image": library.upload(np.zeros((1, 8, 12, 3), np.uint8))})


def test_an_unknown_library_and_an_impossible_thread_count_are_refused() -> None:
    with pytest.raises(InputError, match=r"'tflite' is not one of onnxruntime"):
        open_library("tflite")
    with pytest.raises(InputError, match="threads is 0"):
        open_library("onnxruntime", threads=0)


def test_without_onnxruntime_the_message_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match="pip install onnxruntime"):
        open_library("onnxruntime")


def test_the_fake_refuses_a_tensor_that_its_engine_has_overwritten() -> None:
    spec = TensorSpec("x", "float32", (1,))
    library = FakeLibrary({"g": FakeGraph((spec,), (spec,), lambda feeds: feeds)})
    engine = library.load(Path("g.onnx"))
    feeds = {"x": library.upload(np.ones(1, np.float32))}
    old = engine.run(feeds)
    engine.run(feeds)
    with pytest.raises(EngineError, match="overwritten"):
        library.download(old["x"])


def test_the_fake_times_a_run_apart_from_what_is_queued() -> None:
    spec = TensorSpec("x", "float32", (1,))
    graph = FakeGraph((spec,), (spec,), lambda feeds: feeds, cost_ns=3_000_000, device_ns=2_000_000)
    library = FakeLibrary({"g": graph}, queued=True)
    engine = library.load(Path("g.onnx"))
    feeds = {"x": library.upload(np.ones(1, np.float32))}
    engine.run(feeds)
    assert engine.run_timed(feeds) == Timing(3.0, 2.0)
    assert library.now_ns == 6_000_000


def buffers_on_the_cpu(specs: Iterable[TensorSpec]) -> dict[str, onnxruntime.OrtValue]:
    make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
    return {spec.name: make(spec.shape, np.dtype(spec.dtype), "cpu", 0) for spec in specs}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("onnxruntime", id="as a GPU would"),
        pytest.param("onnxruntime-cuda", marks=pytest.mark.gpu),
        pytest.param("onnxruntime-tensorrt", marks=pytest.mark.gpu),
    ],
)
def test_outputs_that_stay_on_the_device_are_those_of_plain_runs(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The binding that keeps tensors on a GPU works on the CPU too: without a GPU it is tested there."""
    if onnxruntime_engine.PROVIDERS[name][0] not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {onnxruntime_engine.PROVIDERS[name][0]}")
    library = open_library(name)
    if name == "onnxruntime":
        monkeypatch.setattr(library, "_buffers", buffers_on_the_cpu)
    first, second = library.load(root / "segment-0-1.onnx"), library.load(root / "segment-1-2.onnx")
    for seed in range(3):
        image = small_network.frame(seed)
        features = first.run({"image": library.upload(image[None])})
        assert features["exit1"] is first.run({"image": library.upload(image[None])})["exit1"]
        values = library.download(second.run(features)["exit2"])[0].transpose(1, 2, 0)
        wanted = np.maximum(image[::2, ::2] @ small_network.FIRST.T, 0) @ small_network.SECOND.T
        np.testing.assert_allclose(values, np.maximum(wanted, 0), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_without_the_gpu_provider_the_message_names_the_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match=r"has CPUExecutionProvider, but not .*pip install onnxruntime-gpu"):
        open_library(name)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime would fall back to the CPU without a word, and the figures would be the CPU's."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    if "CUDAExecutionProvider" in onnxruntime.get_all_providers() and onnxruntime.get_device() == "GPU":
        pytest.skip("this machine has the provider")
    with pytest.raises(EngineError, match="could not start CUDAExecutionProvider"):
        open_library("onnxruntime-cuda").load(root / "segment-0-1.onnx")
