"""Clocks at their highest while something is measured, and put back afterwards, whatever becomes of us.

Where the kernel's files can be written, they are: GPU (devfreq), processor (cpufreq) and memory (the BPMP's debugfs).
Elsewhere it is `sudo -n jetson_clocks` on a Jetson, and `nvidia-smi --lock-gpu-clocks` on a card. What was there is
written to a file before anything changes. `python -m mess_compile.runtime.machine.clocks FILE`, a process in a
session of its own, restores from it when this one dies; `restore_leftover` does when both have died. After a reboot
nothing is left to restore. Sources: see `power.py`; NVIDIA's Jetson Linux Developer Guide on jetson_clocks.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator, List, Optional, Set, Tuple

from mess_compile.runtime.base import decode
from mess_compile.runtime.base.errors import InputError, one_line
from mess_compile.runtime.machine import power

_FORMAT, _VERSION = "mess-clocks", 1
_PATIENCE_S = 30
_ATTEMPTS = 50
_OURS = re.compile(
    r"sys/class/devfreq/[\w.-]+/min_freq|sys/devices/system/cpu/cpufreq/policy[0-9]+/scaling_(governor|min_freq)"
    r"|sys/kernel/debug/bpmp/debug/clk/emc/(rate|mrq_rate_locked)",
    re.ASCII,
)
_REMEDY = (
    "run as root there, allow `sudo -n {tool}` without a password (in /etc/sudoers.d), or measure without --lock-clocks"
)


@dataclass(frozen=True)
class ClockLock:
    """What is locked: of `GPU`, `CPU`, `EMC` (memory), or `jetson_clocks` for all that this tool locks."""

    held: Tuple[str, ...]


@dataclass(frozen=True)
class _Kept:
    """What to put back: `writes` (path below `root`, text) in the order in which the files were changed, the file that
    `jetson_clocks` stored to, and the card whose clocks `nvidia-smi` locked."""

    root: str
    boot_id: str
    writes: Tuple[Tuple[str, str], ...] = ()
    jetson_clocks: Optional[str] = None
    card: Optional[str] = None


@dataclass(frozen=True)
class _Change:
    """One file of the kernel's: what is locked by it, its path below the root, and the text before and after."""

    what: str
    path: str
    before: str
    after: str


@dataclass(frozen=True)
class _Plan:
    kept: _Kept
    held: Tuple[str, ...]
    changes: Tuple[_Change, ...] = ()
    commands: Tuple[Tuple[str, ...], ...] = ()


@contextmanager
def lock_clocks(keep: Path, root: Path = Path("/")) -> Iterator[ClockLock]:
    """Hold the clocks at the highest that the power mode allows until the body ends, or this process does.

    `keep` is the file for what was there before; a left-over of an earlier run is restored first. Clocks of a card go
    back to the driver's default, since it does not tell what was asked for before. Raises InputError when clocks cannot
    be locked (nothing is changed then), or cannot be put back.
    """
    keep, root = keep.absolute(), root.absolute()
    restore_leftover(keep)
    plan = _planned(root, keep)
    with _watched(keep), _written(keep, plan.kept):
        try:
            yield ClockLock(_apply(root, plan))
        finally:
            _put_back(keep, plan.kept)


def restore_leftover(keep: Path) -> bool:
    """Put back what a killed run left locked, as told in the file `keep`, which is removed; says whether there was one.

    Raises InputError when the file is damaged, a living process holds it, or the clocks cannot be put back.
    """
    try:
        descriptor = os.open(str(keep), os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InputError(f"{keep}, on the clocks to restore, cannot be read: {error.strerror}") from error
    with open(descriptor, "rb") as stream:
        if not _owned(descriptor):
            raise InputError(f"the clocks are locked by a process that still runs ({keep}): wait for it, or stop it")
        if not _is_at(descriptor, keep):  # restored by another, while we waited
            return False
        kept = _parsed(keep, stream.read(1 << 20))
        if kept.boot_id == _boot_id(Path(kept.root)):
            _put_back(keep, kept)
        else:
            _forget(keep, kept)
        return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(str(path)))
    except FileNotFoundError:
        return False


