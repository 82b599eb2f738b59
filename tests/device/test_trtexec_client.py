"""`profile --host` where Python cannot be used: trtexec alone gives a table, which names its protocol."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mess_compile import files, steps
from mess_compile.device.remote import Remote, RemoteError, parse_host
from mess_compile.device.session import MeasureRequest
from mess_compile.device.trtexec import PROTOCOL_DIFFERENCE
from mess_compile.device.trtexec_client import MOST_RUNS, TrtexecSession, state_from_text, trtexec_instead_of_python
from mess_compile.engines import build as building
from mess_compile.graph.store import store_weight
from mess_compile.latency.table import LatencyTable, read_latency_table
from mess_compile.network import GraphSet, read_graph_set
from mess_compile.runtime.base.errors import EngineError, InputError, MessError
from mess_compile.runtime.machine.machine import Gpu, InstalledLibrary, Machine
from mess_compile.runtime.machine.power import DeviceState
from mess_compile.runtime.measure import measure
from mess_compile.runtime.measure.job_pool import PSEUDO_GRAPHS, Job, Opened
from mess_compile.runtime.measure.measure import Window
from mess_compile.runtime.serve.worker import describe_machine
from mess_compile.targets import find_target
from mess_compile.workspace import Workspace
from tests.commands import printed_json, run
from tests.conftest import EFFORT, quiet
from tests.device.test_trtexec import OPTIONS_8_5, OPTIONS_10, OPTIONS_11
from tests.remote_device import Device, remote_device

TARGET = """name = "mine"
description = "a device of TensorRT's, made in a test"
library = "tensorrt"
library_versions = ["8.5", "11"]
precisions = ["fp32"]
compute_capability = "7.2"
gpu = "Stand-in"
opset = 17
"""
STANDIN = r"""#!/bin/sh
# Stands for trtexec: takes the options of one release, wants what they name, and leaves files as that release does.
place={place}
say() {{ echo "[11/21/2026-10:11:12] [$1] $2"; }}
fail() {{ say E "$1" >&2; say E "Engine set up failed" >&2; echo "&&&& FAILED TensorRT.trtexec"; exit 1; }}
mode() {{ cat "$place/mode" 2>/dev/null; }}
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v{packed}]{build} # $0 $*"
echo "$*" >>"$place/log"
for word; do
    name=${{word%%=*}}; value=${{word#*=}}
    case " {options} " in *" $name "*) ;; *) say E "Unknown option: $name" >&2; exit 1 ;; esac
    case $name in
        --onnx) onnx=$value ;; --saveEngine) save=$value ;; --loadEngine) load=$value ;;
        --timingCacheFile) cache=$value ;; --exportTimes) times=$value ;;
    esac
done
say I "=== Device Information ==="
say I "Selected Device: Stand-in"
say I "Compute Capability: 7.2"
say I "Device Global Memory: 7765 MiB"
say I "TensorRT version: {version}"
if [ -n "$onnx" ]; then
    [ -f "$onnx" ] || fail "Failed to parse onnx file"
    for weight in $(grep -aoE 'weights/[0-9a-f]{{64}}' "$onnx"); do
        [ -f "$(dirname "$onnx")/$weight" ] || fail "[TRT] Failed to open file: $weight"
    done
    [ ! -f "$cache" ] || grep -q '^timed' "$cache" || fail "TimingCache creation failed"
    [ "$(mode)" != full ] || fail "Saving engine to file failed."
    if [ "$(basename "$onnx")" = "$(cat "$place/broken" 2>/dev/null)" ]; then
        [ "$(mode)" != crash ] || kill -9 $$
        say E "[TRT] ModelImporter.cpp:726: While parsing node number 3 [TopK -> \"x\"]:" >&2
        say E "[TRT] ModelImporter.cpp:727: --- Begin node ---" >&2
        say E "[TRT] ModelImporter.cpp:732: ERROR: builtin_op_importers.cpp:4951 In function importTopK:" >&2
        echo "[8] Assertion failed: no kernel for it" >&2
        fail "Failed to parse onnx file"
    fi
    [ "$(mode)" != slow ] || sleep 1
    echo "engine of $(basename "$onnx")" >"$save"
    [ -z "$cache" ] || echo "timed $(basename "$onnx")" >>"$cache"
    echo "&&&& PASSED TensorRT.trtexec [TensorRT v{packed}]"
    exit 0
