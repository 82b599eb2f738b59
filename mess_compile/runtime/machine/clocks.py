"""Locks clocks at their maximum during a measurement; they are restored on exit and after a crash.

Writes the kernel's files where that is allowed: GPU (devfreq), CPU (cpufreq) and memory (the BPMP's debugfs). Otherwise
runs `sudo -n jetson_clocks` on a Jetson, and `nvidia-smi --lock-gpu-clocks` for a graphics card. The previous values
are saved to a file before anything changes. A watcher, a process in a session of its own, restores them from it when
this process dies; `restore_leftover` does when both have died. A reboot resets the clocks. Sources: see `power.py`;
NVIDIA's Jetson Linux Developer Guide on jetson_clocks.
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
_OUR_FILES = re.compile(
    r"sys/class/devfreq/[\w.-]+/min_freq|sys/devices/system/cpu/cpufreq/policy[0-9]+/scaling_(governor|min_freq)"
    r"|sys/kernel/debug/bpmp/debug/clk/emc/(rate|mrq_rate_locked)",
    re.ASCII,
)
_REMEDY = (
    "run as root there, allow `sudo -n {tool}` without a password (in /etc/sudoers.d), or measure without --lock-clocks"
)


@dataclass(frozen=True)
class ClockLock:
    """What is locked: some of `GPU`, `CPU`, `EMC` (memory), or `jetson_clocks` for all that this tool locks."""

    held: Tuple[str, ...]


@dataclass(frozen=True)
class _SavedClocks:
    """What to restore: `writes` (path below `root`, text) in the order in which the files were changed, the file that
    `jetson_clocks` wrote its state to, and the card whose clocks `nvidia-smi` locked."""

    root: str
    boot_id: str
    writes: Tuple[Tuple[str, str], ...] = ()
    jetson_clocks: Optional[str] = None
    card: Optional[str] = None


@dataclass(frozen=True)
class _Change:
    """A change of one kernel file: which clock it locks, its path below the root, and the text before and after."""

    what: str
    path: str
    before: str
    after: str


@dataclass(frozen=True)
class _Plan:
    saved: _SavedClocks
    held: Tuple[str, ...]
    changes: Tuple[_Change, ...] = ()
    commands: Tuple[Tuple[str, ...], ...] = ()


@contextmanager
def lock_clocks(file: Path, root: Path = Path("/")) -> Iterator[ClockLock]:
    """Lock the clocks at the maximum of the power mode until the body or this process ends.

    `file` is where the previous values are saved; what an earlier run left there is restored first. A card's clocks are
    reset to the driver's default, since the driver does not report earlier settings. Raises InputError when clocks
    cannot be locked (nothing is changed then), or cannot be restored.
    """
    file, root = file.absolute(), root.absolute()
    restore_leftover(file)
    plan = _plan_lock(root, file)
    with _restored_by_watcher(file), _save(file, plan.saved):
        try:
            yield ClockLock(_apply(root, plan))
        finally:
            _restore(file, plan.saved)


def restore_leftover(file: Path) -> bool:
    """Restore the clocks that a killed run left locked, from `file`, which is removed; False when there is no file.

    Raises InputError when the file is damaged, a running process holds it, or the clocks cannot be restored.
    """
    try:
        descriptor = os.open(str(file), os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InputError(f"{file}, with the clocks to restore, cannot be read: {error.strerror}") from error
    with open(descriptor, "rb") as stream:
        if not _lock(descriptor):
            raise InputError(
                f"the clocks are locked by a process that is still running ({file}): wait for it, or stop it"
            )
        if not _is_at(descriptor, file):  # another process has restored it meanwhile
            return False
        saved = _decode_saved(file, stream.read(1 << 20))
        if saved.boot_id == _boot_id(Path(saved.root)):
            _restore(file, saved)
        else:
            _remove_saved(file, saved)
        return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(str(path)))
    except FileNotFoundError:
        return False


def _plan_lock(root: Path, file: Path) -> _Plan:
    """What to change on this machine. Raises InputError when its most important clock cannot be locked."""
    possible = _changes(root)
    checked = [(change.what, _refusal(root, change)) for change in possible]
    refusals = {what: refusal for what, refusal in checked if refusal}
    changes = tuple(change for change in possible if change.what not in refusals)
    held = tuple(dict.fromkeys(change.what for change in changes))
    saved = _SavedClocks(str(root), _boot_id(root), tuple((change.path, change.before) for change in changes))
    first = possible[0].what if possible else ""
    if first != "GPU":
        card = _card()
        if card is not None:
            return _card_plan(*card, saved, held, changes)
    if first in held:
        return _Plan(saved, held, changes)
    if power.find_tool("jetson_clocks"):
        return _jetson_plan(root, file, refusals.get(first, "the kernel's files for them are missing"))
    if not first:
        raise InputError("this machine has no clocks that can be locked: measure without --lock-clocks")
    raise InputError(f"clocks cannot be locked: {refusals[first]}; {_REMEDY.format(tool='jetson_clocks')}")


def _card_plan(card: str, mhz: str, saved: _SavedClocks, held: Tuple[str, ...], changes: Tuple[_Change, ...]) -> _Plan:
    """Resetting the card's clocks, which must work later, is the test of whether they may be changed."""
    error = _run(_reset_command(card))
    if error:
        raise InputError(f"clocks cannot be locked: {error}; {_REMEDY.format(tool='nvidia-smi')}")
    command = _as_root("nvidia-smi", "-i", card, f"--lock-gpu-clocks={mhz},{mhz}")
    return _Plan(replace(saved, card=card), ("GPU", *held), changes, (command,))


