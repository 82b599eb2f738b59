"""Builds the overprovisioned network: one backbone, exit points placed by workload, every candidate head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate

import torch
from torch import nn

from mess_compile.nets.backbones import MEAN, STD, build_backbone
from mess_compile.nets.heads import build_head
from mess_compile.network import CandidateNetwork, ExitPoint, Head, HeadConfig, head_config_from_name, head_grid
from mess_compile.runtime.base.errors import InputError

FINAL_HEAD = HeadConfig("fcn")
"""The paper's baseline exit, always present at the final exit point."""


@dataclass(frozen=True)
class Architecture:
    """Everything that decides the shape of an overprovisioned network.

    `exit_blocks` are backbone block names in order, the last block being the final exit; `heads` pairs an exit point
    (from 1) with a configuration.
    """

    backbone: str
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    input_hw: tuple[int, int]
    exit_blocks: tuple[str, ...]
    heads: tuple[tuple[int, HeadConfig], ...]
    output_stride: int = 8
    width: float = 1.0


class SegmentationNetwork(nn.Module):
    """What is trained: a network with early exits, whose last exit is its own end.

    `candidate` describes it; its identity is empty until weights are loaded.
    """

    candidate: CandidateNetwork

    def maps(self, frames: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """uint8 frames (n, H, W, 3) -> the map at every exit point, each (n, C_i, h_i, w_i)."""
        raise NotImplementedError

    def head_module(self, head: str) -> nn.Module:
        """The module that makes a head's logits (n, K, h, w) of the map at its exit point."""
        raise NotImplementedError

    def parts(self) -> tuple[tuple[list[nn.Parameter], float], ...]:
        """The parameters that stage 1 trains, in parts with a factor of the learning rate each."""
        return ((list(self.parameters()), 1.0),)


class OverprovisionedNetwork(SegmentationNetwork):
    """Backbone and heads of an Architecture.

    `heads` is keyed by head name with '/' for '.'; `candidate.identity` is empty until weights are loaded.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.candidate = described(architecture)
        self.backbone = build_backbone(architecture.backbone, architecture.output_stride, architecture.width)
        self.heads = nn.ModuleDict()
        for head, (number, config) in zip(self.candidate.heads, architecture.heads, strict=True):
            channels = self.candidate.exit_point(number).channels
            self.heads[head.name.replace(".", "/")] = build_head(config, channels, len(architecture.classes))

    def features(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Normalised images (n, 3, H, W) -> the map at every exit point, each (n, C_i, h_i, w_i)."""
        exits = set(self.architecture.exit_blocks)
        found = []
        x = self.backbone.stem(images)
        for name, block in self.backbone.blocks():
            x = block(x)
            if name in exits:
                found.append(x)
        return tuple(found)

    def maps(self, frames: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.features(normalise(frames).contiguous(memory_format=torch.channels_last))

    def head_module(self, head: str) -> nn.Module:
        return self.heads[head.replace(".", "/")]

    def forward(self, images: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        """Normalised images (n, 3, H, W) -> maps at the exit points, and logits (n, K, h, w) by head name."""
        features = self.features(images)
        logits = {h.name: self.head_module(h.name)(features[h.exit_point - 1]) for h in self.candidate.heads}
        return features, logits


def described(architecture: Architecture) -> CandidateNetwork:
    """The candidate network as data, workloads included, without weights. Raises InputError."""
    exit_points = _exit_points(architecture)
    numbers = [number for number, _ in architecture.heads]
    if (len(exit_points), FINAL_HEAD) not in architecture.heads or not all(1 <= n <= len(exit_points) for n in numbers):
        raise InputError(
            f"heads at exits {numbers}: give them exits from 1 to {len(exit_points)}, with {FINAL_HEAD.name} at the "
            "last"
        )
    heads = []
    for number, config in architecture.heads:
        point = exit_points[number - 1]
        macs = count_macs(
            partial(build_head, config, point.channels, len(architecture.classes)), point.channels, point.hw
        )
        heads.append(Head(number, config.name, macs))
    return CandidateNetwork(
        backbone=architecture.backbone,
        classes=architecture.classes,
        colours=architecture.colours,
        input_hw=architecture.input_hw,
        exit_points=exit_points,
        heads=tuple(heads),
        baseline=Head(len(exit_points), FINAL_HEAD.name, 0).name,
        identity="",
    )


def normalise(frames: torch.Tensor) -> torch.Tensor:
    """uint8 frames (n, H, W, 3) -> float (n, 3, H, W), ImageNet mean and deviation removed."""
    mean, std = (torch.tensor(values, device=frames.device).view(1, 3, 1, 1) * 255 for values in (MEAN, STD))
    return (frames.permute(0, 3, 1, 2).float() - mean) / std


def count_macs(build: Callable[[], nn.Module], channels: int, hw: tuple[int, int]) -> int:
    """Workload of a freshly built module on one map (channels, h, w): convolution MACs + 2 per BatchNorm element."""
    with torch.device("meta"):
        module = build().eval()
        return _traced_macs(module, module, torch.empty(1, channels, *hw))[0]


def _traced_macs(
    module: nn.Module, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> tuple[int, torch.Tensor]:
    """MACs and output of a call of `module`, which lies on the meta device and is not used again.

    There PyTorch computes norms and activations in Python, for most of the time. They keep the shape: they are skipped.
    """
    total = 0

    def add(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += output.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.BatchNorm2d):
            total += 2 * output.numel()

    hooks = [layer.register_forward_hook(add) for layer in module.modules()]
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm2d, nn.ReLU, nn.ReLU6)):
            layer.forward = nn.Identity().forward  # type: ignore[method-assign]
    output = call(x)
    for hook in hooks:
        hook.remove()
    return total, output


@cache
def block_workloads(
    backbone: str, input_hw: tuple[int, int], output_stride: int = 8, width: float = 1.0
) -> tuple[ExitPoint, ...]:
    """Every backbone block as a possible exit point, with cumulative workload; the stem counts to the first."""
    with torch.device("meta"):
        module = build_backbone(backbone, output_stride, width).eval()
        stem, x = _traced_macs(module, module.stem, torch.empty(1, 3, *input_hw))
        names, macs, maps = [], [], []
        for name, block in module.blocks():
            count, x = _traced_macs(block, block, x)
            names.append(name)
            macs.append(count)
            maps.append(x.shape)
    totals = list(accumulate(macs, initial=stem))[1:]
    return tuple(
        ExitPoint("", name, shape[1], (shape[2], shape[3]), total)
        for name, shape, total in zip(names, maps, totals, strict=True)
    )


def place_exits(blocks: Sequence[ExitPoint], count: int) -> tuple[str, ...]:
    """Names of `count` blocks about equidistant in workload, the last block among them.

    Raises InputError when there are fewer blocks than exits.
    """
    if not 1 <= count <= len(blocks):
        raise InputError(f"{count} exits do not fit a backbone of {len(blocks)} blocks: choose at most {len(blocks)}")
    total, chosen = blocks[-1].macs, [len(blocks) - 1]
    for number in range(count - 1, 0, -1):
        free = range(number - 1, chosen[0])
        chosen.insert(0, min(free, key=lambda i: abs(blocks[i].macs - total * number / count)))
    return tuple(blocks[index].block for index in chosen)


def _exit_points(architecture: Architecture) -> tuple[ExitPoint, ...]:
    blocks = block_workloads(
        architecture.backbone, architecture.input_hw, architecture.output_stride, architecture.width
    )
    names = [block.block for block in blocks]
    for name in architecture.exit_blocks:
        if name not in names:
            raise InputError(f"{architecture.backbone} has no block {name!r}; it has {', '.join(names)}")
    order = [names.index(name) for name in architecture.exit_blocks]
    if order != sorted(set(order)) or order[-1:] != [len(blocks) - 1]:
        raise InputError(f"exit blocks {', '.join(architecture.exit_blocks)} are not in order, ending with {names[-1]}")
    return tuple(replace(blocks[index], name=f"exit{number}") for number, index in enumerate(order, start=1))


def with_final_head(heads: Sequence[tuple[int, HeadConfig]], exits: int) -> tuple[tuple[int, HeadConfig], ...]:
    """Heads sorted by exit point without repetition, and the baseline's head at the final exit point."""
    unique = dict.fromkeys([*heads, (exits, FINAL_HEAD)])
    return tuple(sorted(unique, key=lambda pair: pair[0]))


def heads_from_names(names: Sequence[str], exits: int) -> tuple[tuple[int, HeadConfig], ...]:
    """Heads at the early exit points: `NAME` means each of them, `exitN.NAME` one, `grid` the paper's whole space.

    Raises InputError.
    """
    heads: list[tuple[int, HeadConfig]] = []
    for name in names:
        point, _, config = name.rpartition(".")
        configs = head_grid() if config == "grid" else (head_config_from_name(config),)
        numbers = range(1, exits) if not point else [_exit_number(point, exits, name)]
        heads += [(number, config) for number in numbers for config in configs]
    return tuple(heads)


def _exit_number(point: str, exits: int, name: str) -> int:
    known = {f"exit{number}": number for number in range(1, exits)}
    if point not in known:
        raise InputError(f"head {name!r} is at no early exit point; there are {', '.join(known) or 'none'}")
    return known[point]
