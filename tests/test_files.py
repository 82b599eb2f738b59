"""Whatever interrupts a write, the user keeps the artefact that was there before."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mess_compile import files


class Stopped(BaseException):
    pass


def stop_after(write: Callable[[str], object], text: str) -> None:
    write(text)
    raise Stopped


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(Stopped), files.replaced(path) as temporary:
        stop_after(temporary.write_text, "half of the n")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("plan.json", "old")]


def test_an_interrupted_write_leaves_the_old_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    with pytest.raises(Stopped), files.replaced_folder(tmp_path / "graphs") as temporary:
        stop_after((temporary / "new").write_text, "half")
    assert [p.name for p in tmp_path.rglob("*")] == ["graphs"]


@pytest.mark.parametrize("failing", [1, 2])
def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "old").touch()
    calls = []
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == failing:
            raise OSError("the disk went away")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="went away"), files.replaced_folder(tmp_path / "graphs") as temporary:
        (temporary / "new").touch()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["graphs", "old"]
