"""On a terminal long work tells how far it is and how long it takes; everywhere else nothing stands between results."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

TOLD = {name: value for name, value in os.environ.items() if name != "MESS_COMPILE_PROGRESS"}
"""The environment, in which progress is told."""
WORK = """
import time
from mess_compile.cli.console import progress_bar, say
with progress_bar() as progress:
    for done in range(1, 5):
        time.sleep(0.1)
        progress("prepare what takes long, by a name that is longer than its column", done, 4)
        say(f"result {done}")
    for done in range(1, 13):
        time.sleep(0.1)
        progress("measure", done, 2000)
    progress("of unknown length", 1, 0)
"""


def on_a_terminal(code: str, stdout: int | None = None, **environment: str) -> str:
    """All that a terminal of 80 columns gets; `stdout` is where results go instead."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    kept = {name: value for name, value in TOLD.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=end if stdout is None else stdout,
        stderr=end,
        env={**kept, "TERM": "xterm-256color", **environment},
    )
    os.close(end)
    shown = b""
    while True:
        try:
            more = os.read(terminal, 4096)
        except OSError:  # how Linux says that nobody writes to it any more
            break
        if not more:
            break
        shown += more
    os.close(terminal)
    assert process.wait(timeout=60) == 0, shown.decode()
    return shown.decode()


def plain(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


@pytest.fixture(scope="module")
def shown() -> str:
    return on_a_terminal(WORK)


def test_amount_rate_and_time_left_fit_into_80_columns(shown: str) -> None:
    lines = [line for line in re.split(r"[\r\n]+", plain(shown)) if "measure" in line]
    rates = [float(found[1]) for line in lines if (found := re.search(r" ([\d.]+)/s ", line))]
    assert rates
    assert 2 < rates[-1] < 12, "ten a second at most, and not the pace of the work before it"
    left = [match for line in lines if (match := re.search(r"\b0:(\d\d):(\d\d)", line))]
    assert left, "2000 of them take minutes"
    assert re.search(r"\b12/2000\b", lines[-1])
    assert max(map(len, lines)) <= 80
    assert "1/0" not in shown


def test_results_stand_above_the_bar_once(shown: str) -> None:
    lines = re.split(r"[\r\n]+", plain(shown))
    assert [line.strip() for line in lines if "result" in line] == [f"result {number}" for number in range(1, 5)]


def test_results_go_into_a_file_while_the_terminal_shows_progress(tmp_path: Path) -> None:
    with (tmp_path / "results").open("w") as results:
        shown = on_a_terminal(WORK, results.fileno())
    assert "result" not in shown
    assert "4/4" in shown
    assert (tmp_path / "results").read_text() == "".join(f"result {number}\n" for number in range(1, 5))


def test_no_colour_where_none_is_wanted(shown: str) -> None:
    colour = re.compile(r"\x1b\[[0-9;]*(?:3[0-9]|38;[0-9;]+|9[0-7])m")
    assert colour.search(shown)
    assert not colour.search(on_a_terminal(WORK, NO_COLOR="1"))


def test_nothing_but_results_where_nobody_looks() -> None:
    ended = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True, env=TOLD)
    assert (ended.stdout.count("result"), ended.stderr) == (4, "")


USED_WRONGLY = """
from mess_compile.cli import main
try:
    main(["search", "--seed", "1"])
except SystemExit as end:
    print("code", end.code)
"""


def test_wrong_usage_breaks_between_words_too() -> None:
    lines = plain(on_a_terminal(USED_WRONGLY)).replace("\r", "").strip().split("\n")
    assert max(map(len, lines)) <= 80
    assert lines[0].endswith("search [OPTIONS]")
    (start,) = [number for number, line in enumerate(lines) if line.startswith("Error: ")]
    assert len(lines[start:-1]) == 2
    assert lines[start + 1].startswith("  ")
    assert lines[-1] == "code 2"


