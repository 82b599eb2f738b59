"""Another framework's network comes in as it is: a wrong cut, scale or channel order would only show as poor labels."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mess_compile.graph import opset
from mess_compile.graph.exits_toml import read_exits
from mess_compile.graph.import_onnx import import_with_exits
from mess_compile.graph.node_builder import add, constant, empty_model
from mess_compile.graph.opset_context import Conversion
from mess_compile.network import Gate, GraphSet
from mess_compile.runtime.base.errors import EngineError, InputError
from tests.commands import complaint, contents, done, printed_json
from tests.graph import tiny
from tests.graph.foreign_network import (
    CLASSES,
    HW,
    MEAN,
    STD,
    TOML,
    WEIGHTS,
    expected_logits,
    foreign_network,
    resize,
    saved,
)

Change = Callable[[onnx.ModelProto], None]


def frames(hw: tuple[int, int] = HW) -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    return [generator.integers(0, 256, (*hw, 3), dtype=np.uint8) for _ in range(2)]


def imported(folder: Path, model: onnx.ModelProto | None = None, toml: str = TOML) -> GraphSet:
    paths = saved(folder, model, toml)
    return import_with_exits(*paths, folder / "graphs", Gate(), frames, tiny.nothing)


def run(graph_set: GraphSet, name: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The first output of one written graph."""
    session = onnxruntime.InferenceSession(str(graph_set.path(name)), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def logits_by_stages(graph_set: GraphSet, frame: np.ndarray) -> dict[str, np.ndarray]:
    """Every head's logits (K, h, w), one segment after the other as the device runs them."""
    values, found = frame[None], {}
    rows = np.zeros((len(graph_set.gate.thresholds), len(graph_set.candidate.classes)), np.float32)
    for number in range(1, len(graph_set.candidate.exit_points) + 1):
        source = f"exit{number - 1}" if number > 1 else "image"
        values = run(graph_set, f"segment-{number - 1}-{number}", {source: values})
        for head in graph_set.candidate.heads_at(number):
            feeds = {f"exit{number}": values, "thresholds": rows}
            found[head.name] = run(graph_set, f"head-{head.name}", feeds)[0]
    return found


def compare(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == values.shape
        assert np.abs(found[name] - values).max() < 1e-4 * max(1, np.abs(values).max())


class TestPlainOnnx:
    def test_the_stages_compute_what_the_formulas_say(self, tmp_path: Path) -> None:
        graph_set = imported(tmp_path)
        for frame in frames():
            compare(logits_by_stages(graph_set, frame), expected_logits(frame))

    def test_what_it_is_and_what_it_costs(self, tmp_path: Path) -> None:
        candidate = imported(tmp_path).candidate
        cells = 16 * 24
        stem, middle, wide = cells * 8 * 27, cells // 4 * 12 * 9 * (8 + 12), cells // 4 * 16 * 12
        points = [(point.name, point.block, point.channels, point.hw, point.macs) for point in candidate.exit_points]
        assert points == [
            ("exit1", "stage1", 8, (16, 24), stem),
            ("exit2", "stage2", 12, (8, 12), stem + middle),
            ("exit3", "stage3", 16, (8, 12), stem + middle + wide),
        ]
        assert (candidate.backbone, candidate.baseline, candidate.input_hw) == ("model", "exit3.fcn", HW)
        assert len(set(candidate.colours)) == CLASSES
        assert len(candidate.identity) == 64

    def test_only_the_graphs_stay(self, tmp_path: Path) -> None:
        """The copy of the model that the graphs were checked against is gone, and every weight left is read."""
        graph_set = imported(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["exits.toml", "graphs", "model.onnx"]
        listed = {spec.path for spec in graph_set.graphs.values()}
        others = {path.name for path in graph_set.root.iterdir()} - listed
        assert others == {"index.json", "network.onnx", "weights"}
        large = [values.nbytes for values in WEIGHTS.values() if values.nbytes >= 1024]
        assert sorted(path.stat().st_size for path in (graph_set.root / "weights").iterdir()) == sorted(large)

    def test_the_same_model_gives_the_same_bytes(self, tmp_path: Path) -> None:
        found = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            imported(tmp_path / name)
            found.append(contents(tmp_path / name / "graphs"))
        assert found[0] == found[1]

    def test_weights_in_another_file(self, tmp_path: Path) -> None:
        path, toml = saved(tmp_path)
        onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, location="all.bin", size_threshold=0)
        graph_set = import_with_exits(path, toml, tmp_path / "graphs", Gate(), frames, tiny.nothing)
        compare(logits_by_stages(graph_set, frames()[0]), expected_logits(frames()[0]))

    @pytest.mark.parametrize("opset", [11, 13, 16, 18, 19])
    def test_another_opset_is_converted(self, tmp_path: Path, opset: int) -> None:
        graph_set = imported(tmp_path, foreign_network(opset))
        compare(logits_by_stages(graph_set, frames()[0]), expected_logits(frames()[0]))

    def test_tensors_that_have_our_names_make_way(self, tmp_path: Path) -> None:
        model, toml = foreign_network(), TOML
        names = {"input.1": "image", "stage1": "exit2", "down": "logits", "wide": "labels", "stage2": "exit1"}
        names |= {"aux1": "counts", "main_up": "thresholds", "stem": "gate/labels", "stem.weight": "model/image"}
        for node in model.graph.node:
            for field in (node.input, node.output):
                field[:] = [names.get(name, name) for name in field]
        model.graph.ClearField("value_info")
        for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
            value.name = names.get(value.name, value.name)
        for old, new in names.items():
            toml = toml.replace(f'"{old}"', f'"{new}"')
        graph_set = imported(tmp_path, model, toml)
        compare(logits_by_stages(graph_set, frames()[0]), expected_logits(frames()[0]))

    def test_a_batch_of_any_size_becomes_one(self, tmp_path: Path) -> None:
        """Sizes that an exporter then computes in the graph are constants for the device."""
        model = foreign_network()
        graph = model.graph
        graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
        graph.ClearField("value_info")
        for name in ("main_up", "main"):
            graph.node.remove(node(model, name))
        add(graph, "Shape", ["wide"], "size_of_wide")
        add(graph, "Reshape", ["stage3", "size_of_wide"], "reshaped")
        add(graph, "Conv", ["reshaped", "main.weight"], "main")
        add(graph, "Shape", ["main"], "size_of_main", end=2)
        add(graph, "Shape", ["input.1"], "size_of_frame")
        add(graph, "Slice", ["size_of_frame", *(constant(graph, str(at), [at], "int64") for at in (2, 4))], "hw")
        add(graph, "Concat", ["size_of_main", "hw"], "full_size", axis=0)
        add(
            graph, "Resize", ["main", "", "", "full_size"], "main_up",
            mode="linear", coordinate_transformation_mode="pytorch_half_pixel",
        )  # fmt: skip
        graph_set = imported(tmp_path, model)
        compare(logits_by_stages(graph_set, frames()[0]), expected_logits(frames()[0]))
        head = onnx.load(str(graph_set.path("head-exit3.fcn")), load_external_data=False)
        assert "Shape" not in {node.op_type for node in head.graph.node}

    def test_upsampling_by_scales_and_channels_last_copies_are_seen_through(self, tmp_path: Path) -> None:
        model = foreign_network()
        graph = model.graph
        constant(graph, "four", [1, 1, 4, 4], "float32")
        node(model, "main_up").input[:] = ["main", "", "four"]
        add(graph, "Identity", ["main_up"], "main_same")
        add(graph, "Transpose", ["main_same"], "main_last", perm=[0, 2, 3, 1])
        add(graph, "Transpose", ["stage2"], "stage2_last", perm=[0, 2, 3, 1])
        toml = TOML.replace("main_up", "main_last").replace('"stage2"', '"stage2_last"')
        graph_set = imported(tmp_path, model, toml)
        compare(logits_by_stages(graph_set, frames()[0]), expected_logits(frames()[0]))


def scaled_only(layout: str, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A model whose logits are sums of its input's channels, so that its input can be read off."""
    shape = (1, 3, *HW) if layout == "NCHW" else (1, *HW, 3)
    model = empty_model([helper.make_tensor_value_info("x", dtype, shape)])
    graph, values = model.graph, "x"
    if dtype == TensorProto.UINT8:
        values = add(graph, "Cast", [values], "float", to=TensorProto.FLOAT)
    if layout == "NHWC":
        values = add(graph, "Transpose", [values], "planes", perm=[0, 3, 1, 2])
    shares = np.array([[[[1]], [[0]], [[0]]], [[[0]], [[10]], [[0]]], [[[0]], [[0]], [[100]]]], np.float32)
    graph.initializer.append(numpy_helper.from_array(shares, "shares"))
    add(graph, "Conv", [values, "shares"], "point")
    add(graph, "Conv", ["point", "shares"], "out")
    graph.output.append(helper.make_tensor_value_info("out", TensorProto.FLOAT, (1, 3, *HW)))
    return model


SCALED = """
classes = ["a", "b", "c"]
[input]
{}
[[exit]]
tensor = "point"
head = [{{ name = "only", logits = "out" }}]
"""


@pytest.mark.parametrize(
    ("layout", "rule", "expected"),
    [
        ("NCHW", 'scale = "0-255"', lambda rgb: rgb),
        (
            "NCHW",
            'scale = "0-255"\nchannels = "BGR"\nmean = [104, 117, 123.5]',
            lambda rgb: rgb[..., ::-1] - [104, 117, 123.5],
        ),
        (
            "NCHW",
            'scale = "0-1"\nmean = [0.5, 0.4, 0.3]\nstd = [0.1, 0.2, 0.3]',
            lambda rgb: (rgb / 255 - [0.5, 0.4, 0.3]) / [0.1, 0.2, 0.3],
        ),
        ("NHWC", 'scale = "-1-1"\nlayout = "NHWC"', lambda rgb: rgb / 127.5 - 1),
        (
            "NHWC",
            'scale = "-1-1"\nlayout = "NHWC"\nchannels = "BGR"\nstd = [1, 1, 2]',
            lambda rgb: (rgb[..., ::-1] / 127.5 - 1) / [1, 1, 2],
        ),
    ],
)
def test_frames_become_the_input_that_the_model_was_trained_on(
    tmp_path: Path, layout: str, rule: str, expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    graph_set = imported(tmp_path, scaled_only(layout), SCALED.format(rule))
    frame = frames()[0]
    wanted = (expected(frame.astype(np.float64)) * [1, 100, 10000]).transpose(2, 0, 1)
    compare(logits_by_stages(graph_set, frame), {"exit1.only": wanted})


def test_a_model_that_takes_frames_gets_frames(tmp_path: Path) -> None:
    rule = 'scale = "0-255"\nlayout = "NHWC"'
    graph_set = imported(tmp_path, scaled_only("NHWC", TensorProto.UINT8), SCALED.format(rule))
    wanted = (frames()[0].astype(np.float64) * [1, 100, 10000]).transpose(2, 0, 1)
    compare(logits_by_stages(graph_set, frames()[0]), {"exit1.only": wanted})


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        self.same = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, groups=4), nn.BatchNorm2d(outputs), nn.SiLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        return x + self.same(x)


class Encoder(nn.Module):
    """Somebody's encoder with two auxiliary heads: everything comes out upsampled, normalisation is outside."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Residual(3, 16), Residual(16, 24), Residual(24, 32)])
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Dropout(), nn.Conv2d(16, 5, 1))
            for channels in (16, 24, 32)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        size, results = x.shape[2:], []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            results.append(nn.functional.interpolate(head(x), size, mode="bilinear", align_corners=False))
        return results


TORCH = """
classes = ["road", "car", "tree", "sky", "person"]
colours = [[128, 64, 128], [0, 0, 142], [107, 142, 35], [70, 130, 180], [220, 20, 60]]
baseline = "main"
input = { scale = "0-1", mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225] }

[[exit]]
tensor = "/stages.0/Add_output_0"
head = [{ name = "early", logits = "early" }]

[[exit]]
tensor = "/stages.1/Add_output_0"
head = [{ name = "middle", logits = "middle" }]

[[exit]]
tensor = "/stages.2/Add_output_0"
head = [{ name = "main", logits = "main" }]
"""


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
def test_a_torch_network_that_is_not_ours(tmp_path: Path, dynamic: bool) -> None:
    torch.manual_seed(2)
    network = Encoder()
    network(torch.randn(8, 3, *HW))  # BatchNorm's statistics
    for head in network.heads:
        nn.init.normal_(head[0].weight, std=0.3)
        nn.init.normal_(head[-1].weight)
    network.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(1, 3, *HW),),
            str(tmp_path / "theirs.onnx"),
            input_names=["pixels"],
            output_names=["early", "middle", "main"],
            dynamic_axes={"pixels": {0: "batch"}} if dynamic else None,
            opset_version=17,
            dynamo=False,
        )
    (tmp_path / "exits.toml").write_text(TORCH)
    done("-C", tmp_path, "export", tmp_path / "theirs.onnx", "--exits", tmp_path / "exits.toml")
    found = printed_json("-C", tmp_path, "inspect", "graphs")
    assert [head["name"] for head in found["heads"]] == ["exit1.early", "exit2.middle", "exit3.main"]
    for frame in frames():
        pixels = ((frame / 255 - MEAN) / STD).astype(np.float32).transpose(2, 0, 1)[None]
        with torch.inference_mode():
            wanted = network(torch.from_numpy(pixels))[-1][0].argmax(dim=0).numpy()
        session = onnxruntime.InferenceSession(str(tmp_path / "graphs" / "baseline.onnx"))
        assert len(np.unique(wanted)) > 2, "labels that are all alike would prove nothing"
        assert np.array_equal(session.run(["labels"], {"image": frame[None]})[0][0], wanted)


def edited(change: Change) -> onnx.ModelProto:
    model = foreign_network()
    model.graph.ClearField("value_info")
    change(model)
    return model


def node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if output in node.output)


def refused(folder: Path, message: str, model: onnx.ModelProto | None = None, toml: str = TOML) -> None:
    """One line says why, and nothing is left beside what was there."""
    paths = saved(folder, model, toml)
    before = contents(folder)
    with pytest.raises((InputError, EngineError), match=message):
        import_with_exits(*paths, folder / "graphs", Gate(), frames, tiny.nothing)
    assert contents(folder) == before


FIRST, SECOND = TOML[TOML.index("[[exit]]") :].split("[[exit]]")[1:3]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"stage2"', '"stage_2"', r"\[\[exit\]\] 2: the model has no tensor 'stage_2': did you mean 'stage2'"),
        ('"aux1"', '"aux"', r"head exit1\.fcn: the model has no tensor 'aux': did you mean .*'aux1'"),
        ('"input.1"', '"images"', r"\[input\] is 'images', but the exits need the inputs 'input\.1'"),
        ('"stage2"', '"branch"', r"bypasses exit2 \('branch'\) .* through 'down' before it and 'stage2' after it"),
        (f"{FIRST}[[exit]]{SECOND}", f"{SECOND}[[exit]]{FIRST}", r"exit1 comes after exit2 \('stage1'\): list"),
        ('"stage1"', '"stage3"', "exit1 and exit3 are both at tensor 'stage3'"),
        ('"stage3"', '"stem"', r"exit1 \('stage1'\) comes after exit3 \('stem'\): list exits in running order"),
        ('"stage2"', '"aux1"', r"exit2 \('aux1'\) is a side branch: .* from 'stage1'; the nearest .* is 'stage2'"),
        ('"stage1"', '"input.1"', "exit1 is at 'input.1', the model's input"),
        ('"stage1"', '"stem.weight"', "no tensor 'stem.weight'"),
        ('"aux1"', '"aux2"', r"exit1\.fcn: logits 'aux2' are computed from 'stage2', the tensor of exit2: list them"),
        ('"aux2_up"', '"main"', r"exit2\.fcn: logits 'main' are computed from 'stage3', the tensor of exit3: list"),
        ('"main_up"', '"aux2"', r"exit3\.fcn: logits 'aux2' do not depend on the tensor of .*, 'stage3'"),
        ('"aux1"', '"stage1"', r"exit1\.fcn: logits 'stage1' have 8 channels for 4 classes"),
        ('"sky"]', '"sky", "sea"]', r"exit1\.fcn: logits 'aux1' have 4 channels for 5 classes"),
        ("[[exit]]", '[[exit]]\ntensor = "stem"\nhead = []\n[[exit]]', "head.* is .*not a list of one or more"),
    ],
)  # fmt: skip
def test_places_that_are_no_places_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TOML
    refused(tmp_path, message, toml=TOML.replace(old, new, 1))


def skip_connection(model: onnx.ModelProto) -> None:
    """The final head also sees the first stage."""
    graph = model.graph
    add(graph, "MaxPool", ["stage1"], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    graph.initializer.append(numpy_helper.from_array(np.ones((CLASSES, 8, 1, 1), np.float32), "skip.weight"))
    add(graph, "Conv", ["pooled", "skip.weight"], "skip")
    add(graph, "Add", ["main", "skip"], "both")


def after(op: str, **attributes: Any) -> Change:
    return lambda model: void(add(model.graph, op, ["main_up"], "both", **attributes))


def void(_: object) -> None:
    pass


def resized(**attributes: Any) -> Change:
    return lambda model: resize(model.graph, "main", "both", **attributes)


def squeezed(model: onnx.ModelProto) -> None:
    add(model.graph, "Resize", ["main", "", "", constant(model.graph, "s", [1, 4, 2, 12], "int64")], "both")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (skip_connection, r"exit3\.fcn: logits 'both' also depend on 'skip', which is not computed from 'stage3'"),
        (after("Softmax", axis=1), r"exit3\.fcn: 'both' is made by Softmax: name the logits before it, 'main_up'"),
        (after("ArgMax", axis=1), r"exit3\.fcn: 'both' is made by ArgMax: name the logits before it, 'main_up'"),
        (after("Cast", to=TensorProto.FLOAT16), r"exit3\.fcn: tensor 'both' is float16, not float32"),
        (after("ReduceMax", axes=[1], keepdims=0), r"tensor 'both' has the shape \(1, 32, 48\), not that of a map"),
        (resized(coordinate_transformation_mode="align_corners"), "'both' is upsampled differently .*align_corners"),
        (resized(mode="nearest"), "'both' is upsampled differently .*mode 'nearest'.* the logits before it, 'main'"),
        (squeezed, r"exit3\.fcn: logits 'both' are 2 x 12, which does not cover an input of 32 x 48"),
    ],
)  # fmt: skip
def test_logits_that_the_device_could_not_reproduce_are_named(tmp_path: Path, change: Change, message: str) -> None:
    refused(tmp_path, message, edited(change), TOML.replace('"main_up"', '"both"'))


def dims(*sizes: int | str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("input.1", TensorProto.FLOAT, sizes))

    return change


def second_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("gain", TensorProto.FLOAT, (1, 3, *HW)))
    model.graph.node.insert(0, helper.make_node("Mul", ["input.1", "gain"], ["louder"]))
    node(model, "stem").input[0] = "louder"


def half_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    model.graph.node.insert(0, helper.make_node("Cast", ["input.1"], ["whole"], to=TensorProto.FLOAT))
    node(model, "stem").input[0] = "whole"


def untyped_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UNDEFINED


def wrapped(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 19
    constant(model.graph, "pads", [0, 0, 1, 1, 0, 0, 1, 1], "int64")
    model.graph.node.insert(0, helper.make_node("Pad", ["input.1", "pads"], ["wrapped"], "wider", mode="wrap"))
    node(model, "stem").input[0] = "wrapped"
    node(model, "stem").attribute.remove(next(each for each in node(model, "stem").attribute if each.name == "pads"))


def custom(model: onnx.ModelProto) -> None:
    node(model, "stage1").domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def subgraph(model: onnx.ModelProto) -> None:
    value = helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Relu", ["stem"], ["chosen"])], "branch", [], [value])
    relu = node(model, "stage1")
    relu.op_type, relu.input[0] = "If", constant(model.graph, "always", True, "bool")
    relu.attribute.extend([helper.make_attribute("then_branch", branch), helper.make_attribute("else_branch", branch)])


def quantised(model: onnx.ModelProto) -> None:
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "main.weight")
    weight.CopyFrom(numpy_helper.from_array(np.ones((CLASSES, 16, 1, 1), np.int8), "bytes"))
    constant(model.graph, "step", 0.1, "float32")
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["bytes", "step"], ["main.weight"]))


def written_twice(model: onnx.ModelProto) -> None:
    node(model, "aux1").output[0] = "stem"


def elsewhere(location: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        weight = next(tensor for tensor in model.graph.initializer if tensor.name == "down.weight")
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)

    return change


def constant_elsewhere(model: onnx.ModelProto) -> None:
    tensor = TensorProto(name="size", data_type=TensorProto.INT64, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="model.onnx")
    tensor.external_data.add(key="length", value="32")
    del model.graph.initializer[[tensor.name for tensor in model.graph.initializer].index("size")]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["size"], "sizes", value=tensor))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dims(4, 3, *HW), r"input 'input\.1' is \(4, 3, 32, 48\), not batch 1 and 3 channels.*export with batch 1"),
        (dims("N", 3, "H", 48), r"'input\.1' has no static shape \(1, 3, H, 48\): export with fixed input sizes"),
        (dims(1, 3, 20000, 48), r"sides of more than 16384"),
        (second_input, r"the exits need 2 inputs \('input\.1', 'gain'\), not one image"),
        (half_input, r"input 'input\.1' is float16: export with a float32 or uint8 input"),
        (untyped_input, r"input 'input\.1' is undefined: export with a float32"),
        (wrapped, r"node 'wider' \(Pad, opset 19\) pads by wrapping around, which opset 17 lacks: export the model at"),
        (custom, r"node 'stage1' is com\.example\.Relu, outside the standard ONNX operators"),
        (subgraph, r"node 'stage1' \(If\) holds a subgraph: export without control flow"),
        (quantised, r"node 'main' \(Conv\) computes its weights: export a float32 model"),
        (written_twice, r"model\.onnx is not valid ONNX"),
        (elsewhere("../outside.bin"), r"outside"),
        (elsewhere("/etc/passwd"), r"/etc/passwd"),
        (elsewhere("absent.bin"), r"absent\.bin"),
        (constant_elsewhere, r"keeps its constant in another file"),
        (lambda model: model.graph.node.pop(0), r"model\.onnx is not valid ONNX"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_cut_are_refused_with_the_remedy(tmp_path: Path, change: Change, message: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(4096))
    refused(folder, message, edited(change))


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    model, toml = saved(tmp_path)
    for name in (b"branch", b"branch.weight"):
        model.write_bytes(foreign_network().SerializeToString().replace(name, name.replace(b"b", b"\xff")))
        assert "model.onnx is not valid ONNX" in complaint("-C", tmp_path, "export", model, "--exits", toml)


def test_external_data_behind_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(8 * 12 * 9 * 4))
    os.symlink(tmp_path / "outside.bin", folder / "inside.bin")
    refused(folder, r"inside\.bin", edited(elsewhere("inside.bin")))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (TOML, "", "classes is missing: give a list of one or more"),
        (TOML, "classes = ", "is not TOML"),
        (TOML, "a = " + "[" * 20000, "is not TOML"),
        (TOML, "a = " + "9" * 5000, "is not TOML"),
        (TOML, "# " * 200000, "has more than 262144 bytes"),
        ("classes", "clases", r"clases is not a known entry \(did you mean 'classes'\?\)"),
        ("\n[input]", "[other]", "other is not a known entry; known are baseline, classes"),
        ('"sky"]', '"road"]', "classes has 4 names, 3 of them distinct"),
        ('"sky"]', "7]", r"classes\[4\] is 7, not text"),
        ('"sky"]', '"\\u0007"]', "not text"),
        ('["road", "car", "tree", "sky"]', '["road"]', "have 4 channels for 1 classes.*a single class has one channel"),
        ("\n[input]", "colours = [[0, 0, 0]]\n[input]", "colours has 1 entries for the classes road, car, tree, sky"),
        ("\n[input]", "colours = [[0,0,0],[1,1,1],[2,2,2],[0,0,256]]\n[input]", r"colours\[4\] is .*256.*not .R"),
        ("\n[input]", 'baseline = "aux"\n[input]', "baseline is 'aux', not a head of the last exit: fcn"),
        ('scale = "0-1"', "", r"input\.scale is missing: give one of 0-1, 0-255"),
        ('scale = "0-1"', 'scale = "0-2"', r"input\.scale is '0-2', not one of 0-1, 0-255"),
        ('scale = "0-1"', 'scale = "0-255"', r"input\.std is .*0\.229.* but scale is '0-255'"),
        ("mean = [0.485", "mean = [123.675", r"input\.mean is .*123\.675.* but scale is '0-1'"),
        ("std = [0.229", "std = [0", r"input\.std is"),
        ("std = [0.229", "std = [nan", r"input\.std is"),
        ("std = [0.229", "std = [inf", r"input\.std is"),
        ("std = [0.229", f"std = [0x{'f' * 5000}", r"input\.std is a number of thousands of digits"),
        ('scale = "0-1"', 'scale = "0-1"\nlayout = "NHWC"', r"\(1, 3, 32, 48\), not batch 1 and 3 .* layout NHWC"),
        ('scale = "0-1"', 'scale = "0-1"\nlayout = "CHW"', r"input\.layout is 'CHW', not one of NCHW"),
        ('scale = "0-1"', 'scale = "0-1"\nchannels = "rgb"', r"input\.channels is 'rgb', not one of RGB"),
        ('"fcn"', '"../fcn"', r"exit\[1\]\.head\[1\]\.name is '\.\./fcn', not 1 to 64 .*named after it"),
        ('"fcn"', '"tête"', "files are named after it"),
        ('"fcn"', f'"{"a" * 65}"', "files are named after it"),
        ('name = "fcn"\n', "", r"exit\[1\]\.head\[1\]\.name is missing"),
        ('tensor = "stage1"', "tensor = 1", r"exit\[1\]\.tensor is 1, not text"),
        ("[[exit.head]]", "[exit.head]", r"exit\[1\]\.head is .*not a list"),
    ],
)  # fmt: skip
def test_a_wrong_toml_is_told_what_it_should_hold(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TOML
    refused(tmp_path, f"({message})", toml=TOML.replace(old, new, 1))


def test_whatever_a_toml_holds_is_understood_or_refused(tmp_path: Path) -> None:
    values = (
        "1",
        "-0.0",
        "nan",
        "1e400",
        "true",
        "''",
        "[]",
        "[[]]",
        "{}",
        "1979-05-27",
        "07:32:00",
        f"0x{'f' * 5000}",
    )
    entries = re.findall(r"^ *(\w+) = .*$", TOML, re.MULTILINE)
    path = tmp_path / "exits.toml"
    for entry in dict.fromkeys(entries):
        for value in values:
            path.write_text(re.sub(rf"(?m)^( *){entry} = .*$", rf"\g<1>{entry} = {value}", TOML, count=1))
            with pytest.raises(InputError, match=r"exits\.toml"):
                read_exits(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not TOML"):
        read_exits(path)
    with pytest.raises(InputError, match=r"absent\.toml does not exist"):
        read_exits(tmp_path / "absent.toml")


def calls_a_function(model: onnx.ModelProto) -> None:
    custom(model)
    body = [helper.make_node("Relu", ["x"], ["y"])]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("com.example", "Relu", ["x"], ["y"], body, opsets))


def of_a_newer_onnx(model: onnx.ModelProto) -> None:
    model.ir_version = onnx.IR_VERSION + 1


def weights_in_half(model: onnx.ModelProto) -> None:
    """A trained network whose file was made small: weights in fp16, brought back in the graph."""
    for tensor in list(model.graph.initializer):
        if tensor.name.endswith(".weight"):
            half = numpy_helper.to_array(tensor).astype(np.float16)
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
            model.graph.node.insert(0, helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))


@pytest.mark.parametrize(
    ("change", "tolerance"), [(calls_a_function, 1e-4), (of_a_newer_onnx, 1e-4), (weights_in_half, 5e-3)]
)
def test_what_exporters_write_is_taken(tmp_path: Path, change: Change, tolerance: float) -> None:
    graph_set = imported(tmp_path, edited(change))
    found, expected = logits_by_stages(graph_set, frames()[0]), expected_logits(frames()[0])
    for name, values in expected.items():
        assert np.abs(found[name] - values).max() < tolerance * np.abs(values).max()


def sigmoid(model: onnx.ModelProto) -> None:
    """One channel a head: what speaks for the class."""
    for tensor in model.graph.initializer:
        if tensor.name in ("aux1.weight", "aux2.weight", "main.weight"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:1].copy(), tensor.name))
        if tensor.name == "size":
            tensor.CopyFrom(numpy_helper.from_array(np.array([1, 1, *HW]), tensor.name))
    add(model.graph, "Sigmoid", ["main_up"], "probability")


@pytest.mark.parametrize("classes", ['["crack"]', '["ground", "crack"]'])
def test_one_channel_is_a_class_and_the_rest(tmp_path: Path, classes: str) -> None:
    toml = TOML.replace('["road", "car", "tree", "sky"]', classes).replace('"main_up"', '"probability"')
    graph_set = imported(tmp_path, edited(sigmoid), toml)
    assert graph_set.candidate.classes[1] == "crack"
    assert graph_set.candidate.classes[0] in ("background", "ground")
    expected = {name: np.stack([np.zeros(v.shape[1:]), v[0]]) for name, v in expected_logits(frames()[0]).items()}
    compare(logits_by_stages(graph_set, frames()[0]), expected)


def upsampled_inside(model: onnx.ModelProto) -> None:
    """Three decoders: resize and convolution, a deconvolution, a pixel shuffle to the input's size."""
    graph, random = model.graph, np.random.default_rng(8)
    for name, shape in (
        ("refine", (CLASSES, CLASSES, 3, 3)),
        ("deconv", (12, CLASSES, 2, 2)),
        ("wider", (64, 16, 1, 1)),
    ):
        graph.initializer.append(numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), f"{name}.w"))
    constant(graph, "two", [1, 1, 2, 2], "float32")
    add(graph, "Resize", ["aux1", "", "two"], "larger", mode="nearest")
    add(graph, "Conv", ["larger", "refine.w"], "decoded1", pads=[1] * 4)
    add(graph, "ConvTranspose", ["stage2", "deconv.w"], "decoded2", strides=[2, 2])
    add(graph, "Conv", ["stage3", "wider.w"], "cells")
    add(graph, "DepthToSpace", ["cells"], "decoded3", blocksize=4, mode="CRD")


