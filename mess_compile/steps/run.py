"""Pictures and videos through a bundle: labels, overlays, and the strip of refinement."""

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
from mess_compile.runtime.base.errors import InputError, MessError, PlaceError
from mess_compile.runtime.bundle import archive
from mess_compile.runtime.bundle.manifest import MANIFEST
from mess_compile.runtime.cascade import cascade as runtime_cascade
from mess_compile.runtime.cascade.cascade import Cascade, Prediction
from mess_compile.runtime.images import frames
from mess_compile.runtime.images.confidence import confidence_text
from mess_compile.runtime.images.pictures import OF_ONE_NAME, read_picture
from mess_compile.workspace import Progress, silent

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ogv", ".ts", ".wmv", ".mjpeg")
_COUNTED = (".mp4", ".m4v", ".mov", ".avi")
"""Videos that hold how many frames there are; others tell how long they last, and the number is a guess."""
_CAMERA = "camera:"
_LABELS = re.compile(r"\d{6}\.png")


@dataclass(frozen=True)
class RunOptions:
    """How a bundle is run. `truth` is a folder of label PNGs named as the images, for the end of the `progressive`
    strip; its first class has the value `label_offset`. Under a deadline a frame is refined, and its last result kept.
    Of folders, videos and cameras every so many frames are taken, at most `limit` of each; `label_pictures` are those
    of a video's frames."""

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
    """What `run` made of one image, and the pictures it wrote."""

    image: Path
    exit: int
    exit_point: int
    confidence: float | None
    latency_ms: float
    pictures: tuple[Path, ...]


