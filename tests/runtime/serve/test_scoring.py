"""A score from a device is what it computed for that image; anything else is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from mess_compile.runtime.base.decode import DecodeError
from mess_compile.runtime.engines.engine import TensorSpec
from mess_compile.runtime.engines.engine_fake import FakeGraph, FakeLibrary
from mess_compile.runtime.measure.measure import Effort
from mess_compile.runtime.serve import scoring, worker
from mess_compile.runtime.serve.scoring import (
    IGNORED,
    HeadEngines,
    Score,
    ScoredExits,
    open_scorer,
    score_from_message,
    score_predictions,
    score_to_message,
)

EXITS = ScoredExits(
    (2, 2),
    3,
    ((0, 1, "to1"), (0, 2, "to2")),
    (HeadEngines("head1", 1, "output"), HeadEngines("head2", 2, "output")),
    "alone",
)
ROWS = 2
LABELS = np.array([[0, 1, 2, IGNORED], [0, 0, 1, IGNORED]], np.uint8)
BLOCK = "f" * 64


def guess(value: int) -> NDArray[np.uint8]:
    return np.full((2, 2), value, np.uint8)


def example() -> Score:
    guesses = [(np.array([3, 1], np.int32), guess(0)), (np.array([4, 2], np.int32), guess(1)), (None, guess(2))]
    return score_predictions(guesses, LABELS, LABELS != IGNORED, 3)


def read(content: Any) -> Score:
    return score_from_message(content, BLOCK, 7, np.array([3, 2, 1]), EXITS, ROWS)


def test_pixels_are_counted_at_the_size_of_the_labels() -> None:
    """By hand: of six labelled pixels three are of class 0, two of class 1, one of class 2."""
    found = example()
    assert found.counts.tolist() == [[3, 1], [4, 2]]
    assert found.intersection.tolist() == [[3, 0, 0], [0, 2, 0], [0, 0, 1]]
    assert found.predicted.tolist() == [[6, 0, 0], [0, 6, 0], [0, 0, 6]]
    assert found.labelled.tolist() == [3, 2, 1]
    assert {found.intersection.dtype, found.predicted.dtype, found.labelled.dtype} == {np.dtype(np.int64)}


def fake_library() -> FakeLibrary:
    """Exit k adds k to the image; head k says how many values there are, and the largest as the label everywhere."""
    image, labels = TensorSpec("image", "uint8", (1, 2, 2, 3)), TensorSpec("labels", "uint8", (1, 2, 2))
    thresholds, logits = TensorSpec("thresholds", "float32", (ROWS, 3)), TensorSpec("logits", "uint8", (1, 2, 2, 3))
    counts = TensorSpec("counts", "int32", (ROWS,))
    points = {k: TensorSpec(f"exit{k}", "uint8", (1, 2, 2, 3)) for k in (1, 2)}

    def head(k: int) -> FakeGraph:
        def compute(feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            values = feeds[f"exit{k}"]
            return {"logits": values, "counts": (values.size * feeds["thresholds"][:, 0]).astype(np.int32)}

        return FakeGraph((points[k], thresholds), (logits, counts), compute)

    def segment(k: int) -> FakeGraph:
        return FakeGraph((image,), (points[k],), lambda feeds: {f"exit{k}": feeds["image"] + np.uint8(k)})

    def output(name: str) -> FakeGraph:
        spec = image if name == "image" else logits
        return FakeGraph((spec,), (labels,), lambda feeds: {"labels": feeds[name].max(axis=3)})

    graphs = {f"head{k}": head(k) for k in (1, 2)} | {f"to{k}": segment(k) for k in (1, 2)}
    return FakeLibrary({**graphs, "output": output("logits"), "alone": output("image")})


def test_every_engine_runs_once_and_outputs_are_read_before_they_are_overwritten() -> None:
    library = fake_library()
    paths = {name: Path(f"{name}.engine") for name in EXITS.engines}
    thresholds = np.array([[0.5] * 3, [0.25] * 3], np.float32)
    with open_scorer(EXITS, paths, library, thresholds) as scorer:
        made = list(scorer.run(np.zeros((2, 2, 3), np.uint8)))
        assert library.held == len(EXITS.engines) == 6
    assert [None if counts is None else counts.tolist() for counts, _ in made] == [[6, 3], [6, 3], None]
    assert [labels.tolist() for _, labels in made] == [guess(1).tolist(), guess(2).tolist(), guess(0).tolist()]
    runs = [name for verb, name in library.log if verb == "run"]
    assert runs == ["to1", "to2", "head1", "output", "head2", "output", "alone"]
    assert library.held == 0, "closed again"


@given(
    st.lists(
        st.tuples(
            arrays.arrays(np.uint8, (2, 3, 3)),
            arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9)),
        ),
        max_size=12,
    )
)
def test_images_arrive_as_they_were_sent_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, images: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]
) -> None:
    path = tmp_path_factory.mktemp("images") / "file"
    scoring.write_images(path, images)
    found = list(scoring.read_images(path))
    assert len(found) == len(images)
    for given_pair, found_pair in zip(images, found, strict=True):
        for before, after in zip(given_pair, found_pair, strict=True):
            assert after.dtype == np.uint8
            np.testing.assert_array_equal(before, after)


def test_the_labels_of_a_big_image_are_compressed(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(8, dtype=np.uint8)[:, None], 4000, axis=1).repeat(300, axis=0)
    scoring.write_images(tmp_path / "file", [(np.zeros((2, 2, 3), np.uint8), labels)])
    assert labels.size == 9_600_000
    assert (tmp_path / "file").stat().st_size < 50_000


def test_a_request_with_exits_survives_json() -> None:
    request = worker.WorkRequest("score", "onnxruntime", (), (), "", Effort(), "f" * 64, ((0.5,) * 3,), EXITS)
    assert worker.request_from_json(worker.request_to_json(request)) == request
    without = replace(request, exits=replace(EXITS, alone=None))
    assert worker.request_from_json(worker.request_to_json(without)) == without


def test_a_score_survives_its_message() -> None:
    score = example()
    found = read(json.loads(json.dumps(score_to_message(BLOCK, 7, score))))
    for name in ("counts", "intersection", "predicted", "labelled"):
        assert getattr(found, name).dtype == getattr(score, name).dtype
        np.testing.assert_array_equal(getattr(found, name), getattr(score, name))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("labelled", ["many", 2, 1], "scored.labelled[0] is 'many', not an integer"),
        ("labelled", [0, 3, 2, 1], "scored.labelled is of shape (4,), not (3,)"),
        ("labelled", [3, 1, 2], "scored.labelled is (3, 1, 2), but the image has (3, 2, 1)"),
        ("counts", [[3, 1]], "scored.counts is of shape (1, 2), not (2, 2)"),
        ("counts", [[3, 1], [4]], "scored.counts is not an array of (2, 2)"),
        ("counts", [[3, 1], [4, -1]], "scored.counts has numbers from -1 to 4"),
        ("counts", [[3, 1], [4, 1 << 31]], "scored.counts has numbers from 1 to 2147483648"),
        ("counts", [[3, 1], [4, 1 << 70]], "scored.counts is not an array of (2, 2)"),
        ("counts", [[3, 1], [4, 2.0]], "scored.counts[1][1] is 2.0, not an integer"),
        ("counts", [[3, 1], [4, True]], "scored.counts[1][1] is True, not an integer"),
        ("predicted", [[6, 0, 0], [0, 6, 0], [0, 1, 6]], "scored.predicted does not add up to the labelled pixels"),
        ("intersection", [[4, 0, 0], [0, 2, 0], [0, 0, 1]], "scored.intersection exceeds"),
        ("block", "e" * 64, "scored is for image 7 of 'eeeeeeeeeeee', not 7 of ffffffffffff"),
        ("image", 6, "scored is for image 6 of 'ffffffffffff', not 7 of ffffffffffff"),
        ("image", None, "scored.image is None, not an integer"),
    ],
)
def test_a_score_that_is_not_possible_for_the_image_is_refused(name: str, value: Any, words: str) -> None:
    with pytest.raises(DecodeError) as caught:
        read({**score_to_message(BLOCK, 7, example()), name: value})
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("content", [None, [], {}, "score_predictions", 3, {"image": 7}])
def test_content_that_is_not_a_score_is_refused(content: Any) -> None:
    with pytest.raises(DecodeError):
        read(content)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["counts", "intersection", "predicted", "labelled", "block", "image"]), _JSON)
def test_arbitrary_content_is_a_score_or_is_refused(name: str, value: Any) -> None:
    with suppress(DecodeError):
        assert read({**score_to_message(BLOCK, 7, example()), name: value}).counts.shape == (2, ROWS)
