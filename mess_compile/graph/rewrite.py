"""Rewrites graphs for a target into others that compute the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from mess_compile.graph.gate import CLASS_COUNTS
from mess_compile.graph.lint import CLASSIC, Parser, builds_for_turing, is_before, is_zero
from mess_compile.graph.node_builder import keep
from mess_compile.runtime.base.errors import InputError

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}
_LARGEST = 4
"""A group may have at most so many times the requested channels: beyond, zeros cost more than padding."""


@dataclass(frozen=True)
class Pass:
    """One rewrite, and when it applies: `needed` gets the parser and the precision of the engine.

    `run` returns the same model when there is nothing to change, otherwise a changed copy.
    """

    name: str
    needed: Callable[[Parser, str], bool]
    run: Callable[[onnx.ModelProto], onnx.ModelProto]


def rewritten(model: onnx.ModelProto, parser: Parser, precision: str) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The graph as the target can build it, and the names of the passes that changed it.

    `model` contains its weights, as from `store.read_whole_model`, in any precision, before or after Q/DQ nodes are
    added; it is not changed. Labels and counts stay equal, floats up to rounding. Raises InputError when a weight that
    a pass must change is in another file.
    """
    names = []
    for each in PASSES:
        after = each.run(model) if each.needed(parser, precision) else model
        if after is not model:
            names.append(each.name)
        model = after
    return model, tuple(names)


