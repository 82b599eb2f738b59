"""A network with skip connections and an end of its own, as ONNX, graph set and bundle, and what it gives run whole.

exit1 is read again two exit points later, exit3 is pooled and passes the map itself on, the end reads the image again,
enlarges its logits with aligned corners, and its gate counts over pooled logits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mess_compile.graph.import_onnx import import_onnx
from mess_compile.graph.node_builder import add, constant, empty_model
from mess_compile.network import Gate, GraphSet
from mess_compile.runtime.bundle.manifest import Manifest
from mess_compile.search.metrics import plan_graphs
from mess_compile.search.plan import Plan, PlanGraph, Stage, default_point
from tests import small_network

HW, CELLS_HW, CLASSES = (16, 24), (4, 6), 4
HEADS = ("exit1.small", "exit2.small", "exit3.own")
LOGITS_HW = {"exit1.small": (8, 12), "exit2.small": (4, 6), "exit3.own": (8, 12)}
LABELS = "labels:exit3.own"
GATE = Gate("top1", False, (0.3, 0.45, 0.6, 0.9), by_class=True)
IMAGE = {"name": "image", "dtype": "uint8", "shape": [1, *HW, 3]}
FIRST = {"name": "exit1", "dtype": "float32", "shape": [1, 8, 8, 12]}
SKIP = {"name": "skip1", "dtype": "float32", "shape": [1, 12, 8, 12]}


def frame(seed: int, hw: tuple[int, int] = HW) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)


def metadata() -> dict[str, Any]:
    return {
        "backbone": "skips",
        "classes": ["road", "car", "tree", "sky"],
        "colours": [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]],
        "input_hw": list(HW),
        "exit_points": [
            {"name": "exit1", "block": "a", "channels": 8, "hw": [8, 12], "carried": [IMAGE]},
            {"name": "exit2", "block": "b", "channels": 12, "hw": [4, 6], "carried": [FIRST, IMAGE]},
            {"name": "exit3", "block": "c", "channels": 12, "hw": [4, 6], "carried": [SKIP, IMAGE]},
        ],
        "heads": [
            {"exit_point": 1, "config": "small"},
            {"exit_point": 2, "config": "small"},
            {"exit_point": 3, "config": "own", "hw": [8, 12], "labels": LABELS, "gate_hw": list(CELLS_HW)},
        ],
        "baseline": "exit3.own",
    }


def network(content: dict[str, Any] | None = None) -> onnx.ModelProto:
    """The whole-network form."""
    random = np.random.default_rng(5)
    model = empty_model([helper.make_tensor_value_info("image", TensorProto.UINT8, (1, *HW, 3))])
    graph = model.graph

    def conv(source: str, inputs: int, outputs: int, target: str, kernel: int, stride: int = 1) -> None:
        values = random.standard_normal((outputs, inputs, kernel, kernel)) * (2 / (inputs * kernel**2)) ** 0.5
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), f"{target}.weight"))
        window = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
        add(graph, "Conv", [source, f"{target}.weight"], target, **window)

    def planes(name: str) -> str:
        floats = add(graph, "Cast", ["image"], f"{name}/float", to=TensorProto.FLOAT)
        moved = add(graph, "Transpose", [floats], f"{name}/planes", perm=[0, 3, 1, 2])
        return add(graph, "Mul", [moved, constant(graph, f"{name}/scale", 1 / 128, "float32")], name)

    conv(planes("input"), 3, 8, "stem", 3, 2)
    add(graph, "Relu", ["stem"], "exit1")
    conv("exit1", 8, 12, "down", 3, 2)
    add(graph, "Relu", ["down"], "exit2")
    size = constant(graph, "size", [1, 12, 8, 12], "int64")
    add(graph, "Resize", ["exit2", "", "", size], "up", mode="nearest")
    add(graph, "Concat", ["up", "exit1"], "joined", axis=1)
    conv("joined", 20, 12, "mixed", 3)
    add(graph, "Relu", ["mixed"], "skip1")
    add(graph, "AveragePool", ["skip1"], "exit3", kernel_shape=[2, 2], strides=[2, 2])
    add(graph, "AveragePool", [planes("again")], "thumbnail", kernel_shape=[2, 2], strides=[2, 2])
    add(graph, "Concat", ["skip1", "thumbnail"], "end", axis=1)
    conv("exit1", 8, CLASSES, "logits:exit1.small", 1)
    conv("exit2", 12, CLASSES, "logits:exit2.small", 1)
    conv("end", 15, CLASSES, "logits:exit3.own", 1)
    full = constant(graph, "full", [1, CLASSES, *HW], "int64")
    corners = {"mode": "linear", "coordinate_transformation_mode": "align_corners"}
    add(graph, "Resize", ["logits:exit3.own", "", "", full], "full-size", **corners)
    add(graph, "ArgMax", [add(graph, "Softmax", ["full-size"], "odds", axis=1)], "index", axis=1, keepdims=0)
    add(graph, "Cast", ["index"], LABELS, to=TensorProto.UINT8)
    for point in metadata()["exit_points"]:
        shape = (1, point["channels"], *point["hw"])
        graph.output.append(helper.make_tensor_value_info(point["name"], TensorProto.FLOAT, shape))
    for head in HEADS:
        shape = (1, CLASSES, *LOGITS_HW[head])
        graph.output.append(helper.make_tensor_value_info(f"logits:{head}", TensorProto.FLOAT, shape))
    graph.output.append(helper.make_tensor_value_info(LABELS, TensorProto.UINT8, (1, *HW)))
    model.metadata_props.add(key="mess", value=json.dumps(content or metadata()))
    return model


def imported(folder: Path) -> GraphSet:
    path = folder / "model.onnx"
    onnx.save(network(), str(path))
    return import_onnx(path, folder / "graphs", GATE, [frame(0), frame(1)], lambda name, done, total: None)


@cache
def _whole() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(network().SerializeToString(), providers=["CPUExecutionProvider"])


def tensors(image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """What the network gives, run whole: maps, logits, labels."""
    names = [value.name for value in _whole().get_outputs()]
    return dict(zip(names, _whole().run(names, {"image": image[None]}), strict=True))


def expected(image: NDArray[np.uint8]) -> list[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Counts (T,) and labels (H, W) of every head, from the network run whole."""
    found, results = tensors(image), []
    for head in HEADS:
        logits = found[f"logits:{head}"][0].astype(np.float64)
        cells = logits.reshape(CLASSES, 4, 2, 6, 2).mean(axis=(2, 4)) if head == HEADS[-1] else logits
        odds = np.exp(cells - cells.max(axis=0))
        sure = (odds / odds.sum(axis=0)).max(axis=0)
        larger = np.stack([cv2.resize(plane, HW[::-1], interpolation=cv2.INTER_LINEAR) for plane in logits])
        labels = found[LABELS][0] if head == HEADS[-1] else larger.argmax(axis=0).astype(np.uint8)
        results.append((np.array([(sure >= row).sum() for row in GATE.thresholds]), labels))
    return results


def plan(graph_set: GraphSet, exits: Sequence[int] = (1, 2, 3), cuts: Sequence[int] = (90, 14)) -> Plan:
    stages = tuple(
        Stage(n, HEADS[n - 1], 1, cuts[n - 1] if number < len(exits) else None) for number, n in enumerate(exits, 1)
    )
    known = small_network.plan(exits=(1,))
    figures = replace(known.predicted, exit_rates=(1.0,) + (0.0,) * (len(stages) - 1))
    names = plan_graphs(graph_set.candidate, [stage.head for stage in stages])
    return replace(
        known,
        network=graph_set.identity,
        gate=GATE,
        stages=stages,
        graphs=tuple(PlanGraph(name, "fp32", "fp32") for name in names),
        predicted=figures,
        operating_points=(default_point(stages, figures),),
    )


def write_bundle(folder: Path, graph_set: GraphSet, exits: Sequence[int] = (1, 2, 3)) -> tuple[Path, Manifest]:
    path = folder / "skips.mess"
    of = plan(graph_set, exits)
    part = small_network.write.Part(graph_set, of, small_network.measurements(len(of.stages)))
    manifest = small_network.write.write_bundle(path, [part], [frame(0), frame(1)], {"mess-compile": "1"})
    return path, manifest
