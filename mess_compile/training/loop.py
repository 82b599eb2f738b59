"""What both stages share: optimiser, schedule, one step, and the failures that a step may meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import nn

from mess_compile.dataset import DataSet
from mess_compile.runtime.errors import InputError
from mess_compile.training import losses
from mess_compile.training.augment import Batches
from mess_compile.training.parallel import average_gradients, summed
from mess_compile.training.progress import Progress
from mess_compile.training.recipe import Recipe

WARM_UP_SHARE = 0.05
Piece = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """One training: its machines, data, recipe, and where its lines and its progress go."""

    fabric: Fabric
    batches: Batches
    weights: torch.Tensor  # (classes,)
    recipe: Recipe
    input_hw: tuple[int, int]
    stride: int  # pixels of a side to one cell of the final exit's map
    validation: DataSet
    report: Callable[[str], None]
    save: Callable[[Progress], None]


def optimiser_of(parameters: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; biases and BatchNorm do not decay."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine."""
    warm_up = max(1, int(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def seed_epoch(run: Run, stage: int, group: int, epoch: int) -> None:
    """Let dropout depend on nothing but the seed and the place in the training: a continued run repeats it."""
    place = np.random.SeedSequence((run.recipe.seed, stage, group, epoch, run.fabric.global_rank))
    torch.manual_seed(int(place.generate_state(1)[0]))


def take_step(optimiser: torch.optim.Optimizer, run: Run, step: int, steps: int) -> None:
    """One step of the optimiser by the gradients of all processes."""
    average_gradients(run.fabric, (p for group in optimiser.param_groups for p in group["params"]))
    for group in optimiser.param_groups:
        group["lr"] = run.recipe.learning_rate * schedule(step, steps)
    optimiser.step()
    optimiser.zero_grad()


def pieces_with_targets(run: Run, pieces: Sequence[Piece]) -> Iterator[tuple[torch.Tensor, losses.Targets]]:
    """Every piece of a batch with its targets, on the device; losses are means over the batch of all processes."""
    if run.recipe.loss_resolution == "cells":
        pieces = [(frames, losses.at_cells(labels, run.stride)) for frames, labels in pieces]
    count = sum(losses.labelled_pixels(labels) for _, labels in pieces)
    mean = summed(run.fabric, count) / run.fabric.world_size
    for frames, labels in pieces:
        labels = run.fabric.to_device(labels)
        targets = losses.hard_targets(labels, run.weights, mean, run.recipe.lovasz / len(pieces))
        yield run.fabric.to_device(frames), targets


@contextmanager
def exhaustion_named(
    run: Run, stage: int, epoch: int, index: int, pieces: Sequence[Piece], backward: Callable[[Sequence[Piece]], object]
) -> Iterator[None]:
    """Turns memory that runs out into an InputError naming the batch, and how many of its images fit."""
    try:
        yield
        return
    except RuntimeError as error:
        if not _is_exhaustion(error):
            raise
    fits = _images_that_fit(run.batches.at_once, pieces[0], backward)
    remedy = f"{fits} fit: --batch {fits}" if fits else "not even 2 fit: choose a smaller --crop or --input"
    raise InputError(
        f"out of memory on {run.fabric.device} in stage {stage}, epoch {epoch + 1}, batch {index + 1}, with "
        f"{run.batches.at_once} images at once: {remedy}; progress up to this epoch is kept"
    )


def _is_exhaustion(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _images_that_fit(images: int, piece: Piece, backward: Callable[[Sequence[Piece]], object]) -> int:
    """The largest half, quarter... of `images` that computes, 0 when that is below the 2 that BatchNorm needs."""
    while (images := images // 2) >= 2:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            backward([(piece[0][:images], piece[1][:images])])
            return images
        except RuntimeError as error:
            if not _is_exhaustion(error):
                raise
    return 0


def check_finite(run: Run, values: Sequence[float], stage: int, epoch: int, index: int) -> None:
    """Raises InputError naming the batch when a loss is not a number."""
    if all(math.isfinite(value) for value in values):
        return
    names = ", ".join(run.batches.names(run.recipe.epochs[0] * (stage - 1) + epoch, index))
    raise InputError(
        f"the loss is not a number in stage {stage}, epoch {epoch + 1}, batch {index + 1} ({names}): progress up to "
        "this epoch is kept; look at these images, or start over with a smaller --learning-rate"
    )


def shown(values: NDArray[np.float64]) -> str:
    """Losses in words; what was not trained shows a dash."""
    return " ".join("-" if np.isnan(value) else f"{value:.2f}" for value in values)
