"""How commands print: results and hints on standard output; progress, warnings and errors on standard error."""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click

from mess_compile import launcher
from mess_compile.cli.progress import ProgressLines, rate
from mess_compile.runtime.base import terminal
from mess_compile.runtime.base.errors import MessError

_BAR = 15
"""Columns of the bar: with label, amount, rate and time left, a line of 80."""
_RATE_OVER_S = 600.0
"""The time that the rate is averaged over; an engine can take minutes."""
_SWITCH = "MESS_COMPILE_PROGRESS"
WIDTH = 100
"""No line of results is wider, and none is wider than the terminal; `hint:` and `warning:` are one line each."""
_FOLDED = 36
"""The width of a column whose cells are folded, in a table that is too wide."""
_BEGUN = f"{__name__}.begun"
"""Key of a context's meta: when the command began."""
_WARNED = f"{__name__}.warned"
"""Key of a context's meta: the warnings that the command has printed."""
_RENAMED = {"ships": ("ship", "--list")}
"""Former commands, and what they are called now."""
_bars: list[Any] = []
"""The progress bars on the terminal, the one that is drawn last."""
_contents: list[dict[str, Any]] = []
"""The content so far of each command that runs with `--json`."""
_NOT_BEGUN = "nothing was begun"
_WRITABLE = "choose a workspace that can be written (-C DIR)"
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EFBIG: "a file would exceed the size allowed here (ulimit -f): raise that and run the same command again",
    errno.EROFS: f"the file system is read-only: {_WRITABLE}",
    errno.EACCES: f"permission denied: {_WRITABLE}",
    errno.EPERM: f"permission denied: {_WRITABLE}",
}

if TYPE_CHECKING:
    from mess_compile.reporter import Reporter


class Group(click.Group):
    """The group of all commands: proposes the nearest name for an unknown one, and ends every failure with one line
    and exit code 1.

    `stopped` returns what Ctrl-C leaves behind and how to continue, given the command, its workspace and its start.
    """

    def __init__(self, *arguments: Any, stopped: Callable[[str, Path | None, float], str], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.stopped = stopped

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] in _RENAMED:
            warn(f"`{args[0]}` is now `{' '.join(_RENAMED[args[0]])}`; the old name goes away in the next release")
            args = [*_RENAMED[args[0]], *args[1:]]
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx) from error

    def main(self, args: Sequence[str] | None = None, *rest: Any, **named: Any) -> Any:
        """With `--json` standard output gets one object: the command's result, an `error`, or both."""
        terminal.show_all()
        words = list(sys.argv[1:] if args is None else args)
        if not _asks_for_json(words):
            return super().main(args, *rest, **named)
        standalone = named.pop("standalone_mode", True)
        with _one_object(standalone):
            try:
                code = super().main(words, *rest, **{**named, "standalone_mode": False})
            except click.ClickException as error:
                _add_error(error.format_message())
                if not standalone:
                    raise
                error.show()
                code = error.exit_code
            except click.Abort:
                _stop(_NOT_BEGUN)
            except Exception as error:
                _add_error(f"{type(error).__name__}: {error}")
                raise
        return sys.exit(code if isinstance(code, int) else 0) if standalone else code

    def invoke(self, ctx: click.Context) -> Any:
        ctx.meta[_BEGUN], begun = time.monotonic(), time.time()
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise _readable(error) from error
        except MessError as error:
            fail(str(error))
        except KeyboardInterrupt:
            _stop(self.stopped(ctx.invoked_subcommand or "", ctx.params.get("folder"), begun))
        except MemoryError:
            fail("out of memory; use a smaller input, batch or group of heads")
        except BrokenPipeError:
            sys.exit(1)
        except OSError as error:
            fail(_os_message(error))
        except UnicodeEncodeError as error:
            fail(terminal.unencodable(error))


def fail(message: str) -> NoReturn:
    """Print one line `error: ...` on standard error, put it into the JSON as `error`, and exit with code 1."""
    line = " ".join(message.split())
    say(f"error: {line}", err=True)
    _add_error(line)
    sys.exit(1)


def warn(message: str) -> None:
    """Print one line `warning: ...` on standard error, unless this command has printed the same one before."""
    _warn(_warned(), message)


def _warned() -> set[str]:
    """The warnings that the command has printed. The context of a command is unknown to other threads."""
    context = click.get_current_context(silent=True)
    found: set[str] = set() if context is None else context.meta.setdefault(_WARNED, set())
    return found


