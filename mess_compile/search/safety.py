"""The fastest plan that keeps its bounds on new images with a probability (`--safety`), for sets of any size.

The bounds of the choice are tightened until what is lost on new images stays within those asked for; docs/guarantees.md
has the definitions, and how often it holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mess_compile.runtime.base.errors import InputError, RequirementError
from mess_compile.runtime.bundle.manifest import OWN_OUTPUT
from mess_compile.search.guarantees import FoldSearches
from mess_compile.search.metrics import Evidence, evidence_of_plan, plan_of_stages, refuse_without_own_output
from mess_compile.search.new_images import (
    SHARES,
    Bootstrap,
    Drawn,
    bootstrap_of,
    bound_pp,
    choice_and_front,
    expected_of,
    why_not,
)
from mess_compile.search.operating_points import with_operating_points
from mess_compile.search.plan import ONE_GROUP, Plan, Safety, SearchResult
from mess_compile.search.pool import Tightened
from mess_compile.search.requirement import Requirement

FEW_GROUPS = 8
"""With fewer groups the interval is wide, and how often it holds was not tested (docs/guarantees.md)."""
_STEPS = 64
"""The bounds are tightened in so many equal steps, down to the least that any plan of the pool loses."""


def parse_safety(text: str) -> float:
    """A probability from `90%`. Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%?)", text.strip())
    within = match is not None and 50 < float(match[1]) < 100
    if match is None or not within or not match[2]:
        meant = f"{match[1]}%" if match is not None and within else "90%"
        raise InputError(f"--safety {text!r:.40} is not understood: write {meant} (above 50% and below 100%)")
    return float(match[1]) / 100


def _other_images(evidence: Evidence) -> str:
    """What to do where the images allow no bound."""
    more = "run `mess-compile evaluate --data DIR --split SPLIT` on images of other places"
    if evidence.statistics.truth == OWN_OUTPUT:
        more = "run `mess-compile attach MODEL.onnx --images DIR --hold-back REGEX` to hold back images of more places"
    return f"{more}, name groups with --group-by, or leave --safety out"


def refuse_unsafe(evidences: Sequence[Evidence], requirement: Requirement) -> None:
    """Raises InputError for a requirement that `--safety` cannot keep, or images that allow no bound."""
    if len(set(evidences[0].statistics.group)) == 1:
        raise InputError(
            f"--safety needs two groups of images or more, and there is {ONE_GROUP.partition(':')[0]}: "
            f"{_other_images(evidences[0])}"
        )
    if requirement.max_err_pp is None and requirement.max_change is None:
        raise InputError("--safety keeps --max-err or --max-change on new images: give --max-err 1% too")
    if requirement.baseline_miou is not None:
        raise InputError("--safety compares with the baseline image by image: leave --baseline out")
    if requirement.setting == "anytime":
        raise InputError("--safety chooses thresholds, and the anytime setting has none: leave --safety out")
    if requirement.max_change is not None:
        refuse_without_own_output(evidences[0])


@dataclass(frozen=True, eq=False)
class SafeChoice:
    """What tightened bounds choose, and the upper bounds of loss (pp) and change (percent) on new images; None where
    nothing was asked."""

    drawn: Drawn
    loss: float | None
    change: float | None

    def keeps(self, requirement: Requirement) -> bool:
        pairs = ((self.loss, requirement.max_err_pp), (self.change, requirement.max_change))
        return all(found is None or asked is None or found <= asked for found, asked in pairs)

    @property
    def text(self) -> str:
        """For the user: what the plan may lose."""
        loss = "" if self.loss is None else f"{self.drawn.lost:.2f} pp here and up to {self.loss:.2f} pp there"
        change = "" if self.change is None else f"{self.drawn.changed:.2f} % changed here and up to {self.change:.2f} %"
        return " and ".join(filter(None, (loss, change)))


