"""Decides at an exit whether the image leaves. The search makes the same decisions from statistics."""

from __future__ import annotations

from typing import Union

import numpy as np

from mess_compile.runtime.bundle.manifest import BundleStage, Decision


def leaves(counts: np.ndarray, decision: Union[Decision, BundleStage]) -> bool:
    """Whether the integer of the decision's row reaches its cut; `counts` has one per row, of thresholds confident
    cells.

    A decision without a cut never lets an image leave. Source: docs/definitions.md, Gate.
    """
    return decision.cut is not None and int(counts[decision.row]) >= decision.cut
