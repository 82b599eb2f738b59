"""The gate decides when an image leaves: a wrong count means wrong exits on every device."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from mess_compile.graph.gate import append_gate
from mess_compile.graph.lint import Parser
from mess_compile.graph.node_builder import add, empty_model
from mess_compile.graph.rewrite import rewritten
from mess_compile.network import CONFIDENCES, Gate
from mess_compile.runtime.base.errors import InputError


def gate_model(gate: Gate, classes: int, hw: tuple[int, int]) -> onnx.ModelProto:
    model = empty_model([helper.make_tensor_value_info("map", TensorProto.FLOAT, (1, classes, *hw))])
    add(model.graph, "Identity", ["map"], "logits")
    append_gate(model, gate, classes)
    return model


def gate_session(gate: Gate, classes: int, hw: tuple[int, int]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = gate_model(gate, classes, hw)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def class_counts(gate: Gate, logits: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    session = gate_session(gate, logits.shape[0], logits.shape[1:])
    (counts,) = session.run(["counts"], {"map": logits[None], "thresholds": thresholds})
    assert (counts.dtype, counts.shape) == (np.int32, (len(thresholds) + 2, len(logits)))
    return counts


def run_gate(gate: Gate, logits: np.ndarray, thresholds: np.ndarray) -> list[int]:
    """The confident cells of each row, of all classes together."""
    return class_counts(gate, logits, thresholds)[:-2].sum(axis=1).tolist()


def confidence_of_cell(cell: list[float], kind: str) -> float:
    """Eq. 1's confidence, straight from its words."""
    top = max(cell)
    powers = [math.exp(value - top) for value in cell]
    p = sorted((power / sum(powers) for power in powers), reverse=True)
    if kind == "top1":
        return p[0]
    if kind == "margin":
        return p[0] - p[1]
    return 1 + sum(x * math.log(x) for x in p if x > 0) / math.log(len(p))


def around(values: list[list[float]], y: int, x: int, reach: int) -> list[float]:
    """The window, clipped at the border."""
    rows = values[max(0, y - reach) : y + reach + 1]
    return [value for row in rows for value in row[max(0, x - reach) : x + reach + 1]]


def counts_by_cell(logits: np.ndarray, thresholds: np.ndarray, gate: Gate) -> list[list[int]]:
    """Of each row and class cell by cell, with sorted medians (the upper one of an even number); then the cells beside
    another label, and all cells.

    The median is of confidences where a row holds one threshold, of votes where each class has its own.
    """
    _, height, width = logits.shape
    cells = [[[float(v) for v in logits[:, y, x]] for x in range(width)] for y in range(height)]
    c = [[confidence_of_cell(cell, gate.confidence) for cell in row] for row in cells]
    label = [[cell.index(max(cell)) for cell in row] for row in cells]
    counts = []
    for limits in thresholds.tolist():
        votes = [[float(v >= limits[k]) for v, k in zip(*rows, strict=True)] for rows in zip(c, label, strict=True)]
        values, limit = (c, limits[0]) if len(set(limits)) == 1 else (votes, 0.5)
        total = [0] * len(logits)
        for y in range(height):
            for x in range(width):
                edge = gate.edge_aware and len(set(around(label, y, x, 1))) > 1
                window = sorted(around(values, y, x, 2)) if edge else [values[y][x]]
                total[label[y][x]] += window[len(window) // 2] >= limit
        counts.append(total)
    edges, every = [0] * len(logits), [0] * len(logits)
    for y in range(height):
        for x in range(width):
            edges[label[y][x]] += len(set(around(label, y, x, 1))) > 1
            every[label[y][x]] += 1
    return [*counts, edges, every]


def between(logits: np.ndarray, gate: Gate, quantiles: list[float]) -> list[float]:
    """Thresholds midway between neighbouring confidences, where rounding cannot matter."""
    cells = logits.reshape(logits.shape[0], -1).T
    c = sorted({round(confidence_of_cell([float(v) for v in cell], gate.confidence), 5) for cell in cells})
    edges = [(a + b) / 2 for a, b in zip([-0.1, *c], [*c, 1.1], strict=True) if b - a > 1e-4]
    return [edges[min(int(q * len(edges)), len(edges) - 1)] for q in quantiles]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(2, 5),
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    levels=st.sampled_from([2, 3, 50]),
    kind=st.sampled_from(CONFIDENCES),
    edge_aware=st.booleans(),
    by_class=st.booleans(),
)
def test_the_gate_counts_what_the_equations_say(
    seed: int, classes: int, height: int, width: int, levels: int, kind: str, edge_aware: bool, by_class: bool
) -> None:
    random = np.random.default_rng(seed)
    # Few levels make ties between classes common.
    logits = random.integers(0, levels, (classes, height, width)).astype(np.float32) * np.float32(4 / levels)
    gate = Gate(kind, edge_aware, (0.1, 0.5, 0.9))
    quantiles = random.random((3, classes)) if by_class else np.repeat(random.random((3, 1)), classes, axis=1)
    thresholds = np.array([between(logits, gate, row) for row in quantiles.tolist()], np.float32)
    found = class_counts(gate, logits, thresholds)
    assert found.tolist() == counts_by_cell(logits, thresholds, gate)
    assert tensorrt_counts(gate, logits, thresholds).tolist() == found.tolist()


