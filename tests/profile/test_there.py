"""`profile --host`: a device over a real sshd, with another HOME, another Python, and every way to break in between."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mess_compile import steps
from mess_compile.device import connect
from mess_compile.device.remote import RemoteError, parse_host
from mess_compile.latency.table import LatencyTable, read_latency_table
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.measure import measure
from mess_compile.runtime.serve import worker
from mess_compile.workspace import Workspace
from tests.commands import complaint, done, printed_json, refused, run
from tests.conftest import EFFORT
from tests.remote_device import Device, remote_device

LONGER = measure.Effort(window_s=0.03, window_runs=2, max_s=0.09, warm_up_s=0.0)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with remote_device(tmp_path_factory.mktemp("device")) as device:
        yield device


@pytest.fixture
def device(running: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Reached by the `ssh` on PATH, as a user's ~/.ssh/config would reach it; `profile` measures for milliseconds."""
    running.restore()
    monkeypatch.setenv("PATH", f"{running.path_folder()}:{os.environ['PATH']}")
    monkeypatch.setattr(measure, "Effort", lambda: EFFORT)
    return running


@pytest.fixture
def unmeasured(workspace: Path) -> Path:
    """A workspace without a latency table; afterwards none that is half written."""
    (workspace / "latency" / "host.json").unlink()
    yield workspace
    path = workspace / "latency" / "host.json"
    if path.exists():
        read_latency_table(path)


