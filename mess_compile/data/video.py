"""Reads frames from a video file or a camera, and writes annotated videos, by OpenCV."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # errors are reported in our own messages
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

import cv2

from mess_compile import files
from mess_compile.array_types import Pixels
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.base.lfs_pointers import refuse_pointer

CAMERA = "camera:"
_NO_CAMERA = (
    "cannot be opened: check that it is connected, that no other program uses it, and that you may read /dev/video*"
)
_NO_VIDEO = (
    "is not a video that OpenCV can read: it is damaged, or has a codec that OpenCV lacks (convert it: `ffmpeg -i IN "
    "OUT.mp4`)"
)
_USUAL_FPS = 25.0
_CODEC = "mp4v"
"""Every build of OpenCV with FFmpeg has it, the wheels, too; it needs even sides."""
_BAND, _BOX, _DARK, _TEXT = (24, 24, 24), (255, 196, 0), (90, 90, 90), (255, 255, 255)


@dataclass(frozen=True)
class Shot:
    """A frame, uint8 RGB (H, W, 3); its number in the source from 0; and its place in a video of `VideoSource.fps`."""

    number: int
    frame: Pixels
    slot: int


class VideoSource:
    """An open video file or camera; `frames` is the number of frames that it announces, 0 if unknown.

    Among the selected frames, `lost` counts those between others that could not be decoded, and `unread` those at the
    end that were announced but did not come.
    """

    def __init__(self, capture: cv2.VideoCapture, live: bool, every: int) -> None:
        self._capture, self._live, self._every = capture, live, every
        fps, frames = (capture.get(key) for key in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
        self._announced = 0 if live or not 0 < frames < 1 << 31 else int(frames)
        self.fps = (fps if 0 < fps < 1000 else _USUAL_FPS) / every
        self.frames = -(-self._announced // every)
        self.lost: list[int] = []
        self.unread: list[int] = []

    def shots(self, limit: int | None) -> Iterator[Shot]:
        """Every `every`-th frame, at most `limit`; from a camera the current frame, placed by its time."""
        taken, started = 0, time.monotonic()
        for number in self._grabbed():
            if number % self._every:
                continue
            good, pixels = self._capture.retrieve()
            if not good:
                self.lost.append(number)
                continue
            slot = round((time.monotonic() - started) * self.fps) if self._live else number // self._every
            yield Shot(number, cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), slot)
            taken += 1
            if taken == limit:
                return

    def _grabbed(self) -> Iterator[int]:
        """The numbers of the grabbed frames, each ready to be decoded.

        OpenCV reports a damaged frame like the end of the file, so the announced frames after it are tried, too.
        """
        number, damaged = 0, 0
        while not damaged or number + damaged <= self._announced:
            if not self._capture.grab():
                damaged += 1
                continue
            self.lost += self._wanted(number, number + damaged)
            number, damaged = number + damaged, 0
            yield number
            number += 1
        self.unread += self._wanted(number, self._announced)

    def _wanted(self, first: int, end: int) -> list[int]:
        return [number for number in range(first, end) if number % self._every == 0]


@contextmanager
def opened(name: str, every: int) -> Iterator[VideoSource]:
    """Open a file, or `camera:N`, to take every `every`-th frame. Raises InputError when it has no frame."""
    live = name.startswith(CAMERA)
    if live and not name[len(CAMERA) :].isdecimal():
        raise InputError(f"{name!r} is not a camera: write camera:0, or another number")
    if not live and not Path(name).is_file():
        raise InputError(f"{name} does not exist, or is not a file")
    _check_name(name)
    if not live:
        refuse_pointer(Path(name))
    capture = cv2.VideoCapture(int(name[len(CAMERA) :]) if live else name)
    try:
        if not capture.isOpened():
            raise InputError(f"{name} {_NO_CAMERA if live else _NO_VIDEO}")
        yield VideoSource(capture, live, every)
    finally:
        capture.release()


def _check_name(name: str) -> None:
    """Raises InputError for a name that OpenCV cannot open."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} is not UTF-8, and OpenCV cannot open such a name: rename the file or folder"
        ) from error


class Video:
    """A video file that is being written; its first picture sets its size."""

    def __init__(self, path: Path, fps: float) -> None:
        self._path, self._fps = path, fps
        self._writer: cv2.VideoWriter | None = None
        self.slots = 0
        self._unsure = 0

    @property
    def possible_slots(self) -> range:
        """The pictures that the file may have: one more where Ctrl-C came between writing and counting it."""
        return range(self.slots, self.slots + self._unsure + 1)

    def write(self, picture: Pixels, slot: int) -> None:
        """Repeat the last picture up to `slot`, then write this one, uint8 RGB (H, W, 3). Raises InputError without a
        codec.
        """
        height, width = picture.shape[:2]
        even = cv2.copyMakeBorder(picture, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        if self._writer is None:
            self._writer = self._open(even)
        for _ in range(max(slot + 1 - self.slots, 1)):
            self._unsure = 1
            self._writer.write(cv2.cvtColor(even, cv2.COLOR_RGB2BGR))
            self.slots += 1
            self._unsure = 0

    def _open(self, picture: Pixels) -> cv2.VideoWriter:
        size = picture.shape[1], picture.shape[0]
        writer = cv2.VideoWriter(str(self._path), cv2.VideoWriter.fourcc(*_CODEC), self._fps, size)
        if not writer.isOpened():
            raise InputError(
                f"this OpenCV ({cv2.__version__}) cannot write {_CODEC} video of {size[0]}x{size[1]}: run `pip "
                "install opencv-python-headless`, whose wheels can"
            )
        return writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()


@contextmanager
def written(path: Path, fps: float) -> Iterator[Video]:
    """A video that appears at `path` when the body succeeds, once all of its pictures can be read back.

    Raises InputError when they cannot, which OpenCV does not report.
    """
    _check_name(str(path))
    with files.replaced(path, path.suffix) as temporary:
        video = Video(temporary, fps)
        try:
            yield video
        finally:
            video.close()
        written = _frames_in(temporary)
        if written not in video.possible_slots:
            raise InputError(f"{path} would have {written} of {video.slots} frames: check that the disk is not full")


def _frames_in(path: Path) -> int:
    capture = cv2.VideoCapture(str(path))
    try:
        return int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    finally:
        capture.release()


def annotated(picture: Pixels, exit_: int, exits: int, words: str) -> Pixels:
    """The picture, uint8 RGB (H, W, 3), with a band: a box for each exit, filled up to the one taken, then `words`."""
    image: Pixels = picture.copy()
    height, width = image.shape[:2]
    band = min(max(height // 12, 12), 40)
    side, gap = band // 2, band // 4
    cv2.rectangle(image, (0, 0), (width - 1, band - 1), _BAND, -1)
    for number in range(exits):
        left = gap + number * (side + gap)
        colour = _BOX if number < exit_ else _DARK
        cv2.rectangle(image, (left, gap), (left + side - 1, gap + side - 1), colour, -1)
    start = gap + exits * (side + gap) + gap
    (wide, tall), _ = cv2.getTextSize(words, cv2.FONT_HERSHEY_SIMPLEX, 1.0, 1)
    scale = min(0.6 * band / tall, (width - start - gap) / wide)
    if scale > 0:
        place = start, gap + side
        cv2.putText(image, words, place, cv2.FONT_HERSHEY_SIMPLEX, scale, _TEXT, 1, cv2.LINE_AA)
    return image
