"""Records how long mapping labels back to a frame's size takes, so that deadlines can leave time for it."""

from __future__ import annotations

import threading
from collections import deque
from typing import Deque, Dict, Tuple

RECENT = 100
"""The longest of so many recent times stands for the p99."""
_SIZES = 32

Size = Tuple[int, int]


class MappingTimes:
    """The times of recent frames, for each of the recent frame sizes; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent: Dict[Size, Deque[float]] = {}

    def took(self, hw: Size, ms: float) -> None:
        with self._lock:
            recent = self._recent.pop(hw, None) or deque(maxlen=RECENT)
            recent.append(ms)
            self._recent[hw] = recent
            if len(self._recent) > _SIZES:
                del self._recent[next(iter(self._recent))]

    def p99_ms(self, hw: Size) -> float:
        """0 for a size without frames so far."""
        with self._lock:
            return max(self._recent.get(hw, ()), default=0.0)
