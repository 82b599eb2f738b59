"""`bench --deadline` counts as its user's program would: when the labels are there at the frame's own size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mess_compile import runtime
from mess_compile.bench.run import bench_deadline
from mess_compile.data.dataset import DataSet, open_dataset
from tests import small_network
from tests.runtime.clock import Clock, cheap


@pytest.fixture
def large_frames(tmp_path: Path) -> DataSet:
    """Three frames of 30 x 50, more than the network's 8 x 12."""
    for kind in ("images", "labels"):
        (tmp_path / "data" / "val" / kind).mkdir(parents=True)
    (tmp_path / "data" / "classes.txt").write_text("".join(f"{name}\n" for name in small_network.CLASSES))
    for seed in range(3):
        Image.fromarray(small_network.frame(seed, (30, 50))).save(tmp_path / f"data/val/images/{seed}.png")
        Image.fromarray(np.full((30, 50), seed, np.uint8)).save(tmp_path / f"data/val/labels/{seed}.png")
    return open_dataset(tmp_path / "data", "val")


@pytest.mark.parametrize(
    ("deadline_ms", "exit_rates", "missed_first", "last_ms"),
    [(17.9, (1.0, 0.0), 1.0, 18.0), (26.9, (1.0, 0.0), 0.0, 18.0), (27.1, (0.0, 1.0), 0.0, 25.0)],
)
def test_frames_of_another_size_are_late_when_resizing_and_mapping_back_make_them_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    large_frames: DataSet,
    deadline_ms: float,
    exit_rates: tuple[float, float],
    missed_first: float,
    last_ms: float,
) -> None:
    """Resizing takes 11 ms, mapping back 7, a stage none, and 2 by the plan."""
    small_network.write_bundle(tmp_path / "tiny.mess")
    path = small_network.changed_bundle(tmp_path / "tiny.mess", tmp_path / "cheap.mess", cheap)
    with runtime.load(path, threads=1) as cascade:
        Clock(monkeypatch, to_input=11.0, from_input=7.0)
        found = bench_deadline(cascade, large_frames, deadline_ms, 2, lambda *told: None)
    assert (found.exit_rates, found.missed_first, found.missed_later) == (exit_rates, missed_first, 0.0)
    assert found.p50_ms == pytest.approx(last_ms)
