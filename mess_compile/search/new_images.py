"""What to expect of a plan on new images: an interval by a paired bootstrap over groups that repeats the choice.

Definitions, sources and limits: docs/guarantees.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from mess_compile.array_types import Floats, Index
from mess_compile.evaluate.statistics import WHOLE, ExitStatistics
from mess_compile.runtime.bundle.manifest import OWN_OUTPUT
from mess_compile.search.groups import rule_of
from mess_compile.search.metrics import Evidence, best_baseline
from mess_compile.search.plan import ONE_GROUP, Candidate, Expected, SearchResult
from mess_compile.search.pool import (
    MOST_PLANS,
    Chooser,
    Pool,
    Sums,
    Tightened,
    candidate_of,
    chooser_of,
    pool_of,
    sums_of,
)
from mess_compile.search.requirement import Requirement
from mess_compile.search.risk import drops_pp, numbered_groups

if TYPE_CHECKING:
    from mess_compile.search.guarantees import FoldSearches
    from mess_compile.search.hold_out import HoldOutSplit

RESAMPLES = 1000
CONFIDENCE = 0.95
SHARES = (0.632, 1.0)
"""How much of the optimism out of bag is real: a resample holds 63.2 % of the groups, and a plan that is chosen on
fewer groups is chosen worse. The share is between these, by how far a choice fits its groups alone (Efron and
Tibshirani's .632+): the ends of the interval take one each, the estimate the middle."""
METHOD = (
    f"paired bootstrap over groups, {RESAMPLES} resamples; each repeats the choice among the fronts of search and "
    "folds, and groups that it left out are scored by the folds that did not see them"
)
FIXED = f"paired bootstrap over groups of images that the plan was not chosen on, {RESAMPLES} resamples"
ALIKE = "the images are all alike, so they say nothing about others"
_PERCENT = 100 / WHOLE
_MOST_PRODUCTS = 10**10
"""Of the product that scores the pool on all resamples: about a second on one core."""


def most_plans(groups: int, classes: int) -> int:
    """How many plans a pool may have, so that scoring it on all resamples takes about a second."""
    return max(6, _MOST_PRODUCTS // (RESAMPLES * 2 * groups * classes))


def why_not(groups: Sequence[str], sums: Sums) -> str:
    """Why these groups allow no interval; "" where they do."""
    if len(set(groups)) == 1:
        return ONE_GROUP
    rows = sums.pixels.reshape(len(sums.pixels), -1)
    return ALIKE if (rows == rows[0]).all() and rows.any() else ""


@dataclass(frozen=True, eq=False)
class Drawn:
    """A plan of the pool, by its place, and what it loses against the baseline on new images, in pp.

    `lost` is what it loses on all images, `optimism` how much more chosen plans lose on what their resample left out,
    `errors` (resamples,) by how much the bootstrap misses the truth, about 0. The same of changed pixels, in percent.
    """

    place: int
    lost: float
    optimism: float
    errors: Floats
    changed: float
    change_optimism: float
    change_errors: Floats


class Bootstrap:
    """Resamples of groups, and what the requirement chooses from a pool on each.

    Plans are chosen on the images of `chosen`, and scored on those of `whole`, which may be more. `fold_of_group` is
    the fold (from 0) whose search did not see a group of `whole`, -1 where no fold left it out.
    """

    def __init__(
        self,
        chosen: Sequence[Evidence],
        whole: Sequence[Evidence],
        requirement: Requirement,
        pool: Pool,
        fold_of_group: Index,
        baseline: tuple[int, str],
        seed: int = 0,
    ) -> None:
        names = numbered_groups(whole[0].statistics.group)[0]
        self.groups, self.pool, self._fold_of_group = len(names), pool, fold_of_group
        self.whole = sums_of(whole, chosen, pool.plans, baseline, names)
        same = all(one is other for one, other in zip(chosen, whole, strict=True))
        chosen_sums = self.whole if same else sums_of(chosen, chosen, pool.plans, baseline, names)
        self._chooser: Chooser = chooser_of(chosen, requirement, pool.plans, chosen_sums)
        self._all = np.arange(len(pool.plans)) if requirement.setting != "anytime" else pool.fronts[0]
        self._weights = resampled(self.groups, seed)
        self.requirement = requirement

    @cached_property
    def _drops(self) -> Floats:
        """What each plan loses on each resample of the images to choose on, (resamples, plans)."""
        return self._chooser.sums.drops(self._weights)

    @cached_property
    def _once(self) -> tuple[Floats, Floats, Floats]:
        """What each plan (plans,) loses on the images to choose on, and on all; and what it changes on all."""
        one = np.ones((1, self.groups))
        changed = self.whole.changed.sum(axis=0) / self.whole.images.sum()
        return self._chooser.sums.drops(one)[0], self.whole.drops(one)[0], changed

    @property
    def least(self) -> tuple[float, float]:
        """The least that any plan loses (pp) and changes (percent) on the images themselves."""
        _, lost, changed = self._once
        return float(lost[self._all].min()), _PERCENT * float(changed[self._all].min())

    def chosen(self, tightened: Tightened) -> int:
        """The plan of the pool that tightened bounds choose on the images themselves, by its place."""
        one = np.ones((1, self.groups))
        return int(self._chooser.choices(one, self._once[0][None], self._all, tightened)[0])

    def drawn(self, place: int, tightened: Tightened) -> Drawn:
        """What the plan at `place` loses on new images, which these bounds choose."""
        weights, (_, lost, changed) = self._weights, self._once
        places = self._chooser.choices(weights, self._drops, self._all, tightened)
        inside = drops_pp(self.whole.added(weights, places))[:, 0]
        changed_inside = self._changed(weights, places)
        outside, changed_outside = self._out_of_bag(places, tightened)
        own = np.full(len(weights), place)
        fixed, changed_fixed = drops_pp(self.whole.added(weights, own))[:, 0], self._changed(weights, own)
        return Drawn(
            place=place,
            lost=float(lost[place]),
            optimism=float(np.nanmean(outside - inside)),
            errors=_errors(inside - lost[places], fixed),
            changed=_PERCENT * float(changed[place]),
            change_optimism=_PERCENT * float(np.nanmean(changed_outside - changed_inside)),
            change_errors=_PERCENT * _errors(changed_inside - changed[places], changed_fixed),
        )

    def _out_of_bag(self, places: Index, tightened: Tightened) -> tuple[Floats, Floats]:
        """What is lost and changed (resamples,) on the groups that each resample left out, nan where it left out none.

        A group is answered by what the resample chooses from the front of the fold that did not see this group, so
        that nothing about it is known to the plan that it is scored with. Gates that are fitted are those of that fold.
        """
        left_out = (self._weights == 0).astype(np.float64)
        pixels: Floats = np.zeros((len(left_out), 5, self.whole.pixels.shape[2]))
        changed, images = np.zeros(len(left_out)), left_out @ self.whole.images
        for fold in np.unique(self._fold_of_group):
            some = left_out * (self._fold_of_group == fold)
            found = places
            if fold >= 0:
                found = self._chooser.choices(self._weights, self._drops, self.pool.fronts[1 + fold], tightened)
            pixels += self.whole.added(some, found)
            changed += self._changed(some, found) * (some @ self.whole.images)
        there = pixels[:, 0].any(axis=1)
        lost = np.where(there, drops_pp(pixels)[:, 0], np.nan)
        return lost, np.where(there, changed / np.maximum(1, images), np.nan)

    def _changed(self, weights: Floats, places: Index) -> Floats:
        """The mean over images (sets,) of what one plan for each set changes."""
        sums = np.einsum("sg,gs->s", weights, self.whole.changed[:, places])
        means: Floats = sums / np.maximum(1, weights @ self.whole.images)
        return means


def _errors(chosen: Floats, fixed: Floats) -> Floats:
    """The errors of figures of `chosen` plans about their mean, spread at least as those of a `fixed` plan."""
    errors: Floats = chosen - chosen.mean()
    spread, least = float(errors.std()), fixed - fixed.mean()
    return errors if spread >= least.std() else least


def bootstrap_of(
    chosen: Sequence[Evidence],
    whole: Sequence[Evidence],
    requirement: Requirement,
    own: tuple[Candidate, Sequence[Candidate]],
    searches: FoldSearches,
) -> Bootstrap:
    """The bootstrap of a search and its folds, both on the images of `chosen`, scored on those of `whole`.

    `own` are the search's choice and front.
    A fold that found no plan, or split groups, leaves none out.
    """
    group, names = chosen[0].statistics.group, numbered_groups(whole[0].statistics.group)[0]
    found, fold_of_group = [own], np.full(len(names), -1, np.intp)
    for fold, held in zip(searches.found, searches.parts, strict=True):
        if fold is None:
            continue
        inside = {group[i] for i in held}
        if not inside & {group[i] for other in searches.parts if other is not held for i in other}:
            fold_of_group[[names.index(name) for name in inside]] = len(found) - 1
        found.append((fold.choice, fold.front))
    classes = whole[0].statistics.labelled.shape[1]
    pool = pool_of(found, min(MOST_PLANS, most_plans(len(names), classes)))
    return Bootstrap(chosen, whole, requirement, pool, fold_of_group, searches.baseline)


def choice_and_front(result: SearchResult) -> tuple[Candidate, Sequence[Candidate]]:
    """What a search found, without figures."""
    return candidate_of(result.plan), tuple(candidate_of(plan) for plan in result.front)


def with_expected(
    result: SearchResult, part: HoldOutSplit, requirement: Requirement, searches: FoldSearches
) -> SearchResult:
    """The result of a search of `part` and its folds, with what to expect on new images."""
    if len(set(part.whole[0].statistics.group)) == 1:
        return replace(result, without_expected=ONE_GROUP)
    bootstrap = bootstrap_of(part.chosen, part.whole, requirement, choice_and_front(result), searches)
    if reason := why_not(part.whole[0].statistics.group, bootstrap.whole):
        return replace(result, without_expected=reason)
    found = bootstrap.drawn(0, Tightened(requirement.max_err_pp, requirement.max_change))
    expected = expected_of(found, part.whole[0].statistics, bootstrap.whole, result.plan.group_by)
    return replace(result, plan=replace(result.plan, expected=expected), without_expected="")


def with_held_out(result: SearchResult, part: HoldOutSplit) -> SearchResult:
    """The result with what the images held out say about new images, where there are some."""
    if not part.held:
        return result
    baseline = best_baseline(part.chosen)
    found = expected_of_one(part.held, candidate_of(result.plan), baseline, result.plan.group_by)
    if isinstance(found, str):
        return replace(result, without_expected=found)
    return replace(result, plan=replace(result.plan, expected=found), without_expected="")


def resampled(groups: int, seed: int) -> Floats:
    """How often each group is drawn in RESAMPLES sets of as many groups, (resamples, groups)."""
    drawn = np.random.default_rng([seed, 2]).multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES)
    return drawn.astype(np.float64)


def expected_of(found: Drawn, statistics: ExitStatistics, sums: Sums, pattern: str | None) -> Expected:
    """The interval of the difference to the baseline on new images, from the sums of these."""
    groups = len(sums.images)
    optimism = sum(SHARES) / 2 * found.optimism
    low, lost, high = _interval(found.lost, found.optimism, found.errors, groups, possible_loss(sums, statistics.truth))
    change: tuple[float | None, ...] = (None, None, None)
    if statistics.truth == OWN_OUTPUT:
        change = _interval(found.changed, found.change_optimism, found.change_errors, groups, _POSSIBLE_CHANGE)
    return Expected(
        miou_pp=-lost,
        low_pp=-high,
        high_pp=-low,
        confidence=CONFIDENCE,
        images=statistics.images,
        groups=groups,
        rule=rule_of(statistics.group, pattern),
        optimism_pp=optimism,
        method=METHOD,
        change_low=change[0],
        change=change[1],
        change_high=change[2],
    )


_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
_POSSIBLE_CHANGE = (0.0, 100.0)


def possible_loss(sums: Sums, truth: str) -> tuple[float, float]:
    """The least and most mIoU (pp) that a plan can lose: nothing is gained on a baseline that is itself the truth."""
    labelled, right, predicted = (sums.pixels[:, row] for row in range(3))
    is_truth = truth == OWN_OUTPUT and bool((labelled == right).all() and (labelled == predicted).all())
    return (0.0 if is_truth else -100.0), 100.0


def _interval(
    found: float, optimism: float, errors: Floats, groups: int, possible: tuple[float, float]
) -> tuple[float, float, float]:
    """The lower end, the estimate and the upper end on new images of what is `found` on these; all of them possible."""
    ends = sorted(found + share * optimism for share in SHARES)
    low, high = (bound_pp(each, errors, groups, tail) for each, tail in zip(ends, _TAILS, strict=True))
    first, middle, last = (
        min(max(each, possible[0]), possible[1]) for each in (low, found + sum(SHARES) / 2 * optimism, high)
    )
    return first, middle, last


def expected_of_one(
    part: Sequence[Evidence], plan: Candidate, baseline: tuple[int, str], pattern: str | None
) -> Expected | str:
    """The same of a plan that was not chosen on the images of `part`, whose groups the pattern named; or the reason why
    there is none."""
    statistics = part[0].statistics
    names = numbered_groups(statistics.group)[0]
    sums, rule, groups = sums_of(part, part, [plan], baseline, names), rule_of(statistics.group, pattern), len(names)
    if reason := why_not(statistics.group, sums):
        return reason
    images = statistics.images
    weights = resampled(groups, 0)
    lost, errors = float(sums.drops(np.ones((1, groups)))[0, 0]), sums.drops(weights)[:, 0]
    possible = possible_loss(sums, statistics.truth)
    least, lost, most = _interval(lost, 0.0, errors - errors.mean(), groups, possible)
    change: tuple[float | None, ...] = (None, None, None)
    if statistics.truth == OWN_OUTPUT:
        changed = _PERCENT * float(sums.changed.sum() / sums.images.sum())
        means = _PERCENT * (weights @ sums.changed[:, 0]) / (weights @ sums.images)
        change = _interval(changed, 0.0, means - means.mean(), groups, _POSSIBLE_CHANGE)
    low, middle, high = change
    return Expected(-lost, -most, -least, CONFIDENCE, images, groups, rule, 0.0, FIXED, middle, low, high)


def bound_pp(lost: float, errors: Floats, groups: int, level: float) -> float:
    """What the loss stays below with the probability `level`, given its estimate and the errors of the bootstrap.

    The percentile of the errors is widened as a t-quantile is beside a normal one, for a bootstrap of few groups is too
    narrow by that and by a factor of sqrt((groups - 1) / groups).
    """
    wider = t_quantile(groups - 1, max(level, 1 - level)) / NormalDist().inv_cdf(max(level, 1 - level))
    return lost - wider * math.sqrt(groups / (groups - 1)) * float(np.quantile(errors, 1 - level))


def t_quantile(freedom: int, level: float) -> float:
    """The quantile of Student's t distribution, at a `level` of 0.5 or more."""
    if freedom > 1000:
        return NormalDist().inv_cdf(level)
    angles = np.linspace(0, math.pi / 2, 20_001)  # t = sqrt(freedom) tan(angle) has the density cos(angle)^(freedom-1)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = np.interp(level - 0.5, area / area[-1] / 2, angles)
    return float(math.sqrt(freedom) * math.tan(angle))
