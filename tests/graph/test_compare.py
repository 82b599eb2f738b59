"""What is said of a graph in another precision is counted, not guessed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from mess_compile.graph.compare import LEAST_AGREEMENT, Agreement, agreement_of, check_path, compare, verdict
from mess_compile.network import GraphSet
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines import engine
from tests import small_network


@pytest.fixture(scope="module")
def library() -> Iterator[engine.Library]:
    with closing(engine.open_library("onnxruntime", 1)) as opened:
        yield opened


@pytest.fixture(scope="module")
def graph_set(tmp_path_factory: pytest.TempPathFactory) -> GraphSet:
    return small_network.graph_set(tmp_path_factory.mktemp("graphs"))


def changed(graph_set: GraphSet, root: Path, name: str, weight: str, values: np.ndarray) -> GraphSet:
    """Another graph set in which one weight of one graph has other values."""
    other = small_network.graph_set(root)
    model = onnx.load(str(other.path(name)))
    for tensor in model.graph.initializer:
        if tensor.name == weight:
            shape = (*values.shape, 1, 1)
            tensor.CopyFrom(numpy_helper.from_array(values.reshape(shape).astype(np.float32), weight))
    onnx.save(model, str(other.path(name)))
    return other


def feeds(exit_point: int = 1) -> list[dict[str, np.ndarray]]:
    shape = (1, small_network.CHANNELS, *small_network.CELLS_HW)
    values = [np.random.default_rng(seed).random(shape, np.float32) for seed in range(3)]
    return [{f"exit{exit_point}": value, "thresholds": small_network.thresholds()} for value in values]


def test_labels_that_differ_are_counted_cell_by_cell(
    graph_set: GraphSet, library: engine.Library, tmp_path: Path
) -> None:
    name, classifier = f"head-{small_network.HEADS[0]}", small_network.CLASSIFIERS[0]
    turned = classifier + np.random.default_rng(2).normal(0, 1, classifier.shape)
    other = changed(graph_set, tmp_path, name, "logits.weight", turned)
    maps = [feed["exit1"][0] for feed in feeds()]
    exact, found = ([np.einsum("kc,chw->khw", w, m).argmax(axis=0) for m in maps] for w in (classifier, turned))
    same = sum(int((a == b).sum()) for a, b in zip(exact, found, strict=True))
    agreement = compare(graph_set.path(name), other.path(name), feeds(), library)
    assert 0 < same < 72
    assert (agreement.frames, agreement.cells, agreement.agreeing) == (3, 3 * 4 * 6, same)
    assert agreement.labels_percent == pytest.approx(100 * same / 72)


def test_a_segment_has_an_error_but_no_labels(graph_set: GraphSet, library: engine.Library, tmp_path: Path) -> None:
    other = changed(graph_set, tmp_path, "segment-1-2", "exit2.weight", 1.25 * small_network.SECOND)
    pair = graph_set.path("segment-1-2"), other.path("segment-1-2")
    agreement = compare(*pair, feeds(), library)
    assert agreement.relative_error == pytest.approx(0.25, rel=1e-4)
    assert (agreement.cells, agreement.labels_percent) == (0, None)
    assert verdict(agreement, "int8") is None


def test_nan_and_infinity_are_found_wherever_they_are(
    graph_set: GraphSet, library: engine.Library, tmp_path: Path
) -> None:
    weights = small_network.SECOND.copy()
    weights[1, 2] = np.inf
    other = changed(graph_set, tmp_path, "segment-1-2", "exit2.weight", weights)
    pair = graph_set.path("segment-1-2"), other.path("segment-1-2")
    agreement = compare(*pair, feeds(), library)
    assert agreement.nonfinite == ("exit2",)
    assert verdict(agreement, "fp16") == "NaN or infinity in exit2"
    with pytest.raises(InputError, match="exit2 contains NaN or infinity even in fp32"):
        compare(*reversed(pair), feeds(), library)


def test_a_path_is_judged_by_the_labels_at_its_end(
    graph_set: GraphSet, library: engine.Library, tmp_path: Path
) -> None:
    """A segment that swaps channels leaves the features finite; only the head after it shows the harm."""
    turned = small_network.SECOND[::-1].copy()
    other = changed(graph_set, tmp_path, "segment-1-2", "exit2.weight", turned)
    frames = [small_network.frame(seed) for seed in range(4)]
    same = 0
    for frame in frames:
        first = np.maximum(frame[::2, ::2].astype(np.float64) @ small_network.FIRST.T, 0)
        exact, found = (
            (np.maximum(first @ second.T, 0) @ small_network.CLASSIFIERS[1].T).argmax(axis=2)
            for second in (small_network.SECOND, turned)
        )
        same += int((exact == found).sum())
    agreement = check_path(graph_set, other, (1, 2), small_network.HEADS[1], frames, library)
    assert (agreement.cells, agreement.agreeing) == (4 * 24, same)
    assert verdict(agreement, "int8")
    fused = check_path(graph_set, other, (2,), small_network.HEADS[1], frames, library)
    assert fused.agreeing == 4 * 24
    early = check_path(graph_set, other, (1,), small_network.HEADS[0], frames, library)
    assert early.agreeing == 4 * 24


@given(st.sampled_from(["fp16", "int8"]), st.integers(1, 10**6), st.data())
def test_the_verdict_is_exact_at_its_limit(precision: str, cells: int, data: st.DataObject) -> None:
    per_mille = {"fp16": 995, "int8": 980}[precision]
    limit = -(-per_mille * cells // 1000)  # the fewest that are enough
    agreeing = data.draw(st.integers(max(0, limit - 2), min(cells, limit + 2)))
    reason = verdict(Agreement(1, cells, agreeing, 0.0, ()), precision)
    assert (reason is None) == (agreeing >= limit)


def test_the_limits_are_those_that_were_asked_for() -> None:
    assert LEAST_AGREEMENT == {"fp16": 99.5, "int8": 98.0}
    reason = verdict(Agreement(1, 1000, 994, 0.0, ()), "fp16")
    assert reason == "99.40 % of the labels are those of fp32, fp16 needs 99.5 %"


def test_nothing_compared_is_no_agreement() -> None:
    with pytest.raises(InputError, match="no frames to compare"):
        agreement_of([])
