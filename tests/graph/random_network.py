"""Random networks with skip connections, and frontiers at random places of their node order."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mess_compile.graph.node_builder import add, constant, empty_model

HW, CLASSES = (8, 12), 3
KINDS = ("conv", "down", "add", "concat", "relu", "image")
Steps = list[tuple[str, int, int]]
networks = st.tuples(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 7), st.integers(0, 7)), min_size=3, max_size=9),
    st.sets(st.integers(0, 40), min_size=1, max_size=3),
)
"""Steps, and places at which the backbone is cut."""


@dataclass
class _Builder:
    """Adds nodes that read any earlier tensor: numbers count back from the newest."""

    graph: onnx.GraphProto
    shapes: dict[str, tuple[int, int, int]]
    random: np.random.Generator

    def pick(self, number: int) -> str:
        return list(self.shapes)[-1 - number % len(self.shapes)]

    def name(self) -> str:
        return f"t{len(self.graph.node)}"

    def conv(self, source: str, channels: int, kernel: int = 3, stride: int = 1, name: str | None = None) -> str:
        inputs, height, width = self.shapes[source]
        values = self.random.standard_normal((channels, inputs, kernel, kernel)) / (inputs * kernel**2) ** 0.5
        target = name or self.name()
        self.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), f"{target}.weight"))
        window = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
        self.shapes[target] = channels, -(-height // stride), -(-width // stride)
        return add(self.graph, "Conv", [source, f"{target}.weight"], target, **window)

    def resized(self, source: str, hw: tuple[int, int]) -> str:
        channels, *size = self.shapes[source]
        if tuple(size) == hw:
            return source
        target = self.name()
        sizes = constant(self.graph, f"{target}.size", [1, channels, *hw], "int64")
        self.shapes[target] = channels, *hw
        return add(self.graph, "Resize", [source, "", "", sizes], target, mode="nearest")

    def planes(self) -> str:
        floats = add(self.graph, "Cast", ["image"], self.name(), to=TensorProto.FLOAT)
        moved = add(self.graph, "Transpose", [floats], self.name(), perm=[0, 3, 1, 2])
        target = self.name()
        self.shapes[target] = 3, *HW
        return add(self.graph, "Mul", [moved, constant(self.graph, f"{target}.scale", 1 / 128, "float32")], target)

    def step(self, kind: str, one: int, other: int) -> None:
        source, second = self.pick(one), self.pick(other)
        channels, height, width = self.shapes[source]
        if kind == "image":
            self.planes()
        elif kind == "relu":
            target = self.name()
            self.shapes[target] = channels, height, width
            add(self.graph, "Relu", [source], target)
        elif kind == "conv" or (kind == "down" and height < 4):
            self.conv(source, 4)
        elif kind == "down":
            self.conv(source, 5, stride=2)
        else:
            second = self.resized(second, (height, width))
            if kind == "add":
                second = self.conv(second, channels, 1)
            target = self.name()
            total = channels + (self.shapes[second][0] if kind == "concat" else 0)
            self.shapes[target] = total, height, width
            more = {"axis": 1} if kind == "concat" else {}
            add(self.graph, kind.capitalize(), [source, second], target, **more)


def live_after(nodes: list[onnx.NodeProto], place: int) -> list[str]:
    """The tensors made up to the node at `place` that a node after it reads, and what that node makes, first."""
    made = ["image", *(node.output[0] for node in nodes[: place + 1])]
    read = {name for node in nodes[place + 1 :] for name in node.input}
    point = nodes[place].output[0]
    return [point, *(name for name in made if name in read and name != point)]


def build(steps: Steps, places: set[int]) -> onnx.ModelProto:
    """The whole-network form: the last exit point is the last node, the others are at `places` of the node order."""
    model = empty_model([helper.make_tensor_value_info("image", TensorProto.UINT8, (1, *HW, 3))])
    builder = _Builder(model.graph, {}, np.random.default_rng(len(steps)))
    builder.planes()
    for kind, one, other in steps:
        builder.step(kind, one, other)
    builder.conv(builder.pick(0), 4)
    nodes, shapes = list(model.graph.node), builder.shapes
    maps = [number for number, node in enumerate(nodes) if node.output[0] in shapes]
    chosen = sorted({maps[place % len(maps)] for place in places} | {len(nodes) - 1})
    live = [live_after(nodes, place) for place in chosen]
    new = {nodes[place].output[0]: f"exit{number}" for number, place in enumerate(chosen, start=1)}
    for number, (point, *_) in enumerate(live, start=1):
        builder.conv(point, CLASSES, 1, name=f"logits:exit{number}.small")
    for node in model.graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    _describe(model, live, shapes, new)
    return model


def _describe(
    model: onnx.ModelProto, live: list[list[str]], shapes: dict[str, tuple[int, int, int]], new: dict[str, str]
) -> None:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = {value.name: value for value in (*inferred.input, *inferred.value_info)}

    def spec(name: str) -> dict[str, object]:
        kind = values[new.get(name, name)].type.tensor_type
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
        return {"name": new.get(name, name), "dtype": dtype, "shape": [dim.dim_value for dim in kind.shape.dim]}

    points = []
    for number, (point, *carried) in enumerate(live, start=1):
        channels, *hw = shapes[point]
        described = {"name": f"exit{number}", "block": point, "channels": channels, "hw": hw}
        points.append(described | ({"carried": [spec(name) for name in carried]} if carried else {}))
        for name, depth in ((f"exit{number}", channels), (f"logits:exit{number}.small", CLASSES)):
            model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, depth, *hw)))
    content = {
        "backbone": "random",
        "classes": ["a", "b", "c"],
        "colours": [[0, 0, 0]] * CLASSES,
        "input_hw": list(HW),
        "exit_points": points,
        "heads": [{"exit_point": number, "config": "small"} for number in range(1, len(points) + 1)],
        "baseline": f"exit{len(points)}.small",
    }
    model.metadata_props.add(key="mess", value=json.dumps(content))
