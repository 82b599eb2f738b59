"""Chooses the precision of every graph: the boldest that still gives the labels of fp32."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

from mess_compile import files
from mess_compile.array_types import Array
from mess_compile.graph.compare import agreement_of, compare, labels_of, loaded, run, thresholds_of, verdict
from mess_compile.graph.precision import CONVERTED, Feed, check_calibration, quantiser, to_fp16, to_int8
from mess_compile.graph.precision_progress import TriedGraph, TriedGraphs
from mess_compile.graph.store import WEIGHTS, read_model, read_whole_model, stored_weights, write_graph
from mess_compile.network import (
    IMAGE,
    OUTPUT_OWN,
    GraphSet,
    GraphSpec,
    head_graph_name,
    segment_name,
    write_graph_set,
)
from mess_compile.reporter import Progress
from mess_compile.runtime.base.errors import EngineError, InputError, MessError
from mess_compile.runtime.engines.engine import PRECISIONS, Library


@dataclass(frozen=True)
class PrecisionRecipe:
    """The precision of every graph of a set; those without convolutions are fp32."""

    name: str
    precisions: dict[str, str]

    def precision(self, graph: str) -> str:
        """Raises InputError for a graph that the recipe does not know."""
        if graph not in self.precisions:
            raise InputError(
                f"recipe {self.name!r} has no precision for graph {graph}: run `evaluate --precision` again"
            )
        return self.precisions[graph]


@dataclass(frozen=True, eq=False)
class PrecisionRequest:
    """The `wanted` precision, and the images that decide.

    `frames` judge the graphs and, for int8, `calibration` from the training images calibrates them: uint8 (H, W, 3) at
    the network's input size. A graph that fails falls back to the next safer precision of `allowed`.
    """

    wanted: str
    frames: Sequence[Array]
    calibration: Sequence[Array] = ()
    allowed: Sequence[str] = PRECISIONS


@dataclass(frozen=True)
class Fallback:
    """A graph that is not in its wanted precision, and what each bolder one failed on."""

    graph: str
    wanted: str
    used: str
    reason: str


def bold_recipe(graph_set: GraphSet, wanted: str) -> PrecisionRecipe:
    """Every graph that has convolutions in the `wanted` precision, but the network's own way from logits to labels.

    Raises InputError for an unknown precision.
    """
    if wanted not in PRECISIONS:
        raise InputError(f"precision {wanted!r} is not one of {', '.join(PRECISIONS)}")
    precisions = {}
    for name in graph_set.graphs:
        nodes = read_model(graph_set.path(name)).graph.node
        converted = name != OUTPUT_OWN and any(node.op_type in CONVERTED[wanted] for node in nodes)
        precisions[name] = wanted if converted else "fp32"
    return PrecisionRecipe(wanted, precisions)


def fallback(recipe: PrecisionRecipe, graph: str, allowed: Sequence[str] = PRECISIONS) -> PrecisionRecipe:
    """The recipe with `graph` in the next safer of the `allowed` precisions; fp32 always is one.

    Raises InputError when the graph is in fp32.
    """
    safer = PRECISIONS[PRECISIONS.index(recipe.precision(graph)) + 1 :]
    if not safer:
        raise InputError(f"graph {graph} of recipe {recipe.name!r} is in fp32: there is no safer precision")
    used = next((precision for precision in safer if precision in allowed), "fp32")
    return replace(recipe, precisions={**recipe.precisions, graph: used})


def choose_precisions(
    graph_set: GraphSet,
    request: PrecisionRequest,
    folder: Path,
    library: Library,
    progress: Progress,
    tried: Path | None = None,
) -> tuple[GraphSet, tuple[Fallback, ...]]:
    """Convert every graph to the wanted precision, or to the next safer allowed one that passes, into `folder`.

    Graphs are taken along the path over all exit points; each gets the maps that the chosen graphs before it give. A
    graph passes when it alone, and the path up to it, preserve enough labels of every head at its exit point (the heads
    in fp32 judge a segment). If the path has lost too much before a graph in fp32, the nearest graph before it is
    lowered, and the path is started again.

    `folder` becomes a graph set of the same names, whose recipe has the folder's name; it is replaced when everything
    has passed. Each graph's result is written to the folder `tried`, if given: an interrupted call continues there, and
    the caller removes it. Raises InputError for bad frames and for a network that is not finite in fp32, EngineError
    when a graph does not run.
    """
    start = bold_recipe(graph_set, request.wanted)
    if request.wanted == "int8":
        quantiser()
        check_calibration(len(request.calibration))
    else:
        request = replace(request, calibration=())
    _check_frames(graph_set, (*request.frames, *request.calibration))
    with files.replaced_folder(folder) as made:
        with TemporaryDirectory(dir=made) as scratch:
            progress(f"checking {request.wanted}", 0, len(graph_set.graphs))
            choice = _Choice(graph_set, start, request.allowed, library, made, Path(scratch), TriedGraphs(tried))
            choice.choose(request.frames, request.calibration, progress)
        _drop_unread_weights(made)
        specs = {
            name: replace(spec, precision=choice.recipe.precision(name), wanted=start.precision(name))
            for name, spec in choice.specs.items()
        }
        found = replace(graph_set, root=made, graphs=specs, recipe=folder.name)
        write_graph_set(found)
    return replace(found, root=folder), tuple(
        Fallback(name, start.precision(name), choice.recipe.precision(name), "; ".join(reasons))
        for name, reasons in choice.reasons.items()
    )


def _check_frames(graph_set: GraphSet, frames: Sequence[Array]) -> None:
    shape = (*graph_set.candidate.input_hw, 3)
    for frame in frames:
        if frame.dtype != np.uint8 or frame.shape != shape:
            raise InputError(
                f"a frame is {frame.dtype} {frame.shape}, but the network takes uint8 {shape}: resize it first"
            )


def _drop_unread_weights(folder: Path) -> None:
    """Remove the weights of precisions that were tried and rejected."""
    read = {weight for path in folder.glob("*.onnx") for weight in stored_weights(path)}
    for weight in set(folder.glob(f"{WEIGHTS}/*")) - read:
        weight.unlink()


@dataclass(frozen=True)
class _Maps:
    """The tensors alive at an exit point, by name: for each frame one file of each."""

    paths: dict[str, tuple[Path, ...]]

    @property
    def frames(self) -> int:
        return len(next(iter(self.paths.values()), ()))

    def only(self, names: Sequence[str]) -> _Maps:
        return _Maps({name: self.paths[name] for name in names})

    def arrays(self) -> Iterator[Feed]:
        return ({name: np.load(paths[frame]) for name, paths in self.paths.items()} for frame in range(self.frames))


_Check = Callable[[Path, str, str], str | None]
"""Takes a converted graph, its precision and the boldest on the path up to it; returns why it fails."""


class _Choice:
    """State of `choose_precisions`: the recipe so far, why it is not bolder, the graphs written.

    At most two engines and one converted graph are in memory, and the tensors of two exit points on disk.
    """

    def __init__(
        self,
        graph_set: GraphSet,
        recipe: PrecisionRecipe,
        allowed: Sequence[str],
        library: Library,
        folder: Path,
        scratch: Path,
        tried_graphs: TriedGraphs,
    ) -> None:
        self.tried_graphs, self.inputs_sha256 = tried_graphs, ""
        self.graph_set, self.recipe, self.allowed = graph_set, recipe, allowed
        self.library, self.folder, self.scratch = library, folder, scratch
        self.reasons: dict[str, tuple[str, ...]] = {}
        self.specs: dict[str, GraphSpec] = {}
        self.labels: dict[str, list[Feed]] = {}
        self.numbers: dict[str, int] = {}  # of tensors, in the names of their files

    def choose(self, frames: Sequence[Array], calibration: Sequence[Array], progress: Progress) -> None:
        self.inputs_sha256 = self._inputs_sha256(frames, calibration)
        judged = self._stored("judged", [IMAGE], ({IMAGE: frame[None]} for frame in frames))
        calibrating = self._stored("calibrating", [IMAGE], ({IMAGE: frame[None]} for frame in calibration))
        self._record_labels(judged)
        while True:
            recipe, reasons = self.recipe, self.reasons
            lowered = self._choose_along_path(judged, calibrating, progress)
            if lowered is None:
                return
            # Other fallbacks happened on worse maps, before this graph was lowered.
            self.recipe = replace(recipe, precisions={**recipe.precisions, lowered: self.recipe.precision(lowered)})
            self.reasons = {**reasons, lowered: self.reasons[lowered]}
            self.specs = {}

    def _inputs_sha256(self, *groups: Sequence[Array]) -> str:
        """A hash of all graphs, images and the library that computes."""
        sources = [(name, spec.sha256) for name, spec in self.graph_set.graphs.items()]
        images = [[hashlib.sha256(frame.tobytes()).hexdigest() for frame in frames] for frames in groups]
        return files.sha256_of_json((sources, images, self.library.name, self.library.version))

    def _record_labels(self, maps: _Maps) -> None:
        """Labels of every head on the path in fp32."""
        for b in range(1, len(self.graph_set.candidate.exit_points) + 1):
            maps = self._advanced(self.graph_set.path(segment_name(b - 1, b)), maps, "exact", b)
            for head in self.graph_set.candidate.heads_at(b):
                self.labels[head.name] = _labels(self._logits(self._head_path(head.name), maps))

    def _choose_along_path(self, judged: _Maps, calibrating: _Maps, progress: Progress) -> str | None:
        """Choose graph after graph; returns a graph that had to be lowered for a later one, None at the end."""
        candidate, images = self.graph_set.candidate, (judged, calibrating)
        before: list[str] = []
        for a in range(len(candidate.exit_points)):
            for b in (b for start, b in candidate.segments() if start == a):
                check: _Check = partial(self._segment_failure, a, b, judged)
                if lowered := self._choose_for_graph(segment_name(a, b), before, calibrating, check, progress):
                    return lowered
            before.append(segment_name(a, a + 1))
            judged = self._advanced(self._written(before[-1]), judged, "judged", a + 1)
            calibrating = self._advanced(self._written(before[-1]), calibrating, "calibrating", a + 1)
            for head in candidate.heads_at(a + 1):
                check = partial(self._head_failure, head.name, judged)
                if lowered := self._choose_for_graph(head_graph_name(head.name), before, calibrating, check, progress):
                    return lowered
        for name in [name for name in self.graph_set.graphs if name not in self.specs]:
            self._choose_for_graph(name, (), images[1], partial(self._baseline_failure, name, images[0]), progress)
        return None

    def _choose_for_graph(
        self, name: str, before: Sequence[str], calibrating: _Maps, check: _Check, progress: Progress
    ) -> str | None:
        """Write a graph in the boldest precision that passes; if none does, lower a graph `before` it and return its
        name.
        """
        while (reason := self._failure(name, before, calibrating, check)) is not None:
            lowered = next(graph for graph in (name, *reversed(before)) if self.recipe.precision(graph) != "fp32")
            finding = f"{self.recipe.precision(lowered)}: {reason if lowered == name else f'{name}: {reason}'}"
            self.reasons = {**self.reasons, lowered: (*self.reasons.get(lowered, ()), finding)}
            self.recipe = fallback(self.recipe, lowered, self.allowed)
            if lowered != name:
                return lowered
        progress(f"{name} in {self.recipe.precision(name)}", len(self.specs), len(self.graph_set.graphs))
        return None

    def _failure(self, name: str, before: Sequence[str], calibrating: _Maps, check: _Check) -> str | None:
        """Convert, write and check a graph; why it must not be used, None if it may."""
        path = [(graph, self.specs[graph].sha256) for graph in before]
        key = files.sha256_of_json((self.inputs_sha256, name, self.recipe.precision(name), path))
        tried = self.tried_graphs.take(key, self.folder)
        if tried is None:
            reason = self._try(name, before, calibrating, check)
            tried = TriedGraph(reason, None if reason else self.specs[name])
            self.tried_graphs.store(key, tried, self.folder)
        if tried.spec is not None:
            self.specs[name] = tried.spec
        return tried.reason

    def _try(self, name: str, before: Sequence[str], calibrating: _Maps, check: _Check) -> str | None:
        precision = self.recipe.precision(name)
        boldest = min((precision, *map(self.recipe.precision, before)), key=PRECISIONS.index)
        model = read_whole_model(self.graph_set.path(name))
        try:
            model = self._converted(model, precision, calibrating)
        except MessError as error:
            return str(error)
        self._write(model, name)
        if boldest == "fp32":
            return None
        try:
            return check(self._written(name), precision, boldest)
        except EngineError as error:  # the fp32 graphs ran before
            return str(error)

    def _write(self, model: onnx.ModelProto, name: str) -> None:
        spec = self.graph_set.spec(name)
        written = write_graph(model, self.folder, name, spec.macs)
        # Weights that int8 dequantises do not count as activations.
        self.specs[name] = replace(written, workspace_bytes=min(written.workspace_bytes, spec.workspace_bytes))

    def _converted(self, model: onnx.ModelProto, precision: str, calibrating: _Maps) -> onnx.ModelProto:
        if precision == "fp16":
            return to_fp16(model)
        names = [value.name for value in model.graph.input]
        feeds = ({name: feed[name] for name in names} for feed in self._feeds(calibrating, names))
        return to_int8(model, feeds) if precision == "int8" else model

    def _segment_failure(self, a: int, b: int, maps: _Maps, path: Path, precision: str, boldest: str) -> str | None:
        exact = self._after(self.graph_set.path(segment_name(a, b)), maps, "exact", b)
        found = self._after(path, maps, "found", b)
        pairs = zip(*(each.only(self._made(segment_name(a, b))).arrays() for each in (exact, found)), strict=True)
        reason = verdict(agreement_of(pairs), precision)
        for head in self.graph_set.candidate.heads_at(b) if reason is None else ():
            outputs = [self._logits(self._head_path(head.name), maps) for maps in (exact, found)]
            reason = reason or self._labels_failure(head.name, outputs[0], outputs[1], precision, boldest)
        return reason

    def _head_failure(self, head: str, maps: _Maps, path: Path, precision: str, boldest: str) -> str | None:
        exact, found = self._logits(self._head_path(head), maps), self._logits(path, maps)
        return self._labels_failure(head, exact, found, precision, boldest)

    def _labels_failure(
        self, head: str, exact: Sequence[Feed], found: Sequence[Feed], precision: str, boldest: str
    ) -> str | None:
        """Why a graph fails alone, with `exact` in fp32 on the same maps, or together with the path up to it."""
        alone = verdict(agreement_of(zip(exact, found, strict=True)), precision)
        if alone is not None:
            return f"{alone} (at {head})"
        path = verdict(agreement_of(zip(self.labels[head], _labels(found), strict=True)), boldest)
        return path and f"{path} (at {head}, together with the graphs before)"

    def _baseline_failure(self, name: str, images: _Maps, path: Path, precision: str, boldest: str) -> str | None:
        return verdict(compare(self.graph_set.path(name), path, images.arrays(), self.library), precision)

    def _written(self, name: str) -> Path:
        return self.folder / self.specs[name].path

    def _head_path(self, head: str) -> Path:
        return self.graph_set.path(head_graph_name(head))

    def _advanced(self, graph: Path, maps: _Maps, place: str, b: int) -> _Maps:
        """What is alive after a segment; removes the files of what is not any more, which take much space."""
        after = self._after(graph, maps, place, b)
        remaining = {IMAGE, *after.paths}
        for path in (path for name, paths in maps.paths.items() if name not in remaining for path in paths):
            path.unlink()
        return after

    def _after(self, graph: Path, maps: _Maps, place: str, b: int) -> _Maps:
        """What is alive at exit point `b`: outputs of a segment that ends there, and what it passes on."""
        live = self.graph_set.candidate.live(b)
        made = self._stored(place, [name for name in live if name not in maps.paths], self._outputs(graph, maps))
        both = {**maps.paths, **made.paths}
        return _Maps({name: both[name] for name in live})

    def _made(self, segment: str) -> list[str]:
        return [tensor.name for tensor in self.graph_set.spec(segment).outputs]

    def _stored(self, place: str, names: Sequence[str], outputs: Iterable[Feed]) -> _Maps:
        paths: dict[str, list[Path]] = {name: [] for name in names}
        for index, found in enumerate(outputs):
            for name in names:
                number = self.numbers.setdefault(name, len(self.numbers))
                paths[name].append(self.scratch / f"{place}-{number}-{index}.npy")
                np.save(paths[name][-1], found[name])
        return _Maps({name: tuple(each) for name, each in paths.items()})

    def _logits(self, graph: Path, maps: _Maps) -> list[Feed]:
        return [{"logits": outputs["logits"]} for outputs in self._outputs(graph, maps)]

    def _outputs(self, graph: Path, maps: _Maps) -> Iterator[Feed]:
        if maps.frames:
            with loaded(self.library, graph) as engine:
                for feed in self._feeds(maps, engine.inputs):
                    yield run(self.library, engine, feed)

    def _feeds(self, maps: _Maps, inputs: Collection[str]) -> Iterator[Feed]:
        """What a graph with these inputs is fed, frame by frame."""
        read = maps.only([name for name in maps.paths if name in inputs])
        return ({**feed, "thresholds": thresholds_of(self.graph_set)} for feed in read.arrays())


def _labels(logits: Sequence[Feed]) -> list[Feed]:
    return [{"labels": labels_of(outputs)} for outputs in logits]
