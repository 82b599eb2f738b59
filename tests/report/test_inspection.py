"""Whoever chooses exit points sees what a cut there carries, and how many bytes that is."""

from __future__ import annotations

from pathlib import Path

from mess_compile.report.inspection import inspect_candidate, inspect_graphs
from tests import skips, small_network


def test_inspect_shows_what_every_exit_point_carries_and_its_bytes(tmp_path: Path) -> None:
    found = inspect_graphs(skips.imported(tmp_path))
    image, exit1, exit2, exit3, skip1 = 1152, 8 * 96 * 4, 12 * 24 * 4, 12 * 24 * 4, 12 * 96 * 4
    points = found.content["exit_points"]
    assert [[tensor["name"] for tensor in point["carried"]] for point in points] == [
        ["image"],
        ["exit1", "image"],
        ["skip1", "image"],
    ]
    assert [point["frontier_bytes"] for point in points] == [
        exit1 + image,
        exit2 + exit1 + image,
        exit3 + skip1 + image,
    ]
    table = found.tables[0]
    assert table.header[-2:] == ("alive KiB", "carried besides the map")
    assert [row[-2:] for row in table.rows] == [
        ("4", "image (1 KiB)"),
        ("5", "exit1 (3 KiB), image (1 KiB)"),
        ("7", "skip1 (4 KiB), image (1 KiB)"),
    ]


def test_a_chain_has_no_column_of_carried_tensors() -> None:
    found = inspect_candidate(small_network.candidate())
    assert [point["frontier_bytes"] for point in found.content["exit_points"]] == [4 * 24 * 4] * 2
    assert "carried besides the map" not in found.tables[0].header
