"""What Ctrl-C leaves behind, command by command, and how to go on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_UNTOUCHED = "nothing was changed; the same command starts over"
KEPT = {
    "demo": "steps that were finished are kept; the same command goes on after the last of them",
    "train": "finished epochs are kept; the same command goes on after the last of them",
    "export": "the graphs are as they were; the same command starts over",
    "evaluate": "what is recorded is kept, in blocks of 32 images; the same command goes on from there",
    "build": "engines that are built are kept; the same command builds the others",
    "profile": "what was measured is kept; the same command goes on from there",
    "search": "a plan is written whole or not at all, and `inspect plan` shows it; the same command searches again",
    "bundle": "a bundle is written whole or not at all; the same command writes it",
    "run": "pictures that were written are whole; the same command makes all of them again",
    "bench": "nothing of it is kept; the same command measures again",
    "verify": _UNTOUCHED,
    "ship": "what is in use there stays so until a new version has verified, and `ships` tells which it is; "
    "the same command sends only what is missing",
    "ships": _UNTOUCHED,
    "report": "a page is written whole or not at all; the same command writes it",
    "compare": "a page is written whole or not at all; the same command writes it",
    "devices": _UNTOUCHED,
    "doctor": _UNTOUCHED,
    "inspect": _UNTOUCHED,
    "completion": _UNTOUCHED,
}
GRADUAL = frozenset({"train", "evaluate", "build", "profile"})
"""Commands that keep in the workspace what they have finished."""
NOTHING = "nothing was finished yet, so nothing is kept; the same command starts over"


def words_of(command: str, folder: Path | None, begun: float) -> str:
    """What to say when `command` was stopped, which began to work in `folder` at that time (seconds of the clock)."""
    if command in GRADUAL and folder is not None and not _left_anything(folder, begun):
        return NOTHING
    return KEPT.get(command, "nothing was begun")


def _left_anything(folder: Path, since: float) -> bool:
    """Whether a file in the workspace is newer; hidden ones are locks, and files that are being written."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(place, name)
            with suppress(OSError):  # it may be gone by now
                if not name.startswith(".") and path.lstat().st_mtime >= since and not path.is_symlink():
                    return True
    return False