def _planned(root: Path, keep: Path) -> _Plan:
    """What to change here. Raises InputError when the clock that matters most cannot be."""
    wanted = _changes(root)
    asked = [(change.what, _refusal(root, change)) for change in wanted]
    refusals = {what: refusal for what, refusal in asked if refusal}
    changes = tuple(change for change in wanted if change.what not in refusals)
    held = tuple(dict.fromkeys(change.what for change in changes))
    kept = _Kept(str(root), _boot_id(root), tuple((change.path, change.before) for change in changes))
    first = wanted[0].what if wanted else ""
    if first != "GPU":
        card = _card()
        if card is not None:
            return _card_plan(*card, kept, held, changes)
    if first in held:
        return _Plan(kept, held, changes)
    if power.found_tool("jetson_clocks"):
        return _jetson_plan(root, keep, refusals.get(first, "the kernel's files for them are missing"))
    if not first:
        raise InputError("there are no clocks here that can be locked: measure without --lock-clocks")
    raise InputError(f"clocks cannot be locked: {refusals[first]}; {_REMEDY.format(tool='jetson_clocks')}")


def _card_plan(card: str, mhz: str, kept: _Kept, held: Tuple[str, ...], changes: Tuple[_Change, ...]) -> _Plan:
    """Whether we may is asked by what must work later: putting the card's clocks back."""
    error = _run(_resetting(card))
    if error:
        raise InputError(f"clocks cannot be locked: {error}; {_REMEDY.format(tool='nvidia-smi')}")
    command = _as_root("nvidia-smi", "-i", card, f"--lock-gpu-clocks={mhz},{mhz}")
    return _Plan(replace(kept, card=card), ("GPU", *held), changes, (command,))


def _resetting(card: str) -> Tuple[str, ...]:
    return _as_root("nvidia-smi", "-i", card, "--reset-gpu-clocks")


def _jetson_plan(root: Path, keep: Path, refusal: str) -> _Plan:
    """By the tool of JetPack, for which a password must not be needed: nobody could give it after a crash."""
    stored = keep.with_name(f"{keep.name}.jetson_clocks")
    stored.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        stored.unlink()  # it asks before it overwrites
    error = _run(_as_root("jetson_clocks", "--store", str(stored)))
    if error:
        remedy = _REMEDY.format(tool="jetson_clocks")
        raise InputError(f"clocks cannot be locked: {refusal}, and jetson_clocks says: {error}; {remedy}")
    kept = _Kept(str(root), _boot_id(root), jetson_clocks=str(stored))
    return _Plan(kept, ("jetson_clocks",), commands=(_as_root("jetson_clocks"),))


def _changes(root: Path) -> List[_Change]:
    """All that there is to change, the GPU first; memory's lock comes before its rate, and the last is undone first."""
    found: List[Optional[_Change]] = []
    for folder in power.gpu_folders(root)[:1]:
        found.append(_change(root, "GPU", folder / "min_freq", _text(folder / "max_freq")))
    for folder in power.cpu_folders(root):
        if "performance" in _text(folder / "scaling_available_governors").split():
            found.append(_change(root, "CPU", folder / "scaling_governor", "performance"))
        found.append(_change(root, "CPU", folder / "scaling_min_freq", _text(folder / "scaling_max_freq")))
    emc = root / power.EMC
    if _text(emc / "max_rate"):
        found.append(_change(root, "EMC", emc / "mrq_rate_locked", "1"))
        found.append(_change(root, "EMC", emc / "rate", _text(emc / "max_rate")))
    return [change for change in found if change is not None]