@pytest.mark.parametrize("kind", CONFIDENCES)
def test_extreme_logits_are_certain_not_nan(kind: str) -> None:
    logits = np.zeros((3, 4, 5), np.float32)
    logits[1] = 2000.0
    assert run_gate(Gate(kind, True, (0.999,)), logits, np.full((1, 3), 0.999, np.float32)) == [20]


@pytest.mark.parametrize("kind", CONFIDENCES)
def test_a_broken_network_never_looks_confident(kind: str) -> None:
    logits = np.full((3, 4, 5), np.nan, np.float32)
    assert run_gate(Gate(kind, True, (0.0,)), logits, np.zeros((1, 3), np.float32)) == [0]


def test_ties_go_to_the_lowest_class() -> None:
    logits = np.zeros((3, 2, 2), np.float32)
    thresholds = np.array([[0.3, 0.9, 0.9], [0.9, 0.3, 0.3]], np.float32)
    assert run_gate(Gate("top1", False, (0.3, 0.9)), logits, thresholds) == [4, 0]


def test_each_class_has_its_own_threshold() -> None:
    logits = np.zeros((2, 1, 4), np.float32)
    logits[0, 0, :3] = 3.0  # three cells of class 0, p = 0.95
    logits[1, 0, 3] = 1.0  # one cell of class 1, p = 0.73
    thresholds = np.array([[0.9, 0.7], [0.9, 0.8], [0.96, 0.7]], np.float32)
    assert run_gate(Gate("top1", False, (0.1, 0.2, 0.3)), logits, thresholds) == [4, 3, 1]


def test_edges_inherit_the_confidence_of_their_neighbours() -> None:
    """A straight boundary of unsure cells in a sure map counts as sure with Eq. 2-3, as unsure without."""
    logits = np.zeros((2, 7, 8), np.float32)
    logits[0, :, :4], logits[1, :, 4:] = 6.0, 6.0
    logits[0, :, 3], logits[1, :, 4] = 0.2, 0.2
    thresholds = np.full((1, 2), 0.9, np.float32)
    assert run_gate(Gate("top1", True, (0.9,)), logits, thresholds) == [7 * 8]
    assert run_gate(Gate("top1", False, (0.9,)), logits, thresholds) == [7 * 6]


