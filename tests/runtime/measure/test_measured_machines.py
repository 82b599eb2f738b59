"""Machines that change their speed while they are measured: what is predicted of cascades must not depend on when.

A script of them: two speeds for a second or more at a time, as on a host that others share; heat; a core that is taken
away for a moment. Graphs do not slow down alike. Truth is what a sum of stages costs at the machine's own speed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from mess_compile.runtime.engines.engine import TensorSpec
from mess_compile.runtime.engines.engine_fake import FakeGraph, FakeLibrary
from mess_compile.runtime.measure import measure, summary
from mess_compile.runtime.measure.job_pool import Job
from mess_compile.runtime.measure.measure import Effort, Window
from mess_compile.runtime.measure.summary import Speed, Summary

STAGES_MS = (7.0, 3.3, 3.5, 7.0, 35.0)
HEADS_MS = (0.9, 2.5, 3.0, 5.5, 12.0)
FRAME = np.zeros((2, 2, 3), np.uint8)
IMAGE, OUT = TensorSpec("image", "uint8", (1, 2, 2, 3)), TensorSpec("out", "float32", (1, 1))


@dataclass
class Machine:
    """How much slower than at its own speed a machine is, moment by moment.

    It is slow for `slow_share` of the time, `dwell_s` at once in the mean: `by` times for a graph that suffers as the
    reference does. In half a minute it becomes warmer, and slower, by `heat`. Every `stall_every_s` or so nothing runs
    for up to 0.1 s.
    """

    seed: int
    slow_share: float = 0.0
    dwell_s: float = 2.0
    by: float = 1.9
    heat: float = 0.0
    stall_every_s: float = float("inf")
    rng: random.Random = field(init=False)
    slow: bool = False
    changes_s: float = 0.0
    stalls_s: float = 0.0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.stalls_s = self._in(self.stall_every_s)

    def _in(self, mean_s: float) -> float:
        return self.rng.expovariate(1 / mean_s) if mean_s < float("inf") else mean_s

    def run_s(self, now_s: float, base_s: float, suffers: float) -> float:
        while self.slow_share and self.changes_s <= now_s:
            self.slow = not self.slow
            usual_s = self.dwell_s * (1 - self.slow_share) / self.slow_share
            self.changes_s += self._in(self.dwell_s if self.slow else usual_s)
        slower = 1 + (self.by - 1) * suffers if self.slow else 1.0
        took = base_s * slower * (1 + self.heat * min(1.0, now_s / 30)) * self.rng.gauss(1.0, 0.03)
        if self.stalls_s <= now_s + took:
            took += self.rng.uniform(0.01, 0.1)
            self.stalls_s = now_s + took + self._in(self.stall_every_s)
        return took


def costs_ms() -> dict[str, float]:
    """Segments `sAB` and heads `hAK` of a network of five exits."""
    ends = range(1, len(STAGES_MS) + 1)
    segments = {f"s{a}{b}": sum(STAGES_MS[a:b]) for b in ends for a in range(b)}
    return segments | {f"h{b}{k}": HEADS_MS[(b + 2 * k) % len(HEADS_MS)] for b in ends for k in range(2)}


@dataclass
class Scripted(FakeLibrary):
    """Every run costs what the machine makes of it just then."""

    machine: Machine = field(default_factory=lambda: Machine(0))
    suffers: dict[str, float] = field(default_factory=dict)

    def synchronise(self) -> None:
        base_s, name = self.pending_ns / 1e9, self.log[-1][1] if self.log else ""
        if base_s:
            self.pending_ns = int(1e9 * self.machine.run_s(self.now_ns / 1e9, base_s, self.suffers[name]))
        super().synchronise()


def measured(machine: Machine, folder: Path) -> tuple[dict[str, Summary], Speed, list[Window], float]:
    """The figures of every graph, the speed, the windows, and how long all took, in s."""
    costs, rng = costs_ms(), random.Random(0)
    one = {"out": np.zeros((1, 1), np.float32)}
    graphs = {name: FakeGraph((IMAGE,), (OUT,), lambda feeds: one, int(1e6 * ms)) for name, ms in costs.items()}
    suffers = {name: rng.uniform(0.6, 1.3) for name in costs} | {"s01": 1.0}
    library = Scripted(graphs, machine=machine, suffers=suffers)
    for name in costs:
        (folder / f"{name}.onnx").touch()
    jobs = [Job(name, folder / f"{name}.onnx", "s05" if name.startswith("s0") else f"s0{name[1]}") for name in costs]
    thresholds, clock = np.zeros((1, 2), np.float32), library.clock_ns
    events = measure.measure(library, measure.MeasureTask(jobs, FRAME, thresholds, "s01"), clock_ns=clock)
    windows = [event for event in events if isinstance(event, Window)]
    speed = summary.speed(windows)
    by_job = {name: [window for window in windows if window.job == name] for name in costs}
    return (
        {name: summary.summarise(taken, speed.full_ms) for name, taken in by_job.items()},
        speed,
        windows,
        library.now_ns / 1e9,
    )


def cascades() -> Iterator[list[str]]:
    rng = random.Random(1)
    for _ in range(30):
        points = sorted(rng.sample(range(1, 6), rng.randint(1, 3)))
        starts = [0, *points[:-1]]
        segments = [f"s{a}{b}" for a, b in zip(starts, points, strict=True)]
        yield [*segments, *(f"h{b}{rng.randrange(2)}" for b in points)]


def errors_percent(figures: dict[str, Summary]) -> np.ndarray:
    """How far the cascades' sums of means lie from the truth."""
    costs = costs_ms()
    sums = [(sum(figures[name].mean_ms for name in names), sum(costs[name] for name in names)) for names in cascades()]
    return np.array([100 * abs(found / truth - 1) for found, truth in sums])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "conditions",
    [
        {},
        {"slow_share": 0.2},
        {"slow_share": 0.2, "dwell_s": 10.0},
        {"slow_share": 0.5, "dwell_s": 4.0},
        {"stall_every_s": 2.0},
    ],
)
def test_cascades_are_predicted_whatever_the_machine_does(
    tmp_path: Path, seed: int, conditions: dict[str, float]
) -> None:
    """A slow moment within one window, between two good ticks, is what is left of the error."""
    figures, _, windows, total_s = measured(Machine(seed, **conditions), tmp_path)  # type: ignore[arg-type]
    errors = errors_percent(figures)
    assert np.median(errors) < 2.0
    assert np.percentile(errors, 80) < 4.0 * (2 if "stall_every_s" in conditions else 1)
    assert errors.max() < 12.0
    assert total_s < 1.3 * sum(window.spent_s + window.waited_s for window in windows)