def _change(root: Path, what: str, path: Path, after: str) -> Optional[_Change]:
    before = _text(path)
    return _Change(what, str(path.relative_to(root)), before, after) if before and after else None


def _refusal(root: Path, change: _Change) -> str:
    """Why a file cannot be written, "" when it can; opening it changes nothing."""
    try:
        os.close(os.open(str(root / change.path), os.O_WRONLY))
    except OSError as error:
        return f"{root / change.path} cannot be written ({error.strerror})"
    return ""


def _card() -> Optional[Tuple[str, str]]:
    """The card that CUDA uses first, as `nvidia-smi` names it, and its highest clock in MHz."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if not card:
        return None
    told = power.output("nvidia-smi", "-i", card, "--query-gpu=clocks.max.graphics", "--format=csv,noheader,nounits")
    return (card, told.strip()) if re.fullmatch(r"[0-9]{2,5}", told.strip()) else None


def _apply(root: Path, plan: _Plan) -> Tuple[str, ...]:
    """What is held then; memory that refuses is not, since not every board lets its clock be set."""
    refused = set()
    for change in plan.changes:
        error = _write(root / change.path, change.after)
        if error and change.what != "EMC":
            raise InputError(f"clocks cannot be locked: {error}; measure without --lock-clocks")
        refused.update([change.what] if error else [])
    for command in plan.commands:
        error = _run(command)
        if error:
            raise InputError(f"clocks cannot be locked: {error}; measure without --lock-clocks")
    return tuple(what for what in plan.held if what not in refused)


def _put_back(keep: Path, kept: _Kept) -> None:
    root = Path(kept.root)
    errors = [_restored(root, path, text) for path, text in reversed(kept.writes)]
    if kept.jetson_clocks is not None:
        errors.append(_run(_as_root("jetson_clocks", "--restore", kept.jetson_clocks)))
    if kept.card is not None:
        errors.append(_run(_resetting(kept.card)))
    failed = [error for error in errors if error]
    if failed:
        raise InputError(f"the clocks stay locked: {failed[0]}; run the same command again as root, or reboot ({keep})")
    _forget(keep, kept)


def _restored(root: Path, path: str, text: str) -> str:
    """Memory's rate is a try: it moves by itself as soon as it is not held any more."""
    error = _write(root / path, text)
    return "" if path == f"{power.EMC}/rate" else error


def _forget(keep: Path, kept: _Kept) -> None:
    """The keep file goes first: it must not name a file that is gone."""
    for path in (str(keep), *([kept.jetson_clocks] if kept.jetson_clocks else [])):
        with suppress(FileNotFoundError):
            os.unlink(path)


@contextmanager
def _written(keep: Path, kept: _Kept) -> Iterator[None]:
    """Write `keep`, all of it or nothing, and own it while the body runs."""
    content = decode.encode(kept, _FORMAT, _VERSION)
    try:
        keep.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{keep.name}.", dir=str(keep.parent))
    except OSError as error:
        raise InputError(f"clocks are not locked: {keep} cannot be written ({error.strerror})") from error
    with _not_inherited(descriptor):
        _owned(descriptor)
        try:
            os.write(descriptor, json.dumps(content).encode())
            os.fsync(descriptor)
            os.replace(name, str(keep))
        except OSError as error:
            os.unlink(name)
            raise InputError(f"clocks are not locked: {keep} cannot be written ({error.strerror})") from error
        yield