def test_another_machine_does_not_take_the_place_of_this_one(
    workspace: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `host`, this machine's table would be another's, and every plan for it wrong."""
    here = {**worker.describe_machine(), "identity": "another"}
    monkeypatch.setattr(connect, "describe_machine", lambda: here)
    message = refused(workspace, "profile", "--device", "host", "--host", device.host)
    assert f"{device.host} is another one, whose latencies would replace those of this machine" in message
    assert "describe it in profiles/NAME.toml, and use --device NAME" in message


EVIL = "my tools/py $(touch hacked) `touch hacked`; touch hacked & 'thon\""
OLD = """[ "$1" = -c ] && echo 3.6.9 && exit 0
echo "SyntaxError: future feature annotations is not defined" >&2; exit 1"""


class TestNamedPython:
    """The python3 of a device is often the wrong one: conda, a venv, JetPack's own."""

    @pytest.mark.slow
    def test_it_is_used_quoted_and_remembered(self, workspace: Path, device: Device) -> None:
        python = device.wrapped_python(EVIL)
        device.use_python(None)
        given = ("evaluate", "--split", "val[:2]", "--device", "host", "--host", device.host)
        assert "2 images" in done("-C", workspace, *given, "--python", python)
        assert not list(device.home.rglob("hacked"))
        again = connect.remote_for(Workspace(workspace), device.host, None)
        with again as remote:
            assert remote.run((remote.host.python, "-c", "print(1)")).output == b"1\n"

    @pytest.mark.parametrize(
        ("python", "words"),
        [
            (f"~/{EVIL}", f"`./{EVIL}` is Python 3.6.9, and 3.8 or newer is needed: name another by --python PATH"),
            (
                "~/tools/bare",
                "No module named 'numpy': install it there, for this ./tools/bare, or name another by --python",
            ),
        ],
    )
    def test_one_that_will_not_do_is_named_with_the_remedy(
        self, unmeasured: Path, device: Device, python: str, words: str
    ) -> None:
        device.wrapped_python(EVIL, OLD)
        device.wrapped_python("tools/bare", f'exec {device.bare_python} "$@"')
        message = complaint("-C", unmeasured, "profile", "--device", "host", "--host", device.host, "--python", python)
        assert words in message
        assert "--python PATH" in message
        assert Workspace(unmeasured).memory().pythons == {}
        assert not list(device.home.rglob("hacked"))

    @pytest.mark.parametrize("python", ["", "-c", "--help", "a=b", "python3\nrm", "A=1 python3"])
    def test_what_is_no_path_never_reaches_the_device(self, python: str) -> None:
        with pytest.raises(InputError, match="write the path of a Python there"):
            parse_host("me@there", python)

    def test_without_a_host_there_is_no_other_python(self, workspace: Path) -> None:
        for command in ("profile", "evaluate"):
            words = "--python /opt/python3 needs a device over SSH: add --host ssh://user@host"
            assert words in refused(workspace, command, "--device", "host", "--python", "/opt/python3")


def samples(workspace: Path) -> list[tuple[str, int]]:
    """Job and round of every window that is kept here."""
    path = workspace / "latency" / "host.samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    return [(line["window"]["job"], line["window"]["round"]) for line in lines if "window" in line]


def profiled(
    workspace: Path, device: Device, watch: Callable[[str, int, int], None] = lambda *told: None
) -> LatencyTable:
    return steps.profile(
        Workspace(workspace), "host", steps.ProfileOptions(effort=LONGER, hosts=(device.host,)), steps.Reporter(watch)
    )


def test_a_device_over_ssh_gives_a_table_and_is_remembered(unmeasured: Path, device: Device) -> None:
    shown = done("-C", unmeasured, "profile", "--device", "host", "--host", device.host, "--all")
    assert "entries measured on host: baseline " in shown
    table = read_latency_table(unmeasured / "latency" / "host.json")
    assert table.source == "measured"
    assert table.failed == {}
    sent = {path.name for path in (device.home / ".mess-compile" / "graphs").iterdir() if path.is_file()}
    (unmeasured / "latency" / "host.json").unlink()
    done("-C", unmeasured, "profile", "--all")
    assert {path.name for path in (device.home / ".mess-compile" / "graphs").iterdir() if path.is_file()} == sent
    done("-C", unmeasured, "search", "--max-err", "100%")
    left = {path.name for path in device.home.iterdir()}
    assert left <= {".mess-compile", ".cache"}, "nothing but the hidden store (and what ONNX Runtime leaves)"


def test_only_what_could_change_the_answer_is_measured_over_ssh(unmeasured: Path, device: Device) -> None:
    result = run(
        "-C", unmeasured, "profile", "--device", "host", "--host", device.host, "--requirement", "--max-err 100%"
    )
    assert result.exit_code == 0, result.stderr
    assert "graphs: baselines, and the graphs that calibrate the estimates best; about 1 min" in result.stderr
    table = read_latency_table(unmeasured / "latency" / "host.json")
    told = re.search(r"measured (\d+) of (\d+) graphs", result.stdout)
    assert told is not None
    measured = [
        entry
        for entry in table.entries.values()
        if entry.source == "measured" and entry.sha256 and not entry.shared_with
    ]
    assert len(measured) == int(told[1]) < int(told[2])
    assert all(entry.error is not None for entry in table.entries.values() if entry.source == "estimated")
    content = printed_json("-C", unmeasured, "search", "--max-err", "100%")
    assert content["source"] == "measured", "a plan rests on what was measured, whatever else was estimated"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--requirement", "--max-err 1"), "--max-err '1' has no unit: write 1%"),
        (("--requirement", "--max-error 1%"), "it takes the options of `search`"),
        (("--requirement", '"'), "it takes the options of `search`"),
        (("--budget", "soon"), "--budget 'soon' is not understood: write 30min"),
    ],
)
def test_the_requirement_of_a_subset_profile_is_checked_first(
    unmeasured: Path, device: Device, options: tuple[str, str], words: str
) -> None:
    assert words in complaint("-C", unmeasured, "profile", "--device", "host", "--host", device.host, *options)


def test_a_budget_that_is_used_up_leaves_a_table(unmeasured: Path, device: Device) -> None:
    command = ("-C", unmeasured, "profile", "--device", "host", "--host", device.host, "--budget", "0.001s")
    assert "measured 0 of" in done(*command)
    assert printed_json("-C", unmeasured, "search", "--max-err", "100%")["source"] == "estimated"


