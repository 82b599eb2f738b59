"""Tab completes what is there, at once: who waits for it stops pressing it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from PIL import Image

from mess_compile.cli import completion
from mess_compile.runtime.engines.engine import PRECISIONS
from mess_compile.targets import known_targets
from tests import small_network
from tests.commands import complaint, done, run

PROFILE = 'name = "mine"\ndescription = "my own"\nlibrary = "onnxruntime"\nprecisions = ["fp32"]\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("completed")
    for name in ("profiles", "plans", "data/train/images", "data/night/images"):
        (root / name).mkdir(parents=True)
    (root / "profiles" / "mine.toml").write_text(PROFILE)
    (root / "plans" / "mine.json").write_text("{}")
    memory = {
        "device": "mine",
        "data": "data",
        "split": "night[:5]",
        "hosts": {"mine": "ssh://me@mine"},
        "ships": ["ssh://me@mine:/street"],
    }
    (root / "workspace.json").write_text(json.dumps({"format": "mess-workspace", "version": 1, **memory}))
    small_network.write_bundle(root / "tiny.mess")
    return root


def completed(place: Path, line: str) -> list[str]:
    """What bash would offer for the last word of `mess-compile LINE`, in the folder of the workspace."""
    words = f"mess-compile {line}"
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_MESS_COMPILE_COMPLETE": "bash_complete"}
    code = "import sys; sys.argv[0] = 'mess-compile'; from mess_compile.cli import main; main(prog_name='mess-compile')"
    command = [sys.executable, "-X", "importtime", "-c", code]
    ended = subprocess.run(command, env={**os.environ, **asked}, cwd=place, capture_output=True, text=True, check=False)
    for heavy in ("numpy", "onnx", "torch", "rich"):
        assert f"| {heavy}\n" not in ended.stderr.replace(" ", "").replace("|", "| "), f"{heavy} takes its time"
    assert "Traceback" not in ended.stderr, ended.stderr
    return [offered.partition(",")[2] for offered in ended.stdout.split()]


def test_everything_that_the_workspace_knows_is_offered(place: Path) -> None:
    known = sorted(known_targets(place))
    assert "mine" in known
    for line, offered in (
        ("se", ["search"]),
        ("search --device ", sorted(["cpu", *known])),
        ("profile --device rtx", [name for name in known if name.startswith("rtx")]),
        ("profile --host ssh:", ["ssh://me@mine"]),
        ("evaluate --split ", ["night[:5]", "train"]),
        ("profile --precision fp32,f", ["fp32,fp16"]),
        ("bundle ", ["mine", "plans/mine.json"]),
        ("verify t", ["tiny.mess"]),
        ("compare m", ["mine"]),
        ("ship tiny.mess ssh:", ["ssh://me@mine:/street"]),
        ("inspect sta", ["statistics"]),
        ("run tiny.mess --target host:", ["host:fp32"]),
        ("run tiny.mess --operating-point d", ["default"]),
        ("search --optimise mem", ["memory"]),
    ):
        assert completed(place, line) == offered, line


def test_another_workspace_is_looked_into(place: Path, tmp_path: Path) -> None:
    assert completed(tmp_path, f"-C {place} search --device mi") == ["mine"]
    assert completed(tmp_path, "search --device mi") == []


def test_precisions_are_those_of_the_engines() -> None:
    assert sorted(completion.PRECISIONS) == sorted(PRECISIONS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_takes_the_script(shell: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(done("completion", shell))
    assert "_MESS_COMPILE_COMPLETE" in script.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", script], check=True)


BREAKS = " \t\n\"'><=;|&(:"
"""By what bash parts words when nobody says otherwise."""


def in_bash(script: Path, line: str) -> str:
    """The word as readline leaves it: what follows its last break is replaced."""
    asked = 'COMP_POINT=${#COMP_LINE}; _mess_compile_completion mess-compile; printf %s "${COMPREPLY[*]}"'
    given = {"COMP_WORDBREAKS": BREAKS, "COMP_LINE": line, **ENVIRONMENT}
    code = f"source {shlex.quote(str(script))}; {asked}"
    ended = subprocess.run(["bash", "-c", code], env=given, capture_output=True, text=True, check=True)
    return line.split()[-1].rpartition(":")[0] + ":" * (":" in line) + ended.stdout


def in_fish(script: Path, line: str) -> str:
    code = f"source {shlex.quote(str(script))}; complete -C {shlex.quote(line)}"
    ended = subprocess.run(["fish", "--no-config", "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    return ended.stdout.partition("\t")[0].strip()


def in_zsh(script: Path, line: str) -> str:
    """What stands on the line after Tab."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    given = {**ENVIRONMENT, "TERM": "dumb", "PS1": "ready> "}
    with subprocess.Popen(
        ["zsh", "-f", "-i"], stdin=end, stdout=end, stderr=end, env=given, start_new_session=True
    ) as zsh:
        os.close(end)
        try:
            said = f"autoload -U compinit; compinit -u -D; source {shlex.quote(str(script))}; print do''ne\n"
            os.write(terminal, said.encode())
            heard(terminal, "done")
            os.write(terminal, f"{line}\t".encode())
            return heard(terminal, f"{line}[^ ]+ $").split()[-1]
        finally:
            zsh.kill()
            os.close(terminal)


def heard(terminal: int, pattern: str) -> str:
    text, until = "", time.monotonic() + 30
    while not re.search(pattern, text):
        assert time.monotonic() < until, text
        if select.select([terminal], [], [], 0.5)[0]:
            text += os.read(terminal, 4096).decode(errors="replace").replace("\x07", "")
    return text


ENVIRONMENT = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": "/nowhere"}
ENVIRONMENT |= {name: os.environ[name] for name in ("PYTHONPATH", "LANG") if name in os.environ}
SHELLS = {"bash": in_bash, "zsh": in_zsh, "fish": in_fish}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_completes_names_with_colons_and_commas(
    shell: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shells part words at colons, and click's own scripts at commas."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: apt-get install {shell}")
    script = tmp_path / "script"
    script.write_text(done("completion", shell))
    monkeypatch.chdir(place)
    for line, word in (
        ("mess-compile profile --host ssh:", "ssh://me@mine"),
        ("mess-compile profile --precision fp32,f", "fp32,fp16"),
    ):
        assert SHELLS[shell](script, line) == word


def test_a_shell_that_is_not_known_is_wrong_usage() -> None:
    assert run("completion", "bsh").exit_code == 2


def test_a_mistyped_name_gets_the_nearest_one(place: Path, tmp_path: Path) -> None:
    frame = tmp_path / "a.png"
    Image.fromarray(small_network.frame(0)).save(frame)
    for typed, meant in (
        (("run", place / "tiny.mess", frame, "-o", tmp_path, "--operating-point", "defualt"), "'default'"),
        (("inspect", "grphs"), "'graphs'"),
        (("search", "--device", "hots"), "'host'"),
        (("bench", place / "tiny.mess", "--split", "trian"), "'train'"),
    ):
        assert f"did you mean {meant}?" in complaint("-C", place, *typed)
    assert "--device" in run("search", "--devise", "host").stderr
