"""Building, measuring and scoring on a device for somebody elsewhere: a wish comes as a file, lines tell what happens.

Lines are `hello` and `state` first, then `building`, `built`, `failed`, `opened`, `window`, `ready`, `scored`, and
`state` again at the end. Windows are also kept in a file here, and a call begins with those in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from mess_compile.runtime.base import decode
from mess_compile.runtime.base import protocol as lines
from mess_compile.runtime.base.errors import EngineError, InputError, MessError
from mess_compile.runtime.base.protocol import Say
from mess_compile.runtime.engines.engine import LIBRARIES, Library, open_library
from mess_compile.runtime.engines.engine_cache import loadable
from mess_compile.runtime.machine import clocks, power
from mess_compile.runtime.machine.machine import Machine, this_machine
from mess_compile.runtime.measure import measure
from mess_compile.runtime.measure.job_pool import Job, Opened
from mess_compile.runtime.measure.measure import Effort, Window
from mess_compile.runtime.serve import scoring

FORMAT, VERSION = "mess-session", 1
CLOCKS = "clocks.json"
GRAPHS, ENGINES, WISHES, RESULTS, IMAGES = "graphs", "engines", "wishes", "results", "images"
"""Folders of the store: graphs by hash, weights in `graphs/weights`; wishes with the program that does them."""
_LOOK_S = 0.02


@dataclass(frozen=True)
class RequestedJob:
    """A job by name; `graph` is its ONNX file's SHA-256, None for a pseudo graph."""

    name: str
    graph: Optional[str]
    precision: str
    predecessor: Optional[str]


@dataclass(frozen=True)
class WorkRequest:
    """What to build, and then to measure: `measured` names jobs, the others only run before those; or to score.

    `run` tells one measurement from another of the same jobs. `frame` is the SHA-256 of a .npy file, uint8 (H, W, 3);
    `thresholds` are (T, K). `exits` name jobs, by whose engines images are scored. With `lock_clocks` the clocks are
    held while it is measured.
    """

    run: str
    library: str
    jobs: Tuple[RequestedJob, ...]
    measured: Tuple[str, ...]
    reference: str
    effort: Effort
    frame: str
    thresholds: Tuple[Tuple[float, ...], ...]
    exits: Optional[scoring.ScoredExits] = None
    lock_clocks: bool = False


@dataclass(frozen=True)
class Hello:
    """What a device says of itself first; `facts` is what a measurement there depends on."""

    library: str
    version: str
    machine: Machine
    facts: Dict[str, str]


def wish_to_json(wish: WorkRequest) -> str:
    return json.dumps(decode.encode(wish, FORMAT, VERSION), sort_keys=True)


def wish_from_json(text: str) -> WorkRequest:
    """Raises InputError naming what is wrong."""
    wish: WorkRequest = lines.wish_of(WorkRequest, text, FORMAT, VERSION)
    if wish.library not in LIBRARIES:
        raise InputError(f"the wish is for {wish.library!r}, not one of {', '.join(LIBRARIES)}")
    return wish


def serve(store: Path, name: str, say: Say) -> None:
    """Do what the file `name` (its SHA-256) among the store's wishes says. Raises MessError, OSError."""
    text = (store / WISHES / name).read_bytes()
    if hashlib.sha256(text).hexdigest() != name:
        raise InputError(f"the wish {name[:12]} arrived damaged: run the same command again")
    wish = wish_from_json(text.decode("utf-8"))
    with closing(open_library(wish.library)) as library:
        hello = Hello(library.name, library.version, this_machine(), describe_machine())
        say("hello", asdict(hello))
        say("state", power.state_to_json(power.read_state()))
        jobs = _built(library, wish, store, say)
        if wish.measured:
            with clocks.lock_clocks(store / CLOCKS) if wish.lock_clocks else nullcontext():
                _measure(library, wish, jobs, store, name, say)
        if wish.exits is not None:
            _score(library, wish, wish.exits, jobs, store, say)
    say("state", power.state_to_json(power.read_state()))


def _built(library: Library, wish: WorkRequest, store: Path, say: Say) -> List[Job]:
    """The jobs with what the library loads; a graph that does not build is told and left out."""
    jobs = []
    for wanted in wish.jobs:
        path = None if wanted.graph is None else store / GRAPHS / wanted.graph
        if path is not None:
            say("building", wanted.name)
            start, known = time.monotonic(), _engines_in(store / ENGINES)
            try:
                path = loadable(library, path, wanted.precision, store / ENGINES)
            except MessError as error:
                say("failed", {"job": wanted.name, "error": str(error)})
                continue
            say("built", {"job": wanted.name, "seconds": round(time.monotonic() - start, 3), **_made(path, known)})
        jobs.append(Job(wanted.name, path, wanted.predecessor))
    return jobs


