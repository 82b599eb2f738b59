"""What `bench` last measured of a plan, kept in the workspace as `bench/<device>.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mess_compile import files
from mess_compile.runtime.manifest import Plan

if TYPE_CHECKING:
    from mess_compile.bench import Bench

COLUMNS = ("baseline", "predicted", "replayed", "measured")
_REMEDY = "run `mess-compile bench BUNDLE --data DIR`"


@dataclass(frozen=True)
class BenchColumn:
    """mIoU in percent, mean latency and workload, share of images per exit."""

    name: str
    miou: float
    latency_ms: float
    gmacs: float
    exit_rates: tuple[float, ...]


@dataclass(frozen=True)
class KeptBench:
    """`heads` and `cuts` tell which plan it was; `tuned_on` counts the images that the plan was chosen on."""

    bundle: str
    split: str
    images: int
    tuned_on: int
    passes: int
    baseline_name: str
    columns: tuple[BenchColumn, ...]
    latency_ratio: float
    latency_ratio_range: tuple[float, float]
    disagreements: int
    heads: tuple[str, ...]
    cuts: tuple[int | None, ...]


def write_bench(path: Path, found: Bench, plan: Plan) -> None:
    """Keep what was found of `plan`; all of it or nothing."""
    stages = [{"head": stage.head, "cut": stage.cut} for stage in plan.stages]
    files.write_json(path, "mess-bench", 1, {"bench": asdict(found), "stages": stages})


def read_bench(path: Path) -> KeptBench:
    """Read what `write_bench` wrote. Raises InputError when it is missing or damaged."""
    content = files.read_json(path, "mess-bench", 1, _REMEDY)
    kept: KeptBench = files.decoded(path, _REMEDY, lambda: _kept(content["bench"], content["stages"]))
    return kept


def _kept(found: dict[str, Any], stages: list[dict[str, Any]]) -> KeptBench:
    low, high = map(float, found["latency_ratio_range"])
    return KeptBench(
        bundle=str(found["bundle"]),
        split=str(found["split"]),
        images=int(found["images"]),
        tuned_on=int(found["tuned_on"]),
        passes=int(found["passes"]),
        baseline_name=str(found["baseline_name"]),
        columns=tuple(_column(name, found[name]) for name in COLUMNS),
        latency_ratio=float(found["latency_ratio"]),
        latency_ratio_range=(low, high),
        disagreements=len(found["disagreements"]),
        heads=tuple(str(stage["head"]) for stage in stages),
        cuts=tuple(None if stage["cut"] is None else int(stage["cut"]) for stage in stages),
    )


def _column(name: str, content: dict[str, Any]) -> BenchColumn:
    return BenchColumn(
        name=name,
        miou=float(content["miou"]),
        latency_ms=float(content["latency_ms"]),
        gmacs=float(content["gmacs"]),
        exit_rates=tuple(map(float, content["exit_rates"])),
    )
