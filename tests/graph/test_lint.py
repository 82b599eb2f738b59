"""What a target cannot parse is told in one line, before a build that may take minutes fails in other words."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mess_compile.graph.cut import cut_network
from mess_compile.graph.gate import CLASS_COUNTS
from mess_compile.graph.lint import Parser, lint, operators
from mess_compile.graph.precision import MIN_CALIBRATION_FRAMES, to_fp16, to_int8
from mess_compile.graph.rewrite import rewritten
from mess_compile.graph.store import read_model, read_whole_model
from mess_compile.nets.export import export_network
from mess_compile.network import CONFIDENCES, Gate, GraphSet, HeadConfig
from mess_compile.runtime.base.errors import InputError
from tests.graph import tiny
from tests.networks import random_network

XAVIER = Parser("tensorrt", "8.5.2.2", 17, (7, 2))
GTX_1080 = Parser("tensorrt", "8.6.1", 17, (6, 1))
ORIN = Parser("tensorrt", "10.3.0", 20, (8, 7))
RTX_2080 = Parser("tensorrt_rtx", "1.7.1.116", 17, (7, 5))
RTX_3080 = Parser("tensorrt_rtx", "1.7.1.116", 17, (8, 6))
SERVER = Parser("onnxruntime-cuda", "1.20.1", None, None)
HEADS = (
    (1, HeadConfig("fcn", 4, 2, rdi=True)),
    (2, HeadConfig("dlb", 8)),
    (1, HeadConfig("sep", 2)),
    (2, HeadConfig("lra", 2)),
)
F32, F16, U8, I32, I64, F64 = "float32", "float16", "uint8", "int32", "int64", "float64"
Tensor = tuple[str, Sequence[int | str]]
node = helper.make_node


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    weights: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
    def info(name: str, tensor: Tensor) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(tensor[0])), tensor[1])

    ends = [[info(name, tensor) for name, tensor in values.items()] for values in (inputs, outputs)]
    tensors = [numpy_helper.from_array(np.asarray(values), name) for name, values in (weights or {}).items()]
    graph = helper.make_graph(list(nodes), "graph", *ends, tensors)
    imports = [helper.make_opsetid("", 17)]
    imports += [helper.make_opsetid(each.domain, 1) for each in nodes if each.domain]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def one(op: str, source: Tensor, target: Tensor, weights: Mapping[str, Any] | None = None, **given: Any) -> Any:
    """A graph of one node, which reads `x` and `weights` and writes `y`."""
    only = node(op, ["x", *(weights or {})], ["y"], name="only", **given)
    return model([only], {"x": source}, {"y": target}, weights)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_network(random_network(HEADS), tmp_path_factory.mktemp("graphs")).parent


@pytest.fixture(scope="module", params=CONFIDENCES)
def graph_set(network: Path, request: pytest.FixtureRequest) -> GraphSet:
    return cut_network(network, Gate(request.param), tiny.nothing)


@pytest.mark.parametrize("parser", [XAVIER, GTX_1080, ORIN, RTX_2080, RTX_3080, SERVER])
def test_every_graph_of_ours_passes_on_every_target(graph_set: GraphSet, parser: Parser) -> None:
    kinds = {name.split(".")[-1][:3] for name in graph_set.graphs if name.startswith("head-")}
    assert kinds == {"fcn", "dlb", "sep", "lra"}
    for name in graph_set.graphs:
        graph, _ = rewritten(read_whole_model(graph_set.path(name)), parser, "fp32")
        assert lint(graph, name, parser) == ()
        plain = [each.node for each in lint(read_model(graph_set.path(name)), name, parser)]
        assert plain == ([CLASS_COUNTS] if parser == RTX_2080 and name.startswith("head-") else [])


def converted(graph: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """The graph in fp16 or int8, calibrated on noise: only its nodes matter here."""
    random = np.random.default_rng(0)

    def drawn(value: onnx.ValueInfoProto) -> np.ndarray:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        is_image = value.type.tensor_type.elem_type == TensorProto.UINT8
        return random.integers(0, 256, shape, np.uint8) if is_image else random.random(shape, np.float32)

    if precision == "fp16":
        return to_fp16(graph)
    return to_int8(graph, [{value.name: drawn(value) for value in graph.graph.input}] * MIN_CALIBRATION_FRAMES)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_every_graph_of_ours_passes_in_every_precision(network: Path, tmp_path: Path, precision: str) -> None:
    """Heads of every kind with their gate, segments, outputs and the baseline."""
    shutil.copytree(network, tmp_path, dirs_exist_ok=True)
    graph_set = cut_network(tmp_path, Gate(), tiny.nothing)
    changed = set()
    for name in graph_set.graphs:
        graph = converted(read_whole_model(graph_set.path(name)), precision)
        assert ("counts" in [value.name for value in graph.graph.output]) == name.startswith("head-")
        for parser in (XAVIER, GTX_1080, ORIN, RTX_2080, RTX_3080, SERVER):
            after, names = rewritten(graph, parser, precision)
            changed.update(names)
            assert lint(after, name, parser) == ()
        if precision == "int8" and not name.startswith("output"):
            weights = [complaint.remedy for complaint in lint(graph, name, XAVIER)]
            assert set(weights) == {"keep them in float, with a QuantizeLinear before"}, "were it not rewritten"
    assert ("weights quantised in the graph" in changed) == (precision == "int8")


FOUR, MAPS, INTEGERS = (F32, (1, 4)), (F32, (1, 4, 8, 8)), (I32, (1, 4))
SCALE = {"s": np.float32(0.1)}
PRODUCT = {"w": np.ones((4, 3), np.float32)}
TWICE = np.float32([1, 1, 2, 2])
PAIR = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["y"])]
DOUBLED = (F32, (1, 4, 16, 16))
CROP = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}
REFUSED = {
    "transpose-of-uint8": (
        one("Transpose", (U8, (1, 8, 8, 3)), (U8, (1, 3, 8, 8)), perm=[0, 3, 1, 2]),
        "Transpose does not support uint8; Cast to float first, then Transpose",
    ),
    "uint8-within": (
        model(
            [node("Cast", ["x"], ["u"], to=TensorProto.UINT8), node("Cast", ["u"], ["y"], to=1)],
            {"x": FOUR},
            {"y": FOUR},
        ),
        "Cast produces uint8 within the graph",
    ),
    "int16": (one("Cast", ("int16", (1, 4)), FOUR, to=TensorProto.FLOAT), "'x' is int16"),
    "uint32": (one("Cast", FOUR, ("uint32", (1, 4)), to=TensorProto.UINT32), "'y' is uint32"),
    "relu-of-integers": (one("Relu", INTEGERS, INTEGERS), "Relu does not support int32"),
    "missing-operator": (one("Bernoulli", FOUR, FOUR), "has no 'Bernoulli'"),
    "other-domain": (one("FusedConv", FOUR, FOUR, domain="com.microsoft"), "domain 'com.microsoft'"),
    "crop-and-resize": (
        one("Resize", MAPS, DOUBLED, {"r": np.zeros(8, np.float32), "s": TWICE}, **CROP),
        "use one of half_pixel",
    ),
    "indices-of-pooling": (
        model(
            [node("MaxPool", ["x"], ["y", "i"], kernel_shape=[2, 2])],
            {"x": MAPS},
            {"y": (F32, (1, 4, 7, 7)), "i": (I64, (1, 4, 7, 7))},
        ),
        "MaxPool returns no indices",
    ),
    "zero-point": (model(PAIR, {"x": FOUR}, {"y": FOUR}, SCALE | {"z": np.int8(3)}), "quantise symmetrically"),
    "quantised-to-uint8": (
        model(PAIR, {"x": FOUR}, {"y": FOUR}, SCALE | {"z": np.uint8(128)}),
        "QuantizeLinear does not support uint8",
    ),
    "int32-bias": (
        model(
            [node("DequantizeLinear", ["b", "s"], ["d"]), node("Add", ["x", "d"], ["y"])],
            {"x": FOUR},
            {"y": FOUR},
            SCALE | {"b": np.int32([1, 2, 3, 4])},
        ),
        "DequantizeLinear does not support int32",
    ),
    "computed-k": (
        model(
            [node("Cast", ["k"], ["count"], to=TensorProto.INT64), node("TopK", ["x", "count"], ["y", "i"])],
            {"x": FOUR, "k": (I32, (1,))},
            {"y": (F32, (1, "n"))},
        ),
        "input 'count' of TopK is computed; export it as an initializer",
    ),
    "dynamic-batch": (
        one("Relu", (F32, ("batch", 4)), (F32, ("batch", 4))),
        "node 'x': this input has no static shape",
    ),
}
"""Refused on every TensorRT; each with words that the complaint must hold."""
TURING = {
    "product": one("MatMul", FOUR, (F32, (1, 3)), PRODUCT),
    "gemm": one("Gemm", FOUR, (F32, (1, 3)), PRODUCT),
    "einsum": one("Einsum", FOUR, (F32, (1, 3)), PRODUCT, equation="ij,jk->ik"),
}
TAKEN = {
    "fp16-product": one("MatMul", (F16, (1, 4)), (F16, (1, 3)), {"w": np.ones((4, 3), np.float16)}),
    "labels": one("Cast", INTEGERS, (U8, (1, 4)), to=TensorProto.UINT8),
    "bicubic": one("Resize", MAPS, DOUBLED, {"r": np.zeros(0, np.float32), "s": TWICE}, mode="cubic"),
    "sum-of-integers": one("ReduceSum", INTEGERS, (I32, (1,)), {"a": np.int64([1])}, keepdims=0),
    "quantised": model(PAIR, {"x": FOUR}, {"y": FOUR}, SCALE | {"z": np.int8(0)}),
    "layer-normalisation": one("LayerNormalization", FOUR, FOUR, {"g": np.ones(4, np.float32)}),
    "one-sum": one("Einsum", FOUR, (F32, (1,)), equation="ij->i"),
}


def builds(graph: onnx.ModelProto, capability: str) -> bool:
    """Whether the real library parses and builds the graph; its words are not wanted here."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install mess-compile[rtx]")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph.SerializeToString()):
        return False
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    return builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("parser", [XAVIER, ORIN, RTX_3080], ids=["8.5", "10", "rtx"])
def test_what_no_tensorrt_takes_is_refused_with_node_and_remedy(name: str, parser: Parser) -> None:
    graph, words = REFUSED[name]
    complaints = lint(graph, "head-7", parser)
    lines = [str(complaint) for complaint in complaints]
    assert any(words in line for line in lines), lines
    assert all(line.startswith("graph head-7, node ") for line in lines)
    assert all(complaint.remedy for complaint in complaints)


