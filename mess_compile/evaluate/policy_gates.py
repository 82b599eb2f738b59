"""Compares the policies that an evaluation has counts for: how well each separates images, and how many may leave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mess_compile.evaluate.diagnose import Diagnosis, auroc, leaving_shares
from mess_compile.evaluate.learned import easy_images
from mess_compile.evaluate.policies import possible_policies, with_policies
from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.runtime.base.policy import PLAIN

WITHIN_PP = 1.0


@dataclass(frozen=True)
class PolicyGate:
    """A policy at an early head: how well its best row separates images whose pixel accuracy is within WITHIN_PP of the
    last exit's (None where all are of one kind), and the share that may leave within each error of the diagnosis."""

    head: str
    policy: str
    auroc: float | None
    gate_share: tuple[float, ...]


def policy_gates(statistics: ExitStatistics, diagnosed: Diagnosis) -> tuple[PolicyGate, ...]:
    """Every policy that there are counts for, at every early head; learned rows out of fold."""
    made = with_policies(statistics, possible_policies(statistics))
    labelled, plain = np.asarray(made.labelled).any(axis=1), len(made.gate.thresholds)
    found = []
    for head in (one.head for one in diagnosed.heads):
        columns = {PLAIN: list(range(plain))}
        for row in made.policy_rows:
            if row.head == head:
                columns.setdefault(row.policy, []).append(row.row)
        easy = easy_images(made, head, diagnosed.final, WITHIN_PP)[labelled]
        for policy, rows in columns.items():
            counts = np.asarray(made.counts[:, made.head_index(head)][:, rows])
            areas = auroc(easy, counts[labelled])
            shares = leaving_shares(made, head, diagnosed.final, counts, diagnosed.max_errs_pp)
            found.append(PolicyGate(head, policy, None if areas is None else float(areas.max()), shares))
    return tuple(found)
