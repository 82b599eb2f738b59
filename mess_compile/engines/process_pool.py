"""Runs jobs in fresh processes: a crash affects no other job, and no process outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_sentinels
from typing import TypeVar

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")


def results(
    work: Callable[[JobT], ResultT], jobs: Sequence[JobT], processes: int, crashed: Callable[[JobT], ResultT]
) -> Iterator[ResultT]:
    """Yield `work(job)` for every job as it completes, up to `processes` at once.

    Jobs in flight when a process dies are retried once, each alone; a job that crashes again gives `crashed(job)`.
    Raises what `work` does.
    """
    waiting = list(jobs)
    while waiting:
        suspects: list[JobT] = []
        with _pool(processes) as pool:
            yield from _until_broken(pool, work, waiting, suspects, processes)
        for job in suspects:
            yield _alone(work, job, crashed)


def _until_broken(
    pool: ProcessPoolExecutor,
    work: Callable[[JobT], ResultT],
    waiting: list[JobT],
    suspects: list[JobT],
    processes: int,
) -> Iterator[ResultT]:
    """Take jobs from `waiting`, at most one per process; jobs in flight when the pool breaks go to `suspects`."""
    running: dict[Future[ResultT], JobT] = {}
    broken = False
    while running or (waiting and not broken):
        while waiting and not broken and len(running) < processes:
            try:
                future = _submitted(pool, work, waiting[0])
            except BrokenProcessPool:
                broken = True
            else:
                running[future] = waiting.pop(0)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            try:
                result = future.result()
            except BrokenProcessPool:
                broken = True
                suspects.append(job)
                continue
            yield result


def _alone(work: Callable[[JobT], ResultT], job: JobT, crashed: Callable[[JobT], ResultT]) -> ResultT:
    with _pool(1) as pool:
        try:
            return _submitted(pool, work, job).result()
        except BrokenProcessPool:
            return crashed(job)


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes, since an engine library's logger and locks do not survive a fork.

    On any error its processes are killed: the jobs in progress may take minutes.
    """
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_the_parent
    )
    try:
        yield pool
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, work: Callable[[JobT], ResultT], job: JobT) -> Future[ResultT]:
    """Submit with SIGINT blocked, so that new processes inherit the block: a terminal interrupts all processes."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(work, job)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_sentinels([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
