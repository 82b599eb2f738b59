"""Ships a bundle to devices: only what changed is sent, and a device switches to it when it has passed verification."""

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

from mess_compile.device.client import temporary_files
from mess_compile.device.payload import SHIP_PROGRAM, runtime_zip
from mess_compile.device.remote import PYTHON, Host, Remote, RemoteError, parse_host
from mess_compile.device.scripts import shell_script
from mess_compile.duration import duration
from mess_compile.planned_step import PlannedStep, Shipment
from mess_compile.reporter import SILENT, Reporter
from mess_compile.runtime.base import decode, protocol
from mess_compile.runtime.base.errors import InputError, MessError
from mess_compile.runtime.bundle.archive import Archive, open_archive
from mess_compile.runtime.bundle.plan_choice import named_plans
from mess_compile.runtime.serve.ship import (
    BYTES_PER_S,
    ENGINE_S,
    PROGRAMS,
    VERIFY_S,
    FolderReport,
    Installed,
    ShipRequest,
    Step,
    request_to_json,
)
from mess_compile.runtime.serve.verify import LATENCY_FACTOR, Check
from mess_compile.runtime.serve.versions import FILES, SHIP

if TYPE_CHECKING:
    from mess_compile.ship.retune import Choice, Retuned

_PLACE = re.compile(r"(?P<host>(?:ssh://)?[^/]+?):?(?P<folder>/~?[^~]*|~/[^~]+)")
_FOLDER = re.compile(r"/?[A-Za-z0-9_+][A-Za-z0-9_.+-]*(/[A-Za-z0-9_.+-]*)*")
_LEAST_FOR_SPEED = 1 << 16
_REPORT_S = 2.0
_ATTEMPTS = 3


@dataclass(frozen=True)
class Destination:
    """A folder on a device; `text` as the user wrote it, `folder` absolute or below the home folder there."""

    text: str
    host: Host
    folder: str


@dataclass(frozen=True)
class ShipOptions:
    """`keep` is the number of versions to keep on the device; `target` names the plan to verify, by default the first
    that fits the device. With a `choice` the thresholds are chosen again on the device."""

    keep: int = 3
    allow_downgrade: bool = False
    latency_factor: float = LATENCY_FACTOR
    target: str | None = None
    unit: bool = False
    choice: Choice | None = None


@dataclass(frozen=True)
class Shipped:
    """The result at one place, `done` or `error`; shipping took `seconds` and sent `sent_bytes`."""

    place: str
    sent_bytes: int = 0
    seconds: float = 0.0
    done: Installed | None = None
    checks: tuple[Check, ...] = ()
    retuned: Retuned | None = None
    error: str | None = None


def parse_place(text: str, python: str = PYTHON) -> Destination:
    """From ssh://user@host[:port]:/folder; `~/folder` is below the home folder there, `python` starts Python there.

    Raises InputError.
    """
    match = _PLACE.fullmatch(text)
    if match is None or match["folder"].startswith("//"):
        parse_host(text)  # refuses passwords, options and the like by name
        raise InputError(f"place {text[:80]!r} names no folder: write ssh://user@host:/opt/street")
    folder = re.sub("^/?~/", "", match["folder"]).rstrip("/")
    if _FOLDER.fullmatch(folder) is None or ".." in folder.split("/"):
        raise InputError(f"folder {match['folder'][:80]!r}: write a plain path, such as /opt/street or ~/street")
    return Destination(text, parse_host(match["host"], python), folder)


def ship(
    bundle: Path,
    places: Sequence[Destination],
    options: ShipOptions = ShipOptions(),
    reporter: Reporter = SILENT,
) -> list[Shipped]:
    """Ship a bundle to all `places` at once; one result a place. Raises InputError, BundleError for the bundle."""
    with _open_bundle(bundle, options) as archive:
        return _at_all_places(
            places, lambda place, remote: _retune_and_ship(archive, place, remote, options, _at(place, reporter))
        )


def rollback(
    places: Sequence[Destination],
    options: ShipOptions = ShipOptions(),
    reporter: Reporter = SILENT,
) -> list[Shipped]:
    """Go back to the previous version, at all `places` at once; one result a place."""
    return _at_all_places(places, lambda place, remote: _rollback(place, remote, options, _at(place, reporter)))


def plan_ship(
    bundle: Path, places: Sequence[Destination], options: ShipOptions = ShipOptions()
) -> list[PlannedStep | Shipped]:
    """What `ship` would do at each place, where nothing is changed. A failure gives a Shipped with its error."""
    with _open_bundle(bundle, options) as archive:
        return _at_all_places(places, lambda place, remote: _planned(archive, place, remote, options))


def look(places: Sequence[Destination]) -> list[FolderReport | Shipped]:
    """The versions at each place. A place that fails gives a Shipped with its error."""
    return _at_all_places(places, lambda place, remote: _query(place, remote, ShipRequest(place.folder)))


