"""A hundred thousand frames through a stream with failing engines: none lost, none out of order, no memory growing.

    PYTHONPATH=. python benchmarks/soak.py

A small network runs through `runtime.load` and ONNX Runtime; in 1 % of the frames a graph fails or gives NaN, and the
fallback computes them. Every prediction is held against the network computed by matrix products. Exits 1 when one is
wrong, or the memory of the process grows by 1 MiB or more per 10,000 frames (least squares, the first fifth left out).
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from mess_compile import runtime
from mess_compile.runtime.cascade.metrics import Metrics
from mess_compile.runtime.engines.engine import open_library
from tests import small_network
from tests.runtime.faults import FaultyLibrary

DISTINCT = 64
ROW, CUT = 2, 18
GRAPHS_THAT_GIVE_NAN = ("segment", "head")


class Faults:
    """Which run fails, drawn so that a frame, which has three runs or five, does in so many cases."""

    def __init__(self, share: float, seed: int) -> None:
        self._random, self._per_run = random.Random(seed), share / 4
        self.injected = {"error": 0, "nan": 0}

    def __call__(self, graph: str) -> str | None:
        if self._random.random() >= self._per_run:
            return None
        nan = graph.startswith(GRAPHS_THAT_GIVE_NAN) and self._random.random() < 0.5
        self.injected["nan" if nan else "error"] += 1
        return "nan" if nan else "error"


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def wanted(seed: int) -> tuple[int, NDArray[np.uint8]]:
    """Exit and labels, by matrix products."""
    results = small_network.expected(small_network.frame(seed))
    number = 1 if results[0][0][ROW] >= CUT else 2
    return number, results[number - 1][1]


def checked(stream: Iterator[runtime.Prediction], order: list[int], every: int) -> Iterator[tuple[int, float]]:
    """Yield (frames, MiB) now and then. Raises SystemExit at the first prediction that is not of its frame."""
    known = [wanted(seed) for seed in range(DISTINCT)]
    number = 0
    for number, prediction in enumerate(stream, 1):
        exit_taken, labels = known[order[(number - 1) % len(order)]]
        if prediction.exit != exit_taken or not np.array_equal(prediction.labels, labels):
            raise SystemExit(f"frame {number} is lost, wrong or out of order")
        if number % every == 0:
            yield number, resident_mib()


def slope_per_10_000(points: list[tuple[int, float]]) -> float:
    frames, mib = np.array(points[len(points) // 5 :]).T
    return float(np.polyfit(frames, mib, 1)[0] * 10_000)


def tell(frames: int, seconds: float, injected: dict[str, int], found: Metrics, slope: float) -> None:
    faults = ", ".join(f"{count} {kind}" for kind, count in injected.items())
    print(f"{frames} frames in {seconds:.0f} s ({1e6 * seconds / frames:.0f} us each), all of them right and in order")
    print(f"faults injected: {faults}; seen: {found.failures}; {found.fallback_frames} frames by the fallback")
    print(f"exits {found.exits}, p50 {found.latency.p50_ms:.3f} ms, p99 {found.latency.p99_ms:.3f} ms")
    print(f"memory: {slope:+.3f} MiB per 10,000 frames, {resident_mib():.0f} MiB at the end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--faults", type=float, default=0.01, help="share of the frames that an engine fails on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faults = Faults(options.faults, options.seed)
    order = random.Random(options.seed).choices(range(DISTINCT), k=9973)
    frames = [small_network.frame(seed) for seed in range(DISTINCT)]
    with TemporaryDirectory() as folder:
        bundle = Path(folder, "small.mess")
        small_network.write_bundle(bundle, small_network.plan(CUT))
        library = FaultyLibrary(open_library("onnxruntime", threads=1), faults)
        with runtime.load(bundle, library=library, threads=1, on_failure="fallback") as cascade:
            started = time.monotonic()
            source = (frames[index] for index in itertools.islice(itertools.cycle(order), options.frames))
            points = list(checked(cascade.stream(source), order, max(options.frames // 100, 1)))
            seconds, found = time.monotonic() - started, cascade.metrics()
    slope = slope_per_10_000(points)
    tell(options.frames, seconds, faults.injected, found, slope)
    seen = found.failures["error"], found.failures["not-finite"]
    complete = found.frames == options.frames and found.lost_results == 0
    sys.exit(0 if complete and slope < 1 and seen == tuple(faults.injected.values()) else 1)


if __name__ == "__main__":
    main()
