"""Ship a bundle to devices in use: what changed travels, and nothing that runs is touched until it has verified."""

from __future__ import annotations

import getpass
import io
import platform
import re
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mess_compile.device.client import written
from mess_compile.device.payload import SHIP as SHIP_PROGRAM
from mess_compile.device.payload import runtime_zip
from mess_compile.device.remote import PYTHON, Host, Remote, RemoteError, parse_host
from mess_compile.runtime.base import decode, protocol
from mess_compile.runtime.base.errors import InputError, MessError
from mess_compile.runtime.bundle.archive import Archive, open_archive
from mess_compile.runtime.bundle.plan_choice import named_plans
from mess_compile.runtime.serve import ship as device_side
from mess_compile.runtime.serve.ship import (
    BYTES_PER_S,
    ENGINE_S,
    PROGRAMS,
    VERIFY_S,
    Installed,
    Looked,
    ShipRequest,
    Step,
)
from mess_compile.runtime.serve.verify import LATENCY_FACTOR, Check
from mess_compile.runtime.serve.versions import FILES, SHIP

if TYPE_CHECKING:
    from mess_compile.ship.retune import Choice, Retuned

Tell = Callable[[str], None]
_PLACE = re.compile(r"(?P<host>(?:ssh://)?[^/]+?):?(?P<folder>/~?[^~]*|~/[^~]+)")
_FOLDER = re.compile(r"/?[A-Za-z0-9_+][A-Za-z0-9_.+-]*(/[A-Za-z0-9_.+-]*)*")
_LEAST_FOR_SPEED = 1 << 16
_TELL_S = 2.0
_ATTEMPTS = 3
_LOOK = r"""
d=$(mktemp -d) && tar -xof - -C "$d" && "$1" "$d/p.zip" "$2" look "$d/wish"
code=$?; rm -rf "$d"; exit $code
"""


@dataclass(frozen=True)
class Destination:
    """A folder on a device; `text` as the user wrote it, `folder` absolute or below the home folder there."""

    text: str
    host: Host
    folder: str


@dataclass(frozen=True)
class ShipOptions:
    """`keep` so many versions there; `target` names the plan to verify by, the first that fits there by default. With
    a `choice` the thresholds are chosen again on the device."""

    keep: int = 3
    allow_downgrade: bool = False
    latency_factor: float = LATENCY_FACTOR
    target: str | None = None
    unit: bool = False
    choice: Choice | None = None


@dataclass(frozen=True)
class Shipped:
    """What became of one place: `done`, or `error`. `sent_bytes` travelled in `seconds` of shipping."""

    place: str
    sent_bytes: int = 0
    seconds: float = 0.0
    done: Installed | None = None
    checks: tuple[Check, ...] = ()
    retuned: Retuned | None = None
    error: str | None = None


@dataclass(frozen=True)
class Expected:
    """What shipping a bundle to a place would do, where `current` is in use; None where the place cannot tell yet."""

    place: str
    current: str | None
    send_bytes: int
    files: int
    build: tuple[str, ...]
    expected_s: float | None
    free_bytes: int
    signers: str | None
    refusal: str | None


def parse_place(text: str, python: str = PYTHON) -> Destination:
    """From ssh://user@host[:port]:/folder; `~/folder` is below the home folder there, `python` the Python to use there.

    Raises InputError.
    """
    match = _PLACE.fullmatch(text)
    if match is None or match["folder"].startswith("//"):
        parse_host(text)  # which refuses passwords, options and the like in its own words
        raise InputError(f"place {text[:80]!r} names no folder: write ssh://user@host:/opt/street")
    folder = re.sub("^/?~/", "", match["folder"]).rstrip("/")
    if _FOLDER.fullmatch(folder) is None or ".." in folder.split("/"):
        raise InputError(f"folder {match['folder'][:80]!r}: write a plain path, such as /opt/street or ~/street")
    return Destination(text, parse_host(match["host"], python), folder)


def ship(
    bundle: Path,
    places: Sequence[Destination],
    options: ShipOptions = ShipOptions(),
    tell: Callable[[Destination, str], None] = lambda place, line: None,
) -> list[Shipped]:
    """Ship a bundle to all `places` at once; each tells how it went. Raises InputError, BundleError for the bundle."""
    with _opened(bundle, options) as archive:
        return _everywhere(places, lambda place, remote: _tuned(archive, place, remote, options, _to(tell, place)))


def rollback(
    places: Sequence[Destination],
    options: ShipOptions = ShipOptions(),
    tell: Callable[[Destination, str], None] = lambda place, line: None,
) -> list[Shipped]:
    """Go back to the version before, at all `places` at once."""
    return _everywhere(places, lambda place, remote: _rollback(place, remote, options, _to(tell, place)))


def expected(
    bundle: Path, places: Sequence[Destination], options: ShipOptions = ShipOptions()
) -> list[Expected | Shipped]:
    """What `ship` would do at each place; nothing is changed there. A place that cannot tell is a Shipped with why."""
    with _opened(bundle, options) as archive:
        return _everywhere(places, lambda place, remote: _expected(archive, place, remote, options))


