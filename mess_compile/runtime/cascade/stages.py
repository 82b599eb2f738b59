"""Runs a plan's stages in one engine library, one stage at a time on one frame."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Optional, Tuple

import numpy as np

from mess_compile.runtime.base.errors import BundleError, NotFiniteError
from mess_compile.runtime.bundle.manifest import BundlePlan, BundleStage, Manifest
from mess_compile.runtime.engines.engine import Engine, Library, Tensor, TensorSpec
from mess_compile.runtime.engines.engine_cache import loadable

_BELOW_ALL = -1.0
"""A threshold that every confidence reaches unless it is NaN."""
_SOUND = "sound"
"""The output of a whole network that counts its cells with finite logits; it has no gate."""
_NO_COUNTS = np.zeros(0, np.int32)


@dataclass(frozen=True)
class _LoadedStage:
    name: str
    source: str
    point: str
    segment: Engine
    head: Optional[Engine]
    output: Optional[Engine]
    cells: int


class Stages:
    """Engines for every graph of `plan`; `close` leaves the library open.

    A row of thresholds that no operating point uses is set so low that every cell reaches it: if its count misses a
    cell, the logits hold NaN or infinities. This detects them at no cost, but for a few scattered cells: at edges the
    gate takes the majority of 5 x 5. A whole network has no gate, and counts such cells itself.
    """

    def __init__(self, manifest: Manifest, plan: BundlePlan, library: Library, folder: Path) -> None:
        self.library = library
        self._engines: Dict[str, Engine] = {}
        try:
            for path in plan.graphs():
                self._engines[path] = library.load(loadable(library, folder / path, plan.precisions[path].used))
            self._stages = tuple(self._loaded(index, manifest, plan) for index in range(len(plan.stages)))
            thresholds = np.array(manifest.gate.thresholds, np.float32)
            self._guard = _unused_row(plan, len(thresholds))
            if self._guard is not None:
                thresholds[self._guard] = _BELOW_ALL
            self._thresholds = library.upload(thresholds)
        except BaseException:
            self.close()
            raise

    def _loaded(self, index: int, manifest: Manifest, plan: BundlePlan) -> _LoadedStage:
        stage = plan.stages[index]
        source = f"exit{plan.stages[index - 1].exit_point}" if index else "image"
        segment = self._engines[stage.segment]
        if stage.head_graph is None or stage.output is None:
            _check_whole(stage, segment, manifest)
            return _LoadedStage(stage.head, source, "", segment, None, None, stage.cells)
        head, output = self._engines[stage.head_graph], self._engines[stage.output]
        _check_graphs(stage, source, (segment, head, output), manifest)
        return _LoadedStage(stage.head, source, f"exit{stage.exit_point}", segment, head, output, stage.cells)

    def upload(self, image: np.ndarray) -> Tensor:
        return self.library.upload(image)

    def advance(self, index: int, features: Tensor) -> Tuple[Tensor, Tensor, np.ndarray]:
        """Features, logits and counts (T,) of a stage from the features before it. A whole network returns no features,
        its labels in place of logits, and no counts. Raises EngineError.
        """
        stage = self._stages[index]
        if stage.head is None:
            found = stage.segment.run({stage.source: features})
            self._check_sound(stage, int(self.library.download(found[_SOUND])[0]) == stage.cells)
            return None, found["labels"], _NO_COUNTS
        features = stage.segment.run({stage.source: features})[stage.point]
        gated = stage.head.run({stage.point: features, "thresholds": self._thresholds})
        counts = self.library.download(gated["counts"])
        if self._guard is None:
            sound = bool(np.isfinite(self.library.download(gated["logits"])).all())
        else:
            sound = counts[self._guard] == stage.cells
        self._check_sound(stage, sound)
        return features, gated["logits"], counts

    def _check_sound(self, stage: _LoadedStage, sound: bool) -> None:
        if not sound:
            raise NotFiniteError(
                f"{stage.name} gave NaN or infinities on {self.library.name}: build it in a safer precision (fp32)"
            )

    def labels(self, index: int, logits: Tensor) -> np.ndarray:
        """Labels uint8 (H, W) at the network's input size, from the logits of `advance`. Raises EngineError."""
        output = self._stages[index].output
        made = logits if output is None else output.run({"logits": logits})["labels"]
        labels: np.ndarray = self.library.download(made)[0]
        return labels

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()


def _unused_row(plan: BundlePlan, row_count: int) -> Optional[int]:
    used = {stage.row for stage in plan.stages}
    used |= {decision.row for point in plan.operating_points for decision in point.decisions}
    return next((row for row in reversed(range(row_count)) if row not in used), None)


def _check_graphs(stage: BundleStage, source: str, engines: Tuple[Engine, Engine, Engine], manifest: Manifest) -> None:
    """Check that the graphs have the tensors that their place in the plan requires. Raises BundleError."""
    segment, head, output = engines
    head_path, output_path = str(stage.head_graph), str(stage.output)
    height, width = manifest.network.input_hw
    row_count, classes = len(manifest.gate.thresholds), len(manifest.network.classes)
    point = f"exit{stage.exit_point}"
    _expect(stage.segment, segment.inputs, {source: ("uint8", (1, height, width, 3)) if source == "image" else None})
    _expect(stage.segment, segment.outputs, {point: None})
    thresholds = ("float32", (row_count, classes))
    _expect(head_path, head.inputs, {point: _as_pair(segment.outputs[point]), "thresholds": thresholds})
    _expect(head_path, head.outputs, {"logits": None, "counts": ("int32", (row_count,))})
    logits = head.outputs["logits"]
    if logits.shape[:2] != (1, classes) or int(np.prod(logits.shape[2:])) != stage.cells:
        raise BundleError(f"{head_path} has logits {logits.shape} for {classes} classes, {stage.cells} cells")
    _expect(output_path, output.inputs, {"logits": _as_pair(logits)})
    _expect(output_path, output.outputs, {"labels": ("uint8", (1, height, width))})


def _check_whole(stage: BundleStage, engine: Engine, manifest: Manifest) -> None:
    """Raises BundleError unless the graph maps an image to labels and counts finite cells."""
    height, width = manifest.network.input_hw
    _expect(stage.segment, engine.inputs, {"image": ("uint8", (1, height, width, 3))})
    labels = ("uint8", (1, height, width))
    _expect(stage.segment, engine.outputs, {"labels": labels, _SOUND: ("int32", (1,))})


_Pair = Tuple[str, Tuple[int, ...]]


def _as_pair(spec: TensorSpec) -> _Pair:
    return spec.dtype, spec.shape


def _expect(graph: str, specs: Dict[str, TensorSpec], expected: Dict[str, Optional[_Pair]]) -> None:
    found = {name: _as_pair(spec) for name, spec in specs.items()}
    if set(found) != set(expected) or any(pair not in (None, found[name]) for name, pair in expected.items()):
        raise BundleError(f"the bundle's graph {graph} has the tensors {found}, not {expected}")
