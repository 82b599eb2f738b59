"""What `verify` says of a golden frame or a latency that fails: what differs, and what would pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mess_compile.runtime.bundle.manifest import Golden
from mess_compile.runtime.serve import verify

EXPECTED = Golden("host:fp32", "golden/0.npy", "golden/0-labels.npy", 2, 50)


class _Cascade:
    """A cascade that gives one prediction; its plan has maps of 100 cells."""

    def __init__(self, exit_: int, cells: int, labels: np.ndarray) -> None:
        self.plan = SimpleNamespace(
            top=lambda stage: 100,
            stages=(None, None),
            boldest="fp32",
            predicted=SimpleNamespace(source="measured"),
            costs=(SimpleNamespace(mean_ms=1.0, report_mean_ms=0.0),) * 2,
            upload_mean_ms=0.0,
        )
        self.archive = SimpleNamespace(array=lambda name: np.zeros((20, 20), np.uint8))
        self._prediction = SimpleNamespace(exit=exit_, confidence=cells / 100, labels=labels, latency_ms=3.7)

    def __call__(self, frame: np.ndarray) -> Any:
        return self._prediction


def labels(wrong: int) -> np.ndarray:
    found = np.zeros((20, 20), np.uint8)
    found.ravel()[:wrong] = 1
    return found


@pytest.mark.parametrize(
    ("exit_", "cells", "wrong", "differs"),
    [
        (2, 50, 0, None),
        (1, 50, 0, "; what differs: the exit"),
        (2, 90, 0, "; what differs: the confident cells, by more than "),
        (2, 50, 40, "; what differs: the labels: at least "),
    ],
)
def test_a_golden_frame_that_fails_says_what_differs(exit_: int, cells: int, wrong: int, differs: str | None) -> None:
    """`exit 2, expected 2` failed, and nobody could read why."""
    frame = np.zeros((20, 20, 3), np.uint8)
    check = verify._golden(_Cascade(exit_, cells, labels(wrong)), EXPECTED, frame)  # type: ignore[arg-type]
    assert check.passed == (differs is None)
    assert ("what differs" in check.detail) == (differs is not None)
    assert differs is None or differs in check.detail


def test_a_latency_that_fails_names_a_factor_that_would_pass() -> None:
    cascade: Any = _Cascade(2, 50, labels(0))
    failed = verify._latency(cascade, [np.zeros(1)], 1.25, verify._silent)
    assert failed.detail.endswith("1.85x, at most 1.25x; --latency-factor 2.1 would pass")
    assert verify._latency(cascade, [np.zeros(1)], 2.1, verify._silent).passed
