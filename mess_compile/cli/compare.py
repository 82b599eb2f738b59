"""The command `compare`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion
from mess_compile.cli.console import print_hint, print_json, print_table, quoted, say, warn
from mess_compile.cli.options import FILE, json_option

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace

_PER_TABLE = 3


@click.command(short_help="Compare plans side by side.")
@click.argument("things", nargs=-1, required=True, metavar="PLAN|DEVICE|BUNDLE...", shell_complete=completion.compared)
@click.option("-o", "--output", type=FILE, metavar="PAGE.html", help="Also write an HTML page.")
@json_option
@click.pass_obj
def compare(workspace: Workspace, things: tuple[str, ...], output: Path | None, as_json: bool) -> None:
    """Compare plans side by side: of devices of the workspace, plan files, or bundles."""
    from mess_compile.report import collect, comparison

    found, page = collect.compare(workspace, things, output)
    if as_json:
        return print_json({"plans": [_content(one) for one in found], "notes": comparison.notes(found), "page": page})
    for start in range(0, len(found), _PER_TABLE):
        part = found[start : start + _PER_TABLE]
        print_table("", ["", *(one.name for one in part)], comparison.rows(part))
    for warning in (*comparison.notes(found), *comparison.warnings(found)):
        warn(warning)
    if page is not None:
        say(f"{page}: {page.stat().st_size / 1e6:.1f} MB, one file that needs no network")
    return print_hint(
        "report" if page else f"compare {' '.join(quoted(Path(thing)) for thing in things)} -o compare.html"
    )


def _content(one: Any) -> dict[str, Any]:
    ratios = {name: getattr(one, name) for name in ("latency_ratio", "workload_ratio", "miou_pp")}
    return {**asdict(one), **ratios}
