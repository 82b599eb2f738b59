"""A device over SSH that has trtexec but no usable Python: a run of trtexec builds or measures each graph.

The device needs a POSIX shell, sha256sum, tar and trtexec.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mess_compile import files
from mess_compile.device import trtexec
from mess_compile.device.payload import OWN_FILES_LAST
from mess_compile.device.remote import Remote, RemoteError
from mess_compile.device.scripts import shell_script
from mess_compile.device.session import PID_FILE, STORE, MeasureRequest
from mess_compile.graph.store import WEIGHTS, stored_weights
from mess_compile.reporter import Progress
from mess_compile.runtime.base.errors import EngineError, InputError, MessError
from mess_compile.runtime.machine import power
from mess_compile.runtime.machine.machine import InstalledLibrary, Machine
from mess_compile.runtime.machine.power import DeviceState
from mess_compile.runtime.measure.job_pool import Opened
from mess_compile.runtime.measure.measure import Window, schedule
from mess_compile.runtime.serve.worker import ENGINES, GRAPHS, BuiltEngine, Hello
from mess_compile.targets import Target

Key = tuple[str, str]
"""A graph and its precision, as in a latency table."""
LIBRARY = "tensorrt"
"""The engine library of the targets that trtexec can measure."""
MOST_RUNS = 1000
"""At most so many runs of a window are stored: a graph of 0.05 ms runs fifteen times as often."""
_ENGINES, _GRAPHS = f"{STORE}/{ENGINES}", f"{STORE}/{GRAPHS}"
_TIMES = f"{STORE}/times.json"
_NEW_ENGINE, _NEW_CACHE = f"{_ENGINES}/making.engine", f"{_ENGINES}/making.cache"
_LINES, _PATIENCE_S = 2000, 600.0
_NO_SPACE = re.compile("Saving engine to file failed|No space left on device|Disk quota exceeded")
_BAD_CACHE = re.compile("TimingCache creation failed|Failed to create timing ?cache", re.IGNORECASE)

_USABLE = f"""\
{OWN_FILES_LAST}sys.path[:] = own_files_last(sys.path)
import numpy, tensorrt

sys.exit(sys.version_info < (3, 8))
"""


@dataclass(frozen=True)
class _StoredEngine:
    """An engine in the device's store; `key` is a hash of everything that it depends on."""

    key: str
    file_bytes: int


@dataclass(frozen=True)
class _TrtexecRun:
    """A finished run of trtexec: its exit code, the size of the engine it built, its last output, its times."""

    code: int
    file_bytes: int
    output: str
    times: str


