"""Reads a bundle, a file or a folder, and verifies every byte before any of it is used.

The file is an uncompressed zip whose comment is the SHA-256 of every byte before the comment: a changed, missing or
appended byte anywhere, headers included, is refused before anything is unpacked. A folder is such a zip unpacked.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import IO, BinaryIO, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Union

import numpy as np

from mess_compile.runtime.base.errors import BundleError, InputError
from mess_compile.runtime.base.lfs_pointers import refuse_pointer
from mess_compile.runtime.bundle import onnx_file
from mess_compile.runtime.bundle.manifest import (
    MANIFEST,
    MANIFEST_HASH,
    SIGNATURE,
    File,
    Manifest,
    manifest_from_json,
    manifest_to_json,
)
from mess_compile.runtime.bundle.scratch import Scratch, sweep
from mess_compile.runtime.bundle.signature import Signers, check_signers, signer_of
from mess_compile.runtime.images import npy

_SEAL = re.compile(rb"sha256:([0-9a-f]{64})")
_SEAL_BYTES = len(b"sha256:") + 64
_MAX_BYTES = {MANIFEST: 1 << 22, MANIFEST_HASH: 1 << 8, SIGNATURE: 1 << 14}
_MAX_DEPTH = 8
_MAX_ENTRIES = 1 << 14
_BLOCK = 1 << 20
_PYTHONS_OWN = "__pycache__"
"""Left behind by `python3 FOLDER`; nothing in it is read here."""
_DAMAGED = "copy or write it again"


@dataclass(frozen=True)
class _Entry:
    size: int
    open: Callable[[], IO[bytes]]


class Archive:
    """An unpacked bundle: `manifest`, and `folder` with its files until `close`.

    `signature` covers `manifest_bytes`, None if the bundle is unsigned; `signed_by` is the signer's identity, None
    until `check_signer` has verified it.
    """

    signed_by: Optional[str] = None

    def __init__(self, manifest: Manifest, folder: Scratch, manifest_bytes: bytes, signature: Optional[bytes]) -> None:
        self.manifest = manifest
        self.folder = Path(folder.name)
        self.manifest_bytes = manifest_bytes
        self.signature = signature
        self._temporary = folder

    @property
    def text(self) -> str:
        """The manifest's text, to the byte."""
        return self.manifest_bytes.decode("utf-8")

    @property
    def signature_text(self) -> Optional[str]:
        return None if self.signature is None else self.signature.decode("utf-8", "replace")

    @property
    def hash(self) -> str:
        """`hash_of` this bundle."""
        return hash_of(self.text, self.signature_text)

    def array(self, name: str) -> np.ndarray:
        """An array of the bundle. Raises BundleError unless it is a plain one."""
        try:
            return npy.read_uint8(self.folder / name)
        except (ValueError, OSError) as error:
            raise BundleError(f"{name} of the bundle is not a plain array: {error}") from error

    def check_signer(self, signers: Signers) -> str:
        """The identity among `signers` that signed the bundle. Raises BundleError when none did, InputError."""
        check_signers(signers)
        if self.signature is None:
            raise unsigned(self.manifest)
        self.signed_by = signer_of(self.manifest_bytes, self.signature, signers)
        return self.signed_by

    def close(self) -> None:
        self._temporary.cleanup()


def hash_of(manifest: str, signature: Optional[str]) -> str:
    """The hash that identifies a bundle, from its texts: the manifest lists the hashes of all its files."""
    return hashlib.sha256(manifest.encode("utf-8") + (signature or "").encode("utf-8")).hexdigest()


def unsigned(manifest: Manifest) -> BundleError:
    """The error for a bundle that lacks a required signature."""
    return BundleError(f"the bundle {manifest.name} is not signed: sign it with `mess-compile bundle --sign KEY`")


