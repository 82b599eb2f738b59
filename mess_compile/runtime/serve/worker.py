"""Builds, measures and scores on a device for a client over SSH: a request comes as a file, replies are printed.

Replies are `hello` and `state` first, then `building`, `built`, `failed`, `opened`, `window`, `ready`, `scored`, and
`state` again at the end. Windows are also written to a file on the device; a later call continues after those in it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from mess_compile.runtime.base import decode, protocol
from mess_compile.runtime.base.errors import EngineError, InputError, MessError
from mess_compile.runtime.base.protocol import Send
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
GRAPHS, ENGINES, REQUESTS, RESULTS, IMAGES = "graphs", "engines", "requests", "results", "images"
"""Folders of the store: graphs by hash, weights in `graphs/weights`; requests beside the program that serves them."""
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
    """Jobs to build, and then to measure or to score with.

    Jobs in `measured` are measured, the others only run as predecessors; `run` distinguishes measurements of the same
    jobs. `frame` is the SHA-256 of a .npy file, uint8 (H, W, 3); `thresholds` are (T, K). `exits` name the jobs whose
    engines score images. With `lock_clocks` the clocks are locked during the measurement.
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
    """What a device is; `facts` are what a measurement on it depends on."""

    library: str
    version: str
    machine: Machine
    facts: Dict[str, str]


@dataclass(frozen=True)
class BuiltEngine:
    """The engine of a job: its size, how long it took to build, and its key, a hash of everything it depends on.

    `now` is whether this call built it; otherwise the device had it.
    """

    job: str
    key: str
    bytes: int
    seconds: float
    now: bool


@dataclass(frozen=True)
class BuildFailure:
    """Why a job has no engine."""

    job: str
    error: str


def request_to_json(request: WorkRequest) -> str:
    return protocol.request_to_json(request, FORMAT, VERSION)


def request_from_json(text: str) -> WorkRequest:
    """Raises InputError naming what is wrong."""
    request: WorkRequest = protocol.request_from_json(WorkRequest, text, FORMAT, VERSION)
    if request.library not in LIBRARIES:
        raise InputError(f"the request is for {request.library!r}, not one of {', '.join(LIBRARIES)}")
    return request


def serve(store: Path, name: str, send: Send) -> None:
    """Serve the request in the store's file `name`, its SHA-256. Raises MessError, OSError."""
    text = (store / REQUESTS / name).read_bytes()
    if hashlib.sha256(text).hexdigest() != name:
        raise InputError(f"request {name[:12]} arrived damaged: run the same command again")
    request = request_from_json(text.decode("utf-8"))
    with closing(open_library(request.library)) as library:
        hello = Hello(library.name, library.version, this_machine(), describe_machine())
        send("hello", asdict(hello))
        send("state", power.state_to_json(power.read_state()))
        jobs = _build(library, request, store, send)
        if request.measured:
            with clocks.lock_clocks(store / CLOCKS) if request.lock_clocks else nullcontext():
                _measure(library, request, jobs, store, name, send)
        if request.exits is not None:
            _score(library, request, request.exits, jobs, store, send)
    send("state", power.state_to_json(power.read_state()))


def _build(library: Library, request: WorkRequest, store: Path, send: Send) -> List[Job]:
    """The jobs with what the library loads; a graph that does not build is reported and left out."""
    jobs = []
    for job in request.jobs:
        path = None if job.graph is None else store / GRAPHS / job.graph
        if path is not None:
            send("building", job.name)
            start, known = time.monotonic(), _engines_in(store / ENGINES)
            try:
                path = loadable(library, path, job.precision, store / ENGINES)
            except MessError as error:
                send("failed", asdict(BuildFailure(job.name, str(error))))
                continue
            send("built", asdict(_built_engine(job.name, path, known, time.monotonic() - start)))
        jobs.append(Job(job.name, path, job.predecessor))
    return jobs


