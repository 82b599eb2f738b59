"""`ship` over a real sshd: after any failure the version in use goes on, and no partial version is ever activated."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.bundle.archive import open_archive
from mess_compile.runtime.serve.ship import FolderReport
from mess_compile.ship import client as ship
from mess_compile.ship.client import Destination, parse_place
from mess_compile.workspace import Workspace
from tests.commands import ANY_SPEED, complaint, done, printed_json, run
from tests.json_docs import differences
from tests.remote_device import Device, remote_device
from tests.shipping import IDENTITY, Service, check_whole, keys, released, service, that_fails, with_threshold
from tests.small_network import changed_bundle

FOLDER = "street"


@dataclass(frozen=True)
class Street:
    """A device on which a bundle is in use: a program labels frames with it all the time."""

    device: Device
    bundle: Path
    service: Service | None = None

    @property
    def folder(self) -> Path:
        return self.device.home / FOLDER

    @property
    def place(self) -> str:
        return f"{self.device.host}:~/{FOLDER}"

    def ship(self, bundle: Path, *options: str) -> str:
        """Ship successfully, and return the version in use."""
        done("ship", bundle, self.place, *ANY_SPEED, *options)
        return check_whole(self.folder)

    def refused(self, bundle: Path, *options: str) -> str:
        """The error of a ship that fails and changes nothing."""
        before = check_whole(self.folder)
        message = failed("ship", bundle, self.place, *(options or ANY_SPEED))
        assert check_whole(self.folder) == before
        assert self.place in message
        return message


def failed(*arguments: str | Path) -> str:
    """The error, one line after those of progress."""
    result = run(*arguments)
    assert result.exit_code == 1, (result.stdout, result.stderr)
    *progress, message = result.stderr.splitlines()
    assert message.startswith("error: ")
    assert not any("error" in line for line in progress)
    return message


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Iterator[Street]:
    """A bundle shipped once; the program that uses it runs until the last test of this file, and loses no frame."""
    with remote_device(tmp_path_factory.mktemp("device")) as device, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{device.path_folder()}:{os.environ['PATH']}")
        patch.chdir(tmp_path_factory.mktemp("workspace"))
        Workspace(Path()).remember(split="val")
        found = Street(device, finished / "host.mess")
        assert found.ship(found.bundle).startswith("versions/1-")
        with service(device, found.folder, found.bundle) as running:
            yield replace(found, service=running)


@pytest.fixture(autouse=True)
def in_use(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does, the version in use is whole afterwards."""
    yield
    if "street" in request.fixturenames:
        check_whole(request.getfixturevalue("street").folder)


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return iter(range(1, 1000))


@pytest.fixture
def newer(street: Street, numbers: Iterator[int], tmp_path: Path) -> Path:
    """A bundle that was not shipped before: one threshold differs."""
    return changed_bundle(street.bundle, tmp_path / "host.mess", with_threshold(next(numbers)))


def history(street: Street) -> list[dict[str, Any]]:
    """What `ship --list` prints of each version, the newest first."""
    (place,) = [each for each in printed_json("ship", "--list")["places"] if each["place"] == street.place]
    versions = place["versions"]
    assert isinstance(versions, list)
    return versions


def test_only_changes_are_sent_and_a_version_can_be_rolled_back(street: Street, newer: Path) -> None:
    before = check_whole(street.folder)
    foreseen = printed_json("ship", newer, street.place, "--dry-run")
    assert differences("ship --dry-run", foreseen) == []
    expected = foreseen["places"][0]
    assert f"versions/{expected['current']}" == before
    assert check_whole(street.folder) == before
    told = printed_json("ship", newer, street.place, *ANY_SPEED)
    assert differences("ship", told) == differences("ship --list", printed_json("ship", "--list", street.place)) == []
    (shipped,) = told["places"]
    assert shipped["sent_bytes"] < 64 * 1024
    assert shipped["sent_bytes"] == pytest.approx(expected["send_bytes"], rel=0.01)
    after = check_whole(street.folder)
    assert after != before
    assert street.service is not None
    street.service.check()
    assert f"versions/{shipped['done']['before']}" == before
    done("ship", "--rollback", street.place)
    assert check_whole(street.folder) == before
    in_use = [
        f"versions/{each['version']['number']}-{each['version']['bundle'][:12]}"
        for each in history(street)
        if each["current"]
    ]
    assert in_use == [before]