def open_archive(path: Path) -> Archive:
    """Verify a bundle, a file or an unpacked one, then copy its files to a private temporary folder.

    Raises InputError when there is no such file, BundleError when any byte differs from what was written, or when it
    contains anything but plain files that its manifest lists.
    """
    if not path.is_file() and not path.is_dir():
        raise InputError(f"there is no bundle {path}")
    refuse_pointer(path)
    try:
        with _entries_of_folder(path) if path.is_dir() else _entries_of_file(path) as entries:
            return _unpacked(entries, path)
    except (zipfile.BadZipFile, EOFError, ValueError, OverflowError, RuntimeError, struct.error) as error:
        raise BundleError(f"{path} is not a bundle ({error}): {_DAMAGED}") from error
    except OSError as error:
        place = gettempdir()
        raise InputError(
            f"bundle {path} cannot be read, or cannot be unpacked in {place} (set TMPDIR): {error}"
        ) from error


def _unpacked(entries: Mapping[str, _Entry], path: Path) -> Archive:
    """Compares every size before it writes a file."""
    content = _small(entries, MANIFEST, path)
    if _small(entries, MANIFEST_HASH, path) != hash_line(content):
        raise BundleError(f"{path}: {MANIFEST} was changed after it was written: {_DAMAGED}")
    manifest = manifest_from_json(content.decode("utf-8"))
    odd = sorted((set(manifest.files) | {MANIFEST, MANIFEST_HASH}) ^ (set(entries) - {SIGNATURE}))
    if odd:
        raise BundleError(f"{path}: files and manifest disagree on {', '.join(map(repr, odd))}: {_DAMAGED}"[:300])
    wrong = [name for name, file in manifest.files.items() if entries[name].size != file.bytes]
    if wrong:
        raise BundleError(f"{path}: {wrong[0]} is not the file that the manifest lists")
    signature = _small(entries, SIGNATURE, path) if SIGNATURE in entries else None
    sweep()
    folder = Scratch()
    try:
        for name, file in manifest.files.items():
            _copy(entries[name], Path(folder.name, name), file, f"{path}: {name}")
        sizes = {name: file.bytes for name, file in manifest.files.items()}
        onnx_file.check_graphs(Path(folder.name), sizes)
    except BaseException:
        folder.cleanup()
        raise
    return Archive(manifest, folder, content, signature)


def _small(entries: Mapping[str, _Entry], name: str, path: Path) -> bytes:
    if name not in entries or entries[name].size > _MAX_BYTES[name]:
        raise BundleError(f"{path} has no {name} of a plausible size")
    with entries[name].open() as stream:
        return stream.read(_MAX_BYTES[name] + 1)


def hash_line(content: bytes) -> bytes:
    """The line in the form that `sha256sum -c` reads."""
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode("ascii")


@contextmanager
def _entries_of_file(path: Path) -> Iterator[Dict[str, _Entry]]:
    with path.open("rb") as stream:
        _check_seal(stream, path)
        with zipfile.ZipFile(stream) as content:
            yield _zip_entries(content, path, stream.seek(0, 2))


def _check_seal(stream: BinaryIO, path: Path) -> None:
    size = stream.seek(0, 2)
    stream.seek(max(size - _SEAL_BYTES, 0))
    seal = _SEAL.fullmatch(stream.read())
    if seal is None:
        raise BundleError(f"{path} does not end as a bundle does; it is truncated or another kind of file: {_DAMAGED}")
    if _sha256_of_start(stream, size - _SEAL_BYTES) != seal[1].decode():
        raise BundleError(f"{path} was changed after it was written (its SHA-256 differs): {_DAMAGED}")


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle, after its bytes are verified. Raises BundleError."""
    opened = open_archive(path)
    opened.close()
    return opened.manifest


def is_bundle(path: Path) -> bool:
    """Whether the file ends as a bundle does, complete or not. Raises OSError."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        stream.seek(max(stream.seek(0, 2) - _SEAL_BYTES, 0))
        return _SEAL.fullmatch(stream.read()) is not None


