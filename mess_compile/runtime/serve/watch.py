"""Labels the frames that arrive in a folder with the version of a bundle in use, and switches between frames.

FOLDER/in/NAME.png              frames, renamed into it when complete; removed when their labels are written
FOLDER/out/NAME.labels.png      labels as a palette PNG
FOLDER/refused/                 files that are not images, or that failed: engine, memory, file name
FOLDER/metrics.prom             for Prometheus (node_exporter's textfile collector)
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Collection, Iterator, List, Optional, Sequence, Set, Tuple

from mess_compile.runtime.base.errors import MessError, PlaceError, one_line
from mess_compile.runtime.bundle.manifest import MANIFEST
from mess_compile.runtime.bundle.signature import Signers
from mess_compile.runtime.cascade.cascade import Cascade, load
from mess_compile.runtime.images.pictures import read_picture, write_labels

REFUSED = "refused"
METRICS_S = 10.0
_LOOK_S = 0.02
_FULL_S = 1.0
_BUNDLE_S = 0.25
"""How often to check for another version."""


@dataclass(frozen=True)
class Ended:
    """Why watching ended, a new bundle or a signal, and how many frames were refused."""

    by_new_bundle: bool
    refused: int


def watch(bundle: Path, folder: Path, target: Optional[str], signers: Optional[Signers]) -> Ended:
    """Segment the frames that arrive until SIGTERM or SIGINT, or until the bundle is replaced.

    A frame stays in `in` until its labels are written, so that a killed process loses none. Raises MessError when the
    bundle does not load.
    """
    for name in ("in", "out", REFUSED):
        (folder / name).mkdir(parents=True, exist_ok=True)
    known = _version(bundle)
    with _ending() as ended:
        with load(bundle, target, on_failure="fallback", signers=signers) as cascade:
            refused = _label(cascade, bundle, known, folder, ended)
        return Ended(not ended, refused)  # only now: a signal may have come while the cascade was closed


def _label(cascade: Cascade, bundle: Path, known: Optional[Tuple[str, int]], folder: Path, ended: Sequence[int]) -> int:
    """Label frames until a signal comes or the bundle is not the `known` one; returns how many were refused."""
    written, checked = 0.0, time.monotonic()
    refused = 0
    stuck: Set[str] = set()
    while not ended:
        frame = _oldest(folder / "in", stuck)
        if frame is not None:
            refused += _is_refused(cascade, frame, folder, stuck)
        if time.monotonic() - written >= METRICS_S:
            _write_metrics(cascade, folder / "metrics.prom")
            written = time.monotonic()
        if time.monotonic() - checked >= _BUNDLE_S:
            if _version(bundle) not in (known, None):
                break
            checked = time.monotonic()
        if frame is None:
            time.sleep(_LOOK_S)
    _write_metrics(cascade, folder / "metrics.prom")
    return refused


@contextmanager
def _ending() -> Iterator[List[int]]:
    """Yields the list of stop signals that have come; it grows."""
    received: List[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _version(bundle: Path) -> Optional[Tuple[str, int]]:
    """What identifies a bundle; None while there is none, between two versions."""
    place = os.path.realpath(bundle)
    try:
        found = os.stat(os.path.join(place, MANIFEST) if os.path.isdir(place) else place)
    except OSError:
        return None
    return place, found.st_ino


def _oldest(folder: Path, stuck: Collection[str]) -> Optional[Path]:
    """The oldest frame, without `stuck` ones, which could not be moved, and hidden ones, which are being written."""
    arrived = []
    with os.scandir(folder) as found:
        for entry in found:
            with suppress(FileNotFoundError):  # it was removed meanwhile
                if not entry.name.startswith(".") and entry.name not in stuck and entry.is_file():
                    arrived.append((entry.stat().st_mtime_ns, entry.name))
    return folder / min(arrived)[1] if arrived else None


def _is_refused(cascade: Cascade, path: Path, folder: Path, stuck: Set[str]) -> bool:
    """Segment a frame, or move it to `refused`, so that those behind it have their turn; True when it is refused."""
    done = _segment(cascade, path, folder)
    if not done:
        _put_aside(path, folder, stuck)
    return not done


def _segment(cascade: Cascade, path: Path, folder: Path) -> bool:
    """Write a frame's labels and remove it, or leave it for a retry; False when it has to be refused."""
    try:
        prediction = cascade(read_picture(path))
    except (MessError, MemoryError) as error:
        short = f"{path} needs more memory than there is: send smaller frames"
        _report_error(error if isinstance(error, MessError) else short)
        return False
    try:
        colours = cascade.manifest.network.colours
        write_labels(folder / "out" / f"{path.stem}.labels.png", prediction.labels, colours)
    except PlaceError as error:  # a full disk: the frame waits
        _report_error(error)
        time.sleep(_FULL_S)
        return True
    except MessError as error:  # a name that is too long: waiting would block all frames behind it
        _report_error(error)
        return False
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        _report_error(f"{path} cannot be removed ({one_line(error.strerror)}); its labels are written")
        return False
    return True


def _put_aside(path: Path, folder: Path, stuck: Set[str]) -> None:
    try:
        (folder / REFUSED).mkdir(exist_ok=True)
        os.replace(path, folder / REFUSED / path.name)
    except FileNotFoundError:
        pass
    except OSError as error:
        stuck.add(path.name)
        _report_error(
            f"{path} cannot be moved to {folder / REFUSED} ({one_line(error.strerror)}): it is left where it is"
        )


def _report_error(error: object) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


def _write_metrics(cascade: Cascade, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_text(cascade.metrics().to_prometheus(), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:  # frames matter more
        _report_error(error)