def _reset_command(card: str) -> Tuple[str, ...]:
    return _as_root("nvidia-smi", "-i", card, "--reset-gpu-clocks")


def _jetson_plan(root: Path, file: Path, refusal: str) -> _Plan:
    """By JetPack's tool, which must not need a password: nobody could enter one after a crash."""
    stored = file.with_name(f"{file.name}.jetson_clocks")
    stored.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        stored.unlink()  # the tool asks before it overwrites
    error = _run(_as_root("jetson_clocks", "--store", str(stored)))
    if error:
        remedy = _REMEDY.format(tool="jetson_clocks")
        raise InputError(f"clocks cannot be locked: {refusal}, and jetson_clocks fails: {error}; {remedy}")
    saved = _SavedClocks(str(root), _boot_id(root), jetson_clocks=str(stored))
    return _Plan(saved, ("jetson_clocks",), commands=(_as_root("jetson_clocks"),))


def _changes(root: Path) -> List[_Change]:
    """All possible changes, the GPU first; memory's lock comes before its rate, and changes are undone in reverse."""
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
    text = power.output("nvidia-smi", "-i", card, "--query-gpu=clocks.max.graphics", "--format=csv,noheader,nounits")
    return (card, text.strip()) if re.fullmatch(r"[0-9]{2,5}", text.strip()) else None


def _apply(root: Path, plan: _Plan) -> Tuple[str, ...]:
    """Lock the clocks, and return what is locked; memory may fail, since not every board lets its clock be set."""
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


def _restore(file: Path, saved: _SavedClocks) -> None:
    root = Path(saved.root)
    errors = [_restore_file(root, path, text) for path, text in reversed(saved.writes)]
    if saved.jetson_clocks is not None:
        errors.append(_run(_as_root("jetson_clocks", "--restore", saved.jetson_clocks)))
    if saved.card is not None:
        errors.append(_run(_reset_command(saved.card)))
    failed = [error for error in errors if error]
    if failed:
        raise InputError(
            f"the clocks are still locked: {failed[0]}; run the same command again as root, or reboot ({file})"
        )
    _remove_saved(file, saved)


def _restore_file(root: Path, path: str, text: str) -> str:
    """Write a saved value; an error of memory's rate is ignored, since it moves by itself once it is unlocked."""
    error = _write(root / path, text)
    return "" if path == f"{power.EMC}/rate" else error


def _remove_saved(file: Path, saved: _SavedClocks) -> None:
    """`file` goes first: it must not name a file that is gone."""
    for path in (str(file), *([saved.jetson_clocks] if saved.jetson_clocks else [])):
        with suppress(FileNotFoundError):
            os.unlink(path)


@contextmanager
def _save(file: Path, saved: _SavedClocks) -> Iterator[None]:
    """Write `file` completely or not at all, and hold its lock while the body runs."""
    content = decode.encode(saved, _FORMAT, _VERSION)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=str(file.parent))
    except OSError as error:
        raise InputError(f"clocks are not locked: {file} cannot be written ({error.strerror})") from error
    with _not_inherited(descriptor):
        _lock(descriptor)
        try:
            os.write(descriptor, json.dumps(content).encode())
            os.fsync(descriptor)
            os.replace(name, str(file))
        except OSError as error:
            os.unlink(name)
            raise InputError(f"clocks are not locked: {file} cannot be written ({error.strerror})") from error
        yield


