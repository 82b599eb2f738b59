"""Runs stage 1, exit-aware pre-training: the backbone learns to serve its early exits as well as the final one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mess_compile.nets.checkpoint import load_weights
from mess_compile.nets.network import SegmentationNetwork
from mess_compile.training import loop, losses
from mess_compile.training.loop import Piece, Run
from mess_compile.training.progress import TrainingState, progress_of, restore_optimiser
from mess_compile.training.validate import miou_line

VALIDATE_EVERY = 5
SAVED = "the saved progress"


Judge = Callable[[SegmentationNetwork, int, dict[str, torch.Tensor]], tuple[str, dict[str, torch.Tensor]]]
"""Network after an epoch, its number from 1, and the best weights so far -> a sentence, and the best weights now."""


def pretrain(
    network: SegmentationNetwork, run: Run, progress: TrainingState | None, judge: Judge | None = None
) -> dict[str, torch.Tensor]:
    """Train `network`, one head at every exit point, in place; continues from `progress`.

    Returns the best weights by `judge`, empty without one.
    """
    network.to(run.fabric.device)
    loop.prepare_modules(network)
    optimiser = loop.optimiser_of(network.parts(), run.recipe)
    average = _average_of(network, run.recipe.ema)
    if progress is not None:
        load_weights(network, progress.weights, SAVED)
        restore_optimiser(optimiser, progress)
        if average is not None:
            average.load(progress.average)
        if progress.epoch:
            run.reporter.note(f"continuing {run.stages[0]} after epoch {progress.epoch}")
    best = progress.best if progress is not None else {}
    names, epochs = [head.name for head in network.candidate.heads], run.recipe.epochs[0]
    for epoch in range(progress.epoch if progress else 0, epochs):
        started = time.monotonic()
        loop.seed_epoch(run, 1, 0, epoch)
        mean = _epoch(network.train(), names, optimiser, run, epoch, average)
        line = f"{run.stages[0]} epoch {epoch + 1}/{epochs}  loss per exit {loop.values_text(mean)}"
        if judge is not None:
            sentence, best = judge(network.eval(), epoch + 1, best)
            line += f"  {sentence}"
        elif (epoch + 1) % VALIDATE_EVERY == 0 or epoch + 1 == epochs:
            line += "  " + miou_line(network.eval(), run.validation, names, run.fabric)
        averaged = {} if average is None else average.weights
        saved = partial(progress_of, 1, 0, epoch + 1, network, optimiser, averaged, best)
        loop.finish_epoch(run, f"{line}  {time.monotonic() - started:.0f} s", network, saved)
    if average is not None:
        load_weights(network, average.weights, "the moving average")
    return best


class _Average:
    """Exponential moving average of a network's floating-point state."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._state = {k: v for k, v in network.state_dict().items() if v.is_floating_point()}  # views
        self._decay = decay
        self.weights = {key: value.detach().clone() for key, value in self._state.items()}

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        for key, value in weights.items():
            self.weights[key].copy_(value)

    def update(self, step: int) -> None:
        decay = min(self._decay, (1 + step) / (10 + step))  # a young average must forget the random start
        for key, value in self._state.items():
            self.weights[key].lerp_(value.detach(), 1 - decay)


def _average_of(network: nn.Module, decay: float) -> _Average | None:
    return _Average(network, decay) if decay else None


def trained_exits(order: str, step: int, exits: int) -> list[int]:
    """Indices of the exits that a step trains, from 0; the last one is the final exit."""
    final = exits - 1
    if order == "final" or final == 0:
        return [final]
    if order == "joint":
        return list(range(exits))
    return [step % final, final]


def _epoch(
    network: SegmentationNetwork,
    names: Sequence[str],
    optimiser: torch.optim.Optimizer,
    run: Run,
    epoch: int,
    average: _Average | None,
) -> NDArray[np.float64]:
    """The mean loss of every exit; NaN for one that was not trained."""
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    steps = run.recipe.epochs[0] * len(run.batches)
    hw = run.recipe.crop(epoch, run.input_hw)
    place = f"{run.stages[0]} epoch {epoch + 1}/{run.recipe.epochs[0]}"
    loop.report_progress(run, place, epoch * len(run.batches), steps)
    for index, pieces in enumerate(run.batches.epoch(epoch, hw)):
        step = epoch * len(run.batches) + index
        trained = trained_exits(run.recipe.order, step, len(names))
        backward = partial(_backward, network, [names[i] for i in trained], run)
        found = loop.computed(run, 1, epoch, index, pieces, backward)
        loop.take_step(optimiser, run, step, steps)
        loop.report_progress(run, place, step + 1, steps)
        if average is not None:
            average.update(step)
        sums[trained] += found
        counts[trained] += 1
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _backward(network: SegmentationNetwork, names: Sequence[str], run: Run, pieces: Sequence[Piece]) -> list[float]:
    """Compute the gradients of a batch, the final exit's head last in `names`; returns the loss at every named head."""
    sums = [0.0] * len(names)
    points = [network.candidate.head(name).exit_point for name in names]
    weights = [run.recipe.exit_weight] * (len(names) - 1) + [1.0]
    for frames, targets in loop.pieces_with_targets(run, pieces):
        with run.fabric.autocast():
            features = network.maps(frames)
            if run.first_teacher is not None:
                targets = _taught(run, run.first_teacher, frames, targets)
            logits = [network.head_module(name)(features[point - 1]) for name, point in zip(names, points, strict=True)]
        parts = [losses.loss_of(values, targets) for values in logits]
        run.fabric.backward(torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum())
        sums = [total + part.item() for total, part in zip(sums, parts, strict=True)]
    return sums


def _taught(run: Run, teacher: SegmentationNetwork, frames: torch.Tensor, targets: losses.Targets) -> losses.Targets:
    """The targets with the soft outputs of a teacher that stays as it is."""
    size = (targets.labels.shape[1], targets.labels.shape[2])
    with torch.no_grad():
        logits = teacher.head_module(teacher.candidate.baseline)(teacher.maps(frames)[-1])
    return losses.distilled(targets, losses.upsampled(logits.float(), size), run.recipe.distillation)
