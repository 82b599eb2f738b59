"""The torch side of a network that is brought: its own graph as a trained or frozen backbone, and new early heads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import nn

from mess_compile.graph.cut import logits_name
from mess_compile.graph.normalise import prune
from mess_compile.graph.recompose_check import shares_of_allowed
from mess_compile.graph.store import read_whole_model
from mess_compile.graph.workload import activations
from mess_compile.nets.heads import build_head
from mess_compile.nets.network import SegmentationNetwork, count_macs
from mess_compile.nets.onnx_module import OnnxModule, open_module
from mess_compile.network import CandidateNetwork, Head, HeadConfig, head_config_from_name
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import open_library

TAUGHT_RATE, BACKBONE_RATE = 0.3, 0.03
"""Learning rates, relative to that of new heads, of heads that have learnt and of a network's own weights with them:
BatchNorm is folded in most of these.
"""


class AttachedNetwork(SegmentationNetwork):
    """A network of the whole-network form with early heads attached.

    Its last exit is its own end, whose logits `backbone` makes itself, an OnnxModule or a FrozenGraph.
    """

    def __init__(self, candidate: CandidateNetwork, backbone: nn.Module) -> None:
        super().__init__()
        self.candidate = candidate
        self.backbone = backbone
        self.own_end = nn.Identity()
        self.heads = nn.ModuleDict()
        for head in _early(candidate):
            channels = candidate.exit_point(head.exit_point).channels
            config = head_config_from_name(head.config)
            self.heads[head.name.replace(".", "/")] = build_head(config, channels, len(candidate.classes))

    def maps(self, frames: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The map at every early exit point, and in place of the last one the network's own logits."""
        found: tuple[torch.Tensor, ...] = self.backbone(frames)
        return found

    def head_module(self, head: str) -> nn.Module:
        return self.own_end if head == self.candidate.baseline else self.heads[head.replace(".", "/")]

    def parts(self) -> tuple[tuple[list[nn.Parameter], float], ...]:
        return (list(self.heads.parameters()), TAUGHT_RATE), (list(self.backbone.parameters()), BACKBONE_RATE)


class FrozenGraph(nn.Module):
    """Computes outputs of an ONNX by ONNX Runtime, image by image: no gradients, any operator."""

    def __init__(self, path: Path, outputs: Sequence[str], library: str = "onnxruntime") -> None:
        super().__init__()
        self._outputs = tuple(outputs)
        self._library = open_library(library)
        self._engine = self._library.load(path)

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """uint8 frames (n, H, W, 3) -> the outputs, each (n, C, h, w)."""
        found = [self._run(frame) for frame in frames.cpu().numpy()]
        return tuple(torch.from_numpy(np.concatenate(parts)).to(frames.device) for parts in zip(*found, strict=True))

    def _run(self, frame: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        outputs = self._engine.run({"image": self._library.upload(frame[None])})
        return [np.array(self._library.download(outputs[name])) for name in self._outputs]

    def close(self) -> None:
        with closing(self._library):
            self._engine.close()


def outputs_of(candidate: CandidateNetwork) -> list[str]:
    """The tensors that teaching needs: the maps of early exit points, and the network's own logits."""
    early = [point.name for point in candidate.exit_points[:-1]]
    return [*early, logits_name(candidate.baseline)]


def open_trainable(path: Path, candidate: CandidateNetwork) -> OnnxModule:
    """The network's graph as a torch module. Raises InputError naming a node that cannot be trained."""
    return open_module(path, outputs_of(candidate))


def check_trainable(module: OnnxModule, path: Path, frames: NDArray[np.uint8]) -> None:
    """Compare the module with ONNX Runtime, which runs the ONNX `path`, on frames (n, H, W, 3) of two images or more.

    Raises InputError naming the first node whose result differs.
    """
    expected = _by_runtime(path, module.outputs, frames)
    if _first_difference(module.outputs, module, frames, expected) is None:
        return
    model = read_whole_model(path)
    shapes = activations(model)
    names = [name for node in model.graph.node for name in node.output if name in shapes]
    names = [name for name in dict.fromkeys(names) if shapes[name].dtype == "float32"]
    prune(model, [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name].shape) for name in names])
    probe = path.with_name("probe.onnx")
    try:
        probe.write_bytes(model.SerializeToString())
        wrong = _first_difference(names, OnnxModule(model, names), frames, _by_runtime(probe, names, frames))
    finally:
        probe.unlink(missing_ok=True)
    makers = {name: node for node in model.graph.node for name in node.output}
    node = makers[wrong] if wrong in makers else model.graph.node[-1]
    raise InputError(
        f"node {node.name or node.output[0]!r} ({node.op_type}) computes something else when it is trained: attach "
        "with frozen weights (--epochs 0 N), and please report this as a bug of mess-compile"
    )


def _by_runtime(path: Path, names: Sequence[str], frames: NDArray[np.uint8]) -> list[list[NDArray[np.float32]]]:
    graph = FrozenGraph(path, names)
    try:
        return [[part.numpy() for part in graph(torch.from_numpy(frame[None]))] for frame in frames]
    finally:
        graph.close()


def _first_difference(
    names: Sequence[str], module: OnnxModule, frames: NDArray[np.uint8], expected: list[list[NDArray[np.float32]]]
) -> str | None:
    """The first tensor that the module, which gets all frames as one batch, makes differently."""
    with torch.inference_mode():
        found = [part.numpy() for part in module(torch.from_numpy(frames))]
    for index, name in enumerate(names):
        parts = (
            np.split(found[index], len(frames)) if len(found[index]) == len(frames) else [found[index]] * len(frames)
        )
        if any(shares_of_allowed(part, values[index]) > 1 for part, values in zip(parts, expected, strict=True)):
            return name
    return None


def with_early_heads(candidate: CandidateNetwork, heads: Sequence[tuple[int, HeadConfig]]) -> CandidateNetwork:
    """The candidate network with these early heads before its own end."""
    made = []
    for number, config in sorted(dict.fromkeys(heads), key=lambda pair: pair[0]):
        point = candidate.exit_point(number)
        build = partial(build_head, config, point.channels, len(candidate.classes))
        made.append(Head(number, config.name, count_macs(build, point.channels, point.hw)))
    return replace(candidate, heads=(*made, *candidate.heads[-1:]))


def _early(candidate: CandidateNetwork) -> tuple[Head, ...]:
    return tuple(head for head in candidate.heads if head.name != candidate.baseline)
