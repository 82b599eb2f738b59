"""The loss decides what early exits learn: held against the formulas, in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mess_compile.runtime.errors import InputError
from mess_compile.training import losses
from mess_compile.training.losses import Distillation

RNG = np.random.default_rng(0)
Array = NDArray[np.float64]
LABELS = np.array([[0, 1, 2], [2, 255, 1]], np.uint8)
WEIGHTS = np.array([0.5, 1.0, 2.0])
TEACHER = RNG.normal(0, 3, (3, 2, 3))
HEAD = RNG.normal(0, 3, (3, 2, 3))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(0))
    return e / e.sum(0)


def by_hand(kind: str, alpha: float, temperature: float) -> float:
    """The formula per pixel, written out, with the teacher's entropy (a constant) taken off the divergence."""
    total, pixels = 0.0, 0
    for y in range(2):
        for x in range(3):
            label = int(LABELS[y, x])
            if label == 255:
                continue
            pixels += 1
            ce = -WEIGHTS[label] * np.log(softmax(HEAD[:, y, x])[label])
            taught = kind == "kd" or (kind == "pfd" and TEACHER[:, y, x].argmax() == label)
            q, p = softmax(TEACHER[:, y, x] / temperature), softmax(HEAD[:, y, x] / temperature)
            divergence = temperature**2 * -(q * np.log(p)).sum()
            total += ce if kind == "none" else (1 - alpha) * ce + alpha * taught * divergence
    return total / pixels


@pytest.mark.parametrize("kind", ["pfd", "kd", "none"])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 1.0), (0.3, 1.0), (0.7, 2.5)])
def test_distillation_is_the_formula(kind: str, alpha: float, temperature: float) -> None:
    targets = losses.distilled_targets(
        torch.from_numpy(LABELS)[None],
        torch.from_numpy(TEACHER)[None].float(),
        torch.from_numpy(WEIGHTS).float(),
        Distillation(kind, alpha, temperature),
    )
    loss = losses.loss_of(torch.from_numpy(HEAD)[None].float(), targets)
    assert loss.item() == pytest.approx(by_hand(kind, alpha, temperature), rel=1e-5)


def test_a_teacher_that_is_wrong_everywhere_teaches_nothing() -> None:
    wrong = np.zeros((3, 2, 3))
    for y in range(2):
        for x in range(3):
            wrong[(int(LABELS[y, x]) + 1) % 3, y, x] = 9.0
    weights, labels = torch.ones(3), torch.from_numpy(LABELS)[None]
    targets = losses.distilled_targets(labels, torch.from_numpy(wrong)[None].float(), weights, Distillation("pfd", 0.4))
    assert torch.allclose(targets.hard, 0.6 * losses.hard_targets(labels, weights).hard)


def test_the_loss_is_taken_at_label_resolution() -> None:
    logits = torch.randn(1, 3, 2, 3)
    labels = torch.randint(0, 3, (1, 8, 12), dtype=torch.uint8)
    full = torch.nn.functional.interpolate(logits, (8, 12), mode="bilinear", align_corners=False)
    expected = torch.nn.functional.cross_entropy(full, labels.long())
    assert losses.loss_of(logits, losses.hard_targets(labels, torch.ones(3))).item() == pytest.approx(expected.item())


def test_rare_classes_weigh_more_within_bounds() -> None:
    counts = np.zeros(256, np.int64)
    counts[:3] = 10_000, 100, 1
    counts[255] = 500
    weights = losses.class_weights([counts], 3)
    assert weights[0] < weights[1] < weights[2]
    assert weights[2] / weights[0] == pytest.approx(3.0 / 0.5)


@pytest.mark.parametrize("wrong", [("x", 0.5, 1.0), ("kd", 1.5, 1.0), ("kd", 0.5, 0.0)])
def test_impossible_distillation_is_refused(wrong: tuple[str, float, float]) -> None:
    with pytest.raises(InputError):
        Distillation(*wrong)
