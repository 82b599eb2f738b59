"""fp16 and int8 graphs compute what those formats can hold, keep the gate exact, and build for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mess_compile.data.scenes import make_scene
from mess_compile.graph.compare import loaded, run, thresholds_of
from mess_compile.graph.cut import cut_network
from mess_compile.graph.gate import append_gate
from mess_compile.graph.lint import Parser
from mess_compile.graph.node_builder import add, empty_model
from mess_compile.graph.precision import MIN_CALIBRATION_FRAMES, Feed, to_fp16, to_int8
from mess_compile.graph.rewrite import rewritten
from mess_compile.graph.store import read_whole_model, write_graph
from mess_compile.nets.export import export_network
from mess_compile.network import Gate, GraphSet, HeadConfig
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines import engine
from tests.graph import tiny
from tests.networks import random_network

RANDOM = np.random.default_rng(5)
HEADS = ((1, HeadConfig("fcn", 4, 2, rdi=True)), (2, HeadConfig("dlb", 8)))
RTX_2080 = Parser("tensorrt_rtx", "1.7.1.116", 17, (7, 5))
RTX_3080 = Parser("tensorrt_rtx", "1.7.1.116", 17, (8, 6))
CELLS = (45, 61)  # 2745, odd and above 2048: fp16 cannot hold it


@pytest.fixture(scope="module")
def library() -> Iterator[engine.Library]:
    with closing(engine.open_library("onnxruntime", 1)) as opened:
        yield opened


@pytest.fixture(scope="module")
def graph_set(tmp_path_factory: pytest.TempPathFactory) -> GraphSet:
    return cut_network(
        export_network(random_network(HEADS), tmp_path_factory.mktemp("graphs")).parent, Gate(), tiny.nothing
    )


def two_layers(
    first: np.ndarray, second: np.ndarray, bias: np.ndarray, hw: tuple[int, int] = (2, 3)
) -> onnx.ModelProto:
    """x (1, C, h, w) -> 1x1 convolution -> relu -> 1x1 convolution with a bias -> logits."""
    model = empty_model([helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, first.shape[1], *hw))])
    for name, values in (("first", first[..., None, None]), ("second", second[..., None, None]), ("bias", bias)):
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    add(model.graph, "Conv", ["x", "first"], "sums")
    add(model.graph, "Relu", ["sums"], "kept")
    add(model.graph, "Conv", ["kept", "second", "bias"], "logits")
    model.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, len(second), *hw)))
    return model


def output(library: engine.Library, model: onnx.ModelProto, feed: Feed, folder: Path) -> Feed:
    write_graph(model, folder, "graph", 1)
    with loaded(library, folder / "graph.onnx") as graph:
        return run(library, graph, feed)


def half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float64)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_fp16_computes_what_halves_give_overflow_included(
    library: engine.Library, tmp_path: Path, scale: float
) -> None:
    """A large map between two convolutions is infinite on a GPU; ONNX Runtime alone would not say so."""
    first, second, bias = scale * RANDOM.random((8, 4)), RANDOM.random((3, 8)) / scale, RANDOM.random(3)
    x = RANDOM.uniform(50, 100, (1, 4, 2, 3)).astype(np.float32)
    kept = half(np.maximum(half(np.einsum("kc,nchw->nkhw", half(first), half(x))), 0))
    expected = half(np.einsum("kc,nchw->nkhw", half(second), kept) + half(bias)[:, None, None])
    found = output(library, to_fp16(two_layers(first, second, bias)), {"x": x}, tmp_path)["logits"]
    assert found.dtype == np.float32
    assert np.isinf(expected).all() == (scale > 1)
    np.testing.assert_allclose(found, expected, rtol=2**-10)  # sums in fp32 may round to the neighbour


def test_int8_computes_what_eight_bits_give(library: engine.Library, tmp_path: Path) -> None:
    first, second, bias = RANDOM.normal(size=(8, 4)), RANDOM.normal(size=(3, 8)), RANDOM.normal(size=3)
    frames = [RANDOM.normal(size=(1, 4, 2, 3)).astype(np.float32) for _ in range(MIN_CALIBRATION_FRAMES)]

    def exact(x: np.ndarray) -> np.ndarray:
        return np.maximum(np.einsum("kc,nchw->nkhw", first, x), 0)

    def eight_bits(values: np.ndarray, largest: np.ndarray | float) -> np.ndarray:
        step = largest / 127
        return np.clip(np.round(values / step), -128, 127) * step

    weights = [eight_bits(w, np.abs(w).max(axis=1, keepdims=True)) for w in (first, second)]
    x = frames[3]
    rounded = eight_bits(x, max(np.abs(frame).max() for frame in frames))
    kept = np.maximum(np.einsum("kc,nchw->nkhw", weights[0], rounded), 0)
    kept = eight_bits(kept, max(exact(frame).max() for frame in frames))
    expected = np.einsum("kc,nchw->nkhw", weights[1], kept) + bias[:, None, None]
    model = to_int8(two_layers(first, second, bias), ({"x": frame} for frame in frames))
    found = output(library, model, {"x": x}, tmp_path)["logits"]
    step = np.abs(weights[1]).max() * max(exact(frame).max() for frame in frames) / 127
    assert np.abs(found - expected).max() < 1.01 * step  # a value on the edge may fall to either side
    assert np.median(np.abs(found - expected)) < 1e-5


def test_the_gate_counts_every_cell_in_every_precision(library: engine.Library, tmp_path: Path) -> None:
    weights = np.array([[1.0], [-1.0]])
    model = two_layers(weights, 20 * np.eye(2), np.zeros(2), CELLS)
    append_gate(model, Gate(thresholds=(0.9,)), 2)
    x = np.where(RANDOM.random((1, 1, *CELLS)) > 0.5, 1, -1).astype(np.float32)
    feed = {"x": x, "thresholds": np.full((1, 2), 0.9, np.float32)}
    for converted in (to_fp16(model), to_int8(model, [feed] * MIN_CALIBRATION_FRAMES)):
        assert output(library, converted, feed, tmp_path)["counts"][0].sum() == CELLS[0] * CELLS[1]


def nodes_after_logits(model: onnx.ModelProto) -> list[bytes]:
    after, found = {"logits"}, []
    for node in model.graph.node:
        if after.intersection(node.input):
            after.update(node.output)
            found.append(node.SerializeToString())
    return sorted(found)


def feeds_of(graph_set: GraphSet, library: engine.Library, name: str) -> list[Feed]:
    """What the graph sees of street scenes, by the fp32 segment before it."""
    wanted = {tensor.name: tensor.shape for tensor in graph_set.spec(name).inputs}
    images = [make_scene(seed, graph_set.candidate.input_hw).frame[None] for seed in range(MIN_CALIBRATION_FRAMES)]
    given = {"thresholds": thresholds_of(graph_set), "logits": RANDOM.normal(size=wanted.get("logits", 0))}
    feeds = [{**given, "image": image} for image in images]
    for tensor in [tensor for tensor in wanted if tensor.startswith("exit")]:
        with loaded(library, graph_set.path(f"segment-0-{tensor[4:]}")) as segment:
            feeds = [{**feed, **run(library, segment, feed)} for feed in feeds]
    return [{tensor: feed[tensor] for tensor in wanted} for feed in feeds]


KINDS = (
    "segment-0-1",
    "segment-1-3",
    "head-exit1.fcn-crm4-b2-rdi",
    "head-exit2.dlb-crm8-b0",
    "head-exit3.fcn-crm1-b0",
    "output-8x12",
    "baseline",
)


@pytest.fixture(scope="module", params=KINDS)
def forms(
    request: pytest.FixtureRequest, graph_set: GraphSet, library: engine.Library
) -> tuple[str, onnx.ModelProto, dict[str, onnx.ModelProto]]:
    """A graph's name, the graph, and its two other precisions."""
    model = read_whole_model(graph_set.path(request.param))
    feeds = feeds_of(graph_set, library, request.param)
    return request.param, model, {"fp16": to_fp16(model), "int8": to_int8(model, feeds)}