def safest(
    evidences: Sequence[Evidence], requirement: Requirement, result: SearchResult, searches: FoldSearches, level: float
) -> SearchResult:
    """`result`, of a search of `evidences`, with the fastest plan of the pool that keeps the bounds at this level.

    Raises InputError where the images allow no bound, RequirementError naming the nearest plan when none keeps them.
    """
    bootstrap = bootstrap_of(evidences, evidences, requirement, choice_and_front(result), searches)
    if reason := why_not(evidences[0].statistics.group, bootstrap.whole):
        raise InputError(
            f"--safety {100 * level:.4g}% needs images that differ ({reason}): {_other_images(evidences[0])}"
        )
    best = safe_choice(bootstrap, requirement, level)
    if not best.keeps(requirement):
        raise RequirementError(_refusal(requirement, best, level, len(bootstrap.pool.plans)))
    plan = _plan(evidences, requirement, result.plan, best, bootstrap, level)
    return replace(result, plan=plan, without_expected="", without_optimism="--safety has an interval")


def safe_choice(bootstrap: Bootstrap, requirement: Requirement, level: float) -> SafeChoice:
    """The choice by the least tightened bounds that keeps the requirement at this level; where none does, the most
    careful one."""
    low, high = 0, _STEPS
    found = {step: _choice(bootstrap, requirement, step / _STEPS, level) for step in (low, high)}
    if found[low].keeps(requirement) or not found[high].keeps(requirement):
        return found[low] if found[low].keeps(requirement) else found[high]
    while high - low > 1:
        middle = (low + high) // 2
        found[middle] = _choice(bootstrap, requirement, middle / _STEPS, level)
        low, high = (low, middle) if found[middle].keeps(requirement) else (middle, high)
    return found[high]


def _choice(bootstrap: Bootstrap, requirement: Requirement, step: float, level: float) -> SafeChoice:
    """What is chosen by bounds that are tightened by a `step` from 0 (those asked for) to 1 (the least there is)."""
    err, change = requirement.max_err_pp, requirement.max_change
    least_lost, least_changed = bootstrap.least
    tightened = Tightened(
        None if err is None else err + step * min(0.0, least_lost - err),
        None if change is None else change + step * min(0.0, least_changed - change),
    )
    place = bootstrap.chosen(tightened)
    drawn = bootstrap.drawn(place, tightened)
    most = max(share * drawn.optimism for share in SHARES)
    most_changed = max(share * drawn.change_optimism for share in SHARES)
    loss = min(100.0, bound_pp(drawn.lost + most, drawn.errors, bootstrap.groups, level))
    changed = min(100.0, bound_pp(drawn.changed + most_changed, drawn.change_errors, bootstrap.groups, level))
    return SafeChoice(drawn, None if err is None else loss, None if change is None else changed)


def _plan(
    evidences: Sequence[Evidence],
    requirement: Requirement,
    optimum: Plan,
    best: SafeChoice,
    bootstrap: Bootstrap,
    level: float,
) -> Plan:
    candidate = bootstrap.pool.plans[best.drawn.place]
    evidence = evidence_of_plan(evidences, candidate)
    plan = plan_of_stages(evidence, candidate.setting, candidate.stages, optimum.reference_miou)
    return replace(
        with_operating_points(evidence, plan),
        promises=optimum.promises,
        group_by=optimum.group_by,
        expected=expected_of(best.drawn, evidence.statistics, bootstrap.whole, optimum.group_by),
        safety=Safety(
            level=level,
            loss_bound_pp=best.loss,
            loss_limit_pp=requirement.max_err_pp,
            change_bound=best.change,
            change_limit=requirement.max_change,
            candidates=len(bootstrap.pool.plans),
        ),
    )


def _refusal(requirement: Requirement, nearest: SafeChoice, level: float, plans: int) -> str:
    bounds = {"--max-err": requirement.max_err_pp, "--max-change": requirement.max_change}
    asked = " and ".join(f"{option} {limit:.4g}%" for option, limit in bounds.items() if limit is not None)
    return (
        f"none of {plans} plans keeps {asked} on new images at {100 * level:.4g} %: the nearest loses {nearest.text}; "
        f"evaluate more images, raise {' or '.join(o for o, limit in bounds.items() if limit is not None)}, or lower "
        "--safety"
    )
