"""Learns to tell from a gate's counts whether an image's labels at an exit are about as right as at the last exit.

A logistic regression with few features, rounded to integers, and an isotonic table from its score to 0..HIGHEST, so
that every processor computes the same (Platt, 1999; Zadrozny and Elkan, 2002: calibration of scores).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mess_compile.array_types import Floats, Ints, Mask
from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.runtime.base.policy import HIGHEST, MOST_WEIGHT, counts_of_features

WITHIN_PP = (0.5, 1.0, 2.0)
"""An image is easy whose pixel accuracy is within so many percentage points of the last exit's: a row for each."""
FOLDS = 5
LEAST_OF_A_KIND = 5
"""With fewer images that are easy, or that are not, there is nothing to learn."""
STEPS = 24
_PENALTIES = (3.0, 30.0, 300.0)
"""Of the squared weights of standardised features, beside a log-likelihood summed over images."""
_ITERATIONS = 30


@dataclass(frozen=True)
class LearnedGate:
    """The numbers of a learned row: see `PolicyRow`."""

    feature_weights: tuple[int, ...]
    steps: tuple[int, ...]
    levels: tuple[int, ...]

    def levels_of(self, features: Ints) -> Ints:
        """The level (n,) of images with `features` (n, features)."""
        scores = features @ np.array(self.feature_weights, np.int64)
        found: Ints = np.array(self.levels, np.int64)[np.searchsorted(np.array(self.steps, np.int64), scores, "right")]
        return found


@dataclass(frozen=True, eq=False)
class Learned:
    """The `gate` that is fitted to all images, and the levels (n,) of each by a gate fitted to others: out of fold."""

    gate: LearnedGate
    levels: Ints


def pixel_accuracies(statistics: ExitStatistics, head: str) -> Floats:
    """The percentage (n,) of each image's labelled pixels that are right at `head`; 0 without labelled pixels."""
    right = np.asarray(statistics.intersection[:, statistics.head_index(head)]).sum(axis=1)
    labelled = np.asarray(statistics.labelled).sum(axis=1)
    found: Floats = 100 * right / np.maximum(1, labelled)
    return found


def easy_images(statistics: ExitStatistics, head: str, final: str, within_pp: float) -> Mask:
    """The images (n,) whose pixel accuracy at `head` is within so many points of that at `final`."""
    easy: Mask = pixel_accuracies(statistics, head) >= pixel_accuracies(statistics, final) - within_pp
    return easy


def features_of(statistics: ExitStatistics, head: str) -> Ints:
    """The features (n, features) of each image at a head, of an evaluation with counts by class."""
    assert statistics.class_counts is not None, "counts by class were checked for"
    counts = np.asarray(statistics.class_counts[:, statistics.head_index(head)]).astype(np.int64)
    which = counts_of_features(*statistics.thresholds.shape)
    features: Ints = counts.reshape(len(counts), -1) @ which.reshape(len(which), -1).T
    return features


def learned(features: Ints, easy: Mask, groups: Sequence[str]) -> Learned | None:
    """Learn which images (n,) are easy by their `features` (n, features); images of a group share a fold.

    None where there is nothing to learn: too few images of a kind, or no feature that tells them apart out of fold.
    """
    folds = folds_of(groups)
    others = [np.flatnonzero(folds != fold) for fold in np.unique(folds)]
    if any(min(easy[rows].sum(), (~easy[rows]).sum()) < LEAST_OF_A_KIND for rows in others):
        return None
    penalty = min(_PENALTIES, key=lambda each: _loss_out_of_fold(features, easy, folds, each))
    levels = np.zeros(len(easy), np.int64)
    for fold in np.unique(folds):
        gate = _fitted(features[folds != fold], easy[folds != fold], penalty)
        levels[folds == fold] = gate.levels_of(features[folds == fold])
    if len(np.unique(levels)) == 1:
        return None
    return Learned(_fitted(features, easy, penalty), levels)