@pytest.mark.parametrize("name", REFUSED)
def test_the_real_library_refuses_it_too(name: str) -> None:
    assert not builds(REFUSED[name][0], "SM86")


@pytest.mark.parametrize("name", TURING)
def test_turing_takes_no_product_in_fp32(name: str) -> None:
    (complaint,) = lint(TURING[name], "head", RTX_2080)
    assert "1x1 Conv, or fp16" in complaint.remedy
    assert lint(TURING[name], "head", RTX_3080) == lint(TURING[name], "head", XAVIER) == ()
    assert not builds(TURING[name], "SM75")
    assert builds(TURING[name], "SM86")


@pytest.mark.parametrize("name", TAKEN)
def test_what_the_real_library_takes_is_not_refused(name: str) -> None:
    assert lint(TAKEN[name], "head", RTX_2080) == ()
    assert builds(TAKEN[name], "SM75")


@pytest.mark.parametrize("parser", [XAVIER, GTX_1080, ORIN, RTX_3080], ids=["8.5", "8.6", "10", "rtx"])
def test_both_branches_of_an_if_would_be_paid_for(parser: Parser) -> None:
    value = helper.make_tensor_value_info("a", TensorProto.FLOAT, (1, 4))
    branches = [helper.make_graph([node(op, ["x"], ["a"])], op, [], [value]) for op in ("Relu", "Neg")]
    choice = node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    (complaint,) = lint(model([choice], {"x": FOUR, "c": ("bool", ())}, {"y": FOUR}), "whole", parser)
    assert complaint.remedy == "export without control flow"


