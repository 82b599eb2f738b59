"""A recipe is as bold as the labels allow, and says of every graph that is not why."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from mess_compile.data.scenes import make_scene
from mess_compile.graph.choose_precision import (
    Fallback,
    PrecisionRecipe,
    PrecisionRequest,
    bold_recipe,
    choose_precisions,
    fallback,
)
from mess_compile.graph.compare import check_path, verdict
from mess_compile.graph.cut import cut_network
from mess_compile.graph.store import externalise, read_model, write_model
from mess_compile.network import Gate, GraphSet, read_graph_set, verify_graph_set
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines import engine
from tests import skips
from tests.commands import contents
from tests.graph import tiny

FRAMES = [make_scene(seed, tiny.HW).frame for seed in range(40)]
JUDGED, CALIBRATION = FRAMES[:24], FRAMES[24:]
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def library() -> Iterator[engine.Library]:
    with closing(engine.open_library("onnxruntime", 1)) as opened:
        yield opened


def graphs(root: Path, change: Callable[[Weights], None] = lambda weights: None) -> GraphSet:
    """The tiny network cut into graphs, after `change` was made to its weights."""
    model = tiny.tiny_network()
    weights = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    change(weights)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].astype(np.float32), tensor.name))
    externalise(model, root)
    write_model(model, root / "network.onnx")
    return cut_network(root, Gate(), tiny.nothing)


def overflowing(weights: Weights) -> None:
    """The same network, but the first convolution gives maps of many times 65504, which its BatchNorm undoes."""
    weights["stem.weight"] *= 3000
    weights["normed.mean"] *= 3000
    weights["normed.gamma"] /= 3000


def out_of_range(weights: Weights) -> None:
    """The same network, but one weight of one head is more than fp16 can hold."""
    weights["logits:exit2.wide.weight"] *= 1e6


def delicate(weights: Weights) -> None:
    """What the second exit sees is a small difference between two large channels of the first."""
    for part, values in {"gamma": (0.01, 0), "beta": (1000, 1000), "mean": (0, 0)}.items():
        weights[f"normed.{part}"][:2] = values
    for name in ("down.weight", "residual.weight", "logits:exit1.small.weight"):
        weights[name][:, :2] = 0
    weights["down.weight"][:] = 0
    weights["down.weight"][:2, :2, 1, 1] = [[100, -100], [-100, 100]]
    weights["residual.weight"][:] = 0
    for head in ("exit2.small", "exit2.wide"):
        weights[f"logits:{head}.weight"][:2, :2, 0, 0] = [[1, 0], [0, 1]]
        weights[f"logits:{head}.weight"][2:, :2] = 0


def used(graph_set: GraphSet) -> dict[str, str]:
    """The precision that each written graph really has."""
    names = {TensorProto.FLOAT16: "fp16", TensorProto.INT8: "int8"}
    found = {}
    for name in graph_set.graphs:
        kinds = {tensor.data_type for tensor in read_model(graph_set.path(name)).graph.initializer}
        found[name] = next((names[kind] for kind in names if kind in kinds), "fp32")
    return found


def chosen(
    graph_set: GraphSet,
    wanted: str,
    frames: Sequence[np.ndarray],
    folder: Path,
    library: engine.Library,
    progress: Callable[[str, int, int], None] = tiny.nothing,
    calibration: Sequence[np.ndarray] = (),
) -> tuple[PrecisionRecipe, tuple[Fallback, ...]]:
    """As `choose_precisions`, with the precisions that the graph set on disk records."""
    request = PrecisionRequest(wanted, frames, calibration)
    found, fallbacks = choose_precisions(graph_set, request, folder, library, progress)
    assert found == read_graph_set(found.root)
    return PrecisionRecipe(found.recipe, {name: spec.precision for name, spec in found.graphs.items()}), fallbacks


def test_a_healthy_network_is_fp16_but_for_graphs_without_convolutions(library: engine.Library, tmp_path: Path) -> None:
    graph_set = graphs(tmp_path / "graphs")
    reported: list[str] = []
    recipe, fallbacks = chosen(
        graph_set, "fp16", JUDGED, tmp_path / "fp16", library, lambda name, done, total: reported.append(name)
    )
    converted = read_graph_set(tmp_path / "fp16")
    verify_graph_set(converted)
    assert fallbacks == ()
    assert recipe.name == "fp16"
    assert recipe.precisions == used(converted)
    assert {name for name, precision in recipe.precisions.items() if precision == "fp32"} == {
        "output-8x12",
        "output-4x6",
    }
    assert len(reported) == len(graph_set.graphs) + 1, "the beginning, and each graph"
    assert converted.spec("segment-1-2").bytes * 2 == graph_set.spec("segment-1-2").bytes
    assert converted.spec("segment-1-2").macs == graph_set.spec("segment-1-2").macs
    assert converted.spec("output-4x6") == graph_set.spec("output-4x6")


@pytest.mark.parametrize("wanted", ["fp16", "int8"])
def test_graphs_with_several_inputs_are_judged_on_what_is_alive_before_them(
    library: engine.Library, tmp_path: Path, wanted: str
) -> None:
    graph_set = skips.imported(tmp_path)
    frames = [skips.frame(seed) for seed in range(16)]
    recipe, _ = chosen(graph_set, wanted, frames[:4], tmp_path / wanted, library, calibration=frames)
    converted = read_graph_set(tmp_path / wanted)
    verify_graph_set(converted)
    assert recipe.precisions == used(converted)
    assert recipe.precisions["segment-2-3"] == wanted
    assert recipe.precisions["output-own"] == "fp32"
    found = check_path(graph_set, converted, (2, 3), "exit3.own", frames[:4], library)
    assert verdict(found, wanted) is None


def test_every_path_of_an_int8_recipe_gives_the_labels_of_fp32(library: engine.Library, tmp_path: Path) -> None:
    graph_set = graphs(tmp_path / "graphs")
    recipe, fallbacks = chosen(
        graph_set, "int8", JUDGED, tmp_path / "int8", library, tiny.nothing, calibration=CALIBRATION
    )
    converted = read_graph_set(tmp_path / "int8")
    verify_graph_set(converted)
    assert recipe.precisions == used(converted)
    assert "int8" in recipe.precisions.values()
    for head in tiny.HEADS:
        exits = range(1, int(head[4]) + 1)
        assert verdict(check_path(graph_set, converted, exits, head, JUDGED, library), "int8") is None
    lowered = {name for name, precision in recipe.precisions.items() if precision != "int8"}
    assert lowered == {f.graph for f in fallbacks} | {"output-8x12", "output-4x6"}
    read = {
        entry.value
        for name in graph_set.graphs
        for tensor in read_model(converted.path(name)).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert {f"weights/{path.name}" for path in (tmp_path / "int8" / "weights").iterdir()} == read


def test_a_network_that_overflows_fp16_ends_in_fp32_there(library: engine.Library, tmp_path: Path) -> None:
    """The maps are large within the graphs that begin at the image; between the graphs they are as ever."""
    graph_set = graphs(tmp_path / "graphs", overflowing)
    recipe, fallbacks = chosen(graph_set, "fp16", JUDGED, tmp_path / "fp16", library)
    from_image = {"segment-0-1", "segment-0-2", "segment-0-3", "baseline"}
    assert {fallback.graph for fallback in fallbacks} == from_image
    for name in from_image:
        assert recipe.precision(name) == "fp32"
        assert read_graph_set(tmp_path / "fp16").spec(name).sha256 == graph_set.spec(name).sha256
    assert recipe.precision("segment-1-2") == recipe.precision("head-exit1.small") == "fp16"
    shown = {fallback.graph: fallback.reason for fallback in fallbacks}
    assert shown["segment-0-1"] == "fp16: NaN or infinity in exit1"


def test_a_weight_beyond_fp16_keeps_its_graph_in_fp32(library: engine.Library, tmp_path: Path) -> None:
    graph_set = graphs(tmp_path / "graphs", out_of_range)
    values = tiny_weight("logits:exit2.wide.weight").ravel() * np.float64(1e6)
    recipe, (found,) = chosen(graph_set, "fp16", JUDGED, tmp_path / "fp16", library)
    assert (found.graph, found.wanted, found.used) == ("head-exit2.wide", "fp16", "fp32")
    assert f"'logits:exit2.wide.weight' contains {values[np.abs(values).argmax()]:.6g}" in found.reason
    assert recipe.precision("head-exit2.small") == "fp16"


def tiny_weight(name: str) -> np.ndarray:
    tensors = {tensor.name: tensor for tensor in tiny.tiny_network().graph.initializer}
    return numpy_helper.to_array(tensors[name])


def test_what_was_lost_before_a_graph_is_put_right_before_it(library: engine.Library, tmp_path: Path) -> None:
    """fp16 maps of the first exit are good for its own head and useless for what follows, in any precision."""
    graph_set = graphs(tmp_path / "graphs", delicate)
    recipe, fallbacks = chosen(graph_set, "fp16", JUDGED, tmp_path / "fp16", library)
    reasons = {fallback.graph: fallback.reason for fallback in fallbacks}
    assert recipe.precision("segment-0-1") == "fp32"
    assert reasons["segment-0-1"].startswith("fp16: segment-1-2: ")
    assert "together with the graphs before" in reasons["segment-0-1"]
    assert recipe.precision("head-exit2.small") == "fp16"
    converted = read_graph_set(tmp_path / "fp16")
    assert recipe.precisions == used(converted)
    for exits in ((1, 2), (2,)):
        assert verdict(check_path(graph_set, converted, exits, "exit2.small", JUDGED, library), "fp16") is None


def test_a_fallback_is_the_next_safer_precision_that_the_target_has() -> None:
    recipe = PrecisionRecipe("int8", {"segment-0-1": "int8", "baseline": "int8"})
    once = fallback(recipe, "segment-0-1")
    assert once == PrecisionRecipe("int8", {"segment-0-1": "fp16", "baseline": "int8"})
    assert fallback(once, "segment-0-1").precisions["segment-0-1"] == "fp32"
    assert fallback(recipe, "baseline", ("fp32", "int8")).precisions["baseline"] == "fp32"
    assert recipe.precisions["segment-0-1"] == "int8"
    with pytest.raises(InputError, match=r"baseline .* there is no safer precision"):
        fallback(PrecisionRecipe("x", {"baseline": "fp32"}), "baseline")
    with pytest.raises(InputError, match="has no precision for graph absent"):
        recipe.precision("absent")


def test_bad_requests_change_nothing(library: engine.Library, tmp_path: Path) -> None:
    graph_set = graphs(tmp_path / "graphs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()

    def request(wanted: str, frames: list[np.ndarray], calibration: list[np.ndarray]) -> tuple[Fallback, ...]:
        return choose_precisions(
            graph_set, PrecisionRequest(wanted, frames, calibration), tmp_path / "out", library, tiny.nothing
        )[1]

    with pytest.raises(InputError, match="'bf16' is not one of int8, fp16, fp32"):
        request("bf16", JUDGED, [])
    with pytest.raises(InputError, match="at least 16 frames to calibrate on, there are 3"):
        request("int8", JUDGED, CALIBRATION[:3])
    with pytest.raises(InputError, match=r"a frame is float32 \(16, 24, 3\), but the network takes uint8"):
        request("fp16", [FRAMES[0].astype(np.float32)], [])
    with pytest.raises(InputError, match="no frames to compare"):
        request("fp16", [], [])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graphs", "out"]


def test_a_network_that_is_not_finite_is_refused_not_lowered(library: engine.Library, tmp_path: Path) -> None:
    def broken(weights: Weights) -> None:
        weights["down.weight"][0, 0, 0, 0] = np.nan

    with pytest.raises(InputError, match="exit2 contains NaN or infinity even in fp32"):
        chosen(graphs(tmp_path / "graphs", broken), "fp16", JUDGED, tmp_path / "out", library)


def test_the_bold_recipe_names_every_graph(tmp_path: Path) -> None:
    graph_set = graphs(tmp_path)
    recipe = bold_recipe(graph_set, "int8")
    convolutions = {
        name
        for name in graph_set.graphs
        if any(n.op_type == "Conv" for n in onnx.load(graph_set.path(name)).graph.node)
    }
    assert {name for name, precision in recipe.precisions.items() if precision == "int8"} == convolutions
    assert set(recipe.precisions) == set(graph_set.graphs)


KILLED = """
import os, signal
from contextlib import closing
from pathlib import Path
from mess_compile.network import read_graph_set
from mess_compile.graph.choose_precision import PrecisionRequest, choose_precisions
from mess_compile.runtime.engines import engine
from tests.graph.test_choose_precision import CALIBRATION, JUDGED

