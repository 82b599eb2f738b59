"""The confidence map a user is shown counts to the same as the gate graph that decided."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mess_compile.graph.gate import append_gate
from mess_compile.graph.node_builder import empty_model
from mess_compile.network import Gate
from mess_compile.runtime.engines.engine import open_library
from mess_compile.runtime.images.confidence import confidence_map

CLASSES, HW, ROWS = 5, (6, 7), (0.15, 0.3, 0.45, 0.6, 0.9)


@pytest.mark.parametrize("kind", ["top1", "margin", "entropy"])
def test_as_many_cells_reach_a_threshold_as_the_gate_counts(tmp_path: Path, kind: str) -> None:
    logits = np.random.default_rng(5).normal(0, 2, (1, CLASSES, *HW)).astype(np.float32)
    model = empty_model([helper.make_tensor_value_info("logits", TensorProto.FLOAT, logits.shape)])
    append_gate(model, Gate(kind, edge_aware=False, thresholds=ROWS), CLASSES)
    onnx.save(model, tmp_path / "gate.onnx")
    library = open_library("onnxruntime", threads=1)
    thresholds = np.repeat(np.array(ROWS, np.float32)[:, None], CLASSES, axis=1)
    feeds = {"logits": library.upload(logits), "thresholds": library.upload(thresholds)}
    counts = library.download(library.load(tmp_path / "gate.onnx").run(feeds)["counts"])[:-2].sum(axis=1)
    found = confidence_map(logits[0], kind)
    assert found.shape == HW
    assert found.dtype == np.float32
    assert [int((found >= row).sum()) for row in ROWS] == counts.tolist()
    assert 0 <= counts[-1] < counts[0]


def test_logits_far_apart_do_not_overflow() -> None:
    logits = np.array([[[1e4, 0.0]], [[-1e4, 0.0]]], np.float32)
    for kind, even in (("top1", 0.5), ("margin", 0.0), ("entropy", 0.0)):
        np.testing.assert_allclose(confidence_map(logits, kind), [[1.0, even]], atol=1e-6)
