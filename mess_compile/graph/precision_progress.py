"""Stores on disk which graphs passed in which precision; an interrupted choice of precisions continues there."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from mess_compile import files
from mess_compile.graph.store import WEIGHTS, stored_weights
from mess_compile.network import GraphSpec, check_tensors
from mess_compile.runtime.base.errors import InputError

_FORMAT, _VERSION = "mess-settling", 1


@dataclass(frozen=True)
class TriedGraph:
    """A graph in one precision: why it must not be used, or its description."""

    reason: str | None
    spec: GraphSpec | None


@dataclass(frozen=True)
class TriedGraphs:
    """Results in `folder` by key, a hash of everything that decides them; None stores nothing.

    Graphs that passed are stored with their weights. Damaged results are ignored.
    """

    folder: Path | None

    def take(self, key: str, target: Path) -> TriedGraph | None:
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
        for weight in stored_weights(source):
            if not weight.is_file() or files.sha256_of_file(weight) != weight.name:
                return False
            _copy(weight, target / WEIGHTS / weight.name)
        shutil.copyfile(source, target / spec.path)
        return True

    def store(self, key: str, tried: TriedGraph, source: Path) -> None:
        """Store a result, with the file in `source` of a graph that passed; all of it or nothing."""
        if self.folder is None:
            return
        if tried.spec is not None:
            for weight in stored_weights(source / tried.spec.path):
                _copy(weight, self.folder / WEIGHTS / weight.name)
            with files.replaced(self.folder / f"{key}.onnx") as temporary:
                shutil.copyfile(source / tried.spec.path, temporary)
        spec = None if tried.spec is None else asdict(tried.spec)
        files.write_json(self.folder / f"{key}.json", _FORMAT, _VERSION, {"reason": tried.reason, "spec": spec})


def _copy(source: Path, target: Path) -> None:
    """Copies, since ONNX's checker refuses weights that two folders share by a hard link."""
    if not target.exists():
        with files.replaced(target) as temporary:
            shutil.copyfile(source, temporary)


def _read(path: Path) -> TriedGraph:
    content = files.read_json(path, _FORMAT, _VERSION, "")
    tried: TriedGraph = files.decode_document(path, TriedGraph, content, "", _check)
    return tried


def _check(tried: TriedGraph) -> None:
    if (tried.reason is None) == (tried.spec is None):
        raise InputError("it needs either a reason or a spec")
    if tried.spec is not None:
        check_tensors(tried.spec)
