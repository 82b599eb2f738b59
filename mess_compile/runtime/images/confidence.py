"""Computes the confidence of every cell of a head's map, which the gate graph only counts (MESS, Eq. 1)."""

from __future__ import annotations

import math
from typing import Optional

import numpy as np

LEGEND = (
    "stage: an exit of the plan, counted from 1; confident cells: the share of a stage's cells whose confidence "
    "reaches the plan's threshold; an image leaves at the first stage with the share needed (with --deadline, at the "
    "last one in time), else at the last stage"
)
"""Explains figures of confidence below them."""


_MEASURES = {"agreement": "agreeing cells", "learned": "learned score"}
"""What a policy compares, where it is not the confident cells."""


def confidence_text(confidence: Optional[float], needed: Optional[float] = None, policy: str = "") -> str:
    """What the policy compares and, where that decides, how much is needed to leave; empty for a full network."""
    if confidence is None:
        return ""
    measure = _MEASURES.get(policy, "confident cells")
    if needed is None:
        return f"{measure} {percent(confidence)}"
    digits = int(confidence < needed and percent(confidence) == percent(needed))
    return f"{measure} {percent(confidence, digits)} (needs {percent(needed, digits)})"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def exit_text(number: int, confidence: Optional[float], needed: Optional[float] = None, policy: str = "") -> str:
    """The stage at which a frame left and its confidence there; a full network has no confidence."""
    words = confidence_text(confidence, needed, policy)
    return "the full network" if confidence is None else f"stage {number}, {words}"


def confidence_map(logits: np.ndarray, kind: str) -> np.ndarray:
    """Logits (K, h, w) -> confidence float32 (h, w) in 0..1, before the gate's rule for edges.

    With p = softmax(logits), sorted downwards: `top1` p1, `margin` p1 - p2, `entropy` 1 + sum(p ln p) / ln K. Source:
    docs/definitions.md, Gate.
    """
    z = logits.astype(np.float64) - logits.max(axis=0)
    p = np.exp(z)
    total = p.sum(axis=0)
    p /= total
    if kind == "entropy":
        confidence = 1 + (p * (z - np.log(total))).sum(axis=0) / math.log(len(logits))
    elif kind == "margin":
        second, best = np.partition(p, -2, axis=0)[-2:]
        confidence = best - second
    else:
        confidence = p.max(axis=0)
    values: np.ndarray = confidence.astype(np.float32)
    return values
