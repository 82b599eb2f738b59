"""`ship` to a device that builds engines: TensorRT 8.5's stand-in over a real sshd."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mess_compile.runtime.measure import measure
from tests.commands import ANY_SPEED, done, printed_json, run
from tests.conftest import EFFORT
from tests.remote_device import remote_device
from tests.shipping import check_whole
from tests.tensorrt_device import Xavier, as_xavier

pytestmark = pytest.mark.slow


@pytest.fixture
def xavier(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Xavier]:
    with remote_device(tmp_path_factory.mktemp("device")) as device:
        monkeypatch.setenv("PATH", f"{device.path_folder()}:{os.environ['PATH']}")
        monkeypatch.setattr(measure, "Effort", lambda: EFFORT)
        yield as_xavier(device, "one")


def without_engines(xavier: Xavier) -> None:
    for place in (".mess-compile", ".cache"):
        shutil.rmtree(xavier.device.home / place, ignore_errors=True)
    xavier.place.joinpath("log").unlink(missing_ok=True)


def test_engines_are_taken_over_or_built_with_what_is_left_told(workspace: Path, xavier: Xavier) -> None:
    done("-C", workspace, "profile", "--device", "xavier", "--host", xavier.host, "--all")
    done("-C", workspace, "search", "--device", "xavier", "--max-err", "100%")
    done("-C", workspace, "bundle", workspace / "plans" / "xavier.json")
    bundle, place = workspace / "xavier.mess", f"{xavier.host}:~/street"
    built = len(xavier.built)
    (first,) = printed_json("ship", bundle, place, *ANY_SPEED)["places"]
    assert first["done"]["built"] == 0
    assert len(xavier.built) == built, "what was profiled is not built again"
    street = xavier.device.home / "street"
    version = check_whole(street)

    without_engines(xavier)
    (expected,) = printed_json("ship", bundle, place, "--dry-run")["places"]
    assert len(expected["build"]) >= 3
    assert expected["expected_s"] is None, "no engine was built there for a ship yet"
    xavier.wish("slow")
    result = run("ship", bundle, place, *ANY_SPEED)
    assert result.exit_code == 0, result.stderr
    assert len(xavier.built) == len(expected["build"])
    steps = [line for line in result.stderr.splitlines() if ": build graphs/" in line]
    assert len(steps) == len(expected["build"])
    assert f"(2 of {len(steps)}), about 1 s" in steps[1] or f"(2 of {len(steps)}), about 0 s" in steps[1]

    without_engines(xavier)
    (again,) = printed_json("ship", bundle, place, "--dry-run")["places"]
    assert again["expected_s"] >= 0.2 * len(expected["build"])
    for verb, words in (("break", "no kernel for it"), ("crash", "has the device enough memory?")):
        xavier.wish(verb, Path(expected["build"][-1]).name)
        result = run("ship", bundle, place, *ANY_SPEED)
        assert result.exit_code == 1
        assert words in result.stderr.splitlines()[-1]
        assert check_whole(street) == version
