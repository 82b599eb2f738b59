"""A full disk or a folder that cannot be written costs the user the step in hand, not what was finished before."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import ANY_SPEED, TRAIN, complaint, contents, done, first, refused

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "brief_profile")

WRITING = {
    "train": TRAIN,
    "export": ("export",),
    "evaluate": ("evaluate", "--split", "test"),
    "profile": ("profile",),
    "search": ("search", "--max-err", "50%"),
    "bundle": ("bundle",),
    "run": ("run",),
}


@pytest.fixture(params=WRITING)
def writing(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def attempted(root: Path, command: str) -> str:
    """The complaint of a command that cannot write, all finished artefacts being there as before.

    What is kept beyond them is the progress of an unfinished training or profile.
    """
    before = contents(root)
    arguments: dict[str, tuple[str | Path, ...]] = {
        "train": ("--data", root / "data"),
        "run": (root / "host.mess", first(root / "data" / "test" / "images"), "-o", root / "predictions"),
    }
    message = complaint("-C", root, *WRITING[command], *arguments.get(command, ()))
    after = contents(root)
    assert {name: after.get(name) for name in before} == before
    extra = {name for name in after if name not in before}
    assert all(name.startswith("candidate/training/s") or name == "latency/host.samples.jsonl" for name in extra), extra
    return message


@pytest.fixture
def small_disk(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """The finished workspace on a disk of 12 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield Path(shutil.copytree(finished, place / "workspace"))
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path, free: int) -> None:
    """Leave `free` bytes."""
    space = os.statvfs(disk)
    with (disk / "filler").open("wb") as filler:
        filler.write(bytes(space.f_bavail * space.f_frsize - free))


def test_a_full_disk(small_disk: Path, writing: str) -> None:
    fill(small_disk.parent, 0)
    assert "the disk is full" in attempted(small_disk, writing)


@pytest.mark.parametrize("command", ["export", "bundle"])
def test_a_disk_that_fills_up_half_way(small_disk: Path, command: str) -> None:
    fill(small_disk.parent, 200 << 10)
    assert "the disk is full" in attempted(small_disk, command)


def test_a_full_disk_for_what_is_unpacked(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = small_disk.parent / "temporary"
    place.mkdir()
    fill(small_disk.parent, 200 << 10)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    assert "TMPDIR" in refused(small_disk, "verify", small_disk / "host.mess")
    assert not list(place.iterdir())


def test_a_limit_on_the_size_of_files(workspace: Path, writing: str) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, old[1]))
    try:
        message = attempted(workspace, writing)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "ulimit -f" in message or "File too large" in message


@pytest.fixture
def read_only(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """The finished workspace where nothing can be written: by a mount for root, by its mode for others."""
    root = Path(shutil.copytree(finished, tmp_path / "workspace"))
    if os.geteuid():
        folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
        for path in folders:
            path.chmod(0o555)
        yield root
        for path in folders:
            path.chmod(0o755)
        return
    bound = subprocess.run(["mount", "--bind", root, root], capture_output=True)
    if bound.returncode:
        pytest.skip("this root may not mount, and no mode keeps root from writing")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", root], check=True)
        yield root
    finally:
        subprocess.run(["umount", "-l", root], check=True)


def test_a_read_only_workspace(read_only: Path, writing: str) -> None:
    assert "choose a workspace that can be written" in attempted(read_only, writing)


def test_a_read_only_workspace_can_be_used(read_only: Path, tmp_path: Path) -> None:
    bundle = read_only / "host.mess"
    image = first(read_only / "data" / "test" / "images")
    for command in (
        ("inspect", "plan"),
        ("verify", bundle, *ANY_SPEED),
        ("bench", bundle, "--split", "test", "--passes", "1"),
        ("run", bundle, image, "-o", tmp_path / "predictions"),
    ):
        done("-C", read_only, *command)