def folds_of(groups: Sequence[str]) -> Ints:
    """A fold (n,) for each image: whole groups in turn, or where there are fewer than FOLDS, blocks of images in
    order."""
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    if len(names) < FOLDS:
        return np.arange(len(groups)) * FOLDS // len(groups)
    return np.array([names[group] % FOLDS for group in groups], np.int64)


def _loss_out_of_fold(features: Ints, easy: Mask, folds: Ints, penalty: float) -> float:
    loss = 0.0
    for fold in np.unique(folds):
        scores = _logistic(features[folds != fold], easy[folds != fold], penalty)(features[folds == fold])
        signs = np.where(easy[folds == fold], 1.0, -1.0)
        loss += float(np.logaddexp(0, -signs * scores).sum())
    return loss


@dataclass(frozen=True, eq=False)
class _Logistic:
    weights: Floats
    bias: float

    def __call__(self, features: Ints) -> Floats:
        """The log odds (n,) that images are easy."""
        odds: Floats = features @ self.weights + self.bias
        return odds


def _logistic(features: Ints, easy: Mask, penalty: float) -> _Logistic:
    """Newton's method on standardised features; the bias is not penalised."""
    mean, spread = features.mean(axis=0), features.std(axis=0)
    scaled = np.where(spread > 0, (features - mean) / np.where(spread > 0, spread, 1.0), 0.0)
    design = np.concatenate([scaled, np.ones((len(scaled), 1))], axis=1)
    ridge = np.diag([penalty] * scaled.shape[1] + [1e-6])
    weights = np.zeros(design.shape[1])
    for _ in range(_ITERATIONS):
        odds = np.clip(design @ weights, -30, 30)
        likely = 1 / (1 + np.exp(-odds))
        gradient = design.T @ (likely - easy) + ridge @ weights
        curvature = (design * (likely * (1 - likely))[:, None]).T @ design + ridge
        step = np.linalg.solve(curvature, gradient)
        weights = weights - step
        if np.abs(step).max() < 1e-5:
            break
    plain = np.where(spread > 0, weights[:-1] / np.where(spread > 0, spread, 1.0), 0.0)
    return _Logistic(plain, float(weights[-1] - plain @ mean))


def _fitted(features: Ints, easy: Mask, penalty: float) -> LearnedGate:
    model = _logistic(features, easy, penalty)
    largest = np.abs(model.weights).max()
    scale = (MOST_WEIGHT - 1) / largest if largest > 0 else 0.0
    weights = np.rint(model.weights * scale).astype(np.int64)
    scores = features @ weights
    places, levels = _isotonic(scores, easy)
    found = np.unique(np.rint(np.quantile(scores, np.linspace(0, 1, STEPS + 2)[1:-1])).astype(np.int64))
    at = np.interp(np.concatenate([[scores.min()], found]).astype(np.float64), places, levels)
    rounded = np.maximum.accumulate(np.rint(HIGHEST * at).astype(np.int64))
    rises = np.flatnonzero(np.diff(rounded) > 0)
    return LearnedGate(
        tuple(weights.tolist()),
        tuple(found[rises].tolist()),
        (int(rounded[0]), *(int(level) for level in rounded[rises + 1])),
    )


def _isotonic(scores: Ints, easy: Mask) -> tuple[Floats, Floats]:
    """Centred isotonic regression: the mean score and the share of easy images of each block, both rising.

    Blocks of neighbours are pooled until shares rise (pool adjacent violators); images of equal score are one block.
    """
    blocks: list[list[float]] = []  # images, sum of scores, easy ones
    values, place, images = np.unique(scores, return_inverse=True, return_counts=True)
    right = np.bincount(place, weights=easy)
    for value, number, good in zip(values.tolist(), images.tolist(), right.tolist(), strict=True):
        blocks.append([float(number), float(value) * number, good])
        while len(blocks) > 1 and blocks[-2][2] * blocks[-1][0] >= blocks[-1][2] * blocks[-2][0]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    table = np.array(blocks)
    return table[:, 1] / table[:, 0], table[:, 2] / table[:, 0]
