"""The system's ssh with the user's configuration: one connection to a device stays open, and programs share it.

The login shell may be any (bash, dash, zsh, fish, tcsh). It gets one plain line, which starts `sh`; the script for `sh`
comes over standard input, ahead of the program's own. What the shell prints at its start is skipped."""

from __future__ import annotations

import ipaddress
import os
import re
import select
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mess_compile.runtime.base.errors import InputError, MessError, one_line

CONNECT_S = 60.0
"""Timeout of connecting, long enough for an agent that asks its user for a touch. The network's share is 10 s."""
_SETTINGS = (
    *("BatchMode=yes", "LogLevel=ERROR", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3"),
    *("ControlPersist=no", "RequestTTY=no", "RemoteCommand=none", "PermitLocalCommand=no", "ClearAllForwardings=yes"),
    *("ForwardAgent=no", "ForwardX11=no"),
)
_READY = b"mess-compile is connected\n"
"""Printed by each script when it begins: what comes before it is from the login shell."""
_ENDED = "mess-compile: ended with 255"
"""Printed by a script that ends with code 255, which otherwise means that ssh itself failed."""
_START = "exec sh -c 'eval \"$(dd bs=1 count={} 2>/dev/null)\"'"
"""The line for the login shell. `dd` reads exactly that many bytes of standard input; a shell would read ahead."""
_MARK_255 = f"""trap '[ $? != 255 ] || echo "{_ENDED}" >&2' 0
"""
_WAIT = "exec cat >/dev/null"
_CUT = re.compile("onnection (closed|reset)|closed by remote host|client_loop|Timeout, server|packet_write|Broken pipe")
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_HOST = re.compile(
    rf"(?P<scheme>ssh://)?(?P<user>{_NAME}@)?"
    rf"(?:(?P<name>{_NAME})|\[(?P<six>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?)\])(?::(?P<port>[0-9]{{1,5}}))?"
)
PYTHON = "python3"
KILLED = -1
"""The code of a script that was killed by a signal which ssh does not report."""
_MOST_NOISE = 1 << 16
_PYTHON = re.compile(r"[A-Za-z0-9_./~][^=\x00-\x1f\x7f]*")
"""Not an option, and not a variable for `env`; it is quoted for the shell."""
_REMEDIES = (
    ("Host key verification failed", "run `{login}` once and accept its host key"),
    ("Permission denied|Too many authentication", "check that `{login}` works without a password (`ssh-copy-id`)"),
    ("Could not resolve hostname", "check the name, or add it to ~/.ssh/config"),
    ("Connection refused", "is the device up, and does its ssh server listen on this port?"),
    ("timed out|No route to host|unreachable", "is the device switched on, and on this network?"),
    (
        "kex_exchange|onnection (closed|reset)|closed by remote host",
        "its ssh server takes no more connections now (MaxStartups, penalties for failed logins): wait and try again",
    ),
    ("ession open refused|open failed", "its ssh server lets nobody run programs (MaxSessions 0): allow at least 1"),
)


class RemoteError(MessError):
    """A device cannot be reached, or cannot do what was requested; `lost` is whether an open connection was cut."""

    def __init__(self, message: str, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


@dataclass(frozen=True)
class Host:
    """`text` is as the user wrote it; `destination` and `port` are for ssh, None where its configuration decides.

    `python` starts Python 3.8 or newer on the device, with numpy and an engine library.
    """

    text: str
    destination: str
    port: int | None
    python: str = PYTHON

    @property
    def login(self) -> str:
        """The command with which a user connects."""
        return f"ssh {self.destination}" if self.port is None else f"ssh -p {self.port} {self.destination}"


def parse_host(text: str, python: str = PYTHON) -> Host:
    """From ssh://user@host[:port], user@host or a name of ~/.ssh/config; an IPv6 address stands in brackets. `python`
    is a name on PATH or a path on the device, ~/ being the home folder there.

    Raises InputError for anything else: options, a path, a password (which the message does not repeat).
    """
    if ":" in text.removeprefix("ssh://").rpartition("@")[0]:
        raise InputError(
            "the host contains a password, which is not supported: write ssh://user@host, and run `ssh-copy-id`"
        )
    match = _HOST.fullmatch(text)
    port = int(match["port"]) if match and match["port"] else None
    usable = match and (port is None or (match["scheme"] and 0 < port < 1 << 16)) and _is_ipv6(match["six"])
    if not match or not usable:
        raise InputError(f"host {text[:80]!r}: write ssh://user@host, ssh://user@host:port or a name of ~/.ssh/config")
    if _PYTHON.fullmatch(python) is None:
        raise InputError(f"--python {python[:80]!r}: write the path of a Python there, such as /opt/venv/bin/python3")
    return Host(text, (match["user"] or "") + (match["name"] or match["six"]), port, re.sub("^~/", "./", python))


def _is_ipv6(text: str | None) -> bool:
    with suppress(ValueError):
        return text is None or bool(ipaddress.IPv6Address(text))
    return False


class Connection:
    """A connection, for one thread: opened when it is first needed, and again after it was lost.

    Keys, agent, jump hosts and host keys are those of the user's ssh; `options` are further arguments for it. Where the
    server allows no further session on the connection (MaxSessions), ssh opens another connection for a program.
    """

    def __init__(self, host: Host, options: Sequence[str] = ()) -> None:
        self.host = host
        self._options = tuple(options)
        self._folder: str | None = None
        self._master: subprocess.Popen[bytes] | None = None
        self._errors = ""
        self._clients: set[subprocess.Popen[bytes]] = set()

    def open(self) -> None:
        """Open a session that ends with this process: its program reads standard input, which we never write.

        Raises RemoteError with the error of ssh and the remedy.
        """
        if self._master is not None and self._master.poll() is None:
            return
        self.close()
        try:
            self._folder = _private_folder()
            script = _script(_WAIT, ())
            with (Path(self._folder) / "errors").open("wb") as errors:
                command = self._command("-M", "--", self.host.destination, _START.format(len(script)))
                self._master = _start(command, subprocess.PIPE, subprocess.PIPE, errors)
            _write_input(self._master, script)
            self._await_up(self._master)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for client in tuple(self._clients):
            client.terminate()  # it may have its own connection
        if self._master is not None:
            self._master.terminate()
            _end(self._master, 2.0)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._master = self._folder = None

    @contextmanager
    def client(
        self, script: str, arguments: Sequence[str], output: int | IO[bytes], errors: int | IO[bytes]
    ) -> Iterator[subprocess.Popen[bytes]]:
        """The ssh process of a shell script that runs on the device. Read its output with `began` or `after_start`."""
        self.open()
        text = _script(script, arguments)
        command = self._command("-o", "ControlMaster=no", "--", self.host.destination, _START.format(len(text)))
        client = _start(command, subprocess.PIPE, output, errors)
        self._clients.add(client)
        try:
            _write_input(client, text)
            yield client
        finally:
            self._clients.discard(client)
            _end(client, 0.0)

    def ended(self, client: subprocess.Popen[bytes], began: bool, errors: str) -> tuple[int, str]:
        """The code of a script whose ssh has ended, KILLED after a signal, and its own part of `errors`.

        Raises RemoteError when the connection was lost, or when the script never `began`.
        """
        code = client.wait()
        by_ssh = code == 255 and _ENDED not in errors
        if (by_ssh or code < 0) and not (self._socket() in str(client.args) and self._is_up()):
            raise self._lost(self._errors)
        if by_ssh and began and _CUT.search(errors):
            raise self._lost(errors)
        if not began:
            raise _refusal(self.host, errors, "", code)
        own = "".join(line for line in errors.splitlines(keepends=True) if line.strip() != _ENDED)
        return KILLED if by_ssh else code, own

    def _lost(self, errors: str) -> RemoteError:
        reason = last_line(errors) or "ssh was ended"
        return RemoteError(f"{self.host.text}: the connection was lost ({reason}): run the command again", lost=True)

    def _is_up(self) -> bool:
        """Ask ssh whether the connection is up: its code for a lost one is 255, but a program may end with 255, too."""
        if _start(self._command("-O", "check", "--", self.host.destination)).wait() == 0:
            return True
        if self._master is not None:
            _end(self._master, 2.0)
        self._read_errors()
        return False

    def _read_errors(self) -> None:
        """Keep the errors of ssh, since their folder is removed."""
        assert self._folder
        self._errors = (Path(self._folder) / "errors").read_text(errors="replace")

    def _command(self, *arguments: str) -> list[str]:
        assert self._folder
        settings = [part for setting in _SETTINGS for part in ("-o", setting)]
        port = [] if self.host.port is None else ["-p", str(self.host.port)]
        return ["ssh", *self._options, *settings, "-S", self._socket(), *port, *arguments]

    def _socket(self) -> str:
        """A new one for each connection: programs over an earlier connection ended with it."""
        return f"{self._folder}/s".replace("%", "%%")

    def _await_up(self, master: subprocess.Popen[bytes]) -> None:
        assert master.stdout
        received, until = b"", time.monotonic() + CONNECT_S
        while not received.endswith(_READY):
            if not _readable(master.stdout, until - time.monotonic()):
                remedy = f"check that `{self.host.login}` works, and that no start file of its shell waits for input"
                raise RemoteError(f"{self.host.text}: no connection after {CONNECT_S:g} s: {remedy}")
            block = os.read(master.stdout.fileno(), 1 << 16)
            if not block:
                code = master.wait()
                self._read_errors()
                raise _refusal(self.host, self._errors, received.decode(errors="replace"), code)
            received = (received + block)[-_MOST_NOISE:]


def began(output: IO[bytes]) -> bool:
    """Skip what the login shell printed, up to the output of the script; False when the script never began."""
    return any(line.endswith(_READY) for line in output)


def after_start(output: bytes) -> bytes | None:
    """The output of the script alone; None when the script never began."""
    _, up, own = output.partition(_READY)
    return own if up else None


def _script(script: str, arguments: Sequence[str]) -> bytes:
    """The input of `sh`. The script is a process with `arguments` on its command line, visible in `ps`."""
    command = shlex.join(["sh", "-c", _MARK_255 + script, "sh", *arguments])
    return os.fsencode(f"echo {_READY.decode().strip()}\nexec {command}")


def _write_input(client: subprocess.Popen[bytes], text: bytes) -> None:
    """Write the script to standard input, ahead of everything else; an ssh that has ended is reported later."""
    assert client.stdin
    with suppress(BrokenPipeError):
        while text:
            text = text[os.write(client.stdin.fileno(), text) :]


def _refusal(host: Host, errors: str, printed: str, code: int) -> RemoteError:
    """The error when no script can be run: the words of ssh or of the login shell, and the remedy."""
    if "IDENTIFICATION HAS CHANGED" in errors:
        return _changed_key(host, errors)
    if code not in (255, *range(-64, 0)):
        words = last_line(errors) or last_line(printed) or f"it ended with code {code}"
        remedy = "give the account a usual one there (`chsh -s /bin/sh`), without a command that the server forces"
        return RemoteError(f"{host.text}: its login shell does not start `sh` ({words}): {remedy}")
    remedy = next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, errors)), "check that `{login}` works")
    reason = last_line(errors) or "ssh ended and gave no reason (does its server allow a session: MaxSessions?)"
    return RemoteError(f"{host.text}: {reason}: {remedy.format(login=host.login)}")


