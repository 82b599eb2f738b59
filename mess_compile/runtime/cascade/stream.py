"""Streams frames through a cascade: while one frame waits, another is computed; results keep their order."""

from __future__ import annotations

import os
import queue
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, List, Optional, Tuple

import numpy as np

from mess_compile.runtime.base import fork_guard
from mess_compile.runtime.base.checks import check_whole
from mess_compile.runtime.base.errors import InputError

if TYPE_CHECKING:
    from mess_compile.runtime.cascade.cascade import Prediction

LANES = 2
MOST_AHEAD = 1024
_CLOSE_TIMEOUT_S = 5.0
"""How long closing waits for a source that does not return; its thread then ends with it, or with the process."""


class Stream:
    """An iterator over the predictions of `frames`, in their order; close it, or drop it, and its threads end.

    An error of a frame is raised in its place, and the following `next` continues after it. An error of the source is
    raised after the frames before it and ends the stream. At most `ahead` frames are taken from the source and not yet
    returned, each copied: the source may reuse its buffer.
    """

    def __init__(self, frames: Iterable[np.ndarray], segment: Callable[[Any], Prediction], ahead: int) -> None:
        check_whole("ahead", ahead, MOST_AHEAD)
        try:
            source = iter(frames)
        except TypeError as error:
            raise InputError(f"frames is {frames!r:.80}, not a list or an iterator of frames") from error
        self._process = os.getpid()
        self._state = _StreamState(source, segment, ahead)
        threads = [threading.Thread(target=_lane, args=(self._state,), daemon=True) for _ in range(LANES)]
        self._close = fork_guard.finalizer(self, _stop, self._state, threads)
        for thread in threads:
            thread.start()

    def __iter__(self) -> Iterator[Prediction]:
        return self

    def __next__(self) -> Prediction:
        fork_guard.check_process(self._process, "the cascade of this stream")
        if not self._close.alive:
            raise StopIteration
        place = self._state.places.get()
        if place is None:
            self.close()
            raise StopIteration
        self._state.room.release()
        return place.result()

    def close(self) -> None:
        """Take no more frames, return no more results, wait for the current frames."""
        self._close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _StreamState:
    """State that the lanes share. They hold no reference to the stream, which otherwise would never be dropped."""

    def __init__(self, source: Iterator[Any], segment: Callable[[Any], Prediction], ahead: int) -> None:
        self.source, self.segment = source, segment
        self.room = threading.Semaphore(ahead)
        self.turn = threading.Lock()  # held while a lane takes a frame and its place in the order
        self.places: queue.SimpleQueue[Optional[Future[Prediction]]] = queue.SimpleQueue()
        self.ended = False


def _lane(state: _StreamState) -> None:
    """Process frames from the source, one after the other."""
    for place, frame in iter(lambda: _take(state), None):
        try:
            place.set_result(state.segment(frame))
        except BaseException as error:
            place.set_exception(error)


def _take(state: _StreamState) -> Optional[Tuple[Future[Prediction], Any]]:
    """The next frame, with its place among the results; None at the end."""
    state.room.acquire()
    with state.turn:
        if not state.ended:
            place: Future[Prediction] = Future()
            try:
                frame = next(state.source)
                state.places.put(place)
                return place, frame.copy() if isinstance(frame, np.ndarray) else frame
            except StopIteration:
                pass
            except BaseException as error:
                place.set_exception(error)
                state.places.put(place)
            state.ended = True
            state.places.put(None)
    state.room.release()  # for the other lanes, which have to see the end, too
    return None


def _stop(state: _StreamState, threads: List[threading.Thread]) -> None:
    state.ended = True
    state.room.release()
    state.places.put(None)
    deadline = time.monotonic() + _CLOSE_TIMEOUT_S
    for thread in threads:
        if thread is not threading.current_thread():  # the garbage collector may run this in a lane
            thread.join(max(deadline - time.monotonic(), 0))
