"""The command `demo`."""

from __future__ import annotations

from pathlib import Path

import click

from mess_compile.cli.options import FOLDER


@click.command(short_help="Run the whole flow on generated street scenes.")
@click.argument("folder", type=FOLDER, required=False)
@click.option("--train", is_flag=True, help="Train the network from scratch instead of using the included one.")
@click.pass_context
def demo(context: click.Context, folder: Path | None, train: bool) -> None:
    """Run the whole flow on generated street scenes in FOLDER: export, profile, search, bundle, run, bench, report.

    FOLDER is `demo` by default, or the folder of -C. The demo takes a minute, and with --train a quarter of an hour
    more.
    """
    from mess_compile.steps.demo import run_demo

    root = context.find_root()
    named = root.params["folder"]
    default = Path("demo") if named == Path() else named
    run_demo(default if folder is None else folder, root.command, train)
