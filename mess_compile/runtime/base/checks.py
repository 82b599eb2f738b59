"""Checks numbers that a caller passes: the right kind and in range, or an error that names them."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from typing import Any, Optional

from mess_compile.runtime.base.errors import InputError

THREADS_PER_CORE = 4


def check_whole(name: str, value: Any, most: int) -> None:
    """Raises InputError unless `value` is a whole number from 1 to `most`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= int(value) <= most:
        raise InputError(f"{name} is {value!r:.80}, not a whole number from 1 to {most}")


def check_share(name: str, value: Any) -> None:
    """Raises InputError unless `value` is a number from 0 to 1."""
    if not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise InputError(f"{name} is {value!r:.80}, not a number from 0 to 1")


def check_threads(threads: Optional[int]) -> None:
    """None means every core. Raises InputError."""
    if threads is not None:
        check_whole("threads", threads, THREADS_PER_CORE * (os.cpu_count() or 1))


def check_deadline(deadline_ms: Optional[float]) -> None:
    """A deadline below 0 is allowed: it has passed already. Raises InputError."""
    if deadline_ms is not None and (not isinstance(deadline_ms, Real) or math.isnan(deadline_ms)):
        raise InputError(f"deadline_ms is {deadline_ms!r:.80}: give a number of milliseconds, or None for no deadline")
