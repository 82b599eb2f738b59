"""The check stands between a wrong cut and a device: it must see every mistake that it exists for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from mess_compile.graph.import_onnx import import_onnx
from mess_compile.graph.recompose_check import check_stages, upsampled
from mess_compile.network import Gate, GraphSet
from mess_compile.runtime.base.errors import InputError
from tests import skips
from tests.graph import tiny


@pytest.fixture
def graph_set(tmp_path: Path) -> GraphSet:
    path = tiny.saved(tiny.tiny_network(), tmp_path)
    return import_onnx(path, tmp_path / "graphs", Gate("margin"), tiny.frames(), tiny.nothing)


def whole(frame: np.ndarray) -> dict[str, np.ndarray]:
    model = tiny.tiny_network()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [f"logits:{head}" for head in tiny.HEADS]
    return dict(zip(tiny.HEADS, session.run(names, {"image": frame[None]}), strict=True))


def check(graph_set: GraphSet, reference: Callable[[np.ndarray], dict[str, np.ndarray]] = whole) -> None:
    check_stages(graph_set, reference, tiny.frames(), tiny.nothing)


def edit(graph_set: GraphSet, name: str, change: Callable[[onnx.ModelProto], None]) -> None:
    path = graph_set.path(name)
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    onnx.save(model, str(path))


def scale_first_inline_weight(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name.endswith("weight") and t.raw_data)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))


def test_honest_graphs_pass(graph_set: GraphSet) -> None:
    check(graph_set)


def test_swapped_heads_are_seen(graph_set: GraphSet) -> None:
    one, other = graph_set.path("head-exit2.small"), graph_set.path("head-exit2.wide")
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    with pytest.raises(InputError, match=r"graph head-exit2\.(small|wide) deviates by [\d.]+ .* on frame 0"):
        check(graph_set)


def test_a_reference_with_swapped_heads_is_seen(graph_set: GraphSet) -> None:
    def swapped(frame: np.ndarray) -> dict[str, np.ndarray]:
        found = whole(frame)
        return found | {"exit2.small": found["exit2.wide"], "exit2.wide": found["exit2.small"]}

    with pytest.raises(InputError, match=r"head-exit2\.small deviates"):
        check(graph_set, swapped)


@pytest.mark.parametrize("name", ["segment-0-1", "segment-2-3", "segment-1-3"])
def test_a_segment_one_percent_off_is_seen(graph_set: GraphSet, name: str) -> None:
    edit(graph_set, name, scale_first_inline_weight)
    with pytest.raises(InputError, match="deviates"):
        check(graph_set)


def test_a_network_that_gives_no_numbers_is_told_from_a_wrong_cut(graph_set: GraphSet) -> None:
    def broken(frame: np.ndarray) -> dict[str, np.ndarray]:
        return {name: values * np.nan for name, values in whole(frame).items()}

    with pytest.raises(InputError, match=r"head exit\d\.\S+ of the original model gives NaN on frame 0"):
        check(graph_set, broken)


@pytest.mark.parametrize("name", ["output-4x6", "baseline"])
def test_an_output_graph_that_scales_otherwise_is_seen(graph_set: GraphSet, name: str) -> None:
    def corners(model: onnx.ModelProto) -> None:
        resize = next(node for node in model.graph.node if node.op_type == "Resize")
        next(a for a in resize.attribute if a.name == "coordinate_transformation_mode").s = b"align_corners"

    edit(graph_set, name, corners)
    with pytest.raises(InputError, match=rf"{name}: \d+ labels of frame 0"):
        check(graph_set)


def test_another_opset_or_boundary_is_seen(graph_set: GraphSet) -> None:
    spec = graph_set.graphs["segment-1-2"]
    graph_set.graphs["segment-1-2"] = replace(spec, inputs=(replace(spec.inputs[0], name="exit0"),))
    with pytest.raises(InputError, match=r"segment-1-2 is bounded by \['exit1'\], not by \['exit0'\]"):
        check(graph_set)
    graph_set.graphs["segment-1-2"] = spec
    edit(graph_set, "segment-1-2", lambda model: setattr(model.opset_import[0], "version", 16))
    with pytest.raises(InputError, match=r"opset \[16\], not 17"):
        check(graph_set)


def test_frames_of_another_size_are_refused(graph_set: GraphSet) -> None:
    with pytest.raises(InputError, match=r"uint8 of shape \(16, 24, 3\)"):
        check_stages(graph_set, whole, [np.zeros((16, 20, 3), np.uint8)], tiny.nothing)
    with pytest.raises(InputError, match="needs frames"):
        check_stages(graph_set, whole, [], tiny.nothing)


def test_upsampling_by_hand() -> None:
    """Half-pixel centres: cells 0 and 4 at double size are 0, 1, 3, 4."""
    assert upsampled(np.array([[[0.0, 4.0]]], np.float32), (1, 4)).tolist() == [[[0, 1, 3, 4]]]


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> GraphSet:
    return skips.imported(tmp_path_factory.mktemp("skips"))


def check_skips(graph_set: GraphSet) -> None:
    def reference(frame: np.ndarray) -> dict[str, np.ndarray]:
        found = skips.tensors(frame)
        return {head: found[f"logits:{head}"] for head in skips.HEADS}

    check_stages(graph_set, reference, [skips.frame(2), skips.frame(3)], tiny.nothing)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ("segment-1-3", r"segment-1-3 \(skip1\) deviates|segment-1-3 deviates"),
        ("segment-0-2", "segment-0-2"),
        ("head-exit3.own", "head-exit3.own deviates"),
        ("baseline", r"baseline: \d+ labels of frame 0 are not those of the network's own end"),
    ],
)
def test_any_wrong_graph_of_a_network_with_skips_is_seen(skipping: GraphSet, graph: str, message: str) -> None:
    path = skipping.path(graph)
    before = path.read_bytes()
    check_skips(skipping)
    try:
        edit(skipping, graph, negate_last_convolution)
        with pytest.raises(InputError, match=message):
            check_skips(skipping)
    finally:
        path.write_bytes(before)


def negate_last_convolution(model: onnx.ModelProto) -> None:
    last = [node for node in model.graph.node if node.op_type == "Conv"][-1]
    made = last.output[0]
    last.output[0] = "before"
    model.graph.node.extend([onnx.helper.make_node("Neg", ["before"], [made])])
    order = [*model.graph.node]
    order.insert(order.index(last) + 1, order.pop())
    del model.graph.node[:]
    model.graph.node.extend(order)


def test_another_enlargement_than_the_networks_own_is_seen(skipping: GraphSet) -> None:
    path = skipping.path("output-own")
    before = path.read_bytes()
    try:
        path.write_bytes(skipping.path("output-8x12").read_bytes())
        with pytest.raises(InputError, match=r"head-exit3.own and output-own: \d+ labels of frame 0 are not those of"):
            check_skips(skipping)
    finally:
        path.write_bytes(before)
