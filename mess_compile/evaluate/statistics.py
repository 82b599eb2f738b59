"""Stores exit statistics: confidence and score per image and head, enough for any plan's mIoU, exits and latency."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile import files
from mess_compile.array_types import Ints
from mess_compile.network import BASELINE, BASELINE_ALONE, Gate, GraphSet
from mess_compile.runtime.base import decode
from mess_compile.runtime.base.errors import InputError, StaleError
from mess_compile.runtime.base.policy import MORE_ROWS, PolicyRow, plain_values
from mess_compile.runtime.bundle.manifest import LABELS, TRUTHS
from mess_compile.runtime.serve.scoring import score_predictions

WHOLE = 10**9
"""Shares of pixels are counted in whole billionths, so that their sums are exact in any order."""
_REMEDY = "run `mess-compile evaluate`"
_BLOCK = 256
_ARRAYS = {
    "thresholds": np.float32,
    "counts": np.int32,
    "intersection": np.int64,
    "predicted": np.int64,
    "labelled": np.int64,
}
CLASS_COUNTS = "class_counts"
"""The array that evaluations by the gates of earlier releases lack."""
_TEXTS = ("network", "precision", "device", "library", "split")


@dataclass(frozen=True, eq=False)
class ExitStatistics:
    """The confidences and scores of one recipe's exits, per image.

    `cells` is each head's feature-map size, `thresholds` (T, K); `counts` (n, heads, T) are the confident cells per
    threshold, `class_counts` (n, heads, T + 2, K) what the gate counts by class, in uint16 where the cells fit, or None
    of a gate that counts sums; `intersection` and `predicted` (n, scored, K) and `labelled` (n, K) are pixels per class
    at the frame's own size, without ignored pixels. `group` is the image's sequence; `precision` names the recipe,
    `network` is the identity of its graphs, `baseline_alone` that of the baseline trained alone, or None. `final_head`
    is the head whose labels the graph `BASELINE` gives; it is not stored, since it follows from the network. `truth` is
    what `labelled` counts: LABELS, or OWN_OUTPUT. For a search `counts` also has the `policy_rows`, each at its number:
    see `policies`.
    """

    heads: tuple[str, ...]
    classes: tuple[str, ...]
    cells: tuple[int, ...]
    thresholds: NDArray[np.float32]
    counts: NDArray[np.int32]
    intersection: Ints
    predicted: Ints
    labelled: Ints
    image_id: tuple[str, ...]
    group: tuple[str, ...]
    network: str
    gate: Gate
    precision: str
    device: str
    library: str
    split: str
    baseline_alone: str | None = None
    final_head: str | None = None
    truth: str = LABELS
    class_counts: NDArray[Any] | None = None
    policy_rows: tuple[PolicyRow, ...] = ()

    def __repr__(self) -> str:
        return f"<exit statistics of {self.images} images of {self.split}: {len(self.heads)} heads, {self.precision}>"

    @property
    def images(self) -> int:
        return len(self.image_id)

    @property
    def scored(self) -> tuple[str, ...]:
        """The heads, and the baseline trained alone, which has pixels but no counts."""
        return self.heads if self.baseline_alone is None else (*self.heads, BASELINE_ALONE)

    def head_index(self, head: str) -> int:
        """The index of a head among the scored heads, `BASELINE_ALONE` being the last. Raises InputError.

        `BASELINE` is scored as the final head.
        """
        name = self.final_head if head == BASELINE and self.final_head is not None else head
        if name not in self.scored:
            raise InputError(f"the evaluation has no head {head!r}: {_REMEDY}")
        return self.scored.index(name)

    def select(self, indices: Sequence[int]) -> ExitStatistics:
        """The statistics of these images, in this order."""
        chosen = np.asarray(indices, dtype=np.intp)
        return dataclasses.replace(
            self,
            counts=self.counts[chosen],
            class_counts=None if self.class_counts is None else self.class_counts[chosen],
            intersection=self.intersection[chosen],
            predicted=self.predicted[chosen],
            labelled=self.labelled[chosen],
            image_id=tuple(self.image_id[i] for i in chosen),
            group=tuple(self.group[i] for i in chosen),
        )


@dataclass(frozen=True)
class _StatisticsDocument:
    """The content of `statistics.json`; `sha256` is by array. The first releases wrote no `baseline_alone`."""

    network: str
    precision: str
    device: str
    library: str
    split: str
    baseline_alone: str | None = dataclasses.field(default=None, kw_only=True, metadata=decode.OPTIONAL)
    heads: tuple[str, ...]
    classes: tuple[str, ...]
    cells: tuple[int, ...]
    image_id: tuple[str, ...]
    group: tuple[str, ...]
    gate: Gate
    sha256: dict[str, str]
    truth: str = dataclasses.field(default=LABELS, metadata=decode.entry(optional=True, check=decode.one_of(TRUTHS)))


def miou(intersection: Ints, predicted: Ints, labelled: Ints) -> float:
    """mIoU in percent of (K,) pixel sums over a set, over the classes that have labelled pixels.

    Summed from the first class to the last, so that every implementation rounds alike. Raises InputError when no
    class has labelled pixels.
    """
    present = np.flatnonzero(labelled)
    if not present.size:
        raise InputError(
            "mIoU is undefined, since no image has a labelled pixel outside the ignored classes: check labels and "
            f"classes.txt, then {_REMEDY}"
        )
    total = 0.0
    for k in present:
        total += float(intersection[k]) / float(predicted[k] + labelled[k] - intersection[k])
    return 100.0 * (total / present.size)


def class_iou(intersection: Ints, predicted: Ints, labelled: Ints) -> NDArray[np.float64]:
    """IoU in percent (K,) of pixel sums (K,) over a set; nan for a class without labelled pixels."""
    union = np.where(labelled > 0, predicted + labelled - intersection, 1).astype(np.float64)
    return np.where(labelled > 0, 100.0 * (intersection / union), np.nan)


def label_counts(found: NDArray[np.uint8], labels: NDArray[np.uint8], classes: int) -> Ints:
    """Intersection, predicted and labelled pixels of each class, (3, K), of labels found at any size."""
    score = score_predictions([(None, found)], labels, labels < classes, classes)
    return np.stack([score.intersection[0], score.predicted[0], score.labelled])


def changed_share(wrong: Any, labelled: Any) -> Any:
    """The share of `labelled` pixels that are `wrong`, in billionths, rounded half up; 0 without labelled pixels."""
    whole = np.maximum(1, labelled)
    return (wrong * WHOLE + whole // 2) // whole


def changed_shares(statistics: ExitStatistics) -> Ints:
    """The share (n, scored) of each image's labelled pixels that a head labels otherwise, in billionths."""
    labelled = np.asarray(statistics.labelled).sum(axis=1, dtype=np.int64)[:, None]
    shares: Ints = changed_share(labelled - np.asarray(statistics.intersection).sum(axis=2, dtype=np.int64), labelled)
    return shares


