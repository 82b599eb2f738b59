"""Rewrites that a target needs: other graphs that compute the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from mess_compile.graph.lint import CLASSIC, Parser, builds_for_turing, is_zero
from mess_compile.graph.nodes import keep
from mess_compile.runtime.errors import InputError

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}
_LARGEST = 4
"""Times the channels asked for, the most that a group may have: beyond, zeros cost more than padding."""


@dataclass(frozen=True)
class Pass:
    """One rewrite, and for whom: `needed` is asked with the parser and the precision that the engine will have.

    `run` gives back the very model when there is nothing to change, else a changed copy.
    """

    name: str
    needed: Callable[[Parser, str], bool]
    run: Callable[[onnx.ModelProto], onnx.ModelProto]


def rewritten(model: onnx.ModelProto, parser: Parser, precision: str) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The graph as the target can build it, and the names of the passes that changed it.

    `model` has its weights in it, as `store.read_whole_model` gives it, in any precision, before or after Q/DQ nodes
    are added; it is left as it is. Labels and counts stay equal, floats up to rounding. Raises InputError when a weight
    that a pass must change is in another file.
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


def group_depthwise(model: onnx.ModelProto, channels: int) -> onnx.ModelProto:
    """Turn static depthwise convolutions into grouped ones of `channels` per group, the new weights zero.

    For SM75, TensorRT-RTX pads each group to so many channels and stores what it padded: engines of depthwise networks
    are up to 20 times those for newer cards. Groups are up to four times larger where the channels do not divide, and
    the convolution stays where that fails too. Raises InputError when a weight is in another file.
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
    fed = {value.name for value in graph.input}
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in fed}
    makers = {name: node for node in graph.node for name in node.output}
    readers = Counter([name for node in graph.node for name in node.input] + [value.name for value in graph.output])
    for index, node in enumerate(graph.node):
        if node.op_type != "Conv" or node.domain or _group(node).i < 2:
            continue
        names, groups = _kernel(node, makers, weights), _group(node).i
        alone = all(readers[name] == 1 for name in names)
        if alone and names[-1] in weights and _is_depthwise(weights[names[-1]], groups):
            yield (index, names[-1]), _group_size(groups, channels)


def _is_depthwise(kernel: TensorProto, groups: int) -> bool:
    return len(kernel.dims) > 2 and kernel.dims[1] == 1 and kernel.dims[0] % groups == 0


def _group(node: NodeProto) -> onnx.AttributeProto:
    return next((part for part in node.attribute if part.name == "group"), helper.make_attribute("group", 1))


def _kernel(conv: NodeProto, makers: Mapping[str, NodeProto], weights: Mapping[str, TensorProto]) -> list[str]:
    """The kernel's name and, through Q/DQ nodes that keep zeros zero, the names that it is made from."""
    names = [conv.input[1]]
    while names[-1] in makers and _keeps_zeros(makers[names[-1]], weights):
        names.append(makers[names[-1]].input[0])
    return names


def _keeps_zeros(node: NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    """Quantisation without a zero point, its scales those of output channels."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.input[1] not in weights:
        return False
    axis = next((part.i for part in node.attribute if part.name == "axis"), 1)
    symmetric = len(node.input) < 3 or is_zero(weights.get(node.input[2]))
    return symmetric and (axis == 0 or prod(weights[node.input[1]].dims) == 1)


def _group_size(count: int, channels: int) -> int:
    """Of `count` channels, how many to put in a group; 1 where no size fits."""
    if count < channels:
        return count
    return next((size for size in range(channels, _LARGEST * channels + 1) if count % size == 0), 1)


def _spread(weight: TensorProto, groups: int, size: int) -> TensorProto:
    """The weight (O, 1, ...) of `groups` depthwise channels, for groups of `size`: (O, size, ...)."""
    if uses_external_data(weight):
        raise InputError(f"weight {weight.name!r} is in another file: read the graph with its weights")
    narrow = numpy_helper.to_array(weight)
    outputs = np.arange(len(narrow))
    wide = np.zeros((len(narrow), size, *narrow.shape[2:]), narrow.dtype)
    wide[outputs, outputs // (len(narrow) // groups) % size] = narrow[:, 0]
    return numpy_helper.from_array(wide, weight.name)


PASSES = (
    Pass("uint8 through float", lambda parser, _: parser.library == CLASSIC, cast_bytes_through_float),
    Pass(
        "depthwise in groups of 4",
        lambda parser, precision: builds_for_turing(parser) and precision != "fp16",
        partial(group_depthwise, channels=4),
    ),
    Pass(
        "depthwise in groups of 8",
        lambda parser, precision: builds_for_turing(parser) and precision == "fp16",
        partial(group_depthwise, channels=8),
    ),
)
"""In the order in which they run."""
