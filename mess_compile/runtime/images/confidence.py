"""The confidence of every cell of a head's map, on request: what the gate graph counts, as values (MESS, Eq. 1)."""

from __future__ import annotations

import math
from typing import Optional

import numpy as np

LEGEND = (
    "confidence: the share of an exit's cells that are sure at the plan's pixel threshold; early exits decide by it, "
    "unless a deadline does, and the last one only tells it"
)
"""What stands below figures of confidence."""


def confidence_text(confidence: Optional[float]) -> str:
    """The share of sure cells in a caption; a whole network has none."""
    return "" if confidence is None else f"sure {confidence:.0%}  "


def exit_text(number: int, confidence: Optional[float]) -> str:
    """Where a frame left, and how sure it was there; a whole network has no confidence."""
    return "the whole network" if confidence is None else f"exit {number}, confidence {confidence:.3f}"


def confidence_map(logits: np.ndarray, kind: str) -> np.ndarray:
    """Logits (K, h, w) -> confidence float32 (h, w) in 0..1, before the gate's rule for edges.

    With p = softmax(logits), best first: `top1` p1, `margin` p1 - p2, `entropy` 1 + sum(p ln p) / ln K. Source:
    DESIGN.md, Gate.
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
