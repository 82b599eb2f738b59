"""Runs every head on an image and scores it against the labels, on this machine or on a device over SSH."""

from __future__ import annotations

import zipfile
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Mapping, Optional, Tuple

import numpy as np

from mess_compile.runtime.base import decode
from mess_compile.runtime.base.policy import MORE_ROWS
from mess_compile.runtime.engines.engine import Engine, Library, Tensor
from mess_compile.runtime.images import frames

IGNORED = 255
"""The label of ignored pixels, in a file of images."""
_COUNTABLE = 1 << 31
"""An image has fewer cells and pixels than this."""


@dataclass(frozen=True)
class HeadEngines:
    """Names of a head's engine and of its output graph's, and the exit point that the head reads."""

    engine: str
    exit_point: int
    output: str


@dataclass(frozen=True)
class ScoredExits:
    """The engines, by name, that run on every image.

    `segments` are (from, to, engine) in the order in which they run, 0 being the image; `alone` is the separately
    trained baseline, None without one. Labels have this number of `classes`; heads count `by_class`, or sums.
    """

    input_hw: Tuple[int, int]
    classes: int
    segments: Tuple[Tuple[int, int, str], ...]
    heads: Tuple[HeadEngines, ...]
    alone: Optional[str]
    by_class: bool = field(default=False, metadata=decode.OPTIONAL)

    @property
    def engines(self) -> Tuple[str, ...]:
        """All engines, each once."""
        names = [name for _, _, name in self.segments]
        names += [head.engine for head in self.heads] + [head.output for head in self.heads]
        return tuple(dict.fromkeys(names if self.alone is None else [*names, self.alone]))


@dataclass(frozen=True, eq=False)
class Score:
    """The heads' results on one image: int32 `counts` (heads, T + 2, K), or (heads, T) where gates do not count by
    class, and in pixels, int64, `intersection` and `predicted` (heads, K) and `labelled` (K,). The separately trained
    baseline comes last."""

    counts: np.ndarray
    intersection: np.ndarray
    predicted: np.ndarray
    labelled: np.ndarray


class Scorer:
    """Runs the open engines of some exits."""

    def __init__(
        self, exits: ScoredExits, library: Library, engines: Mapping[str, Engine], thresholds: np.ndarray
    ) -> None:
        self._exits, self._library, self._engines = exits, library, engines
        self._thresholds = library.upload(thresholds)

    def run(self, frame: np.ndarray) -> Iterator[Tuple[Optional[np.ndarray], np.ndarray]]:
        """Yield counts (T + 2, K), or (T,), and labels, at the network's input size, of every head in order.

        The labels of the separately trained baseline come last, without counts. Raises EngineError.
        """
        exits, engines, download = self._exits, self._engines, self._library.download
        image = self._library.upload(frames.resize(frame, exits.input_hw)[None])
        live: Dict[int, Dict[str, Tensor]] = {0: {"image": image}}  # by exit point: what its own path computes
        for a, b, segment in exits.segments:
            live[b] = {**live[a], **_run(engines[segment], live[a])}
        for head in exits.heads:
            outputs = _run(engines[head.engine], {**live[head.exit_point], "thresholds": self._thresholds})
            labels = engines[head.output].run({"logits": outputs["logits"]})["labels"]
            yield download(outputs["counts"]), download(labels)[0]
        if exits.alone is not None:
            yield None, download(engines[exits.alone].run({"image": image})["labels"])[0]

    def score(self, frame: np.ndarray, labels: np.ndarray, known: np.ndarray) -> Score:
        """Score a frame of any size against labels (H, W); only the pixels in `known` count."""
        return score_predictions(self.run(frame), labels, known, self._exits.classes)


