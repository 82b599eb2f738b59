"""The cascade: runs a bundle's plan, stage by stage, and leaves at the first exit that is sure enough."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Dict, Iterator, List, Optional, Tuple, Type, Union

import numpy as np

from mess_compile.runtime.archive import Archive, open_archive
from mess_compile.runtime.engine import LIBRARIES, Engine, Library, Tensor, TensorSpec, open_library
from mess_compile.runtime.engine_cache import loadable
from mess_compile.runtime.errors import BundleError, EngineError, InputError
from mess_compile.runtime.frames import check_frame, resize, resize_labels
from mess_compile.runtime.manifest import Manifest, Plan, Stage


@dataclass(frozen=True)
class Prediction:
    """What the cascade says of one frame.

    `labels` uint8 (H, W) at the frame's own size; `exit` counts the plan's exits from 1 and `exit_point` the
    network's; `confidence` is the share of sure cells at that exit; `latency_ms` runs from upload to download.
    """

    labels: np.ndarray
    exit: int
    exit_point: int
    confidence: float
    latency_ms: float


@dataclass(frozen=True)
class _LoadedStage:
    source: str
    point: str
    segment: Engine
    head: Engine
    output: Engine
    row: int
    cut: Optional[int]
    cells: int


class Cascade:
    """A plan's engines, loaded. Use as a context manager, from one thread at a time; made by `load`."""

    def __init__(self, archive: Archive, plan: Plan, library: Library) -> None:
        self.manifest = archive.manifest
        self.plan = plan
        self.library = library
        self.archive = archive
        self._engines: Dict[str, Engine] = {}
        try:
            for path in plan.graphs():
                graph = loadable(library, archive.folder / path, plan.precisions[path].used)
                self._engines[path] = library.load(graph)
            self._stages = tuple(self._loaded(index) for index in range(len(plan.stages)))
            self._thresholds = library.upload(np.array(self.manifest.gate.thresholds, np.float32))
        except BaseException:
            self.close()
            raise

    def _loaded(self, index: int) -> _LoadedStage:
        stage = self.plan.stages[index]
        source = f"exit{self.plan.stages[index - 1].exit_point}" if index else "image"
        segment, head, output = (self._engines[p] for p in (stage.segment, stage.head_graph, stage.output))
        _check_graphs(stage, source, (segment, head, output), self.manifest)
        point = f"exit{stage.exit_point}"
        return _LoadedStage(source, point, segment, head, output, stage.row, stage.cut, stage.cells)

    def __call__(self, frame: np.ndarray) -> Prediction:
        """Segment one frame: uint8 RGB (H, W, 3), resized when it is not of the network's input size.

        Raises InputError for any other array, EngineError when a graph cannot run.
        """
        image = self._image(frame)
        start = time.perf_counter_ns()
        features = self.library.upload(image)
        last = len(self._stages)
        for number, stage in enumerate(self._stages, 1):
            features, logits, counts = self._advance(stage, features)
            count = int(counts[stage.row])
            if number == last or (stage.cut is not None and count >= stage.cut):
                break
        labels = self._labels(stage, logits)
        return self._prediction(frame, labels, number, count, start)

    def refine(self, frame: np.ndarray, deadline_ms: Optional[float] = None) -> Iterator[Prediction]:
        """Every exit's prediction, the first soonest, whatever their confidence; all stages run but those that would
        begin after `deadline_ms`. Time counts from the first `next`, what the caller does between included.
        """
        image = self._image(frame)
        start = time.perf_counter_ns()
        features = self.library.upload(image)
        for number, stage in enumerate(self._stages, 1):
            late = deadline_ms is not None and time.perf_counter_ns() - start >= deadline_ms * 1e6
            if late and number > 1:
                return
            features, logits, counts = self._advance(stage, features)
            yield self._prediction(frame, self._labels(stage, logits), number, int(counts[stage.row]), start)

    def _image(self, frame: np.ndarray) -> np.ndarray:
        return resize(check_frame(frame), self.manifest.network.input_hw)[None]

    def _advance(self, stage: _LoadedStage, features: Tensor) -> Tuple[Tensor, Tensor, np.ndarray]:
        features = stage.segment.run({stage.source: features})[stage.point]
        gated = stage.head.run({stage.point: features, "thresholds": self._thresholds})
        return features, gated["logits"], self.library.download(gated["counts"])

    def _labels(self, stage: _LoadedStage, logits: Tensor) -> np.ndarray:
        labels: np.ndarray = self.library.download(stage.output.run({"logits": logits})["labels"])[0]
        return labels

    def _prediction(self, frame: np.ndarray, labels: np.ndarray, number: int, count: int, start: int) -> Prediction:
        latency_ms = (time.perf_counter_ns() - start) / 1e6
        stage = self.plan.stages[number - 1]
        labels = resize_labels(labels, frame.shape[:2])
        return Prediction(labels, number, stage.exit_point, count / stage.cells, latency_ms)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self.library.close()
        self.archive.close()

    def __enter__(self) -> Cascade:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()


