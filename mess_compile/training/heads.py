"""Runs stage 2: trains every head on the frozen backbone, with the labels and the final exit as teachers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mess_compile.nets.network import SegmentationNetwork
from mess_compile.training import loop, losses
from mess_compile.training.loop import Piece, Run
from mess_compile.training.progress import TrainingState, progress_of, restore_optimiser

_BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments, fp32


def head_groups(network: SegmentationNetwork, memory_mib: int) -> tuple[tuple[str, ...], ...]:
    """Names of the early heads in groups whose weights and optimiser state fit `memory_mib`, at least one per group."""
    groups: list[list[str]] = []
    room = 0.0
    for head in network.candidate.heads:
        if head.name == network.candidate.baseline:
            continue
        parameters = sum(p.numel() for p in network.head_module(head.name).parameters())
        need = parameters * _BYTES_PER_PARAMETER / 2**20
        if not groups or need > room:
            groups.append([])
            room = memory_mib
        groups[-1].append(head.name)
        room -= need
    return tuple(tuple(group) for group in groups)


def train_heads(network: SegmentationNetwork, run: Run, progress: TrainingState) -> None:
    """Train the early heads in place; heads do not influence each other, so a group trains in one pass."""
    network.eval().requires_grad_(False)
    network.to(run.fabric.device)
    groups = head_groups(network, run.recipe.head_memory_mib)
    for number, names in enumerate(groups):
        if number >= progress.group:
            _train_group(network, names, run, progress, number, len(groups))


def _train_group(
    network: SegmentationNetwork, names: Sequence[str], run: Run, progress: TrainingState, number: int, groups: int
) -> None:
    modules = nn.ModuleList(network.head_module(name) for name in names)
    modules.requires_grad_(True).train()
    loop.prepare_modules(modules)
    optimiser = loop.optimiser_of(((list(modules.parameters()), 1.0),), run.recipe)
    first = progress.epoch if number == progress.group else 0
    if first:
        restore_optimiser(optimiser, progress)
    epochs = run.recipe.epochs[1]
    for epoch in range(first, epochs):
        started = time.monotonic()
        loop.seed_epoch(run, 2, number, epoch)
        mean = _epoch(network, names, modules, run, epoch, optimiser, (number, groups))
        place = _place(run, (number, groups), epoch)
        line = f"{place}  loss per head {loop.values_text(mean)}"
        saved = partial(progress_of, 2, number, epoch + 1, network, optimiser, {})
        loop.finish_epoch(run, f"{line}  {time.monotonic() - started:.0f} s", network, saved)
    modules.requires_grad_(False).eval()


def _place(run: Run, group: tuple[int, int], epoch: int) -> str:
    number, groups = group
    return f"{run.stages[1]} group {number + 1}/{groups} epoch {epoch + 1}/{run.recipe.epochs[1]}"


def _epoch(
    network: SegmentationNetwork,
    names: Sequence[str],
    heads: nn.ModuleList,
    run: Run,
    epoch: int,
    optimiser: torch.optim.Optimizer,
    group: tuple[int, int],
) -> NDArray[np.float64]:
    """The mean loss of every head of a group; `group` is its number, from 0, and how many there are."""
    sums = np.zeros(len(names))
    points = [network.candidate.head(name).exit_point for name in names]
    steps = run.recipe.epochs[1] * len(run.batches)
    before, all_steps = group[0] * steps, group[1] * steps
    backward = partial(_backward, network, heads, points, run)
    place = _place(run, group, epoch)
    loop.report_progress(run, place, before + epoch * len(run.batches), all_steps)
    for index, pieces in enumerate(run.batches.epoch(run.recipe.epochs[0] + epoch, run.recipe.head_crop(run.input_hw))):
        found = loop.computed(run, 2, epoch, index, pieces, backward)
        step = epoch * len(run.batches) + index
        loop.take_step(optimiser, run, step, steps)
        loop.report_progress(run, place, before + step + 1, all_steps)
        sums += found
    return sums / len(run.batches)


def _backward(
    network: SegmentationNetwork,
    heads: nn.ModuleList,
    points: Sequence[int],
    run: Run,
    pieces: Sequence[Piece],
) -> list[float]:
    """Compute the gradients of a batch; returns its loss at every head. Only one head's activations are in memory."""
    sums = [0.0] * len(heads)
    for frames, targets in loop.pieces_with_targets(run, pieces):
        with torch.no_grad(), run.fabric.autocast():
            features = network.maps(frames)
            teacher = _taught_by(run.teacher or network, frames, None if run.teacher else features)
        size = (targets.labels.shape[1], targets.labels.shape[2])
        taught = losses.distilled(targets, losses.upsampled(teacher.float(), size), run.recipe.distillation)
        for i, (head, point) in enumerate(zip(heads, points, strict=True)):
            with run.fabric.autocast():
                logits = head(features[point - 1])
            loss = losses.loss_of(logits, taught)
            run.fabric.backward(loss)
            sums[i] += loss.item()
    return sums


def _taught_by(
    teacher: SegmentationNetwork, frames: torch.Tensor, features: tuple[torch.Tensor, ...] | None
) -> torch.Tensor:
    """Logits (n, K, h, w) of the teacher's final exit; its maps of these frames may be given."""
    features = features or teacher.maps(frames)
    logits: torch.Tensor = teacher.head_module(teacher.candidate.baseline)(features[-1])
    return logits
