"""How kernels are compiled: by one process for all, into a folder whose name is a hash over all of their sources.

Numba's cache of a function depends on the file that the function is in, and not on the files of what it calls. A change
to any kernel therefore leads to a new folder.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numba

from mess_compile.runtime.base import user_dirs
from mess_compile.search import space

Function = TypeVar("Function", bound=Callable[..., Any])
_LOCK = "compiling.lock"
_SHARED_UNUSED_S = 30 * 24 * 3600.0
"""How old a folder of other sources may become where several installations have their folders."""
_CONFIG: Any = numba.config
_NJIT: Any = numba.njit


def sources() -> tuple[Path, ...]:
    """The files that the compiled code follows from: every kernel, and the constants in `space`."""
    return (*sorted(Path(__file__).parent.glob("*.py")), Path(space.__file__))


def sources_sha256() -> str:
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_folder() -> Path | None:
    """Where compiled kernels are stored, created if need be; None when no folder can be written.

    It is in NUMBA_CACHE_DIR where that is set, else beside the kernels, else in the user's cache. A new folder takes
    the place of those that other sources had.
    """
    own, user = Path(__file__).parent / "__pycache__", user_dirs.cache()
    chosen = _CONFIG.CACHE_DIR
    parents = [Path(chosen)] if chosen else [own, *([user / "mess-compile" / "kernels"] if user else [])]
    name = f"numba-{sources_sha256()[:16]}"
    for folder in (parent / name for parent in parents):
        is_new = not folder.exists()
        if _is_writable(folder):
            if is_new:
                _remove_others(folder, unused_s=0.0 if folder.parent == own else _SHARED_UNUSED_S)
            return folder
    return None


def _remove_others(folder: Path, unused_s: float) -> None:
    """Remove the folders of other sources beside `folder` that nothing was stored in for `unused_s` seconds.

    Only where other installations have their folders, too, does one that is not this one's matter.
    """
    for other in folder.parent.glob("numba-*"):
        with suppress(OSError):
            if other != folder and time.time() - other.stat().st_mtime >= unused_s:
                shutil.rmtree(other)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


FOLDER = cache_folder()


def kernel(function: Function | None = None, /, **options: bool | str) -> Any:
    """Compile a function when it is first called, as `numba.njit` does, and store the result in FOLDER."""
    if function is None:
        return functools.partial(kernel, **options)
    if FOLDER is None:
        return _NJIT(**options)(function)
    chosen = _CONFIG.CACHE_DIR
    _CONFIG.CACHE_DIR = str(FOLDER)  # it is read when the function is decorated
    try:
        return _NJIT(cache=True, **options)(function)
    finally:
        _CONFIG.CACHE_DIR = chosen


inlined = kernel(inline="always")
"""Compile a function into the kernels that call it. As a kernel of its own it would be optimised once by itself, and
once more in each kernel above it."""


def compiled_once(function: Any) -> Any:
    """A kernel for Python to call: one process compiles it while the others wait, and then load what it stored."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if not _CONFIG.DISABLE_JIT and not function.overloads:
            with _exclusive(FOLDER):
                function.compile(tuple(map(numba.typeof, arguments)))
        return function(*arguments)

    return call


@contextmanager
def _exclusive(folder: Path | None) -> Iterator[None]:
    """Hold the folder's lock. Without a folder, or on a file system without locks, each process compiles for itself."""
    try:
        descriptor = -1 if folder is None else os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        descriptor = -1
    if descriptor < 0:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
