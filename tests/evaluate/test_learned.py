"""A learned gate is arithmetic on integers, and its figures are of images that it was not fitted to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile.evaluate.diagnose import auroc
from mess_compile.evaluate.learned import _isotonic, easy_images, folds_of, learned
from mess_compile.evaluate.policies import with_policies, with_rows
from mess_compile.evaluate.statistics import ExitStatistics
from tests.search.cases import by_class, candidate_network, exit_statistics, graph_set

GRAPHS = graph_set(candidate_network((1, 1)), rows=4)


def drawn(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of which one tells easy images apart, with noise."""
    rng = np.random.default_rng(seed)
    features = rng.integers(0, 400, (images, 6))
    return features, features[:, 2] + rng.normal(0, 60, images) > 200


def test_what_tells_images_apart_is_learned_out_of_fold() -> None:
    features, easy = drawn(200)
    found = learned(features, easy, [f"image{i}" for i in range(200)])
    best = auroc(easy, features[:, [2]])[0]
    assert auroc(easy, found.levels[:, None])[0] > best - 0.04
    new, truth = drawn(500, seed=1)
    assert auroc(truth, found.gate.levels_of(new)[:, None])[0] > best - 0.06


def test_a_level_is_about_the_chance_that_an_image_is_easy() -> None:
    features, easy = drawn(2000)
    found = learned(features, easy, [f"image{i}" for i in range(2000)])
    new, truth = drawn(4000, seed=1)
    levels = found.gate.levels_of(new)
    for low in range(0, 1000, 250):
        here = (levels >= low) & (levels < low + 250)
        assert abs(truth[here].mean() - levels[here].mean() / 1000) < 0.1


def test_noise_learns_nothing_that_holds_out_of_fold() -> None:
    rng = np.random.default_rng(3)
    features, easy = rng.integers(0, 400, (120, 30)), rng.random(120) > 0.5
    found = learned(features, easy, [f"image{i}" for i in range(120)])
    assert found is None or abs(auroc(easy, found.levels[:, None])[0] - 0.5) < 0.15


@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_images_alike_teach_nothing(share: float) -> None:
    features = np.random.default_rng(0).integers(0, 400, (100, 6))
    assert learned(features, np.arange(100) < 100 * share, [f"image{i}" for i in range(100)]) is None


def test_weights_are_integers_and_levels_rise() -> None:
    gate = learned(*drawn(200), ["drive"] * 200).gate
    assert all(type(weight) is int and abs(weight) <= 1 << 24 for weight in gate.feature_weights)
    assert list(gate.steps) == sorted(set(gate.steps))
    assert list(gate.levels) == sorted(set(gate.levels))
    assert (len(gate.levels), gate.levels[0] >= 0, gate.levels[-1] <= 1000) == (len(gate.steps) + 1, True, True)
    assert len(gate.levels) <= 25


def test_groups_are_not_torn_apart() -> None:
    groups = [f"drive{i % 7}" for i in range(70)]
    folds = folds_of(groups)
    assert len({(group, fold) for group, fold in zip(groups, folds.tolist(), strict=True)}) == 7
    assert len(set(folds.tolist())) == 5
    assert folds_of(["one"] * 10).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=12))
def test_shares_are_those_of_the_rising_curve_that_fits_best(pairs: list[tuple[int, bool]]) -> None:
    """Against the min-max formula of isotonic regression."""
    scores, easy = (np.array(values) for values in zip(*pairs, strict=True))
    places, shares = _isotonic(scores, easy)
    assert (np.diff(places) > 0).all()
    known = np.unique(scores).tolist()
    fitted = []
    for index in range(len(known)):
        best = -1.0
        for start in range(index + 1):
            best = max(
                best,
                min(easy[(scores >= known[start]) & (scores <= known[end])].mean() for end in range(index, len(known))),
            )
        fitted.append(round(best, 9))
    assert sorted(set(fitted)) == sorted({round(share, 9) for share in shares.tolist()})


def recorded() -> ExitStatistics:
    return by_class(exit_statistics(GRAPHS, 120, seed=4, distinct=40), 4)


def test_tuning_images_have_levels_of_other_folds_and_new_ones_those_that_ship() -> None:
    found = recorded()
    made = with_policies(found, ("plain", "learned"))
    rows = [row for row in made.policy_rows if row.policy == "learned"]
    assert rows
    shipped = with_rows(found, made.policy_rows)
    assert {row.head for row in rows} <= set(found.heads[:2]), "the last exit decides nothing"
    columns = [(found.heads.index(row.head), row.row) for row in rows]
    assert any((made.counts[:, head, row] != shipped.counts[:, head, row]).any() for head, row in columns)
    assert all(0 <= made.counts[:, head, row].min() <= made.counts[:, head, row].max() <= 1000 for head, row in columns)


def test_an_image_is_easy_within_points_of_the_last_exit() -> None:
    found = recorded()
    first, last = (
        found.intersection[:, index].sum(axis=1) / np.maximum(1, found.labelled.sum(axis=1)) for index in (0, 2)
    )
    wanted = [bool(100 * a >= 100 * b - 2) for a, b in zip(first, last, strict=True)]
    assert easy_images(found, found.heads[0], found.heads[2], 2.0).tolist() == wanted
