"""Creates the private folder that a bundle is unpacked into; it exists as long as its process, however that ends.

The process holds an exclusive `flock` on the folder; the kernel releases it when the process ends, even after a crash.
Cleaners that go by age respect it (tmpfiles.d(5)), so a cascade that runs for weeks keeps its files.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from tempfile import gettempdir, mkdtemp
from typing import Tuple

from mess_compile.runtime.base import fork_guard

PREFIX = "mess-bundle-"
_TRIES = 10


class Scratch:
    """A folder `name` of mode 700 in the temporary folder, until `cleanup` or the end of the process that made it.

    Raises OSError.
    """

    def __init__(self) -> None:
        folder, descriptor = _held_folder()
        self.name = folder
        self._release = fork_guard.finalizer(self, _remove, folder, descriptor)

    def cleanup(self) -> None:
        self._release()


def sweep() -> None:
    """Remove the folders that this user's processes left behind."""
    with suppress(OSError), os.scandir(gettempdir()) as found:
        for entry in found:
            if entry.name.startswith(PREFIX):
                with suppress(OSError):
                    _sweep(entry.path)


def _sweep(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid == os.getuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
    finally:
        os.close(descriptor)


def _held_folder() -> Tuple[str, int]:
    """Make a folder and lock it; between the two, another process may take it for one left behind."""
    for _ in range(_TRIES):
        folder = mkdtemp(prefix=PREFIX)
        with suppress(FileNotFoundError):
            return folder, _locked(folder)
        shutil.rmtree(folder, ignore_errors=True)
    raise OSError("new folders disappear there before they can be locked")


def _locked(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks: no process can sweep there either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.stat(path)
    except FileNotFoundError:
        os.close(descriptor)
        raise
    return descriptor


def _remove(folder: str, descriptor: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)
