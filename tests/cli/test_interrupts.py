"""Ctrl-C: whoever presses it wants to know what is left, and whether the hours before it were for nothing."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mess_compile.cli import console, main
from mess_compile.cli.interrupts import AFTER, GRADUAL, NOTHING, message_of
from tests.commands import contents, run

GIVEN = {
    "train": ("--data", "."),
    "attach": ("model.onnx",),
    "run": ("host.mess", "a.png"),
    "bench": ("host.mess",),
    "verify": ("host.mess",),
    "ship": ("host.mess", "ssh://me@there:/street"),
    "compare": ("host",),
    "inspect": ("graphs",),
    "completion": ("bash",),
}


@pytest.mark.parametrize("command", sorted(main.commands))
def test_one_line_says_what_is_kept(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main.commands[command], "callback", interrupted)
    ended = run("-C", tmp_path, command, *GIVEN.get(command, ()))
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert ended.stderr == f"stopped: {NOTHING if command in GRADUAL else AFTER[command]}\n"


@pytest.mark.parametrize("command", sorted(GRADUAL))
def test_what_a_command_has_finished_since_it_began_is_kept(command: str, tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    begun = (tmp_path / "old").stat().st_mtime + 10
    (tmp_path / ".lock").touch()
    os.utime(tmp_path / ".lock", (begun + 1, begun + 1))
    assert message_of(command, tmp_path, begun) == NOTHING, "a lock is nothing that is kept"
    (tmp_path / "statistics").mkdir()
    (tmp_path / "statistics" / "block").touch()
    os.utime(tmp_path / "statistics" / "block", (begun + 1, begun + 1))
    assert message_of(command, tmp_path, begun) == AFTER[command]


def test_nothing_is_said_of_commands_that_are_not_there() -> None:
    assert AFTER.keys() == main.commands.keys()


@contextmanager
def pressed(as_json: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """The progress of somebody who stops it at the second sign of life."""
    calls = iter(range(1, 100))

    def tell(label: str, done: int, total: int) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    yield tell


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("export",), marks=pytest.mark.slow),
        ("bundle",),
        ("bench", "host.mess", "--split", "test", "--passes", "1"),
        ("report",),
    ],
)
@pytest.mark.usefixtures("nothing_left_behind")
def test_what_was_there_is_there_and_whole(
    arguments: tuple[str, ...], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    before = contents(workspace)
    with monkeypatch.context() as patched:
        patched.setattr(console, "progress_bar", pressed)
        command = importlib.import_module(f"mess_compile.cli.{arguments[0]}")
        patched.setattr(command, "progress_bar", pressed, raising=False)
        ended = run(*arguments)
    assert ended.stderr == f"stopped: {AFTER[arguments[0]]}\n"
    assert contents(workspace) == before
