"""Runs a plan's stages in one engine library, one stage at a time on one frame.

Live tensors have names: a segment adds what it computes, and each tensor is released after the last graph of the plan
that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from mess_compile.runtime.base.errors import BundleError, NotFiniteError
from mess_compile.runtime.base.policy import CELLS, MORE_ROWS, RowValues
from mess_compile.runtime.bundle.manifest import BundlePlan, BundleStage, Manifest
from mess_compile.runtime.engines.engine import Engine, Library, Tensor, TensorSpec
from mess_compile.runtime.engines.engine_cache import loadable

_BELOW_ALL = -1.0
"""A threshold that every confidence reaches unless it is NaN."""
_IMAGE, _THRESHOLDS = "image", "thresholds"
_OF_HEADS = frozenset({"logits", "counts", "labels", "sound"})
"""What heads and whole networks give; it is not passed on to later segments."""
_SOUND = "sound"
"""The output of a whole network that counts its cells with finite logits; it has no gate."""
_NO_COUNTS = np.zeros(0, np.int32)


Live = Dict[str, Tensor]
"""The tensors of one frame that later graphs read, by name."""


@dataclass(frozen=True)
class _Step:
    """A segment or head: the live tensors that it reads, and those that no graph after it reads."""

    engine: Engine
    reads: Tuple[str, ...]
    releases: Tuple[str, ...]

    def run(self, live: Live) -> Live:
        feeds = {}
        for name in self.reads:  # in chains one; a comprehension would cost more
            feeds[name] = live[name]
        return self.engine.run(feeds)


@dataclass(frozen=True)
class _LoadedStage:
    name: str
    segment: _Step
    head: Optional[_Step]
    output: Optional[Engine]
    cells: int
    values: RowValues


class Stages:
    """Engines for every graph of `plan`; `close` leaves the library open.

    The last row of a gate's counts has the cells with finite logits: if it misses one, the logits hold NaN or
    infinities. Gates of earlier releases lack it. There a row of thresholds that no operating point uses is set so low
    that every cell reaches it, which finds all but a few scattered cells: at edges the gate takes the majority of
    5 x 5. A whole network has no gate, and counts such cells itself.
    """

    def __init__(self, manifest: Manifest, plan: BundlePlan, library: Library, folder: Path) -> None:
        self.library = library
        self._engines: Dict[str, Engine] = {}
        try:
            for path in plan.graphs():
                self._engines[path] = library.load(loadable(library, folder / path, plan.precisions[path].used))
            self._stages = self._loaded(manifest, plan)
            thresholds = np.array(manifest.gate.thresholds, np.float32)
            self._by_class = manifest.gate.by_class
            self._guard = None if self._by_class else _unused_row(plan, len(thresholds))
            if self._guard is not None:
                thresholds[self._guard] = _BELOW_ALL
            self._thresholds = library.upload(thresholds)
        except BaseException:
            self.close()
            raise

    def _loaded(self, manifest: Manifest, plan: BundlePlan) -> Tuple[_LoadedStage, ...]:
        _check_graphs(plan, self._engines, manifest)
        order = [path for stage in plan.stages for path in (stage.segment, stage.head_graph) if path is not None]
        shape = len(manifest.gate.thresholds), len(manifest.network.classes)
        steps = iter(_steps([self._engines[path] for path in order]))
        return tuple(
            _LoadedStage(
                stage.head,
                next(steps),
                None if stage.head_graph is None else next(steps),
                None if stage.output is None else self._engines[stage.output],
                stage.cells,
                RowValues([row for row in plan.policy_rows if row.head == stage.head], *shape),
            )
            for stage in plan.stages
        )

    def upload(self, image: np.ndarray) -> Live:
        """The live tensors before the first stage; the thresholds are alive throughout."""
        return {_IMAGE: self.library.upload(image), _THRESHOLDS: self._thresholds}

    def advance(self, index: int, live: Live) -> Tuple[Tensor, np.ndarray]:
        """Logits of a stage, and the integer of every row; turns the tensors that are live before it into those after
        it. A whole network returns its labels in place of logits, and no integers. Raises EngineError.
        """
        stage = self._stages[index]
        found = stage.segment.run(live)
        if stage.head is None:
            self._check_sound(stage, int(self.library.download(found[_SOUND])[0]) == stage.cells)
            live.clear()
            return found["labels"], _NO_COUNTS
        live.update(found)
        del found  # a released tensor has no other reference
        for name in stage.segment.releases:
            del live[name]
        gated = stage.head.run(live)
        for name in stage.head.releases:
            del live[name]
        counts = self.library.download(gated["counts"])
        if self._by_class:
            self._check_sound(stage, int(counts[CELLS].sum()) == stage.cells)
            return gated["logits"], stage.values(counts)
        if self._guard is None:
            sound = bool(np.isfinite(self.library.download(gated["logits"])).all())
        else:
            sound = counts[self._guard] == stage.cells
        self._check_sound(stage, sound)
        return gated["logits"], counts

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


def _steps(engines: Sequence[Engine]) -> List[_Step]:
    """The segments and heads of a plan in their order, and when each tensor is released."""
    live, steps = {_IMAGE}, []
    for number, engine in enumerate(engines, 1):
        read_later = {name for later in engines[number:] for name in later.inputs}
        live |= set(engine.outputs) - _OF_HEADS
        steps.append(_Step(engine, tuple(engine.inputs), tuple(live - read_later)))
        live &= read_later
    return steps


def _check_graphs(plan: BundlePlan, engines: Dict[str, Engine], manifest: Manifest) -> None:
    """Check that every graph has the tensors that its place in the plan requires. Raises BundleError."""
    height, width = manifest.network.input_hw
    known: _Pairs = {_IMAGE: ("uint8", (1, height, width, 3))}
    for stage in plan.stages:
        if stage.head_graph is None or stage.output is None:
            _check_whole(stage, engines[stage.segment], manifest)
            continue
        segment = engines[stage.segment]
        _expect_reads(stage.segment, segment, known)
        made = _pairs(segment.outputs)
        point, again = f"exit{stage.exit_point}", set(made) & (set(known) | _OF_HEADS | {_THRESHOLDS})
        if point not in made or again:
            raise BundleError(f"the bundle's graph {stage.segment} has the outputs {made}, not {point} and new names")
        known.update(made)
        _check_head(stage, engines, known, manifest, stage is plan.stages[-1])


def _check_head(
    stage: BundleStage, engines: Dict[str, Engine], known: _Pairs, manifest: Manifest, is_last: bool
) -> None:
    head_path, output_path = str(stage.head_graph), str(stage.output)
    head, output = engines[head_path], engines[output_path]
    height, width = manifest.network.input_hw
    row_count, classes = len(manifest.gate.thresholds), len(manifest.network.classes)
    thresholds: _Pair = ("float32", (row_count, classes))
    _expect_reads(head_path, head, {**known, _THRESHOLDS: thresholds}, needed=_THRESHOLDS)
    counted = (row_count + MORE_ROWS, classes) if manifest.gate.by_class else (row_count,)
    _expect(head_path, head.outputs, {"logits": None, "counts": ("int32", counted)})
    logits = head.outputs["logits"]
    size = int(np.prod(logits.shape[2:]))
    # The last gate, which decides nothing, may count over average-pooled logits.
    if logits.shape[:2] != (1, classes) or not (size == stage.cells or (is_last and size % stage.cells == 0)):
        raise BundleError(f"{head_path} has logits {logits.shape} for {classes} classes, {stage.cells} cells")
    _expect(output_path, output.inputs, {"logits": _as_pair(logits)})
    _expect(output_path, output.outputs, {"labels": ("uint8", (1, height, width))})


def _check_whole(stage: BundleStage, engine: Engine, manifest: Manifest) -> None:
    """Raises BundleError unless the graph maps an image to labels and counts finite cells."""
    height, width = manifest.network.input_hw
    _expect(stage.segment, engine.inputs, {_IMAGE: ("uint8", (1, height, width, 3))})
    labels = ("uint8", (1, height, width))
    _expect(stage.segment, engine.outputs, {"labels": labels, _SOUND: ("int32", (1,))})


_Pair = Tuple[str, Tuple[int, ...]]
_Pairs = Dict[str, _Pair]


def _as_pair(spec: TensorSpec) -> _Pair:
    return spec.dtype, spec.shape


def _pairs(specs: Dict[str, TensorSpec]) -> _Pairs:
    return {name: _as_pair(spec) for name, spec in specs.items()}


def _expect_reads(graph: str, engine: Engine, known: _Pairs, needed: Optional[str] = None) -> None:
    """Check that a graph reads tensors that the graphs before it give. Raises BundleError."""
    found = _pairs(engine.inputs)
    wrong = {name: pair for name, pair in found.items() if known.get(name) != pair}
    if wrong or (needed is not None and needed not in found) or len(found) <= (needed is not None):
        given = {name: known[name] for name in wrong if name in known} or known
        raise BundleError(f"the bundle's graph {graph} reads {found}, but the graphs before it give {given}")


def _expect(graph: str, specs: Dict[str, TensorSpec], expected: Dict[str, Optional[_Pair]]) -> None:
    found = _pairs(specs)
    if set(found) != set(expected) or any(pair not in (None, found[name]) for name, pair in expected.items()):
        raise BundleError(f"the bundle's graph {graph} has the tensors {found}, not {expected}")
