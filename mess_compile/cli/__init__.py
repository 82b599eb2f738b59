"""The command line: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path

import click

from mess_compile import __version__
from mess_compile.cli import bundles, completion, networks, on_devices, searching, shipping, showing
from mess_compile.cli.console import Group
from mess_compile.cli.interrupts import words_of
from mess_compile.cli.options import FOLDER


@click.group(
    cls=Group, stopped=words_of, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option("-C", "folder", type=FOLDER, default=".", help="The workspace: the current folder by default.")
@click.version_option(__version__)
@click.pass_context
def main(ctx: click.Context, folder: Path) -> None:
    """Compile multi-exit segmentation networks for a device.

    \b
    mess-compile export                     cut the candidate network into graphs
    mess-compile profile --device host      measure them on the device
    mess-compile search --max-err 1%        choose exits, heads and thresholds
    mess-compile bundle                     write what the device runs
    """
    from mess_compile.workspace import open_workspace

    ctx.obj = open_workspace(folder)


for command in (
    networks.demo,
    networks.train,
    networks.export,
    networks.evaluate,
    on_devices.build,
    on_devices.profile,
    searching.search,
    bundles.bundle,
    bundles.run,
    bundles.bench,
    bundles.verify,
    shipping.ship,
    shipping.ships,
    showing.report,
    showing.compare,
    on_devices.devices,
    on_devices.doctor,
    bundles.inspect,
    completion.completion,
):
    main.add_command(command)