def _lock(descriptor: int) -> bool:
    """Take the lock that shows that this process is alive; the system releases it. Waits while another restores."""
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
def _restored_by_watcher(file: Path) -> Iterator[None]:
    """Start the watcher, which restores when the pipe to it closes, at the latest when this process ends."""
    watcher = _start_watcher(file)
    assert watcher.stdin is not None
    assert watcher.stdout is not None
    try:
        with watcher.stdout as output, watcher.stdin as pipe, _not_inherited(os.dup(pipe.fileno())):
            pipe.close()
            if output.readline() != b"ready\n":
                raise InputError("clocks are not locked: the process that restores them after a crash did not start")
            yield
    finally:
        with suppress(subprocess.TimeoutExpired):
            watcher.wait(_PATIENCE_S)


def _start_watcher(file: Path) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).resolve().parents[3])
    path = [package, *filter(None, sys.path)]  # without the current folder, which `-c` puts in front
    imports = f"import sys; sys.path[:] = {path!r}\nfrom {__name__} import watch"
    code = f"{imports}\nwatch(sys.argv[1])"
    try:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise InputError(
            f"clocks are not locked: the process that restores them cannot be started ({error.strerror})"
        ) from error


_close_in_children: Set[int] = set()


def _close_in_child() -> None:
    """Otherwise a forked child that outlives this process would hold the pipe, and nothing would be restored."""
    for descriptor in _close_in_children:
        os.close(descriptor)
    _close_in_children.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def _not_inherited(descriptor: int) -> Iterator[None]:
    _close_in_children.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _close_in_children:
            _close_in_children.discard(descriptor)
            os.close(descriptor)


def _decode_saved(file: Path, content: bytes) -> _SavedClocks:
    """Decoded strictly, since root may write these values."""
    try:
        saved: _SavedClocks = decode.document(_SavedClocks, content.decode("utf-8"), _FORMAT, _VERSION, "its content")
        _check_values(saved)
    except (UnicodeDecodeError, decode.DecodeError) as error:
        remedy = "reboot the device, which resets its clocks, and remove the file"
        raise InputError(f"{file}, with the clocks to restore, is damaged ({one_line(error)}): {remedy}") from error
    return saved


def _check_values(saved: _SavedClocks) -> None:
    """Raises DecodeError for values that this module never writes."""
    for path, text in saved.writes:
        if not _OUR_FILES.fullmatch(path) or not re.fullmatch(r"[\w-]{1,40}", text, re.ASCII):
            raise decode.DecodeError(f"{path[:80]!r} = {text[:40]!r} is not a clock setting")
    if saved.jetson_clocks is not None and not Path(saved.jetson_clocks).is_absolute():
        raise decode.DecodeError(f"jetson_clocks is {saved.jetson_clocks!r}")
    if saved.card is not None and not re.fullmatch(r"[0-9]{1,2}|(GPU|MIG)-[\w/-]{1,80}", saved.card, re.ASCII):
        raise decode.DecodeError(f"card is {saved.card!r}")


def _as_root(*command: str) -> Tuple[str, ...]:
    """With sudo unless we are root, and without a cached password (-k), since the watcher would have none."""
    tool = power.find_tool(command[0]) or command[0]
    return (*(() if os.geteuid() == 0 else ("sudo", "-n", "-k")), tool, *command[1:])


def _run(command: Tuple[str, ...]) -> str:
    """ "" when it succeeds, otherwise the error."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        return one_line(error)
    output = one_line(done.stdout.decode("utf-8", "replace"))
    return "" if done.returncode == 0 else f"`{' '.join(command)}` fails ({output or done.returncode})"


def _write(path: Path, text: str) -> str:
    """ "" when it succeeds, otherwise the error."""
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


def watch(file: str) -> None:
    """Wait until the process that locked the clocks is gone, then restore them from `file`."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with suppress(BrokenPipeError):  # killed already
        os.write(sys.stdout.fileno(), b"ready\n")
    sys.stdin.buffer.read()
    try:
        restore_leftover(Path(file))
    except InputError as error:
        sys.exit(f"error: {error}")