def cast_bytes_through_float(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let every Cast between uint8 and another type than float go through float32: TensorRT 8.5 casts only these."""
    graph = model.graph
    fed = {value.type.tensor_type.elem_type for value in graph.input}
    if TensorProto.UINT8 not in fed | {_cast_to(node) for node in graph.node}:
        return model
    types = _types(model)
    parts: list[NodeProto] = []
    for node in graph.node:
        ends = {_cast_to(node), types.get(node.input[0])} if node.op_type == "Cast" else set()
        through_float = TensorProto.UINT8 in ends and not ends & _FLOATS
        parts += _two_casts(node, f"{node.output[0]}/float") if through_float else [node]
    return model if len(parts) == len(graph.node) else _with_nodes(model, parts)


def _cast_to(node: NodeProto) -> int | None:
    return next((part.i for part in node.attribute if part.name == "to" and node.op_type == "Cast"), None)


def _types(model: onnx.ModelProto) -> Mapping[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _two_casts(node: NodeProto, middle: str) -> list[NodeProto]:
    return [
        helper.make_node("Cast", [node.input[0]], [middle], name=middle, to=TensorProto.FLOAT),
        helper.make_node("Cast", [middle], [node.output[0]], name=node.name, to=_cast_to(node)),
    ]


def _with_nodes(model: onnx.ModelProto, nodes: list[NodeProto]) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    keep(changed.graph.node, nodes)
    return changed


def quantise_weights_in_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store int8 weights in float32, with a QuantizeLinear that gives the same eight bits.

    TensorRT 8 quantises weights itself and refuses those that are int8 in the file. Raises InputError when a weight is
    in another file.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    parts: list[NodeProto] = []
    made: dict[str, TensorProto] = {}
    for node in model.graph.node:
        weight = tensors.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weight is not None and weight.data_type == TensorProto.INT8 and node.input[1] in tensors:
            made[f"{node.output[0]}/float"] = _dequantised(weight, tensors[node.input[1]], node)
            parts += _in_pair(node)
        else:
            parts.append(node)
    if not made:
        return model
    changed = _with_nodes(model, parts)
    read = {name for node in parts for name in node.input}
    read_initializers = [tensor for tensor in changed.graph.initializer if tensor.name in read]
    keep(changed.graph.initializer, [*read_initializers, *made.values()])
    return changed


def _in_pair(node: NodeProto) -> list[NodeProto]:
    """QuantizeLinear and DequantizeLinear of a float weight, in place of the DequantizeLinear of an int8 one."""
    name = node.output[0]
    first, second = NodeProto(), NodeProto()
    first.CopyFrom(node)
    second.CopyFrom(node)
    first.op_type, first.name = "QuantizeLinear", f"{name}/quantised"
    first.input[0], first.output[0] = f"{name}/float", f"{name}/quantised"
    second.input[0] = first.output[0]
    return [first, second]


def _dequantised(weight: TensorProto, scale: TensorProto, node: NodeProto) -> TensorProto:
    values, steps = _values(weight).astype(np.float32), _values(scale)
    if steps.ndim:
        axis = next((part.i for part in node.attribute if part.name == "axis"), 1)
        steps = steps.reshape([-1 if place == axis % values.ndim else 1 for place in range(values.ndim)])
    return numpy_helper.from_array(values * steps, f"{node.output[0]}/float")


def count_by_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let the gate count by class with elementwise products and a sum, which give equal counts: TensorRT-RTX builds no
    matrix product in fp32 for SM75.
    """
    parts: list[NodeProto] = []
    for node in model.graph.node:
        parts += _products(node) if node.output[0] == CLASS_COUNTS and node.op_type == "Gemm" else [node]
    if len(parts) == len(model.graph.node):
        return model
    changed = _with_nodes(model, parts)
    for name, axis in ((f"{CLASS_COUNTS}/behind", 1), (f"{CLASS_COUNTS}/cells", 2)):
        changed.graph.initializer.append(numpy_helper.from_array(np.array([axis]), name))
    return changed


def _products(node: NodeProto) -> list[NodeProto]:
    """(rows, cells) and (classes, cells) -> (rows, classes)."""
    name, (chosen, of_class) = node.output[0], node.input
    return [
        helper.make_node("Unsqueeze", [chosen, f"{name}/behind"], [f"{name}/rows"], name=f"{name}/rows"),
        helper.make_node("Mul", [f"{name}/rows", of_class], [f"{name}/products"], name=f"{name}/products"),
        helper.make_node("ReduceSum", [f"{name}/products", f"{name}/cells"], [name], name=name, keepdims=0),
    ]


def group_depthwise(model: onnx.ModelProto, channels: int) -> onnx.ModelProto:
    """Turn static depthwise convolutions into grouped ones of `channels` per group; the new weights are zero.

    For SM75, TensorRT-RTX pads each group to so many channels and stores the padding: engines of depthwise networks are
    up to 20 times those for newer cards. Groups are up to four times larger if the channels do not divide; if that
    fails, too, the convolution stays as it is. Raises InputError when a weight is in another file.
    """
    sizes = {place: size for place, size in _group_sizes(model.graph, channels) if size > 1}
    if not sizes:
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.value_info[:]  # shapes of weights
    tensors = {tensor.name: tensor for tensor in changed.graph.initializer}
    for (index, weight), size in sizes.items():
        group = _group(changed.graph.node[index])
        tensors[weight].CopyFrom(_spread(tensors[weight], group.i, size))
        group.i //= size
    return changed


def _group_sizes(graph: onnx.GraphProto, channels: int) -> Iterator[tuple[tuple[int, str], int]]:
    """(index of the node, its weight) of each static depthwise convolution, and the channels that a group will have."""
    for index, (node, kernel, _) in _static_convolutions(graph).items():
        groups = _group(node).i
        if groups > 1 and _is_depthwise(kernel, groups):
            yield (index, kernel.name), _group_size(groups, channels)


def pad_channels(model: onnx.ModelProto, channels: int) -> onnx.ModelProto:
    """Give convolutions of fewer input channels than `channels` that many; the new ones are zero, in maps and weights.

    For SM75, TensorRT-RTX pads the three channels of an image itself, with maps of zeros that it stores in the engine:
    2 MiB for fp16 at 512 x 512. A Pad node makes them in each run. Raises InputError when a weight is in another file.
    """
    places = tuple(_narrow_convolutions(model.graph, channels))
    if not places:
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.value_info[:]  # shapes of weights and maps
    tensors = {tensor.name: tensor for tensor in changed.graph.initializer}
    pads: dict[str, NodeProto] = {}
    parts: list[NodeProto] = []
    for index, node in enumerate(changed.graph.node):
        for kernel in (kernel for reader, kernel in places if reader == index):
            source, missing = node.input[0], channels - tensors[kernel].dims[1]
            if source not in pads:
                pads[source] = helper.make_node("Pad", [source, f"{source}/pads"], [f"{source}/wide"])
                values = np.array([0, 0, 0, 0, 0, missing, 0, 0])
                changed.graph.initializer.append(numpy_helper.from_array(values, f"{source}/pads"))
                parts.append(pads[source])
            node.input[0] = pads[source].output[0]
            tensors[kernel].CopyFrom(_widened(tensors[kernel], missing))
        parts.append(node)
    keep(changed.graph.node, parts)
    return changed


def _narrow_convolutions(graph: onnx.GraphProto, channels: int) -> Iterator[tuple[int, str]]:
    """(index of the node that reads the map, name of the kernel) of each with too few channels, in two dimensions.

    The convolution reads the map, or the Q/DQ nodes before it do.
    """
    places = {name: index for index, node in enumerate(graph.node) for name in node.output}
    for index, (node, kernel, maps) in _static_convolutions(graph).items():
        if _group(node).i == 1 and len(kernel.dims) == 4 and kernel.dims[1] < channels:
            yield (places[maps[-2]] if len(maps) > 1 else index), kernel.name


def _widened(weight: TensorProto, missing: int) -> TensorProto:
    """The weight (O, C, h, w) with `missing` more input channels of zeros."""
    narrow = _values(weight)
    zeros = np.zeros((len(narrow), missing, *narrow.shape[2:]), narrow.dtype)
    return numpy_helper.from_array(np.concatenate([narrow, zeros], axis=1), weight.name)


def _static_convolutions(graph: onnx.GraphProto) -> dict[int, tuple[NodeProto, TensorProto, list[str]]]:
    """By index: the node, its kernel, and the names of the map that it reads, the last being that before Q/DQ nodes.

    Kernels, and what Q/DQ nodes make of them and of maps, belong to the convolution alone.
    """
    fed = {value.name for value in graph.input}
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in fed}
    makers = {name: node for node in graph.node for name in node.output}
    readers = Counter([name for node in graph.node for name in node.input] + [value.name for value in graph.output])
    found = {}
    for index, node in enumerate(graph.node):
        if node.op_type == "Conv" and not node.domain:
            maps, names = (_before_quantisation(name, makers, weights) for name in node.input[:2])
            if names[-1] in weights and all(readers[name] == 1 for name in (*names, *maps[:-1])):
                found[index] = (node, weights[names[-1]], maps)
    return found


