"""Teaches early heads by the network's own outputs, and by labels where there are some, in one or two stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import nn

from mess_compile import files, launcher
from mess_compile.attach.network import (
    AttachedNetwork,
    FrozenGraph,
    check_trainable,
    open_trainable,
    outputs_of,
    with_early_heads,
)
from mess_compile.data.dataset import DataSet, samples, survey_labels
from mess_compile.nets.checkpoint import load_weights
from mess_compile.nets.network import SegmentationNetwork
from mess_compile.nets.onnx_module import OnnxModule
from mess_compile.network import CandidateNetwork, HeadConfig
from mess_compile.reporter import Reporter
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.images import frames
from mess_compile.training import losses
from mess_compile.training.augment import Batches, Shard
from mess_compile.training.backbone import SAVED, pretrain
from mess_compile.training.heads import train_heads
from mess_compile.training.loop import Run
from mess_compile.training.parallel import Machines, launch, readers
from mess_compile.training.progress import TrainingState, progress_of, read_progress, save_progress
from mess_compile.training.recipe import Recipe
from mess_compile.training.validate import validate

MOST_CHANGED = 0.02
"""The share of held-back pixels that the trained end may label otherwise than the network as it came."""
MOST_LOST_PP = 0.3
"""The points of mIoU that it may lose where there are labels."""
SHARES = (1.0, 0.5, 0.25)
"""How far from the weights that came to the trained ones an epoch's weights may lie, tried in this order: weights
between the two change the network's end less (Wortsman et al. 2022, Robust fine-tuning of zero-shot models).
"""
CHECKED_IMAGES = 2
NETWORK, HEADS = 1, 2
"""The stages of `pretrain` and `train_heads`, here in the other order: heads first, which is cheap."""
_SCORE = "score"
_OTHER = "another attach is running there: wait until it has ended, or use another workspace (-C DIR)"


@dataclass(frozen=True)
class TeachingJob:
    """What to teach: the network in `graph` (whole-network form, one head: its own end) and heads (exit point from 1,
    configuration) on labelled images. `labelled`: the labels are the user's, not the network's own output.

    The heads learn first, then the network's own weights together with them; with 0 epochs these stay frozen. `folder`
    keeps the progress; `source` identifies the network. With `may_freeze`, a network that cannot be trained stays
    frozen, with a warning.
    """

    graph: Path
    candidate: CandidateNetwork
    heads: tuple[tuple[int, HeadConfig], ...]
    data: DataSet
    validation: DataSet
    labelled: bool
    recipe: Recipe
    folder: Path
    source: str
    machines: Machines = field(default_factory=Machines)
    may_freeze: bool = False

    @property
    def frozen(self) -> bool:
        return self.recipe.epochs[0] == 0


@dataclass(frozen=True)
class Taught:
    """The taught network on the CPU, and mIoU in percent of every head on the validation images, the network's own end
    last. `weights` are the network's trained weights by name, empty if they stayed as they were; `changed` is the share
    of the validation pixels that its end labels otherwise.
    """

    network: AttachedNetwork
    miou: dict[str, float]
    weights: dict[str, NDArray[np.float32]]
    changed: float


def teach(job: TeachingJob, reporter: Reporter) -> Taught:
    """Teach the heads; progress is saved after each epoch, and the same call continues it.

    Raises InputError as `train` does, and naming a node that cannot be trained.
    """
    alone = files.used_alone(job.folder, _OTHER) if launcher.is_first() else nullcontext()
    with alone, closing(FrozenGraph(job.graph, outputs_of(job.candidate))) as frozen:
        return _teach(job, frozen, reporter)


def _teach(job: TeachingJob, frozen: FrozenGraph, reporter: Reporter) -> Taught:
    labels = survey_labels(job.data)
    described = _described(job, labels.sha256)
    progress = read_progress(job.folder, described)
    fabric = launch(job.machines)
    run = _run(job, fabric, frozen, labels.pixels, described, reporter)
    torch.manual_seed(job.recipe.seed)
    trainable = None if job.frozen else _trainable(job, reporter)
    network = AttachedNetwork(with_early_heads(job.candidate, job.heads), frozen)
    if progress is None or progress.stage == HEADS:
        _teach_heads(network, run, progress)
        progress = None
    if trainable is not None:
        network = _teach_together(job, run, network, frozen, trainable, progress)
    network.eval().to("cpu")
    miou = validate(network, job.validation, [head.name for head in network.candidate.heads], fabric)
    weights = {} if trainable is None else _changed_weights(trainable, network.backbone)
    return Taught(network, miou, weights, _changed(network, _own_labels(frozen, job), job) if weights else 0.0)


def _teach_heads(network: AttachedNetwork, run: Run, progress: TrainingState | None) -> None:
    """Teach the heads on the network as it came, in place."""
    if progress is None:
        progress = progress_of(HEADS, 0, 0, network, None, {})
        run.save(progress)
    else:
        load_weights(network, progress.weights, SAVED)
        run.reporter.note(f"continuing with the heads after epoch {progress.epoch}")
    train_heads(network, run, progress)


def _trainable(job: TeachingJob, reporter: Reporter) -> OnnxModule | None:
    """The network's graph as a torch module, checked on images. Raises InputError naming a node, unless it may be
    frozen: then None.
    """
    hw, few = job.candidate.input_hw, replace(job.validation, items=job.validation.items[:CHECKED_IMAGES])
    try:
        module = open_trainable(job.graph, job.candidate)
        check_trainable(module, job.graph, np.stack([frames.resize(sample.frame, hw) for sample in samples(few)]))
    except InputError as error:
        if not job.may_freeze:
            raise
        reporter.warn(f"{error}; its weights stay as they came")
        return None
    return module


def _teach_together(
    job: TeachingJob,
    run: Run,
    taught: AttachedNetwork,
    frozen: FrozenGraph,
    came: OnnxModule,
    progress: TrainingState | None,
) -> AttachedNetwork:
    """The network at its best epoch after its own weights have learnt together with the heads of `taught`.

    That is `taught` itself if no epoch made the early exits better and left the network's own end as it was. `came` has
    the weights before.
    """
    network = AttachedNetwork(taught.candidate, open_trainable(job.graph, job.candidate))
    network.heads.load_state_dict(taught.heads.state_dict())
    network.to(run.fabric.device)
    judge = _ExitJudge(job, frozen, run, came.state_dict())
    if progress is None:
        progress = progress_of(NETWORK, 0, 0, network, None, {}, judge.start(network))
        run.save(progress)
    early = len(job.candidate.exit_points) - 1
    recipe = replace(job.recipe, exit_weight=job.recipe.exit_weight * early / len(job.heads))
    best = pretrain(network, replace(run, recipe=recipe), progress, judge)
    load_weights(network, {key: value for key, value in best.items() if key != _SCORE}, "the best epoch")
    if not _changed_weights(came, network.backbone):
        allowed = f"{MOST_LOST_PP} pp of mIoU" if job.labelled else f"{MOST_CHANGED:.0%} of changed pixels"
        run.reporter.note(
            f"no epoch made the early exits better and kept the network's own end within {allowed}: its weights stay "
            "as they came"
        )
    return network


def _changed_weights(before: OnnxModule, after: nn.Module) -> dict[str, NDArray[np.float32]]:
    """The weights by name that differ; tied ones are there once."""
    assert isinstance(after, OnnxModule), "the network's own graph was trained"
    known = before.weights()
    return {name: values for name, values in after.weights().items() if not np.array_equal(values, known[name])}


def _run(
    job: TeachingJob, fabric: Fabric, frozen: FrozenGraph, pixels: Any, described: dict[str, Any], reporter: Reporter
) -> Run:
    recipe, hw = job.recipe, job.candidate.input_hw
    batches = Batches(job.data, hw, recipe, Shard.of(fabric, job.machines.accumulate), readers(fabric, job.machines))
    teacher = AttachedNetwork(job.candidate, frozen)
    return Run(
        fabric=fabric,
        batches=batches,
        weights=losses.class_weights(pixels, recipe.class_power).to(fabric.device),
        recipe=recipe,
        input_hw=hw,
        stride=min(round(hw[0] / point.hw[0]) for point in job.candidate.exit_points[:-1]),
        validation=job.validation,
        teacher=None,
        first_teacher=teacher,
        save=lambda found: save_progress(job.folder, found, described),
        reporter=reporter,
        stages=("network", "heads"),
    )


def _described(job: TeachingJob, labels_sha256: str) -> dict[str, Any]:
    """What identifies the teaching, for a later call to continue it."""
    return {
        "source": job.source,
        "exits": [point.block for point in job.candidate.exit_points],
        "heads": [f"exit{number}.{config.name}" for number, config in job.heads],
        "recipe": asdict(job.recipe),
        "images": len(job.data.items),
        "labels_sha256": labels_sha256,
    }


def _labels_by(module: nn.Module, frame: NDArray[np.uint8], hw: tuple[int, int]) -> NDArray[np.int64]:
    """Labels (H, W) of a frame at the network's input size by the last of the module's outputs."""
    with torch.no_grad():
        logits = module(torch.from_numpy(frame[None].copy()))[-1]
        found: NDArray[np.int64] = losses.upsampled(logits.float(), hw).argmax(1)[0].cpu().numpy()
    return found


def _own_labels(frozen: FrozenGraph, job: TeachingJob) -> tuple[NDArray[np.int64], ...]:
    """Labels (H, W) of every validation image, at the network's input size, by the network as it came."""
    hw = job.candidate.input_hw
    return tuple(_labels_by(frozen, frames.resize(sample.frame, hw), hw) for sample in samples(job.validation))


