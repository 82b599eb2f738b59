"""Soft targets for cross-entropy and Positive Filtering Distillation at full label resolution."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from mess_compile.dataset import ALWAYS_IGNORED
from mess_compile.runtime.errors import InputError

DISTILLATIONS = ("pfd", "kd", "none")


@dataclass(frozen=True)
class Distillation:
    """How the final exit teaches a head: Positive Filtering Distillation, plain distillation or none (CE alone).

    Per pixel: alpha * [teacher is right] * T^2 * KL(teacher || head) + (1 - alpha) * CE; the name is the MESS paper's,
    the formula our reading of it (facts: unconfirmed). Plain distillation leaves the bracket out.
    """

    kind: str = "pfd"
    alpha: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in DISTILLATIONS or not 0 <= self.alpha <= 1 or not self.temperature > 0:
            raise InputError(f"distillation {self}: kind is one of {DISTILLATIONS}, alpha 0 to 1, temperature above 0")


@dataclass(frozen=True)
class Targets:
    """What all heads of a batch learn: `hard` and `soft` weights per class, (n, K, H, W) each, and the pixel count."""

    hard: torch.Tensor
    soft: torch.Tensor | None
    temperature: float
    pixels: int


def class_weights(histograms: Iterable[NDArray[np.int64]], classes: int) -> torch.Tensor:
    """Weight of each class: the root of (median frequency / frequency), within 0.5 and 3, mean 1 over pixels."""
    counts = np.sum(list(histograms), axis=0)[:classes].astype(float)
    frequency = np.maximum(counts, 1) / counts.sum()
    weights = np.clip(np.sqrt(np.median(frequency) / frequency), 0.5, 3.0)
    return torch.tensor(weights / (weights * frequency).sum(), dtype=torch.float32)


def upsampled(logits: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
    """Logits (n, K, h, w) -> (n, K, H, W), bilinear with half-pixel centres, as the output graph does."""
    return functional.interpolate(logits, hw, mode="bilinear", align_corners=False)


def hard_targets(labels: torch.Tensor, weights: torch.Tensor) -> Targets:
    """Labels (n, H, W) uint8 -> weighted one-hot targets; ignored pixels weigh nothing."""
    classes = len(weights)
    index = labels.long()
    valid = index != ALWAYS_IGNORED
    one_hot = functional.one_hot(index.where(valid, torch.tensor(0)), classes).movedim(3, 1).float()
    hard = one_hot * weights.view(1, -1, 1, 1) * valid.unsqueeze(1)
    return Targets(hard, None, 1.0, max(1, int(valid.sum())))


def distilled_targets(
    labels: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, distillation: Distillation
) -> Targets:
    """Targets for heads taught by `teacher` logits (n, K, H, W)."""
    targets = hard_targets(labels, weights)
    if distillation.kind == "none":
        return targets
    alpha, temperature = distillation.alpha, distillation.temperature
    right = targets.hard.sum(1) > 0
    if distillation.kind == "pfd":
        right &= teacher.argmax(1) == labels.long()
    soft = (teacher / temperature).softmax(1) * (alpha * temperature**2) * right.unsqueeze(1)
    hard = targets.hard * (1 - alpha)
    if temperature == 1.0:
        return Targets(hard + soft, None, 1.0, targets.pixels)
    return Targets(hard, soft, temperature, targets.pixels)


def loss_of(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Mean over labelled pixels, at label resolution; the teacher's own entropy, a constant, is left out."""
    full = upsampled(logits, (targets.hard.shape[2], targets.hard.shape[3]))
    loss = -(targets.hard * full.log_softmax(1)).sum()
    if targets.soft is not None:
        loss = loss - (targets.soft * (full / targets.temperature).log_softmax(1)).sum()
    return loss / targets.pixels
