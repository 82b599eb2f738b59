"""The step `run`: images and videos through a bundle, to labels, overlays and refinement strips."""

from __future__ import annotations

import re
import shlex
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile import extras, files
from mess_compile.data.dataset import ClassList, read_labels
from mess_compile.data.layouts import IMAGE_SUFFIXES, listed_files
from mess_compile.reporter import SILENT, Progress, Reporter
from mess_compile.runtime.base.errors import InputError, MessError, PlaceError
from mess_compile.runtime.bundle import archive
from mess_compile.runtime.bundle.manifest import MANIFEST
from mess_compile.runtime.cascade.cascade import Cascade, Prediction, load
from mess_compile.runtime.images import frames
from mess_compile.runtime.images.confidence import confidence_text
from mess_compile.runtime.images.pictures import OF_ONE_NAME, read_picture

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ogv", ".ts", ".wmv", ".mjpeg")
_COUNTED = (".mp4", ".m4v", ".mov", ".avi")
"""Containers that store their number of frames; for others it is guessed from the duration."""
_CAMERA = "camera:"
_LABELS = re.compile(r"\d{6}\.png")


@dataclass(frozen=True)
class RunOptions:
    """How a bundle is run.

    `progressive` adds a strip of all exits to each image, `truth` (a folder of label PNGs named as the images, whose
    first class has the value `label_offset`) the true labels at its end. With `deadline_ms` each frame is refined until
    then. Of folders, videos and cameras every `every`-th frame is used, at most `limit` of each. `label_pictures` also
    writes the labels of each frame of a video.
    """

    progressive: bool = False
    truth: Path | None = None
    label_offset: int = 0
    deadline_ms: float | None = None
    operating_point: str | None = None
    target: str | None = None
    every: int = 1
    limit: int | None = None
    label_pictures: bool = False


@dataclass(frozen=True)
class ImageResult:
    """The prediction for one image, and the pictures written.

    `needed` is the share of confident cells from which images leave there; None at the last exit, or with a deadline.
    `policy` says what `confidence` is a share of: see `Prediction`.
    """

    image: Path
    exit: int
    exit_point: int
    confidence: float | None
    latency_ms: float
    pictures: tuple[Path, ...]
    needed: float | None
    policy: str


@dataclass(frozen=True)
class VideoResult:
    """Totals of a video or camera: the frames that left at each exit, and the files written.

    `unread` counts frames at the end that the file announces and that cannot be read; `stopped`: by Ctrl-C.
    """

    source: str
    frames: int
    exits: tuple[int, ...]
    mean_latency_ms: float
    frames_per_s: float
    video: Path
    labels: Path | None
    unread: int
    stopped: bool


Result = ImageResult | VideoResult


@dataclass(frozen=True)
class ImageFailure:
    """An image or video that failed, or `frames` (from 0) of a video, and why."""

    source: str
    error: str
    frames: tuple[int, ...] = ()


class RunError(MessError):
    """Some images or frames failed; `results` are those of the others, whose pictures are written."""

    def __init__(self, message: str, results: Sequence[Result], failures: Sequence[ImageFailure]) -> None:
        super().__init__(message)
        self.results, self.failures = tuple(results), tuple(failures)


def is_moving(source: Path) -> bool:
    """Whether the name is that of a video or a camera."""
    return str(source).startswith(_CAMERA) or source.suffix.lower() in VIDEO_SUFFIXES


