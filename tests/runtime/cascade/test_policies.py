"""A policy decides on the device as in the search: a user would else get other exits than those that were planned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from mess_compile import runtime
from mess_compile.bundle import single_file
from mess_compile.network import GraphSet
from mess_compile.runtime.base.errors import BundleError
from mess_compile.runtime.base.policy import PolicyRow
from mess_compile.runtime.bundle.manifest import Manifest, manifest_from_json, manifest_to_json
from mess_compile.runtime.images.confidence import exit_text
from mess_compile.runtime.serve.verify import verify
from mess_compile.search.plan import Plan, default_point
from tests import skips, small_network

THRESHOLDS = skips.GATE.thresholds
CLASS = PolicyRow("exit1.small", 4, "class", "class 0.45", (2, 0, 1, 3))
AGREEMENT = PolicyRow("exit1.small", 5, "agreement", "agreement")
WEIGHTS = (3, -20, 7, 11, -5, 2, -9, 4, 1, 8, -6, 10, -3)
LEARNED = PolicyRow("exit2.small", 4, "learned", "learned 1 pp", (), WEIGHTS, (-300, -220, -150), (40, 300, 700, 1000))


def counts_of(head: str, image: np.ndarray) -> np.ndarray:
    """Counts by class, (T + 2, K), cell by cell from the network run whole."""
    logits = skips.tensors(image)[f"logits:{head}"][0].astype(np.float64)
    odds = np.exp(logits - logits.max(axis=0))
    sure, label = (odds / odds.sum(axis=0)).max(axis=0), logits.argmax(axis=0)
    counts = np.zeros((len(THRESHOLDS) + 2, skips.CLASSES), int)
    for y, x in np.ndindex(label.shape):
        around = label[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        passed = [sure[y, x] >= threshold for threshold in THRESHOLDS]
        counts[:, label[y, x]] += [*passed, len(np.unique(around)) > 1, True]
    return counts


def class_value(counts: np.ndarray) -> int:
    return int(counts[2, 0] + counts[0, 1] + counts[1, 2] + counts[3, 3])


def agreement_value(counts: np.ndarray) -> int:
    return int(counts[-1].sum() - counts[-2].sum())


def learned_value(counts: np.ndarray) -> int:
    features = [*counts[:4].sum(axis=1), counts[4].sum(), *counts[5], *counts[2]]
    score = sum(int(feature) * weight for feature, weight in zip(features, WEIGHTS, strict=True))
    return [40, 300, 700, 1000][sum(score >= step for step in (-300, -220, -150))]


VALUES: dict[str, Callable[[np.ndarray], int]] = {
    "class": class_value,
    "agreement": agreement_value,
    "learned": learned_value,
}


def planned(graphs: GraphSet, first: PolicyRow, cuts: tuple[int, int]) -> Plan:
    known = skips.plan(graphs, cuts=cuts)
    stages = tuple(
        dataclasses.replace(stage, row=row) for stage, row in zip(known.stages, (first.row, 4, 1), strict=True)
    )
    points = (default_point(stages, known.predicted),)
    return dataclasses.replace(known, stages=stages, operating_points=points, policy_rows=(first, LEARNED))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> GraphSet:
    return skips.imported(tmp_path_factory.mktemp("skips"))


def bundled(folder: Path, graphs: GraphSet, first: PolicyRow, cuts: tuple[int, int]) -> Path:
    of = planned(graphs, first, cuts)
    part = small_network.write.Part(graphs, of, small_network.measurements(3))
    frames = [skips.frame(seed) for seed in range(8)]
    small_network.write.write_bundle(folder / "skips.mess", [part], frames, {})
    return folder / "skips.mess"


@pytest.mark.parametrize("first", [CLASS, AGREEMENT])
def test_images_leave_by_the_integers_of_their_policies(tmp_path: Path, graphs: GraphSet, first: PolicyRow) -> None:
    """In the cascade, in its refinement, in the single file; and the golden frames verify."""
    images = [skips.frame(seed) for seed in range(24)]
    values = [[VALUES[row.policy](counts_of(row.head, image)) for image in images] for row in (first, LEARNED)]
    cuts = int(np.quantile(values[0], 0.6)), int(np.quantile(values[1], 0.5))
    wanted = [1 if a >= cuts[0] else 2 if b >= cuts[1] else 3 for a, b in zip(*values, strict=True)]
    assert set(wanted) == {1, 2, 3}
    path = bundled(tmp_path, graphs, first, cuts)
    single_file.write_single_file(path, "host:fp32", tmp_path / "skips.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "skips.onnx")
    with runtime.load(path) as cascade:
        for image, exit_, found in zip(images, wanted, zip(*values, strict=True), strict=True):
            prediction = cascade(image)
            assert prediction.exit == exit_
            assert session.run(["exit"], {"image": image[None]})[0].tolist() == [exit_]
            refined = list(cascade.refine(image))
            assert [each.policy for each in refined] == [first.policy, "learned", "plain"]
            shares = [found[0] / 96, found[1] / 1000]
            assert [each.confidence for each in refined[:2]] == shares
            assert refined[1].needed == cuts[1] / 1000
            if exit_ < 3:
                (confidence,) = session.run(["confidence"], {"image": image[None]})[0]
                assert confidence == pytest.approx(shares[exit_ - 1])
        checks = verify(cascade, float("inf"))
        assert all(check.passed for check in checks)


def test_what_a_policy_compares_is_said() -> None:
    assert exit_text(2, 0.7, 0.3, "learned") == "stage 2, learned score 70 % (needs 30 %)"
    assert exit_text(1, 0.7, None, "agreement") == "stage 1, agreeing cells 70 %"
    assert exit_text(1, 0.7, 0.3, "class") == "stage 1, confident cells 70 % (needs 30 %)"


@pytest.mark.parametrize(
    ("row", "key", "value", "words"),
    [
        (0, "class_rows", [2, 0, 1], "class_rows is .*, not 4 numbers below 4"),
        (0, "class_rows", [2, 0, 1, 4], "class_rows is .*, not 4 numbers below 4"),
        (0, "row", 3, "row is 3, not after the thresholds"),
        (0, "row", 26, "row is 26, not after the thresholds"),
        (0, "policy", "plain", "policy is 'plain', not one of class, learned, agreement"),
        (1, "feature_weights", [1, 2], "feature_weights is .*, not 13 integers"),
        (1, "feature_weights", [1 << 30] * 13, "feature_weights is .*, not 13 integers"),
        (1, "steps", [-220, -300, -150], "steps is .*, not ascending integers"),
        (1, "levels", [40, 300, 700], "levels is .*, not rising integers from 0 to 1000"),
        (1, "levels", [40, 300, 700, 1001], "levels is .*, not rising integers from 0 to 1000"),
        (1, "head", "exit9.x", "row is 4"),
    ],
)
def test_a_policy_that_the_gate_cannot_give_is_refused(
    graphs: GraphSet, tmp_path: Path, row: int, key: str, value: Any, words: str
) -> None:
    """A learned gate of other statistics, among others."""
    with pytest.raises(BundleError, match=words):
        manifest_from_json(json.dumps(changed(manifest(graphs, tmp_path), row, key, value)))


def test_policies_need_a_gate_that_counts_by_class(graphs: GraphSet, tmp_path: Path) -> None:
    content = json.loads(manifest_to_json(manifest(graphs, tmp_path)))
    content["gate"]["by_class"] = False
    with pytest.raises(BundleError, match="has policy_rows, and its gate does not count by class"):
        manifest_from_json(json.dumps(content))


def manifest(graphs: GraphSet, folder: Path) -> Manifest:
    with runtime.load(bundled(folder, graphs, CLASS, (50, 300))) as cascade:
        return cascade.manifest


def changed(known: Manifest, row: int, key: str, value: Any) -> Any:
    content = json.loads(manifest_to_json(known))
    content["plans"][0]["policy_rows"][row][key] = value
    return content
