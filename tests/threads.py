"""Counts the threads that a test may have left running."""

from __future__ import annotations

import threading

from mess_compile.search.bnb.bounds import THREADS


def own_threads() -> int:
    """The running threads, without those that the search keeps for the process."""
    return sum(not thread.name.startswith(THREADS) for thread in threading.enumerate())
