"""The step `train`: a candidate network, or the baseline alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mess_compile import extras, launcher
from mess_compile.backbone_names import EFFICIENTNET_LITE0
from mess_compile.data.dataset import Data, DataFolder, DataSet, open_dataset
from mess_compile.network import CandidateNetwork
from mess_compile.planned_step import PlannedStep
from mess_compile.reporter import SILENT, Reporter
from mess_compile.runtime.base.errors import InputError
from mess_compile.workspace import Workspace

if TYPE_CHECKING:
    from mess_compile.nets.network import Architecture
    from mess_compile.training.parallel import Machines
    from mess_compile.training.recipe import Recipe
    from mess_compile.training.train import TrainingJob


@dataclass(frozen=True)
class NetworkChoice:
    """What to train: backbone, input size, where the exits are (a count, or block names), and heads at every early
    exit (configuration names, or `exitN.NAME` for one exit alone)."""

    backbone: str
    input_hw: tuple[int, int]
    exits: int | tuple[str, ...]
    heads: tuple[str, ...]
    output_stride: int = 8
    width: float = 1.0


@dataclass(frozen=True)
class TrainingData:
    """The splits train and val of a data folder, opened before anything heavy is loaded."""

    folder: DataFolder
    images: DataSet
    validation: DataSet


@dataclass(frozen=True)
class TrainOptions:
    """Where a training starts from, and on what it runs.

    `imagenet` are weights of the backbone; `pretrained` takes those that a package brings. `source` is the folder of a
    candidate network that stage 2 alone starts from; `teacher` that of one whose final exit teaches instead of the
    network's own.
    """

    imagenet: Path | None = None
    machines: Machines | None = None
    source: Path | None = None
    teacher: Path | None = None
    pretrained: bool = False


def training_data(workspace: Workspace, data: Data, reporter: Reporter = SILENT) -> TrainingData:
    """Open the splits that a network is trained and validated on, by default read as before in this workspace.

    Warnings name files that are not read. Raises InputError where the folder is no data set, without a wait for
    PyTorch.
    """
    folder = workspace.data_folder(data)
    images = open_dataset(folder, "train")
    validation = open_dataset(folder, "val", images.classes)
    if not launcher.is_child():
        for warning in dict.fromkeys((*images.notes, *validation.notes)):
            reporter.warn(warning)
    return TrainingData(folder, images, validation)


@dataclass(frozen=True)
class _TrainRequest:
    """A training whose data are open, and the folder that its network goes to."""

    data: TrainingData
    choice: NetworkChoice
    recipe: Recipe
    folder: Path
    options: TrainOptions


def _request(
    workspace: Workspace,
    data: Data | TrainingData,
    choice: NetworkChoice,
    recipe: Recipe,
    options: TrainOptions,
    reporter: Reporter,
    baseline: bool,
) -> _TrainRequest:
    """The training of a candidate network, or of the baseline alone for the sum of the epochs. Raises InputError."""
    folder, source = workspace.baseline if baseline else workspace.candidate, options.source
    options = replace(options, imagenet=_imagenet(choice, options))
    if baseline:
        if source is not None or options.teacher is not None:
            raise InputError(
                "a baseline is a single-exit network trained for the sum of the epochs: it has no --from or --teacher"
            )
        choice, recipe = replace(choice, exits=1, heads=()), replace(recipe, epochs=(sum(recipe.epochs), 0))
    elif source is not None and source.resolve() == folder.resolve():
        raise InputError(f"--from {source} is where the result goes: copy or move that folder first")
    return _TrainRequest(_opened(workspace, data, reporter), choice, recipe, folder, options)


def _imagenet(choice: NetworkChoice, options: TrainOptions) -> Path | None:
    """The file of the backbone's ImageNet weights, None without. Raises InputError where two starts are named."""
    starts = {"--weights": options.imagenet, "--from": options.source}
    given = [f"{option} {path}" for option, path in starts.items() if path] + ["--pretrained"] * options.pretrained
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} both say where to start from: drop one of them")
    if not options.pretrained:
        return options.imagenet
    if choice.backbone != EFFICIENTNET_LITE0:
        raise InputError(
            f"--pretrained has weights of {EFFICIENTNET_LITE0}, not of {choice.backbone}: give torchvision's file with "
            "--weights FILE"
        )
    return extras.pretrained_weights()


