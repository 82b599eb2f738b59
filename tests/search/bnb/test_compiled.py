"""Kernels are compiled once for all processes, anew after any change to their sources, and also without a cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mess_compile.search.bnb.kernels import compiled

SCRIPT = """
import sys
from mess_compile.search.bnb.kernels.compiled import compiled_once, kernel

@kernel
def double(x):
    return x + x

assert compiled_once(double)(21) == 42
print(sum(double.stats.cache_misses.values()), sum(double.stats.cache_hits.values()))
"""


def start(script: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(script)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    )


def finished(process: subprocess.Popen[str]) -> list[int]:
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return [int(number) for number in printed.split()]


def test_of_two_processes_one_compiles_and_the_other_loads(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    counts = [finished(process) for process in [start(script, tmp_path / "cache") for _ in range(2)]]
    assert sorted(counts) == [[0, 1], [1, 0]], "cache misses and hits of each"


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compiled._CONFIG, "CACHE_DIR", str(tmp_path / "file"))
    assert compiled.cache_folder() is None
    monkeypatch.setattr(compiled, "FOLDER", None)
    double = compiled.kernel(lambda x: x + x)
    assert compiled.compiled_once(double)(21) == 42


def test_a_change_to_any_source_leads_to_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba itself would not notice a change to what a kernel calls in another file."""
    copies = [Path(shutil.copy(path, tmp_path)) for path in compiled.sources()]
    assert {"space.py", "sums.py", "pairs.py", "triples.py", "chains.py", "leaves.py"} <= {each.name for each in copies}
    before = compiled.sources_sha256()
    monkeypatch.setattr(compiled, "sources", lambda: tuple(copies))
    assert compiled.sources_sha256() == before, "the same content elsewhere"
    found = set()
    for copy in copies:
        copy.write_text(copy.read_text() + "\n# changed\n")
        found.add(compiled.sources_sha256())
    assert len(found | {before}) == len(copies) + 1


def test_the_cache_is_beside_the_kernels_unless_the_user_names_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled._CONFIG, "CACHE_DIR", str(tmp_path))
    assert compiled.cache_folder() == tmp_path / f"numba-{compiled.sources_sha256()[:16]}"
    monkeypatch.setattr(compiled._CONFIG, "CACHE_DIR", "")
    monkeypatch.setattr(compiled, "_is_writable", lambda folder: "__pycache__" not in folder.parts)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compiled.cache_folder()
    assert folder is not None
    assert folder.parent == tmp_path / "mess-compile" / "kernels"


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What other sources left beside kernels whose own folder does not exist yet."""
    monkeypatch.setattr(compiled, "sources", lambda: ())
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    monkeypatch.setattr(compiled._CONFIG, "CACHE_DIR", "")
    folder = tmp_path / "__pycache__" / "numba-0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "kernel.nbc").write_bytes(b"compiled")
    return folder


def test_a_new_folder_takes_the_place_of_those_of_other_sources(older: Path) -> None:
    """Every change would leave megabytes behind for good."""
    folder = compiled.cache_folder()
    assert folder is not None
    assert list(older.parent.iterdir()) == [folder]


def test_a_folder_that_is_there_already_removes_no_other(older: Path) -> None:
    older.rename(older.parent / "put aside")
    compiled.cache_folder()
    (older.parent / "put aside").rename(older)
    compiled.cache_folder()
    assert older.exists()


def test_other_installations_share_a_folder_that_the_user_names(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = older.parent.rename(older.parent.with_name("named"))
    monkeypatch.setattr(compiled._CONFIG, "CACHE_DIR", str(named))
    older, unused = named / older.name, named / "numba-unused"
    unused.mkdir()
    os.utime(unused, (0, 0))
    compiled.cache_folder()
    assert (older.exists(), unused.exists()) == (True, False)
