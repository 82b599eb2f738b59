"""The whole flow on generated street scenes, with the commands that a user would type."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click

from mess_compile import extras, files
from mess_compile.data import scenes
from mess_compile.evaluate import statistics
from mess_compile.latency.table import check_table_current, read_latency_table
from mess_compile.network import read_graph_set, verify_graph_set
from mess_compile.runtime.base.errors import InputError, MessError
from mess_compile.runtime.serve.worker import describe_machine
from mess_compile.search.plan import read_result
from mess_compile.workspace import HOST, Workspace

NETWORK = Path(__file__).with_name("demo_network")
"""The included network: `train_command` trained it on TRAIN_COUNT scenes, none of which is in validation or test."""
INPUT_HW = (192, 256)
COUNTS = {"val": 120, "test": 64, "train": 120}
"""Scenes of each split; those to train on are for networks of your own, and --train draws TRAIN_COUNT."""
TRAIN_COUNT = 480
FIRST_SEED = 2000
"""Scenes from here on had no part in choosing the network, its heads and the scenes' difficulty."""
PICTURES = 4
REQUIREMENTS = ("0.5%", "0.2%")
LEAST_SHARE = 0.1


def run_demo(folder: Path, program: click.Command, train: bool = False) -> None:
    """Generate data in FOLDER/data, then run everything from `export` to `bench` and `report` in FOLDER.

    The network is the included one, or with `train` one that is trained first. The same demo again keeps the results
    that are current, and runs the search and all behind it again. Raises InputError where FOLDER holds other data.
    """
    started = time.monotonic()
    _refuse_other_data(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _draw_scenes(folder / "data", {**COUNTS, "train": TRAIN_COUNT} if train else COUNTS)
    current = _put_network(folder) if not train else False
    for line, what, is_there in _steps_before_search(folder, train):
        if is_there(Workspace(folder)):
            click.echo(f"\nunchanged: {what} (remove {folder} to start over)" if not current else f"unchanged: {what}")
            current = True
        else:
            _run(program, line)
    for requirement in REQUIREMENTS:
        _run(program, ["-C", str(folder), "search", "--max-err", requirement])
        if _shows_two_exits(folder):
            break
    else:
        click.echo(f"on this machine no requirement of the demo gives two exits {LEAST_SHARE:.0%} of the images each")
    for line in _commands_after_search(folder):
        _run(program, line)
    strips = sorted((folder / "predictions").glob("*.progressive.png"))
    click.echo(f"\ndone in {time.monotonic() - started:.0f} s. Pictures of the refinement:")
    for strip in strips:
        click.echo(f"  {strip}")
    if extras.writes_reports():
        click.echo(f"Everything on one page: {folder / 'report.html'}")
    else:
        click.echo("For everything on one page: pip install 'mess-compile[report]', then `mess-compile report`")


def _refuse_other_data(folder: Path) -> None:
    """The demo draws its scenes into FOLDER/data, and must not replace a user's images."""
    data = folder / "data"
    known = data / "classes.txt"
    if data.is_dir() and any(data.iterdir()) and not (known.is_file() and _names(known) == scenes.SCENE_CLASSES.names):
        raise InputError(f"{data} holds other images than the demo's: name another folder, `mess-compile demo FOLDER`")


def _names(known: Path) -> tuple[str, ...]:
    lines = known.read_text(encoding="utf-8", errors="replace").splitlines()
    return tuple(line.split()[0] for line in lines if line.strip())


def _draw_scenes(data: Path, counts: dict[str, int]) -> None:
    """Draw the scenes where a split is missing, or where --train needs more than there are."""
    few = counts["train"] > COUNTS["train"] == len(list((data / "train" / "images").glob("*")))
    if few or not all((data / split).is_dir() for split in counts):
        click.echo(f"drawing {sum(counts.values())} street scenes in {data}")
        scenes.write_scenes(data, counts, INPUT_HW, FIRST_SEED, scenes.MOSTLY_EASY)


def _put_network(folder: Path) -> bool:
    """Copy the included network to FOLDER/candidate; return whether one was there already, which is kept."""
    candidate = Workspace(folder).candidate
    if (candidate / "network.json").is_file():
        click.echo(f"\nunchanged: the network in candidate/ (remove {folder} to start over)")
        return True
    with files.replaced_folder(candidate) as temporary:
        shutil.copytree(NETWORK, temporary, dirs_exist_ok=True)
    click.echo(f"the included network is in {candidate} (demo --train trains it from scratch)")
    return False


def _run(program: click.Command, line: list[str]) -> None:
    click.echo(f"\n$ mess-compile {shlex.join(line)}")
    program.main(args=line, prog_name="mess-compile", standalone_mode=False)


def _shows_two_exits(folder: Path) -> bool:
    """Whether the plan shows a cascade; a looser requirement may be met by one exit alone."""
    rates = read_result(Workspace(folder).plan("host")).plan.predicted.exit_rates
    return sum(rate >= LEAST_SHARE for rate in rates) >= 2


def _steps_before_search(folder: Path, train: bool) -> list[tuple[list[str], str, Callable[[Workspace], bool]]]:
    """Commands, what they make, and whether that is current."""
    here, data = ["-C", str(folder)], str(folder / "data")
    training = (train_command(folder), "the network trained in candidate/", _is_trained)
    return [
        *([training] if train else []),
        ([*here, "export"], "its graphs", _is_exported),
        ([*here, "profile", "--device", "cpu", "--seconds", "0.3"], "their latencies on this machine", _is_profiled),
        ([*here, "evaluate", "--data", data], "an evaluation of every head", _is_evaluated),
    ]


def train_command(folder: Path) -> list[str]:
    """The command that trains the network of the demo in FOLDER."""
    line = ["-C", str(folder), "train", "--data", str(folder / "data"), "--input", f"{INPUT_HW[0]}x{INPUT_HW[1]}"]
    line += ["--width", "0.5", "--exits", "features.6,features.10,features.17"]
    line += ["--heads", "fcn-crm1-b1,sep32-crm1-b0,sep-crm1-b0", "--epochs", "12", "8", "--learning-rate", "0.004"]
    return [*line, "--crop", "128x160", "--full-size-epochs", "2"]


def _is_trained(workspace: Workspace) -> bool:
    """Whether a network is there that was trained, not copied."""
    found, brought = (
        json.loads(path.read_bytes()) if path.is_file() else None
        for path in (workspace.candidate / "network.json", NETWORK / "network.json")
    )
    return found is not None and found != brought


def _is_exported(workspace: Workspace) -> bool:
    with suppress(MessError):
        network = extras.torch_module("nets.checkpoint").load_candidate(workspace.candidate)
        graph_set = read_graph_set(workspace.graphs)
        verify_graph_set(graph_set)
        return bool(graph_set.candidate.identity == network.candidate.identity)
    return False


def _is_profiled(workspace: Workspace) -> bool:
    """Whether this machine measured the current graphs, without much noise."""
    with suppress(MessError):
        table = read_latency_table(workspace.latency(HOST))
        check_table_current(table, read_graph_set(workspace.graphs))
        environment = table.environment
        same = environment.get("identity") == describe_machine()["identity"]
        return same and environment.get("verdict") != "unstable"
    return False


def _is_evaluated(workspace: Workspace) -> bool:
    with suppress(MessError):
        found = statistics.read_statistics(workspace.statistics("val"))
        statistics.check_statistics_current(found, read_graph_set(workspace.graphs))
        return workspace.memory().data is not None
    return False


def _commands_after_search(folder: Path) -> list[list[str]]:
    here, bundle, test = ["-C", str(folder)], str(folder / "host.mess"), folder / "data" / "test"
    images = sorted(str(path) for path in (test / "images").iterdir())[:PICTURES]
    output = str(folder / "predictions")
    return [
        [*here, "bundle"],
        [*here, "run", bundle, *images, "--progressive", "--truth", str(test / "labels"), "-o", output],
        [*here, "bench", bundle, "--data", str(folder / "data"), "--split", "test", "--passes", "2"],
        *([[*here, "report"]] if extras.writes_reports() else []),
    ]