def _changed(network: AttachedNetwork, own: Sequence[NDArray[np.int64]], job: TeachingJob) -> float:
    """The share of the validation pixels that the network's end labels otherwise than `own`, an array an image."""
    hw = job.candidate.input_hw
    made = (_labels_by(network.backbone, frames.resize(sample.frame, hw), hw) for sample in samples(job.validation))
    return float(np.mean([np.mean(labels != expected) for labels, expected in zip(made, own, strict=True)]))


@contextmanager
def _mixed(module: nn.Module, came: Mapping[str, torch.Tensor], share: float) -> Iterator[None]:
    """The module with its weights at `share` of the way from those that came to its own."""
    if share == 1:
        yield
        return
    trained = {key: value.detach().clone() for key, value in module.state_dict().items()}
    floating = {key: value for key, value in trained.items() if value.is_floating_point()}
    mixed = {key: torch.lerp(came[key].to(value), value, share) for key, value in floating.items()}
    module.load_state_dict({**trained, **mixed})
    try:
        yield
    finally:
        module.load_state_dict(trained)


@dataclass(frozen=True)
class _Verdict:
    """An epoch's weights at one share: mIoU of every exit in percent, changed pixels, and whether both are allowed."""

    share: float
    miou: tuple[float, ...]
    changed: float
    fits: bool

    @property
    def score(self) -> float:
        return float(np.mean(self.miou[:-1] or self.miou))

    def __str__(self) -> str:
        values = " ".join(f"{value:.1f}" for value in self.miou)
        where = "" if self.share == 1 else f" with {self.share:.0%} of the change in weights"
        return f"mIoU{where} {values}, the end changed {self.changed:.1%} of the pixels"


