"""Random deadlines: how often a result comes too late, and how sure what was delivered is.

    python benchmarks/anytime.py anytime.mess [--data FOLDER_OF_IMAGES]

Frames (the bundle's golden ones unless --data names others) are refined under deadlines drawn evenly from nothing to
1.5 times what the whole plan takes at p99 (by the bundle). Deadlines shorter than the first result, which is always
delivered, stand apart. Of the others 1 % may be missed, and what chance adds (three standard deviations of a binomial):
beyond that the exit code is 1.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mess_compile.data.dataset import read_frame
from mess_compile.runtime.cascade.cascade import Cascade, load

ALLOWED = 0.01
WARM_UP_FRAMES = 50
COLUMNS = 6


@dataclass(frozen=True)
class Case:
    deadline_ms: float
    first_ms: float
    last_ms: float
    exit: int
    confidence: float

    @property
    def too_short(self) -> bool:
        return self.first_ms > self.deadline_ms

    @property
    def missed(self) -> bool:
        return not self.too_short and self.last_ms > self.deadline_ms


def whole_plan_ms(cascade: Cascade) -> float:
    costs = cascade.plan.costs
    return cascade.plan.upload_p99_ms + sum(cost.p99_ms + cost.report_p99_ms for cost in costs)


def one_case(cascade: Cascade, frame: NDArray[np.uint8], deadline_ms: float) -> Case:
    results = list(cascade.refine(frame, deadline_ms))
    in_time = [result for result in results if result.latency_ms <= deadline_ms] or results[:1]
    return Case(deadline_ms, results[0].latency_ms, results[-1].latency_ms, results[-1].exit, in_time[-1].confidence)


def tell(cases: Sequence[Case], most_ms: float) -> float:
    """Print what happened; the share of misses over what is allowed (at most 1 is well)."""
    fair = [case for case in cases if not case.too_short]
    misses = sum(case.missed for case in fair)
    allowed = ALLOWED * len(fair) + 3 * math.sqrt(ALLOWED * (1 - ALLOWED) * len(fair))
    late_ms = [case.last_ms - case.deadline_ms for case in fair if case.missed]
    print(f"{len(cases)} frames, {len(cases) - len(fair)} of them with a deadline shorter than the first result")
    print(f"missed: {misses} of {len(fair)}, {100 * misses / max(len(fair), 1):.2f} %; {allowed:.0f} are allowed")
    if late_ms:
        print(f"late by {np.median(late_ms):.3f} ms (median), {max(late_ms):.3f} ms at most")
    for low, high in zip(np.linspace(0, most_ms, COLUMNS + 1), np.linspace(0, most_ms, COLUMNS + 1)[1:], strict=False):
        within = [case for case in cases if low <= case.deadline_ms < high]
        if within:
            exits = np.bincount([case.exit for case in within])[1:]
            sure = np.percentile([case.confidence for case in within], (10, 50, 90))
            told = ", ".join(f"{100 * value:.0f} %" for value in sure)
            print(f"deadlines {low:.1f} to {high:.1f} ms: last exits {exits.tolist()}; sure cells {told} (p10, 50, 90)")
    return misses / allowed if fair else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, help="folder of images")
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with load(options.bundle) as cascade:
        if options.data is not None:
            frames = [read_frame(path) for path in sorted(options.data.iterdir())]
        else:
            frames = [cascade.archive.array(golden.frame) for golden in cascade.manifest.golden_of(cascade.plan)]
        most_ms = 1.5 * whole_plan_ms(cascade)
        for frame in (frames * WARM_UP_FRAMES)[:WARM_UP_FRAMES]:
            list(cascade.refine(frame))
        cases = [one_case(cascade, draw.choice(frames), draw.uniform(0, most_ms)) for _ in range(options.frames)]
        share = tell(cases, most_ms)
    sys.exit(0 if share <= 1 else 1)


if __name__ == "__main__":
    main()
