"""An interrupted choice of precisions continues; a stored result that was edited is ignored, and made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile.graph.precision_progress import TriedGraph, TriedGraphs


@settings(deadline=None, max_examples=40)
@given(reason=st.text(max_size=20))
def test_a_stored_reason_is_found_again(tmp_path_factory: pytest.TempPathFactory, reason: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "tried"
    TriedGraphs(folder).store("key", TriedGraph(reason, None), folder)
    assert TriedGraphs(folder).take("key", folder) == TriedGraph(reason, None)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(reason=3),
        lambda content: content.update(reason=None),
        lambda content: content.update(resaon="slow"),
        lambda content: content.pop("spec"),
        lambda content: content.update(spec={"path": "../../outside.onnx"}),
    ],
)
def test_an_edited_result_is_ignored(tmp_path: Path, change: Callable[[Any], None]) -> None:
    TriedGraphs(tmp_path).store("key", TriedGraph("a NaN", None), tmp_path)
    content = json.loads((tmp_path / "key.json").read_text())
    change(content)
    (tmp_path / "key.json").write_text(json.dumps(content))
    assert TriedGraphs(tmp_path).take("key", tmp_path) is None
