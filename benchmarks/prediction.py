"""Does the latency table predict what a cascade takes? Random plans, predicted from the table and really run.

    python benchmarks/prediction.py WORKSPACE --png docs/prediction.png

Heads, exits and cuts are drawn at random; frames are generated scenes. A prediction is the mean over the frames of the
cost of the path that each took. Plans are run in turn, many times over, so that drift of the machine spreads over all;
the baseline runs between them, and its own ratio says how much the machine moved since the table was made.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mess_compile import scenes
from mess_compile.bundle import write_bundle
from mess_compile.candidates import BASELINE, GraphSet, read_graph_set
from mess_compile.latency import (
    LatencyTable,
    baseline_cost_ns,
    check_current,
    content_sha256,
    path_costs_ns,
    read_latency_table,
)
from mess_compile.measurements import measurements_of
from mess_compile.runtime.cascade import Cascade, load
from mess_compile.runtime.engine import Engine
from mess_compile.search.figures import plan_graphs
from mess_compile.search.plan import Figures, Plan, PlanGraph, Stage, default_point
from mess_compile.statistics import threshold_table

FRAMES, WARM_UP = 8, 3
SIZE, MARGIN = 640, 60
GOAL_MEDIAN, GOAL_WORST = 3.0, 8.0
"""Percent."""


@dataclass(frozen=True)
class Outcome:
    heads: tuple[str, ...]
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """Percent of what was measured."""
        return 100 * (self.predicted_ms / self.measured_ms - 1)


def random_plan(graph_set: GraphSet, table: LatencyTable, rng: random.Random) -> Plan:
    candidate = graph_set.candidate
    points = sorted(rng.sample(range(1, len(candidate.exit_points) + 1), rng.randint(1, 3)))
    heads = [rng.choice(candidate.heads_at(point)).name for point in points if candidate.heads_at(point)]
    stages = []
    for head in heads:
        point = candidate.head(head).exit_point
        height, width = candidate.exit_point(point).hw
        cut = None if head == heads[-1] else round(rng.uniform(0.3, 1.0) * height * width)
        stages.append(Stage(point, head, rng.randrange(len(graph_set.gate.thresholds)), cut))
    nothing = Figures(1.0, 1.0, 1.0, 0.0, 0.0, 0, (1.0,) * len(stages), 1, "none", "measured")
    graphs = tuple(PlanGraph(name, "fp32", "fp32") for name in plan_graphs(candidate, heads))
    return Plan(
        device=table.device,
        library=table.library,
        precision=graph_set.recipe,
        setting="input-dependent",
        network=graph_set.identity,
        gate=graph_set.gate,
        stages=tuple(stages),
        graphs=graphs,
        predicted=nothing,
        baseline=replace(nothing, exit_rates=(1.0,)),
        tuned_by="onnxruntime on host",
        table_sha256=content_sha256(table),
        statistics_sha256="",
        operating_points=(default_point(stages, nothing),),
        baseline_alone=graph_set.baseline_alone,
    )


def opened(
    graph_set: GraphSet, table: LatencyTable, plan: Plan, frame: NDArray[np.uint8], folder: Path, name: str
) -> Cascade:
    path = folder / f"{name}.mess"
    thresholds = threshold_table(graph_set.gate, len(graph_set.candidate.classes))
    write_bundle(path, graph_set, plan, thresholds, [frame], measurements_of(plan, graph_set, table, None), {})
    cascade = load(path)
    path.unlink()
    return cascade


def baseline_ms(cascade: Cascade, engine: Engine, frame: NDArray[np.uint8]) -> float:
    """As the table has it: upload, graph, download."""
    from time import perf_counter

    start = perf_counter()
    labels = engine.run({"image": cascade.library.upload(frame[None])})["labels"]
    cascade.library.download(labels)
    return 1e3 * (perf_counter() - start)


def outcomes(graph_set: GraphSet, table: LatencyTable, plans: list[Plan], rounds: int) -> tuple[list[Outcome], float]:
    """The plans' outcomes, and the baseline's time as a multiple of the table's."""
    hw = graph_set.candidate.input_hw
    frames = [scenes.make_scene(seed, hw, seed / (FRAMES - 1)).frame for seed in range(FRAMES)]
    times = np.zeros((len(plans), rounds, FRAMES))
    exits = np.zeros((len(plans), FRAMES), np.intp)
    single: list[float] = []
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        cascades = [
            stack.enter_context(opened(graph_set, table, plan, frames[0], Path(folder), str(number)))
            for number, plan in enumerate(plans)
        ]
        baseline = cascades[0].library.load(graph_set.path(BASELINE))
        for number in range(WARM_UP + rounds):
            for index in random.Random(number).sample(range(len(plans)), len(plans)):
                for place, frame in enumerate(frames):
                    prediction = cascades[index](frame)
                    exits[index, place] = prediction.exit - 1
                    times[index, max(0, number - WARM_UP), place] = prediction.latency_ms
                if number >= WARM_UP:
                    single.append(baseline_ms(cascades[0], baseline, frames[number % FRAMES]))
    found = []
    for plan, taken, measured in zip(plans, exits, times, strict=True):
        heads = tuple(stage.head for stage in plan.stages)
        costs = np.array(path_costs_ns(table, graph_set, heads))
        found.append(Outcome(heads, float(costs[taken].mean()) / 1e6, float(measured.mean())))
    return found, float(np.mean(single)) / (baseline_cost_ns(table, graph_set, BASELINE) / 1e6)


