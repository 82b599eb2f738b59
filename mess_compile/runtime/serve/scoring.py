"""Every head on one image and how right it was: the same on this machine as on a device that is far away."""

from __future__ import annotations

import zipfile
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Mapping, Optional, Tuple

import numpy as np

from mess_compile.runtime.base import decode
from mess_compile.runtime.engines.engine import Engine, Library
from mess_compile.runtime.images import frames

IGNORED = 255
"""The label of pixels that count nowhere, in a file of images."""
_COUNTABLE = 1 << 31
"""Cells and pixels of one image are fewer."""


@dataclass(frozen=True)
class HeadEngines:
    """Names of a head's engine and of the output graph behind it, and the exit point that it reads."""

    engine: str
    exit_point: int
    output: str


@dataclass(frozen=True)
class ScoredExits:
    """What runs on every image, engines by their names.

    `segments` are (from, to, engine) in the order in which they run, 0 being the image; `alone` is the baseline trained
    alone, None without one. Labels are of so many `classes`.
    """

    input_hw: Tuple[int, int]
    classes: int
    segments: Tuple[Tuple[int, int, str], ...]
    heads: Tuple[HeadEngines, ...]
    alone: Optional[str]

    @property
    def engines(self) -> Tuple[str, ...]:
        """All of them, once."""
        names = [name for _, _, name in self.segments]
        names += [head.engine for head in self.heads] + [head.output for head in self.heads]
        return tuple(dict.fromkeys(names if self.alone is None else [*names, self.alone]))


@dataclass(frozen=True, eq=False)
class Score:
    """What the heads said of one image, int32 `counts` (heads, T), and what they got right, in pixels, int64:
    `intersection` and `predicted` (scored, K), `labelled` (K,). The baseline trained alone is scored last."""

    counts: np.ndarray
    intersection: np.ndarray
    predicted: np.ndarray
    labelled: np.ndarray


class Scorer:
    """Open engines of some exits."""

    def __init__(
        self, exits: ScoredExits, library: Library, engines: Mapping[str, Engine], thresholds: np.ndarray
    ) -> None:
        self._exits, self._library, self._engines = exits, library, engines
        self._thresholds = library.upload(thresholds)

    def run(self, frame: np.ndarray) -> Iterator[Tuple[Optional[np.ndarray], np.ndarray]]:
        """Yield counts (T,) and labels, at the network's input size, of every head in the network's order.

        The labels of the baseline trained alone come last, without counts. Raises EngineError.
        """
        exits, engines, download = self._exits, self._engines, self._library.download
        tensors = {"image": self._library.upload(frames.resize(frame, exits.input_hw)[None])}
        for a, _, segment in exits.segments:
            name = f"exit{a}" if a else "image"
            tensors.update(engines[segment].run({name: tensors[name]}))
        for head in exits.heads:
            point = f"exit{head.exit_point}"
            made = engines[head.engine].run({point: tensors[point], "thresholds": self._thresholds})
            labels = engines[head.output].run({"logits": made["logits"]})["labels"]
            yield download(made["counts"]), download(labels)[0]
        if exits.alone is not None:
            yield None, download(engines[exits.alone].run({"image": tensors["image"]})["labels"])[0]

    def score(self, frame: np.ndarray, labels: np.ndarray, known: np.ndarray) -> Score:
        """The score of a frame of any size by labels (H, W), of which the pixels in `known` count."""
        return scored(self.run(frame), labels, known, self._exits.classes)


@contextmanager
def open_scorer(
    exits: ScoredExits, paths: Mapping[str, Path], library: Library, thresholds: np.ndarray
) -> Iterator[Scorer]:
    """Open the engines of `exits` from their files; `thresholds` are (T, K). Raises EngineError."""
    with ExitStack() as stack:
        engines = {name: stack.enter_context(closing(library.load(paths[name]))) for name in exits.engines}
        yield Scorer(exits, library, engines, thresholds)


