"""Computes cross-entropy, Positive Filtering Distillation and Lovasz-softmax at label resolution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from mess_compile.data.dataset import ALWAYS_IGNORED
from mess_compile.training.recipe import Distillation

LOVASZ_STRIDE = 4
"""Lovasz uses every fourth pixel of every fourth row, since it sorts all its pixels."""


@dataclass(frozen=True)
class Targets:
    """The targets of all heads of a batch.

    `labels` (n, H, W) int64, 255 ignored, cross-entropy with `weights` (K,) times `hard`; `soft` (n, K, H, W) or None,
    cross-entropy at `temperature`; both summed over pixels and divided by `pixels`. `lovasz` weighs the Lovasz-softmax.
    """

    labels: torch.Tensor
    weights: torch.Tensor
    pixels: float
    lovasz: float = 0.0
    hard: float = 1.0
    soft: torch.Tensor | None = None
    temperature: float = 1.0


def class_weights(counts: NDArray[np.int64], power: float) -> torch.Tensor:
    """Weight of each class from its pixel count: (median frequency / frequency) ** power, within 0.5 and 3, mean 1
    over pixels."""
    frequency = np.maximum(counts, 1) / counts.sum()
    weights = np.clip((np.median(frequency) / frequency) ** power, 0.5, 3.0)
    return torch.tensor(weights / (weights * frequency).sum(), dtype=torch.float32)


def upsampled(logits: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
    """Logits (n, K, h, w) -> (n, K, H, W), bilinear with half-pixel centres, as the output graph does."""
    return functional.interpolate(logits, hw, mode="bilinear", align_corners=False)


def at_cells(labels: torch.Tensor, stride: int) -> torch.Tensor:
    """Labels (n, H, W) -> (n, ceil(H / stride), ceil(W / stride)): the label in the middle of every cell."""
    hw = [-(-side // stride) for side in labels.shape[1:]]
    return functional.interpolate(labels[:, None].float(), hw, mode="nearest-exact")[:, 0].to(labels.dtype)


def labelled_pixels(labels: torch.Tensor) -> int:
    return int((labels != ALWAYS_IGNORED).sum())


def hard_targets(labels: torch.Tensor, weights: torch.Tensor, pixels: float, lovasz: float = 0.0) -> Targets:
    """Labels (n, H, W) uint8 as the only targets; ignored pixels have no weight."""
    return Targets(labels.long(), weights, max(1.0, pixels), lovasz)


def distilled(targets: Targets, teacher: torch.Tensor, distillation: Distillation) -> Targets:
    """`targets` with `teacher` logits (n, K, H, W) added."""
    if distillation.kind == "none":
        return targets
    alpha, temperature = distillation.alpha, distillation.temperature
    right = targets.labels != ALWAYS_IGNORED
    if distillation.kind == "pfd":
        right &= teacher.argmax(1) == targets.labels
    soft = (teacher / temperature).softmax(1) * (alpha * temperature**2) * right.unsqueeze(1)
    return Targets(targets.labels, targets.weights, targets.pixels, targets.lovasz, 1 - alpha, soft, temperature)


def loss_of(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Sum over labelled pixels / `targets.pixels`, without the teacher's own entropy, which is constant."""
    hw, cells = (targets.labels.shape[1], targets.labels.shape[2]), logits.float()
    full = _upsampled_by_products(cells, hw, 0, 1)
    logs = full.log_softmax(1)
    loss = targets.hard * functional.nll_loss(
        logs, targets.labels, targets.weights, ignore_index=ALWAYS_IGNORED, reduction="sum"
    )
    if targets.soft is not None:
        warm = logs if targets.temperature == 1 else (full / targets.temperature).log_softmax(1)
        loss = loss - (targets.soft * warm).sum()
    loss = loss / targets.pixels
    if targets.lovasz:
        first = LOVASZ_STRIDE // 2
        seen = _upsampled_by_products(cells, hw, first, LOVASZ_STRIDE).softmax(1)
        loss = loss + targets.lovasz * lovasz_softmax(
            seen, targets.labels[:, first::LOVASZ_STRIDE, first::LOVASZ_STRIDE]
        )
    return loss


def _upsampled_by_products(logits: torch.Tensor, hw: tuple[int, int], first: int, stride: int) -> torch.Tensor:
    """Every `stride`-th row and column of `upsampled`, from `first` on, by two matrix products: their gradient takes a
    fraction of the time of the interpolation's on a CPU."""
    down, across = (
        _interpolation(cells, pixels, logits.device)[:, first::stride]
        for cells, pixels in zip(logits.shape[2:], hw, strict=True)
    )
    found: torch.Tensor = down.T @ (logits.contiguous() @ across)
    return found


@lru_cache(maxsize=32)
def _interpolation(cells: int, pixels: int, device: torch.device) -> torch.Tensor:
    """The matrix (cells, pixels) of a linear interpolation with half-pixel centres."""
    unit = torch.eye(cells, device=device)[:, None]
    return functional.interpolate(unit, pixels, mode="linear", align_corners=False)[:, 0]


def lovasz_softmax(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Lovasz-softmax (Berman et al. 2018, classes present) of probabilities (n, K, h, w) against labels (n, h, w).

    The Jaccard loss of all these pixels together, extended to probabilities; 0 when nothing is labelled.
    """
    known = labels != ALWAYS_IGNORED
    found = labels[known]  # (pixels,)
    present = torch.bincount(found).nonzero()  # (present classes, 1)
    if not len(present):
        return probabilities.sum() * 0
    p = torch.stack([probabilities[:, k][known] for (k,) in present.tolist()])  # (present classes, pixels)
    truth = (found == present).to(p.dtype)
    errors, order = (truth - p).abs().sort(1, descending=True)
    truth = truth.gather(1, order)
    total = truth.sum(1, keepdim=True)
    jaccard = 1 - (total - truth.cumsum(1)) / (total + (1 - truth).cumsum(1))
    steps = torch.cat([jaccard[:, :1], jaccard[:, 1:] - jaccard[:, :-1]], dim=1)
    return (errors * steps).sum(1).mean()
