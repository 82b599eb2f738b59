"""Progress and notes of long-running steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[str, int, int], None]
"""Step under way, amount done, total amount (0: unknown)."""


def _ignore(*content: object) -> None:
    pass


@dataclass(frozen=True)
class Reporter:
    """`progress` is called as work goes on, `note` with each sentence for the user, `warning` with each that asks for a
    second look: at data that are not read, or figures that rest on less than they seem to. `note` gets those as well
    where there is no `warning`."""

    progress: Progress = _ignore
    note: Callable[[str], None] = _ignore
    warning: Callable[[str], None] | None = None

    def warn(self, sentence: str) -> None:
        (self.warning or self.note)(sentence)


SILENT = Reporter()
