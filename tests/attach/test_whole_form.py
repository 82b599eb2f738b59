"""Any trained network can be cut, and its last exit is the network as it came."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from mess_compile.attach.checked import check_whole_form
from mess_compile.attach.opened import OpenedNetwork, open_network
from mess_compile.attach.whole_form import ClassNames, WholeForm, early_frontiers, whole_form
from mess_compile.graph.cut import cut_network
from mess_compile.graph.recompose_check import check_stages
from mess_compile.graph.store import write_model
from mess_compile.network import Gate, GraphSet
from mess_compile.runtime.base.errors import InputError
from tests.attach import brought


def opened(model: onnx.ModelProto, folder: Path, **options: object) -> OpenedNetwork:
    folder.mkdir(exist_ok=True)
    graphs = folder / "graphs"
    graphs.mkdir(exist_ok=True)
    return open_network(brought.saved(model, folder), brought.RULE, graphs, **options)  # type: ignore[arg-type]


def formed(network: OpenedNetwork, exits: int = 3) -> WholeForm:
    names = tuple(f"class{number}" for number in range(network.end.classes))
    return whole_form(network, early_frontiers(network, exits), ClassNames(names, ((0, 0, 0),) * len(names)))


def cut(form: WholeForm, folder: Path) -> GraphSet:
    write_model(form.model, folder / "graphs" / "network.onnx")
    return cut_network(folder / "graphs", Gate(), lambda name, done, total: None)


def run(path: Path, frame: NDArray[np.uint8]) -> dict[str, NDArray[np.generic]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": frame[None]}), strict=True))


@pytest.mark.parametrize("end", brought.ENDS)
def test_the_last_exit_gives_the_labels_of_the_network_as_it_came(tmp_path: Path, end: str) -> None:
    model, frame = brought.unet(end), brought.frame(1)
    graph_set = cut(formed(opened(model, tmp_path)), tmp_path)
    found = run(graph_set.root / "network.onnx", frame)
    labels = found[f"labels:{graph_set.candidate.baseline}"][0]
    wanted = brought.own_labels(model, frame)
    assert np.array_equal(labels, wanted)
    assert len(np.unique(wanted)) > 1

    def logits(image: NDArray[np.uint8]) -> dict[str, NDArray[np.generic]]:
        return {graph_set.candidate.baseline: run(graph_set.root / "network.onnx", image)[f"logits:{head}"]}

    head = graph_set.candidate.baseline
    check_stages(graph_set, logits, [frame], lambda name, done, total: None)


def test_skip_connections_are_carried_and_listed(tmp_path: Path) -> None:
    form = formed(opened(brought.unet(), tmp_path), exits=3)
    blocks = [point.block for point in form.candidate.exit_points]
    assert (blocks[0], blocks[-1]) == ("deep", "fused")
    shapes = {tensor.shape for tensor in form.candidate.exit_points[0].carried}
    assert shapes == {(1, 16, 16, 24)}, "down1 is read again after the bottleneck"
    assert form.candidate.exit_points[-1].carried == ()


def test_a_fine_map_is_pooled_for_its_heads_and_passed_on_as_it_is(tmp_path: Path) -> None:
    network = opened(brought.unet(), tmp_path)
    (down1,) = [each for each in network.frontiers.found if each.map.name == "down1"]
    form = whole_form(network, [down1], ClassNames(("a", "b", "c"), ((0, 0, 0),) * 3))
    first = form.candidate.exit_points[0]
    assert first.hw == (8, 12), "stride 4, not 2"
    assert [tensor.shape for tensor in first.carried] == [(1, 16, 16, 24)]


def test_exits_leave_a_place_for_the_end_when_most_work_is_in_its_last_node(tmp_path: Path) -> None:
    """As in SegFormer, whose decoder is one convolution: nothing lies between that and the logits."""
    model = brought.unet("logits")
    for tensor in model.graph.initializer:
        if tensor.name == "fused.weight":
            wide = np.random.default_rng(2).standard_normal((512, *tensor.dims[1:])) * 0.01
            tensor.CopyFrom(numpy_helper.from_array(wide.astype(np.float32), tensor.name))
        if tensor.name == "scores.weight":
            wide = np.random.default_rng(3).standard_normal((brought.CLASSES, 512, 1, 1)) * 0.01
            tensor.CopyFrom(numpy_helper.from_array(wide.astype(np.float32), tensor.name))
    network = opened(model, tmp_path)
    early = early_frontiers(network, 5)
    assert 1 <= len(early) < 4
    assert all(network.frontiers.share(each) < 0.9 for each in early)
    assert whole_form(network, early, ClassNames(("a", "b", "c"), ((0, 0, 0),) * 3)).candidate.exit_points


def test_a_network_with_its_own_end_alone_has_no_early_exits(tmp_path: Path) -> None:
    assert early_frontiers(opened(brought.unet("logits"), tmp_path), 1) == ()


@pytest.mark.parametrize("opset", [9, 13, 18, 20])
def test_other_opsets_are_taken(tmp_path: Path, opset: int) -> None:
    end = "softmax" if opset >= 13 else "small"
    model, frame = brought.unet(end, opset=opset), brought.frame(2)
    network = opened(model, tmp_path)
    form = formed(network)
    check_whole_form(network, form, tmp_path / "graphs", [frame])
    graph_set = cut(form, tmp_path)
    if end == "softmax":
        labels = run(graph_set.root / "network.onnx", frame)[f"labels:{graph_set.candidate.baseline}"][0]
        assert np.array_equal(labels, brought.own_labels(model, frame))


def test_a_dynamic_input_needs_a_size(tmp_path: Path) -> None:
    model = brought.unet(dynamic=True)
    with pytest.raises(InputError, match="fix its size with --input HxW"):
        opened(model, tmp_path)
    assert opened(model, tmp_path, input_hw=(64, 48)).hw == (64, 48)
    with pytest.raises(InputError, match="fixed size 32x48"):
        opened(brought.unet(), tmp_path, input_hw=(64, 64))


def test_half_precision_is_lifted(tmp_path: Path) -> None:
    model = brought.unet("logits")
    for tensor in model.graph.initializer:
        if tensor.name != "scales":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    assert opened(model, tmp_path).image.dtype == "float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("outputs", r"the model has 2 outputs \(pixels, deep\): name the one with the segmentation with --output"),
        ("flat", r"output 'flat' is float32 \(1, 3\), which is no segmentation of an input of 32 x 48"),
        ("nothing", "no tensor between the input 'input' and 'scores' is a map"),
    ],
)
def test_what_cannot_be_attached_to_is_named(tmp_path: Path, change: str, message: str) -> None:
    model = brought.unet("logits")
    graph = model.graph
    if change == "outputs":
        graph.output.append(onnx.helper.make_tensor_value_info("deep", onnx.TensorProto.FLOAT, (1, 24, 8, 12)))
    elif change == "flat":
        graph.node.append(onnx.helper.make_node("ReduceMean", ["pixels"], ["flat"], axes=[2, 3], keepdims=0))
        graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("flat", onnx.TensorProto.FLOAT, (1, 3)))
    else:
        del graph.node[:], graph.initializer[:]
        weight = numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "only.weight")
        graph.initializer.append(weight)
        graph.node.append(onnx.helper.make_node("Conv", ["input", "only.weight"], ["scores"]))
        graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, (1, 3, 32, 48)))
    with pytest.raises(InputError, match=message):
        opened(model, tmp_path)
