"""A stream loses no frame, keeps their order, and leaves no thread behind, whatever its source does."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mess_compile import runtime
from mess_compile.runtime.base.errors import EngineError, InputError
from mess_compile.runtime.cascade.cascade import Cascade
from mess_compile.runtime.engines.engine import open_library
from tests import small_network
from tests.runtime.faults import FaultyLibrary
from tests.small_network import frame
from tests.threads import own_threads

Frame = NDArray[np.uint8]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny.mess"
    small_network.write_bundle(path)
    return path


@pytest.fixture(params=[True, False], ids=["cpu", "as a GPU"])
def cascade(bundle: Path, request: pytest.FixtureRequest) -> Iterator[Cascade]:
    """With an engine library that runs two frames at once, and with one whose runs must not overlap."""
    running = threading.Lock()

    def alone(name: str) -> None:
        if not request.param:
            assert running.acquire(blocking=False), "two runs at once"
            time.sleep(0.0002)
            running.release()

    library = FaultyLibrary(open_library("onnxruntime", threads=1), alone, concurrent=request.param)
    with runtime.load(bundle, library=library) as loaded:
        yield loaded
    assert own_threads() == 1


def is_of(prediction: runtime.Prediction, seed: int) -> bool:
    return bool((prediction.labels == small_network.expected(frame(seed))[prediction.exit - 1][1]).all())


def test_predictions_come_in_the_order_of_the_frames(cascade: Cascade) -> None:
    seeds = [seed % 16 for seed in range(300)]
    predictions = list(cascade.stream(frame(seed) for seed in seeds))
    assert len(predictions) == 300
    assert all(is_of(prediction, seed) for prediction, seed in zip(predictions, seeds, strict=True))
    assert list(cascade.stream([])) == []
    taken = [prediction.exit for prediction in predictions]
    assert cascade.metrics().exits == (taken.count(1), taken.count(2))
    assert 0 < taken.count(1) < 300


def test_a_source_may_use_its_buffer_again(cascade: Cascade) -> None:
    buffer = np.empty_like(frame(0))

    def source() -> Iterator[Frame]:
        for seed in range(40):
            buffer[:] = frame(seed)
            yield buffer

    assert all(is_of(prediction, seed) for seed, prediction in enumerate(cascade.stream(source())))


def test_no_more_than_so_many_frames_are_taken_ahead(cascade: Cascade) -> None:
    taken = 0

    def source() -> Iterator[Frame]:
        nonlocal taken
        for seed in range(50):
            taken += 1
            yield frame(seed)

    with cascade.stream(source(), ahead=3) as stream:
        for given, _ in enumerate(stream, 1):
            time.sleep(0.002)
            assert given <= taken <= given + 3
    assert taken == 50
    with pytest.raises(InputError, match="ahead is 0"):
        cascade.stream([], ahead=0)


def test_a_result_does_not_wait_for_the_next_frame(cascade: Cascade) -> None:
    """As a camera's would: it gives the next frame only after the user has seen the result."""
    seen = threading.Event()

    def source() -> Iterator[Frame]:
        yield frame(0)
        assert seen.wait(10), "the first result was not given out"
        yield frame(1)

    stream = cascade.stream(source())
    assert is_of(next(stream), 0)
    seen.set()
    assert is_of(next(stream), 1)
    assert list(stream) == []


def test_a_frame_that_is_none_raises_in_its_place_and_the_stream_goes_on(cascade: Cascade) -> None:
    given = [frame(0), np.zeros((8, 12), np.uint8), frame(2), None, frame(4)]
    stream = cascade.stream(given)  # type: ignore[arg-type]
    told = []
    for seed in range(len(given)):
        try:
            told.append(is_of(next(stream), seed))
        except InputError as error:
            told.append(str(error).startswith("a frame is"))
    assert told == [True] * 5
    assert list(stream) == []


def test_an_engine_that_fails_is_reported_in_its_place_and_the_stream_goes_on(bundle: Path) -> None:
    number = itertools.count()

    def every_seventh(name: str) -> str | None:
        return "error" if name == "segment-0-1" and next(number) % 7 == 0 else None

    library = FaultyLibrary(open_library("onnxruntime", threads=1), every_seventh, concurrent=False)
    with runtime.load(bundle, library=library) as cascade:
        stream, failed = cascade.stream(frame(seed % 8) for seed in range(70)), 0
        for seed in range(70):
            try:
                assert is_of(next(stream), seed % 8)
            except EngineError:
                failed += 1
        assert failed == 10
        assert list(stream) == []


def test_what_the_source_raises_comes_behind_its_frames_and_ends_the_stream(cascade: Cascade) -> None:
    def source() -> Iterator[Frame]:
        for seed in range(5):
            yield frame(seed)
        raise OSError("the camera is gone")

    stream = cascade.stream(source())
    assert [is_of(next(stream), seed) for seed in range(5)] == [True] * 5
    with pytest.raises(OSError, match="the camera is gone"):
        next(stream)
    assert list(stream) == []


def test_a_stream_that_is_closed_or_dropped_early_ends_its_threads(cascade: Cascade) -> None:
    endless = cascade.stream(itertools.cycle([frame(0)]))
    next(endless)
    endless.close()
    endless.close()
    assert own_threads() == 1
    assert list(endless) == []
    for _ in cascade.stream(itertools.cycle([frame(0)])):
        break
    gc.collect()
    assert own_threads() == 1
    assert is_of(cascade(frame(3)), 3)


def test_closing_the_cascade_ends_its_streams(cascade: Cascade) -> None:
    stream = cascade.stream(itertools.cycle([frame(0)]))
    next(stream)
    cascade.close()
    assert own_threads() == 1
    assert list(stream) == []


def test_single_frames_run_beside_a_stream(cascade: Cascade) -> None:
    stream = cascade.stream(frame(seed % 8) for seed in range(60))
    for seed, prediction in enumerate(stream):
        assert is_of(prediction, seed % 8)
        assert is_of(cascade(frame(seed % 5)), seed % 5)
