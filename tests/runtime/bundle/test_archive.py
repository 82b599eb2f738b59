"""A bundle with one byte changed, missing or added runs nowhere; a hostile one writes nothing outside its folder."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mess_compile.runtime.base.errors import BundleError, InputError
from mess_compile.runtime.bundle.archive import file_of, open_archive, write_sealed_zip
from mess_compile.runtime.bundle.manifest import manifest_to_json
from tests import small_network


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny.mess"
    small_network.write_bundle(path)
    return path


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where bundles are unpacked, so that a test sees what stays behind."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def refused(content: bytes) -> None:
    folder = Path(tempfile.gettempdir())
    path = folder / "changed.mess"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"changed\.mess"):
        open_archive(path)
    assert list(folder.iterdir()) == [path]


def parts(bundle: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(bundle) as content:
        return {name: content.read(name) for name in content.namelist()}


def hash_line(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  manifest.json\n".encode()


def resealed(folder: Path, content: dict[str, bytes]) -> Path:
    """Sealed as a forger would, the manifest's hash included."""
    path = folder / "forged.mess"
    content = {**content, "manifest.json.sha256": hash_line(content["manifest.json"])}
    write_sealed_zip(path, list(content.items()))
    return path


def test_an_unchanged_bundle_unpacks_to_what_was_packed_and_leaves_nothing(bundle: Path, scratch: Path) -> None:
    archive = open_archive(bundle)
    assert stat.S_IMODE(archive.folder.stat().st_mode) == 0o700
    for name, file in archive.manifest.files.items():
        assert file_of(archive.folder / name) == file
    archive.close()
    assert list(scratch.iterdir()) == []


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_byte_is_refused(bundle: Path, data: st.DataObject) -> None:
    content = bytearray(bundle.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    refused(bytes(content))


def test_every_byte_of_the_headers_at_the_end_counts(bundle: Path) -> None:
    content = bundle.read_bytes()
    for position in range(len(content) - 200, len(content)):
        refused(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_truncated_bundle_is_refused(bundle: Path, data: st.DataObject) -> None:
    content = bundle.read_bytes()
    refused(content[: data.draw(st.integers(0, len(content) - 1))])


@settings(max_examples=60, deadline=None)
@given(extra=st.binary(min_size=1, max_size=200), front=st.booleans())
def test_appended_bytes_are_refused(bundle: Path, extra: bytes, front: bool) -> None:
    assume(not front or b"git-lfs" not in extra)  # a pointer of Git LFS is refused, too, as what it is
    content = bundle.read_bytes()
    refused(extra + content if front else content + extra)


def test_bytes_between_content_and_seal_are_refused(bundle: Path) -> None:
    content = bundle.read_bytes()
    refused(content + content[-71:])


def test_two_bundles_in_one_file_are_refused(bundle: Path) -> None:
    refused(bundle.read_bytes() * 2)


def test_a_missing_bundle_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no bundle"):
        open_archive(tmp_path / "gone.mess")


def test_an_extra_and_a_missing_file_are_refused_by_name(bundle: Path, tmp_path: Path) -> None:
    content = parts(bundle)
    with pytest.raises(BundleError, match=r"surprise\.bin"):
        open_archive(resealed(tmp_path, {**content, "surprise.bin": b"x"}))
    del content["golden/0.npy"]
    with pytest.raises(BundleError, match=r"golden/0\.npy"):
        open_archive(resealed(tmp_path, content))


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "graphs/../../outside"])
def test_a_path_out_of_the_folder_is_refused(bundle: Path, tmp_path: Path, scratch: Path, name: str) -> None:
    with pytest.raises(BundleError, match="outside"):
        open_archive(resealed(tmp_path, {**parts(bundle), name: b"x"}))
    assert list(scratch.iterdir()) == []


def test_a_file_that_differs_from_its_hash_is_refused_and_nothing_stays(
    bundle: Path, tmp_path: Path, scratch: Path
) -> None:
    content = parts(bundle)
    content["graphs/segment-1-2.onnx"] += b"\0"
    with pytest.raises(BundleError, match=r"segment-1-2\.onnx"):
        open_archive(resealed(tmp_path, content))
    assert list(scratch.iterdir()) == []


def test_a_forged_manifest_is_refused(bundle: Path, tmp_path: Path) -> None:
    for forged in (b"{}", b"\xff", b""):
        with pytest.raises(BundleError, match=r"does not have the format|not a bundle|not JSON"):
            open_archive(resealed(tmp_path, {**parts(bundle), "manifest.json": forged}))


def seal_of(tmp_path: Path, write: Callable[[zipfile.ZipFile], None]) -> Path:
    """A zip that `write` fills, sealed as a forger would."""
    path = tmp_path / "forged.mess"
    with zipfile.ZipFile(path, "w") as content:
        write(content)
        content.comment = b"sha256:" + b"0" * 64
    raw = path.read_bytes()[:-71]
    path.write_bytes(raw + b"sha256:" + hashlib.sha256(raw).hexdigest().encode())
    return path


