"""Which part of the method earns what: one row per choice, mean and spread over seeds, on frames nothing was tuned on.

    python benchmarks/ablation.py --data DIR --out FOLDER

Rows: how stage 1 trains the exits; what stage 1 does beside; how stage 2 teaches the heads; every kind of head; the
image confidence. Everything is trained small (--input, --epochs), from scratch, alike but for the row's one choice.
The default frames are those that the CamVid example tunes on: what is chosen by this table is reported on others.
FOLDER keeps every network and figure: a stopped ablation continues, more seeds add to it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mess_compile import steps
from mess_compile.evaluate.diagnose import TOLERANCE_PP, auroc, final_head, image_mious
from mess_compile.evaluate.statistics import ExitStatistics, head_miou, miou
from mess_compile.files import write_json
from mess_compile.nets.checkpoint import load_candidate
from mess_compile.network import CONFIDENCES, Gate
from mess_compile.reporter import Reporter
from mess_compile.training.recipe import Distillation, Recipe
from mess_compile.workspace import Workspace

EXITS = ("features.6", "features.9", "features.13", "features.17")
HEADS = (
    *("fcn-crm1-b0", "fcn-crm1-b1", "fcn-crm1-b3", "fcn-crm1-b3-rdi", "fcn-crm2-b3-rdi"),
    *("dlb64-crm1-b0", "sep-crm1-b0", "sep128-crm1-b0", "lra-crm1-b0"),
)
TAUGHT = ("fcn-crm1-b0", "sep-crm1-b0")
"""Heads of the rows on teaching and on stage 1: one of the paper's, one of ours."""
GATED = "sep-crm1-b0"
ALONE = "final exit only"


@dataclass(frozen=True)
class Options:
    """What all rows share; figures made with other options are not mixed with these."""

    data: str
    input_hw: tuple[int, int]
    epochs: tuple[int, int]
    batch: int
    tune: str
    report: str


@dataclass(frozen=True)
class Row:
    """One choice: its group and name, the backbone it trains on (name and recipe of stage 1), the recipe of stage 2.

    `teacher` is the backbone whose final exit teaches, its own by default.
    """

    group: str
    name: str
    backbone: str
    stage1: Recipe
    stage2: Recipe
    teacher: str | None = None


def rows(options: Options, seed: int) -> list[Row]:
    """Each row differs from round-robin with Positive Filtering in one choice."""
    plain = Recipe(epochs=(options.epochs[0], 0), batch=options.batch, seed=seed)
    heads = Recipe(epochs=(0, options.epochs[1]), batch=options.batch, seed=seed)
    orders = {
        "round-robin": plain,
        "joint": replace(plain, order="joint"),
        ALONE: replace(plain, order="final"),
    }
    beside = {
        "separable ASPP at the early exits": replace(plain, stage1_head="sep-crm1-b0"),
        "Lovasz 0.5": replace(plain, lovasz=0.5),
        "moving average 0.99": replace(plain, ema=0.99),
        "classes weigh alike": replace(plain, class_power=0.0),
        "early exits at 0.3": replace(plain, exit_weight=0.3),
        "no augmentation": replace(plain, augment=False),
        "loss at cells": replace(plain, loss_resolution="cells"),
    }
    teaching = {
        "CE": replace(heads, distillation=Distillation("none")),
        "distillation": replace(heads, distillation=Distillation("kd")),
        "Positive Filtering": heads,
        "Positive Filtering, no augmentation": replace(heads, augment=False),
        "Positive Filtering, loss at cells": replace(heads, loss_resolution="cells"),
    }
    found = [Row("stage 1", name, name, recipe, heads) for name, recipe in orders.items()]
    found += [Row("beside round-robin", name, name, recipe, heads) for name, recipe in beside.items()]
    found += [Row("stage 2", name, "round-robin", plain, recipe) for name, recipe in teaching.items()]
    return [*found, Row("stage 2", f"Positive Filtering, taught by {ALONE}", "round-robin", plain, heads, ALONE)]