INSTANCES = node("InstanceNormalization", ["x", "s", "s"], ["y"])
OLD = {
    "layer-normalisation": (TAKEN["layer-normalisation"], "tensorrt 8.5.2.2 has no 'LayerNormalization'"),
    "largest-of-integers": (one("ArgMax", INTEGERS, (I64, (1, 1)), axis=1), "ArgMax does not support int32"),
    "scale-of-instances": (
        model([INSTANCES], {"x": MAPS, "s": (F32, (4,))}, {"y": MAPS}),
        "input 's' of InstanceNormalization is computed",
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_xavier_takes_less_than_newer_parsers(name: str) -> None:
    graph, words = OLD[name]
    assert any(words in str(complaint) for complaint in lint(graph, "head", XAVIER))
    left = [complaint for complaint in lint(graph, "head", GTX_1080) if complaint.node != "y"]
    assert left == [], "8.6 takes it"
    assert lint(graph, "head", ORIN) == ()


@pytest.mark.parametrize("parser", [XAVIER, GTX_1080], ids=["8.5", "8.6"])
def test_tensorrt_8_has_limits_that_the_parser_does_not_complain_of(parser: Parser) -> None:
    mean = one("ReduceMean", MAPS, (F32, (1, 4, 1, 1)), {"a": np.int64([2, 3])})
    mean.opset_import[0].version = 18
    assert lint(mean, "head", parser)[0].what == f"its opset is 18, tensorrt {parser.version} parses up to 17"
    assert "axes of ReduceMean" in lint(mean, "head", parser)[1].what, "it would be the mean over all axes"
    assert lint(mean, "head", ORIN) == ()
    (complaint,) = lint(one("ArgMax", FOUR, (I64, (1, 1)), axis=1), "head", parser)
    assert (complaint.node, complaint.remedy) == ("y", "Cast to int32 in the graph")


def test_classic_tensorrt_writes_labels_from_float_only_which_rtx_would_not_tell() -> None:
    for parser in (XAVIER, GTX_1080, ORIN):
        (complaint,) = lint(TAKEN["labels"], "output", parser)
        assert complaint.remedy == "Cast to float in between"
    assert lint(TAKEN["labels"], "output", RTX_2080) == ()


def test_double_is_refused_though_newer_parsers_would_narrow_it() -> None:
    for parser in (XAVIER, ORIN, RTX_3080):
        (complaint,) = lint(one("Relu", (F64, (1, 4)), (F64, (1, 4))), "head", parser)
        assert "'x' is double" in complaint.what


def test_a_lost_shape_is_told_once() -> None:
    nodes = [node("NonZero", ["x"], ["i"], name="where"), node("Neg", ["i"], ["j"], name="then")]
    nodes.append(node("Cast", ["j"], ["y"], to=TensorProto.FLOAT))
    graph = model(nodes, {"x": FOUR}, {"y": (F32, (2, "found"))})
    assert [complaint.node for complaint in lint(graph, "head", ORIN)] == ["where"]
    assert [complaint.node for complaint in lint(graph, "head", SERVER)] == ["where"]


def test_onnx_runtime_is_asked_for_opset_and_shapes_only() -> None:
    for name in ("int16", "missing-operator", "crop-and-resize", "zero-point"):
        assert lint(REFUSED[name][0], "head", SERVER) == ()
    opset = Parser("onnxruntime-tensorrt", "1.20.1", 16, None)
    assert "export at opset 16" in str(lint(TAKEN["quantised"], "head", opset)[0])


def test_names_out_of_a_hostile_graph_stay_on_one_line() -> None:
    graph = one("Relu\x1b[2J", FOUR, FOUR)
    graph.graph.node[0].name = "two\nlines"
    (complaint,) = lint(graph, "head", XAVIER)
    assert str(complaint).isprintable()


def test_contradicting_shapes_are_one_complaint_of_the_whole_graph() -> None:
    graph = model([node("Add", ["x", "z"], ["y"])], {"x": FOUR, "z": (F32, (1, 3))}, {"y": FOUR})
    (complaint,) = lint(graph, "segment-0-1", XAVIER)
    assert complaint.node == ""
    assert str(complaint).startswith("graph segment-0-1: its types or shapes contradict each other")
    assert str(complaint).isprintable()


def test_a_version_without_a_number_is_refused() -> None:
    with pytest.raises(InputError, match="version 'newest' of tensorrt contains no number"):
        lint(TAKEN["quantised"], "head", Parser("tensorrt", "newest", 17, None))


def test_the_table_of_operators_is_that_of_the_real_parser() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install mess-compile[rtx]")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    parser = trt.OnnxParser(builder.create_network(0), logger)
    schemas = [schema for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""]
    known = {schema.name for schema in schemas if schema.since_version <= 17}
    gone = {schema.name for schema in schemas if schema.deprecated}
    supported = {name for name in known - gone if parser.supports_operator(name)}
    assert supported - set(operators(RTX_3080)) == {"If", "Loop", "Scan"}
    assert all(parser.supports_operator(name) for name in operators(RTX_3080))
    assert set(operators(XAVIER)) < set(operators(GTX_1080)) < set(operators(ORIN)) < set(operators(RTX_3080))
