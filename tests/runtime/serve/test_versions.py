"""Versions on a device: a kill or a full disk at any step leaves a complete version in use."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mess_compile.runtime.base.errors import BundleError, InputError, MessError
from mess_compile.runtime.bundle import archive
from mess_compile.runtime.bundle.manifest import Manifest
from mess_compile.runtime.serve import ship, versions
from mess_compile.runtime.serve.ship import ShipRequest
from tests import small_network
from tests.shipping import check_whole, released, with_threshold
from tests.small_network import changed_bundle

STEPS = {os: ("replace", "symlink", "link", "unlink", "fsync", "sync"), shutil: ("rmtree",)}
"""Calls that change the disk; folders and small files are made before them."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three that differ in a threshold, without the runtime: fewer files, fewer steps."""
    folder = tmp_path_factory.mktemp("bundles")
    small_network.write_bundle(folder / "whole.mess")

    def without_runtime(manifest: Manifest) -> Manifest:
        return replace(manifest, files={n: f for n, f in manifest.files.items() if not n.startswith("mess_compile/")})

    first = changed_bundle(folder / "whole.mess", folder / "0.mess", without_runtime)
    return [first, *(changed_bundle(first, folder / f"{i}.mess", with_threshold(i)) for i in (1, 2))]


@pytest.fixture(autouse=True)
def verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bundle passes; what verification itself finds, others test. No power cut is simulated, so nothing is
    flushed: that takes long where others write."""
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(ship, "_build_and_verify", lambda *told: ship._Verified(None, 0, 0.0, 0.0))


def quiet(kind: str, content: Any) -> None:
    pass


def request_for(folder: Path, bundle: Path, **options: Any) -> ShipRequest:
    """The files have arrived."""
    store = folder / versions.FILES
    store.mkdir(parents=True, exist_ok=True)
    with closing(archive.open_archive(bundle)) as opened:
        for name, file in opened.manifest.files.items():
            if not (store / file.sha256).exists():
                shutil.copy(opened.folder / name, store / file.sha256)
        return ShipRequest(str(folder), opened.manifest_bytes.decode(), **options)


def shipped(folder: Path, bundle: Path, **options: Any) -> str:
    """Ship a bundle, and return the version in use."""
    ship.ship(request_for(folder, bundle, **options), quiet)
    return check_whole(folder)


class Steps:
    """Counts the calls that change the disk, and fails at one of them."""

    def __init__(self, at: int, broken: Callable[[], None]) -> None:
        self.count, self._at, self._broken = 0, at, broken

    def put_in(self, patch: pytest.MonkeyPatch) -> None:
        for module, names in STEPS.items():
            for name in names:
                patch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self._at:
                self._broken()
            return real(*arguments, **options)

        return step


def steps_of(act: Callable[[], object]) -> int:
    steps = Steps(0, lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        steps.put_in(patch)
        act()
    return steps.count


def killed(act: Callable[[], object], at: int) -> None:
    """Do it in a process that exits silently before step `at`."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            Steps(at, lambda: os._exit(9)).put_in(patch)
            act()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def left_over(folder: Path) -> list[str]:
    return [path.name for path in (folder / ".ship").iterdir() if path.name.startswith("making-")]