def _opened(workspace: Workspace, data: Data | TrainingData, reporter: Reporter) -> TrainingData:
    return data if isinstance(data, TrainingData) else training_data(workspace, data, reporter)


def train(
    workspace: Workspace,
    data: Data | TrainingData,
    choice: NetworkChoice,
    recipe: Recipe,
    options: TrainOptions = TrainOptions(),
    reporter: Reporter = SILENT,
) -> CandidateNetwork | None:
    """Train a candidate network on the split train and write it to the workspace; val is looked at on the way.

    Of several processes the first returns the network, the others None.
    """
    request = _request(workspace, data, choice, recipe, options, reporter, baseline=False)
    candidate = _trained(request, reporter)
    if candidate is not None:
        workspace.remember(data=request.data.folder)
    return candidate


def train_baseline(
    workspace: Workspace,
    data: Data | TrainingData,
    choice: NetworkChoice,
    recipe: Recipe,
    options: TrainOptions = TrainOptions(),
    reporter: Reporter = SILENT,
) -> CandidateNetwork | None:
    """Train the single-exit network of `choice` alone, for the epochs of both stages, and write it to `baseline/`.

    `export` puts it beside the candidate network's final exit; plans are compared with the better of the two.
    """
    return _trained(_request(workspace, data, choice, recipe, options, reporter, baseline=True), reporter)


def plan_train(
    workspace: Workspace,
    data: Data | TrainingData,
    choice: NetworkChoice,
    recipe: Recipe,
    options: TrainOptions = TrainOptions(),
    baseline: bool = False,
) -> tuple[PlannedStep, ...]:
    """What `train` would do, or `train_baseline`. Raises InputError where they would."""
    request = _request(workspace, data, choice, recipe, options, SILENT, baseline)
    what, notes = extras.torch_module("training.train").planned(_job(request))
    basis = "the time of a batch is known after the first ones, and shown on the progress line"
    return (PlannedStep("train", what, (str(request.folder), str(workspace.file)), None, basis, notes),)


def _trained(request: _TrainRequest, reporter: Reporter) -> CandidateNetwork | None:
    job = _job(request)
    network: CandidateNetwork | None = extras.torch_module("training.train").train(job, reporter)
    return network


def _job(request: _TrainRequest) -> TrainingJob:
    train, parallel = extras.torch_module("training.train"), extras.torch_module("training.parallel")
    data, options = request.data, request.options
    job: TrainingJob = train.TrainingJob(
        architecture=_architecture(request.choice, data.images),
        data=data.images,
        validation=data.validation,
        folder=request.folder,
        recipe=request.recipe,
        imagenet=options.imagenet,
        machines=options.machines or parallel.Machines(),
        source=options.source,
        teacher=options.teacher,
    )
    return job


def _architecture(choice: NetworkChoice, folder: DataSet) -> Architecture:
    network = extras.torch_module("nets.network")
    exits = choice.exits
    if isinstance(exits, int):
        blocks = network.block_workloads(choice.backbone, choice.input_hw, choice.output_stride, choice.width)
        exits = network.place_exits(blocks, exits)
    architecture: Architecture = network.Architecture(
        backbone=choice.backbone,
        classes=folder.classes.names,
        colours=folder.classes.colours,
        input_hw=choice.input_hw,
        exit_blocks=exits,
        heads=network.with_final_head(network.heads_from_names(choice.heads, len(exits)), len(exits)),
        output_stride=choice.output_stride,
        width=choice.width,
    )
    return architecture