def look(places: Sequence[Destination]) -> list[Looked | Shipped]:
    """Which versions are at each place. A place that cannot tell is a Shipped with why."""
    return _everywhere(places, lambda place, remote: _look(place, remote, ShipRequest(place.folder)))


@contextmanager
def _opened(bundle: Path, options: ShipOptions) -> Iterator[Archive]:
    """Raises InputError when it has no plan of the target's name: before anything travels."""
    with closing(open_archive(bundle)) as archive:
        plans = archive.manifest.plans
        if options.target is not None and not named_plans(plans, options.target):
            names = ", ".join(plan.name for plan in plans)
            raise InputError(f"the bundle {archive.manifest.name} has no plan {options.target!r}; it has {names}")
        yield archive


def _to(tell: Callable[[Destination, str], None], place: Destination) -> Tell:
    return lambda text: tell(place, text)


def _everywhere(places: Sequence[Destination], act: Callable[[Destination, Remote], Any]) -> list[Any]:
    """What `act` gives for each place, at once; a place where it fails does not keep the others from theirs."""
    remotes = [Remote(place.host) for place in places]

    def attempt(place: Destination, remote: Remote) -> Any:
        start = time.monotonic()
        try:
            with remote:
                return act(place, remote)
        except MessError as error:
            return Shipped(place.text, seconds=time.monotonic() - start, error=str(error))

    if len(places) == 1:
        return [attempt(places[0], remotes[0])]
    with ThreadPoolExecutor(len(places)) as pool:
        waiting = [pool.submit(attempt, place, remote) for place, remote in zip(places, remotes, strict=True)]
        try:
            return [each.result() for each in waiting]
        except BaseException:
            for remote in remotes:
                remote.__exit__()
            raise


@dataclass
class _Heard:
    """What a device has said so far."""

    absent: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    done: Installed | None = None
    looked: Looked | None = None
    error: str | None = None


def _tuned(archive: Archive, place: Destination, remote: Remote, options: ShipOptions, tell: Tell) -> Shipped:
    """Ship the bundle, or what becomes of it on the device."""
    if options.choice is None:
        return _ship(archive, place, remote, options, tell)
    from mess_compile.ship.retune import retuned

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mess-") as folder:
        path = Path(folder) / f"{archive.manifest.name}.mess"
        other, told = retuned(archive, options.choice, options.target, remote, path, tell)
        if other is None:
            shipped = _ship(archive, place, remote, options, tell)
        else:
            with closing(open_archive(other)) as chosen:
                shipped = _ship(chosen, place, remote, options, tell)
    return replace(shipped, retuned=told, seconds=time.monotonic() - start)


def _ship(archive: Archive, place: Destination, remote: Remote, options: ShipOptions, tell: Tell) -> Shipped:
    start, sent_bytes = time.monotonic(), 0
    wish = _wish(archive, place, options)
    for _ in range(_ATTEMPTS):
        files = {file.sha256: archive.folder / name for name, file in archive.manifest.files.items()}
        pushing = time.monotonic()
        pushed = _push(remote, files, f"{place.folder}/{FILES}", tell)
        took = time.monotonic() - pushing
        fast = pushed / took if pushed > _LEAST_FOR_SPEED and took > 0 else None
        heard, more = _act("ship", replace(wish, bytes_per_s=fast), place, remote, tell)
        sent_bytes += pushed + more
        if heard.done is not None:
            seconds = time.monotonic() - start
            return Shipped(place.text, sent_bytes, seconds, heard.done, tuple(heard.checks))
        if not heard.absent:
            raise RemoteError(f"{place.text} exited without output: run the command again", lost=True)
    raise RemoteError(f"{place.text}: files that arrive are gone again: does something else clear {place.folder}?")


def _rollback(place: Destination, remote: Remote, options: ShipOptions, tell: Tell) -> Shipped:
    start = time.monotonic()
    if _look(place, remote, ShipRequest(place.folder)).current is None:
        raise InputError(f"{place.text}: nothing was shipped there: see `mess-compile ship --list {place.text}`")
    heard, sent_bytes = _act("rollback", ShipRequest(place.folder, target=options.target), place, remote, tell)
    if heard.done is None:
        raise RemoteError(f"{place.text} exited without output: run the command again", lost=True)
    return Shipped(place.text, sent_bytes, time.monotonic() - start, heard.done, tuple(heard.checks))


def _expected(archive: Archive, place: Destination, remote: Remote, options: ShipOptions) -> Expected:
    wish, program = _wish(archive, place, options), runtime_zip()
    looked = _look(place, remote, replace(wish, program=sha256(program).hexdigest()))
    sizes = {file.sha256: file.bytes for file in archive.manifest.files.values()}
    send_bytes = sum(sizes[name] for name in looked.absent) + len(_text(wish))
    send_bytes += 0 if looked.program else len(program)
    full = f"it takes {send_bytes} bytes, and {looked.free_bytes} are free" if send_bytes > looked.free_bytes else None
    return Expected(
        place.text,
        looked.current,
        send_bytes,
        len(looked.absent),
        looked.build,
        _expected_s(looked, send_bytes),
        looked.free_bytes,
        looked.signers,
        looked.refusal or full,
    )


