"""Taking a bundle in for somebody elsewhere: staged beside what runs, built, verified, and only then put in its place.

Lines tell of it: `absent`, `step`, `check`, `looked`, `done` or `error`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from mess_compile.runtime.base import decode, protocol
from mess_compile.runtime.base.errors import BundleError, EngineError, InputError, MessError
from mess_compile.runtime.base.protocol import Say
from mess_compile.runtime.bundle.archive import Archive, hash_of, open_archive, unsigned
from mess_compile.runtime.bundle.engines_inside import adopt, brought
from mess_compile.runtime.bundle.manifest import BundlePlan, Manifest, manifest_from_json
from mess_compile.runtime.bundle.plan_choice import first_that_opens, matching_plans
from mess_compile.runtime.bundle.signature import installed_signers, signer_of
from mess_compile.runtime.cascade.cascade import load_archive
from mess_compile.runtime.cascade.fallback import safer_plans
from mess_compile.runtime.engines.engine import Library
from mess_compile.runtime.engines.engine_cache import borrow, is_built, loadable, profiled_folder
from mess_compile.runtime.serve import systemd as unit
from mess_compile.runtime.serve import versions
from mess_compile.runtime.serve.verify import LATENCY_FACTOR, verify
from mess_compile.runtime.serve.versions import SHIP, VERSIONS, History, Version

FORMAT, VERSION = "mess-ship", 1
PROGRAMS = f"{SHIP}/programs"
ENGINE_S, VERIFY_S, BYTES_PER_S = "engine_s", "verify_s", "bytes_per_s"
"""What a folder remembers of the last time: an engine, all but engines and sending, and the link."""
_REMEDIES = {
    "latency": "see what else runs there and how warm it is, or allow more by --latency-factor",
    "power mode": "set it back there, or profile again in this one",
}
_DAY_S = 86400.0


@dataclass(frozen=True)
class ShipRequest:
    """What to do in `folder`. A bundle is the text of its `manifest` and `signature`; its files lie in the store.

    `keep` so many versions; `bytes_per_s` is how fast files came, None when nothing came; `program` is the hash of what
    is to run there.
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
    """What begins now: `number` of `total`, and how many seconds all that is left of `what` should take, if known."""

    what: str
    number: int
    total: int
    expected_s: Optional[float]


