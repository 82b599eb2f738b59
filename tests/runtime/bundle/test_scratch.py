"""A killed process leaves its unpacked bundle behind: the next one removes it, and never that of one that lives."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mess_compile.runtime.bundle import scratch
from mess_compile.runtime.bundle.archive import open_archive
from tests import small_network

LOAD = """
import signal, sys
from mess_compile.runtime.bundle.archive import open_archive
archive = open_archive(__import__("pathlib").Path(sys.argv[1]))
print(archive.folder, flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "street.mess"
    small_network.write_bundle(path)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where bundles are unpacked."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def other(bundle: Path, place: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has loaded the bundle, and where it lies unpacked."""
    environment = {**os.environ, "TMPDIR": str(place)}
    with subprocess.Popen(
        [sys.executable, "-c", LOAD, bundle], stdout=subprocess.PIPE, text=True, env=environment
    ) as it:
        assert it.stdout is not None
        yield it, Path(it.stdout.readline().strip())
        it.kill()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_killed_process_left_is_removed_at_the_next_load(
    bundle: Path, place: Path, other: tuple[subprocess.Popen[str], Path], how: signal.Signals
) -> None:
    process, folder = other
    open_archive(bundle).close()
    assert (folder / "README.txt").exists(), "its process lives"
    process.send_signal(how)
    process.wait()
    assert folder.exists()
    archive = open_archive(bundle)
    assert list(place.iterdir()) == [archive.folder]
    archive.close()
    assert list(place.iterdir()) == []


def test_bundles_of_one_process_leave_each_other_alone(bundle: Path, place: Path) -> None:
    first, second = open_archive(bundle), open_archive(bundle)
    assert (first.folder / "README.txt").exists()
    first.close()
    assert list(place.iterdir()) == [second.folder]
    second.close()


def test_what_is_not_ours_stays(bundle: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "mess-else").mkdir()
    (place / "mess-bundle-file").write_text("")
    (place / "mess-bundle-link").symlink_to(place / "mess-else")
    (place / "mess-bundle-foreign").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: (place / "mess-else").stat().st_uid + 1)
    scratch.sweep()
    assert len(list(place.iterdir())) == 4
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    scratch.sweep()
    assert {path.name for path in place.iterdir()} == {"mess-else", "mess-bundle-file", "mess-bundle-link"}


def test_cleaners_by_age_see_that_the_folder_is_in_use(place: Path) -> None:
    """tmpfiles.d(5): they take a shared lock on each folder that they descend into, and skip it when they cannot."""
    held = scratch.Scratch()
    descriptor = os.open(held.name, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(descriptor)
    held.cleanup()


def test_a_folder_that_is_swept_while_it_is_made_is_made_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, swept = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if how == fcntl.LOCK_EX and not swept:
            swept.extend(place.iterdir())
            swept[0].rmdir()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    held = scratch.Scratch()
    assert list(place.iterdir()) == [Path(held.name)] != swept
    held.cleanup()


def test_processes_that_load_at_once_do_not_disturb_each_other(bundle: Path, place: Path) -> None:
    def load() -> None:
        try:
            for _ in range(15):
                archive = open_archive(bundle)
                missing.extend(name for name in archive.manifest.files if not (archive.folder / name).is_file())
                archive.close()
        except BaseException as error:
            missing.append(repr(error))

    missing: list[str] = []
    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert missing == []
    assert list(place.iterdir()) == []
