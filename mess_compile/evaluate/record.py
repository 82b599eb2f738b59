"""Records exit statistics: runs and scores every head, and the baseline trained alone, once per labelled image."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mess_compile.array_types import Pixels
from mess_compile.data.dataset import ALWAYS_IGNORED, DataSet, Item, samples
from mess_compile.engines.files import EngineFiles
from mess_compile.engines.jobs import job_name
from mess_compile.engines.remote_build import built_there
from mess_compile.evaluate.statistics import (
    ExitStatistics,
    check_statistics_current,
    merge,
    read_statistics,
    stacked_counts,
    write_statistics,
)
from mess_compile.network import BASELINE_ALONE, head_graph_name, segment_name, threshold_table
from mess_compile.runtime.base.errors import InputError, MessError
from mess_compile.runtime.bundle.manifest import LABELS
from mess_compile.runtime.engines.engine import Library
from mess_compile.runtime.serve.scoring import HeadEngines, Score, ScoredExits, open_scorer

if TYPE_CHECKING:
    from mess_compile.device.client import PythonSession

BLOCK = 32
"""Images after which results are saved; a remote device holds at most as many images at a time."""
LabelledImage = tuple[str, str, Pixels, Pixels]
"""Image id, group, frame and labels."""
Scoring = Callable[[Iterable[tuple[Pixels, Pixels, NDArray[np.bool_]]]], Iterator[Score]]
"""Frames, labels and masks of the pixels that count -> a score each, in the same order."""


@dataclass(frozen=True)
class _Origin:
    """The engines, library, device, split and truth that statistics come from."""

    engines: EngineFiles
    library: str
    device: str
    split: str
    truth: str = LABELS


def evaluate(
    engines: EngineFiles,
    library: Library,
    images: Iterable[LabelledImage],
    *,
    device: str,
    split: str,
    truth: str = LABELS,
    ignore: frozenset[int] = frozenset({255}),
    progress: Callable[[int], None] = lambda done: None,
) -> ExitStatistics:
    """Run every head that has engines, and the baseline trained alone if there is one, on labelled `images`.

    Frames are uint8 (H, W, 3) of any size, labels uint8 (H, W) of the same size; label values in `ignore` are not
    scored; `truth` says what the labels are. `progress` gets the number of images done. Raises InputError naming the
    image for labels that are out of range or of another size, EngineError when a graph does not run.
    """
    with _scoring_here(engines, library) as score:
        return _evaluated(_Origin(engines, library.name, device, split, truth), score, images, ignore, progress)


def _evaluated(
    origin: _Origin,
    score: Scoring,
    images: Iterable[LabelledImage],
    ignore: frozenset[int],
    progress: Callable[[int], None],
) -> ExitStatistics:
    graph_set, heads = origin.engines.graph_set, origin.engines.heads
    candidate = graph_set.candidate
    classes = len(candidate.classes)
    ids: list[str] = []
    groups: list[str] = []
    scores: list[Score] = []

    def checked() -> Iterator[tuple[Pixels, Pixels, NDArray[np.bool_]]]:
        for image_id, group, frame, labels in images:
            known = countable(image_id, frame, labels, classes, ignore)
            ids.append(image_id)
            groups.append(group)
            yield frame, labels, known

    for each in score(checked()):
        scores.append(each)
        progress(len(scores))
    if not scores:
        raise InputError(f"there are no images to evaluate in split {origin.split!r}")
    return ExitStatistics(
        heads=heads,
        classes=candidate.classes,
        cells=tuple(candidate.cells(candidate.head(head)) for head in heads),
        thresholds=threshold_table(graph_set.gate, classes),
        **stacked_counts([each.counts for each in scores]),
        intersection=np.stack([each.intersection for each in scores]),
        predicted=np.stack([each.predicted for each in scores]),
        labelled=np.stack([each.labelled for each in scores]),
        image_id=tuple(ids),
        group=tuple(groups),
        network=graph_set.identity,
        gate=graph_set.gate,
        precision=graph_set.recipe,
        device=origin.device,
        library=origin.library,
        split=origin.split,
        truth=origin.truth,
        baseline_alone=graph_set.baseline_alone if BASELINE_ALONE in origin.engines.paths else None,
    )


@contextmanager
def _scoring_here(engines: EngineFiles, library: Library) -> Iterator[Scoring]:
    exits, graph_set = _exits(engines), engines.graph_set
    paths = {name: engines.path(name) for name in exits.engines}
    thresholds = threshold_table(graph_set.gate, len(graph_set.candidate.classes))
    with open_scorer(exits, paths, library, thresholds) as scorer:
        yield lambda images: (scorer.score(*image) for image in images)


def _exits(engines: EngineFiles) -> ScoredExits:
    """The graphs that run: every head that can, the segments up to it, and the baseline trained alone.

    Where a segment between neighbours has no engine, a longer one replaces it. Raises InputError when no head runs.
    """
    graph_set, candidate = engines.graph_set, engines.graph_set.candidate
    heads = [candidate.head(name) for name in engines.heads]
    if not heads:
        raise InputError(f"no head runs in {graph_set.recipe}: {'; '.join(engines.failed.values())[:300]}")
    return ScoredExits(
        input_hw=candidate.input_hw,
        classes=len(candidate.classes),
        segments=tuple((a, b, segment_name(a, b)) for b, a in engines.sources.items()),
        heads=tuple(
            HeadEngines(head_graph_name(head.name), head.exit_point, candidate.output_of(head)) for head in heads
        ),
        alone=BASELINE_ALONE if BASELINE_ALONE in engines.paths else None,
        by_class=graph_set.gate.by_class,
    )


@dataclass(frozen=True)
class Share:
    """The blocks of images of one process among several: every `world`-th from `rank`.

    `wait` returns when all processes have called it. `gpu` is the process's own GPU, if there are some.
    """

    rank: int = 0
    world: int = 1
    gpu: int = 0
    wait: Callable[[], None] = lambda: None


def evaluate_data(
    engines: EngineFiles,
    library: Library,
    data: DataSet,
    folder: Path,
    share: Share,
    *,
    device: str,
    progress: Callable[[int], None],
) -> ExitStatistics | None:
    """Evaluate a data set block by block and write its statistics to `folder`; finished blocks survive a killed run.

    Several processes share the folder; the first one merges, the others return None. The bytes written do not depend
    on the number of processes. Raises what `evaluate` does.
    """
    origin = _Origin(engines, library.name, device, data.split, data.truth)
    with _scoring_here(engines, library) as score:
        return _by_blocks(origin, score, data, folder, share, progress)


def build_scored_graphs(session: PythonSession, forms: EngineFiles) -> EngineFiles:
    """Build the graphs of `forms` that statistics need on a device; graphs that do not build are left out.

    When a segment fails, a longer one is built in its place. Raises RemoteError, InputError when no head is left.
    """
    requested: set[str] = set()
    while missing := {job_name(name, precision) for name, (_, precision) in _jobs(forms).items()} - requested:
        (forms,) = built_there(session, [forms], missing)
        requested |= missing
    return forms


def _jobs(engines: EngineFiles) -> dict[str, tuple[Path, str]]:
    """Path and precision of every graph that runs."""
    names = _exits(engines).engines
    return {name: (engines.path(name), engines.graph_set.spec(name).precision) for name in names}


def evaluate_there(
    session: PythonSession,
    engines: EngineFiles,
    data: DataSet,
    folder: Path,
    *,
    device: str,
    progress: Callable[[int], None],
) -> ExitStatistics:
    """Like `evaluate_data`, on a remote device, by the engines that `build_scored_graphs` returned.

    The device holds at most a block of images at a time. Finished blocks are saved on this machine, so that a run
    resumes after a broken connection. Raises what `evaluate` does, and RemoteError.
    """
    with session.scoring(_jobs(engines), _exits(engines)) as score:
        origin = _Origin(engines, session.library, device, data.split, data.truth)
        found = _by_blocks(origin, score, data, folder, Share(), progress)
    assert found is not None, "the first of one process"
    return found


def _by_blocks(
    origin: _Origin, score: Scoring, data: DataSet, folder: Path, share: Share, progress: Callable[[int], None]
) -> ExitStatistics | None:
    parts = folder.with_name(f".{folder.name}.parts-{_fingerprint(data)}")
    blocks = [data.items[start : start + BLOCK] for start in range(0, len(data.items), BLOCK)]
    for index in range(share.rank, len(blocks), share.world):
        if not _is_done(parts / str(index), blocks[index], origin):
            images = ((s.id, s.group, s.frame, s.labels) for s in samples(replace(data, items=blocks[index])))
            report = partial(_report_progress, progress, index * BLOCK, share)
            found = _evaluated(origin, score, images, frozenset({ALWAYS_IGNORED}), report)
            write_statistics(parts / str(index), found)
    share.wait()
    if share.rank:
        return None
    merged = merge([read_statistics(parts / str(index)) for index in range(len(blocks))])
    write_statistics(folder, merged)
    for finished in folder.parent.glob(f".{folder.name}.parts-*"):
        shutil.rmtree(finished)
    return merged


def _report_progress(progress: Callable[[int], None], before: int, share: Share, done: int) -> None:
    """Only the first process reports, for all: the others have done about as much of their blocks."""
    if share.rank == 0:
        progress(before + done * share.world)


def _fingerprint(data: DataSet) -> str:
    """A hash over classes, images and labels: blocks of other or changed data are not reused."""
    digest = hashlib.sha256(repr(replace(data.classes, ignored=frozenset())).encode())
    digest.update(repr(sorted(data.classes.ignored)).encode())
    for item in data.items:
        label = item.label_path
        digest.update(item.image.read_bytes() + (label.read_bytes() if label else repr(item.label).encode()))
    return digest.hexdigest()[:16]


def _is_done(part: Path, items: Sequence[Item], origin: _Origin) -> bool:
    try:
        found = read_statistics(part)
        check_statistics_current(found, origin.engines.graph_set)
    except MessError:
        return False
    expected = (tuple(item.id for item in items), origin.library, origin.device, origin.engines.heads, origin.truth)
    return (found.image_id, found.library, found.device, found.heads, found.truth) == expected


def countable(image_id: str, frame: Pixels, labels: Pixels, classes: int, ignore: frozenset[int]) -> NDArray[np.bool_]:
    """The pixels (H, W) that count. Raises InputError for labels of another size or out of range."""
    if labels.shape != frame.shape[:2]:
        raise InputError(f"image {image_id}: labels of shape {labels.shape} do not fit a frame of {frame.shape[:2]}")
    known = ~np.isin(labels, list(ignore))
    highest = int(labels[known].max(initial=0))
    if highest >= classes:
        raise InputError(
            f"image {image_id}: label {highest} is out of range: the network has {classes} classes "
            f"(0 to {classes - 1}), ignored are {', '.join(map(str, sorted(ignore)))}; check the class list"
        )
    return known