def scored(
    guesses: Iterable[Tuple[Optional[np.ndarray], np.ndarray]], labels: np.ndarray, known: np.ndarray, classes: int
) -> Score:
    """Compare guesses (counts, labels of any size) at the size of `labels`, where `known`."""
    truth = labels[known]
    counts, intersection, predicted = [], [], []
    for row, guess in guesses:
        guessed = frames.resize_labels(guess, (labels.shape[0], labels.shape[1]))[known]
        if row is not None:
            counts.append(row)
        intersection.append(np.bincount(truth[truth == guessed], minlength=classes))
        predicted.append(np.bincount(guessed, minlength=classes))
    labelled = np.bincount(truth, minlength=classes)
    return Score(np.array(counts, np.int32), np.stack(intersection), np.stack(predicted), labelled)


def write_images(path: Path, images: Iterable[Tuple[np.ndarray, np.ndarray]]) -> None:
    """A file of frames at the network's input size with labels at their own, `IGNORED` where they do not count."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as content:  # as numpy's .npz, but image by image
        for index, pair in enumerate(images):
            for name, array in zip(("frame", "labels"), pair):
                with content.open(f"{name}{index}.npy", "w") as entry:
                    np.lib.format.write_array(entry, np.ascontiguousarray(array), allow_pickle=False)


def read_images(path: Path) -> Iterator[Tuple[np.ndarray, np.ndarray]]:
    """What `write_images` wrote, image by image. Raises OSError."""
    with np.load(str(path), allow_pickle=False) as arrays:
        for index in range(len(arrays.files) // 2):
            yield arrays[f"frame{index}"], arrays[f"labels{index}"]


@dataclass(frozen=True)
class Scored:
    """A score as a line says it: of which image of which file."""

    block: str
    image: int
    counts: Tuple[Tuple[int, ...], ...]
    intersection: Tuple[Tuple[int, ...], ...]
    predicted: Tuple[Tuple[int, ...], ...]
    labelled: Tuple[int, ...]


def told(block: str, image: int, score: Score) -> Dict[str, Any]:
    """What a line says of an image."""
    arrays = ("counts", "intersection", "predicted", "labelled")
    return {"block": block, "image": image, **{name: getattr(score, name).tolist() for name in arrays}}


def score_of(content: Any, block: str, image: int, labelled: np.ndarray, exits: ScoredExits, rows: int) -> Score:
    """What a line says of an image, whose labels have `labelled` (K,) pixels; there are `rows` thresholds.

    Raises DecodeError when it cannot be a score of this image.
    """
    said: Scored = decode.decode(Scored, content, "scored")
    heads, compared = len(exits.heads), len(exits.heads) + (exits.alone is not None)
    score = Score(
        _numbers("counts", said.counts, (heads, rows)).astype(np.int32),
        _numbers("intersection", said.intersection, (compared, exits.classes)),
        _numbers("predicted", said.predicted, (compared, exits.classes)),
        _numbers("labelled", said.labelled, (exits.classes,)),
    )
    if (said.block, said.image) != (block, image):
        raise decode.DecodeError(f"scored is of image {said.image} of {said.block[:12]!r}, not {image} of {block[:12]}")
    if not np.array_equal(score.labelled, labelled):
        raise decode.DecodeError(f"scored.labelled is {said.labelled}, but the image has {tuple(labelled.tolist())}")
    if (score.predicted.sum(axis=1) != labelled.sum()).any():
        raise decode.DecodeError("scored.predicted has not a class for each labelled pixel")
    if (score.intersection > np.minimum(score.predicted, labelled)).any():
        raise decode.DecodeError("scored.intersection is larger than what it is an intersection of")
    return score


def _numbers(name: str, values: Any, shape: Tuple[int, ...]) -> np.ndarray:
    """Numbers from 0 to what one image can have, int64. Raises DecodeError."""
    try:
        array = np.array(values, np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        raise decode.DecodeError(f"scored.{name} is no array of {shape}: {error}") from error
    array = array.reshape(shape) if not array.size and 0 in shape else array
    if array.shape != shape:
        raise decode.DecodeError(f"scored.{name} is of shape {array.shape}, not {shape}")
    if ((array < 0) | (array >= _COUNTABLE)).any():
        raise decode.DecodeError(f"scored.{name} has numbers from {array.min()} to {array.max()}")
    return array