@contextmanager
def _open_bundle(bundle: Path, options: ShipOptions) -> Iterator[Archive]:
    """Raises InputError when the bundle has no plan of the target's name, before anything is sent."""
    with closing(open_archive(bundle)) as archive:
        plans = archive.manifest.plans
        if options.target is not None and not named_plans(plans, options.target):
            names = ", ".join(plan.name for plan in plans)
            raise InputError(f"the bundle {archive.manifest.name} has no plan {options.target!r}; it has {names}")
        yield archive


def _at(place: Destination, reporter: Reporter) -> Reporter:
    """A reporter whose notes name the place."""
    return Reporter(note=lambda text: reporter.note(f"{place.text}: {text}"))


def _at_all_places(places: Sequence[Destination], act: Callable[[Destination, Remote], Any]) -> list[Any]:
    """Call `act` for all places at once, and return its results; one that fails does not affect the others."""
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
class _Replies:
    """The replies of a device so far."""

    missing: tuple[str, ...] = ()
    checks: list[Check] = field(default_factory=list)
    done: Installed | None = None
    report: FolderReport | None = None
    error: str | None = None


def _retune_and_ship(
    archive: Archive, place: Destination, remote: Remote, options: ShipOptions, reporter: Reporter
) -> Shipped:
    """Ship the bundle, with the thresholds chosen again on the device when the options say so."""
    if options.choice is None:
        return _ship(archive, place, remote, options, reporter)
    from mess_compile.ship.retune import retune

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mess-") as folder:
        path = Path(folder) / f"{archive.manifest.name}.mess"
        changed, retuned = retune(archive, options.choice, options.target, remote, path, reporter)
        if changed is None:
            shipped = _ship(archive, place, remote, options, reporter)
        else:
            with closing(open_archive(changed)) as chosen:
                shipped = _ship(chosen, place, remote, options, reporter)
    return replace(shipped, retuned=retuned, seconds=time.monotonic() - start)


def _ship(archive: Archive, place: Destination, remote: Remote, options: ShipOptions, reporter: Reporter) -> Shipped:
    start, sent_bytes = time.monotonic(), 0
    request = _request(archive, place, options)
    for _ in range(_ATTEMPTS):
        files = {file.sha256: archive.folder / name for name, file in archive.manifest.files.items()}
        pushing = time.monotonic()
        pushed = _push(remote, files, f"{place.folder}/{FILES}", reporter)
        took_s = time.monotonic() - pushing
        bytes_per_s = pushed / took_s if pushed > _LEAST_FOR_SPEED and took_s > 0 else None
        replies, more = _run_action("ship", replace(request, bytes_per_s=bytes_per_s), place, remote, reporter)
        sent_bytes += pushed + more
        if replies.done is not None:
            seconds = time.monotonic() - start
            return Shipped(place.text, sent_bytes, seconds, replies.done, tuple(replies.checks))
        if not replies.missing:
            raise RemoteError(f"{place.text} exited without output: run the command again", lost=True)
    raise RemoteError(f"{place.text}: files disappear after they arrive: is another program deleting files there?")


def _rollback(place: Destination, remote: Remote, options: ShipOptions, reporter: Reporter) -> Shipped:
    start = time.monotonic()
    if _query(place, remote, ShipRequest(place.folder)).current is None:
        raise InputError(f"{place.text}: nothing was shipped there: see `mess-compile ship --list {place.text}`")
    replies, sent_bytes = _run_action(
        "rollback", ShipRequest(place.folder, target=options.target), place, remote, reporter
    )
    if replies.done is None:
        raise RemoteError(f"{place.text} exited without output: run the command again", lost=True)
    return Shipped(place.text, sent_bytes, time.monotonic() - start, replies.done, tuple(replies.checks))


def _planned(archive: Archive, place: Destination, remote: Remote, options: ShipOptions) -> PlannedStep:
    request, program = _request(archive, place, options), runtime_zip()
    report = _query(place, remote, replace(request, program=sha256(program).hexdigest()))
    sizes = {file.sha256: file.bytes for file in archive.manifest.files.values()}
    send_bytes = sum(sizes[name] for name in report.absent) + len(_text(request))
    send_bytes += 0 if report.program else len(program)
    full = f"{send_bytes} bytes to send, but only {report.free_bytes} are free"
    refusal = report.refusal or (full if send_bytes > report.free_bytes else None)
    files, current = len(report.absent), report.current
    what = (
        f"ship {archive.manifest.name} to {place.text}, where {current or 'nothing'} is in use: send {send_bytes:,} "
        f"bytes ({files} files beside manifest and program; {report.free_bytes / 2**20:,.0f} MiB free) and build "
        f"{len(report.build)} engines"
    )
    if report.signers is not None:
        what += f", check the signature against {report.signers}"
    expected_s = _expected_s(report, send_bytes)
    basis = "no earlier ship to this place" if expected_s is None else "the last ship to this place"
    shipment = Shipment(current, send_bytes, files, report.build, report.free_bytes, report.signers, refusal)
    return PlannedStep(
        "ship", what, (place.text,), expected_s, basis, most_s=expected_s, place=place.text, shipment=shipment
    )


