"""Whatever interrupts a write, the user keeps the artefact that was there before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mess_compile import files
from mess_compile.evaluate.statistics import read_statistics, write_statistics
from mess_compile.network import read_graph_set, verify_graph_set, write_graph_set
from mess_compile.runtime.base.errors import InputError
from tests import small_network
from tests.search import cases
from tests.search.cases import candidate_network, exit_statistics


class Stopped(BaseException):
    pass


def stop_after(write: Callable[[str], object], text: str) -> None:
    write(text)
    raise Stopped


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(Stopped), files.replaced(path) as temporary:
        stop_after(temporary.write_text, "half of the n")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("plan.json", "old")]


def test_an_interrupted_write_leaves_the_old_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    with pytest.raises(Stopped), files.replaced_folder(tmp_path / "graphs") as temporary:
        stop_after((temporary / "new").write_text, "half")
    assert [p.name for p in tmp_path.rglob("*")] == ["graphs"]


@pytest.mark.parametrize("failing", [1, 2])
def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "old").touch()
    calls = []
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == failing:
            raise OSError("the disk went away")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="went away"), files.replaced_folder(tmp_path / "graphs") as temporary:
        (temporary / "new").touch()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["graphs", "old"]


KILLED = """
import os, signal, sys
from pathlib import Path
from mess_compile import files

rename, calls = os.replace, []

def replace(source, target):
    calls.append(target)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.replace = replace
path = Path(sys.argv[1])
with (files.replaced_folder if path.is_dir() else files.replaced)(path) as temporary:
    (temporary / "new" if temporary.is_dir() else temporary).write_text("new")
"""


def kill_at_rename(path: Path, number: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), str(number)], check=False)
    assert done.returncode == -signal.SIGKILL


def folder_of_a_killed_run(tmp_path: Path, number: int) -> Path:
    graphs = tmp_path / "graphs"
    graphs.mkdir()
    (graphs / "old").touch()
    kill_at_rename(graphs, number)
    assert len(list(tmp_path.iterdir())) == 2
    return graphs


def test_a_reader_gets_back_the_folder_that_a_killed_run_had_set_aside(tmp_path: Path) -> None:
    graphs = folder_of_a_killed_run(tmp_path, 2)
    assert not graphs.exists()
    files.recovered(graphs)
    assert [p.name for p in graphs.iterdir()] == ["old"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_next_write_of_a_folder_clears_away_what_a_killed_run_left(tmp_path: Path, number: int) -> None:
    graphs = folder_of_a_killed_run(tmp_path, number)
    with pytest.raises(Stopped), files.replaced_folder(graphs) as temporary:
        stop_after((temporary / "newer").write_text, "half")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["graphs", "new" if number == 3 else "old"]


def test_the_next_write_of_a_file_clears_away_what_a_killed_run_left_and_nothing_else(tmp_path: Path) -> None:
    plan, others = tmp_path / "plan", {"plan", ".plan.json", ".plan.json.abcd1234", ".plan", "plan.abcd1234"}
    for name in others:
        (tmp_path / name).touch()
    kill_at_rename(plan, 1)
    assert len(list(tmp_path.iterdir())) == len(others) + 1
    with files.replaced(plan) as temporary:
        temporary.write_text("newer")
    assert {p.name for p in tmp_path.iterdir()} == others
    assert plan.read_text() == "newer"


def test_a_write_leaves_the_temporaries_of_a_living_run_alone(tmp_path: Path) -> None:
    with files.replaced(tmp_path / "plan") as first, files.replaced_folder(tmp_path / "graphs") as second:
        with files.replaced(tmp_path / "plan"), files.replaced_folder(tmp_path / "graphs"):
            assert first.exists()
            assert second.exists()
        (second / "last").touch()
    assert [p.name for p in (tmp_path / "graphs").iterdir()] == ["last"]


def test_statistics_and_graphs_are_read_where_a_killed_run_had_set_them_aside(tmp_path: Path) -> None:
    graphs = small_network.graph_set(tmp_path / "graphs")
    write_graph_set(graphs)
    kill_at_rename(graphs.root, 2)
    assert read_graph_set(graphs.root).graphs == graphs.graphs
    written = exit_statistics(cases.graph_set(candidate_network((1,)), rows=2), 3)
    write_statistics(tmp_path / "val", written)
    kill_at_rename(tmp_path / "val", 2)
    assert read_statistics(tmp_path / "val").image_id == written.image_id


@pytest.mark.parametrize("name", ["segment-1-2.onnx", "weights"])
def test_a_graph_or_weight_changed_after_export_is_named(tmp_path: Path, name: str) -> None:
    graphs = small_network.graph_set(tmp_path / "graphs")
    verify_graph_set(graphs)
    path = graphs.root / name
    path = next(path.iterdir()) if path.is_dir() else path
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=rf"{path.name} was changed after export: run `mess-compile export`"):
        verify_graph_set(graphs)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a = ", "it is not TOML"),
        (b"\xff\xfe", "it is not TOML"),
        (b"a = " + b"[" * 20000, "it is not TOML"),
        (b"#" * (files.MAX_TOML_BYTES + 1), "it has more than 262144 bytes"),
    ],
)
def test_toml_that_a_person_got_wrong_is_told_in_words(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{words}"):
        files.read_toml(tmp_path / "mine.toml")


@pytest.mark.parametrize("kind", ["absent", "folder", "pipe", "endless"])
def test_toml_that_never_ends_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mine.toml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"^it is not a file$"):
        files.read_toml(path)


def test_toml_of_the_largest_size_is_read(tmp_path: Path) -> None:
    text = 'name = "naïve"\n'
    (tmp_path / "mine.toml").write_text(text + "#" * (files.MAX_TOML_BYTES - len(text.encode())), encoding="utf-8")
    assert files.read_toml(tmp_path / "mine.toml") == {"name": "naïve"}


def test_a_temporary_has_the_ending_that_a_library_goes_by_and_is_cleared_away_like_others(tmp_path: Path) -> None:
    path = tmp_path / "street.mp4"
    with files.replaced(path, ".mp4") as temporary:
        assert temporary.suffix == ".mp4"
        temporary.write_bytes(b"new")
        with files.replaced(path, ".mp4") as other:
            other.write_bytes(b"of another run")
        assert temporary.exists(), "a run that lives holds its temporary"
    assert path.read_bytes() == b"new"
    left = tmp_path / ".street.mp4.abcd1234.mp4"
    left.write_bytes(b"of a killed run")
    with files.replaced(path, ".mp4") as temporary:
        temporary.write_bytes(b"newer")
    assert [each.name for each in tmp_path.iterdir()] == ["street.mp4"]


def test_a_decimal_comma_in_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "xavier.toml"
    path.write_text("name = 'xavier'\npeak = 1,4  # TFLOP/s\n")
    with pytest.raises(ValueError, match=r"numbers have a decimal point: 1\.4, not 1,4"):
        files.read_toml(path)


def test_toml_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "xavier.toml"
    path.write_bytes(b"\xef\xbb\xbfname = 'xavier'\r\n")
    assert files.read_toml(path) == {"name": "xavier"}


def test_a_folder_that_is_used_alone_keeps_others_out_and_is_not_left_behind_empty(tmp_path: Path) -> None:
    place = tmp_path / "new" / "candidate"
    with files.used_alone(place, "wait"):
        with pytest.raises(InputError, match="candidate is in use: wait"), files.used_alone(place, "wait"):
            pass
        assert place.is_dir()
    assert not place.exists()
    with files.used_alone(place, "wait"):
        (place / "kept").touch()
    assert (place / "kept").exists()
