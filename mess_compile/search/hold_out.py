"""Images that are held out of a search, so that its plan is also evaluated on images that it was not chosen on.

docs/guarantees.md says what is held out, and when nothing is.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from mess_compile.array_types import Index
from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.bundle.manifest import LABELS, against
from mess_compile.search.display import figure_names, figures_row, network_label
from mess_compile.search.groups import grouped
from mess_compile.search.metrics import Evidence, baseline_figures, evidence_of_plan, figures_of_stages
from mess_compile.search.plan import FEW_IMAGES, HoldOut, SearchResult, share_of
from mess_compile.search.risk import numbered_groups

THIRD = Fraction(1, 3)
LEAST_IMAGES = math.ceil(FEW_IMAGES / (1 - THIRD))
"""With fewer images nothing is held out unless --hold-out asks for it: fewer than FEW_IMAGES would be left to choose a
plan by."""
_SHARES = (1, 90)  # per cent
NOT_WANTED = "--hold-out none"


def parse_hold_out(text: str) -> Fraction:
    """A share from `33%`, or 0 from `none`. Raises InputError."""
    match = re.fullmatch(r"(\d{1,2}(?:\.\d{0,6})?)\s*%", text.strip())
    if text.strip() == "none":
        return Fraction(0)
    if match is None or not _SHARES[0] <= Fraction(match[1]) <= _SHARES[1]:
        raise InputError(
            f"--hold-out {text!r} is not understood: write 33% (from {_SHARES[0]}% to {_SHARES[1]}%), or none"
        )
    return Fraction(match[1]) / 100


def held_rows(groups: Sequence[str], share: Fraction) -> tuple[Index, str]:
    """The images to hold out, given the sequence of each, and the rule in words.

    Of each sequence the last ones, since neighbours in a video are nearly the same image; where images belong to no
    sequences, or these are too short, whole sequences at even distances.
    """
    names, group = numbered_groups(groups)
    sizes = np.bincount(group)
    last = [int(size * share) for size in sizes]
    if len(names) < len(groups) and 2 * sum(last) >= share * len(groups):
        left = sizes - np.array(last)
        place = np.empty(len(groups), np.intp)  # of each image in its sequence
        for number, size in enumerate(sizes):
            place[group == number] = np.arange(size)
        part = "third" if share == THIRD else f"{100 * float(share):.4g} %"
        return np.flatnonzero(place >= left[group]), f"the last {part} of each sequence"
    chosen = [number for number in range(len(names)) if int((number + 1) * share) > int(number * share)]
    unit = "image" if len(names) == len(groups) else "sequence"
    rule = f"every third {unit}" if share == THIRD else f"{100 * float(share):.4g} % of the {unit}s, at even distances"
    return np.flatnonzero(np.isin(group, chosen)), rule


def tuning_rows(groups: Sequence[str], share: str | None) -> Index:
    """The images that a plan was chosen on, given the sequence of each and the `share` that its record says was held
    out (None: nothing). Raises InputError when this is not a share."""
    everything = np.arange(len(groups))
    return everything if share is None else np.delete(everything, held_rows(groups, share_of(share))[0])


def tuning_part(statistics: ExitStatistics, hold_out: HoldOut | None, group_by: str | None = None) -> ExitStatistics:
    """The statistics of the images that a plan with this record was chosen on; `group_by` named their groups."""
    if hold_out is None:
        return statistics
    return statistics.select(tuning_rows(grouped(statistics, group_by).group, hold_out.share).tolist())


@dataclass(frozen=True, eq=False)
class HoldOutSplit:
    """The evidence that a plan is chosen by and that it is evaluated on, for each recipe; `held` is empty where nothing
    is held out, and `without` says why."""

    chosen: Sequence[Evidence]
    whole: Sequence[Evidence]
    held: Sequence[Evidence] = ()
    share: Fraction = Fraction(0)
    rule: str = ""
    without: str = ""

    def evaluated(self, result: SearchResult) -> SearchResult:
        """The result of a search by `chosen`, with the figures of its plan on the images held out.

        Its plans name the statistics of all images, for these are in the workspace.
        """
        if not self.held:
            return replace(result, without_hold_out=self.without)
        evidence = evidence_of_plan(self.held, result.plan)
        held = HoldOut(
            share=str(self.share),
            rule=self.rule,
            image_ids_sha256=hashlib.sha256("\n".join(evidence.statistics.image_id).encode()).hexdigest(),
            predicted=figures_of_stages(evidence, result.plan.setting, result.plan.stages),
            baseline=baseline_figures(evidence),
        )
        whole = {each.graph_set.recipe: each.statistics_sha256 for each in self.whole}
        front = tuple(replace(plan, statistics_sha256=whole[plan.precision]) for plan in result.front)
        plan = replace(result.plan, statistics_sha256=whole[result.plan.precision], hold_out=held)
        return replace(result, plan=plan, front=front)


def split_images(evidences: Sequence[Evidence], share: Fraction | None) -> HoldOutSplit:
    """Hold out `share` of the images of `evidences`, of the recipes searched; None: a third, where the images suffice.

    Raises InputError when a share that was asked for leaves no labelled image to choose by, or to evaluate on.
    """
    images = evidences[0].statistics.images
    if share == 0:
        return HoldOutSplit(evidences, evidences, without=NOT_WANTED)
    if share is None and images < LEAST_IMAGES:
        return HoldOutSplit(evidences, evidences, without=f"{images} images are fewer than {LEAST_IMAGES}")
    used = THIRD if share is None else share
    rows = [held_rows(each.statistics.group, used) for each in evidences]
    lacking = _lacking(evidences[0], rows[0][0])
    if lacking and share is None:
        return HoldOutSplit(evidences, evidences, without=lacking)
    if lacking:
        raise InputError(
            f"--hold-out {100 * float(used):.4g}% of {images} images: {lacking}; evaluate more images, or give "
            "--hold-out none"
        )
    parts = [(each, held) for each, (held, _) in zip(evidences, rows, strict=True)]
    chosen = [each.of_images(np.setdiff1d(np.arange(each.statistics.images), held)) for each, held in parts]
    return HoldOutSplit(chosen, evidences, [each.of_images(held) for each, held in parts], used, rows[0][1])


def _lacking(evidence: Evidence, held: Index) -> str:
    """Why these images cannot be held out; "" where they can."""
    labelled = np.asarray(evidence.statistics.labelled.any(axis=1))
    if not labelled[held].any():
        return "no image with labels would be held out"
    if not np.delete(labelled, held).any():
        return "no image with labels would be left to choose a plan by"
    return ""


def held_out_table(
    hold_out: HoldOut, baseline: str, truth: str = LABELS
) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Title, header and rows: the plan and the baseline, called so, on images that it was not chosen on."""
    images = f"{hold_out.predicted.images} images of {hold_out.predicted.split}"
    title = f"held out, not used to choose the plan: {images}, {hold_out.rule}{against(truth)}"
    return (
        title,
        figure_names(hold_out.predicted),
        [figures_row(baseline, hold_out.baseline), figures_row("plan", hold_out.predicted)],
    )


def held_out_sentence(result: SearchResult, max_err_pp: float | None) -> str:
    """The loss of mIoU on the images that the plan was chosen on and on those held out, or why there are none."""
    plan, hold_out = result.plan, result.plan.hold_out
    if hold_out is None:
        why = f" ({result.without_hold_out})" if result.without_hold_out else ""
        return f"nothing was held out{why}: all figures are of the images that the plan was chosen on"
    tuned, held = (figures.predicted.miou - figures.baseline.miou for figures in (plan, hold_out))
    words = (
        f"mIoU against the {network_label(plan.baseline_name, plan.retrained)}: {tuned:+.2f} pp on "
        f"the {plan.predicted.images} images that the plan was chosen on, {held:+.2f} pp on the "
        f"{hold_out.predicted.images} held out"
    )
    if max_err_pp is None or plan.offset_pp - held <= max_err_pp:
        return words
    remedy = "evaluate more images" + (", or give a smaller --max-err" if max_err_pp else "")
    return f"{words}, where more than {max_err_pp:.4g} pp is lost: {remedy}"