def trained(
    folder: Path,
    options: Options,
    recipe: Recipe,
    heads: tuple[str, ...],
    source: Path | None = None,
    teacher: Path | None = None,
) -> Workspace:
    """The workspace of a finished training; what was trained before is used again."""
    folder.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(folder)
    if not (workspace.candidate / "network.json").is_file():
        choice = steps.NetworkChoice("mobilenetv2", options.input_hw, EXITS, heads)
        steps.train(
            workspace,
            Path(options.data),
            choice,
            recipe,
            steps.TrainOptions(source=source, teacher=teacher),
            Reporter(note=print),
        )
    return workspace


def measured(workspace: Workspace, gate: Gate, splits: Sequence[str]) -> list[ExitStatistics]:
    """Exit statistics on each of the splits."""
    steps.export(workspace, None, gate)
    found = [steps.evaluate(workspace, steps.EvaluateOptions(split=split)) for split in splits]
    shutil.rmtree(workspace.graphs)
    return [part for part in found if part is not None]


def exit_figures(workspace: Workspace, options: Options) -> dict[str, float]:
    """mIoU of every head on the reporting frames."""
    (found,) = measured(workspace, Gate(), [options.report])
    return {head: head_miou(found, head) for head in found.heads}


def head_figures(workspace: Workspace, options: Options) -> dict[str, dict[str, float]]:
    """Of every kind of head its mIoU at each early exit on the reporting frames, and its own workload there."""
    found = exit_figures(workspace, options)
    candidate = load_candidate(workspace.candidate).candidate
    kinds: dict[str, dict[str, float]] = {}
    for head in candidate.heads:
        if head.exit_point < len(candidate.exit_points):
            figures = kinds.setdefault(head.config, {})
            figures[f"exit {head.exit_point} mIoU"] = found[head.name]
            figures[f"exit {head.exit_point} MMACs"] = head.macs / 1e6
    return kinds


def gate_figures(workspace: Workspace, options: Options, gate: Gate) -> dict[str, float]:
    """Of each early exit, on the reporting frames: how well its confidence knows that it is as good as the last one
    (AUROC in %), the images in % that leave by the row and cut that let most leave within 1 pp on the tuning frames,
    and what that costs in mIoU."""
    tune, report = measured(workspace, gate, [options.tune, options.report])
    figures = {}
    for head in (name for name in report.heads if name.endswith(GATED)):
        row, cut = _widest_gate(tune, head)
        good = image_mious(report, head) >= image_mious(report, final_head(report)) - TOLERANCE_PP
        counts = report.counts[:, report.head_index(head)]
        areas = auroc(good, np.asarray(counts))
        leaves = np.asarray(counts[:, row] >= cut)
        exit_point = head.split(".")[0]
        figures[f"{exit_point} AUROC"] = float("nan") if areas is None else 100 * float(areas[row])
        figures[f"{exit_point} leave"] = 100 * float(leaves.mean())
        figures[f"{exit_point} pp"] = _mixed_miou(report, head, leaves) - head_miou(report, final_head(report))
    return figures


def _widest_gate(tune: ExitStatistics, head: str) -> tuple[int, int]:
    """Row and cut by which most images leave at `head` within 1 pp of the final exit; nobody does by a cut too high."""
    counts = np.asarray(tune.counts[:, tune.head_index(head)])
    least = head_miou(tune, final_head(tune)) - 1.0
    best, most = (0, int(counts.max()) + 1), 0
    for row in range(counts.shape[1]):
        for cut in np.unique(counts[:, row]):
            leaves = counts[:, row] >= cut
            if leaves.sum() > most and _mixed_miou(tune, head, leaves) >= least:
                best, most = (row, int(cut)), int(leaves.sum())
    return best


def _mixed_miou(found: ExitStatistics, head: str, leaves: NDArray[np.bool_]) -> float:
    """mIoU when the images that `leaves` (n,) marks leave at `head`, the others at the final exit."""
    early, last = found.head_index(head), found.head_index(final_head(found))
    index = np.where(leaves, early, last)
    images = np.arange(found.images)
    intersection = found.intersection[images, index].sum(0)
    return miou(intersection, found.predicted[images, index].sum(0), found.labelled.sum(0))


