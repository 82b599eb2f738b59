"""Where engines are kept: a folder that cannot be written is named with the remedy, and no half engine is left."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.bundle import engines_inside, manifest
from mess_compile.runtime.engines import engine_cache, tensorrt_build
from mess_compile.runtime.engines.engine_fake import FakeLibrary
from mess_compile.runtime.engines.tensorrt_build import BuildOptions, Built
from tests import small_network
from tests.runtime.homeless import homeless


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
        with pytest.raises(
            InputError, match=rf"cannot be written to {place}/mess-compile/engines .*: .*XDG_CACHE_HOME"
        ):
            engine_cache.loadable(builder(), graph, "fp32")


def test_a_full_disk_leaves_no_half_engine(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "mess-compile" / "engines"
    with files_of_at_most(5_000), pytest.raises(InputError, match=r"\(File too large\): free space there"):
        engine_cache.loadable(builder(), graph, "fp32")
    assert list(folder.iterdir()) == []
    assert engine_cache.loadable(builder(), graph, "fp32").read_bytes() == b"e" * 100_000


def test_of_a_folder_that_was_named_the_error_comes_as_it_is(graph: Path, tmp_path: Path) -> None:
    """A session on a device tells a full disk from a graph that does not build."""
    with files_of_at_most(5_000), pytest.raises(OSError, match="File too large"):
        engine_cache.loadable(builder(), graph, "fp32", tmp_path / "engines")


def test_without_a_home_the_remedy_is_named(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homeless(monkeypatch)
    with pytest.raises(InputError, match="no home folder is known for the cache of engines: set XDG_CACHE_HOME"):
        engine_cache.loadable(builder(), graph, "fp32")


def test_without_a_home_nothing_is_borrowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service of nobody's keeps its engines where it was told to, and has no others."""
    homeless(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not engine_cache.borrow(builder(), "0" * 64, "fp32")


class TestEnginesOfABundle:
    """A signed bundle brings an engine and a timing cache for this very GPU."""

    @pytest.fixture
    def brought(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> manifest.Manifest:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        known = small_network.write_bundle(tmp_path / "street.mess")
        graph = known.plans[0].stages[0].segment
        engine = manifest.EngineFile("engines/a.engine", graph, "fp32", "tensorrt", "1", "GPU", (8, 7))
        timing = replace(engine, file="engines/timing.cache", graph=None, precision="")
        for each in (engine, timing):
            path = tmp_path / "bundle" / each.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(each.file.encode())
        return replace(known, engines=(engine, timing))

    def kept(self) -> dict[str, bytes]:
        """By how their names end."""
        return {path.suffix: path.read_bytes() for path in engine_cache.default_folder().iterdir()}

    def test_becomes_the_users_own(self, brought: manifest.Manifest, tmp_path: Path) -> None:
        plan = brought.plans[0]
        engines_inside.adopt(brought, plan, builder(), tmp_path / "bundle")
        assert self.kept()[".engine"] == b"engines/a.engine"
        assert self.kept()[".cache"] == b"engines/timing.cache"
        sha256 = brought.files[plan.stages[0].segment].sha256
        assert engine_cache.is_built(builder(), sha256, "fp32")
        assert not engine_cache.is_built(builder(), sha256, "fp16")

    def test_is_not_read_where_there_is_one(self, brought: manifest.Manifest, tmp_path: Path) -> None:
        engines_inside.adopt(brought, brought.plans[0], builder(), tmp_path / "bundle")
        before = self.kept()
        shutil.rmtree(tmp_path / "bundle")
        engines_inside.adopt(brought, brought.plans[0], builder(), tmp_path / "bundle")
        assert self.kept() == before

    @pytest.mark.parametrize(
        "library",
        [FakeLibrary({}), FakeLibrary({}, name="tensorrt", builds_for=("GPU", (8, 6)))],
        ids=["none", "other"],
    )
    def test_is_left_where_it_does_not_fit(
        self, brought: manifest.Manifest, tmp_path: Path, library: FakeLibrary
    ) -> None:
        engines_inside.adopt(brought, brought.plans[0], library, tmp_path / "bundle")
        assert not engine_cache.default_folder().exists()
