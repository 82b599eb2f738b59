"""Binds resources to the process that made them: a forked child neither uses nor releases them."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from typing import Any, Callable, Tuple

from mess_compile.runtime.base.errors import EngineError

_undestroyed: weakref.WeakSet[Any] = weakref.WeakSet()


def finalizer(owner: object, action: Callable[..., None], *arguments: object) -> weakref.finalize[..., object]:
    """Like `weakref.finalize`, but does nothing in a forked child, neither when it ends nor when called."""
    return weakref.finalize(owner, _act, os.getpid(), action, arguments)


def _act(made_by: int, action: Callable[..., None], arguments: Tuple[object, ...]) -> None:
    if os.getpid() == made_by:
        action(*arguments)


def never_destroy_in_children(thing: object) -> None:
    """Never destroy `thing` in a forked child: its destructor waits for threads or a device of the parent."""
    _undestroyed.add(thing)


def _leak_in_child() -> None:
    """Add a reference that no name holds, so that not even the end of the interpreter destroys the object."""
    with suppress(ImportError):  # Python may be built without libffi
        import ctypes

        for thing in tuple(_undestroyed):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


os.register_at_fork(after_in_child=_leak_in_child)


def check_process(made_by: int, what: str) -> None:
    """Raises EngineError in a process that was forked after process `made_by` loaded `what`."""
    if os.getpid() != made_by:
        raise EngineError(
            f"{what} was loaded in process {made_by}, and process {os.getpid()} was forked from it: engines do not "
            "survive a fork; call runtime.load in each process after the fork (gunicorn: in the hook post_fork; "
            "multiprocessing: in the pool's initializer)"
        )
