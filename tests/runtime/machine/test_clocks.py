"""Locked clocks are always restored: after an error, a kill, or a power cut."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mess_compile
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.machine import clocks, power
from mess_compile.runtime.machine.clocks import lock_clocks, restore_leftover

PACKAGE = Path(mess_compile.__file__).parents[1]
GPU = "sys/class/devfreq/17000000.gv11b"
CPU = "sys/devices/system/cpu/cpufreq"
EMC = "sys/kernel/debug/bpmp/debug/clk/emc"
BOOT = "proc/sys/kernel/random/boot_id"
FREE = {
    f"{GPU}/min_freq": "114750000",
    f"{GPU}/max_freq": "905250000",
    f"{GPU}/governor": "nvhost_podgov",
    f"{CPU}/policy0/scaling_governor": "schedutil",
    f"{CPU}/policy0/scaling_available_governors": "interactive performance schedutil",
    f"{CPU}/policy0/scaling_min_freq": "115200",
    f"{CPU}/policy0/scaling_max_freq": "1420800",
    f"{CPU}/policy2/scaling_governor": "userspace",
    f"{CPU}/policy2/scaling_available_governors": "userspace",
    f"{CPU}/policy2/scaling_min_freq": "115200",
    f"{CPU}/policy2/scaling_max_freq": "1420800",
    f"{EMC}/mrq_rate_locked": "0",
    f"{EMC}/rate": "204000000",
    f"{EMC}/max_rate": "1600000000",
    BOOT: "0b8d2e1c-boot",
}
LOCKED = FREE | {
    f"{GPU}/min_freq": "905250000",
    f"{CPU}/policy0/scaling_governor": "performance",
    f"{CPU}/policy0/scaling_min_freq": "1420800",
    f"{CPU}/policy2/scaling_min_freq": "1420800",
    f"{EMC}/mrq_rate_locked": "1",
    f"{EMC}/rate": "1600000000",
}
HOLDS = """
import os, sys, time
from pathlib import Path
from mess_compile.runtime.machine.clocks import lock_clocks
with lock_clocks(Path(sys.argv[1]), Path(sys.argv[2])):
    child = os.fork() if "fork" in sys.argv else None
    if child == 0:
        time.sleep(100)
        os._exit(0)
    print(child or "locked", flush=True)
    time.sleep(100)