def _is_depthwise(kernel: TensorProto, groups: int) -> bool:
    return len(kernel.dims) > 2 and kernel.dims[1] == 1 and kernel.dims[0] % groups == 0


def _group(node: NodeProto) -> onnx.AttributeProto:
    return next((part for part in node.attribute if part.name == "group"), helper.make_attribute("group", 1))


def _before_quantisation(name: str, makers: Mapping[str, NodeProto], weights: Mapping[str, TensorProto]) -> list[str]:
    """A tensor's name and, through Q/DQ nodes that preserve zeros, the names that it is computed from."""
    names = [name]
    while names[-1] in makers and _keeps_zeros(makers[names[-1]], weights):
        names.append(makers[names[-1]].input[0])
    return names


def _keeps_zeros(node: NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    """Whether it quantises without a zero point, with scales per output channel."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.input[1] not in weights:
        return False
    axis = next((part.i for part in node.attribute if part.name == "axis"), 1)
    symmetric = len(node.input) < 3 or is_zero(weights.get(node.input[2]))
    return symmetric and (axis == 0 or prod(weights[node.input[1]].dims) == 1)


def _group_size(count: int, channels: int) -> int:
    """How many of `count` channels to put in a group; 1 if no size fits."""
    if count < channels:
        return count
    return next((size for size in range(channels, _LARGEST * channels + 1) if count % size == 0), 1)


def _spread(weight: TensorProto, groups: int, size: int) -> TensorProto:
    """The weight (O, 1, ...) of `groups` depthwise channels, for groups of `size`: (O, size, ...)."""
    narrow = _values(weight)
    outputs = np.arange(len(narrow))
    wide = np.zeros((len(narrow), size, *narrow.shape[2:]), narrow.dtype)
    wide[outputs, outputs // (len(narrow) // groups) % size] = narrow[:, 0]
    return numpy_helper.from_array(wide, weight.name)


def _values(weight: TensorProto) -> NDArray[Any]:
    if uses_external_data(weight):
        raise InputError(f"weight {weight.name!r} is in another file: read the graph with its weights")
    return numpy_helper.to_array(weight)


def _in_tensorrt_8(parser: Parser, _: str) -> bool:
    return parser.library == CLASSIC and is_before(parser, (10, 0))


def _turing_in_fp16(parser: Parser, precision: str) -> bool:
    return builds_for_turing(parser) and precision == "fp16"


def _turing_in_others(parser: Parser, precision: str) -> bool:
    return builds_for_turing(parser) and precision != "fp16"


PASSES = (
    Pass("counts by products", lambda parser, _: builds_for_turing(parser), count_by_products),
    Pass("uint8 through float", lambda parser, _: parser.library == CLASSIC, cast_bytes_through_float),
    Pass("weights quantised in the graph", _in_tensorrt_8, quantise_weights_in_graph),
    Pass("depthwise in groups of 4", _turing_in_others, partial(group_depthwise, channels=4)),
    Pass("depthwise in groups of 8", _turing_in_fp16, partial(group_depthwise, channels=8)),
    Pass("images in 4 channels", _turing_in_others, partial(pad_channels, channels=4)),
    Pass("images in 8 channels", _turing_in_fp16, partial(pad_channels, channels=8)),
)
"""In the order in which they run."""
