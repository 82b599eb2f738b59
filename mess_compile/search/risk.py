"""Plans compared with the baseline on the same images, and tests of how far they fall below it on unseen images.

Definitions and sources: docs/guarantees.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mess_compile.array_types import Floats, Index
from mess_compile.evaluate.statistics import head_miou
from mess_compile.search.metrics import Evidence, evidence_of_plan, exits_taken
from mess_compile.search.plan import Candidate, Plan

RESAMPLES = 2000
_WEIGHTS = 1 << 22


@dataclass(frozen=True, eq=False)
class Pairs:
    """Plans and the baseline on the same images, summed up by sequence.

    `risk` (plans, sequences) is the mean over a sequence's images of the share of labelled pixels that the plan gets
    wrong, less that of the baseline: -1 to 1; `changed` the same of the plan's share alone. `pixels` (sequences, 3 +
    2 * plans, classes) are labelled pixels, then intersection and predicted pixels of the baseline and of each plan.
    """

    risk: Floats
    pixels: Floats
    changed: Floats = field(default_factory=lambda: np.zeros((0, 0)))


def pairs_of_plans(
    part: Sequence[Evidence], chosen: Sequence[Evidence], plans: Sequence[Plan], baseline: tuple[int, str]
) -> Pairs:
    """`plans`, chosen on the images of `chosen`, on those of `part`; `baseline` names an evidence and a head of it."""
    truth = part[0].statistics
    names, group = numbered_groups(truth.group)
    everyone = np.arange(truth.images)
    recipe, head = baseline
    answers = [(part[recipe].statistics, np.full(truth.images, part[recipe].statistics.head_index(head)))]
    answers += [(evidence_of_plan(part, plan).statistics, _answers(part, chosen, plan)) for plan in plans]
    rows = [truth.labelled]
    for statistics, answer in answers:
        rows += [statistics.intersection[everyone, answer], statistics.predicted[everyone, answer]]
    stacked = np.stack(rows, axis=1).astype(np.float64)  # (n, 3 + 2 * plans, classes)
    right = stacked[:, 1::2].sum(axis=2)
    labelled = np.maximum(1, stacked[:, :1].sum(axis=2))
    risk = (right[:, :1] - right[:, 1:]) / labelled  # (n, plans)
    changed = (stacked[:, :1].sum(axis=2) - right[:, 1:]) / labelled
    sums = np.zeros((len(names), *stacked.shape[1:]))
    np.add.at(sums, group, stacked)
    return Pairs(_means(risk, group), sums, _means(changed, group))


def _means(values: Floats, group: Index) -> Floats:
    """The means (plans, groups) of values (n, plans) over the images of each group."""
    sizes = np.bincount(group)
    sums = np.zeros((len(sizes), values.shape[1]))
    np.add.at(sums, group, values)
    means: Floats = (sums / sizes[:, None]).T
    return means


@dataclass(frozen=True)
class Limits:
    """What is certified: at most `err_pp` more pixels wrong and less mIoU than the baseline, and at most `change`
    percent of the pixels changed. None: not certified."""

    err_pp: float | None
    change: float | None = None

    @property
    def least(self) -> float:
        return min(limit for limit in (self.err_pp, self.change) if limit is not None)


def _answers(part: Sequence[Evidence], chosen: Sequence[Evidence], plan: Plan) -> Index:
    """The index (n,) of the head whose labels each image ends with."""
    statistics = evidence_of_plan(part, plan).statistics
    index = np.array([statistics.head_index(stage.head) for stage in plan.stages])
    answers: Index = index[final_exits(part, chosen, plan)]
    return answers


def final_exits(part: Sequence[Evidence], chosen: Sequence[Evidence], plan: Plan | Candidate) -> Index:
    """The exit (n,), from 0, whose labels each image ends with; in the anytime setting that of the best report on the
    images of `chosen`."""
    statistics = evidence_of_plan(part, plan).statistics
    if plan.setting == "anytime":
        known = evidence_of_plan(chosen, plan).statistics
        best = max(range(len(plan.stages)), key=lambda i: head_miou(known, plan.stages[i].head))
        return np.full(statistics.images, best, np.intp)
    return exits_taken(statistics, plan.stages)


@dataclass(frozen=True)
class Certified:
    """`passed` is the fastest plan that passed, None when not even the safest did; the bounds (pp) are of that plan,
    None where nothing was asked."""

    passed: int | None
    tested: int
    risk_bound_pp: float | None
    drop_bound_pp: float
    change_bound: float | None


def certified_in_turn(chosen: Pairs, held: Pairs, limits: Limits, confidence: float, seed: int) -> Certified:
    """Test plans, given from the fastest, on `held`, from the safest on until one fails; the order is from `chosen`.

    A plan passes when the bound of its risk and the bootstrap bound of its mIoU drop are within the limit, and so is
    the bound of what it changes. Since each is tested at the full level only after all before it passed, the chance
    that one with a risk or change above the limit passes is at most 1 - confidence (Learn then Test, fixed-sequence
    testing).
    """
    order = safest_first(chosen, limits)
    columns = [0, 1, 2, *(row for plan in order for row in (3 + 2 * plan, 4 + 2 * plan))]
    drops = bootstrap_bounds_pp(held.pixels[:, columns], confidence, seed)
    verdict = None
    for tested, (plan, drop) in enumerate(zip(order, drops.tolist(), strict=True), start=1):
        risk_pp = _bound(chosen.risk[plan], held.risk[plan], confidence) if limits.err_pp is not None else None
        change = _bound(chosen.changed[plan], held.changed[plan], confidence) if limits.change is not None else None
        found = Certified(plan, tested, risk_pp, drop, change)
        if not _within(found, limits):
            return replace(verdict or replace(found, passed=None), tested=tested)
        verdict = found
    assert verdict is not None, "there is a plan to test"
    return verdict


def _bound(known: Floats, held: Floats, confidence: float) -> float:
    """The upper bound in percent of the mean that `held` was drawn from, with a stake from values that are not held."""
    return 100 * risk_bound(held, stake_for(known, held.size, confidence), confidence)


def _within(found: Certified, limits: Limits) -> bool:
    err = limits.err_pp is None or max(found.risk_bound_pp or 0.0, found.drop_bound_pp) <= limits.err_pp
    return err and (limits.change is None or (found.change_bound or 0.0) <= limits.change)


def safest_first(chosen: Pairs, limits: Limits) -> list[int]:
    """From the safest plan to the fastest, which comes first in `chosen`.

    Plans that are no safer there than a faster one are left out.
    """
    lost = np.full(len(chosen.risk), -np.inf)  # as shares of the limits
    if limits.err_pp is not None:
        lost_pp = np.maximum(100 * chosen.risk.mean(axis=1), drops_pp(chosen.pixels.sum(axis=0)[None])[0])
        lost = lost_pp / limits.err_pp
    if limits.change is not None:
        lost = np.maximum(lost, 100 * chosen.changed.mean(axis=1) / limits.change)
    safer = [plan for plan in range(len(lost)) if not plan or lost[plan] < lost[:plan].min()]
    return safer[::-1]


def stake_for(known_risk: Floats, tests: int, confidence: float) -> float:
    """The stake per unit of risk, from risks that are not tested: the best for `tests` risks of the same spread.

    Source: the bets of Waudby-Smith and Ramdas (2024) for a fixed number, with a variance that starts at 1/4 as theirs.
    """
    variance = (0.25 + known_risk.var() * known_risk.size) / (known_risk.size + 1)
    return math.sqrt(2 * math.log(1 / (1 - confidence)) / (tests * variance))


def log_capital(risk: Floats, mean: float, stake: float) -> float:
    """The logarithm of the capital that a bet of 1 against "the mean of `risk` is at least `mean`" ends with.

    Its expectation is at most 1 when that is true: risks are at most 1, so that no stake up to 1 / (1 - mean) can lose
    more than all.
    """
    factors = 1 + min(stake, 1 / (1 - mean)) * (mean - risk)
    return float(np.log(factors).sum()) if factors.min() > 0 else -math.inf


def risk_bound(risk: Floats, stake: float, confidence: float) -> float:
    """An upper bound of the mean of the distribution that `risk` (n,) <= 1 was drawn from, or 1."""
    needed = -math.log(1 - confidence)
    low, high = float(risk.mean()), 1.0
    while high - low > 1e-9:  # the capital grows with the mean that is bet against
        middle = (low + high) / 2
        low, high = (low, middle) if log_capital(risk, middle, stake) >= needed else (middle, high)
    return high


def bootstrap_bounds_pp(pixels: Floats, confidence: float, seed: int) -> Floats:
    """Upper bounds (plans,) of the mIoU drop below the baseline, in pp, from `pixels` as in Pairs.

    The percentile of drops over RESAMPLES sets of as many sequences, drawn with replacement, the same for all plans.
    """
    rng = np.random.default_rng([seed, 1])
    sequences = len(pixels)
    flat = pixels.reshape(sequences, -1)
    step = max(1, min(RESAMPLES, _WEIGHTS // sequences))
    drops = []
    for start in range(0, RESAMPLES, step):
        sets = min(step, RESAMPLES - start)
        drawn = rng.integers(sequences, size=(sets, sequences)) + sequences * np.arange(sets)[:, None]
        times = np.bincount(drawn.ravel(), minlength=sets * sequences).reshape(sets, sequences)
        drops.append(drops_pp((times.astype(np.float64) @ flat).reshape(sets, *pixels.shape[1:])))
    rank = min(RESAMPLES, math.ceil(confidence * (RESAMPLES + 1)))
    bounds: Floats = np.sort(np.concatenate(drops), axis=0)[rank - 1]
    return bounds


def drops_pp(sums: Floats) -> Floats:
    """mIoU of the baseline less that of each plan, (sets, plans), in pp; of `sums` (sets, 3 + 2 * plans, classes)."""
    labelled, right, predicted = sums[:, :1], sums[:, 1::2], sums[:, 2::2]
    union = predicted + labelled - right
    iou = np.where(labelled > 0, right / np.maximum(1, union), 0.0)
    miou = 100 * iou.sum(axis=2) / np.maximum(1, (labelled > 0).sum(axis=2))
    drops: Floats = miou[:, :1] - miou[:, 1:]
    return drops


def numbered_groups(groups: Sequence[str]) -> tuple[list[str], Index]:
    """The distinct groups in the order of their first image, and the place of each image's group among them."""
    names = list(dict.fromkeys(groups))
    place = {name: i for i, name in enumerate(names)}
    return names, np.array([place[group] for group in groups], np.intp)
