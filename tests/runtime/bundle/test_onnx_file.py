"""A hostile graph reads no file of the device and takes no memory for tensors that are not there."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mess_compile.runtime.base.errors import BundleError
from mess_compile.runtime.bundle import onnx_file
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
        (placed("location", "/etc/passwd"), "'/etc/passwd', which is not a file of the bundle"),
        (placed("location", "../golden/0.npy"), "not a file of the bundle"),
        (placed("location", ""), "not a file of the bundle"),
        (placed("offset", "4096"), "refers to 4096"),
        (placed("offset", "-4"), "place is '-4'"),
        (placed("length", "9" * 30), "place is '999"),
        (placed("length", "1000000"), "1000000 of weights"),
        (placed("basepath", "/etc"), "not a file of the bundle"),
        (twice, "not a file of the bundle"),
        (wide, "has the shape"),
        (wider, "a tensor of"),
        (claiming(data_type=1, dims=[1 << 39], raw_data=b"1234"), "has 4 bytes"),
        (claiming(data_type=1, dims=[1 << 39], float_data=[1.0]), "4 bytes of values"),
        (claiming(data_type=1, dims=[-1], raw_data=b""), "has the shape"),
        (claiming(data_type=1, dims=[0, -1], raw_data=b""), "has the shape"),
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
    with pytest.raises(BundleError, match=rf"segment-0-1\.onnx is not a graph that a bundle may contain: .*{words}"):
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
    with pytest.raises(BundleError, match="there twice"):
        onnx_file.check(folder, NAME, sizes(folder))


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


@pytest.mark.parametrize("content", [b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 20, b"\x3b", b"\x38\x01", b"\x3a"])
def test_what_is_no_onnx_is_refused(folder: Path, content: bytes) -> None:
    (folder / NAME).write_bytes(content)
    with pytest.raises(BundleError, match="not a graph that a bundle may contain"):
        onnx_file.check(folder, NAME, sizes(folder))


def secret_weight() -> bytes:
    """An initializer that lies in a file of the device."""
    tensor = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor.SerializeToString()


def engine_node() -> bytes:
    return helper.make_node("EPContext", [], ["x"], domain="com.microsoft").SerializeToString()


def with_field(folder: Path, tag: bytes, content: bytes, length: bytes | None = None) -> None:
    """The graph with one more field at its end, under any tag."""
    model = onnx.load(str(folder / NAME), load_external_data=False)
    graph = model.graph.SerializeToString() + tag + (length or varint(len(content))) + content
    model.ClearField("graph")
    rest = model.SerializeToString()
    (folder / NAME).write_bytes(rest + b"\x3a" + varint(len(graph)) + graph)


def names(folder: Path) -> list[str]:
    """As another parser reads the graph."""
    graph = onnx.load(str(folder / NAME), load_external_data=False).graph
    return [tensor.name for tensor in graph.initializer] + [node.op_type for node in graph.node]


@pytest.mark.parametrize(
    ("number", "content", "name"),
    [(5, secret_weight(), "w"), (1, engine_node(), "EPContext")],
    ids=["weight", "engine"],
)
@pytest.mark.parametrize(
    "odd",
    [
        lambda tag: varint(tag + (1 << 32)),
        lambda tag: varint(tag + (7 << 32)),
        lambda tag: bytes([tag | 128, 0]),
        lambda tag: bytes([tag | 128, 128, 128, 128, 0]),
    ],
    ids=["33 bits", "35 bits", "two bytes for one", "five bytes for one"],
)
def test_what_hides_under_a_tag_that_parsers_read_differently_is_refused(
    folder: Path, number: int, content: bytes, name: str, odd: Callable[[int], bytes]
) -> None:
    tag = number << 3 | 2
    with_field(folder, varint(tag), content)
    assert name in names(folder)
    with pytest.raises(BundleError):
        onnx_file.check(folder, NAME, sizes(folder))
    small_network.graph_set(folder / "graphs", baseline_alone="a" * 64)
    with_field(folder, odd(tag), content)
    with pytest.raises(BundleError, match="a number is longer than necessary, or than 32 bits"):
        onnx_file.check(folder, NAME, sizes(folder))


@pytest.mark.parametrize(
    ("tag", "length", "words"),
    [
        (varint(0 << 3 | 2), None, "a graph has a field 0"),
        (varint(9 << 3 | 2), None, "a graph has a field 9"),
        (varint(99 << 3 | 2), None, "a graph has a field 99"),
        (varint(((1 << 29) - 1) << 3 | 2), None, "a graph has a field 536870911"),
        (varint(5 << 3 | 3), None, "a field 5 of wire type 3"),
        (varint(5 << 3), None, "a field 5 of wire type 0"),
        (varint(2 << 3 | 2), b"\x84\x00", "longer than necessary, or than 31 bits"),
        (varint(2 << 3 | 2), varint(1 << 31), "longer than necessary, or than 31 bits"),
        (varint(2 << 3 | 2), varint((1 << 35) + 4), "longer than necessary, or than 31 bits"),
    ],
)
def test_fields_and_lengths_that_onnx_does_not_have_are_refused(
    folder: Path, tag: bytes, length: bytes | None, words: str
) -> None:
    with_field(folder, tag, b"abcd", length)
    with pytest.raises(BundleError, match=words):
        onnx_file.check(folder, NAME, sizes(folder))


def test_the_fields_are_those_of_onnx() -> None:
    """Held against the descriptors that come with ONNX: a field or kind of storage that is not theirs would let one
    parser see what another one does not."""
    own = ("model", "graph", "function", "node", "attribute", "tensor", "type")
    descriptors = {
        **{name: getattr(onnx, f"{name.capitalize()}Proto").DESCRIPTOR for name in own},
        "value": onnx.ValueInfoProto.DESCRIPTOR,
        "tensor_type": onnx.TypeProto.Tensor.DESCRIPTOR,
        "shape": onnx.TensorShapeProto.DESCRIPTOR,
        "dimension": onnx.TensorShapeProto.Dimension.DESCRIPTOR,
        "annotation": onnx.TensorAnnotation.DESCRIPTOR,
        "opset": onnx.OperatorSetIdProto.DESCRIPTOR,
        "pair": onnx.StringStringEntryProto.DESCRIPTOR,
        "sparse": onnx.SparseTensorProto.DESCRIPTOR,
        "training": onnx.TrainingInfoProto.DESCRIPTOR,
    }
    left_out = {("model", 26), ("node", 10), ("tensor", 3), *(("type", number) for number in (4, 5, 7, 8, 9))}
    assert set(onnx_file._FIELDS) == set(descriptors) - {"sparse", "training"}
    for kind, fields in onnx_file._FIELDS.items():
        known = {field.number: field for field in descriptors[kind].fields}
        assert set(fields) == {number for number in known if (kind, number) not in left_out}, kind
        for number, holds in fields.items():
            assert same_kind(holds, known[number], descriptors), (kind, number)


def same_kind(holds: str, field: Any, descriptors: dict[str, Any]) -> bool:
    if field.message_type is not None:
        return bool(descriptors[holds] is field.message_type)
    stored = {
        field.TYPE_FLOAT: "float",
        field.TYPE_DOUBLE: "double",
        field.TYPE_STRING: "text",
        field.TYPE_BYTES: "text",
    }
    several = field.default_value == []
    kind = stored.get(field.type, "int")
    return holds == (kind + "s" if several and kind != "text" else kind)


def test_a_tensor_of_millions_of_dimensions_is_refused_before_memory_is_taken(folder: Path) -> None:
    tensor = b"\x0a" + varint(4 << 20) + b"\x01" * (4 << 20)
    with_field(folder, varint(5 << 3 | 2), tensor)
    found = sizes(folder)
    tracemalloc.start()
    with pytest.raises(BundleError, match=r"has the shape \[1, 1, 1, 1, 1, 1, 1, 1\]"):
        onnx_file.check(folder, NAME, found)
    assert tracemalloc.get_traced_memory()[1] < 5 << 20, "beside the file itself"
    tracemalloc.stop()


def test_a_bundle_of_millions_of_empty_fields_is_refused_in_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "MAX_FIELDS", 10_000)
    onnx_file.check_graphs(folder, sizes(folder))
    for number in range(2):  # each of them small enough
        (folder / "graphs" / f"{number}.onnx").write_bytes(b"\x3a" + varint(12_000) + b"\x0a\x00" * 6_000)
        onnx_file.check(folder, f"graphs/{number}.onnx", sizes(folder))
    with pytest.raises(BundleError, match="more than 10000 fields"):
        onnx_file.check_graphs(folder, sizes(folder))


def test_a_graph_that_keeps_its_weights_inside_is_refused_unread(folder: Path) -> None:
    with pytest.raises(BundleError, match="has 16777217 bytes, too many for a graph"):
        onnx_file.check(folder, NAME, {NAME: (16 << 20) + 1})


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=60))
def test_any_bytes_are_refused_or_a_graph(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "any.onnx").write_bytes(content)
    try:
        onnx_file.check(folder, "any.onnx", {"any.onnx": len(content)})
    except BundleError:
        return
    onnx.ModelProto.FromString(content)