def _changed_key(host: Host, errors: str) -> RemoteError:
    line = re.search(r"Offending (?:\S+ )?key in (\S+)", errors)
    name = re.search(r"Host key for (\S+) has changed", errors)
    where = f" ({line[1]})" if line else ""
    key = name[1] if name else host.destination.rpartition("@")[2]
    remedy = f"if the device was set up anew, remove the old key with `ssh-keygen -R '{key}'`"
    return RemoteError(f"{host.text}: its host key is not the one that is known{where}: {remedy}")


def last_line(text: str) -> str:
    """The last line that is not empty: the error after a traceback or warnings."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return one_line(lines[-1]).rstrip(".") if lines else ""


def _start(
    command: Sequence[str],
    given: int | IO[bytes] = subprocess.DEVNULL,
    output: int | IO[bytes] = subprocess.DEVNULL,
    errors: int | IO[bytes] = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start in a new session, so that Ctrl-C does not reach it, and neither it nor a jump host asks for a password."""
    environment = {**os.environ, "SSH_ASKPASS_REQUIRE": "never"}
    try:
        return subprocess.Popen(
            command, stdin=given, stdout=output, stderr=errors, env=environment, start_new_session=True
        )
    except (FileNotFoundError, PermissionError) as error:
        raise RemoteError("ssh is not installed here: run `apt-get install openssh-client`") from error


def _end(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """Wait, then kill, and close the pipes."""
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def _private_folder() -> str:
    """With a short path, since that of a socket is limited to some 100 bytes."""
    place = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="mess-", dir=place if len(os.fsencode(place)) <= 50 else "/tmp")


def _readable(stream: IO[bytes], patience_s: float) -> bool:
    waiting = select.poll()
    waiting.register(stream, select.POLLIN)
    return bool(waiting.poll(max(0.0, patience_s) * 1e3))