def test_heads_may_upsample_inside(tmp_path: Path) -> None:
    """Gate and output graph read a head's logits at their own size; the labels are those of the model as it came."""
    toml = TOML.replace('"aux1"', '"decoded1"').replace('"aux2_up"', '"decoded2"').replace('"main_up"', '"decoded3"')
    model = edited(upsampled_inside)
    graph_set = imported(tmp_path, model, toml)
    candidate = graph_set.candidate
    sizes = [candidate.logits_hw(head) for head in candidate.heads]
    assert sizes == [(32, 48), (16, 24), (32, 48)]
    assert [point.hw for point in candidate.exit_points] == [(16, 24), (8, 12), (8, 12)]
    whole = onnx.load(str(graph_set.path("output-32x48")))
    assert "Resize" not in {node.op_type for node in whole.graph.node}, "full-size logits need no upsampling"
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=f"decoded{number}") for number in (1, 2, 3))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    frame = frames()[0]
    pixels = ((frame / 255 - MEAN) / STD).astype(np.float32).transpose(2, 0, 1)[None]
    names = [head.name for head in candidate.heads]
    wanted = dict(zip(names, (values[0] for values in session.run(None, {"input.1": pixels})), strict=True))
    compare(logits_by_stages(graph_set, frame), wanted)
    assert np.array_equal(run(graph_set, "baseline", {"image": frame[None]})[0], wanted["exit3.fcn"].argmax(axis=0))


