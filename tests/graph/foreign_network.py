"""A three-exit network as another framework exports it, in plain ONNX, and the same network in plain numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mess_compile.graph.node_builder import add, constant, empty_model

HW = (32, 48)
CLASSES = 4
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
_RANDOM = np.random.default_rng(11)


def _weight(outputs: int, inputs: int, kernel: int) -> np.ndarray:
    values = _RANDOM.standard_normal((outputs, inputs, kernel, kernel)) / (inputs * kernel * kernel) ** 0.5
    return values.astype(np.float32)


WEIGHTS = {
    "stem": _weight(8, 3, 3),
    "down": _weight(12, 8, 3),
    "branch": _weight(12, 12, 3),
    "wide": _weight(16, 12, 1),
    "aux1": _weight(CLASSES, 8, 1),
    "aux2": _weight(CLASSES, 12, 3),
    "main": _weight(CLASSES, 16, 1),
}
TOML = """
classes = ["road", "car", "tree", "sky"]

[input]
tensor = "input.1"
scale = "0-1"
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]

[[exit]]
tensor = "stage1"
  [[exit.head]]
  name = "fcn"
  logits = "aux1"

[[exit]]
tensor = "stage2"
  [[exit.head]]
  name = "fcn"
  logits = "aux2_up"

[[exit]]
tensor = "stage3"
  [[exit.head]]
  name = "fcn"
  logits = "main_up"
"""


def foreign_network(opset: int = 17) -> onnx.ModelProto:
    """`aux1` ends at feature resolution, `aux2_up` and `main_up` are upsampled to the input's."""
    model = empty_model([helper.make_tensor_value_info("input.1", TensorProto.FLOAT, (1, 3, *HW))])
    model.opset_import[0].version = opset
    graph = model.graph
    conv(graph, "input.1", "stem", 2)
    add(graph, "Relu", ["stem"], "stage1")
    conv(graph, "stage1", "down", 2)
    conv(graph, "down", "branch")
    add(graph, "Add", ["down", "branch"], "stage2")
    conv(graph, "stage2", "wide")
    add(graph, "Relu", ["wide"], "stage3")
    for point, head in (("stage1", "aux1"), ("stage2", "aux2"), ("stage3", "main")):
        conv(graph, point, head)
    constant(graph, "size", [1, CLASSES, *HW], "int64")
    constant(
        graph, "none", [], "float32"
    )  # what exporters wrote before opset 13, where roi and scales were not optional
    for head in ("aux2", "main"):
        resize(graph, head, f"{head}_up")
    for name in ("aux1", "aux2_up", "main_up"):
        graph.output.append(onnx.ValueInfoProto(name=name))
    return onnx.shape_inference.infer_shapes(model)


def conv(graph: onnx.GraphProto, source: str, name: str, stride: int = 1) -> None:
    values = WEIGHTS[name]
    graph.initializer.append(numpy_helper.from_array(values, f"{name}.weight"))
    pads = [values.shape[2] // 2] * 4
    add(graph, "Conv", [source, f"{name}.weight"], name, strides=[stride] * 2, pads=pads)


def resize(graph: onnx.GraphProto, source: str, target: str, **attributes: Any) -> None:
    plain = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    add(graph, "Resize", [source, "none", "none", "size"], target, **(plain | attributes))


def expected_logits(frame: np.ndarray) -> dict[str, np.ndarray]:
    """Logits (K, h, w) f64 of every head, by sums over windows."""
    stage1 = np.maximum(_convolved((frame / 255 - MEAN) / STD, "stem", 2), 0)
    down = _convolved(stage1, "down", 2)
    stage2 = down + _convolved(down, "branch")
    stage3 = np.maximum(_convolved(stage2, "wide"), 0)
    logits = (_convolved(stage1, "aux1"), _convolved(stage2, "aux2"), _convolved(stage3, "main"))
    return {f"exit{number}.fcn": values.transpose(2, 0, 1) for number, values in enumerate(logits, start=1)}


def _convolved(maps: np.ndarray, name: str, stride: int = 1) -> np.ndarray:
    """Maps (h, w, C) f64 -> (h', w', C')."""
    weight = WEIGHTS[name].astype(np.float64)
    kernel = weight.shape[2]
    padded = np.pad(maps, ((kernel // 2,) * 2, (kernel // 2,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (0, 1))[::stride, ::stride]
    return np.einsum("hwcij,ocij->hwo", windows, weight)


def saved(folder: Path, model: onnx.ModelProto | None = None, toml: str = TOML) -> tuple[Path, Path]:
    """The model and its TOML on disk."""
    paths = folder / "model.onnx", folder / "exits.toml"
    paths[0].write_bytes((model or foreign_network()).SerializeToString())
    paths[1].write_text(toml, encoding="utf-8")
    return paths
