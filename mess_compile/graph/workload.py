"""Counts the workload and memory of a graph from its inferred shapes."""

from __future__ import annotations

from math import prod

import onnx
from onnx import helper

from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import TensorSpec


def tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    """A tensor's numpy dtype and static shape. Raises InputError naming a tensor whose shape is not known."""
    kind = value.type.tensor_type
    dims = kind.shape.dim
    if not kind.HasField("shape") or any(not dim.HasField("dim_value") or dim.dim_value < 1 for dim in dims):
        shape = ", ".join(dim.dim_param or str(dim.dim_value) for dim in dims) if kind.HasField("shape") else "?"
        raise InputError(
            f"tensor {value.name!r} has no static shape ({shape}): export with fixed input sizes and batch 1"
        )
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return TensorSpec(value.name, dtype, tuple(dim.dim_value for dim in dims))


def activations(model: onnx.ModelProto) -> dict[str, TensorSpec]:
    """Every tensor that is computed or fed, by name, without weights.

    Raises InputError when the shapes do not follow from the graph.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise InputError(f"the shapes of graph {model.graph.name!r} contradict each other: {error}") from error
    found = {v.name: tensor_spec(v) for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in found:
                raise InputError(f"the shape of tensor {name!r} ({node.op_type}) does not follow from the graph")
    return found


def count_macs(model: onnx.ModelProto) -> int:
    """Convolution MACs plus 2 per element that passes a BatchNorm: the convention of the paper's tables."""
    shapes = activations(model)
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    total = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            total += prod(shapes[node.output[0]].shape) * prod(weights[node.input[1]][1:])
        elif node.op_type == "ConvTranspose":
            total += prod(shapes[node.input[0]].shape) * prod(weights[node.input[1]][1:])
        elif node.op_type == "BatchNormalization":
            total += 2 * prod(shapes[node.output[0]].shape)
    return total


def workspace_bytes(model: onnx.ModelProto) -> int:
    """Peak of the activations that are live at the same time, without the graph's own inputs and outputs.

    An estimate: engines that compute in place or fuse need less.
    """
    sizes = {name: tensor.bytes for name, tensor in activations(model).items()}
    outside = {value.name for value in (*model.graph.input, *model.graph.output)}
    last_use = {name: step for step, node in enumerate(model.graph.node) for name in (*node.output, *node.input)}
    live = peak = 0
    for step, node in enumerate(model.graph.node):
        live += sum(sizes[name] for name in node.output if name and name not in outside)
        peak = max(peak, live)
        touched = {name for name in (*node.input, *node.output) if name in sizes and name not in outside}
        live -= sum(sizes[name] for name in touched if last_use[name] == step)
    return peak