WARNED = """
import click
from mess_compile.cli.console import warn
@click.command()
def measure():
    for _ in range(2):
        warn("latencies of host are noisy; " + "profile again " * 12)
        warn("another")
measure()
"""


def test_a_warning_is_one_line_on_standard_error_once_a_command(tmp_path: Path) -> None:
    """A log is searched by line, and nobody reads the third copy of a warning."""
    ended = subprocess.run([sys.executable, "-c", WARNED], capture_output=True, text=True, check=True)
    assert ended.stdout == ""
    first, second = ended.stderr.splitlines()
    assert first.startswith("warning: latencies of host are noisy; ")
    assert first.endswith("profile again profile again")
    assert second == "warning: another"


PRINTED = """
from mess_compile.cli.console import print_hint, print_table, say
say("one two three " * 12)
say("no   what: " + "why " * 30)
print_table("title", ["head", *"abcdef"], [["first", *["0123456789" * 2] * 6], ["second", *["1"] * 6]])
"""


def test_lines_break_between_words_and_tables_between_columns() -> None:
    lines = plain(on_a_terminal(PRINTED)).replace("\r", "").split("\n")
    assert max(map(len, lines)) <= 80
    assert " ".join(line.strip() for line in lines[:3]).split() == ["one", "two", "three"] * 12
    assert lines[3].startswith("no   what: why")
    assert lines[4].startswith("     why")
    assert [line.split() for line in lines if line.startswith("head")] == [["head", *"abc"], ["head", *"def"]]
    assert [len(line.split()) for line in lines if line.startswith("second")] == [4, 4]
    environment = {name: value for name, value in TOLD.items() if name != "COLUMNS"}
    piped, long = (
        subprocess.run(
            [sys.executable, "-c", PRINTED], capture_output=True, text=True, check=True, env=environment | columns
        ).stdout.splitlines()
        for columns in ({}, {"COLUMNS": "10000"})
    )
    assert 90 < max(map(len, piped)) <= 100
    assert [len(line.split()) for line in piped if line.startswith("second")] == [5, 3]
    assert [len(line.split()) for line in long if line.startswith("second")] == [7]
    assert len(long) == 6


SLOW = """
import time
from mess_compile.cli import progress as progress_lines
progress_lines.FIRST_S, progress_lines.EVERY_S = 0.2, 0.3
import click
from mess_compile.cli.console import Group, progress_bar, say
@click.group(cls=Group, stopped=lambda command, folder, begun: "nothing was begun")
def main():
    pass
@main.command()
@click.option("--json", "as_json", is_flag=True)
def measure(as_json):
    with progress_bar(as_json) as progress:
        time.sleep(0.35)
        for done in range(10):
            progress("visits", done, 2000)
            time.sleep(0.07)
        say("result")
main()
"""


def slow_work(variables: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """SLOW, under the environment of this process and these variables."""
    command = [sys.executable, "-c", SLOW, "measure", *options]
    environment = {**TOLD, **variables}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_log_hears_now_and_then_how_far_long_work_is(options: list[str]) -> None:
    ended = slow_work({}, *options)
    assert ended.stdout == ("" if options else "result\n"), "with --json, lines for people go to the other stream"
    first, *others = ended.stderr.splitlines()
    assert re.fullmatch(r"measure: \d s so far", first), "a step of which nothing is known yet is heard of, too"
    found = [re.fullmatch(r"measure: visits: (\d+) of 2000, ([\d.]+)/s, about \d+ min left", line) for line in others]
    assert any(found), ended.stderr
    assert all(1 < float(each[2]) < 15 for each in found if each), "a thing takes 0.07 s at least"


def test_of_processes_that_share_the_work_the_first_one_tells() -> None:
    ended = slow_work({"LOCAL_RANK": "1"})
    assert (ended.stdout, ended.stderr) == ("result\n", "")


def test_progress_can_be_turned_off() -> None:
    ended = slow_work({"MESS_COMPILE_PROGRESS": "off"})
    assert (ended.stdout, ended.stderr) == ("result\n", "")
