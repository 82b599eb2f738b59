"""A device over a real sshd: nothing is lost, half written or left running; every error names its remedy."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mess_compile.device.remote import Host, PushResult, Remote, RemoteError, parse_host
from mess_compile.runtime.base.errors import InputError
from tests.remote_device import Device, remote_device

pytestmark = pytest.mark.slow

MB = 1 << 20
SLEEPER = ("sh", "-c", "echo $$; exec sleep 600")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with remote_device(tmp_path_factory.mktemp("device")) as device:
        yield device


@pytest.fixture
def device(running: Device) -> Device:
    running.restore()
    return running


@pytest.fixture
def remote(device: Device) -> Iterator[Remote]:
    with Remote(parse_host(device.host), device.ssh_options) as remote:
        yield remote


@pytest.fixture(scope="module")
def lasting(running: Device) -> Iterator[Remote]:
    """One connection for all examples of a test."""
    running.restore()
    with Remote(parse_host(running.host), running.ssh_options) as remote:
        yield remote


@pytest.fixture
def some(tmp_path: Path) -> dict[str, Path]:
    return made(tmp_path / "some", [200_000] * 3)


def made(folder: Path, sizes: list[int]) -> dict[str, Path]:
    """Files of these sizes, by their hashes."""
    folder.mkdir()
    found = {}
    for index, size in enumerate(sizes):
        content = (str(index).encode() * size)[:size]
        (folder / str(index)).write_bytes(content)
        found[hashlib.sha256(content).hexdigest()] = folder / str(index)
    return found


def quiet(sent_bytes: int, of_bytes: int) -> None:
    pass


def refusal(device: Device, *options: str, host: str = "") -> str:
    """The error of a connection that cannot be opened, which does not count as lost."""
    remote = Remote(parse_host(host or device.host), options)
    with pytest.raises(RemoteError) as caught, remote:
        pass
    message = str(caught.value)
    assert not caught.value.lost
    assert "\n" not in message
    assert message.startswith(host or device.host)
    return message


def ended(process: int) -> bool:
    """Within 20 s."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if not alive(process):
            return True
        time.sleep(0.02)
    return False


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("text", "destination", "port"),
    [
        ("ssh://nv@xavier:2222", "nv@xavier", 2222),
        ("ssh://xavier", "xavier", None),
        ("nv@192.168.1.7", "nv@192.168.1.7", None),
        ("my_jetson-2.lan", "my_jetson-2.lan", None),
        ("ssh://nv@[fe80::1%eth0]:22", "nv@fe80::1%eth0", 22),
        ("[::1]", "::1", None),
    ],
)
def test_hosts_are_parsed_as_ssh_does(text: str, destination: str, port: int | None) -> None:
    assert parse_host(text) == Host(text, destination, port)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "-oProxyCommand=touch x",
            "ssh://-oProxyCommand=x",
            "nv@-F",
            "-l@host",
            "a b",
            "host\n",
            "host;id",
            "$(id)",
        ),
        *("ssh://host/dir", "host:/dir", "host:22", "ssh://host:0", "ssh://host:65536", "ssh://host:", "::1", "[::g]"),
        *("http://host", "ssh://", "@host", "a@b@c", "hö", "ssh://host:２２"),
    ],
)
def test_an_invalid_host_never_reaches_ssh(text: str) -> None:
    with pytest.raises(InputError, match="write ssh://user@host") as caught:
        parse_host(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["ssh://nv:s3cret@xavier", "nv:s3cret@xavier", "ssh://nv:s3cret@", "a:s3cret@b@c"])
def test_a_password_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InputError, match="password") as caught:
        parse_host(text)
    assert "s3cret" not in str(caught.value)


@given(st.text(max_size=40) | st.from_regex(r"(ssh://)?([a-z-]+@)?[\[\]a-z0-9:.%-]+(:[0-9]+)?", fullmatch=True))
@example("ssh://a@-b")
def test_no_text_becomes_an_option_or_two_arguments(text: str) -> None:
    try:
        host = parse_host(text)
    except InputError:
        return
    user, _, name = host.destination.rpartition("@")
    assert name
    assert not name.startswith("-")
    assert not user.startswith("-")
    assert host.destination.isascii()
    assert not any(letter in host.destination for letter in " \t\n'\"$;&|<>`\\/*")


