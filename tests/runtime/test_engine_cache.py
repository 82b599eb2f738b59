"""Where engines are kept: a folder that cannot be written is named with the remedy, and no half engine is left."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mess_compile.runtime import engine_cache, tensorrt_build
from mess_compile.runtime.engine_fake import FakeLibrary
from mess_compile.runtime.errors import InputError
from mess_compile.runtime.tensorrt_build import BuildOptions, Built


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that builds into 100 kB."""

    def build(path: Path, options: BuildOptions, timing_cache: bytes | None = None) -> Built:
        return Built(b"e" * 100_000, 0.0, None)

    monkeypatch.setattr(tensorrt_build, "build_engine", build)
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"a graph")
    return path


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def builder() -> FakeLibrary:
    return FakeLibrary({}, name="tensorrt", builds_for=("GPU", (8, 7)))


def test_a_cache_that_cannot_be_made_is_named_with_the_remedy(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in ("/proc/nowhere", str(tmp_path / "file")):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        with pytest.raises(InputError, match=rf"cannot be kept in {place}/mess-compile/engines .*: .*XDG_CACHE_HOME"):
            engine_cache.loadable(builder(), graph, "fp32")


def test_a_full_disk_leaves_no_half_engine(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "mess-compile" / "engines"
    with files_of_at_most(5_000), pytest.raises(InputError, match=r"\(File too large\): make room there"):
        engine_cache.loadable(builder(), graph, "fp32")
    assert list(folder.iterdir()) == []
    assert engine_cache.loadable(builder(), graph, "fp32").read_bytes() == b"e" * 100_000


def test_of_a_folder_that_was_named_the_error_comes_as_it_is(graph: Path, tmp_path: Path) -> None:
    """A session on a device tells a full disk from a graph that does not build."""
    with files_of_at_most(5_000), pytest.raises(OSError, match="File too large"):
        engine_cache.loadable(builder(), graph, "fp32", tmp_path / "engines")


def test_without_a_home_the_remedy_is_named(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(InputError, match="no home folder is known to keep engines in: set XDG_CACHE_HOME"):
        engine_cache.loadable(builder(), graph, "fp32")
