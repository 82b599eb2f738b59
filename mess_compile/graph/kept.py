"""What a settling of precisions has found out so far, on disk: one that is broken off continues there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mess_compile import files
from mess_compile.candidates import GraphSpec, TensorSpec
from mess_compile.graph.store import WEIGHTS, read_model
from mess_compile.runtime.errors import InputError

_FORMAT, _VERSION = "mess-settling", 1


@dataclass(frozen=True)
class Tried:
    """A graph in one precision: why it must not be used, or what was written of it."""

    reason: str | None
    spec: GraphSpec | None


@dataclass(frozen=True)
class Kept:
    """Results by a hash over all that decides them, in `folder`; with None nothing is kept.

    Graphs that pass are there with their weights. What is damaged is none.
    """

    folder: Path | None

    def key(self, *decides: object) -> str:
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def take(self, key: str, target: Path) -> Tried | None:
        """An earlier result; a graph that passed is put into `target`, as `write_graph` would."""
        if self.folder is None:
            return None
        try:
            tried = _read(self.folder / f"{key}.json")
        except InputError:
            return None
        if tried.spec is not None and not self._put(key, tried.spec, target):
            return None
        return tried

    def _put(self, key: str, spec: GraphSpec, target: Path) -> bool:
        assert self.folder is not None
        source = self.folder / f"{key}.onnx"
        if not source.is_file() or files.sha256_of_file(source) != spec.sha256:
            return False
        for weight in _weights(source):
            if not (self.folder / weight).is_file() or files.sha256_of_file(self.folder / weight) != Path(weight).name:
                return False
            _copy(self.folder / weight, target / weight)
        shutil.copyfile(source, target / spec.path)
        return True

    def keep(self, key: str, tried: Tried, source: Path) -> None:
        """Keep a result, and of a graph that passed the file in `source`; whole or not at all."""
        if self.folder is None:
            return
        if tried.spec is not None:
            for weight in _weights(source / tried.spec.path):
                _copy(source / weight, self.folder / weight)
            with files.replaced(self.folder / f"{key}.onnx") as temporary:
                shutil.copyfile(source / tried.spec.path, temporary)
        spec = None if tried.spec is None else asdict(tried.spec)
        files.write_json(self.folder / f"{key}.json", _FORMAT, _VERSION, {"reason": tried.reason, "spec": spec})


def _weights(graph: Path) -> Iterator[str]:
    """Where a graph's external data lie, relative to its folder."""
    for tensor in read_model(graph).graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value.startswith(f"{WEIGHTS}/"):
                yield str(entry.value)


def _copy(source: Path, target: Path) -> None:
    """A copy, for ONNX's checker refuses weights that two folders share by a hard link."""
    if not target.exists():
        with files.replaced(target) as temporary:
            shutil.copyfile(source, temporary)


def _read(path: Path) -> Tried:
    content = files.read_json(path, _FORMAT, _VERSION, "")
    tried: Tried = files.decoded(path, "", lambda: _tried(content))
    return tried


def _tried(content: dict[str, Any]) -> Tried:
    reason, spec = content["reason"], content["spec"]
    if spec is None:
        return Tried(str(reason), None)
    inputs, outputs = (tuple(_tensor(tensor) for tensor in spec[name]) for name in ("inputs", "outputs"))
    if Path(spec["path"]).name != spec["path"]:
        raise ValueError(f"path {spec['path']!r}")
    return Tried(None, GraphSpec(**{**spec, "inputs": inputs, "outputs": outputs}))


def _tensor(content: dict[str, Any]) -> TensorSpec:
    return TensorSpec(content["name"], content["dtype"], tuple(content["shape"]))
