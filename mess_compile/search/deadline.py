"""When a search has to end: at a time limit, or from Ctrl-C on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from mess_compile.runtime.base.errors import RequirementError


class UnfinishedError(RequirementError):
    """No plan was found in time, and it is not known whether there is one."""

    def __init__(self) -> None:
        super().__init__(
            "the search ended before it found a plan that satisfies the requirement, and before it proved that there "
            "is none: raise --time-limit, or leave it out"
        )


class TimeIsUp(Exception):
    """Ends a search that returns what it has so far."""


class Clock:
    """One for a whole command, so that all its searches together end in time, and one Ctrl-C ends them all."""

    def __init__(self, limit_s: float = math.inf) -> None:
        self._end = time.monotonic() + limit_s

    @property
    def up(self) -> bool:
        """Whether a search should end with the best that it has."""
        return time.monotonic() > self._end

    @contextmanager
    def ends_by_interrupt(self) -> Iterator[None]:
        """Ctrl-C ends the block, and the time of everything after it."""
        try:
            yield
        except KeyboardInterrupt:
            self._end = -math.inf


def is_up(clock: Clock | None) -> bool:
    return clock is not None and clock.up


def check_time(clock: Clock | None) -> None:
    """Raises TimeIsUp when the clock is up."""
    if is_up(clock):
        raise TimeIsUp


@contextmanager
def ended_by_interrupt(clock: Clock | None) -> Iterator[None]:
    """With a clock Ctrl-C ends the block, without one it raises KeyboardInterrupt."""
    with nullcontext() if clock is None else clock.ends_by_interrupt():
        yield