def _engines_in(folder: Path) -> Dict[Path, int]:
    """The engines in a folder, each with its modification time in ns."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.engine")}


def _built_engine(job: str, path: Path, known: Dict[Path, int], seconds: float) -> BuiltEngine:
    """What the library loads for a job; the engines in `known` were there before."""
    found = path.stat()
    now = path.suffix == ".engine" and known.get(path) != found.st_mtime_ns
    return BuiltEngine(job, path.stem, found.st_size, round(seconds, 3), now)


def _measure(library: Library, request: WorkRequest, jobs: List[Job], store: Path, name: str, send: Send) -> None:
    results = store / RESULTS / f"{name}.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    earlier = [event for event in read_events(results) if isinstance(event, Window)]
    frame = np.load(store / GRAPHS / request.frame, allow_pickle=False)
    thresholds = np.array(request.thresholds, np.float32)
    task = measure.MeasureTask(jobs, frame, thresholds, request.reference, request.measured, earlier)
    events = measure.measure(library, task, request.effort, power.power_meter())
    with results.open("a", encoding="utf-8") as stream:
        for event in events:
            kind, content = event_to_message(event)
            stream.write(protocol.message_to_line(kind, content) + "\n")
            stream.flush()
            send(kind, content)


def _score(
    library: Library, request: WorkRequest, exits: scoring.ScoredExits, jobs: List[Job], store: Path, send: Send
) -> None:
    """Score each file of images that arrives, then remove it; runs until the client stops this program."""
    paths = {job.name: job.path for job in jobs if job.path is not None}
    missing = [name for name in exits.engines if name not in paths]
    if missing:
        raise EngineError(f"the engine of {missing[0]} is no longer on the device: run the same command again")
    folder = store / IMAGES
    folder.mkdir(exist_ok=True)
    for left in _files_in(folder):
        left.unlink()  # sent to an earlier program, which has ended
    with scoring.open_scorer(exits, paths, library, np.array(request.thresholds, np.float32)) as scorer:
        while True:
            send("ready", None)
            path = _next_file(folder)
            for index, (frame, labels) in enumerate(scoring.read_images(path)):
                score = scorer.score(frame, labels, labels != scoring.IGNORED)
                send("scored", scoring.score_to_message(path.name, index, score))
            path.unlink()


def _next_file(folder: Path) -> Path:
    """Wait for a file in `folder`."""
    while True:
        for path in _files_in(folder):
            return path
        time.sleep(_LOOK_S)


def _files_in(folder: Path) -> List[Path]:
    """The files in `folder`, without the folder of a transfer that is under way."""
    return [path for path in folder.iterdir() if path.is_file()]


def event_to_message(event: Union[Opened, Window]) -> Tuple[str, Dict[str, Any]]:
    """Kind and content of the message for an event."""
    return ("window" if isinstance(event, Window) else "opened"), asdict(event)


def read_events(path: Path) -> Iterator[Union[Opened, Window]]:
    """The windows and opened engines in a file of messages; half-written and damaged lines are skipped."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        event = event_from_line(line)
        if event is not None:
            yield event


def event_from_line(line: str) -> Optional[Union[Opened, Window]]:
    """The event in a line; None for any other message, and for times that are not possible."""
    message = protocol.message_from_line(line)
    return None if message is None else event_from_message(*message)


def event_from_message(kind: str, content: Any) -> Optional[Union[Opened, Window]]:
    """The event in a message, as `event_from_line`."""
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
    """Distinguishes devices of one kind: a hash of the machine's id, which itself stays private."""
    for place in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            text = Path(place).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if text:
            return hashlib.sha256(f"mess-compile {text}".encode("ascii")).hexdigest()[:12]
    return hashlib.sha256(f"mess-compile {platform.node()}".encode("utf-8")).hexdigest()[:12]


def main(arguments: Sequence[str]) -> int:
    """`STORE NAME`: serve the request of that name in a store, with replies on standard output; the exit code."""
    store, name = Path(arguments[0]), arguments[1]
    return protocol.serve_messages(lambda send: serve(store, name, send), store)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
