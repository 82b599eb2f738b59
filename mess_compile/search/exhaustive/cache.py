"""Plan tables cached between searches, since they do not depend on bounds: a folder per key, used only when intact."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile import __version__, files
from mess_compile.evaluate import statistics
from mess_compile.latency import table
from mess_compile.runtime.base.errors import InputError
from mess_compile.search import metrics, space
from mess_compile.search.context import SearchContext
from mess_compile.search.exhaustive import enumeration, plan_table
from mess_compile.search.exhaustive.enumeration import BY_MIOU, Selection
from mess_compile.search.exhaustive.plan_table import (
    NO_OPTION,
    PLAN_DTYPE,
    HeadDecisions,
    PlanTable,
    enumerate_plans,
    stages_of_row,
)
from mess_compile.search.metrics import Evidence, figures_of_stages
from mess_compile.search.requirement import Requirement

FORMAT, VERSION = "mess-search", 1
MOST_BYTES = 512 << 20
_CHECKED_PLANS = 3
_CODE = [Path(module.__file__ or "") for module in (enumeration, metrics, table, plan_table, space, statistics)]
_KEY = re.compile(r"[0-9a-f]{64}")


def cached_plan_table(evidence: Evidence, context: SearchContext, selection: Selection = BY_MIOU) -> PlanTable:
    """The result of `enumerate_plans`, from the context's folder where an earlier search stored it; stored there for
    later ones.

    What is damaged, or of other evidence, is computed again. Settings other than the input-dependent one are quick, and
    nothing of them is stored.
    """
    requirement, folder = context.requirement, context.cache_folder
    if folder is None or requirement.setting == "anytime" or not requirement.early_exits:
        return enumerate_plans(evidence, context, selection)
    key = _key(evidence, requirement, selection)
    found = _load(folder / key, key, evidence)
    if found is not None:
        with suppress(OSError):
            os.utime(folder / key)  # the table that was used last is evicted last
        return found
    found = enumerate_plans(evidence, context, selection)
    with suppress(OSError):  # a folder that cannot be written only costs time
        if not found.skipped:
            _store(folder / key, key, found)
            _evict(folder, key)
    return found


def _key(evidence: Evidence, requirement: Requirement, selection: Selection) -> str:
    """A hash over everything that a plan table depends on."""
    graph_set = evidence.graph_set
    return files.sha256_of_json(
        {
            "code": [__version__, VERSION, *map(files.sha256_of_file, _CODE)],
            "candidate": asdict(graph_set.candidate),
            "graphs": [asdict(spec) for spec in graph_set.graphs.values()],
            "recipe": [graph_set.recipe, graph_set.identity],
            "latency table": evidence.table_sha256,
            "statistics": evidence.statistics_sha256,
            "early exits": requirement.early_exits,
            "selection": repr(selection),
        }
    )


_AGAIN = "it is computed again"


@dataclass(frozen=True)
class _IndexDocument:
    """The content of `index.json`: `heads` by their number in the chains, `sha256` by array, `seal` over the rest."""

    key: str
    heads: tuple[str, ...]
    space: int
    evaluated: int
    sha256: dict[str, str]
    seal: str


def _store(folder: Path, key: str, found: PlanTable) -> None:
    if found.plans.nbytes > MOST_BYTES // 2:
        return
    names = sorted({head for chain in found.chains for head in chain})
    number = {name: index for index, name in enumerate(names)}
    chains = np.full((len(found.chains), max(map(len, found.chains))), NO_OPTION, np.int32)
    for chain, line in zip(found.chains, chains, strict=True):
        line[: len(chain)] = [number[head] for head in chain]
    hashes: dict[str, str] = {}
    content = {"key": key, "heads": names, "space": found.space, "evaluated": found.evaluated, "sha256": hashes}
    with files.replaced_folder(folder) as temporary:
        for name, array in (("plans", found.plans), ("chains", chains)):
            data = _npy(array)
            (temporary / f"{name}.npy").write_bytes(data)
            hashes[name] = hashlib.sha256(data).hexdigest()
        files.write_json(temporary / "index.json", FORMAT, VERSION, {**content, "seal": files.sha256_of_json(content)})


def _npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=False)
    return stream.getvalue()


def _load(folder: Path, key: str, evidence: Evidence) -> PlanTable | None:
    """What `_store` wrote under this key; None when it is missing, damaged or of other evidence."""
    try:
        content = files.read_json(folder / "index.json", FORMAT, VERSION, _AGAIN)
        index: _IndexDocument = files.decode_document(folder / "index.json", _IndexDocument, content, _AGAIN)
        sealed = {name: value for name, value in asdict(index).items() if name != "seal"}
        if index.key != key or index.seal != files.sha256_of_json(sealed):
            return None
        plans, chains = (_array(folder / f"{name}.npy", index.sha256[name]) for name in ("plans", "chains"))
        heads = [tuple(index.heads[i] for i in line if i != NO_OPTION) for line in chains.tolist()]
        found = PlanTable(tuple(heads), HeadDecisions(evidence), plans, index.space, index.evaluated)
        return found if plans.dtype == PLAN_DTYPE and _agrees(evidence, found) else None
    except (InputError, OSError, KeyError, TypeError, ValueError, IndexError):
        return None


def _array(path: Path, sha256: str) -> NDArray[Any]:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path} is damaged")
    array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return array


def _agrees(evidence: Evidence, found: PlanTable) -> bool:
    """Whether a few plans, spread over the table, have the figures that are computed for them."""
    images = evidence.statistics.images
    for index in np.linspace(0, len(found.plans) - 1, _CHECKED_PLANS).astype(int):
        plan = found.plans[index]
        figures = figures_of_stages(evidence, "input-dependent", stages_of_row(evidence, found, plan))
        if (figures.latency_ms, figures.miou) != (int(plan["cost_ns"]) / images / 1e6, plan["miou"]):
            return False
    return True


def _evict(folder: Path, newest: str) -> None:
    """Remove the tables that were used longest ago, until the others take at most MOST_BYTES."""
    others = [each for each in folder.iterdir() if _KEY.fullmatch(each.name) and each.is_dir() and each.name != newest]
    spent = _bytes(folder / newest)
    for each in sorted(others, key=lambda each: each.stat().st_mtime, reverse=True):
        spent += _bytes(each)
        if spent > MOST_BYTES:
            shutil.rmtree(each, ignore_errors=True)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
