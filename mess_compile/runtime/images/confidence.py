"""Computes the confidence of every cell of a head's map, which the gate graph only counts (MESS, Eq. 1)."""

from __future__ import annotations

import math
from typing import Optional

import numpy as np

LEGEND = (
    "confidence: the share of an exit's cells whose confidence reaches the plan's threshold; early exits decide by "
    "it, unless a deadline does; the last exit only reports it"
)
"""Explains figures of confidence below them."""


def confidence_text(confidence: Optional[float]) -> str:
    """The share of confident cells, for a caption; empty for a whole network."""
    return "" if confidence is None else f"confident {confidence:.0%}  "


def exit_text(number: int, confidence: Optional[float]) -> str:
    """The exit that a frame took and its confidence there; a whole network has no confidence."""
    return "the whole network" if confidence is None else f"exit {number}, confidence {confidence:.3f}"


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