def _expected_s(report: FolderReport, send_bytes: int) -> float | None:
    """By the durations of the last time; None when one of the steps was never taken there."""
    took, total = report.took, 0.0
    for name, count in ((VERIFY_S, 1.0), (ENGINE_S, len(report.build))):
        if count and name not in took:
            return None
        total += took.get(name, 0.0) * count
    if report.absent:
        if BYTES_PER_S not in took:
            return None
        total += send_bytes / took[BYTES_PER_S]
    return total


def _request(archive: Archive, place: Destination, options: ShipOptions) -> ShipRequest:
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


def _push(remote: Remote, files: dict[str, Path], folder: str, reporter: Reporter) -> int:
    last = 0.0

    def progress(sent: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _REPORT_S:
            reporter.note(f"sending {size(total)}" + (f", {sent / total:.0%} done" if last else ""))
            last = time.monotonic()

    try:
        return remote.push(files, folder, progress).sent_bytes
    except RemoteError as error:
        if "Permission denied" in str(error):
            place = folder.removesuffix(f"/{FILES}")
            raise RemoteError(f"{error}: make the folder there once: `sudo install -d -o $USER {place}`") from error
        raise


def _run_action(
    action: str, request: ShipRequest, place: Destination, remote: Remote, reporter: Reporter
) -> tuple[_Replies, int]:
    """Run an action on the device; its replies, and the bytes that were sent for it."""
    programs = f"{place.folder}/{PROGRAMS}"
    with temporary_files(runtime_zip(), _text(request)) as paths:
        code, name = paths
        sent_bytes = _push(remote, paths, programs, SILENT)
    command = (place.host.python, "-u", f"{programs}/{code}", SHIP_PROGRAM)
    replies = _Replies()
    try:
        for line in remote.lines((*command, action, f"{programs}/{name}"), _pid_file(place)):
            _receive(replies, line, place, reporter)
    except RemoteError as failure:
        if replies.error is not None and not failure.lost:
            raise RemoteError(f"{place.text}: {replies.error}") from failure
        if replies.done is None:
            if not failure.lost:
                remote.refuse_old_python()
            raise
    return replies, sent_bytes


def _pid_file(place: Destination) -> str:
    """Of this user: the next ship stops a broken one of the same user, and waits for one of another user."""
    who = f"{getpass.getuser()}@{platform.node()}"
    return f"{place.folder}/{SHIP}/pid-{sha256(who.encode()).hexdigest()[:12]}"


def _query(place: Destination, remote: Remote, request: ShipRequest) -> FolderReport:
    """Query a folder with a program that is removed afterwards."""
    replies = _Replies()
    python = place.host.python
    done = remote.run(
        ("sh", "-c", shell_script("run_unpacked"), "sh", python, SHIP_PROGRAM, "look"),
        _tar({"program.zip": runtime_zip(), "request": _text(request)}),
    )
    for line in done.output.decode(errors="replace").splitlines():
        _receive(replies, line, place, SILENT)
    if replies.error is not None:
        raise RemoteError(f"{place.text}: {replies.error}")
    if replies.report is None:
        remote.refuse_old_python()
        raise remote.failure(f"`{python}`", done.code or 1, done.errors)
    return replies.report


def _receive(replies: _Replies, line: str, place: Destination, reporter: Reporter) -> None:
    message = protocol.message_from_line(line)
    if message is None:
        return
    kind, content = message
    try:
        if kind == "absent":
            replies.missing = decode.decode(tuple[str, ...], content, kind)
        elif kind == "check":
            replies.checks.append(decode.decode(Check, content, kind))
        elif kind == "step":
            reporter.note(_describe_step(decode.decode(Step, content, kind)))
        elif kind == "looked":
            replies.report = decode.decode(FolderReport, content, kind)
        elif kind == "done":
            replies.done = decode.decode(Installed, content, kind)
        elif kind == "error":
            replies.error = decode.decode(str, content, kind)
    except decode.DecodeError as error:
        raise InputError(f"{place.text} sent an unexpected reply: {error}") from error


def _describe_step(step: Step) -> str:
    number = f" ({step.number} of {step.total})" if step.total > 1 else ""
    return f"{step.what}{number}" + ("" if step.expected_s is None else f", about {duration(step.expected_s)} left")


def size(count: int) -> str:
    """A number of bytes, for people."""
    return f"{count / 2**20:,.2f} MiB" if count >= 1 << 20 else f"{count / 2**10:.1f} KiB"


def _text(request: ShipRequest) -> bytes:
    return request_to_json(request).encode("utf-8")


def _tar(contents: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()
