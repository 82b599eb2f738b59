"""A device elsewhere that builds, measures and scores for us: what it needs is pushed by hash, what it says is read."""

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
from mess_compile.device.payload import SESSION, runtime_zip
from mess_compile.device.remote import Remote, RemoteError
from mess_compile.device.scripts import shell_script
from mess_compile.graph.store import WEIGHTS, stored_weights
from mess_compile.runtime.base import decode, protocol
from mess_compile.runtime.base.errors import EngineError, InputError
from mess_compile.runtime.images import frames, npy
from mess_compile.runtime.machine import power
from mess_compile.runtime.measure.job_pool import Job, Opened
from mess_compile.runtime.measure.measure import Effort, Window
from mess_compile.runtime.serve import scoring, worker
from mess_compile.runtime.serve.scoring import Score, ScoredExits
from mess_compile.runtime.serve.worker import Hello, RequestedJob, WorkRequest

Progress = Callable[[str, int, int], None]
Image = NDArray[np.uint8]
Counted = tuple[Image, Image, NDArray[np.bool_]]
"""A frame (H, W, 3), its labels (H, W), and which of these count."""
STORE = ".mess-compile"
"""Below the home folder there."""
_PID = "session.pid"


@dataclass(frozen=True)
class BuiltThere:
    """An engine on a device: the name that all which decides it gives, its size, and how long it took to build.

    `now` says that this session built it; else it was there.
    """

    key: str
    bytes: int
    seconds: float
    now: bool


