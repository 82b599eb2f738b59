"""The index of exported graphs is read as it was written; an edited entry is named, and no graph runs before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile.network import (
    CONFIDENCES,
    DTYPES,
    MAX_SIDE,
    CandidateNetwork,
    ExitPoint,
    Gate,
    GraphSet,
    GraphSpec,
    Head,
    read_graph_set,
    write_graph_set,
)
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import PRECISIONS, TensorSpec

TEXT, COUNT, SIDES = st.text(max_size=6), st.integers(0, (1 << 48) - 1), st.tuples(*[st.integers(1, MAX_SIDE)] * 2)
PRECISION = st.sampled_from(PRECISIONS)
TENSORS = st.lists(
    st.builds(TensorSpec, TEXT, st.sampled_from(DTYPES), st.lists(st.integers(0, 99), max_size=4).map(tuple)),
    max_size=2,
).map(tuple)


@st.composite
def candidates(draw: st.DrawFn) -> CandidateNetwork:
    count, classes = draw(st.integers(1, 3)), draw(st.lists(TEXT, max_size=3))
    points = draw(
        st.lists(st.builds(ExitPoint, TEXT, TEXT, st.integers(), SIDES, COUNT), min_size=count, max_size=count)
    )
    heads = draw(st.lists(st.builds(Head, st.integers(1, count), TEXT, COUNT, st.none() | SIDES), max_size=3))
    last = Head(count, "last", draw(COUNT))
    colours = [(index, 0, 255) for index in range(len(classes))]
    parts = tuple(classes), tuple(colours), draw(SIDES), tuple(points), (*heads, last)
    return CandidateNetwork(draw(TEXT), *parts, last.name, draw(TEXT))


@st.composite
def graph_sets(draw: st.DrawFn) -> GraphSet:
    names = draw(st.lists(st.text("abc_-.0", min_size=1, max_size=5), unique=True, max_size=3))
    specs = {
        name: GraphSpec(
            *(name, f"{name}.onnx", draw(TEXT), draw(TENSORS), draw(TENSORS), draw(COUNT), draw(COUNT), draw(COUNT)),
            *(draw(PRECISION), draw(PRECISION)),
        )
        for name in names
    }
    thresholds = st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3).map(tuple)
    gate = draw(st.builds(Gate, st.sampled_from(CONFIDENCES), st.booleans(), thresholds))
    return GraphSet(Path(), draw(candidates()), gate, specs, None, draw(TEXT))


@settings(deadline=None, max_examples=40)
@given(graph_sets())
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, graph_set: GraphSet) -> None:
    root = tmp_path_factory.getbasetemp() / "graphs"
    graph_set = GraphSet(root, graph_set.candidate, graph_set.gate, graph_set.graphs, None, graph_set.recipe)
    write_graph_set(graph_set)
    assert read_graph_set(root) == graph_set


def written(folder: Path) -> dict[str, Any]:
    """The index of a network of one exit and one graph."""
    head = Head(1, "only", 5)
    point = ExitPoint("exit1", "stage", 8, (4, 6), 7)
    network = CandidateNetwork("tiny", ("road",), ((0, 0, 0),), (8, 12), (point,), (head,), head.name, "a" * 64)
    tensor = TensorSpec("image", "uint8", (1, 8, 12, 3))
    spec = GraphSpec("segment-0-1", "segment-0-1.onnx", "b" * 64, (tensor,), (tensor,), 7, 8, 9)
    write_graph_set(GraphSet(folder, network, Gate(), {spec.name: spec}))
    content: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["candidate"].update(input_hw=[0, 8]),
            "candidate.input_hw is [0, 8], not two sides from 1 to 16384",
        ),
        (lambda c: c["candidate"]["heads"][0].update(macs=-1), "candidate.heads[0].macs is -1, not a workload or size"),
        (lambda c: c["candidate"]["exit_points"][0].pop("macs"), "candidate.exit_points[0].macs is missing"),
        (lambda c: c["gate"].update(edge_aware=1), "gate.edge_aware is 1, not true or false"),
        (lambda c: c["gate"].update(treshold=[]), "gate.treshold is not a known entry (did you mean 'thresholds'?)"),
        (lambda c: c["graphs"][0].update(path="../x.onnx"), "graphs[0].path is '../x.onnx', not the name of an .onnx"),
        (lambda c: c["graphs"][0].update(wanted="fp64"), "graphs[0].wanted is 'fp64', not one of int8, fp16, fp32"),
        (lambda c: c["graphs"][0]["inputs"][0].update(dtype="object"), "tensor image has dtype 'object', not one of"),
        (lambda c: c["graphs"][0]["inputs"][0].update(shape=[1 << 50]), "tensor image has shape (1125899906842624,)"),
        (lambda c: c.update(baseline_alone="a" * 64), "baseline_alone is 'aaa"),
    ],
)
def test_a_wrong_entry_is_named_with_its_value(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    content = written(tmp_path)
    change(content)
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as refused:
        read_graph_set(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / 'index.json'} is damaged ({message}")
    assert str(refused.value).endswith("): run `mess-compile export`")


def test_an_index_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    """Before there were precisions, graphs and set named none."""
    content = written(tmp_path)
    expected = read_graph_set(tmp_path)
    del content["recipe"], content["baseline_alone"], content["graphs"][0]["precision"], content["graphs"][0]["wanted"]
    (tmp_path / "index.json").write_text(json.dumps(content))
    assert read_graph_set(tmp_path) == expected