def test_programs_see_the_environment_of_the_device(device: Device, remote: Remote) -> None:
    done = remote.run(("python3", "-c", "import numpy, onnxruntime, os; print(os.environ['HOME'], os.getcwd())"))
    assert done.output.decode().split() == [str(device.home)] * 2
    for name in ("mess_compile", "torch", "onnx", "click"):
        assert f"No module named '{name}'" in remote.run(("python3", "-c", f"import {name}")).errors


def test_output_errors_and_exit_code_arrive_separately(remote: Remote) -> None:
    done = remote.run(("sh", "-c", "cat; echo no >&2; exit 3"), given=bytes(range(256)) * 1000)
    assert (done.code, done.output, done.errors) == (3, bytes(range(256)) * 1000, "no\n")


@settings(max_examples=15, deadline=None)
@given(arguments=st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), min_size=1))
@example(arguments=["a b", "'", '"', "$HOME", "`id`", "\n", "\\n", "*", "", "-n", "~", "!x", "a=b", "#", "ü\U0001f600"])
def test_arguments_arrive_as_they_are(lasting: Remote, arguments: list[str]) -> None:
    command = ("python3", "-c", "import os, sys; print(ascii(sys.argv[1:]))", *arguments)
    assert lasting.run(command).output.decode() == ascii(arguments) + "\n"


def test_a_killed_program_or_exit_code_255_is_not_a_lost_connection(remote: Remote) -> None:
    assert remote.run(("sh", "-c", "kill -9 $$")).code == 137
    assert remote.run(("sh", "-c", "exit 255")).code == 255
    with pytest.raises(RemoteError, match=r"`sh` ended with code 255: no such option$"):
        list(remote.lines(("sh", "-c", "echo no such option >&2; exit 255")))
    with pytest.raises(RemoteError, match="`sh` was killed: has the device enough memory"):
        list(remote.lines(("sh", "-c", "kill -9 $PPID")))


def test_a_program_that_does_not_end_is_given_up_with_one_line(remote: Remote) -> None:
    with pytest.raises(RemoteError, match=r"`sleep` has not ended within 0.5 s") as caught:
        remote.run(("sleep", "30"), patience_s=0.5)
    assert not caught.value.lost
    assert remote.run(("true",)).code == 0


def test_the_first_line_comes_before_the_program_ends(device: Device, remote: Remote) -> None:
    lines = remote.lines(("sh", "-c", "echo first; until [ -e seen ]; do sleep 0.1; done; printf 'one\\n\\nlast'"))
    assert next(lines) == "first"
    (device.home / "seen").touch()
    assert list(lines) == ["one", "", "last"]


def test_a_failed_program_is_named_with_its_last_output(remote: Remote) -> None:
    lines = remote.lines(("python3", "-c", "print('a', flush=True); raise ValueError('bad graph')"))
    assert next(lines) == "a"
    with pytest.raises(RemoteError, match=r"`python3` ended with code 1: ValueError: bad graph$"):
        next(lines)


def test_a_missing_python_is_named(device: Device, remote: Remote) -> None:
    device.use_python(None)
    with pytest.raises(RemoteError, match=r"`python3` cannot be started .*not found.*: install it there"):
        list(remote.lines(("python3", "-c", "pass")))
    device.use_python(device.bare_python)
    with pytest.raises(RemoteError, match="No module named 'numpy'"):
        list(remote.lines(("python3", "-c", "import numpy")))


def test_a_program_that_the_system_killed_has_its_own_message(remote: Remote) -> None:
    with pytest.raises(RemoteError, match="`sh` was killed by signal 9: has the device enough memory") as caught:
        list(remote.lines(("sh", "-c", "kill -9 $$")))
    assert not caught.value.lost


def test_the_program_and_its_children_stop_when_nobody_reads(remote: Remote) -> None:
    lines = remote.lines(("sh", "-c", "sleep 600 & echo $!; echo $$; yes"))
    child, program = int(next(lines)), int(next(lines))
    lines.close()  # type: ignore[attr-defined]
    assert ended(child)
    assert ended(program)
    assert remote.run(("true",)).code == 0


