"""Compares a graph in another precision, or a path of such graphs, with fp32 on real images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

from mess_compile.array_types import Array
from mess_compile.graph.precision import Feed, is_fp16, write_out_roundings
from mess_compile.graph.store import read_model, read_whole_model
from mess_compile.network import GraphSet, head_graph_name, segment_name
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import Engine, Library

LEAST_AGREEMENT = {"int8": 98.0, "fp16": 99.5}
"""Percent of the cells whose label must equal that of fp32; labels decide."""


@dataclass(frozen=True)
class Agreement:
    """Labels and numbers against fp32 on the same inputs.

    `agreeing` of `cells` labels are equal, over all frames; no cells if there is nothing to label. `relative_error` is
    the largest of any frame and floating-point output, ||found - exact|| / ||exact||. `nonfinite` names the outputs
    that contain NaN or infinity.
    """

    frames: int
    cells: int
    agreeing: int
    relative_error: float
    nonfinite: tuple[str, ...]

    @property
    def labels_percent(self) -> float | None:
        return 100 * self.agreeing / self.cells if self.cells else None


def verdict(agreement: Agreement, precision: str) -> str | None:
    """Why a graph of this precision must not be used; None if it may."""
    if agreement.nonfinite:
        return f"NaN or infinity in {', '.join(agreement.nonfinite)}"
    least = LEAST_AGREEMENT.get(precision, 0.0)
    if 100 * agreement.agreeing < least * agreement.cells:
        return f"{agreement.labels_percent:.2f} % of the labels are those of fp32, {precision} needs {least:g} %"
    return None


def compare(reference: Path, candidate: Path, feeds: Iterable[Feed], library: Library) -> Agreement:
    """Run two forms of one graph on the same inputs, one feed per frame.

    Labels are `labels`, or the argmax of `logits`; a segment has none. Raises InputError when there are no feeds or the
    reference itself gives NaN or infinity, EngineError when a graph does not run.
    """
    with loaded(library, reference) as exact, loaded(library, candidate) as found:
        return agreement_of((run(library, exact, feed), run(library, found, feed)) for feed in feeds)


def check_path(
    graph_set: GraphSet, converted: GraphSet, exits: Sequence[int], head: str, frames: Sequence[Array], library: Library
) -> Agreement:
    """Compare labels of `head` at the end of the path over the exit points `exits`, in `converted` and fp32
    `graph_set`.

    This judges segments, which have no labels of their own. Frames are uint8 (H, W, 3) at the network's input size.
    Raises what `compare` does.
    """
    names = [segment_name(a, b) for a, b in pairwise((0, *exits))] + [head_graph_name(head)]
    feeds = [{"image": frame[None], "thresholds": thresholds_of(graph_set)} for frame in frames]
    with ExitStack() as stack:
        exact = [stack.enter_context(loaded(library, graph_set.path(name))) for name in names]
        found = [stack.enter_context(loaded(library, converted.path(name))) for name in names]
        return agreement_of((_run_path(library, exact, feed), _run_path(library, found, feed)) for feed in feeds)


@contextmanager
def loaded(library: Library, path: Path) -> Iterator[Engine]:
    """Load a graph's engine, and close it at the end.

    ONNX Runtime computes fp16 in fp32 on a CPU and rounds only at a Cast: an overflow between two convolutions would go
    unnoticed. It gets a copy with every rounding written out.
    """
    with TemporaryDirectory() as folder:
        if library.name == "onnxruntime" and is_fp16(read_model(path)):
            model = read_whole_model(path)
            write_out_roundings(model)
            path = Path(folder) / path.name
            onnx.save(model, str(path))
        with closing(library.load(path)) as engine:
            yield engine


def run(library: Library, engine: Engine, feed: Feed) -> Feed:
    """Outputs of one graph, which takes its inputs from the feed."""
    outputs = engine.run({name: library.upload(feed[name]) for name in engine.inputs})
    return {name: library.download(tensor).copy() for name, tensor in outputs.items()}


def _run_path(library: Library, engines: Sequence[Engine], feed: Feed) -> Feed:
    """Outputs of the last graph; each takes its inputs from the feed and from the graphs before it."""
    for engine in engines:
        feed = {**feed, **run(library, engine, feed)}
    return {name: feed[name] for name in engines[-1].outputs}


def agreement_of(pairs: Iterable[tuple[Feed, Feed]]) -> Agreement:
    """Compare each frame's exact and found outputs. Raises InputError if there are none or the exact are not finite."""
    frames = cells = agreeing = 0
    error, nonfinite = 0.0, set()
    for exact, found in pairs:
        frames += 1
        for name, wanted in exact.items():
            if wanted.dtype.kind == "f":
                if not np.isfinite(wanted).all():
                    raise InputError(f"{name} contains NaN or infinity even in fp32: train the network again")
                deviation = _relative_error(found[name], wanted)
                error = max(error, deviation)
                nonfinite |= set() if np.isfinite(deviation) else {name}
            if name in ("logits", "labels"):
                same = labels_of(exact) == labels_of(found)
                cells, agreeing = cells + same.size, agreeing + int(same.sum())
    if not frames:
        raise InputError("there are no frames to compare precisions on: give some real images")
    return Agreement(frames, cells, agreeing, error, tuple(sorted(nonfinite)))


def _relative_error(found: Array, exact: Array) -> float:
    """Infinite when a value is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    deviation = float(np.linalg.norm(found.astype(np.float64) - exact))
    return deviation / max(float(np.linalg.norm(exact.astype(np.float64))), 1e-30)


def labels_of(outputs: Feed) -> Array:
    """Labels (1, h, w) of a head, lowest class on ties, or of a graph that gives labels."""
    return outputs["labels"] if "labels" in outputs else outputs["logits"].argmax(axis=1)


def thresholds_of(graph_set: GraphSet) -> Array:
    """The thresholds that feed a gate: (T, K), one row per threshold."""
    rows = np.asarray(graph_set.gate.thresholds, np.float32)
    return np.repeat(rows[:, None], len(graph_set.candidate.classes), axis=1)