@dataclass(frozen=True)
class Installed:
    """`version` is in use now, `before` was; engines `built` in `build_s`.

    `refusals` say which engines of safer plans, for frames that fail in the wanted one, cannot be built. `unit` tells
    of the systemd unit.
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
class Listed:
    version: Version
    here: bool
    current: bool


@dataclass(frozen=True)
class Looked:
    """What is in a folder and, of a bundle that is to come: files that have not arrived, graphs to build engines of,
    and why it would be refused. Whether the `program` is there, too."""

    current: Optional[str]
    versions: Tuple[Listed, ...]
    took: Dict[str, float]
    free_bytes: int
    signers: Optional[str]
    absent: Tuple[str, ...]
    build: Tuple[str, ...]
    refusal: Optional[str]
    program: bool


def wish_to_json(wish: ShipRequest) -> str:
    return json.dumps(decode.encode(wish, FORMAT, VERSION), sort_keys=True)


def wish_from_json(text: str) -> ShipRequest:
    """Raises InputError naming what is wrong."""
    wish: ShipRequest = protocol.wish_of(ShipRequest, text, FORMAT, VERSION)
    return wish


def look(wish: ShipRequest, say: Say) -> None:
    """Say what is there and, with a bundle, what shipping it would do. Nothing is changed."""
    folder = Path(wish.folder)
    history, current = versions.read_history(folder), versions.current_id(folder)
    there = versions.ids_there(folder)
    listed = tuple(
        Listed(version, version.id in there, version.id == current) for version in reversed(history.versions)
    )
    absent: List[str] = []
    build: List[str] = []
    refusal = None
    if wish.manifest is not None:
        manifest = manifest_from_json(wish.manifest)
        absent = versions.absent_files(folder, manifest)
        try:
            if not wish.allow_downgrade:
                bundle = hash_of(wish.manifest, wish.signature)
                versions.refuse_downgrade(history, current, bundle, versions.release_of(manifest))
            build = _to_build(manifest, wish.target, _is_signed(wish, manifest))
        except MessError as error:
            refusal = str(error)
    free = shutil.disk_usage(str(_existing(folder))).free
    signers = installed_signers()
    file = None if signers is None else str(signers.file)
    program = (folder / PROGRAMS / str(wish.program)).is_file()
    looked = Looked(current, listed, history.took, free, file, tuple(absent), tuple(build), refusal, program)
    say("looked", asdict(looked))


def _is_signed(wish: ShipRequest, manifest: Manifest) -> bool:
    """Whether it is known whose the bundle is. Raises BundleError where that has to be known and is not."""
    signers = installed_signers()
    if signers is None:
        return False
    if wish.signature is None:
        raise unsigned(manifest)
    signer_of((wish.manifest or "").encode("utf-8"), wish.signature.encode("utf-8"), signers)
    return True


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _to_build(manifest: Manifest, target: Optional[str], signed: bool) -> List[str]:
    """Graphs of which there is no engine yet, nor brings the bundle one that may be used."""
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


def ship(wish: ShipRequest, say: Say) -> None:
    """Take the bundle in: nothing that runs is touched until it has verified. Raises MessError, OSError."""
    folder, text = Path(wish.folder), wish.manifest or ""
    manifest, bundle = manifest_from_json(text), hash_of(text, wish.signature)
    if wish.unit:
        unit.check_paths(folder, sys.executable)
    with versions.locked(folder):
        start = time.monotonic()
        history, current = versions.read_history(folder), versions.current_id(folder)
        if not wish.allow_downgrade:
            versions.refuse_downgrade(history, current, bundle, versions.release_of(manifest))
        known = versions.intact(folder, history, bundle)
        if known is not None:
            proved = _proved(folder / VERSIONS / known.id, wish.target, wish.latency_factor, history, say)
        else:
            absent = versions.absent_files(folder, manifest)
            if absent:
                return say("absent", absent)
            with versions.staged(folder, text, wish.signature, manifest) as place:
                proved = _proved(place, wish.target, wish.latency_factor, history, say)
                history = versions.added(folder, history, place, manifest, bundle, proved.signed_by)
        took = {VERIFY_S: time.monotonic() - start - proved.build_s}
        _finish(wish, folder, history, known or history.versions[-1], current, proved, took, say)
    return None


def rollback(wish: ShipRequest, say: Say) -> None:
    """Go back to the version that was in use before, where its bytes, signature and golden frames are still right."""
    folder = Path(wish.folder)
    with versions.locked(folder):
        history, current = versions.read_history(folder), versions.current_id(folder)
        wanted = versions.before(folder, history)
        if current is None or wanted is None:
            raise InputError(
                f"{folder} holds no version to go back to from {current or 'none'}: ship the one that is wanted"
            )
        proved = _proved(folder / VERSIONS / wanted, wish.target, math.inf, history, say)
        version = history.named(wanted) or _unknown(wanted, folder / VERSIONS / wanted)
        end = len(history.past) - history.past[::-1].index(wanted) if wanted in history.past else 0
        versions.switched(folder, history, wanted, history.past[:end])
        done = Installed(version, current, proved.built, proved.build_s, proved.verify_s, proved.refusals, (), None)
        say("done", asdict(done))


def _unknown(id_: str, place: Path) -> Version:
    """A version that is here, in a folder whose history was lost."""
    archive = open_archive(place)
    with closing(archive):
        manifest, number = archive.manifest, int(id_.partition("-")[0])
        release = versions.release_of(manifest)
        return Version(number, archive.hash, manifest.name, release, None, manifest.bytes, "unknown")


@dataclass(frozen=True)
class _Proof:
    signed_by: Optional[str]
    built: int
    build_s: float
    verify_s: float
    refusals: Tuple[str, ...] = ()


def _proved(place: Path, target: Optional[str], factor: float, history: History, say: Say) -> _Proof:
    """Check bytes and signature, build engines, verify. Nothing of a bundle is used before it is known whose it is.

    Raises BundleError when a check fails.
    """
    archive = open_archive(place)
    try:
        signers = installed_signers()
        if signers is not None:
            archive.check_signer(signers)
        plan, library = first_that_opens(matching_plans(archive.manifest, target, None))
        try:
            start = time.monotonic()
            built, refusals = _built(archive, plan, library, history, say)
            build_s = time.monotonic() - start
        except BaseException:
            library.close()
            raise
        say("step", asdict(Step("verify", 1, 1, history.took.get(VERIFY_S))))
        start = time.monotonic()
        with load_archive(archive, plan.name, library) as cascade:
            checks = verify(cascade, factor)
        for check in checks:
            say("check", asdict(check))
        failed = [check for check in checks if not check.passed]
        if failed:
            remedy = _REMEDIES.get(
                failed[0].name, "its engines compute something else: profile and search on this device"
            )
            raise BundleError(f"it fails verification there: {failed[0].name}: {failed[0].detail}: {remedy}")
        return _Proof(archive.signed_by, built, build_s, time.monotonic() - start, refusals)
    finally:
        archive.close()


def _built(
    archive: Archive, plan: BundlePlan, library: Library, history: History, say: Say
) -> Tuple[int, Tuple[str, ...]]:
    """Have an engine of every graph, those of the plans that are fallen back to among them.

    How many were built now, and why those were not that only a fallback needs.
    """
    plans, files = (plan, *safer_plans(archive.manifest, plan)), archive.manifest.files
    if archive.signed_by is not None:
        for each in plans:
            adopt(archive.manifest, each, library, archive.folder)
    wanted = [
        (path, precision)
        for path, precision in _graphs(plans)
        if not is_built(library, files[path].sha256, precision) and not borrow(library, files[path].sha256, precision)
    ]
    needed, refusals = _graphs((plan,)), []
    each_s, start = history.took.get(ENGINE_S), time.monotonic()
    for number, (path, precision) in enumerate(wanted, 1):
        expected = None if each_s is None else each_s * (len(wanted) - number + 1)
        say("step", asdict(Step(f"build {path}", number, len(wanted), expected)))
        try:
            loadable(library, archive.folder / path, precision)
        except EngineError as error:
            if (path, precision) in needed:
                raise
            refusals.append(str(error))
        each_s = (time.monotonic() - start) / number
    return len(wanted) - len(refusals), tuple(refusals)


def _finish(
    wish: ShipRequest,
    folder: Path,
    history: History,
    version: Version,
    current: Optional[str],
    proved: _Proof,
    took: Dict[str, float],
    say: Say,
) -> None:
    """Put a proved version in its place, and clear away what is too old."""
    if proved.built:
        took[ENGINE_S] = proved.build_s / proved.built
    if wish.bytes_per_s is not None:
        took[BYTES_PER_S] = wish.bytes_per_s
    history = replace(history, took={**history.took, **took})
    past = [id_ for id_ in history.past if id_ != current] + ([current] if current else [])
    history = versions.switched(folder, history, version.id, tuple(past))
    removed = versions.pruned(folder, history, wish.keep)
    told = _unit(folder, wish.target) if wish.unit else None
    done = Installed(
        version, current, proved.built, proved.build_s, proved.verify_s, proved.refusals, tuple(removed), told
    )
    say("done", asdict(done))


def _unit(folder: Path, target: Optional[str]) -> str:
    """What became of the unit: the version is in use, whether or not there is one."""
    try:
        return unit.installed(folder, sys.executable, target)
    except OSError as error:
        return f"the systemd unit cannot be written: {error}"


_ACTIONS: Dict[str, Callable[[ShipRequest, Say], None]] = {"look": look, "ship": ship, "rollback": rollback}


def _remove_old(folder: Path) -> None:
    """Programs and wishes of other days; the program that runs, a zip, need not travel again next time."""
    own = Path(__file__).resolve().parents[3]
    for path in folder.iterdir():
        with suppress(OSError):
            if time.time() - path.stat().st_ctime > _DAY_S and path.resolve() != own:
                path.unlink()


def tell(action: str, wish: Path) -> int:
    """Do what the file `wish` says, by lines on standard output; the exit code."""

    def act(say: Say) -> None:
        _ACTIONS[action](wish_from_json(wish.read_text(encoding="utf-8")), say)
        _remove_old(wish.parent)

    return protocol.tell(act, wish)


def main(arguments: Sequence[str]) -> int:
    """`ACTION WISH`: as `tell`, and what it writes may be read by every user of the device."""
    os.umask(0o022)
    return tell(arguments[0], Path(arguments[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
