"""What a search finds whatever the requirement, kept between searches: a folder per key, used only when it is whole."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile import __version__, files
from mess_compile.evaluate import statistics
from mess_compile.latency import table
from mess_compile.runtime.base.errors import InputError
from mess_compile.search import metrics as figures
from mess_compile.search import space
from mess_compile.search.deadline import Clock
from mess_compile.search.exhaustive import enumeration
from mess_compile.search.exhaustive import plan_table as rows_module
from mess_compile.search.exhaustive.plan_table import (
    NO_OPTION,
    ROW,
    HeadDecisions,
    Progress,
    Rows,
    rows_of_plans,
    stages_of_row,
)
from mess_compile.search.metrics import Evidence, figures_of_stages
from mess_compile.search.requirement import Requirement

FORMAT, VERSION = "mess-search", 1
MOST_BYTES = 512 << 20
_CHECKED_ROWS = 3
_CODE = [Path(module.__file__ or "") for module in (enumeration, figures, table, rows_module, space, statistics)]
_KEY = re.compile(r"[0-9a-f]{64}")


def kept_rows(
    evidence: Evidence, requirement: Requirement, progress: Progress, folder: Path | None, clock: Clock | None
) -> Rows:
    """What `rows_of_plans` gives, from `folder` where an earlier search left it; left there for later ones.

    What is damaged, or not of this evidence, is found again. Other settings than the input-dependent one are quick, and
    nothing of them is kept.
    """
    if folder is None or requirement.setting == "anytime" or not requirement.early_exits:
        return rows_of_plans(evidence, requirement, progress, clock)
    key = _key(evidence, requirement)
    rows = _recalled(folder / key, key, evidence)
    if rows is not None:
        with suppress(OSError):
            os.utime(folder / key)  # what was used last is forgotten last
        return rows
    rows = rows_of_plans(evidence, requirement, progress, clock)
    with suppress(OSError):  # a search that cannot be kept is a search all the same
        if not rows.left:
            _keep(folder / key, key, rows)
            _forget_old(folder, key)
    return rows


def _key(evidence: Evidence, requirement: Requirement) -> str:
    """A hash of all that the rows follow from."""
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
        }
    )


def _keep(folder: Path, key: str, rows: Rows) -> None:
    if rows.plans.nbytes > MOST_BYTES // 2:
        return
    names = sorted({head for chain in rows.chains for head in chain})
    number = {name: index for index, name in enumerate(names)}
    chains = np.full((len(rows.chains), max(map(len, rows.chains))), NO_OPTION, np.int32)
    for chain, line in zip(rows.chains, chains, strict=True):
        line[: len(chain)] = [number[head] for head in chain]
    hashes: dict[str, str] = {}
    content = {"key": key, "heads": names, "space": rows.space, "evaluated": rows.evaluated, "sha256": hashes}
    with files.replaced_folder(folder) as temporary:
        for name, array in (("plans", rows.plans), ("chains", chains)):
            data = _npy(array)
            (temporary / f"{name}.npy").write_bytes(data)
            hashes[name] = hashlib.sha256(data).hexdigest()
        files.write_json(temporary / "index.json", FORMAT, VERSION, {**content, "seal": files.sha256_of_json(content)})


def _npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=False)
    return stream.getvalue()


def _recalled(folder: Path, key: str, evidence: Evidence) -> Rows | None:
    """What `_keep` left under this key, None when it is not there or not what was left."""
    try:
        content = files.read_json(folder / "index.json", FORMAT, VERSION, "it is made again")
        sealed = {name: content[name] for name in ("key", "heads", "space", "evaluated", "sha256")}
        if content["key"] != key or content["seal"] != files.sha256_of_json(sealed):
            return None
        plans, chains = (_array(folder / f"{name}.npy", content["sha256"][name]) for name in ("plans", "chains"))
        heads = [tuple(content["heads"][i] for i in line if i != NO_OPTION) for line in chains.tolist()]
        options = HeadDecisions(evidence)
        rows = Rows(tuple(heads), options, plans, int(content["space"]), int(content["evaluated"]))
        return rows if plans.dtype == ROW and _agrees(evidence, rows) else None
    except (InputError, OSError, KeyError, TypeError, ValueError, IndexError):
        return None


def _array(path: Path, sha256: str) -> NDArray[Any]:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path} is damaged")
    array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return array


def _agrees(evidence: Evidence, rows: Rows) -> bool:
    """Whether a few rows, spread over all, have the figures that their plans have."""
    images = evidence.statistics.images
    for index in np.linspace(0, len(rows.plans) - 1, _CHECKED_ROWS).astype(int):
        row = rows.plans[index]
        figures = figures_of_stages(evidence, "input-dependent", stages_of_row(evidence, rows, row))
        if (figures.latency_ms, figures.miou) != (int(row["cost_ns"]) / images / 1e6, row["miou"]):
            return False
    return True


def _forget_old(folder: Path, newest: str) -> None:
    """Remove what was kept longest ago, until the rest is no more than MOST_BYTES."""
    kept = [each for each in folder.iterdir() if _KEY.fullmatch(each.name) and each.is_dir() and each.name != newest]
    spent = _bytes(folder / newest)
    for each in sorted(kept, key=lambda each: each.stat().st_mtime, reverse=True):
        spent += _bytes(each)
        if spent > MOST_BYTES:
            shutil.rmtree(each, ignore_errors=True)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