def test_a_budget_and_a_requirement_hold_on_this_machine_too(unmeasured: Path, brief_profile: None) -> None:
    assert "measured 0 of" in done("-C", unmeasured, "profile", "--device", "host", "--budget", "0.001s")
    told = run("-C", unmeasured, "profile", "--device", "host", "--requirement", "--max-err 100%").stderr
    assert "graphs: baselines" in told
    table = read_latency_table(unmeasured / "latency" / "host.json")
    assert table.source == "estimated", "the rest was not measured"
    assert printed_json("-C", unmeasured, "search", "--max-err", "100%")["source"] == "measured"


@pytest.mark.parametrize(
    "options",
    [("--requirement", "--max-err 1%"), ("--budget", "1min"), ("--all",), ("--seconds", "1"), ("--lock-clocks",)],
    ids=lambda options: options[0],
)
def test_what_measures_does_not_go_with_an_estimate(unmeasured: Path, options: tuple[str, ...]) -> None:
    result = run("-C", unmeasured, "profile", "--device", "xavier", "--estimate", *options)
    assert result.exit_code == 2
    assert f"--estimate does without the device: drop {options[0]}, or measure there." in result.stderr


def test_an_estimate_is_marked_all_the_way(unmeasured: Path) -> None:
    shown = done("-C", unmeasured, "profile", "--device", "xavier", "--estimate", "-v")
    assert re.search(r"(\d+) of \1 entries ESTIMATED for xavier", shown)
    assert "estimated from its data sheet" in shown
    assert "host.json does not exist" in complaint("-C", unmeasured, "search"), "an estimate is not taken by default"
    shown = done("-C", unmeasured, "search", "--device", "xavier", "--max-err", "100%")
    assert "Plan for xavier (fp32, ESTIMATED latency): " in shown
    told = run("-C", unmeasured, "search", "--device", "xavier", "--max-err", "100%").stderr
    assert "warning: latencies are estimates, off by a factor of up to " in told
    done("-C", unmeasured, "bundle", "xavier")
    assert "estimated" in done("inspect", unmeasured / "xavier.mess")


@pytest.mark.slow
def test_what_was_measured_stays_when_the_rest_is_estimated(unmeasured: Path, device: Device) -> None:
    done("-C", unmeasured, "profile", "--device", "host", "--host", device.host, "--all")
    before = read_latency_table(unmeasured / "latency" / "host.json")
    done("-C", unmeasured, "profile", "--device", "host", "--estimate")
    assert read_latency_table(unmeasured / "latency" / "host.json").entries == before.entries


@pytest.mark.slow
def test_what_runs_there_is_the_device_s_own_python(unmeasured: Path, device: Device) -> None:
    """No path to the workspace, nothing of this environment but numpy and the engine library."""
    done("-C", unmeasured, "profile", "--device", "host", "--host", device.host)
    asked = "import sys; print(sys.executable); import mess_compile"
    found = subprocess.run([device.python, "-c", asked], capture_output=True, text=True, check=False, cwd="/")
    assert found.returncode == 1
    assert "No module named 'mess_compile'" in found.stderr


@pytest.mark.parametrize("how", ["cut", "kill", pytest.param("reboot", marks=pytest.mark.slow)])
def test_a_break_in_the_middle_is_one_line_and_the_same_command_continues(
    unmeasured: Path, device: Device, how: str
) -> None:
    broken: list[int] = []

    def watch(label: str, finished: int, total: int) -> None:
        if len(samples(unmeasured)) >= 5 and not broken:
            broken.append(1)
            if how == "cut":
                device.cut()
            elif how == "reboot":
                device.stop()
            else:
                _kill_session(device)

    with pytest.raises(RemoteError) as caught:
        profiled(unmeasured, device, watch)
    assert str(caught.value).count("\n") == 0
    assert device.host in str(caught.value)
    kept = samples(unmeasured)
    assert len(kept) >= 5
    device.start()
    last: list[tuple[str, int]] = []

    def follow(label: str, finished: int, total: int) -> None:
        last[:] = samples(unmeasured)

    table = profiled(unmeasured, device, follow)
    assert last[: len(kept)] == kept, "what was measured is kept"
    assert len(set(last)) == len(last), "nothing is measured twice"
    assert {entry.source for entry in table.entries.values()} == {"measured"}


