"""The command `attach`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mess_compile.cli.console import print_hint, print_json, print_table, reporting, say
from mess_compile.cli.options import FILE, FOLDER, gathered, json_option, picked, size

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@dataclass(frozen=True)
class AttachArguments:
    """The options of `attach`."""

    images: Path | None
    hold_back: str | None
    data: Path | None
    preprocess: str | None
    exits: int
    exits_at: str | None
    heads: str
    classes: Path | None
    output: str | None
    input_hw: str | None
    epochs: tuple[int, int]
    batch: int
    learning_rate: float
    seed: int
    weights: Path | None
    accelerator: str
    threads: int | None
    as_json: bool


@click.command(short_help="Give a trained single-exit network early exits.")
@click.argument("source")
@click.option("--weights", type=FILE, help="Weights (.pth, .safetensors) for a torch module.")
@click.option("--images", type=FOLDER, help="Folder of images without labels; the network's own output teaches.")
@click.option(
    "--hold-back",
    metavar="REGEX",
    help="Images whose file names match are never taught on, but evaluated; by default a fifth, in whole sequences.",
)
@click.option("--data", type=FOLDER, help="Data set with labels, which teach beside the network's output.")
@click.option(
    "--preprocess",
    metavar="NAME",
    help="How the network wants its input: imagenet, 0-1, -1-1, 0-255, caffe-bgr, or a TOML file with [input]. "
    "By default the one with the best mIoU, if there are labels.",
)
@click.option(
    "--exits", default=5, show_default=True, type=click.IntRange(2), help="Exits, the network's end included."
)
@click.option("--exits-at", metavar="NAME,...", help="Tensors or submodules to attach at, instead of --exits.")
@click.option("--heads", default="sep-crm1-b0,lra-crm1-b0", show_default=True, help="Heads at every early exit.")
@click.option("--classes", type=FILE, help="File with a class name per line, in the order of the network's channels.")
@click.option("--output", metavar="NAME", help="The output with the segmentation, if the network has several.")
@click.option("--input", "input_hw", metavar="HxW", help="Size of the input, if the network's is dynamic.")
@click.option(
    "--epochs",
    nargs=2,
    type=click.IntRange(0),
    metavar="NETWORK HEADS",
    default=(6, 20),
    show_default=True,
    help="Epochs of the network together with its heads, which first learn alone; 0 N leaves the network as it is.",
)
@click.option("--batch", type=click.IntRange(2), default=8, show_default=True, help="Images a step.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, 1, min_open=True),
    default=3e-3,
    show_default=True,
    help="Of new heads; the network's own is 3 % of it.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--accelerator", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads; by default OMP_NUM_THREADS, else all cores.")
@json_option
@click.pass_obj
@gathered(AttachArguments)
def attach(workspace: Workspace, source: str, arguments: AttachArguments) -> None:
    """Find exit points in a trained network, teach early heads there, and write the multi-exit network.

    SOURCE is an ONNX file with one segmentation output, or package.module:factory, a function that returns a torch
    module (--exits-at then names submodules). The network's own end stays its last exit. The same command continues an
    interrupted one.
    """
    from mess_compile import extras, steps

    if sum(arguments.epochs) == 0:
        raise click.UsageError("--epochs 0 0 teaches nothing: give 0 20 to leave the network as it is, or 6 20.")
    if not arguments.learning_rate <= 1:
        raise click.UsageError("--learning-rate is not a number from above 0 to 1, such as 3e-3.")
    source_of = click.get_current_context().get_parameter_source
    with reporting(arguments.as_json) as reporter:
        recipe = _recipe(extras.torch_module("training.recipe"), arguments)
        parallel = extras.torch_module("training.parallel")
        options = steps.AttachOptions(
            preprocess=arguments.preprocess,
            images=arguments.images,
            hold_back=arguments.hold_back,
            data=arguments.data,
            exits=arguments.exits,
            exits_at=_names(arguments.exits_at),
            heads=tuple(arguments.heads.split(",")),
            classes=arguments.classes,
            output=arguments.output,
            input_hw=size(arguments.input_hw) if arguments.input_hw else None,
            may_freeze=source_of("epochs") == ParameterSource.DEFAULT,
            weights=arguments.weights,
            machines=parallel.Machines(**picked(arguments, "accelerator threads")),
        )
        attached = steps.attach(workspace, source, recipe, options, reporter)
    if arguments.as_json:
        return print_json(_content(workspace, attached))
    return _print(workspace, attached)


def _names(exits_at: str | None) -> tuple[str, ...]:
    """The tensors or submodules of --exits-at. Raises UsageError for an empty name."""
    names = () if exits_at is None else tuple(name.strip() for name in exits_at.split(","))
    if "" in names:
        raise click.UsageError("--exits-at names tensors or submodules, such as layer2,layer3: one of these is empty.")
    return names


def _recipe(recipes: Any, arguments: AttachArguments) -> Any:
    return recipes.Recipe(
        epochs=arguments.epochs,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        order="joint",
        exit_weight=0.5,
        distillation=recipes.Distillation("kd"),
        class_power=0.0,
        loss_resolution="cells",
        seed=arguments.seed,
    )


def _content(workspace: Workspace, attached: Any) -> dict[str, Any]:
    return {
        "folder": str(workspace.candidate),
        "exit_points": [
            {"name": point.name, "tensor": point.block, "carried": [tensor.name for tensor in point.carried]}
            for point in attached.candidate.exit_points
        ],
        "miou": attached.miou,
        "truth": attached.truth,
        "images": attached.images,
        "changed": attached.changed,
        "left_out": list(attached.left_out),
    }


def _print(workspace: Workspace, attached: Any) -> None:
    candidate = attached.candidate
    rows = [
        (head.name, candidate.exit_point(head.exit_point).block, f"{attached.miou[head.name]:.1f}")
        for head in candidate.heads
    ]
    say(
        f"multi-exit network in {workspace.candidate}: {len(candidate.exit_points)} exits, {len(candidate.heads)} heads"
    )
    print_table(
        f"mIoU against {attached.truth}, {attached.images} images not taught on", ("head", "at", "mIoU %"), rows
    )
    if attached.changed:
        say(f"the network's own end labels {attached.changed:.1%} of their pixels otherwise than as it came")
    if attached.left_out:
        say(f"left out of mIoU, with less than 0.1 % of the pixels: {', '.join(attached.left_out)}")
    print_hint("export")
