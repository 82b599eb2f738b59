"""A multi-exit network of three exit points in plain ONNX, small enough to count by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mess_compile.graph.node_builder import add, empty_model

CLASSES = 4
HW = (16, 24)
HEADS = ("exit1.small", "exit2.small", "exit2.wide", "exit3.final")
CHANNELS = {"exit1": 8, "exit2": 12, "exit3": 16}


def nothing(name: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def frames(count: int = 2) -> list[np.ndarray]:
    generator = np.random.default_rng(7)
    return [generator.integers(0, 256, (*HW, 3), dtype=np.uint8) for _ in range(count)]


def metadata(**changes: Any) -> dict[str, Any]:
    """What a foreign exporter writes: neither workloads nor an identity."""
    points = [
        {"name": "exit1", "block": "a", "channels": 8, "hw": [8, 12]},
        {"name": "exit2", "block": "b", "channels": 12, "hw": [4, 6]},
        {"name": "exit3", "block": "c", "channels": 16, "hw": [4, 6]},
    ]
    heads = [{"exit_point": int(name[4]), "config": name.split(".")[1]} for name in HEADS]
    content = {
        "backbone": "tiny",
        "classes": ["road", "car", "tree", "sky"],
        "colours": [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]],
        "input_hw": list(HW),
        "exit_points": points,
        "heads": heads,
        "baseline": "exit3.final",
    }
    return content | changes


class Tiny:
    """Builds the network; `leak` lets a connection pass around the second exit point."""

    def __init__(self, leak: bool = False) -> None:
        self.random = np.random.default_rng(3)
        self.model = empty_model([helper.make_tensor_value_info("image", TensorProto.UINT8, (1, *HW, 3))])
        graph = self.model.graph
        add(graph, "Cast", ["image"], "float", to=TensorProto.FLOAT)
        add(graph, "Transpose", ["float"], "planes", perm=[0, 3, 1, 2])
        self.weight("scale", (1, 1, 1, 1))
        add(graph, "Mul", ["planes", "scale"], "scaled")
        self.conv("scaled", 3, 8, "stem", 3, 2)
        self.norm("stem", 8, "normed")
        add(graph, "Relu", ["normed"], "exit1")
        self.conv("exit1", 8, 12, "down", 3, 2)
        self.conv("down", 12, 12, "residual", 3)
        add(graph, "Add", ["down", "residual"], "exit2")
        self.conv("down" if leak else "exit2", 12, 16, "wide", 1)
        self.conv("exit2", 12, 16, "again", 1)
        add(graph, "Add", ["wide", "again"], "exit3")
        for head in HEADS:
            self.conv(head[:5], CHANNELS[head[:5]], CLASSES, f"logits:{head}", 1)
        for name, kind in [("exit1", (8, 8, 12)), ("exit2", (12, 4, 6)), ("exit3", (16, 4, 6))]:
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, *kind)))
        for head in HEADS:
            hw = (8, 12) if head.startswith("exit1") else (4, 6)
            graph.output.append(helper.make_tensor_value_info(f"logits:{head}", TensorProto.FLOAT, (1, CLASSES, *hw)))

    def weight(self, name: str, shape: tuple[int, ...]) -> str:
        values = self.random.standard_normal(shape).astype(np.float32) / np.float32(max(1, np.prod(shape[1:])) ** 0.5)
        self.model.graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def conv(self, source: str, inputs: int, outputs: int, target: str, kernel: int, stride: int = 1) -> None:
        weight = self.weight(f"{target}.weight", (outputs, inputs, kernel, kernel))
        add(
            self.model.graph, "Conv", [source, weight], target,
            kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[kernel // 2] * 4,
        )  # fmt: skip

    def norm(self, source: str, channels: int, target: str) -> None:
        names = [self.weight(f"{target}.{part}", (channels,)) for part in ("gamma", "beta", "mean")]
        variance = numpy_helper.from_array(self.random.uniform(0.5, 2, channels).astype(np.float32), f"{target}.var")
        self.model.graph.initializer.append(variance)
        add(self.model.graph, "BatchNormalization", [source, *names, variance.name], target)


def tiny_network(leak: bool = False, **changes: Any) -> onnx.ModelProto:
    """The network with its metadata, of which `changes` replaces entries."""
    model = Tiny(leak).model
    model.metadata_props.add(key="mess", value=json.dumps(metadata(**changes)))
    return model


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    return path