@pytest.mark.slow
def test_an_older_bundle_is_installed_only_with_allow_downgrade(street: Street, newer: Path) -> None:
    street.ship(newer)
    assert "--allow-downgrade" in street.refused(street.bundle)
    refused = done("ship", street.bundle, street.place, "--dry-run")
    assert "--allow-downgrade" in refused
    assert f"hint: mess-compile ship --list {street.place}" in refused, "without its place the list may know none"
    assert street.ship(street.bundle, "--allow-downgrade").startswith("versions/1-")


@pytest.mark.slow
def test_bundle_gives_a_release(workspace: Path) -> None:
    done("-C", workspace, "bundle", "--release", "7")
    with closing(open_archive(workspace / "host.mess")) as opened:
        assert opened.manifest.provenance["release"] == "7"


@pytest.mark.slow
def test_release_numbers_decide_which_bundle_is_older(street: Street, tmp_path: Path) -> None:
    second, first = (changed_bundle(street.bundle, tmp_path / f"{each}.mess", released(each)) for each in (2, 1))
    street.ship(second)
    assert "is release 1, and release 2 is in use" in street.refused(first)
    assert "has no release number" in street.refused(street.bundle)
    street.ship(street.bundle, "--allow-downgrade")


def test_a_bundle_that_fails_verification_is_not_activated(street: Street, tmp_path: Path) -> None:
    bundle = changed_bundle(street.bundle, tmp_path / "host.mess", that_fails)
    assert "failed verification on the device: golden/0.npy" in street.refused(bundle)


@pytest.mark.slow
def test_a_bundle_slower_than_its_plan_is_not_activated(street: Street, newer: Path) -> None:
    assert "failed verification on the device: latency" in street.refused(newer, "--latency-factor", "0.0001")


@pytest.mark.slow
def test_the_device_accepts_only_its_own_signers(street: Street, newer: Path, tmp_path: Path) -> None:
    _, other = keys(tmp_path)
    installed = street.device.home / ".config" / "mess-compile" / "allowed_signers"
    installed.parent.mkdir(parents=True, exist_ok=True)
    installed.write_bytes((tmp_path / "allowed").read_bytes())
    try:
        assert "is not signed" in street.refused(newer)
        (expected,) = printed_json("ship", newer, street.place, "--dry-run")["places"]
        assert "is not signed" in expected["refusal"]
        foreign = changed_bundle(newer, tmp_path / "foreign.mess", lambda manifest: manifest, other)
        assert "nobody in" in street.refused(foreign)
        (expected,) = printed_json("ship", foreign, street.place, "--dry-run")["places"]
        assert "nobody in" in expected["refusal"]
    finally:
        installed.unlink()


@pytest.mark.slow
def test_the_signer_is_reported(street: Street, newer: Path, tmp_path: Path) -> None:
    own, _ = keys(tmp_path)
    installed = street.device.home / ".config" / "mess-compile" / "allowed_signers"
    installed.parent.mkdir(parents=True, exist_ok=True)
    installed.write_bytes((tmp_path / "allowed").read_bytes())
    try:
        signed = changed_bundle(newer, tmp_path / "signed.mess", lambda manifest: manifest, own)
        street.ship(signed)
        assert history(street)[0]["version"]["signed_by"] == IDENTITY
    finally:
        installed.unlink()


def test_an_unknown_target_is_refused_before_anything_is_sent(street: Street) -> None:
    message = complaint("ship", street.bundle, street.place, "--target", "orin")
    assert "has no plan 'orin'; it has host:fp32" in message


def test_a_damaged_bundle_is_refused_before_anything_is_sent(street: Street, newer: Path, tmp_path: Path) -> None:
    content = bytearray(newer.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "damaged.mess").write_bytes(content)
    before = check_whole(street.folder)
    assert "was changed after it was written" in complaint("ship", tmp_path / "damaged.mess", street.place)
    assert check_whole(street.folder) == before


@pytest.mark.slow
def test_a_file_damaged_on_the_device_is_sent_again(street: Street, newer: Path) -> None:
    """In the store, from which later versions are made; programs that loaded it have their own copies."""
    stored = max((street.folder / ".ship" / "files").iterdir(), key=lambda path: path.stat().st_size)
    content = stored.read_bytes()
    stored.chmod(0o644)
    stored.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (shipped,) = printed_json("ship", newer, street.place, *ANY_SPEED)["places"]
    assert shipped["sent_bytes"] >= len(content)
    check_whole(street.folder)


