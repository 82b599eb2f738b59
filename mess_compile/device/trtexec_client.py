"""A device elsewhere that has trtexec and no Python for us: it builds and measures graph by graph, by our commands.

`TrtexecSession` is to `profiling` what `sessions.Session` is. There a POSIX shell, sha256sum, tar and trtexec do.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mess_compile import files
from mess_compile.device import trtexec
from mess_compile.device.client import STORE, BuiltThere
from mess_compile.device.payload import OWN_FILES_LAST
from mess_compile.device.remote import Remote, RemoteError
from mess_compile.device.scripts import shell_script
from mess_compile.graph.store import WEIGHTS, stored_weights
from mess_compile.runtime.base.errors import EngineError, InputError, MessError
from mess_compile.runtime.machine import power
from mess_compile.runtime.machine.machine import InstalledLibrary, Machine
from mess_compile.runtime.machine.power import DeviceState
from mess_compile.runtime.measure import measure as profile
from mess_compile.runtime.measure.job_pool import Job, Opened
from mess_compile.runtime.measure.measure import Effort, Window
from mess_compile.runtime.serve.worker import ENGINES, GRAPHS, Hello
from mess_compile.targets import Target

Progress = Callable[[str, int, int], None]
Key = tuple[str, str]
"""A graph and its precision, as in a latency table."""
LIBRARY = "tensorrt"
"""Of the targets that can be measured so."""
MOST_RUNS = 1000
"""Kept of a window: a graph of 0.05 ms runs fifteen times as often in one."""
_ENGINES, _GRAPHS = f"{STORE}/{ENGINES}", f"{STORE}/{GRAPHS}"
_TIMES, _PID = f"{STORE}/times.json", f"{STORE}/session.pid"
_MAKING, _MAKING_CACHE = f"{_ENGINES}/making.engine", f"{_ENGINES}/making.cache"
_LINES, _PATIENCE_S = 2000, 600.0
_FULL = re.compile("Saving engine to file failed|No space left on device|Disk quota exceeded")
_NO_CACHE = re.compile("TimingCache creation failed|Failed to create timing ?cache", re.IGNORECASE)

_USABLE = f"""\
{OWN_FILES_LAST}sys.path[:] = own_files_last(sys.path)
import numpy, tensorrt

sys.exit(sys.version_info < (3, 8))
"""


@dataclass(frozen=True)
class _Kept:
    """An engine in the device's store, by the hash of all that decides it."""

    key: str
    file_bytes: int


@dataclass(frozen=True)
class _Run:
    """How a run of trtexec ended: its exit code, the bytes of the engine that it made, what it said last, its times."""

    code: int
    file_bytes: int
    said: str
    times: str


