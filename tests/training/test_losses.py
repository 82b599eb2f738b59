"""The loss decides what early exits learn: held against the formulas, in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mess_compile.runtime.base.errors import InputError
from mess_compile.training import losses
from mess_compile.training.recipe import Distillation

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
    hard = losses.hard_targets(torch.from_numpy(LABELS)[None], torch.from_numpy(WEIGHTS).float(), 5)
    targets = losses.distilled(hard, torch.from_numpy(TEACHER)[None].float(), Distillation(kind, alpha, temperature))
    loss = losses.loss_of(torch.from_numpy(HEAD)[None].float(), targets)
    assert loss.item() == pytest.approx(by_hand(kind, alpha, temperature), rel=1e-5)


def test_a_teacher_that_is_wrong_everywhere_teaches_nothing() -> None:
    wrong = np.zeros((3, 2, 3))
    for y in range(2):
        for x in range(3):
            wrong[(int(LABELS[y, x]) + 1) % 3, y, x] = 9.0
    targets = losses.hard_targets(torch.from_numpy(LABELS)[None], torch.ones(3), 5)
    taught = losses.distilled(targets, torch.from_numpy(wrong)[None].float(), Distillation("pfd", 0.4))
    head = torch.from_numpy(HEAD)[None].float()
    assert losses.loss_of(head, taught).item() == pytest.approx(0.6 * losses.loss_of(head, targets).item())


def test_the_loss_is_taken_at_label_resolution() -> None:
    logits = torch.randn(1, 3, 2, 3)
    labels = torch.randint(0, 3, (1, 8, 12), dtype=torch.uint8)
    full = torch.nn.functional.interpolate(logits, (8, 12), mode="bilinear", align_corners=False)
    expected = torch.nn.functional.cross_entropy(full, labels.long())
    assert losses.loss_of(logits, losses.hard_targets(labels, torch.ones(3), 96)).item() == pytest.approx(
        expected.item()
    )


def test_rare_classes_weigh_more_within_bounds() -> None:
    weights = losses.class_weights(np.array([10_000, 100, 1]), 0.5)
    assert weights[0] < weights[1] < weights[2]
    assert weights[2] / weights[0] == pytest.approx(3.0 / 0.5)
    assert torch.allclose(losses.class_weights(np.array([10_000, 100, 1]), 0.0), torch.ones(3))


def test_labels_at_cells_are_those_in_the_middle_of_the_cells() -> None:
    labels = torch.arange(12 * 16, dtype=torch.uint8).view(1, 12, 16)
    cells = losses.at_cells(labels, 8)
    assert cells.tolist() == [
        [[int(labels[0, 3, 4]), int(labels[0, 3, 12])], [int(labels[0, 9, 4]), int(labels[0, 9, 12])]]
    ]


def jaccard_extension(p: Array, truth: NDArray[np.int64]) -> float:
    """Lovasz extension of the Jaccard loss by its definition: sum of sorted errors times the loss's increments."""
    values = []
    for k in np.unique(truth):
        foreground = truth == k
        errors = np.where(foreground, 1 - p[:, k], p[:, k])
        order = np.argsort(-errors, kind="stable")
        before, total = 0.0, 0.0
        for i in range(1, len(order) + 1):
            wrong = np.zeros(len(truth), bool)
            wrong[order[:i]] = True  # mispredicted pixels so far
            hit = (foreground & ~wrong).sum()
            loss = 1 - hit / (foreground | (wrong & ~foreground)).sum()
            total += errors[order[i - 1]] * (loss - before)
            before = loss
        values.append(total)
    return float(np.mean(values))


@pytest.mark.parametrize("seed", range(5))
def test_lovasz_is_the_extension_of_the_jaccard_loss(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, 2, (1, 3, 4, 5)), rng.integers(0, 3, (1, 4, 5))
    p = torch.from_numpy(logits).softmax(1)
    expected = jaccard_extension(p[0].reshape(3, -1).T.numpy(), labels.ravel())
    assert losses.lovasz_softmax(p, torch.from_numpy(labels)).item() == pytest.approx(expected)


def test_lovasz_ignores_void_and_survives_a_batch_without_labels() -> None:
    p = torch.randn(1, 3, 4, 5).softmax(1)
    labels = torch.randint(0, 3, (1, 4, 5))
    labels[0, :2] = 255
    assert losses.lovasz_softmax(p, labels).item() == pytest.approx(
        losses.lovasz_softmax(p[:, :, 2:], labels[:, 2:]).item()
    )
    assert losses.lovasz_softmax(p, torch.full((1, 4, 5), 255)).item() == 0


@pytest.mark.parametrize("wrong", [("x", 0.5, 1.0), ("kd", 1.5, 1.0), ("kd", 0.5, 0.0)])
def test_impossible_distillation_is_refused(wrong: tuple[str, float, float]) -> None:
    with pytest.raises(InputError):
        Distillation(*wrong)
