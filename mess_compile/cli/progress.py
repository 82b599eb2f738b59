"""How far long work is, in a line now and then: for logs and pipes, where no bar can be drawn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

FIRST_S, EVERY_S = 7.0, 30.0
"""When the first line comes, so that it is there within ten seconds of the command, and the time between two lines."""


@dataclass(frozen=True)
class _Told:
    """What was told last, and what had been done, and when, when that work began."""

    label: str
    done: int
    total: int
    first: int
    since_s: float


class ProgressLines:
    """Has `write` print how far the work `what` is, from a thread of its own: after `first_s`, then each `every_s`.

    So a single step that takes minutes is heard of, too. As a context manager it ends with the work.
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
        self._told: _Told | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print, daemon=True)

    def __enter__(self) -> ProgressLines:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join(timeout=1.0)  # it may wait for a reader that is gone

    def tell(self, label: str, done: int, total: int) -> None:
        """So much is done, and of how much: 0 where that is not known."""
        last = self._told
        if last is None or done < last.done or total != last.total:  # something else begins, at another pace
            self._told = _Told(label, done, total, done, self._clock())
        else:
            self._told = _Told(label, done, total, last.first, last.since_s)

    def line(self) -> str:
        """Such as `train: images of stage 1: 640 of 3840, 12.5/s, about 4 min left`."""
        now, told = self._clock(), self._told
        so_far = f"{duration(now - self._begun_s)} so far"
        if told is None:
            return f"{self._what}: {so_far}"
        name = self._what if told.label == self._what else f"{self._what}: {told.label}"
        per_s = (told.done - told.first) / (now - told.since_s) if now > told.since_s else 0.0
        words = [so_far]
        if told.done >= told.total > 0:
            words = [f"{told.total} of {told.total} done", so_far]
        elif told.total:
            left = f"about {duration((told.total - told.done) / per_s)} left" if per_s else so_far
            words = [f"{told.done} of {told.total}", *([rate(per_s)] if per_s else []), left]
        elif told.done:
            words = [f"{told.done} done", *([rate(per_s)] if per_s else []), so_far]
        return f"{name}: {', '.join(words)}"

    def _print(self) -> None:
        wait_s = max(0.0, self._begun_s + self._first_s - self._clock())
        with suppress(OSError, ValueError):  # nobody reads any more
            while not self._ended.wait(wait_s):
                self._write(self.line())
                wait_s = self._every_s


def rate(per_s: float) -> str:
    """Such as 12.5/s, or where that is slow the time of each."""
    return f"{per_s:.3g}/s" if per_s >= 1 else f"{1 / per_s:.3g} s each"


def duration(seconds: float) -> str:
    """Such as 40 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
