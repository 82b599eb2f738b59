"""The whole flow on generated street scenes, by the commands a user would type."""

from __future__ import annotations

import time
from pathlib import Path

import click

from mess_compile import scenes
from mess_compile.dataset import IMAGE_SUFFIXES

INPUT_HW = (96, 128)
COUNTS = {"train": 320, "val": 96, "test": 64}
PICTURES = 4


def run_demo(folder: Path, program: click.Command) -> None:
    """Generate data in FOLDER/data, then train, export, profile, evaluate, search, bundle, run and bench in FOLDER.

    What is already there is used again, so that an interrupted demo continues.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    if not data.is_dir():
        click.echo(f"drawing {sum(COUNTS.values())} street scenes in {data}")
        scenes.write_scenes(data, COUNTS, INPUT_HW)
    for line in _commands(folder):
        click.echo(f"\n$ mess-compile {' '.join(line)}")
        program.main(args=line, prog_name="mess-compile", standalone_mode=False)
    strips = sorted((folder / "predictions").glob("*.progressive.png"))
    click.echo(f"\ndone in {time.monotonic() - started:.0f} s. Pictures of the refinement:")
    for strip in strips:
        click.echo(f"  {strip}")


def _commands(folder: Path) -> list[list[str]]:
    here = ["-C", str(folder)]
    data, bundle = str(folder / "data"), str(folder / "host.mess")
    images = folder / "data" / "test" / "images"
    shown = sorted(str(path) for path in images.iterdir() if path.suffix in IMAGE_SUFFIXES)[:PICTURES]
    truth = str(folder / "data" / "test" / "labels")
    train = [*here, "train", "--data", data, "--input", f"{INPUT_HW[0]}x{INPUT_HW[1]}", "--width", "0.5"]
    train += ["--exits", "features.3,features.6,features.10,features.17", "--epochs", "10", "4"]
    train += ["--heads", "fcn-crm1-b0,fcn-crm1-b1,fcn-crm2-b2-rdi", "--learning-rate", "0.004"]
    commands = [] if (folder / "candidate" / "network.json").is_file() else [train]
    return [
        *commands,
        [*here, "export"],
        [*here, "profile", "--device", "host"],
        [*here, "evaluate", "--data", data],
        [*here, "search", "--max-err", "1%"],
        [*here, "bundle"],
        [*here, "run", bundle, *shown, "--progressive", "--truth", truth, "-o", str(folder / "predictions")],
        [*here, "bench", bundle, "--data", data, "--split", "test"],
    ]
