"""Batches of augmented crops, made off the training thread."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mess_compile.dataset import ALWAYS_IGNORED, DataSet, Sample, read_sample

SCALE_RANGE = (0.5, 2.0)
JITTER = 0.25
_CACHED_BYTES = 1 << 30


class Batches:
    """Endless supply of epochs: `epoch(number)` yields (frames (n, h, w, 3), labels (n, h, w)), both uint8 tensors.

    The order and every crop follow from (seed, epoch), so a continued run sees what an unbroken one would have.
    """

    def __init__(self, data: DataSet, hw: tuple[int, int], batch: int, seed: int) -> None:
        self._data, self._hw, self._seed = data, hw, seed
        self.batch = min(batch, len(data.items))
        first = read_sample(data.items[0], data.classes)
        slots = max(1, _CACHED_BYTES // (first.frame.nbytes + first.labels.nbytes))
        self._read = lru_cache(maxsize=slots)(lambda index: read_sample(data.items[index], data.classes))

    def __len__(self) -> int:
        """Batches in an epoch; a smaller rest is left out, since BatchNorm needs more than one image."""
        return len(self._data.items) // self.batch

    def epoch(self, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rng = np.random.default_rng((self._seed, number))
        order = rng.permutation(len(self._data.items))
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting = pool.submit(self._make, order[: self.batch], rng)
            for start in range(self.batch, (len(self) + 1) * self.batch, self.batch):
                ready = waiting.result()
                if start < len(self) * self.batch:
                    waiting = pool.submit(self._make, order[start : start + self.batch], rng)
                yield ready

    def _make(self, indices: NDArray[np.int64], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        crops = [augmented(self._read(int(index)), self._hw, rng) for index in indices]
        frames, labels = zip(*crops, strict=True)
        return torch.from_numpy(np.stack(frames)), torch.from_numpy(np.stack(labels))


def augmented(
    sample: Sample, hw: tuple[int, int], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A random crop of size `hw` at a random scale, flipped at random, colours disturbed; padding is ignored."""
    height, width = hw
    factor = float(np.exp(rng.uniform(*np.log(SCALE_RANGE))))
    scaled = (max(1, round(width * factor)), max(1, round(height * factor)))
    frame = np.asarray(Image.fromarray(sample.frame).resize(scaled, Image.Resampling.BILINEAR))
    labels = np.asarray(Image.fromarray(sample.labels).resize(scaled, Image.Resampling.NEAREST))
    missing = ((0, max(0, height - scaled[1])), (0, max(0, width - scaled[0])))
    frame = np.pad(frame, (*missing, (0, 0)))
    labels = np.pad(labels, missing, constant_values=ALWAYS_IGNORED)
    top = int(rng.integers(labels.shape[0] - height + 1))
    left = int(rng.integers(labels.shape[1] - width + 1))
    frame, labels = frame[top : top + height, left : left + width], labels[top : top + height, left : left + width]
    if rng.random() < 0.5:
        frame, labels = frame[:, ::-1], labels[:, ::-1]
    return _jittered(frame, rng), np.ascontiguousarray(labels)


def _jittered(frame: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    brightness, contrast, saturation = rng.uniform(1 - JITTER, 1 + JITTER, 3).astype(np.float32)
    pixels = frame.astype(np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + saturation * (pixels - grey)
    mean = pixels.mean()
    jittered: NDArray[np.uint8] = np.clip((mean + contrast * (pixels - mean)) * brightness, 0, 255).astype(np.uint8)
    return jittered