def _owned(descriptor: int) -> bool:
    """Take the lock that tells others that we live; the system drops it with us. Waits a little for a restoring one."""
    for _ in range(_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return True
    return False


@contextmanager
def _watched(keep: Path) -> Iterator[None]:
    """Have a process of its own restore when the pipe to it ends, which happens with this process at the latest."""
    watch = _start_watch(keep)
    assert watch.stdin is not None
    assert watch.stdout is not None
    try:
        with watch.stdout as said, watch.stdin as pipe, _not_inherited(os.dup(pipe.fileno())):
            pipe.close()
            if said.readline() != b"ready\n":
                raise InputError("clocks are not locked: the process that restores them after a crash does not start")
            yield
    finally:
        with suppress(subprocess.TimeoutExpired):
            watch.wait(_PATIENCE_S)


def _start_watch(keep: Path) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).resolve().parents[3])
    path = [package, *filter(None, sys.path)]  # without the current folder, which `-c` puts in front
    imports = f"import sys; sys.path[:] = {path!r}\nfrom {__name__} import watch"
    code = f"{imports}\nwatch(sys.argv[1])"
    try:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(keep)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise InputError(f"clocks are not locked: no process to watch over them starts ({error.strerror})") from error


_ours_alone: Set[int] = set()


def _close_in_child() -> None:
    """A forked child would else hold the pipe and outlive us: nothing would be restored."""
    for descriptor in _ours_alone:
        os.close(descriptor)
    _ours_alone.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def _not_inherited(descriptor: int) -> Iterator[None]:
    _ours_alone.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _ours_alone:
            _ours_alone.discard(descriptor)
            os.close(descriptor)


def _parsed(keep: Path, content: bytes) -> _Kept:
    """Strict, since root may be the one who writes what it says."""
    try:
        kept: _Kept = decode.document(_Kept, content.decode("utf-8"), _FORMAT, _VERSION, "its content")
        _check_ours(kept)
    except (UnicodeDecodeError, decode.DecodeError) as error:
        remedy = "reboot the device, which resets its clocks, and remove the file"
        raise InputError(f"{keep}, on the clocks to restore, is damaged ({one_line(error)}): {remedy}") from error
    return kept


def _check_ours(kept: _Kept) -> None:
    """Raises DecodeError for what we never wrote."""
    for path, text in kept.writes:
        if not _OURS.fullmatch(path) or not re.fullmatch(r"[\w-]{1,40}", text, re.ASCII):
            raise decode.DecodeError(f"{path[:80]!r} = {text[:40]!r} is none of ours")
    if kept.jetson_clocks is not None and not Path(kept.jetson_clocks).is_absolute():
        raise decode.DecodeError(f"jetson_clocks is {kept.jetson_clocks!r}")
    if kept.card is not None and not re.fullmatch(r"[0-9]{1,2}|(GPU|MIG)-[\w/-]{1,80}", kept.card, re.ASCII):
        raise decode.DecodeError(f"card is {kept.card!r}")


def _as_root(*command: str) -> Tuple[str, ...]:
    """Through sudo unless we are root. It must do without a cached password (-k), which the watching process lacks."""
    tool = power.found_tool(command[0]) or command[0]
    return (*(() if os.geteuid() == 0 else ("sudo", "-n", "-k")), tool, *command[1:])


def _run(command: Tuple[str, ...]) -> str:
    """ "" when it succeeds, what it says otherwise."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        return one_line(error)
    said = one_line(done.stdout.decode("utf-8", "replace"))
    return "" if done.returncode == 0 else f"`{' '.join(command)}` fails ({said or done.returncode})"


def _write(path: Path, text: str) -> str:
    """ "" when it succeeds, why not otherwise."""
    try:
        descriptor = os.open(str(path), os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"{path} cannot be set to {text} ({error.strerror})"
    return ""


def _text(path: Path) -> str:
    try:
        with open(str(path), "rb") as stream:
            return stream.read(4096).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _boot_id(root: Path) -> str:
    return _text(root / "proc" / "sys" / "kernel" / "random" / "boot_id")


def watch(keep: str) -> None:
    """Wait until the other process is gone, then restore what it left by the file `keep`."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with suppress(BrokenPipeError):  # killed already
        os.write(sys.stdout.fileno(), b"ready\n")
    sys.stdin.buffer.read()
    try:
        restore_leftover(Path(keep))
    except InputError as error:
        sys.exit(f"error: {error}")
