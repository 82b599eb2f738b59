"""The commands that show: `report` and `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import print_json, print_next, print_table, progress_bar, quoted, say
from mess_compile.cli.options import FILE, json_option

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace

_PER_TABLE = 3


@click.command(short_help="One self-contained HTML page of what was found.")
@click.option("--device", shell_complete=completion.devices, help="The device profiled last by default.")
@click.option("-o", "--output", type=FILE, help="report.html in the workspace by default.")
@json_option
@click.pass_obj
def report(workspace: Workspace, device: str | None, output: Path | None, as_json: bool) -> None:
    """One self-contained HTML page of what was found: cascade, front, classes, latencies, pictures."""
    from mess_compile.report import collect

    with progress_bar(as_json) as progress:
        path, found = collect.report(workspace, device, output, progress)
    content = collect.content_of(found)
    if as_json:
        return print_json({"report": str(path), "bytes": path.stat().st_size, **content})
    say(f"{path}: {path.stat().st_size / 1e6:.1f} MB, one file, no network needed")
    for note in found.notes:
        say(f"mind: {note}")
    missing = content["missing"]
    for reason in dict.fromkeys(missing.values()):
        parts = ", ".join(part for part, why in missing.items() if why == reason)
        say(f"without {parts}: {reason}")
    return hints.print_known(*_after_report(workspace, found.device, set(missing)))


def _after_report(workspace: Workspace, device: str, missing: set[str]) -> Sequence[str | None]:
    """The first step that would add to the report; where nothing would, what is done with a plan that is good."""
    plan = quoted(workspace.plan(device))
    for part, command in (
        ("latencies", f"profile --device {device}"),
        ("plan", f"search --device {device} --max-err 1%"),
        ("pictures", f"bundle {plan}"),
        ("measured", hints.bench_on_data(workspace.bundle(device))),
    ):
        if part in missing and command is not None:
            return [command]
    return [hints.ship_to_host(workspace.bundle(device), device)]


@click.command(short_help="Plans side by side.")
@click.argument("things", nargs=-1, required=True, metavar="PLAN|DEVICE|BUNDLE...", shell_complete=completion.compared)
@click.option("-o", "--output", type=FILE, metavar="PAGE.html", help="Also a page.")
@json_option
@click.pass_obj
def compare(workspace: Workspace, things: tuple[str, ...], output: Path | None, as_json: bool) -> None:
    """Plans side by side: of devices of the workspace, plan files, or bundles."""
    from mess_compile.report import collect, comparison

    found, page = collect.compare(workspace, things, output)
    if as_json:
        return print_json({"plans": [_content(one) for one in found], "notes": comparison.notes(found), "page": page})
    for start in range(0, len(found), _PER_TABLE):
        part = found[start : start + _PER_TABLE]
        print_table("", ["", *(one.name for one in part)], comparison.rows(part))
    for note in (*comparison.notes(found), *comparison.doubts(found)):
        say(f"mind: {note}")
    if page is not None:
        say(f"{page}: {page.stat().st_size / 1e6:.1f} MB, one file, no network needed")
    return print_next(
        "report" if page else f"compare {' '.join(quoted(Path(thing)) for thing in things)} -o compare.html"
    )


def _content(one: Any) -> dict[str, Any]:
    ratios = {name: getattr(one, name) for name in ("latency_ratio", "workload_ratio", "miou_pp")}
    return {**asdict(one), **ratios}
