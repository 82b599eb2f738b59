"""`watch`: every frame that arrives gets its labels or a reason, across versions and until the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mess_compile import runtime
from mess_compile.runtime.signature import Signers, installed_signers
from tests import small_network
from tests.shipping import with_threshold


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def arrive(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    os.replace(folder / name, folder / "in" / name)


def test_frames_get_labels_or_a_reason_across_versions_until_the_end(tmp_path: Path) -> None:
    bundle, live = tmp_path / "street.mess", tmp_path / "live"
    small_network.write_bundle(bundle)
    other = small_network.changed_bundle(bundle, tmp_path / "other.mess", with_threshold(1))
    frame = small_network.frame(3, (20, 30))
    Image.fromarray(frame).save(tmp_path / "frame.png")
    content = (tmp_path / "frame.png").read_bytes()
    with runtime.load(bundle) as cascade:
        labels = cascade(frame).labels
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
    assert process.returncode == 0
    assert [path.name for path in (live / "refused").iterdir()] == ["b.png"]
    assert errors.count("error: ") == 1
    assert "b.png" in errors
    written = sorted(path.name for path in (live / "out").iterdir())
    assert written == sorted(["a.labels.png", *(f"c{number}.labels.png" for number in range(30))])
    for name in written:
        with Image.open(live / "out" / name) as found:
            assert np.array_equal(np.array(found), labels)
    assert "mess_frames_total" in (live / "metrics.prom").read_text()


def test_a_device_says_whose_bundles_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mess_compile.runtime import signature

    monkeypatch.setattr(signature, "INSTALLED", tmp_path / "etc")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert installed_signers() is None
    own = tmp_path / "mess-compile" / "allowed_signers"
    own.parent.mkdir()
    own.symlink_to(tmp_path / "gone")
    assert installed_signers() == Signers(own), "a link that leads nowhere does not open the door"
    (tmp_path / "etc").write_text("")
    assert installed_signers() == Signers(tmp_path / "etc"), "the administrator's word comes first"
