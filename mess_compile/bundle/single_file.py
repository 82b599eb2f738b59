"""Writes a plan as one ONNX file for ONNX Runtime, with an `If` at each exit.

The file has no operating points and no deadlines. TensorRT computes both branches of an `If`, so an early exit saves
nothing there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mess_compile import files
from mess_compile.graph.store import read_model
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.base.policy import LEARNED, PolicyRow, named_row
from mess_compile.runtime.bundle.archive import Archive, open_archive
from mess_compile.runtime.bundle.manifest import BundlePlan, BundleStage, Golden
from mess_compile.runtime.engines.engine import Engine, Library, open_library
from mess_compile.runtime.images.frames import from_input, to_input

_MOST_BYTES = (1 << 31) - (1 << 24)
"""Largest size of the weights: the limit of a protobuf message, less room for the rest."""
_OUTPUTS = ("labels", "exit", "confidence")


def write_single_file(bundle: Path, name: str, path: Path) -> None:
    """Write the plan `name` (TARGET:PRECISION) as one ONNX file.

    `image` uint8 (1, H, W, 3) -> `labels` uint8 (1, H, W), `exit` int32 (1,) from 1, `confidence` float32 (1,).

    Writes nothing unless labels, exit and count of every golden frame equal the bundle's. Raises InputError when they
    differ, or the weights do not fit into one file.
    """
    archive = open_archive(bundle)
    try:
        plan = next(plan for plan in archive.manifest.plans if plan.name == name)
        model = _Writer(archive, plan).model()
        onnx.checker.check_model(model)
        with files.replaced(path) as temporary:
            onnx.save(model, str(temporary))
            _check(temporary, archive, plan, path)
    finally:
        archive.close()


def is_single_file(path: Path) -> bool:
    """Whether the file has the outputs that `write_single_file` writes."""
    try:
        return tuple(value.name for value in read_model(path).graph.output) == _OUTPUTS
    except InputError:
        return False


class _Writer:
    """Builds the nested graph; weights lie in the outermost scope, once for each graph of the bundle."""

    def __init__(self, archive: Archive, plan: BundlePlan) -> None:
        self._plan, self._manifest = plan, archive.manifest
        self._models = {name: onnx.load(str(archive.folder / name)) for name in plan.graphs()}
        self._weights: dict[str, TensorProto] = {}
        opsets = {tuple(sorted((o.domain, o.version) for o in m.opset_import)) for m in self._models.values()}
        if len(opsets) > 1:
            raise InputError(
                f"the graphs of the bundle have different operator sets ({opsets}): they cannot be one file"
            )

    def model(self) -> onnx.ModelProto:
        height, width = self._manifest.network.input_hw
        self._constant("thresholds", np.array(self._manifest.gate.thresholds, np.float32))
        nodes = self._stage(0, {"image": "image"})
        graph = helper.make_graph(
            nodes,
            self._manifest.name,
            [helper.make_tensor_value_info("image", TensorProto.UINT8, (1, height, width, 3))],
            self._outputs(""),
            list(self._weights.values()),
        )
        if sum(len(weight.raw_data) for weight in self._weights.values()) > _MOST_BYTES:
            raise InputError("the weights are too large for one ONNX file (2 GiB): use the bundle")
        first = next(iter(self._models.values()))
        version = max(model.ir_version for model in self._models.values())
        return helper.make_model(graph, opset_imports=first.opset_import, ir_version=version)

    def _outputs(self, prefix: str) -> list[onnx.ValueInfoProto]:
        hw = self._manifest.network.input_hw
        kinds = ((TensorProto.UINT8, (1, *hw)), (TensorProto.INT32, (1,)), (TensorProto.FLOAT, (1,)))
        return [
            helper.make_tensor_value_info(prefix + name, kind, shape)
            for name, (kind, shape) in zip(_OUTPUTS, kinds, strict=True)
        ]

    def _stage(self, index: int, live: Mapping[str, str], prefix: str = "") -> list[onnx.NodeProto]:
        """The nodes from this stage on; their outputs are named with `prefix`.

        `live` has the names here of the tensors that are alive before the stage; branches read them from outside.
        """
        stage, place = self._plan.stages[index], f"exit{index + 1}"
        nodes, made = self._graph(stage.segment, f"{place}/segment", live)
        if stage.head_graph is None:
            return nodes + self._whole(made["labels"], prefix)
        live = {**live, **made}
        if stage.cut is None and index + 1 < len(self._plan.stages):  # nothing is decided here
            return nodes + self._stage(index + 1, live, prefix)
        gated, outputs = self._graph(stage.head_graph, f"{place}/head", {**live, "thresholds": "thresholds"})
        nodes += gated
        count = f"{place}/count"
        nodes += self._count(stage, outputs["counts"], count)
        if stage.cut is None:
            return nodes + self._leave(index, outputs["logits"], count, prefix)
        cut = self._constant(f"{place}/cut", np.array([stage.cut], np.int32))
        sure = f"{place}/sure"
        nodes.append(helper.make_node("GreaterOrEqual", [count, cut], [sure]))
        here, there = f"{place}/leaves/", f"{place}/goes-on/"
        leaves = helper.make_graph(self._leave(index, outputs["logits"], count, here), here, [], self._outputs(here))
        rest = self._stage(index + 1, live, there)
        goes_on = helper.make_graph(rest, there, [], self._outputs(there))
        names = [prefix + name for name in _OUTPUTS]
        return [*nodes, helper.make_node("If", [sure], names, then_branch=leaves, else_branch=goes_on)]

    def _count(self, stage: BundleStage, counts: str, count: str) -> list[onnx.NodeProto]:
        """`count` (1,) int32, the integer of the stage's row of `counts`, (T,) or by class (T + 2, K)."""
        policy_row = named_row(self._plan.policy_rows, stage.head, stage.row)
        if policy_row is not None:
            return self._policy_count(policy_row, counts, count)
        row = self._constant(f"{count}/row", np.array([stage.row], np.int64))
        if not self._manifest.gate.by_class:
            return [helper.make_node("Gather", [counts, row], [count], axis=0)]
        classes = self._constant(f"{count}/classes", np.array([1], np.int64))
        return [
            helper.make_node("Gather", [counts, row], [f"{count}/by-class"], axis=0),  # (1, K)
            helper.make_node("ReduceSum", [f"{count}/by-class", classes], [count], keepdims=0),
        ]

    def _policy_count(self, row: PolicyRow, counts: str, count: str) -> list[onnx.NodeProto]:
        """As a sum of all counts by class, each times the weight that the row gives it; of a learned row its level."""
        values = row.weights(len(self._manifest.gate.thresholds), len(self._manifest.network.classes))
        weights = self._constant(f"{count}/weights", values)
        axes = self._constant(f"{count}/axes", np.array([0, 1], np.int64))
        one = self._constant(f"{count}/one", np.array([1], np.int64))
        nodes = [
            helper.make_node("Cast", [counts], [f"{count}/counts"], to=TensorProto.INT64),
            helper.make_node("Mul", [f"{count}/counts", weights], [f"{count}/weighted"]),
            helper.make_node("ReduceSum", [f"{count}/weighted", axes], [f"{count}/sum"], keepdims=0),
            helper.make_node("Reshape", [f"{count}/sum", one], [f"{count}/score"]),  # (1,)
        ]
        level = self._level(row, f"{count}/score", count, nodes) if row.policy == LEARNED else f"{count}/score"
        return [*nodes, helper.make_node("Cast", [level], [count], to=TensorProto.INT32)]

    def _level(self, row: PolicyRow, score: str, count: str, nodes: list[onnx.NodeProto]) -> str:
        """The level of a score: the first, and the rise at each step that the score reaches."""
        steps = self._constant(f"{count}/steps", np.array(row.steps, np.int64))
        rises = self._constant(f"{count}/rises", np.diff(np.array(row.levels, np.int64)))
        first = self._constant(f"{count}/first", np.array(row.levels[:1], np.int64))
        axes = self._constant(f"{count}/step-axes", np.array([0], np.int64))
        nodes += [
            helper.make_node("GreaterOrEqual", [score, steps], [f"{count}/reached"]),
            helper.make_node("Cast", [f"{count}/reached"], [f"{count}/reached-steps"], to=TensorProto.INT64),
            helper.make_node("Mul", [f"{count}/reached-steps", rises], [f"{count}/risen"]),
            helper.make_node("ReduceSum", [f"{count}/risen", axes], [f"{count}/rise"], keepdims=1),
            helper.make_node("Add", [f"{count}/rise", first], [f"{count}/level"]),
        ]
        return f"{count}/level"

    def _leave(self, index: int, logits: str, count: str, prefix: str) -> list[onnx.NodeProto]:
        stage, place = self._plan.stages[index], f"exit{index + 1}"
        nodes, made = self._graph(str(stage.output), f"{place}/output", {"logits": logits})
        cells = self._constant(f"{place}/cells", np.array([self._plan.top(stage)], np.float32))
        number = self._constant(f"{place}/number", np.array([index + 1], np.int32))
        share = f"{place}/sure-cells"
        return [
            *nodes,
            helper.make_node("Identity", [made["labels"]], [f"{prefix}labels"]),
            helper.make_node("Identity", [number], [f"{prefix}exit"]),
            helper.make_node("Cast", [count], [share], to=TensorProto.FLOAT),
            helper.make_node("Div", [share, cells], [f"{prefix}confidence"]),
        ]

    def _whole(self, labels: str, prefix: str) -> list[onnx.NodeProto]:
        """The outputs of a whole network: its only exit, and NaN for the confidence that it does not have."""
        made = {
            "labels": labels,
            "exit": self._constant("whole/number", np.array([1], np.int32)),
            "confidence": self._constant("whole/confidence", np.array([np.nan], np.float32)),
        }
        return [helper.make_node("Identity", [made[name]], [prefix + name]) for name in _OUTPUTS]

    def _constant(self, name: str, value: np.ndarray) -> str:
        self._weights[name] = numpy_helper.from_array(value, name)
        return name

    def _graph(self, path: str, prefix: str, inputs: Mapping[str, str]) -> tuple[list[onnx.NodeProto], dict[str, str]]:
        """Copies the nodes of a graph onto those of the tensors `inputs` that it reads; returns them and the new names
        of its outputs."""
        graph = self._models[path].graph
        names = {"": "", **{value.name: inputs[value.name] for value in graph.input}}
        for weight in graph.initializer:
            names[weight.name] = f"{path}/{weight.name}"
            if names[weight.name] not in self._weights:
                copy = onnx.TensorProto()
                copy.CopyFrom(weight)
                copy.name = names[weight.name]
                self._weights[copy.name] = copy
        nodes = []
        for node in graph.node:
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            copied.name = f"{prefix}/{node.output[0]}"
            names.update({name: f"{prefix}/{name}" for name in node.output if name})
            copied.input[:] = [names[name] for name in node.input]
            copied.output[:] = [names[name] for name in node.output]
            nodes.append(copied)
        return nodes, {value.name: names[value.name] for value in graph.output}