def _sha256_of_start(stream: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    stream.seek(0)
    while size > 0:
        block = stream.read(min(size, _BLOCK))
        digest.update(block)
        size -= len(block) or size
    return digest.hexdigest()


def _zip_entries(content: zipfile.ZipFile, path: Path, size: int) -> Dict[str, _Entry]:
    infos = content.infolist()
    for info in infos:
        kind = stat.S_IFMT(info.external_attr >> 16)
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not stored or info.flag_bits & 1 or kind not in (0, stat.S_IFREG):
            raise BundleError(f"{path}: {info.filename!r:.200} is not a plain stored file")
    entries = {info.filename: _Entry(info.file_size, _opener(content, info)) for info in infos}
    if len(entries) != len(infos):
        raise BundleError(f"{path} contains a file twice")
    if sum(info.file_size for info in infos) > size:
        raise BundleError(f"{path} claims more bytes than it has")
    return entries


def _opener(content: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], IO[bytes]]:
    return lambda: content.open(info)


@contextmanager
def _entries_of_folder(path: Path) -> Iterator[Dict[str, _Entry]]:
    entries: Dict[str, _Entry] = {}
    path = path.resolve()  # a link to it may be switched in the meantime
    for name, found in _entries(path, "", _MAX_DEPTH):
        if not stat.S_ISREG(found.st_mode) or len(entries) == _MAX_ENTRIES:
            raise BundleError(f"{path}: {name!r:.200} is not a plain file: links and devices are refused")
        entries[name] = _Entry(found.st_size, _file_opener(path / name, found))
    yield entries


def _entries(folder: Path, inside: str, depth: int) -> Iterator[Tuple[str, os.stat_result]]:
    """Everything that is not a folder, without following links; also below `depth` folders."""
    with os.scandir(folder) as found:
        for entry in found:
            name, status = inside + entry.name, entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode) and entry.name == _PYTHONS_OWN:
                continue
            if stat.S_ISDIR(status.st_mode) and depth:
                yield from _entries(folder / entry.name, f"{name}/", depth - 1)
            else:
                yield name, status


def _file_opener(path: Path, known: os.stat_result) -> Callable[[], IO[bytes]]:
    """Opens the file that was checked, and no other that took its place."""

    def opened() -> IO[bytes]:
        stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
        found = os.fstat(stream.fileno())
        if (found.st_dev, found.st_ino, found.st_size) == (known.st_dev, known.st_ino, known.st_size):
            return stream
        stream.close()
        raise BundleError(f"{path} is being changed: {_DAMAGED}")

    return opened


def _copy(entry: _Entry, target: Path, file: File, name: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with entry.open() as source, target.open("xb") as sink:
        for block in iter(lambda: source.read(_BLOCK), b""):
            digest.update(block)
            size += len(block)
            if size > file.bytes:
                break
            sink.write(block)
    if size != file.bytes or digest.hexdigest() != file.sha256:
        raise BundleError(f"{name} is not the file that the manifest lists")


def write_archive(
    path: Path,
    manifest: Manifest,
    sources: Mapping[str, Union[Path, bytes]],
    sign: Optional[Callable[[bytes], bytes]] = None,
) -> None:
    """Write a bundle, the same bytes for the same content: entries sorted, one fixed time, sealed.

    `sign` returns the signature of the manifest's bytes.
    """
    content = manifest_to_json(manifest).encode("utf-8")
    beside: List[Tuple[str, Union[Path, bytes]]] = [(MANIFEST, content), (MANIFEST_HASH, hash_line(content))]
    if sign is not None:
        beside.append((SIGNATURE, sign(content)))
    write_sealed_zip(path, beside + sorted(sources.items()))


def write_sealed_zip(path: Path, parts: List[Tuple[str, Union[Path, bytes]]]) -> None:
    """Write the parts in their order, uncompressed, then seal."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as content:
        for name, source in parts:
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            content.writestr(info, source if isinstance(source, bytes) else source.read_bytes())
        content.comment = b"sha256:" + b"0" * 64
    with path.open("r+b") as stream:
        size = stream.seek(0, 2) - _SEAL_BYTES
        digest = _sha256_of_start(stream, size)
        stream.seek(size)
        stream.write(b"sha256:" + digest.encode())


def file_of(source: Union[Path, bytes]) -> File:
    """The manifest's entry for a file or for bytes."""
    content = source if isinstance(source, bytes) else source.read_bytes()
    return File(hashlib.sha256(content).hexdigest(), len(content))
