"""Versions of a bundle in a folder of this machine: `current` is a link to one of them; a rename switches it.

current -> versions/3-5d1c0e6b2a94      the version that programs load
versions/NUMBER-HASH/                   unpacked bundles, each complete and verified
.ship/files/SHA256                      files that have arrived; versions share them by hard links
.ship/history.json                      the versions, and which were current before
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Dict, Iterator, List, Optional, Tuple

from mess_compile.runtime.base import decode
from mess_compile.runtime.base.errors import BundleError, InputError
from mess_compile.runtime.bundle.archive import hash_line, open_archive
from mess_compile.runtime.bundle.manifest import MANIFEST, MANIFEST_HASH, SIGNATURE, Manifest

CURRENT, VERSIONS = "current", "versions"
SHIP = ".ship"
FILES = f"{SHIP}/files"
RELEASE = "release"
"""The key of a bundle's release number in its provenance; a newer bundle has a higher one."""
LOCK_S = 60.0
"""How long to wait for the lock: the program of a broken connection takes some time to notice."""
_FORMAT, _VERSION = "mess-ships", 1
_HISTORY, _LOCK, _MAKING = f"{SHIP}/history.json", f"{SHIP}/lock", "making-"
_ID = re.compile(r"([1-9][0-9]{0,8})-[0-9a-f]{12}")


@dataclass(frozen=True)
class Version:
    """`number` counts bundles in the order of arrival; `bundle` is the hash of manifest and signature."""

    number: int
    bundle: str
    name: str
    release: Optional[int]
    signed_by: Optional[str]
    bytes: int
    shipped: str

    @property
    def id(self) -> str:
        return f"{self.number}-{self.bundle[:12]}"


@dataclass(frozen=True)
class History:
    """`past` are the ids that were current, the latest last; `took` are durations and speeds of the last time."""

    versions: Tuple[Version, ...] = ()
    past: Tuple[str, ...] = ()
    took: Dict[str, float] = field(default_factory=dict)

    def of(self, bundle: str) -> Optional[Version]:
        """The newest version of exactly this bundle."""
        found = [version for version in self.versions if version.bundle == bundle]
        return max(found, key=lambda version: version.number) if found else None

    def named(self, id_: Optional[str]) -> Optional[Version]:
        return next((version for version in self.versions if version.id == id_), None)


def release_of(manifest: Manifest) -> Optional[int]:
    text = manifest.provenance.get(RELEASE, "")
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


def read_history(folder: Path) -> History:
    """The history of a folder, empty when there is none. Raises InputError when the file is damaged."""
    path = folder / _HISTORY
    if not path.exists():
        return History()
    try:
        text = path.read_bytes().decode("utf-8")
        history: History = decode.document(History, text, _FORMAT, _VERSION, "history")
    except decode.ForeignError as error:
        raise InputError(f"{path} was written by another release: update mess-compile") from error
    except (UnicodeDecodeError, decode.DecodeError) as error:
        raise InputError(
            f"{path} is damaged ({error}): remove it; the versions stay, ordered by their numbers"
        ) from error
    return history


def _write_history(folder: Path, history: History) -> None:
    text = json.dumps(decode.encode(history, _FORMAT, _VERSION), indent=1) + "\n"
    temporary = folder / SHIP / f"{_MAKING}history"
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, folder / _HISTORY)


def current_id(folder: Path) -> Optional[str]:
    """The version that programs load, None when there is none. Raises InputError when `current` is something else."""
    path = folder / CURRENT
    try:
        place, _, name = os.readlink(path).rpartition("/")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} is not a link that `ship` made: move it away, or ship to another folder") from error
    if place != VERSIONS or _ID.fullmatch(name) is None:
        raise InputError(f"{path} is a link out of {folder / VERSIONS}: move it away, or ship to another folder")
    return name


def ids_in(folder: Path) -> List[str]:
    """The versions in the folder, the newest first."""
    found = [name for name in _names_in(folder / VERSIONS) if _ID.fullmatch(name)]
    return sorted(found, key=lambda name: -int(name.partition("-")[0]))


def _names_in(folder: Path) -> List[str]:
    return os.listdir(folder) if folder.is_dir() else []


@contextmanager
def locked(folder: Path, patience_s: float = LOCK_S) -> Iterator[None]:
    """Hold the folder's lock, and remove what a killed program left unfinished. Raises InputError on a timeout."""
    (folder / SHIP).mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a+") as stream:
        until = time.monotonic() + patience_s
        while not _has_lock(stream.fileno()):
            if time.monotonic() > until:
                stream.seek(0)
                holder = stream.read(20) or "unknown"
                raise InputError(
                    f"process {holder} is shipping to {folder}: wait until it ends, then run the command again"
                )
            time.sleep(0.05)
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        for name in _names_in(folder / SHIP):
            if name.startswith(_MAKING):
                _remove(folder / SHIP / name)
        yield


