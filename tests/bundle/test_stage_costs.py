"""The figures by which a device meets its deadlines, and sees that a scene is not like those it was tuned on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mess_compile.bundle.stage_costs import device_costs
from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.latency.table import Latency, LatencyTable
from tests import small_network

MEAN_MS = {"segment-0-1": 4.0, "segment-1-2": 8.0, "output-4x6": 0.5, "upload": 0.25, "download": 0.125, "null": 0.03}


def table() -> LatencyTable:
    costs = MEAN_MS | dict.fromkeys((f"head-{name}" for name in small_network.HEADS), 1.0)
    entries = {
        (name, "fp32"): Latency(name, "", "fp32", ms, ms, ms, ms, 2 * ms, 9, "measured") for name, ms in costs.items()
    }
    return LatencyTable("host", "onnxruntime", "1.0", "f" * 64, {"cores": "2"}, "measured", entries)


def statistics() -> ExitStatistics:
    """Four images; 24 cells. The first two leave at exit 1 (cut 18 in row 2)."""
    counts = np.zeros((4, 2, 4), np.int32)
    counts[:, 0, 2] = [24, 18, 17, 0]
    counts[:, 1, 2] = [1, 2, 12, 23]
    pixels = np.ones((4, 2, 3), np.int64)
    return ExitStatistics(
        heads=small_network.HEADS,
        classes=small_network.CLASSES,
        cells=(24, 24),
        thresholds=small_network.thresholds(),
        counts=counts,
        intersection=pixels,
        predicted=pixels,
        labelled=np.ones((4, 3), np.int64),
        image_id=("a", "b", "c", "d"),
        group=("", "", "", ""),
        network="f" * 64,
        gate=small_network.plan().gate,
        precision="fp32",
        device="host",
        library="onnxruntime",
        split="val",
    )


def test_the_stages_costs_add_up_to_the_plans_path(tmp_path: Path) -> None:
    graphs = small_network.graph_set(tmp_path)
    found = device_costs(small_network.plan(18), graphs, table(), None)
    first, last = found.costs
    assert (first.mean_ms, first.report_mean_ms) == pytest.approx((4 + 1 + 0.03, 0.5 + 0.125))
    assert (last.mean_ms, last.report_mean_ms) == pytest.approx((8 + 1, 0.5 + 0.125))
    assert (first.p99_ms, last.p99_ms) == pytest.approx((2 * 5.03, 2 * 9.03))
    assert (first.report_p99_ms, found.upload_mean_ms, found.upload_p99_ms) == pytest.approx((1.25, 0.25, 0.5))
    assert found.confidence == ((), ())
    assert found.environment == {"cores": "2", "library_version": "1.0"}


def test_confidence_is_of_the_images_that_reached_the_exit(tmp_path: Path) -> None:
    graphs = small_network.graph_set(tmp_path)
    found = device_costs(small_network.plan(18), graphs, table(), statistics())
    assert found.confidence[0] == (1, 0, 0, 0, 0, 0, 0, 2, 0, 1)  # shares 0, 17/24, 18/24 and 1
    assert found.confidence[1] == (0, 0, 0, 0, 0, 1, 0, 0, 0, 1)  # 12/24 and 23/24


def test_in_the_anytime_setting_every_image_reaches_every_exit(tmp_path: Path) -> None:
    graphs = small_network.graph_set(tmp_path)
    found = device_costs(small_network.plan(None, setting="anytime"), graphs, table(), statistics())
    assert [sum(bins) for bins in found.confidence] == [4, 4]
    assert found.costs[0].mean_ms == pytest.approx(5.0)  # nothing is decided
