"""What a process made belongs to it: a child that it forks neither gives it back nor uses it."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from typing import Any, Callable, Tuple

from mess_compile.runtime.base.errors import EngineError

_undestroyed: weakref.WeakSet[Any] = weakref.WeakSet()


def finalizer(owner: object, action: Callable[..., None], *arguments: object) -> weakref.finalize[..., object]:
    """As `weakref.finalize`; in a forked child nothing is done, neither at its end nor when it is called."""
    return weakref.finalize(owner, _act, os.getpid(), action, arguments)


def _act(made_by: int, action: Callable[..., None], arguments: Tuple[object, ...]) -> None:
    if os.getpid() == made_by:
        action(*arguments)


def never_destroy_in_children(thing: object) -> None:
    """Have a forked child never destroy `thing`, whose destructor waits for threads or a device that only we have."""
    _undestroyed.add(thing)


def _leak_in_child() -> None:
    """One reference more than there are names for it, so that not even the end of the interpreter destroys it."""
    with suppress(ImportError):  # a Python that was built without libffi
        import ctypes

        for thing in tuple(_undestroyed):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


os.register_at_fork(after_in_child=_leak_in_child)


def check_process(made_by: int, what: str) -> None:
    """Raises EngineError in a process that was forked after `what` had been made in process `made_by`."""
    if os.getpid() != made_by:
        raise EngineError(
            f"{what} was loaded in process {made_by}, and process {os.getpid()} was forked from it: engines do not "
            "survive a fork; call runtime.load in each process after the fork (gunicorn: in the hook post_fork; "
            "multiprocessing: in the pool's initializer)"
        )