fi
grep -q '^engine of' "$load" || fail "[TRT] 4: [runtime.cpp::deserializeCudaEngine::66] Engine deserialization failed."
say I "Engine loaded in 0.25 sec."
[ "$(mode)" != slow ] || sleep 1
compute=2.125; rows=13
[ "$(mode)" != nonsense ] || compute=-nan
[ "$(mode)" != fast ] || rows=2400
awk -v rows=$rows -v compute=$compute 'BEGIN {{
    print "["; separator = "  "
    for (row = 0; row < rows; row++) {{
        printf "%s{{ \"startEnqMs\" : %.6g, \"endEnqMs\" : 0", separator, 200 + row / 4
        printf ", \"startH2dMs\" : 0, \"endH2dMs\" : 0"
        printf ", \"startComputeMs\" : 0, \"endComputeMs\" : 0, \"startD2hMs\" : 0, \"endD2hMs\" : 0, \"h2dMs\" : 0"
        printf ", \"computeMs\" : %s, \"d2hMs\" : 0, \"latencyMs\" : %s }}\n", compute, compute; separator = ", "
    }}
    print "]"
}}' >"$times"
echo "&&&& PASSED TensorRT.trtexec [TensorRT v{packed}]"
"""
REFUSED = (
    'trtexec: ModelImporter.cpp:726: While parsing node number 3 [TopK -> "x"]; ModelImporter.cpp:732: ERROR: '
    "builtin_op_importers.cpp:4951 In function importTopK: [8] Assertion failed: no kernel for it"
)
"""The stand-in's output for a graph that it does not build."""
EVERY_MS, COMPUTE_MS = 0.25, 2.125
"""Of the stand-in: from one enqueue to the next, and between its events; different on purpose."""


@dataclass(frozen=True)
class Standin:
    """The device's trtexec; `mode` is how it behaves, `broken` the hash of a graph that it does not build."""

    device: Device
    place: Path

    def install(self, version: str, packed: str, build: str, options: set[str]) -> None:
        known = " ".join(f"--{option}" for option in sorted(options))
        script = STANDIN.format(place=self.place, version=version, packed=packed, build=build, options=known)
        (self.place / "trtexec").write_text(script)
        (self.place / "trtexec").chmod(0o755)

    def behave(self, mode: str) -> None:
        (self.place / "mode").write_text(mode)

    def cut_at_next_call(self) -> None:
        """Cut the connection while the next call runs; before it, the session would connect again unnoticed."""
        self.behave("slow")
        before = len(self.calls)

        def cut() -> None:
            while len(self.calls) == before:
                time.sleep(0.01)
            self.device.cut()

        threading.Thread(target=cut, daemon=True).start()

    def fake(self, script: str) -> None:
        """Put another program in its place."""
        (self.place / "trtexec").write_text(f"#!/bin/sh\n{script}\n")

    def break_graph(self, sha256: str) -> None:
        (self.place / "broken").write_text(sha256)

    @property
    def calls(self) -> list[str]:
        log = self.place / "log"
        return log.read_text().splitlines() if log.exists() else []

    def called(self, option: str) -> list[str]:
        return [call for call in self.calls if option in call]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with remote_device(tmp_path_factory.mktemp("device")) as device:
        yield device


