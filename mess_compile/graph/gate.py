"""Builds the gate: a head's logits -> the confident cells per row of thresholds and predicted class (MESS, Eq. 1-3).

Defined in docs/definitions.md, Gate. Uses only nodes that TensorRT 8.5 supports, and no sort. Its one matrix product,
`CLASS_COUNTS`, has another form for TensorRT-RTX on SM75, which takes none in fp32 (`rewrite.count_by_products`).
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto, helper

from mess_compile.graph.node_builder import add, constant
from mess_compile.network import SOUND, Gate
from mess_compile.runtime.base.errors import InputError

CLASS_COUNTS = "gate/class_counts"
"""The node that counts by class: (rows, cells) times (classes, cells) transposed, both of zeros and ones."""
HALF = 0.49
"""Half of a window of at most 25 cells is above this, anything less than half is below (12/25 = 0.48)."""


def append_gate(
    model: onnx.ModelProto, gate: Gate, classes: int, pooled: tuple[tuple[int, int], tuple[int, int]] | None = None
) -> None:
    """Append the gate to a graph that ends in `logits` f32 (1, K, h, w), K = `classes`.

    It counts over the logits, or with `pooled` (their size, a smaller one that divides it) over their means. Adds the
    input `thresholds` f32 (T, K), row j holding the threshold of each predicted class, T being the number of the gate's
    thresholds. Adds the output `counts` int32 (T + 2, K), cells by their label: in row j < T the confident cells, in
    row T those beside another label, in the last row those whose logits are finite. Raises InputError for a single
    class, which has no confidence.
    """
    if classes < 2:
        raise InputError(f"a gate needs at least 2 classes, this network has {classes}")
    graph, rows = model.graph, len(gate.thresholds)
    graph.input.append(helper.make_tensor_value_info("thresholds", TensorProto.FLOAT, (rows, classes)))
    logits = "logits" if pooled is None else _average_pooled(graph, *pooled)  # (1, K, h, w)
    labels = add(graph, "ArgMax", [logits], "gate/labels", axis=1, keepdims=1, select_last_index=0)  # (1, 1, h, w)
    of_class = _one_hot(graph, labels, classes)  # (1, K, h, w)
    confidence = _confidence(graph, gate.confidence, logits, of_class, classes)  # (1, 1, h, w)
    sure = add(graph, "GreaterOrEqual", [confidence, _limits(graph, labels)], "gate/sure")  # (T, 1, h, w)
    edge = _edge_cells(graph, labels)  # (1, 1, h, w)
    if gate.edge_aware:
        sure = _median_at_edges(graph, edge, sure)
    below_all = constant(graph, "gate/below_all", -1.0, "float32")
    finite = add(graph, "GreaterOrEqual", [confidence, below_all], "gate/finite")  # false for NaN alone
    chosen = add(graph, "Concat", [sure, edge, finite], "gate/chosen", axis=0)  # (T + 2, 1, h, w)
    _count_by_class(graph, chosen, of_class, rows + 2, classes)


def append_sound(model: onnx.ModelProto) -> None:
    """Add the output `sound` int32 (1,) to a single-exit graph with `logits` f32 (1, K, h, w): the number of cells
    whose best logit is finite.

    It is what a gate without thresholds would count, and finds NaN and infinities where there is no gate.
    """
    graph = model.graph
    class_axis = constant(graph, "sound/class_axis", [1], "int64")
    best = add(graph, "ReduceMax", ["logits"], "sound/best", axes=[1], keepdims=1)  # (1, 1, h, w)
    powers = add(graph, "Exp", [add(graph, "Sub", ["logits", best], "sound/z")], "sound/powers")
    total = add(graph, "ReduceSum", [powers, class_axis], "sound/sum", keepdims=1)  # at least 1, or NaN
    finite = add(graph, "Greater", [total, constant(graph, "sound/half", 0.5, "float32")], "sound/finite")
    values = add(graph, "Cast", [finite], "sound/finite_float", to=TensorProto.FLOAT)
    axes = constant(graph, "sound/total_axes", [1, 2, 3], "int64")
    counted = add(graph, "ReduceSum", [values, axes], "sound/total", keepdims=0)  # exact below 2^24 cells
    add(graph, "Cast", [counted], SOUND, to=TensorProto.INT32)
    graph.output.append(helper.make_tensor_value_info(SOUND, TensorProto.INT32, (1,)))


def _average_pooled(graph: onnx.GraphProto, hw: tuple[int, int], smaller_hw: tuple[int, int]) -> str:
    window = [side // cells for side, cells in zip(hw, smaller_hw, strict=True)]
    if any(side % cells for side, cells in zip(hw, smaller_hw, strict=True)):
        raise InputError(f"logits of size {hw} cannot be average-pooled to {smaller_hw}, which does not divide it")
    return add(graph, "AveragePool", ["logits"], "gate/logits", kernel_shape=window, strides=window)


def _one_hot(graph: onnx.GraphProto, labels: str, classes: int) -> str:
    """Whether a cell has a label, boolean (1, K, h, w)."""
    index = constant(graph, "gate/class_index", np.arange(classes).reshape(1, classes, 1, 1), "int64")
    return add(graph, "Equal", [index, labels], "gate/of_class")


def _count_by_class(graph: onnx.GraphProto, chosen: str, of_class: str, rows: int, classes: int) -> None:
    """Add the output `counts`: how many `chosen` cells (rows, 1, h, w) have each label."""
    factors = []
    for name, cells, count in (("gate/chosen_cells", chosen, rows), ("gate/class_cells", of_class, classes)):
        values = add(graph, "Cast", [cells], f"{name}_float", to=TensorProto.FLOAT)
        shape = constant(graph, f"{name}_shape", [count, -1], "int64")
        factors.append(add(graph, "Reshape", [values, shape], name))  # (count, cells)
    counts = add(graph, "Gemm", factors, CLASS_COUNTS, transB=1)  # exact below 2^24 cells
    add(graph, "Cast", [counts], "counts", to=TensorProto.INT32)
    graph.output.append(helper.make_tensor_value_info("counts", TensorProto.INT32, (rows, classes)))


def _limits(graph: onnx.GraphProto, labels: str) -> str:
    """The threshold of each cell's class, (T, 1, h, w): whole rows of T gathered, then moved to the front."""
    indices = add(graph, "Squeeze", [labels, constant(graph, "gate/first", [0], "int64")], "gate/indices")  # (1, h, w)
    by_class = add(graph, "Transpose", ["thresholds"], "gate/by_class", perm=[1, 0])  # (K, T)
    by_cell = add(graph, "Gather", [by_class, indices], "gate/by_cell", axis=0)  # (1, h, w, T)
    return add(graph, "Transpose", [by_cell], "gate/limits", perm=[3, 0, 1, 2])


