"""A scripted engine library for tests: graphs are Python functions, time is a counter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np

from mess_compile.runtime.base.errors import EngineError
from mess_compile.runtime.engines.engine import TensorSpec, Timing

Compute = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class FakeGraph:
    """The script of a graph file.

    One run adds `cost_ns` to the library's clock; `device_ns` is the time that device events would report.
    """

    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    compute: Compute
    cost_ns: int = 0
    device_ns: Optional[int] = None
    scratch_bytes: Optional[int] = None


@dataclass
class FakeTensor:
    values: np.ndarray
    valid: bool = True

    def read(self) -> np.ndarray:
        if not self.valid:
            raise EngineError("this tensor was overwritten: its engine has run again since")
        values: np.ndarray = self.values.copy()
        return values


@dataclass
class FakeLibrary:
    """Loads graphs by file stem; `log` lists events as (verb, graph), `now_ns` is the clock.

    When it is `queued`, runs take their time after the call returns, as on a GPU. The cost of a run is looked up in
    `graphs` each time, so a test may change it. At most `room` engines fit into its memory.
    """

    graphs: Mapping[str, FakeGraph]
    name: str = "fake"
    version: str = "1"
    builds_for: Optional[Tuple[str, Tuple[int, int]]] = None
    concurrent: bool = False
    log: List[Tuple[str, str]] = field(default_factory=list)
    now_ns: int = 0
    queued: bool = False
    pending_ns: int = 0
    room: int = 1000
    held: int = 0

    def clock_ns(self) -> int:
        return self.now_ns

    def load(self, path: Path) -> FakeEngine:
        if path.stem not in self.graphs:
            raise EngineError(f"there is no graph {path}")
        if self.held == self.room:
            raise EngineError(f"no memory for {path}")
        self.held += 1
        self.log.append(("load", path.stem))
        return FakeEngine(self, path.stem, self.graphs[path.stem])

    def upload(self, array: np.ndarray) -> FakeTensor:
        return FakeTensor(array.copy())

    def download(self, tensor: FakeTensor) -> np.ndarray:
        self.synchronise()
        return tensor.read()

    def synchronise(self) -> None:
        self.now_ns += self.pending_ns
        self.pending_ns = 0

    def close(self) -> None:
        self.log.append(("close", ""))


class FakeEngine:
    """Checks what a real engine would: names, shapes, dtypes, and that outputs are used before they are overwritten."""

    def __init__(self, library: FakeLibrary, name: str, graph: FakeGraph) -> None:
        self._library, self._name, self._graph = library, name, graph
        self._closed = False
        self._last: List[FakeTensor] = []
        self.inputs = {spec.name: spec for spec in graph.inputs}
        self.outputs = {spec.name: spec for spec in graph.outputs}
        self.scratch_bytes = graph.scratch_bytes

    def run(self, feeds: Mapping[str, FakeTensor]) -> Dict[str, FakeTensor]:
        if self._closed or set(feeds) != set(self.inputs):
            raise EngineError(f"{self._name}: closed, or fed {sorted(feeds)} for {sorted(self.inputs)}")
        arrays = {name: tensor.read() for name, tensor in feeds.items()}
        for name, array in arrays.items():
            spec = self.inputs[name]
            if (str(array.dtype), array.shape) != (spec.dtype, spec.shape):
                raise EngineError(f"{self._name}: {name} is {array.dtype} {array.shape}, not {spec.dtype} {spec.shape}")
        for tensor in self._last:
            tensor.valid = False
        self._library.log.append(("run", self._name))
        self._library.pending_ns += self._library.graphs[self._name].cost_ns
        if not self._library.queued:
            self._library.synchronise()
        results = {name: FakeTensor(values) for name, values in self._graph.compute(arrays).items()}
        self._last = list(results.values())
        return results

    def run_timed(self, feeds: Mapping[str, FakeTensor]) -> Timing:
        self._library.synchronise()
        start = self._library.now_ns
        self.run(feeds)
        self._library.synchronise()
        device_ns = self._graph.device_ns
        return Timing((self._library.now_ns - start) / 1e6, None if device_ns is None else device_ns / 1e6)

    def close(self) -> None:
        self._closed = True
        self._library.held -= 1
        self._library.log.append(("close", self._name))