@dataclass
class TrtexecSession:
    """A device that has trtexec; its timing cache is copied to the folder `caches` of this machine.

    A break leaves the engines there and the windows here; the same calls continue.
    """

    remote: Remote
    caches: Path
    progress: Progress
    hello: Hello | None = None
    states: list[DeviceState] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    built: dict[str, BuiltThere] = field(default_factory=dict)
    _program: str = field(default=trtexec.PROGRAM, init=False)
    _engines: dict[str, _Kept] = field(default_factory=dict, init=False)

    def greet(self) -> Hello:
        """What the device is. Raises RemoteError when it has no trtexec, InputError and EngineError when it has."""
        host = self.remote.host.text
        done = self.remote.run(("sh", "-c", shell_script("describe_trtexec"), "sh", trtexec.PROGRAM))
        if done.code:
            reason = f"no trtexec, neither {trtexec.PROGRAM} nor on PATH: install TensorRT's tools there"
            raise RemoteError(f"{host} has {reason}")
        facts, _, text = done.output.decode(errors="replace").partition("trtexec says\n")
        told = dict(line.partition(" ")[::2] for line in facts.splitlines())
        try:
            version, gpu = trtexec.version_from_output(text), trtexec.gpu_from_output(text)
        except InputError as error:
            raise InputError(f"{host}: {error}") from error
        if gpu is None:
            raise EngineError(f"{host}: trtexec finds no GPU: {trtexec.error_from_output(text)}")
        machine = Machine(
            gpus=(gpu,),
            board=told.get("board") or None,
            l4t=_jetson_linux(told.get("release", "")),
            libraries=(InstalledLibrary(LIBRARY, version),),
        )
        self._program, self.hello = told["program"], Hello(LIBRARY, version, machine, _facts(told))
        self.states.append(self._state())
        return self.hello

    def build(self, jobs: Mapping[str, tuple[Path, str]]) -> dict[str, str]:
        """Have an engine of every job's graph (path, precision) there; why those that failed did.

        What was built before is kept. Raises RemoteError, InputError.
        """
        if not jobs:
            return self.failed
        self._push_graphs([path for path, _ in jobs.values()])
        wanted = {name: (files.sha256_of_file(path), precision) for name, (path, precision) in jobs.items()}
        keys = {name: self._key(*graph) for name, graph in wanted.items()}
        known = self._kept(set(keys.values()))
        made: dict[str, float] = {}
        for done, (name, key) in enumerate(keys.items(), 1):
            if key not in known:
                started, run = time.monotonic(), self._built(*wanted[name], key)
                if run.code == 0:
                    known[key], made[key] = _Kept(key, run.file_bytes), time.monotonic() - started
                else:
                    self.failed[name] = _why_not_built(run)
            if key in known:
                self._engines[name] = known[key]
                seconds = round(made.get(key, 0.0), 3)
                self.built.setdefault(name, BuiltThere(key, known[key].file_bytes, seconds, key in made))
            self.progress("build there", done, len(keys))
        if made and self.remote.read(self._cache) is not None:
            self.remote.pull(self._cache, self.caches / Path(self._cache).name)
        self.states.append(self._state())
        return self.failed

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
        """Measure those of `measured` that are graphs, a run of trtexec for each window; what was not built is first.

        `run` and predecessors play no part. Raises RemoteError, EngineError, InputError.
        """
        timed = {job.name: job.path for job in jobs if job.name in {*measured, reference} and job.path is not None}
        self.build({name: (path, precisions[name]) for name, path in timed.items() if name not in self._engines})
        taken = {name: [window for window in earlier if window.job == name] for name in timed}
        opened: set[str] = set()
        others = [window for window in earlier if window.job not in taken]
        for name, number in profile.schedule(taken, effort, others, first=reference):
            samples, load_ms = self._timed(name)
            if name not in opened:
                opened.add(name)
                yield Opened(name, load_ms, self._engines[name].file_bytes, None)
            opening = next((window for window in taken[reference] if window.round == number), None)
            taken[name].append(_window(name, number, samples, opening))
            yield taken[name][-1]
        self.states.append(self._state())

    def _timed(self, name: str) -> tuple[trtexec.TrtexecTimes, float]:
        """A window, and how long the engine took to load, in ms."""
        if name not in self._engines:
            raise EngineError(f"{self.remote.host.text}: {name} has no engine: {self.failed.get(name)}")
        engine = f"{_ENGINES}/{self._engines[name].key}"
        words = trtexec.timing_command(f"{engine}.engine", self._major, _TIMES, program=self._program)
        run = self._run(shell_script("time_engine"), engine, _TIMES, *words)
        host = self.remote.host.text
        if run.code:
            raise EngineError(f"{host}: {name} does not run: {trtexec.error_from_output(run.said)}")
        try:
            return trtexec.samples_from_json(run.times), trtexec.load_ms_from_output(run.said)
        except InputError as error:
            raise InputError(f"{host}: {name}: {error}") from error

    def _key(self, sha256: str, precision: str) -> str:
        hello = self._greeted
        decides = (self._build_words(sha256, precision)[1:], hello.version, hello.machine.gpus)
        return hashlib.sha256(repr(decides).encode()).hexdigest()

    def _build_words(self, sha256: str, precision: str) -> tuple[str, ...]:
        graph = f"{_GRAPHS}/{sha256}"
        return trtexec.build_command(
            graph, precision, self._major, _MAKING, timing_cache=_MAKING_CACHE, program=self._program
        )

    def _built(self, sha256: str, precision: str, key: str) -> _Run:
        """A timing cache that TensorRT does not take, cut off or of another device, is removed: it fills again."""
        words = (f"{_ENGINES}/{key}", _MAKING, self._cache, _MAKING_CACHE, *self._build_words(sha256, precision))
        run = self._run(shell_script("build_engine"), *words)
        if run.code and _NO_CACHE.search(run.said):
            self.remote.run(("rm", "-f", self._cache))
            run = self._run(shell_script("build_engine"), *words)
        if run.code and _FULL.search(run.said):
            raise self.remote.failure(f"engines in {_ENGINES}", run.code, "No space left on device")
        return run

    def _run(self, script: str, *words: str) -> _Run:
        """A script that says `ended CODE BYTES` after trtexec's own words, and then its times; stopped when we are."""
        said, ended = deque[str]([], _LINES), None
        times: list[str] = []
        for line in self.remote.lines(("sh", "-c", script, "sh", *words), _PID):
            (said if ended is None else times).append(line)
            ended = ended or re.fullmatch("ended ([0-9]+) +([0-9]+)", line)
        if ended is None:
            raise RemoteError(f"{self.remote.host.text}: trtexec exited without output: run the command again")
        return _Run(int(ended[1]), int(ended[2]), "\n".join([*said][:-1]), "\n".join(times))

    def _kept(self, keys: set[str]) -> dict[str, _Kept]:
        """The engines that are there, whole."""
        given = "".join(f"{key}\n" for key in sorted(keys)).encode()
        done = self.remote.run(("sh", "-c", shell_script("list_engines"), "sh", _ENGINES), given, _PATIENCE_S)
        if done.code:
            raise self.remote.failure(f"folder {_ENGINES}", done.code, done.errors)
        rows = [line.split() for line in done.output.decode().splitlines()]
        return {key: _Kept(key, int(count)) for key, count in rows}

    def _push_graphs(self, paths: Sequence[Path]) -> None:
        graphs = {files.sha256_of_file(path): path for path in paths}
        weights = {weight.name: weight for path in paths for weight in stored_weights(path)}
        for content, folder in ((weights, f"{_GRAPHS}/{WEIGHTS}"), (graphs, _GRAPHS)):
            self.remote.push(content, folder, lambda done, total: self.progress("send", done, total))

    def _state(self) -> DeviceState:
        """What the kernel's files and nvpmodel tell there."""
        return state_from_text(
            self.remote.run(("sh", "-c", shell_script("device_state"))).output.decode(errors="replace")
        )

    @property
    def _greeted(self) -> Hello:
        assert self.hello is not None, "who builds there first hears it"
        return self.hello

    @property
    def _major(self) -> int:
        return int(self._greeted.version.partition(".")[0])

    @property
    def _cache(self) -> str:
        return f"{_ENGINES}/timing-{self._greeted.version}.cache"