def _run(engine: Engine, live: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Run an engine on those of the live tensors that it reads."""
    return engine.run({name: live[name] for name in engine.inputs})


@contextmanager
def open_scorer(
    exits: ScoredExits, paths: Mapping[str, Path], library: Library, thresholds: np.ndarray
) -> Iterator[Scorer]:
    """Open the engines of `exits` from their files; `thresholds` are (T, K). Raises EngineError."""
    with ExitStack() as stack:
        engines = {name: stack.enter_context(closing(library.load(paths[name]))) for name in exits.engines}
        yield Scorer(exits, library, engines, thresholds)


def score_predictions(
    predictions: Iterable[Tuple[Optional[np.ndarray], np.ndarray]], labels: np.ndarray, known: np.ndarray, classes: int
) -> Score:
    """Compare predictions (counts, labels of any size) with `labels`, at their size, in the pixels `known`."""
    truth = labels[known]
    counts, intersection, predicted = [], [], []
    for head_counts, head_labels in predictions:
        found = frames.resize_labels(head_labels, (labels.shape[0], labels.shape[1]))[known]
        if head_counts is not None:
            counts.append(head_counts)
        intersection.append(np.bincount(truth[truth == found], minlength=classes))
        predicted.append(np.bincount(found, minlength=classes))
    labelled = np.bincount(truth, minlength=classes)
    return Score(np.array(counts, np.int32), np.stack(intersection), np.stack(predicted), labelled)


def write_images(path: Path, images: Iterable[Tuple[np.ndarray, np.ndarray]]) -> None:
    """Write frames at the network's input size with labels at their own size, `IGNORED` where they do not count."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as content:  # as numpy's .npz, but image by image
        for index, pair in enumerate(images):
            for name, array in zip(("frame", "labels"), pair):
                with content.open(f"{name}{index}.npy", "w") as entry:
                    np.lib.format.write_array(entry, np.ascontiguousarray(array), allow_pickle=False)


def read_images(path: Path) -> Iterator[Tuple[np.ndarray, np.ndarray]]:
    """Yield the images in a file that `write_images` wrote. Raises OSError."""
    with np.load(str(path), allow_pickle=False) as arrays:
        for index in range(len(arrays.files) // 2):
            yield arrays[f"frame{index}"], arrays[f"labels{index}"]


_SUMS = Tuple[Tuple[int, ...], ...]
_BY_CLASS = Tuple[_SUMS, ...]


@dataclass(frozen=True)
class ScoreMessage:
    """The content of a message with a score: of image number `image` in the file `block`; `counts` are _SUMS or
    _BY_CLASS."""

    block: str
    image: int
    counts: Any
    intersection: Tuple[Tuple[int, ...], ...]
    predicted: Tuple[Tuple[int, ...], ...]
    labelled: Tuple[int, ...]


def score_to_message(block: str, image: int, score: Score) -> Dict[str, Any]:
    """The content of the message with an image's score."""
    arrays = ("counts", "intersection", "predicted", "labelled")
    return {"block": block, "image": image, **{name: getattr(score, name).tolist() for name in arrays}}


def score_from_message(
    content: Any, block: str, image: int, labelled: np.ndarray, exits: ScoredExits, thresholds: int
) -> Score:
    """The score in a message, of the image whose labels have `labelled` (K,) pixels, for that many `thresholds`.

    Raises DecodeError when it is not possible for this image.
    """
    message: ScoreMessage = decode.decode(ScoreMessage, content, "scored")
    counted = (thresholds + MORE_ROWS, exits.classes) if exits.by_class else (thresholds,)
    counts = decode.decode(_BY_CLASS if exits.by_class else _SUMS, message.counts, "scored.counts")
    heads, compared = len(exits.heads), len(exits.heads) + (exits.alone is not None)
    score = Score(
        _numbers("counts", counts, (heads, *counted)).astype(np.int32),
        _numbers("intersection", message.intersection, (compared, exits.classes)),
        _numbers("predicted", message.predicted, (compared, exits.classes)),
        _numbers("labelled", message.labelled, (exits.classes,)),
    )
    if (message.block, message.image) != (block, image):
        raise decode.DecodeError(
            f"scored is for image {message.image} of {message.block[:12]!r}, not {image} of {block[:12]}"
        )
    if not np.array_equal(score.labelled, labelled):
        pixels = tuple(labelled.tolist())
        raise decode.DecodeError(f"scored.labelled is {message.labelled}, but the image has {pixels}")
    if (score.predicted.sum(axis=1) != labelled.sum()).any():
        raise decode.DecodeError("scored.predicted does not add up to the labelled pixels")
    if (score.intersection > np.minimum(score.predicted, labelled)).any():
        raise decode.DecodeError("scored.intersection exceeds scored.predicted or scored.labelled")
    return score


def _numbers(name: str, values: Any, shape: Tuple[int, ...]) -> np.ndarray:
    """Numbers from 0 to the most that an image can have, int64. Raises DecodeError."""
    try:
        array = np.array(values, np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        raise decode.DecodeError(f"scored.{name} is not an array of {shape}: {error}") from error
    array = array.reshape(shape) if not array.size and 0 in shape else array
    if array.shape != shape:
        raise decode.DecodeError(f"scored.{name} is of shape {array.shape}, not {shape}")
    if ((array < 0) | (array >= _COUNTABLE)).any():
        raise decode.DecodeError(f"scored.{name} has numbers from {array.min()} to {array.max()}")
    return array
