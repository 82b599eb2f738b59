"""Names the file that an engine library loads for each graph: the ONNX file, or an engine built from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mess_compile.network import GraphSet, head_graph_name, segment_name
from mess_compile.runtime.base.errors import InputError


@dataclass(frozen=True)
class EngineFiles:
    """A file for every graph that runs; `failed` says why each of the others has none."""

    graph_set: GraphSet
    paths: dict[str, Path]
    failed: dict[str, str] = field(default_factory=dict)

    def path(self, graph: str) -> Path:
        """Raises InputError for a graph that has no file, with the builder's error."""
        if graph not in self.paths:
            raise InputError(
                f"{graph} has no engine: {self.failed.get(graph, 'this network has no graph of that name')}"
            )
        return self.paths[graph]

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads whose head graph, output graph and segments up to them have files, in the network's order."""
        candidate, reached = self.graph_set.candidate, set(self.sources)
        return tuple(
            head.name
            for head in candidate.heads
            if head.exit_point in reached
            and head_graph_name(head.name) in self.paths
            and candidate.output_of(head) in self.paths
        )

    @property
    def sources(self) -> dict[int, int]:
        """Exit point -> start of the shortest segment that leads to it from a reachable point; 0 is the image.

        Unreachable exit points are missing.
        """
        found: dict[int, int] = {}
        for b in range(1, len(self.graph_set.candidate.exit_points) + 1):
            starts = [a for a in (*found, 0) if segment_name(a, b) in self.paths]
            if starts:
                found[b] = max(starts)
        return found


def plain_files(graph_set: GraphSet) -> EngineFiles:
    """The ONNX files themselves, as ONNX Runtime loads them."""
    return EngineFiles(graph_set, {name: graph_set.path(name) for name in graph_set.graphs})