@dataclass(frozen=True)
class VideoResult:
    """What `run` made of a video or camera: the frames that left at each exit, and the files it wrote.

    `unread` frames, at its end, were announced by the file and could not be read; `stopped`: by Ctrl-C.
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
    """What `run` could not do of a source, and why: an image or a whole video, or such `frames` of a video, from 0."""

    source: str
    error: str
    frames: tuple[int, ...] = ()


class RunError(MessError):
    """Some images or frames failed; `results` are those of the others, which are written."""

    def __init__(self, message: str, results: Sequence[Result], failures: Sequence[ImageFailure]) -> None:
        super().__init__(message)
        self.results, self.failures = tuple(results), tuple(failures)


def is_moving(source: Path) -> bool:
    """Whether it is a video or a camera, by its name."""
    return str(source).startswith(_CAMERA) or source.suffix.lower() in VIDEO_SUFFIXES


def run(
    bundle: Path,
    sources: Sequence[Path],
    output: Path = Path("predictions"),
    options: RunOptions = RunOptions(),
    done: Callable[[Result], None] = lambda result: None,
    progress: Progress = silent,
    failed: Callable[[ImageFailure], None] = lambda failure: None,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Result, ...]:
    """Segment images, those in folders, videos and `camera:N` with a bundle, and tell `done` or `failed` of each.

    `tell` is told which files of folders are left out.

    An image gets a palette PNG of labels, an overlay and on request the refinement strip, a video or camera one with
    overlay, exit and latency drawn on it; Ctrl-C ends it as its last frame does. An image or frame that fails does not
    end the rest: RunError comes at the end. Raises InputError, BundleError before anything is run.
    """
    _refuse_swapped(bundle, sources)
    images = [image for source in sources if not is_moving(source) for image in _images(source, options, tell)]
    videos = [source for source in sources if is_moving(source)]
    _check_names(images, videos)
    results: list[Result] = []
    failures: list[ImageFailure] = []

    def fail(failure: ImageFailure) -> None:
        failures.append(failure)
        failed(failure)

    with runtime_cascade.load(bundle, options.target) as cascade:
        if options.operating_point is not None:
            cascade.operating_point = options.operating_point
        for number, source in enumerate((*images, *videos)):
            try:
                if is_moving(source):
                    results.append(_run_video(cascade, str(source), output, options, progress, fail))
                else:
                    progress("run", number, len(images))
                    results.append(_run_image(cascade, source, output, options))
            except (MessError, MemoryError, OSError) as error:
                fail(ImageFailure(str(source), _reason(error, source)))
                continue
            done(results[-1])
    if failures:
        raise RunError(_failed_words(failures, len(images), len(videos), output), results, failures)
    return tuple(results)


def _reason(error: MessError | MemoryError | OSError, source: Path | str) -> str:
    """Why one image or frame fails; what ends every other one, too, is raised again."""
    if isinstance(error, PlaceError) or (isinstance(error, OSError) and error.errno not in OF_ONE_NAME):
        raise error
    if isinstance(error, MemoryError):
        return f"{source} takes more memory than there is: use smaller images"
    return f"{source}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _failed_words(failures: Sequence[ImageFailure], images: int, videos: int, output: Path) -> str:
    if images + videos == 1 and len(failures) == 1 and not failures[0].frames:
        return failures[0].error
    whole = [is_moving(Path(failure.source)) for failure in failures if not failure.frames]
    frames = Counter[str]()
    for failure in failures:
        frames[failure.source] += len(failure.frames)
    told = [f"{whole.count(False)} of {images} images"] if False in whole else []
    told += [f"{whole.count(True)} of {videos} videos"] if True in whole else []
    told += [f"{count} frame{'s' * (count > 1)} of {source}" for source, count in frames.items() if count]
    return f"{', '.join(told)} failed; what could be labelled is in {output}"


def _refuse_swapped(bundle: Path, sources: Sequence[Path]) -> None:
    """Raises InputError when the bundle does not come first."""
    if _is_bundle(bundle):
        return
    among = next((source for source in sources if _is_bundle(source)), None)
    if among is not None:
        others = shlex.join(str(source) for source in (bundle, *sources) if source != among)
        raise InputError(f"the bundle comes first, and {bundle} is none: `mess-compile run {among} {others}`")
    if bundle.suffix.lower() in IMAGE_SUFFIXES or is_moving(bundle):
        raise InputError(f"{bundle} is what to look at, and no bundle: `mess-compile run BUNDLE {bundle}`")


def _is_bundle(path: Path) -> bool:
    """A file, or the folder of one that was unpacked."""
    return archive.is_bundle(path) or (path / MANIFEST).is_file()


def _images(source: Path, options: RunOptions, tell: Callable[[str], None]) -> Sequence[Path]:
    if not source.is_dir():
        return [source]
    listing = listed_files(source)
    for note in listing.notes:
        tell(note)
    if not listing.paths:
        raise InputError(f"{source} holds no {', '.join(IMAGE_SUFFIXES)}; folders in it are not looked into")
    return listing.paths[:: options.every][: options.limit]


def _check_names(*kinds: Sequence[Path]) -> None:
    for sources in kinds:
        (stem, often), *_ = Counter(source.stem for source in sources).most_common(1) or [("", 0)]
        if often > 1:
            raise InputError(
                f"two sources are named {stem}: their pictures would share a name; run them one by one (-o DIR)"
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
        image, prediction.exit, prediction.exit_point, prediction.confidence, prediction.latency_ms, tuple(paths)
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
        caption = (
            f"exit {prediction.exit}{mark}  {confidence_text(prediction.confidence)}{prediction.latency_ms:.1f} ms"
        )
        panels.append((caption, frames.overlay(frame, prediction.labels, network.colours)))
    if options.truth is not None:
        path = options.truth / f"{image.stem}.png"
        labels = read_labels(path, _classes_of_truth(cascade, options.label_offset))
        if labels.shape != frame.shape[:2]:
            raise InputError(f"{path} is {labels.shape}, but {image} is {frame.shape[:2]}")
        panels.append(("truth", pictures.truth_overlay(frame, labels, network.colours)))
    return panels


def _classes_of_truth(cascade: Cascade, label_offset: int) -> ClassList:
    """The network's classes; what stands for none of them is void."""
    network = cascade.manifest.network
    return ClassList(
        network.classes,
        network.colours,
        frozenset(range(label_offset + len(network.classes), 256)),
        is_coloured=len({*network.colours}) == len(network.colours),
        label_offset=label_offset,
    )