@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN"), (-np.inf, "-inf")])
def test_a_network_that_gives_no_numbers_is_named_for_it(tmp_path: Path, value: float, said: str) -> None:
    def broken(model: onnx.ModelProto) -> None:
        constant(model.graph, "bias", np.full((1, CLASSES, 1, 1), value), "float32")
        add(model.graph, "Add", ["main", "bias"], "both")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = rf"head exit3\.fcn of the original model gives {said} on frame 0: .* with {said} is 'both'"
        refused(tmp_path, message, edited(broken), TOML.replace('"main_up"', '"both"'))


def test_what_our_conversion_breaks_is_not_the_models_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_: Conversion, made: onnx.NodeProto) -> list[onnx.NodeProto]:
        made.op_type = "Abs"
        return [made]

    monkeypatch.setattr(opset, "RULES", ((("Relu",), 1, 99, wrong),))
    message = (
        r"from opset 18 to 17 changed what node 'stage1' \(Relu\) computes by \d.*a bug of mess-compile, not of the"
    )
    refused(tmp_path, message, foreign_network(18))


def test_a_side_branch_names_the_nearest_tensor_that_works(tmp_path: Path) -> None:
    """Tokens that are maps for the heads only, as a transformer's: 'stage1' is the last map before them."""
    model = foreign_network()
    graph = model.graph
    graph.ClearField("value_info")
    node(model, "stage2").output[0] = "sum"
    constant(graph, "flat", [1, 12, 96], "int64")
    constant(graph, "map", [1, 12, 8, 12], "int64")
    at = [each.output[0] for each in graph.node].index("sum") + 1
    graph.node.insert(at, helper.make_node("Reshape", ["sum", "flat"], ["tokens"], "tokens"))
    graph.node.insert(at + 1, helper.make_node("Relu", ["tokens"], ["mixed"], "mixed"))
    graph.node.insert(at + 2, helper.make_node("Reshape", ["tokens", "map"], ["stage2"], "stage2"))
    graph.node.insert(at + 3, helper.make_node("Reshape", ["mixed", "map"], ["next"], "next"))
    node(model, "wide").input[0] = "next"
    side = (
        r"exit2 \('stage2'\) is a side branch: the backbone goes on from 'tokens', which is not a map but \(1, 12, 96\)"
    )
    refused(tmp_path, side + "; the nearest tensor that works is 'sum'", model)
    no_map = r"exit2: tensor 'tokens' has the shape \(1, 12, 96\), not that of a map .*; the nearest .* is 'sum'"
    refused(tmp_path, no_map, model, TOML.replace('"stage2"', '"tokens"'))
    imported(tmp_path, model, TOML.replace('"stage2"', '"sum"'))


