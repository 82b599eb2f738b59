"""The command `report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import print_json, progress_bar, quoted, say
from mess_compile.cli.options import FILE, json_option

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@click.command(short_help="Write one self-contained HTML page of the results.")
@click.option(
    "--device", shell_complete=completion.devices, help="Device to report on; by default the one profiled last."
)
@click.option("-o", "--output", type=FILE, help="File for the page; report.html in the workspace by default.")
@json_option
@click.pass_obj
def report(workspace: Workspace, device: str | None, output: Path | None, as_json: bool) -> None:
    """Write one self-contained HTML page of the results: cascade, trade-offs, classes, latencies, pictures."""
    from mess_compile.report import collect

    with progress_bar(as_json) as progress:
        path, found = collect.report(workspace, device, output, progress)
    content = collect.content_of(found)
    if as_json:
        return print_json({"report": str(path), "bytes": path.stat().st_size, **content})
    say(f"{path}: {path.stat().st_size / 1e6:.1f} MB, one file that needs no network")
    missing = content["missing"]
    for reason in dict.fromkeys(missing.values()):
        parts = ", ".join(part for part, why in missing.items() if why == reason)
        say(f"no {parts}: {reason}")
    return hints.print_known(*_after_report(workspace, found.device, set(missing)))


def _after_report(workspace: Workspace, device: str, missing: set[str]) -> Sequence[str | None]:
    """The first step that would add to the report, or with a complete one, shipping."""
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
