"""Two-stage training of an overprovisioned network (MESS): exit-aware pre-training, then heads on a frozen backbone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mess_compile import files
from mess_compile.candidates import CandidateNetwork, head_config_from_name
from mess_compile.dataset import DataSet, check_trainable
from mess_compile.nets.backbones import load_imagenet
from mess_compile.nets.checkpoint import architecture_to_json, load_state, load_weights, save_candidate
from mess_compile.nets.network import Architecture, OverprovisionedNetwork, with_final_head
from mess_compile.runtime.errors import InputError
from mess_compile.training import losses
from mess_compile.training.augment import Batches, Shard
from mess_compile.training.distilling import train_heads
from mess_compile.training.loop import Run
from mess_compile.training.parallel import Machines, launch, lost_process_named
from mess_compile.training.pretraining import SAVED, pretrain
from mess_compile.training.progress import Progress, progress_of, read_progress, remove_progress, save_progress
from mess_compile.training.recipe import Recipe
from mess_compile.training.validate import miou_line


def train(
    architecture: Architecture,
    data: DataSet,
    validation: DataSet,
    folder: Path,
    recipe: Recipe,
    report: Callable[[str], None],
    imagenet: Path | None = None,
    machines: Machines | None = None,
) -> CandidateNetwork | None:
    """Train both stages and write the candidate network to `folder`; continues what an earlier call left there.

    Progress is saved after each epoch. With several processes every one of them calls this; they share the folder, and
    all but the first return None. Without early heads stage 1 is all there is. Raises InputError when `folder` holds
    another unfinished training, the data do not suffice, the loss is not a number, memory runs out, or a process is
    gone.
    """
    machines = machines or Machines()
    fabric = launch(machines)
    first = fabric.global_rank == 0
    described = _described(architecture, data, recipe, imagenet)
    progress = read_progress(folder, described)
    shard = Shard(fabric.global_rank, fabric.world_size, machines.accumulate)
    batches = Batches(data, architecture.input_hw, recipe.batch, recipe.seed, recipe.augment, shard)
    run = Run(
        fabric=fabric,
        batches=batches,
        weights=losses.class_weights(check_trainable(data), recipe.class_power).to(fabric.device),
        recipe=recipe,
        input_hw=architecture.input_hw,
        stride=architecture.output_stride,
        validation=validation,
        report=report if first else lambda line: None,
        save=(lambda p: save_progress(folder, p, described)) if first else lambda p: None,
    )
    with lost_process_named(fabric, "run the same command again, it continues after the last finished epoch"):
        run.report(_opening(run, len(data.items)))
        network = _trained(architecture, run, progress, imagenet)
        fabric.barrier()
    if not first:
        return None
    save_candidate(network, folder)
    remove_progress(folder)
    return network.candidate


def _described(architecture: Architecture, data: DataSet, recipe: Recipe, imagenet: Path | None) -> dict[str, Any]:
    """What makes a training this one and no other. Machines are no part of it: it may continue on others."""
    return {
        "architecture": architecture_to_json(architecture),
        "recipe": asdict(recipe),
        "images": len(data.items),
        "image_ids_sha256": hashlib.sha256("\n".join(item.id for item in data.items).encode()).hexdigest(),
        "imagenet_sha256": None if imagenet is None else _sha256_of_weights(imagenet),
    }


def _sha256_of_weights(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"weights {path} do not exist")
    return files.sha256_of_file(path)


def _opening(run: Run, images: int) -> str:
    fabric, batches = run.fabric, run.batches
    where = f"{fabric.world_size} processes on " if fabric.world_size > 1 else ""
    return (
        f"training on {images} images, {len(batches)} batches of {batches.batch} per epoch, "
        f"{where}{fabric.device.type}, {fabric.strategy.precision.precision}"
    )


def _trained(
    architecture: Architecture, run: Run, progress: Progress | None, imagenet: Path | None
) -> OverprovisionedNetwork:
    early = len(architecture.heads) > 1
    if progress is None or progress.stage == 1:
        torch.manual_seed(run.recipe.seed)
        bare = _bare_network(architecture, run.recipe, imagenet)
        pretrain(bare, run, progress)
        if not early:
            return bare
        progress = progress_of(2, 0, 0, bare, None, {})
        run.save(progress)
    elif progress.epoch or progress.group:
        run.report(f"continuing stage 2, group {progress.group + 1}, after epoch {progress.epoch}")
    torch.manual_seed(run.recipe.seed)
    network = _with_all_heads(architecture, run.recipe, progress)
    train_heads(network, run, progress)
    names = [head.name for head in network.candidate.heads]
    run.report(miou_line(network.eval(), run.validation, names, run.fabric))
    return network


def _bare_architecture(architecture: Architecture, recipe: Recipe) -> Architecture:
    exits = len(architecture.exit_blocks)
    heads = [(number, head_config_from_name(recipe.stage1_head)) for number in range(1, exits)]
    return replace(architecture, heads=with_final_head(heads, exits))


def _build(architecture: Architecture) -> OverprovisionedNetwork:
    network = OverprovisionedNetwork(architecture)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _bare_network(architecture: Architecture, recipe: Recipe, imagenet: Path | None) -> OverprovisionedNetwork:
    """Stage 1 trains one head at every exit point."""
    bare = _build(_bare_architecture(architecture, recipe))
    if imagenet is not None:
        load_imagenet(bare.backbone, architecture.backbone, load_state(imagenet))
    return bare


def _with_all_heads(architecture: Architecture, recipe: Recipe, progress: Progress) -> OverprovisionedNetwork:
    """The whole network with stage 1's weights, or with those that stage 2 had reached."""
    network = _build(architecture)
    if progress.group or progress.epoch:
        load_weights(network, progress.weights, SAVED)
        return network
    bare = _build(_bare_architecture(architecture, recipe))
    load_weights(bare, progress.weights, SAVED)
    network.backbone.load_state_dict(bare.backbone.state_dict())
    for name in bare.heads.keys() & network.heads.keys():
        network.heads[name].load_state_dict(bare.heads[name].state_dict())
    return network
