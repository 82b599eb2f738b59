"""Single-exit networks as people bring them: a small U-Net with several ends, as ONNX of any opset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mess_compile.graph.exits_toml import InputRule

HW, CLASSES = (32, 48), 3
ENDS = ("logits", "corners", "softmax", "argmax", "sigmoid", "small", "channels-last")
RULE = InputRule(scale="-1-1")


class _Graph:
    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    def weight(self, name: str, values: NDArray[np.generic]) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def conv(self, source: str, inputs: int, outputs: int, name: str, stride: int = 1, kernel: int = 3) -> str:
        scale = (2 / (inputs * kernel**2)) ** 0.5
        values = self.random.standard_normal((outputs, inputs, kernel, kernel)) * scale
        pads = [kernel // 2] * 4
        weight = self.weight(f"{name}.weight", values.astype(np.float32))
        made = self.add("Conv", [source, weight], f"{name}.conv", strides=[stride] * 2, pads=pads)
        return self.add("Relu", [made], name)


def unet(end: str = "corners", seed: int = 3, opset: int = 17, dynamic: bool = False) -> onnx.ModelProto:
    """Two skip connections around a bottleneck; `end` is one of ENDS. Input `input` (1, 3, 32, 48)."""
    g = _Graph(seed)
    g.conv("input", 3, 8, "stem")  # 32 x 48
    g.conv("stem", 8, 16, "down1", 2)  # 16 x 24
    g.conv("down1", 16, 16, "down2", 2)  # 8 x 12
    g.conv("down2", 16, 24, "deep")
    g.conv("deep", 24, 24, "deeper")
    up = g.weight("up.weight", (g.random.standard_normal((24, 16, 2, 2)) * 0.2).astype(np.float32))
    g.add("ConvTranspose", ["deeper", up], "up", strides=[2, 2])
    g.add("Concat", ["up", "down1"], "joined", axis=1)
    g.conv("joined", 32, 16, "fused")
    channels = 1 if end == "sigmoid" else CLASSES
    values = (g.random.standard_normal((channels, 16, 1, 1)) * 0.5).astype(np.float32)
    scores = g.add("Conv", ["fused", g.weight("scores.weight", values)], "scores")  # 16 x 24
    output, shape, kind = _ended(g, scores, end, channels)
    size: tuple[int | str, ...] = ("batch", 3, "height", "width") if dynamic else (1, 3, *HW)
    graph = helper.make_graph(
        g.nodes,
        "unet",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info(output, kind, _free(shape) if dynamic else shape)],
        g.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _ended(g: _Graph, scores: str, end: str, channels: int) -> tuple[str, tuple[int, ...], int]:
    full, small = (1, channels, *HW), (1, channels, HW[0] // 2, HW[1] // 2)
    if end == "small":
        return scores, small, TensorProto.FLOAT
    if end == "channels-last":
        return g.add("Transpose", [scores], "last", perm=[0, 2, 3, 1]), (1, *small[2:], channels), TensorProto.FLOAT
    how = {"mode": "linear", "coordinate_transformation_mode": "align_corners" if end == "corners" else "half_pixel"}
    scales = g.weight("scales", np.array([1, 1, 2, 2], np.float32))
    pixels = g.add("Resize", [scores, "", scales], "pixels", **how)
    if end == "sigmoid":
        return g.add("Sigmoid", [pixels], "odds"), full, TensorProto.FLOAT
    if end == "logits" or end == "corners":
        return pixels, full, TensorProto.FLOAT
    odds = g.add("Softmax", [pixels], "odds", axis=1)
    if end == "softmax":
        return odds, full, TensorProto.FLOAT
    return g.add("ArgMax", [odds], "index", axis=1, keepdims=0), (1, *HW), TensorProto.INT64


def _free(shape: tuple[int, ...]) -> tuple[int | str, ...]:
    return tuple(f"d{axis}" for axis in range(len(shape)))


def grey(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with one input channel in place of three: the first of its stem's."""
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    for tensor in model.graph.initializer:
        if tensor.name == "stem.weight":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:, :1].copy(), tensor.name))
    return model


def with_weights_in_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a Constant node in place of each initializer, as PaddlePaddle writes it."""
    nodes = [helper.make_node("Constant", [], [each.name], value=each) for each in model.graph.initializer]
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    return path


def own_labels(model: onnx.ModelProto, frame: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Labels (H, W) of the model as it came, from its own output alone; small scores are enlarged by OpenCV."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"input": (frame.transpose(2, 0, 1)[None] / 127.5 - 1).astype(np.float32)})
    if output.ndim == 3:
        return np.asarray(output[0])
    if output.shape[1] == 1:
        return (output[0, 0] > 0.5).astype(np.int64)
    planes = output[0].transpose(2, 0, 1) if output.shape[3] == CLASSES else output[0]
    larger = np.stack([cv2.resize(plane, HW[::-1], interpolation=cv2.INTER_LINEAR) for plane in planes])
    return np.asarray(larger.argmax(axis=0))


def frame(seed: int, hw: tuple[int, int] = HW) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)
