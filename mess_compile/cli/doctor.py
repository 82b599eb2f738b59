"""The command `doctor`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mess_compile.cli.console import print_hint, print_json, progress_bar, say
from mess_compile.cli.options import json_option

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@click.command()
@json_option
@click.pass_obj
def doctor(workspace: Workspace, as_json: bool) -> None:
    """List what this machine can train, build and run."""
    from mess_compile.doctor import examine

    with progress_bar(as_json) as progress:
        progress("look at this machine", 0, 0)
        findings = examine(workspace.root)
    if as_json:
        return print_json({"findings": [asdict(finding) for finding in findings]})
    for finding in findings:
        say(f"{'yes' if finding.possible else 'no '}  {finding.what}: {finding.detail}")
    return print_hint("profile --device cpu" if (workspace.graphs / "index.json").is_file() else "demo")
