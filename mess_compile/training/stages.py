"""Two-stage training of an overprovisioned network (MESS): exit-aware pre-training, then heads on a frozen backbone."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mess_compile import files
from mess_compile.candidates import HeadConfig
from mess_compile.dataset import DataSet, read_labels
from mess_compile.nets.backbones import load_imagenet
from mess_compile.nets.checkpoint import architecture_to_json, load_state, load_weights, save_candidate
from mess_compile.nets.network import Architecture, OverprovisionedNetwork, normalise, with_final_head
from mess_compile.runtime.errors import InputError
from mess_compile.training import losses
from mess_compile.training.augment import Batches
from mess_compile.training.progress import (
    Progress,
    progress_of,
    read_progress,
    remove_progress,
    restore_optimiser,
    save_progress,
)
from mess_compile.training.validate import miou_line

WARM_UP_SHARE = 0.05
VALIDATE_EVERY = 5
_BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments, fp32
_SAVED = "the saved progress"


@dataclass(frozen=True)
class Recipe:
    """How to train. Epochs of stage 1 and 2; `head_memory_mib` bounds the weights and optimiser state of the heads
    that train in one pass; `seed` fixes weights, order and crops."""

    epochs: tuple[int, int] = (60, 20)
    batch: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    distillation: losses.Distillation = field(default_factory=losses.Distillation)
    head_memory_mib: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs) < 1 or self.batch < 2 or not self.learning_rate > 0 or self.head_memory_mib < 1:
            raise InputError(
                f"epochs {self.epochs} must be positive, batch {self.batch} at least 2, "
                f"learning rate {self.learning_rate} and head memory {self.head_memory_mib} MiB positive"
            )


@dataclass(frozen=True)
class _Run:
    """What both stages share."""

    batches: Batches
    weights: torch.Tensor  # (classes,)
    recipe: Recipe
    validation: DataSet
    report: Callable[[str], None]
    save: Callable[[Progress], None]


def train(
    architecture: Architecture,
    data: DataSet,
    validation: DataSet,
    folder: Path,
    recipe: Recipe,
    report: Callable[[str], None],
    imagenet: Path | None = None,
) -> OverprovisionedNetwork:
    """Train both stages and write the candidate network to `folder`; continues what an earlier call left there.

    Progress is saved after each epoch. Raises InputError when `folder` holds another unfinished training, or when the
    data are too few for one batch.
    """
    torch.manual_seed(recipe.seed)
    described = {
        "architecture": architecture_to_json(architecture),
        "recipe": asdict(recipe),
        "images": len(data.items),
        "image_ids_sha256": hashlib.sha256("\n".join(item.id for item in data.items).encode()).hexdigest(),
        "imagenet_sha256": None if imagenet is None else _sha256_of_weights(imagenet),
    }
    progress = read_progress(folder, described)
    if len(data.items) < 2:
        raise InputError(f"{data.root} has {len(data.items)} training image: BatchNorm needs at least 2 in a batch")
    batches = Batches(data, architecture.input_hw, recipe.batch, recipe.seed)
    weights = losses.class_weights(_histograms(data), len(architecture.classes))
    run = _Run(batches, weights, recipe, validation, report, lambda p: save_progress(folder, p, described))
    report(f"training on {len(data.items)} images, {len(batches)} batches of {batches.batch} per epoch")
    if progress is None or progress.stage == 1:
        bare = _bare_network(architecture, imagenet)
        _pretrain(bare, run, progress)
        progress = progress_of(2, 0, 0, bare, None)
        run.save(progress)
    elif progress.epoch or progress.group:
        report(f"continuing stage 2, group {progress.group + 1}, after epoch {progress.epoch}")
    network = _with_all_heads(architecture, progress)
    _train_heads(network, run, progress)
    report(miou_line(network.eval(), validation, [head.name for head in network.candidate.heads]))
    save_candidate(network, folder)
    remove_progress(folder)
    return network


def _sha256_of_weights(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"weights {path} do not exist")
    return files.sha256_of_file(path)


def _histograms(data: DataSet) -> Iterator[NDArray[np.int64]]:
    for item in data.items:
        yield np.bincount(read_labels(item.label, data.classes).ravel(), minlength=256)


def _bare_architecture(architecture: Architecture) -> Architecture:
    exits = len(architecture.exit_blocks)
    heads = [(number, HeadConfig("fcn")) for number in range(1, exits)]
    return replace(architecture, heads=with_final_head(heads, exits))


def _build(architecture: Architecture) -> OverprovisionedNetwork:
    network = OverprovisionedNetwork(architecture)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _bare_network(architecture: Architecture, imagenet: Path | None) -> OverprovisionedNetwork:
    """Stage 1 trains bare FCN heads, one at every exit point."""
    bare = _build(_bare_architecture(architecture))
    if imagenet is not None:
        load_imagenet(bare.backbone, architecture.backbone, load_state(imagenet))
    return bare


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    warm_up = max(1, int(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _optimiser(parameters: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def _step(optimiser: torch.optim.AdamW, recipe: Recipe, step: int, steps: int) -> None:
    for group in optimiser.param_groups:
        group["lr"] = recipe.learning_rate * _schedule(step, steps)
    optimiser.step()
    optimiser.zero_grad()


def _features(network: OverprovisionedNetwork, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return network.features(normalise(images).contiguous(memory_format=torch.channels_last))


def _pretrain(network: OverprovisionedNetwork, run: _Run, progress: Progress | None) -> None:
    """Stage 1: each iteration trains the final exit and one early exit in turn, CE(y_i) + CE(y_N)."""
    optimiser = _optimiser(list(network.parameters()), run.recipe)
    if progress is not None:
        load_weights(network, progress.weights, _SAVED)
        restore_optimiser(optimiser, progress)
        run.report(f"continuing stage 1 after epoch {progress.epoch}")
    names = [head.name for head in network.candidate.heads]
    epochs = run.recipe.epochs[0]
    for epoch in range(progress.epoch if progress else 0, epochs):
        started = time.monotonic()
        mean = _pretrain_epoch(network.train(), names, run, epoch, optimiser)
        line = f"stage 1 epoch {epoch + 1}/{epochs}  loss per exit {_shown(mean)}"
        if (epoch + 1) % VALIDATE_EVERY == 0 or epoch + 1 == epochs:
            line += "  " + miou_line(network.eval(), run.validation, names)
        run.report(f"{line}  {time.monotonic() - started:.0f} s")
        run.save(progress_of(1, 0, epoch + 1, network, optimiser))


def _pretrain_epoch(
    network: OverprovisionedNetwork, names: Sequence[str], run: _Run, epoch: int, optimiser: torch.optim.AdamW
) -> NDArray[np.float64]:
    """The mean loss of every exit; not a number for one whose turn did not come."""
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    final = len(names) - 1
    for index, (images, labels) in enumerate(run.batches.epoch(epoch)):
        step = epoch * len(run.batches) + index
        trained = [step % final, final] if final else [final]
        features = _features(network, images)
        targets = losses.hard_targets(labels, run.weights)
        parts = [losses.loss_of(network.head_module(names[i])(features[i]), targets) for i in trained]
        torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]
        _step(optimiser, run.recipe, step, run.recipe.epochs[0] * len(run.batches))
        for i, part in zip(trained, parts, strict=True):
            sums[i] += part.item()
            counts[i] += 1
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _shown(values: NDArray[np.float64]) -> str:
    return " ".join("-" if np.isnan(value) else f"{value:.2f}" for value in values)


def _with_all_heads(architecture: Architecture, progress: Progress) -> OverprovisionedNetwork:
    """The whole network with stage 1's weights, or with those that stage 2 had reached."""
    network = _build(architecture)
    if progress.group or progress.epoch:
        load_weights(network, progress.weights, _SAVED)
        return network
    bare = _build(_bare_architecture(architecture))
    load_weights(bare, progress.weights, _SAVED)
    network.backbone.load_state_dict(bare.backbone.state_dict())
    for name in bare.heads.keys() & network.heads.keys():
        network.heads[name].load_state_dict(bare.heads[name].state_dict())
    return network


