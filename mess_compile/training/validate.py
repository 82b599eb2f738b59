"""mIoU of a network's heads while it trains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mess_compile.dataset import DataSet, samples
from mess_compile.nets.network import OverprovisionedNetwork, normalise
from mess_compile.runtime import frames
from mess_compile.training.losses import upsampled


@torch.no_grad()
def validate(network: OverprovisionedNetwork, data: DataSet, names: Sequence[str]) -> dict[str, float]:
    """mIoU in percent of each named head, at the frames' own size (DESIGN.md, mIoU); the network in eval mode."""
    classes, hw = len(network.candidate.classes), network.candidate.input_hw
    confusion = {name: np.zeros((classes, classes), np.int64) for name in names}
    for sample in samples(data):
        frame = torch.from_numpy(frames.resize(sample.frame, hw)[None].copy())
        features = network.features(normalise(frame).contiguous(memory_format=torch.channels_last))
        valid = sample.labels < classes
        for name in names:
            logits = network.head_module(name)(features[network.candidate.head(name).exit_point - 1])
            labels = upsampled(logits, hw).argmax(1)[0].numpy().astype(np.uint8)
            labels = frames.resize_labels(labels, (sample.labels.shape[0], sample.labels.shape[1]))
            pairs = sample.labels[valid].astype(np.int64) * classes + labels[valid]
            confusion[name] += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    return {name: _miou(matrix) for name, matrix in confusion.items()}


def _miou(confusion: NDArray[np.int64]) -> float:
    labelled = confusion.sum(1)
    union = labelled + confusion.sum(0) - confusion.diagonal()
    present = labelled > 0
    return float(100 * (confusion.diagonal()[present] / union[present]).mean())


def miou_line(network: OverprovisionedNetwork, data: DataSet, names: Sequence[str]) -> str:
    """The mIoU of every named head, in words."""
    miou = validate(network, data, names)
    return f"mIoU on {data.split}: " + " ".join(f"{name} {value:.1f}" for name, value in miou.items())