@pytest.mark.slow
def test_a_full_disk_leaves_the_version_in_use_and_the_same_command_continues(street: Street, tmp_path: Path) -> None:
    place = f"{street.device.host}:~/another"
    street.device.limit_file_bytes(100_000)
    try:
        assert "has no space left" in failed("ship", street.bundle, place, *ANY_SPEED)
    finally:
        street.device.limit_file_bytes(None)
    assert not (street.device.home / "another" / "current").exists()
    arrived = sum(
        path.stat().st_size for path in (street.device.home / "another" / ".ship" / "files").iterdir() if path.is_file()
    )
    (shipped,) = printed_json("ship", street.bundle, place, *ANY_SPEED)["places"]
    assert arrived > 0
    assert shipped["sent_bytes"] < street.bundle.stat().st_size - arrived + 150_000, "the program has some 120 kB"


@pytest.mark.slow
def test_one_dead_host_of_three_does_not_stop_the_others(street: Street, newer: Path) -> None:
    dead = "ssh://127.0.0.1:1:/opt/street"
    result = run("ship", newer, street.place, dead, f"{street.device.host}:~/third", *ANY_SPEED, "--systemd")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: 1 of 3 places failed")
    assert "Connection refused" in result.stderr
    for folder in (street.folder, street.device.home / "third"):
        assert check_whole(folder)
    states = {row.split()[0]: row.split()[1] for row in result.stdout.splitlines()[1:4]}
    assert states == {street.place: "host", dead: "FAILED", f"{street.device.host}:~/third": "host"}
    unit = (street.device.home / ".config" / "systemd" / "user" / "mess-third.service").read_text()
    assert (
        f"ExecStart={street.device.python} {street.device.home}/third/current watch {street.device.home}/third/live\n"
        in unit
    )
    assert "Restart=always" in unit


def test_a_place_that_is_named_twice_is_listed_once_with_its_own_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(places: Sequence[Destination]) -> list[FolderReport]:
        return [FolderReport(place.folder, (), {}, 0, None, (), (), None, False) for place in places]

    monkeypatch.setattr(ship, "look", looked)
    told = printed_json("-C", tmp_path, "ship", "--list", "xavier:/a", "xavier:/a", "orin:/b")["places"]
    assert [(each["place"], each["current"]) for each in told] == [("xavier:/a", "/a"), ("orin:/b", "/b")]


@pytest.mark.parametrize(
    ("place", "bundles", "proposed"),
    [
        ("nv@xavier:/a", ("agx.mess", "orin.mess", "xavier.mess"), "xavier.mess"),
        ("nv@xavier:/a", ("agx.mess", "orin.mess"), None),
        ("other:/a", ("agx.mess", "zoo.mess", "orin.mess", "xavier.mess"), "zoo.mess"),
        ("other:/a", ("orin.mess", "xavier.mess"), None),
    ],
)
def test_what_a_list_proposes_to_ship_is_never_for_another_host(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    bundles: tuple[str, ...],
    proposed: str | None,
) -> None:
    """Of bundles for that device its own, else the newest that is for no other host, here in the order of writing."""

    def looked(places: Sequence[Destination]) -> list[FolderReport]:
        return [FolderReport(place.folder, (), {}, 0, None, (), (), None, False) for place in places]

    monkeypatch.setattr(ship, "look", looked)
    workspace = Workspace(tmp_path)
    for device, host in (("xavier", "ssh://nv@xavier"), ("orin", "ssh://nv@orin:2222")):
        workspace.remember_host(device, host)
    for age, name in enumerate(bundles):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 + age, 1e9 + age))
    shown = done("-C", tmp_path, "ship", "--list", place)
    assert re.findall(r"ship \S*/(\S+\.mess) ", shown) == ([] if proposed is None else [proposed])


@pytest.mark.parametrize(
    ("text", "destination", "port", "folder"),
    [
        ("ssh://nv@xavier:/opt/street", "nv@xavier", None, "/opt/street"),
        ("ssh://nv@xavier:2222:/opt/street/", "nv@xavier", 2222, "/opt/street"),
        ("ssh://nv@xavier/opt/street", "nv@xavier", None, "/opt/street"),
        ("xavier:~/street", "xavier", None, "street"),
        ("ssh://[fe80::1]:22:/opt/street", "fe80::1", 22, "/opt/street"),
    ],
)
def test_places_are_hosts_and_folders(text: str, destination: str, port: int | None, folder: str) -> None:
    place = parse_place(text)
    assert (place.host.destination, place.host.port, place.folder) == (destination, port, folder)


