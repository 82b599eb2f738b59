"""Builds the output graph: a head's logits -> labels at the size of the image. It runs once, at the exit taken."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from mess_compile.graph.frontiers import covers_image
from mess_compile.graph.node_builder import add, constant, empty_model
from mess_compile.runtime.base.errors import InputError

MAX_CLASSES = 256


def append_output(model: onnx.ModelProto, classes: int, feature_hw: tuple[int, int], hw: tuple[int, int]) -> None:
    """Let a graph that ends in `logits` f32 (1, K, h, w) end in `labels` uint8 (1, *hw) instead.

    K = `classes`, (h, w) = `feature_hw`. Bilinear with half-pixel centres if the two sizes differ, then argmax, the
    lowest index on ties. Raises InputError when the labels do not fit a byte.
    """
    if classes > MAX_CLASSES:
        raise InputError(f"{classes} classes do not fit uint8 labels: at most {MAX_CLASSES}")
    graph = model.graph
    # Classes innermost: ONNX Runtime scales and compares 1.7 to 2.6 times faster than with classes outermost.
    pixels = add(graph, "Transpose", ["logits"], "output/cells", perm=[0, 2, 3, 1])  # (1, h, w, K)
    if feature_hw != hw:
        size = constant(graph, "output/size", [1, *hw, classes], "int64")
        pixels = add(
            graph, "Resize", [pixels, "", "", size], "output/pixels",
            mode="linear", coordinate_transformation_mode="half_pixel",
        )  # fmt: skip
    index = add(graph, "ArgMax", [pixels], "output/index", axis=3, keepdims=0, select_last_index=0)  # (1, H, W)
    # TensorRT 8.5 writes uint8 from floating point only.
    value = add(graph, "Cast", [index], "output/value", to=TensorProto.FLOAT)
    add(graph, "Cast", [value], "labels", to=TensorProto.UINT8)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("labels", TensorProto.UINT8, (1, *hw)))


def output_graph(classes: int, feature_hw: tuple[int, int], hw: tuple[int, int]) -> onnx.ModelProto:
    """The output graph of heads whose logits are of size `feature_hw`: `logits` (1, K, h, w) -> `labels` (1, *hw)."""
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, classes, *feature_hw))
    model = empty_model([logits])
    append_output(model, classes, feature_hw, hw)
    return model


def append_labels(
    graph: onnx.GraphProto,
    output: str,
    dtype: str,
    shape: tuple[int, ...],
    hw: tuple[int, int],
    labels: str,
    threshold: float,
) -> None:
    """Append `labels` uint8 (1, *hw), made of a network's own output, which may be scores or labels of another size.

    Scores are (1, K, h, w) or (1, h, w, K), of `dtype` float32; those of one channel give 1 above `threshold`.
    """
    name, size = output, hw
    if dtype == "float32" and len(shape) == 4:
        if not covers_image(shape[2:], hw) and covers_image(shape[1:3], hw):
            name = add(graph, "Transpose", [name], f"{labels}/planes", perm=[0, 3, 1, 2])
            shape = (1, shape[3], *shape[1:3])
        name = _index_of_scores(graph, name, shape, hw, labels, threshold)
    else:
        size = (shape[-2], shape[-1]) if shape[-1] != 1 else (shape[-3], shape[-2])
        plane = constant(graph, f"{labels}/plane", [1, 1, *size], "int64")
        name = add(graph, "Reshape", [name, plane], f"{labels}/plane_of", allowzero=0)
        name = add(graph, "Cast", [name], f"{labels}/values", to=TensorProto.FLOAT)
        if size != hw:
            full = constant(graph, f"{labels}/size", [1, 1, *hw], "int64")
            how = {"mode": "nearest", "coordinate_transformation_mode": "half_pixel", "nearest_mode": "floor"}
            name = add(graph, "Resize", [name, "", "", full], f"{labels}/pixels", **how)
        first = constant(graph, f"{labels}/first", [1], "int64")
        name = add(graph, "Squeeze", [name, first], f"{labels}/value")
    add(graph, "Cast", [name], labels, to=TensorProto.UINT8)


def _index_of_scores(
    graph: onnx.GraphProto, name: str, shape: tuple[int, ...], hw: tuple[int, int], labels: str, threshold: float
) -> str:
    """Labels as float32 (1, *hw): the best of K scores, or 1 where the only score is above `threshold`."""
    if shape[2:] != hw:
        full = constant(graph, f"{labels}/size", [1, shape[1], *hw], "int64")
        how = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        name = add(graph, "Resize", [name, "", "", full], f"{labels}/pixels", **how)
    if shape[1] > 1:
        name = add(graph, "ArgMax", [name], f"{labels}/index", axis=1, keepdims=0, select_last_index=0)
    else:
        above = constant(graph, f"{labels}/threshold", threshold, "float32")
        name = add(graph, "Greater", [name, above], f"{labels}/above")
        first = constant(graph, f"{labels}/first", [1], "int64")
        name = add(graph, "Squeeze", [name, first], f"{labels}/above_of")
    return add(graph, "Cast", [name], f"{labels}/value", to=TensorProto.FLOAT)