def test_the_program_stops_when_this_process_is_killed(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from mess_compile.device.remote import Remote, parse_host\n"
        f"remote = Remote(parse_host({device.host!r}), {device.ssh_options!r})\n"
        f"for line in remote.lines({SLEEPER!r}): print(line, flush=True)"
    )
    with tempfile.TemporaryDirectory() as left:
        monkeypatch.setenv("TMPDIR", left)
        _killed(code)


def _killed(code: str) -> None:
    ours = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert ours.stdout
    program = int(ours.stdout.readline())
    children = [int(word) for word in Path(f"/proc/{ours.pid}/task/{ours.pid}/children").read_text().split()]
    ours.kill()
    ours.wait()
    ours.stdout.close()
    assert ended(program)
    assert len(children) == 2
    assert all(ended(child) for child in children)


def test_a_cut_connection_is_reported_as_lost_and_opened_again(device: Device, remote: Remote) -> None:
    lines = remote.lines(SLEEPER)
    program = int(next(lines))
    device.cut()
    with pytest.raises(RemoteError, match=r"the connection was lost .*: run the command again") as caught:
        next(lines)
    assert caught.value.lost
    assert ended(program)
    assert remote.run(("echo", "again")).output == b"again\n"


def test_a_program_left_running_by_a_frozen_connection_is_stopped_before_the_next(device: Device) -> None:
    options = (*device.ssh_options, "-o", "ServerAliveInterval=1")
    with Remote(parse_host(device.host), options) as remote:
        lines = remote.lines(SLEEPER, pid_file=".cache/it's a/running")
        program = int(next(lines))
        device.freeze()
        with pytest.raises(RemoteError, match="lost") as caught:
            next(lines)
        assert caught.value.lost
        assert alive(program)
        assert list(remote.lines(("echo", "new"), pid_file=".cache/it's a/running")) == ["new"]
        assert not alive(program)


def test_a_process_of_another_program_in_the_pid_file_is_left_alone(device: Device, remote: Remote) -> None:
    bystander = subprocess.Popen(["sleep", "600"])
    for left in (str(bystander.pid), "-1", "nonsense $(touch x)", "0"):
        (device.home / "running").write_text(left)
        assert list(remote.lines(("echo", "new"), pid_file="running")) == ["new"]
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_only_missing_files_are_sent(device: Device, remote: Remote, tmp_path: Path) -> None:
    files = made(tmp_path / "files", [*range(300), 20 * MB])
    told: list[tuple[int, int]] = []
    total = 20 * MB + 299 * 300 // 2
    assert remote.push(files, "a folder/graphs", lambda *bytes: told.append(bytes)) == PushResult(total, 301, 0)
    assert told[-1] == (total, total)
    assert told == sorted(told)
    there = device.home / "a folder" / "graphs"
    assert sorted(os.listdir(there)) == sorted(files)
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in there.iterdir())
    told.clear()
    assert remote.push(files, "a folder/graphs", lambda *bytes: told.append(bytes)) == PushResult(0, 0, 301)
    assert not told
    changed = dict(list(files.items())[1:]) | made(tmp_path / "changed", [7777])
    assert remote.push(changed, "a folder/graphs", quiet) == PushResult(7777, 1, 300)


def test_a_push_without_files_creates_the_folder(device: Device, remote: Remote) -> None:
    assert remote.push({}, "-folder", quiet) == PushResult(0, 0, 0)
    assert (device.home / "-folder").is_dir()


def test_a_broken_push_is_continued(device: Device, remote: Remote, tmp_path: Path) -> None:
    files = made(tmp_path / "files", [MB + index for index in range(30)])

    def cut(sent_bytes: int, of_bytes: int) -> None:
        if sent_bytes > 20 * MB:
            device.cut()

    with pytest.raises(RemoteError) as caught:
        remote.push(files, "graphs", cut)
    assert caught.value.lost
    half = [path for path in (device.home / "graphs").glob("[!i]*") if path.stat().st_size < MB]
    assert not half
    again = remote.push(files, "graphs", quiet)
    assert again.present >= 10, "at least what was not under way is not sent again"
    assert again.present + again.sent == 30
    assert again.sent_bytes == sum(path.stat().st_size for path in files.values()) - sum(
        path.stat().st_size for path in list(files.values())[: again.present]
    )
    assert sorted(path.name for path in (device.home / "graphs").glob("[!i]*")) == sorted(files)


