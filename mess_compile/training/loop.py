"""Provides what both stages share: optimiser, schedule, one step, and the handling of a step's failures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import nn

from mess_compile.data.dataset import DataSet
from mess_compile.nets.network import SegmentationNetwork
from mess_compile.reporter import Reporter
from mess_compile.runtime.base.errors import InputError
from mess_compile.training import losses
from mess_compile.training.augment import Batches
from mess_compile.training.convolutions import use_fast_convolutions
from mess_compile.training.parallel import average_gradients, refuse_if_any, summed, synchronise_norms
from mess_compile.training.progress import TrainingState
from mess_compile.training.recipe import Recipe

WARM_UP_SHARE = 0.05
_EARLIER_EPOCHS = "the epochs before this one are kept"
Piece = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """One training: its machines, data, recipe, and where its messages and its progress go."""

    fabric: Fabric
    batches: Batches
    weights: torch.Tensor  # (classes,)
    recipe: Recipe
    input_hw: tuple[int, int]
    stride: int  # pixels of a side to one cell of the final exit's map
    validation: DataSet
    teacher: SegmentationNetwork | None  # of stage 2; the network's own final exit without one
    first_teacher: SegmentationNetwork | None  # of stage 1; labels alone without one
    reporter: Reporter  # progress counts images
    save: Callable[[TrainingState], None]
    stages: tuple[str, str] = ("stage 1", "stage 2")  # what messages call them


def optimiser_of(parts: Sequence[tuple[Sequence[nn.Parameter], float]], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW of parameters with a factor of the learning rate each; biases and BatchNorm do not decay."""
    groups = [
        {"params": chosen, "weight_decay": decay, "factor": factor}
        for parameters, factor in parts
        for chosen, decay in (
            ([p for p in parameters if p.ndim > 1], recipe.weight_decay),
            ([p for p in parameters if p.ndim <= 1], 0.0),
        )
        if chosen or factor == 1
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)


def prepare_modules(module: nn.Module) -> None:
    """Make what is trained compute over the images of all processes, and fast, under the same names of its state."""
    synchronise_norms(module)
    use_fast_convolutions(module)


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine."""
    warm_up = max(1, int(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def seed_epoch(run: Run, stage: int, group: int, epoch: int) -> None:
    """Seed dropout from the seed and the place in the training only: a continued run repeats it."""
    place = np.random.SeedSequence((run.recipe.seed, stage, group, epoch, run.fabric.global_rank))
    torch.manual_seed(int(place.generate_state(1)[0]))


def take_step(optimiser: torch.optim.Optimizer, run: Run, step: int, steps: int) -> None:
    """One step of the optimiser by the gradients of all processes."""
    average_gradients(run.fabric, (p for group in optimiser.param_groups for p in group["params"]))
    for group in optimiser.param_groups:
        group["lr"] = run.recipe.learning_rate * group["factor"] * schedule(step, steps)
    optimiser.step()
    optimiser.zero_grad()


def report_progress(run: Run, place: str, step: int, steps: int) -> None:
    """Report finished steps of a stage in images, so that the displayed speed is images per second.

    `place` names the stage and the epoch.
    """
    run.reporter.progress(f"{place}, images", step * run.batches.batch, steps * run.batches.batch)


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


def computed(
    run: Run,
    stage: int,
    epoch: int,
    index: int,
    pieces: Sequence[Piece],
    backward: Callable[[Sequence[Piece]], list[float]],
) -> list[float]:
    """The losses of `backward(pieces)`. Raises InputError naming the batch when memory runs out, with the number of
    pieces that fit, or when a loss is not a number.
    """
    place = f"in stage {stage}, epoch {epoch + 1}, batch {index + 1}"
    try:
        found = backward(pieces)
    except RuntimeError as error:
        if not _is_exhaustion(error):
            raise
        found = []
    if not found:  # outside the handler, which holds what the failed attempt had allocated
        raise InputError(
            f"out of memory on {run.fabric.device} {place}, with {run.batches.at_once} images at a time: "
            f"{_what_fits(run, pieces[0], backward)}; {_EARLIER_EPOCHS}"
        )
    wrong = not all(math.isfinite(value) for value in found)
    refuse_if_any(run.fabric, wrong, lambda: _spoiled(run, stage, epoch, index, place))
    return found


def _spoiled(run: Run, stage: int, epoch: int, index: int, place: str) -> str:
    names = ", ".join(run.batches.names(run.recipe.epochs[0] * (stage - 1) + epoch, index))
    return (
        f"the loss is not a number {place} ({names}): {_EARLIER_EPOCHS}; check these images, or start over with a "
        "smaller --learning-rate"
    )


def _is_exhaustion(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _what_fits(run: Run, piece: Piece, backward: Callable[[Sequence[Piece]], object]) -> str:
    """Tries smaller and smaller pieces; only in a single process, since others would have to compute them, too."""
    images = run.batches.at_once
    for parts in (n for n in range(2, images // 2 + 1) if images % n == 0):
        if run.fabric.world_size > 1:
            return f"continue with --accumulate {parts * run.batches.pieces}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            backward([(piece[0][: images // parts], piece[1][: images // parts])])
        except RuntimeError as error:
            if _is_exhaustion(error):
                continue
            raise
        return f"{images // parts} fit, continue with --accumulate {parts * run.batches.pieces}"
    return "not even 2 fit, start over with a smaller --crop or --input"


def finish_epoch(run: Run, line: str, network: nn.Module, progress: Callable[[], TrainingState]) -> None:
    """Report an epoch and save the state of the training. Raises InputError when its last step made weights NaN."""
    run.reporter.note(line)
    spoiled = not all(bool(value.isfinite().all()) for value in network.state_dict().values())
    message = f"the weights are not numbers after {line.split('  ')[0]}: {_EARLIER_EPOCHS}; start over with a smaller"
    refuse_if_any(run.fabric, spoiled, lambda: f"{message} --learning-rate")
    if run.fabric.global_rank == 0:
        run.save(progress())


def values_text(values: NDArray[np.float64]) -> str:
    """Losses as text, with a dash for what was not trained."""
    return " ".join("-" if np.isnan(value) else f"{value:.2f}" for value in values)
