"""Exit statistics from labelled images: every head and the baseline trained alone, run and scored once per image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing

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
from mess_compile.runtime import frames
from mess_compile.runtime.engine import Engine, Library
from mess_compile.runtime.errors import InputError
from mess_compile.statistics import ExitStatistics, Ints, threshold_table

Image = NDArray[np.uint8]
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
    candidate = graph_set.candidate
    classes = len(candidate.classes)
    ids: list[str] = []
    groups: list[str] = []
    scores: list[tuple[NDArray[np.int32], Ints, Ints, Ints]] = []
    with ExitStack() as stack:
        exits = _Exits(graph_set, library, stack)
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
        library=library.name,
        split=split,
        baseline_alone=graph_set.baseline_alone,
    )


def _cells(candidate: CandidateNetwork, exit_point: int) -> int:
    height, width = candidate.exit_point(exit_point).hw
    return height * width


class _Exits:
    """The engines of every segment a -> a+1, head and output graph, and of the baseline trained alone."""

    def __init__(self, graph_set: GraphSet, library: Library, stack: ExitStack) -> None:
        def load(name: str) -> Engine:
            return stack.enter_context(closing(library.load(graph_set.path(name))))

        candidate = graph_set.candidate
        self._candidate = candidate
        self._library = library
        self._thresholds = library.upload(threshold_table(graph_set.gate, len(candidate.classes)))
        self._segments = [load(segment_name(a, a + 1)) for a in range(len(candidate.exit_points))]
        self._heads = {head.name: load(head_graph_name(head.name)) for head in candidate.heads}
        self._outputs = {hw: load(output_name(hw)) for hw in {point.hw for point in candidate.exit_points}}
        self._alone = load(BASELINE_ALONE) if graph_set.baseline_alone is not None else None

    def run(self, frame: Image) -> Iterator[tuple[NDArray[np.int32] | None, Image]]:
        """Yield counts (T,) and labels, at the network's input size, of every head in the network's order.

        The labels of the baseline trained alone come last, without counts.
        """
        candidate, download = self._candidate, self._library.download
        tensors = {"image": self._library.upload(frames.resize(frame, candidate.input_hw)[None])}
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
