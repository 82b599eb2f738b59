"""Does a loaded bundle compute, on this machine, what it computed where it was made?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

import numpy as np

from mess_compile.runtime.cascade import Cascade
from mess_compile.runtime.manifest import Golden

LABELS_EQUAL_PERCENT = 99.9
COUNT_TOLERANCE = 1


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


def verify(cascade: Cascade) -> Tuple[Check, ...]:
    """The checks of a loaded bundle: its hashes, which loading has proven, and every golden frame of its plan.

    A golden frame passes when it leaves at the exit it left at, with 99.9 % of its labels equal and its
    confident cells counted to within one. Raises BundleError
    for a golden file that is not a plain array, EngineError.
    """
    files = len(cascade.manifest.files)
    cases = [golden for golden in cascade.manifest.golden if golden.target == cascade.plan.target]
    checks = [Check("hashes", True, f"{files} files are as they were written")]
    checks += [_golden(cascade, golden) for golden in cases]
    if not cases:
        checks.append(Check("golden", False, f"the bundle holds no golden frame for {cascade.plan.target}"))
    return tuple(checks)


def _golden(cascade: Cascade, golden: Golden) -> Check:
    frame, labels = cascade.archive.array(golden.frame), cascade.archive.array(golden.labels)
    prediction = cascade(frame)
    if prediction.labels.shape != labels.shape:
        return Check(golden.frame, False, f"labels are {prediction.labels.shape}, expected {labels.shape}")
    equal = 100.0 * float(np.mean(prediction.labels == labels))
    count = round(prediction.confidence * cascade.plan.stages[prediction.exit - 1].cells)
    passed = (
        prediction.exit == golden.exit
        and abs(count - golden.count) <= COUNT_TOLERANCE
        and equal >= LABELS_EQUAL_PERCENT
    )
    detail = (
        f"exit {prediction.exit}, expected {golden.exit}; {count} confident cells, expected {golden.count}; "
        f"{equal:.3f} % of the labels are equal"
    )
    return Check(golden.frame, passed, detail)