def die(name, done, total):
    done < 6 or os.kill(os.getpid(), signal.SIGKILL)

root = Path({root!r})
with closing(engine.open_library("onnxruntime", 1)) as library:
    graphs = read_graph_set(root / "graphs")
    choose_precisions(
        graphs, PrecisionRequest("int8", JUDGED, CALIBRATION), root / "int8", library, die, root / "kept"
    )
"""


def test_a_killed_settling_continues_where_it_was(library: engine.Library, tmp_path: Path) -> None:
    graph_set = graphs(tmp_path / "graphs")

    def choose_in(place: Path) -> dict[str, bytes]:
        choose_precisions(
            graph_set,
            PrecisionRequest("int8", JUDGED, CALIBRATION),
            place / "int8",
            library,
            tiny.nothing,
            place / "kept",
        )
        return contents(place / "int8")

    def kept() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*.json")}

    whole = choose_in(tmp_path / "whole")
    killed = subprocess.run([sys.executable, "-c", KILLED.format(root=str(tmp_path))])
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "int8").exists()
    before = kept()
    assert len(before) >= 6
    assert choose_in(tmp_path) == whole
    assert before.items() <= kept().items(), "what was found out is not found out again"
    assert kept().keys() == {path.name for path in (tmp_path / "whole" / "kept").glob("*.json")}
    graph, *_ = sorted((tmp_path / "kept").glob("*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1])
    next((tmp_path / "kept").glob("*.json")).write_text("{")
    weight = next((tmp_path / "kept" / "weights").iterdir())
    weight.unlink()
    weight.write_bytes(b"of something else")
    assert choose_in(tmp_path) == whole, "damaged results are none"
