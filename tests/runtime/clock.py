"""A clock that a test sets: what a frame takes on it is what its steps are said to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from mess_compile.runtime.bundle.manifest import Manifest, StageCost
from mess_compile.runtime.cascade import cascade as cascade_module
from mess_compile.runtime.images import frames


class Clock:
    """One that stands still but for what a frame's steps are said to take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **milliseconds: float) -> None:
        self.ms = 0.0
        monkeypatch.setattr(cascade_module, "time", SimpleNamespace(perf_counter_ns=lambda: int(self.ms * 1e6)))
        for name, duration_ms in milliseconds.items():
            monkeypatch.setattr(frames, name, self._slow(getattr(frames, name), duration_ms))

    def _slow(self, step: Callable[..., Any], duration_ms: float) -> Callable[..., Any]:
        def slowed(*arguments: Any) -> Any:
            self.ms += duration_ms
            return step(*arguments)

        return slowed


def cheap(manifest: Manifest) -> Manifest:
    """Each stage is said to take 2 ms at p99, with its report."""
    costs = (StageCost(1.0, 1.0, 1.0, 1.0),) * 2
    return replace(manifest, plans=(replace(manifest.plans[0], costs=costs),))
