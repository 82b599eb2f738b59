"""Commands around the network: demo, train, export, evaluate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion
from mess_compile.cli.console import print_json, print_next, progress_bar, say
from mess_compile.cli.options import (
    FILE,
    FOLDER,
    HW,
    PRECISION,
    PYTHON,
    data_options,
    dry_run_option,
    json_option,
    picked,
    print_inspection,
    print_prospects,
    size,
)
from mess_compile.data_folder import DataFolder
from mess_compile.runtime.base.errors import InputError

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@click.command(short_help="The whole flow on generated street scenes.")
@click.argument("folder", type=FOLDER, default="demo")
@click.option("--train", is_flag=True, help="Train the network from scratch, instead of the one that is brought.")
def demo(folder: Path, train: bool) -> None:
    """The whole flow on generated street scenes: export, profile, search, bundle, run, bench, report.

    It takes a minute, with a network that mess-compile brings; to train that takes a quarter of an hour more.
    """
    from mess_compile.steps import demo as demonstration

    demonstration.run_demo(folder, click.get_current_context().find_root().command, train)


def _train_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `train` takes beside data and workspace, grouped as in its help: network, schedule, losses, machines."""
    options = (
        click.option(
            "--backbone", type=click.Choice(["mobilenetv2", "resnet50"]), default="mobilenetv2", show_default=True
        ),
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
        click.option("--weights", type=FILE, help="torchvision ImageNet weights (.pth, .safetensors)."),
        click.option("--from", "source", type=FOLDER, help="Start stage 2 from this candidate: --epochs 0 N."),
        click.option("--teacher", type=FOLDER, help="Another candidate, whose final exit teaches in stage 2."),
        click.option("--baseline", is_flag=True, help="Train the single-exit network alone, for as many epochs."),
        click.option(
            "--epochs",
            nargs=2,
            type=int,
            metavar="STAGE1 STAGE2",
            default=(60, 20),
            show_default=True,
            help="Of stage 1 and 2.",
        ),
        click.option("--batch", default=8, show_default=True, help="Images of a step, over all processes."),
        click.option("--learning-rate", default=2e-3, show_default=True),
        click.option("--crop", help="Size of the training crops, such as 240x320; the input size by default."),
        click.option("--full-size-epochs", default=0, show_default=True, help="Last epochs of stage 1, at input size."),
        click.option("--no-augment", is_flag=True, help="Whole frames at input size instead of random crops."),
        click.option(
            "--order",
            type=click.Choice(["round-robin", "joint", "final"]),
            default="round-robin",
            show_default=True,
            help="Exits that a step of stage 1 trains.",
        ),
        click.option("--stage1-head", default="fcn-crm1-b0", show_default=True, help="Early heads of stage 1."),
        click.option("--exit-weight", default=1.0, show_default=True, help="An early exit's loss beside the final's."),
        click.option("--ema", default=0.0, show_default=True, help="Decay per step of a moving average in stage 1."),
        click.option("--lovasz", default=0.0, show_default=True, help="Weight of Lovasz-softmax beside cross-entropy."),
        click.option("--class-power", default=0.5, show_default=True, help="0: all classes weigh alike."),
        click.option(
            "--loss-resolution",
            type=click.Choice(["labels", "cells"]),
            default="labels",
            show_default=True,
            help="Losses at the labels' resolution, or at the head's.",
        ),
        click.option("--distillation", type=click.Choice(["pfd", "kd", "none"]), default="pfd", show_default=True),
        click.option("--alpha", default=0.5, show_default=True, help="Weight of the teacher against the labels."),
        click.option("--temperature", default=1.0, show_default=True, help="Temperature of the teacher."),
        click.option("--head-memory", default=4096, show_default=True, help="MiB for heads that train in one pass."),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
        click.option("--accelerator", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        click.option("--devices", default=1, show_default=True, help="Processes (GPUs) on each machine."),
        click.option("--nodes", default=1, show_default=True, help="Machines; torchrun and SLURM set both themselves."),
        click.option(
            "--threads",
            type=click.IntRange(1),
            help="CPU threads of each process; by default OMP_NUM_THREADS, else its share of the cores.",
        ),
        click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True),
        click.option("--accumulate", default=1, show_default=True, help="Pieces of a batch, one after the other."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(short_help="Train a candidate network in two stages.")
@data_options("CamVid, Cityscapes, VOC, COCO, or a folder of your own.", required=True)
@_train_options
@dry_run_option
@json_option
@click.pass_obj
def train(workspace: Workspace, /, data: DataFolder, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Train a candidate network in two stages; the same command continues an interrupted training."""
    from mess_compile import extras, steps
    from mess_compile.report import inspection

    if options["baseline"] and (options["source"] or options["teacher"]):
        raise InputError("--baseline trains a whole network for the sum of --epochs: it has no --from or --teacher")
    opened = steps.training_data(workspace, data, partial(say, err=as_json))
    choice = steps.NetworkChoice(
        backbone=options["backbone"],
        input_hw=size(options["input_hw"]),
        exits=int(options["exits"]) if options["exits"].isdecimal() else tuple(options["exits"].split(",")),
        heads=tuple(options["heads"].split(",")),
        output_stride=int(options["output_stride"]),
        width=options["width"],
    )
    folder = workspace.baseline if options["baseline"] else workspace.candidate
    with progress_bar(as_json) as progress:  # torch, which is slow to load, is part of what it tells
        recipe = _recipe(extras.torch_module("training.recipe"), options)
        parallel = extras.torch_module("training.parallel")
        machines = parallel.Machines(**picked(options, "accelerator devices nodes precision accumulate threads"))
        if dry_run:
            others = options["baseline"], options["weights"], machines, options["source"], options["teacher"]
            return print_prospects(steps.foresee_train(workspace, opened, choice, recipe, *others), as_json)
        arguments = (workspace, opened, choice, recipe, partial(say, err=as_json), options["weights"], machines)
        if options["baseline"]:
            candidate = steps.train_baseline(*arguments, progress)
        else:
            candidate = steps.train(*arguments, options["source"], options["teacher"], progress)
    if candidate is None:  # one of many processes; the first one speaks
        return None
    if as_json:
        return print_json({"folder": str(folder), **inspection.inspect_candidate(candidate).content})
    say(f"{'baseline' if options['baseline'] else 'candidate network'} in {folder}")
    return print_next("export")


def _recipe(recipes: Any, options: dict[str, Any]) -> Any:
    """The recipe, of the module `recipes`, that the options of `train` describe."""
    return recipes.Recipe(
        crop_hw=size(options["crop"]) if options["crop"] else None,
        augment=not options["no_augment"],
        distillation=recipes.Distillation(options["distillation"], options["alpha"], options["temperature"]),
        head_memory_mib=options["head_memory"],
        **picked(options, "epochs batch learning_rate full_size_epochs order stage1_head exit_weight ema lovasz"),
        **picked(options, "class_power loss_resolution seed"),
    )


@click.command(short_help="Cut a candidate network into checked graphs.")
@click.argument("source", type=click.Path(path_type=Path), required=False)
@click.option("--exits", type=FILE, help="TOML that names another framework's tensors; with MODEL.onnx.")
@click.option("--confidence", type=click.Choice(["top1", "margin", "entropy"]), default="top1", show_default=True)
@click.option("--plain", is_flag=True, help="Leave the edge-aware step (Eq. 2-3) of the gate out.")
@json_option
@click.pass_obj
def export(
    workspace: Workspace, source: Path | None, exits: Path | None, confidence: str, plain: bool, as_json: bool
) -> None:
    """Cut a candidate network (or a multi-exit ONNX) into checked graphs."""
    from mess_compile import steps
    from mess_compile.network import Gate
    from mess_compile.report import inspection

    with progress_bar(as_json) as progress:
        graph_set = steps.export(workspace, source, Gate(confidence, not plain), progress, exits)
    candidate = graph_set.candidate
    if as_json:
        return print_json(inspection.inspect_graphs(graph_set).content)
    weights = sum(path.stat().st_size for path in (workspace.graphs / "weights").glob("*"))
    say(
        f"{len(graph_set.graphs)} graphs in {workspace.graphs}: {len(candidate.segments())} segments, "
        f"{len(candidate.heads)} heads; weights {weights / 2**20:.1f} MiB; all agree with the whole network"
    )
    if graph_set.baseline_alone is not None:
        say(f"{' and '.join(graph_set.baselines)}: plans are held against the better one in mIoU")
    return print_next("profile --device host")


@click.command(short_help="Record how sure and how right every head is.")
@data_options("Labelled images; remembered.")
@click.option(
    "--split", shell_complete=completion.splits, help="val by default; val[:50] takes the first 50 files. Remembered."
)
@click.option(
    "--device", shell_complete=completion.devices, help="Run the engines of this device instead of ONNX Runtime here."
)
@click.option(
    "--host",
    shell_complete=completion.hosts,
    help="Where the device is: ssh://user@host[:port]; the one that it was profiled at by default.",
)
@PYTHON
@PRECISION
@click.option("--accelerator", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--devices", default=1, show_default=True, help="Processes (GPUs) on each machine that share the images.")
@click.option("--nodes", default=1, show_default=True, help="Machines; torchrun and SLURM set both themselves.")
@click.option(
    "--threads", type=click.IntRange(1), help="CPU threads of each process; by default its share of the cores."
)
@dry_run_option
@json_option
@click.pass_obj
def evaluate(
    workspace: Workspace, /, data: DataFolder | None, split: str | None, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Record how sure and how right every head is on labelled images."""
    from mess_compile import steps
    from mess_compile.report import inspection

    if dry_run:
        where = picked(options, "device precision host")
        return print_prospects(steps.foresee_evaluate(workspace, data, split, **where), as_json)
    with progress_bar(as_json) as progress:
        found = steps.evaluate(workspace, data, split, progress, **options, tell=partial(say, err=as_json))
    if found is None:  # one of many processes; the first one speaks
        return None
    described = inspection.inspect_statistics(found)
    if as_json:
        return print_json(described.content)
    print_inspection(described)
    return print_next("search --max-err 1%")