def _confidence(graph: onnx.GraphProto, kind: str, logits: str, of_class: str, classes: int) -> str:
    """Confidence per cell, (1, 1, h, w), in 0..1.

    With p = softmax(logits), sorted downwards: top1 p1, margin p1 - p2, entropy 1 + sum(p ln p) / ln K. Here in terms
    of z = logits - max, with p = exp z / sum(exp z) and p1 = 1 / sum(exp z): ONNX Runtime is several times faster at
    reductions over the class axis than at Softmax and TopK over it.
    """
    class_axis = constant(graph, "gate/class_axis", [1], "int64")
    one = constant(graph, "gate/one", 1.0, "float32")
    best = add(graph, "ReduceMax", [logits], "gate/best", axes=[1], keepdims=1)  # (1, 1, h, w)
    z = add(graph, "Sub", [logits, best], "gate/z")
    powers = add(graph, "Exp", [z], "gate/powers")
    total = add(graph, "ReduceSum", [powers, class_axis], "gate/sum", keepdims=1)  # (1, 1, h, w)
    if kind == "top1":
        return add(graph, "Div", [one, total], "gate/confidence")
    if kind == "margin":
        lowest = constant(graph, "gate/lowest", np.finfo(np.float32).min, "float32")
        others = add(graph, "Where", [of_class, lowest, z], "gate/others")
        second = add(graph, "ReduceMax", [others], "gate/second", axes=[1], keepdims=1)
        lead = add(graph, "Sub", [one, add(graph, "Exp", [second], "gate/second_power")], "gate/lead")
        return add(graph, "Div", [lead, total], "gate/confidence")
    weighted = add(graph, "Mul", [powers, z], "gate/weighted")  # 0 where exp z underflows
    weighted_sum = add(graph, "ReduceSum", [weighted, class_axis], "gate/weighted_sum", keepdims=1)
    mean_z = add(graph, "Div", [weighted_sum, total], "gate/mean_z")
    negative_entropy = add(graph, "Sub", [mean_z, add(graph, "Log", [total], "gate/log_sum")], "gate/negative_entropy")
    log_classes = constant(graph, "gate/log_classes", math.log(classes), "float32")
    relative = add(graph, "Div", [negative_entropy, log_classes], "gate/relative")
    return add(graph, "Add", [relative, one], "gate/confidence")


def _edge_cells(graph: onnx.GraphProto, labels: str) -> str:
    """The cells (1, 1, h, w) beside another label: the 3 x 3 maximum of the labels is not the minimum."""
    values = add(graph, "Cast", [labels], "gate/label_values", to=TensorProto.FLOAT)
    window = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1]}
    highest = add(graph, "MaxPool", [values], "gate/highest", **window)
    negated = add(graph, "Neg", [values], "gate/negated")
    minus_lowest = add(graph, "MaxPool", [negated], "gate/minus_lowest", **window)
    spread = add(graph, "Add", [highest, minus_lowest], "gate/spread")
    return add(graph, "Greater", [spread, constant(graph, "gate/same", 0.5, "float32")], "gate/edge")


def _median_at_edges(graph: onnx.GraphProto, edge: str, sure: str) -> str:
    """Eq. 2-3: at edge cells, whether the upper median of the 5 x 5 window reaches the threshold.

    edge (1, 1, h, w), sure (T, 1, h, w) -> (T, 1, h, w), all boolean.
    """
    values = add(graph, "Cast", [sure], "gate/sure_float", to=TensorProto.FLOAT)
    neighbours = add(
        graph, "AveragePool", [values], "gate/neighbours",
        kernel_shape=[5, 5], pads=[2, 2, 2, 2], strides=[1, 1], count_include_pad=0,
    )  # fmt: skip
    mixed = add(graph, "Where", [edge, neighbours, values], "gate/mixed")
    return add(graph, "Greater", [mixed, constant(graph, "gate/half", HALF, "float32")], "gate/majority")