def head_miou(statistics: ExitStatistics, head: str) -> float:
    """mIoU in percent when every image leaves at `head`, or runs on the baseline trained alone."""
    return miou(*_head_pixels(statistics, head))


def head_class_iou(statistics: ExitStatistics, head: str) -> NDArray[np.float64]:
    """IoU in percent (K,) when every image leaves at `head`, or runs on the baseline trained alone."""
    return class_iou(*_head_pixels(statistics, head))


def _head_pixels(statistics: ExitStatistics, head: str) -> tuple[Ints, Ints, Ints]:
    """Intersection, predicted and labelled pixels (K,) of one head on all images."""
    index = statistics.head_index(head)
    return (
        statistics.intersection[:, index].sum(axis=0),
        statistics.predicted[:, index].sum(axis=0),
        statistics.labelled.sum(axis=0),
    )


def merge(shards: Sequence[ExitStatistics]) -> ExitStatistics:
    """One set of statistics from shards of the same recipe, with their images in the order given.

    Raises InputError when a shard is of another recipe or two shards have the same image.
    """
    if not shards:
        raise InputError("there are no statistics to merge")
    first = shards[0]
    for shard in shards[1:]:
        for field in ("heads", "classes", "cells", "gate", "baseline_alone", "truth", *_TEXTS):
            if getattr(shard, field) != getattr(first, field):
                raise InputError(f"cannot merge statistics whose {field} differ; evaluate all shards alike")
    ids = [image for shard in shards for image in shard.image_id]
    twice = sorted({image for image in ids if ids.count(image) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        raise InputError(f"cannot merge statistics: image {twice[0]} is in more than one shard")
    return dataclasses.replace(
        first,
        counts=np.concatenate([shard.counts for shard in shards]),
        class_counts=_merged_class_counts(shards),
        intersection=np.concatenate([shard.intersection for shard in shards]),
        predicted=np.concatenate([shard.predicted for shard in shards]),
        labelled=np.concatenate([shard.labelled for shard in shards]),
        image_id=tuple(ids),
        group=tuple(group for shard in shards for group in shard.group),
    )


def _merged_class_counts(shards: Sequence[ExitStatistics]) -> NDArray[Any] | None:
    counts = [shard.class_counts for shard in shards if shard.class_counts is not None]
    return np.concatenate(counts) if len(counts) == len(shards) else None


def stacked_counts(counts: Sequence[NDArray[np.int32]]) -> dict[str, Any]:
    """The counts of images, (heads, T) or by class (heads, T + 2, K), as arguments of `ExitStatistics`."""
    whole = np.stack(counts)
    if whole.ndim < 4:
        return {"counts": whole}
    narrow = np.uint16 if whole.max(initial=0) <= np.iinfo(np.uint16).max else np.int32
    return {"counts": plain_values(whole), CLASS_COUNTS: whole.astype(narrow)}


def check_statistics_current(statistics: ExitStatistics, graph_set: GraphSet) -> None:
    """Raises StaleError when `statistics` are of another network, recipe, baseline, gate or heads than `graph_set`.

    They may lack heads that have no engine on the device, and on a device other than this machine the baseline. A gate
    of an earlier release counts the same cells, without classes.
    """
    candidate = graph_set.candidate
    differs = {
        "recipe": statistics.precision != graph_set.recipe,
        "network": statistics.network != graph_set.identity,
        "baseline": statistics.baseline_alone != graph_set.baseline_alone
        and not (statistics.baseline_alone is None and statistics.device != "host"),
        "gate": replace(statistics.gate, by_class=graph_set.gate.by_class) != graph_set.gate,
        "heads": statistics.heads != tuple(h.name for h in candidate.heads if h.name in statistics.heads),
        "classes": statistics.classes != candidate.classes,
    }
    for what, different in differs.items():
        if different:
            raise StaleError(f"the evaluation is of another {what} than {graph_set.root}: {_REMEDY}")


def write_statistics(folder: Path, statistics: ExitStatistics) -> None:
    """Write `statistics.json` and one `.npy` per array; the old folder is replaced when the new one is complete."""
    with files.replaced_folder(folder) as temporary:
        arrays = {}
        for name, array in _arrays(statistics):
            path = temporary / f"{name}.npy"
            _write_array(path, array)
            arrays[name] = files.sha256_of_file(path)
        files.write_json(temporary / "statistics.json", "mess-statistics", 1, _to_json(statistics, arrays))


def statistics_content_sha256(statistics: ExitStatistics) -> str:
    """A hash of all that the statistics hold."""
    arrays = {name: hashlib.sha256(array.data).hexdigest() for name, array in _arrays(statistics)}
    rows = {"policy_rows": [asdict(row) for row in statistics.policy_rows]} if statistics.policy_rows else {}
    return files.sha256_of_json({**_to_json(statistics, arrays), **rows})


def _arrays(statistics: ExitStatistics) -> Iterator[tuple[str, NDArray[Any]]]:
    """Each array that is stored, with its name."""
    for name, dtype in _ARRAYS.items():
        yield name, np.ascontiguousarray(getattr(statistics, name), dtype=dtype)
    if statistics.class_counts is not None:
        yield CLASS_COUNTS, np.ascontiguousarray(statistics.class_counts)


def _to_json(statistics: ExitStatistics, arrays: dict[str, str]) -> dict[str, Any]:
    content: dict[str, Any] = {name: getattr(statistics, name) for name in (*_TEXTS, "baseline_alone")}
    for name in ("heads", "classes", "cells", "image_id", "group"):
        content[name] = list(getattr(statistics, name))
    truth = {} if statistics.truth == LABELS else {"truth": statistics.truth}  # older plans name hashes without it
    gate = asdict(statistics.gate)
    if not statistics.gate.by_class:
        del gate["by_class"]
    return {**content, **truth, "gate": gate, "sha256": arrays}


def _write_array(path: Path, array: NDArray[Any]) -> None:
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
        stream.write(array.reshape(-1).view(np.uint8).data)  # numpy's own write hides the system's error


def read_statistics(folder: Path) -> ExitStatistics:
    """Read what `write_statistics` wrote; arrays are memory-mapped. Raises InputError when missing or damaged."""
    files.recovered(folder)
    path = folder / "statistics.json"
    content = files.read_json(path, "mess-statistics", 1, _REMEDY)
    document: _StatisticsDocument = files.decode_document(path, _StatisticsDocument, content, _REMEDY)
    names = (*_ARRAYS, *([CLASS_COUNTS] if document.gate.by_class else ()))
    arrays = {name: _read_array(folder / f"{name}.npy", document.sha256) for name in names}
    statistics: ExitStatistics = files.decoded(path, _REMEDY, lambda: _checked_statistics(document, arrays))
    return statistics


def _read_array(path: Path, hashes: dict[str, str]) -> Any:
    if not path.is_file():
        raise InputError(f"{path} does not exist: {_REMEDY}")
    if files.sha256_of_file(path) != hashes.get(path.stem):
        raise InputError(f"{path} is damaged (its bytes are not those that were written): {_REMEDY}")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _checked_statistics(document: _StatisticsDocument, arrays: dict[str, Any]) -> ExitStatistics:
    content = {
        each.name: getattr(document, each.name) for each in dataclasses.fields(document) if each.name != "sha256"
    }
    statistics = ExitStatistics(**arrays, **content)
    _check_shapes(statistics)
    return statistics


def _check_shapes(statistics: ExitStatistics) -> None:
    n, heads, classes = statistics.images, len(statistics.heads), len(statistics.classes)
    thresholds, scored = len(statistics.gate.thresholds), len(statistics.scored)
    expected = {
        "thresholds": (thresholds, classes),
        "counts": (n, heads, thresholds),
        "intersection": (n, scored, classes),
        "predicted": (n, scored, classes),
        "labelled": (n, classes),
    }
    for name, shape in expected.items():
        array = getattr(statistics, name)
        if array.shape != shape or array.dtype != _ARRAYS[name]:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, not {np.dtype(_ARRAYS[name])} {shape}")
    _check_class_counts(statistics)
    if len(statistics.group) != n or len(statistics.cells) != heads:
        raise ValueError("the numbers of image ids and groups, or of heads and cells, differ")
    if min(statistics.cells, default=1) < 1:
        raise ValueError(f"cells {statistics.cells} are not positive")
    _check_values(statistics)


def _check_class_counts(statistics: ExitStatistics) -> None:
    found = statistics.class_counts
    if found is None:
        return
    shape = (*statistics.counts.shape[:2], len(statistics.gate.thresholds) + MORE_ROWS, len(statistics.classes))
    if found.shape != shape or found.dtype not in (np.uint16, np.int32):
        raise ValueError(f"{CLASS_COUNTS} is {found.dtype} {found.shape}, not uint16 or int32 {shape}")
    for start in range(0, statistics.images, _BLOCK):
        part = slice(start, start + _BLOCK)
        if (found[part] < 0).any() or (plain_values(found[part]) != statistics.counts[part]).any():
            raise ValueError("the counts by class do not add up to the confident cells")


def _check_values(statistics: ExitStatistics) -> None:
    """Raises ValueError for values that no count can have."""
    if not np.isfinite(statistics.thresholds).all():
        raise ValueError("a threshold is not finite")
    if (statistics.counts < 0).any() or (statistics.counts > np.array(statistics.cells, np.int32)[:, None]).any():
        raise ValueError("a count of confident cells is negative or above the head's number of cells")
    for start in range(0, statistics.images, _BLOCK):
        part = slice(start, start + _BLOCK)
        right, most = statistics.intersection[part], statistics.labelled[part, None]
        if (right < 0).any() or (right > np.minimum(statistics.predicted[part], most)).any():
            raise ValueError("a class has more correct pixels than predicted or labelled ones")