@pytest.mark.parametrize("seed", range(6))
def test_a_machine_that_is_slow_most_of_the_time_is_waited_for(tmp_path: Path, seed: int) -> None:
    """Else jobs are given up whose windows were all slow by chance, and the run is called unstable."""
    figures = measured(Machine(seed, slow_share=0.6, dwell_s=4.0), tmp_path)[0]
    assert all(figure.steady for figure in figures.values())
    assert errors_percent(figures).max() < 3.0


def test_graphs_are_told_at_one_temperature(tmp_path: Path) -> None:
    figures = measured(Machine(0, heat=0.15), tmp_path)[0]
    ratios = [figures[name].mean_ms / cost for name, cost in costs_ms().items()]
    assert np.percentile(ratios, 90) / np.percentile(ratios, 10) < 1.05


def test_without_ticks_the_same_windows_would_mislead(tmp_path: Path) -> None:
    """That the machine of these tests is one on which it matters what is thrown away."""
    found = [measured(Machine(seed, slow_share=0.2, dwell_s=4.0), tmp_path) for seed in range(3)]
    for figures, _, windows, _ in found:
        blind = {name: summary.summarise([each for each in windows if each.job == name]) for name in figures}
        assert errors_percent(blind).max() > 3 * errors_percent(figures).max()


def test_how_slow_the_machine_was_is_told(tmp_path: Path) -> None:
    found = [measured(Machine(seed, slow_share=0.3, by=1.65), tmp_path)[1] for seed in range(4)]
    assert float(np.mean([speed.slow_share for speed in found])) == pytest.approx(0.3, abs=0.1)
    assert all(speed.slow_by == pytest.approx(1.65, rel=0.08) for speed in found)
    assert all(speed.full_ms == pytest.approx(7.0, rel=0.05) for speed in found)


def test_a_machine_that_becomes_slower_for_good_is_measured_as_it_then_is(tmp_path: Path) -> None:
    """Ratios to the baseline, the longest path, hold: nothing is told at the one speed, and the rest at the other."""

    class Throttled(Machine):
        def run_s(self, now_s: float, base_s: float, suffers: float) -> float:
            return super().run_s(now_s, base_s, suffers) * (1.3 if now_s > 20 else 1.0)

    figures, speed, _, total_s = measured(Throttled(0), tmp_path)
    costs = costs_ms()
    ratios = [figures[name].mean_ms / costs[name] for name in costs]
    assert np.percentile(ratios, 90) / np.percentile(ratios, 10) < 1.05
    assert speed.full_ms == pytest.approx(7.0 * 1.3, rel=0.05)
    assert total_s < 300


def test_a_machine_that_is_never_twice_the_same_comes_to_an_end(tmp_path: Path) -> None:
    """And says so: hardly a graph of it settles."""

    class Restless(Machine):
        def run_s(self, now_s: float, base_s: float, suffers: float) -> float:
            return base_s * 2 ** random.Random(int(20 * now_s)).random()

    figures, speed, windows, _ = measured(Restless(0), tmp_path)
    assert sum(figure.steady for figure in figures.values()) < 0.5 * len(figures)
    assert speed.slow_share > 0.3
    most = 2 * Effort().max_s * len(figures)
    assert sum(window.spent_s for window in windows) < 1.1 * most