@dataclass
class TrtexecSession:
    """A device that works by trtexec: a `DeviceSession`. Its timing cache is copied to the local folder `caches`.

    After a broken connection the engines are still on the device and the windows here; the same calls continue.
    """

    remote: Remote
    caches: Path
    progress: Progress
    hello: Hello | None = None
    states: list[DeviceState] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    built: dict[str, BuiltEngine] = field(default_factory=dict)
    _program: str = field(default=trtexec.PROGRAM, init=False)
    _engines: dict[str, _StoredEngine] = field(default_factory=dict, init=False)

    measures_transfers = False

    def greet(self) -> Hello:
        """Ask the device what it is. Raises RemoteError without trtexec, InputError, EngineError if it is unusable."""
        host = self.remote.host.text
        done = self.remote.run(("sh", "-c", shell_script("describe_trtexec"), "sh", trtexec.PROGRAM))
        if done.code:
            reason = f"no trtexec, neither {trtexec.PROGRAM} nor on PATH: install TensorRT's tools there"
            raise RemoteError(f"{host} has {reason}")
        head, _, text = done.output.decode(errors="replace").partition("trtexec says\n")
        facts = dict(line.partition(" ")[::2] for line in head.splitlines())
        try:
            version, gpu = trtexec.version_from_output(text), trtexec.gpu_from_output(text)
        except InputError as error:
            raise InputError(f"{host}: {error}") from error
        if gpu is None:
            raise EngineError(f"{host}: trtexec finds no GPU: {trtexec.error_from_output(text)}")
        machine = Machine(
            gpus=(gpu,),
            board=facts.get("board") or None,
            l4t=_jetson_linux(facts.get("release", "")),
            libraries=(InstalledLibrary(LIBRARY, version),),
        )
        self._program, self.hello = facts["program"], Hello(LIBRARY, version, machine, _hello_facts(facts))
        self.states.append(self._state())
        return self.hello

    def lock_clocks_while_measuring(self) -> None:
        """Raises InputError: only the Python on a device can lock its clocks, and restore them after a crash."""
        raise InputError("--lock-clocks needs a usable Python on the device: lock the clocks there by hand")

    def build(self, jobs: Mapping[str, tuple[Path, str]]) -> dict[str, str]:
        """Build an engine of each job's graph (path, precision), and return the reasons of those that failed.

        Engines that the device has are not built again. Raises RemoteError, InputError.
        """
        if not jobs:
            return self.failed
        self._push_graphs([path for path, _ in jobs.values()])
        graphs = {name: (files.sha256_of_file(path), precision) for name, (path, precision) in jobs.items()}
        keys = {name: self._key(*graph) for name, graph in graphs.items()}
        stored = self._stored(set(keys.values()))
        built_s: dict[str, float] = {}
        for done, (name, key) in enumerate(keys.items(), 1):
            if key not in stored:
                started, run = time.monotonic(), self._build_engine(*graphs[name], key)
                if run.code == 0:
                    stored[key], built_s[key] = _StoredEngine(key, run.file_bytes), time.monotonic() - started
                else:
                    self.failed[name] = _why_not_built(run)
            if key in stored:
                self._engines[name] = stored[key]
                seconds = round(built_s.get(key, 0.0), 3)
                self.built.setdefault(name, BuiltEngine(name, key, stored[key].file_bytes, seconds, key in built_s))
            self.progress("build there", done, len(keys))
        if built_s and self.remote.read(self._cache) is not None:
            self.remote.pull(self._cache, self.caches / Path(self._cache).name)
        self.states.append(self._state())
        return self.failed

    def measure(self, request: MeasureRequest, earlier: Sequence[Window]) -> Iterator[Opened | Window]:
        """Measure the graphs among `request.measured`, one run of trtexec a window; builds what has no engine first.

        The request's `run` and predecessors are not used. Raises RemoteError, EngineError, InputError.
        """
        reference = request.reference
        names = {*request.measured, reference}
        timed = {job.name: job.path for job in request.jobs if job.name in names and job.path is not None}
        unbuilt = [name for name in timed if name not in self._engines]
        self.build({name: (timed[name], request.precisions[name]) for name in unbuilt})
        windows = {name: [window for window in earlier if window.job == name] for name in timed}
        opened: set[str] = set()
        others = [window for window in earlier if window.job not in windows]
        for name, number in schedule(windows, request.effort, others, first=reference):
            samples, load_ms = self._time(name)
            if name not in opened:
                opened.add(name)
                yield Opened(name, load_ms, self._engines[name].file_bytes, None)
            opening = next((window for window in windows[reference] if window.round == number), None)
            windows[name].append(_window(name, number, samples, opening))
            yield windows[name][-1]
        self.states.append(self._state())

    def _time(self, name: str) -> tuple[trtexec.TrtexecTimes, float]:
        """The times of one window, and how long the engine took to load, in ms."""
        if name not in self._engines:
            raise EngineError(f"{self.remote.host.text}: {name} has no engine: {self.failed.get(name)}")
        engine = f"{_ENGINES}/{self._engines[name].key}"
        command = trtexec.timing_command(f"{engine}.engine", self._major, _TIMES, program=self._program)
        run = self._run(shell_script("time_engine"), engine, _TIMES, *command)
        host = self.remote.host.text
        if run.code:
            raise EngineError(f"{host}: {name} does not run: {trtexec.error_from_output(run.output)}")
        try:
            return trtexec.samples_from_json(run.times), trtexec.load_ms_from_output(run.output)
        except InputError as error:
            raise InputError(f"{host}: {name}: {error}") from error

    def _key(self, sha256: str, precision: str) -> str:
        hello = self._known_hello
        inputs = (self._build_command(sha256, precision)[1:], hello.version, hello.machine.gpus)
        return hashlib.sha256(repr(inputs).encode()).hexdigest()

    def _build_command(self, sha256: str, precision: str) -> tuple[str, ...]:
        graph = f"{_GRAPHS}/{sha256}"
        return trtexec.build_command(
            graph, precision, self._major, _NEW_ENGINE, timing_cache=_NEW_CACHE, program=self._program
        )

    def _build_engine(self, sha256: str, precision: str, key: str) -> _TrtexecRun:
        """A timing cache that TensorRT rejects, truncated or of another device, is removed; it fills again."""
        arguments = (f"{_ENGINES}/{key}", _NEW_ENGINE, self._cache, _NEW_CACHE, *self._build_command(sha256, precision))
        run = self._run(shell_script("build_engine"), *arguments)
        if run.code and _BAD_CACHE.search(run.output):
            self.remote.run(("rm", "-f", self._cache))
            run = self._run(shell_script("build_engine"), *arguments)
        if run.code and _NO_SPACE.search(run.output):
            raise self.remote.failure(f"engines in {_ENGINES}", run.code, "No space left on device")
        return run

    def _run(self, script: str, *command: str) -> _TrtexecRun:
        """Run a script that prints trtexec's output, `ended CODE BYTES`, and its times; it is stopped when we are."""
        output, ended = deque[str]([], _LINES), None
        times: list[str] = []
        for line in self.remote.lines(("sh", "-c", script, "sh", *command), PID_FILE):
            (output if ended is None else times).append(line)
            ended = ended or re.fullmatch("ended ([0-9]+) +([0-9]+)", line)
        if ended is None:
            raise RemoteError(f"{self.remote.host.text}: trtexec exited without output: run the same command again")
        return _TrtexecRun(int(ended[1]), int(ended[2]), "\n".join([*output][:-1]), "\n".join(times))

    def _stored(self, keys: set[str]) -> dict[str, _StoredEngine]:
        """The engines of `keys` that are whole on the device. Raises RemoteError, InputError."""
        given = "".join(f"{key}\n" for key in sorted(keys)).encode()
        done = self.remote.run(("sh", "-c", shell_script("list_engines"), "sh", _ENGINES), given, _PATIENCE_S)
        if done.code:
            raise self.remote.failure(f"folder {_ENGINES}", done.code, done.errors)
        found = re.findall(r"(?m)^([0-9a-f]{64}) +([0-9]{1,15})$", done.output.decode(errors="replace"))
        return {key: _StoredEngine(key, int(count)) for key, count in found}

    def _push_graphs(self, paths: Sequence[Path]) -> None:
        graphs = {files.sha256_of_file(path): path for path in paths}
        weights = {weight.name: weight for path in paths for weight in stored_weights(path)}
        for content, folder in ((weights, f"{_GRAPHS}/{WEIGHTS}"), (graphs, _GRAPHS)):
            self.remote.push(content, folder, lambda done, total: self.progress("send", done, total))

    def _state(self) -> DeviceState:
        """Read the kernel's files on the device, and ask its nvpmodel."""
        return state_from_text(
            self.remote.run(("sh", "-c", shell_script("device_state"))).output.decode(errors="replace")
        )

    @property
    def _known_hello(self) -> Hello:
        assert self.hello is not None, "`greet` comes before anything else"
        return self.hello

    @property
    def _major(self) -> int:
        return int(self._known_hello.version.partition(".")[0])

    @property
    def _cache(self) -> str:
        return f"{_ENGINES}/timing-{self._known_hello.version}.cache"


