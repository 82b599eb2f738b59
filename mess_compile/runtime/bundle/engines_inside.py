"""Copies the engines that a bundle carries for this library and GPU into the user's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Tuple

from mess_compile.runtime.bundle.manifest import BundlePlan, EngineFile, Manifest
from mess_compile.runtime.engines import engine_cache
from mess_compile.runtime.engines.engine import Library


def brought(manifest: Manifest, library: Library) -> Tuple[EngineFile, ...]:
    """The bundle's files for exactly this library and GPU: engines, and a builder's timing cache."""
    gpu = library.builds_for
    return () if gpu is None else tuple(engine for engine in manifest.engines if _fits(engine, library, gpu))


def adopt(manifest: Manifest, plan: BundlePlan, library: Library, source: Path) -> None:
    """Put the engines that a bundle in `source` carries into the user's cache, unless it has its own.

    Call this only for a bundle whose signature was verified. Raises InputError.
    """
    engines, timing = [], None
    for engine in brought(manifest, library):
        if engine.graph is None:
            timing = source / engine.file
        elif engine.graph in plan.precisions and engine.precision == plan.precisions[engine.graph].used:
            engines.append((manifest.files[engine.graph].sha256, engine.precision, source / engine.file))
    if engines or timing is not None:
        engine_cache.adopt(library, engines, timing)


def _fits(engine: EngineFile, library: Library, gpu: Tuple[str, Tuple[int, int]]) -> bool:
    same_library = (engine.library, engine.library_version) == (library.name, library.version)
    return same_library and engine.device in ("", gpu[0]) and engine.capability == gpu[1]
