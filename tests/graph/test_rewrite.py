"""A graph rewritten for a target computes what it computed: else other labels would ship than were tested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers import float16

from mess_compile.graph.cut import cut_network
from mess_compile.graph.lint import Parser, lint
from mess_compile.graph.precision import to_fp16
from mess_compile.graph.rewrite import PASSES, rewritten
from mess_compile.graph.store import read_model, read_whole_model
from mess_compile.nets.export import export_network
from mess_compile.network import Gate, GraphSet, HeadConfig
from mess_compile.runtime.base.errors import InputError
from tests.graph import tiny
from tests.networks import random_network

XAVIER = Parser("tensorrt", "8.5.2.2", 17, (7, 2))
RTX_2080 = Parser("tensorrt_rtx", "1.7.1.116", 17, (7, 5))
RTX_3080 = Parser("tensorrt_rtx", "1.7.1.116", 17, (8, 6))
HEADS = ((1, HeadConfig("fcn", 4, 1)), (1, HeadConfig("sep", 4)), (2, HeadConfig("lra", 2)), (2, HeadConfig("dlb", 8)))
FOURS, EIGHTS, FLOAT = "depthwise in groups of 4", "depthwise in groups of 8", "uint8 through float"
PRODUCTS = "counts by products"
IN_FOUR, IN_EIGHT, PAIRS = "images in 4 channels", "images in 8 channels", "weights quantised in the graph"
Arrays = dict[str, NDArray[np.generic]]
node, info, weight = helper.make_node, helper.make_tensor_value_info, numpy_helper.from_array


def model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: list[onnx.TensorProto],
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    return made


def run(graph: onnx.ModelProto, feeds: Arrays) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


def check_equal(before: onnx.ModelProto, after: onnx.ModelProto, feeds: Arrays) -> None:
    onnx.checker.check_model(after, full_check=True)
    expected, found = run(before, feeds), run(after, feeds)
    assert list(expected) == list(found)
    for name, values in expected.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape)
        allowed = 1e-5 * np.abs(values).max() if values.dtype.kind == "f" else 0
        assert np.abs(found[name].astype(np.float64) - values).max() <= allowed, name


def convolution(
    channels: int, outputs: int = 1, dtype: type[np.generic] = np.float32, bias: bool = True, **given: object
) -> onnx.ModelProto:
    """A depthwise convolution, 3x3 unless `given` says otherwise, with `outputs` channels made of each."""
    random = np.random.default_rng(channels)
    kernel = given.get("kernel_shape", [3, 3])
    values = random.standard_normal((channels * outputs, 1, *kernel)).astype(dtype)
    weights = [weight(values, "w"), weight(random.standard_normal(channels * outputs).astype(dtype), "b")]
    conv = node("Conv", ["x", "w", "b"] if bias else ["x", "w"], ["y"], group=channels, **given)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    ends = [info("x", kind, (1, channels, 13, 17))], [info("y", kind, None)]
    graph = helper.make_graph([conv], "graph", *ends, weights if bias else weights[:1])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(made, strict_mode=True)


def maps(channels: int) -> Arrays:
    return {"x": np.random.default_rng(1).standard_normal((1, channels, 13, 17)).astype(np.float32)}


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(2, 40),
    outputs=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilations=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    bias=st.booleans(),
    precision=st.sampled_from(["fp32", "fp16", "int8"]),
)
def test_depthwise_convolutions_in_groups_compute_the_same(
    channels: int,
    outputs: int,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    pads: tuple[int, int, int, int],
    bias: bool,
    precision: str,
) -> None:
    before = convolution(
        channels, outputs, bias=bias, kernel_shape=kernel, strides=strides, dilations=dilations, pads=pads
    )
    bytes_before = before.SerializeToString()
    after, names = rewritten(before, RTX_2080, precision)
    assert before.SerializeToString() == bytes_before
    wanted = 8 if precision == "fp16" else 4
    fits = channels < wanted or any(channels % size == 0 for size in range(wanted, 4 * wanted + 1))
    expected = [EIGHTS if wanted == 8 else FOURS] if fits else []
    expected += [IN_EIGHT if wanted == 8 else IN_FOUR] if channels < wanted else []  # one group that is not full
    assert list(names) == expected
    if channels % wanted == 0:
        assert after.graph.initializer[0].dims[1] == wanted
    check_equal(before, after, maps(channels))


def test_weights_keep_their_type_and_the_new_ones_are_zero() -> None:
    """Three outputs of each of 16 channels: output o reads channel o // 3, in groups of 8."""
    before = convolution(16, 3, np.float16)
    after, names = rewritten(before, RTX_2080, "fp16")
    assert names == (EIGHTS,)
    narrow, wide = (numpy_helper.to_array(graph.graph.initializer[0]) for graph in (before, after))
    assert (wide.dtype, wide.shape) == (np.float16, (48, 8, 3, 3))
    for output in range(48):
        np.testing.assert_array_equal(wide[output, (output // 3) % 8], narrow[output, 0])
    assert np.count_nonzero(wide) == np.count_nonzero(narrow)


def quantised(zero: int = 0, per_channel: bool = True) -> onnx.ModelProto:
    """A depthwise convolution of 8 channels whose weights are int8 in the file, as a quantiser writes them."""
    random = np.random.default_rng(5)
    count = 8 if per_channel else 1
    scales = random.uniform(0.01, 0.02, 8).astype(np.float32) if per_channel else np.float32(0.01)
    zeros = np.full(8, zero, np.int8) if per_channel else np.int8(zero)
    weights = [weight(random.integers(-127, 128, (8, 1, 3, 3)).astype(np.int8), "w")]
    weights += [weight(scales, "ws"), weight(zeros, "wz"), weight(np.float32(0.03), "s"), weight(np.int8(0), "z")]
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["xq"]), node("DequantizeLinear", ["xq", "s", "z"], ["xd"])]
    nodes += [node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0 if count > 1 else 1)]
    nodes += [node("Conv", ["xd", "wd"], ["y"], group=8)]
    return model(nodes, [info("x", 1, (1, 8, 13, 17))], [info("y", 1, (1, 8, 11, 15))], weights)


