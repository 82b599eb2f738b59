"""Finds where a single-exit network can be cut: frontiers, the tensors alive between two of its nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import onnx

from mess_compile.graph.normalise import nodes_to
from mess_compile.graph.workload import activations
from mess_compile.runtime.base.errors import InputError, did_you_mean
from mess_compile.runtime.engines.engine import TensorSpec

NEAR = 0.05
"""Frontiers within this share of the workload of an equal step compete by their bytes."""
FINEST_STRIDE, COARSEST_STRIDE = 4, 32
"""Heads read maps of a stride between these: finer ones are average-pooled, of coarser ones little can be said."""
FEWEST_CHANNELS = 8
_NEWEST = 0.5
"""The map of a frontier has at least this share of the work so far behind it; an old skip connection has less."""
_ASPECT = 1.25
"""Rounding at strides up to 32 changes the proportions of a map by less than this factor."""


@dataclass(frozen=True)
class MapForm:
    """How a tensor holds a map of (channels, h, w): "NCHW", "NHWC" or "tokens" (1, h * w, channels)."""

    layout: str
    channels: int
    hw: tuple[int, int]


@dataclass(frozen=True)
class Frontier:
    """The tensors alive after a node.

    `map` feeds heads: of the maps among them the one with most work behind it, in the form `form`. `carried` are the
    others, in the order in which they were made; the input may be one of them. `macs` is the work done so far, with
    MatMul and Gemm, and `position` the number of nodes that have run.
    """

    map: TensorSpec
    form: MapForm
    carried: tuple[TensorSpec, ...]
    macs: int
    position: int

    @property
    def feeds_heads(self) -> bool:
        """Whether an early head can learn from its map."""
        return self.form.channels >= FEWEST_CHANNELS

    @property
    def bytes(self) -> int:
        return self.map.bytes + sum(tensor.bytes for tensor in self.carried)


@dataclass(frozen=True)
class Frontiers:
    """All frontiers of a network on the way from `image` to `end`, in running order; `macs` is the whole workload."""

    found: tuple[Frontier, ...]
    macs: int

    def share(self, frontier: Frontier) -> float:
        """The part of the workload that is done there."""
        return frontier.macs / max(1, self.macs)


def find_frontiers(model: onnx.ModelProto, image: str, hw: tuple[int, int], end: str) -> Frontiers:
    """Every place between `image`, frames of size `hw`, and the tensor `end` at which the network can be cut.

    Nodes that `end` does not need are not counted. Raises InputError when no tensor on the way is a map to attach to.
    """
    shapes = activations(model)
    nodes = nodes_to(model, [end])
    last_use = {name: step for step, node in enumerate(nodes, start=1) for name in node.input if name in shapes}
    work = {node.output[0]: node_macs(node, shapes, model) for node in nodes}
    behind = _work_behind(nodes, work)
    alive, done, found = {image: shapes[image]}, 0, []
    for position, node in enumerate(nodes, start=1):
        done += work[node.output[0]]
        alive.update({name: shapes[name] for name in node.output if last_use.get(name, 0) > position})
        for name in [name for name in alive if last_use.get(name, 0) <= position]:
            del alive[name]
        frontier = _frontier(alive, behind, hw, done, position)
        if frontier is not None and position < len(nodes):
            found.append(frontier)
    if not any(frontier.feeds_heads for frontier in found):
        raise InputError(
            f"no tensor between the input {image!r} and {end!r} is a map (channels, height, width) of stride "
            f"{COARSEST_STRIDE} or finer with {FEWEST_CHANNELS} channels or more: exits need one to attach to"
        )
    return Frontiers(tuple(found), done)


def choose_frontiers(frontiers: Frontiers, count: int, before: Frontier) -> tuple[Frontier, ...]:
    """Up to `count` frontiers ahead of `before`, near equal steps of the workload, as the paper places exits.

    Of those within NEAR of a step the one with fewest bytes wins, then the nearest, then the last in running order.
    A step gets none if there is none within the length of a step of it. Raises InputError when no step has one.
    """
    chosen: list[Frontier] = []
    feeding = [each for each in frontiers.found if each.feeds_heads and _follows(before, each)]
    for number in range(1, count + 1):
        step = frontiers.macs * number / (count + 1)
        later = [each for each in feeding if not chosen or _follows(each, chosen[-1])]
        distances = [abs(each.macs - step) for each in later]
        far = min(distances, default=float("inf"))
        if far > frontiers.macs / (count + 1):
            continue
        within = max(far, NEAR * frontiers.macs)
        near = [each for each, distance in zip(later, distances, strict=True) if distance <= within]
        chosen.append(min(near, key=lambda each: (each.bytes, abs(each.macs - step), -each.position)))
    if count and not chosen:
        raise InputError(
            f"--exits {count + 1}: no map lies near {'a step' if count > 1 else 'the step'} of 1/{count + 1} of the "
            "work: name tensors with --exits-at; `mess-compile inspect MODEL.onnx` lists the places"
        )
    return tuple(chosen)


def _follows(frontier: Frontier, before: Frontier) -> bool:
    """Whether it comes after another, with work between them and a map that was not alive there."""
    alive = (before.map, *before.carried)
    return frontier.macs > before.macs and frontier.map not in alive


def best_frontiers(frontiers: Frontiers) -> tuple[Frontier, ...]:
    """The places worth attaching at: no other within half of NEAR has fewer bytes, or as many and comes later."""
    feeding = [each for each in frontiers.found if each.feeds_heads]

    def beaten(one: Frontier) -> bool:
        near = (each for each in feeding if abs(each.macs - one.macs) <= NEAR / 2 * frontiers.macs)
        return any((each.bytes, -each.position) < (one.bytes, -one.position) for each in near)

    return tuple(each for each in feeding if not beaten(each))


def frontiers_at(frontiers: Frontiers, names: Sequence[str]) -> tuple[Frontier, ...]:
    """The frontiers whose maps have these names, in running order. Raises InputError naming those that are no map."""
    last = {each.map.name: each for each in frontiers.found if each.feeds_heads}
    wrong = [name for name in dict.fromkeys(names) if name not in last]
    if wrong:
        named = ", ".join(f"{name}{did_you_mean(name, last)}" for name in wrong)
        raise InputError(
            f"--exits-at {named}: no exit can be there; `mess-compile inspect MODEL.onnx` lists the places"
        )
    return tuple(sorted({last[name] for name in names}, key=lambda each: each.position))


def map_form(spec: TensorSpec, hw: tuple[int, int]) -> MapForm | None:
    """How a tensor holds a map of an input of size `hw`; None if it is none that a head could read."""
    if spec.dtype != "float32":
        return None
    if len(spec.shape) == 4 and spec.shape[0] == 1:
        _, *rest = spec.shape
        forms = [MapForm("NCHW", rest[0], (rest[1], rest[2])), MapForm("NHWC", rest[2], (rest[0], rest[1]))]
    elif len(spec.shape) == 3 and spec.shape[0] == 1:
        forms = [MapForm("tokens", spec.shape[2], size) for size in _sizes(hw) if prod(size) == spec.shape[1]]
    else:
        forms = []
    return next((form for form in forms if min(form.hw) > 1 and _covers(form, hw)), None)


def _sizes(hw: tuple[int, int]) -> Iterable[tuple[int, int]]:
    """Sizes of maps at the usual strides, rounded down and up."""
    for stride in (2, 4, 8, 16, 32):
        yield hw[0] // stride, hw[1] // stride
        yield -(-hw[0] // stride), -(-hw[1] // stride)


def _covers(form: MapForm, hw: tuple[int, int]) -> bool:
    """Whether it is a map of the whole image, not coarser than a head can use."""
    return covers_image(form.hw, hw) and min(hw[0] / form.hw[0], hw[1] / form.hw[1]) < COARSEST_STRIDE + 2


def covers_image(hw: tuple[int, int], full: tuple[int, int]) -> bool:
    """Whether a map of height and width `hw` shows a whole image of size `full`: not larger, of its proportions."""
    if min(hw) < 1 or hw[0] > full[0] or hw[1] > full[1]:
        return False
    return 1 / _ASPECT <= hw[0] * full[1] / (hw[1] * full[0]) <= _ASPECT


def _frontier(
    alive: dict[str, TensorSpec], behind: dict[str, int], hw: tuple[int, int], done: int, position: int
) -> Frontier | None:
    forms = {
        name: form
        for name, spec in alive.items()
        if 0 < behind.get(name, 0) >= _NEWEST * done and (form := map_form(spec, hw))
    }
    if not forms:
        return None
    order = {name: number for number, name in enumerate(alive)}
    name = max(forms, key=lambda each: (behind[each], order[each]))
    carried = tuple(spec for other, spec in alive.items() if other != name)
    return Frontier(alive[name], forms[name], carried, done, position)


def _work_behind(nodes: Sequence[onnx.NodeProto], work: dict[str, int]) -> dict[str, int]:
    """By tensor, the work of all nodes that it depends on; sets of nodes are bits of an integer."""
    ancestors: dict[str, int] = {}
    behind: dict[str, int] = {}
    costs = [cost for node in nodes if (cost := work[node.output[0]])]
    number = 0
    for node in nodes:
        bits = 0
        for name in node.input:
            bits |= ancestors.get(name, 0)
        if work[node.output[0]]:
            bits |= 1 << number
            number += 1
        total = sum(cost for index, cost in enumerate(costs[:number]) if bits >> index & 1)
        for name in node.output:
            ancestors[name], behind[name] = bits, total
    return behind


def node_macs(node: onnx.NodeProto, shapes: dict[str, TensorSpec], model: onnx.ModelProto) -> int:
    """Multiplications of a node: convolutions, MatMul and Gemm, by whose sum exits are placed.

    The paper's convention (`count_macs`), which has no MatMul, stays the figure that is reported.
    """
    if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
        return 0
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if tensor.name in node.input}
    first, second = (weights.get(name) or shapes[name].shape for name in node.input[:2])
    output = prod(shapes[node.output[0]].shape)
    if node.op_type == "Conv":
        return output * prod(second[1:])
    if node.op_type == "ConvTranspose":
        return prod(first) * prod(second[1:])
    transposed = node.op_type == "Gemm" and any(each.name == "transA" and each.i for each in node.attribute)
    return output * first[0 if transposed else -1]
