"""`evaluate --host`: over a real sshd, what the command line says and leaves."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mess_compile import cores
from mess_compile.runtime.engines import engine
from mess_compile.workspace import Workspace
from tests.commands import complaint, contents, done
from tests.remote_device import Device, remote_device


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with remote_device(tmp_path_factory.mktemp("device")) as device:
        yield device


@pytest.fixture
def device(running: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Reached by the `ssh` on PATH, as a user's ~/.ssh/config would reach it."""
    running.restore()
    monkeypatch.setenv("PATH", f"{running.path_folder()}:{os.environ['PATH']}")
    return running


@pytest.mark.slow
def test_statistics_of_a_device_over_ssh_are_those_of_this_machine(workspace: Path, device: Device) -> None:
    place = Workspace(workspace).statistics("val")
    expected = contents(place)
    shutil.rmtree(place)
    shown = done("-C", workspace, "evaluate", "--device", "host", "--host", device.host)
    assert "12 images of val, onnxruntime fp32 on host" in shown
    assert contents(place) == expected
    done("-C", workspace, "search", "--max-err", "100%")


@pytest.mark.slow
def test_a_device_that_is_something_else_is_refused(workspace: Path, device: Device) -> None:
    message = complaint("-C", workspace, "evaluate", "--device", "xavier", "--host", device.host)
    assert f"{device.host}: tensorrt cannot be imported" in message
    assert not (device.home / ".mess-compile" / "images").exists()


@pytest.mark.slow
def test_a_device_elsewhere_is_reached_where_it_was_profiled(workspace: Path, device: Device) -> None:
    assert "reach it with --host ssh://user@host" in complaint("-C", workspace, "evaluate", "--device", "xavier")
    Workspace(workspace).remember(device="xavier", host=device.host)
    assert f"{device.host}: tensorrt cannot be imported" in complaint("-C", workspace, "evaluate", "--device", "xavier")


@pytest.mark.slow
def test_a_host_without_its_device_s_name_is_refused(workspace: Path) -> None:
    assert "--host ssh://xavier needs --device NAME" in complaint("-C", workspace, "evaluate", "--host", "ssh://xavier")


@pytest.mark.slow
def test_a_device_with_other_software_is_one_line(workspace: Path, device: Device) -> None:
    device.use_python(device.bare_python)
    assert "numpy" in complaint("-C", workspace, "evaluate", "--device", "host", "--host", device.host)


@pytest.mark.parametrize("asked", [[], ["--threads", "1"]])
def test_graphs_run_with_the_threads_that_were_asked_for(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    opened = []

    def open_library(name: str, threads: int | None, gpu: int) -> object:
        opened.append(threads)
        return engine.open_library(name, threads, gpu)

    monkeypatch.setattr(sys.modules["mess_compile.steps.evaluate"], "open_library", open_library)
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    done("-C", workspace, "evaluate", *asked)
    assert opened == [1 if asked else None], "by default the library takes all cores that it sees"


def test_impossible_numbers_of_threads_are_refused(workspace: Path) -> None:
    assert "threads is 100000, not a whole number from 1 to " in complaint(
        "-C", workspace, "evaluate", "--threads", "100000"
    )
    device = ("--device", "xavier", "--host", "ssh://nowhere", "--threads", "2")
    assert "chooses what runs the graphs: drop --accelerator, --devices, --nodes and --threads" in complaint(
        "-C", workspace, "evaluate", *device
    )
