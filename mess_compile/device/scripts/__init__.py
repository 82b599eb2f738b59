"""Shell scripts that run on a device, for any POSIX `sh` (dash, busybox, bash), one file each."""

from __future__ import annotations

import functools
from importlib import resources


@functools.cache
def shell_script(*names: str) -> str:
    """The text of scripts, one behind the other; comments stay here, since each byte is read singly on the device."""
    folder = resources.files(__name__)
    lines = [line for name in names for line in (folder / f"{name}.sh").read_text("utf-8").splitlines(keepends=True)]
    return "".join(line for line in lines if not line.lstrip().startswith("#"))