def test_complete_files_of_a_push_survive_a_reboot(device: Device, remote: Remote, some: dict[str, Path]) -> None:
    whole, half, _ = some
    left = device.home / "graphs" / "incoming-999999999"
    left.mkdir(parents=True)
    (left / whole).write_bytes(some[whole].read_bytes())
    (left / half).write_bytes(some[half].read_bytes()[:1000])
    assert remote.push(some, "graphs", quiet) == PushResult(400_000, 2, 1)
    assert sorted(os.listdir(device.home / "graphs")) == sorted(some)


def test_a_file_that_was_damaged_there_is_sent_again(device: Device, remote: Remote, some: dict[str, Path]) -> None:
    remote.push(some, "graphs", quiet)
    damaged = device.home / "graphs" / next(iter(some))
    damaged.write_bytes(b"x" * 200_000)
    assert remote.push(some, "graphs", quiet) == PushResult(200_000, 1, 2)
    assert hashlib.sha256(damaged.read_bytes()).hexdigest() == damaged.name


def test_a_file_that_changes_during_a_push_is_named_and_not_stored(
    device: Device, remote: Remote, some: dict[str, Path]
) -> None:
    first = next(iter(some.values()))
    first.write_bytes(b"y" * 200_000)
    with pytest.raises(InputError, match=f"{first} has changed since"):
        remote.push(some, "graphs", quiet)
    assert len(os.listdir(device.home / "graphs")) == 2
    first.unlink()
    with pytest.raises(InputError, match=f"{first} cannot be read"):
        remote.push(some, "graphs", quiet)


def test_a_full_disk_is_reported_and_complete_files_stay(device: Device, remote: Remote, tmp_path: Path) -> None:
    if device.small is None:
        pytest.skip("a small file system takes the right to mount one")
    files = made(tmp_path / "files", [300_000, 300_000, 3 * MB])
    folder = f"{device.small}/graphs"
    with pytest.raises(RemoteError, match=f"has no space left for folder {folder}: make room there"):
        remote.push(files, folder, quiet)
    assert remote.run(("ls", folder)).output.decode().split() == sorted(list(files)[:2])


def test_writes_that_fail_there_are_named(device: Device, remote: Remote, tmp_path: Path) -> None:
    files = made(tmp_path / "files", [1000, 2 * MB])
    device.limit_file_bytes(MB)
    with pytest.raises(RemoteError, match="has no space left for folder graphs"):  # tar tells the two not apart
        remote.push(files, "graphs", quiet)
    with pytest.raises(RemoteError, match=r"`dd` ended with code 1: .*File too large"):
        list(remote.lines(("dd", "if=/dev/zero", "of=table", "bs=2M", "count=2", "status=none")))
    device.limit_file_bytes(None)
    assert remote.push(files, "graphs", quiet) == PushResult(2 * MB, 1, 1)
    with pytest.raises(RemoteError, match=f"folder {device.home}/graphs/{next(iter(files))}.*(Not a dir|File exists)"):
        remote.push(files, f"{device.home}/graphs/{next(iter(files))}", quiet)


def test_a_file_is_pulled_completely_or_not_at_all(device: Device, remote: Remote, tmp_path: Path) -> None:
    content = bytes(range(256)) * 50_000
    (device.home / "it's a table").write_bytes(content)
    target = tmp_path / "back" / "table"
    remote.pull("it's a table", target)
    assert target.read_bytes() == content
    assert remote.read("it's a table") == content
    with pytest.raises(RemoteError, match=r"has no file nothing$"):
        remote.pull("nothing", target)
    (device.home / "folder").mkdir()
    with pytest.raises(RemoteError, match=r"reading folder ended with code 1: .*Is a directory"):
        remote.read("folder")
    assert remote.read("nothing") is None
    assert target.read_bytes() == content
    assert os.listdir(target.parent) == ["table"]