def run(
    bundle: Path,
    sources: Sequence[Path],
    output: Path = Path("predictions"),
    options: RunOptions = RunOptions(),
    done: Callable[[Result], None] = lambda result: None,
    failed: Callable[[ImageFailure], None] = lambda failure: None,
    reporter: Reporter = SILENT,
) -> tuple[Result, ...]:
    """Segment images, those in folders, videos and `camera:N` with a bundle; `done` or `failed` gets each result.

    Notes say which files of folders are left out.

    Each image gives a palette PNG of labels, an overlay and on request a refinement strip; each video or camera a video
    with overlay, exit and latency. Ctrl-C ends a video early. Images and frames that fail do not stop the others:
    RunError is raised at the end. Raises InputError, BundleError before anything is run.
    """
    _refuse_swapped(bundle, sources)
    images = [image for source in sources if not is_moving(source) for image in _images(source, options, reporter)]
    videos = [source for source in sources if is_moving(source)]
    _check_names(images, videos)
    results: list[Result] = []
    failures: list[ImageFailure] = []

    def fail(failure: ImageFailure) -> None:
        failures.append(failure)
        failed(failure)

    with load(bundle, options.target) as cascade:
        if options.operating_point is not None:
            cascade.operating_point = options.operating_point
        for number, source in enumerate((*images, *videos)):
            try:
                if is_moving(source):
                    results.append(_run_video(cascade, str(source), output, options, reporter.progress, fail))
                else:
                    reporter.progress("run", number, len(images))
                    results.append(_run_image(cascade, source, output, options))
            except (MessError, MemoryError, OSError) as error:
                fail(ImageFailure(str(source), _reason(error, source)))
                continue
            done(results[-1])
    if failures:
        raise RunError(_failed_words(failures, len(images), len(videos), output), results, failures)
    return tuple(results)


def _reason(error: MessError | MemoryError | OSError, source: Path | str) -> str:
    """Why one image or frame failed; an error that concerns all others too is raised again."""
    if isinstance(error, PlaceError) or (isinstance(error, OSError) and error.errno not in OF_ONE_NAME):
        raise error
    if isinstance(error, MemoryError):
        return f"{source} needs more memory than is available: use smaller images"
    return f"{source}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _failed_words(failures: Sequence[ImageFailure], images: int, videos: int, output: Path) -> str:
    if images + videos == 1 and len(failures) == 1 and not failures[0].frames:
        return failures[0].error
    whole = [is_moving(Path(failure.source)) for failure in failures if not failure.frames]
    frames = Counter[str]()
    for failure in failures:
        frames[failure.source] += len(failure.frames)
    counts = [f"{whole.count(False)} of {images} images"] if False in whole else []
    counts += [f"{whole.count(True)} of {videos} videos"] if True in whole else []
    counts += [f"{count} frame{'s' * (count > 1)} of {source}" for source, count in frames.items() if count]
    return f"{', '.join(counts)} failed; the results of the others are in {output}"


def _refuse_swapped(bundle: Path, sources: Sequence[Path]) -> None:
    """Raises InputError when the first argument is not the bundle."""
    if _is_bundle(bundle):
        return
    among = next((source for source in sources if _is_bundle(source)), None)
    if among is not None:
        others = shlex.join(str(source) for source in (bundle, *sources) if source != among)
        raise InputError(f"{bundle} is not a bundle, and the bundle comes first: `mess-compile run {among} {others}`")
    if bundle.suffix.lower() in IMAGE_SUFFIXES or is_moving(bundle):
        raise InputError(f"{bundle} is an image, not a bundle: `mess-compile run BUNDLE {bundle}`")


def _is_bundle(path: Path) -> bool:
    """Whether the path is a bundle file, or an unpacked bundle."""
    return archive.is_bundle(path) or (path / MANIFEST).is_file()


def _images(source: Path, options: RunOptions, reporter: Reporter) -> Sequence[Path]:
    if not source.is_dir():
        return [source]
    listing = listed_files(source)
    for warning in listing.notes:
        reporter.warn(warning)
    if not listing.paths:
        raise InputError(f"{source} has no {', '.join(IMAGE_SUFFIXES)} files; its subfolders are not searched")
    return listing.paths[:: options.every][: options.limit]


def _check_names(*kinds: Sequence[Path]) -> None:
    for sources in kinds:
        (stem, often), *_ = Counter(source.stem for source in sources).most_common(1) or [("", 0)]
        if often > 1:
            raise InputError(
                f"two sources are named {stem} and would write the same pictures: run them one by one (-o DIR)"
            )