@pytest.fixture
def standin(running: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Standin:
    """A device with TensorRT 8.5.2 and trtexec, without Python."""
    running.restore()
    place = tmp_path / "trtexec-there"
    place.mkdir()
    (running.folder / "path").write_text(f"{place}:{running.folder / 'tools'}")
    monkeypatch.setenv("PATH", f"{running.path_folder()}:{os.environ['PATH']}")
    monkeypatch.setattr(measure, "Effort", lambda: EFFORT)
    made = Standin(running, place)
    made.install("8.5.2", "8502", "", OPTIONS_8_5)
    return made


@pytest.fixture
def mine(workspace: Path) -> Path:
    """A workspace that knows the target; afterwards its latency table is whole, if there is one."""
    (workspace / "profiles").mkdir()
    (workspace / "profiles" / "mine.toml").write_text(TARGET)
    yield workspace
    if table_path(workspace).exists():
        read_latency_table(table_path(workspace))


@pytest.fixture
def remote(standin: Standin) -> Iterator[Remote]:
    with Remote(parse_host(standin.device.host)) as connected:
        yield connected


@pytest.fixture
def session(remote: Remote, tmp_path: Path) -> TrtexecSession:
    return another_session(remote, tmp_path)


def another_session(remote: Remote, tmp_path: Path) -> TrtexecSession:
    made = TrtexecSession(remote, tmp_path / "caches", quiet)
    made.greet()
    return made


@pytest.fixture
def jobs(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Three small graphs that share a weight, as `build` takes them."""
    return {f"{name}@fp32": (write_graph(tmp_path / "graphs", name), "fp32") for name in ("a", "b", "c")}


def write_graph(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    weight = numpy_helper.from_array(np.zeros((1, 512), np.float32), "weight")
    store_weight(weight, folder)
    values = [helper.make_tensor_value_info(each, onnx.TensorProto.FLOAT, (1, 512)) for each in ("x", name)]
    nodes = [helper.make_node("Add", ["x", "weight"], [name])]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, name, values[:1], values[1:], [weight])), folder / f"{name}.onnx"
    )
    return folder / f"{name}.onnx"


def measured(session: TrtexecSession, jobs: dict[str, tuple[Path, str]]) -> list[Opened | Window]:
    listed = [Job(name, path) for name, (path, _) in jobs.items()]
    precisions = {name: precision for name, (_, precision) in jobs.items()}
    request = MeasureRequest("", tuple(listed), precisions, tuple(jobs), next(iter(jobs)), EFFORT)
    return list(session.measure(request, ()))


def table_path(workspace: Path) -> Path:
    return workspace / "latency" / "mine.json"


def samples(workspace: Path) -> list[tuple[str, int]]:
    """Job and round of every window that is stored locally."""
    path = table_path(workspace).with_suffix(".samples.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    return [(line["window"]["job"], line["window"]["round"]) for line in lines if "window" in line]


def profiled(
    workspace: Path, standin: Standin, watch: Callable[[str, int, int], None] = lambda *told: None
) -> LatencyTable:
    """A subset, as is usual over SSH."""
    return steps.profile(
        Workspace(workspace),
        "mine",
        steps.ProfileOptions(effort=EFFORT, hosts=(standin.device.host,), subset=steps.Subset()),
        steps.Reporter(watch),
    )


def words(workspace: Path, standin: Standin) -> tuple[str, ...]:
    return ("-C", str(workspace), "profile", "--verbose", "--all", "--device", "mine", "--host", standin.device.host)


def graphs(workspace: Path) -> GraphSet:
    return read_graph_set(workspace / "graphs")


def sent_as(workspace: Path, graph: str) -> str:
    """The hash of the graph as the target's parser takes it."""
    place, target = Workspace(workspace), find_target("mine", workspace)
    return files.sha256_of_file(
        building.target_forms(graphs(workspace), target, place.forms("mine"), quiet).path(graph)
    )


def test_trtexec_alone_gives_a_table_that_names_its_protocol(mine: Path, standin: Standin) -> None:
    broken = "head-exit1.fcn-crm1-b0"
    standin.break_graph(sent_as(mine, broken))
    result = run(*words(mine, standin))
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("trtexec builds and measures there") == 1
    assert "python3" in result.stderr, "why it is used"
    assert PROTOCOL_DIFFERENCE in result.stdout
    assert f"FAILED  {broken} (fp32), in no plan: {REFUSED}" in result.stdout
    table = read_latency_table(table_path(mine))
    assert (table.source, table.library, table.library_version) == ("estimated", "tensorrt", "8.5.2")
    assert table.environment["protocol"] == PROTOCOL_DIFFERENCE
    assert {name: table.environment[name] for name in ("identity", "cores", "cpu", "system")}.items() <= (
        describe_machine().items()
    ), "one device is the same device in both protocols"
    assert {name for name, _ in table.entries} == {*graphs(mine).graphs, *PSEUDO_GRAPHS} - {broken}
    for (name, _), entry in table.entries.items():
        if name in PSEUDO_GRAPHS:
            assert (entry.source, entry.runs) == ("estimated", 0)
            assert entry.mean_ms > 0
            assert entry.error is not None
            assert entry.error > 1
        else:
            assert (entry.source, entry.error, entry.steady) == ("measured", None, True)
            assert entry.mean_ms == pytest.approx(EVERY_MS)
            assert entry.device_ms == pytest.approx(COMPUTE_MS)
            assert entry.runs == 12 * EFFORT.windows or name == "baseline"
            assert entry.file_bytes == len("engine of ") + 64 + 1
    cache = mine / "engines" / "mine" / "timing-8.5.2.cache"
    assert cache.read_text().count("timed") == len(graphs(mine).graphs) - 1, "each build adds to what is kept"
    content = printed_json("-C", mine, "search", "--device", "mine", "--max-err", "100%")
    assert content["source"] == "estimated"
    assert os.listdir(standin.device.home) == [".mess-compile"], "nothing else is left in the user's home"


@pytest.mark.slow
def test_a_cut_connection_is_one_line_and_the_same_command_continues(mine: Path, standin: Standin) -> None:
    cut: list[bool] = []

    def watch(label: str, done: int, total: int) -> None:
        if len(samples(mine)) >= 5 and not cut:
            cut.append(True)
            standin.cut_at_next_call()

    with pytest.raises(RemoteError) as caught:
        profiled(mine, standin, watch)
    assert caught.value.lost
    assert "\n" not in str(caught.value)
    standin.behave("")
    kept = samples(mine)
    assert len(kept) >= 5
    last: list[tuple[str, int]] = []
    table = profiled(mine, standin, lambda *told: last.__setitem__(slice(None), samples(mine)))
    assert last[: len(kept)] == kept, "what was measured is kept"
    assert len(set(last)) == len(last), "nothing is measured twice"
    again = [call.split()[0] for call in standin.called("--onnx")]
    assert len(set(again)) == len(again), "nothing is built twice"
    assert {name for name, _ in table.entries} == {*graphs(mine).graphs, *PSEUDO_GRAPHS}
    assert table.entries["baseline", "fp32"].source == "measured"
    assert table.environment["protocol"] == PROTOCOL_DIFFERENCE


@pytest.mark.slow
def test_a_cut_while_building_leaves_nothing_running_and_what_was_built(
    standin: Standin, session: TrtexecSession, jobs: dict[str, tuple[Path, str]], remote: Remote, tmp_path: Path
) -> None:
    def watch(label: str, done: int, total: int) -> None:
        if label == "build there" and done == 1:
            standin.cut_at_next_call()

    session.progress = watch
    with pytest.raises(RemoteError) as caught:
        session.build(jobs)
    assert caught.value.lost
    until = time.monotonic() + 20
    while any(f"{standin.place}/trtexec" in command for command in commands()):
        assert time.monotonic() < until
        time.sleep(0.05)
    standin.behave("")
    assert another_session(remote, tmp_path).build(jobs) == {}
    built = [call.split()[0] for call in standin.called("--onnx")]
    assert built.count(built[0]) == 1
    assert len(set(built)) == 3


def commands() -> Iterator[str]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                yield (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


@pytest.mark.parametrize(
    ("version", "packed", "build", "options"),
    [("11.1.0", "110100", " [b42]", OPTIONS_11)],
)
@pytest.mark.slow
def test_newer_releases_get_their_own_options(
    standin: Standin,
    session: TrtexecSession,
    jobs: dict[str, tuple[Path, str]],
    version: str,
    packed: str,
    build: str,
    options: set[str],
) -> None:
    standin.install(version, packed, build, options)
    hello = session.greet()
    assert (hello.version, hello.machine.libraries) == (version, (InstalledLibrary("tensorrt", version),))
    assert session.build(jobs) == {}
    events = measured(session, jobs)
    assert sorted(event.job for event in events if isinstance(event, Opened)) == sorted(jobs)
    for event in events:
        if isinstance(event, Opened):
            assert event.load_ms == pytest.approx(250)
        else:
            assert event.wall_ms == pytest.approx((EVERY_MS,) * 12)
            assert event.device_ms == (COMPUTE_MS,) * 12
            assert event.spent_s == pytest.approx(12 * EVERY_MS / 1e3)


@pytest.mark.slow
def test_the_facts_of_a_device_are_read(session: TrtexecSession) -> None:
    assert session.hello is not None
    assert session.hello.machine == Machine(
        gpus=(Gpu("Stand-in", (7, 2), 7765 / 1024),),
        board=session.hello.machine.board,
        l4t=session.hello.machine.l4t,
        libraries=(InstalledLibrary("tensorrt", "8.5.2"),),
    )


@pytest.mark.slow
def test_a_builder_that_crashes_takes_one_graph_with_it(
    standin: Standin, session: TrtexecSession, jobs: dict[str, tuple[Path, str]]
) -> None:
    standin.behave("crash")
    standin.break_graph(files.sha256_of_file(jobs["b@fp32"][0]))
    assert session.build(jobs) == {"b@fp32": "trtexec crashed on the device, or was killed for the memory it took"}
    standin.behave("")
    del jobs["b@fp32"]
    assert {event.job for event in measured(session, jobs)} == {*jobs}


@pytest.mark.slow
def test_damaged_engines_and_timing_caches_are_rebuilt(
    standin: Standin, session: TrtexecSession, jobs: dict[str, tuple[Path, str]], remote: Remote, tmp_path: Path
) -> None:
    session.build(jobs)
    assert another_session(remote, tmp_path).build(jobs) == {}
    assert len(standin.called("--onnx")) == 3, "what is there is kept"
    folder = standin.device.home / ".mess-compile" / "engines"
    first, second, third = sorted(folder.glob("*.engine"))
    first.write_bytes(b"an engine from elsewhere")
    second.with_suffix(".sha256").unlink()
    (folder / "timing-8.5.2.cache").write_bytes(b"half of a ca")
    assert another_session(remote, tmp_path).build(jobs) == {}
    assert len(standin.called("--onnx")) == 3 + 2 + 1, "two engines, and one again after the cache was refused"
    assert (tmp_path / "caches" / "timing-8.5.2.cache").read_text().count("timed") == 2
    third.write_bytes(b"it does not load")
    with pytest.raises(EngineError, match=r"does not run: 4: .* Engine deserialization failed"):
        measured(session, jobs)
    assert not third.with_suffix(".sha256").exists(), "it is built again by the next call"


@pytest.mark.slow
def test_a_folder_of_engines_that_others_can_write_is_refused(
    standin: Standin, session: TrtexecSession, jobs: dict[str, tuple[Path, str]]
) -> None:
    folder = standin.device.home / ".mess-compile" / "engines"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(RemoteError, match=r"engines are code: run `chmod go-w \.mess-compile/engines` there"):
        session.build(jobs)


@pytest.mark.slow
def test_nonsense_instead_of_times_is_one_line_that_names_the_graph(
    standin: Standin, session: TrtexecSession, jobs: dict[str, tuple[Path, str]]
) -> None:
    session.build(jobs)
    standin.behave("nonsense")
    with pytest.raises(InputError, match=r"a@fp32: the times that trtexec exported are damaged .* run") as caught:
        measured(session, jobs)
    assert "\n" not in str(caught.value)
    assert standin.device.host in str(caught.value)


@pytest.mark.slow
def test_a_window_of_many_runs_is_sampled_evenly(
    standin: Standin, session: TrtexecSession, jobs: dict[str, tuple[Path, str]]
) -> None:
    session.build(jobs)
    standin.behave("fast")
    windows = [event for event in measured(session, jobs) if isinstance(event, Window)]
    for window in windows:
        assert MOST_RUNS / 2 < len(window.wall_ms) <= MOST_RUNS
        assert len(window.wall_ms) == len(window.device_ms)
        assert window.spent_s == pytest.approx(2399 * EVERY_MS / 1e3)


@pytest.mark.parametrize(
    ("provoke", "told"),
    [
        (lambda standin: standin.behave("full"), "has no space left for engines in .mess-compile/engines: make room"),
        (lambda standin: standin.install("10.3.0", "100300", "", OPTIONS_10), "tensorrt is 10.3.0, not 8.5 or 11"),
        (lambda standin: standin.fake("true"), "{host}: trtexec names no version of TensorRT in ''"),
        (lambda standin: standin.fake("echo '[TensorRT v8502]'; exit 1"), "trtexec finds no GPU"),
        (
            lambda standin: (standin.place / "trtexec").unlink(),
            "or name another by --python PATH; trtexec would be enough, but {host} has no trtexec, neither /usr/src/",
        ),
    ],
    ids=["full", "another version", "another program", "no GPU", "neither Python nor trtexec"],
)
@pytest.mark.slow
def test_errors_on_the_device_are_one_line_with_the_remedy(
    mine: Path, standin: Standin, provoke: Callable[[Standin], object], told: str
) -> None:
    provoke(standin)
    result = run(*words(mine, standin))
    assert result.exit_code == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert told.format(host=standin.device.host) in message
    assert not table_path(mine).exists()


@pytest.mark.slow
def test_nothing_is_sent_to_a_device_that_is_not_the_target(mine: Path, standin: Standin) -> None:
    (mine / "profiles" / "mine.toml").write_text(TARGET.replace("Stand-in", "Xavier"))
    message = run(*words(mine, standin)).stderr.splitlines()[-1]
    assert f"{standin.device.host} is not 'mine': the GPU is Stand-in, not Xavier" in message
    assert not (standin.device.home / ".mess-compile" / "graphs").exists()


@pytest.mark.slow
def test_trtexec_is_used_only_where_python_is_unusable(standin: Standin, remote: Remote, tmp_path: Path) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / "mine.toml").write_text(TARGET)
    target, error = find_target("mine", tmp_path), MessError("tensorrt cannot be imported")
    path = standin.device.folder / "path"
    path.write_text(f"{standin.device.python.parent}:{path.read_text()}")
    assert trtexec_instead_of_python(remote, target, tmp_path, quiet, error) is not None, "a Python without tensorrt"
    assert trtexec_instead_of_python(remote, target, tmp_path, quiet, RemoteError("it was cut", lost=True)) is None
    assert trtexec_instead_of_python(remote, find_target("host", tmp_path), tmp_path, quiet, error) is None
    usable = standin.place / "python3"
    usable.write_text("#!/bin/sh\nexit 0\n")
    usable.chmod(0o755)
    path.write_text(f"{standin.place}:{standin.device.folder / 'tools'}")
    assert trtexec_instead_of_python(remote, target, tmp_path, quiet, error) is None, "a Python that has all it needs"


@pytest.mark.slow
def test_the_state_of_a_jetson_is_read_from_its_files() -> None:
    text = (
        "zone 41500 CPU-therm\nzone 38000 GPU-therm\nzone  broken\ndevfreq 1377000000 1377000000 17000000.gv11b\n"
        "devfreq 204000000 1 15480000.nvdec\npolicy 2265600 2265600 0\npolicy 1190400 2265600 2\nload 0.25\nmode MAXN\n"
    )
    assert state_from_text(text) == DeviceState(
        power_mode="MAXN",
        clocks_mhz=(("GPU", 1377.0), ("CPU0", 2265.6), ("CPU2", 1190.4)),
        limits_mhz=(("GPU", 1377.0), ("CPU0", 2265.6), ("CPU2", 2265.6)),
        temperatures_c=(("CPU-therm", 41.5), ("GPU-therm", 38.0)),
        load_average=0.25,
    )
    assert state_from_text("zone \nload x\nmode \n") == DeviceState()


@pytest.mark.slow
def test_build_uses_trtexec_where_python_is_unusable(mine: Path, standin: Standin) -> None:
    command = ("-C", mine, "build", "--device", "mine", "--host", standin.device.host)
    (first,) = printed_json(*command)["builds"]
    graphs = set(read_graph_set(mine / "graphs").graphs)
    assert {entry["graph"] for entry in first["engines"]["entries"]} == graphs
    assert first["engines"]["built"] == len(graphs) == len(standin.called("--saveEngine"))
    assert (first["engines"]["library_version"], first["engines"]["entries"][0]["error"]) == ("8.5.2", None)
    (again,) = printed_json(*command)["builds"]
    assert again["engines"]["built"] == 0
    assert len(standin.called("--saveEngine")) == len(graphs)
