"""When a search has to end: at a time limit, or from Ctrl-C on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mess_compile.runtime.base.errors import RequirementError


class UnfinishedError(RequirementError):
    """No plan was found in time, and whether there is one is not known."""

    def __init__(self) -> None:
        super().__init__(
            "no plan that satisfies the requirement was found before the search was ended, and that there is none is "
            "not proved: give --time-limit more, or leave it out"
        )


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
        """Ctrl-C ends what stands inside, and the time of all that follows."""
        try:
            yield
        except KeyboardInterrupt:
            self._end = -math.inf
