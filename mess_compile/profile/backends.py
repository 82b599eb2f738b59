"""Provides the backends of a profile: this machine, or a device over SSH. A backend builds engines and times them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from mess_compile.data.scenes import profiling_inputs
from mess_compile.device.session import DeviceSession, MeasureRequest
from mess_compile.engines.files import EngineFiles
from mess_compile.engines.remote_build import built_there
from mess_compile.latency.table import Latency
from mess_compile.network import GraphSet
from mess_compile.runtime.engines.engine import FP32, Library
from mess_compile.runtime.machine import power
from mess_compile.runtime.machine.power import DeviceState
from mess_compile.runtime.measure import measure
from mess_compile.runtime.measure.job_pool import Job, Opened
from mess_compile.runtime.measure.measure import Effort, Window
from mess_compile.runtime.serve.worker import describe_machine

MeasureJobs = Callable[["Task", Effort, Sequence[Window]], Iterator[Opened | Window]]
"""Task, effort, windows measured before -> the events measured now."""
Build = Callable[[Sequence[EngineFiles], Collection[str] | None], tuple[EngineFiles, ...]]
"""Build engines of some jobs' graphs (None: all) -> the files that are loaded; graphs that do not build are failed."""
Transfers = Callable[[Mapping[tuple[str, str], Latency]], dict[tuple[str, str], Latency]]
"""Measured entries -> estimated entries of upload, download and null stage."""


@dataclass(frozen=True)
class Task:
    """Jobs of one `run`, the names of those to measure, and the `reference` job that tracks the machine's speed."""

    run: str
    jobs: tuple[Job, ...]
    measured: tuple[str, ...]
    reference: str


@dataclass(frozen=True)
class Backend:
    """A device to measure on: its name as a target, its library, `facts` about the machine, and functions that act.

    `state` reads clocks, temperatures and power mode. `transfers` estimates the pseudo graphs where the device cannot
    measure them.
    """

    device: str
    library: str
    version: str
    facts: dict[str, str]
    measure: MeasureJobs
    state: Callable[[], DeviceState]
    build: Build
    transfers: Transfers | None = None


def nothing_to_build(forms: Sequence[EngineFiles], jobs: Collection[str] | None) -> tuple[EngineFiles, ...]:
    """A `Build` for a library that loads the ONNX files themselves."""
    return tuple(forms)


def local_backend(library: Library, device: str, graph_set: GraphSet, build: Build = nothing_to_build) -> Backend:
    """This machine as a backend."""
    frame, thresholds = profiling_inputs(graph_set)

    def run(task: Task, effort: Effort, earlier: Sequence[Window]) -> Iterator[Opened | Window]:
        meter = power.power_meter()
        request = measure.MeasureTask(task.jobs, frame, thresholds, task.reference, task.measured, earlier)
        return measure.measure(library, request, effort, meter)

    return Backend(device, library.name, library.version, describe_machine(), run, power.read_state, build)


def remote_backend(session: DeviceSession, device: str, transfers: Transfers | None = None) -> Backend:
    """A connected device over SSH as a backend."""
    assert session.hello is not None, "the caller connects first"

    def run(task: Task, effort: Effort, earlier: Sequence[Window]) -> Iterator[Opened | Window]:
        precisions = {job.name: job.name.partition("@")[2] or FP32 for job in task.jobs}
        request = MeasureRequest(task.run, task.jobs, precisions, task.measured, task.reference, effort)
        return session.measure(request, earlier)

    hello, build = session.hello, partial(built_there, session)
    return Backend(device, hello.library, hello.version, hello.facts, run, lambda: session.states[-1], build, transfers)
