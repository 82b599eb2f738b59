"""What the cascade itself costs: its wall time less that of the same graphs alone in a tight loop.

    python benchmarks/cascade.py host.mess graphs/baseline.onnx [--single-file host.onnx]

Every round runs the cascade, its graphs, the baseline and, where there is one, the same plan as one ONNX file with `If`
in a random order, on the bundle's golden frames. Before, a new process is timed from `load` to its first prediction.
Exits 1 when the cascade's own cost exceeds 150 us or 1 % of the baseline for any frame, or the first prediction takes
more than 1 s.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mess_compile.runtime.cascade.cascade import Cascade, load
from mess_compile.runtime.engines.engine import Engine, Tensor, open_library

WARM_UP_ROUNDS = 10


Step = tuple[Engine, Mapping[str, Tensor]]


def graphs_alone(cascade: Cascade, frame: NDArray[np.uint8], exit_taken: int) -> list[Step]:
    """The engines that the cascade ran for `frame`, in order, each with the tensors it was fed."""
    library, folder = cascade.library, cascade.archive.folder
    thresholds = library.upload(np.array(cascade.manifest.gate.thresholds, np.float32))
    tensors = {"image": library.upload(frame[None]), "thresholds": thresholds}
    stages = cascade.plan.stages[:exit_taken]
    steps: list[Step] = []
    for path in [path for stage in stages for path in (stage.segment, stage.head_graph)] + [stages[-1].output]:
        engine = library.load(folder / path)
        feeds = {name: tensors[name] for name in engine.inputs}
        tensors.update(engine.run(feeds))
        steps.append((engine, feeds))
    return steps


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def timed_in_any_order(actions: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each action; the order is drawn anew, since whoever runs after the baseline finds cold caches."""
    taken = [0.0] * len(actions)
    for index in random.sample(range(len(actions)), len(actions)):
        taken[index] = seconds(actions[index])
    return taken


def run_all(steps: list[Step]) -> None:
    for engine, feeds in steps:
        engine.run(feeds)


class AtOnce:
    """An engine that computed a frame once, and from then on returns what it did then: what is left is the cascade."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._results: dict[str, Tensor] = {}
        self.inputs, self.outputs, self.scratch_bytes = engine.inputs, engine.outputs, engine.scratch_bytes
        self.run_timed, self.close = engine.run_timed, engine.close

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._results = self._results or self._engine.run(feeds)
        return self._results


def without_graphs_us(bundle: Path, name: str) -> float:
    """The shortest of many calls whose engines return at once, in us: what no other load on the machine hides."""
    library = open_library("onnxruntime")
    load_engine = library.load
    library.load = lambda path: AtOnce(load_engine(path))  # type: ignore[method-assign]
    with load(bundle, library=library) as cascade:
        frame = cascade.archive.array(name)
        return min(timeit.repeat(lambda: cascade(frame), number=50, repeat=20)) / 50 * 1e6


FIRST_PREDICTION = """
import sys, time
from pathlib import Path
import numpy, onnxruntime
from mess_compile import runtime
from mess_compile.runtime.bundle.archive import open_archive
archive = open_archive(Path(sys.argv[1]))
frame = archive.array(archive.manifest.golden[0].frame)
start = time.perf_counter()
with runtime.load(sys.argv[1]) as cascade:
    loaded = time.perf_counter() - start
    cascade(frame)
    print(loaded, time.perf_counter() - start)
archive.close()
"""


def first_prediction(bundle: Path) -> float:
    """Seconds from `load` to the first prediction in a process of its own, the median of five."""
    command = [sys.executable, "-c", FIRST_PREDICTION, str(bundle)]
    told = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(5)]
    loaded, first = np.median([[float(word) for word in line.split()] for line in told], axis=0)
    print(f"loaded after {loaded:.3f} s, first prediction after {first:.3f} s (medians of five processes)")
    return float(first)


def own_cost(
    cascade: Cascade, name: str, baseline: Engine, single_file: Engine | None, rounds: int
) -> tuple[float, float]:
    """In us, and as a share of the baseline, for one golden frame."""
    frame = cascade.archive.array(name)
    taken = cascade(frame).exit
    steps = graphs_alone(cascade, frame, taken)
    image = cascade.library.upload(frame[None])
    actions: list[Callable[[], object]] = [
        lambda: cascade(frame),
        lambda: run_all(steps),
        lambda: baseline.run({"image": image}),
    ]
    if single_file is not None:
        actions.append(lambda: single_file.run({"image": image}))
    times_ms = 1e3 * np.array([timed_in_any_order(actions) for _ in range(WARM_UP_ROUNDS + rounds)])[WARM_UP_ROUNDS:]
    whole, alone, single, *one_file = np.median(times_ms, axis=0)
    own = float(np.median(times_ms[:, 0] - times_ms[:, 1]))
    beside = f"; single file {one_file[0]:.3f} ms" if one_file else ""
    print(
        f"{name}, exit {taken}: cascade {whole:.3f} ms, its graphs {alone:.3f} ms, own {own * 1e3:.0f} us; baseline "
        f"{single:.3f} ms ({single / whole:.2f} times as long): {100 * own / single:.2f} % of it{beside}"
    )
    return own * 1e3, own / single


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("--single-file", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    first_s = first_prediction(options.bundle)
    with load(options.bundle) as cascade:
        baseline = cascade.library.load(options.baseline)
        one_file = None if options.single_file is None else cascade.library.load(options.single_file)
        names = [golden.frame for golden in cascade.manifest.golden_of(cascade.plan)]
        costs = [own_cost(cascade, name, baseline, one_file, options.rounds) for name in names]
    python_us = max(without_graphs_us(options.bundle, name) for name in names)
    print(f"a call whose engines return at once takes {python_us:.0f} us at most (shortest of many)")
    most_us, most_share = np.max(costs, axis=0)
    print(f"own cost at most {most_us:.0f} us, {100 * most_share:.2f} % of the baseline")
    sys.exit(0 if most_us <= 150 and most_share <= 0.01 and first_s <= 1 else 1)


if __name__ == "__main__":
    main()