def _expected_s(looked: Looked, send_bytes: int) -> float | None:
    """By what things took there last; None when one of them was never done there."""
    took, total = looked.took, 0.0
    for name, much in ((VERIFY_S, 1.0), (ENGINE_S, len(looked.build))):
        if much and name not in took:
            return None
        total += took.get(name, 0.0) * much
    if looked.absent:
        if BYTES_PER_S not in took:
            return None
        total += send_bytes / took[BYTES_PER_S]
    return total


def _wish(archive: Archive, place: Destination, options: ShipOptions) -> ShipRequest:
    return ShipRequest(
        place.folder,
        archive.text,
        archive.signature_text,
        options.target,
        options.keep,
        options.allow_downgrade,
        options.latency_factor,
        options.unit,
    )


def _push(remote: Remote, files: dict[str, Path], folder: str, tell: Tell) -> int:
    last = 0.0

    def progress(sent: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _TELL_S:
            tell(f"sends {size(total)}" + (f", {sent / total:.0%} are there" if last else ""))
            last = time.monotonic()

    try:
        return remote.push(files, folder, progress).sent_bytes
    except RemoteError as error:
        if "Permission denied" in str(error):
            place = folder.removesuffix(f"/{FILES}")
            raise RemoteError(f"{error}: make the folder once, there: `sudo install -d -o $USER {place}`") from error
        raise


def _act(action: str, wish: ShipRequest, place: Destination, remote: Remote, tell: Tell) -> tuple[_Heard, int]:
    """Have the program there do something; what it said, and how many bytes travelled for it."""
    programs = f"{place.folder}/{PROGRAMS}"
    with written(runtime_zip(), _text(wish)) as paths:
        code, name = paths
        sent_bytes = _push(remote, paths, programs, lambda text: None)
    command = (place.host.python, "-u", f"{programs}/{code}", SHIP_PROGRAM)
    heard = _Heard()
    try:
        for line in remote.lines((*command, action, f"{programs}/{name}"), _pid_file(place)):
            _hear(heard, line, place, tell)
    except RemoteError as failure:
        if heard.error is not None and not failure.lost:
            raise RemoteError(f"{place.text}: {heard.error}") from failure
        if heard.done is None:
            if not failure.lost:
                remote.refuse_old_python()
            raise
    return heard, sent_bytes


def _pid_file(place: Destination) -> str:
    """A cut ship of this user's makes room for the next one; one of somebody else's is waited for."""
    who = f"{getpass.getuser()}@{platform.node()}"
    return f"{place.folder}/{SHIP}/pid-{sha256(who.encode()).hexdigest()[:12]}"


def _look(place: Destination, remote: Remote, wish: ShipRequest) -> Looked:
    """By a program that is gone afterwards."""
    heard = _Heard()
    python = place.host.python
    done = remote.run(
        ("sh", "-c", _LOOK, "sh", python, SHIP_PROGRAM), _tar({"p.zip": runtime_zip(), "wish": _text(wish)})
    )
    for line in done.output.decode(errors="replace").splitlines():
        _hear(heard, line, place, lambda text: None)
    if heard.error is not None:
        raise RemoteError(f"{place.text}: {heard.error}")
    if heard.looked is None:
        remote.refuse_old_python()
        raise remote.failure(f"`{python}`", done.code or 1, done.errors)
    return heard.looked


def _hear(heard: _Heard, line: str, place: Destination, tell: Tell) -> None:
    found = protocol.said(line)
    if found is None:
        return
    kind, said = found
    try:
        if kind == "absent":
            heard.absent = [str(name) for name in said]
        elif kind == "check":
            heard.checks.append(decode.decode(Check, said, kind))
        elif kind == "step":
            tell(_in_words(decode.decode(Step, said, kind)))
        elif kind == "looked":
            heard.looked = decode.decode(Looked, said, kind)
        elif kind == "done":
            heard.done = decode.decode(Installed, said, kind)
        elif kind == "error":
            heard.error = str(said)
    except (decode.DecodeError, TypeError) as error:
        raise InputError(f"{place.text} says something else than expected: {error}") from error


def _in_words(step: Step) -> str:
    number = f" ({step.number} of {step.total})" if step.total > 1 else ""
    return f"{step.what}{number}" + ("" if step.expected_s is None else f", about {duration(step.expected_s)} left")


def size(count: int) -> str:
    """For people."""
    return f"{count / 2**20:,.2f} MiB" if count >= 1 << 20 else f"{count / 2**10:.1f} KiB"


def duration(seconds: float) -> str:
    """For people."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _text(wish: ShipRequest) -> bytes:
    return device_side.wish_to_json(wish).encode("utf-8")


def _tar(contents: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()
