"""Trains an overprovisioned network in two stages (MESS): exit-aware pre-training, then heads on a frozen backbone."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from mess_compile import files, launcher
from mess_compile.data.dataset import DataSet, refuse_untrainable, survey_labels
from mess_compile.nets.backbones import load_imagenet
from mess_compile.nets.checkpoint import (
    architecture_to_json,
    load_candidate,
    load_state,
    load_weights,
    save_candidate,
    set_aside,
)
from mess_compile.nets.network import Architecture, OverprovisionedNetwork, with_final_head
from mess_compile.network import CandidateNetwork, head_config_from_name
from mess_compile.reporter import SILENT, Reporter
from mess_compile.runtime.base.errors import InputError
from mess_compile.training import losses
from mess_compile.training.augment import Batches, Shard
from mess_compile.training.backbone import SAVED, pretrain
from mess_compile.training.heads import head_groups, train_heads
from mess_compile.training.loop import Run
from mess_compile.training.parallel import Machines, launch, lost_process_named, readers, reported_by_first
from mess_compile.training.progress import TrainingState, progress_of, read_progress, remove_progress, save_progress
from mess_compile.training.recipe import Recipe
from mess_compile.training.validate import miou_line

_OTHER = "another training is running there: wait until it has ended, or train in another workspace (-C DIR)"


@dataclass(frozen=True)
class TrainingJob:
    """A training: of which network, on which data, written to which folder.

    `imagenet` is a file of backbone weights to start stage 1 from. `source` is the folder of a candidate network to
    start stage 2 from; stage 1 then has no epochs. `teacher` is the folder of a network whose final exit teaches
    instead of the network's own.
    """

    architecture: Architecture
    data: DataSet
    validation: DataSet
    folder: Path
    recipe: Recipe
    imagenet: Path | None = None
    machines: Machines = field(default_factory=Machines)
    source: Path | None = None
    teacher: Path | None = None


@dataclass(frozen=True)
class _Networks:
    """The networks that a training starts from and learns from, loaded and checked."""

    source: OverprovisionedNetwork | None
    teacher: OverprovisionedNetwork | None


def train(
    options: TrainingJob,
    reporter: Reporter = SILENT,
) -> CandidateNetwork | None:
    """Train both stages and write the candidate network to the folder; continues what an earlier call left there.

    Progress is saved after each epoch. With several processes every one of them calls this; they share the folder, and
    all but the first return None. Raises InputError when the folder holds another unfinished training, `source` has
    another architecture, the data do not suffice, the loss is not a number, memory runs out, a process is gone, or
    another training runs in the folder.
    """
    alone = files.used_alone(options.folder, _OTHER) if launcher.is_first() else nullcontext()
    with alone:
        return _train(options, reporter)


def _train(options: TrainingJob, reporter: Reporter) -> CandidateNetwork | None:
    networks = _loaded(options)
    described = _described(options, networks)
    progress, counts = None, None
    if not launcher.is_child():  # before other processes start, so that an error is reported once
        reporter.progress("read labels", 0, 0)
        surveyed = survey_labels(options.data)
        refuse_untrainable(surveyed)
        described["labels_sha256"], counts = surveyed.sha256, surveyed.pixels
        progress = read_progress(options.folder, described)
        surveyed.report(reporter)
        survey_labels(options.validation).report(reporter)
        reporter.progress("prepare the network", 0, 0)
    fabric = launch(options.machines)
    first = fabric.global_rank == 0
    with lost_process_named(fabric):
        progress, counts = fabric.broadcast((progress, counts))
        assert counts is not None, "the first process has counted"
        run = Run(
            fabric=fabric,
            batches=_batches(options, fabric),
            weights=losses.class_weights(counts, options.recipe.class_power).to(fabric.device),
            recipe=options.recipe,
            input_hw=options.architecture.input_hw,
            stride=options.architecture.output_stride,
            validation=options.validation,
            teacher=networks.teacher.to(fabric.device) if networks.teacher else None,
            first_teacher=None,
            reporter=reporter if first else SILENT,
            save=lambda found: save_progress(options.folder, found, described),
        )
        run.reporter.note(_opening(run, len(options.data.items)))
        network = _trained(options, run, progress, networks.source)
        fabric.barrier()
    return _written(network, options.folder, reporter) if first else None


def _loaded(options: TrainingJob) -> _Networks:
    """Raises InputError for networks that do not fit the architecture."""
    source, teacher = (load_candidate(path) if path else None for path in (options.source, options.teacher))
    _check_stages(options.architecture, options.recipe, source)
    _check_teacher(options.architecture, teacher)
    return _Networks(source, teacher)


def _batches(options: TrainingJob, fabric: Fabric) -> Batches:
    with reported_by_first(fabric):
        shard, workers = Shard.of(fabric, options.machines.accumulate), readers(fabric, options.machines)
        return Batches(options.data, options.architecture.input_hw, options.recipe, shard, workers)


def _written(network: OverprovisionedNetwork, folder: Path, reporter: Reporter) -> CandidateNetwork:
    earlier = set_aside(folder)
    if earlier is not None:
        reporter.note(f"the network that was in {folder} is kept in {earlier}")
    save_candidate(network, folder)
    remove_progress(folder)
    return network.candidate


def planned(options: TrainingJob) -> tuple[str, tuple[str, ...]]:
    """A sentence on what `train` would do, and notes; writes nothing. Raises InputError where `train` would."""
    data, folder, recipe, machines = options.data, options.folder, options.recipe, options.machines
    progress = read_progress(folder, _described(options, _loaded(options)))
    shard = Shard(0, machines.devices * machines.nodes, machines.accumulate)
    steps, batches = (
        len(Batches(data, options.architecture.input_hw, recipe, shard)),
        min(recipe.batch, len(data.items)),
    )
    groups = len(head_groups(_build(options.architecture), recipe.head_memory_mib))
    first, second = recipe.epochs
    what = (
        f"train {options.architecture.backbone} on {len(data.items)} images, validated on "
        f"{len(options.validation.items)}: stage 1, {first} epochs x {steps} batches of {batches}; stage 2, {groups} "
        f"groups of heads x {second} epochs x as many"
    )
    notes: tuple[str, ...] = ()
    if progress is not None:
        notes += (f"it would go on in stage {progress.stage}, after epoch {progress.epoch}",)
    elif (folder / "network.json").exists():
        notes += (f"the network that is in {folder} would be kept beside it, as {folder.name}-N",)
    return what, notes


def _described(options: TrainingJob, networks: _Networks) -> dict[str, Any]:
    """What identifies a training. Machines are no part of it: a training may continue on others."""
    items, imagenet, others = options.data.items, options.imagenet, (networks.source, networks.teacher)
    return {
        "architecture": architecture_to_json(options.architecture),
        "recipe": asdict(options.recipe),
        "images": len(items),
        "image_ids_sha256": hashlib.sha256("\n".join(item.id for item in items).encode()).hexdigest(),
        "images_sha256": hashlib.sha256(repr([item.image.stat().st_size for item in items]).encode()).hexdigest(),
        "imagenet_sha256": None if imagenet is None else _sha256_of_weights(imagenet),
        "source_and_teacher": [None if other is None else other.candidate.identity for other in others],
    }


def _sha256_of_weights(path: Path) -> str:
    load_state(path)  # a damaged file is refused before labels are counted and processes are started
    return files.sha256_of_file(path)


def _opening(run: Run, images: int) -> str:
    fabric, batches = run.fabric, run.batches
    where = f"{fabric.world_size} processes on " if fabric.world_size > 1 else ""
    few = (
        "; fewer than one batch: enough to try the commands, too few to learn from" if images < run.recipe.batch else ""
    )
    return (
        f"training on {images} images, {len(batches)} batches of {batches.batch} per epoch, "
        f"{where}{fabric.device.type}, {fabric.strategy.precision.precision}{few}"
    )


def _trained(
    options: TrainingJob, run: Run, progress: TrainingState | None, source: OverprovisionedNetwork | None
) -> OverprovisionedNetwork:
    recipe = run.recipe
    torch.manual_seed(recipe.seed)
    if source is None:
        source = _bare_network(options.architecture, recipe, options.imagenet)
        if progress is None or progress.stage == 1:
            pretrain(source, run, progress)
            progress = progress_of(2, 0, 0, source, None, {})
            if recipe.epochs[1] and run.fabric.global_rank == 0:
                run.save(progress)
        elif not (progress.group or progress.epoch):
            load_weights(source, progress.weights, SAVED)
    torch.manual_seed(recipe.seed)
    network = _with_all_heads(options.architecture, source)
    progress = progress or progress_of(2, 0, 0, network, None, {})
    if progress.group or progress.epoch:
        run.reporter.note(f"continuing stage 2, group {progress.group + 1}, after epoch {progress.epoch}")
        load_weights(network, progress.weights, SAVED)
    if recipe.epochs[1]:
        train_heads(network, run, progress)
    names = [head.name for head in network.candidate.heads]
    network.to(run.fabric.device)
    run.reporter.note(miou_line(network.eval(), run.validation, names, run.fabric))
    return network


def _bare_architecture(architecture: Architecture, recipe: Recipe) -> Architecture:
    exits = len(architecture.exit_blocks)
    heads = [(number, head_config_from_name(recipe.stage1_head)) for number in range(1, exits)]
    return replace(architecture, heads=with_final_head(heads, exits))


def _bare_network(architecture: Architecture, recipe: Recipe, imagenet: Path | None) -> OverprovisionedNetwork:
    """Stage 1 trains one head at every exit point."""
    bare = _build(_bare_architecture(architecture, recipe))
    if imagenet is not None:
        load_imagenet(bare.backbone, architecture.backbone, load_state(imagenet))
    return bare


def _build(architecture: Architecture) -> OverprovisionedNetwork:
    network = OverprovisionedNetwork(architecture)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _with_all_heads(architecture: Architecture, source: OverprovisionedNetwork) -> OverprovisionedNetwork:
    """The whole network with the backbone of `source`, and those of its heads that it has."""
    network = _build(architecture)
    network.backbone.load_state_dict(source.backbone.state_dict())
    for name in source.heads.keys() & network.heads.keys():
        network.heads[name].load_state_dict(source.heads[name].state_dict())
    return network


def _check_stages(architecture: Architecture, recipe: Recipe, source: OverprovisionedNetwork | None) -> None:
    """Check that nothing stays untrained, and that a given backbone fits the architecture. Raises InputError."""
    if (recipe.epochs[0] == 0) != (source is not None):
        raise InputError(
            f"stage 1 has {recipe.epochs[0]} epochs: 0 requires --from, which names the network whose "
            "backbone is used; without --from, stage 1 must train the backbone"
        )
    known = source.architecture if source else _bare_architecture(architecture, recipe)
    trained = known.heads[-1:] if recipe.order == "final" and not source else known.heads
    untrained = [f"exit{number}.{head.name}" for number, head in architecture.heads if (number, head) not in trained]
    if recipe.epochs[1] == 0 and untrained:
        raise InputError(f"stage 2 has 0 epochs, so nothing would train {untrained[0]}: give it some, or omit the head")
    wanted, found = (architecture_to_json(a) for a in (architecture, known))
    for name in found.keys() - {"heads", "colours"}:
        if wanted[name] != found[name]:
            raise InputError(
                f"--from names a network whose {name} is {found[name]}, but {wanted[name]} is asked for: only heads "
                "may differ"
            )


def _check_teacher(architecture: Architecture, teacher: OverprovisionedNetwork | None) -> None:
    if teacher is not None and teacher.architecture.classes != architecture.classes:
        raise InputError(
            f"the teacher has the classes {', '.join(teacher.architecture.classes)}, but the data "
            f"{', '.join(architecture.classes)}: use a teacher with the same classes"
        )
