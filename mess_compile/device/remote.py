"""Runs programs on a device over SSH, and transfers files. The device needs a POSIX shell, tar and sha256sum."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mess_compile.device.scripts import shell_script
from mess_compile.device.ssh import (
    KILLED,
    PYTHON,
    Connection,
    Host,
    RemoteError,
    after_start,
    began,
    last_line,
    parse_host,
)
from mess_compile.files import replaced, sha256_of_file
from mess_compile.runtime.base.errors import InputError

__all__ = ["PYTHON", "Completed", "Host", "PushResult", "Remote", "RemoteError", "parse_host"]

STOP_S = 10.0
"""How long to wait for a program on the device to end once nobody reads it; it is killed there after 5 s."""
_ABSENT = 44
"""The exit code of `show.sh` and `show_hashed.sh` when there is no such file."""
_LAST_SIGNAL = 64
_LEAST_PYTHON = (3, 8)
_VERSION = "import sys; print('.'.join(map(str, sys.version_info[:3])))"


@dataclass(frozen=True)
class Completed:
    """A finished program: its code is 128 + N after signal N, KILLED where ssh did not report the signal."""

    code: int
    output: bytes
    errors: str


@dataclass(frozen=True)
class PushResult:
    """Bytes and files that were sent, and files that the device had."""

    sent_bytes: int
    sent: int
    present: int


class Remote:
    """A device over SSH, for one thread. Connects on entry, and again at the next call after the connection was lost.

    Paths on the device are absolute or relative to the home folder. `options` are further arguments for ssh. All
    methods raise RemoteError.
    """

    def __init__(self, host: Host, options: Sequence[str] = ()) -> None:
        self.host = host
        self._connection = Connection(host, options)

    def __enter__(self) -> Remote:
        self._connection.open()
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the connection; programs that `lines` started are stopped on the device."""
        self._connection.close()

    def run(self, command: Sequence[str], given: bytes = b"", patience_s: float = 60.0) -> Completed:
        """Run a short program with `given` on its standard input, and wait until it ends with any code.

        Gives up after `patience_s` seconds, and does not stop the program then. Use `lines` for long programs.
        """
        return self._answer(shell_script("run"), command, given, patience_s)

    def lines(self, command: Sequence[str], pid_file: str | None = None) -> Iterator[str]:
        """Yield the lines of a program's standard output as they come; an error at the end holds its last words.

        Its standard input is empty. The program is stopped, with its children, when the generator is closed, this
        process ends in any way, or the connection is cut. A connection that died silently may leave it running; the
        next program with the same `pid_file` (a path on the device) stops it first.
        """
        with tempfile.TemporaryFile() as errors:
            with self._connection.client(
                shell_script("run_watched"), (pid_file or "", *command), subprocess.PIPE, errors
            ) as client:
                assert client.stdin
                assert client.stdout
                try:
                    started = began(client.stdout)
                    for line in client.stdout:
                        yield line.decode(errors="replace").rstrip("\r\n")
                    client.wait()
                    code, words = self._connection.ended(client, started, _text(errors))
                finally:
                    client.stdout.close()
                    client.stdin.close()  # the script waits for this
                    with suppress(subprocess.TimeoutExpired):
                        client.wait(STOP_S)
            if code:
                raise self.failure(f"`{command[0]}`", code, words)

    def push(self, files: Mapping[str, Path], folder: str, progress: Callable[[int, int], None]) -> PushResult:
        """Have `files`, named by the hex SHA-256 of their bytes, in `folder` on the device, under these names.

        Sends only missing files; those that are there are hashed again each time (some seconds per GB), and replaced
        when damaged. A file gets its name once it has arrived completely and its hash is right. After a broken call
        the next one continues. `progress` gets the bytes sent and the total; it is not called when nothing is missing.
        Raises InputError when a file cannot be read or does not match its name.
        """
        assert all(re.fullmatch("[0-9a-f]{64}", name) for name in files)
        present = self._present(files, folder)
        missing = {name: path for name, path in files.items() if name not in present}
        sent_bytes = self._send(missing, folder, progress) if missing else 0
        return PushResult(sent_bytes, len(missing), len(present))

    def pull(self, path: str, target: Path) -> None:
        """Copy a file from the device; `target` is complete, or as it was before."""
        with replaced(target) as temporary, tempfile.TemporaryFile() as errors:
            with (
                temporary.open("wb") as stream,
                self._connection.client(shell_script("show_hashed"), (path,), subprocess.PIPE, errors) as client,
            ):
                assert client.stdout
                started = began(client.stdout)
                shutil.copyfileobj(client.stdout, stream)
                client.wait()
                code, words = self._connection.ended(client, started, _text(errors))
            if code:
                raise self._no_file(path, code, words)
            if f"{sha256_of_file(temporary)}  -" not in words.splitlines():
                reason = f"{path} changed while it was copied, or there is no space for {target}"
                raise RemoteError(f"{self.host.text}: {reason}: run the command again")

    def read(self, path: str) -> bytes | None:
        """The bytes of a small file on the device; None when there is none."""
        done = self._answer(shell_script("show"), (path,))
        if done.code == _ABSENT:
            return None
        if done.code:
            raise self._no_file(path, done.code, done.errors)
        return done.output

    def failure(self, what: str, code: int, errors: str) -> RemoteError:
        """The error for `what` ("`python3`"), which ended with a code other than 0 after printing `errors`."""
        words = last_line(re.sub("tar: Exiting with failure status.*", "", errors))
        if re.search(r"No space left on device|Disk quota exceeded|Wrote only \d+ of", errors):
            return RemoteError(f"{self.host.text} has no space left for {what}: make room there, then run it again")
        if code in (126, 127):
            reason = f"{what} cannot be started ({words}): install it there, or {self._naming(what)}"
        elif code == KILLED or 128 < code <= 128 + _LAST_SIGNAL:
            signal = "" if code == KILLED else f" by signal {code - 128}"
            reason = f"{what} was killed{signal}: has the device enough memory? (last output: {words or 'none'})"
        else:
            lacks = f": install it there, for this {self.host.python}, or {self._naming(what)}"
            remedy = lacks if "No module named" in words else ""
            reason = f"{what} ended with code {code}: {words or 'no output'}{remedy}"
        return RemoteError(f"{self.host.text}: {reason}")

    def _naming(self, what: str) -> str:
        """The remedy where the program has another path."""
        is_python = what == f"`{self.host.python}`"
        return "name another by --python PATH" if is_python else "give its path"

    def refuse_old_python(self) -> None:
        """Raises RemoteError when the Python on the device works but is too old for the runtime."""
        done = self.run((self.host.python, "-c", _VERSION))
        version = re.fullmatch(r"(\d+)[.](\d+)[.]\d+\s*", done.output.decode(errors="replace"))
        if version is not None and (int(version[1]), int(version[2])) < _LEAST_PYTHON:
            least = ".".join(map(str, _LEAST_PYTHON))
            raise RemoteError(
                f"{self.host.text}: `{self.host.python}` is Python {version[0].strip()}, and {least} or newer is "
                "needed: name another by --python PATH"
            )

    def _no_file(self, path: str, code: int, errors: str) -> RemoteError:
        if code == _ABSENT:
            return RemoteError(f"{self.host.text} has no file {path}")
        return self.failure(f"reading {path}", code, errors)

    def _present(self, names: Iterable[str], folder: str) -> set[str]:
        """The `names` whose files are intact in `folder`, which is created; damaged ones are removed."""
        done = self._answer(
            shell_script("verified_folder", "list_files"), (folder,), "".join(f"{name}\n" for name in names).encode()
        )
        if done.code:
            raise self.failure(f"folder {folder}", done.code, done.errors)
        return set(done.output.decode().split())

    def _send(self, missing: Mapping[str, Path], folder: str, progress: Callable[[int, int], None]) -> int:
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            with self._connection.client(
                shell_script("verified_folder", "receive_files"), (folder,), output, errors
            ) as client:
                assert client.stdin
                sent_bytes = 0
                try:
                    with suppress(BrokenPipeError):  # the script reports the reason
                        sent_bytes = _write_archive(client.stdin, missing, progress)
                finally:
                    with suppress(BrokenPipeError):
                        client.stdin.close()
                    client.wait()
                    output.seek(0)
                    received = after_start(output.read())
                    code, words = self._connection.ended(client, received is not None, _text(errors))
            if code:
                raise self.failure(f"folder {folder}", code, words)
            arrived = set((received or b"").decode().split())
        self._refuse_damaged({name: path for name, path in missing.items() if name not in arrived}, folder)
        return sent_bytes

    def _refuse_damaged(self, missing: Mapping[str, Path], folder: str) -> None:
        """Raises for missing files, unless another push to the same folder has taken them over."""
        for name in missing.keys() - (self._present(missing, folder) if missing else set()):
            if sha256_of_file(missing[name]) != name:
                raise InputError(f"{missing[name]} has changed since it was hashed: run the command again")
            raise RemoteError(f"{self.host.text}: {missing[name]} arrived damaged in {folder}: check its disk")

    def _answer(
        self, script: str, arguments: Sequence[str], given: bytes = b"", patience_s: float | None = None
    ) -> Completed:
        with self._connection.client(script, arguments, subprocess.PIPE, subprocess.PIPE) as client:
            try:
                output, errors = client.communicate(given, patience_s)
            except subprocess.TimeoutExpired as error:
                what = f"`{arguments[0]}` has not ended within {patience_s:g} s"
                raise RemoteError(f"{self.host.text}: {what}: is the device busy, or out of memory?") from error
            own = after_start(output)
            code, words = self._connection.ended(client, own is not None, errors.decode(errors="replace"))
            return Completed(code, own or b"", words)


def _write_archive(pipe: IO[bytes], files: Mapping[str, Path], progress: Callable[[int, int], None]) -> int:
    """Write a tar stream of `files`, and return the bytes of their contents. One block is in memory at a time."""
    sent, total = 0, sum(_size(path) for path in files.values())

    def count(block_bytes: int) -> None:
        nonlocal sent
        sent += block_bytes
        progress(sent, total)

    with tarfile.open(fileobj=pipe, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        archive.copybufsize = 1 << 18  # type: ignore[attr-defined]
        for name, path in files.items():
            _add(archive, name, path, count)
    return sent


def _add(archive: tarfile.TarFile, name: str, path: Path, count: Callable[[int], None]) -> None:
    try:
        with path.open("rb") as stream:
            entry = tarfile.TarInfo(name)
            entry.size = os.fstat(stream.fileno()).st_size
            archive.addfile(entry, _Counted(stream, count))  # type: ignore[arg-type]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): run the command again") from error


@dataclass(frozen=True)
class _Counted:
    stream: IO[bytes]
    count: Callable[[int], None]

    def read(self, size: int) -> bytes:
        block = self.stream.read(size)
        self.count(len(block))
        return block


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): run the command again") from error


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")
