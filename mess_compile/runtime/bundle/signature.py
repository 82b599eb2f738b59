"""Signs bundles and verifies signers: OpenSSH's signatures of the manifest's bytes, by `ssh-keygen` (8.2 or later).

The manifest lists every other file with its SHA-256, so that the signature covers the whole bundle.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import List, Optional

from mess_compile.runtime.base import user_dirs
from mess_compile.runtime.base.errors import BundleError, InputError, one_line

NAMESPACE = "mess-compile-bundle"
INSTALLED = Path("/etc/mess-compile/allowed_signers")
"""The signers that a device's administrator trusts; a user's own file applies if this one does not exist."""
_TIMEOUT_S = 60


@dataclass(frozen=True)
class Signers:
    """Trusted signers: an allowed-signers file of `ssh-keygen`, and which of its identities (None: any)."""

    file: Path
    identity: Optional[str] = None


def installed_signers() -> Optional[Signers]:
    """The signers trusted on this machine: INSTALLED, or `mess-compile/allowed_signers` in the user's settings."""
    settings = user_dirs.settings()
    own = () if settings is None else (settings / "mess-compile" / "allowed_signers",)
    for file in (INSTALLED, *own):
        if os.path.lexists(file):
            return Signers(file)
    return None


def sign(content: bytes, key: Path) -> bytes:
    """The signature by a private key, or by the agent if `key` is a public one. Raises InputError.

    Keys of the types ed25519 and rsa sign the same content with the same bytes.
    """
    if not key.is_file():
        raise InputError(f"there is no key {key}: name a private key, such as ~/.ssh/id_ed25519")
    done = _ssh_keygen(["sign", "-q", "-f", str(key), "-n", NAMESPACE], content)
    if done.returncode or not done.stdout.startswith(b"-----BEGIN SSH SIGNATURE-----"):
        raise InputError(f"ssh-keygen cannot sign with {key}: {_words(done)}")
    return done.stdout


def check_signers(signers: Signers) -> None:
    """Raises InputError when there is no such file."""
    if not signers.file.is_file():
        raise InputError(f"there is no file {signers.file} of allowed signers: a line is `NAME ssh-ed25519 AAAA...`")


def signer_of(content: bytes, signature: bytes, signers: Signers) -> str:
    """The identity among `signers` that signed `content`. Raises BundleError when none did, InputError."""
    check_signers(signers)
    with TemporaryDirectory(prefix="mess-") as folder:
        path = Path(folder, "signature")
        path.write_bytes(signature)
        identity = signers.identity or _found(path, signers)
        chosen = ["-f", str(signers.file), "-I", identity, "-n", NAMESPACE, "-s", str(path)]
        done = _ssh_keygen(["verify", *chosen], content)
    if done.returncode:
        raise BundleError(f"the bundle's signature is not that of {identity} in {signers.file}: {_words(done)}")
    return identity


def _found(signature: Path, signers: Signers) -> str:
    done = _ssh_keygen(["find-principals", "-s", str(signature), "-f", str(signers.file)], b"")
    names = done.stdout.decode("utf-8", "replace").splitlines()
    if done.returncode or not names:
        raise BundleError(f"nobody in {signers.file} signed the bundle: {_words(done)}")
    return names[0]


def _ssh_keygen(arguments: List[str], content: bytes) -> subprocess.CompletedProcess[bytes]:
    try:
        done = subprocess.run(
            ["ssh-keygen", "-Y", *arguments], input=content, capture_output=True, timeout=_TIMEOUT_S, check=False
        )
    except OSError as error:
        raise InputError(f"ssh-keygen does not run ({error.strerror}): install OpenSSH's client") from error
    except subprocess.TimeoutExpired as error:
        raise InputError(f"ssh-keygen did not finish within {_TIMEOUT_S} s: check that its agent answers") from error
    if b"unknown option -- Y" in done.stderr or b"illegal option -- Y" in done.stderr:
        raise InputError("ssh-keygen here is older than OpenSSH 8.2, which signatures need: verify on another machine")
    return done


def _words(done: subprocess.CompletedProcess[bytes]) -> str:
    return one_line(done.stderr.decode("utf-8", "replace") or f"exit code {done.returncode}")
