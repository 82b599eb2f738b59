"""The command line: each command parses its options, calls one function of `steps`, and prints."""

from __future__ import annotations

from pathlib import Path

import click

from mess_compile import __version__
from mess_compile.cli import (
    attach,
    bench,
    build,
    bundle,
    compare,
    completion,
    demo,
    devices,
    doctor,
    evaluate,
    export,
    inspect,
    profile,
    report,
    run,
    search,
    ship,
    train,
    verify,
)
from mess_compile.cli.console import Group, made
from mess_compile.cli.interrupts import message_of
from mess_compile.cli.options import FOLDER

_BEGIN = ("demo", "train", "attach", "export")
"""Commands that make the folder of a new workspace."""


@click.group(
    cls=Group, stopped=message_of, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option("-C", "folder", type=FOLDER, default=".", help="The workspace; the current folder by default.")
@click.version_option(__version__)
@click.pass_context
def main(ctx: click.Context, folder: Path) -> None:
    """Compile multi-exit segmentation networks for a device.

    \b
    mess-compile export                     cut the multi-exit network into graphs
    mess-compile profile --device cpu       measure the graphs on this machine
    mess-compile search --max-err 1%        choose exits, heads and thresholds
    mess-compile bundle                     write one file that the device runs
    """
    from mess_compile.workspace import open_workspace

    if ctx.invoked_subcommand in _BEGIN:
        ctx.with_resource(made(folder))
    ctx.obj = open_workspace(folder)


for command in (
    demo.demo,
    train.train,
    attach.attach,
    export.export,
    evaluate.evaluate,
    build.build,
    profile.profile,
    search.search,
    bundle.bundle,
    run.run,
    bench.bench,
    verify.verify,
    ship.ship,
    report.report,
    compare.compare,
    devices.devices,
    doctor.doctor,
    inspect.inspect,
    completion.completion,
):
    main.add_command(command)
