"""Lists the jobs of a profile: every graph that runs, with the graph that runs before it in a cascade."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mess_compile.engines.files import EngineFiles
from mess_compile.network import BASELINE, head_graph_name, segment_name
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.measure.job_pool import DOWNLOAD, NULL, UPLOAD, Job


def job_name(graph: str, precision: str) -> str:
    return f"{graph}@{precision}"


def job_names(engines: EngineFiles) -> dict[str, str]:
    """Graph -> job, for all graphs that have a file."""
    return {name: job_name(name, engines.graph_set.spec(name).precision) for name in engines.paths}


def without(engines: EngineFiles, failed: Mapping[str, str]) -> EngineFiles:
    """The engines less those of the `failed` jobs (job -> error)."""
    names = job_names(engines)
    paths = {name: path for name, path in engines.paths.items() if names[name] not in failed}
    broken = {name: failed[job] for name, job in names.items() if job in failed}
    return EngineFiles(engines.graph_set, paths, {**engines.failed, **broken})


def profiling_jobs(engines: Sequence[EngineFiles]) -> list[Job]:
    """Every graph that runs, once, with its predecessor in a cascade: the previous frame's output, a segment or a head.

    Raises InputError when no head can be reached.
    """
    jobs: dict[str, Job] = {}
    for each in engines:
        for job in _jobs_of(each) if each.heads else ():
            jobs.setdefault(job.name, job)
    if not jobs:
        each = engines[0]
        raise InputError(f"no head runs in {each.graph_set.recipe}: {'; '.join(each.failed.values())[:300]}")
    return list(jobs.values())


def _jobs_of(engines: EngineFiles) -> Iterator[Job]:
    graph_set, candidate = engines.graph_set, engines.graph_set.candidate
    sources, last = engines.sources, len(engines.graph_set.candidate.exit_points)

    def job(graph: str, predecessor: str | None) -> Job:
        known = predecessor in engines.paths
        return Job(named(graph), engines.paths[graph], named(str(predecessor)) if known else None)

    def named(graph: str) -> str:
        return job_name(graph, graph_set.spec(graph).precision)

    heads = [candidate.head(name) for name in engines.heads]
    typical = {point: _typical([h for h in heads if h.exit_point == point]) for point in {h.exit_point for h in heads}}
    outputs: dict[str, str] = {}
    for point, output in sorted({(head.exit_point, candidate.output_of(head)) for head in heads}):
        alike = [head for head in heads if (head.exit_point, candidate.output_of(head)) == (point, output)]
        outputs[output] = _typical(alike)
    output, head_graph = next(iter(outputs.items()))
    for name in graph_set.baselines:
        if name in engines.paths:
            yield job(name, segment_name(sources.get(last, 0), last))
    for a, b in candidate.segments():
        if segment_name(a, b) in engines.paths and (a == 0 or a in sources):
            before = (typical.get(a) or segment_name(sources[a], a)) if a else output
            yield job(segment_name(a, b), before)
    for head in heads:
        yield job(head_graph_name(head.name), segment_name(sources[head.exit_point], head.exit_point))
    for name, before in outputs.items():
        yield job(name, before)
    yield Job(UPLOAD, None, named(output))
    yield Job(NULL, None, named(head_graph))
    yield Job(DOWNLOAD, None, named(output))


def _typical(heads: Sequence[Any]) -> str:
    ordered = sorted(heads, key=lambda head: head.macs)
    return head_graph_name(ordered[len(ordered) // 2].name)


def reference_of(jobs: Sequence[Job]) -> str:
    """The job that tracks the machine's speed: the first segment, which is short and uses all cores."""
    return next((job.name for job in jobs if job.name.startswith("segment-0-")), jobs[0].name)


def with_feeders(jobs: Sequence[Job], names: Sequence[str]) -> list[str]:
    """The named jobs, the predecessor of each, and all jobs that produce the predecessors' inputs from the image on."""
    by_name = {job.name: job for job in jobs}
    needed = dict.fromkeys(name for name in names if name in by_name)
    fed: set[str] = set()

    def feed(name: str | None) -> None:
        if name is not None and name not in fed:
            fed.add(name)
            needed[name] = None
            if not name.startswith(("segment-0-", BASELINE)):  # these read the image
                feed(by_name[name].predecessor)

    for name in list(needed):
        feed(by_name[name].predecessor)
    return list(needed)
