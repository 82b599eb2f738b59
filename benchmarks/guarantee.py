"""Does --confidence hold? Draws from a population whose true risks are known, certified as the product does.

A fixed family of plans, chosen once on images apart, is certified on each draw: how often is the certified plan's true
risk, or its true mIoU drop, above the bound? Then the hard cases: mIoU never binds; a plan lies just above the bound;
a plan fails rarely but totally. Then fewer draws of the whole: split, search, certification, beside a search without
confidence. Then the bound by betting beside Hoeffding-Bentkus. With --intervals instead: how often the interval that
every search prints contains the chosen plan's true difference to the baseline, and how often --safety keeps --max-err.
The population's front is about the paper's: 1 pp of mIoU saves 42 % of the latency, 0.1 pp 34 % (MESS on MobileNetV2:
42 % and 39 %).

Usage: python benchmarks/guarantee.py [--draws 2000] [--whole 20] [--images 2000] [--population 200000] [--frames 1]
       python benchmarks/guarantee.py --intervals 400 [--seed 0] [--groups 100] [--frames 1] [--population 20000]
                                     [--safety 90]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.latency.table import Latency, LatencyTable
from mess_compile.network import (
    BASELINE,
    CandidateNetwork,
    ExitPoint,
    Gate,
    GraphSet,
    GraphSpec,
    Head,
    head_graph_name,
    output_name,
    segment_name,
    threshold_table,
)
from mess_compile.runtime.base.errors import RequirementError
from mess_compile.runtime.measure.job_pool import PSEUDO_GRAPHS
from mess_compile.search.context import SearchContext
from mess_compile.search.guarantees import certify, fold_searches
from mess_compile.search.metrics import Evidence, figures_of_stages
from mess_compile.search.new_images import bootstrap_of, expected_of, expected_of_one
from mess_compile.search.plan import Candidate, Expected
from mess_compile.search.pool import Tightened, candidate_of, sums_of
from mess_compile.search.requirement import Requirement
from mess_compile.search.risk import (
    Limits,
    Pairs,
    certified_in_turn,
    drops_pp,
    numbered_groups,
    pairs_of_plans,
    risk_bound,
    stake_for,
)
from mess_compile.search.safety import safe_choice
from mess_compile.search.solver import optimum_and_front, search

CONFIDENCE = 0.95
BOUNDS_PP = (0.5, 1.0, 2.0)
CLASSES, PIXELS, CELLS_HW = 12, 10_000, (23, 30)
REACH = (-1.0, 0.2, 1.2, 9.0)  # how hard an image may be for a head at each exit point to do as well as the last
POINTS, HEADS = 3, ("fcn-crm1-b0", "fcn-crm1-b1")
FAMILY = 8
BLOCK = 20_000


def made_up_graphs() -> tuple[GraphSet, LatencyTable]:
    """Three early exit points with two heads each; segments take 10 ms, heads 1 or 2, the output graph 2."""
    candidate = CandidateNetwork(
        backbone="made-up",
        classes=tuple(f"class{k}" for k in range(CLASSES)),
        colours=((0, 0, 0),) * CLASSES,
        input_hw=(100, 100),
        exit_points=tuple(ExitPoint(f"exit{p}", f"block{p}", 64, CELLS_HW, 10**9 * p) for p in range(1, POINTS + 2)),
        heads=(
            *(Head(p, name, 10**8 * (j + 1)) for p in range(1, POINTS + 1) for j, name in enumerate(HEADS)),
            Head(POINTS + 1, HEADS[0], 10**8),
        ),
        baseline=f"exit{POINTS + 1}.{HEADS[0]}",
        identity="made-up",
    )
    costs_ms = {segment_name(a, b): 10.0 * (b - a) for a, b in candidate.segments()}
    costs_ms |= {head_graph_name(head.name): head.macs / 1e8 for head in candidate.heads}
    costs_ms |= {output_name(CELLS_HW): 2.0, BASELINE: 10.0 * (POINTS + 1) + 3}
    specs = {name: GraphSpec(name, f"{name}.onnx", name, (), (), 0, 1000, 1000) for name in costs_ms}
    entries = {
        (name, "fp32"): Latency(name, name if name in specs else "", "fp32", ms, ms, ms, ms, ms, 30, "estimated")
        for name, ms in {**costs_ms, **dict.fromkeys(PSEUDO_GRAPHS, 0.1)}.items()
    }
    gate = Gate(thresholds=(0.5, 0.7, 0.9))
    graphs = GraphSet(Path("graphs"), candidate, gate, specs)
    recipes = {graphs.recipe: graphs.identity}
    return graphs, LatencyTable("made-up", "none", "0", candidate.identity, {}, "estimated", entries, recipes)


@dataclass(frozen=True, eq=False)
class Population:
    """Every image there is; those of one sequence, `frames` each, lie together."""

    counts: NDArray[np.int32]
    intersection: NDArray[np.int32]
    predicted: NDArray[np.int32]
    labelled: NDArray[np.int32]
    frames: int

    def evidence(self, graphs: GraphSet, table: LatencyTable, images: NDArray[np.intp]) -> Evidence:
        """These images; one that is drawn twice is another image each time, as is its sequence."""
        n, heads = len(images), graphs.candidate.heads
        return Evidence(
            graphs,
            table,
            ExitStatistics(
                heads=tuple(head.name for head in heads),
                classes=graphs.candidate.classes,
                cells=(math.prod(CELLS_HW),) * len(heads),
                thresholds=threshold_table(graphs.gate, CLASSES),
                counts=self.counts[images],
                intersection=self.intersection[images].astype(np.int64),
                predicted=self.predicted[images].astype(np.int64),
                labelled=self.labelled[images].astype(np.int64),
                image_id=tuple(f"image{i}" for i in range(n)),
                group=tuple(f"sequence{i // self.frames}" for i in range(n)),
                network=graphs.candidate.identity,
                gate=graphs.gate,
                precision="fp32",
                device="made-up",
                library="none",
                split="val",
            ),
        )

    def drawn(self, rng: np.random.Generator, images: int) -> NDArray[np.intp]:
        """So many images in whole sequences, each drawn independently."""
        sequences = rng.integers(len(self.labelled) // self.frames, size=images // self.frames)
        return (sequences[:, None] * self.frames + np.arange(self.frames)).ravel()


def population(graphs: GraphSet, images: int, frames: int, seed: int = 0) -> Population:
    blocks = [_block(graphs, min(BLOCK, images - i), frames, seed + i) for i in range(0, images, BLOCK)]
    return Population(*map(np.concatenate, zip(*blocks, strict=True)), frames)


def _block(graphs: GraphSet, images: int, frames: int, seed: int) -> tuple[NDArray[np.int32], ...]:
    """Images differ in difficulty (of one sequence less), and hold few classes; deeper heads bear harder images."""
    rng = np.random.default_rng(seed)
    heads = graphs.candidate.heads
    reach = np.array([REACH[head.exit_point - 1] + 0.2 * (head.macs > 10**8) for head in heads])
    shared = np.repeat(rng.normal(size=-(-images // frames)), frames)[:images]
    hard = np.sqrt(0.7) * shared + np.sqrt(0.3) * rng.normal(size=images) if frames > 1 else shared
    held = rng.random((images, CLASSES)) < np.linspace(1.0, 0.08, CLASSES)
    size = rng.gamma(0.7, size=(images, CLASSES)) * held + 1e-6 * held
    labelled = np.floor(size / size.sum(axis=1, keepdims=True) * PIXELS)  # (n, classes)
    taste = rng.normal(0, 0.5, (images, 1, CLASSES)) - np.linspace(-1.2, 1.0, CLASSES)
    quality = 1.6 - 0.5 * hard[:, None] - 0.5 * np.maximum(0, hard[:, None] - reach)  # (n, heads)
    quality = quality + rng.normal(0, 0.12, quality.shape)
    accuracy = 1 / (1 + np.exp(-quality[:, :, None] - taste - rng.normal(0, 0.15, (images, len(heads), CLASSES))))
    right = np.floor(labelled[:, None] * accuracy)  # (n, heads, classes)
    missed = (labelled[:, None] - right).sum(axis=2, keepdims=True)
    confused = labelled + 0.02 * PIXELS / CLASSES
    predicted = right + np.floor(missed * (confused / confused.sum(axis=1, keepdims=True))[:, None])
    sure = (
        1.6 * quality[:, :, None]
        + rng.normal(0, 0.4, (*quality.shape, 1))
        - 6 * (np.array(graphs.gate.thresholds) - 0.6)
    )
    counts = np.round(math.prod(CELLS_HW) / (1 + np.exp(-sure)))
    return tuple(array.astype(np.int32) for array in (counts, right, predicted, labelled))


@dataclass(frozen=True, eq=False)
class Family:
    """Plans from the boldest: what each sequence of the population makes of them, and the truth over all of it."""

    pairs: Pairs
    risk_pp: NDArray[np.float64]
    drop_pp: NDArray[np.float64]
    latency_ms: NDArray[np.float64]
    baseline_ms: float


def family(graphs: GraphSet, table: LatencyTable, known: Population, images: int = 4000) -> Family:
    """FAMILY plans off the front on so many images, spread over mIoU drops up to 1.5 times the largest bound."""
    drawn = known.drawn(np.random.default_rng([0, 0]), images)
    found = search(known.evidence(graphs, table, drawn), Requirement(max_err_pp=1.5 * BOUNDS_PP[-1]))
    front = [plan for plan in found.front if plan.predicted.miou >= found.plan.predicted.miou]
    plans = [front[i] for i in np.linspace(0, len(front) - 1, FAMILY).round().astype(int)]
    whole = known.evidence(graphs, table, np.arange(len(known.labelled)))
    pairs = pairs_of_plans([whole], [whole], plans, (0, whole.candidate.baseline))
    return Family(
        pairs,
        100 * pairs.risk.mean(axis=1),
        drops_pp(pairs.pixels.sum(axis=0)[None])[0],
        np.array([figures_of_stages(whole, plan.setting, plan.stages).latency_ms for plan in plans]),
        whole.baseline_cost_ns() / 1e6,
    )


def without_miou(of: Family) -> Family:
    """The same risks over pixels that all plans get alike, so that the mIoU drop, 0, never binds."""
    pixels = np.ones((of.pairs.risk.shape[1], 3 + 2 * len(of.risk_pp), 1))
    return replace(of, pairs=Pairs(of.pairs.risk, pixels), drop_pp=np.zeros(len(of.risk_pp)))


def rare_failures(bound_pp: float, sequences: int) -> Family:
    """One plan that gets whole images wrong, as often as just exceeds the bound: to certify it is a violation."""
    failures = math.floor(bound_pp / 100 * sequences) + 1
    risk = np.zeros((1, sequences))
    risk[0, :failures] = 1.0
    rate_pp = 100 * failures / sequences
    return Family(Pairs(risk, np.ones((sequences, 5, 1))), np.array([rate_pp]), np.zeros(1), np.ones(1), 2.0)


@dataclass(frozen=True)
class Draw:
    """What one draw came to: the truth of the certified plan (None: none was), and the savings."""

    risk_pp: float | None
    drop_pp: float | None
    saving_ms: float
    uncertified_ms: float


def family_draw(of: Family, sequences: int, bound_pp: float, seed: int) -> Draw:
    rng = np.random.default_rng([1, seed])
    drawn = rng.integers(of.pairs.risk.shape[1], size=sequences)
    parts = [Pairs(of.pairs.risk[:, part], of.pairs.pixels[part]) for part in np.array_split(drawn, 2)]
    drops = drops_pp(of.pairs.pixels[drawn].sum(axis=0)[None])[0]
    lost = np.maximum(drops, 100 * of.pairs.risk[:, drawn].mean(axis=1))
    fastest = next((float(of.latency_ms[i]) for i in range(len(lost)) if lost[i] <= bound_pp), of.baseline_ms)
    verdict = certified_in_turn(*parts, Limits(bound_pp), CONFIDENCE, seed)
    passed = verdict.passed
    if passed is None:
        return Draw(None, None, 0.0, of.baseline_ms - fastest)
    saving = of.baseline_ms - float(of.latency_ms[passed])
    return Draw(float(of.risk_pp[passed]), float(of.drop_pp[passed]), saving, of.baseline_ms - fastest)


def family_summary(of: Family, sequences: int, bound_pp: float, draws: int) -> dict[str, float]:
    return summary([family_draw(of, sequences, bound_pp, seed) for seed in range(draws)], bound_pp)


def whole_draw(
    graphs: GraphSet, table: LatencyTable, known: Population, truth: Evidence, images: int, bound_pp: float, seed: int
) -> Draw:
    """Search and certification as the product runs them; what the search without confidence saves is its own figure."""
    evidence = known.evidence(graphs, table, known.drawn(np.random.default_rng([2, seed]), images))
    requirement = Requirement(max_err_pp=bound_pp)
    baseline_ms = truth.baseline_cost_ns() / 1e6
    plain = search(evidence, requirement).plan
    uncertified = baseline_ms - figures_of_stages(truth, plain.setting, plain.stages).latency_ms
    try:
        plan = certify([evidence], requirement, CONFIDENCE, seed).plan
    except RequirementError:
        return Draw(None, None, 0.0, uncertified)
    pairs = pairs_of_plans([truth], [truth], [plan], (0, truth.candidate.baseline))
    figures = figures_of_stages(truth, plan.setting, plan.stages)
    return Draw(
        100 * float(pairs.risk.mean()),
        float(drops_pp(pairs.pixels.sum(axis=0)[None])[0, 0]),
        baseline_ms - figures.latency_ms,
        uncertified,
    )


def hoeffding_bentkus_p(mean: float, n: int, limit: float) -> float:
    """p-value of "the mean of a risk in 0 to 1 is above `limit`", from the `mean` of n. Angelopoulos et al. (2021)."""
    if mean >= limit:
        return 1.0
    divergence = (1 - mean) * math.log((1 - mean) / (1 - limit)) + (mean * math.log(mean / limit) if mean else 0.0)
    terms = [
        math.lgamma(n + 1)
        - math.lgamma(k + 1)
        - math.lgamma(n - k + 1)
        + k * math.log(limit)
        + (n - k) * math.log1p(-limit)
        for k in range(math.ceil(n * mean) + 1)
    ]
    return min(1.0, math.exp(-n * divergence), math.e * math.fsum(map(math.exp, terms)))


def bounds_compared(of: Family, n: int, draws: int = 20) -> tuple[float, float]:
    """The median upper bound (pp) of the risk of the middle plan by betting, and by Hoeffding-Bentkus from -1 to 1."""
    betting, classic = [], []
    risk = of.pairs.risk[len(of.risk_pp) // 2]
    for seed in range(draws):
        known, tested = np.random.default_rng([3, seed]).choice(risk, (2, n))
        betting.append(100 * risk_bound(tested, stake_for(known, n, CONFIDENCE), CONFIDENCE))
        mean, low, high = (1 + float(tested.mean())) / 2, 0.0, 1.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (low, middle) if hoeffding_bentkus_p(mean, n, middle) <= 1 - CONFIDENCE else (middle, high)
        classic.append(100 * (2 * high - 1))
    return float(np.median(betting)), float(np.median(classic))


@dataclass(frozen=True)
class IntervalDraw:
    """What one draw came to, in pp: the interval of the chosen plan, the same with the choice left out, and the truth;
    the true loss with `--safety` (None: no plan), and what each saves."""

    low: float
    high: float
    fixed_low: float
    fixed_high: float
    truth: float
    safe_lost: float | None
    saving_ms: float
    safe_saving_ms: float


def interval_draw(
    graphs: GraphSet, table: LatencyTable, known: Population, truth: Evidence, groups: int, seed: int, level: float
) -> IntervalDraw:
    """Search at `--max-err 1%` with one early exit, its folds and the bootstrap, as the product runs them."""
    requirement, baseline = Requirement(max_err_pp=1.0, max_exits=1), (0, truth.candidate.baseline)
    evidence = known.evidence(
        graphs, table, known.drawn(np.random.default_rng([7, groups, seed]), groups * known.frames)
    )
    plan, front = optimum_and_front([evidence], SearchContext(requirement))
    searches = fold_searches([evidence], requirement)
    bootstrap = bootstrap_of([evidence], [evidence], requirement, (candidate_of(plan), front), searches)
    drawn = bootstrap.drawn(0, Tightened(requirement.max_err_pp, None))
    interval = expected_of(drawn, evidence.statistics, bootstrap.whole, None)
    fixed = expected_of_one([evidence], candidate_of(plan), baseline, None)
    assert isinstance(fixed, Expected), "the images differ"
    true_drop, saving = _truth_of(truth, candidate_of(plan))
    safe_lost, safe_saving = None, 0.0
    if level:
        best = safe_choice(bootstrap, requirement, level)
        if best.keeps(requirement):
            safe_lost, safe_saving = _truth_of(truth, bootstrap.pool.plans[best.drawn.place])
    ends = (interval.low_pp, interval.high_pp, fixed.low_pp, fixed.high_pp)
    return IntervalDraw(*ends, -true_drop, safe_lost, saving, safe_saving)


def _truth_of(truth: Evidence, plan: Candidate) -> tuple[float, float]:
    """What a plan loses in the population, and the milliseconds that it saves there."""
    sums = sums_of([truth], [truth], [plan], (0, truth.candidate.baseline), numbered_groups(truth.statistics.group)[0])
    figures = figures_of_stages(truth, plan.setting, plan.stages)
    lost = drops_pp(sums.pixels.sum(axis=0)[None])[0, 0]
    return float(lost), truth.baseline_cost_ns() / 1e6 - figures.latency_ms


def interval_summary(draws: Sequence[IntervalDraw]) -> dict[str, float]:
    """Shares in percent, widths in pp."""
    safe = [draw.safe_lost for draw in draws if draw.safe_lost is not None]
    return {
        "draws": len(draws),
        "covered": 100 * sum(draw.low <= draw.truth <= draw.high for draw in draws) / len(draws),
        "worse": 100 * sum(draw.truth < draw.low for draw in draws) / len(draws),
        "fixed": 100 * sum(draw.fixed_low <= draw.truth <= draw.fixed_high for draw in draws) / len(draws),
        "width_pp": float(np.median([draw.high - draw.low for draw in draws])),
        "lost_pp": float(np.mean([-draw.truth for draw in draws])),
        "kept": 100 * sum(-draw.truth <= 1.0 for draw in draws) / len(draws),
        "safe": 100 * len(safe) / len(draws),
        "safe_kept": 100 * sum(lost <= 1.0 for lost in safe) / max(1, len(safe)),
        "saving_kept": 100 * sum(draw.safe_saving_ms for draw in draws) / sum(draw.saving_ms for draw in draws),
    }


def show_intervals(groups: int, frames: int, level: float, row: dict[str, float]) -> None:
    print(f"{groups} groups of {frames}, {row['draws']:.0f} draws, --max-err 1%: loses {row['lost_pp']:.2f} pp (mean)")
    print(
        f"  95 % interval: covers {row['covered']:.1f} %, worse than its end {row['worse']:.1f} %, median width "
        f"{row['width_pp']:.2f} pp; with the choice left out {row['fixed']:.1f} %"
    )
    print(f"  --max-err kept {row['kept']:.1f} %", end="")
    print(
        f"; with --safety {100 * level:g}%: a plan in {row['safe']:.1f} %, of these kept {row['safe_kept']:.1f} %, "
        f"saving kept {row['saving_kept']:.1f} %"
        if level
        else ""
    )


def just_below(truths: NDArray[np.float64]) -> list[float]:
    """For each bound the nearest true value, less a thousandth: its plan is the hardest to tell from a good one."""
    return [0.999 * float(min(truths, key=lambda truth, bound=bound: abs(truth - bound))) for bound in BOUNDS_PP]


def summary(draws: Sequence[Draw], bound_pp: float) -> dict[str, float]:
    """Shares in percent; `allowed` is 5 % and two Monte Carlo standard errors."""
    level = 1 - CONFIDENCE
    passed = [draw for draw in draws if draw.risk_pp is not None]
    return {
        "bound_pp": bound_pp,
        "draws": len(draws),
        "certified": 100 * len(passed) / len(draws),
        "risk_violations": 100 * sum(draw.risk_pp > bound_pp for draw in passed) / len(draws),
        "drop_violations": 100 * sum(draw.drop_pp > bound_pp for draw in passed) / len(draws),
        "allowed": 100 * (level + 2 * math.sqrt(level * (1 - level) / len(draws))),
        "saving_kept": 100 * sum(draw.saving_ms for draw in draws) / sum(draw.uncertified_ms for draw in draws),
    }


def show(title: str, rows: Sequence[dict[str, float]]) -> None:
    print(title)
    print("  bound  draws  certified  risk above  mIoU drop above  allowed  saving kept")
    for row in rows:
        print(
            f"{row['bound_pp']:4.2f} pp {row['draws']:6.0f} {row['certified']:8.1f} % {row['risk_violations']:9.2f} % "
            f"{row['drop_violations']:14.2f} % {row['allowed']:6.2f} % {row['saving_kept']:10.1f} %"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (("draws", 2000), ("whole", 20), ("images", 2000), ("population", 200_000), ("frames", 1))
    sizes += (("intervals", 0), ("seed", 0), ("groups", 100), ("safety", 90))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    start = time.perf_counter()
    graphs, table = made_up_graphs()
    known = population(graphs, asked.population, asked.frames)
    if asked.intervals:
        truth, level = known.evidence(graphs, table, np.arange(asked.population)), asked.safety / 100
        draws = range(asked.seed, asked.seed + asked.intervals)
        found = [interval_draw(graphs, table, known, truth, asked.groups, seed, level) for seed in draws]
        show_intervals(asked.groups, asked.frames, level, interval_summary(found))
        print(f"{time.perf_counter() - start:.0f} s")
        return
    of = family(graphs, table, known)
    print(f"{asked.population:,} images in sequences of {asked.frames}; {asked.images:,} images a draw")
    print("a fixed family of plans, on the whole population:")
    for latency, risk, drop in zip(of.latency_ms, of.risk_pp, of.drop_pp, strict=True):
        print(f"  {latency:6.2f} ms of {of.baseline_ms:.2f}  risk {risk:6.3f} pp  mIoU drop {drop:6.3f} pp")
    sequences = asked.images // asked.frames
    alone = without_miou(of)
    rare = {bound: rare_failures(bound, asked.population) for bound in BOUNDS_PP}
    cases: tuple[tuple[str, dict[float, Family]], ...] = (
        ("certification of the family", dict.fromkeys(BOUNDS_PP, of)),
        ("the bounds just below a plan's mIoU drop (the bootstrap decides)", dict.fromkeys(just_below(of.drop_pp), of)),
        ("mIoU never binding", dict.fromkeys(BOUNDS_PP, alone)),
        ("mIoU never binding, the bounds just below a plan's risk", dict.fromkeys(just_below(of.risk_pp), alone)),
        ("rare total failures, their rate just above the bound", rare),
    )
    for title, families in cases:
        show(title, [family_summary(each, sequences, bound, asked.draws) for bound, each in families.items()])
    truth = known.evidence(graphs, table, np.arange(len(known.labelled)))
    whole = [whole_draw(graphs, table, known, truth, asked.images, 1.0, seed) for seed in range(asked.whole)]
    if whole:
        show("search and certification", [summary(whole, 1.0)])
    betting, classic = bounds_compared(of, asked.images // asked.frames // 2)
    print(f"risk bounds over half of a draw: {betting:.2f} pp by betting, {classic:.2f} pp by Hoeffding-Bentkus")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
