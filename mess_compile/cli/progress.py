"""Progress of long work in occasional lines, for logs and pipes, where no bar can be drawn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from mess_compile.duration import duration

FIRST_S, EVERY_S = 7.0, 30.0
"""The time of the first line, within ten seconds of the command's start, and the time between two lines."""


@dataclass(frozen=True)
class _LabelState:
    """The last update, and what had been done, and when, as that work began."""

    label: str
    done: int
    total: int
    first: int
    since_s: float


class ProgressLines:
    """Prints with `write` how far the work `what` is, from a thread of its own: after `first_s`, then each `every_s`.

    So a single step that takes minutes shows progress, too. As a context manager it ends with the work.
    """

    def __init__(
        self,
        what: str,
        write: Callable[[str], None],
        begun_s: float | None = None,
        first_s: float | None = None,
        every_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._write, self._clock = what, write, clock
        self._begun_s = clock() if begun_s is None else begun_s
        self._first_s = FIRST_S if first_s is None else first_s
        self._every_s = EVERY_S if every_s is None else every_s
        self._state: _LabelState | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print, daemon=True)

    def __enter__(self) -> ProgressLines:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join(timeout=1.0)  # its reader may be gone

    def update(self, label: str, done: int, total: int) -> None:
        """Set what is done, and of how much: 0 where that is not known."""
        last = self._state
        if last is None or done < last.done or total != last.total:  # other work begins, at another pace
            self._state = _LabelState(label, done, total, done, self._clock())
        else:
            self._state = _LabelState(label, done, total, last.first, last.since_s)

    def line(self) -> str:
        """Such as `train: images of stage 1: 640 of 3840, 12.5/s, about 4 min left`."""
        now, state = self._clock(), self._state
        so_far = f"{duration(now - self._begun_s)} so far"
        if state is None:
            return f"{self._what}: {so_far}"
        name = self._what if state.label == self._what else f"{self._what}: {state.label}"
        per_s = (state.done - state.first) / (now - state.since_s) if now > state.since_s else 0.0
        words = [so_far]
        if state.done >= state.total > 0:
            words = [f"{state.total} of {state.total} done", so_far]
        elif state.total:
            left = f"about {duration((state.total - state.done) / per_s)} left" if per_s else so_far
            words = [f"{state.done} of {state.total}", *([rate(per_s)] if per_s else []), left]
        elif state.done:
            words = [f"{state.done} done", *([rate(per_s)] if per_s else []), so_far]
        return f"{name}: {', '.join(words)}"

    def _print(self) -> None:
        wait_s = max(0.0, self._begun_s + self._first_s - self._clock())
        with suppress(OSError, ValueError):  # the reader is gone
            while not self._ended.wait(wait_s):
                self._write(self.line())
                wait_s = self._every_s


def rate(per_s: float) -> str:
    """Such as 12.5/s, or where that is slow the time of each."""
    return f"{per_s:.3g}/s" if per_s >= 1 else f"{1 / per_s:.3g} s each"