def trtexec_instead_of_python(
    remote: Remote, target: Target, caches: Path, progress: Progress, error: MessError
) -> TrtexecSession | None:
    """A session by trtexec with a device whose Python failed with `error`; None when its Python can be used.

    None also for other libraries than TensorRT and for a lost connection. Raises RemoteError without trtexec.
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
    """From lines `zone MILLIDEGREES TYPE`, `devfreq HZ LIMIT NAME`, `policy KHZ LIMIT NUMBER`, `load N`, `mode M`."""
    zones = {name: int(milli) / 1000 for milli, name in re.findall(r"(?m)^zone (-?[0-9]{1,6}) (\S.*)$", text)}
    gpus = [found for found in _frequencies("devfreq", text) if power.GPU_DEVFREQ.fullmatch(found[2])]
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


def _hello_facts(found: Mapping[str, str]) -> dict[str, str]:
    """The facts of `worker.describe_machine`, and how trtexec measures."""
    facts = {name: found.get(name, "") for name in ("cpu", "cores", "load_average", "system", "identity")}
    facts["cpu"] = facts["cpu"] or facts["system"].rpartition(" ")[2]
    return {**facts, "protocol": trtexec.PROTOCOL_DIFFERENCE, "estimated_from": "what was measured of its graphs"}


def _jetson_linux(release: str) -> str | None:
    found = re.search(r"R([0-9]+) \(release\), REVISION: ([0-9.]+)", release)
    return ".".join(found.groups()) if found else None


def _why_not_built(run: _TrtexecRun) -> str:
    if run.code > 128:
        return "trtexec crashed on the device, or was killed for the memory it took"
    return f"trtexec: {trtexec.error_from_output(run.output)}"


def _window(name: str, number: int, samples: trtexec.TrtexecTimes, opening: Window | None) -> Window:
    """A window of at most MOST_RUNS runs, evenly chosen. Its tick is the reference's window that opens the round."""
    step = -(-len(samples.wall_ms) // MOST_RUNS)
    wall_ms = tuple(round(milliseconds, 6) for milliseconds in samples.wall_ms[::step])
    window = Window(name, number, wall_ms, samples.device_ms[::step], None, sum(samples.wall_ms) / 1e3)
    return replace(window, ticks_ms=((opening or window).median_ms,))
