"""Checks a bundle on this machine: its hashes and signature, its results on golden frames, and its latency."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple

import numpy as np

from mess_compile.runtime.base.errors import BundleError
from mess_compile.runtime.bundle.archive import Archive, open_archive
from mess_compile.runtime.bundle.manifest import Golden
from mess_compile.runtime.bundle.signature import Signers, check_signers
from mess_compile.runtime.cascade.cascade import Cascade, Prediction, load_archive
from mess_compile.runtime.machine.power import read_state

LABELS_EQUAL_PERCENT = {"fp32": 99.9, "fp16": 99.5, "int8": 98.0}
COUNT_TOLERANCE = {"fp32": 0.0, "fp16": 0.005, "int8": 0.02}
"""A count may differ by this share of the cells, plus one cell."""
LATENCY_FACTOR = 1.25
Progress = Callable[[str, int, int], None]
_WARM_UP, _RUNS, _MOST_S = 2, 15, 3.0
"""Each golden frame runs _RUNS times, fewer when that exceeds _MOST_S seconds, and at least three times."""


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class VerifyOptions:
    """What is checked besides hashes and golden frames.

    With `signers` the bundle must be signed by one of them; `require_signature` fails without `signers`. Golden frames
    may take `latency_factor` times the plan's latency of their exits.
    """

    signers: Optional[Signers] = None
    require_signature: bool = False
    latency_factor: float = LATENCY_FACTOR


def _silent(what: str, done: int, total: int) -> None:
    pass


def verify_bundle(
    path: Path, target: Optional[str] = None, options: Optional[VerifyOptions] = None, progress: Progress = _silent
) -> Tuple[Check, ...]:
    """All checks of a bundle; nothing of it runs when the signature check fails.

    `progress` gets the check, how much of it is done, and the total, 0 where that is not known.

    Raises BundleError when a byte of the bundle was changed, InputError, EngineError.
    """
    options = options or VerifyOptions()
    if options.signers is not None:
        check_signers(options.signers)
    progress("hashes", 0, 0)
    archive = open_archive(path)
    try:
        checks = (_hashes(archive), _signature(archive, options))
        if not checks[1].passed:
            return checks
        progress("open engines", 0, 0)
        with load_archive(archive, target) as cascade:
            return checks + verify(cascade, options.latency_factor, progress)
    finally:
        archive.close()


def _hashes(archive: Archive) -> Check:
    return Check("hashes", True, f"{len(archive.manifest.files)} files are unchanged")


def _signature(archive: Archive, options: VerifyOptions) -> Check:
    needed = options.require_signature or options.signers is not None
    if archive.signature is None:
        return Check("signature", not needed, "none, but a signature is required" if needed else "none")
    if options.signers is None:
        detail = "not checked: no file of allowed signers"
        return Check("signature", not needed, detail)
    try:
        return Check("signature", True, f"by {archive.check_signer(options.signers)}")
    except BundleError as error:
        return Check("signature", False, str(error))


def verify(cascade: Cascade, latency_factor: float = LATENCY_FACTOR, progress: Progress = _silent) -> Tuple[Check, ...]:
    """The checks of a loaded bundle: every golden frame of its plan, power mode, latency.

    A golden frame passes when it leaves at the expected exit, and its labels and its count of confident cells are
    within the tolerances of the plan's lowest precision; for a whole network only labels are compared. With an infinite
    `latency_factor`, latency and power mode are not judged. Raises BundleError for a golden file that is not a plain
    array, EngineError.
    """
    plan = cascade.plan
    cases = cascade.manifest.golden_of(plan)
    if not cases:
        return (Check("golden", False, f"the bundle has no golden frame for {plan.name}"),)
    frames = [cascade.archive.array(golden.frame) for golden in cases]
    checks = []
    for golden, frame in zip(cases, frames):
        checks.append(_golden(cascade, golden, frame))
        progress("golden frames", len(checks), len(cases))
    if plan.power_mode is not None and not math.isinf(latency_factor):
        checks.append(_power_mode(plan.power_mode, read_state().power_mode))
    checks.append(_latency(cascade, frames, latency_factor, progress))
    return tuple(checks)


def _power_mode(expected: str, found: Optional[str]) -> Check:
    detail = f"{found or 'unknown'}; the plan's latencies were measured in {expected}"
    return Check("power mode", found == expected, detail)


def _golden(cascade: Cascade, golden: Golden, frame: np.ndarray) -> Check:
    labels, prediction = cascade.archive.array(golden.labels), cascade(frame)
    if prediction.labels.shape != labels.shape:
        return Check(golden.frame, False, f"labels are {prediction.labels.shape}, expected {labels.shape}")
    equal = 100.0 * float(np.mean(prediction.labels == labels))
    top, precision = cascade.plan.top(cascade.plan.stages[prediction.exit - 1]), cascade.plan.boldest
    least = LABELS_EQUAL_PERCENT[precision]
    if prediction.confidence is None:
        passed = prediction.exit == golden.exit and equal >= least
        return Check(golden.frame, passed, f"the full network; {equal:.3f} % of the labels are equal")
    count = round(prediction.confidence * top)
    most = 1 + COUNT_TOLERANCE[precision] * top
    detail = (
        f"exit {prediction.exit}, expected {golden.exit}; {count} confident cells, expected {golden.count}; "
        f"{equal:.3f} % of the labels are equal"
    )
    wrong = {
        "the exit": prediction.exit != golden.exit,
        f"the confident cells, by more than {most:g}": abs(count - golden.count) > most,
        f"the labels: at least {least:g} % must be equal": equal < least,
    }
    differs = [name for name, is_wrong in wrong.items() if is_wrong]
    return Check(golden.frame, not differs, f"{detail}{'; what differs: ' * bool(differs)}{' and '.join(differs)}")


def _latency(cascade: Cascade, frames: Sequence[np.ndarray], factor: float, progress: Progress) -> Check:
    """Compare the mean of the frames' median latencies with the plan's mean latency of the exits that they took."""
    rounds = _timed(cascade, frames, progress)
    latencies = np.array([[prediction.latency_ms for prediction in predictions] for predictions in rounds])
    measured = float(np.median(latencies, axis=0).mean())
    planned = float(np.mean([_planned_ms(cascade, prediction.exit) for prediction in rounds[-1]]))
    ratio = measured / planned if planned else float("inf")
    found = f"{measured:.2f} ms per golden frame, {planned:.2f} ms in the plan: {ratio:.2f}x"
    if cascade.plan.predicted.source == "estimated":
        return Check("latency", True, f"{found}; not judged: the plan's latencies are estimates")
    if math.isinf(factor):
        return Check("latency", True, f"{found}; not judged")
    enough = "" if ratio <= factor else f"; --latency-factor {math.ceil(11 * ratio) / 10:g} would pass"
    return Check("latency", ratio <= factor, f"{found}, at most {factor:g}x{enough}")


def _timed(cascade: Cascade, frames: Sequence[np.ndarray], progress: Progress) -> List[List[Prediction]]:
    """Run all frames in each round, so that a disturbance affects few runs of each frame."""
    for frame in frames[:_WARM_UP]:
        cascade(frame)
    rounds: List[List[Prediction]] = []
    started = time.monotonic()
    while len(rounds) < 3 or (len(rounds) < _RUNS and time.monotonic() - started < _MOST_S):
        rounds.append([cascade(frame) for frame in frames])
        progress("latency", len(rounds), _RUNS)
    return rounds


def _planned_ms(cascade: Cascade, exit_: int) -> float:
    """The plan's latency of an image that leaves at an exit: upload, stages, one output graph, download."""
    costs = cascade.plan.costs[:exit_]
    return cascade.plan.upload_mean_ms + sum(cost.mean_ms for cost in costs) + costs[-1].report_mean_ms