def _check(model: Path, archive: Archive, plan: BundlePlan, path: Path) -> None:
    library = open_library("onnxruntime")
    engine = library.load(model)
    try:
        for golden in archive.manifest.golden_of(plan):
            _check_golden(library, engine, archive, plan, golden, path)
    finally:
        engine.close()
        library.close()


def _check_golden(
    library: Library, engine: Engine, archive: Archive, plan: BundlePlan, golden: Golden, path: Path
) -> None:
    network = archive.manifest.network
    frame, wanted = archive.array(golden.frame), archive.array(golden.labels)
    image = to_input(frame, network.input_hw, network.resize)[None]
    found = {name: library.download(value) for name, value in engine.run({"image": library.upload(image)}).items()}
    labels = from_input(found["labels"][0], frame.shape[:2], network.resize)
    exit_ = int(found["exit"][0])
    count = round(float(np.nan_to_num(found["confidence"][0])) * plan.top(plan.stages[exit_ - 1]))
    if (exit_, count) != (golden.exit, golden.count) or not np.array_equal(labels, wanted):
        raise InputError(
            f"{path} is not written: on {golden.frame} the single file leaves at exit {exit_} with {count} confident "
            f"cells, the bundle at exit {golden.exit} with {golden.count}; "
            f"{100 * np.mean(labels == wanted):.3f} % of the labels are equal"
        )
