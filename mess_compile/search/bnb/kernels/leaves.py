"""The best plan of a chain of heads: its plans are pruned by their bounds, and the others evaluated exactly."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mess_compile.search.bnb.kernels.chains import bound_chain, place_of, scores_of
from mess_compile.search.bnb.kernels.compiled import inlined, kernel
from mess_compile.search.bnb.kernels.sums import sums_of_staying, sums_of_staying_at_three
from mess_compile.search.bnb.kernels.values import INFINITE, Array, ChainBatch, Constraints, Cutoff, HeadTable


class Leaves(NamedTuple):
    """The plans of one `chain` (4,) at three threshold `rows` with cut `cut1` at the first head: `chosen` (cuts, cuts)
    are those to evaluate. An image that leaves at an exit costs `costs` (q, 4)."""

    chain: Array
    rows: tuple[int, int, int]
    cut1: int
    chosen: Array
    costs: Array


class Leaving(NamedTuple):
    """Images and scores that leave, for one cut at the first head: there `at_first` images, and the scores of all if
    those beyond left at the last, `fixed`; at the second head `at_second` (cuts + 1,) and `second` by the cuts that an
    image passes; at the third `at_third` (cuts + 1, cuts + 1) and `third` by both. Scores count from the last head's;
    behind them is what is changed.
    """

    at_first: int
    fixed: Array
    at_second: Array
    second: Array
    at_third: Array
    third: Array


@kernel
def mean_iou(sums: Array, labelled: Array) -> float:
    """mIoU in percent, added up class by class as `statistics.miou` does, to the same last bit."""
    classes = labelled.size
    total = 0.0
    for k in range(classes):
        total += sums[k] / (sums[classes + k] + labelled[k])
    return float(100.0 * (total / classes))


@kernel
def keeps_classes(sums: Array, labelled: Array, least_iou: Array) -> bool:
    """Whether the IoU of every class is at least its own least, in percent."""
    classes = labelled.size
    kept = True
    for k in range(classes):
        kept &= 100.0 * (sums[k] / (sums[classes + k] + labelled[k])) >= least_iou[k]
    return kept


@inlined
def percentile_cost(costs: Array, leaving: Array, rank: int) -> int:
    """The smallest of the costs that at least `rank` images do not exceed; `leaving` counts those that pay each."""
    found = -1
    for exit_ in range(leaving.size):
        within = 0
        for other in range(leaving.size):
            if costs[other] <= costs[exit_]:
                within += leaving[other]
        if leaving[exit_] and within >= rank and (found < 0 or costs[exit_] < found):
            found = costs[exit_]
    return found


@inlined
def satisfies(costs: Array, leaving: Array, constraints: Constraints) -> bool:
    """Whether a plan with `leaving` (4,) images at its exits, at `costs` (q, 4) each, satisfies the bounds."""
    for quantity in range(costs.shape[0]):
        total = 0
        for exit_ in range(leaving.size):
            total += costs[quantity, exit_] * leaving[exit_]
        if total > constraints.bounds[quantity]:
            return False
    rank = -(-constraints.percentile[0] * leaving.sum() // 100)
    return percentile_cost(costs[0], leaving, rank) <= constraints.percentile[1]


@inlined
def is_before(goal: int, miou: float, chain: Array, options: Array, table: HeadTable, found: Array) -> bool:
    """Whether a plan comes before the one found: by objective, mIoU, the texts of rows, then those of cuts.

    `options` (3, 2) are row and cut at each early head of the `chain` (4,).
    """
    if found[2] < 0:
        return True
    if goal != found[0]:
        return goal < found[0]
    if miou != found[1]:
        return miou > found[1]
    for by_cut in range(2):
        for place in range(3):
            own, other = options[place], found[2 + 2 * place : 4 + 2 * place].astype(np.int64)
            own_rank = table.text_ranks[chain[place], own[0], by_cut * (own[1] + 1)]
            other_rank = table.text_ranks[chain[place], other[0], by_cut * (other[1] + 1)]
            if own_rank != other_rank:
                return bool(own_rank < other_rank)
    return False


@kernel(nogil=True)
def evaluate_chains(
    batch: ChainBatch, cutoff: Cutoff, constraints: Constraints, table: HeadTable
) -> tuple[Array, Array]:
    """The best plan of each chain, exactly, of those that the cutoff does not prune.

    Of the plans that satisfy the constraints the best is least in the objective, greatest in mIoU, first by
    `text_ranks`. Returns what was found (m, 8): objective, mIoU, row and cut at each early head, with row -1 where
    there is nothing; and the number of plans evaluated (m,).
    """
    count = batch.heads.shape[0]
    found, evaluated = np.full((count, 8), -1.0), np.zeros(count, np.int64)
    for m in range(count):
        evaluated[m] = _evaluate_chain(batch, m, cutoff, constraints, table, found[m])
    return found, evaluated


@inlined
def _evaluate_chain(
    batch: ChainBatch, m: int, cutoff: Cutoff, constraints: Constraints, table: HeadTable, found: Array
) -> int:
    """Fills `found` (8,) with the best plan of chain `m`; returns how many plans were evaluated."""
    chain, ceiling, n_rows = batch.heads[m], cutoff.ceiling, table.passed.shape[1]
    bound = bound_chain(chain, batch.prices[m], cutoff.slope, table)
    lows = bound.base + bound.lows
    fixed = bound.base + bound.steps[1].sum() + bound.steps[2].sum()
    evaluated = 0
    for index in range(n_rows**3):
        row1, row2, row3 = index // n_rows**2, index // n_rows % n_rows, index % n_rows
        if lows[row1, row2, row3] > ceiling or lows[row1, row2, row3] == INFINITE:
            continue
        counts = (
            table.cut_counts[chain[0], row1],
            table.cut_counts[chain[1], row2],
            table.cut_counts[chain[2], row3],
        )
        pairs, triples = _sums_of_rows(chain, (row1, row2, row3), counts, bound.steps, table)
        for cut1 in range(counts[0]):
            chosen, some = np.zeros((counts[1], counts[2]), np.bool_), False
            for cut2 in range(counts[1]):
                least = fixed + bound.alone[row1, cut1] - pairs[cut1, cut2]
                if least - triples[cut1, cut2, : counts[2]].max() <= ceiling:
                    chosen[cut2] = least - triples[cut1, cut2, : counts[2]] <= ceiling
                    some = True
            if some:
                leaves = Leaves(chain, (row1, row2, row3), cut1, chosen, batch.costs[m])
                evaluated += _evaluate_leaves(leaves, constraints, table, found)
    return evaluated


@inlined
def _sums_of_rows(
    chain: Array, rows: tuple[int, int, int], counts: tuple[int, int, int], steps: Array, table: HeadTable
) -> tuple[Array, Array]:
    """Sums of u2 - u3 over the images that leave neither at the first head nor at the second, by both cuts, and of u3 -
    u4 over those that leave at none of three, by all cuts."""
    first, second = table.passed[chain[0], rows[0]], table.passed[chain[1], rows[1]]
    pairs = np.empty((counts[0] + 1, counts[1] + 1))
    sums_of_staying(first, second, steps[1], pairs)
    triples = np.empty((counts[0] + 1, counts[1] + 1, counts[2] + 1))
    sums_of_staying_at_three(first, second, table.passed[chain[2], rows[2]], steps[2], triples)
    return pairs, triples


@inlined
def _evaluate_leaves(leaves: Leaves, constraints: Constraints, table: HeadTable, found: Array) -> int:
    """Evaluates plans, and fills `found` (8,) with one that is better; returns how many were evaluated."""
    chain, (row1, row2, row3), costs = leaves.chain, leaves.rows, leaves.costs
    leaving = _leaving(leaves, table)
    n, columns = table.passed.shape[2], leaving.fixed.size
    sums, counts = np.empty(columns), np.empty(4, np.int64)
    options = np.array([[row1, leaves.cut1], [row2, 0], [row3, 0]])
    evaluated = 0
    for cut2 in range(leaves.chosen.shape[0]):
        for cut3 in range(leaves.chosen.shape[1]):
            if not leaves.chosen[cut2, cut3]:
                continue
            evaluated += 1
            counts[0], counts[1] = leaving.at_first, leaving.at_second[cut2 + 1]
            counts[2] = leaving.at_third[cut2, cut3 + 1]
            counts[3] = n - counts[0] - counts[1] - counts[2]
            if not satisfies(costs, counts, constraints):
                continue
            for column in range(columns):
                second, third = leaving.second[cut2 + 1, column], leaving.third[cut2, cut3 + 1, column]
                sums[column] = leaving.fixed[column] + second + third
            if sums[columns - 1] > constraints.most_changed:
                continue
            if not keeps_classes(sums, table.labelled, constraints.least_iou):
                continue
            miou = mean_iou(sums, table.labelled)
            goal = 0
            for exit_ in range(4):
                goal += costs[constraints.objective, exit_] * counts[exit_] if constraints.objective >= 0 else 0
            options[1, 1], options[2, 1] = cut2, cut3
            if miou >= constraints.floor and is_before(goal, miou, chain, options, table, found):
                found[0], found[1] = goal, miou
                found[2:8] = options.reshape(-1)
    return evaluated


@inlined
def _leaving(leaves: Leaves, table: HeadTable) -> Leaving:
    chain, (row1, row2, row3) = leaves.chain, leaves.rows
    last, first = table.scores[chain[3]], scores_of(chain[0], chain[3], table)
    second, third = scores_of(chain[1], chain[3], table), scores_of(chain[2], chain[3], table)
    changed = table.changed
    head1, head2 = place_of(chain[0], chain[3], table), place_of(chain[1], chain[3], table)
    head3 = place_of(chain[2], chain[3], table)
    n, columns = last.shape
    cuts2, cuts3 = leaves.chosen.shape
    second_sums = np.zeros((cuts2 + 1, columns + 1))
    third_sums = np.zeros((cuts2 + 1, cuts3 + 1, columns + 1))
    at_first, fixed = 0, np.empty(columns + 1)
    fixed[:columns] = table.totals[chain[3]]
    fixed[columns] = changed[chain[3]].sum()
    at_second, at_third = np.zeros(cuts2 + 1, np.int64), np.zeros((cuts2 + 1, cuts3 + 1), np.int64)
    for image in range(n):
        if table.passed[chain[0], row1, image] > leaves.cut1:
            at_first += 1
            for column in range(columns):
                fixed[column] += first[image, column] - last[image, column]
            fixed[columns] += changed[head1, image] - changed[chain[3], image]
            continue
        passed2, passed3 = table.passed[chain[1], row2, image], table.passed[chain[2], row3, image]
        at_second[passed2] += 1
        at_third[passed2, passed3] += 1
        for column in range(columns):
            second_sums[passed2, column] += second[image, column] - last[image, column]
            third_sums[passed2, passed3, column] += third[image, column] - last[image, column]
        second_sums[passed2, columns] += changed[head2, image] - changed[chain[3], image]
        third_sums[passed2, passed3, columns] += changed[head3, image] - changed[chain[3], image]
    for cut2 in range(cuts2 - 1, -1, -1):
        at_second[cut2] += at_second[cut2 + 1]
        second_sums[cut2] += second_sums[cut2 + 1]
    for cut2 in range(cuts2 + 1):  # those that pass at most `cut2` at the second head and more than `cut3` at the third
        for cut3 in range(cuts3 - 1, -1, -1):
            at_third[cut2, cut3] += at_third[cut2, cut3 + 1]
            third_sums[cut2, cut3] += third_sums[cut2, cut3 + 1]
        if cut2:
            at_third[cut2] += at_third[cut2 - 1]
            third_sums[cut2] += third_sums[cut2 - 1]
    return Leaving(at_first, fixed, at_second, second_sums, at_third, third_sums)
