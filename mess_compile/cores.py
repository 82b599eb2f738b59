"""Counts the CPU cores that this process may use, and makes waiting threads leave them to others."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def cores() -> int:
    """CPU cores that this process may use: those that it may run on, or fewer if a cgroup (a container's CPU limit)
    grants less time.
    """
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def cpu_quota(membership: Path = _MEMBERSHIP, cgroups: Path = _CGROUPS) -> float | None:
    """CPU time that cgroups (version 1 or 2) grant this process, in cores; None if they set no limit."""
    quotas = [quota for folder in _cgroup_folders(membership, cgroups) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def wait_without_spinning() -> None:
    """Make OpenMP threads sleep while they wait. Only libraries that are loaded later read this.

    By default they spin and take the core from the thread that they wait for: with a busy process on each of two cores
    a training step took six times as long (benchmarks/training_speed.py). A value that the user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def threads_are_set() -> bool:
    """Whether the user has set the number of OpenMP threads in the environment."""
    return bool(os.environ.get("OMP_NUM_THREADS", "").strip())


def _cgroup_folders(membership: Path, cgroups: Path) -> Iterator[Path]:
    """The process's cgroups and their parents, as far as they are mounted; inside a container the mount itself is often
    the process's own group.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if number == "0" and not controllers:
            mounts = [cgroups, cgroups / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [cgroups / controllers, cgroups / "cpu"]
        else:
            continue
        own = Path(place.lstrip("/"))
        for mount in mounts:
            yield from (mount / folder for folder in (own, *own.parents))


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()[:2]
        else:
            quota, period = ((folder / f"cpu.cfs_{what}_us").read_text().strip() for what in ("quota", "period"))
        found = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max": no limit
        return None
    return found if 0 < found < math.inf else None  # version 1 writes -1 if there is none


def share_of_cores(processes: int) -> int | None:
    """The cores of one of some processes on this machine; None if these are all of its cores, which libraries use by
    themselves.
    """
    share = max(1, cores() // processes)
    return share if share < len(os.sched_getaffinity(0)) else None