@dataclass
class PythonSession:
    """A device that does what we wish, by the Python that its host names."""

    remote: Remote
    library: str
    frame: NDArray[np.uint8]
    thresholds: NDArray[np.float32]
    progress: Progress
    lock_clocks: bool = False
    hello: Hello | None = None
    states: list[power.DeviceState] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    built: dict[str, BuiltThere] = field(default_factory=dict)

    def greet(self) -> Hello:
        """What the device is, before anything is built there. Raises RemoteError, EngineError."""
        try:
            for _ in self._wish(self._wished("greet", (), (), "", Effort())):
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

    def build(self, jobs: Mapping[str, tuple[Path, str]]) -> dict[str, str]:
        """Build an engine of every job's graph (path, precision) there; why those that failed did.

        A graph whose builder crashes is tried once. Raises RemoteError, InputError.
        """
        wanted = [
            RequestedJob(name, files.sha256_of_file(path), precision, None) for name, (path, precision) in jobs.items()
        ]
        self._push_graphs([path for path, _ in jobs.values()])
        left = wanted
        while left:
            crashed = self._build(left)
            if crashed is None:
                return self.failed
            self.failed[crashed] = "the builder crashed there, or was killed for the memory it took"
            left = [each for each in wanted if each.name not in self.failed]
        return self.failed

    def _build(self, jobs: Sequence[RequestedJob]) -> str | None:
        """The job whose builder ended the program there; None when it came to its end."""
        building, done = "", 0
        try:
            for kind, content in self._wish(self._wished("build", jobs, (), "", Effort())):
                if kind == "building":
                    building = str(content)
                elif kind in ("built", "failed"):
                    building, done = "", done + 1
                    self.progress("build there", done, len(jobs))
        except RemoteError as error:
            if error.lost or not building:
                raise
            return building
        return None

    def measure(
        self,
        run: str,
        jobs: Sequence[Job],
        precisions: Mapping[str, str],
        measured: Sequence[str],
        reference: str,
        effort: Effort,
        earlier: Sequence[Window],
    ) -> Iterator[Opened | Window]:
        """Measure `measured` there and yield what is new; windows that only one side knows are not measured again."""
        wanted = [
            RequestedJob(
                job.name,
                None if job.path is None else files.sha256_of_file(job.path),
                precisions[job.name],
                job.predecessor,
            )
            for job in jobs
        ]
        self._push_graphs([job.path for job in jobs if job.path is not None])
        wish = self._wished(run, wanted, measured, reference, effort)
        yield from self._exchanged(wish, earlier)
        for heard in self._wish(wish):
            event = worker.event_from(*heard)
            if event is not None:
                yield event

    @contextmanager
    def scoring(
        self, jobs: Mapping[str, tuple[Path, str]], exits: ScoredExits
    ) -> Iterator[Callable[[Iterable[Counted]], Iterator[Score]]]:
        """Have the engines of `exits` open there, built from `jobs` (graph, precision), as long as the context lasts.

        What is yielded scores images, which lie there until all of them are scored. Raises RemoteError, EngineError in
        the device's words, InputError when it says what cannot be.
        """
        wanted = [
            RequestedJob(name, files.sha256_of_file(path), precision, None) for name, (path, precision) in jobs.items()
        ]
        self._push_graphs([path for path, _ in jobs.values()])
        with closing(self._wish(self._wished("score", wanted, (), "", Effort(), exits))) as said:
            yield lambda images: self._scores(said, exits, images)

    def _scores(
        self, said: Iterator[tuple[str, Any]], exits: ScoredExits, images: Iterable[Counted]
    ) -> Iterator[Score]:
        labelled: list[NDArray[np.int64]] = []

        def travelling() -> Iterator[tuple[Image, Image]]:
            for frame, labels, known in images:
                labelled.append(np.bincount(labels[known], minlength=exits.classes))
                marked = np.where(known, labels, np.uint8(scoring.IGNORED))
                yield frames.resize(frame, exits.input_hw), marked

        with tempfile.TemporaryDirectory(prefix="mess-") as folder:
            path = Path(folder) / "images"
            scoring.write_images(path, travelling())
            self._awaited(said, "ready")
            block = files.sha256_of_file(path)
            self.remote.push({block: path}, f"{STORE}/{worker.IMAGES}", lambda done, total: None)
        for index, truth in enumerate(labelled):
            content = self._awaited(said, "scored")
            try:
                yield scoring.score_of(content, block, index, truth, exits, len(self.thresholds))
            except decode.DecodeError as error:
                raise self._nonsense(error) from error

    def _awaited(self, said: Iterator[tuple[str, Any]], kind: str) -> Any:
        """What a line says of a `kind` that is now due. Raises RemoteError when a line of ours was lost."""
        for heard, content in said:
            if heard == kind:
                return content
            if heard in ("ready", "scored"):
                break
        raise RemoteError(f"{self.remote.host.text} has not told all of its scores: run the same command again")

    def _exchanged(self, wish: WorkRequest, earlier: Sequence[Window]) -> Iterator[Opened | Window]:
        """Give the device the windows that it lacks, and yield those that we lack."""
        path = f"{STORE}/{worker.RESULTS}/{_name(wish)}.jsonl"
        there = [
            worker.event_of(line) for line in (self.remote.read(path) or b"").decode(errors="replace").splitlines()
        ]
        known = {(window.job, window.round) for window in earlier}
        lacking = [e for e in there if e is not None and not (isinstance(e, Window) and (e.job, e.round) in known)]
        yield from lacking
        ours = [protocol.line_of(*worker.told(event)) for event in (*earlier, *lacking)]
        self._write(path, "".join(f"{line}\n" for line in ours).encode())

    def _wished(
        self,
        run: str,
        jobs: Sequence[RequestedJob],
        measured: Sequence[str],
        reference: str,
        effort: Effort,
        exits: ScoredExits | None = None,
    ) -> WorkRequest:
        rows = tuple(tuple(map(float, row)) for row in self.thresholds)
        frame = hashlib.sha256(npy.content_of(self.frame)).hexdigest()
        return WorkRequest(
            run, self.library, tuple(jobs), tuple(measured), reference, effort, frame, rows, exits, self.lock_clocks
        )

    def _wish(self, wish: WorkRequest) -> Generator[tuple[str, Any], None, None]:
        """Have a wish done; yields what the device says. Raises RemoteError, EngineError in its words."""
        text = worker.wish_to_json(wish).encode()
        code, name = self._sent(worker.WISHES, runtime_zip(), text)
        there = f"{STORE}/{worker.WISHES}/{code}"
        command = (self.remote.host.python, "-u", there, SESSION, STORE, name)
        error = ""
        try:
            for line in self.remote.lines(command, f"{STORE}/{_PID}"):
                heard = protocol.said(line)
                if heard is not None:
                    error = str(heard[1]) if heard[0] == "error" else error
                    self._heard(*heard)
                    yield heard
        except RemoteError as failure:
            if error and not failure.lost:
                raise EngineError(f"{self.remote.host.text}: {error}") from failure
            raise

    def _heard(self, kind: str, content: Any) -> None:
        try:
            if kind == "hello":
                self.hello = decode.decode(Hello, content, "hello")
            elif kind == "state":
                self.states.append(power.state_from_json(content))
            elif kind == "failed":
                self.failed[str(content["job"])] = str(content["error"])
            elif kind == "built":
                its = {name: content[name] for name in ("key", "bytes", "seconds", "now")}
                self.built.setdefault(str(content["job"]), decode.decode(BuiltThere, its, "built"))
        except (decode.DecodeError, ValueError, KeyError, TypeError) as error:
            raise self._nonsense(error) from error

    def _nonsense(self, error: Exception) -> InputError:
        return InputError(f"{self.remote.host.text} says something else than expected: {error}")

    def _push_graphs(self, paths: Sequence[Path]) -> None:
        """Graphs, the weights that they name, and the frame."""
        graphs = {files.sha256_of_file(path): path for path in paths}
        weights = {weight.name: weight for path in paths for weight in stored_weights(path)}
        told = lambda done, total: self.progress("send", done, total)  # noqa: E731
        if weights:
            self.remote.push(weights, f"{STORE}/{worker.GRAPHS}/{WEIGHTS}", told)
        with written(npy.content_of(self.frame)) as frame:
            self.remote.push({**graphs, **frame}, f"{STORE}/{worker.GRAPHS}", told)

    def _sent(self, place: str, *contents: bytes) -> list[str]:
        """Have small files there, and return their names."""
        with written(*contents) as paths:
            self.remote.push(paths, f"{STORE}/{place}", lambda done, total: None)
        return list(paths)

    def _write(self, path: str, content: bytes) -> None:
        done = self.remote.run(("sh", "-c", shell_script("write"), "sh", path), content, patience_s=600.0)
        if done.code:
            raise self.remote.failure(path, done.code, done.errors)


@contextmanager
def written(*contents: bytes) -> Iterator[dict[str, Path]]:
    """A file each, for a while, by the names that their bytes give them, in this order."""
    with tempfile.TemporaryDirectory(prefix="mess-") as folder:
        paths = {}
        for content in contents:
            name = hashlib.sha256(content).hexdigest()
            paths[name] = Path(folder) / name
            paths[name].write_bytes(content)
        yield paths


def _name(wish: WorkRequest) -> str:
    return hashlib.sha256(worker.wish_to_json(wish).encode()).hexdigest()
