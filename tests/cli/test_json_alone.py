"""Programs read standard output of `--json`: one stray line, or an error without an object, and they break."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mess_compile.cli import main
from mess_compile.cli.console import fail, print_json
from tests.commands import run

LOUD = """
import atexit, ctypes, os, subprocess, sys
from mess_compile.cli import main
libc = ctypes.CDLL(None)
inner = main.commands["devices"].callback
def loud():
    print("python")
    os.write(1, b"descriptor\\n")
    libc.puts(b"a library in C")
    subprocess.run(["echo", "a child"])
    atexit.register(lambda: libc.puts(b"at the end"))
main.commands["devices"].callback = lambda *a, **k: (loud(), inner(*a, **k))[1]
main(["devices", "--json"])
"""
NOISE = ("python", "descriptor", "a library in C", "a child", "at the end")


def ended(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)


def test_whatever_libraries_print_goes_to_the_other_stream() -> None:
    found = ended(LOUD)
    assert found.returncode == 0, found.stderr
    assert "devices" in json.loads(found.stdout)
    assert all(words in found.stderr for words in NOISE)


def error_of(*words: str) -> tuple[int, str]:
    """Exit code, and the one key of the object on standard output."""
    found = run(*words)
    content = json.loads(found.stdout)
    assert list(content) == ["error"]
    assert content["error"] in found.stderr.replace("\n", " ")
    return found.exit_code, content["error"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("-C", "/absent", "profile"), 1, "/absent does not exist"),
        (("export", "absent.onnx"), 1, "absent.onnx does not exist"),
        (("export", "--frob"), 2, "--frob"),
        (("exprot",), 2, "Did you mean 'export'"),
        (("demo",), 2, "--json"),
        (("bench",), 2, "Missing argument"),
        (("train",), 2, "--data"),
    ],
)
def test_an_error_is_an_object_too(
    words: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, said = error_of(*words, "--json")
    assert (found, message in said) == (code, True), (found, said)


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "full", "graphs"), RuntimeError("a fault of ours")])
def test_every_kind_of_end_has_its_object(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(main.commands["devices"], "callback", broken)
    found = CliRunner().invoke(main, ["devices", "--json"])
    assert found.exit_code == 1
    assert json.loads(found.stdout)["error"]


def test_ctrl_c_is_an_object() -> None:
    code = (
        "import time\nfrom mess_compile.cli import main\n"
        "main.commands['devices'].callback = lambda *a, **k: (print('ready', flush=True), time.sleep(30))\n"
        "main(['devices', '--json'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert json.loads(told)["error"].startswith("stopped: ")


def test_what_was_found_before_an_error_stands_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `verify`, which says what failed and then that it did."""

    def verified(*given: object, **named: object) -> None:
        print_json({"passed": False})
        fail("it failed")

    monkeypatch.setattr(main.commands["devices"], "callback", verified)
    found = run("devices", "--json")
    assert (found.exit_code, json.loads(found.stdout)) == (1, {"passed": False, "error": "it failed"})


def test_help_stays_on_standard_output() -> None:
    assert run("export", "--json", "--help").stdout.startswith("Usage: ")


def test_a_closed_standard_output_is_no_traceback() -> None:
    code = "from mess_compile.cli import main\nmain(['devices', '--json'])"
    found = ended(code, preexec_fn=lambda: os.close(1))
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
