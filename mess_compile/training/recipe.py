"""Describes how to train: everything that decides the result besides data, architecture and machines."""

from __future__ import annotations

from dataclasses import dataclass, field

from mess_compile.network import head_config_from_name
from mess_compile.runtime.base.errors import InputError

DISTILLATIONS = ("pfd", "kd", "none")
ORDERS = ("round-robin", "joint", "final")
LOSS_RESOLUTIONS = ("labels", "cells")


@dataclass(frozen=True)
class Distillation:
    """How the final exit teaches a head: Positive Filtering Distillation, plain distillation or none (CE alone).

    Per pixel: alpha * [teacher is right] * T^2 * KL(teacher || head) + (1 - alpha) * CE; the name is the MESS paper's,
    the formula is our reading of it (unconfirmed). Plain distillation omits the bracket.
    """

    kind: str = "pfd"
    alpha: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in DISTILLATIONS or not 0 <= self.alpha <= 1 or not self.temperature > 0:
            raise InputError(f"distillation {self}: kind is one of {DISTILLATIONS}, alpha 0 to 1, temperature above 0")


@dataclass(frozen=True)
class Recipe:
    """Epochs of stage 1 and 2, and everything that the two stages do.

    `order`: stage 1 trains the final exit and one early exit in turn (MESS), all exits at once, or the final exit
    alone. `stage1_head` is the head at every early exit in stage 1, `exit_weight` the weight of its loss relative to
    the final exit's. `crop_hw`: the size of crops, except in the last `full_size_epochs` of stage 1, which use the
    input size. `lovasz` is the weight of the Lovasz-softmax beside cross-entropy; `ema` the decay per step of a moving
    average of stage 1's weights, 0 for none; `class_power` the power of (median / frequency) that weighs classes.
    `head_memory_mib` bounds the weights and optimiser state of the heads that train in one pass; `seed` fixes weights,
    order and crops.
    """

    epochs: tuple[int, int] = (60, 20)
    batch: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    order: str = "round-robin"
    stage1_head: str = "fcn-crm1-b0"
    exit_weight: float = 1.0
    crop_hw: tuple[int, int] | None = None
    full_size_epochs: int = 0
    augment: bool = True
    loss_resolution: str = "labels"
    class_power: float = 0.5
    lovasz: float = 0.0
    ema: float = 0.0
    distillation: Distillation = field(default_factory=Distillation)
    head_memory_mib: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        head_config_from_name(self.stage1_head)
        if min(self.epochs) < 0 or sum(self.epochs) < 1 or self.batch < 2 or not self.learning_rate > 0:
            raise InputError(
                f"epochs {self.epochs} cannot be negative or all 0, batch {self.batch} at least 2, "
                f"learning rate {self.learning_rate} positive"
            )
        if self.order not in ORDERS or self.loss_resolution not in LOSS_RESOLUTIONS:
            raise InputError(
                f"order {self.order!r} is one of {ORDERS}, loss at {self.loss_resolution!r} one of {LOSS_RESOLUTIONS}"
            )
        if self.head_memory_mib < 1 or self.full_size_epochs < 0 or not 0 <= self.ema < 1:
            raise InputError(
                f"head memory {self.head_memory_mib} MiB must be positive, full-size epochs {self.full_size_epochs} "
                f"not negative, the moving average's decay {self.ema} from 0 to below 1"
            )
        if min(self.lovasz, self.exit_weight, self.class_power, self.weight_decay) < 0:
            raise InputError(
                f"weights of Lovasz {self.lovasz}, exits {self.exit_weight}, classes {self.class_power} and decay "
                f"{self.weight_decay} cannot be negative"
            )

    def crop(self, epoch: int, input_hw: tuple[int, int]) -> tuple[int, int]:
        """Size of the crops of a stage 1 epoch, from 0."""
        if self.crop_hw is None or epoch >= self.epochs[0] - self.full_size_epochs:
            return input_hw
        return self.crop_hw

    def head_crop(self, input_hw: tuple[int, int]) -> tuple[int, int]:
        """Size of the crops of stage 2: that of stage 1's first crops."""
        return self.crop_hw or input_hw