def _warn(warned: set[str], message: str) -> None:
    line = f"warning: {' '.join(message.split())}"
    if line not in warned:
        warned.add(line)
        _print(line, err=True)


def _asks_for_json(words: Sequence[str]) -> bool:
    """Whether a command line has `--json`, valid or not, and does not ask for help."""
    options = words[: words.index("--")] if "--" in words else words
    return "--json" in options and not {"-h", "--help", "--version"}.intersection(options)


@contextmanager
def _one_object(for_good: bool) -> Iterator[None]:
    """Reserve standard output for one JSON object, written at the end: whatever else is printed, also by libraries in
    C, goes to standard error. `for_good` extends that to what they print while the process ends."""
    with _others_to_stderr(for_good) as stream:
        _contents.append({})
        try:
            yield
        finally:
            content = _contents.pop()
            if content:
                _write_object(stream, content)


def _write_object(stream: TextIO, content: dict[str, Any]) -> None:
    try:
        stream.write(json.dumps(content, default=str) + "\n")
        stream.flush()
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        say(f"error: {_os_message(error)}", err=True)
        sys.exit(1)


@contextmanager
def _others_to_stderr(for_good: bool) -> Iterator[TextIO]:
    """Yield the stream that standard output was."""
    ours = sys.stdout
    if ours is None:  # closed before the program began
        with open(os.devnull, "w", encoding="utf-8") as nothing:
            yield nothing
        return
    if not _is_standard_output(ours):  # redirected in Python
        with redirect_stdout(sys.stderr):
            yield ours
        return
    ours.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stream:
        _point_stdout_to_stderr()
        try:
            yield stream
        finally:
            ours.flush()
            if not for_good:
                ctypes.CDLL(None).fflush(None)
                os.dup2(stream.fileno(), 1)


def _is_standard_output(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 1
    except (AttributeError, OSError, ValueError):
        return False


def _point_stdout_to_stderr() -> None:
    """Point file descriptor 1 to standard error, or to nothing where that is closed."""
    try:
        os.dup2(2, 1)
    except OSError:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)


def _add_error(words: str) -> None:
    if _contents:
        _contents[-1]["error"] = words


def _readable(error: click.UsageError) -> click.UsageError:
    """A usage error of click, wrapped for the terminal, with a remedy for decimal commas."""
    message = error.format_message()
    comma = re.search(r"'([-+]?\d+),(\d+)' is not a valid (?:float|integer)", message)
    if comma is not None:
        message = f"{message.rstrip('.')}: numbers have a decimal point, {comma[1]}.{comma[2]}"
    if sys.stderr.isatty():
        message = _wrapped(f"Error: {message}", _columns(sys.stderr)).removeprefix("Error: ")
    return click.UsageError(message, error.ctx)


def _stop(words: str) -> NoReturn:
    if sys.stderr.isatty():
        click.echo(err=True)  # the cursor is behind ^C
    say(f"stopped: {words}", err=True)
    _add_error(f"stopped: {words}")
    sys.exit(1)


def _os_message(error: OSError) -> str:
    place = f" ({error.filename})" if error.filename else ""
    return _REMEDIES.get(error.errno or 0, error.strerror or str(error)) + place


def print_json(content: dict[str, Any]) -> None:
    """The object that a command's `--json` prints; on the command line it is written when the command ends."""
    if _contents:
        _contents[-1].update(content)
    else:
        click.echo(json.dumps(content, default=str))


def print_hint(*commands: str) -> None:
    """Print the commands to run next in the same workspace; they are never wrapped, so that they can be copied."""
    folder = click.get_current_context().find_root().params["folder"]
    place = "" if folder == Path() else f"-C {quoted(folder)} "
    _print("hint: " + "\n      ".join(f"mess-compile {place}{command}" for command in commands))


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder, and remove it again where nothing was put into it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # it is in use
            for path in missing:
                path.rmdir()


def quoted(path: Path) -> str:
    """The path, quoted for a shell."""
    return shlex.quote(str(path))


@contextmanager
def reporting(as_json: bool = False, notes_aside: bool = False) -> Iterator[Reporter]:
    """A reporter with progress and warnings on standard error, and notes above the result or, `notes_aside`, there."""
    from mess_compile.reporter import Reporter

    with progress_bar(as_json) as progress:
        yield Reporter(progress, partial(say, err=as_json or notes_aside), partial(_warn, _warned()))


