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
    """`progress` is called as work goes on; `note` gets each sentence for the user once."""

    progress: Progress = _ignore
    note: Callable[[str], None] = _ignore


SILENT = Reporter()
