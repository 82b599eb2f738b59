"""Writes a taught network as a candidate network: one ONNX with all heads, and the network as it came beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from mess_compile.attach.network import AttachedNetwork
from mess_compile.attach.whole_form import describe
from mess_compile.graph.cut import NETWORK, logits_name
from mess_compile.graph.store import read_model, store_weight, write_model
from mess_compile.nets.export import module_as_onnx

_HEADS = "heads.onnx"
ORIGINAL = "original.onnx"
"""The network as it came, in the whole-network form, where the candidate network's own weights differ from it."""


class _EarlyHeads(nn.Module):
    """All early heads, of the maps at the exit points that have some, in order."""

    def __init__(self, network: AttachedNetwork) -> None:
        super().__init__()
        self.heads, points = network.heads, _points(network)
        self._places = [points.index(head.exit_point) for head in network.candidate.heads[:-1]]

    def forward(self, *maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(head(maps[place]) for head, place in zip(self.heads.values(), self._places, strict=True))


def _points(network: AttachedNetwork) -> list[int]:
    """The early exit points that have heads."""
    return sorted({head.exit_point for head in network.candidate.heads[:-1]})


def write_candidate(
    network: AttachedNetwork, weights: Mapping[str, NDArray[np.float32]], base: Path, folder: Path
) -> None:
    """Write `folder/network.onnx`: the graph `base`, in the same folder, with the heads of `network` and its own
    changed `weights`. If there are any, `base` is kept as ORIGINAL.
    """
    candidate = network.candidate
    model = read_model(base)
    _replace_weights(model, weights, folder)
    names = [logits_name(head.name) for head in candidate.heads[:-1]]
    if names:
        points = [candidate.exit_point(number) for number in _points(network)]
        maps = {point.name: torch.zeros(1, point.channels, *point.hw) for point in points}
        heads = module_as_onnx(_EarlyHeads(network), maps, names, folder / _HEADS)
        _merge(model, heads, {*maps, *names})
        (folder / _HEADS).unlink()
    describe(model, candidate)
    write_model(model, folder / NETWORK)
    if weights:
        base.replace(folder / ORIGINAL)
    else:
        base.unlink()


def _replace_weights(model: onnx.ModelProto, weights: Mapping[str, NDArray[np.float32]], folder: Path) -> None:
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
            store_weight(tensor, folder)


def _merge(model: onnx.ModelProto, part: onnx.ModelProto, shared: set[str]) -> None:
    """Append the nodes and weights of `part`, whose tensors in `shared` are those of `model`."""

    def renamed(name: str) -> str:
        return name if not name or name in shared else f"heads:{name}"

    for tensor in part.graph.initializer:
        copy = model.graph.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = renamed(tensor.name)
    for node in part.graph.node:
        added: Any = model.graph.node.add()
        added.CopyFrom(node)
        added.name = renamed(node.name)
        added.input[:] = [renamed(name) for name in node.input]
        added.output[:] = [renamed(name) for name in node.output]