def test_a_broken_pull_leaves_the_old_file(device: Device, remote: Remote, tmp_path: Path) -> None:
    pipe, target = device.home / "table", tmp_path / "table"
    os.mkfifo(pipe)
    target.write_text("old")

    def cut() -> None:
        with pipe.open("wb"):  # as soon as it is read there
            device.cut()

    cutter = threading.Thread(target=cut)
    cutter.start()
    with pytest.raises(RemoteError) as caught:
        remote.pull("table", target)
    cutter.join()
    assert caught.value.lost
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["table"]


@pytest.mark.parametrize("checking", ["yes", "ask"])
def test_the_user_has_to_accept_an_unknown_host_key(device: Device, checking: str) -> None:
    message = refusal(device, *device.options(known="known_nothing", checking=checking))
    login = device.host.removeprefix("ssh://").rpartition(":")[0]
    assert f"Host key verification failed: run `ssh -p {device.port} {login}` once" in message


def test_a_changed_host_key_is_named_with_its_line(device: Device) -> None:
    message = refusal(device, *device.options(known="known_wrongly"))
    assert f"({device.folder}/known_wrongly:1)" in message
    assert message.endswith(f"`ssh-keygen -R '[127.0.0.1]:{device.port}'`")


def test_a_wrong_key_asks_for_no_password(device: Device) -> None:
    message = refusal(device, *device.options(key="wrong_key"))
    assert "Permission denied (publickey): check that `ssh -p" in message
    assert "property of nobody" not in message


def test_a_device_that_is_down_and_comes_back(device: Device, remote: Remote) -> None:
    device.stop()
    assert "Connection refused: is the device up" in refusal(device, *device.ssh_options)
    with pytest.raises(RemoteError):
        remote.run(("true",))
    device.start()
    assert remote.run(("true",)).code == 0


def test_an_unknown_host_name(device: Device) -> None:
    message = refusal(device, *device.ssh_options, host="ssh://nosuch.invalid")
    assert "Could not resolve hostname nosuch.invalid" in message
    assert message.endswith("check the name, or add it to ~/.ssh/config")


def test_a_port_without_a_server(device: Device) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        host = f"ssh://127.0.0.1:{silent.getsockname()[1]}"
        message = refusal(device, *device.ssh_options, "-o", "ConnectTimeout=1", host=host)
    assert "timed out" in message
    assert message.endswith("is the device switched on, and on this network?")


@pytest.mark.parametrize("greeting", ["Welcome!\n", "no line end", "x" * 200_000])
def test_the_start_messages_of_a_shell_are_in_no_result(
    device: Device, remote: Remote, some: dict[str, Path], tmp_path: Path, greeting: str
) -> None:
    device.greet(greeting)
    assert remote.run(("cat",), b"given").output == b"given"
    assert list(remote.lines(("echo", "line"))) == ["line"]
    assert remote.push(some, "files", quiet).sent == len(some)
    for name, path in some.items():
        remote.pull(f"files/{name}", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == path.read_bytes() == remote.read(f"files/{name}")


def test_a_missing_ssh(device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RemoteError, match="ssh is not installed here: run `apt-get install openssh-client`"):
        Remote(parse_host(device.host)).run(("true",))


def test_commands_use_the_ssh_on_path(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{device.path_folder()}:{os.environ['PATH']}")
    with Remote(parse_host(device.host)) as remote:
        assert remote.run(("pwd",)).output.decode().strip() == str(device.home)


def test_temporary_files_are_removed_and_a_long_temporary_path_works(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for place in (tmp_path / ("long" * 20), Path("/tmp") / f"t{os.getpid()}"):
        place.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        with Remote(parse_host(device.host), device.ssh_options) as remote:
            assert remote.run(("true",)).code == 0
        assert not list(place.iterdir())
        place.rmdir()


def test_an_interrupted_push_keeps_the_files_that_arrived(device: Device, remote: Remote, tmp_path: Path) -> None:
    files = made(tmp_path / "files", [MB + index for index in range(20)])

    def stop(sent_bytes: int, of_bytes: int) -> None:
        if sent_bytes > 10 * MB:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        remote.push(files, "graphs", stop)
    assert remote.push(files, "graphs", quiet).present >= 9
