"""Checks whether a target's ONNX parser supports a graph, before anything is built.

Follows the support matrix and importers of onnx-tensorrt 8.5, 8.6 and 10 (docs/targets.md in its repository), and the
errors of TensorRT-RTX.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import uses_external_data

from mess_compile.graph.constant_fold import has_subgraph
from mess_compile.runtime.base.errors import InputError

CLASSIC, RTX = "tensorrt", "tensorrt_rtx"
_KINDS: dict[int, str] = {
    TensorProto.FLOAT: "f",
    TensorProto.FLOAT16: "f",
    TensorProto.INT32: "i",
    TensorProto.INT64: "i",
    TensorProto.BOOL: "b",
    TensorProto.INT8: "q",
    TensorProto.UINT8: "u",
}
_NAMES = [TensorProto.DataType.Name(number).lower() for number in _KINDS]
_OPERATORS_8_5 = {
    "f": """
        Acos Acosh ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Conv ConvTranspose Cos
        Cosh CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GridSample
        HardSigmoid HardSwish InstanceNormalization LRN LSTM LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul
        MaxPool MeanVarianceNormalization NonMaxSuppression NonZero PRelu Pow QuantizeLinear RNN RandomNormal
        RandomNormalLike RandomUniform RandomUniformLike Reciprocal Relu Resize ReverseSequence RoiAlign Round Selu
        Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu TopK
    """,
    "fi": """
        Abs Add Clip DepthToSpace Div Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod Mul Neg Pad Range
        ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum
    """,
    "fib": """
        Concat Constant ConstantOfShape Equal Expand EyeLike Flatten Gather GatherElements GatherND Identity OneHot
        Reshape Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where
    """,
    "fibu": "Cast",
    "b": "And Not Or Xor",
    "q": "DequantizeLinear",
}
"""Operators by the kinds of data that they support: float, integer, boolean, uint8, quantised (int8)."""
_ADDED_8_6 = {"f": "GroupNormalization IsInf LayerNormalization", "fi": "ArgMax ArgMin TopK", "fib": "ReverseSequence"}
_ADDED_10 = {"f": "Gelu Hardmax Mish", "fibu": "CastLike"}
_ADDED_RTX = {"fi": "BlackmanWindow HammingWindow HannWindow", "f": "STFT"}
_INITIALIZERS = {"TopK": 1, "Squeeze": 1, "Unsqueeze": 1, "CumSum": 1, "Slice": 3}
"""The input of each operator that must be an initializer, besides the axes of reductions."""
_RESIZE = (b"half_pixel", b"pytorch_half_pixel", b"tf_half_pixel_for_nn", b"asymmetric", b"align_corners")
_PRODUCTS = ("MatMul", "Gemm", "Einsum", "LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Parser:
    """Identifies a parser, and so the graphs that a target supports.

    `version` is the library's own, such as 8.5.2.2; `opset` the newest that it parses, None if unknown.
    """

    library: str
    version: str
    opset: int | None
    compute_capability: tuple[int, int] | None


@dataclass(frozen=True)
class Complaint:
    """One reason why a graph would not parse or build.

    `node` is a node's name, or that of the graph's input or output; empty when the whole graph is meant.
    """

    graph: str
    node: str
    what: str
    remedy: str

    def __str__(self) -> str:
        place = f"graph {self.graph}, node {self.node!r}" if self.node else f"graph {self.graph}"
        return f"{place}: {self.what}; {self.remedy}"


_Finding = tuple[str, str]
"""The problem and the remedy."""


@dataclass(frozen=True)
class _Facts:
    """The facts that rules use: inferred types, names of static shape, initializers, outputs, tensors."""

    types: Mapping[str, int]
    static: frozenset[str]
    initializers: Mapping[str, TensorProto]
    outputs: frozenset[str]
    operators: Mapping[str, str]

    def kind(self, name: str) -> str:
        """`f i b q u`; empty for a type that no parser has, float if the type is unknown."""
        return _KINDS.get(self.types.get(name, TensorProto.FLOAT), "")


def lint(model: onnx.ModelProto, graph: str, parser: Parser) -> tuple[Complaint, ...]:
    """What the parser would refuse, at most one complaint per node; empty if the graph can be built.

    `model` is the graph as it will be built, after `rewritten`, with or without its external weights; `graph` is its
    name. For ONNX Runtime only opset and static shapes are checked: other providers run what its TensorRT provider
    lacks. Raises InputError when the parser's version contains no number.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        reason = " ".join(str(error).split())[:300]
        return (Complaint(graph, "", f"its types or shapes contradict each other ({reason})", "export it again"),)
    facts = _facts(inferred, parser)
    found = [*_opset(model, parser), *_boundary(inferred, facts, parser), *_nodes(inferred, facts, parser)]
    return tuple(Complaint(graph, node, *finding) for node, finding in found)


