"""Folds constants: Constant nodes, and sizes computed from sizes."""

from __future__ import annotations

from math import prod
from typing import Any

import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import uses_external_data
from onnx.reference import ReferenceEvaluator

from mess_compile.graph.node_builder import OPSET, keep

_SIZES = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
_NUMBERS = (*_SIZES, TensorProto.FLOAT)
_GROWING = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Range": 1, "Pad": 1, "OneHot": 1}
"""Operators whose output may be much larger than their inputs, and the input that sets its size."""
_MOST_ELEMENTS = 1 << 20
_MOST_FLOATS = 1 << 12
_BY_CHANCE = ("Bernoulli", "Dropout", "Multinomial", "RandomNormalLike", "RandomUniformLike")
_SUBGRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def fold_constants(model: onnx.ModelProto, floats: bool = False) -> None:
    """Turn Constant nodes, and nodes that compute integers from constants, into initializers.

    With `floats`, also nodes that compute anything from a few constants.

    There is then one form to cut, share and store; and TensorRT 8.5 needs initializers where ONNX allows computed
    sizes.
    """
    graph = model.graph
    known = {tensor.name: tensor for tensor in graph.initializer if not uses_external_data(tensor)}
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), OPSET)
    folded, remaining = {}, []
    for node in graph.node:
        value = _value(node, known, opset) if _is_foldable(node, known, floats) else None
        if value is None:
            remaining.append(node)
        else:
            folded[node.output[0]] = known[node.output[0]] = numpy_helper.from_array(value, node.output[0])
    read = {name for node in remaining for name in node.input} | {value.name for value in graph.output}
    graph.initializer.extend(tensor for name, tensor in folded.items() if name in read)
    keep(graph.node, remaining)


def has_subgraph(node: onnx.NodeProto) -> bool:
    return any(attribute.type in _SUBGRAPHS for attribute in node.attribute)


def _is_foldable(node: onnx.NodeProto, known: dict[str, onnx.TensorProto], floats: bool) -> bool:
    if node.op_type == "Constant":
        return not node.domain
    if node.op_type in _BY_CHANCE:
        return False
    inputs = [known.get(name) for name in node.input if name]
    sizes = all(tensor is not None and tensor.data_type in _SIZES for tensor in inputs)
    if floats and not sizes:
        sizes = all(
            tensor is not None and tensor.data_type in _NUMBERS and prod(tensor.dims) <= _MOST_FLOATS
            for tensor in inputs
        )
    return sizes and bool(node.input) and len(node.output) == 1 and not node.domain and not has_subgraph(node)


def _grows(node: onnx.NodeProto, known: dict[str, onnx.TensorProto]) -> bool:
    """Whether a few bytes of sizes request an array too large to be a size: it would fill the memory."""
    if node.op_type not in _GROWING:
        return False
    sizes = numpy_helper.to_array(known[node.input[_GROWING[node.op_type]]]).ravel().tolist()
    return prod(max(1, abs(int(size))) for size in sizes) > _MOST_ELEMENTS


def _value(node: onnx.NodeProto, known: dict[str, onnx.TensorProto], opset: int) -> Any:
    """The node's output, or None if the evaluator cannot compute it: the engine library will."""
    if _grows(node, known):
        return None
    feeds = {name: numpy_helper.to_array(known[name]) for name in node.input if name}
    try:
        return next(iter(ReferenceEvaluator(node, opsets={"": opset}).run(None, feeds)))
    except Exception:
        return None
