"""Finds how a single-exit network ends: its logits, and the closing nodes that turn them into labels."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from mess_compile.graph.frontiers import covers_image
from mess_compile.graph.workload import activations
from mess_compile.runtime.base.errors import InputError, did_you_mean
from mess_compile.runtime.engines.engine import TensorSpec

_CLOSING = ("Resize", "Softmax", "LogSoftmax", "Sigmoid", "ArgMax", "Cast", "Identity", "Transpose", "Squeeze")
"""Operators between a network's logits and its output that change no pixel's order of classes on their own."""
MOST_CLASSES = 255


@dataclass(frozen=True)
class OwnEnd:
    """`logits` is the last map of K channels before the closing nodes, in the layout "NCHW" or "NHWC"; `output` is the
    network's output. `closing` are the operators between them.

    With one channel, labels are 1 where the output is above `threshold`: 0.5 after a Sigmoid, 0 without one.
    """

    logits: TensorSpec
    layout: str
    output: TensorSpec
    closing: tuple[str, ...]

    @property
    def channels(self) -> int:
        return self.logits.shape[self.layout.index("C")]

    @property
    def hw(self) -> tuple[int, int]:
        return self.logits.shape[self.layout.index("H")], self.logits.shape[self.layout.index("W")]

    @property
    def single(self) -> bool:
        """Whether one channel separates a class from the background."""
        return self.channels == 1

    @property
    def classes(self) -> int:
        return max(2, self.channels)

    @property
    def threshold(self) -> float:
        return 0.5 if "Sigmoid" in self.closing else 0.0


def name_output(model: onnx.ModelProto, name: str | None) -> str:
    """The output that labels come from: the only one, or the one of this name. Raises InputError."""
    names = [value.name for value in model.graph.output]
    made = [output for node in model.graph.node for output in node.output if output]
    if name is not None:
        if name not in made:
            raise InputError(
                f"--output {name}: the model has no such tensor{did_you_mean(name, made)}; its outputs are "
                f"{', '.join(names[:8])}"
            )
        return name
    if len(names) != 1:
        raise InputError(
            f"the model has {len(names)} outputs ({', '.join(names[:8])}): name the one with the segmentation with "
            "--output NAME"
        )
    return str(names[0])


def find_own_end(model: onnx.ModelProto, output: str, hw: tuple[int, int]) -> OwnEnd:
    """How a model with frames of size `hw` ends in the tensor `output`.

    Raises InputError when the output is no segmentation: neither a map of scores nor of labels.
    """
    shapes = activations(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    found = None if _map_of(shapes[output], hw) is None else output
    closing: list[str] = []
    passed: list[str] = []
    name = output
    while (node := makers.get(name)) is not None and _closes(node, shapes):
        passed.append(node.op_type)
        name = node.input[0]
        if name in shapes and _map_of(shapes[name], hw) is not None:
            found, closing = name, list(passed)
    if found is None or shapes[found].dtype != "float32":
        raise InputError(
            f"output {output!r} is {shapes[output].dtype} {shapes[output].shape}, which is no segmentation of an input "
            f"of {hw[0]} x {hw[1]}: scores (1, classes, h, w) or labels (1, h, w) made of them are; name another with "
            "--output NAME"
        )
    end = OwnEnd(shapes[found], str(_map_of(shapes[found], hw)), shapes[output], tuple(closing[::-1]))
    if end.channels > MOST_CLASSES:
        raise InputError(f"output {output!r} has {end.channels} classes; labels hold {MOST_CLASSES} at most")
    if min(end.hw) < 2:
        raise InputError(f"output {output!r} is {end.hw[0]} x {end.hw[1]}: one answer an image, not a segmentation")
    return end


def _closes(node: onnx.NodeProto, shapes: dict[str, TensorSpec]) -> bool:
    """Whether the node belongs to the network's closing: of the operators above, on one tensor."""
    if node.op_type not in _CLOSING or node.input[0] not in shapes:
        return False
    softmax = node.op_type in ("Softmax", "LogSoftmax")
    return not softmax or len(shapes[node.input[0]].shape) == 4


def _map_of(spec: TensorSpec, hw: tuple[int, int]) -> str | None:
    """The layout of a map (1, K, h, w) or (1, h, w, K) of an image of size `hw`; None if it is none."""
    if len(spec.shape) != 4 or spec.shape[0] != 1:
        return None
    for layout in ("NCHW", "NHWC"):
        size = spec.shape[layout.index("H")], spec.shape[layout.index("W")]
        if covers_image(size, hw) and (layout == "NCHW" or spec.shape[3] <= MOST_CLASSES):
            return layout
    return None
