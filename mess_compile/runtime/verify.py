"""Does a loaded bundle compute, on this machine, what it computed where it was made?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Tuple

import numpy as np

from mess_compile.runtime.cascade import Cascade
from mess_compile.runtime.manifest import Golden
from mess_compile.runtime.power import read_state

LABELS_EQUAL_PERCENT = {"fp32": 99.9, "fp16": 99.5, "int8": 98.0}
COUNT_TOLERANCE = {"fp32": 0.0, "fp16": 0.005, "int8": 0.02}
"""Share of the cells by which a count may differ, beside one cell."""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


def verify(cascade: Cascade) -> Tuple[Check, ...]:
    """The checks of a loaded bundle: its hashes, which loading has proven, every golden frame of its plan, power mode.

    A golden frame passes when it leaves at the exit it left at, with as many labels equal and its confident cells
    counted as closely as the boldest precision of the plan allows. Raises BundleError for a golden file that is not a
    plain array, EngineError.
    """
    files = len(cascade.manifest.files)
    cases = [golden for golden in cascade.manifest.golden if golden.target == cascade.plan.target]
    checks = [Check("hashes", True, f"{files} files are as they were written")]
    checks += [_golden(cascade, golden) for golden in cases]
    if cascade.plan.power_mode is not None:
        checks.append(_power_mode(cascade.plan.power_mode, read_state().power_mode))
    if not cases:
        checks.append(Check("golden", False, f"the bundle holds no golden frame for {cascade.plan.target}"))
    return tuple(checks)


def _power_mode(wanted: str, found: Optional[str]) -> Check:
    detail = f"{found or 'unknown'}; the plan's latencies were measured in {wanted}"
    return Check("power mode", found == wanted, detail)


def _golden(cascade: Cascade, golden: Golden) -> Check:
    frame, labels = cascade.archive.array(golden.frame), cascade.archive.array(golden.labels)
    prediction = cascade(frame)
    if prediction.labels.shape != labels.shape:
        return Check(golden.frame, False, f"labels are {prediction.labels.shape}, expected {labels.shape}")
    equal = 100.0 * float(np.mean(prediction.labels == labels))
    cells, precision = cascade.plan.stages[prediction.exit - 1].cells, cascade.plan.boldest
    count = round(prediction.confidence * cells)
    passed = (
        prediction.exit == golden.exit
        and abs(count - golden.count) <= 1 + COUNT_TOLERANCE[precision] * cells
        and equal >= LABELS_EQUAL_PERCENT[precision]
    )
    detail = (
        f"exit {prediction.exit}, expected {golden.exit}; {count} confident cells, expected {golden.count}; "
        f"{equal:.3f} % of the labels are equal"
    )
    return Check(golden.frame, passed, detail)
