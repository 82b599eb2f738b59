"""What was timed so far, on disk beside the latency table: a broken measurement continues there."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mess_compile import files
from mess_compile.runtime.measure.job_pool import Opened
from mess_compile.runtime.measure.measure import Window
from mess_compile.runtime.serve.worker import event_from_line, event_to_message

FORMAT, VERSION = "mess-latency-samples", 2


class SampleLog:
    """Windows and opened engines, one JSON line each behind a header; a half-written or damaged line is dropped.

    Another `header` than the file's means another measurement, which starts afresh; `run` names each. Lines of jobs
    that are not in `names` are dropped.
    """

    def __init__(self, path: Path, header: dict[str, Any], names: Collection[str]) -> None:
        self.path = path
        self.windows: dict[str, list[Window]] = {}
        self.opened: dict[str, Opened] = {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        first, *lines = text.splitlines() or [""]
        known = _run_of(first, header)
        self.run = known or secrets.token_hex(8)
        kept = [_header_line(self.run, header)]
        if known is not None:
            kept += [line for line in lines if self._take(line, names)]
        with files.replaced(path) as temporary:
            temporary.write_text("\n".join(kept) + "\n", encoding="utf-8")

    def _take(self, line: str, names: Collection[str]) -> bool:
        event = event_from_line(line)
        if event is None or event.job not in names:
            return False
        self._keep(event)
        return True

    def _keep(self, event: Window | Opened) -> None:
        if isinstance(event, Window):
            self.windows.setdefault(event.job, []).append(event)
        else:
            self.opened[event.job] = event

    def append(self, event: Window | Opened) -> None:
        kind, content = event_to_message(event)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({kind: content}) + "\n")
        self._keep(event)

    @property
    def in_order(self) -> list[Window]:
        """All windows, those of a job in the order in which they were measured."""
        return [window for windows in self.windows.values() for window in windows]


def _header_line(run: str, header: dict[str, Any]) -> str:
    return json.dumps({"format": FORMAT, "version": VERSION, "run": run, **header})


def _run_of(line: str, header: dict[str, Any]) -> str | None:
    """The run that a file's first line names, None when it is of another measurement."""
    try:
        run = json.loads(line)["run"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return run if isinstance(run, str) and line == _header_line(run, header) else None