def in_place_of_python(
    remote: Remote, target: Target, caches: Path, progress: Progress, error: MessError
) -> TrtexecSession | None:
    """A device by trtexec that has failed with `error` by Python; None when that is not for want of a usable Python.

    Raises RemoteError when there is no trtexec either.
    """
    if target.library != LIBRARY or (isinstance(error, RemoteError) and error.lost):
        return None
    if remote.run((remote.host.python, "-c", _USABLE), patience_s=_PATIENCE_S).code == 0:
        return None
    session = TrtexecSession(remote, caches, progress)
    try:
        session.greet()
    except RemoteError as absent:
        raise RemoteError(f"{error}; trtexec would be enough, but {absent}") from error
    return session


def state_from_text(text: str) -> DeviceState:
    """From lines `zone MILLIDEGREES TYPE`, `devfreq HZ LIMIT NAME`, `policy KHZ LIMIT NUMBER`, `load`, `mode`."""
    zones = {name: int(milli) / 1000 for milli, name in re.findall(r"(?m)^zone (-?[0-9]{1,6}) (\S.*)$", text)}
    gpus = [row for row in _frequencies("devfreq", text) if power.GPU_DEVFREQ.fullmatch(row[2])]
    clocks = {"GPU": (int(gpus[0][0]) / 1e6, int(gpus[0][1]) / 1e6)} if gpus else {}
    clocks |= {f"CPU{name}": (int(now) / 1e3, int(limit) / 1e3) for now, limit, name in _frequencies("policy", text)}
    mode = re.search(r"(?m)^mode (\S+)$", text)
    load = re.search(r"(?m)^load ([0-9]{1,6}[.][0-9]+)$", text)
    return DeviceState(
        power_mode=mode[1] if mode else None,
        clocks_mhz=tuple((name, now) for name, (now, _) in clocks.items()),
        limits_mhz=tuple((name, limit) for name, (_, limit) in clocks.items()),
        temperatures_c=tuple(zones.items()),
        load_average=float(load[1]) if load else None,
    )


def _frequencies(kind: str, text: str) -> list[tuple[str, str, str]]:
    return re.findall(rf"(?m)^{kind} ([0-9]{{1,12}}) ([0-9]{{1,12}}) (\S+)$", text)


def _facts(told: Mapping[str, str]) -> dict[str, str]:
    """As `runtime.session.describe_machine` tells them, and how it is measured."""
    facts = {name: told.get(name, "") for name in ("cpu", "cores", "load_average", "system", "identity")}
    facts["cpu"] = facts["cpu"] or facts["system"].rpartition(" ")[2]
    return {**facts, "protocol": trtexec.PROTOCOL_DIFFERENCE, "estimated_from": "what was measured of its graphs"}


def _jetson_linux(release: str) -> str | None:
    found = re.search(r"R([0-9]+) \(release\), REVISION: ([0-9.]+)", release)
    return ".".join(found.groups()) if found else None


def _why_not_built(run: _Run) -> str:
    if run.code > 128:
        return "trtexec crashed there, or was killed for the memory it took"
    return f"trtexec: {trtexec.error_from_output(run.said)}"


def _window(name: str, number: int, samples: trtexec.TrtexecTimes, opening: Window | None) -> Window:
    """Of many runs every so-manieth. The reference's window that opens the round is its tick, and its own."""
    step = -(-len(samples.wall_ms) // MOST_RUNS)
    wall_ms = tuple(round(milliseconds, 6) for milliseconds in samples.wall_ms[::step])
    window = Window(name, number, wall_ms, samples.device_ms[::step], None, sum(samples.wall_ms) / 1e3)
    return replace(window, ticks_ms=((opening or window).median_ms,))
