"""Frame after frame from a folder, by the version of a bundle that is in use; a new one is taken up between frames.

FOLDER/in/NAME.png              frames, renamed into it when they are whole; removed when their labels are written
FOLDER/out/NAME.labels.png      labels as a palette PNG
FOLDER/refused/                 what is no picture, or what no engine, memory or file name here can take
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
"""How often one looks whether there is another version."""


@dataclass(frozen=True)
class Ended:
    """Why watching ended, by a new bundle or by a signal, and how many frames were refused."""

    by_new_bundle: bool
    refused: int


def watch(bundle: Path, folder: Path, target: Optional[str], signers: Optional[Signers]) -> Ended:
    """Segment what arrives until SIGTERM or SIGINT, or until the bundle was replaced.

    A frame stays where it is until its labels are written: one who is killed here loses none. Raises MessError when
    the bundle does not load.
    """
    for name in ("in", "out", REFUSED):
        (folder / name).mkdir(parents=True, exist_ok=True)
    known = _version(bundle)
    with _ending() as ended:
        with load(bundle, target, on_failure="fallback", signers=signers) as cascade:
            refused = _label(cascade, bundle, known, folder, ended)
        return Ended(not ended, refused)  # only now: a signal may have come while the cascade was let go


def _label(cascade: Cascade, bundle: Path, known: Optional[Tuple[str, int]], folder: Path, ended: Sequence[int]) -> int:
    """Until a signal has come, or the bundle is another than the one that is known; how many frames were refused."""
    told, looked = 0.0, time.monotonic()
    refused = 0
    stuck: Set[str] = set()
    while not ended:
        frame = _oldest(folder / "in", stuck)
        if frame is not None:
            refused += _is_refused(cascade, frame, folder, stuck)
        if time.monotonic() - told >= METRICS_S:
            _write_metrics(cascade, folder / "metrics.prom")
            told = time.monotonic()
        if time.monotonic() - looked >= _BUNDLE_S:
            if _version(bundle) not in (known, None):
                break
            looked = time.monotonic()
        if frame is None:
            time.sleep(_LOOK_S)
    _write_metrics(cascade, folder / "metrics.prom")
    return refused


@contextmanager
def _ending() -> Iterator[List[int]]:
    """The signals to end that have come."""
    come: List[int] = []

    def note(number: int, frame: Any) -> None:
        come.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield come
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _version(bundle: Path) -> Optional[Tuple[str, int]]:
    """By what one sees that the bundle is another; None for a moment in which there is none."""
    place = os.path.realpath(bundle)
    try:
        found = os.stat(os.path.join(place, MANIFEST) if os.path.isdir(place) else place)
    except OSError:
        return None
    return place, found.st_ino


def _oldest(folder: Path, stuck: Collection[str]) -> Optional[Path]:
    """Of the frames that have arrived, but for those that could not be put aside; hidden files are being written."""
    arrived = []
    with os.scandir(folder) as found:
        for entry in found:
            with suppress(FileNotFoundError):  # somebody took it away
                if not entry.name.startswith(".") and entry.name not in stuck and entry.is_file():
                    arrived.append((entry.stat().st_mtime_ns, entry.name))
    return folder / min(arrived)[1] if arrived else None


def _is_refused(cascade: Cascade, path: Path, folder: Path, stuck: Set[str]) -> bool:
    """Segment a frame, or put it aside: it makes way for those behind it in any case."""
    done = _segment(cascade, path, folder)
    if not done:
        _put_aside(path, folder, stuck)
    return not done


def _segment(cascade: Cascade, path: Path, folder: Path) -> bool:
    """Write a frame's labels and remove it, or leave it for a later try; False when it is to be refused."""
    try:
        prediction = cascade(read_picture(path))
    except (MessError, MemoryError) as error:
        short = f"{path} takes more memory than there is: send smaller frames"
        _complain(error if isinstance(error, MessError) else short)
        return False
    try:
        colours = cascade.manifest.network.colours
        write_labels(folder / "out" / f"{path.stem}.labels.png", prediction.labels, colours)
    except PlaceError as error:  # a full disk: the frame waits
        _complain(error)
        time.sleep(_FULL_S)
        return True
    except MessError as error:  # a name that is too long: it would wait for ever, and all frames behind it
        _complain(error)
        return False
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        _complain(f"{path} cannot be removed ({one_line(error.strerror)}); its labels are written")
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
        _complain(f"{path} cannot be moved to {folder / REFUSED} ({one_line(error.strerror)}): it is left where it is")


def _complain(error: object) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


def _write_metrics(cascade: Cascade, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_text(cascade.metrics().to_prometheus(), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:  # frames matter more
        _complain(error)