def seed_figures(options: Options, place: Path, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every row with one seed, by "group/name"; `place` keeps them."""
    known = place / "figures.json"
    figures = _known_figures(known, options)

    def keep(name: str, found: dict[str, float]) -> None:
        figures[name] = found
        write_json(known, "mess-ablation", 1, {"options": asdict(options), "figures": figures})

    for row in rows(options, seed):
        if f"{row.group}/{row.name}" not in figures:
            bare = () if row.stage1.order == "final" else (row.stage1.stage1_head,)
            source = trained(_backbone(place, row.backbone), options, row.stage1, bare).candidate
            teacher = None if row.teacher is None else _backbone(place, row.teacher) / "candidate"
            teaching = row.name if row.group == "stage 2" else "Positive Filtering"
            folder = place / _slug(f"{row.backbone} {teaching}")
            workspace = trained(folder, options, row.stage2, TAUGHT, source, teacher)
            keep(f"{row.group}/{row.name}", exit_figures(workspace, options))
    if f"heads/{HEADS[-1]}" not in figures:
        heads = rows(options, seed)[0].stage2
        workspace = trained(place / "heads", options, heads, HEADS, _backbone(place, "round-robin") / "candidate")
        for name, found in head_figures(workspace, options).items():
            keep(f"heads/{name}", found)
    for confidence, edge_aware in product(CONFIDENCES, (False, True)):
        name = f"confidence/{confidence}, {'edge-aware' if edge_aware else 'plain'}"
        if name not in figures:
            keep(name, gate_figures(Workspace(place / "heads"), options, Gate(confidence, edge_aware)))
    return figures


def _known_figures(path: Path, options: Options) -> dict[str, dict[str, float]]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    if content["options"] != json.loads(json.dumps(asdict(options))):
        sys.exit(f"error: {path} holds figures made with other options ({content['options']}): name another --out")
    figures: dict[str, dict[str, float]] = content["figures"]
    return figures


def _backbone(place: Path, name: str) -> Path:
    return place / _slug(f"stage 1 {name}")


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text.lower())


def table(found: Sequence[dict[str, dict[str, float]]]) -> str:
    """Markdown: per row and column the mean over seeds, and half the distance between the lowest and the highest.

    A dash where a seed has no figure: an AUROC of images that are all as good, or all worse.
    """
    lines: list[str] = []
    for group, names in groupby(found[0], key=lambda name: name.split("/")[0]):
        members = list(names)
        columns = list(dict.fromkeys(column for name in members for column in found[0][name]))
        lines += ["", f"| {group} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name in members:
            values = np.array([[seed[name].get(column, np.nan) for column in columns] for seed in found])
            middle, spread = values.mean(axis=0), (values.max(axis=0) - values.min(axis=0)) / 2
            cells = ["-" if np.isnan(m) else f"{m:.1f} ± {s:.1f}" for m, s in zip(middle, spread, strict=True)]
            lines.append(f"| {name.split('/', 1)[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--input", type=int, nargs=2, default=(120, 160), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--epochs", type=int, nargs=2, default=(24, 6), help="of stage 1 and of stage 2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune", default="val[:25]", help="where gates are chosen")
    parser.add_argument("--report", default="val[25:50]", help="where every figure is taken")
    given = parser.parse_args()
    height, width = given.input
    stage1, stage2 = given.epochs
    options = Options(
        str(given.data.resolve()), (height, width), (stage1, stage2), given.batch, given.tune, given.report
    )
    found = [seed_figures(options, given.out / f"seed{seed}", seed) for seed in range(given.seeds)]
    print(f"\n{given.seeds} seeds, {height} x {width}, epochs {stage1} and {stage2}; mIoU in % on {options.report}")
    print(table(found))


if __name__ == "__main__":
    main()
