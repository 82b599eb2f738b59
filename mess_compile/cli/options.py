"""What several commands share: options, sizes, and how findings are printed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli.completion import precisions, targets
from mess_compile.cli.console import print_json, print_table, say
from mess_compile.cli.progress import duration
from mess_compile.data_folder import DataFolder
from mess_compile.runtime.base.errors import InputError

if TYPE_CHECKING:
    from mess_compile.steps.dry_run import PlannedStep

HW = click.option("--input", "input_hw", default="180x240", show_default=True, help="Input size, HEIGHTxWIDTH.")
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
BUNDLE = click.Path(path_type=Path)
PYTHON = click.option(
    "--python",
    metavar="PATH",
    help="What starts Python there: a path, ~/ being the home folder there; python3 by default. Remembered.",
)
TARGET = click.option(
    "--target",
    shell_complete=targets,
    help="Which plan: a device, or device and precision such as xavier:fp16.",
)
PRECISION = click.option(
    "--precision", default="fp32", shell_complete=precisions, show_default=True, help="fp32, fp16 or int8."
)
PRECISIONS = click.option(
    "--precision",
    default="fp32",
    shell_complete=precisions,
    show_default=True,
    help="One or more of fp32, fp16, int8: fp32,fp16.",
)


def data_options(help: str, required: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--data`, and how it is read; the command gets one `data`: a DataFolder, or None where nothing is said."""
    options = (
        click.option("--data", type=FOLDER, required=required, help=help),
        click.option("--images", metavar="NAME", help="The folders of images in --data, if not `images`. Remembered."),
        click.option("--labels", metavar="NAME", help="The folders of labels in --data, if not `labels`. Remembered."),
        click.option(
            "--label-offset", type=int, metavar="N", help="The label value of the first class, 1 where 0 is unlabelled."
        ),
    )

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def combined(
            *arguments: Any,
            data: Path | None,
            images: str | None,
            labels: str | None,
            label_offset: int | None,
            **others: Any,
        ) -> Any:
            folder = DataFolder(data, images, labels, label_offset)
            return command(*arguments, data=None if folder == DataFolder() else folder, **others)

        wrapped: Callable[..., Any] = combined
        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped

    return decorate


JUDGED = data_options("Images that fp16 and int8 are judged on; the workspace's by default.")


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(command)


def dry_run_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--dry-run", is_flag=True, help="Only say what would be done, and how long it should take.")(
        command
    )


def print_plan(steps: Sequence[PlannedStep], as_json: bool) -> None:
    """What would be done, and that nothing was."""
    if as_json:
        return print_json({"dry_run": [step.content() for step in steps]})
    for each in steps:
        say(f"would {each.what}")
        for place in each.writes:
            say(f"would write {place}")
        say(_time_planned(each))
        for note in each.notes:
            say(f"mind: {note}")
    return say("nothing was written")


def _time_planned(step: PlannedStep) -> str:
    if step.least_s is None:
        return f"how long it takes is not known: {step.basis}"
    least = duration(step.least_s) if step.least_s >= 10 else f"{step.least_s:.2g} s"
    if step.most_s is None:
        return f"it should take {least} or more, ESTIMATED (by {step.basis})"
    most = duration(step.most_s)
    return (
        f"it should take {least if step.least_s == step.most_s else f'{least} to {most}'}, ESTIMATED (by {step.basis})"
    )


def print_inspection(found: Any) -> None:
    for table in found.tables:
        print_table(table.title, table.header, table.rows)
    for note in found.notes:
        say(note if sys.stdout.isatty() else fill(note, 100, break_long_words=False, break_on_hyphens=False))


def size(text: str) -> tuple[int, int]:
    from mess_compile.network import MAX_SIDE

    height, separator, width = text.lower().partition("x")
    if not separator or not height.isdecimal() or not width.isdecimal() or min(int(height), int(width)) < 32:
        raise InputError(f"size {text!r} is not HEIGHTxWIDTH of at least 32x32, such as 360x480")
    if max(int(height), int(width)) > MAX_SIDE:
        raise InputError(f"size {text!r} is more than {MAX_SIDE}x{MAX_SIDE}")
    return int(height), int(width)


def rates(rates: Any) -> str:
    return " ".join(f"{rate:.0%}" for rate in rates)


def picked(options: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: options[name] for name in names.split()}


def print_doubts(doubts: Iterable[str]) -> None:
    for doubt in doubts:
        say(f"mind: {doubt}")
