"""Recognises the pointers that Git LFS and git-annex leave in place of a file until its content is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from mess_compile.runtime.base.errors import InputError

HEAD_BYTES = 64
"""So many bytes identify a pointer."""
_KINDS = (
    (b"version https://git-lfs.github.com/spec/", "Git LFS", "git lfs pull"),
    (b"version https://hawser.github.com/spec/", "Git LFS", "git lfs pull"),
    (b"/annex/objects/", "git-annex", "git annex get"),
)


def refuse_pointer(path: Path, content: Optional[bytes] = None) -> None:
    """Raises InputError if `path` is a pointer; `content` is its beginning, if it was already read.

    A file that cannot be read is left to its reader.
    """
    if content is None:
        try:
            with path.open("rb") as stream:
                content = stream.read(HEAD_BYTES)
        except OSError:
            return
    for start, tool, command in _KINDS:
        if content.startswith(start):
            raise InputError(
                f"{path} is a {tool} pointer, not the file itself: run `{command}` in the repository that it lies in"
            )
