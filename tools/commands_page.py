"""docs/commands.md, from the command line itself: `python tools/commands_page.py` writes it anew."""

from __future__ import annotations

import inspect
from pathlib import Path

import click

from mess_compile.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """\
# Commands

<!-- Written by tools/commands_page.py: change the code, then run that. -->

Every command works in a workspace, the current folder or that of `mess-compile -C DIR`, which `demo`, `train` and
`export` make. It prints what matters first, in lines of at most 100 columns (elsewhere than on a terminal as many as
the variable `COLUMNS` says), details with `-v`, warnings on standard error, and ends with the next command (`hint:`).
With `--json` it prints one object on standard output and nothing else there. It exits 0 when done, 1 when it could not
be done (one line says why and what to do), 2 for wrong usage, 3 where `bench --strict` found a promise missed. After
Ctrl-C one line says what is kept and how to go on:
`train`, `evaluate`, `build`, `profile`, `ship` and `demo` continue with the same command, `search` gives the best plan
so far, and what is written is written whole or not at all. Long steps show a bar on a terminal; elsewhere a line on
standard error says within ten seconds, and then each half minute, how far they are and what is left. In the
environment `MESS_COMPILE_PROGRESS=off` turns both off.
"""


def page() -> str:
    return "\n".join([HEAD, *(section(name, command) for name, command in main.commands.items())])


def section(name: str, command: click.Command) -> str:
    """Usage, purpose, and a row for each option."""
    ctx = click.Context(command, info_name=name, max_content_width=100)
    usage = " ".join(["mess-compile", name, *command.collect_usage_pieces(ctx)])
    purpose = inspect.cleandoc(command.help or "").replace("\b\n", "")
    records = [record for option in command.params if (record := option.get_help_record(ctx)) and record[1]]
    rows = [f"| `{_cell(names)}` | {_cell(told)} |" for names, told in records]
    table = ["| option | |", "|---|---|", *rows, ""] if rows else []
    return "\n".join([f"## {name}", "", f"    {usage}", "", purpose, "", *table])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
