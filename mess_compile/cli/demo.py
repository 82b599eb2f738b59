"""The command `demo`."""

from __future__ import annotations

from pathlib import Path

import click

from mess_compile.cli.options import FOLDER


@click.command(short_help="The whole flow on generated street scenes.")
@click.argument("folder", type=FOLDER, default="demo")
@click.option("--train", is_flag=True, help="Train the network from scratch, instead of the one that is brought.")
def demo(folder: Path, train: bool) -> None:
    """The whole flow on generated street scenes: export, profile, search, bundle, run, bench, report.

    It takes a minute, with a network that mess-compile brings; to train that takes a quarter of an hour more.
    """
    from mess_compile.steps import demo as demonstration

    demonstration.run_demo(folder, click.get_current_context().find_root().command, train)