class _ExitJudge:
    """Keeps the weights with the best early exits among those that leave the network's own end as it was."""

    def __init__(self, job: TeachingJob, frozen: FrozenGraph, run: Run, came: Mapping[str, torch.Tensor]) -> None:
        self._job, self._run, self._came = job, run, came
        self._own = _own_labels(frozen, job)
        own, end = AttachedNetwork(job.candidate, frozen), [job.candidate.baseline]
        (self._own_miou,) = validate(own, job.validation, end, run.fabric).values()

    def start(self, network: AttachedNetwork) -> dict[str, torch.Tensor]:
        """The weights to beat: those before the first epoch."""
        verdict = self._verdict(network.eval(), 1.0)
        self._run.reporter.note(f"heads on the network as it came: {verdict}")
        return _scored(network, verdict)

    def __call__(
        self, network: SegmentationNetwork, epoch: int, best: dict[str, torch.Tensor]
    ) -> tuple[str, dict[str, torch.Tensor]]:
        assert isinstance(network, AttachedNetwork)
        for share in SHARES:
            with _mixed(network.backbone, self._came, share):
                verdict = self._verdict(network, share)
                if verdict.fits and verdict.score > float(best[_SCORE]):
                    return f"{verdict}: best epoch so far", _scored(network, verdict)
            if verdict.fits:
                return str(verdict), best
        return f"{verdict}, too many", best

    def _verdict(self, network: AttachedNetwork, share: float) -> _Verdict:
        job, names = self._job, [head.name for head in network.candidate.heads]
        miou = tuple(validate(network, job.validation, names, self._run.fabric).values())
        changed = _changed(network, self._own, job)
        fits = self._own_miou - miou[-1] <= MOST_LOST_PP if job.labelled else changed <= MOST_CHANGED
        return _Verdict(share, miou, changed, fits)


def _scored(network: AttachedNetwork, verdict: _Verdict) -> dict[str, torch.Tensor]:
    state = {key: value.detach().clone() for key, value in network.state_dict().items() if "num_batches" not in key}
    return {**state, _SCORE: torch.tensor(verdict.score)}
