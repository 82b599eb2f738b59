"""Finds the cut points of another framework's model: the tensors that its TOML names, checked in the graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mess_compile.graph.exits_toml import ExitsFile
from mess_compile.graph.workload import activations
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import TensorSpec

_AFTER_LOGITS = ("Softmax", "LogSoftmax", "Sigmoid", "ArgMax")
_CHANNELS_LAST = [0, 2, 3, 1]


@dataclass(frozen=True)
class Places:
    """The tensors at which a model is cut: exit points f32 (1, C, h, w) in running order, and each head's logits f32
    (1, K, h, w), by head name. For two classes K may be 1: the logit of the second.
    """

    exits: dict[str, TensorSpec]
    logits: dict[str, TensorSpec]


@dataclass(frozen=True)
class _Model:
    """The searched graph: its input, the tensors that depend on it, and the node that makes each."""

    graph: onnx.GraphProto
    image: str
    hw: tuple[int, int]
    tensors: dict[str, TensorSpec]
    makers: dict[str, onnx.NodeProto]

    def resolved(self, name: str) -> str:
        """The tensor that `name` repeats."""
        while (maker := self.makers.get(name)) is not None and _repeats(maker):
            name = maker.input[0]
        return name

    def above(self, name: str) -> list[str]:
        """The tensors that `name` is computed from, without weights."""
        maker = self.makers.get(name)
        return [] if maker is None else [source for source in maker.input if source in self.tensors]


def find_places(model: onnx.ModelProto, image: str, hw: tuple[int, int], exits: ExitsFile) -> Places:
    """Find the tensors that `exits` names in a model whose only input `image` has frames of size `hw`.

    A tensor that only repeats another (Identity, a channels-last copy) is resolved to that one, logits upsampled to
    `hw` and the Sigmoid of one channel to the logits before. Raises InputError naming the entry: a tensor that is not a
    map, exit points that connections bypass or that are out of order, a head that does not depend on its exit point's
    tensor, or depends on more.
    """
    found = _model(model, image, hw)
    points = {f"exit{number}": _point(found, number, exits) for number in range(1, len(exits.points) + 1)}
    _check_distinct({name: spec.name for name, spec in points.items()})
    _check_backbone(found, points, exits)
    logits = {}
    for name, head in exits.heads.items():
        logits[name] = _logits(found, name, head.logits, exits)
        _check_head(found, name, logits[name].name, points, exits)
    _check_distinct({name: spec.name for name, spec in {**points, **logits}.items()})
    return Places(points, logits)


def _model(model: onnx.ModelProto, image: str, hw: tuple[int, int]) -> _Model:
    shapes, fed = activations(model), {image}
    for node in model.graph.node:
        if fed.intersection(node.input):
            fed.update(name for name in node.output if name)
    tensors = {name: spec for name, spec in shapes.items() if name in fed}
    makers = {name: node for node in model.graph.node for name in node.output if name}
    return _Model(model.graph, image, hw, tensors, makers)


def _point(model: _Model, number: int, exits: ExitsFile) -> TensorSpec:
    where, name = f"exit{number}", exits.points[number - 1].tensor
    spec = _tensor(model, where, name)
    if spec.name == model.image:
        raise InputError(f"{where} is at {name!r}, the model's input: name a tensor of the backbone")
    if len(spec.shape) != 4:
        raise InputError(f"{where}: {_no_map(spec)}; {_nearest_place(model, number, spec.name, exits)}")
    return _checked_map(where, spec)


def _tensor(model: _Model, where: str, name: str) -> TensorSpec:
    """The tensor that `name` repeats. Raises InputError when it does not depend on the input."""
    name = model.resolved(name)
    if name not in model.tensors:
        raise InputError(f"{where}: tensor {name!r} does not depend on the model's input {model.image!r}")
    return model.tensors[name]


def _repeats(node: onnx.NodeProto) -> bool:
    permutation = [list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"]
    return node.op_type == "Identity" or (node.op_type == "Transpose" and permutation == [_CHANNELS_LAST])


def _checked_map(where: str, spec: TensorSpec) -> TensorSpec:
    if spec.dtype != "float32":
        raise InputError(
            f"{where}: tensor {spec.name!r} is {spec.dtype}, not float32: export in float32 (`mess-compile build` "
            "chooses the precision), and name logits before any ArgMax"
        )
    if len(spec.shape) != 4:
        raise InputError(f"{where}: {_no_map(spec)}")
    return spec


def _no_map(spec: TensorSpec) -> str:
    return f"tensor {spec.name!r} has the shape {spec.shape}, not that of a map (1, channels, h, w)"


def _check_distinct(tensors: dict[str, str]) -> None:
    seen: dict[str, str] = {}
    for where, name in tensors.items():
        if name in seen:
            raise InputError(f"{seen[name]} and {where} are both at tensor {name!r}: each needs its own")
        seen[name] = where


def _check_backbone(model: _Model, points: dict[str, TensorSpec], exits: ExitsFile) -> None:
    """Check that exit points lie in order on the tensors that every path from the input to the last of them passes."""
    *_, (final, last) = points.items()
    order = _upstream(model, last.name)
    narrows = _narrows(model, order, last.name)
    passed = ""
    for number, (where, spec) in enumerate(points.items(), start=1):
        name = spec.name
        if name not in order and last.name in _upstream(model, name):
            raise InputError(f"{where} ({name!r}) comes after {final} ({last.name!r}): list exits in running order")
        if name not in order:
            hint = _nearest_place(model, number, name, exits)
            raise InputError(f"{where} ({name!r}) is a side branch: {_goes_on(model, narrows, name)}; {hint}")
        if name not in narrows:
            hint = _around(order, tuple(each for each in narrows if _is_map(model.tensors[each])), name)
            raise InputError(f"a connection bypasses {where} ({name!r}) on the way to {final}: {hint}")
        if passed and order[name] < order[points[passed].name]:
            raise InputError(f"{passed} comes after {where} ({name!r}): list exits in running order")
        passed = where


def _upstream(model: _Model, name: str) -> dict[str, int]:
    """`name` and everything that it is computed from, without weights, each with its place in running order."""
    wanted = {name}
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            wanted.update(source for source in node.input if source in model.tensors)
    made = [output for node in model.graph.node for output in node.output if output in wanted]
    return {tensor: step for step, tensor in enumerate([model.image, *made])}


def _narrows(model: _Model, order: dict[str, int], last: str) -> tuple[str, ...]:
    """The tensors that every path from the input to `last` passes, in running order, without the input.

    Once such a tensor is computed, nothing before it is needed.
    """
    last_use = {source: step for name, step in order.items() for source in model.above(name)}
    last_use[last] = len(order)
    needed: set[str] = set()
    found = []
    for name, step in order.items():
        needed.add(name)
        needed.difference_update(source for source in model.above(name) if last_use[source] == step)
        found += [name] if len(needed) == 1 else []
    return tuple(found[1:])


def _goes_on(model: _Model, narrows: tuple[str, ...], name: str) -> str:
    """Where the backbone branches off from a tensor."""
    above = _upstream(model, name)
    *_, fork = (model.image, *(narrow for narrow in narrows if narrow in above))
    spec = model.tensors[fork]
    return f"the backbone goes on from {fork!r}" + ("" if _is_map(spec) else f", which is not a map but {spec.shape}")


def _is_map(spec: TensorSpec) -> bool:
    return spec.dtype == "float32" and len(spec.shape) == 4


def _nearest_place(model: _Model, number: int, name: str, exits: ExitsFile) -> str:
    """The tensor nearest to `name` where exit point `number` with its heads could be, as the end of a message."""
    end = model.resolved(exits.heads[exits.baseline].logits)
    order = _upstream(model, end)
    narrows = [each for each in _narrows(model, order, end) if _is_map(model.tensors[each])]
    places = [order.get(model.resolved(point.tensor)) for point in exits.points]
    before, after = ([place for place in part if place is not None] for part in (places[: number - 1], places[number:]))
    between = [each for each in narrows if max(before, default=0) < order[each] < min(after, default=len(order) + 1)]
    steps = {each: step for step, each in enumerate(model.makers)}
    heads = [model.resolved(head.logits) for head in exits.points[number - 1].heads]
    for each in sorted(between, key=lambda each: abs(steps[each] - steps.get(name, 0))):
        if each not in heads and all(_beyond(model, head, each) is None for head in heads):
            return f"the nearest tensor that works is {each!r}"
    return "no other tensor works for its heads: they need one map that every path passes through"


def _around(order: dict[str, int], narrows: tuple[str, ...], name: str) -> str:
    before = [f"{narrow!r} before it" for narrow in narrows if order[narrow] < order[name]]
    after = [f"{narrow!r} after it" for narrow in narrows if order[narrow] > order[name]]
    return f"every path passes through {' and '.join(before[-1:] + after[:1])}"


def _logits(model: _Model, where: str, name: str, exits: ExitsFile) -> TensorSpec:
    """A head's logits: the named tensor, or the one that is upsampled to the input's size to make it."""
    spec = _checked_logits(model, where, name)
    maker = model.makers.get(spec.name)
    if _size(spec) == model.hw and maker is not None and maker.op_type == "Resize":
        source = _checked_logits(model, where, maker.input[0])
        if _size(source) != model.hw:
            _check_upsampling(model, where, maker, source, spec)
            spec = source
    _check_size(model, where, spec)
    _check_classes(where, spec, exits)
    return spec


def _check_size(model: _Model, where: str, spec: TensorSpec) -> None:
    """Check that logits cover the image: not larger, and of the same proportions up to rounding."""
    least = [full / (size + 1) for size, full in zip(_size(spec), model.hw, strict=True)]
    most = [full / (size - 1) if size > 1 else np.inf for size, full in zip(_size(spec), model.hw, strict=True)]
    if max(least) >= min(most) or any(size > full for size, full in zip(_size(spec), model.hw, strict=True)):
        raise InputError(
            f"{where}: logits {spec.name!r} are {_as_text(_size(spec))}, which does not cover an input of "
            f"{_as_text(model.hw)}: name a map of the whole image, no larger than the input and of its proportions"
        )


def _check_classes(where: str, spec: TensorSpec, exits: ExitsFile) -> None:
    channels, classes = spec.shape[1], 1 if exits.single else len(exits.classes)
    if channels == classes or (channels == 1 and classes == 2):
        return
    single = "; a single class has one channel, as before a Sigmoid" if exits.single else ""
    raise InputError(
        f"{where}: logits {spec.name!r} have {channels} channels for {classes} classes: list as many classes as there "
        f"are channels{single}"
    )


def _checked_logits(model: _Model, where: str, name: str) -> TensorSpec:
    spec = _tensor(model, where, name)
    maker = model.makers.get(spec.name)
    if maker is not None and maker.op_type == "Sigmoid" and spec.shape[1:2] == (1,):
        return _checked_logits(model, where, maker.input[0])  # above 0.5 exactly where its input is above 0
    if maker is not None and maker.op_type in _AFTER_LOGITS:
        raise InputError(f"{where}: {name!r} is made by {maker.op_type}: name the logits before it, {maker.input[0]!r}")
    return _checked_map(where, spec)


def _check_upsampling(model: _Model, where: str, node: onnx.NodeProto, source: TensorSpec, target: TensorSpec) -> None:
    """Check that it upsamples as the output graph does: bilinear, half-pixel centres. Raises InputError naming the
    tensor before.
    """
    named = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    mode = named.get("mode", b"nearest").decode(errors="replace")
    centres = named.get("coordinate_transformation_mode", b"half_pixel").decode(errors="replace")
    if mode == "linear" and centres in ("half_pixel", "pytorch_half_pixel") and _is_exact(model, node, source, target):
        return
    raise InputError(
        f"{where}: {target.name!r} is upsampled differently (mode {mode!r}, {centres!r}) than labels will be "
        f"(bilinear, half-pixel centres): name the logits before it, {source.name!r}; borders between labels will "
        "then differ a little"
    )


def _is_exact(model: _Model, node: onnx.NodeProto, source: TensorSpec, target: TensorSpec) -> bool:
    """Whether the scales, if a Resize has them instead of sizes, match the two sizes."""
    if len(node.input) < 3 or not node.input[2]:
        return True
    known = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == node.input[2]]
    if len(known) != 1 or known[0].size not in (0, 4):
        return False
    sizes = np.array([source.shape, target.shape], np.float64)
    return known[0].size == 0 or bool(np.allclose(known[0] * sizes[0], sizes[1], rtol=0, atol=1e-3))


def _check_head(model: _Model, where: str, logits: str, points: dict[str, TensorSpec], exits: ExitsFile) -> None:
    """Check that the head depends on its exit point's tensor and on nothing else of the network, and belongs to no
    later one.
    """
    here = where.partition(".")[0]
    point, number = points[here].name, int(here.removeprefix("exit"))
    beyond = _beyond(model, logits, point)
    if beyond == logits:
        raise InputError(f"{where}: logits {logits!r} do not depend on the tensor of their exit point, {point!r}")
    if beyond is not None:
        raise InputError(
            f"{where}: logits {logits!r} also depend on {beyond!r}, which is not computed from {point!r}, the tensor "
            f"of their exit point: a head may use that tensor only; {_nearest_place(model, number, point, exits)}"
        )
    for later, spec in list(points.items())[number:]:
        if spec.name in _upstream(model, logits):
            raise InputError(
                f"{where}: logits {logits!r} are computed from {spec.name!r}, the tensor of {later}: list them there"
            )


def _beyond(model: _Model, logits: str, point: str) -> str | None:
    """A tensor that `logits` need although it is not computed from `point`; None if there is none."""
    inside = {point}
    for node in model.graph.node:
        if inside.intersection(node.input):
            inside.update(name for name in node.output if name)
    wanted, seen = [logits], {logits, point}
    while wanted:
        name = wanted.pop()
        if name not in inside:
            return name
        new = [source for source in model.above(name) if source not in seen]
        seen.update(new)
        wanted += new
    return None


def _size(spec: TensorSpec) -> tuple[int, ...]:
    return spec.shape[2:]


def _as_text(hw: tuple[int, ...]) -> str:
    return " x ".join(map(str, hw))