@pytest.mark.parametrize("per_channel", [True, False])
def test_quantised_weights_are_grouped_behind_their_scales(per_channel: bool) -> None:
    before = quantised(per_channel=per_channel)
    after, names = rewritten(before, RTX_2080, "int8")
    assert names == (FOURS,)
    assert [list(tensor.dims) for tensor in after.graph.initializer if tensor.name == "w"] == [[8, 4, 3, 3]]
    check_equal(before, after, maps(8))


def plain(channels: int, dtype: type[np.generic] = np.float32, scales: bool = False) -> onnx.ModelProto:
    """A convolution 3x3 of a map of few channels, as the first of a network; with `scales`, both go through int8."""
    random = np.random.default_rng(channels)
    weights = [weight(random.standard_normal((5, channels, 3, 3)).astype(dtype), "w")]
    nodes, names = [], ["x", "w"]
    if scales:
        weights += [weight(np.int8(0), "z"), weight(np.float32(0.02), "s")]
        for name in names:
            nodes.append(node("QuantizeLinear", [name, "s", "z"], [f"{name}q"]))
            nodes.append(node("DequantizeLinear", [f"{name}q", "s", "z"], [f"{name}d"]))
        names = ["xd", "wd"]
    nodes.append(node("Conv", names, ["y"], pads=[1] * 4, strides=[2, 2]))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return model(nodes, [info("x", kind, (1, channels, 13, 17))], [info("y", kind, (1, 5, 7, 9))], weights)


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_images_in_more_channels_compute_the_same(channels: int, scales: bool) -> None:
    before = plain(channels, scales=scales)
    bytes_before = before.SerializeToString()
    after, names = rewritten(before, RTX_2080, "int8" if scales else "fp32")
    assert before.SerializeToString() == bytes_before
    assert names == (IN_FOUR,)
    assert after.graph.node[0].op_type == "Pad", "before eight bits, which follow the convolution"
    assert list(after.graph.initializer[0].dims) == [5, 4, 3, 3]
    check_equal(before, after, maps(channels))


def test_two_convolutions_of_one_image_share_its_channels() -> None:
    before = plain(3)
    before.graph.initializer.append(weight(np.ones((2, 3, 3, 3), np.float32), "v"))
    before.graph.node.append(node("Conv", ["x", "v"], ["z"]))
    before.graph.node.append(node("Relu", ["x"], ["r"]))
    before.graph.output.extend([info("z", 1, (1, 2, 11, 15)), info("r", 1, (1, 3, 13, 17))])
    after, names = rewritten(before, RTX_2080, "fp32")
    assert names == (IN_FOUR,)
    assert [each.op_type for each in after.graph.node] == ["Pad", "Conv", "Conv", "Relu"]
    check_equal(before, after, maps(3))


