"""What Ctrl-C leaves behind, for each command, and how to continue."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_UNCHANGED = "nothing was changed; the same command starts over"
AFTER = {
    "demo": "finished steps are kept; the same command continues after them",
    "train": "finished epochs are kept; the same command continues after them",
    "attach": "finished epochs are kept; the same command continues after them",
    "export": "the graphs are unchanged; the same command starts over",
    "evaluate": "recorded images are kept, in blocks of 32; the same command continues from there",
    "build": "finished engines are kept; the same command builds the others",
    "profile": "finished measurements are kept; the same command continues from there",
    "search": "the plan is written whole or not at all (see `inspect plan`); the same command searches again",
    "bundle": "the bundle is written whole or not at all; the same command writes it",
    "run": "the pictures written so far are whole; the same command writes all of them again",
    "bench": "nothing is kept; the same command measures again",
    "verify": _UNCHANGED,
    "ship": "the version in use stays in use until a new one is verified (see `ship --list`); the same command sends "
    "only what is missing",
    "report": "the page is written whole or not at all; the same command writes it",
    "compare": "the page is written whole or not at all; the same command writes it",
    "devices": _UNCHANGED,
    "doctor": _UNCHANGED,
    "inspect": _UNCHANGED,
    "completion": _UNCHANGED,
}
GRADUAL = frozenset({"train", "attach", "evaluate", "build", "profile"})
"""Commands that keep finished work in the workspace."""
NOTHING = "nothing was finished yet; the same command starts over"


def message_of(command: str, folder: Path | None, begun: float) -> str:
    """The message for a `command` that was stopped, which had begun in `folder` at that time (seconds of the clock)."""
    if command in GRADUAL and folder is not None and not _has_newer(folder, begun):
        return NOTHING
    return AFTER.get(command, "nothing was begun")


def _has_newer(folder: Path, since: float) -> bool:
    """Whether a file in the workspace is newer, apart from hidden ones: locks and files being written."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(place, name)
            with suppress(OSError):  # removed meanwhile
                if not name.startswith(".") and path.lstat().st_mtime >= since and not path.is_symlink():
                    return True
    return False
