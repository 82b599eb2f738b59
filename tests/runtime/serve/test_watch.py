"""`watch`: every frame that arrives gets its labels or a reason, across versions and until the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mess_compile import runtime
from mess_compile.runtime.bundle.manifest import Manifest
from mess_compile.runtime.bundle.signature import Signers, installed_signers
from mess_compile.runtime.serve import watch
from tests import small_network
from tests.runtime.homeless import homeless


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def labelled_alike(path: Path, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> bool:
    """Whether a picture holds the `second` labels; it must hold one or the other."""
    with Image.open(path) as picture:
        found = np.array(picture)
    assert np.array_equal(found, first) or np.array_equal(found, second)
    return np.array_equal(found, second)


def arrive(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    os.replace(folder / name, folder / "in" / name)


def that_leaves_at_once(known: Manifest) -> Manifest:
    """The first exit's labels, whatever it is sure of."""
    (plan,) = known.plans
    stages = (replace(plan.stages[0], cut=0), *plan.stages[1:])
    (point,) = plan.operating_points
    decisions = (replace(point.decisions[0], cut=0), *point.decisions[1:])
    changed = replace(plan, stages=stages, operating_points=(replace(point, decisions=decisions),))
    return replace(known, plans=(changed,))


def test_frames_get_labels_or_a_reason_across_versions_until_the_end(tmp_path: Path) -> None:
    bundle, live = tmp_path / "street.mess", tmp_path / "live"
    small_network.write_bundle(bundle)
    other = small_network.changed_bundle(bundle, tmp_path / "other.mess", that_leaves_at_once)
    frames = map(small_network.frame, range(100))
    frame = next(each for each in frames if small_network.expected(each)[0][0][2] < 18)  # stays for the second exit
    at_once, labels = (found for _, found in small_network.expected(frame))
    assert (at_once != labels).any()
    Image.fromarray(frame).save(tmp_path / "frame.png")
    content = (tmp_path / "frame.png").read_bytes()
    command = [sys.executable, "-m", "mess_compile.runtime", "watch", str(bundle), str(live)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until((live / "metrics.prom").exists)
        (live / "in" / ".half.png").write_bytes(content[:50])
        arrive(live, "a.png", content)
        arrive(live, "b.png", b"not a picture")
        until(lambda: len(list((live / "in").iterdir())) == 1)
        os.replace(other, bundle)
        for number in range(30):
            arrive(live, f"c{number}.png", content)
            time.sleep(0.02)
        until(lambda: len(list((live / "in").iterdir())) == 1)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert [path.name for path in (live / "refused").iterdir()] == ["b.png"]
    of_frame, at_end = errors.splitlines()
    assert of_frame.startswith("error: ")
    assert "b.png" in of_frame
    assert at_end == f"error: refused frames: 1; they lie in {live / 'refused'}"
    names = ["a.labels.png", *(f"c{number}.labels.png" for number in range(30))]
    assert {path.name for path in (live / "out").iterdir()} == set(names)
    by_other = [labelled_alike(live / "out" / name, labels, at_once) for name in names]
    assert by_other == sorted(by_other), "once a version is taken up, the one before labels no frame any more"
    assert (by_other[0], by_other[-1]) == (False, True)
    assert "mess_frames_total" in (live / "metrics.prom").read_text()


def test_watch_accepts_only_the_signers_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mess_compile.runtime.bundle import signature

    monkeypatch.setattr(signature, "INSTALLED", tmp_path / "etc")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert installed_signers() is None
    own = tmp_path / "mess-compile" / "allowed_signers"
    own.parent.mkdir()
    own.symlink_to(tmp_path / "gone")
    assert installed_signers() == Signers(own), "a link that leads nowhere does not open the door"
    (tmp_path / "etc").write_text("")
    assert installed_signers() == Signers(tmp_path / "etc"), "the administrator's word comes first"
    homeless(monkeypatch)
    assert installed_signers() == Signers(tmp_path / "etc")
    (tmp_path / "etc").unlink()
    assert installed_signers() is None


def test_a_frame_that_needs_too_much_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would else be the first one again after each restart, and no frame behind it would ever be labelled."""

    def full(path: Path) -> NDArray[np.uint8]:
        raise MemoryError

    monkeypatch.setattr(watch, "read_picture", full)
    for name in ("in", "refused"):
        (tmp_path / name).mkdir()
    arrive(tmp_path, "huge.png", b"")
    small_network.write_bundle(tmp_path / "street.mess")
    with runtime.load(tmp_path / "street.mess") as cascade:
        assert watch._is_refused(cascade, tmp_path / "in" / "huge.png", tmp_path, set())
    assert (tmp_path / "refused" / "huge.png").exists()
    assert "huge.png" in capsys.readouterr().err


def test_a_frame_with_an_unusable_name_does_not_block_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One whose labels would have too long a name; one that is not UTF-8; one that cannot even be put aside."""
    long, strange = "x" * 250 + ".png", os.fsdecode(b"caf\xe9.png")
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "refused" / "stuck.png").mkdir(parents=True)
    arrive(tmp_path, "stuck.png", b"not a picture")
    Image.fromarray(small_network.frame(0)).save(tmp_path / "frame.png")
    for name in (long, strange, "last.png"):
        arrive(tmp_path, name, (tmp_path / "frame.png").read_bytes())
    small_network.write_bundle(tmp_path / "street.mess")
    stuck: set[str] = set()
    with runtime.load(tmp_path / "street.mess") as cascade:
        while (frame := watch._oldest(tmp_path / "in", stuck)) is not None:
            watch._is_refused(cascade, frame, tmp_path, stuck)
    assert os.listdir(tmp_path / "in") == ["stuck.png"]
    assert set(os.listdir(tmp_path / "refused")) == {"stuck.png", long}
    assert set(os.listdir(tmp_path / "out")) == {f"{strange[:-4]}.labels.png", "last.labels.png"}
    assert "stuck.png cannot be moved" in capfd.readouterr().err