class TestCommandLine:
    def test_it_says_what_it_made(self, tmp_path: Path) -> None:
        model, toml = saved(tmp_path)
        printed = done("-C", tmp_path, "export", model, "--exits", toml, "-v")
        assert "12 graphs in " in printed
        assert "6 segments, 3 heads" in printed
        assert "each checked against the whole network" in printed
        assert "hint: mess-compile" in printed

    def test_a_tensor_that_does_not_exist_is_one_line(self, tmp_path: Path) -> None:
        model, toml = saved(tmp_path, toml=TOML.replace('"stage2"', '"layer2"'))
        assert "no tensor 'layer2'" in complaint("-C", tmp_path, "export", model, "--exits", toml)
        assert not (tmp_path / "graphs").exists()

    def test_a_model_that_is_missing_is_said_to_be(self, tmp_path: Path) -> None:
        model, toml = saved(tmp_path)
        assert "modle.onnx does not exist (did you mean 'model.onnx'?)" in complaint("export", tmp_path / "modle.onnx")
        assert "modle.onnx does not exist" in complaint("export", tmp_path / "modle.onnx", "--exits", toml)
        assert model.is_file()

    def test_no_message_names_a_temporary_file(self, tmp_path: Path) -> None:
        weights = foreign_network()
        elsewhere("absent.bin")(weights)
        model, toml = saved(tmp_path, weights)
        assert ".graphs." not in complaint("-C", tmp_path, "export", model, "--exits", toml)

    def test_exits_belong_to_a_model(self, tmp_path: Path) -> None:
        _, toml = saved(tmp_path)
        assert "export MODEL.onnx --exits" in complaint("-C", tmp_path, "export", "--exits", toml)
        assert "is no ONNX file" in complaint("-C", tmp_path, "export", tmp_path, "--exits", toml)
        assert "absent.toml does not exist" in complaint(
            "-C", tmp_path, "export", tmp_path / "model.onnx", "--exits", tmp_path / "absent.toml"
        )
