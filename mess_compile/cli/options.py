"""What several commands share: options, the values they become, and how results are printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli.completion import precisions, targets
from mess_compile.cli.console import print_json, print_table, say, warn
from mess_compile.data_folder import DataFolder
from mess_compile.duration import duration
from mess_compile.runtime.base.errors import InputError

if TYPE_CHECKING:
    from mess_compile.planned_step import PlannedStep

HW = click.option("--input", "input_hw", default="180x240", show_default=True, help="Input size, HEIGHTxWIDTH.")
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
BUNDLE = click.Path(path_type=Path)
PYTHON = click.option(
    "--python",
    metavar="PATH",
    help="Path of Python on the device, such as ~/venv/bin/python; python3 by default. Remembered.",
)
TARGET = click.option(
    "--target",
    shell_complete=targets,
    help="Which of the bundle's plans: DEVICE, or DEVICE:PRECISION such as xavier:fp16.",
)
PRECISION = click.option(
    "--precision",
    default="fp32",
    shell_complete=precisions,
    show_default=True,
    help="Precision of the graphs: fp32, fp16 or int8.",
)
PRECISIONS = click.option(
    "--precision",
    default="fp32",
    shell_complete=precisions,
    show_default=True,
    help="One or more of fp32, fp16 and int8, such as fp32,fp16.",
)


def data_options(help: str, required: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--data` and how it is read; the command gets one `data`: a DataFolder, or None where none of them is given."""
    options = (
        click.option("--data", type=FOLDER, required=required, help=help),
        click.option(
            "--images", metavar="NAME", help="Name of the image folders in --data; `images` by default. Remembered."
        ),
        click.option(
            "--labels", metavar="NAME", help="Name of the label folders in --data; `labels` by default. Remembered."
        ),
        click.option(
            "--label-offset",
            type=int,
            metavar="N",
            help="Label value of the first class; 1 if 0 means unlabelled. Remembered.",
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


JUDGED = data_options("Images for checking fp16 and int8; the workspace's data by default.")


class Command(click.Command):
    """A command that takes former names of its options, with a warning, for one release."""

    def __init__(self, *arguments: Any, formerly: dict[str, str] | None = None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.formerly = formerly or {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [*map(self._renamed, args[:end]), *args[end:]])

    def _renamed(self, argument: str) -> str:
        name, separator, value = argument.partition("=")
        if name not in self.formerly:
            return argument
        warn(f"{name} is now {self.formerly[name]}; the old name goes away in the next release")
        return f"{self.formerly[name]}{separator}{value}"


def gathered(kind: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Hand a command those of its options that are fields of the dataclass `kind` as one value, `arguments`."""
    names = [field.name for field in fields(kind)]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def combined(*positional: Any, **given: Any) -> Any:
            value = kind(**{name: given.pop(name) for name in names})
            return command(*positional, arguments=value, **given)

        return combined

    return decorate


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--json", "as_json", is_flag=True, help="Print the result as one JSON object and nothing else."
    )(command)


def verbose_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("-v", "--verbose", is_flag=True, help="Also print details.")(command)


def dry_run_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--dry-run", is_flag=True, help="Only print what would be done and how long it should take.")(
        command
    )


def print_plan(steps: Sequence[PlannedStep], as_json: bool) -> None:
    """Print what a command would do and write."""
    if as_json:
        return print_json({"dry_run": [step.content() for step in steps]})
    for each in steps:
        say(f"would {each.what}")
        for place in each.writes:
            say(f"would write {place}")
        say(_planned_time(each))
        for note in each.notes:
            warn(note)
    return say("nothing was written")


def _planned_time(step: PlannedStep) -> str:
    if step.least_s is None:
        return f"duration unknown: {step.basis}"
    least = duration(step.least_s) if step.least_s >= 10 else f"{step.least_s:.2g} s"
    if step.most_s is None:
        return f"it should take {least} or more, ESTIMATED (by {step.basis})"
    times = least if step.least_s == step.most_s else f"{least} to {duration(step.most_s)}"
    return f"it should take {times}, ESTIMATED (by {step.basis})"


def print_inspection(found: Any) -> None:
    """Print the tables and notes of an Inspection."""
    for table in found.tables:
        print_table(table.title, table.header, table.rows)
    for note in found.notes:
        say(note)
    for warning in found.warnings:
        warn(warning)


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


def picked(arguments: object, names: str) -> dict[str, Any]:
    """Some fields of the arguments of a command, by name."""
    return {name: getattr(arguments, name) for name in names.split()}


BOUNDS = {
    "err_pp": "--max-err {:.4g}%",
    "change": "--max-change {:.4g}%",
    "class_err_pp": "--max-class-err {name}={:.4g}%",
    "latency_ms": "--max-latency {:.4g}ms",
    "p95_ms": "--max-latency-p95 {:.4g}ms",
    "worst_ms": "--max-latency-worst {:.4g}ms",
    "gmacs": "--max-workload {:.4g}",
    "energy_mj": "--max-energy {:.4g}mJ",
    "memory_bytes": "--max-memory {:.0f}B",
}
"""The option of `search` for each bound of a plan."""


def promise_option(promise: Any) -> str:
    """The option of `search` that a bound came from."""
    option = BOUNDS.get(promise.quantity, f"{promise.quantity} {{:g}}")
    return (
        f"{option.split()[0]} {promise.limit:.4g}x"
        if promise.relative
        else option.format(promise.limit, name=promise.class_name)
    )
