"""Saves the progress of a training: at most one epoch can be lost."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mess_compile import files
from mess_compile.nets.checkpoint import load_state, write_tensors
from mess_compile.runtime.base import decode
from mess_compile.runtime.base.errors import InputError

_REMEDY = "remove the folder `training` in it to start over"

_TENSORS = decode.matches(r"stage\d+-group\d+-epoch\d+[.]safetensors", "the name of a file of tensors")


@dataclass(frozen=True)
class TrainingState:
    """The state of a training: stage, group of heads, finished epochs of it; weights, optimiser state, moving average
    and best weights so far (empty without them) by name.
    """

    stage: int
    group: int
    epoch: int
    weights: dict[str, torch.Tensor]
    optimiser: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _ProgressDocument:
    """The content of `progress.json`; `training` describes the training, which another one must equal."""

    stage: int
    group: int
    epoch: int
    tensors: str = field(metadata=decode.entry(check=_TENSORS))
    training: dict[str, Any]


def progress_of(
    stage: int,
    group: int,
    epoch: int,
    network: nn.Module,
    optimiser: torch.optim.Optimizer | None,
    average: dict[str, torch.Tensor],
    best: dict[str, torch.Tensor] | None = None,
) -> TrainingState:
    """The state of a running training; without an optimiser, before the first epoch of a stage."""
    weights = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    state = optimiser.state_dict()["state"] if optimiser is not None else {}
    tensors = {f"{index}.{key}": value for index, values in state.items() for key, value in values.items()}
    return TrainingState(stage, group, epoch, _copied(weights), _copied(tensors), _copied(average), _copied(best or {}))


def _copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}


def restore_optimiser(optimiser: torch.optim.Optimizer, progress: TrainingState) -> None:
    """Load the saved state, each moment in the memory layout of its parameter: the fused step takes it for granted."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in progress.optimiser.items():
        index, name = key.split(".", 1)
        if value.ndim:
            value = torch.empty_like(parameters[int(index)], requires_grad=False).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def save_progress(folder: Path, progress: TrainingState, described: dict[str, Any]) -> None:
    """Write the tensors under a new name, then make them current by replacing `progress.json`."""
    place = folder / "training"
    place.mkdir(parents=True, exist_ok=True)
    name = f"stage{progress.stage}-group{progress.group}-epoch{progress.epoch}.safetensors"
    tensors = {f"weights.{key}": value for key, value in progress.weights.items()}
    tensors |= {f"optimiser.{key}": value for key, value in progress.optimiser.items()}
    tensors |= {f"average.{key}": value for key, value in progress.average.items()}
    tensors |= {f"best.{key}": value for key, value in progress.best.items()}
    with files.replaced(place / name) as temporary:
        write_tensors(temporary, tensors)
    content = {"stage": progress.stage, "group": progress.group, "epoch": progress.epoch, "tensors": name}
    files.write_json(place / "progress.json", "mess-training", 1, content | {"training": described})
    for old in place.iterdir():
        if old.name not in (name, "progress.json"):
            old.unlink()  # the earlier epoch, or the rest of a killed save


def read_progress(folder: Path, described: dict[str, Any]) -> TrainingState | None:
    """The state that an interrupted training left in `folder`, if any.

    Raises InputError when it belongs to another training, naming the differences, or is damaged.
    """
    path = folder / "training" / "progress.json"
    if not path.exists():
        return None
    content = files.read_json(path, "mess-training", 1, _REMEDY)
    found: _ProgressDocument = files.decode_document(path, _ProgressDocument, content, _REMEDY)
    if _changed(found.training, described):
        raise InputError(
            f"{folder} holds an unfinished training that differs in {_difference(found.training, described)}: {_REMEDY}"
        )
    state = load_state(path.parent / found.tensors)
    return TrainingState(
        found.stage,
        found.group,
        found.epoch,
        _prefixed(state, "weights."),
        _prefixed(state, "optimiser."),
        _prefixed(state, "average."),
        _prefixed(state, "best."),
    )


def _prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def remove_progress(folder: Path) -> None:
    shutil.rmtree(folder / "training")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}".lstrip(".")).items()}
    return {name: list(value) if isinstance(value, tuple) else value}


_CONTENTS = {
    "labels_sha256": "the labels, which were changed since",
    "images_sha256": "the images, which were changed since",
    "image_ids_sha256": "the list of images (image_ids)",
    "imagenet_sha256": "the ImageNet weights",
}
_NEWER = ("labels_sha256", "images_sha256")
"""Keys that earlier releases did not save, and that are unknown before labels are read."""


def _changed(saved: Any, described: dict[str, Any]) -> list[str]:
    """The keys in which a saved training differs from the described one."""
    old, new = _flat(saved), _flat(described)
    unknown = {key for key in _NEWER if key not in old or key not in new}
    return [key for key in sorted((old.keys() | new.keys()) - unknown) if old.get(key) != new.get(key)]


def _difference(saved: Any, described: dict[str, Any]) -> str:
    old, new = _flat(saved), _flat(described)
    return "; ".join(
        _CONTENTS.get(key) or f"{key} ({old.get(key)!r}, now {new.get(key)!r})"
        for key in _changed(saved, described)[:3]
    )
