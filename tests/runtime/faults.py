"""An engine library that fails on command: it stands before a real one and spoils chosen runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mess_compile.runtime.base.errors import EngineError
from mess_compile.runtime.engines.engine import Engine, Library, Tensor, TensorSpec, Timing

Fault = Callable[[str], str | None]
"""Graph -> what becomes of its next run: None for nothing, "error", or "nan": a head is fed NaN, of which its own
gate must tell, and a segment gives NaN."""


class FaultyLibrary:
    """`library` with faults; `concurrent` False makes the cascade treat it as it would a GPU's."""

    def __init__(self, library: Library, fault: Fault, concurrent: bool = True) -> None:
        self._library, self._fault = library, fault
        self.name, self.version, self.builds_for = library.name, library.version, library.builds_for
        self.concurrent = concurrent
        self.loaded: list[str] = []
        self.closed = False

    def load(self, path: Path) -> FaultyEngine:
        self.loaded.append(path.stem)
        return FaultyEngine(self._library.load(path), path.stem, self._library, self._fault)

    def upload(self, array: np.ndarray[Any, Any]) -> Tensor:
        return self._library.upload(array)

    def download(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        return self._library.download(tensor)

    def synchronise(self) -> None:
        self._library.synchronise()

    def close(self) -> None:
        self.closed = True
        self._library.close()


class FaultyEngine:
    def __init__(self, engine: Engine, name: str, library: Library, fault: Fault) -> None:
        self._engine, self._name, self._library, self._fault = engine, name, library, fault

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        return self._engine.inputs

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        return self._engine.outputs

    @property
    def scratch_bytes(self) -> int | None:
        return self._engine.scratch_bytes

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        fault = self._fault(self._name)
        if fault == "error":
            raise EngineError(f"{self._name} failed, as the test wants")
        if fault == "nan" and "thresholds" in feeds:
            feeds = {name: self._spoilt(tensor, self.inputs[name]) for name, tensor in feeds.items()}
        results = self._engine.run(feeds)
        if fault == "nan" and "thresholds" not in feeds:
            results = {name: self._spoilt(tensor, self.outputs[name]) for name, tensor in results.items()}
        return results

    def _spoilt(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        if spec.dtype != "float32" or spec.name == "thresholds":
            return tensor
        return self._library.upload(np.full(spec.shape, np.nan, np.float32))

    def run_timed(self, feeds: Mapping[str, Tensor]) -> Timing:
        return self._engine.run_timed(feeds)

    def close(self) -> None:
        self._engine.close()