def _has_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def refuse_downgrade(history: History, current: Optional[str], bundle: str, release: Optional[int]) -> None:
    """Raises BundleError when a bundle is older than the version in use, by release number or by order of arrival."""
    used, known = history.named(current), history.of(bundle)
    if used is None or used.bundle == bundle:
        return
    remedy = "use --allow-downgrade, or go back with --rollback"
    if used.release is not None:
        if release is None or release < used.release:
            found = "has no release number" if release is None else f"is release {release}"
            raise BundleError(f"the bundle {found}, and release {used.release} is in use: {remedy}")
        if release > used.release:
            return
    if known is not None and known.number < used.number:
        raise BundleError(f"the bundle is older ({known.id}), and {used.id} is in use: {remedy}")


def missing_files(folder: Path, manifest: Manifest) -> List[str]:
    """Hashes of the bundle's files that have not arrived."""
    names = {file.sha256 for file in manifest.files.values()}
    return sorted(name for name in names if not (folder / FILES / name).is_file())


@contextmanager
def stage(folder: Path, text: str, signature: Optional[str], manifest: Manifest) -> Iterator[Path]:
    """Unpack the bundle beside the versions, from files that arrived; it is removed unless `add` has moved it."""
    place = Path(mkdtemp(prefix=_MAKING, dir=folder / SHIP))
    try:
        for name, file in manifest.files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            _link(folder / FILES / file.sha256, place / name)
        content = text.encode("utf-8")
        (place / MANIFEST).write_bytes(content)
        (place / MANIFEST_HASH).write_bytes(hash_line(content))
        if signature is not None:
            (place / SIGNATURE).write_bytes(signature.encode("utf-8"))
        place.chmod(0o755)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    source.chmod(0o444)  # versions share it
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)  # no hard links on this file system, or too many of this file


def find_intact(folder: Path, history: History, bundle: str) -> Optional[Version]:
    """The version of this bundle, if every byte of it is intact."""
    version = history.of(bundle)
    if version is None or version.id not in ids_in(folder):
        return None
    place = folder / VERSIONS / version.id
    try:
        archive = open_archive(place)
    except (BundleError, InputError):
        return None
    archive.close()
    return version if archive.hash == bundle else None


def add(folder: Path, history: History, place: Path, manifest: Manifest, bundle: str, by: Optional[str]) -> History:
    """Move a verified bundle from `place` to the versions, as the newest; programs do not load it yet."""
    numbers = [version.number for version in history.versions]
    numbers += [int(name.partition("-")[0]) for name in ids_in(folder)]
    shipped = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    version = Version(
        max(numbers, default=0) + 1, bundle, manifest.name, release_of(manifest), by, manifest.bytes, shipped
    )
    history = replace(history, versions=(*history.versions, version))
    _write_history(folder, history)
    (folder / VERSIONS).mkdir(exist_ok=True)
    os.replace(place, folder / VERSIONS / version.id)
    return history


def switch(folder: Path, history: History, id_now: str, past: Tuple[str, ...]) -> History:
    """Have programs load the version `id_now`; `past` are the ids that were current before, the latest last.

    Everything is synced to disk first: a power cut leaves the old version or the new one.
    """
    history = replace(history, past=past)
    _write_history(folder, history)
    if current_id(folder) == id_now:
        return history
    os.sync()
    link = folder / SHIP / f"{_MAKING}link"
    os.symlink(f"{VERSIONS}/{id_now}", link)
    os.replace(link, folder / CURRENT)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return history


def previous_id(folder: Path, history: History) -> Optional[str]:
    """The version to go back to: the one that was current before, or else the next older one in the folder."""
    used, there = current_id(folder), ids_in(folder)
    past = [id_ for id_ in reversed(history.past) if id_ != used and id_ in there]
    older = there[there.index(used) + 1 :] if used in there else there
    return next(iter(past + older), None)


def remove_old(folder: Path, history: History, keep: int) -> List[str]:
    """Remove all versions but `keep`, and files that no version has.

    The one in use is always kept, then those in use before it, then the newest.
    """
    used, there = current_id(folder), ids_in(folder)
    order = [*([used] if used else []), *reversed(history.past), *there]
    remaining = [id_ for id_ in dict.fromkeys(order) if id_ in there][: max(keep, 1)]
    gone = [id_ for id_ in there if id_ not in remaining]
    for id_ in gone:
        aside = folder / SHIP / f"{_MAKING}{id_}"
        os.replace(folder / VERSIONS / id_, aside)  # a half removed one must not look like a version
        shutil.rmtree(aside, ignore_errors=True)
    used_files = {sha256 for id_ in remaining for sha256 in _files_of(folder / VERSIONS / id_)}
    for name in set(_names_in(folder / FILES)) - used_files:
        if re.fullmatch("[0-9a-f]{64}", name):
            (folder / FILES / name).unlink()
    return gone


def _files_of(version: Path) -> List[str]:
    try:
        return [file["sha256"] for file in json.loads((version / MANIFEST).read_text("utf-8"))["files"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # damaged: its files are sent again when they are needed
