"""The whole flow on generated street scenes, by the commands a user would type."""

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
from mess_compile.latency.table import check_current, read_latency_table
from mess_compile.network import read_graph_set, verify_graph_set
from mess_compile.runtime.base.errors import MessError
from mess_compile.runtime.serve.worker import describe_machine
from mess_compile.search.plan import read_result
from mess_compile.workspace import HOST, Workspace

NETWORK = Path(__file__).with_name("demo_network")
"""What `train_command` made of TRAIN_COUNT scenes, none of which is drawn for validation or test."""
INPUT_HW = (192, 256)
COUNTS = {"val": 120, "test": 64, "train": 120}
"""Scenes; those to train on are for networks of your own, and --train draws TRAIN_COUNT."""
TRAIN_COUNT = 480
FIRST_SEED = 2000
"""No scene from here on was looked at while the network, its heads and the scenes' difficulty were chosen."""
PICTURES = 4
REQUIREMENTS = ("0.5%", "0.2%")
SHOWN_SHARE = 0.1


def run_demo(folder: Path, program: click.Command, train: bool = False) -> None:
    """Generate data in FOLDER/data, then do everything from `export` to `bench` and `report` in FOLDER.

    The network is the one that mess-compile brings, or with `train` one that is trained first. An interrupted demo
    continues: what is there and fits what it is made from is kept, which is said, and the search and all behind it is
    done again.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    _draw_scenes(folder / "data", {**COUNTS, "train": TRAIN_COUNT} if train else COUNTS)
    kept = _put_network(folder) if not train else False
    for line, what, is_there in _steps_before_search(folder, train):
        if is_there(Workspace(folder)):
            click.echo(f"\nkept: {what} (remove {folder} to start over)" if not kept else f"kept: {what}")
            kept = True
        else:
            _run(program, line)
    for requirement in REQUIREMENTS:
        _run(program, ["-C", str(folder), "search", "--max-err", requirement])
        if _shows_two_exits(folder):
            break
    else:
        click.echo(f"no requirement tried lets two exits take {SHOWN_SHARE:.0%} of the images each on this machine")
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


def _draw_scenes(data: Path, counts: dict[str, int]) -> None:
    """All of them again when a split is missing, or has the few that a demo without --train draws: the same ones, and
    the missing ones."""
    few = counts["train"] > COUNTS["train"] == len(list((data / "train" / "images").glob("*")))
    if few or not all((data / split).is_dir() for split in counts):
        click.echo(f"drawing {sum(counts.values())} street scenes in {data}")
        scenes.write_scenes(data, counts, INPUT_HW, FIRST_SEED, scenes.MOSTLY_EASY)


def _put_network(folder: Path) -> bool:
    """Put our network into FOLDER/candidate; whether one was there already, which is kept."""
    candidate = Workspace(folder).candidate
    if (candidate / "network.json").is_file():
        click.echo(f"\nkept: the network in candidate/ (remove {folder} to start over)")
        return True
    with files.replaced_folder(candidate) as temporary:
        shutil.copytree(NETWORK, temporary, dirs_exist_ok=True)
    click.echo(f"the network that mess-compile brings is in {candidate} (demo --train trains it from scratch)")
    return False


def _run(program: click.Command, line: list[str]) -> None:
    click.echo(f"\n$ mess-compile {shlex.join(line)}")
    program.main(args=line, prog_name="mess-compile", standalone_mode=False)


def _shows_two_exits(folder: Path) -> bool:
    """Whether the plan is worth a demonstration; a looser requirement may be met by one exit alone."""
    rates = read_result(Workspace(folder).plan("host")).plan.predicted.exit_rates
    return sum(rate >= SHOWN_SHARE for rate in rates) >= 2


def _steps_before_search(folder: Path, train: bool) -> list[tuple[list[str], str, Callable[[Workspace], bool]]]:
    """Commands, what they leave, and whether that is there."""
    here, data = ["-C", str(folder)], str(folder / "data")
    training = (train_command(folder), "the network trained in candidate/", _is_trained)
    return [
        *([training] if train else []),
        ([*here, "export"], "its graphs", _is_exported),
        ([*here, "profile", "--device", "host", "--seconds", "0.3"], "their latencies on this machine", _is_profiled),
        ([*here, "evaluate", "--data", data], "the statistics of every head", _is_evaluated),
    ]


def train_command(folder: Path) -> list[str]:
    """What trains the network of the demo in FOLDER."""
    line = ["-C", str(folder), "train", "--data", str(folder / "data"), "--input", f"{INPUT_HW[0]}x{INPUT_HW[1]}"]
    line += ["--width", "0.5", "--exits", "features.6,features.10,features.17"]
    line += ["--heads", "fcn-crm1-b1,sep32-crm1-b0,sep-crm1-b0", "--epochs", "12", "8", "--learning-rate", "0.004"]
    return [*line, "--crop", "128x160", "--full-size-epochs", "2"]


def _is_trained(workspace: Workspace) -> bool:
    """Here, and not put there by a demo without `--train`."""
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
    """By this machine, when it was in a state to be trusted."""
    with suppress(MessError):
        table = read_latency_table(workspace.latency(HOST))
        check_current(table, read_graph_set(workspace.graphs))
        told = table.environment
        return told.get("identity") == describe_machine()["identity"] and told.get("verdict") != "unstable"
    return False


def _is_evaluated(workspace: Workspace) -> bool:
    with suppress(MessError):
        found = statistics.read_statistics(workspace.statistics("val"))
        statistics.check_current(found, read_graph_set(workspace.graphs))
        return workspace.memory().data is not None
    return False


def _commands_after_search(folder: Path) -> list[list[str]]:
    here, bundle, test = ["-C", str(folder)], str(folder / "host.mess"), folder / "data" / "test"
    shown = sorted(str(path) for path in (test / "images").iterdir())[:PICTURES]
    output = str(folder / "predictions")
    return [
        [*here, "bundle"],
        [*here, "run", bundle, *shown, "--progressive", "--truth", str(test / "labels"), "-o", output],
        [*here, "bench", bundle, "--data", str(folder / "data"), "--split", "test", "--passes", "2"],
        *([[*here, "report"]] if extras.writes_reports() else []),
    ]