def test_a_compressed_bomb_is_refused_unopened(tmp_path: Path) -> None:
    path = seal_of(tmp_path, lambda z: z.writestr("manifest.json", b"0" * 10**7, zipfile.ZIP_DEFLATED))
    with pytest.raises(BundleError, match="not a plain stored file"):
        open_archive(path)


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("graphs/link.onnx")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(BundleError, match=r"link\.onnx"):
        open_archive(seal_of(tmp_path, lambda z: z.writestr(link, "/etc/passwd")))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_twice_is_refused(bundle: Path, tmp_path: Path) -> None:
    def write(content: zipfile.ZipFile) -> None:
        for name, data in [*parts(bundle).items(), ("golden/0.npy", b"other")]:
            content.writestr(name, data)

    with pytest.raises(BundleError, match="twice"):
        open_archive(seal_of(tmp_path, write))


def test_entries_that_share_their_bytes_are_refused(bundle: Path, tmp_path: Path) -> None:
    def write(content: zipfile.ZipFile) -> None:
        content.writestr("a", b"x" * 5000)
        for number in range(20):
            info = zipfile.ZipInfo(f"b{number}")
            original = content.getinfo("a")
            info.header_offset, info.CRC = original.header_offset, original.CRC
            info.file_size = info.compress_size = original.file_size
            info.external_attr = 0
            content.filelist.append(info)

    with pytest.raises(BundleError, match="more bytes than it has"):
        open_archive(seal_of(tmp_path, write))


def with_file(bundle: Path, folder: Path, name: str, content: bytes) -> Path:
    """The bundle with another file, its hashes and seal made to fit."""
    archive = open_archive(bundle)
    listed = {**archive.manifest.files, name: file_of(content)}
    manifest = manifest_to_json(replace(archive.manifest, files=listed)).encode()
    archive.close()
    return resealed(folder, {**parts(bundle), name: content, "manifest.json": manifest})


def npy(shape: str, values: bytes, descr: str = "|u1") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + values


def pickled() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickled(), "version 1 with uint8"),
        (npy("(99999, 99999, 3)", b"xyz"), "3 bytes follow"),
        (npy("(1, 3)", b"xyz", "|O"), "version 1 with uint8"),
        (npy("(3,)", b"xyz"), "version 1 with uint8"),
        (npy("(1, 3)", b"xy"), "2 bytes follow"),
        (npy("(" * 30, b""), "version 1 with uint8"),
        (b"\x93NUMPY\x01\x00\xff\xff", "version 1 with uint8"),
        (b"", "version 1 with uint8"),
    ],
)
def test_a_golden_file_that_is_no_plain_array_is_refused_unread(
    bundle: Path, tmp_path: Path, content: bytes, words: str
) -> None:
    forged = open_archive(with_file(bundle, tmp_path, "golden/0.npy", content))
    with pytest.raises(BundleError, match=f"golden/0.npy of the bundle is not a plain array: .*{words}"):
        forged.array("golden/0.npy")
    forged.close()


def test_a_file_in_place_of_a_folder_is_refused(bundle: Path, tmp_path: Path, scratch: Path) -> None:
    with pytest.raises(BundleError, match="files has the path 'golden'"):
        open_archive(with_file(bundle, tmp_path, "golden", b"x"))
    assert list(scratch.iterdir()) == []


@pytest.fixture
def unpacked(bundle: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "street"
    with zipfile.ZipFile(bundle) as content:
        content.extractall(folder)
    return folder


def test_an_unpacked_bundle_is_the_bundle(bundle: Path, unpacked: Path) -> None:
    whole, folder = open_archive(bundle), open_archive(unpacked)
    assert folder.manifest == whole.manifest
    for name, file in whole.manifest.files.items():
        assert file_of(folder.folder / name) == file
    whole.close()
    folder.close()


def test_any_changed_file_of_an_unpacked_bundle_is_refused(unpacked: Path, scratch: Path) -> None:
    names = ("manifest.json", "manifest.json.sha256", "__main__.py", "README.txt", "graphs/segment-0-1.onnx")
    weight = next((unpacked / "graphs" / "weights").iterdir())
    for path in (*(unpacked / name for name in names), unpacked / "golden" / "0.npy", weight):
        good = path.read_bytes()
        for changed in (good + b"x", good[:-1] + bytes([good[-1] ^ 1])):
            path.write_bytes(changed)
            with pytest.raises(BundleError, match="street"):
                open_archive(unpacked)
        path.write_bytes(good)
    assert list(scratch.iterdir()) == []
    open_archive(unpacked).close()


def test_links_and_more_files_in_an_unpacked_bundle_are_refused(unpacked: Path, tmp_path: Path) -> None:
    graph = unpacked / "graphs" / "segment-0-1.onnx"
    outside = tmp_path / "outside.onnx"
    outside.write_bytes(graph.read_bytes())
    graph.unlink()
    graph.symlink_to(outside)
    with pytest.raises(BundleError, match="links and devices are refused"):
        open_archive(unpacked)
    graph.unlink()
    os.mkfifo(graph)
    with pytest.raises(BundleError, match="links and devices are refused"):
        open_archive(unpacked)
    graph.unlink()
    outside.rename(graph)
    (tmp_path / "graphs").mkdir()
    (unpacked / "more").symlink_to(tmp_path / "graphs")
    with pytest.raises(BundleError, match="'more' is not a plain file"):
        open_archive(unpacked)
    (unpacked / "more").unlink()
    (unpacked / "golden" / "more.npy").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"disagree on 'golden/more\.npy'"):
        open_archive(unpacked)


def test_a_pointer_of_git_lfs_is_no_damaged_bundle(tmp_path: Path) -> None:
    path = tmp_path / "street.mess"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n")
    with pytest.raises(InputError, match=r"street\.mess is a Git LFS pointer.*git lfs pull"):
        open_archive(path)