def test_every_kind_of_graph_keeps_its_ends_and_its_gate(
    forms: tuple[str, onnx.ModelProto, dict[str, onnx.ModelProto]],
) -> None:
    name, model, converted = forms
    for found in converted.values():
        onnx.checker.check_model(found, full_check=True)
        assert list(found.graph.input) == list(model.graph.input)
        assert list(found.graph.output) == list(model.graph.output)
        assert nodes_after_logits(found) == nodes_after_logits(model)
        assert list(found.opset_import) == list(model.opset_import)
    if name.startswith("output"):
        assert list(converted.values()) == [model, model]
    convolutions = [
        [node for node in form.graph.node if node.op_type == "Conv"] for form in (model, *converted.values())
    ]
    assert len({len(found) for found in convolutions}) == 1
    half_weights = {t.name for t in converted["fp16"].graph.initializer if t.data_type == TensorProto.FLOAT16}
    assert all(node.input[1] in half_weights for node in convolutions[1])
    sources = {name: node.op_type for node in converted["int8"].graph.node for name in node.output}
    quantised = [{sources.get(name) for name in node.input[:2]} == {"DequantizeLinear"} for node in convolutions[2]]
    assert quantised == [not is_depthwise(node) for node in convolutions[2]]
    assert all(t.data_type != TensorProto.INT32 for t in converted["int8"].graph.initializer), "TensorRT takes no bias"


def is_depthwise(node: onnx.NodeProto) -> bool:
    """No other convolution of these networks has groups."""
    return any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)