@contextmanager
def progress_bar(as_json: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error while it is a terminal, else a line there now and then.

    Takes a label, what is done, and of how much: 0 where that is not known. Results that are printed meanwhile stand
    above the bar, by `say`. Of several processes that share the work only the first reports, and none with
    MESS_COMPILE_PROGRESS=off in the environment.
    """
    if launcher.is_child() or os.environ.get(_SWITCH) == "off":
        yield lambda label, done, total: None
        return
    if as_json or not sys.stderr.isatty():
        with _progress_lines() as lines:
            yield lines.update
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with (
        ExitStack() as stack,
        Progress(
            TextColumn("{task.description:<27.27}"),
            BarColumn(_BAR),
            TextColumn("{task.fields[amount]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
            transient=True,
            speed_estimate_period=_RATE_OVER_S,
            redirect_stdout=False,  # what `say` does, where it is a terminal too
            redirect_stderr=False,
        ) as bar,
    ):
        _bars.append(bar)
        stack.callback(_bars.remove, bar)
        task = bar.add_task("", total=None, amount="", rate="")
        last = (0, 0)

        def tell(label: str, done: int, total: int) -> None:
            nonlocal last
            if done < last[0] or total != last[1]:  # something else begins, at another pace
                bar.reset(task, total=total or None, completed=done)
            last = done, total
            amount = f"{done}/{total}" if total else f"{done}"
            speed = bar.tasks[0].speed
            pace = rate(speed) if speed else ""
            bar.update(task, description=label, completed=done, total=total or None, amount=amount, rate=pace)

        yield tell


def _progress_lines() -> ProgressLines:
    """Lines of the command that runs, with its name and start."""
    context = click.get_current_context(silent=True)
    if context is None:
        return ProgressLines("at work", partial(say, err=True))
    return ProgressLines(context.info_name or "at work", partial(say, err=True), context.meta.get(_BEGUN))


def say(text: str, err: bool = False) -> None:
    """Print lines for people, wrapped between words with a hanging indent, above a progress bar.

    Lines on standard error are wrapped on a terminal only: a log keeps each in one line.
    """
    stream = sys.stderr if err else sys.stdout
    if not err or _is_terminal(stream):
        text = "\n".join(_wrapped(line, _columns(stream)) for line in text.split("\n"))
    _print(text, err)


def _print(text: str, err: bool = False) -> None:
    """Print lines as they are; on a terminal that shows a progress bar, above it."""
    stream = sys.stderr if err else sys.stdout
    if _bars and _is_terminal(stream):
        _bars[-1].console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        click.echo(text, err=err)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty()


def _columns(stream: TextIO) -> int:
    """The width of a terminal, at most WIDTH; without a terminal WIDTH, or the variable COLUMNS."""
    columns = shutil.get_terminal_size((WIDTH, 24)).columns
    return min(columns, WIDTH) if _is_terminal(stream) else columns if os.environ.get("COLUMNS") else WIDTH


def _wrapped(line: str, columns: int) -> str:
    """The line, continued below its second column where its first is set apart by two spaces or more."""
    if len(line) <= columns:
        return line
    first = re.match(r"\S+\s{2,}", line)
    indent = " " * (len(first[0]) if first else 2)
    lines = textwrap.wrap(
        line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )
    return "\n".join(lines)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a plain table: the first column flush left, the others flush right.

    Columns that do not fit beside the first follow below, with the first one again.
    """
    lines = [header, *rows]
    widths = [max(len(row[i]) for row in lines) for i in range(len(header))]
    width = _columns(sys.stdout)
    if sum(widths) + 2 * len(widths) > width:
        widths = [min(each, _FOLDED) for each in widths]
    if title:
        say(title)
    for columns in _blocks(widths, width):
        chosen = (0, *columns)
        _print(_table([[row[i] for i in chosen] for row in lines], [widths[i] for i in chosen], width))


def _table(lines: Sequence[Sequence[str]], widths: Sequence[int], width: int) -> str:
    """A table without lines; cells wider than their column are folded."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for number in range(len(lines[0])):
        table.add_column(justify="right" if number else "left", overflow="fold", max_width=widths[number])
    for line in lines:
        table.add_row(*line)
    text = io.StringIO()
    Console(file=text, width=width, markup=False, emoji=False, highlight=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _blocks(widths: Sequence[int], most: int) -> list[list[int]]:
    """The columns after the first, grouped so that each group fits beside the first."""
    blocks: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        if blocks[-1] and widths[0] + sum(2 + widths[i] for i in (*blocks[-1], column)) > most:
            blocks.append([])
        blocks[-1].append(column)
    return blocks
