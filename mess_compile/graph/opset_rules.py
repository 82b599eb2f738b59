"""Converts operators of other opsets to ours, one rule each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from mess_compile.graph.node_builder import OPSET
from mess_compile.graph.opset_context import Conversion

_REDUCTIONS = {
    "ReduceL1": ("Abs",), "ReduceL2": ("Abs",), "ReduceLogSum": ("Log",), "ReduceLogSumExp": (), "ReduceMax": (),
    "ReduceMean": (), "ReduceMin": (), "ReduceProd": (), "ReduceSumSquare": ("Mul",),
}  # fmt: skip
"""Those whose axes became an input with opset 18, and what each becomes when no axis is reduced."""
_GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def as_text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def taken(node: onnx.NodeProto, name: str, otherwise: Any = None) -> Any:
    """Remove an attribute from a node; returns its value."""
    for attribute in node.attribute:
        if attribute.name == name:
            value = helper.get_attribute_value(attribute)
            node.attribute.remove(attribute)
            return value
    return otherwise


def put(node: onnx.NodeProto, name: str, value: Any) -> None:
    taken(node, name)
    node.attribute.append(helper.make_attribute(name, value))


def _given(node: onnx.NodeProto, index: int) -> bool:
    return index < len(node.input) and bool(node.input[index])


def _attribute_to_input(attribute: str, dtype: str = "int64") -> _Rule:
    """A rule for an attribute that is now the second input."""

    def rule(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        values = taken(node, attribute)
        if values is not None:
            values = [values] if attribute == "k" else values
            node.input.append(change.constant(f"{node.output[0]}.{attribute}", values, dtype))
        return [node]

    return rule


def _reduction(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    axes, noop = change.known(node, 1, "axes"), taken(node, "noop_with_empty_axes", 0)
    del node.input[1:]
    if axes is not None and axes.size:
        put(node, "axes", [int(axis) for axis in axes.ravel()])
    elif noop:
        taken(node, "keepdims")
        left = _REDUCTIONS[node.op_type]
        node.op_type = left[0] if left else "Identity"
        if node.op_type == "Mul":
            node.input.append(node.input[0])
    return [node]


def _split(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    taken(node, "num_outputs")
    if _given(node, 1):
        return [node]
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    size, parts = change.shape(node, node.input[0])[axis], len(node.output)
    part = math.ceil(size / parts)
    sizes = [min(part, size - part * index) for index in range(parts)]
    if min(sizes) < 0:
        raise change.refused(node, f"splits {size} into {parts} parts")
    node.input[1:] = [change.constant(f"{node.output[0]}.split", sizes, "int64")]
    return [node]


def _softmax(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Before opset 13, all axes from `axis` on counted as one."""
    shape = change.shape(node, node.input[0])
    axis = taken(node, "axis", 1) % max(1, len(shape))
    if math.prod(shape[axis + 1 :]) == 1:
        put(node, "axis", axis)
        return [node]
    flat, scaled, stem = change.name(f"{node.output[0]}.flat"), change.name(f"{node.output[0]}.rows"), node.output[0]
    rows = change.constant(f"{stem}.2d", [math.prod(shape[:axis]), math.prod(shape[axis:])], "int64")
    back = change.constant(f"{stem}.shape", shape, "int64")
    return [
        helper.make_node("Reshape", [node.input[0], rows], [flat], name=flat),
        helper.make_node(node.op_type, [flat], [scaled], name=node.name or scaled, axis=1),
        helper.make_node("Reshape", [scaled, back], [stem], name=change.name(f"{stem}.back")),
    ]


