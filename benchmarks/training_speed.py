"""The time of a training step by several thread settings, or by this checkout and another one.

    python benchmarks/training_speed.py                        # the demo's network on its scenes
    python benchmarks/training_speed.py --input 360x480 --width 1 --rounds 3
    git worktree add ../before v0.4.0 && python benchmarks/training_speed.py --against ../before --threads 1 \\
        --input 160x160 --order joint --lovasz 0.5 --stage1-head sep-crm1-b0 --exits 5

One process for each setting waits, and trains some steps when it is its turn; in each round every setting has its turn
once, in an order that is drawn anew, so that other load on the machine meets all of them alike. Thread settings are
compared with and without a busy process on each core; the script exits 1 when the default takes more than 1.3 times as
long as the best setting. Checkouts are compared as the machine is, and the script exits 1 when this one is slower.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mess_compile import extras
from mess_compile.cores import cores
from mess_compile.data import scenes
from mess_compile.data.dataset import open_dataset
from mess_compile.steps import NetworkChoice, Reporter, TrainOptions, Workspace, train

MOST_RATIO = 1.3
SCENES = {"train": 160, "val": 2}
EXITS = ("features.3", "features.6", "features.10", "features.17")
HEADS = ("fcn-crm1-b0", "fcn-crm1-b1", "fcn-crm2-b2-rdi")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Setting:
    """How a training is started: `--threads`, and variables that the user has set in the environment."""

    threads: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """The time of some steps: by the clock, and on all cores (which other processes disturb less)."""

    wall_s: float
    cpu_s: float


def settings() -> dict[str, Setting]:
    """`spinning` is what GNU OpenMP does by itself: a thread that waits turns 300,000 times before it sleeps."""
    found = {
        "default": Setting(),
        "--threads 1": Setting(1),
        "spinning a little": Setting(environment={"GOMP_SPINCOUNT": "1000"}),
        "spinning": Setting(environment={"GOMP_SPINCOUNT": "300000"}),
    }
    if cores() > 2:
        found[f"--threads {cores() // 2}"] = Setting(cores() // 2)
    return found


def checkouts(other: Path, threads: int | None) -> dict[str, Setting]:
    """This checkout and another one, whose package is imported instead."""
    here = Path(__file__).resolve().parent.parent
    return {
        name: Setting(threads, {"PYTHONPATH": str(place.resolve())})
        for name, place in (("this checkout", here), (str(other), other))
    }


def train_by_turns(data: Path, options: argparse.Namespace) -> None:
    """Train for ever; after every so many steps, print how long they took, and wait for a line."""
    recipes, parallel = extras.torch_module("training.recipe"), extras.torch_module("training.parallel")
    done, started, cpu = 0, time.perf_counter(), time.process_time()

    def stepped(what: str, images: int, of: int) -> None:
        nonlocal done, started, cpu
        if not images:  # a stage begins
            return
        done += 1
        if done % options.steps:
            return
        print(time.perf_counter() - started, time.process_time() - cpu, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        started, cpu = time.perf_counter(), time.process_time()

    exits = EXITS if options.exits is None else options.exits
    recipe = recipes.Recipe(
        epochs=(100_000, 1), order=options.order, lovasz=options.lovasz, stage1_head=options.stage1_head
    )
    height, width = map(int, options.input.split("x"))
    choice = NetworkChoice("mobilenetv2", (height, width), exits, HEADS, width=options.width)
    machines = parallel.Machines("cpu", threads=options.threads)
    with tempfile.TemporaryDirectory() as folder:
        train(Workspace(Path(folder)), data, choice, recipe, TrainOptions(machines=machines), Reporter(stepped))


_PASSED_ON = ("input", "width", "steps", "order", "lovasz", "stage1_head", "exits")


class Worker:
    """A training that goes on for some steps whenever it is its turn."""

    def __init__(self, setting: Setting, data: Path, options: argparse.Namespace) -> None:
        values = {name: getattr(options, name) for name in _PASSED_ON} | {"threads": setting.threads}
        command = [sys.executable, __file__, "--work-on", str(data)]
        for name, value in values.items():
            command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        others = {name: value for name, value in os.environ.items() if name not in _THREAD_VARIABLES}
        self.process = subprocess.Popen(
            command,
            env={**others, **setting.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> Turn:
        """The time of the steps just done."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the training ended with code {self.process.wait()}: {self.process.args}")
        return Turn(*map(float, line.split()))

    def turn(self) -> Turn:
        assert self.process.stdin is not None
        self.process.stdin.write("on\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def spin() -> None:
    while True:
        pass


@contextmanager
def load(processes: int) -> Iterator[None]:
    """So many processes beside it that are always busy."""
    busy = [multiprocessing.get_context("fork").Process(target=spin, daemon=True) for _ in range(processes)]
    for process in busy:
        process.start()
    try:
        yield
    finally:
        for process in busy:
            process.terminate()
            process.join()


def compared(workers: Mapping[str, Worker], rounds: int, steps: int) -> dict[str, float]:
    """Print the time of a step by each setting; returns its median by the clock relative to the best setting's."""
    taken: dict[str, list[Turn]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name in random.sample(list(workers), len(workers)):
            taken[name].append(workers[name].turn())
    middle = {name: statistics.median(turn.wall_s for turn in turns) for name, turns in taken.items()}
    best = min(middle.values())
    for name, turns in taken.items():
        walls, cpu = [turn.wall_s for turn in turns], statistics.median(turn.cpu_s for turn in turns)
        least, most = (1000 * found(walls) / steps for found in (min, max))
        print(
            f"  {name:18} {1000 * middle[name] / steps:8.0f} ms ({least:.0f} to {most:.0f})"
            f"  {middle[name] / best:5.2f} x the best; {1000 * cpu / steps:.0f} ms of CPU"
        )
    return {name: seconds / best for name, seconds in middle.items()}


def compare_threads(workers: Mapping[str, Worker], options: argparse.Namespace) -> bool:
    """Whether the default is good enough, with and without other load."""
    ratios = []
    for busy in (0, cores()):
        print(f"{busy} busy processes beside it, load average {os.getloadavg()[0]:.1f}:")
        with load(busy):
            ratios.append(compared(workers, options.rounds, options.steps)["default"])
    print(f"the default takes {ratios[0]:.2f} x the best setting, beside a load {ratios[1]:.2f} x")
    return max(ratios) <= MOST_RATIO


def compare_checkouts(workers: Mapping[str, Worker], options: argparse.Namespace) -> bool:
    """Whether this checkout is at least as fast as the other one."""
    print(f"load average {os.getloadavg()[0]:.1f}:")
    this, other = compared(workers, options.rounds, options.steps).values()
    print(f"a step of this checkout takes {this / other:.2f} x the time of the other one's")
    return this <= other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", default="96x128", help="size of the crops, HEIGHTxWIDTH")
    parser.add_argument("--width", type=float, default=0.5, help="width multiplier of mobilenetv2")
    parser.add_argument("--steps", type=int, default=3, help="training steps of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="a data set; generated scenes by default")
    parser.add_argument("--exits", type=int, help="number of exits; four named blocks by default")
    parser.add_argument("--stage1-head", default="fcn-crm1-b0")
    parser.add_argument("--order", default="round-robin")
    parser.add_argument("--lovasz", type=float, default=0.0)
    parser.add_argument("--threads", type=int, help="CPU threads of the checkouts that are compared")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="compare with this checkout")
    parser.add_argument("--work-on", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work_on is not None:
        return train_by_turns(options.work_on, options)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ends:
        data = options.data or Path(folder) / "data"
        if options.data is None:
            scenes.write_scenes(data, SCENES, tuple(map(int, options.input.split("x"))))
        images = len(open_dataset(data, "train").items)
        print(f"{images} images at {options.input}, batches of 8, {cores()} cores")
        chosen = checkouts(options.against, options.threads) if options.against else settings()
        workers = {name: Worker(setting, data, options) for name, setting in chosen.items()}
        for worker in workers.values():
            ends.callback(worker.end)
        for worker in workers.values():
            worker.answer()  # the first steps are slower
        good = (compare_checkouts if options.against else compare_threads)(workers, options)
    sys.exit(int(not good))


if __name__ == "__main__":
    main()
