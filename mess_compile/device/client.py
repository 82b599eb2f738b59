"""A device over SSH whose Python builds, measures and scores: files are pushed by hash, replies come line by line."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile import files
from mess_compile.array_types import Pixels
from mess_compile.device.payload import SESSION, runtime_zip
from mess_compile.device.remote import Remote, RemoteError
from mess_compile.device.scripts import shell_script
from mess_compile.device.session import PID_FILE, STORE, MeasureRequest
from mess_compile.graph.store import WEIGHTS, stored_weights
from mess_compile.reporter import Progress
from mess_compile.runtime.base import decode, protocol
from mess_compile.runtime.base.errors import EngineError, InputError
from mess_compile.runtime.images import frames, npy
from mess_compile.runtime.machine import power
from mess_compile.runtime.measure.job_pool import Opened
from mess_compile.runtime.measure.measure import Effort, Window
from mess_compile.runtime.serve import scoring, worker
from mess_compile.runtime.serve.scoring import Score, ScoredExits
from mess_compile.runtime.serve.worker import BuildFailure, BuiltEngine, Hello, RequestedJob, WorkRequest

LabelledFrame = tuple[Pixels, Pixels, NDArray[np.bool_]]
"""A frame (H, W, 3), its labels (H, W), and which of these count."""


@dataclass
class PythonSession:
    """A device that works by its own Python, the one that its host names: a `DeviceSession` that also scores images."""

    remote: Remote
    library: str
    frame: NDArray[np.uint8]
    thresholds: NDArray[np.float32]
    progress: Progress
    lock_clocks: bool = False
    hello: Hello | None = None
    states: list[power.DeviceState] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    built: dict[str, BuiltEngine] = field(default_factory=dict)

    measures_transfers = True

    def greet(self) -> Hello:
        """Ask the device what it is, before anything is built there. Raises RemoteError, EngineError, InputError."""
        try:
            for _ in self._replies(self._request("greet")):
                pass
        except RemoteError as error:
            if not error.lost:
                self.remote.refuse_old_python()
            raise
        if self.hello is None:
            raise InputError(
                f"{self.remote.host.text}: the program there exited without output: is its Python 3.8 or newer?"
            )
        return self.hello

    def lock_clocks_while_measuring(self) -> None:
        """Have the device hold its clocks during `measure`."""
        self.lock_clocks = True

    def build(self, jobs: Mapping[str, tuple[Path, str]]) -> dict[str, str]:
        """Build an engine of each job's graph (path, precision), and return the reasons of those that failed.

        A graph that crashes the builder is tried once. Raises RemoteError, InputError.
        """
        requested = _requested_jobs(jobs)
        self._push_graphs([path for path, _ in jobs.values()])
        remaining = requested
        while remaining:
            crashed = self._build(remaining)
            if crashed is None:
                return self.failed
            self.failed[crashed] = "the builder crashed on the device, or was killed for the memory it took"
            remaining = [job for job in requested if job.name not in self.failed]
        return self.failed

    def _build(self, jobs: Sequence[RequestedJob]) -> str | None:
        """Build until the program on the device ends, and return the job that crashed it, None when none did."""
        building, done = "", 0
        try:
            for kind, content in self._replies(self._request("build", jobs)):
                if kind == "building":
                    building = self._decoded(str, content, kind)
                elif kind in ("built", "failed"):
                    building, done = "", done + 1
                    self.progress("build there", done, len(jobs))
        except RemoteError as error:
            if error.lost or not building:
                raise
            return building
        return None

    def measure(self, request: MeasureRequest, earlier: Sequence[Window]) -> Iterator[Opened | Window]:
        """Measure on the device, and yield what is new; windows that only one side has are not measured again."""
        jobs = [
            RequestedJob(
                job.name,
                None if job.path is None else files.sha256_of_file(job.path),
                request.precisions[job.name],
                job.predecessor,
            )
            for job in request.jobs
        ]
        self._push_graphs([job.path for job in request.jobs if job.path is not None])
        work = self._request(request.run, jobs, request.measured, request.reference, request.effort)
        yield from self._exchange_windows(work, earlier)
        for kind, content in self._replies(work):
            event = worker.event_from_message(kind, content)
            if event is not None:
                yield event

    @contextmanager
    def scoring(
        self, jobs: Mapping[str, tuple[Path, str]], exits: ScoredExits
    ) -> Iterator[Callable[[Iterable[LabelledFrame]], Iterator[Score]]]:
        """Hold the engines of `exits`, built from `jobs` (graph, precision), open on the device inside the context.

        Yields a function that scores images; they stay on the device until all of them are scored. Raises RemoteError,
        EngineError in the device's words, InputError for a score that is not possible.
        """
        self._push_graphs([path for path, _ in jobs.values()])
        request = self._request("score", _requested_jobs(jobs), exits=exits)
        with closing(self._replies(request)) as replies:
            yield lambda images: self._scores(replies, exits, images)

    def _scores(
        self, replies: Iterator[tuple[str, Any]], exits: ScoredExits, images: Iterable[LabelledFrame]
    ) -> Iterator[Score]:
        labelled: list[NDArray[np.int64]] = []

        def resized() -> Iterator[tuple[Pixels, Pixels]]:
            for frame, labels, known in images:
                labelled.append(np.bincount(labels[known], minlength=exits.classes))
                marked = np.where(known, labels, np.uint8(scoring.IGNORED))
                yield frames.resize(frame, exits.input_hw), marked

        with tempfile.TemporaryDirectory(prefix="mess-") as folder:
            path = Path(folder) / "images"
            scoring.write_images(path, resized())
            self._next_reply(replies, "ready")
            block = files.sha256_of_file(path)
            self.remote.push({block: path}, f"{STORE}/{worker.IMAGES}", lambda done, total: None)
        for index, pixels in enumerate(labelled):
            content = self._next_reply(replies, "scored")
            try:
                yield scoring.score_from_message(content, block, index, pixels, exits, len(self.thresholds))
            except decode.DecodeError as error:
                raise self._unexpected(error) from error

    def _next_reply(self, replies: Iterator[tuple[str, Any]], expected: str) -> Any:
        """The content of the next `ready` or `scored` reply. Raises RemoteError when it is not the `expected` one."""
        for kind, content in replies:
            if kind == expected:
                return content
            if kind in ("ready", "scored"):
                break
        raise RemoteError(f"{self.remote.host.text} did not send all of its scores: run the same command again")

    def _exchange_windows(self, request: WorkRequest, earlier: Sequence[Window]) -> Iterator[Opened | Window]:
        """Send the windows that the device lacks, and yield those that are missing here."""
        path = f"{STORE}/{worker.RESULTS}/{_request_hash(request)}.jsonl"
        lines = (self.remote.read(path) or b"").decode(errors="replace").splitlines()
        events = [event for event in map(worker.event_from_line, lines) if event is not None]
        known = {(window.job, window.round) for window in earlier}
        missing = [e for e in events if not (isinstance(e, Window) and (e.job, e.round) in known)]
        yield from missing
        merged = [protocol.message_to_line(*worker.event_to_message(event)) for event in (*earlier, *missing)]
        self._write(path, "".join(f"{line}\n" for line in merged).encode())

    def _request(
        self,
        run: str,
        jobs: Sequence[RequestedJob] = (),
        measured: Sequence[str] = (),
        reference: str = "",
        effort: Effort | None = None,
        exits: ScoredExits | None = None,
    ) -> WorkRequest:
        thresholds = tuple(tuple(map(float, row)) for row in self.thresholds)
        frame = hashlib.sha256(npy.content_of(self.frame)).hexdigest()
        return WorkRequest(
            run=run,
            library=self.library,
            jobs=tuple(jobs),
            measured=tuple(measured),
            reference=reference,
            effort=effort or Effort(),
            frame=frame,
            thresholds=thresholds,
            exits=exits,
            lock_clocks=self.lock_clocks,
        )

    def _replies(self, request: WorkRequest) -> Generator[tuple[str, Any], None, None]:
        """Have a request done on the device, and yield its replies. Raises RemoteError, EngineError in its words."""
        text = worker.request_to_json(request).encode()
        program, name = self._push_contents(worker.REQUESTS, runtime_zip(), text)
        program_path = f"{STORE}/{worker.REQUESTS}/{program}"
        command = (self.remote.host.python, "-u", program_path, SESSION, STORE, name)
        error = ""
        try:
            for line in self.remote.lines(command, PID_FILE):
                message = protocol.message_from_line(line)
                if message is not None:
                    if message[0] == "error":
                        error = self._decoded(str, message[1], "error")
                    self._receive(*message)
                    yield message
        except RemoteError as failure:
            if error and not failure.lost:
                raise EngineError(f"{self.remote.host.text}: {error}") from failure
            raise

    def _receive(self, kind: str, content: Any) -> None:
        if kind == "hello":
            self.hello = self._decoded(Hello, content, kind)
        elif kind == "state":
            self.states.append(self._state(content))
        elif kind == "failed":
            failure: BuildFailure = self._decoded(BuildFailure, content, kind)
            self.failed[failure.job] = failure.error
        elif kind == "built":
            engine: BuiltEngine = self._decoded(BuiltEngine, content, kind)
            self.built.setdefault(engine.job, engine)

    def _state(self, content: Any) -> power.DeviceState:
        try:
            return power.state_from_json(content)
        except decode.DecodeError as error:
            raise self._unexpected(error) from error

    def _decoded(self, kind: Any, content: Any, where: str) -> Any:
        try:
            return decode.decode(kind, content, where)
        except decode.DecodeError as error:
            raise self._unexpected(error) from error

    def _unexpected(self, error: Exception) -> InputError:
        return InputError(f"{self.remote.host.text} sent an unexpected reply: {error}")

    def _push_graphs(self, paths: Sequence[Path]) -> None:
        """Push graphs, the weights that they name, and the frame."""
        graphs = {files.sha256_of_file(path): path for path in paths}
        weights = {weight.name: weight for path in paths for weight in stored_weights(path)}

        def progress(done: int, total: int) -> None:
            self.progress("send", done, total)

        if weights:
            self.remote.push(weights, f"{STORE}/{worker.GRAPHS}/{WEIGHTS}", progress)
        with temporary_files(npy.content_of(self.frame)) as frame:
            self.remote.push({**graphs, **frame}, f"{STORE}/{worker.GRAPHS}", progress)

    def _push_contents(self, folder: str, *contents: bytes) -> list[str]:
        """Push small files to a folder of the store, and return their names."""
        with temporary_files(*contents) as paths:
            self.remote.push(paths, f"{STORE}/{folder}", lambda done, total: None)
        return list(paths)

    def _write(self, path: str, content: bytes) -> None:
        done = self.remote.run(("sh", "-c", shell_script("write"), "sh", path), content, patience_s=600.0)
        if done.code:
            raise self.remote.failure(path, done.code, done.errors)


@contextmanager
def temporary_files(*contents: bytes) -> Iterator[dict[str, Path]]:
    """Write a temporary file for each content; yields their paths by the SHA-256 of the content, in this order."""
    with tempfile.TemporaryDirectory(prefix="mess-") as folder:
        paths = {}
        for content in contents:
            name = hashlib.sha256(content).hexdigest()
            paths[name] = Path(folder) / name
            paths[name].write_bytes(content)
        yield paths


def _requested_jobs(jobs: Mapping[str, tuple[Path, str]]) -> list[RequestedJob]:
    """From name -> (path, precision)."""
    return [RequestedJob(name, files.sha256_of_file(path), precision, None) for name, (path, precision) in jobs.items()]


def _request_hash(request: WorkRequest) -> str:
    return hashlib.sha256(worker.request_to_json(request).encode()).hexdigest()
