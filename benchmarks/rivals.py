"""What a user would do instead of a multi-exit network: train a smaller one. Latency, work and mIoU in one run.

    python benchmarks/rivals.py WORKSPACE --data DIR --epochs 16 4 --max-err 1
    python benchmarks/rivals.py demo --data demo/data --epochs 3 1 --split test       # a smoke test, in minutes

WORKSPACE holds a candidate network that is exported, profiled and evaluated; it is only read. The rivals are trained
with the options given here, which should be those of the candidate network, for the sum of its epochs:

- the network that ends at the early exit where the best budgeted plan ends, trained for that exit alone;
- half the width (mobilenetv2 only);
- two thirds of the resolution.

Every rival, the candidate network's most accurate exit and its best budgeted and input-dependent plans become bundles.
These run on every image of the split one after the other, in an order that is drawn anew for each image. The table is
also written to OUT/rivals.json. A stopped script continues: a training after its last epoch; finished ones are used.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from mess_compile import steps
from mess_compile.bench.run import WARM_UP_FRAMES
from mess_compile.data.dataset import DataSet, open_dataset, samples
from mess_compile.evaluate.statistics import label_counts, miou
from mess_compile.nets.checkpoint import load_candidate, read_architecture
from mess_compile.nets.network import Architecture
from mess_compile.reporter import Reporter
from mess_compile.runtime import Cascade, load
from mess_compile.runtime.base.errors import MessError
from mess_compile.runtime.measure.measure import Effort
from mess_compile.search.metrics import exit_macs
from mess_compile.search.plan import Plan, read_result
from mess_compile.training.recipe import Recipe
from mess_compile.workspace import Workspace

ALONE = 1e4
"""Weight of the early exit's loss where that exit is trained alone: AdamW ignores the scale of a loss, so the final
exit, which the package always trains as well, is left with a ten thousandth of the gradient."""
CPU = "cpu"
REPORTER = Reporter(note=print)


@dataclass(frozen=True)
class Contender:
    """A bundle in the comparison; of each of its exits the head, and the workload of an image that leaves there."""

    name: str
    bundle: Path
    heads: tuple[str, ...]
    macs: tuple[int, ...]


@dataclass(frozen=True)
class Line:
    """A contender's figures on the split: mean latency and its standard error over passes, workload, mIoU in percent,
    and the share of images that leave at each head."""

    name: str
    latency_ms: float
    spread_ms: float
    gmacs: float
    miou: float
    exit_rates: dict[str, float]


@dataclass(frozen=True)
class Rival:
    """A network to train instead, and how; the fastest of its exits runs."""

    name: str
    choice: steps.NetworkChoice
    recipe: Recipe


def rivals(architecture: Architecture, ends_at: int, head: str, recipe: Recipe) -> list[Rival]:
    """The networks that are trained instead; `ends_at` is the number of the exit that one of them ends at."""
    blocks, hw = architecture.exit_blocks, architecture.input_hw
    plain = steps.NetworkChoice(
        architecture.backbone, hw, 1, (), output_stride=architecture.output_stride, width=architecture.width
    )
    early = replace(plain, exits=(blocks[ends_at - 1], blocks[-1]), heads=(head,))
    alone = replace(recipe, order="joint", stage1_head=head, exit_weight=ALONE)
    found = [
        Rival(f"ends at exit {ends_at}", early, alone),
        Rival("two thirds of the resolution", replace(plain, input_hw=two_thirds(hw)), recipe),
    ]
    if architecture.backbone == "mobilenetv2":
        found.insert(1, Rival("half the width", replace(plain, width=architecture.width / 2), recipe))
    else:
        print(f"{architecture.backbone} has no width to halve: that rival is left out")
    return found


def two_thirds(hw: tuple[int, int]) -> tuple[int, int]:
    """In multiples of 8, the output stride."""
    height, width = (max(8, round(side / 12) * 8) for side in hw)
    return height, width


def ending(workspace: Workspace, budgeted: Plan) -> tuple[int, str]:
    """Exit and head at which a rival ends: those of the budgeted plan, or of the best head at the middle exit where
    that plan is the whole network."""
    candidate = load_candidate(workspace.candidate).candidate
    early = [head for head in candidate.heads if head.exit_point < len(candidate.exit_points)]
    if not early:
        raise SystemExit(f"{workspace.root} has a network without early exits: there is nothing to compare")
    chosen = [head for head in early if head.name == budgeted.stages[-1].head]
    middle = [head for head in early if head.exit_point == max(1, len(candidate.exit_points) // 2)]
    head = (chosen or middle or early)[-1]
    return head.exit_point, head.config


def contender_of_plan(name: str, workspace: Workspace, plan_file: Path, bundle: Path) -> Contender:
    """The bundle of a plan that was searched in the workspace."""
    steps.bundle(workspace, [plan_file], bundle, reporter=REPORTER)
    heads = tuple(stage.head for stage in read_result(plan_file).plan.stages)
    return Contender(name, bundle, heads, exit_macs(load_candidate(workspace.candidate).candidate, heads))


def searched(workspace: Workspace, requirement: steps.Requirement, output: Path) -> Plan:
    """The best plan for the device that the workspace was profiled on."""
    options = steps.SearchOptions(output=output)
    (result,) = steps.search(workspace, requirement=requirement, options=options, reporter=REPORTER)
    return result.plan


def trained(rival: Rival, folder: Path, data: Path, profile: steps.ProfileOptions) -> Contender:
    """The rival as a bundle; what an earlier call made is used again."""
    folder.mkdir(parents=True, exist_ok=True)
    workspace, plan_file = Workspace(folder), folder / "plan.json"
    if not (workspace.candidate / "network.json").is_file():
        print(f"{rival.name}: training")
        steps.train(workspace, data, rival.choice, rival.recipe, steps.TrainOptions(), REPORTER)
    if not plan_file.is_file():
        steps.export(workspace, reporter=REPORTER)
        steps.profile(workspace, CPU, profile)
        steps.evaluate(workspace, steps.EvaluateOptions(data=data, split="val"))
        searched(workspace, steps.Requirement(setting="budgeted"), plan_file)
    return contender_of_plan(rival.name, workspace, plan_file, folder / "rival.mess")


def compared(contenders: Sequence[Contender], data: DataSet, passes: int) -> list[Line]:
    """Run every contender on every image, in an order that is drawn anew for each image."""
    items = list(samples(data))
    took = {each.name: np.zeros((passes, len(items))) for each in contenders}
    exits: dict[str, list[int]] = {each.name: [] for each in contenders}
    classes = len(data.classes.names)
    pixels = {each.name: np.zeros((3, classes), np.int64) for each in contenders}
    with ExitStack() as stack:
        cascades = {each.name: stack.enter_context(load(each.bundle)) for each in contenders}
        warm_up(cascades, [item.frame for item in items[:WARM_UP_FRAMES]])
        for number in range(passes):
            for index, item in enumerate(items):
                for name in random.sample(list(cascades), len(cascades)):
                    prediction = cascades[name](item.frame)
                    took[name][number, index] = prediction.latency_ms
                    if number == 0:
                        exits[name].append(prediction.exit)
                        pixels[name] += label_counts(prediction.labels, item.labels, classes)
    return [line_of(each, took[each.name], exits[each.name], pixels[each.name]) for each in contenders]


def warm_up(cascades: dict[str, Cascade], frames: Sequence[np.ndarray]) -> None:
    for cascade in cascades.values():
        for frame in frames:
            cascade(frame)


def line_of(contender: Contender, took: np.ndarray, exits: Sequence[int], pixels: np.ndarray) -> Line:
    a_pass = took.mean(axis=1).tolist()
    return Line(
        name=contender.name,
        latency_ms=statistics.mean(a_pass),
        spread_ms=statistics.stdev(a_pass) / len(a_pass) ** 0.5 if len(a_pass) > 1 else 0.0,
        gmacs=sum(contender.macs[number - 1] for number in exits) / len(exits) / 1e9,
        miou=miou(*pixels),
        exit_rates={head: exits.count(number) / len(exits) for number, head in enumerate(contender.heads, start=1)},
    )


def table(lines: Sequence[Line]) -> str:
    """The comparison as a Markdown table; speeds are relative to the first line."""
    first = lines[0]
    rows = ["| network | latency ms | x faster | GMACs | mIoU % | exits |", "|---|--:|--:|--:|--:|---|"]
    for line in lines:
        rates = ", ".join(f"{100 * rate:.0f} % {head}" for head, rate in line.exit_rates.items())
        latency = f"{line.latency_ms:.2f} ± {line.spread_ms:.2f}"
        faster = f"{first.latency_ms / line.latency_ms:.2f}"
        rows.append(f"| {line.name} | {latency} | {faster} | {line.gmacs:.3f} | {line.miou:.2f} | {rates} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val", help="the images that are run; plans are always chosen on val")
    parser.add_argument("--out", type=Path, help="where rivals and figures go; WORKSPACE-rivals by default")
    parser.add_argument("--epochs", type=int, nargs=2, default=(60, 20), metavar=("STAGE1", "STAGE2"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--lovasz", type=float, default=0.0)
    parser.add_argument("--class-power", type=float, default=0.5)
    parser.add_argument("--ema", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-err", type=float, default=1.0, help="mIoU points that the two plans may lose")
    parser.add_argument("--passes", type=int, default=3, help="runs of every image")
    parser.add_argument("--seconds", type=float, default=1.0, help="longest measurement of one of a rival's graphs")
    options = parser.parse_args()
    try:
        lines = measured(options, options.out or Path(f"{options.workspace}-rivals"))
    except MessError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"\n{table(lines)}")


def measured(options: argparse.Namespace, out: Path) -> list[Line]:
    """The figures of all contenders, also written to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    workspace, data = steps.open_workspace(options.workspace), open_dataset(options.data, options.split)
    profile = steps.ProfileOptions(effort=Effort(max_s=options.seconds))
    recipe = Recipe(
        epochs=(sum(options.epochs), 0),
        batch=options.batch,
        learning_rate=options.learning_rate,
        lovasz=options.lovasz,
        class_power=options.class_power,
        ema=options.ema,
        seed=options.seed,
    )
    requirements = {
        "most accurate exit": steps.Requirement(setting="budgeted", objective="accuracy"),
        "budgeted plan": steps.Requirement(setting="budgeted", max_err_pp=options.max_err),
        "input-dependent plan": steps.Requirement(max_err_pp=options.max_err),
    }
    contenders, plans = [], {}
    for name, requirement in requirements.items():
        place = out / f"{name.replace(' ', '-')}.json"
        plans[name] = searched(workspace, requirement, place)
        contenders.append(contender_of_plan(name, workspace, place, place.with_suffix(".mess")))
    ends_at, head = ending(workspace, plans["budgeted plan"])
    for rival in rivals(read_architecture(workspace.candidate), ends_at, head, recipe):
        folder = out / rival.name.replace(" ", "-")
        contenders.append(trained(rival, folder, options.data, profile))
    lines = compared(contenders, data, options.passes)
    content = {"split": data.split, "images": len(data.items), "recipe": asdict(recipe)}
    content["lines"] = [asdict(line) for line in lines]
    (out / "rivals.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return lines


if __name__ == "__main__":
    main()
