"""How long it takes to map labels back to the size of a frame, which a deadline has to leave room for."""

from __future__ import annotations

import threading
from collections import deque
from typing import Deque, Dict, Tuple

RECENT = 100
"""The longest of so many stands for the p99."""
_SIZES = 32

Size = Tuple[int, int]


class MappingTimes:
    """Of the latest frames of each size, the latest sizes; from any thread."""

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
        """0 for a size that no frame had."""
        with self._lock:
            return max(self._recent.get(hw, ()), default=0.0)
