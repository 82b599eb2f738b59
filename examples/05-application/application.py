"""A bundle in a program: a stream of frames, a deadline, another operating point, metrics."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

import numpy as np

DEADLINE_MS = 50.0
FRAMES = 12


def camera(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Frames, uint8 RGB (H, W, 3): put your camera here."""
    random = np.random.default_rng(0)
    for number in range(count):
        light = np.linspace(220 - 10 * number, 60, height)[:, np.newaxis, np.newaxis]
        yield np.clip(light + random.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def main(bundle: str) -> None:
    sys.path.insert(0, bundle)  # the bundle brings the runtime; an installed mess-compile does as well
    from mess_compile import runtime

    with runtime.load(bundle, on_failure="fallback") as cascade:
        height, width = cascade.manifest.network.input_hw
        for number, prediction in enumerate(cascade.stream(camera(FRAMES, height, width))):
            label = int(np.bincount(prediction.labels.ravel()).argmax())
            print(f"frame {number}: exit {prediction.exit}, mostly {cascade.class_names[label]}")
        (frame,) = camera(1, 2 * height, 2 * width)  # of another size: resized on the way in, labels on the way out
        for prediction in cascade.refine(frame, deadline_ms=DEADLINE_MS):
            sure = "" if prediction.confidence is None else f"{prediction.confidence:.0%} sure, "  # None: no exit rule
            print(f"refined: exit {prediction.exit}, {sure}labels {prediction.labels.shape}")
        cascade.operating_point = min(cascade.operating_points, key=len)
        print(f"operating point {cascade.operating_point}: exit {cascade(frame).exit}")
        print(cascade.metrics().to_prometheus())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="what `mess-compile bundle` wrote, such as ../01-quickstart/demo/host.mess")
    chosen = parser.parse_args()
    if not os.path.exists(chosen.bundle):
        parser.error(f"{chosen.bundle} does not exist: run ../01-quickstart first, or name another bundle")
    main(chosen.bundle)
