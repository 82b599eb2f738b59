"""Ctrl-C: whoever presses it wants to know what is left, and whether the hours before it were for nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mess_compile.cli import main
from mess_compile.cli.stopped import KEPT
from tests.commands import contents, run

GIVEN = {
    "train": ("--data", "."),
    "run": ("host.mess", "a.png"),
    "bench": ("host.mess",),
    "verify": ("host.mess",),
    "ship": ("host.mess", "ssh://me@there:/street"),
    "compare": ("host",),
    "inspect": ("graphs",),
    "completion": ("bash",),
}


@pytest.mark.parametrize("command", sorted(main.commands))
def test_one_line_says_what_is_kept(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main.commands[command], "callback", interrupted)
    ended = run(command, *GIVEN.get(command, ()))
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert ended.stderr == f"stopped: {KEPT[command]}\n"


def test_nothing_is_said_of_commands_that_are_not_there() -> None:
    assert KEPT.keys() == main.commands.keys()


@contextmanager
def pressed(as_json: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """The progress of somebody who stops it at the second sign of life."""
    calls = iter(range(1, 100))

    def tell(label: str, done: int, total: int) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    yield tell


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        pytest.param("networks", ("export",), marks=pytest.mark.slow),
        ("bundles", ("bundle",)),
        ("bundles", ("bench", "host.mess", "--split", "test", "--passes", "1")),
        ("showing", ("report",)),
    ],
)
@pytest.mark.usefixtures("nothing_left_behind")
def test_what_was_there_is_there_and_whole(
    module: str, arguments: tuple[str, ...], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    before = contents(workspace)
    with monkeypatch.context() as patched:
        patched.setattr(importlib.import_module(f"mess_compile.cli.{module}"), "progress_bar", pressed)
        ended = run(*arguments)
    assert ended.stderr == f"stopped: {KEPT[arguments[0]]}\n"
    assert contents(workspace) == before
