"""A server that loads once and forks its workers: none of them hangs at its end or takes the others' bundle away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import small_network

FORK = """
import gc, os, sys, time
import numpy as np
from mess_compile import runtime

cascade = runtime.load(sys.argv[1], threads=int(sys.argv[2]) or None)
frame = np.zeros((6, 8, 3), np.uint8)
expected = cascade(frame).labels
stream = cascade.stream([frame] * 9)
next(stream)
refinement = cascade.refine(frame)
next(refinement)

def refused(action):
    try:
        action()
    except runtime.EngineError as error:
        return str(error)
    return "nothing was raised"

child = os.fork()
if child == 0:
    {child}
until = time.monotonic() + 20
while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < until:
    time.sleep(0.02)
if not ended[0]:
    os.kill(child, 9)
assert ended[0], "the child hangs"
assert os.waitstatus_to_exitcode(ended[1]) == 0, ended
assert (cascade.archive.folder / "README.txt").exists(), "the child removed the parent's bundle"
assert np.array_equal(cascade(frame).labels, expected)
assert len(list(stream)) == 8
cascade.close()
assert not cascade.archive.folder.exists()
"""
ENDS = "sys.exit(0)"
LETS_GO = "cascade.close(); stream.close(); del cascade, stream, refinement; gc.collect(); sys.exit(0)"
USES = """
    for action in (
        lambda: cascade(frame), lambda: cascade.batch([frame]), lambda: next(stream), lambda: next(refinement),
        lambda: cascade.stream([frame]), lambda: next(cascade.refine(frame)),
    ):
        words = refused(action)
        assert f"process {os.getpid()} was forked from it" in words and "call runtime.load in each" in words, words
    with runtime.load(sys.argv[1], threads=1) as own:
        assert np.array_equal(own(frame).labels, expected)
    sys.exit(0)
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "street.mess"
    small_network.write_bundle(path)
    return path


@pytest.mark.parametrize(
    ("child", "threads"), [(ENDS, 0), (ENDS, 1), (ENDS, 2), (LETS_GO, 2), (USES, 2)], ids=lambda it: str(it).strip()[:9]
)
def test_a_forked_worker_neither_hangs_nor_takes_anything_away(
    bundle: Path, tmp_path: Path, child: str, threads: int
) -> None:
    command = [sys.executable, "-c", FORK.replace("{child}", child), str(bundle), str(threads)]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
