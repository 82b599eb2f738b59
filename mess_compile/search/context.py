"""What travels through the layers of a search beside the evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mess_compile.search.deadline import Clock
from mess_compile.search.plan import FRONT_BY
from mess_compile.search.requirement import Requirement

SearchProgress = Callable[[int, int], None]
"""It is called with (chains of heads done, in all)."""


def no_progress(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class SearchContext:
    """What to search for, and how.

    `front_by` names what the front is by, beside the bounds; empty: no front and no operating points. What does not
    follow from the requirement is stored in `cache_folder`. When the `clock` is up, or with one at Ctrl-C, a search
    ends with the best plan so far; without one Ctrl-C raises KeyboardInterrupt.
    """

    requirement: Requirement
    front_by: tuple[str, ...] = FRONT_BY
    progress: SearchProgress = no_progress
    cache_folder: Path | None = None
    clock: Clock | None = None

    def of(self, **changes: Any) -> SearchContext:
        """The same search under a requirement with these changes."""
        return replace(self, requirement=replace(self.requirement, **changes))