@pytest.mark.parametrize(
    "text", ["ssh://h", "h:/", "h:/a b", "h:/a;b", "h:/../a", "h:/a/../b", "h:~/", "h:-x", "-oX:/a", "h:/a'"]
)
def test_an_invalid_place_never_reaches_a_shell(text: str) -> None:
    with pytest.raises(InputError):
        parse_place(text)


def test_a_place_without_a_folder_is_refused_with_an_example() -> None:
    for text in ("ssh://nv@xavier:2222", "nv@xavier", "ssh://xavier"):
        with pytest.raises(InputError, match=r"names no folder: write ssh://user@host:/opt/street"):
            parse_place(text)


@settings(max_examples=40)
@given(st.text(max_size=30) | st.from_regex(r"(ssh://)?[a-z@:0-9]+[:/~]+[-a-z./ ~;$]+", fullmatch=True))
def test_no_text_becomes_an_option_or_leaves_its_folder(text: str) -> None:
    try:
        place = parse_place(text)
    except InputError:
        return
    assert not place.folder.startswith(("-", "~"))
    assert ".." not in place.folder.split("/")
    assert not set(place.folder) & set(" \t\n'\"$;&|<>`\\*%()")


NAMED = "my tools/py $(touch hacked) 'thon"


@pytest.fixture
def without_python(street: Street) -> Iterator[Device]:
    """Its python3 is gone; one more is below the home folder, by a name that no shell may take apart."""
    street.device.wrapped_python(NAMED)
    street.device.use_python(None)
    yield street.device
    street.device.use_python(street.device.python)
    assert not list(street.device.home.rglob("hacked"))


def test_a_missing_python_is_reported_with_the_option_to_name_one(
    street: Street, newer: Path, without_python: Device
) -> None:
    old = without_python.wrapped_python("old", 'echo 3.6.9; [ "$1" = -c ]')
    message = failed("ship", newer, street.place, *ANY_SPEED)
    assert "`python3` cannot be started" in message
    assert "name another by --python PATH" in message
    assert "`./old` is Python 3.6.9, and 3.8 or newer is needed" in failed(
        "ship", "--list", street.place, "--python", old
    )
    (place,) = printed_json("ship", "--list", street.place, "--python", f"~/{NAMED}")["places"]
    assert f"versions/{place['current']}" == check_whole(street.folder)


@pytest.mark.slow
def test_another_python_is_used_and_remembered(street: Street, newer: Path, without_python: Device) -> None:
    before = check_whole(street.folder)
    try:
        assert street.ship(newer, "--python", f"~/{NAMED}") != before
        assert history(street)[0]["current"]
        done("ship", "--rollback", street.place)
    finally:
        Path("workspace.json").unlink()
        Workspace(Path()).remember(split="val")
    assert check_whole(street.folder) == before


def test_a_password_is_not_repeated(street: Street) -> None:
    message = complaint("ship", street.bundle, "ssh://nv:s3cret@xavier:/opt/street")
    assert "password" in message
    assert "s3cret" not in message


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_ship_broken_at_random_moments_never_activates_a_partial_version(
    street: Street, numbers: Iterator[int], tmp_path: Path, seed: int
) -> None:
    """Ten times: cut the connection, kill this process or that on the device. Then the same command succeeds."""
    moments, broken = random.Random(seed), 0
    newer = changed_bundle(street.bundle, tmp_path / "host.mess", with_threshold(next(numbers)))
    took_s = -time.monotonic()
    assert _shipping(street, newer).wait(120) == 0
    took_s += time.monotonic()
    for attempt in range(10):
        newer = changed_bundle(street.bundle, tmp_path / "host.mess", with_threshold(next(numbers)))
        before = check_whole(street.folder)
        process = _shipping(street, newer)
        time.sleep(moments.uniform(0.1, 0.95) * took_s)
        how = ("cut", "here", "there")[attempt % 3]
        if how == "cut":
            street.device.cut()
        elif how == "here":
            process.kill()
        else:
            _kill_there(street.device)
        errors = process.communicate(timeout=120)[1].decode()
        assert "Traceback" not in errors
        assert errors.count("error: ") == (process.returncode == 1), errors
        broken += process.returncode != 0
        check_whole(street.folder)
        assert street.ship(newer) != before
    assert broken >= 3, "most of the moments hit something"


def _shipping(street: Street, bundle: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mess_compile", "ship", str(bundle), street.place, *ANY_SPEED]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def _kill_there(device: Device) -> None:
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
            if (
                b"mess_compile.runtime.serve.ship" in words
                and f"HOME={device.home}".encode() in (entry / "environ").read_bytes()
            ):
                os.kill(int(entry.name), signal.SIGKILL)
