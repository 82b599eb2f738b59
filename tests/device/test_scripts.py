"""Scripts that run on devices: any POSIX shell takes them, they do what their head says, and they are in the wheel."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

from mess_compile.device import scripts
from mess_compile.device.scripts import shell_script

FILES = sorted(Path(str(resources.files(scripts))).glob("*.sh"))
SHELLS = {"sh": ("sh",), "dash": ("dash",), "bash": ("bash", "--posix"), "busybox": ("busybox", "sh")}


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> tuple[str, ...]:
    command: tuple[str, ...] = SHELLS[request.param]
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}: apt-get install --no-install-recommends {command[0]}")
    return command


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck: apt-get install --no-install-recommends shellcheck")
    done = subprocess.run(["shellcheck", "--shell=sh", *FILES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_script_documents_its_arguments_and_comments_are_not_sent() -> None:
    assert len(FILES) >= 10
    for path in FILES:
        assert path.read_text().startswith((f"# {path.name} ", f"# {path.name}:")), path.name
        sent = shell_script(path.stem)
        assert sent.strip()
        assert not any(line.lstrip().startswith("#") for line in sent.splitlines())


def test_every_shell_can_read_them(shell: tuple[str, ...]) -> None:
    for path in FILES:
        subprocess.run([*shell, "-n", path], check=True)
        subprocess.run([*shell, "-n"], input=shell_script(path.stem), text=True, check=True)


def test_a_damaged_file_is_removed_and_a_whole_one_of_a_broken_transfer_is_taken_over(
    shell: tuple[str, ...], tmp_path: Path
) -> None:
    contents = {hashlib.sha256(text).hexdigest(): text for text in (b"whole", b"damaged", b"arrived", b"absent")}
    whole, damaged, arrived, absent = contents
    left = tmp_path / "incoming-999999999"  # of a process that does not exist
    left.mkdir()
    (tmp_path / whole).write_bytes(b"whole")
    (tmp_path / damaged).write_bytes(b"something else")
    (left / arrived).write_bytes(b"arrived")
    (left / absent).write_bytes(b"abs")
    command = (*shell, "-c", shell_script("verified_folder", "list_files"), "sh", tmp_path)
    done = subprocess.run(command, input="".join(f"{name}\n" for name in contents), capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, [whole, arrived])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((whole, arrived))


def test_an_engine_that_fails_to_build_leaves_the_one_before(shell: tuple[str, ...], tmp_path: Path) -> None:
    def build(command: str) -> list[str]:
        paths = ("engine", "new", "cache", "new.cache")
        script = (*shell, "-c", shell_script("build_engine"), "sh", *paths, "sh", "-c", command)
        return subprocess.run(script, capture_output=True, text=True, cwd=tmp_path).stdout.splitlines()

    assert build("echo building; printf first >new; printf c >new.cache")[-1] == "ended 0 5"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before == {
        "engine.engine": b"first",
        "engine.sha256": hashlib.sha256(b"first").hexdigest().encode() + b"\n",
        "cache": b"c",
    }
    assert build("printf sec >new; exit 3")[-1] == "ended 3 0"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
