"""Runs one frame through the stages of a plan, and falls back to safer plans when an engine fails."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Tuple, TypeVar

import numpy as np

from mess_compile.runtime.base.errors import EngineError, MessError
from mess_compile.runtime.base.policy import PLAIN, named_row
from mess_compile.runtime.bundle.manifest import DEFAULT_POINT, BundlePlan, BundleStage, Decision, Manifest
from mess_compile.runtime.cascade.exit_policy import leaves
from mess_compile.runtime.cascade.metrics import Recorder
from mess_compile.runtime.cascade.stages import Live, Stages
from mess_compile.runtime.engines import onnxruntime_engine
from mess_compile.runtime.engines.engine import PRECISIONS, Library, Tensor

FAILURES_IN_A_ROW = 3
PAUSE_FRAMES = 100
"""After so many failures in a row an executor is skipped for so many frames, then tried again."""
_CLOSED = "the cascade is closed"
_Result = TypeVar("_Result")


class Executor:
    """One way to run a frame: a plan in an engine library.

    If it cannot be opened, it refuses, and is opened again after a pause, unless that would build engines.
    """

    def __init__(self, plan: BundlePlan, name: str, builds: bool, open_stages: Callable[[], Stages]) -> None:
        self.plan, self.name = plan, name
        self._builds, self._open_stages = builds, open_stages
        self._decisions = {point.name: point.decisions for point in plan.operating_points}
        self._stages: Optional[Stages] = None
        self._refusal: Optional[str] = None
        self._lock, self._opening = threading.Lock(), threading.Lock()
        self._failures_in_a_row, self._pause_frames = 0, 0

    def stages(self) -> Stages:
        """Raises EngineError when they cannot be opened."""
        return self._stages or self._opened()

    def open(self) -> None:
        """Open now rather than with the first frame that needs it; `refusal` holds the error."""
        with suppress(EngineError):
            self.stages()

    def _opened(self) -> Stages:
        with self._opening:
            if self._stages is None and self._refusal is None:
                try:
                    self._stages = self._open_stages()
                except MessError as error:
                    self._refusal = str(error)
            if self._stages is None:
                raise EngineError(str(self._refusal))
            return self._stages

    @property
    def refusal(self) -> Optional[str]:
        """Why it cannot be opened; None if it is open."""
        return self._refusal

    def decisions(self, point: str) -> Tuple[Decision, ...]:
        """The decisions of an operating point, or of the default one if the plan lacks the name."""
        return self._decisions.get(point) or self._decisions[DEFAULT_POINT]

    def is_paused(self) -> bool:
        """Whether the next frame skips it."""
        if self._pause_frames <= 0:
            return False
        with self._lock:
            if self._pause_frames <= 0:
                return False
            self._pause_frames -= 1
            if self._pause_frames == 0 and not self._builds and self._refusal != _CLOSED:
                self._refusal = None
        return True

    def failed(self) -> None:
        with self._lock:
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= FAILURES_IN_A_ROW and self._pause_frames <= 0:
                self._pause_frames = PAUSE_FRAMES

    def succeeded(self) -> None:
        self._failures_in_a_row = 0

    def close(self) -> None:
        """Release its engines; it does not open again."""
        with self._opening:
            self._refusal = _CLOSED
            if self._stages is not None:
                self._stages.close()
            self._stages = None


class FallbackChain:
    """The executors of a plan, opened here; the first runs the plan itself. It closes `library` when it closes.

    With `fallback`, the bundle's plans for the same target in safer precisions follow, in the same library; ONNX
    Runtime's plain kernels on the CPU are last, with the safest of these plans. Executors that cannot be opened are
    skipped and listed by `refusals`.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: BundlePlan,
        library: Library,
        folder: Path,
        fallback: bool,
        threads: Optional[int],
    ) -> None:
        self._libraries: List[Library] = [library]
        builds = library.builds_for is not None

        def executor(of: BundlePlan) -> Executor:
            return Executor(of, f"{of.name} on {library.name}", builds, lambda: Stages(manifest, of, library, folder))

        def plain_stages() -> Stages:
            if len(self._libraries) == 1:
                self._libraries.append(onnxruntime_engine.open_library(threads=threads, plain=True))
            return Stages(manifest, plans[-1], self._libraries[-1], folder)

        plans = (plan, *(safer_plans(manifest, plan) if fallback else ()))
        try:
            first = Stages(manifest, plan, library, folder)
        except BaseException:
            library.close()
            raise
        self._executors = [Executor(plan, f"{plan.name} on {library.name}", builds, lambda: first)]
        self._executors += [executor(safer) for safer in plans[1:]]
        if fallback:
            name = f"{plans[-1].name} on ONNX Runtime's plain kernels"
            self._executors.append(Executor(plans[-1], name, False, plain_stages))
        try:
            for each in self._executors:
                each.open()
        except BaseException:
            self.close()
            raise

    @property
    def refusals(self) -> Tuple[str, ...]:
        """The executors that cannot be used, and why."""
        return tuple(
            f"{executor.name}: {executor.refusal}" for executor in self._executors if executor.refusal is not None
        )

    @property
    def falls_back(self) -> bool:
        return len(self._executors) > 1

    def executors(self) -> Iterator[Executor]:
        """Those that a frame tries in turn; the last one is never paused."""
        last = self._executors[-1]
        for executor in self._executors:
            if not executor.is_paused() or executor is last:
                yield executor

    def is_first(self, executor: Executor) -> bool:
        return executor is self._executors[0]

    def close(self) -> None:
        for executor in self._executors:
            executor.close()
        for library in self._libraries:
            library.close()