def operators(parser: Parser) -> Mapping[str, str]:
    """Operators of the parser, each with the kinds of data that it supports."""
    tables = [_OPERATORS_8_5]
    tables += [] if is_before(parser, (8, 6)) else [_ADDED_8_6]
    tables += [] if is_before(parser, (10, 0)) else [_ADDED_10]
    tables += [_ADDED_RTX] if parser.library == RTX else []
    return {name: kinds for table in tables for kinds, names in table.items() for name in names.split()}


def builds_for_turing(parser: Parser) -> bool:
    """Whether engines are TensorRT-RTX's for SM75, the oldest that it builds for, which has limits of its own."""
    return parser.library == RTX and parser.compute_capability == (7, 5)


def is_before(parser: Parser, version: tuple[int, int]) -> bool:
    """Whether the parser belongs to a classic TensorRT before `version`, major and minor."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", parser.version)[:2])
    if not numbers:
        raise InputError(f"version {parser.version!r} of {parser.library} contains no number: write it as 8.5")
    return parser.library != RTX and numbers < version


def _facts(graph: onnx.GraphProto, parser: Parser) -> _Facts:
    values = (*graph.input, *graph.value_info, *graph.output)
    fed = {value.name for value in graph.input}
    initializers = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in fed}
    for node in graph.node:
        if node.op_type == "Constant":
            initializers.update((name, attribute.t) for name in node.output for attribute in node.attribute)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
    static = {value.name for value in values if _is_static(value)} | set(initializers)
    outputs = frozenset(value.name for value in graph.output)
    return _Facts(types, frozenset(static), initializers, outputs, operators(parser))


def _is_static(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    return kind.HasField("shape") and all(dim.dim_value > 0 for dim in kind.shape.dim)


def _opset(model: onnx.ModelProto, parser: Parser) -> Iterator[tuple[str, _Finding]]:
    found = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if parser.opset is not None and found > parser.opset:
        newest = f"{parser.library} {parser.version} parses up to {parser.opset}"
        yield "", (f"its opset is {found}, {newest}", f"export at opset {parser.opset}")


def _boundary(graph: onnx.GraphProto, facts: _Facts, parser: Parser) -> Iterator[tuple[str, _Finding]]:
    """Inputs and outputs of the graph."""
    for value in graph.input:
        if value.name not in facts.static:
            yield value.name, ("this input has no static shape", "export with fixed sizes and batch 1")
    for value in (*graph.input, *graph.output):
        if parser.library == CLASSIC and is_before(parser, (10, 0)) and facts.types[value.name] == TensorProto.INT64:
            yield value.name, ("TensorRT 8 converts int64 inputs and outputs to int32", "Cast to int32 in the graph")


def _nodes(graph: onnx.GraphProto, facts: _Facts, parser: Parser) -> Iterator[tuple[str, _Finding]]:
    rules = (_operator, _types, _bytes, _initializers, _details, _turing, _shapes)
    for node in graph.node:
        for rule in rules if parser.library in (CLASSIC, RTX) else (_shapes,):
            finding = rule(node, facts, parser)
            if finding:
                yield node.name or f"{node.op_type} of {', '.join(node.output)}", finding
                break


def _operator(node: onnx.NodeProto, facts: _Facts, parser: Parser) -> _Finding | None:
    if node.domain not in ("", "ai.onnx"):
        what = f"{node.op_type!r} is of the domain {node.domain!r}, outside standard ONNX"
        return what, "export without the optimisations of one runtime"
    if has_subgraph(node):
        return f"{node.op_type!r} contains subgraphs, and TensorRT runs all of them", "export without control flow"
    if node.op_type not in facts.operators:
        return f"{parser.library} {parser.version} has no {node.op_type!r}", "compute it from other operators"
    return None


def _types(node: onnx.NodeProto, facts: _Facts, parser: Parser) -> _Finding | None:
    takes = facts.operators[node.op_type]
    for name in filter(None, (*node.input, *node.output)):
        if not facts.kind(name):
            return f"{name!r} is {_type(facts, name)}, not one of {', '.join(_NAMES)}", "export in float or int32"
    place = 1 if node.op_type == "Where" else 0
    refused = [name for name in node.input[place : place + 1] if facts.kind(name) not in takes]
    refused += [name for name in node.input if facts.kind(name) == "u" and "u" not in takes]
    if refused:
        return (
            f"{node.op_type} does not support {_type(facts, refused[0])}",
            f"Cast to float first, then {node.op_type}",
        )
    return None


def _type(facts: _Facts, name: str) -> str:
    number = facts.types[name]
    return next((str(known).lower() for known, value in TensorProto.DataType.items() if value == number), str(number))


def _bytes(node: onnx.NodeProto, facts: _Facts, parser: Parser) -> _Finding | None:
    """uint8 enters and leaves a graph through Cast and occurs nowhere else; classic TensorRT casts it from and to
    float.
    """
    made = [name for name in node.output if facts.kind(name) == "u"]
    if made and (node.op_type != "Cast" or made[0] not in facts.outputs):
        return f"{node.op_type} produces uint8 within the graph", "compute in float and Cast to uint8 last"
    kinds = {facts.kind(name) for name in (*node.input, *node.output)}
    if node.op_type == "Cast" and "u" in kinds and kinds != {"u", "f"} and parser.library == CLASSIC:
        return "TensorRT casts uint8 from and to float only", "Cast to float in between"
    return None


def _initializers(node: onnx.NodeProto, facts: _Facts, parser: Parser) -> _Finding | None:
    place = 1 if _is_reduction(node) else _INITIALIZERS.get(node.op_type, len(node.input))
    names = node.input[place : place + 1]
    if node.op_type == "InstanceNormalization" and is_before(parser, (8, 6)):
        names = node.input[1:]
    for name in filter(None, names):
        if name not in facts.initializers:
            return f"input {name!r} of {node.op_type} is computed", "export it as an initializer"
    return None


def _details(node: onnx.NodeProto, facts: _Facts, parser: Parser) -> _Finding | None:
    op, old = node.op_type, is_before(parser, (10, 0))
    attributes = {attribute.name: attribute for attribute in node.attribute}
    mode = attributes.get("coordinate_transformation_mode")
    if op == "Resize" and mode and mode.s not in _RESIZE:
        return f"Resize has no {mode.s.decode(errors='replace')!r}", f"use one of {b', '.join(_RESIZE).decode()}"
    if op == "BatchNormalization" and "training_mode" in attributes and attributes["training_mode"].i:
        return "BatchNormalization is in training mode", "export in evaluation mode"
    if op == "MaxPool" and len(node.output) > 1:
        return "MaxPool returns no indices in TensorRT", "upsample without them"
    if old and _is_reduction(node) and op != "ReduceSum" and len(node.input) > 1:
        return f"TensorRT 8 reads the axes of {op} from its attribute", "export at opset 17"
    return _quantisation(node, facts, old) if op in ("QuantizeLinear", "DequantizeLinear") else None


def _is_reduction(node: onnx.NodeProto) -> bool:
    return node.op_type.startswith("Reduce")


def _quantisation(node: onnx.NodeProto, facts: _Facts, old: bool) -> _Finding | None:
    if old and node.op_type == "DequantizeLinear" and node.input[0] in facts.initializers:
        return "TensorRT 8 does not support weights in int8", "keep them in float, with a QuantizeLinear before"
    if len(node.input) < 3:
        return (f"TensorRT 8 needs a zero point in {node.op_type}", "add a zero point of 0") if old else None
    if not is_zero(facts.initializers.get(node.input[2])):
        return f"the zero point of {node.op_type} is not a constant zero", "quantise symmetrically"
    return None


def is_zero(tensor: onnx.TensorProto | None) -> bool:
    """Whether a constant is zero everywhere; one whose bytes are in another file is assumed to be."""
    if tensor is None or uses_external_data(tensor):
        return tensor is not None
    try:
        return not numpy_helper.to_array(tensor).any()
    except (TypeError, ValueError):
        return False


def _turing(node: onnx.NodeProto, facts: _Facts, parser: Parser) -> _Finding | None:
    """Observed with TensorRT-RTX 1.7: it builds none of these in fp32, but in fp16 and as 1x1 convolutions."""
    fp32 = len(node.input) > 1 and facts.types.get(node.input[0]) == TensorProto.FLOAT
    if fp32 and node.op_type in _PRODUCTS and builds_for_turing(parser):
        return f"TensorRT-RTX builds no {node.op_type} in fp32 for SM75", "use a 1x1 Conv, or fp16"
    return None


def _shapes(node: onnx.NodeProto, facts: _Facts, parser: Parser) -> _Finding | None:
    """Reports only the node where a shape is lost, not those that follow."""
    if all(name in facts.static for name in node.input if name):
        for name in filter(None, node.output):
            if name not in facts.static:
                return f"the shape of {name!r} does not follow from the graph", "export with fixed sizes and batch 1"
    return None