def _engines_in(folder: Path) -> Dict[Path, int]:
    """The engines that are there, each with the time of its writing in ns."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.engine")}


def _made(path: Path, known: Dict[Path, int]) -> Dict[str, Any]:
    """What `BuiltThere` of the other side says of what the library loads; `known` was there before."""
    found = path.stat()
    now = path.suffix == ".engine" and known.get(path) != found.st_mtime_ns
    return {"key": path.stem, "bytes": found.st_size, "now": now}


def _measure(library: Library, wish: WorkRequest, jobs: List[Job], store: Path, name: str, say: Say) -> None:
    results = store / RESULTS / f"{name}.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    earlier = [event for event in events_in(results) if isinstance(event, Window)]
    frame = np.load(store / GRAPHS / wish.frame, allow_pickle=False)
    thresholds = np.array(wish.thresholds, np.float32)
    task = measure.MeasureTask(jobs, frame, thresholds, wish.reference, wish.measured, earlier)
    events = measure.measure(library, task, wish.effort, power.power_meter())
    with results.open("a", encoding="utf-8") as stream:
        for event in events:
            kind, content = told(event)
            stream.write(lines.line_of(kind, content) + "\n")
            stream.flush()
            say(kind, content)


def _score(
    library: Library, wish: WorkRequest, exits: scoring.ScoredExits, jobs: List[Job], store: Path, say: Say
) -> None:
    """Score files of images as they come, and remove each after it; whoever sends them ends this program."""
    paths = {job.name: job.path for job in jobs if job.path is not None}
    absent = [name for name in exits.engines if name not in paths]
    if absent:
        raise EngineError(f"{absent[0]} has no engine here any more: run the same command again")
    folder = store / IMAGES
    folder.mkdir(exist_ok=True)
    for left in _whole(folder):
        left.unlink()  # sent to a program that was ended since
    with scoring.open_scorer(exits, paths, library, np.array(wish.thresholds, np.float32)) as scorer:
        while True:
            say("ready", None)
            path = _arrived(folder)
            for index, (frame, labels) in enumerate(scoring.read_images(path)):
                score = scorer.score(frame, labels, labels != scoring.IGNORED)
                say("scored", scoring.told(path.name, index, score))
            path.unlink()


def _arrived(folder: Path) -> Path:
    """A file in `folder`, once there is one."""
    while True:
        for path in _whole(folder):
            return path
        time.sleep(_LOOK_S)


def _whole(folder: Path) -> List[Path]:
    """The files in `folder` that have arrived."""
    return [path for path in folder.iterdir() if path.is_file()]


def told(event: Union[Opened, Window]) -> Tuple[str, Dict[str, Any]]:
    """An event as a line says it."""
    return ("window" if isinstance(event, Window) else "opened"), asdict(event)


def events_in(path: Path) -> Iterator[Union[Opened, Window]]:
    """The windows and opened engines in a file of lines; half-written and damaged lines are none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        event = event_of(line)
        if event is not None:
            yield event


def event_of(line: str) -> Optional[Union[Opened, Window]]:
    """What a line says was measured; None when it says something else, or times that are none."""
    found = lines.said(line)
    return None if found is None else event_from(*found)


def event_from(kind: str, content: Any) -> Optional[Union[Opened, Window]]:
    """As `event_of`, of what `lines.said` gives."""
    kinds: Dict[str, Any] = {"window": Window, "opened": Opened}
    try:
        event = decode.decode(kinds[kind], content, kind)
    except (KeyError, decode.DecodeError):
        return None
    return event if isinstance(event, Opened) or _is_sound(event) else None


def _is_sound(window: Window) -> bool:
    counts = {0, len(window.wall_ms)}
    others = (*window.device_ms, *window.ticks_ms, window.spent_s, window.waited_s)
    optional = window.power_mw or 0.0, window.waited_tick_ms or 0.0
    whole = bool(window.wall_ms) and len(window.device_ms) in counts
    return whole and min(*window.wall_ms, *others, *optional) >= 0 and window.round >= 0


def describe_machine() -> Dict[str, str]:
    """What a measurement on this machine depends on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(errors="replace").splitlines()
        named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = named[0] if named else model
    return {
        "cpu": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "load_average": f"{os.getloadavg()[0]:.2f}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "identity": _identity(),
    }


def _identity() -> str:
    """By which one device is told from another of its kind: a hash of the machine's id, which itself stays private."""
    for place in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            text = Path(place).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if text:
            return hashlib.sha256(f"mess-compile {text}".encode("ascii")).hexdigest()[:12]
    return hashlib.sha256(f"mess-compile {platform.node()}".encode("utf-8")).hexdigest()[:12]


def main(arguments: Sequence[str]) -> int:
    """`STORE NAME`: do what the wish of that name in a store says, by lines on standard output; the exit code."""
    store, name = Path(arguments[0]), arguments[1]
    return lines.tell(lambda say: serve(store, name, say), store)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
