"""Writes a single-exit network in the whole-network form: exit points, what they carry, and the network's own end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from mess_compile.attach.opened import OpenedNetwork
from mess_compile.graph.cut import METADATA_KEY, logits_name
from mess_compile.graph.frontiers import FINEST_STRIDE, NEAR, Frontier, choose_frontiers
from mess_compile.graph.import_onnx import prepend_input, rename_tensors, reserved_names
from mess_compile.graph.node_builder import add, constant, keep
from mess_compile.graph.normalise import prune
from mess_compile.graph.output_graph import append_labels
from mess_compile.graph.own_end import OwnEnd
from mess_compile.network import OWN, CandidateNetwork, ExitPoint, Head
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import TensorSpec


@dataclass(frozen=True)
class ClassNames:
    """Names and colours of the classes, by label."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]


def own_frontier(opened: OpenedNetwork, after: Sequence[Frontier] = ()) -> Frontier:
    """The last exit point: the frontier with fewest bytes near the network's logits."""
    alive = {tensor.name for each in after for tensor in (each.map, *each.carried)}
    later = [each for each in opened.frontiers.found if not after or each.position > after[-1].position]
    later = [each for each in later if each.map.name not in alive]
    total = opened.frontiers.macs
    near = [each for each in later if each.macs >= (1 - NEAR) * total and each.form.layout == "NCHW"] or later[-1:]
    if not near:
        raise InputError(
            f"no exit point lies between {after[-1].map.name!r} and the network's own end: choose earlier ones"
        )
    return min(near, key=lambda each: (each.bytes, -each.position))


def early_frontiers(opened: OpenedNetwork, exits: int) -> tuple[Frontier, ...]:
    """Where up to `exits` exits are placed, without the last, which is the network's own end. Raises InputError."""
    return choose_frontiers(opened.frontiers, exits - 1, own_frontier(opened))


@dataclass(frozen=True)
class WholeForm:
    """A network in the whole-network form: `model` describes itself as `candidate`; `names` maps tensors of the network
    to their new names, where they have one.
    """

    model: onnx.ModelProto
    candidate: CandidateNetwork
    names: Mapping[str, str]


def whole_form(opened: OpenedNetwork, early: Sequence[Frontier], classes: ClassNames) -> WholeForm:
    """The network with its input's preparation in front and its own end as its only head; weights stay references.

    Outputs `exit1`.., `logits:exitN.own` and `labels:exitN.own`.
    """
    model: onnx.ModelProto = onnx.ModelProto.FromString(opened.model.SerializeToString())
    points = (*early, own_frontier(opened, early))
    end, image = opened.end, opened.image
    names = reserved_names(model, image)
    pools = [_pool(point.form.hw, opened.hw) for point in early] + [1]  # the network's own end reads its map as it is
    names |= {
        point.map.name: f"exit{number}"
        for number, (point, pool) in enumerate(zip(points, pools, strict=True), start=1)
        if point.form.layout == "NCHW" and pool == 1
    }
    others = [tensor.name for point in points for tensor in (point.map, *point.carried)]
    skips = (name for name in dict.fromkeys(others) if name not in names and name != image.name)
    names |= {name: f"skip{number}" for number, name in enumerate(skips, start=1)}
    head = f"exit{len(points)}.{OWN}"
    end_names = _end_names(end, head, names)
    rename_tensors(model, names | end_names)
    new = {**names, **end_names}
    graph = model.graph
    specs = [
        _append_map(graph, f"exit{number}", point, pool, new)
        for number, (point, pool) in enumerate(zip(points, pools, strict=True), start=1)
    ]
    _append_own_end(model, opened, head, new)
    prepend_input(model, image, opened.rule)
    logits_hw = _hw_unless(end.hw, (specs[-1].shape[2], specs[-1].shape[3]))
    heads = (Head(len(points), OWN, 0, logits_hw, f"labels:{head}", _gate_hw(opened)),)
    exit_points = tuple(
        ExitPoint(spec.name, point.map.name, spec.shape[1], (spec.shape[2], spec.shape[3]), 0, carried)
        for point, spec, carried in zip(points, specs, _carried(points, opened, new), strict=True)
    )
    candidate = CandidateNetwork(opened.name, classes.names, classes.colours, opened.hw, exit_points, heads, head, "")
    describe(model, candidate)
    return WholeForm(model, candidate, new)


def describe(model: onnx.ModelProto, candidate: CandidateNetwork) -> None:
    """Let the model end in the tensors that `cut_network` expects, and its metadata describe `candidate`."""
    outputs = [
        helper.make_tensor_value_info(point.name, TensorProto.FLOAT, (1, point.channels, *point.hw))
        for point in candidate.exit_points
    ]
    for head in candidate.heads:
        shape = (1, len(candidate.classes), *candidate.logits_hw(head))
        outputs.append(helper.make_tensor_value_info(logits_name(head.name), TensorProto.FLOAT, shape))
        if head.labels is not None:
            outputs.append(helper.make_tensor_value_info(head.labels, TensorProto.UINT8, (1, *candidate.input_hw)))
    prune(model, outputs)
    model.graph.ClearField("value_info")
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(candidate.to_json()))


