"""The bundle as a file: an uncompressed zip whose comment is the SHA-256 of every byte before the comment.

One changed, missing or appended byte anywhere, headers included, is refused before anything is unpacked.
"""

from __future__ import annotations

import hashlib
import re
import stat
import struct
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import BinaryIO, Dict, List, Mapping, Tuple, Union

import numpy as np

from mess_compile.runtime.errors import BundleError, InputError
from mess_compile.runtime.manifest import MANIFEST, File, Manifest, manifest_from_json, manifest_to_json

_SEAL = re.compile(rb"sha256:([0-9a-f]{64})")
_SEAL_BYTES = len(b"sha256:") + 64
_MAX_MANIFEST_BYTES = 1 << 24
_BLOCK = 1 << 20
_DAMAGED = "copy or write it again"


class Archive:
    """An unpacked bundle: `manifest`, and `folder` with its files until `close`."""

    def __init__(self, manifest: Manifest, folder: TemporaryDirectory[str]) -> None:
        self.manifest = manifest
        self.folder = Path(folder.name)
        self._temporary = folder

    def array(self, name: str) -> np.ndarray:
        """An array of the bundle. Raises BundleError when it is not a plain one."""
        try:
            return np.array(np.load(self.folder / name, mmap_mode="r", allow_pickle=False))
        except (ValueError, EOFError, OSError) as error:
            raise BundleError(f"{name} of the bundle is not a plain array: {error}") from error

    def close(self) -> None:
        self._temporary.cleanup()


def open_archive(path: Path) -> Archive:
    """Verify a bundle, then unpack it into a private temporary folder.

    Raises InputError when there is no such file, BundleError when any byte of it is not what was written, or when it
    holds anything but plain files that its manifest lists.
    """
    if not path.is_file():
        raise InputError(f"there is no bundle {path}")
    try:
        with path.open("rb") as stream:
            _check_seal(stream, path)
            with zipfile.ZipFile(stream) as content:
                entries = _entries(content, path, stream.seek(0, 2))
                manifest = _manifest(content, entries, path)
                return _unpack(content, entries, manifest, path)
    except (zipfile.BadZipFile, EOFError, ValueError, OverflowError, RuntimeError, struct.error) as error:
        raise BundleError(f"{path} is not a bundle ({error}): {_DAMAGED}") from error
    except OSError as error:
        place = gettempdir()
        raise InputError(f"bundle {path} cannot be read, or not unpacked in {place} (set TMPDIR): {error}") from error


def _check_seal(stream: BinaryIO, path: Path) -> None:
    size = stream.seek(0, 2)
    stream.seek(max(size - _SEAL_BYTES, 0))
    seal = _SEAL.fullmatch(stream.read())
    if seal is None:
        raise BundleError(f"{path} does not end as a bundle does; it is truncated or something else: {_DAMAGED}")
    if _sha256_of_start(stream, size - _SEAL_BYTES) != seal[1].decode():
        raise BundleError(f"{path} was changed after it was written (its SHA-256 differs): {_DAMAGED}")


def _sha256_of_start(stream: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    stream.seek(0)
    while size > 0:
        block = stream.read(min(size, _BLOCK))
        digest.update(block)
        size -= len(block) or size
    return digest.hexdigest()


def _entries(content: zipfile.ZipFile, path: Path, size: int) -> Dict[str, zipfile.ZipInfo]:
    infos = content.infolist()
    for info in infos:
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or kind not in (0, stat.S_IFREG):
            raise BundleError(f"{path}: {info.filename!r} is not a plain stored file")
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
        raise BundleError(f"{path} holds a file twice")
    if sum(info.file_size for info in infos) > size:
        raise BundleError(f"{path} claims more bytes than it has")
    return entries


def _manifest(content: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], path: Path) -> Manifest:
    if MANIFEST not in entries or entries[MANIFEST].file_size > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} has no {MANIFEST} of a sane size")
    manifest = manifest_from_json(content.read(entries[MANIFEST]).decode("utf-8"))
    listed = set(manifest.files) | {MANIFEST}
    if listed != set(entries):
        odd = sorted(listed ^ set(entries))
        raise BundleError(f"{path}: files and manifest disagree on {', '.join(map(repr, odd))}"[:300])
    return manifest


def _unpack(
    content: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], manifest: Manifest, path: Path
) -> Archive:
    folder = TemporaryDirectory(prefix="mess-")
    try:
        for name, file in manifest.files.items():
            _unpack_file(content, entries[name], Path(folder.name, name), file, path)
    except BaseException:
        folder.cleanup()
        raise
    return Archive(manifest, folder)


def _unpack_file(content: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, file: File, path: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with content.open(entry) as source, target.open("xb") as sink:
        for block in iter(lambda: source.read(_BLOCK), b""):
            digest.update(block)
            size += len(block)
            sink.write(block)
    if size != file.bytes or digest.hexdigest() != file.sha256:
        raise BundleError(f"{path}: {entry.filename} is not the file that the manifest lists")


def write_archive(path: Path, manifest: Manifest, sources: Mapping[str, Union[Path, bytes]]) -> None:
    """Write a bundle, the same bytes for the same content: entries sorted, one fixed time, sealed."""
    parts: List[Tuple[str, Union[Path, bytes]]] = [(MANIFEST, manifest_to_json(manifest).encode("utf-8"))]
    write_sealed_zip(path, parts + sorted(sources.items()))


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
    """The manifest's entry of a file or of bytes."""
    content = source if isinstance(source, bytes) else source.read_bytes()
    return File(hashlib.sha256(content).hexdigest(), len(content))
