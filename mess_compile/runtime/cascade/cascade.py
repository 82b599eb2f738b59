"""Runs a bundle's plan stage by stage and exits at the first stage that is confident enough."""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    ContextManager,
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
    Type,
    Union,
)

import numpy as np

from mess_compile.runtime.base import fork_guard
from mess_compile.runtime.base.checks import check_deadline, check_threads
from mess_compile.runtime.base.errors import BatchError, EngineError, InputError, did_you_mean
from mess_compile.runtime.base.policy import PLAIN
from mess_compile.runtime.bundle.archive import Archive, open_archive
from mess_compile.runtime.bundle.engines_inside import adopt
from mess_compile.runtime.bundle.manifest import DEFAULT_POINT, BundlePlan
from mess_compile.runtime.bundle.plan_choice import first_that_opens, matching_plans
from mess_compile.runtime.bundle.signature import Signers
from mess_compile.runtime.cascade.exit_policy import leaves
from mess_compile.runtime.cascade.fallback import FallbackChain, FrameRun, safer_plans
from mess_compile.runtime.cascade.metrics import Metrics, Recorder
from mess_compile.runtime.cascade.stream import Stream
from mess_compile.runtime.engines.engine import Library
from mess_compile.runtime.images import frames
from mess_compile.runtime.images.confidence import confidence_map, exit_text
from mess_compile.runtime.images.resize_times import MappingTimes

if TYPE_CHECKING:
    from mess_compile.runtime.images.notebook import Palette

ON_FAILURE = ("fallback", "raise")
_FREE: ContextManager[None] = nullcontext()
_Ended = Tuple[FrameRun, np.ndarray, float]
"""A finished run, its labels at the network's input size, and its latency in ms."""


@dataclass(frozen=True)
class Prediction:
    """The cascade's result for one frame.

    `labels` uint8 (H, W) at the frame's own size; `exit` counts the plan's exits from 1 and `exit_point` the network's;
    `confidence` is the share of confident cells at that exit, None for a whole network. `latency_ms` runs from upload
    to download; in a refinement from its first `next` until these labels are available. After a fallback to a plan with
    other exits, `exit` is the plan's last one that is no deeper. `palette` has the name and colour of every label.
    `needed` is the share of confident cells from which frames leave there, None at the last exit. If the `policy` there
    is "agreement" or "learned", both are shares of what it compares: of agreeing cells, or of the highest score.
    """

    labels: np.ndarray
    exit: int
    exit_point: int
    confidence: Optional[float]
    latency_ms: float
    palette: Palette = field(default=(), repr=False, compare=False)
    needed: Optional[float] = None
    policy: str = PLAIN

    def __repr__(self) -> str:
        words = exit_text(self.exit, self.confidence, self.needed, self.policy)
        return f"<labels {self.labels.shape} of {words}, {self.latency_ms:.2f} ms>"

    def _repr_html_(self) -> str:
        from mess_compile.runtime.images.notebook import labels_html, text_html

        words = exit_text(self.exit, self.confidence, self.needed, self.policy)
        return text_html(f"{words}, {self.latency_ms:.2f} ms") + labels_html(self.labels, self.palette)


