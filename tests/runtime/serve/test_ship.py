"""What `ship` does before it activates a version: build engines, also of fallback plans, and verify."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mess_compile import runtime
from mess_compile.runtime.base.errors import EngineError
from mess_compile.runtime.bundle import archive
from mess_compile.runtime.bundle.archive import Archive
from mess_compile.runtime.bundle.manifest import EngineFile, File, Manifest, manifest_to_json
from mess_compile.runtime.bundle.signature import Signers
from mess_compile.runtime.engines import engine_cache, tensorrt_build
from mess_compile.runtime.engines.engine_fake import FakeLibrary
from mess_compile.runtime.engines.tensorrt_build import BuildOptions, Built
from mess_compile.runtime.serve import ship
from mess_compile.runtime.serve.ship import ShipRequest
from mess_compile.runtime.serve.verify import verify
from mess_compile.runtime.serve.versions import History
from tests import small_network


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Archive]:
    """A plan in fp16 that falls back to one in fp32, of five graphs each."""
    graphs = small_network.graph_set(tmp_path / "graphs")
    parts = [small_network.part(graphs, small_network.plan(), recipe) for recipe in ("fp16", "fp32")]
    small_network.write_parts(tmp_path / "several.mess", parts)
    with closing(archive.open_archive(tmp_path / "several.mess")) as found:
        yield found


class Builder:
    """Records what it builds, and fails for one precision."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.failing: str | None = None

    def __call__(self, path: Path, options: BuildOptions, timing_cache: bytes | None = None) -> Built:
        self.asked.append(options.precision)
        if options.precision == self.failing:
            raise EngineError(f"{path.name} does not build: no kernel for it")
        return Built(b"an engine", 0.0, None)


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    found = Builder()
    monkeypatch.setattr(tensorrt_build, "build_engine", found)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return found


def quiet(kind: str, content: object) -> None:
    pass


def built(opened: Archive) -> tuple[int, tuple[str, ...]]:
    return ship._build_engines(opened, opened.manifest.plans[0], library(), History(), quiet)


def library() -> FakeLibrary:
    return FakeLibrary({}, name="tensorrt", builds_for=("GPU", (8, 7)))


def test_engines_of_fallback_plans_are_built_before_they_are_needed(opened: Archive, builder: Builder) -> None:
    assert built(opened) == (10, ())
    assert builder.asked == ["fp16"] * 5 + ["fp32"] * 5
    assert built(opened) == (0, ())
    assert len(builder.asked) == 10


def test_a_failed_fallback_engine_is_reported_and_one_of_the_plan_is_an_error(
    opened: Archive, builder: Builder
) -> None:
    builder.failing = "fp32"
    count, refusals = built(opened)
    assert count == 5
    assert len(refusals) == 5
    assert "no kernel for it" in refusals[0]
    builder.failing = "fp16"
    for path in engine_cache.default_folder().iterdir():
        path.unlink()
    with pytest.raises(EngineError, match="no kernel for it"):
        built(opened)


@pytest.mark.parametrize("known", [True, False])
def test_a_dry_run_does_not_count_engines_in_a_signed_bundle(
    opened: Archive, builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """`ship --dry-run` estimates the duration: minutes for each engine."""
    plan, *_ = opened.manifest.plans
    brought = EngineFile("engines/a.engine", plan.graphs()[0], "fp16", "tensorrt", "1", "GPU", (8, 7))
    files = {**opened.manifest.files, brought.file: File("0" * 64, 3)}
    manifest = replace(opened.manifest, engines=(brought,), files=files)
    monkeypatch.setattr(ship, "first_that_opens", lambda plans: (plan, library()))
    monkeypatch.setattr(ship, "installed_signers", lambda: Signers(tmp_path / "allowed") if known else None)
    monkeypatch.setattr(ship, "signer_of", lambda *told: "maker@example.com")
    said: dict[str, Any] = {}
    ship.look(ShipRequest(str(tmp_path), manifest_to_json(manifest), "signature"), said.__setitem__)
    every = [*plan.graphs(), *plan.graphs()]
    assert said["looked"]["refusal"] is None
    assert sorted(said["looked"]["build"]) == sorted(every[known:])


def test_engines_built_by_profile_are_reused(opened: Archive, builder: Builder) -> None:
    plan = opened.manifest.plans[0]
    for path in plan.graphs():
        engine_cache.loadable(library(), opened.folder / path, "fp16", engine_cache.profiled_folder())
    builder.asked.clear()
    assert built(opened) == (5, ())
    assert builder.asked == ["fp32"] * 5


def test_a_rollback_checks_golden_frames_but_not_speed_or_power_mode(tmp_path: Path) -> None:
    """A rollback has to work in any state of the device."""

    def of_another_mode(known: Manifest) -> Manifest:
        slower = [replace(cost, mean_ms=0.0, report_mean_ms=0.0) for cost in known.plans[0].costs]
        plan = replace(known.plans[0], power_mode="MODE_30W_ALL", upload_mean_ms=1e-9, costs=tuple(slower))
        return replace(known, plans=(plan,))

    small_network.write_bundle(tmp_path / "street.mess")
    bundle = small_network.changed_bundle(tmp_path / "street.mess", tmp_path / "other.mess", of_another_mode)
    with runtime.load(bundle) as cascade:
        assert {check.name for check in verify(cascade, 1.25) if not check.passed} == {"power mode", "latency"}
        checks = verify(cascade, math.inf)
    assert [check.name for check in checks] == ["golden/0.npy", "golden/1.npy", "latency"]
    assert all(check.passed for check in checks)


def test_old_programs_are_removed_but_for_the_running_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that shipping a changed threshold sends only some 30 KB; the program has 0.1 MB."""
    programs = tmp_path / ".ship" / "programs"
    programs.mkdir(parents=True)
    for name in ("own", "older"):
        (programs / name).write_bytes(b"a program")
    (programs / "request").write_text(ship.request_to_json(ship.ShipRequest(str(tmp_path))))
    monkeypatch.setattr(ship, "__file__", str(programs / "own" / "mess_compile" / "runtime" / "serve" / "ship.py"))
    assert ship.act_on("look", programs / "request") == 0
    assert len(list(programs.iterdir())) == 3, "they are of today"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * 86400)
    assert ship.act_on("look", programs / "request") == 0
    assert [path.name for path in programs.iterdir()] == ["own"]