@dataclass
class _Course:
    """A video under way."""

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
    course = _Course([0] * len(cascade.plan.stages))
    with ExitStack() as opened:
        shown = opened.enter_context(media.opened(source, options.every))
        kept = None if labels is None else opened.enter_context(_label_folder(labels))
        file = opened.enter_context(media.written(video, shown.fps))
        total = min(filter(None, (shown.frames, options.limit)), default=0)
        try:
            with closing(_segmented(cascade, shown.shots(options.limit), options)) as found:
                for shot, prediction in found:
                    if not isinstance(prediction, Prediction):
                        error = _reason(prediction, f"frame {shot.number} of {source}")
                        course.failed.append(ImageFailure(source, error, (shot.number,)))
                        continue
                    file.write(_drawn(media, cascade, shot.frame, prediction), shot.slot)
                    if kept is not None:
                        _save_labels(kept / f"{shot.number:06}.png", prediction, cascade)
                    course.exits[prediction.exit - 1] += 1
                    course.latencies_ms.append(prediction.latency_ms)
                    progress(stem, len(course.latencies_ms), total)
        except KeyboardInterrupt:
            if not course.latencies_ms:
                raise
            course.stopped = True
        count = len(course.latencies_ms)
        if not count:
            why = "see that it plays, or that nothing else uses the camera"
            raise InputError(f"{source} gave no frame: {course.failed[0].error if course.failed else why}")
        for failure in (*course.failed, *_undecoded(source, shown.lost, shown.unread)):
            fail(failure)
    return VideoResult(
        source=source,
        frames=count,
        exits=tuple(course.exits),
        mean_latency_ms=float(np.mean(course.latencies_ms)),
        frames_per_s=count / (time.monotonic() - course.started),
        video=video,
        labels=labels,
        unread=len(shown.unread),
        stopped=course.stopped,
    )


def counts_frames(source: str) -> bool:
    """Whether a video holds how many frames there are, by its name; others tell how long they last."""
    return Path(source).suffix.lower() in _COUNTED


def _undecoded(source: str, lost: Sequence[int], unread: Sequence[int]) -> Iterator[ImageFailure]:
    missing = unread if counts_frames(source) else ()
    for numbers, words in ((lost, "cannot be decoded"), (missing, "are missing at its end")):
        if numbers:
            shown = ", ".join(map(str, numbers[:9])) + (f" and {len(numbers) - 9} more" if len(numbers) > 9 else "")
            yield ImageFailure(source, f"{source}: frames {shown} (from 0) {words}", tuple(numbers))


def _segmented(
    cascade: Cascade, shots: Iterator[Any], options: RunOptions
) -> Generator[tuple[Any, Prediction | MessError | MemoryError], None, None]:
    """Each shot with its prediction, or with what failed; without a deadline, neighbouring frames overlap."""
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
    """What the action gives, or the error of one frame."""
    try:
        return action(given)
    except (MessError, MemoryError) as error:
        return error


def _drawn(media: Any, cascade: Cascade, frame: NDArray[np.uint8], prediction: Prediction) -> NDArray[np.uint8]:
    exits = len(cascade.plan.stages)
    words = f"exit {prediction.exit} of {exits}  {confidence_text(prediction.confidence)}{prediction.latency_ms:.1f} ms"
    picture: NDArray[np.uint8] = media.annotated(cascade.overlay(frame, prediction), prediction.exit, exits, words)
    return picture


def _save_labels(path: Path, prediction: Prediction, cascade: Cascade) -> None:
    from mess_compile.report import pictures

    pictures.save_picture(path, pictures.label_picture(prediction.labels, cascade.manifest.network.colours))


def _label_folder(folder: Path) -> Any:
    """One that replaces what an earlier run wrote there. Raises InputError when anything else lies there."""
    if folder.exists() and not (folder.is_dir() and all(_LABELS.fullmatch(path.name) for path in folder.iterdir())):
        raise InputError(f"{folder} is there and holds more than label pictures: name another folder (-o DIR)")
    return files.replaced_folder(folder)
