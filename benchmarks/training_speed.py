"""What a step of training takes by several thread settings, with and without a busy process on each core beside it.

    python benchmarks/training_speed.py                        # the demo's network on its scenes
    python benchmarks/training_speed.py --input 360x480 --width 1 --rounds 3

One process for each setting stands ready and trains some steps when it is its turn; in each round every setting has its
turn once, in an order that is drawn anew, so that what else the machine does meets all of them alike. Exits 1 when the
default takes more than 1.3 times as long as the best setting, with or without the load.
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
    """What a training is started with: `--threads`, and what the user has set in the environment."""

    threads: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


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


def train_by_turns(data: Path, hw: tuple[int, int], width: float, steps: int, threads: int | None) -> None:
    """Train for ever; after every so many steps, say on standard output how long they took, and wait for a line."""
    recipes, parallel = extras.torch_module("training.recipe"), extras.torch_module("training.parallel")
    done, started = 0, time.perf_counter()

    def stepped(what: str, images: int, of: int) -> None:
        nonlocal done, started
        if not images:  # a stage begins
            return
        done += 1
        if done % steps:
            return
        print(time.perf_counter() - started, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        started = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        recipe = recipes.Recipe(epochs=(100_000, 1))
        choice = NetworkChoice("mobilenetv2", hw, EXITS, HEADS, width=width)
        train(
            Workspace(Path(folder)),
            data,
            choice,
            recipe,
            TrainOptions(machines=parallel.Machines("cpu", threads=threads)),
            Reporter(stepped),
        )


class Worker:
    """A training that goes on for some steps whenever it is its turn."""

    def __init__(self, setting: Setting, data: Path, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--work-on", str(data), "--input", options.input]
        command += [
            "--width",
            str(options.width),
            "--steps",
            str(options.steps),
            "--threads",
            str(setting.threads or 0),
        ]
        others = {name: value for name, value in os.environ.items() if name not in _THREAD_VARIABLES}
        self.process = subprocess.Popen(
            command,
            env={**others, **setting.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> float:
        """Seconds of the steps just done."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the training ended with code {self.process.wait()}: {self.process.args}")
        return float(line)

    def turn(self) -> float:
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


def compared(workers: Mapping[str, Worker], rounds: int, steps: int) -> float:
    """Print what a step takes by each setting; the default's time relative to the best."""
    taken: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name in random.sample(list(workers), len(workers)):
            taken[name].append(workers[name].turn() / steps)
    best = min(map(statistics.median, taken.values()))
    for name, seconds in taken.items():
        middle = statistics.median(seconds)
        print(
            f"  {name:18} {1000 * middle:8.0f} ms ({1000 * min(seconds):.0f} to {1000 * max(seconds):.0f})"
            f"  {middle / best:5.2f} x the best"
        )
    return statistics.median(taken["default"]) / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", default="96x128", help="size of the crops, HEIGHTxWIDTH")
    parser.add_argument("--width", type=float, default=0.5, help="width multiplier of mobilenetv2")
    parser.add_argument("--steps", type=int, default=3, help="training steps of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work-on", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    height, width = map(int, options.input.split("x"))
    if options.work_on is not None:
        return train_by_turns(options.work_on, (height, width), options.width, options.steps, options.threads or None)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ends:
        data = Path(folder) / "data"
        scenes.write_scenes(data, SCENES, (height, width))
        print(f"{len(open_dataset(data, 'train').items)} scenes of {options.input}, batches of 8, {cores()} cores")
        workers = {name: Worker(setting, data, options) for name, setting in settings().items()}
        for worker in workers.values():
            ends.callback(worker.end)
        for worker in workers.values():
            worker.answer()  # the first steps are slower
        ratios = []
        for busy in (0, cores()):
            print(f"{busy} busy processes beside it, load average {os.getloadavg()[0]:.1f}:")
            with load(busy):
                ratios.append(compared(workers, options.rounds, options.steps))
    print(f"the default takes {ratios[0]:.2f} x the best setting, beside a load {ratios[1]:.2f} x")
    sys.exit(int(max(ratios) > MOST_RATIO))


if __name__ == "__main__":
    main()
