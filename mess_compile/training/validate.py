"""Measures the mIoU of a network's heads during training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from mess_compile.data.dataset import DataSet, samples
from mess_compile.evaluate.statistics import miou
from mess_compile.nets.network import SegmentationNetwork
from mess_compile.runtime.images import frames
from mess_compile.training.losses import upsampled


@torch.no_grad()
def validate(network: SegmentationNetwork, data: DataSet, names: Sequence[str], fabric: Fabric) -> dict[str, float]:
    """mIoU in percent of each named head, at the frames' own size (docs/definitions.md, mIoU); the network in eval
    mode.

    Every process takes its share of the images; all return the same.
    """
    classes = len(network.candidate.classes)
    confusion = torch.zeros((len(names), classes, classes), dtype=torch.int64, device=fabric.device)
    share = replace(data, items=data.items[fabric.global_rank :: fabric.world_size])
    for sample in samples(share):
        truth = torch.from_numpy(sample.labels).to(fabric.device).long()
        valid = truth < classes
        for index, labels in enumerate(_labels(network, sample.frame, names, fabric.device)):
            guess = frames.resize_labels(labels.byte().cpu().numpy(), (truth.shape[0], truth.shape[1]))
            pairs = truth[valid] * classes + torch.from_numpy(guess).to(fabric.device)[valid]
            confusion[index] += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    if fabric.world_size > 1:
        confusion = fabric.all_reduce(confusion, reduce_op="sum")  # type: ignore[assignment]
    return {name: _miou(matrix) for name, matrix in zip(names, confusion.cpu().numpy(), strict=True)}


def _labels(
    network: SegmentationNetwork, frame: NDArray[np.uint8], names: Sequence[str], device: torch.device
) -> Iterator[torch.Tensor]:
    """The label map (h, w) of every named head at the network's input size."""
    hw = network.candidate.input_hw
    features = network.maps(torch.tensor(frames.resize(frame, hw)[None], device=device))
    for name in names:
        logits = network.head_module(name)(features[network.candidate.head(name).exit_point - 1])
        yield upsampled(logits, hw).argmax(1)[0]


def _miou(confusion: NDArray[np.int64]) -> float:
    diagonal = confusion.diagonal()
    return miou(diagonal, confusion.sum(0), confusion.sum(1))


def miou_line(network: SegmentationNetwork, data: DataSet, names: Sequence[str], fabric: Fabric) -> str:
    """The mIoU of every named head as a line of text."""
    found = validate(network, data, names, fabric)
    return f"mIoU on {data.split}: " + " ".join(f"{name} {value:.1f}" for name, value in found.items())