def _kill_session(device: Device) -> None:
    for process in _sessions(device):
        os.kill(process, signal.SIGKILL)


def _sessions(device: Device) -> list[int]:
    """The processes of this device alone that measure for us."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else [b""]
            ours = b"python" in words[0] and b"mess_compile.runtime.serve.worker" in words
            if ours and f"HOME={device.home}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_windows_that_only_the_device_has_are_taken_over(unmeasured: Path, device: Device) -> None:
    """Measured there, but the connection was gone before the lines arrived."""
    with pytest.raises(RemoteError):
        profiled(unmeasured, device, lambda *told: device.cut() if len(samples(unmeasured)) >= 5 else None)
    path = unmeasured / "latency" / "host.samples.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n")
    there = next((device.home / ".mess-compile" / "results").glob("*.jsonl"))
    known = [json.loads(line)["window"] for line in there.read_text().splitlines() if "window" in json.loads(line)]
    last: list[tuple[str, int]] = []
    profiled(unmeasured, device, lambda *told: last.extend(samples(unmeasured)[len(last) :]))
    assert {(window["job"], window["round"]) for window in known} <= set(last)
    assert len(set(last)) == len(last)


@pytest.mark.slow
def test_a_killed_command_here_leaves_nothing_running_there(unmeasured: Path, device: Device) -> None:
    code = "from mess_compile.cli import main; main()"
    words = ["-C", unmeasured, "profile", "--device", "host", "--host", device.host]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while len(samples(unmeasured)) < 3:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    while _sessions(device):
        assert time.monotonic() < until
        time.sleep(0.05)
    done("-C", unmeasured, "profile", "--device", "host", "--host", device.host)


@pytest.mark.parametrize(
    ("provoke", "words"),
    [
        (lambda device: device.use_python(device.bare_python), "numpy"),
        (lambda device: device.use_python(None), "python3"),
        (lambda device: device.limit_file_bytes(100_000), "make room there"),
        (lambda device: device.stop(), "Connection refused"),
        (lambda device: device.path_folder(device.options(key="wrong_key")), "ssh-copy-id"),
        (lambda device: device.path_folder(device.options(known="known_nothing")), "accept its host key"),
        (lambda device: device.path_folder(device.options(known="known_wrongly")), "ssh-keygen -R"),
    ],
    ids=["no numpy", "no python", "disk full", "down", "wrong key", "unknown host", "changed host key"],
)
def test_what_is_wrong_there_is_one_line_with_the_remedy(
    unmeasured: Path, device: Device, provoke: Callable[[Device], object], words: str
) -> None:
    provoke(device)
    message = complaint("-C", unmeasured, "profile", "--device", "host", "--host", device.host)
    device.path_folder()
    assert words in message
    assert not (unmeasured / "latency" / "host.json").exists()


def test_a_device_that_is_something_else_is_refused_before_anything_is_sent(unmeasured: Path, device: Device) -> None:
    message = complaint("-C", unmeasured, "profile", "--device", "xavier", "--host", device.host)
    assert f"{device.host}: tensorrt cannot be imported" in message
    assert not (device.home / ".mess-compile" / "graphs").exists()


def test_without_a_way_to_the_device_the_three_ways_are_named(unmeasured: Path) -> None:
    message = complaint("-C", unmeasured, "profile", "--device", "xavier")
    assert "this machine is not 'xavier'" in message
    assert "--host ssh://user@host, run this command on it, or go without it by --estimate" in message


@pytest.mark.parametrize("host", ["-oProxyCommand=touch x", "a b", "ssh://u:secret@h", "ssh://h/path", ""])
def test_a_host_that_is_none_is_refused(unmeasured: Path, host: str) -> None:
    message = complaint("-C", unmeasured, "profile", "--device", "host", "--host", host)
    assert "ssh://user@host" in message
    assert "secret" not in message
