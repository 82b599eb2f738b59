"""Infers static shapes from the input's size, and folds sizes that are computed from it."""

from __future__ import annotations

from contextlib import suppress

import onnx

from mess_compile.graph.constant_fold import fold_constants
from mess_compile.graph.node_builder import constant, keep
from mess_compile.graph.workload import tensor_spec
from mess_compile.runtime.base.errors import InputError

_OF_ITS_INPUT = ("GroupNormalization",)


def fold_shapes(model: onnx.ModelProto) -> None:
    """Fold constants and the sizes that follow from the input's; every round may reveal more shapes."""
    while True:
        fold_constants(model)
        shapes = known_shapes(model)
        rest = []
        for node in model.graph.node:
            if node.op_type == "Shape" and node.input[0] in shapes:
                bounds = {attribute.name: attribute.i for attribute in node.attribute}
                sizes = shapes[node.input[0]][bounds.get("start", 0) : bounds.get("end")]
                constant(model.graph, node.output[0], sizes, "int64")
            else:
                rest.append(node)
        if len(rest) == len(model.graph.node):
            return
        keep(model.graph.node, rest)


def known_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The static shapes of weights and tensors, by name. Raises InputError when they contradict each other."""
    try:
        graph = onnx.shape_inference.infer_shapes(_inferable(model), data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise InputError(f"the shapes of the model contradict each other: {error}") from error
    found: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        with suppress(InputError):  # not static, or not yet
            found[value.name] = tensor_spec(value).shape
    return found


def _inferable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, or a copy in which nodes whose shape ONNX does not infer are replaced by their input."""
    if not any(node.op_type in _OF_ITS_INPUT for node in model.graph.node):
        return model
    copy: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    for node in copy.graph.node:
        if node.op_type in _OF_ITS_INPUT:
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    return copy
