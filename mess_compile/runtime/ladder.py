"""Ways to run a plan, from the wanted one to the safest, and one frame's walk through the stages on them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Tuple, TypeVar

import numpy as np

from mess_compile.runtime import onnxruntime_engine
from mess_compile.runtime.engine import PRECISIONS, Library, Tensor
from mess_compile.runtime.errors import EngineError, MessError
from mess_compile.runtime.manifest import Decision, Manifest, Plan
from mess_compile.runtime.metrics import Recorder
from mess_compile.runtime.stages import Stages

FAILURES_IN_A_ROW = 3
REST_FRAMES = 100
"""After so many failures in a row a rung is left out for so many frames, then tried again."""
_Result = TypeVar("_Result")


class Rung:
    """One way to run the plan, opened with its first use."""

    def __init__(self, open_stages: Callable[[], Stages]) -> None:
        self._open_stages = open_stages
        self._stages: Optional[Stages] = None
        self._refusal = ""
        self._opening = threading.Lock()
        self._failures_in_a_row, self._rest = 0, 0

    def stages(self) -> Stages:
        """Raises EngineError, each time again, when they cannot be opened."""
        with self._opening:
            if self._stages is None and not self._refusal:
                try:
                    self._stages = self._open_stages()
                except MessError as error:
                    self._refusal = str(error)
            if self._stages is None:
                raise EngineError(self._refusal)
            return self._stages

    def rests(self) -> bool:
        """Whether the next frame leaves it out."""
        if self._rest == 0:
            return False
        self._rest -= 1
        return True

    def failed(self) -> None:
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= FAILURES_IN_A_ROW:
            self._rest = REST_FRAMES

    def succeeded(self) -> None:
        self._failures_in_a_row = 0

    def close(self) -> None:
        """Give back what it holds; it does not open again."""
        with self._opening:
            self._refusal = "the cascade is closed"
            if self._stages is not None:
                self._stages.close()
            self._stages = None


class Ladder:
    """The rungs of a plan; the first is the plan as it is, open from the start. It closes `library` with itself.

    With `fallback` there follow, where this bundle has a plan of the same heads in a safer precision, its graphs in the
    same library; and last ONNX Runtime's plain kernels on the CPU, with the safest of these graphs.
    """

    def __init__(
        self, manifest: Manifest, plan: Plan, library: Library, folder: Path, fallback: bool, threads: Optional[int]
    ) -> None:
        self._libraries: List[Library] = [library]

        def stages(of: Plan, on: Library) -> Callable[[], Stages]:
            return lambda: Stages(manifest, of, on, folder)

        def plain_stages() -> Stages:
            self._libraries.append(onnxruntime_engine.open_library(threads=threads, plain=True))
            return Stages(manifest, plans[-1], self._libraries[-1], folder)

        plans = (plan, *_safer_plans(manifest, plan))
        try:
            first = Stages(manifest, plan, library, folder)
        except BaseException:
            library.close()
            raise
        self._rungs = [Rung(lambda: first)]
        self._rungs[0].stages()
        if fallback:
            self._rungs += [Rung(stages(safer, library)) for safer in plans[1:]]
            self._rungs.append(Rung(plain_stages))

    def rungs(self) -> Iterator[Rung]:
        """Those that a frame tries in turn; the last one never rests."""
        for rung in self._rungs[:-1]:
            if not rung.rests():
                yield rung
        yield self._rungs[-1]

    def is_first(self, rung: Rung) -> bool:
        return rung is self._rungs[0]

    def close(self) -> None:
        for rung in self._rungs:
            rung.close()
        for library in self._libraries:
            library.close()


def _safer_plans(manifest: Manifest, plan: Plan) -> Tuple[Plan, ...]:
    """Plans of the same heads and a safer precision, the boldest first."""

    def exits(of: Plan) -> List[Tuple[int, str, int]]:
        return [(stage.exit_point, stage.head, stage.cells) for stage in of.stages]

    def safety(of: Plan) -> int:
        return PRECISIONS.index(of.boldest)

    safer = [each for each in manifest.plans if exits(each) == exits(plan) and safety(each) > safety(plan)]
    return tuple(sorted(safer, key=safety))


class Walk:
    """One frame on its way through the stages. What fails on one rung is done again, from the image, on the next."""

    def __init__(self, ladder: Ladder, image: np.ndarray, decisions: Tuple[Decision, ...], recorder: Recorder) -> None:
        self.counts: List[np.ndarray] = []
        """Of every stage passed, (T,) each."""
        self.depth = 0
        self._image, self._decisions, self._recorder = image, decisions, recorder
        self._rungs = ladder.rungs()
        self._rung = next(self._rungs)
        self.fell_back = not ladder.is_first(self._rung)
        self._reason: Optional[EngineError] = None
        self._stages: Optional[Stages] = None
        self._features: Tensor = None
        self._logits: Tensor = None

    def advance(self) -> None:
        """Pass one more stage. Raises EngineError when no rung can."""
        self.depth += 1
        self._attempt(self._caught_up)

    @property
    def count(self) -> int:
        """The sure cells of the last stage passed, by its decision's row."""
        return int(self.counts[-1][self._decisions[self.depth - 1].row])

    @property
    def is_sure(self) -> bool:
        """Whether the image leaves here."""
        cut = self._decisions[self.depth - 1].cut
        return cut is not None and self.count >= cut

    def labels(self) -> np.ndarray:
        """Labels uint8 (H, W), at the network's input size, of the last stage passed. Raises EngineError."""
        labels = self._attempt(lambda: self._caught_up().labels(self.depth - 1, self._logits))
        self._rung.succeeded()
        return labels

    def logits(self) -> np.ndarray:
        """Logits (K, h, w) of the last stage passed, while they are there. Raises EngineError."""
        values: np.ndarray = self._caught_up().library.download(self._logits)[0]
        return values

    def _attempt(self, action: Callable[[], _Result]) -> _Result:
        while True:
            try:
                return action()
            except EngineError as error:
                self._climb(error)

    def _caught_up(self) -> Stages:
        """The present rung's stages, all of them run that the frame is to have passed."""
        if self._stages is None:
            self._stages = self._rung.stages()
            self._features = self._stages.upload(self._image)
            self.counts.clear()
        while len(self.counts) < self.depth:
            self._features, self._logits, counts = self._stages.advance(len(self.counts), self._features)
            self.counts.append(counts)
        return self._stages

    def _climb(self, error: EngineError) -> None:
        self._recorder.failed(error)
        self._rung.failed()
        following = next(self._rungs, None)
        if following is None:
            self._recorder.lost()
            raise error if self._reason is None else EngineError(f"{self._reason}; then, falling back: {error}")
        self._reason = self._reason or error
        self._rung, self._stages, self.fell_back = following, None, True
