"""Prints every name: one that is not UTF-8, and one that the terminal cannot show."""

from __future__ import annotations

import io
import sys


def show_all() -> None:
    """Print as \\xNN or \\uNNNN what the streams would else refuse, as standard error does by itself."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def unencodable(error: UnicodeEncodeError) -> str:
    """A one-line error for a name that our code or a library cannot encode as UTF-8."""
    before, after = error.object[: error.start], error.object[error.start :]
    around = (before.splitlines() or [""])[-1][-60:] + after.splitlines()[0][:60]
    return f"{around!a} contains a name that is not UTF-8: rename the file or folder"
