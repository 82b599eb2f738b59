"""Cuts: a connection overlooked here would be a bundle that computes something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mess_compile.graph.cut import cut, cut_network, import_network
from mess_compile.graph.import_onnx import import_onnx
from mess_compile.graph.node_builder import add, constant
from mess_compile.graph.store import externalise, read_model, write_model
from mess_compile.network import Gate, GraphSpec, read_graph_set
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import TensorSpec
from tests.graph import tiny

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
    rows, counts = TensorSpec("thresholds", "float32", (2, 4)), TensorSpec("counts", "int32", (2,))
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
    assert counts.tolist() == [24, 24]


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
