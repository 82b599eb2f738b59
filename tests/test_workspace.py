"""Later commands run with what earlier ones remembered; an edited entry is named, not guessed at."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile import files
from mess_compile.runtime.base.errors import InputError
from mess_compile.workspace import Memory, Workspace

TEXT = st.text(max_size=6)
NAMES = st.dictionaries(TEXT, TEXT, max_size=2)
OPTIONS = st.fixed_dictionaries({}, optional={"images": TEXT, "labels": TEXT, "label_offset": st.integers(0, 254)})
MEMORIES = st.builds(
    Memory,
    *[st.none() | TEXT] * 3,
    st.dictionaries(TEXT, OPTIONS, max_size=2),
    NAMES,
    NAMES,
    st.lists(TEXT, max_size=2).map(tuple),
)


@settings(deadline=None, max_examples=40)
@given(MEMORIES)
def test_what_is_remembered_is_read_again(tmp_path_factory: pytest.TempPathFactory, memory: Memory) -> None:
    workspace = Workspace(tmp_path_factory.getbasetemp())
    files.write_json(workspace.file, "mess-workspace", 1, asdict(memory))
    assert workspace.memory() == memory


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device": ["host"]}, "device is ['host'], not text"),
        ({"hosts": {"orin": 3}}, "hosts[orin] is 3, not text"),
        ({"ships": "ssh://a"}, "ships is 'ssh://a', not a list"),
        ({"read_as": {"data": {"images": 3}}}, "read_as[data].images is 3, not text"),
        ({"read_as": {"data": {"label_ofset": 1}}}, "read_as[data].label_ofset is not a known entry (did you mean"),
        ({"spilt": "val"}, "spilt is not a known entry (did you mean 'split'?)"),
    ],
)
def test_a_wrong_entry_is_named_with_its_value(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = tmp_path / "workspace.json"
    path.write_text(json.dumps({"format": "mess-workspace", "version": 1, **changed}))
    with pytest.raises(InputError) as refused:
        Workspace(tmp_path).memory()
    assert str(refused.value).startswith(f"{path} is damaged ({message}")
    assert str(refused.value).endswith("): remove it; it only remembers the last device, data and split")


def test_a_workspace_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    """It knew neither hosts nor places."""
    text = '{"format": "mess-workspace", "version": 1, "device": "host", "data": "data", "split": "val"}'
    (tmp_path / "workspace.json").write_text(text)
    assert Workspace(tmp_path).memory() == Memory("host", "data", "val")
