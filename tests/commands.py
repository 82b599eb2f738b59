"""Run commands as a user would, and look at what they leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from mess_compile.cli import main

ANY_SPEED = ("--latency-factor", "1000")
"""Tests share their machine."""
CHAIN = """
import json, sys
from mess_compile.cli import main
from mess_compile.runtime.measure import measure
effort = measure.Effort(window_s=0.01, window_runs=1, windows=1, max_s=0.02, warm_up_s=0.0)
measure.Effort = lambda: effort
for command in json.loads(sys.argv[1]):
    main.main(command, standalone_mode=False)
"""
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


def chained(commands: Iterable[Sequence[str | Path]], folder: Path | None = None) -> str:
    """What commands print one after the other, in a process of their own and with a brief `profile`.

    There warnings of libraries would show on standard error, which stays empty.
    """
    words = json.dumps([[str(word) for word in command] for command in commands])
    ended = subprocess.run(
        [sys.executable, "-c", CHAIN, words], cwd=folder, capture_output=True, text=True, timeout=900
    )
    apart = [line for line in ended.stderr.splitlines() if not line.startswith("warning: ")]  # a busy machine
    assert (ended.returncode, apart) == (0, [])
    return ended.stdout


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
