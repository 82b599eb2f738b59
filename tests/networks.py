"""Small candidate networks with random weights for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mess_compile.nets.network import (
    Architecture,
    OverprovisionedNetwork,
    block_workloads,
    place_exits,
    with_final_head,
)
from mess_compile.network import HeadConfig


def random_network(
    heads: Sequence[tuple[int, HeadConfig]],
    backbone: str = "mobilenetv2",
    input_hw: tuple[int, int] = (64, 96),
    classes: int = 4,
    width: float = 0.25,
    seed: int = 0,
    exits: int = 3,
) -> OverprovisionedNetwork:
    """BatchNorm has statistics far from those of initialisation."""
    torch.manual_seed(seed)
    width = width if backbone == "mobilenetv2" else 1.0
    blocks = place_exits(block_workloads(backbone, input_hw, width=width), exits)
    names = tuple(f"class {index}" for index in range(classes))
    colours = tuple((index, index, index) for index in range(classes))
    architecture = Architecture(backbone, names, colours, input_hw, blocks, with_final_head(heads, exits), width=width)
    network = OverprovisionedNetwork(architecture).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    network.candidate = replace(network.candidate, identity="0" * 64)
    return network