def head_groups(network: OverprovisionedNetwork, memory_mib: int) -> tuple[tuple[str, ...], ...]:
    """Names of the early heads in groups whose weights and optimiser state fit `memory_mib`, at least one a group."""
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


def _train_heads(network: OverprovisionedNetwork, run: _Run, progress: Progress) -> None:
    """Stage 2: backbone and final exit frozen; heads do not influence each other, so a group trains in one pass."""
    network.eval().requires_grad_(False)
    groups = head_groups(network, run.recipe.head_memory_mib)
    epochs = run.recipe.epochs[1]
    for number, names in enumerate(groups):
        if number < progress.group:
            continue
        modules = nn.ModuleList(network.head_module(name) for name in names)
        modules.requires_grad_(True).train()
        optimiser = _optimiser(list(modules.parameters()), run.recipe)
        first = progress.epoch if number == progress.group else 0
        if first:
            restore_optimiser(optimiser, progress)
        for epoch in range(first, epochs):
            started = time.monotonic()
            mean = _head_epoch(network, names, run, epoch, optimiser)
            run.report(
                f"stage 2 group {number + 1}/{len(groups)} epoch {epoch + 1}/{epochs}  loss per head {_shown(mean)}  "
                f"{time.monotonic() - started:.0f} s"
            )
            run.save(progress_of(2, number, epoch + 1, network, optimiser))
        modules.requires_grad_(False).eval()


def _head_epoch(
    network: OverprovisionedNetwork, names: Sequence[str], run: _Run, epoch: int, optimiser: torch.optim.AdamW
) -> NDArray[np.float64]:
    sums = np.zeros(len(names))
    points = [network.candidate.head(name).exit_point for name in names]
    teacher_head = network.head_module(network.candidate.baseline)
    for index, (images, labels) in enumerate(run.batches.epoch(run.recipe.epochs[0] + epoch)):
        with torch.no_grad():
            features = _features(network, images)
            teacher = losses.upsampled(teacher_head(features[-1]), (labels.shape[1], labels.shape[2]))
            targets = losses.distilled_targets(labels, teacher, run.weights, run.recipe.distillation)
        for i, (name, point) in enumerate(zip(names, points, strict=True)):
            loss = losses.loss_of(network.head_module(name)(features[point - 1]), targets)
            loss.backward()  # type: ignore[no-untyped-call]  # at once: only one head's activations are ever held
            sums[i] += loss.item()
        _step(optimiser, run.recipe, epoch * len(run.batches) + index, run.recipe.epochs[1] * len(run.batches))
    return sums / len(run.batches)
