"""Converts the workspace's graphs to a precision, choosing each graph's precision once, and stores the result."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import onnx

from mess_compile import files
from mess_compile.array_types import Array
from mess_compile.engines.files import EngineFiles
from mess_compile.graph import store
from mess_compile.graph.choose_precision import Fallback, PrecisionRequest, choose_precisions
from mess_compile.graph.precision import is_fp16, write_out_roundings
from mess_compile.network import GraphSet, check_graphs, read_graph_set
from mess_compile.reporter import Progress
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import FP32, PRECISIONS, open_library

_FILE, _FORMAT, _REMEDY = "recipe.json", "mess-recipe", "run `mess-compile build --precision ...`"
_PROGRESS_PREFIX = ".settling-"
"""Prefix of the folder from which an interrupted choice of precisions resumes."""
_SETTLING = 2
"""Increased when conversion or checks change the result: older recipes are then made again."""
Images = Callable[[str], list[Array]]
"""Split -> some of its images, uint8 (H, W, 3) at the network's input size."""


@dataclass(frozen=True)
class PreciseGraphs:
    """A graph set converted by a recipe, and the graphs that fell back to a safer precision.

    `made_from` is a hash over the fp32 graphs and the allowed precisions, `images` one over the frames on which the
    recipe was checked (`judged_frames` of them) and calibrated (`calibration_frames`).
    """

    graph_set: GraphSet
    fallbacks: tuple[Fallback, ...]
    made_from: str = ""
    images: str = ""
    judged_frames: int = 0
    calibration_frames: int = 0


@dataclass(frozen=True)
class RecipeRequest:
    """The `precision` to convert to, the precisions that the target supports (`allowed`), and the split to check on.

    With `renewed` a stored recipe is used only when it was made on the same images.
    """

    precision: str
    allowed: tuple[str, ...]
    tune: str
    renewed: bool = False


def make_recipe(
    graph_set: GraphSet, request: RecipeRequest, folder: Path, images: Images, progress: Progress
) -> PreciseGraphs:
    """The graphs in the requested precision; graphs that lose too much fall back to the next safer allowed one.

    fp32 returns the graphs themselves. Other recipes are stored below `folder` and reused for the same graphs.
    Otherwise each graph's precision is chosen on images of the split `tune`; int8 is calibrated on images of train. An
    interrupted call resumes after the last graph that it decided. Raises what `images` and the choice do.
    """
    wanted, allowed = request.precision, request.allowed
    if wanted == FP32:
        return PreciseGraphs(graph_set, ())
    target = folder / recipe_name(wanted, allowed)
    made_from = _source_of(graph_set, target.name)
    known = _known(target, made_from, set(graph_set.graphs))
    if known is not None and not request.renewed:
        return known
    judged, calibration = images(request.tune), images("train") if wanted == PRECISIONS[0] else []
    images_sha256 = _sha256_of(judged, calibration)
    if known is not None and known.images == images_sha256:
        return known
    unfinished = folder / f"{_PROGRESS_PREFIX}{target.name}-{made_from[:16]}"
    with closing(open_library("onnxruntime")) as library:
        chosen = PrecisionRequest(wanted, judged, calibration, allowed)
        converted, fallbacks = choose_precisions(graph_set, chosen, target, library, progress, unfinished)
    made = PreciseGraphs(converted, fallbacks, made_from, images_sha256, len(judged), len(calibration))
    _write(made)
    for leftover in folder.glob(f"{_PROGRESS_PREFIX}{target.name}-{'?' * 16}"):  # including those of other graphs
        shutil.rmtree(leftover, ignore_errors=True)
    return made


def stored_recipe(graph_set: GraphSet, recipe: str, folder: Path) -> PreciseGraphs | None:
    """The stored recipe of these graphs; None when it is missing or damaged."""
    if recipe == FP32:
        return PreciseGraphs(graph_set, ())
    return _known(folder / recipe, _source_of(graph_set, recipe), set(graph_set.graphs))


def reference_files(graph_set: GraphSet, folder: Path) -> EngineFiles:
    """The graphs for ONNX Runtime on a CPU; graphs with fp16 are written to `folder` with their roundings as nodes.

    ONNX Runtime keeps fp32 between fp16 nodes, so that without these nodes an overflow on the target stays hidden.
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
    """`int8`, or `int8-fp32` for a target that lacks a precision in between."""
    safer = PRECISIONS[PRECISIONS.index(wanted) + 1 :]
    usable = [precision for precision in safer if precision in allowed]
    return wanted if len(usable) == len(safer) else "-".join([wanted, *usable])


def _known(folder: Path, made_from: str, graphs: set[str]) -> PreciseGraphs | None:
    """The recipe in `folder`; None when it was made from other graphs, or when a part is missing or damaged."""
    try:
        known = _read(folder)
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
    """A hash over the graphs that a recipe is made from."""
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
