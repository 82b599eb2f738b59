"""Stores the last result of `bench` for a device as `bench/<device>.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from mess_compile import files
from mess_compile.bench.run import Bench, Column
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


@dataclass(frozen=True)
class _StageDocument:
    head: str
    cut: int | None


@dataclass(frozen=True)
class _BenchDocument:
    """The content of the file."""

    bench: Bench
    stages: tuple[_StageDocument, ...]


def read_bench(path: Path) -> StoredBench:
    """Read what `write_bench` wrote. Raises InputError when it is missing or damaged."""
    content = files.read_json(path, "mess-bench", VERSION, _REMEDY)
    found: _BenchDocument = files.decode_document(path, _BenchDocument, content, _REMEDY)
    heads, cuts = (tuple(getattr(stage, name) for stage in found.stages) for name in ("head", "cut"))
    return StoredBench(found.bench, heads, cuts)