def _clip(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    for attribute in ("min", "max"):
        value = taken(node, attribute)
        node.input.append("" if value is None else change.constant(f"{node.output[0]}.{attribute}", value, "float32"))
    return [node]


def _pad_attributes(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    pads = taken(node, "pads") or taken(node, "paddings")
    node.input.append(change.constant(f"{node.output[0]}.pads", pads, "int64"))
    node.input.append(change.constant(f"{node.output[0]}.value", taken(node, "value", 0.0), "float32"))
    return [node]


def _pad_axes(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    if any(attribute.name == "mode" and attribute.s == b"wrap" for attribute in node.attribute):
        raise change.refused(node, f"pads by wrapping around, which opset {OPSET} lacks")
    axes = change.known(node, 3, "axes")
    if axes is not None:
        pads, rank = change.known(node, 1, "pads"), len(change.shape(node, node.input[0]))
        full = np.zeros((2, rank), np.int64)
        full[:, [int(axis) % rank for axis in axes]] = np.reshape(pads, (2, -1))
        node.input[1] = change.constant(f"{node.output[0]}.pads", full.ravel(), "int64")
        del node.input[3:]
    return [node]


def _slice(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    for attribute in ("starts", "ends", "axes"):
        values = taken(node, attribute)
        node.input.append("" if values is None else change.constant(f"{node.output[0]}.{attribute}", values, "int64"))
    return [node]


def _dropout(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """In inference it returns its input."""
    if any(node.output[1:]):
        raise change.refused(node, "has a mask, as in training: export for inference (model.eval())")
    del node.attribute[:], node.input[1:], node.output[1:]
    node.op_type = "Identity"
    return [node]


def _batch_normalization(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    if any(node.output[1:]):
        raise change.refused(
            node, "returns statistics of the batch, as in training: export for inference (model.eval())"
        )
    del node.output[1:]
    return [node]


def _scatter(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    node.op_type = "ScatterElements"
    return [node]


def _scatter_reduction(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    for attribute in node.attribute:
        if attribute.name == "reduction" and attribute.s in (b"max", b"min"):
            raise change.refused(node, f"scatters by {as_text(attribute.s)}, which opset {OPSET} lacks")
    return [node]


def _grid_sample(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    mode = as_text(taken(node, "mode", b"linear"))
    put(node, "mode", _GRID_MODES.get(mode, mode))
    return [node]


def _group_normalization(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Groups are the channels of an InstanceNormalization; exporters write it so at opset 17."""
    shape, groups, stem = change.shape(node, node.input[0]), taken(node, "num_groups"), node.output[0]
    taken(node, "stash_type")
    by_group = change.shape(node, node.input[1]) == (groups,) != (shape[1],)
    neutral = ("one", 1.0), ("zero", 0.0)
    factors = [change.constant(f"{stem}.{name}", np.full(groups, value), "float32") for name, value in neutral]
    factors = list(node.input[1:]) if by_group else factors
    rows, grouped, scaled = (change.name(f"{stem}.{name}") for name in ("groups", "normalised", "whole"))
    sizes = change.constant(f"{stem}.by_group", [shape[0], groups, -1], "int64")
    whole = change.constant(f"{stem}.shape", shape, "int64")
    normalise = helper.make_node("InstanceNormalization", [rows, *factors], [grouped], name=node.name or grouped)
    normalise.attribute.extend(node.attribute)
    made = [helper.make_node("Reshape", [node.input[0], sizes], [rows], name=rows), normalise]
    made.append(helper.make_node("Reshape", [grouped, whole], [stem if by_group else scaled], name=scaled))
    if by_group:
        return made
    column = change.constant(f"{stem}.column", [-1, *(1 for _ in shape[2:])], "int64")
    last = scaled
    for op, factor in (("Mul", node.input[1]), ("Add", node.input[2])):
        shaped, result = change.name(f"{stem}.{op}.values"), stem if op == "Add" else change.name(f"{stem}.scaled")
        made.append(helper.make_node("Reshape", [factor, column], [shaped], name=shaped))
        made.append(helper.make_node(op, [last, shaped], [result], name=change.name(f"{stem}.{op}")))
        last = result
    return made


def _upsample(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Upsample, and Resize of opset 10: cells lie at their upper left corners."""
    scales = taken(node, "scales")
    name = node.input[1] if scales is None else change.constant(f"{node.output[0]}.scales", scales, "float32")
    mode = as_text(taken(node, "mode", b"nearest"))
    node.op_type = "Resize"
    node.input[1:] = ["", name]
    put(node, "mode", {"bilinear": "linear"}.get(mode, mode))
    put(node, "coordinate_transformation_mode", "asymmetric")
    if mode == "nearest":
        put(node, "nearest_mode", "floor")
    return [node]


def _resize(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Every axis gets a scale or size of its own; inputs without elements are dropped (NVIDIA/TensorRT#4476)."""
    shape = change.shape(node, node.input[0])
    axes = [int(axis) % len(shape) for axis in taken(node, "axes", range(len(shape)))]
    given = {what: _elements(change, node, index, what) for index, what in ((1, "roi"), (2, "scales"), (3, "sizes"))}
    scales, sizes = np.ones(len(shape)), np.array(shape)
    if given["sizes"] is not None:
        sizes[axes] = given["sizes"]
        scales = sizes / np.array(shape)
    elif given["scales"] is not None:
        scales[axes] = given["scales"]
        sizes = np.floor(sizes * scales).astype(np.int64)
    policy = as_text(taken(node, "keep_aspect_ratio_policy", b"stretch"))
    if policy != "stretch" and given["sizes"] is not None:
        scales, sizes = _same_aspect(change, node, shape, axes, scales, policy)
    if taken(node, "antialias", 0) and (scales < 1).any():
        raise change.refused(node, f"makes a map smaller with antialias = 1, which opset {OPSET} lacks")
    _check_symmetric(change, node, scales, sizes, shape)
    by_sizes = given["sizes"] is not None and policy == "stretch"
    stem = node.output[0]
    name = (
        change.constant(f"{stem}.sizes", sizes, "int64")
        if by_sizes
        else change.constant(f"{stem}.scales", scales, "float32")
    )
    node.input[1:] = [_full_roi(change, node, given["roi"], axes, len(shape)), *(("", name) if by_sizes else (name,))]
    return [node]


def _elements(change: Conversion, node: onnx.NodeProto, index: int, what: str) -> Any:
    values = change.known(node, index, what)
    return None if values is None or not values.size else values


def _full_roi(change: Conversion, node: onnx.NodeProto, roi: Any, axes: Sequence[int], rank: int) -> str:
    cropped = any(a.name == "coordinate_transformation_mode" and a.s == b"tf_crop_and_resize" for a in node.attribute)
    if roi is None or not cropped:
        return ""
    full = np.array([[0.0] * rank, [1.0] * rank])
    full[:, axes] = np.reshape(roi, (2, -1))
    return change.constant(f"{node.output[0]}.roi", full.ravel(), "float32")


def _same_aspect(
    change: Conversion, node: onnx.NodeProto, shape: tuple[int, ...], axes: Sequence[int], scales: Any, policy: str
) -> tuple[Any, Any]:
    """One scale for all resized axes, as keep_aspect_ratio_policy requires; their sizes are rounded."""
    least = policy == "not_larger"
    scale = float(scales[axes].min() if least else scales[axes].max())
    found, sizes = np.ones(len(shape)), np.array(shape)
    found[axes] = scale
    sizes[axes] = [math.floor(scale * shape[axis] + 0.5) for axis in axes]
    if (np.floor(np.array(shape) * found.astype(np.float32)).astype(np.int64) != sizes).any():
        raise change.refused(
            node, f"has keep_aspect_ratio_policy = {policy} with rounded sizes, which opset {OPSET} lacks"
        )
    return found, sizes


def _check_symmetric(change: Conversion, node: onnx.NodeProto, scales: Any, sizes: Any, shape: tuple[int, ...]) -> None:
    """Where sizes are not rounded, half_pixel_symmetric is half_pixel."""
    for attribute in node.attribute:
        if attribute.name == "coordinate_transformation_mode" and attribute.s == b"half_pixel_symmetric":
            if not np.allclose(scales * np.array(shape), sizes, rtol=0, atol=1e-4):
                raise change.refused(node, f"is half_pixel_symmetric with rounded sizes, which opset {OPSET} lacks")
            attribute.s = b"half_pixel"


_Rule = Callable[[Conversion, onnx.NodeProto], list[onnx.NodeProto]]
RULES: tuple[tuple[tuple[str, ...], int, int, _Rule], ...] = (
    (("Upsample",), 7, 9, _upsample),
    (("Resize",), 10, 10, _upsample),
    (("Resize",), 11, 99, _resize),
    (("Squeeze", "Unsqueeze", "ReduceSum"), 1, 11, _attribute_to_input("axes")),
    (("TopK",), 1, 9, _attribute_to_input("k")),
    (("Split",), 1, 12, _attribute_to_input("split")),
    (("Split",), 18, 99, _split),
    (("Softmax", "LogSoftmax", "Hardmax"), 1, 12, _softmax),
    (("Clip",), 1, 10, _clip),
    (("Pad",), 1, 10, _pad_attributes),
    (("Pad",), 18, 99, _pad_axes),
    (("Slice",), 1, 9, _slice),
    (("Dropout",), 1, 11, _dropout),
    (("BatchNormalization",), 1, 13, _batch_normalization),
    (("Scatter",), 1, 11, _scatter),
    (("ScatterElements", "ScatterND"), 18, 99, _scatter_reduction),
    (("GridSample",), 20, 99, _grid_sample),
    (("GroupNormalization",), 18, 99, _group_normalization),
    (tuple(_REDUCTIONS), 18, 99, _reduction),
)
"""Operators, their versions (first and last) that are written differently at opset 17, and the rules."""
