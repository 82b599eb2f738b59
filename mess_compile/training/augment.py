"""Makes batches of augmented crops, off the training thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from PIL import Image

from mess_compile.array_types import Pixels
from mess_compile.data.dataset import ALWAYS_IGNORED, DataSet, Sample, read_sample
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.images import frames
from mess_compile.training.recipe import Recipe

SCALE_RANGE = (0.5, 2.0)
JITTER = 0.25
_CACHED_BYTES = 1 << 30


@dataclass(frozen=True)
class Shard:
    """This process's part of every batch: `rank` of `world`, in `accumulate` pieces one after the other."""

    rank: int = 0
    world: int = 1
    accumulate: int = 1

    @staticmethod
    def of(fabric: Fabric, accumulate: int) -> Shard:
        return Shard(fabric.global_rank, fabric.world_size, accumulate)


class Batches:
    """Endless supply of epochs: `epoch(number, hw)` yields lists of (frames (n, h, w, 3), labels (n, h, w)), uint8
    tensors; the pieces of a list together are this process's part of one batch.

    The order and every crop follow from (seed, epoch, place in the epoch), so a continued run sees the same batches as
    an uninterrupted one, and several processes together the same as one; the number of `readers`, the threads that make
    batches, does not matter either.
    """

    def __init__(
        self, data: DataSet, input_hw: tuple[int, int], recipe: Recipe, shard: Shard, readers: int = 1
    ) -> None:
        self._data, self._input_hw, self._shard, self._readers = data, input_hw, shard, readers
        self._seed, self._augment = recipe.seed, recipe.augment
        self.batch = min(recipe.batch, len(data.items))
        pieces = shard.world * shard.accumulate
        if len(data.items) < 2:
            raise InputError(
                f"split {data.split!r} of {data.root} has 1 image, but training takes at least 2 at a time: add images"
            )
        if self.batch % pieces or self.batch // pieces < 2:
            raise InputError(
                f"a batch of {self.batch} images cannot be shared by {shard.world} processes in {shard.accumulate} "
                f"pieces of at least 2 (BatchNorm): choose a multiple of {pieces} from {2 * pieces}"
            )
        first = read_sample(data.items[0], data.classes)
        slots = max(1, _CACHED_BYTES // (first.frame.nbytes + first.labels.nbytes))
        self._read = lru_cache(maxsize=slots)(lambda index: read_sample(data.items[index], data.classes))
        self._order = lru_cache(maxsize=1)(self._order_of)

    def __len__(self) -> int:
        """Batches in an epoch; a smaller rest is dropped, since BatchNorm needs more than one image."""
        return len(self._data.items) // self.batch

    @property
    def at_once(self) -> int:
        """The number of images that this process computes at the same time."""
        return self.batch // (self._shard.world * self._shard.accumulate)

    @property
    def pieces(self) -> int:
        return self._shard.accumulate

    def names(self, number: int, index: int) -> tuple[str, ...]:
        """The images of batch `index` of an epoch."""
        order = self._order(number)[index * self.batch : (index + 1) * self.batch]
        return tuple(self._data.items[int(image)].id for image in order)

    def _order_of(self, number: int) -> NDArray[np.int64]:
        return np.random.default_rng((self._seed, number)).permutation(len(self._data.items))

    def epoch(self, number: int, hw: tuple[int, int]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        indices = iter(range(len(self)))
        with ThreadPoolExecutor(max_workers=self._readers) as pool:
            waiting = deque(pool.submit(self._make, number, index, hw) for index in islice(indices, 2 * self._readers))
            while waiting:
                ready = waiting.popleft().result()
                waiting.extend(pool.submit(self._make, number, index, hw) for index in islice(indices, 1))
                yield ready

    def _make(self, number: int, index: int, hw: tuple[int, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        shard, order = self._shard, self._order(number)
        pieces = []
        for piece in range(shard.accumulate):
            start = index * self.batch + piece * self.batch // shard.accumulate
            places = range(start + shard.rank, start + self.batch // shard.accumulate, shard.world)
            crops = [self._crop(number, place, int(order[place]), hw) for place in places]
            images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*crops, strict=True))
            pieces.append((images, labels))
        return pieces

    def _crop(self, number: int, place: int, image: int, hw: tuple[int, int]) -> tuple[Pixels, Pixels]:
        sample = self._read(image)
        if not self._augment:
            return frames.resize(sample.frame, hw), frames.resize_labels(sample.labels, hw)
        return augmented(sample, self._input_hw, hw, np.random.default_rng((self._seed, number, place)))


def augmented(
    sample: Sample, input_hw: tuple[int, int], hw: tuple[int, int], rng: np.random.Generator
) -> tuple[Pixels, Pixels]:
    """A random crop of size `hw`, flipped at random, colours disturbed, from the sample at a random scale.

    At scale 1 the whole sample has the network's input size. Pixels outside the sample are black and ignored.
    """
    scale = float(np.exp(rng.uniform(*np.log(SCALE_RANGE))))
    rows, top = _span(sample.labels.shape[0], input_hw[0] * scale, hw[0], rng)
    columns, left = _span(sample.labels.shape[1], input_hw[1] * scale, hw[1], rng)
    box, size = (left[0], top[0], left[1], top[1]), (columns, rows)
    frame = np.asarray(Image.fromarray(sample.frame).resize(size, Image.Resampling.BILINEAR, box))
    labels = np.asarray(Image.fromarray(sample.labels).resize(size, Image.Resampling.NEAREST, box))
    frame = _jittered(frame, rng)
    missing = ((0, hw[0] - rows), (0, hw[1] - columns))
    frame = np.pad(frame, (*missing, (0, 0)))
    labels = np.pad(labels, missing, constant_values=ALWAYS_IGNORED)
    if rng.random() < 0.5:
        frame, labels = frame[:, ::-1], labels[:, ::-1]
    return np.ascontiguousarray(frame), np.ascontiguousarray(labels)


def _span(length: int, scaled: float, wanted: int, rng: np.random.Generator) -> tuple[int, tuple[float, float]]:
    """Pixels made along one side, and the part (start, stop) of the sample's `length` pixels that they come from."""
    pixels = max(1, min(wanted, round(scaled)))
    part = min(length, pixels * length / scaled)
    start = float(rng.uniform(0, length - part))
    return pixels, (start, min(float(length), start + part))


def _jittered(frame: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    brightness, contrast, saturation = rng.uniform(1 - JITTER, 1 + JITTER, 3).astype(np.float32)
    pixels = frame.astype(np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + saturation * (pixels - grey)
    mean = pixels.mean()
    jittered: NDArray[np.uint8] = np.clip((mean + contrast * (pixels - mean)) * brightness, 0, 255).astype(np.uint8)
    return jittered
