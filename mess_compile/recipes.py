"""Graphs in another precision, in the workspace: settled once for the same graphs, and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mess_compile import files
from mess_compile.candidates import GraphSet, read_graph_set, verify_graph_set
from mess_compile.graph.cut import Progress
from mess_compile.graph.precision import PRECISIONS, Array
from mess_compile.graph.recipe import Fallback, PrecisionRecipe, settle
from mess_compile.runtime.engine import open_library
from mess_compile.runtime.errors import InputError

_FILE, _FORMAT, _REMEDY = "recipe.json", "mess-recipe", "run `mess-compile build --precision ...`"
_SETTLING = 1
"""Raised when conversion or checks change what comes out: recipes of before are then settled again."""
Images = Callable[[str], list[Array]]
"""Some real images of a split, uint8 (H, W, 3) at the network's input size."""


@dataclass(frozen=True)
class SettledRecipe:
    """What was settled, kept beside its graphs; `made_from` is a hash over the graphs in fp32 and what was allowed."""

    recipe: PrecisionRecipe
    fallbacks: tuple[Fallback, ...]
    made_from: str
    judged_frames: int
    calibration_frames: int


@dataclass(frozen=True)
class PreciseGraphs:
    """A graph set in which every graph has the precision that `recipe` gives it."""

    graph_set: GraphSet
    recipe: PrecisionRecipe
    fallbacks: tuple[Fallback, ...]


def precise_graphs(
    graph_set: GraphSet,
    wanted: str,
    allowed: Sequence[str],
    folder: Path,
    tune: str,
    images: Images,
    progress: Progress,
) -> PreciseGraphs:
    """The graphs in the `wanted` precision, or the next safer one of `allowed` for those that lose too much.

    fp32 is the graphs themselves. Other recipes are kept below `folder` and taken again for the same graphs; else they
    are settled on images of the split `tune`, int8 calibrated on images of train. Raises what `images` and `settle` do.
    """
    if wanted == "fp32":
        return PreciseGraphs(graph_set, PrecisionRecipe("fp32", dict.fromkeys(graph_set.graphs, "fp32")), ())
    place = folder / recipe_name(wanted, allowed)
    made_from = _source_of(graph_set, place.name)
    known = _known(place, made_from, set(graph_set.graphs))
    if known is None:
        known = _settled(graph_set, wanted, allowed, place, tune, images, progress, made_from)
        _write_recipe(place, known)
    return PreciseGraphs(read_graph_set(place), known.recipe, known.fallbacks)


def _known(place: Path, made_from: str, graphs: set[str]) -> SettledRecipe | None:
    """An earlier call's recipe; None when it was made from other graphs, or anything of it is missing or damaged."""
    try:
        known = _read_recipe(place)
        verify_graph_set(read_graph_set(place))
    except InputError:
        return None
    return known if known.made_from == made_from and set(known.recipe.precisions) == graphs else None


def _settled(
    graph_set: GraphSet,
    wanted: str,
    allowed: Sequence[str],
    place: Path,
    tune: str,
    images: Images,
    progress: Progress,
    made_from: str,
) -> SettledRecipe:
    judged, calibration = images(tune), images("train") if wanted == "int8" else []
    with closing(open_library("onnxruntime")) as library:
        recipe, fallbacks = settle(
            graph_set, wanted, judged, place, library, progress, calibration=calibration, allowed=allowed
        )
    return SettledRecipe(replace(recipe, name=place.name), fallbacks, made_from, len(judged), len(calibration))


def recipe_name(wanted: str, allowed: Sequence[str]) -> str:
    """`int8`, or `int8-fp32` for a target that does without a precision between."""
    safer = PRECISIONS[PRECISIONS.index(wanted) + 1 :]
    kept = [precision for precision in safer if precision in allowed]
    return wanted if len(kept) == len(safer) else "-".join([wanted, *kept])


def _source_of(graph_set: GraphSet, recipe: str) -> str:
    """By which a settled recipe knows the graphs that it was made from."""
    parts = [f"{name} {spec.sha256}" for name, spec in sorted(graph_set.graphs.items())]
    return hashlib.sha256("\n".join([str(_SETTLING), recipe, *parts]).encode()).hexdigest()


def _write_recipe(folder: Path, settled: SettledRecipe) -> None:
    """Write `recipe.json` beside the graphs in `folder`."""
    files.write_json(folder / _FILE, _FORMAT, 1, asdict(settled))


def _read_recipe(folder: Path) -> SettledRecipe:
    """Read `recipe.json`. Raises InputError when it is missing or damaged."""
    path = folder / _FILE
    content = files.read_json(path, _FORMAT, 1, _REMEDY)

    def decode() -> SettledRecipe:
        precisions = {str(name): str(value) for name, value in content["recipe"]["precisions"].items()}
        if set(precisions.values()) - set(PRECISIONS):
            raise ValueError(f"precisions {sorted(set(precisions.values()))}")
        return SettledRecipe(
            recipe=PrecisionRecipe(str(content["recipe"]["name"]), precisions),
            fallbacks=tuple(
                Fallback(*(str(each[name]) for name in ("graph", "wanted", "used", "reason")))
                for each in content["fallbacks"]
            ),
            made_from=str(content["made_from"]),
            judged_frames=int(content["judged_frames"]),
            calibration_frames=int(content["calibration_frames"]),
        )

    settled: SettledRecipe = files.decoded(path, _REMEDY, decode)
    return settled
