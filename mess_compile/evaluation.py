"""Exit statistics from labelled images: every head and the baseline trained alone, run and scored once per image."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mess_compile.candidates import (
    BASELINE_ALONE,
    CandidateNetwork,
    GraphSet,
    head_graph_name,
    output_name,
    segment_name,
)
from mess_compile.dataset import ALWAYS_IGNORED, DataSet, Item, samples
from mess_compile.runtime import frames
from mess_compile.runtime.engine import Engine, Library
from mess_compile.runtime.errors import InputError, MessError
from mess_compile.statistics import (
    ExitStatistics,
    Ints,
    check_current,
    merge,
    read_statistics,
    threshold_table,
    write_statistics,
)

Image = NDArray[np.uint8]
BLOCK = 32
"""Images between two savings of `evaluate_data`."""
LabelledImage = tuple[str, str, Image, Image]


def evaluate(
    graph_set: GraphSet,
    library: Library,
    images: Iterable[LabelledImage],
    *,
    device: str,
    split: str,
    ignore: frozenset[int] = frozenset({255}),
    precision: str = "fp32",
    progress: Callable[[int], None] = lambda done: None,
) -> ExitStatistics:
    """Run every head of the candidate network on labelled `images`: (id, group, frame, labels) each.

    The baseline trained alone, where the graph set has one, runs on them too. Frames are uint8 (H, W, 3) of any size,
    labels uint8 (H, W) of the same; label values in `ignore` count nowhere.
    `progress` is told the number of images done. Raises InputError naming the image for labels that are out of range
    or of another size, EngineError when a graph does not run.
    """
    with ExitStack() as stack:
        exits = _Exits(graph_set, library, stack)
        return _evaluated(exits, images, device, split, ignore, precision, progress)


def _evaluated(
    exits: _Exits,
    images: Iterable[LabelledImage],
    device: str,
    split: str,
    ignore: frozenset[int],
    precision: str,
    progress: Callable[[int], None],
) -> ExitStatistics:
    graph_set = exits.graph_set
    candidate = graph_set.candidate
    classes = len(candidate.classes)
    ids: list[str] = []
    groups: list[str] = []
    scores: list[tuple[NDArray[np.int32], Ints, Ints, Ints]] = []
    for image_id, group, frame, labels in images:
        known = _countable(image_id, frame, labels, classes, ignore)
        scores.append(_scored(exits.run(frame), labels, known, classes))
        ids.append(image_id)
        groups.append(group)
        progress(len(ids))
    if not ids:
        raise InputError(f"there are no images to evaluate in split {split!r}")
    counts, intersection, predicted, labelled = zip(*scores, strict=True)
    return ExitStatistics(
        heads=tuple(head.name for head in candidate.heads),
        classes=candidate.classes,
        cells=tuple(_cells(candidate, head.exit_point) for head in candidate.heads),
        thresholds=threshold_table(graph_set.gate, classes),
        counts=np.stack(counts),
        intersection=np.stack(intersection),
        predicted=np.stack(predicted),
        labelled=np.stack(labelled),
        image_id=tuple(ids),
        group=tuple(groups),
        network=candidate.identity,
        gate=graph_set.gate,
        precision=precision,
        device=device,
        library=exits.library.name,
        split=split,
        baseline_alone=graph_set.baseline_alone,
    )


@dataclass(frozen=True)
class Share:
    """Which blocks of images are this process's: every `world`-th from `rank`; `wait` returns when all got there.

    `gpu` is the one of this machine that it has for itself, where there are some.
    """

    rank: int = 0
    world: int = 1
    gpu: int = 0
    wait: Callable[[], None] = lambda: None


def evaluate_data(
    graph_set: GraphSet,
    library: Library,
    data: DataSet,
    folder: Path,
    share: Share,
    *,
    device: str,
    progress: Callable[[int], None],
) -> ExitStatistics | None:
    """Evaluate a data set block by block and write its statistics to `folder`; blocks that a killed run left are kept.

    Several processes share the folder; the first one merges, the others return None. The bytes written do not depend
    on their number. Raises what `evaluate` does.
    """
    parts = folder.with_name(f".{folder.name}.parts-{_fingerprint(data)}")
    blocks = [data.items[start : start + BLOCK] for start in range(0, len(data.items), BLOCK)]
    with ExitStack() as stack:
        exits = _Exits(graph_set, library, stack)
        for index in range(share.rank, len(blocks), share.world):
            if not _is_done(parts / str(index), blocks[index], exits, device):
                block = replace(data, items=blocks[index])
                images = ((s.id, s.group, s.frame, s.labels) for s in samples(block))
                told = partial(_told, progress, index * BLOCK, share)
                found = _evaluated(exits, images, device, data.split, frozenset({ALWAYS_IGNORED}), "fp32", told)
                write_statistics(parts / str(index), found)
    share.wait()
    if share.rank:
        return None
    merged = merge([read_statistics(parts / str(index)) for index in range(len(blocks))])
    write_statistics(folder, merged)
    for left in folder.parent.glob(f".{folder.name}.parts-*"):
        shutil.rmtree(left)
    return merged


def _told(progress: Callable[[int], None], before: int, share: Share, done: int) -> None:
    """The first process speaks for all: the others are as far in the same blocks."""
    if share.rank == 0:
        progress(before + done * share.world)


def _fingerprint(data: DataSet) -> str:
    """Of classes, images and labels: a block of others, or of some changed since, is not taken up again."""
    digest = hashlib.sha256(repr((data.classes.names, sorted(data.classes.ignored))).encode())
    for item in data.items:
        label = item.label_path
        digest.update(item.image.read_bytes() + (label.read_bytes() if label else repr(item.label).encode()))
    return digest.hexdigest()[:16]


def _is_done(part: Path, items: Sequence[Item], exits: _Exits, device: str) -> bool:
    try:
        found = read_statistics(part)
        check_current(found, exits.graph_set)
    except MessError:
        return False
    here = (tuple(item.id for item in items), exits.library.name, device)
    return (found.image_id, found.library, found.device) == here


def _cells(candidate: CandidateNetwork, exit_point: int) -> int:
    height, width = candidate.exit_point(exit_point).hw
    return height * width


class _Exits:
    """The engines of every segment a -> a+1, head and output graph, and of the baseline trained alone."""

    def __init__(self, graph_set: GraphSet, library: Library, stack: ExitStack) -> None:
        def load(name: str) -> Engine:
            return stack.enter_context(closing(library.load(graph_set.path(name))))

        candidate = graph_set.candidate
        self.graph_set, self.library = graph_set, library
        self._thresholds = library.upload(threshold_table(graph_set.gate, len(candidate.classes)))
        self._segments = [load(segment_name(a, a + 1)) for a in range(len(candidate.exit_points))]
        self._heads = {head.name: load(head_graph_name(head.name)) for head in candidate.heads}
        self._outputs = {hw: load(output_name(hw)) for hw in {point.hw for point in candidate.exit_points}}
        self._alone = load(BASELINE_ALONE) if graph_set.baseline_alone is not None else None

    def run(self, frame: Image) -> Iterator[tuple[NDArray[np.int32] | None, Image]]:
        """Yield counts (T,) and labels, at the network's input size, of every head in the network's order.

        The labels of the baseline trained alone come last, without counts.
        """
        candidate, download = self.graph_set.candidate, self.library.download
        tensors = {"image": self.library.upload(frames.resize(frame, candidate.input_hw)[None])}
        name = "image"
        for b, segment in enumerate(self._segments, start=1):
            tensors.update(segment.run({name: tensors[name]}))
            name = f"exit{b}"
        for head in candidate.heads:
            point = f"exit{head.exit_point}"
            made = self._heads[head.name].run({point: tensors[point], "thresholds": self._thresholds})
            output = self._outputs[candidate.exit_point(head.exit_point).hw]
            labels = output.run({"logits": made["logits"]})["labels"]
            yield download(made["counts"]), download(labels)[0]
        if self._alone is not None:
            yield None, download(self._alone.run({"image": tensors["image"]})["labels"])[0]


def _scored(
    guesses: Iterable[tuple[NDArray[np.int32] | None, Image]], labels: Image, known: NDArray[np.bool_], classes: int
) -> tuple[NDArray[np.int32], Ints, Ints, Ints]:
    """Counts (heads, T), intersection and predicted (scored, K), labelled (K,) of one image."""
    truth = labels[known]
    counts, intersection, predicted = [], [], []
    for row, guess in guesses:
        guessed = frames.resize_labels(guess, (labels.shape[0], labels.shape[1]))[known]
        if row is not None:
            counts.append(row)
        intersection.append(np.bincount(truth[truth == guessed], minlength=classes))
        predicted.append(np.bincount(guessed, minlength=classes))
    return np.stack(counts), np.stack(intersection), np.stack(predicted), np.bincount(truth, minlength=classes)


def _countable(image_id: str, frame: Image, labels: Image, classes: int, ignore: frozenset[int]) -> NDArray[np.bool_]:
    """The pixels (H, W) that count. Raises InputError."""
    if labels.shape != frame.shape[:2]:
        raise InputError(f"image {image_id}: labels of shape {labels.shape} do not fit a frame of {frame.shape[:2]}")
    known = ~np.isin(labels, list(ignore))
    highest = int(labels[known].max(initial=0))
    if highest >= classes:
        raise InputError(
            f"image {image_id}: label {highest} is out of range: the network has {classes} classes "
            f"(0 to {classes - 1}), ignored are {', '.join(map(str, sorted(ignore)))}; check the class list"
        )
    return known