def test_images_have_eight_channels_in_fp16() -> None:
    before = plain(3, np.float16)
    after, names = rewritten(before, RTX_2080, "fp16")
    assert names == (IN_EIGHT,)
    assert numpy_helper.to_array(after.graph.initializer[0]).dtype == np.float16
    check_equal(before, after, {"x": maps(3)["x"].astype(np.float16)})


@pytest.mark.parametrize("parser", [XAVIER, Parser("tensorrt", "8.6.1", 17, (6, 1))], ids=["8.5", "8.6"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_tensorrt_8_gets_weights_in_float_that_become_the_same_eight_bits(per_channel: bool, parser: Parser) -> None:
    """Else it stops with "invalid weights type of Int8", as issue 2163 of its repository says."""
    before = quantised(per_channel=per_channel)
    bytes_before = before.SerializeToString()
    assert len(lint(before, "head", parser)) == 1
    after, names = rewritten(before, parser, "int8")
    assert before.SerializeToString() == bytes_before
    assert names == (PAIRS,)
    assert lint(after, "head", parser) == ()
    assert {tensor.name for tensor in after.graph.initializer} == {"ws", "wz", "s", "z", "wd/float"}
    for each in (before, after):
        each.graph.output.append(info("wd", 1, (8, 1, 3, 3)))
    check_equal(before, after, maps(8))
    scales = np.abs(run(before, maps(8))["wd"]).max()
    np.testing.assert_allclose(run(after, maps(8))["wd"], run(before, maps(8))["wd"], atol=1e-6 * scales)


@pytest.mark.parametrize("parser", [RTX_2080, RTX_3080, Parser("tensorrt", "10.3", 20, (8, 7))])
def test_newer_parsers_read_weights_of_int8(parser: Parser) -> None:
    before = quantised()
    assert PAIRS not in rewritten(before, parser, "int8")[1]
    assert lint(before, "head", parser) == ()


def left_alone() -> dict[str, onnx.ModelProto]:
    """Convolutions with channels enough, or whose weights are not theirs alone."""
    shared = convolution(8, pads=[1] * 4)
    shared.graph.node.append(node("Conv", ["y", "w"], ["z"], group=8))
    shared.graph.output.append(info("z", 1, (1, 8, 11, 15)))
    fed = convolution(8)
    fed.graph.input.append(info("w", 1, (8, 1, 3, 3)))
    paired = convolution(8)
    paired.graph.initializer[0].CopyFrom(weight(np.ones((8, 2, 3, 3), np.float32), "w"))
    paired.graph.node[0].attribute[0].i = 4
    wide, wide_shared = plain(4), plain(3)
    wide_shared.graph.output.append(info("w", 1, (5, 3, 3, 3)))
    return {
        "shared": shared, "fed": fed, "paired": paired, "offset": quantised(zero=3), "wide": wide, "shown": wide_shared,
    }  # fmt: skip


@pytest.mark.parametrize("name", left_alone())
def test_other_convolutions_are_left_alone(name: str) -> None:
    before = left_alone()[name]
    onnx.checker.check_model(before)
    after, names = rewritten(before, RTX_2080, "fp32")
    assert after is before
    assert names == ()


def test_only_turing_pays_for_zeros() -> None:
    for parser in (RTX_3080, XAVIER, Parser("tensorrt", "10.3", 20, (7, 5)), Parser("onnxruntime", "1.20", None, None)):
        before = convolution(8)
        assert rewritten(before, parser, "fp32") == (before, ())


def painted(*kinds: int) -> onnx.ModelProto:
    """Logits (1, 5, 6, 7) -> argmax -> Cast to each of `kinds` in turn."""
    nodes = [node("ArgMax", ["logits"], ["t0"], axis=1, keepdims=0)]
    nodes += [node("Cast", [f"t{i}"], [f"t{i + 1}"], name=f"cast{i}", to=kind) for i, kind in enumerate(kinds)]
    nodes[-1].output[0] = "labels"
    return model(nodes, [info("logits", 1, (1, 5, 6, 7))], [info("labels", kinds[-1], (1, 6, 7))], [])


def test_labels_reach_uint8_through_float_for_tensorrt() -> None:
    before = painted(TensorProto.UINT8)
    bytes_before = before.SerializeToString()
    assert len(lint(before, "output", XAVIER)) == 1
    after, names = rewritten(before, XAVIER, "fp32")
    assert before.SerializeToString() == bytes_before
    assert names == (FLOAT,)
    assert lint(after, "output", XAVIER) == ()
    assert [each.op_type for each in after.graph.node] == ["ArgMax", "Cast", "Cast"]
    check_equal(before, after, {"logits": np.random.default_rng(0).standard_normal((1, 5, 6, 7)).astype(np.float32)})
    assert rewritten(before, RTX_3080, "fp32")[1] == ()


def test_a_cast_that_passes_float_already_is_left_alone() -> None:
    before = painted(TensorProto.FLOAT, TensorProto.UINT8)
    assert rewritten(before, XAVIER, "fp32") == (before, ())


def test_frames_leave_uint8_through_float_for_tensorrt() -> None:
    nodes = [node("Cast", ["image"], ["y"], name="only", to=TensorProto.INT32)]
    before = model(nodes, [info("image", TensorProto.UINT8, (1, 4, 4, 3))], [info("y", 6, (1, 4, 4, 3))], [])
    after, names = rewritten(before, XAVIER, "fp32")
    assert names == (FLOAT,)
    assert lint(after, "segment-0-1", XAVIER) == ()
    check_equal(before, after, {"image": np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3) * 5})


def test_a_graph_read_without_its_weights_is_refused(tmp_path: Path) -> None:
    big = convolution(64)
    onnx.save(big, str(tmp_path / "big.onnx"), save_as_external_data=True, size_threshold=0)
    with pytest.raises(InputError, match="'w' is in another file: read the graph with its weights"):
        rewritten(read_model(tmp_path / "big.onnx"), RTX_2080, "fp32")


@pytest.fixture(scope="module")
def graph_set(tmp_path_factory: pytest.TempPathFactory) -> GraphSet:
    folder = export_network(random_network(HEADS), tmp_path_factory.mktemp("graphs")).parent
    return cut_network(folder, Gate(), tiny.nothing)


def feeds(graph: onnx.ModelProto) -> Arrays:
    random = np.random.default_rng(0)
    drawn: Arrays = {}
    for value in graph.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == TensorProto.UINT8:
            drawn[value.name] = random.integers(0, 256, shape, dtype=np.uint8)
        else:
            drawn[value.name] = random.random(shape, np.float32)
    return drawn


def test_every_exported_graph_computes_the_same_for_every_target(graph_set: GraphSet) -> None:
    used = set()
    for name in graph_set.graphs:
        graph = read_whole_model(graph_set.path(name))
        for parser, precision in ((RTX_2080, "fp32"), (RTX_2080, "fp16"), (XAVIER, "fp32"), (RTX_3080, "fp32")):
            after, names = rewritten(graph, parser, precision)
            used.update((parser, each) for each in names)
            if names:
                check_equal(graph, after, feeds(graph))
    assert used == {(RTX_2080, name) for name in (FOURS, EIGHTS, IN_FOUR, IN_EIGHT, PRODUCTS)}, (
        "our graphs are already as TensorRT 8.5 takes them"
    )


def engine_bytes(graph: onnx.ModelProto, capability: str) -> int:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install mess-compile[rtx]")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, logger).parse(graph.SerializeToString())
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    return int(builder.build_serialized_network(network, config).nbytes)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_for_turing_is_not_several_times_larger(graph_set: GraphSet, precision: str) -> None:
    graph = read_whole_model(graph_set.path("segment-1-3"))
    if precision == "fp16":
        graph = float16.convert_float_to_float16(graph)
    after, names = rewritten(graph, RTX_2080, precision)
    assert len(names) == 1
    newer = engine_bytes(graph, "SM86")
    assert engine_bytes(after, "SM75") <= 2 * newer < engine_bytes(graph, "SM75")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_engine_of_a_first_segment_holds_no_empty_image(precision: str) -> None:
    """One map of zeros of the image's size for every channel that Turing pads: 1.5 MiB at this size in fp32."""
    before = plain(3)
    for value, shape in ((before.graph.input[0], (1, 3, 640, 640)), (before.graph.output[0], (1, 5, 320, 320))):
        value.CopyFrom(info(value.name, 1, shape))
    graph = to_fp16(before) if precision == "fp16" else before
    after, names = rewritten(graph, RTX_2080, precision)
    assert len(names) == 1
    assert engine_bytes(after, "SM75") < 1 << 20 < engine_bytes(graph, "SM75")


def test_every_pass_has_a_name_of_its_own() -> None:
    assert {each.name for each in PASSES} == {FOURS, EIGHTS, IN_FOUR, IN_EIGHT, FLOAT, PAIRS, PRODUCTS}
    assert len(PASSES) == 7
