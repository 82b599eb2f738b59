"""A hostile graph reads no file of the device and takes no memory for tensors that are not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mess_compile.runtime import onnx_file
from mess_compile.runtime.errors import BundleError
from tests import small_network

NAME = "graphs/segment-0-1.onnx"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_network.graph_set(tmp_path / "graphs", baseline_alone="a" * 64)
    return tmp_path


def sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_the_graphs_that_are_exported_pass(folder: Path) -> None:
    graphs = [name for name in sizes(folder) if name.endswith(".onnx")]
    assert len(graphs) == 7
    for name in graphs:
        onnx_file.check(folder, name, sizes(folder))


def weight(model: onnx.ModelProto) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def placed(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = weight(model)
        entries = {entry.key: entry.value for entry in tensor.external_data} | {key: value}
        del tensor.external_data[:]
        for name, text in entries.items():
            tensor.external_data.add(key=name, value=text)

    return change


def twice(model: onnx.ModelProto) -> None:
    weight(model).external_data.add(key="location", value="/etc/passwd")


def wide(model: onnx.ModelProto) -> None:
    weight(model).dims[0] = 1 << 50


def wider(model: onnx.ModelProto) -> None:
    weight(model).dims[0] += 1


def claiming(**fields: object) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(TensorProto(name="more", **fields))  # type: ignore[arg-type]

    return change


def hidden(model: onnx.ModelProto) -> None:
    """In a subgraph of a node's attribute."""
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "x")
    tensor.dims[0] = 1 << 33
    inner = helper.make_graph([helper.make_node("Constant", [], ["y"], value=tensor)], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))


def in_a_function(model: onnx.ModelProto) -> None:
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[1 << 33])
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    model.functions.append(helper.make_function("own", "f", [], ["y"], [node], [helper.make_opsetid("", 17)]))


def deep(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "g", [], [])
    for _ in range(9):
        inner = helper.make_graph([helper.make_node("If", ["c"], ["z"], then_branch=inner)], "g", [], [])
    model.graph.node.extend(inner.node)


def sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add().dims.extend([1 << 20, 1 << 20])


def engine(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("EPContext", [], ["x"], domain="com.microsoft", embed_mode=0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (placed("location", "/etc/passwd"), "'/etc/passwd', which is no file of the bundle"),
        (placed("location", "../golden/0.npy"), "no file of the bundle"),
        (placed("location", ""), "no file of the bundle"),
        (placed("offset", "4096"), "lies at 4096"),
        (placed("offset", "-4"), "lies at '-4'"),
        (placed("length", "9" * 30), "lies at '999"),
        (placed("length", "1000000"), "1000000 of weights"),
        (twice, "no file of the bundle"),
        (wide, "has the shape"),
        (wider, "a tensor of"),
        (claiming(data_type=1, dims=[1 << 39], raw_data=b"1234"), "has 4 bytes"),
        (claiming(data_type=1, dims=[1 << 39], float_data=[1.0]), "4 bytes of values"),
        (claiming(data_type=1, dims=[-1], raw_data=b""), "has the shape"),
        (claiming(data_type=8, dims=[1], string_data=[b"x"]), "elements of type 8"),
        (claiming(data_type=99, dims=[1]), "elements of type 99"),
        (hidden, "a tensor of \\[8589934592\\]"),
        (in_a_function, "a tensor of \\[8589934592\\]"),
        (deep, "deep"),
        (sparse, "a sparse tensor"),
        (engine, "a node of it is an engine"),
    ],
)
def test_what_a_bundle_does_not_hold_is_refused(
    folder: Path, change: Callable[[onnx.ModelProto], None], words: str
) -> None:
    model = onnx.load(str(folder / NAME), load_external_data=False)
    change(model)
    (folder / NAME).write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=rf"segment-0-1\.onnx is not a graph that a bundle holds: .*{words}"):
        onnx_file.check(folder, NAME, sizes(folder))


def test_a_tensor_in_two_parts_that_a_parser_would_join_is_refused(folder: Path) -> None:
    attribute = onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR)
    attribute.t.CopyFrom(numpy_helper.from_array(np.zeros(1000, np.float32)))
    twofold = attribute.SerializeToString() * 2
    assert list(onnx.AttributeProto.FromString(twofold).t.dims) == [1000, 1000]
    node = (
        onnx.NodeProto(op_type="Constant", output=["x"]).SerializeToString() + b"\x2a" + varint(len(twofold)) + twofold
    )
    graph = b"\x0a" + varint(len(node)) + node
    (folder / NAME).write_bytes(b"\x3a" + varint(len(graph)) + graph)
    with pytest.raises(BundleError, match="one already"):
        onnx_file.check(folder, NAME, sizes(folder))


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


@pytest.mark.parametrize("content", [b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 20, b"\x3b", b"\x38\x01", b"\x3a"])
def test_what_is_no_onnx_is_refused(folder: Path, content: bytes) -> None:
    (folder / NAME).write_bytes(content)
    with pytest.raises(BundleError, match="not a graph that a bundle holds"):
        onnx_file.check(folder, NAME, sizes(folder))
