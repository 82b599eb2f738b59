"""How the commands speak: JSON or tables on standard output, progress and one line of what went wrong on the other."""

from __future__ import annotations

import errno
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from mess_compile.runtime.errors import MessError

_ELSEWHERE = "work in a folder that can be written (-C DIR)"
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EFBIG: "a file would exceed the size allowed here (ulimit -f): raise that and run the same command again",
    errno.EROFS: f"the file system is read-only: {_ELSEWHERE}",
    errno.EACCES: f"permission denied: {_ELSEWHERE}",
    errno.EPERM: f"permission denied: {_ELSEWHERE}",
}


class Group(click.Group):
    """Unknown commands get the nearest known name; what goes wrong is one line and exit code 1."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MessError as error:
            fail(str(error))
        except KeyboardInterrupt:
            fail("stopped; what was finished is kept, and the same command continues")
        except MemoryError:
            fail("out of memory; use a smaller input, batch or group of heads")
        except BrokenPipeError:
            sys.exit(1)
        except OSError as error:
            fail(_os_message(error))


def fail(message: str) -> NoReturn:
    """One line on standard error, and exit code 1."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(1)


def _os_message(error: OSError) -> str:
    place = f" ({error.filename})" if error.filename else ""
    return _REMEDIES.get(error.errno or 0, error.strerror or str(error)) + place


def print_json(content: dict[str, Any]) -> None:
    click.echo(json.dumps(content, default=str))


def print_next(*commands: str) -> None:
    """Say what to do next, in the same workspace."""
    folder = click.get_current_context().find_root().params["folder"]
    place = "" if folder == Path() else f"-C {quoted(folder)} "
    click.echo("next: " + "\n      ".join(f"mess-compile {place}{command}" for command in commands))


def quoted(path: Path) -> str:
    """The path as a shell takes it."""
    return shlex.quote(str(path))


@contextmanager
def progress_bar(as_json: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error while it is a terminal; silence otherwise."""
    if as_json or not sys.stderr.isatty():
        yield lambda label, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description:<24.24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda label, done, total: bar.update(task, description=label, completed=done, total=total)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A plain table, left column left, the others right."""
    lines = [header, *rows]
    widths = [max(len(row[i]) for row in lines) for i in range(len(header))]
    if title:
        click.echo(title)
    for row in lines:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        click.echo("  ".join(cells).rstrip())
