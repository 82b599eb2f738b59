"""The paper's results on MS-COCO (21 classes), for orientation beside a front: only ratios carry over to other data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """`miou_pp` is the difference to the row's own baseline; the ratios are baseline over row."""

    row: str
    network: str
    device: str
    requirement: str
    miou_pp: float
    latency_ratio: float
    workload_ratio: float


_BASELINES = {"ResNet-50": (59.02, 138.63, 39.96, "GTX"), "MobileNetV2": (54.24, 8.78, 67.04, "Xavier AGX")}
"""mIoU in percent, GMACs, ms, device. Source: the MobiSys'22 poster, rows i and v."""
_ROWS = (
    ("ii", "ResNet-50", "least error, workload ≤ 1x", 64.35, 113.65, 37.53),
    ("iii", "ResNet-50", "error ≤ 0.1 %", 58.91, 41.17, 17.92),
    ("iv", "ResNet-50", "error ≤ 1 %", 58.12, 34.53, 15.11),
    ("vi", "MobileNetV2", "least error, workload ≤ 1x", 57.49, 8.10, 56.05),
    ("vii", "MobileNetV2", "error ≤ 0.1 %", 54.18, 4.05, 40.97),
    ("viii", "MobileNetV2", "error ≤ 1 %", 53.24, 3.48, 38.83),
)


def paper_rows() -> tuple[PaperRow, ...]:
    """The multi-exit rows of the paper's table, each against its baseline."""
    found = []
    for row, network, requirement, miou, gmacs, latency_ms in _ROWS:
        baseline_miou, baseline_gmacs, baseline_ms, device = _BASELINES[network]
        ratios = baseline_ms / latency_ms, baseline_gmacs / gmacs
        found.append(PaperRow(row, network, device, requirement, miou - baseline_miou, *ratios))
    return tuple(found)