def _pool(size: tuple[int, int], hw: tuple[int, int]) -> int:
    """The factor by which a map is average-pooled to come to FINEST_STRIDE: one that divides both sides."""
    stride = round(min(full / side for full, side in zip(hw, size, strict=True)))
    factor = max(1, FINEST_STRIDE // max(1, stride))
    while factor > 1 and (size[0] % factor or size[1] % factor):
        factor //= 2
    return factor


def _hw_unless(hw: tuple[int, int], same: tuple[int, int]) -> tuple[int, int] | None:
    return None if hw == same else hw


def _gate_hw(opened: OpenedNetwork) -> tuple[int, int] | None:
    factor = _pool(opened.end.hw, opened.hw)
    return None if factor == 1 else (opened.end.hw[0] // factor, opened.end.hw[1] // factor)


def _append_map(
    graph: onnx.GraphProto, target: str, point: Frontier, pool: int, names: Mapping[str, str]
) -> TensorSpec:
    """The map that heads read at an exit point, (1, C, h, w): the frontier's own, reshaped or pooled if need be."""
    form, name, (height, width) = point.form, names[point.map.name], point.form.hw
    if name == target:
        return TensorSpec(target, "float32", (1, form.channels, height, width))
    steps: list[tuple[str, list[str], dict[str, object]]] = []
    if form.layout == "NHWC":
        steps.append(("Transpose", [], {"perm": [0, 3, 1, 2]}))
    elif form.layout == "tokens":
        shape = constant(graph, f"{target}/shape", [1, form.channels, height, width], "int64")
        steps += [("Transpose", [], {"perm": [0, 2, 1]}), ("Reshape", [shape], {})]
    if pool > 1:
        steps.append(("AveragePool", [], {"kernel_shape": [pool] * 2, "strides": [pool] * 2}))
    for place, (op, more, attributes) in enumerate(steps, start=1):
        output = target if place == len(steps) else f"{target}/{op}"
        name = add(graph, op, [name, *more], output, **attributes)
    return TensorSpec(target, "float32", (1, form.channels, height // pool, width // pool))


def _carried(
    points: Sequence[Frontier], opened: OpenedNetwork, names: Mapping[str, str]
) -> list[tuple[TensorSpec, ...]]:
    """What each exit point carries besides its map, by new names."""
    found = []
    for number, point in enumerate(points, start=1):
        own = () if names[point.map.name] == f"exit{number}" else (point.map,)
        found.append(tuple(_renamed(spec, opened, names) for spec in (*own, *point.carried)))
    return found


def _renamed(spec: TensorSpec, opened: OpenedNetwork, names: Mapping[str, str]) -> TensorSpec:
    if spec.name == opened.image.name and spec.dtype == "uint8":
        return TensorSpec("image", "uint8", (1, *opened.hw, 3))
    return TensorSpec(names.get(spec.name, spec.name), spec.dtype, spec.shape)


def _end_names(end: OwnEnd, head: str, taken: Mapping[str, str]) -> dict[str, str]:
    """The new name of the logits, where they are already (1, K, h, w) of two classes or more."""
    plain = end.layout == "NCHW" and not end.single and end.logits.name not in taken
    return {end.logits.name: logits_name(head)} if plain else {}


def _append_own_end(model: onnx.ModelProto, opened: OpenedNetwork, head: str, names: Mapping[str, str]) -> None:
    """Append logits, unless they have their name already, and labels, which the network's own closing nodes make."""
    graph, end, logits = model.graph, opened.end, logits_name(head)
    made = names.get(end.logits.name, end.logits.name)
    output = names.get(end.output.name, end.output.name)
    if made != logits:
        planes = made
        if end.layout == "NHWC":
            planes = add(graph, "Transpose", [made], f"{logits}/planes", perm=[0, 3, 1, 2])
        _append_logits(graph, planes, logits, end)
        back = _back(graph, logits, end)
        readers = [node for node in graph.node if made in node.input and node.output[0] not in _ours(logits)]
        for node in readers:
            node.input[:] = [back if name == made else name for name in node.input]
        output = back if output == made else output
        _sort(graph)
    append_labels(graph, output, end.output.dtype, end.output.shape, opened.hw, f"labels:{head}", end.threshold)


def _ours(logits: str) -> tuple[str, ...]:
    return logits, f"{logits}/planes"


def _append_logits(graph: onnx.GraphProto, planes: str, logits: str, end: OwnEnd) -> None:
    """Logits (1, K, h, w) of `planes`; of one channel x, [0, x], whose argmax is 1 where x is above 0."""
    if not end.single:
        add(graph, "Identity", [planes], logits)
        return
    pads = constant(graph, f"{logits}/pads", [0, 1, 0, 0, 0, 0, 0, 0], "int64")
    add(graph, "Pad", [planes, pads, constant(graph, f"{logits}/zero", 0.0, "float32")], logits)


def _back(graph: onnx.GraphProto, logits: str, end: OwnEnd) -> str:
    """What the closing nodes read, in the layout and with the channels that they expect."""
    name = logits
    if end.single:
        bounds = [constant(graph, f"{logits}/{what}", [value], "int64") for what, value in
                  (("from", 1), ("to", 2), ("axis", 1))]  # fmt: skip
        name = add(graph, "Slice", [name, *bounds], f"{logits}/channel")
    if end.layout == "NHWC":
        name = add(graph, "Transpose", [name], f"{logits}/back", perm=[0, 2, 3, 1])
    return name


def _sort(graph: onnx.GraphProto) -> None:
    """Put the nodes in running order."""
    known = {value.name for value in (*graph.input, *graph.initializer)} | {""}
    waiting, done = list(graph.node), []
    while waiting:
        ready = [node for node in waiting if known.issuperset(node.input)]
        for node in ready:
            known.update(node.output)
        done += ready
        waiting = [node for node in waiting if not known.issuperset(node.output)]
    keep(graph.node, done)
