"""A two-exit network small enough to compute by hand, as graphs, as a bundle, and in plain numpy.

Pixels of the even rows and columns go through 1x1 convolutions; labels are repeated 2x2. The gate is a plain count of
softmax maxima: what the real one counts is tested with the gate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mess_compile import files
from mess_compile.bundle import write
from mess_compile.bundle.stage_costs import DeviceCosts
from mess_compile.graph.gate import append_sound
from mess_compile.network import CandidateNetwork, ExitPoint, Gate, GraphSet, GraphSpec, Head
from mess_compile.runtime.bundle import archive, signature
from mess_compile.runtime.bundle.manifest import Figures, Manifest, StageCost
from mess_compile.runtime.engines.engine import TensorSpec
from mess_compile.search.metrics import plan_graphs
from mess_compile.search.plan import Plan, PlanGraph, Stage, default_point

HW, CELLS_HW, CHANNELS = (8, 12), (4, 6), 4
CLASSES = ("sky", "road", "car")
ROWS = (0.4, 0.5, 0.7, 0.9)
HEADS = ("exit1.fcn-crm1-b0", "exit2.fcn-crm1-b0")
_RANDOM = np.random.default_rng(7)
FIRST, SECOND = _RANDOM.normal(0, 0.02, (CHANNELS, 3)), _RANDOM.normal(0, 1, (CHANNELS, CHANNELS))
CLASSIFIERS = _RANDOM.normal(0, 1, (2, len(CLASSES), CHANNELS))
ALONE = _RANDOM.normal(0, 1, (len(CLASSES), CHANNELS))
"""Classifier of a baseline trained alone, whose backbone is one convolution."""


def frame(seed: int, hw: tuple[int, int] = HW) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)


def expected(image: NDArray[np.uint8]) -> list[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Counts (T,) and labels (H, W) of both exits, by matrix products."""
    first = np.maximum(image[::2, ::2].astype(np.float64) @ FIRST.T, 0)
    features = (first, np.maximum(first @ SECOND.T, 0))
    results = []
    for values, classifier in zip(features, CLASSIFIERS, strict=True):
        logits = values @ classifier.T
        odds = np.exp(logits - logits.max(axis=2, keepdims=True))
        sure = (odds / odds.sum(axis=2, keepdims=True)).max(axis=2)
        counts = np.array([(sure >= row).sum() for row in ROWS])
        results.append((counts, logits.argmax(axis=2).astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)))
    return results