def tensorrt_counts(gate: Gate, logits: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """By the form that engines of TensorRT are built from, which has no matrix product."""
    model = gate_model(gate, logits.shape[0], logits.shape[1:])
    changed, names = rewritten(model, Parser("tensorrt_rtx", "1.1", 20, (7, 5)), "fp32")
    assert (names, {node.op_type for node in changed.graph.node} & {"Gemm", "MatMul"}) == (
        ("counts by products",),
        set(),
    )
    session = onnxruntime.InferenceSession(changed.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["counts"], {"map": logits[None], "thresholds": thresholds})[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_cell_that_is_no_number_is_missing_from_the_last_row(bad: float) -> None:
    """Wherever it is: a user would else get wrong labels with a confident face."""
    logits = np.zeros((3, 4, 5), np.float32)
    logits[1] = 8.0
    logits[0, 2, 3] = bad
    counts = class_counts(Gate("top1", True, (0.9,)), logits, np.full((1, 3), 0.9, np.float32))
    assert counts[-1].sum() == 4 * 5 - 1


def test_every_node_is_one_that_tensorrt_8_5_takes() -> None:
    allowed = {
        "Add", "ArgMax", "AveragePool", "Cast", "Concat", "Div", "Equal", "Exp", "Gather", "Gemm", "Greater",
        "GreaterOrEqual", "Identity", "Log", "MaxPool", "Mul", "Neg", "ReduceMax", "ReduceSum", "Reshape", "Squeeze",
        "Sub", "Transpose", "Where",
    }  # fmt: skip
    for kind in CONFIDENCES:
        model = empty_model([helper.make_tensor_value_info("map", TensorProto.FLOAT, (1, 3, 4, 5))])
        add(model.graph, "Identity", ["map"], "logits")
        append_gate(model, Gate(kind), 3)
        assert {node.op_type for node in model.graph.node} <= allowed
        fixed = {tensor.name for tensor in model.graph.initializer}
        parameters = [node.input[1] for node in model.graph.node if node.op_type in ("ReduceSum", "Squeeze")]
        assert fixed.issuperset(parameters)


def test_one_class_is_refused() -> None:
    model = empty_model([helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 1, 4, 5))])
    with pytest.raises(InputError, match="at least 2 classes"):
        append_gate(model, Gate(), 1)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(CONFIDENCES),
    st.booleans(),
    st.sampled_from([(1, 1), (2, 2), (1, 3), (4, 2)]),
    st.integers(0, 99),
)
def test_a_pooled_gate_counts_over_the_means_of_its_windows(
    kind: str, edge_aware: bool, window: tuple[int, int], seed: int
) -> None:
    """The logits that the output graph reads stay as they are."""
    height, width = 3, 4
    hw = height * window[0], width * window[1]
    logits = np.random.default_rng(seed).normal(0, 2, (3, *hw)).astype(np.float32)
    gate = Gate(kind, edge_aware, (0.2, 0.5, 0.8))
    thresholds = np.repeat(np.array(gate.thresholds, np.float32)[:, None], 3, axis=1)
    model = empty_model([helper.make_tensor_value_info("map", TensorProto.FLOAT, (1, 3, *hw))])
    add(model.graph, "Identity", ["map"], "logits")
    model.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 3, *hw)))
    append_gate(model, gate, 3, (hw, (height, width)))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found, counts = session.run(["logits", "counts"], {"map": logits[None], "thresholds": thresholds})
    np.testing.assert_array_equal(found[0], logits)
    means = np.zeros((3, height, width))
    for y in range(height):
        for x in range(width):
            rows = logits[:, y * window[0] : (y + 1) * window[0], x * window[1] : (x + 1) * window[1]]
            means[:, y, x] = rows.astype(np.float64).mean(axis=(1, 2))
    assert counts.tolist() == counts_by_cell(means, thresholds, gate)


def test_a_gate_is_not_pooled_to_a_size_that_does_not_divide_the_logits() -> None:
    model = empty_model([helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 3, 8, 9))])
    with pytest.raises(InputError, match=r"\(8, 9\) cannot be average-pooled to \(4, 4\)"):
        append_gate(model, Gate(), 3, ((8, 9), (4, 4)))