class Cascade:
    """A plan's loaded engines; made by `load`. Use as a context manager.

    Threads may share it: their calls wait for each other. With `on_failure="fallback"`, a frame on which an engine
    fails or gives NaN is computed by the bundle's next safer plan for the target, in the end by ONNX Runtime on the
    CPU; with "raise" it raises EngineError. Either way the cascade can be used further.

    It belongs to the process that loaded it: in a forked child each call raises EngineError, and `close` does nothing.
    """

    def __init__(
        self,
        archive: Archive,
        plan: BundlePlan,
        library: Library,
        on_failure: str = "raise",
        threads: Optional[int] = None,
    ) -> None:
        self.manifest = archive.manifest
        self.plan = plan
        self.library = library
        self.archive = archive
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._recorder = Recorder(plan)
        self._on_engine: Optional[FrameRun] = None
        self._last: Optional[Tuple[Prediction, FrameRun]] = None
        self._point = DEFAULT_POINT
        self._mapping = MappingTimes()
        self._palette = tuple(zip(self.manifest.network.classes, self.manifest.network.colours))
        self._chain = FallbackChain(self.manifest, plan, library, archive.folder, on_failure == "fallback", threads)
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._release = fork_guard.finalizer(self, _release, self._chain, archive)

    def __call__(self, frame: np.ndarray) -> Prediction:
        """Segment one frame: uint8 RGB (H, W, 3), resized as the bundle says unless it has the network's size.

        Raises InputError for any other array, EngineError when a graph cannot run.
        """
        self._check_process()
        image = self._image(frame)
        with self._lock:
            ended = self._segmented(image, time.perf_counter_ns())
        prediction = self._ended_prediction(frame, ended)
        self._last = prediction, ended[0]
        return prediction

    def refine(self, frame: np.ndarray, deadline_ms: Optional[float] = None) -> Iterator[Prediction]:
        """Every exit's prediction, the first as soon as possible, whatever their confidence.

        The first is always delivered. Under a deadline a later stage starts only if its p99, plus that of the output
        graph, of the download and of mapping the labels back to the frame's size, still fits; a stage that fallback
        engines would have to run does not start. Time counts from the first `next`, including resizing the frame and
        the caller's work between. If the engine library holds one frame at a time, another frame ends the refinement:
        it raises InputError.
        """
        check_deadline(deadline_ms)
        return self._refinement(frame, deadline_ms)

    def _refinement(self, frame: np.ndarray, deadline_ms: Optional[float]) -> Iterator[Prediction]:
        start = time.perf_counter_ns()
        image, hw = self._own_image(frame), (frame.shape[0], frame.shape[1])
        run: Optional[FrameRun] = None
        latencies_ms: List[float] = []
        try:
            while run is None or not run.is_last:
                self._check_process()
                with self._lock:
                    if run is not None and not self._fits(run, hw, start, deadline_ms):
                        return
                    run = self._resumed(run, image)
                    run.advance()
                    labels = run.labels()
                labels = self._mapped(labels, hw)
                latencies_ms.append(_ms_since(start))
                prediction = self._prediction(run, labels, latencies_ms[-1])
                self._last = prediction, run
                yield prediction
        finally:
            if run is not None and latencies_ms:
                self._record_refinement(run, latencies_ms, deadline_ms)

    def _fits(self, run: FrameRun, hw: Tuple[int, int], start: int, deadline_ms: Optional[float]) -> bool:
        if deadline_ms is None:
            return True
        if run.fell_back:
            return False
        cost = self.plan.costs[run.depth]
        p99_ms = cost.p99_ms + cost.report_p99_ms + self._mapping.p99_ms(hw)
        return _ms_since(start) + p99_ms <= deadline_ms

    def _resumed(self, run: Optional[FrameRun], image: np.ndarray) -> FrameRun:
        if run is None:
            return self._started(image)
        if not self._holds(run):
            raise InputError(
                f"another frame was segmented since, and {self.library.name} holds one at a time: finish a refinement "
                "before the next frame"
            )
        return run

    def _record_refinement(self, run: FrameRun, latencies_ms: Sequence[float], deadline_ms: Optional[float]) -> None:
        self._record(run, latencies_ms[-1])
        if deadline_ms is not None:
            late = [latency_ms > deadline_ms for latency_ms in latencies_ms]
            self._recorder.had_deadline(late[0], not late[0] and late[-1])

    def batch(self, frames: Iterable[np.ndarray]) -> List[Prediction]:
        """Predictions of several frames, in their order; `latency_ms` counts from the start of the batch.

        Engines take one image at a time. If outputs outlive the next run, as in ONNX Runtime on the CPU, all images
        pass a stage before the next stage begins, and those that exit free their memory; otherwise image follows image.
        Raises BatchError, with the results of the others, when some frame cannot be computed.
        """
        self._check_process()
        given = list(frames)
        images = [self._image(frame) for frame in given]
        with self._lock:
            by_stages = self.library.concurrent
            found = self._segmented_by_stages(images) if by_stages else self._segmented_in_turn(images)
        return _all_of([self._batched(frame, each) for frame, each in zip(given, found)])

    def _batched(self, frame: np.ndarray, ended: Union[_Ended, EngineError]) -> Union[Prediction, EngineError]:
        return ended if isinstance(ended, EngineError) else self._ended_prediction(frame, ended)

    def stream(self, frames: Iterable[np.ndarray], ahead: int = 4) -> Stream:
        """Predictions of frame after frame, in order, while up to `ahead` frames are read, resized and computed.

        ONNX Runtime on the CPU runs the stages of two frames at the same time; a GPU runs one, while the next is
        resized and the labels of the last one are mapped back. An error of a frame or of the source is raised in its
        place; after a frame that failed the stream continues. Close the stream, or drop it, to end it early.
        """
        self._check_process()
        stream = Stream(frames, self._streamed, ahead)
        self._streams.add(stream)
        return stream

    def _streamed(self, frame: Any) -> Prediction:
        image = self._image(frame)
        turn: ContextManager[Any] = _FREE if self.library.concurrent else self._lock
        with turn:
            ended = self._segmented(image, time.perf_counter_ns())
        return self._ended_prediction(frame, ended)

    @property
    def operating_point(self) -> str:
        """The name of the thresholds in use. Setting it rebuilds nothing; raises InputError for an unknown one."""
        return self._point

    @operating_point.setter
    def operating_point(self, name: str) -> None:
        if name not in self.operating_points:
            known = ", ".join(self.operating_points)
            near = did_you_mean(name, self.operating_points)
            raise InputError(f"the plan for {self.plan.target} has no operating point {name!r}{near}; it has {known}")
        self._point = name

    @property
    def operating_points(self) -> Tuple[str, ...]:
        return tuple(point.name for point in self.plan.operating_points)

    @property
    def refusals(self) -> Tuple[str, ...]:
        """The plans that `on_failure="fallback"` cannot fall back to here, and why."""
        return self._chain.refusals

    @property
    def class_names(self) -> Tuple[str, ...]:
        """By label."""
        return self.manifest.network.classes

    def overlay(self, frame: np.ndarray, prediction: Prediction, opacity: float = 0.5) -> np.ndarray:
        """Blend the labels' colours over the frame: uint8 (H, W, 3). Raises InputError when they do not fit."""
        return frames.overlay(frame, prediction.labels, self.manifest.network.colours, opacity)

    def confidence_map(self, prediction: Prediction) -> np.ndarray:
        """The confidence of each pixel at the exit taken: float32 (H, W) in 0..1, each cell's value over its pixels.

        Computed on request from the logits that the engine still holds: of the last frame only, and of none from
        `stream` or `batch`. Raises InputError for any other.
        """
        self._check_process()
        network = self.manifest.network
        with self._lock:
            if not self._release.alive:
                raise InputError("the cascade is closed, and holds no logits any more: load the bundle again")
            last = self._last
            if last is None or last[0] is not prediction or not self._holds(last[1]):
                raise InputError("only the last prediction has a confidence map: request it before the next frame")
            if prediction.confidence is None:
                raise InputError("the plan runs the full network, which has no confidence map")
            logits = last[1].logits()
        cells = frames.resize_labels(confidence_map(logits, self.manifest.gate.confidence), network.input_hw)
        return frames.from_input(cells, prediction.labels.shape, network.resize)

    def metrics(self) -> Metrics:
        """Exits taken, latencies, deadlines missed, failures and drift since loading."""
        return self._recorder.metrics(self.manifest.name, self._point)

    def _check_process(self) -> None:
        fork_guard.check_process(self._process, "this cascade")

    def _image(self, frame: Any) -> np.ndarray:
        network = self.manifest.network
        return frames.to_input(frames.check_frame(frame), network.input_hw, network.resize)[None]

    def _own_image(self, frame: Any) -> np.ndarray:
        """An image that a safer engine can start from after the caller has reused the frame's buffer."""
        image = self._image(frame)
        return image.copy() if self._chain.falls_back and np.may_share_memory(image, frame) else image

    def _started(self, image: np.ndarray) -> FrameRun:
        self._on_engine = FrameRun(self._chain, image, self._point, self._recorder)
        return self._on_engine

    def _holds(self, run: FrameRun) -> bool:
        """Whether the library still holds the run's last outputs: no other frame has overwritten them."""
        return self.library.concurrent or self._on_engine is run

    def _segmented(self, image: np.ndarray, start: int) -> _Ended:
        run = self._started(image)
        run.advance()
        while not run.leaves:
            run.advance()
        return self._end(run, start)

    def _segmented_in_turn(self, images: Sequence[np.ndarray]) -> List[Union[_Ended, EngineError]]:
        start = time.perf_counter_ns()
        found: List[Union[_Ended, EngineError]] = []
        for image in images:
            try:
                found.append(self._segmented(image, start))
            except EngineError as error:
                found.append(error)
        return found

    def _segmented_by_stages(self, images: Sequence[np.ndarray]) -> List[Union[_Ended, EngineError]]:
        start = time.perf_counter_ns()
        runs = [self._started(image) for image in images]
        found: Dict[int, Union[_Ended, EngineError]] = {}
        while len(found) < len(runs):
            for index, run in enumerate(runs):
                if index in found:
                    continue
                try:
                    run.advance()
                    if run.leaves:
                        found[index] = self._end(run, start)
                except EngineError as error:
                    found[index] = error
        return [found[index] for index in range(len(images))]

    def _end(self, run: FrameRun, start: int) -> _Ended:
        labels = run.labels()
        run.drop_features()
        latency_ms = _ms_since(start)
        self._record(run, latency_ms)
        return run, labels, latency_ms

    def _record(self, run: FrameRun, latency_ms: float) -> None:
        self._recorder.finished(self._exit(run), latency_ms, self._confidences(run), run.fell_back)

    def _exit(self, run: FrameRun) -> int:
        """The number in the cascade's own plan, even if another plan computed the frame."""
        if run.plan is self.plan:
            return run.depth
        point = run.stage.exit_point
        return max(sum(stage.exit_point <= point for stage in self.plan.stages), 1)

    def _confidences(self, run: FrameRun) -> List[float]:
        """Confidences of the stages that the frame reaches under the default decisions, as the tuning images'
        histograms count.

        At other operating points other frames reach a later stage, so only the first stage is recorded; what another
        plan computed cannot be compared.
        """
        found: List[float] = []
        if run.plan is not self.plan:
            return found
        for stage, counts in zip(self.plan.stages, run.counts):
            if stage.is_whole:
                break
            found.append(int(counts[stage.row]) / self.plan.top(stage))
            if run.point != DEFAULT_POINT or leaves(counts, stage):
                break
        return found

    def _mapped(self, labels: np.ndarray, hw: Tuple[int, int]) -> np.ndarray:
        """Labels at the frame's own size; records how long that takes, for deadlines."""
        if labels.shape == hw:
            return labels
        start = time.perf_counter_ns()
        labels = frames.from_input(labels, hw, self.manifest.network.resize)
        self._mapping.took(hw, (time.perf_counter_ns() - start) / 1e6)
        return labels

    def _ended_prediction(self, frame: np.ndarray, ended: _Ended) -> Prediction:
        run, labels, latency_ms = ended
        return self._prediction(run, self._mapped(labels, (frame.shape[0], frame.shape[1])), latency_ms)

    def _prediction(self, run: FrameRun, labels: np.ndarray, latency_ms: float) -> Prediction:
        stage, count, cut, top = run.stage, run.count, run.cut, run.top
        sure = None if count is None else count / top
        needed = None if cut is None else cut / top
        return Prediction(
            labels, self._exit(run), stage.exit_point, sure, latency_ms, self._palette, needed, run.policy
        )

    def close(self) -> None:
        """End the streams, wait for the current frame, then release everything; also done when the process ends."""
        if os.getpid() != self._process:
            return
        for stream in tuple(self._streams):
            stream.close()
        with self._lock:
            self._release()
            self._last = None

    def __enter__(self) -> Cascade:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()


