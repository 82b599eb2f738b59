"""A step of training is computed in faster ways than PyTorch's plain ones: it must remain the same step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mess_compile.nets.network import Architecture, OverprovisionedNetwork, heads_from_names, with_final_head
from mess_compile.training import loop, losses
from mess_compile.training.recipe import Recipe

HW = (64, 96)


def network() -> OverprovisionedNetwork:
    heads = with_final_head(heads_from_names(("sep16-crm1-b0",), 3), 3)
    blocks = ("features.6", "features.10", "features.17")
    torch.manual_seed(0)
    made = OverprovisionedNetwork(
        Architecture("mobilenetv2", ("a", "b", "c"), ((0, 0, 0),) * 3, HW, blocks, heads, width=0.25)
    )
    for layer in made.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return made.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload, no-any-return]


def plain_lovasz(p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Every class by itself, as in the paper's algorithm 1."""
    terms = []
    for k in labels[labels != 255].unique():
        truth = (labels == k)[labels != 255].float()
        errors, order = (truth - p[:, int(k)][labels != 255]).abs().sort(descending=True)
        truth = truth[order]
        jaccard = 1 - (truth.sum() - truth.cumsum(0)) / (truth.sum() + (1 - truth).cumsum(0))
        terms.append((errors * jaccard.diff(prepend=torch.zeros(1))).sum())
    return torch.stack(terms).mean()


def plain_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    full = functional.interpolate(logits, HW, mode="bilinear", align_corners=False)
    entropy = functional.cross_entropy(full, labels, ignore_index=255)
    return entropy + 0.5 * plain_lovasz(full.softmax(1)[..., 2::4, 2::4], labels[:, 2::4, 2::4])


def logits_of(made: OverprovisionedNetwork, frames: torch.Tensor) -> list[torch.Tensor]:
    features = made.maps(frames)
    return [made.head_module(head.name)(features[head.exit_point - 1]) for head in made.candidate.heads]


def test_fast_steps_have_the_losses_of_plain_pytorch() -> None:
    plain = network()
    fast = copy.deepcopy(plain)
    loop.prepare_modules(fast)
    optimisers = (
        torch.optim.AdamW(plain.parameters(), 1e-4, weight_decay=0),
        loop.optimiser_of(fast.parts(), Recipe(weight_decay=0, learning_rate=1e-4)),
    )
    rng = np.random.default_rng(0)
    for _ in range(4):
        frames = torch.from_numpy(rng.integers(0, 256, (4, *HW, 3), np.uint8))
        labels = torch.from_numpy(rng.choice([0, 1, 255], (4, *HW), p=[0.7, 0.2, 0.1]))
        pixels = losses.labelled_pixels(labels)
        targets = losses.hard_targets(labels, torch.ones(3), pixels, 0.5)
        expected = [plain_loss(values, labels) for values in logits_of(plain, frames)]
        found = [losses.loss_of(values, targets) for values in logits_of(fast, frames)]
        assert [loss.item() for loss in found] == pytest.approx([loss.item() for loss in expected], rel=1e-4)
        for optimiser, values in zip(optimisers, (expected, found), strict=True):
            torch.stack(values).sum().backward()
            optimiser.step()
            optimiser.zero_grad()
