"""What the cascade itself costs: its wall time less that of the same graphs alone in a tight loop.

    python benchmarks/cascade.py host.mess graphs/baseline.onnx

Every round runs the cascade, its graphs and the baseline in a random order, on the bundle's golden frames.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mess_compile.runtime.cascade import Cascade, load
from mess_compile.runtime.engine import Engine, Tensor

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    with load(options.bundle) as cascade:
        baseline = cascade.library.load(options.baseline)
        for golden in cascade.manifest.golden:
            frame = cascade.archive.array(golden.frame)
            taken = cascade(frame).exit
            steps = graphs_alone(cascade, frame, taken)
            image = cascade.library.upload(frame[None])
            actions = (lambda: cascade(frame), lambda: run_all(steps), lambda: baseline.run({"image": image}))  # noqa: B023
            rounds = range(WARM_UP_ROUNDS + options.rounds)
            times_ms = 1e3 * np.array([timed_in_any_order(actions) for _ in rounds])[WARM_UP_ROUNDS:]
            whole, alone, single = np.median(times_ms, axis=0)
            own = np.median(times_ms[:, 0] - times_ms[:, 1])
            print(
                f"{golden.frame}, exit {taken}: cascade {whole:.3f} ms, its graphs {alone:.3f} ms, "
                f"own {own * 1e3:.0f} us; baseline {single:.3f} ms: {100 * own / single:.2f} % of it"
            )


if __name__ == "__main__":
    main()
