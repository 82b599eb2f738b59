"""Installs a bundle for a client over SSH: stages it beside the version in use, builds, verifies, and then switches.

Replies are `absent`, `step`, `check`, `looked`, `done` or `error`.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from mess_compile.runtime.base import protocol
from mess_compile.runtime.base.errors import BundleError, EngineError, InputError, MessError
from mess_compile.runtime.base.protocol import Send
from mess_compile.runtime.bundle.archive import Archive, hash_of, open_archive, unsigned
from mess_compile.runtime.bundle.engines_inside import adopt, brought
from mess_compile.runtime.bundle.manifest import BundlePlan, Manifest, manifest_from_json
from mess_compile.runtime.bundle.plan_choice import first_that_opens, matching_plans
from mess_compile.runtime.bundle.signature import installed_signers, signer_of
from mess_compile.runtime.cascade.cascade import load_archive
from mess_compile.runtime.cascade.fallback import safer_plans
from mess_compile.runtime.engines.engine import Library
from mess_compile.runtime.engines.engine_cache import borrow, is_built, loadable, profiled_folder
from mess_compile.runtime.serve import systemd, versions
from mess_compile.runtime.serve.verify import LATENCY_FACTOR, verify
from mess_compile.runtime.serve.versions import SHIP, VERSIONS, History, Version

FORMAT, VERSION = "mess-ship", 1
PROGRAMS = f"{SHIP}/programs"
ENGINE_S, VERIFY_S, BYTES_PER_S = "engine_s", "verify_s", "bytes_per_s"
"""Durations and speed of the last time, in the history: an engine, all but engines and sending, and the link."""
_REMEDIES = {
    "latency": "check that the device is idle and not too hot, or raise --latency-factor",
    "power mode": "set the device to that power mode, or profile again in the present one",
}
_DAY_S = 86400.0


@dataclass(frozen=True)
class ShipRequest:
    """What to do in `folder`. A bundle is the text of its `manifest` and `signature`; its files are in the store.

    `keep` is the number of versions to keep; `bytes_per_s` is how fast files arrived, None when none did; `program` is
    the hash of the program that is to run there.
    """

    folder: str
    manifest: Optional[str] = None
    signature: Optional[str] = None
    target: Optional[str] = None
    keep: int = 3
    allow_downgrade: bool = False
    latency_factor: float = LATENCY_FACTOR
    unit: bool = False
    bytes_per_s: Optional[float] = None
    program: Optional[str] = None


@dataclass(frozen=True)
class Step:
    """A step that begins, `number` of `total`; `expected_s` is for the rest of these steps, None when unknown."""

    what: str
    number: int
    total: int
    expected_s: Optional[float]


@dataclass(frozen=True)
class Installed:
    """`version` is in use now, `before` was in use until now; `built` engines took `build_s`.

    `refusals` are the engines of fallback plans that cannot be built, with reasons. `unit` is the state of the systemd
    unit.
    """

    version: Version
    before: Optional[str]
    built: int
    build_s: float
    verify_s: float
    refusals: Tuple[str, ...]
    removed: Tuple[str, ...]
    unit: Optional[str]


@dataclass(frozen=True)
class ListedVersion:
    """A version in the history: whether it is still in the folder (`here`), and whether it is in use."""

    version: Version
    here: bool
    current: bool


@dataclass(frozen=True)
class FolderReport:
    """What a folder holds. For a bundle to be shipped: its missing files, the graphs to build engines of, and why it
    would be refused. `program` is whether the program is there."""

    current: Optional[str]
    versions: Tuple[ListedVersion, ...]
    took: Dict[str, float]
    free_bytes: int
    signers: Optional[str]
    absent: Tuple[str, ...]
    build: Tuple[str, ...]
    refusal: Optional[str]
    program: bool


def request_to_json(request: ShipRequest) -> str:
    return protocol.request_to_json(request, FORMAT, VERSION)


def request_from_json(text: str) -> ShipRequest:
    """Raises InputError naming what is wrong."""
    request: ShipRequest = protocol.request_from_json(ShipRequest, text, FORMAT, VERSION)
    return request


def look(request: ShipRequest, send: Send) -> None:
    """Report what is there and, for a bundle, what shipping it would do. Nothing is changed."""
    folder = Path(request.folder)
    history, current = versions.read_history(folder), versions.current_id(folder)
    present = versions.ids_in(folder)
    listed = tuple(
        ListedVersion(version, version.id in present, version.id == current) for version in reversed(history.versions)
    )
    missing: List[str] = []
    build: List[str] = []
    refusal = None
    if request.manifest is not None:
        manifest = manifest_from_json(request.manifest)
        missing = versions.missing_files(folder, manifest)
        try:
            if not request.allow_downgrade:
                bundle = hash_of(request.manifest, request.signature)
                versions.refuse_downgrade(history, current, bundle, versions.release_of(manifest))
            build = _to_build(manifest, request.target, _is_signed(request, manifest))
        except MessError as error:
            refusal = str(error)
    free = shutil.disk_usage(str(_nearest_existing(folder))).free
    signers = installed_signers()
    signers_file = None if signers is None else str(signers.file)
    program = (folder / PROGRAMS / str(request.program)).is_file()
    report = FolderReport(
        current, listed, history.took, free, signers_file, tuple(missing), tuple(build), refusal, program
    )
    send("looked", asdict(report))


def _is_signed(request: ShipRequest, manifest: Manifest) -> bool:
    """Whether the bundle is signed by an allowed signer. Raises BundleError where it must be and is not."""
    signers = installed_signers()
    if signers is None:
        return False
    if request.signature is None:
        raise unsigned(manifest)
    signer_of((request.manifest or "").encode("utf-8"), request.signature.encode("utf-8"), signers)
    return True


def _nearest_existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _to_build(manifest: Manifest, target: Optional[str], signed: bool) -> List[str]:
    """Graphs that have no engine here and none in the bundle that may be used."""
    plan, library = first_that_opens(matching_plans(manifest, target, None))
    with closing(library):
        places = (None, profiled_folder())
        fitting = {(engine.graph, engine.precision) for engine in brought(manifest, library)} if signed else set()
        return [
            path
            for path, precision in _graphs((plan, *safer_plans(manifest, plan)))
            if (path, precision) not in fitting
            and not any(is_built(library, manifest.files[path].sha256, precision, place) for place in places)
        ]


def _graphs(plans: Sequence[BundlePlan]) -> List[Tuple[str, str]]:
    """Each graph once, with the precision that it computes in."""
    return list(dict.fromkeys((path, plan.precisions[path].used) for plan in plans for path in plan.graphs()))


def ship(request: ShipRequest, send: Send) -> None:
    """Install the bundle; the version in use stays until this one is verified. Raises MessError, OSError."""
    folder, text = Path(request.folder), request.manifest or ""
    manifest, bundle = manifest_from_json(text), hash_of(text, request.signature)
    if request.unit:
        systemd.check_paths(folder, sys.executable)
    with versions.locked(folder):
        start = time.monotonic()
        history, current = versions.read_history(folder), versions.current_id(folder)
        if not request.allow_downgrade:
            versions.refuse_downgrade(history, current, bundle, versions.release_of(manifest))
        known = versions.find_intact(folder, history, bundle)
        if known is not None:
            verified = _build_and_verify(folder / VERSIONS / known.id, request, history, send)
        else:
            missing = versions.missing_files(folder, manifest)
            if missing:
                return send("absent", missing)
            with versions.stage(folder, text, request.signature, manifest) as place:
                verified = _build_and_verify(place, request, history, send)
                history = versions.add(folder, history, place, manifest, bundle, verified.signed_by)
        took = {VERIFY_S: time.monotonic() - start - verified.build_s}
        done = _activate(request, history, known or history.versions[-1], current, verified, took)
        send("done", asdict(done))
    return None


def rollback(request: ShipRequest, send: Send) -> None:
    """Return to the version that was in use before, after checking its bytes, signature and golden frames."""
    folder = Path(request.folder)
    with versions.locked(folder):
        history, current = versions.read_history(folder), versions.current_id(folder)
        previous = versions.previous_id(folder, history)
        if current is None or previous is None:
            raise InputError(
                f"{folder} has no version before {current or 'the first'} to go back to: ship the bundle that you want"
            )
        any_speed = replace(request, latency_factor=math.inf)
        verified = _build_and_verify(folder / VERSIONS / previous, any_speed, history, send)
        version = history.named(previous) or _version_without_history(previous, folder / VERSIONS / previous)
        end = len(history.past) - history.past[::-1].index(previous) if previous in history.past else 0
        versions.switch(folder, history, previous, history.past[:end])
        done = _installed(version, current, verified)
        send("done", asdict(done))


def _version_without_history(id_: str, place: Path) -> Version:
    """A version in a folder whose history was lost."""
    archive = open_archive(place)
    with closing(archive):
        manifest, number = archive.manifest, int(id_.partition("-")[0])
        release = versions.release_of(manifest)
        return Version(number, archive.hash, manifest.name, release, None, manifest.bytes, "unknown")


@dataclass(frozen=True)
class _Verified:
    """A version that passed all checks."""

    signed_by: Optional[str]
    built: int
    build_s: float
    verify_s: float
    refusals: Tuple[str, ...] = ()


def _installed(version: Version, before: Optional[str], verified: _Verified) -> Installed:
    """The reply for a version that is in use now, without a unit and with nothing removed."""
    figures = verified.built, verified.build_s, verified.verify_s, verified.refusals
    return Installed(version, before, *figures, removed=(), unit=None)


def _build_and_verify(place: Path, request: ShipRequest, history: History, send: Send) -> _Verified:
    """Check bytes and signature, build engines, verify. Nothing of the bundle is used before its signer is checked.

    Raises BundleError when a check fails.
    """
    archive = open_archive(place)
    try:
        signers = installed_signers()
        if signers is not None:
            archive.check_signer(signers)
        plan, library = first_that_opens(matching_plans(archive.manifest, request.target, None))
        try:
            start = time.monotonic()
            built, refusals = _build_engines(archive, plan, library, history, send)
            build_s = time.monotonic() - start
        except BaseException:
            library.close()
            raise
        send("step", asdict(Step("verify", 1, 1, history.took.get(VERIFY_S))))
        start = time.monotonic()
        with load_archive(archive, plan.name, library) as cascade:
            checks = verify(cascade, request.latency_factor)
        for check in checks:
            send("check", asdict(check))
        failed = [check for check in checks if not check.passed]
        if failed:
            remedy = _REMEDIES.get(
                failed[0].name, "its engines compute different results: profile and search on this device"
            )
            raise BundleError(f"failed verification on the device: {failed[0].name}: {failed[0].detail}: {remedy}")
        return _Verified(archive.signed_by, built, build_s, time.monotonic() - start, refusals)
    finally:
        archive.close()


def _build_engines(
    archive: Archive, plan: BundlePlan, library: Library, history: History, send: Send
) -> Tuple[int, Tuple[str, ...]]:
    """Have an engine of every graph of the plan and of its fallback plans.

    Returns how many were built now, and why engines that only a fallback plan needs cannot be built.
    """
    plans, files = (plan, *safer_plans(archive.manifest, plan)), archive.manifest.files
    if archive.signed_by is not None:
        for each in plans:
            adopt(archive.manifest, each, library, archive.folder)
    unbuilt = [
        (path, precision)
        for path, precision in _graphs(plans)
        if not is_built(library, files[path].sha256, precision) and not borrow(library, files[path].sha256, precision)
    ]
    needed, refusals = _graphs((plan,)), []
    each_s, start = history.took.get(ENGINE_S), time.monotonic()
    for number, (path, precision) in enumerate(unbuilt, 1):
        expected = None if each_s is None else each_s * (len(unbuilt) - number + 1)
        send("step", asdict(Step(f"build {path}", number, len(unbuilt), expected)))
        try:
            loadable(library, archive.folder / path, precision)
        except EngineError as error:
            if (path, precision) in needed:
                raise
            refusals.append(str(error))
        each_s = (time.monotonic() - start) / number
    return len(unbuilt) - len(refusals), tuple(refusals)


def _activate(
    request: ShipRequest,
    history: History,
    version: Version,
    current: Optional[str],
    verified: _Verified,
    took: Mapping[str, float],
) -> Installed:
    """Switch from `current` to a verified version, and remove versions that are too old."""
    folder = Path(request.folder)
    engine = {ENGINE_S: verified.build_s / verified.built} if verified.built else {}
    speed = {} if request.bytes_per_s is None else {BYTES_PER_S: request.bytes_per_s}
    history = replace(history, took={**history.took, **took, **engine, **speed})
    past = [id_ for id_ in history.past if id_ != current] + ([current] if current else [])
    history = versions.switch(folder, history, version.id, tuple(past))
    removed = versions.remove_old(folder, history, request.keep)
    unit_state = _install_unit(folder, request.target) if request.unit else None
    return replace(_installed(version, current, verified), removed=tuple(removed), unit=unit_state)


def _install_unit(folder: Path, target: Optional[str]) -> str:
    """The state of the systemd unit; the version is in use whether or not there is one."""
    try:
        return systemd.install(folder, sys.executable, target)
    except OSError as error:
        return f"the systemd unit cannot be written: {error}"


_ACTIONS: Dict[str, Callable[[ShipRequest, Send], None]] = {"look": look, "ship": ship, "rollback": rollback}


def _remove_old(folder: Path) -> None:
    """Remove programs and requests that are over a day old, but for the program that runs: it is not sent again."""
    own = Path(__file__).resolve().parents[3]
    for path in folder.iterdir():
        with suppress(OSError):
            if time.time() - path.stat().st_ctime > _DAY_S and path.resolve() != own:
                path.unlink()


def act_on(action: str, path: Path) -> int:
    """Serve the request in a file, with replies on standard output; the exit code."""

    def act(send: Send) -> None:
        _ACTIONS[action](request_from_json(path.read_text(encoding="utf-8")), send)
        _remove_old(path.parent)

    return protocol.serve_messages(act, path)


def main(arguments: Sequence[str]) -> int:
    """`ACTION REQUEST`: as `act_on`; files that it writes can be read by every user of the device."""
    os.umask(0o022)
    return act_on(arguments[0], Path(arguments[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