@pytest.mark.parametrize("how", ["killed", "full"])
def test_a_failure_at_any_step_leaves_a_complete_version_and_the_next_ship_succeeds(
    bundles: list[Path], tmp_path: Path, how: str
) -> None:
    start = tmp_path / "start"
    first = shipped(start, bundles[0])
    shutil.copytree(start, tmp_path / "counted", symlinks=True)
    counted = request_for(tmp_path / "counted", bundles[1])
    total = steps_of(lambda: ship.ship(counted, quiet))
    many = len({path for path in (start / first).rglob("*") if path.is_file()})
    assert total > many, "every file is linked"
    seen = set()
    for at in [1, 2, many // 2, *range(many - 1, total + 1)]:
        folder = tmp_path / f"{how}-{at}"
        shutil.copytree(start, folder, symlinks=True)
        request = request_for(folder, bundles[1], keep=1)
        if how == "killed":
            killed(lambda request=request: ship.ship(request, quiet), at)  # type: ignore[misc]
        else:
            with pytest.MonkeyPatch.context() as patch:
                Steps(at, full).put_in(patch)
                with suppress(OSError, MessError):
                    ship.ship(request, quiet)
        seen.add(check_whole(folder))
        after = shipped(folder, bundles[1])
        assert after != first
        assert not left_over(folder)
        shutil.rmtree(folder)
    assert len(seen) == 2, "some breaks came before, some after the switch"


def test_rollback_goes_to_the_previous_version_and_then_to_older_ones(bundles: list[Path], tmp_path: Path) -> None:
    first, second, third = (shipped(tmp_path, bundle) for bundle in bundles)
    for expected in (second, first):
        ship.rollback(ShipRequest(str(tmp_path)), quiet)
        assert check_whole(tmp_path) == expected
    with pytest.raises(InputError, match=r"has no version before .* to go back to"):
        ship.rollback(ShipRequest(str(tmp_path)), quiet)
    assert shipped(tmp_path, bundles[2]) == third, "newer than what is in use, though it was here before"


def test_a_killed_rollback_goes_back_by_one_version_only(bundles: list[Path], tmp_path: Path) -> None:
    start = tmp_path / "start"
    _, second, third = (shipped(start, bundle) for bundle in bundles)
    shutil.copytree(start, tmp_path / "counted", symlinks=True)
    total = steps_of(lambda: ship.rollback(ShipRequest(str(tmp_path / "counted")), quiet))
    assert total > 3
    for at in range(1, total + 1):
        folder = tmp_path / str(at)
        shutil.copytree(start, folder, symlinks=True)
        request = ShipRequest(str(folder))
        killed(lambda request=request: ship.rollback(request, quiet), at)  # type: ignore[misc]
        if check_whole(folder) == third:
            ship.rollback(request, quiet)
        assert check_whole(folder) == second


def test_the_history_may_be_lost(bundles: list[Path], tmp_path: Path) -> None:
    first, _ = (shipped(tmp_path, bundle) for bundle in bundles[:2])
    history = tmp_path / ".ship" / "history.json"
    history.write_text("{")
    with pytest.raises(InputError, match=r"is damaged .* remove it"):
        shipped(tmp_path, bundles[2])
    history.unlink()
    ship.rollback(ShipRequest(str(tmp_path)), quiet)
    assert check_whole(tmp_path) == first
    assert shipped(tmp_path, bundles[2]).startswith("versions/3-"), "no number twice"


def test_a_file_in_place_of_the_link_is_left_alone(bundles: list[Path], tmp_path: Path) -> None:
    (tmp_path / "current").mkdir()
    with pytest.raises(InputError, match="not a link that `ship` made"):
        ship.ship(request_for(tmp_path, bundles[0]), quiet)
    (tmp_path / "current").rmdir()
    (tmp_path / "current").symlink_to("/etc")
    with pytest.raises(InputError, match="is a link out of"):
        ship.ship(request_for(tmp_path, bundles[0]), quiet)


def test_only_one_program_ships_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(InputError, match=f"process {os.getpid()} is shipping")
    with versions.locked(tmp_path), refused, versions.locked(tmp_path, patience_s=0.1):
        pass
    with versions.locked(tmp_path, patience_s=0.1):
        pass


def test_a_damaged_version_is_installed_again_beside_it(bundles: list[Path], tmp_path: Path) -> None:
    first = shipped(tmp_path, bundles[0])
    path = tmp_path / first / "README.txt"
    path.unlink()
    path.write_text("something else")
    again = shipped(tmp_path, bundles[0])
    assert again != first
    assert again.partition("-")[2] == first.partition("-")[2]


def test_missing_files_are_reported_and_nothing_is_changed(bundles: list[Path], tmp_path: Path) -> None:
    request = request_for(tmp_path, bundles[0])
    gone = min((tmp_path / versions.FILES).iterdir())
    gone.unlink()
    said: list[tuple[str, Any]] = []
    ship.ship(request, lambda kind, content: said.append((kind, content)))
    assert said == [("absent", [gone.name])]
    assert not (tmp_path / "current").exists()


def test_old_versions_and_their_files_are_removed(bundles: list[Path], tmp_path: Path) -> None:
    first, second, third = (shipped(tmp_path, bundle, keep=2) for bundle in bundles)
    assert {f"versions/{path.name}" for path in (tmp_path / "versions").iterdir()} == {second, third}
    kept = {path.stat().st_ino for path in (tmp_path / "versions").rglob("*") if path.is_file()}
    store = tmp_path / versions.FILES
    assert {path.stat().st_ino for path in store.iterdir()} <= kept
    (store / ("0" * 64)).write_text("of nobody")
    ship.rollback(ShipRequest(str(tmp_path)), quiet)
    again = shipped(tmp_path, bundles[0], keep=2, allow_downgrade=True)
    there = {f"versions/{path.name}" for path in (tmp_path / "versions").iterdir()}
    assert there == {again, second}, "what was in use last stays rather than what is newest"
    assert again != first
    assert not (store / ("0" * 64)).exists()


@pytest.mark.parametrize("keep", [0, -1])
def test_the_version_in_use_stays_whatever_keep_is(bundles: list[Path], tmp_path: Path, keep: int) -> None:
    first, second = (shipped(tmp_path, bundle, keep=keep) for bundle in bundles[:2])
    assert [path.name for path in (tmp_path / "versions").iterdir()] == [Path(second).name]
    assert first != second


def test_waiting_for_the_lock_does_not_count_as_verification_time(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ship --dry-run` uses it for its estimate."""
    now, busy = [0.0], [False] * 100 + [True]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(versions, "_has_lock", lambda descriptor: busy.pop(0))
    shipped(tmp_path, bundles[0])
    assert now[0] == pytest.approx(5.0)
    assert versions.read_history(tmp_path).took["verify_s"] == 0.0


def test_programs_load_the_link_while_it_is_switched(bundles: list[Path], tmp_path: Path) -> None:
    """Each load gives one version or the other, never a mixture or an error."""
    shipped(tmp_path, bundles[0])
    end = threading.Event()
    found: list[str] = []

    def load() -> None:
        while not end.is_set():
            with closing(archive.open_archive(tmp_path / "current")) as opened:
                found.append(opened.manifest.gate.thresholds[0][0].hex())

    loading = threading.Thread(target=load)
    loading.start()
    for turn in range(6):
        shipped(tmp_path, bundles[1 + turn % 2], allow_downgrade=True)
    seen = len(found)
    while len(found) < seen + 2 and loading.is_alive():
        pass
    end.set()
    loading.join()
    assert len(found) >= seen + 2, "a load failed"


def test_release_numbers_take_precedence_over_the_order_of_arrival(bundles: list[Path], tmp_path: Path) -> None:
    def of(number: int | None, bundle: str) -> versions.Version:
        return versions.Version(ord(bundle) - 96, bundle * 64, "street", number, None, 1, "")

    used, early = of(5, "b"), of(7, "a")
    history = versions.History((early, used))
    versions.refuse_downgrade(history, used.id, early.bundle, 7)
    versions.refuse_downgrade(history, None, early.bundle, None)
    versions.refuse_downgrade(history, used.id, used.bundle, 5)
    for bundle, release in (("c" * 64, 4), ("c" * 64, None)):
        with pytest.raises(BundleError, match="--allow-downgrade"):
            versions.refuse_downgrade(history, used.id, bundle, release)


@pytest.mark.parametrize(("text", "number"), [("7", 7), ("", None), ("x", None), ("9" * 10, None), ("-1", None)])
def test_a_release_is_a_plain_number(bundles: list[Path], text: str, number: int | None) -> None:
    with closing(archive.open_archive(bundles[0])) as opened:
        manifest: Manifest = replace(opened.manifest, provenance={"release": text})
    assert versions.release_of(manifest) == number
    assert versions.release_of(released(3)(manifest)) == 3


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": "mess-ship"}', json.dumps({"format": "x", "version": 1})]
)
def test_a_request_of_another_release_is_refused(content: str) -> None:
    with pytest.raises(InputError):
        ship.request_from_json(content)
