"""Who made a bundle: with real keys and the system's ssh-keygen."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from mess_compile import runtime
from mess_compile.runtime import __main__ as command
from mess_compile.runtime.base.errors import BundleError, InputError
from mess_compile.runtime.bundle.archive import open_archive, write_sealed_zip
from mess_compile.runtime.bundle.signature import Signers, sign, signer_of
from mess_compile.runtime.serve.verify import VerifyOptions, verify_bundle
from tests import commands, small_network

pytestmark = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="there is no ssh-keygen")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys `maker` and `other`, and a file that allows the maker's."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("maker", "other"):
        making = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)]
        subprocess.run(making, check=True)
    public = (folder / "maker.pub").read_text().split()
    (folder / "allowed").write_text(f'maker@example.com namespaces="mess-compile-bundle" {public[0]} {public[1]}\n')
    return folder


@pytest.fixture(scope="module")
def signed(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "street.mess"
    small_network.write_bundle(path, key=keys / "maker")
    return path


def options_of(keys: Path, identity: str | None = None) -> VerifyOptions:
    return VerifyOptions(Signers(keys / "allowed", identity), require_signature=True, latency_factor=1000)


def test_a_signed_bundle_names_its_signer_and_verifies(keys: Path, signed: Path) -> None:
    checks = verify_bundle(signed, options=options_of(keys))
    assert all(check.passed for check in checks)
    assert (checks[1].name, checks[1].detail) == ("signature", "by maker@example.com")
    assert verify_bundle(signed, options=options_of(keys, "maker@example.com"))[1].passed
    with runtime.load(signed, signers=Signers(keys / "allowed")) as cascade:
        assert cascade(small_network.frame(0)).labels.shape == small_network.HW


def test_the_systems_own_tool_agrees(keys: Path, signed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(signed) as content:
        content.extractall(tmp_path)
    verify = f"ssh-keygen -Y verify -f {keys}/allowed -I maker@example.com -n mess-compile-bundle -s manifest.json.sig"
    subprocess.run(
        f"{verify} < manifest.json && sha256sum -c manifest.json.sha256", shell=True, cwd=tmp_path, check=True
    )


def test_signing_twice_gives_the_same_bytes(keys: Path, tmp_path: Path, signed: Path) -> None:
    small_network.write_bundle(tmp_path / "street.mess", key=keys / "maker")
    assert (tmp_path / "street.mess").read_bytes() == signed.read_bytes()


def test_another_key_another_name_and_no_signature_fail_and_nothing_runs(
    keys: Path, signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a bundle of unknown origin was loaded")

    monkeypatch.setattr("mess_compile.runtime.serve.verify.load_archive", refuse)
    monkeypatch.setattr("mess_compile.runtime.cascade.cascade.load_archive", refuse)
    foreign, plain = tmp_path / "foreign.mess", tmp_path / "plain.mess"
    monkeypatch.setattr("mess_compile.bundle.write._golden", lambda *_: ())
    small_network.write_bundle(foreign, key=keys / "other")
    small_network.write_bundle(plain)
    for path, words, identity in (
        (foreign, "nobody in", None),
        (foreign, "the bundle's signature is not that of maker@example.com", "maker@example.com"),
        (signed, "the bundle's signature is not that of somebody@example.com", "somebody@example.com"),
        (plain, "none, but a signature is required", None),
    ):
        hashes, signature = verify_bundle(path, options=options_of(keys, identity))
        assert hashes.passed
        assert not signature.passed
        assert words in signature.detail
        with pytest.raises(BundleError, match=r"is not signed|signature is not that of|nobody in"):
            runtime.load(path, signers=Signers(keys / "allowed", identity))


def repacked(signed: Path, folder: Path, change: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(signed) as content:
        parts = {name: content.read(name) for name in content.namelist()} | change
    path = folder / "repacked.mess"
    write_sealed_zip(path, list(parts.items()))
    return path


def test_a_changed_manifest_is_not_what_was_signed(keys: Path, signed: Path, tmp_path: Path) -> None:
    archive = open_archive(signed)
    content = archive.manifest_bytes.replace(b'"cut": 18', b'"cut": 0')
    assert content != archive.manifest_bytes
    archive.close()
    line = f"{hashlib.sha256(content).hexdigest()}  manifest.json\n".encode()
    path = repacked(signed, tmp_path, {"manifest.json": content, "manifest.json.sha256": line})
    open_archive(path).close()
    signature = verify_bundle(path, options=options_of(keys))[1]
    assert not signature.passed
    assert "incorrect signature" in signature.detail.lower()


def test_a_changed_file_is_refused_before_its_signature_matters(keys: Path, signed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(signed) as content:
        graph = bytearray(content.read("graphs/segment-0-1.onnx"))
    graph[40] ^= 1
    with pytest.raises(BundleError, match=r"segment-0-1\.onnx is not the file that the manifest lists"):
        verify_bundle(repacked(signed, tmp_path, {"graphs/segment-0-1.onnx": bytes(graph)}), options=options_of(keys))


def test_without_allowed_signers_a_signature_is_told_but_proves_nothing(signed: Path) -> None:
    check = verify_bundle(signed, options=VerifyOptions(latency_factor=1000))[1]
    assert check.passed
    assert "no file of allowed signers" in check.detail
    assert not verify_bundle(signed, options=VerifyOptions(require_signature=True))[1].passed


def test_a_signature_for_another_purpose_does_not_count(keys: Path, tmp_path: Path) -> None:
    (tmp_path / "mail").write_bytes(b"content")
    subprocess.run(
        ["ssh-keygen", "-q", "-Y", "sign", "-f", str(keys / "maker"), "-n", "mail", "mail"], cwd=tmp_path, check=True
    )
    with pytest.raises(BundleError, match=r"signature is not that of|nobody in"):
        signer_of(b"content", (tmp_path / "mail.sig").read_bytes(), Signers(keys / "allowed", "maker@example.com"))
    own = sign(b"content", keys / "maker")
    assert signer_of(b"content", own, Signers(keys / "allowed")) == "maker@example.com"


@pytest.mark.parametrize("garbage", [b"", bytes(100), b"-----BEGIN SSH SIGNATURE-----\nAAAA\n"])
def test_what_is_no_signature_is_refused(keys: Path, garbage: bytes) -> None:
    with pytest.raises(BundleError, match=r"signature is not that of|nobody in"):
        signer_of(b"content", garbage, Signers(keys / "allowed"))


def test_missing_keys_files_and_tools_are_named(keys: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no key"):
        sign(b"x", keys / "gone")
    with pytest.raises(InputError, match=r"cannot sign with .*allowed"):
        sign(b"x", keys / "allowed")
    with pytest.raises(InputError, match=r"there is no file .* of allowed signers"):
        signer_of(b"x", b"", Signers(keys / "gone"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"ssh-keygen does not run .*: install OpenSSH's client"):
        sign(b"x", keys / "maker")
    old = tmp_path / "ssh-keygen"
    old.write_text("#!/bin/sh\necho 'unknown option -- Y' >&2\nexit 1\n")
    old.chmod(0o755)
    with pytest.raises(InputError, match=r"older than OpenSSH 8\.2"):
        sign(b"x", keys / "maker")


def test_the_command_on_the_device_asks_for_a_signature(
    keys: Path, signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--allowed-signers", str(keys / "allowed"), "--require-signature", "--latency-factor", "1000"]
    assert command.main(["verify", str(signed), *asked]) == 0
    assert "ok      signature: by maker@example.com" in capsys.readouterr().out
    plain = tmp_path / "plain.mess"
    small_network.write_bundle(plain)
    assert command.main(["verify", str(plain), *asked]) == 1
    assert "FAILED  signature: none, but a signature is required" in capsys.readouterr().out


def test_named_signers_ask_for_a_signature_by_themselves(
    keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, named = tmp_path / "plain.mess", ("--allowed-signers", str(keys / "allowed"))
    small_network.write_bundle(plain)
    checks = verify_bundle(plain, options=VerifyOptions(Signers(keys / "allowed")))
    assert [(check.name, check.passed) for check in checks] == [("hashes", True), ("signature", False)]
    assert command.main(["verify", str(plain), *named]) == 1
    assert "FAILED  signature: none, but a signature is required" in capsys.readouterr().out
    assert "(signature)" in commands.complaint("verify", plain, *named)


def test_a_missing_file_of_signers_is_refused_before_the_bundle_is_looked_at(
    keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, gone = tmp_path / "plain.mess", keys / "gone"
    small_network.write_bundle(plain)
    for path in (plain, tmp_path / "no.mess"):
        assert command.main(["verify", str(path), "--allowed-signers", str(gone)]) == 1
        assert f"there is no file {gone} of allowed signers" in capsys.readouterr().err
    assert f"there is no file {gone}" in commands.complaint("verify", plain, "--allowed-signers", gone)
    with pytest.raises(InputError, match="there is no file"):
        runtime.load(plain, signers=Signers(gone))