def _run_image(cascade: Cascade, image: Path, output: Path, options: RunOptions) -> ImageResult:
    from mess_compile.report import pictures

    frame = read_picture(image)
    prediction = _predicted(cascade, frame, options)
    colours = cascade.manifest.network.colours
    drawn = {
        "labels": pictures.label_picture(prediction.labels, colours),
        "overlay": pictures.overlay_picture(frame, prediction.labels, colours),
    }
    if options.progressive:
        drawn["progressive"] = pictures.strip_picture(_panels(cascade, frame, prediction.exit, image, options))
    paths = []
    for kind, picture in drawn.items():
        paths.append(output / f"{image.stem}.{kind}.png")
        pictures.save_picture(paths[-1], picture)
    return ImageResult(
        *(image, prediction.exit, prediction.exit_point, prediction.confidence, prediction.latency_ms, tuple(paths)),
        needed=prediction.needed if options.deadline_ms is None else None,
        policy=prediction.policy,
    )


def _predicted(cascade: Cascade, frame: NDArray[np.uint8], options: RunOptions) -> Prediction:
    return cascade(frame) if options.deadline_ms is None else list(cascade.refine(frame, options.deadline_ms))[-1]


def _panels(
    cascade: Cascade, frame: NDArray[np.uint8], taken: int, image: Path, options: RunOptions
) -> list[tuple[str, NDArray[np.uint8]]]:
    from mess_compile.report import pictures

    network = cascade.manifest.network
    panels = [("input", frame)]
    for prediction in cascade.refine(frame):
        mark = " (taken)" if prediction.exit == taken else ""
        caption = f"stage {prediction.exit}{mark}  {_sure(prediction)}{prediction.latency_ms:.1f} ms"
        panels.append((caption, frames.overlay(frame, prediction.labels, network.colours)))
    if options.truth is not None:
        path = options.truth / f"{image.stem}.png"
        labels = read_labels(path, _classes_of_truth(cascade, options.label_offset))
        if labels.shape != frame.shape[:2]:
            raise InputError(f"{path} is {labels.shape}, but {image} is {frame.shape[:2]}")
        panels.append(("truth", pictures.truth_overlay(frame, labels, network.colours)))
    return panels


def _classes_of_truth(cascade: Cascade, label_offset: int) -> ClassList:
    """The network's classes; other label values are void."""
    network = cascade.manifest.network
    return ClassList(
        network.classes,
        network.colours,
        frozenset(range(label_offset + len(network.classes), 256)),
        is_coloured=len({*network.colours}) == len(network.colours),
        label_offset=label_offset,
    )


@dataclass
class _VideoRun:
    """State of a video being processed."""

    exits: list[int]
    latencies_ms: list[float] = field(default_factory=list)
    failed: list[ImageFailure] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    stopped: bool = False


def _run_video(
    cascade: Cascade,
    source: str,
    output: Path,
    options: RunOptions,
    progress: Progress,
    fail: Callable[[ImageFailure], None],
) -> VideoResult:
    media = extras.video_module("data.video")
    stem = source.replace(":", "") if source.startswith(_CAMERA) else Path(source).stem
    video, labels = output / f"{stem}.overlay.mp4", output / f"{stem}.labels" if options.label_pictures else None
    state = _VideoRun([0] * len(cascade.plan.stages))
    with ExitStack() as opened:
        source_video = opened.enter_context(media.opened(source, options.every))
        label_folder = None if labels is None else opened.enter_context(_label_folder(labels))
        file = opened.enter_context(media.written(video, source_video.fps))
        total = min(filter(None, (source_video.frames, options.limit)), default=0)
        try:
            with closing(_segmented(cascade, source_video.shots(options.limit), options)) as found:
                for shot, prediction in found:
                    if not isinstance(prediction, Prediction):
                        error = _reason(prediction, f"frame {shot.number} of {source}")
                        state.failed.append(ImageFailure(source, error, (shot.number,)))
                        continue
                    file.write(_drawn(media, cascade, shot.frame, prediction), shot.slot)
                    if label_folder is not None:
                        _save_labels(label_folder / f"{shot.number:06}.png", prediction, cascade)
                    state.exits[prediction.exit - 1] += 1
                    state.latencies_ms.append(prediction.latency_ms)
                    progress(stem, len(state.latencies_ms), total)
        except KeyboardInterrupt:
            if not state.latencies_ms:
                raise
            state.stopped = True
        count = len(state.latencies_ms)
        if not count:
            why = "check that it plays, or that no other program uses the camera"
            raise InputError(f"{source} gave no frame: {state.failed[0].error if state.failed else why}")
        for failure in (*state.failed, *_undecoded(source, source_video.lost, source_video.unread)):
            fail(failure)
    return VideoResult(
        source=source,
        frames=count,
        exits=tuple(state.exits),
        mean_latency_ms=float(np.mean(state.latencies_ms)),
        frames_per_s=count / (time.monotonic() - state.started),
        video=video,
        labels=labels,
        unread=len(source_video.unread),
        stopped=state.stopped,
    )


