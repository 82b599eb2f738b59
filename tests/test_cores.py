"""In a container with half a core, eight threads only wait for each other; and threads that wait must not spin."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest

from mess_compile import cores, extras


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")


def membership(root: Path, text: str) -> Path:
    path = root / "membership"
    path.write_text(text)
    return path


def test_the_tightest_limit_of_the_groups_around_a_process_counts(tmp_path: Path) -> None:
    group(tmp_path / "cgroup/pods/one/inner", cpu_max="max 100000")
    group(tmp_path / "cgroup/pods/one", cpu_max="150000 100000")
    group(tmp_path / "cgroup/pods", cpu_max="400000 100000")
    group(tmp_path / "cgroup/others", cpu_max="10000 100000")
    own = membership(tmp_path, "0::/pods/one/inner\n")
    assert cores.cpu_quota(own, tmp_path / "cgroup") == 1.5


@pytest.mark.parametrize(("quota", "found"), [("50000", 0.5), ("-1", None)])
def test_limits_of_the_first_version_of_cgroups_count_too(tmp_path: Path, quota: str, found: float | None) -> None:
    group(tmp_path / "cgroup/cpu,cpuacct/box", cpu_cfs_quota_us=quota, cpu_cfs_period_us="100000")
    own = membership(tmp_path, "12:memory:/box\n3:cpu,cpuacct:/box\n0::/\n")
    assert cores.cpu_quota(own, tmp_path / "cgroup") == found


def test_inside_a_container_the_mount_itself_is_the_group(tmp_path: Path) -> None:
    group(tmp_path / "cgroup", cpu_max="200000 100000")
    assert cores.cpu_quota(membership(tmp_path, "0::/elsewhere/seen/from/outside\n"), tmp_path / "cgroup") == 2
    assert cores.cpu_quota(tmp_path / "missing", tmp_path / "cgroup") is None


@pytest.mark.parametrize(("allowed", "quota", "found"), [(8, None, 8), (8, 2.5, 3), (2, 6.0, 2), (4, 0.2, 1)], ids=str)
def test_cores_are_those_allowed_or_fewer_by_the_limit(
    monkeypatch: pytest.MonkeyPatch, allowed: int, quota: float | None, found: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert cores.cores() == found
    assert cores.share_of_cores(1) == (None if found == allowed else found)
    assert cores.share_of_cores(2) == (max(1, found // 2) if max(1, found // 2) < allowed else None)


@pytest.mark.parametrize("own", [None, "active"])
def test_threads_are_told_not_to_spin_before_torch_is_loaded(monkeypatch: pytest.MonkeyPatch, own: str | None) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    seen = []

    def imported(name: str) -> ModuleType:
        seen.append(os.environ.get("OMP_WAIT_POLICY"))
        return ModuleType(name)

    monkeypatch.setattr(importlib, "import_module", imported)
    extras.torch_module("training.train")
    assert seen == [own or "passive"]