def load(
    path: Union[str, Path],
    target: Optional[str] = None,
    library: Optional[Library] = None,
    threads: Optional[int] = None,
    cuda_graphs: bool = False,
) -> Cascade:
    """Verify a bundle and load its plan for `target`, or the first plan that this machine has a library for.

    `threads` is for CPU libraries (None: every core), `cuda_graphs` for TensorRT: stages as one launch each; `profile`
    measures without. The cascade closes `library` with itself. Raises InputError,
    BundleError, EngineError.
    """
    archive = open_archive(Path(path))
    try:
        plans = _matching(archive.manifest, target, library)
        if library is not None:
            return Cascade(archive, plans[0], library)
        return Cascade(archive, *_first_that_opens(plans, threads, cuda_graphs))
    except BaseException:
        archive.close()
        raise


def _matching(manifest: Manifest, target: Optional[str], library: Optional[Library]) -> List[Plan]:
    known = LIBRARIES if library is None else (library.name,)
    plans = [p for p in manifest.plans if p.target == target or (target is None and p.library in known)]
    if not plans:
        has = ", ".join(f"{plan.target} ({plan.library})" for plan in manifest.plans)
        wanted = f"the target {target}" if target is not None else f"a library of {', '.join(known)}"
        raise InputError(f"bundle {manifest.name} has no plan for {wanted}; it has {has}")
    return plans


def _first_that_opens(plans: List[Plan], threads: Optional[int], cuda_graphs: bool) -> Tuple[Plan, Library]:
    """Raises EngineError for the last plan when the library of none is here."""
    for plan in plans[:-1]:
        try:
            return plan, open_library(plan.library, threads, cuda_graphs=cuda_graphs)
        except EngineError:
            continue
    return plans[-1], open_library(plans[-1].library, threads, cuda_graphs=cuda_graphs)


def _check_graphs(stage: Stage, source: str, engines: Tuple[Engine, Engine, Engine], manifest: Manifest) -> None:
    """The graphs have the tensors that their place in the plan asks for. Raises BundleError."""
    segment, head, output = engines
    height, width = manifest.network.input_hw
    rows, classes = len(manifest.gate.thresholds), len(manifest.network.classes)
    point = f"exit{stage.exit_point}"
    _expect(stage.segment, segment.inputs, {source: ("uint8", (1, height, width, 3)) if source == "image" else None})
    _expect(stage.segment, segment.outputs, {point: None})
    thresholds = ("float32", (rows, classes))
    _expect(stage.head_graph, head.inputs, {point: _as_pair(segment.outputs[point]), "thresholds": thresholds})
    _expect(stage.head_graph, head.outputs, {"logits": None, "counts": ("int32", (rows,))})
    logits = head.outputs["logits"]
    if logits.shape[:2] != (1, classes) or int(np.prod(logits.shape[2:])) != stage.cells:
        raise BundleError(f"{stage.head_graph} has logits {logits.shape} for {classes} classes, {stage.cells} cells")
    _expect(stage.output, output.inputs, {"logits": _as_pair(logits)})
    _expect(stage.output, output.outputs, {"labels": ("uint8", (1, height, width))})


_Pair = Tuple[str, Tuple[int, ...]]


def _as_pair(spec: TensorSpec) -> _Pair:
    return spec.dtype, spec.shape


def _expect(graph: str, specs: Dict[str, TensorSpec], wanted: Dict[str, Optional[_Pair]]) -> None:
    found = {name: _as_pair(spec) for name, spec in specs.items()}
    if set(found) != set(wanted) or any(pair not in (None, found[name]) for name, pair in wanted.items()):
        raise BundleError(f"graph {graph} of the bundle has the tensors {found}, not {wanted}")
