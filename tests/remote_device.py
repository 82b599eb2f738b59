"""A device for tests: a real sshd on loopback, whose users find another HOME, other tools and another Python.

Use `remote_device(folder)` in a fixture of wide scope, and `device.restore()` before each test.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PACKAGES = ("numpy", "numpy.libs", "onnxruntime", "flatbuffers", "google", "packaging")
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
ENTRY = """#!/bin/sh
cat {folder}/greeting
trap '' XFSZ
ulimit -f $(cat {folder}/blocks)
cd {home} || exit 1
shell=$(cat {folder}/shell)
exec env -i HOME={home} PATH="$(cat {folder}/path)" LANG=C.UTF-8 SHELL="$shell" "$shell" -c "$SSH_ORIGINAL_COMMAND"
"""
# SHLVL: a login shell that is bash would read the ~/.bashrc of whoever runs the tests in every session.
DAEMON = """Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized
PidFile {folder}/sshd.pid
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PrintMotd no
SetEnv SHLVL=1
Banner {folder}/banner
ForceCommand {folder}/entry
"""
SESSIONS = 10
"""That sshd allows on a connection, unless it is told otherwise."""
CLIENT = """Host *
IdentityFile {key}
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {known}
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking {checking}
HashKnownHosts no
"""


@dataclass
class Device:
    """`host` is what a user writes after --host; `home` is the HOME of its programs, seen from here.

    `python` has numpy and onnxruntime, `bare_python` neither; nothing else of ours can be imported there. `small` is a
    folder there on a file system of 1 MB, or None where such a thing cannot be made.
    """

    folder: Path
    port: int
    small: str | None
    _daemon: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _frozen: list[int] = field(default_factory=list, repr=False)
    _sessions: int = field(default=SESSIONS, repr=False)

    @property
    def host(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def python(self) -> Path:
        return self.folder / "full" / "bin" / "python3"

    @property
    def bare_python(self) -> Path:
        return self.folder / "bare" / "bin" / "python3"

    @property
    def ssh_options(self) -> tuple[str, ...]:
        """Arguments for ssh by which this user gets in."""
        return self.options()

    def options(self, key: str = "key", known: str = "known", checking: str = "yes") -> tuple[str, ...]:
        """Other arguments: `key` may be "wrong_key"; `known` "known_nothing" or "known_wrongly"."""
        config = self.folder / f"config-{key}-{known}-{checking}"
        config.write_text(CLIENT.format(key=self.folder / key, known=self.folder / known, checking=checking))
        return ("-F", str(config))

    def path_folder(self, options: Sequence[str] | None = None) -> Path:
        """A folder to put first on PATH: its `ssh` is the system's, with the options of this device."""
        place = self.folder / "ssh-on-path"
        place.mkdir(exist_ok=True)
        words = " ".join(f"'{option}'" for option in (options or self.ssh_options))
        (place / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh", path=_path_without(place))} {words} "$@"\n')
        (place / "ssh").chmod(0o755)
        return place

    def use_python(self, python: Path | None) -> None:
        """What `python3` is there, from the next command on; None: there is none."""
        places = [self.folder / "tools"] if python is None else [python.parent, self.folder / "tools"]
        (self.folder / "path").write_text(":".join(map(str, places)))

    def wrapped_python(self, name: str, script: str | None = None) -> str:
        """What a user writes after --python for one below the home folder there; a full one, unless `script` says."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        full = f'exec {self.python} "$@"'
        path.write_text(f"#!/bin/sh\n{script or full}\n")
        path.chmod(0o755)
        return f"~/{name}"

    def greet(self, text: str) -> None:
        """What its shell prints before every command, as a ~/.bashrc may."""
        (self.folder / "greeting").write_text(text)

    def log_in_by(self, shell: str) -> None:
        """Which login shell the user has, from the next command on; its start files are in the home folder."""
        (self.folder / "shell").write_text(shell)

    def allow_sessions(self, most: int) -> None:
        """How many programs may run over one connection, from the next connection on."""
        if most == self._sessions:
            return
        config = self.folder / "sshd_config"
        lines = [line for line in config.read_text().splitlines() if not line.startswith("MaxSessions ")]
        self.stop()
        config.write_text("\n".join([*lines, f"MaxSessions {most}", ""]))
        self.start()
        self._sessions = most

    def limit_file_bytes(self, limit: int | None) -> None:
        """Programs there can write no longer files, from the next command on; a write beyond fails."""
        (self.folder / "blocks").write_text("unlimited" if limit is None else str(limit // 512))

    def cut(self) -> None:
        """Every connection ends at once; programs there live on, and see the end of their input."""
        for process in self._connections():
            _signal(process, signal.SIGKILL)

    def freeze(self) -> None:
        """Every connection falls silent without an end, as behind a switch that was turned off."""
        self._frozen = self._connections()
        for process in self._frozen:
            _signal(process, signal.SIGSTOP)

    def thaw(self) -> None:
        for process in self._frozen:
            _signal(process, signal.SIGCONT)
        self._frozen = []

    def stop(self) -> None:
        """Down, as a device that reboots."""
        self.thaw()
        self.cut()
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait()
        self._daemon = None

    def start(self) -> None:
        if self._daemon is None:
            self._daemon = _start(self.folder, self.port, self.small)

    def restore(self) -> None:
        """Up, empty and whole again."""
        self.thaw()
        self.cut()
        self.greet("")
        self.log_in_by("/bin/sh")
        self.allow_sessions(SESSIONS)
        self.limit_file_bytes(None)
        self.use_python(self.python)
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        self.start()

    def _connections(self) -> list[int]:
        """The processes of sshd that serve connections: below the daemon, and named like it."""
        if self._daemon is None:
            return []
        found, parents = [], [self._daemon.pid]
        while parents:
            parents = [child for parent in parents for child in _children(parent) if _name(child).startswith("sshd")]
            found += parents
        return found


@contextmanager
def remote_device(folder: Path) -> Iterator[Device]:
    """A running device whose files are in `folder`; skips the test where there is no sshd."""
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("no sshd: apt-get install --no-install-recommends openssh-server openssh-client")
    folder.chmod(0o755)
    device = Device(folder, _free_port(), _small_folder(folder))
    _write_keys(device)
    _write_daemon(device)
    _write_tools(folder / "tools")
    _write_python(folder / "full", PACKAGES)
    _write_python(folder / "bare", ())
    try:
        device.restore()
        _skip_where_login_is_refused(device)
        yield device
    finally:
        device.stop()


def _write_keys(device: Device) -> None:
    folder = device.folder
    for name in ("key", "wrong_key", "host_key", "other_host_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    shutil.copy(folder / "key.pub", folder / "authorized")
    for known, key in (("known", "host_key"), ("known_wrongly", "other_host_key")):
        (folder / known).write_text(f"[127.0.0.1]:{device.port} {(folder / f'{key}.pub').read_text()}")
    (folder / "known_nothing").write_text("")


def _write_daemon(device: Device) -> None:
    folder = device.folder
    (folder / "entry").write_text(ENTRY.format(folder=folder, home=device.home))
    (folder / "entry").chmod(0o755)
    (folder / "banner").write_text("This device is the property of nobody.\n")
    config = folder / "sshd_config"
    config.write_text(DAEMON.format(folder=folder, port=device.port) + "PerSourcePenalties no\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where Debian's sshd gives up its privileges
    if subprocess.run([str(SSHD), "-t", "-f", str(config)], capture_output=True).returncode:
        config.write_text(DAEMON.format(folder=folder, port=device.port))  # before OpenSSH 9.8 there are no penalties
    subprocess.run([str(SSHD), "-t", "-f", str(config)], check=True)


def _write_tools(tools: Path) -> None:
    """All programs of the system but Python, so that tests choose which Python there is."""
    tools.mkdir()
    for place in ("/usr/bin", "/bin"):
        for name in os.listdir(place):
            if "python" not in name and not (tools / name).is_symlink():
                (tools / name).symlink_to(f"{place}/{name}")


def _write_python(folder: Path, packages: Sequence[str]) -> None:
    """A virtual environment that has `packages` of ours and nothing else."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    for name in packages:
        for source in (Path(path) / name for path in sys.path if path.endswith("site-packages")):
            if source.exists() and not (site / name).is_symlink():
                (site / name).symlink_to(source)


def _small_folder(folder: Path) -> str | None:
    (folder / "small").mkdir()
    return str(folder / "small") if subprocess.run(_small(folder), capture_output=True).returncode == 0 else None


def _small(folder: Path, *command: str) -> list[str]:
    """Run a command that sees a file system of 1 MB in `folder/small`; nobody else sees it."""
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1" && shift && exec "$@"'
    return ["unshare", "-m", "sh", "-c", mount, "sh", str(folder / "small"), *(command or ("true",))]


def _start(folder: Path, port: int, small: str | None) -> subprocess.Popen[bytes]:
    command = [str(SSHD), "-D", "-E", str(folder / "sshd.log"), "-f", str(folder / "sshd_config")]
    daemon = subprocess.Popen(command if small is None else _small(folder, *command), start_new_session=True)
    until = time.monotonic() + 20
    while time.monotonic() < until and daemon.poll() is None:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return daemon
        time.sleep(0.02)
    daemon.kill()
    raise AssertionError(f"sshd does not start: {(folder / 'sshd.log').read_text()}")


def _skip_where_login_is_refused(device: Device) -> None:
    command = ["ssh", *device.ssh_options, "-p", str(device.port), "-o", "BatchMode=yes", "127.0.0.1", "true"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    log = (device.folder / "sshd.log").read_text()
    if done.returncode and "locked" in log:
        pytest.skip(f"sshd lets this account not in, for it is locked: {log.splitlines()[-1]}")
    assert not done.returncode, (done.stderr, log)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _path_without(folder: Path) -> str:
    return ":".join(place for place in os.environ["PATH"].split(":") if place != str(folder))


def _signal(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def _name(process: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process}/comm").read_text().strip()
    return ""


def _children(process: int) -> list[int]:
    with suppress(OSError):
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []
