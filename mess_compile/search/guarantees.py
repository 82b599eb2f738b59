"""What to expect of a plan on images that it was not chosen on: optimism, and certified bounds.

Definitions, sources and limits: docs/guarantees.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mess_compile.array_types import Floats, Index
from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.runtime.base.errors import InputError, RequirementError
from mess_compile.search.context import SearchContext, SearchProgress, no_progress
from mess_compile.search.metrics import (
    Evidence,
    best_baseline,
    evidence_of_plan,
    figures_of_stages,
    refuse_different_images,
    refuse_without_own_output,
)
from mess_compile.search.new_images import expected_of_one
from mess_compile.search.plan import FRONT_BY, Candidate, Guarantee, Optimism, Plan, SearchResult
from mess_compile.search.pool import candidate_of
from mess_compile.search.requirement import Requirement
from mess_compile.search.risk import (
    RESAMPLES,
    Certified,
    Limits,
    certified_in_turn,
    drops_pp,
    numbered_groups,
    pairs_of_plans,
)
from mess_compile.search.solver import optimum_and_front, search_without_points

FOLDS = 5
LEAST_CHOSEN = 20  # sequences to choose a plan by: fewer say next to nothing
CERTIFIED_SHARE = 0.5
MOST_CAREFUL = 31  # plans of the front that are tested before the optimum
_SHARES = (0.75, 0.5, 0.25, 0.0)  # of the error allowed, for plans more careful than the optimum


def parse_confidence(text: str) -> float:
    """A probability from `95%`. Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*%", text.strip())
    if match is None or not 50 <= float(match[1]) < 100:
        raise InputError(f"--confidence {text!r} is not understood: write 95% (from 50% to below 100%)")
    return float(match[1]) / 100


@dataclass(frozen=True, eq=False)
class FoldSearches:
    """What a search finds without each of the `parts` (images by index); None: no plan satisfies, or nothing there is
    labelled. `method` says in words what the parts are, `baseline` names an evidence and its head."""

    parts: tuple[Index, ...]
    method: str
    baseline: tuple[int, str]
    found: tuple[_Fold | None, ...]


@dataclass(frozen=True, eq=False)
class _Fold:
    """A plan chosen on the other folds: mIoU above the baseline's (pp) and latency as predicted there, and as replayed
    on this fold; and the front that it stands on."""

    predicted_gain: float
    held_gain: float
    predicted_ms: float
    held_ms: float
    pixels: Floats  # (5, classes), as in Pairs, summed over the images held
    images: int
    choice: Candidate
    front: tuple[Candidate, ...]


def fold_searches(
    evidences: Sequence[Evidence],
    requirement: Requirement,
    folds: int = FOLDS,
    progress: SearchProgress = no_progress,
    cache_folder: Path | None = None,
) -> FoldSearches:
    """Search under `requirement` without each fold of the images in turn.

    `evidences` are of the recipes searched, as for `search_recipes`. `progress` is called with (folds done, folds);
    `cache_folder` is as for `search_recipes`. Gates that are fitted to images would be fitted anew in each fold, before
    its search. Raises RequirementError where there is one image.
    """
    refuse_different_images(evidences)
    parts, method = cross_validation_folds(evidences[0].statistics.group, folds)
    if len(parts) < 2:
        raise RequirementError(f"{evidences[0].statistics.images} image is too few for cross-validation")
    baseline, context = best_baseline(evidences), SearchContext(requirement, cache_folder=cache_folder)
    found = []
    for done, held in enumerate(parts, start=1):
        found.append(_searched_fold(evidences, held, baseline, context))
        progress(done, len(parts))
    return FoldSearches(tuple(parts), method, baseline, tuple(found))


def optimism(
    evidences: Sequence[Evidence],
    requirement: Requirement,
    folds: int = FOLDS,
    progress: SearchProgress = no_progress,
    cache_folder: Path | None = None,
) -> Optimism:
    """By how much the figures of a plan searched under `requirement` are too good, by cross-validation over sequences.

    As `optimism_of` the `fold_searches` with these arguments.
    """
    return optimism_of(evidences, fold_searches(evidences, requirement, folds, progress, cache_folder))


def optimism_of(evidences: Sequence[Evidence], searches: FoldSearches) -> Optimism:
    """By how much a plan's figures are too good, where each fold is replayed with the plan chosen on the others.

    Folds on which that is impossible are left out. Raises RequirementError with the reason when fewer than two remain.
    """
    found, parts, method = [fold for fold in searches.found if fold], searches.parts, searches.method
    if len(found) < 2:
        raise RequirementError(
            f"cross-validation found a plan for only {len(found)} of {len(parts)} folds: evaluate more images, or ask "
            "for less"
        )
    gains = [fold.predicted_gain - fold.held_gain for fold in found]
    pooled = _gain(np.sum([fold.pixels for fold in found], axis=0))
    predicted_ms = sum(fold.predicted_ms * fold.images for fold in found)
    return Optimism(
        miou_pp=float(np.mean([fold.predicted_gain for fold in found])) - pooled,
        latency_percent=100 * (sum(f.held_ms * f.images for f in found) / predicted_ms - 1) if predicted_ms else 0.0,
        folds=len(found),
        spread_pp=float(np.std(gains, ddof=1)),
        method=method + (f"; left out: {len(parts) - len(found)}" if len(found) < len(parts) else ""),
        images=evidences[0].statistics.images,
        groups=len(set(evidences[0].statistics.group)),
    )


def _searched_fold(
    evidences: Sequence[Evidence], held: Index, baseline: tuple[int, str], context: SearchContext
) -> _Fold | None:
    rest = np.setdiff1d(np.arange(evidences[0].statistics.images), held)
    chosen, unseen = ([evidence.of_images(rows) for evidence in evidences] for rows in (rest, held))
    if not chosen[0].statistics.labelled.any() or not unseen[0].statistics.labelled.any():
        return None
    try:
        plan, front = optimum_and_front(chosen, context)
    except RequirementError:
        return None
    predicted, pixels = (pairs_of_plans(part, chosen, [plan], baseline).pixels.sum(axis=0) for part in (chosen, unseen))
    figures = figures_of_stages(evidence_of_plan(unseen, plan), plan.setting, plan.stages)
    return _Fold(
        predicted_gain=_gain(predicted),
        held_gain=_gain(pixels),
        predicted_ms=plan.predicted.latency_ms,
        held_ms=figures.latency_ms,
        pixels=pixels,
        images=len(held),
        choice=candidate_of(plan),
        front=front,
    )


def _gain(pixels: Floats) -> float:
    """mIoU of the plan above the baseline's in pp, from pixels (5, classes) summed over images."""
    return -float(drops_pp(pixels[None])[0, 0])


def cross_validation_folds(groups: Sequence[str], folds: int) -> tuple[list[Index], str]:
    """The images of each fold, about as many in each, and the method in words: no group is split, unless there are
    fewer groups than folds."""
    names, group = numbered_groups(groups)
    if len(names) < folds:
        parts = [part for part in np.array_split(np.arange(len(groups)), folds) if part.size]
        few = f"{len(names)} {'sequence is' if len(names) == 1 else 'sequences are'} fewer than {folds} folds"
        return parts, f"cross-validation over {len(parts)} blocks of images in order ({few}, so they are split)"
    sizes = np.bincount(group)
    fold_of_group, images = np.zeros(len(names), np.intp), np.zeros(folds, np.intp)
    for largest in np.argsort(-sizes, kind="stable"):
        fold_of_group[largest] = images.argmin()
        images[images.argmin()] += sizes[largest]
    parts = [np.flatnonzero(fold_of_group[group] == fold) for fold in range(folds)]
    return parts, f"cross-validation over {folds} folds of {len(names)} {_unit(groups)}"


def certify(
    evidences: Sequence[Evidence],
    requirement: Requirement,
    confidence: float,
    seed: int = 0,
    progress: SearchProgress = no_progress,
    front_by: tuple[str, ...] = FRONT_BY,
    cache_folder: Path | None = None,
    group_by: str | None = None,
) -> SearchResult:
    """The fastest plan whose error is certified to stay within `max_err_pp`, and its change within `max_change`; its
    guarantee says on what grounds.

    Plans are chosen on one part of the sequences, drawn by `seed`, and tested on the other in a fixed order until one
    fails. The result's front and certificate are those of the first part; the plan has no operating point but the
    certified one. `front_by` and `cache_folder` are as for `search_recipes`; `group_by` is the pattern that named the
    groups. Raises InputError when the requirement has nothing to certify or the images are too few, RequirementError
    when no plan passes.
    """
    refuse_different_images(evidences)
    limits = _limits(evidences, requirement, confidence)
    rows = certification_split(evidences[0].statistics, limits, confidence, seed)
    chosen, held = ([evidence.of_images(part) for evidence in evidences] for part in rows)
    context = SearchContext(requirement, front_by, progress, cache_folder)
    result = search_without_points(chosen, context)
    plans = _from_fastest(chosen, context, result)
    baseline = best_baseline(chosen)
    first, second = (pairs_of_plans(part, chosen, plans, baseline) for part in (chosen, held))
    verdict = certified_in_turn(first, second, limits, confidence, seed)
    images, groups = (chosen[0].statistics.images, held[0].statistics.images), second.risk.shape[1]
    test = _Test(confidence, seed, limits, images, groups)
    if verdict.passed is None:
        raise RequirementError(
            f"no plan can be certified within {_text_of(limits)} at {100 * confidence:.4g} % on {groups} {test.unit} "
            f"that it was not chosen on: the bounds of the safest are {_bounds_text(verdict)}; raise "
            f"{_options(limits)}, or evaluate more images"
        )
    whole = {evidence.graph_set.recipe: evidence.statistics_sha256 for evidence in evidences}
    front = tuple(replace(plan, statistics_sha256=whole[plan.precision]) for plan in result.front)
    plan = plans[verdict.passed]
    expected = expected_of_one(held, candidate_of(plan), baseline, group_by)
    plan = replace(
        plan,
        statistics_sha256=whole[plan.precision],
        guarantee=_guarantee(verdict, test, len(plans)),
        expected=None if isinstance(expected, str) else expected,
    )
    return replace(result, plan=plan, front=front, without_expected=expected if isinstance(expected, str) else "")


@dataclass(frozen=True)
class _Test:
    """`images` to choose by and to certify on; the latter are of so many `groups`."""

    confidence: float
    seed: int
    limits: Limits
    images: tuple[int, int]
    groups: int

    @property
    def unit(self) -> str:
        return "images" if self.images[1] == self.groups else "sequences"


def _guarantee(verdict: Certified, test: _Test, candidates: int) -> Guarantee:
    return Guarantee(
        confidence=test.confidence,
        seed=test.seed,
        images_chosen=test.images[0],
        images_certified=test.images[1],
        groups=test.groups,
        risk_bound_pp=verdict.risk_bound_pp,
        risk_limit_pp=test.limits.err_pp,
        risk_method="Learn-then-Test in a fixed sequence, p-values by betting (finite sample)",
        miou_drop_bound_pp=verdict.drop_bound_pp,
        miou_drop_limit_pp=test.limits.err_pp,
        miou_method=f"paired bootstrap over {test.unit}, {RESAMPLES} resamples (no guarantee)",
        assumption=f"the {test.unit} certified on are independent draws of what the device will see",
        tested=verdict.tested,
        place=(verdict.passed or 0) + 1,
        candidates=candidates,
        change_bound=verdict.change_bound,
        change_limit=test.limits.change,
    )


