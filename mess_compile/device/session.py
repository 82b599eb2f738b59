"""What a session with a device over SSH offers, whether its Python or its trtexec does the work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mess_compile.runtime.machine.power import DeviceState
from mess_compile.runtime.measure.job_pool import Job, Opened
from mess_compile.runtime.measure.measure import Effort, Window
from mess_compile.runtime.serve.worker import BuiltEngine, Hello

STORE = ".mess-compile"
"""The folder of a session on the device, below the home folder."""
PID_FILE = f"{STORE}/session.pid"
"""By which a session finds the program of an earlier one that a frozen connection left running."""


@dataclass(frozen=True)
class MeasureRequest:
    """Jobs to measure in one `run`, with a precision for each job that has a graph.

    Those in `measured` are measured, the others only run as predecessors; the `reference` shows the device's speed.
    """

    run: str
    jobs: tuple[Job, ...]
    precisions: Mapping[str, str]
    measured: tuple[str, ...]
    reference: str
    effort: Effort


class DeviceSession(Protocol):
    """A device that builds engines and measures them: `PythonSession`, `TrtexecSession`.

    `hello` is None until `greet` was called. `states` are what the device reported of its clocks and temperatures, in
    order. `failed` and `built` hold every job of `build`: why it failed, or its engine. `measures_transfers` is whether
    upload, download and null stage can be measured.
    """

    hello: Hello | None
    states: list[DeviceState]
    failed: dict[str, str]
    built: dict[str, BuiltEngine]

    @property
    def measures_transfers(self) -> bool: ...

    def greet(self) -> Hello:
        """Ask the device what it is. Raises RemoteError, EngineError, InputError."""
        ...

    def lock_clocks_while_measuring(self) -> None:
        """Have the device hold its clocks during `measure`. Raises InputError where it cannot."""
        ...

    def build(self, jobs: Mapping[str, tuple[Path, str]]) -> dict[str, str]:
        """Build an engine of each job's graph (path, precision), and return the reasons of those that failed.

        Engines that the device has are not built again. Raises RemoteError, InputError.
        """
        ...

    def measure(self, request: MeasureRequest, earlier: Sequence[Window]) -> Iterator[Opened | Window]:
        """Measure what the windows in `earlier` do not cover, and yield new results as they come.

        Raises RemoteError, EngineError, InputError.
        """
        ...
