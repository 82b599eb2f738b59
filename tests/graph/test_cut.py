"""Cuts: a connection overlooked here would be a bundle that computes something else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from onnx import TensorProto, helper, numpy_helper

from mess_compile.graph.cut import cut, cut_network, import_network
from mess_compile.graph.import_onnx import import_onnx
from mess_compile.graph.node_builder import add, constant
from mess_compile.graph.store import externalise, read_model, write_model
from mess_compile.network import Gate, GraphSpec, read_graph_set
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import TensorSpec
from tests import skips
from tests.graph import random_network, tiny

GATE = Gate("top1", True, (0.3, 0.5))


def imported(model: onnx.ModelProto, folder: Path) -> dict[str, GraphSpec]:
    graph_set = import_onnx(tiny.saved(model, folder), folder / "graphs", GATE, tiny.frames(), tiny.nothing)
    return graph_set.graphs


def test_a_cut_names_the_tensor_that_passes_around_the_exit_point() -> None:
    network = import_network(tiny.tiny_network(leak=True))
    assert len(cut(network, ["exit1"], ["exit2"]).graph.node) == 3
    with pytest.raises(InputError, match="exit3 is not bounded by exit2: it also needs 'image'"):
        cut(network, ["exit2"], ["exit3"])


def test_a_cut_names_what_does_not_exist_or_does_not_matter() -> None:
    network = import_network(tiny.tiny_network())
    with pytest.raises(InputError, match="no tensor 'exit9'"):
        cut(network, ["exit1"], ["exit9"])
    with pytest.raises(InputError, match="exit1 does not depend on 'exit2'"):
        cut(network, ["image", "exit2"], ["exit1"])


def test_control_flow_is_refused() -> None:
    model = tiny.tiny_network()
    graph = model.graph
    branch = helper.make_graph(
        [helper.make_node("Identity", ["exit1"], ["same"])], "branch", [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, (1, 8, 8, 12))],
    )  # fmt: skip
    always = constant(graph, "always", True, "bool")
    graph.node.append(helper.make_node("If", [always], ["out"], "choice", then_branch=branch, else_branch=branch))
    with pytest.raises(InputError, match=r"choice.*control flow"):
        import_network(model)


def test_every_graph_is_there_with_its_fixed_names(tmp_path: Path) -> None:
    graphs = imported(tiny.tiny_network(), tmp_path)
    assert list(graphs) == [
        "segment-0-1", "segment-0-2", "segment-0-3", "segment-1-2", "segment-1-3", "segment-2-3",
        "head-exit1.small", "head-exit2.small", "head-exit2.wide", "head-exit3.final",
        "output-4x6", "output-8x12", "baseline",
    ]  # fmt: skip
    image, exit2 = TensorSpec("image", "uint8", (1, 16, 24, 3)), TensorSpec("exit2", "float32", (1, 12, 4, 6))
    logits, labels = TensorSpec("logits", "float32", (1, 4, 4, 6)), TensorSpec("labels", "uint8", (1, 16, 24))
    rows, counts = TensorSpec("thresholds", "float32", (2, 4)), TensorSpec("counts", "int32", (4, 4))
    assert (graphs["segment-0-2"].inputs, graphs["segment-0-2"].outputs) == ((image,), (exit2,))
    assert (graphs["head-exit2.wide"].inputs, graphs["head-exit2.wide"].outputs) == ((exit2, rows), (logits, counts))
    assert (graphs["output-4x6"].inputs, graphs["output-4x6"].outputs) == ((logits,), (labels,))
    sound = TensorSpec("sound", "int32", (1,))
    assert (graphs["baseline"].inputs, graphs["baseline"].outputs) == ((image,), (labels, sound))


def test_segments_hold_no_weight_that_is_not_theirs(tmp_path: Path) -> None:
    """Weights: stem 8 x 3 x 9, norm 4 x 8, scale 1; down 12 x 8 x 9, residual 12 x 12 x 9; twice 16 x 12; float32."""
    graphs = imported(tiny.tiny_network(), tmp_path)
    first, second, third = 4 * (216 + 32 + 1), 4 * (864 + 1296), 4 * 2 * 192
    assert graphs["segment-0-1"].bytes == first
    assert graphs["segment-1-2"].bytes == second
    assert graphs["segment-0-3"].bytes == first + second + third
    large = [path.stat().st_size for path in (tmp_path / "graphs" / "weights").iterdir()]
    assert sorted(large) == [4 * 864, 4 * 1296]


def test_a_foreign_networks_workloads_are_counted_from_its_convolutions(tmp_path: Path) -> None:
    graphs = imported(tiny.tiny_network(), tmp_path)
    stem, middle, last = 96 * 8 * 27 + 2 * 96 * 8, 24 * 12 * (72 + 108), 24 * 16 * 12 * 2
    assert [graphs[f"segment-{name}"].macs for name in ("0-1", "1-2", "2-3", "0-3")] == [
        stem, middle, last, stem + middle + last,
    ]  # fmt: skip
    assert graphs["head-exit1.small"].macs == 96 * 8 * 4
    assert graphs["baseline"].macs == stem + middle + last + 24 * 16 * 4
    graph_set = read_graph_set(tmp_path / "graphs")
    assert graph_set.candidate.exit_points[2].macs == stem + middle + last
    assert len(graph_set.candidate.identity) == 64


def test_an_edited_copy_is_another_network_whatever_identity_it_claims(tmp_path: Path) -> None:
    model = tiny.tiny_network(identity="a" * 64)
    imported(model, tmp_path)
    first = read_graph_set(tmp_path / "graphs").candidate.identity
    weight = next(tensor for tensor in model.graph.initializer if numpy_helper.to_array(tensor).size == 12 * 8 * 9)
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] += 1.0
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    imported(model, tmp_path)
    second = read_graph_set(tmp_path / "graphs").candidate.identity
    assert len({"a" * 64, first, second}) == 3
    assert len(first) == len(second) == 64


def test_the_written_graphs_compute_what_the_whole_network_computes(tmp_path: Path) -> None:
    model = tiny.tiny_network()
    imported(model, tmp_path)
    frame = tiny.frames(1)[0][None]
    whole = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = whole.run(["logits:exit2.wide"], {"image": frame})

    def run(name: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        path = str(tmp_path / "graphs" / f"{name}.onnx")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return list(session.run(None, feeds))

    (exit2,) = run("segment-1-2", {"exit1": run("segment-0-1", {"image": frame})[0]})
    logits, counts = run("head-exit2.wide", {"exit2": exit2, "thresholds": np.zeros((2, 4), np.float32)})
    assert np.abs(logits - expected).max() < 1e-5
    assert counts[[0, 1, 3]].sum(axis=1).tolist() == [24, 24, 24]


def test_a_failed_import_leaves_the_old_graphs(tmp_path: Path) -> None:
    before = imported(tiny.tiny_network(), tmp_path)
    with pytest.raises(InputError, match="not bounded"):
        imported(tiny.tiny_network(leak=True), tmp_path)
    assert read_graph_set(tmp_path / "graphs").graphs == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graphs", "model.onnx"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_hw": [16, 20]}, r"'image' is uint8 \(1, 16, 24, 3\), but the metadata say uint8 \(1, 16, 20, 3\)"),
        ({"classes": ["a", "b", "c"], "colours": [[0, 0, 0]] * 3}, "'logits:exit1.small' is float32"),
        ({"heads": [{"exit_point": 3, "config": "../final"}], "baseline": "exit3.../final"}, "letters, digits"),
        ({"heads": [{"exit_point": 3, "config": "other"}], "baseline": "exit3.other"}, "no tensor"),
        ({"baseline": "exit1.small"}, "not at the final exit"),
        ({"colours": []}, "0 colours for 4 classes"),
    ],
)
def test_metadata_that_do_not_fit_the_network_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        imported(tiny.tiny_network(**changes), tmp_path)


def test_an_onnx_without_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no metadata entry 'mess'"):
        imported(tiny.Tiny().model, tmp_path)


def test_sizes_computed_in_the_graph_are_folded(tmp_path: Path) -> None:
    """Exporters write Constant nodes and arithmetic on sizes; TensorRT 8.5 wants plain initializers."""
    model = tiny.tiny_network()
    graph = model.graph
    resized = helper.make_node("Resize", ["exit2", "", "", "target"], ["larger"], mode="nearest")
    size = helper.make_tensor("size", TensorProto.INT64, [4], [1, 6, 2, 3])
    half = helper.make_node("Constant", [], ["half"], value=size)
    total = helper.make_node("Add", ["half", "half"], ["doubled"])
    target = helper.make_node("Sub", ["doubled", "batch"], ["target"])
    constant(graph, "batch", [1, 0, 0, 0], "int64")
    graph.node.extend([half, total, target, resized])
    add(graph, "Relu", ["larger"], "unused")
    graph.output.append(helper.make_tensor_value_info("unused", TensorProto.FLOAT, (1, 12, 4, 6)))
    imported(model, tmp_path)
    written = read_model(tmp_path / "graphs" / "network.onnx")
    assert not {"Constant", "Sub"} & {node.op_type for node in written.graph.node}
    assert "target" in {tensor.name for tensor in written.graph.initializer}


def test_progress_names_every_graph_once(tmp_path: Path) -> None:
    model = tiny.tiny_network()
    externalise(model, tmp_path)
    write_model(model, tmp_path / "network.onnx")
    seen: list[tuple[str, int, int]] = []
    graph_set = cut_network(tmp_path, GATE, lambda *step: seen.append(step))
    assert seen == [(name, index, 13) for index, name in enumerate(graph_set.graphs, start=1)]


def session(model: str | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def whole_tensors(model: onnx.ModelProto, names: set[str], frame: np.ndarray) -> dict[str, np.ndarray]:
    """Any tensors of the network, run uncut by ONNX Runtime."""
    inferred = onnx.shape_inference.infer_shapes(model)
    given_already = {value.name for value in inferred.graph.output} | {"image"}
    more = [value for value in inferred.graph.value_info if value.name in names - given_already]
    inferred.graph.output.extend(more)
    found = session(inferred.SerializeToString())
    outputs = [value.name for value in found.get_outputs()]
    return {"image": frame} | dict(zip(outputs, found.run(outputs, {"image": frame}), strict=True))


@settings(max_examples=15, deadline=None)
@given(random_network.networks)
def test_segments_of_any_network_with_skips_recompose_to_the_whole(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[random_network.Steps, set[int]]
) -> None:
    folder = tmp_path_factory.mktemp("random")
    model = random_network.build(*drawn)
    written = onnx.ModelProto.FromString(model.SerializeToString())
    externalise(written, folder)
    write_model(written, folder / "network.onnx")
    graph_set = cut_network(folder, GATE, tiny.nothing)
    candidate, last = graph_set.candidate, len(graph_set.candidate.exit_points)
    frame = np.random.default_rng(1).integers(0, 256, (1, *random_network.HW, 3), dtype=np.uint8)
    live = [{tensor.name for tensor in candidate.frontier(number)} for number in range(last + 1)]
    whole = whole_tensors(model, set().union(*live), frame)
    after: dict[int, dict[str, np.ndarray]] = {0: {"image": frame}}
    for a, b in sorted(candidate.segments(), key=lambda pair: pair[1] - pair[0]):
        spec = graph_set.graphs[f"segment-{a}-{b}"]
        given_names = [tensor.name for tensor in spec.inputs]
        assert {tensor.name for tensor in spec.outputs} == live[b] - live[a]
        assert set(given_names) <= live[a]
        segment = session(str(graph_set.path(spec.name)))
        names = [value.name for value in segment.get_outputs()]
        for before in (whole, after.get(a, whole)):  # on its own, and after the segments before it
            made = dict(zip(names, segment.run(names, {name: before[name] for name in given_names}), strict=True))
            for name, values in made.items():
                np.testing.assert_allclose(values, whole[name], atol=1e-4 * max(1, np.abs(whole[name]).max()))
        if b == a + 1:
            after[b] = {name: ({**after[a], **made})[name] for name in live[b]}
    for head in candidate.heads:
        gated = session(str(graph_set.path(f"head-{head.name}")))
        feeds = {"thresholds": np.zeros((2, 3), np.float32), f"exit{head.exit_point}": whole[f"exit{head.exit_point}"]}
        (logits,) = gated.run(["logits"], feeds)
        np.testing.assert_allclose(logits, whole[f"logits:{head.name}"], atol=1e-3)


def test_a_segment_gives_what_is_alive_at_its_end_and_was_not_before(tmp_path: Path) -> None:
    graphs = skips.imported(tmp_path).graphs
    found = {
        name.removeprefix("segment-"): ([t.name for t in spec.inputs], [t.name for t in spec.outputs])
        for name, spec in graphs.items()
        if name.startswith("segment-")
    }
    assert found == {
        "0-1": (["image"], ["exit1"]),
        "0-2": (["image"], ["exit2", "exit1"]),
        "0-3": (["image"], ["exit3", "skip1"]),
        "1-2": (["exit1"], ["exit2"]),  # exit1 and the image are passed on
        "1-3": (["exit1"], ["exit3", "skip1"]),
        "2-3": (["exit2", "exit1"], ["exit3", "skip1"]),
    }
    stem, down, mixed = 96 * 8 * 27, 24 * 12 * 72, 96 * 12 * 180
    assert [graphs[f"segment-{name}"].macs for name in ("0-1", "1-2", "2-3", "0-3")] == [
        stem, down, mixed, stem + down + mixed,
    ]  # fmt: skip
    assert [tensor.name for tensor in graphs["head-exit3.own"].inputs] == ["skip1", "image", "thresholds"]
    assert graphs["head-exit3.own"].macs == 96 * 15 * 4


def test_the_networks_own_end_gives_its_own_labels(tmp_path: Path) -> None:
    """Aligned corners, of which half-pixel centres make other labels at the edges of regions."""
    graph_set = skips.imported(tmp_path)
    own, plain, whole = (session(str(graph_set.path(name))) for name in ("output-own", "output-8x12", "baseline"))
    other = 0
    for seed in range(5):
        wanted = skips.tensors(skips.frame(seed))
        logits, labels = wanted["logits:exit3.own"], wanted[skips.LABELS]
        np.testing.assert_array_equal(own.run(["labels"], {"logits": logits})[0], labels)
        other += int((plain.run(["labels"], {"logits": logits})[0] != labels).sum())
        painted, sound = whole.run(["labels", "sound"], {"image": skips.frame(seed)[None]})
        np.testing.assert_array_equal(painted, labels)
        assert sound.tolist() == [96]
    assert other > 50


def test_a_tensor_that_is_not_carried_is_named(tmp_path: Path) -> None:
    content = skips.metadata()
    content["exit_points"][1]["carried"] = [skips.IMAGE]
    path = tiny.saved(skips.network(content), tmp_path)
    with pytest.raises(InputError, match="'stem' again, which is before exit2: carry what it computes"):
        import_onnx(path, tmp_path / "graphs", GATE, [skips.frame(0)], tiny.nothing)
    content = skips.metadata()
    for point in content["exit_points"]:
        point["carried"] = [tensor for tensor in point["carried"] if tensor != skips.IMAGE]
    path = tiny.saved(skips.network(content), tmp_path)
    with pytest.raises(InputError, match=r"exit3.own is not bounded by exit3, skip1: it also needs 'image'"):
        import_onnx(path, tmp_path / "graphs", GATE, [skips.frame(0)], tiny.nothing)


@pytest.mark.parametrize(
    ("number", "carried", "message"),
    [
        (2, [skips.FIRST | {"shape": [1, 8, 8, 13]}, skips.IMAGE], r"carries exit1 float32 \(1, 8, 8, 13\), but"),
        (3, [skips.SKIP | {"dtype": "int64"}, skips.IMAGE], "'skip1' is float32 .* the metadata say int64"),
        (3, [skips.SKIP, skips.SKIP], "exit3 carries a tensor twice: exit3, skip1, skip1"),
        (1, [], "exit2 carries image, which exit1 does not"),
        (1, [{"name": "exit2", "dtype": "float32", "shape": [1]}], "exit2, which is not alive before it"),
        (1, [{"name": "logits", "dtype": "float32", "shape": [1]}], "exit1 carries 'logits', a name that"),
        (1, [{"name": "a", "dtype": "float16", "shape": [1]}], "dtype 'float16', not one of"),
        (1, [{"name": "a", "dtype": "int64", "shape": [0]}], r"a int64 \(0,\), without a static shape"),
    ],
)  # fmt: skip
def test_carried_tensors_that_cannot_be_are_refused(tmp_path: Path, number: int, carried: object, message: str) -> None:
    content = skips.metadata()
    content["exit_points"][number - 1]["carried"] = carried
    path = tiny.saved(skips.network(content), tmp_path)
    with pytest.raises(InputError, match=message):
        import_onnx(path, tmp_path / "graphs", GATE, [skips.frame(0)], tiny.nothing)


@pytest.mark.parametrize(
    ("head", "changes", "message"),
    [
        (1, {"labels": skips.LABELS}, "exit1.small has labels or gate_hw, which only the final head may have"),
        (3, {"gate_hw": [3, 6]}, r"gate_hw of head exit3.own is \(3, 6\), which does not divide its logits' \(8, 12\)"),
        (3, {"gate_hw": [0, 6]}, r"heads\[2\].gate_hw is \[0, 6\], not two sides from 1"),
        (3, {"labels": "exit3"}, "labels of head exit3.own is 'exit3'"),
        (3, {"labels": "full-size"}, "'full-size' is float32 .* the metadata say uint8"),
    ],
)
def test_an_own_end_that_cannot_be_is_refused(
    tmp_path: Path, head: int, changes: dict[str, object], message: str
) -> None:
    content = skips.metadata()
    content["heads"][head - 1] |= changes
    path = tiny.saved(skips.network(content), tmp_path)
    with pytest.raises(InputError, match=message):
        import_onnx(path, tmp_path / "graphs", GATE, [skips.frame(0)], tiny.nothing)


def test_a_graph_set_with_skips_is_read_as_it_was_written_and_chains_name_nothing_new(tmp_path: Path) -> None:
    graph_set = skips.imported(tmp_path)
    assert read_graph_set(graph_set.root) == graph_set
    content = graph_set.candidate.to_json()
    assert [[t["name"] for t in point["carried"]] for point in content["exit_points"]] == [
        ["image"], ["exit1", "image"], ["skip1", "image"],
    ]  # fmt: skip
    imported(tiny.tiny_network(), tmp_path)
    chain = read_graph_set(tmp_path / "graphs").candidate.to_json()
    assert [sorted(point) for point in chain["exit_points"]] == [["block", "channels", "hw", "macs", "name"]] * 3
    assert sorted({key for head in chain["heads"] for key in head}) == ["config", "exit_point", "macs"]


def test_a_mask_is_carried_with_its_own_dtype(tmp_path: Path) -> None:
    """Graphs take and give bool, and the recomposed stages are compared with the whole network."""
    model = tiny.tiny_network()
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "bound"))
    mask = helper.make_node("Greater", ["down", "bound"], ["mask"])
    masked = helper.make_node("Where", ["mask", "exit2", "bound"], ["masked"])
    order = [*graph.node]
    place = next(index for index, node in enumerate(order) if node.output[0] == "exit2")
    order[place + 1 : place + 1] = [mask, masked]
    for node in order[place + 3 :]:
        if node.output[0] in ("wide", "again"):
            node.input[0] = "masked"
    del graph.node[:]
    graph.node.extend(order)
    points = tiny.metadata()["exit_points"]
    points[1]["carried"] = [{"name": "mask", "dtype": "bool", "shape": [1, 12, 4, 6]}]
    del model.metadata_props[:]
    model.metadata_props.add(key="mess", value=json.dumps(tiny.metadata(exit_points=points)))
    graphs = imported(model, tmp_path)
    assert [tensor.dtype for tensor in graphs["segment-0-2"].outputs] == ["float32", "bool"]
    assert [tensor.name for tensor in graphs["segment-2-3"].inputs] == ["exit2", "mask"]
    assert read_graph_set(tmp_path / "graphs").graphs == graphs
