"""Logs timing samples to a file beside the latency table, so that an interrupted profile resumes from it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from mess_compile import files
from mess_compile.runtime.base import decode
from mess_compile.runtime.measure.job_pool import Opened
from mess_compile.runtime.measure.measure import Window
from mess_compile.runtime.serve.worker import event_from_line, event_to_message

FORMAT, VERSION = "mess-latency-samples", 2


@dataclass(frozen=True)
class SampleHeader:
    """The first line of a sample log: everything that two profiles must share for their samples to be comparable.

    `graphs` has the SHA-256 of each job's graph, `recipes` the identity of each recipe's graphs. `run` is a random name
    for the measurement; `SampleLog` chooses it.
    """

    run: str
    library: str
    power_mode: str | None
    machine: dict[str, str]
    recipes: dict[str, str]
    graphs: dict[str, str]
    effort: str


class SampleLog:
    """A header and one JSON line per measured window or opened engine. Truncated or damaged lines are dropped.

    When the file's header differs from `header`, the file belongs to another measurement, and the log starts empty.
    Lines of jobs that are not in `names` are dropped. `run` names the measurement.
    """

    def __init__(self, path: Path, header: SampleHeader, names: Collection[str]) -> None:
        self.path = path
        self.windows: dict[str, list[Window]] = {}
        self.opened: dict[str, Opened] = {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        first, *lines = text.splitlines() or [""]
        known = _run_of(first, header)
        self.run = known or secrets.token_hex(8)
        valid = [_header_line(replace(header, run=self.run))]
        if known is not None:
            valid += [line for line in lines if self._read(line, names)]
        with files.replaced(path) as temporary:
            temporary.write_text("\n".join(valid) + "\n", encoding="utf-8")

    def _read(self, line: str, names: Collection[str]) -> bool:
        event = event_from_line(line)
        if event is None or event.job not in names:
            return False
        self._add(event)
        return True

    def _add(self, event: Window | Opened) -> None:
        if isinstance(event, Window):
            self.windows.setdefault(event.job, []).append(event)
        else:
            self.opened[event.job] = event

    def append(self, event: Window | Opened) -> None:
        """Add an event here and to the file."""
        kind, content = event_to_message(event)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({kind: content}) + "\n")
        self._add(event)

    @property
    def in_order(self) -> list[Window]:
        """All windows, job by job; those of one job in the order of measurement."""
        return [window for windows in self.windows.values() for window in windows]


def _header_line(header: SampleHeader) -> str:
    return json.dumps(decode.encode(header, FORMAT, VERSION))


def _run_of(line: str, header: SampleHeader) -> str | None:
    """The run named in a file's first line; None when the line belongs to another measurement."""
    try:
        found: SampleHeader = decode.document(SampleHeader, line, FORMAT, VERSION, "the header")
    except decode.DecodeError:
        return None
    return found.run if found.run and replace(header, run=found.run) == found else None
