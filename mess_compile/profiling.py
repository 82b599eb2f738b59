"""Measure every graph of a workspace on this machine, in context, and continue after a break."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from mess_compile import files, latency, scenes
from mess_compile.candidates import BASELINE, CandidateNetwork, GraphSet, head_graph_name, output_name, segment_name
from mess_compile.latency import Latency, LatencyTable
from mess_compile.runtime import profile
from mess_compile.runtime.engine import Library
from mess_compile.statistics import threshold_table

Progress = Callable[[str, int, int], None]
STEADY_SPREAD = 0.1
"""Share by which the visits to the middle graph may lie apart in their medians."""
_FORMAT, _VERSION = "mess-latency-samples", 1


def profile_graphs(
    graph_set: GraphSet,
    library: Library,
    device: str,
    path: Path,
    progress: Progress,
    effort: profile.Effort | None = None,
) -> LatencyTable:
    """Measure all graphs on this machine in fp32 and write the latency table to `path`.

    Samples are kept beside it after each visit; a killed call continues there, unless graphs or library changed.
    Raises InputError, EngineError.
    """
    effort = effort or profile.Effort()
    jobs = profiling_jobs(graph_set)
    names = {job.name for job in jobs}
    samples = _Samples(path.with_suffix(".samples.jsonl"), _header(graph_set, library, effort), names)
    visited = samples.visited()
    total, done = len(jobs) * effort.visits, sum(visited.values())
    progress("profile", done, total)
    frame = scenes.make_scene(0, graph_set.candidate.input_hw).frame
    thresholds = threshold_table(graph_set.gate, len(graph_set.candidate.classes))
    for visit in profile.measure(library, jobs, frame, thresholds, effort, visited):
        samples.append(visit)
        done += 1
        progress("profile", done, total)
    table = _table(graph_set, library, device, samples.visits)
    latency.write_latency_table(path, table)
    samples.path.unlink()
    return table


def profiling_jobs(graph_set: GraphSet) -> list[profile.Job]:
    """Every graph with what runs before it in a cascade: the previous frame, the segment, or a head."""
    candidate = graph_set.candidate

    def job(name: str, predecessor: str | None) -> profile.Job:
        return profile.Job(name, graph_set.path(name), predecessor)

    jobs = [job(name, segment_name(0, len(candidate.exit_points))) for name in graph_set.baselines]
    for a, b in candidate.segments():
        jobs.append(job(segment_name(a, b), head_graph_name(_typical_head(candidate, a)) if a else BASELINE))
    for head in candidate.heads:
        jobs.append(job(head_graph_name(head.name), segment_name(head.exit_point - 1, head.exit_point)))
    outputs = {}
    for number, point in enumerate(candidate.exit_points, start=1):
        outputs[output_name(point.hw)] = head_graph_name(_typical_head(candidate, number))
    jobs += [job(name, predecessor) for name, predecessor in outputs.items()]
    jobs.append(profile.Job(latency.UPLOAD, None))
    jobs.append(profile.Job(latency.NULL, None, next(iter(outputs.values()))))
    jobs.append(profile.Job(latency.DOWNLOAD, None, next(iter(outputs))))
    return jobs


def _typical_head(candidate: CandidateNetwork, exit_point: int) -> str:
    heads = sorted(candidate.heads_at(exit_point), key=lambda head: head.macs)
    return heads[len(heads) // 2].name


def _header(graph_set: GraphSet, library: Library, effort: profile.Effort) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "library": f"{library.name} {library.version}",
        "machine": {name: describe_machine()[name] for name in ("cpu", "cores")},
        "graphs": {name: spec.sha256 for name, spec in sorted(graph_set.graphs.items())},
        "effort": repr(effort),
    }


class _Samples:
    """Visits on disk, one JSON line each behind a header; a half-written or damaged line is dropped."""

    def __init__(self, path: Path, header: dict[str, Any], names: Collection[str]) -> None:
        self.path = path
        self.names = names
        self.visits: dict[str, list[tuple[float, ...]]] = {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        first, *lines = text.splitlines() or [""]
        kept = [json.dumps(header)]
        if first == kept[0]:
            kept += [line for line in lines if self._take(line)]
        with files.replaced(path) as temporary:
            temporary.write_text("\n".join(kept) + "\n", encoding="utf-8")

    def _take(self, line: str) -> bool:
        try:
            content = json.loads(line)
            name, visit = content["graph"], tuple(float(value) for value in content["samples_ms"])
            usable = name in self.names and visit and all(0 <= value < math.inf for value in visit)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return False
        if usable:
            self.visits.setdefault(name, []).append(visit)
        return bool(usable)

    def visited(self) -> dict[str, int]:
        return {name: len(visits) for name, visits in self.visits.items()}

    def append(self, visit: profile.Visit) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"graph": visit.name, "samples_ms": visit.samples_ms}) + "\n")
        self.visits.setdefault(visit.name, []).append(visit.samples_ms)


def _table(
    graph_set: GraphSet, library: Library, device: str, visits: dict[str, list[tuple[float, ...]]]
) -> LatencyTable:
    entries = {}
    spreads = []
    for name, samples in visits.items():
        summary = profile.summarise(samples)
        spreads.append(summary.spread)
        spec = graph_set.graphs.get(name)
        entries[name, "fp32"] = Latency(
            graph=name,
            sha256=spec.sha256 if spec else "",
            precision="fp32",
            mean_ms=summary.mean_ms,
            p50_ms=summary.p50_ms,
            p90_ms=summary.p90_ms,
            p95_ms=summary.p95_ms,
            p99_ms=summary.p99_ms,
            runs=summary.runs,
            source="measured",
        )
    spread = float(np.median(spreads))
    verdict = "steady" if spread <= STEADY_SPREAD else "unstable"
    environment = describe_machine() | {"median_spread": f"{spread:.3f}", "verdict": verdict}
    return LatencyTable(
        device, library.name, library.version, graph_set.candidate.identity, environment, "measured", entries
    )


def describe_machine() -> dict[str, str]:
    """What a measurement on this machine depends on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = named[0] if named else model
    return {
        "cpu": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "load_average": f"{os.getloadavg()[0]:.2f}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