def counts_frames(source: str) -> bool:
    """Whether the container stores its number of frames, by the file name."""
    return Path(source).suffix.lower() in _COUNTED


def _undecoded(source: str, lost: Sequence[int], unread: Sequence[int]) -> Iterator[ImageFailure]:
    missing = unread if counts_frames(source) else ()
    for numbers, words in ((lost, "cannot be decoded"), (missing, "are missing at its end")):
        if numbers:
            listed = ", ".join(map(str, numbers[:9])) + (f" and {len(numbers) - 9} more" if len(numbers) > 9 else "")
            yield ImageFailure(source, f"{source}: frames {listed} (from 0) {words}", tuple(numbers))


def _segmented(
    cascade: Cascade, shots: Iterator[Any], options: RunOptions
) -> Generator[tuple[Any, Prediction | MessError | MemoryError], None, None]:
    """Each shot with its prediction or its error; without a deadline, neighbouring frames overlap."""
    if options.deadline_ms is not None:
        for shot in shots:
            yield shot, _attempted(lambda frame: _predicted(cascade, frame, options), shot.frame)
        return
    waiting: deque[Any] = deque()

    def frames_of() -> Iterator[NDArray[np.uint8]]:
        for shot in shots:
            waiting.append(shot)
            yield shot.frame

    with closing(cascade.stream(frames_of())) as stream:
        while (found := _attempted(lambda at_end: next(stream, at_end), None)) is not None:
            if not waiting:  # it is the source that failed
                raise found
            yield waiting.popleft(), found


def _attempted(action: Callable[[Any], Any], given: Any) -> Any:
    """The result of the action, or the error of one frame."""
    try:
        return action(given)
    except (MessError, MemoryError) as error:
        return error


def _drawn(media: Any, cascade: Cascade, frame: NDArray[np.uint8], prediction: Prediction) -> NDArray[np.uint8]:
    exits = len(cascade.plan.stages)
    words = f"stage {prediction.exit} of {exits}  {_sure(prediction)}{prediction.latency_ms:.1f} ms"
    picture: NDArray[np.uint8] = media.annotated(cascade.overlay(frame, prediction), prediction.exit, exits, words)
    return picture


def _sure(prediction: Prediction) -> str:
    text = confidence_text(prediction.confidence, prediction.needed, prediction.policy)
    return f"{text}  " if text else ""


def _save_labels(path: Path, prediction: Prediction, cascade: Cascade) -> None:
    from mess_compile.report import pictures

    pictures.save_picture(path, pictures.label_picture(prediction.labels, cascade.manifest.network.colours))


def _label_folder(folder: Path) -> Any:
    """A folder that replaces one of an earlier run. Raises InputError when it holds other files."""
    if folder.exists() and not (folder.is_dir() and all(_LABELS.fullmatch(path.name) for path in folder.iterdir())):
        raise InputError(f"{folder} exists and holds other files than label pictures: name another folder (-o DIR)")
    return files.replaced_folder(folder)