def depthwise_between(channels: int) -> onnx.ModelProto:
    """x (1, 16, 32, 48) -> 1x1 -> depthwise 3x3 on `channels` -> 1x1 -> logits, as a block of MobileNetV2."""
    x, logits = (helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 16, 32, 48)) for name in ("x", "logits"))
    model = empty_model([x])
    for name, shape in (("up", (channels, 16, 1, 1)), ("deep", (channels, 1, 3, 3)), ("down", (16, channels, 1, 1))):
        model.graph.initializer.append(numpy_helper.from_array(RANDOM.normal(size=shape).astype(np.float32), name))
    add(model.graph, "Conv", ["x", "up"], "wide")
    add(model.graph, "Conv", ["wide", "deep"], "deeper", group=channels, pads=[1] * 4)
    add(model.graph, "Conv", ["deeper", "down"], "logits")
    model.graph.output.append(logits)
    return model


@pytest.mark.parametrize(("parser", "capability"), [(RTX_2080, "SM75"), (RTX_3080, "SM86")])
def test_an_int8_engine_is_not_several_times_larger_for_its_depthwise_convolutions(
    parser: Parser, capability: str, tmp_path: Path
) -> None:
    """It was 9 times as large as in fp32, for Ampere too, while they were in eight bits."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install mess-compile[rtx]")
    from tests.graph.test_tensorrt import build

    model, frame = depthwise_between(576), {"x": RANDOM.normal(size=(1, 16, 32, 48)).astype(np.float32)}
    quantised = to_int8(model, [frame] * MIN_CALIBRATION_FRAMES)
    read = [[node.input[0] for node in form.graph.node if is_depthwise(node)] for form in (model, quantised)]
    assert read == [["wide"], ["wide"]], "not through eight bits"
    sizes = []
    for form, precision in ((model, "fp32"), (quantised, "int8")):
        write_graph(rewritten(form, parser, precision)[0], tmp_path, "graph", 1)
        sizes.append(build(tmp_path / "graph.onnx", capability))
    assert sizes[1] < 3 * sizes[0]


@pytest.mark.parametrize("capability", ["SM75", "SM86"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_every_kind_of_graph_builds_in_every_precision(
    forms: tuple[str, onnx.ModelProto, dict[str, onnx.ModelProto]], precision: str, capability: str, tmp_path: Path
) -> None:
    """Of int8 this says that it parses and builds, no more."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install mess-compile[rtx]")
    from tests.graph.test_tensorrt import build

    parser = {"SM75": RTX_2080, "SM86": RTX_3080}[capability]
    copy = onnx.ModelProto()
    copy.CopyFrom(rewritten(forms[2][precision], parser, precision)[0])
    write_graph(copy, tmp_path, "graph", 1)
    assert build(tmp_path / "graph.onnx", capability) > 0


def test_equal_graphs_give_equal_bytes(graph_set: GraphSet, library: engine.Library) -> None:
    """Engines are cached by the hash of the graph."""
    name = "segment-1-3"
    feeds = feeds_of(graph_set, library, name)
    once, again = ([to_fp16(m), to_int8(m, feeds)] for m in [read_whole_model(graph_set.path(name)) for _ in range(2)])
    assert [form.SerializeToString(deterministic=True) for form in once] == [
        form.SerializeToString(deterministic=True) for form in again
    ]


@settings(max_examples=15, deadline=None)
@given(worst=st.floats(width=32))
@example(worst=65504.0)
@example(worst=float(np.nextafter(np.float32(65504), np.float32(np.inf))))
@example(worst=-65536.0)
@example(worst=float("nan"))
def test_a_weight_that_fp16_cannot_hold_is_named(worst: float) -> None:
    second = np.array([[1.0, worst], [-3.0, 2.0]])
    model = two_layers(np.eye(2), second, np.zeros(2))
    if abs(worst) <= 65504:
        assert to_fp16(model).graph.node
    else:
        with pytest.raises(InputError, match=r"weight 'second' contains .*fp16 ends at 65504: keep it in fp32"):
            to_fp16(model)


def test_too_few_frames_to_calibrate_on_are_refused() -> None:
    model = two_layers(np.eye(2), np.eye(2), np.zeros(2))
    feeds = [{"x": np.ones((1, 2, 2, 3), np.float32)}] * (MIN_CALIBRATION_FRAMES - 1)
    with pytest.raises(InputError, match=r"at least 16 frames to calibrate on, there are 15: take more"):
        to_int8(model, feeds)


def test_the_quantiser_is_quiet_and_leaves_the_model_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model = two_layers(np.eye(2), np.eye(2), np.zeros(2))
    before = model.SerializeToString(deterministic=True)
    to_int8(model, [{"x": np.ones((1, 2, 2, 3), np.float32)}] * MIN_CALIBRATION_FRAMES)
    assert model.SerializeToString(deterministic=True) == before
    assert not caplog.records