"""
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def _no_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(power, "SYSTEM_FOLDERS", str(tmp_path / "bin"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return device(tmp_path / "root")


@pytest.fixture
def keep(tmp_path: Path) -> Path:
    return tmp_path / "state" / "clocks.json"


def device(root: Path, content: dict[str, str] = FREE) -> Path:
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def found(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text().strip() for path in root.rglob("*") if path.is_file()}


def install(tmp_path: Path, name: str, script: str) -> None:
    tool = tmp_path / "bin" / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def wait_until(reached: Callable[[], bool]) -> None:
    """Long, since nothing is timed here: only what never happens takes so long."""
    end = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def holder(keep: Path, root: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start processes that hold the clocks, once they do."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDS, str(keep), str(root), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


class TestInOrder:
    def test_clocks_are_locked_at_the_maximum_and_restored(self, root: Path, keep: Path) -> None:
        with lock_clocks(keep, root) as lock:
            assert found(root) == LOCKED
            assert lock.held == ("GPU", "CPU", "EMC")
        assert found(root) == FREE
        assert list(keep.parent.iterdir()) == []

    def test_they_are_restored_after_an_error(self, root: Path, keep: Path) -> None:
        with pytest.raises(ZeroDivisionError), lock_clocks(keep, root):
            raise ZeroDivisionError
        assert found(root) == FREE
        assert not keep.exists()

    def test_previous_values_are_on_disk_before_anything_changes(
        self, root: Path, keep: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []
        apply = clocks._apply

        def observed(*arguments: Any) -> tuple[str, ...]:
            seen.append((found(root), json.loads(keep.read_text())))
            return apply(*arguments)

        monkeypatch.setattr(clocks, "_apply", observed)
        with lock_clocks(keep, root):
            pass
        ((files, kept),) = seen
        assert files == FREE
        assert dict(kept["writes"]) == {name: FREE[name] for name in FREE if FREE[name] != LOCKED[name]}
        assert kept["boot_id"] == FREE[BOOT]

    def test_the_memory_rate_is_restored_before_it_is_unlocked(
        self, root: Path, keep: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = clocks._write
        written: list[tuple[str, str]] = []

        def noted(path: Path, text: str) -> str:
            written.append((path.name, text))
            return write(path, text)

        monkeypatch.setattr(clocks, "_write", noted)
        with lock_clocks(keep, root):
            assert written[-2:] == [("mrq_rate_locked", "1"), ("rate", "1600000000")]
            written.clear()
        assert written[:2] == [("rate", "204000000"), ("mrq_rate_locked", "0")]

    def test_a_host_without_a_gpu_locks_its_processor(self, tmp_path: Path, keep: Path) -> None:
        host = device(tmp_path / "host", {name: text for name, text in FREE.items() if name.startswith(CPU)})
        with lock_clocks(keep, host) as lock:
            assert lock.held == ("CPU",)
        assert found(host) == {name: text for name, text in FREE.items() if name.startswith(CPU)}

    def test_memory_clocks_that_only_root_may_read_are_left_alone(self, root: Path, keep: Path) -> None:
        shutil.rmtree(root / EMC)
        with lock_clocks(keep, root) as lock:
            assert lock.held == ("GPU", "CPU")


class TestKilled:
    def test_the_watcher_restores_after_kill_9(
        self, root: Path, keep: Path, holder: Callable[..., subprocess.Popen[str]]
    ) -> None:
        process = holder()
        assert says(process) == "locked"
        assert found(root) == LOCKED
        process.send_signal(signal.SIGKILL)
        wait_until(lambda: not keep.exists())
        assert found(root) == FREE

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
    def test_the_watcher_restores_after_other_signals(
        self, root: Path, keep: Path, holder: Callable[..., subprocess.Popen[str]], number: int
    ) -> None:
        process = holder()
        assert says(process) == "locked"
        process.send_signal(number)
        wait_until(lambda: not keep.exists())
        assert found(root) == FREE

    def test_a_forked_child_that_lives_on_does_not_keep_the_clocks_locked(
        self, root: Path, keep: Path, holder: Callable[..., subprocess.Popen[str]]
    ) -> None:
        process = holder("fork")
        child = says(process)
        process.send_signal(signal.SIGKILL)
        try:
            wait_until(lambda: not keep.exists())
            assert found(root) == FREE
            os.kill(int(child), 0)
        finally:
            os.kill(int(child), signal.SIGKILL)

    def test_the_next_start_restores_when_the_watcher_was_killed_too(
        self, root: Path, keep: Path, holder: Callable[..., subprocess.Popen[str]]
    ) -> None:
        process = holder()
        assert says(process) == "locked"
        (watch,) = children(process)
        os.kill(watch, signal.SIGKILL)
        process.kill()
        process.wait()
        assert found(root) == LOCKED
        with lock_clocks(keep, root):
            assert found(root) == LOCKED
        assert found(root) == FREE
        assert not restore_leftover(keep)

    def test_the_watcher_survives_a_hang_up(
        self, root: Path, keep: Path, holder: Callable[..., subprocess.Popen[str]]
    ) -> None:
        process = holder()
        assert says(process) == "locked"
        (watch,) = children(process)
        assert os.getsid(watch) == watch
        os.kill(watch, signal.SIGHUP)
        process.kill()
        wait_until(lambda: not keep.exists())
        assert found(root) == FREE

    def test_a_living_owner_is_not_disturbed(
        self, root: Path, keep: Path, holder: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(clocks, "_ATTEMPTS", 2)
        process = holder()
        assert says(process) == "locked"
        with pytest.raises(InputError, match=r"clocks are locked by a process that is still running \(.*clocks.json\)"):
            restore_leftover(keep)
        assert found(root) == LOCKED

    def test_after_a_reboot_nothing_is_written(
        self, root: Path, keep: Path, holder: Callable[..., subprocess.Popen[str]]
    ) -> None:
        process = holder()
        assert says(process) == "locked"
        os.kill(children(process)[0], signal.SIGKILL)
        process.kill()
        process.wait()
        device(root, rebooted := {**FREE, f"{GPU}/min_freq": "318750000", BOOT: "another-boot"})
        assert restore_leftover(keep)
        assert found(root) == rebooted
        assert not keep.exists()


class TestRefused:
    def test_without_permission_the_error_names_the_file_and_the_remedy(self, keep: Path) -> None:
        """Without mocks: root drops its privileges; other users have none."""
        script = (
            "import os, sys\nfrom pathlib import Path\nfrom mess_compile.runtime.base import errors\n"
            "from mess_compile.runtime.machine import clocks\n"
            "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "try:\n    with clocks.lock_clocks(Path(sys.argv[1]) / 'keep', Path(sys.argv[1])): print('locked')\n"
            "except errors.InputError as error: print(error)\n"
        )
        place = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
        try:
            place.chmod(0o755)
            device(place)
            for path in place.rglob("*"):
                path.chmod(0o555 if path.is_dir() else 0o444)
            command = [sys.executable, "-c", script, str(place)]
            environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.stdout == (
                f"clocks cannot be locked: {place}/{GPU}/min_freq cannot be written (Permission denied); run as root "
                "there, allow `sudo -n jetson_clocks` without a password (in /etc/sudoers.d), or measure without "
                "--lock-clocks\n"
            )
            assert found(place) == FREE
        finally:
            for path in (place, *(folder for folder in place.rglob("*") if folder.is_dir())):
                path.chmod(0o755)
            shutil.rmtree(place)

    def test_a_machine_without_clocks_to_lock(self, tmp_path: Path, keep: Path) -> None:
        with pytest.raises(InputError, match="no clocks that can be locked"), lock_clocks(keep, tmp_path):
            pass
        assert not keep.exists()

    def test_a_value_that_the_kernel_rejects_leaves_everything_unchanged(
        self, root: Path, keep: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = clocks._write

        def picky(path: Path, text: str) -> str:
            return f"{path} cannot be set to {text} (Invalid argument)" if text == "1420800" else write(path, text)

        monkeypatch.setattr(clocks, "_write", picky)
        with pytest.raises(InputError, match=r"scaling_min_freq cannot be set to 1420800 \(Invalid argument\)"):
            lock_clocks(keep, root).__enter__()
        assert found(root) == FREE
        assert not keep.exists()

    def test_memory_that_cannot_be_set_is_not_reported_as_locked(
        self, root: Path, keep: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = clocks._write
        monkeypatch.setattr(clocks, "_write", lambda path, text: "no" if path.name == "rate" else write(path, text))
        with lock_clocks(keep, root) as lock:
            assert lock.held == ("GPU", "CPU")
        assert found(root) == FREE
        assert not keep.exists()

    def test_clocks_that_cannot_be_restored_are_reported_and_retried(
        self, root: Path, keep: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with (
            pytest.raises(InputError, match=r"the clocks are still locked: .*/min_freq cannot be set"),
            lock_clocks(keep, root),
        ):
            (root / GPU / "min_freq").unlink()
        assert keep.exists()
        assert "the clocks are still locked" in capfd.readouterr().err
        (root / GPU / "min_freq").write_text("")
        assert restore_leftover(keep)
        assert found(root) == FREE

    def test_without_a_writable_file_nothing_is_locked(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="cannot be"):
            lock_clocks(tmp_path / "file" / "clocks.json", root).__enter__()
        assert found(root) == FREE

    def test_without_a_watcher_nothing_is_locked(
        self, root: Path, keep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for executable in ("false", "no-such-program"):
            install(tmp_path, "false", "exit 1")
            monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / executable))
            with pytest.raises(InputError, match="clocks are not locked: "):
                lock_clocks(keep, root).__enter__()
            assert found(root) == FREE
            assert not keep.exists()


class TestJetsonClocks:
    """Where the kernel's files are closed to us: the tool through sudo, whose calls are written down."""

    @pytest.fixture(autouse=True)
    def _as_a_user(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(clocks, "_refusal", lambda root, change: f"{root / change.path} cannot be written")
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        log = tmp_path / "log"
        install(tmp_path, "sudo", f'test "$1 $2" = "-n -k" && shift 2 && echo "sudo" >>{log} && exec "$@"')
        stores = 'if [ "$1" = --store ]; then test ! -e "$2" && echo stored >"$2"; fi'
        install(tmp_path, "jetson_clocks", f'echo "$*" >>{log}\n{stores}')

    def test_it_stores_locks_and_restores(self, tmp_path: Path, root: Path, keep: Path) -> None:
        stored = f"{keep}.jetson_clocks"
        with lock_clocks(keep, root) as lock:
            assert lock.held == ("jetson_clocks",)
            assert (tmp_path / "log").read_text() == f"sudo\n--store {stored}\nsudo\n\n"
        assert (tmp_path / "log").read_text().endswith(f"sudo\n\nsudo\n--restore {stored}\n")
        assert list(keep.parent.iterdir()) == []
        assert found(root) == FREE

    def test_an_older_store_is_removed_so_that_the_tool_does_not_ask(self, root: Path, keep: Path) -> None:
        keep.parent.mkdir()
        Path(f"{keep}.jetson_clocks").write_text("of a run that was killed between the two files")
        with lock_clocks(keep, root):
            pass

    def test_a_password_is_never_asked_for(self, tmp_path: Path, root: Path, keep: Path) -> None:
        install(tmp_path, "sudo", "echo 'sudo: a password is required' >&2; exit 1")
        with pytest.raises(InputError) as refused:
            lock_clocks(keep, root).__enter__()
        assert f"{GPU}/min_freq cannot be written, and jetson_clocks fails: " in str(refused.value)
        assert "(sudo: a password is required); run as root there, allow `sudo -n jetson_clocks`" in str(refused.value)
        assert "\n" not in str(refused.value)
        assert not keep.exists()


class TestCard:
    @pytest.fixture(autouse=True)
    def _as_root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)

    def install(self, tmp_path: Path, more: str = "") -> None:
        answer = f'case "$*" in *--query-gpu=*) echo 1980; exit;; esac; echo "$*" >>{tmp_path}/log\n{more}'
        install(tmp_path, "nvidia-smi", answer)

    def test_its_clock_is_locked_at_the_maximum_and_reset(self, tmp_path: Path, keep: Path) -> None:
        self.install(tmp_path)
        with lock_clocks(keep, tmp_path / "no-files") as lock:
            assert lock.held == ("GPU",)
        calls = (tmp_path / "log").read_text().splitlines()
        assert calls == ["-i 0 --reset-gpu-clocks", "-i 0 --lock-gpu-clocks=1980,1980", "-i 0 --reset-gpu-clocks"]

    def test_it_is_the_card_that_cuda_uses(self, tmp_path: Path, keep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.install(tmp_path)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f6a,GPU-1111")
        with lock_clocks(keep, tmp_path / "no-files"):
            pass
        assert (tmp_path / "log").read_text().count("-i GPU-8f6a ") == 3

    def test_a_driver_that_forbids_it_is_quoted(self, tmp_path: Path, keep: Path) -> None:
        self.install(tmp_path, 'echo "The current user does not have permission to change clocks"; exit 4')
        with pytest.raises(InputError) as refused:
            lock_clocks(keep, tmp_path / "no-files").__enter__()
        assert "(The current user does not have permission to change clocks)" in str(refused.value)
        assert "allow `sudo -n nvidia-smi` without a password" in str(refused.value)
        assert not keep.exists()

    def test_a_card_without_a_maximum_clock_is_ignored(self, tmp_path: Path, keep: Path) -> None:
        install(tmp_path, "nvidia-smi", "echo '[N/A]'")
        with pytest.raises(InputError, match="no clocks that can be locked"):
            lock_clocks(keep, tmp_path / "no-files").__enter__()


class TestKeptFile:
    def content(self, root: Path) -> dict[str, Any]:
        return {
            "format": "mess-clocks",
            "version": 1,
            "root": str(root),
            "boot_id": FREE[BOOT],
            "writes": [[f"{GPU}/min_freq", "114750000"]],
            "jetson_clocks": None,
            "card": None,
        }

    def test_a_complete_file_is_restored_and_removed(self, root: Path, tmp_path: Path) -> None:
        device(root, LOCKED)
        keep = tmp_path / "keep"
        keep.write_text(json.dumps(self.content(root)))
        assert restore_leftover(keep)
        assert found(root) == {**LOCKED, f"{GPU}/min_freq": "114750000"}
        assert not keep.exists()

    @pytest.mark.parametrize(
        "changed",
        [
            {"format": "mess-table"},
            {"version": 2},
            {"writes": None},
            {"writes": [["sys/class/devfreq/17000000.gv11b/min_freq"]]},
            {"writes": [["etc/passwd", "root"]]},
            {"writes": [["sys/class/devfreq/../../../etc/min_freq", "1"]]},
            {"writes": [[f"{GPU}/min_freq", "1 2"]]},
            {"writes": [[f"{GPU}/min_freq", "1\n"]]},
            {"jetson_clocks": "relative"},
            {"jetson_clocks": 3},
            {"card": "0; reboot"},
            {"card": "--help"},
            {"root": None, "boot_id": 3, "writes": 3},
        ],
        ids=str,
    )
    def test_a_foreign_file_is_refused_and_nothing_is_written(
        self, root: Path, tmp_path: Path, changed: dict[str, Any]
    ) -> None:
        keep = tmp_path / "keep"
        keep.write_text(json.dumps({**self.content(root), **changed}))
        self.refused(keep)
        assert found(root) == FREE

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"[" * 100_000, b'{"format": "mess-clocks"}'])
    def test_a_damaged_one_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "keep").write_bytes(content)
        self.refused(tmp_path / "keep")

    def refused(self, keep: Path) -> None:
        with pytest.raises(InputError, match=r"is damaged .*: reboot the device, which resets its clocks") as refused:
            restore_leftover(keep)
        assert str(keep) in str(refused.value)
        assert "\n" not in str(refused.value)
        assert keep.exists()

    def test_a_missing_file_is_not_an_error(self, tmp_path: Path) -> None:
        assert not restore_leftover(tmp_path / "keep")
        assert not restore_leftover(tmp_path / "no-folder" / "keep")
