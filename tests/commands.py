"""Run commands as a user would, and look at what they leave behind."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from mess_compile.cli import main

ANY_SPEED = ("--latency-factor", "1000")
"""Tests share their machine."""
TRAIN = ("train", "--input", "64x96", "--width", "0.25", "--exits", "3", "--heads", "fcn-crm1-b0", "--epochs", "1", "1")


def run(*arguments: str | Path) -> Result:
    """The outcome of `mess-compile ARGUMENTS` with lines of any length; anything but an exit code is a crash."""
    result = CliRunner(env={"COLUMNS": "10000"}).invoke(main, [str(argument) for argument in arguments])
    crashed = result.exception is not None and not isinstance(result.exception, SystemExit)
    assert not crashed, "".join(traceback.format_exception(*(result.exc_info or (None, None, None))))
    return result


def done(*arguments: str | Path) -> str:
    """What a command that succeeds prints."""
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def printed_json(*arguments: str | Path) -> dict[str, Any]:
    """The one JSON object that a command with `--json` prints: nothing may stand beside it, nor NaN in it."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(done(*arguments, "--json"), parse_constant=refuse)
    assert isinstance(content, dict)
    return content


def complaint(*arguments: str | Path) -> str:
    """The one line on standard error of a command that could not do it."""
    result = run(*arguments)
    assert result.exit_code == 1, (result.exit_code, result.stdout, result.stderr)
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, temporary ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(workspace: Path, *arguments: str | Path) -> str:
    """The complaint of a command in `workspace`, where every file is afterwards as it was."""
    before = contents(workspace)
    message = complaint("-C", workspace, *arguments)
    after = contents(workspace)
    assert after.keys() == before.keys(), after.keys() ^ before.keys()
    assert after == before
    return message


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change what a JSON file holds."""
    content = json.loads(path.read_text())
    change(content)
    overwrite(path, json.dumps(content).encode())


def overwrite(path: Path, content: bytes) -> None:
    """Give a file of the workspace other bytes, and leave the file alone that it is a link to."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def first(folder: Path) -> Path:
    return min(folder.iterdir())
