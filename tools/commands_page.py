"""docs/commands.md, from the command line itself: `python tools/commands_page.py` writes it anew."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import click

from mess_compile.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """\
# Commands

<!-- Written by tools/commands_page.py: change the code, then run that. -->

Every command works in a workspace, the current folder or that of `mess-compile -C DIR`, which
`demo`, `train` and `export` make. It prints what matters first, in lines of at most 100 columns
(`COLUMNS` sets another width where there is no terminal), and details with `-v`. Warnings go to
standard error. The last line is the next command (`hint:`). With `--json` standard output gets one
object and nothing else.

A command exits with 0 when it is done, 1 when it could not be done (one line says why, and what to
do), 2 for wrong usage, and 3 if `bench --strict` found a promise missed. After Ctrl-C one line says
which results are kept and how to continue: `train`, `evaluate`, `build`, `profile`, `ship` and
`demo` continue with the same command, `search` returns the best plan so far. A file is written
whole or not at all.

Long steps show a progress bar on a terminal. Without one, a line on standard error says how far
they are: the first after at most ten seconds, then one every half minute.
`MESS_COMPILE_PROGRESS=off` in the environment turns both off.
"""


def page() -> str:
    return "\n".join([HEAD, *(section(name, command) for name, command in main.commands.items())])


def section(name: str, command: click.Command) -> str:
    """Usage, purpose, and a row for each option."""
    ctx = click.Context(command, info_name=name, max_content_width=100)
    usage = " ".join(["mess-compile", name, *command.collect_usage_pieces(ctx)])
    purpose = "\n\n".join(map(_paragraph, inspect.cleandoc(command.help or "").split("\n\n")))
    records = [record for option in command.params if (record := option.get_help_record(ctx)) and record[1]]
    rows = [f"| `{_cell(names)}` | {_cell(told)} |" for names, told in records]
    table = ["| option | |", "|---|---|", *rows, ""] if rows else []
    return "\n".join([f"## {name}", "", f"    {usage}", "", purpose, "", *table])


def _paragraph(text: str) -> str:
    """Wrapped at 100 columns; a block of code where click keeps lines apart."""
    if text.startswith("\b\n"):
        return textwrap.indent(text.removeprefix("\b\n"), "    ")
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
