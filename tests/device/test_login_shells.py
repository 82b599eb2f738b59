"""Programs on a device find their modules, and no others, with any login shell, start files and session limits."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mess_compile.device.client import PythonSession
from mess_compile.device.remote import Remote, RemoteError, parse_host
from tests import small_network
from tests.remote_device import Device, remote_device

slow = pytest.mark.slow
START_FILES = {
    "bash": "",
    "dash": "",
    "zsh": ".zshenv",
    "fish": ".config/fish/config.fish",
    "tcsh": ".tcshrc",
}
"""Start files that a shell reads for a program over SSH; whether bash reads its own depends on its input."""
EXPORT = {"tcsh": "setenv PYTHONPATH {}", "fish": "set -gx PYTHONPATH {}"}
ODD = ("a b", "'", '"', "$HOME", "`id`", "\n", "\\n", "\\", "*", "", "-n", "~", "!x", "a=b", "#", "\\'", "ü", "%", "^")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with remote_device(tmp_path_factory.mktemp("device")) as device:
        yield device


@pytest.fixture
def device(running: Device) -> Device:
    running.restore()
    return running


def quiet(*told: object) -> None:
    pass


def made(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    content = bytes(range(256)) * 100
    name = hashlib.sha256(content).hexdigest()
    (folder / name).write_bytes(content)
    return {name: folder / name}


def greeted(remote: Remote) -> str:
    """The engine library that our program finds on the device."""
    frame = np.zeros((*small_network.HW, 3), np.uint8)
    session = PythonSession(remote, "onnxruntime", frame, small_network.thresholds(), quiet)
    return session.greet().library


def path_in_start_file(device: Device, shell: str) -> None:
    """Have numpy only on PYTHONPATH; its empty entry is the current folder. The file also prints a line."""
    (site,) = device.python.parents[1].glob("lib/python3*/site-packages")
    file = device.home / START_FILES[shell]
    file.parent.mkdir(parents=True, exist_ok=True)
    export = EXPORT.get(shell, "export PYTHONPATH={}").format(f":{site}")
    file.write_text(f"echo hello from {shell}\n{export}\n")
    device.use_python(device.bare_python)


def shadow(home: Path) -> None:
    for name in ("json", "numpy", "typing", "dataclasses", "tempfile", "mess_compile/__init__"):
        (home / f"{name}.py").parent.mkdir(exist_ok=True)
        (home / f"{name}.py").write_text("raise SystemExit('shadowed')")


@pytest.mark.parametrize("shell", ["tcsh", *(pytest.param(name, marks=slow) for name in START_FILES if name != "tcsh")])
def test_every_login_shell_works(device: Device, shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}: apt-get install --no-install-recommends {shell}")
    device.log_in_by(str(shutil.which(shell)))
    shadow(device.home)
    if START_FILES[shell]:
        path_in_start_file(device, shell)
    with Remote(parse_host(device.host), device.ssh_options) as remote:
        arguments = remote.run(("python3", "-c", "import sys; print(ascii(sys.argv[1:]))", *ODD))
        assert arguments.output.decode() == ascii([*ODD]) + "\n"
        files = made(tmp_path / "files")
        assert remote.push(files, "a folder/it's", quiet).sent == 1
        for name, path in files.items():
            remote.pull(f"a folder/it's/{name}", tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == path.read_bytes()
        assert greeted(remote) == "onnxruntime"


@pytest.mark.parametrize("most", [1, pytest.param(2, marks=slow)])
def test_a_server_that_allows_few_sessions_takes_programs_and_files_at_once(
    device: Device, most: int, tmp_path: Path
) -> None:
    device.allow_sessions(most)
    with Remote(parse_host(device.host), device.ssh_options) as remote:
        said = remote.lines(("sh", "-c", "echo first; until [ -e seen ]; do sleep 0.05; done; echo last"))
        assert next(said) == "first"
        assert remote.push(made(tmp_path / "files"), "files", quiet).sent == 1
        assert remote.run(("touch", "seen")).code == 0
        assert list(said) == ["last"]
        assert greeted(remote) == "onnxruntime"
        with pytest.raises(RemoteError, match=r"`sh` ended with code 255: bad$"):
            list(remote.lines(("sh", "-c", "echo bad >&2; exit 255")))


def test_a_server_that_allows_no_session_is_named(device: Device) -> None:
    device.allow_sessions(0)
    with pytest.raises(RemoteError, match="MaxSessions"), Remote(parse_host(device.host), device.ssh_options):
        pass


@slow
def test_a_program_with_its_own_connection_stops_when_the_connection_closes(device: Device) -> None:
    device.allow_sessions(1)
    with Remote(parse_host(device.host), device.ssh_options) as remote:
        said = remote.lines(("sh", "-c", "echo $$; exec sleep 600"))
        program = int(next(said))
    with pytest.raises(RemoteError, match="lost"):
        next(said)
    with Remote(parse_host(device.host), device.ssh_options) as remote:
        gone = f"n=0; while kill -0 {program} 2>/dev/null && [ $n -lt 100 ]; do n=$((n + 1)); sleep 0.1; done; echo $n"
        assert int(remote.run(("sh", "-c", gone)).output) < 100


def test_an_account_without_a_shell_is_named(device: Device, tmp_path: Path) -> None:
    (tmp_path / "nologin").write_text("#!/bin/sh\necho This account is currently not available.\nexit 1\n")
    (tmp_path / "nologin").chmod(0o755)
    device.log_in_by(str(tmp_path / "nologin"))
    words = r"its login shell does not start `sh` \(This account is currently not available\): give .*`chsh -s /bin/sh`"
    with pytest.raises(RemoteError, match=words), Remote(parse_host(device.host), device.ssh_options):
        pass
