"""Who follows a log wants to know what runs, how far it is, and how long it will take."""

from __future__ import annotations

import time

from mess_compile.cli.progress import ProgressLines


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_what_is_left_follows_from_the_pace_of_the_work_that_goes_on() -> None:
    clock, lines = Clock(), list[str]()
    lines_of = ProgressLines("train", lines.append, begun_s=90.0, clock=clock)
    assert lines_of.line() == "train: 10 s so far"
    lines_of.update("stage 1 of 2, images", 40, 640)  # a training that continues
    assert lines_of.line() == "train: stage 1 of 2, images: 40 of 640, 10 s so far"
    clock.now_s += 20
    lines_of.update("stage 1 of 2, images", 240, 640)
    assert lines_of.line() == "train: stage 1 of 2, images: 240 of 640, 10/s, about 40 s left"
    lines_of.update("stage 2 of 2, images", 0, 900)  # another stage has a pace of its own
    clock.now_s += 60
    lines_of.update("stage 2 of 2, images", 30, 900)
    assert lines_of.line() == "train: stage 2 of 2, images: 30 of 900, 2 s each, about 29 min left"
    lines_of.update("stage 2 of 2, images", 900, 900)
    assert lines_of.line() == "train: stage 2 of 2, images: 900 of 900 done, 90 s so far".replace("90 s", "2 min")


def test_a_step_that_stalls_takes_longer_the_longer_it_stalls() -> None:
    clock = Clock()
    lines_of = ProgressLines("build", print, clock=clock)
    lines_of.update("build", 0, 10)
    clock.now_s += 10
    lines_of.update("build", 5, 10)
    assert lines_of.line() == "build: 5 of 10, 2 s each, about 10 s left"
    clock.now_s += 30
    assert lines_of.line() == "build: 5 of 10, 8 s each, about 40 s left"


def test_what_has_no_known_end_tells_what_is_done() -> None:
    clock = Clock()
    lines_of = ProgressLines("search", print, begun_s=100.0, clock=clock)
    lines_of.update("open engines", 0, 0)
    assert lines_of.line() == "search: open engines: 0 s so far"
    clock.now_s += 10
    lines_of.update("open engines", 30, 0)
    assert lines_of.line() == "search: open engines: 30 done, 3/s, 10 s so far"


def test_lines_come_by_themselves_and_end_with_the_work() -> None:
    lines: list[str] = []
    with ProgressLines("train", lines.append, first_s=0.05, every_s=0.1):
        time.sleep(0.5)
    heard = len(lines)
    assert 2 <= heard <= 5
    time.sleep(0.2)
    assert len(lines) == heard
