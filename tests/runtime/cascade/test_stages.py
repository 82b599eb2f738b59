"""NaN among the logits is seen at no cost: a user would else get wrong labels with a confident face."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from mess_compile.graph.gate import append_gate
from mess_compile.graph.node_builder import empty_model
from mess_compile.network import Gate
from mess_compile.runtime.base.errors import NotFiniteError
from mess_compile.runtime.bundle.archive import open_archive
from mess_compile.runtime.bundle.manifest import Decision, Manifest, OperatingPoint
from mess_compile.runtime.cascade.stages import Stages
from mess_compile.runtime.engines.engine import Engine, Library, open_library
from tests import small_network
from tests.runtime.faults import FaultyLibrary

CLASSES, HW = 4, (9, 11)
KINDS = ("top1", "margin", "entropy")


@pytest.fixture(scope="module")
def library() -> Library:
    return open_library("onnxruntime", threads=1)


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory, library: Library) -> dict[str, Engine]:
    folder = tmp_path_factory.mktemp("gates")
    for kind in KINDS:
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, CLASSES, *HW))
        model = empty_model([logits])
        append_gate(model, Gate(kind, edge_aware=True, thresholds=(0.5, 0.9)), CLASSES)
        onnx.save(model, folder / f"{kind}.onnx")
    return {kind: library.load(folder / f"{kind}.onnx") for kind in KINDS}


def lowest_count(gate: Engine, library: Library, logits: np.ndarray) -> int:
    thresholds = np.repeat(np.array([[0.5], [-1.0]], np.float32), CLASSES, axis=1)
    feeds = {"logits": library.upload(logits), "thresholds": library.upload(thresholds)}
    return int(library.download(gate.run(feeds)["counts"])[1].sum())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10_000), st.sampled_from((0.01, 1.0, 50.0, 3e4)))
def test_every_cell_of_sound_logits_reaches_the_lowest_row(
    library: Library, gates: dict[str, Engine], kind: str, seed: int, scale: float
) -> None:
    logits = np.random.default_rng(seed).normal(0, scale, (1, CLASSES, *HW)).astype(np.float32)
    assert lowest_count(gates[kind], library, logits) == 99


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 10_000),
    st.integers(0, HW[0] - 3),
    st.integers(0, HW[1] - 3),
    st.integers(0, CLASSES - 1),
    st.sampled_from((np.nan, np.inf)),
)
def test_nine_bad_cells_are_seen_among_sound_ones(
    library: Library, gates: dict[str, Engine], kind: str, seed: int, row: int, column: int, label: int, bad: float
) -> None:
    """As gates of earlier releases find them: what a NaN feature becomes behind a 3 x 3 convolution and the classifier,
    or one class that overflows."""
    logits = np.random.default_rng(seed).normal(0, 0.1, (1, CLASSES, *HW)).astype(np.float32)
    classes = slice(None) if np.isnan(bad) else label
    logits[0, classes, row : row + 3, column : column + 3] = bad
    assert lowest_count(gates[kind], library, logits) < 99


@pytest.mark.parametrize("every_row", [False, True])
def test_a_plan_that_uses_every_row_looks_at_the_logits_instead(tmp_path: Path, every_row: bool) -> None:
    def points(manifest: Manifest) -> Manifest:
        plan = manifest.plans[0]
        more = [
            OperatingPoint(f"row{row}", (Decision(row, 3), plan.operating_points[0].decisions[1]), plan.predicted)
            for row in range(len(small_network.ROWS) if every_row else 1)
        ]
        return replace(manifest, plans=(replace(plan, operating_points=(*plan.operating_points, *more)),))

    small_network.write_bundle(tmp_path / "plain.mess")
    path = small_network.changed_bundle(tmp_path / "plain.mess", tmp_path / "points.mess", points)
    archive = open_archive(path)
    fault: list[str | None] = [None]
    spoiling = FaultyLibrary(open_library("onnxruntime", threads=1), lambda name: fault[0])
    stages = Stages(archive.manifest, archive.manifest.plans[0], spoiling, archive.folder)
    counts = stages.advance(0, stages.upload(small_network.frame(0)[None]))[1]
    wanted = small_network.expected(small_network.frame(0))[0][0]
    rows = len(wanted) if every_row else len(wanted) - 1
    assert counts[:rows].tolist() == wanted[:rows].tolist()
    assert every_row or counts[-1] == 24  # the last row, which nothing decides by, is the lowest
    fault[0] = "nan"
    with pytest.raises(NotFiniteError, match=r"exit1\.fcn-crm1-b0 gave NaN or infinities on onnxruntime"):
        stages.advance(0, stages.upload(small_network.frame(0)[None]))
    stages.close()
    archive.close()