def _ms_since(start_ns: int) -> float:
    return (time.perf_counter_ns() - start_ns) / 1e6


def _all_of(results: Sequence[Union[Prediction, EngineError]]) -> List[Prediction]:
    """Raises BatchError with all results when there is an error among them."""
    computed = [each for each in results if isinstance(each, Prediction)]
    if len(computed) == len(results):
        return computed
    lost = [index for index, each in enumerate(results) if isinstance(each, EngineError)]
    raise BatchError(
        f"{len(lost)} of the {len(results)} frames cannot be computed, the first is number {lost[0]} (from 0): "
        f"{results[lost[0]]}; `results` of this error holds the others",
        results,
    )


def _release(chain: FallbackChain, archive: Archive) -> None:
    try:
        chain.close()
    finally:
        archive.close()


def load(
    path: Union[str, Path],
    target: Optional[str] = None,
    library: Optional[Library] = None,
    threads: Optional[int] = None,
    cuda_graphs: bool = False,
    on_failure: str = "raise",
    signers: Optional[Signers] = None,
) -> Cascade:
    """Verify a bundle and load its plan for `target`, such as "xavier" or, with several precisions, "xavier:fp16".

    Without a target it is the first plan whose library is installed here; if the bundle has several targets, among
    those that match this machine. `threads` is for CPU libraries (None: every core), `cuda_graphs` for TensorRT: each
    stage is one launch; `profile` measures without. `on_failure` is "raise" or "fallback": see `Cascade`. With
    `signers` one of them must have signed the bundle, and the engines in it are used; otherwise they are built here.
    The cascade closes `library` when it closes. Raises InputError, BundleError, EngineError.
    """
    if on_failure not in ON_FAILURE:
        raise InputError(f"on_failure is {on_failure!r}, not one of {', '.join(ON_FAILURE)}")
    archive = open_archive(Path(path))
    try:
        if signers is not None:
            archive.check_signer(signers)
        return load_archive(archive, target, library, threads, cuda_graphs, on_failure)
    except BaseException:
        archive.close()
        raise


def load_archive(
    archive: Archive,
    target: Optional[str] = None,
    library: Optional[Library] = None,
    threads: Optional[int] = None,
    cuda_graphs: bool = False,
    on_failure: str = "raise",
) -> Cascade:
    """Like `load`, for an open bundle; the cascade closes it, but not when this raises."""
    check_threads(threads)
    plans = matching_plans(archive.manifest, target, library)
    if library is not None:
        plan, opened = plans[0], library
    else:
        plan, opened = first_that_opens(plans, threads, cuda_graphs)
    if archive.signed_by is not None:
        for each in (plan, *(safer_plans(archive.manifest, plan) if on_failure == "fallback" else ())):
            adopt(archive.manifest, each, opened, archive.folder)
    return Cascade(archive, plan, opened, on_failure, threads)
