"""Stores the last result of `bench` for a device as `bench/<device>.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mess_compile import files
from mess_compile.bench.run import Bench, Column
from mess_compile.runtime.base import decode
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.bundle.manifest import BundlePlan

VERSION = 3
_REMEDY = "run `mess-compile bench BUNDLE --data DIR`"


@dataclass(frozen=True)
class StoredBench:
    """A result, and the plan that it is of, by its `heads` and `cuts`."""

    found: Bench
    heads: tuple[str, ...]
    cuts: tuple[int | None, ...]

    @property
    def columns(self) -> dict[str, Column]:
        """By name, the baseline's first."""
        names = ("baseline", "predicted", "replayed", "measured")
        return {name: getattr(self.found, name) for name in names}


def write_bench(path: Path, found: Bench, plan: BundlePlan) -> None:
    """Store the result of `plan` atomically."""
    stages = [{"head": stage.head, "cut": stage.cut} for stage in plan.stages]
    files.write_json(path, "mess-bench", VERSION, {"bench": asdict(found), "stages": stages})


def read_bench(path: Path) -> StoredBench:
    """Read what `write_bench` wrote. Raises InputError when it is missing or damaged."""
    content = files.read_json(path, "mess-bench", VERSION, _REMEDY)
    stored: StoredBench = files.decoded(path, _REMEDY, lambda: _stored(content["bench"], content["stages"]))
    return stored


def _stored(found: Any, stages: list[dict[str, Any]]) -> StoredBench:
    try:
        bench: Bench = decode.decode(Bench, found, "bench")
    except decode.DecodeError as error:
        raise InputError(str(error)) from error
    cuts = tuple(None if stage["cut"] is None else int(stage["cut"]) for stage in stages)
    return StoredBench(bench, tuple(str(stage["head"]) for stage in stages), cuts)
