"""Graphs in another precision, in the workspace: settled once for the same graphs, and kept."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import onnx

from mess_compile import files
from mess_compile.engines.files import EngineFiles
from mess_compile.graph import store
from mess_compile.graph.precision import Array, is_fp16, write_out_roundings
from mess_compile.graph.settle_precision import Fallback, settle
from mess_compile.network import GraphSet, check_graphs, read_graph_set
from mess_compile.reporter import Progress
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import FP32, PRECISIONS, open_library

_FILE, _FORMAT, _REMEDY = "recipe.json", "mess-recipe", "run `mess-compile build --precision ...`"
_PROGRESS_PREFIX = ".settling-"
"""Begins the name of a folder in which an interrupted settling continues."""
_SETTLING = 2
"""Raised when conversion or checks change what comes out: recipes of before are then settled again."""
Images = Callable[[str], list[Array]]
"""Some real images of a split, uint8 (H, W, 3) at the network's input size."""


@dataclass(frozen=True)
class PreciseGraphs:
    """A graph set converted by a recipe, and the graphs that are in a safer precision than was wanted.

    `made_from` is a hash over the graphs in fp32 and what was allowed, `images` one over the frames that it was judged
    and calibrated on, so many of each.
    """

    graph_set: GraphSet
    fallbacks: tuple[Fallback, ...]
    made_from: str = ""
    images: str = ""
    judged_frames: int = 0
    calibration_frames: int = 0


def choose_precisions(
    graph_set: GraphSet,
    wanted: str,
    allowed: Sequence[str],
    folder: Path,
    tune: str,
    images: Images,
    progress: Progress,
    renewed: bool = False,
) -> PreciseGraphs:
    """The graphs in the `wanted` precision, or the next safer one of `allowed` for those that lose too much.

    fp32 is the graphs themselves. Other recipes are kept below `folder` and taken again for the same graphs, when
    `renewed` for the same images as well; else they are settled on images of the split `tune`, int8 calibrated on
    images of train; what a killed call has found out of each graph is kept. Raises what `images` and `settle` do.
    """
    if wanted == FP32:
        return PreciseGraphs(graph_set, ())
    place = folder / recipe_name(wanted, allowed)
    made_from = _source_of(graph_set, place.name)
    known = _known(place, made_from, set(graph_set.graphs))
    if known is not None and not renewed:
        return known
    judged, calibration = images(tune), images("train") if wanted == PRECISIONS[0] else []
    seen = _sha256_of(judged, calibration)
    if known is not None and known.images == seen:
        return known
    kept = folder / f"{_PROGRESS_PREFIX}{place.name}-{made_from[:16]}"
    with closing(open_library("onnxruntime")) as library:
        converted, fallbacks = settle(
            graph_set, wanted, judged, place, library, progress, calibration=calibration, allowed=allowed, kept=kept
        )
    settled = PreciseGraphs(converted, fallbacks, made_from, seen, len(judged), len(calibration))
    _write(settled)
    for left in folder.glob(f"{_PROGRESS_PREFIX}{place.name}-{'?' * 16}"):  # of other graphs, too
        shutil.rmtree(left, ignore_errors=True)
    return settled


def stored_recipe(graph_set: GraphSet, recipe: str, folder: Path) -> PreciseGraphs | None:
    """What was settled as `recipe` from these graphs, None when nothing was or anything of it is damaged."""
    if recipe == FP32:
        return PreciseGraphs(graph_set, ())
    place = folder / recipe
    return _known(place, _source_of(graph_set, recipe), set(graph_set.graphs))


def reference_files(graph_set: GraphSet, folder: Path) -> EngineFiles:
    """The graphs as ONNX Runtime computes them on a CPU: in `folder`, with their roundings, where they have fp16.

    It runs fp16 in fp32 between nodes, so that an overflow on the target would go unnoticed.
    """
    paths = {}
    for name, spec in graph_set.graphs.items():
        paths[name] = graph_set.path(name)
        if spec.precision != FP32 and is_fp16(store.read_model(paths[name])):
            model = store.read_whole_model(paths[name])
            write_out_roundings(model)
            paths[name] = folder / paths[name].name
            onnx.save(model, str(paths[name]))
    return EngineFiles(graph_set, paths)


def recipe_name(wanted: str, allowed: Sequence[str]) -> str:
    """`int8`, or `int8-fp32` for a target that does without a precision between."""
    safer = PRECISIONS[PRECISIONS.index(wanted) + 1 :]
    kept = [precision for precision in safer if precision in allowed]
    return wanted if len(kept) == len(safer) else "-".join([wanted, *kept])


def _known(place: Path, made_from: str, graphs: set[str]) -> PreciseGraphs | None:
    """An earlier call's recipe; None when it was made from other graphs, or anything of it is missing or damaged."""
    try:
        known = _read(place)
        check_graphs(known.graph_set)
    except InputError:
        return None
    return known if known.made_from == made_from and set(known.graph_set.graphs) == graphs else None


def _sha256_of(*groups: Sequence[Array]) -> str:
    digest = hashlib.sha256()
    for frames in groups:
        digest.update(f"{len(frames)} {[frame.shape for frame in frames]}".encode())
        for frame in frames:
            digest.update(frame.tobytes())
    return digest.hexdigest()


def _source_of(graph_set: GraphSet, recipe: str) -> str:
    """By which a settled recipe knows the graphs that it was made from."""
    parts = [f"{name} {spec.sha256}" for name, spec in sorted(graph_set.graphs.items())]
    return hashlib.sha256("\n".join([str(_SETTLING), recipe, *parts]).encode()).hexdigest()


@dataclass(frozen=True)
class _RecipeDocument:
    """The content of `recipe.json`."""

    made_from: str
    images: str
    judged_frames: int
    calibration_frames: int
    fallbacks: tuple[Fallback, ...]


def _write(recipe: PreciseGraphs) -> None:
    """Write `recipe.json` beside the graphs."""
    content = {each.name: getattr(recipe, each.name) for each in fields(_RecipeDocument)}
    fallbacks = [asdict(fallback) for fallback in recipe.fallbacks]
    files.write_json(recipe.graph_set.root / _FILE, _FORMAT, 2, {**content, "fallbacks": fallbacks})


def _read(folder: Path) -> PreciseGraphs:
    """Read `recipe.json` and the graphs beside it. Raises InputError when anything is missing or damaged."""
    path = folder / _FILE
    content = files.read_json(path, _FORMAT, 2, _REMEDY)
    document: _RecipeDocument = files.decode_document(path, _RecipeDocument, content, _REMEDY)
    found = {each.name: getattr(document, each.name) for each in fields(document)}
    return PreciseGraphs(read_graph_set(folder), **found)