def draw(path: Path, found: list[Outcome]) -> None:
    """Predicted against measured, both axes logarithmic; the diagonal is the goal."""
    values = [value for each in found for value in (each.predicted_ms, each.measured_ms)]
    low, high = np.log(min(values) / 1.2), np.log(max(values) * 1.2)
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    pen = ImageDraw.Draw(picture)

    def place(ms: float) -> float:
        return MARGIN + float((np.log(ms) - low) / (high - low)) * (SIZE - 2 * MARGIN)

    pen.line((MARGIN, SIZE - MARGIN, SIZE - MARGIN, MARGIN), fill="grey")
    pen.rectangle((MARGIN, MARGIN, SIZE - MARGIN, SIZE - MARGIN), outline="black")
    for each in found:
        x, y = place(each.measured_ms), SIZE - place(each.predicted_ms)
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), outline="navy", width=2)
    for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500):
        if low < np.log(tick) < high:
            pen.text((place(tick), SIZE - MARGIN + 6), f"{tick}", fill="black", anchor="mt")
            pen.text((MARGIN - 6, SIZE - place(tick)), f"{tick}", fill="black", anchor="rm")
    pen.text((SIZE / 2, SIZE - 16), "measured, ms a frame", fill="black", anchor="mb")
    pen.text((MARGIN, MARGIN - 12), "predicted from the latency table, ms a frame", fill="black", anchor="lb")
    picture.save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    graph_set = read_graph_set(options.workspace / "graphs")
    table = read_latency_table(options.workspace / "latency" / "host.json")
    check_current(table, graph_set)
    rng = random.Random(options.seed)
    plans = [random_plan(graph_set, table, rng) for _ in range(options.plans)]
    found, moved = outcomes(graph_set, table, plans, options.rounds)
    for each in sorted(found, key=lambda each: each.measured_ms):
        print(
            f"predicted {each.predicted_ms:7.3f} ms, measured {each.measured_ms:7.3f} ms: {each.error:+6.1f} %  "
            f"{' -> '.join(each.heads)}"
        )
    errors = np.abs([each.error for each in found])
    print(
        f"median absolute error {np.median(errors):.1f} % (goal {GOAL_MEDIAN:g}), worst {errors.max():.1f} % "
        f"(goal {GOAL_WORST:g}), over {len(found)} plans"
    )
    print(f"the baseline took {moved:.3f} x the table's time in the same run; table: {table.environment['verdict']}")
    still = np.abs([100 * (moved * each.predicted_ms / each.measured_ms - 1) for each in found])
    print(f"with that taken out: median {np.median(still):.1f} %, worst {still.max():.1f} %")
    if options.png:
        draw(options.png, found)
    return 0 if np.median(errors) <= GOAL_MEDIAN and errors.max() <= GOAL_WORST else 1


if __name__ == "__main__":
    sys.exit(main())
