"""Which of the slow tests fall to a commit: a fifth of them, another one for the next number."""

from __future__ import annotations

import zlib

FIFTHS = 5


def falls_to(commit: str, test: str) -> bool:
    """Whether the fifth of `commit`, a hexadecimal number, has the test of this node id."""
    return zlib.crc32(test.encode()) % FIFTHS == int(commit, 16) % FIFTHS