def safer_plans(manifest: Manifest, plan: BundlePlan) -> Tuple[BundlePlan, ...]:
    """The bundle's other plans for the same target, library and setting in a safer precision, the boldest first."""

    def safety(of: BundlePlan) -> int:
        return PRECISIONS.index(of.boldest)

    def place(of: BundlePlan) -> Tuple[str, str, str]:
        return of.target, of.library, of.setting

    safer = [each for each in manifest.plans if place(each) == place(plan) and safety(each) > safety(plan)]
    return tuple(sorted(safer, key=safety))


class FrameRun:
    """One frame's run through the stages. If an executor fails, the next one starts again from the image."""

    def __init__(self, chain: FallbackChain, image: np.ndarray, point: str, recorder: Recorder) -> None:
        self.counts: List[np.ndarray] = []
        """The integer of each row, of every passed stage."""
        self.depth = 0
        self.point = point
        self._image, self._recorder = image, recorder
        self._executors = chain.executors()
        self._executor = next(self._executors)
        self._decisions = self._executor.decisions(point)
        self.fell_back = not chain.is_first(self._executor)
        self._reason: Optional[EngineError] = None
        self._stages: Optional[Stages] = None
        self._live: Live = {}
        self._logits: Tensor = None

    def advance(self) -> None:
        """Pass one more stage. Raises EngineError when no executor can.

        After a fallback to a plan with other exits, the run continues at that plan's first exit that is as deep, or its
        last.
        """
        self.depth += 1
        self._attempt(self._catch_up)

    @property
    def plan(self) -> BundlePlan:
        """The plan that computes the frame; not the cascade's own after a fallback."""
        return self._executor.plan

    @property
    def stage(self) -> BundleStage:
        """The last stage passed."""
        return self._executor.plan.stages[self.depth - 1]

    @property
    def count(self) -> Optional[int]:
        """The integer of the last stage passed in its decision's row; None for a whole network."""
        return None if self.stage.is_whole else int(self.counts[-1][self._decisions[self.depth - 1].row])

    @property
    def top(self) -> int:
        """The greatest that `count` can be."""
        return self.plan.top(self.stage, self._decisions[self.depth - 1].row)

    @property
    def policy(self) -> str:
        """The policy of the last stage passed."""
        found = named_row(self.plan.policy_rows, self.stage.head, self._decisions[self.depth - 1].row)
        return PLAIN if found is None else found.policy

    @property
    def cut(self) -> Optional[int]:
        """The `count` that is needed to exit at the last stage passed; None at the plan's last."""
        return None if self.stage.is_whole else self._decisions[self.depth - 1].cut

    @property
    def is_last(self) -> bool:
        return self.depth == len(self._decisions)

    @property
    def leaves(self) -> bool:
        """Whether the image exits here: it is confident enough, or there are no more exits."""
        if self.is_last:
            return True
        return not self.stage.is_whole and leaves(self.counts[-1], self._decisions[self.depth - 1])

    def labels(self) -> np.ndarray:
        """Labels uint8 (H, W), at the network's input size, of the last stage passed. Raises EngineError."""
        labels = self._attempt(self._labels)
        self._executor.succeeded()
        return labels

    def _labels(self) -> np.ndarray:
        return self._catch_up().labels(self.depth - 1, self._logits)

    def drop_features(self) -> None:
        """Free the tensors alive after the last stage: the next frame's can use that memory, warm in the cache."""
        self._live.clear()

    def logits(self) -> np.ndarray:
        """Logits (K, h, w) of the last stage passed, while they are valid. Raises EngineError."""
        values: np.ndarray = self._catch_up().library.download(self._logits)[0]
        return values

    def _attempt(self, action: Callable[[], _Result]) -> _Result:
        while True:
            try:
                return action()
            except EngineError as error:
                self._fall_back(error)

    def _catch_up(self) -> Stages:
        """Run the current executor's stages that the frame should have passed, and return them."""
        if self._stages is None:
            self._stages = self._executor.stages()
            self._live = self._stages.upload(self._image)
            self.counts.clear()
        while len(self.counts) < self.depth:
            self._logits, counts = self._stages.advance(len(self.counts), self._live)
            self.counts.append(counts)
        return self._stages

    def _fall_back(self, error: EngineError) -> None:
        self._recorder.failed(error)
        self._executor.failed()
        following = next(self._executors, None)
        if following is None:
            self._recorder.lost()
            raise error if self._reason is None else EngineError(f"{self._reason}; then, falling back: {error}")
        self._reason = self._reason or error
        self.depth = _depth_at(following.plan, self.stage.exit_point)
        self._executor, self._stages, self.fell_back = following, None, True
        self._decisions = following.decisions(self.point)


def _depth_at(plan: BundlePlan, exit_point: int) -> int:
    """The number, from 1, of the plan's first exit that is no shallower, or of its last one."""
    deep = (number for number, stage in enumerate(plan.stages, 1) if stage.exit_point >= exit_point)
    return next(deep, len(plan.stages))