def least_sequences(limit_pp: float, confidence: float) -> int:
    """The fewest independent sequences on which even a plan that never errs above the baseline can be certified."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-limit_pp / 100))


def _text_of(limits: Limits) -> str:
    err = [] if limits.err_pp is None else [f"{limits.err_pp:.4g} pp"]
    return " and ".join(err + ([] if limits.change is None else [f"{limits.change:.4g} % of changed pixels"]))


def _bounds_text(verdict: Certified) -> str:
    err = [] if verdict.risk_bound_pp is None else [f"{verdict.risk_bound_pp:.2f} pp of pixel error"]
    change = [] if verdict.change_bound is None else [f"{verdict.change_bound:.2f} % of changed pixels"]
    return " and ".join([*err, *change, f"{verdict.drop_bound_pp:.2f} pp of mIoU"])


def _options(limits: Limits) -> str:
    options = {"--max-err": limits.err_pp, "--max-change": limits.change}
    return " or ".join(option for option, limit in options.items() if limit is not None)


def _limits(evidences: Sequence[Evidence], requirement: Requirement, confidence: float) -> Limits:
    if not 0.5 <= confidence < 1:
        raise InputError(f"a confidence of {confidence:.4g} is not from 0.5 to below 1")
    limits = Limits(requirement.max_err_pp, requirement.max_change)
    if limits.err_pp is None and limits.change is None:
        raise InputError("--confidence certifies --max-err on unseen images: give --max-err 1% too")
    if limits.change is not None:
        refuse_without_own_output(evidences[0])
    if requirement.max_class_err:
        raise InputError(
            "--confidence certifies means over images, not the IoU of one class: leave --max-class-err out"
        )
    if requirement.baseline_miou is not None:
        raise InputError("--confidence compares with the baseline image by image: leave --baseline out")
    for option, limit in (("--max-err", limits.err_pp), ("--max-change", limits.change)):
        if limit is not None and not 0 < limit < 100:
            raise InputError(f"no number of images can certify {option} {limit:.4g}%: give {option} 1%")
    return limits


def certification_split(
    statistics: ExitStatistics, limits: Limits, confidence: float, seed: int
) -> tuple[Index, Index]:
    """The labelled images to choose by and those to certify on; no sequence has images in both.

    Raises InputError with the number that would suffice when there are too few sequences.
    """
    labelled = np.flatnonzero(statistics.labelled.any(axis=1))
    groups = [statistics.group[i] for i in labelled]
    names, group = numbered_groups(groups)
    least = least_sequences(limits.least, confidence)
    if len(names) < least + LEAST_CHOSEN:
        option = "--max-err" if limits.least == limits.err_pp else "--max-change"
        single = _unit(groups) == "images"
        have = "independent images" if single else f"images of {len(names)} independent sequences"
        raise InputError(
            f"{len(labelled)} labelled {have} are too few to certify {option} {limits.least:.4g}% at "
            f"--confidence {100 * confidence:.4g}%: it takes at least "
            f"{least + LEAST_CHOSEN} ({least} to certify on, where a plan without any error just passes, and "
            f"{LEAST_CHOSEN} to choose by); evaluate more, or raise {option}"
        )
    certified = max(least, round(CERTIFIED_SHARE * len(names)))
    held = np.isin(group, np.random.default_rng(seed).permutation(len(names))[:certified])
    return labelled[~held], labelled[held]


def _from_fastest(parts: Sequence[Evidence], context: SearchContext, result: SearchResult) -> list[Plan]:
    """The optimum and then plans that each err less on `parts`; all satisfy the requirement there."""
    requirement = context.requirement
    if requirement.objective == "accuracy":
        return [result.plan]
    on_front = Requirement(
        setting=requirement.setting,
        objective=requirement.objective,
        max_err_pp=requirement.max_err_pp,
        max_change=requirement.max_change,
        max_memory_bytes=requirement.max_memory_bytes,
        max_workload=requirement.max_workload,
        max_exits=requirement.max_exits,
    )
    plans = [result.plan]
    if requirement == on_front and (requirement.objective or "latency") == "latency" and result.front_complete:
        careful = _more_careful(result, requirement)
        some = np.linspace(0, len(careful) - 1, min(len(careful), MOST_CAREFUL)).round().astype(int)
        return plans + [careful[i] for i in some]
    for share in _SHARES:
        err_pp, change = (
            None if bound is None else share * bound for bound in (requirement.max_err_pp, requirement.max_change)
        )
        tighter = replace(requirement, max_err_pp=err_pp, max_change=change)
        try:
            alone = SearchContext(tighter, (), cache_folder=context.cache_folder)
            plans.append(search_without_points(parts, alone).plan)
        except RequirementError:
            break
    return plans


def _more_careful(result: SearchResult, requirement: Requirement) -> list[Plan]:
    """Plans of the front that each err less than the one before, from the chosen one on, in the memory that is allowed:
    a front by memory has no bound on it, and holds plans that only take less."""
    careful, most = [result.plan], requirement.max_memory_bytes
    for plan in result.front:
        fits = most is None or plan.predicted.memory_bytes <= most
        if fits and plan.predicted.miou > careful[-1].predicted.miou:
            careful.append(plan)
    return careful[1:]


def _unit(groups: Sequence[str]) -> str:
    return "images" if len(set(groups)) == len(groups) else "sequences"