def expected_alone(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Labels (H, W) of the baseline trained alone, by matrix products."""
    logits = np.maximum(image[::2, ::2].astype(np.float64) @ FIRST.T, 0) @ ALONE.T
    return logits.argmax(axis=2).astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)


def candidate() -> CandidateNetwork:
    points = tuple(ExitPoint(f"exit{n}", f"block{n}", CHANNELS, CELLS_HW, 100 * n) for n in (1, 2))
    heads = tuple(Head(n, "fcn-crm1-b0", 10) for n in (1, 2))
    return CandidateNetwork(
        "tiny", CLASSES, ((0, 0, 0), (128, 64, 0), (0, 0, 255)), HW, points, heads, HEADS[1], "f" * 64
    )


def graph_set(root: Path, baseline_alone: str | None = None, whole: bool = False) -> GraphSet:
    """All graphs of the network, written to `root` with their weights in one store; on request the `whole` one too."""
    root.mkdir(parents=True, exist_ok=True)
    image, exits = ("image", "uint8", (1, *HW, 3)), [(f"exit{n}", "float32", (1, CHANNELS, *CELLS_HW)) for n in (1, 2)]
    thresholds, counts = ("thresholds", "float32", (len(ROWS), len(CLASSES))), ("counts", "int32", (len(ROWS),))
    logits, labels = ("logits", "float32", (1, len(CLASSES), *CELLS_HW)), ("labels", "uint8", (1, *HW))
    graphs: dict[str, tuple[list[_Tensor], list[_Tensor], list[_Node]]] = {
        "segment-0-1": ([image], [exits[0]], _first("exit1")),
        "segment-1-2": ([exits[0]], [exits[1]], _conv("exit1", "exit2", SECOND)),
        "segment-0-2": ([image], [exits[1]], _first("middle") + _conv("middle", "exit2", SECOND)),
        f"head-{HEADS[0]}": ([exits[0], thresholds], [logits, counts], _head("exit1", CLASSIFIERS[0])),
        f"head-{HEADS[1]}": ([exits[1], thresholds], [logits, counts], _head("exit2", CLASSIFIERS[1])),
        "output-4x6": ([logits], [labels], _output()),
    }
    sound = ("sound", "int32", (1,))
    if whole:
        nodes = [
            *_first("middle"),
            *_conv("middle", "exit2", SECOND),
            *_conv("exit2", "logits", CLASSIFIERS[1], relu=False),
        ]
        graphs["baseline"] = ([image], [labels, sound], [*nodes, *_output(), *_sound()])
    if baseline_alone:
        nodes = _first("middle") + _conv("middle", "logits", ALONE, relu=False) + _output()
        graphs["baseline-alone"] = ([image], [labels], nodes)
    specs = {name: _write(root, name, *parts) for name, parts in graphs.items()}
    return GraphSet(root, candidate(), Gate(thresholds=ROWS), specs, baseline_alone)


def plan(cut: int | None = 18, exits: Sequence[int] = (1, 2), setting: str = "input-dependent") -> Plan:
    stages = [Stage(n, HEADS[n - 1], 2, cut) for n in exits]
    stages[-1] = replace(stages[-1], cut=None)
    rates = (1.0,) + (0.0,) * (len(stages) - 1)
    figures = Figures(1.5, 2.0, 2.5, 60.0, 0.1, 1000, rates, 10, "val", "measured")
    baseline = replace(figures, exit_rates=(1.0,))
    gate = Gate(thresholds=ROWS)
    graphs = tuple(PlanGraph(name, "fp32", "fp32") for name in plan_graphs(candidate(), [s.head for s in stages]))
    return Plan(
        "host",
        "onnxruntime",
        "fp32",
        setting,
        "f" * 64,
        gate,
        tuple(stages),
        graphs,
        figures,
        baseline,
        "onnxruntime on host",
        "a" * 64,
        "b" * 64,
        (default_point(stages, figures),),
    )


def whole_plan() -> Plan:
    """The network as one graph, uncut."""
    stages, graphs = (Stage(2, "baseline", 2, None),), (PlanGraph("baseline", "fp32", "fp32"),)
    known = plan(exits=(2,))
    return replace(known, stages=stages, graphs=graphs, operating_points=(default_point(stages, known.predicted),))


def thresholds() -> NDArray[np.float32]:
    return np.repeat(np.array(ROWS, np.float32)[:, None], len(CLASSES), axis=1)


def measurements(stages: int) -> DeviceCosts:
    """Of a device that takes 10 ms for everything at the least, so that no test depends on the speed of this one."""
    return DeviceCosts((StageCost(10.0, 20.0, 10.0, 20.0),) * stages, 10.0, 20.0, ((),) * stages, {"cores": "2"})


def write_bundle(path: Path, of: Plan | None = None, golden: int = 2, key: Path | None = None) -> Manifest:
    return write_parts(path, [part(graph_set(path.parent / "graphs"), of or plan())], golden, key)


def write_parts(path: Path, parts: Sequence[write.Part], golden: int = 2, key: Path | None = None) -> Manifest:
    frames = [frame(seed) for seed in range(golden)]
    return write.write_bundle(path, parts, frames, {"mess-compile": "1"}, key=key)


def part(graphs: GraphSet, of: Plan, recipe: str = "fp32") -> write.Part:
    """A plan as a bundle takes it; the same graphs may be said to be of another recipe."""
    if recipe != "fp32":
        graphs = replace(graphs, recipe=recipe)
        precision = recipe.partition("-")[0]
        named = tuple(PlanGraph(graph.name, precision, precision) for graph in of.graphs)
        of = replace(of, precision=recipe, network=graphs.identity, graphs=named)
    return write.Part(graphs, of, measurements(len(of.stages)))


def changed_bundle(source: Path, target: Path, change: Callable[[Manifest], Manifest], key: Path | None = None) -> Path:
    """A bundle of the same files with another manifest."""
    opened = archive.open_archive(source)
    try:
        manifest = change(opened.manifest)
        sources: dict[str, Path | bytes] = {name: opened.folder / name for name in manifest.files}
        signed = None if key is None else partial(signature.sign, key=key)
        archive.write_archive(target, manifest, sources, signed)
    finally:
        opened.close()
    return target


_Node = onnx.NodeProto | onnx.TensorProto
_Tensor = tuple[str, str, tuple[int, ...]]


def _conv(source: str, target: str, weight: NDArray[np.float64], relu: bool = True, stride: int = 1) -> list[_Node]:
    values = weight.astype(np.float32)[:, :, None, None]
    sums = f"{target}.sums" if relu else target
    conv = helper.make_node("Conv", [source, f"{target}.weight"], [sums], strides=[stride, stride])
    nodes: list[_Node] = [numpy_helper.from_array(values, f"{target}.weight"), conv]
    return nodes + ([helper.make_node("Relu", [sums], [target])] if relu else [])


def _first(target: str) -> list[_Node]:
    cast = helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT)
    transpose = helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2])
    return [cast, transpose, *_conv("planes", target, FIRST, stride=2)]


def _head(point: str, classifier: NDArray[np.float64]) -> list[_Node]:
    shape = numpy_helper.from_array(np.array([1, -1]), "flat")
    return [
        *_conv(point, "logits", classifier, relu=False),
        shape,
        numpy_helper.from_array(np.array([1]), "axis1"),
        helper.make_node("Softmax", ["logits"], ["p"], axis=1),
        helper.make_node("ReduceMax", ["p"], ["sure"], axes=[1]),
        helper.make_node("Reshape", ["sure", "flat"], ["cells"]),
        helper.make_node("ReduceMax", ["thresholds"], ["rows"], axes=[1], keepdims=1),
        helper.make_node("GreaterOrEqual", ["cells", "rows"], ["s"]),
        helper.make_node("Cast", ["s"], ["ones"], to=TensorProto.INT32),
        helper.make_node("ReduceSum", ["ones", "axis1"], ["counts"], keepdims=0),
    ]


def _output() -> list[_Node]:
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    resize = helper.make_node(
        "Resize",
        ["logits", "", "scales"],
        ["large"],
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    argmax = helper.make_node("ArgMax", ["large"], ["index"], axis=1, keepdims=0)
    return [scales, resize, argmax, helper.make_node("Cast", ["index"], ["labels"], to=TensorProto.UINT8)]


def _sound() -> list[_Node]:
    model = helper.make_model(helper.make_graph([], "sound", [], []))
    append_sound(model)
    return [*model.graph.initializer, *model.graph.node]


def _write(root: Path, name: str, inputs: list[_Tensor], outputs: list[_Tensor], parts: list[_Node]) -> GraphSpec:
    weights = [part for part in parts if isinstance(part, onnx.TensorProto)]
    size = sum(_externalise(root, weight) for weight in weights if weight.name.endswith(".weight"))
    nodes = [part for part in parts if isinstance(part, onnx.NodeProto)]
    infos = [[_info(tensor) for tensor in tensors] for tensors in (inputs, outputs)]
    graph = helper.make_graph(nodes, name, infos[0], infos[1], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = root / f"{name}.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    tensors = [tuple(TensorSpec(*tensor) for tensor in group) for group in (inputs, outputs)]
    return GraphSpec(name, path.name, files.sha256_of_file(path), tensors[0], tensors[1], 10, size, 1000)


def _info(tensor: _Tensor) -> onnx.ValueInfoProto:
    name, dtype, shape = tensor
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def _externalise(root: Path, tensor: onnx.TensorProto) -> int:
    content = tensor.raw_data
    location = f"weights/{hashlib.sha256(content).hexdigest()}"
    (root / "weights").mkdir(exist_ok=True)
    (root / location).write_bytes(content)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return len(content)
