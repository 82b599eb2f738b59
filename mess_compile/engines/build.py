"""Builds the engines of every graph for one target: cached on disk, in parallel processes, resumable."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mess_compile import files
from mess_compile.engines import process_pool
from mess_compile.engines.files import EngineFiles
from mess_compile.graph import lint, rewrite, store
from mess_compile.network import GraphSet
from mess_compile.reporter import Progress
from mess_compile.runtime.base.errors import InputError, MessError, one_line
from mess_compile.runtime.engines import tensorrt_build, tensorrt_module
from mess_compile.runtime.engines.engine import Library, TensorSpec, open_library
from mess_compile.runtime.engines.tensorrt_build import BuildOptions
from mess_compile.targets import Target

PREPARATION = 1
"""Increased when lint or rewrites change what is built from the same graph: older engines are then rebuilt."""
TOLERANCE = 1e-4
"""Largest difference of a rewritten graph's outputs, relative to their largest magnitude (at least 1)."""
_FORMAT, _VERSION, _INDEX = "mess-engines", 1, "index.json"
_TEMPORARY_PREFIX = ".making-"


@dataclass(frozen=True)
class EngineEntry:
    """One engine in `engines/DEVICE/RECIPE/` or in a device's own store, or the reason why there is none.

    `key` is a hash over everything that determines the engine; `sha256` is that of the file `KEY.engine`, and
    `rewrites` names the passes that changed the graph for the target. Both are empty for an engine on a remote device.
    `error` is the message of lint, parser or builder.
    """

    graph: str
    precision: str
    key: str
    sha256: str
    bytes: int
    seconds: float
    rewrites: tuple[str, ...]
    error: str | None


@dataclass(frozen=True)
class EngineSet:
    """The engines of one target; `built` counts those that this call built, the others were reused."""

    device: str
    recipe: str
    library: str
    library_version: str
    built: int
    entries: tuple[EngineEntry, ...]

    @property
    def failed(self) -> tuple[EngineEntry, ...]:
        return tuple(entry for entry in self.entries if entry.error is not None)


@dataclass(frozen=True)
class _Job:
    """Everything that a process needs to build one engine."""

    graph: str
    source: Path
    key: str
    options: BuildOptions
    parser: lint.Parser
    folder: Path


def build_engines(
    graph_set: GraphSet,
    target: Target,
    folder: Path,
    jobs: int,
    progress: Progress,
    wanted: Collection[str] | None = None,
) -> EngineSet:
    """Build the missing engines of `folder` (engines/DEVICE/RECIPE), in up to `jobs` processes, one graph in each.

    Only the graphs in `wanted` (None: all) are built; existing engines of the others stay. A graph that fails becomes
    an entry with its error, and the others go on. The index is written after every graph, so a killed call resumes.
    Raises InputError when the target's library builds no engines, EngineError when the library is not installed.
    """
    version = library_version(target)
    with _alone_in(folder):
        return _engines(
            graph_set, target, version, folder, jobs, progress, graph_set.graphs if wanted is None else wanted
        )


def refuse_without_engines(target: Target) -> None:
    """Raises InputError when the target's library builds no engines."""
    if target.library.startswith("onnxruntime"):
        raise InputError(f"{target.name} needs no engines: ONNX Runtime compiles each graph when it loads it")


def library_version(target: Target) -> str:
    """The version of the target's builder. Raises InputError when it builds no engines, EngineError when missing."""
    refuse_without_engines(target)
    return str(tensorrt_module.import_module(target.library).__version__)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Raises InputError when another process builds in `folder`: each would delete the other's temporary files."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process builds in {folder}: wait for it, or stop it") from error
        yield
    finally:
        os.close(descriptor)


def _engines(
    graph_set: GraphSet,
    target: Target,
    version: str,
    folder: Path,
    jobs: int,
    progress: Progress,
    wanted: Collection[str],
) -> EngineSet:
    every = [_job(graph_set, name, target, version, folder) for name in graph_set.graphs]
    index = entries_in(folder)
    known = _intact(folder, index)
    found = {job.graph: known[job.key] for job in every if job.key in known}
    missing = [job for job in every if job.graph in wanted and job.graph not in found]
    reused = len(found)
    total = reused + len(missing)
    progress("build", reused, total)

    def engines() -> EngineSet:
        entries = tuple(found[name] for name in graph_set.graphs if name in found)
        built = sum(entry.error is None for entry in entries) - reused
        return EngineSet(target.name, graph_set.recipe, target.library, version, built, entries)

    processes = jobs if target.library == "tensorrt_rtx" else 1
    for entry in process_pool.results(_build, missing, processes, _crashed):
        found[entry.graph] = entry
        _write_index(folder, engines())
        progress("build", len(found), total)
    if engines().entries != index:
        _write_index(folder, engines())
        _remove_others(folder, {entry.key for entry in found.values()})
    return engines()


def built_files(graph_set: GraphSet, engines: EngineSet, folder: Path) -> EngineFiles:
    """The engines in `folder` as the files that a library loads."""
    paths = {entry.graph: folder / f"{entry.key}.engine" for entry in engines.entries if entry.error is None}
    return EngineFiles(graph_set, paths, {entry.graph: str(entry.error) for entry in engines.failed})


def target_forms(graph_set: GraphSet, target: Target, folder: Path, progress: Progress) -> EngineFiles:
    """Every graph in the form that the target's parser accepts, for a remote build: itself, or rewritten in `folder`.

    Earlier rewritten graphs are reused. Graphs that the parser refuses are failed.
    """
    parser = parser_of(target)
    folder.mkdir(parents=True, exist_ok=True)
    paths, failed = {}, {}
    for name, spec in graph_set.graphs.items():
        decides = (PREPARATION, spec.sha256, spec.precision, asdict(parser))
        form = folder / f"{hashlib.sha256(json.dumps(decides).encode()).hexdigest()}.onnx"
        own = form.with_suffix(".own")
        try:
            if not form.exists() and not own.exists():
                _write_form(graph_set.path(name), spec.precision, parser, form, own)
            paths[name] = form if form.exists() else graph_set.path(name)
        except InputError as error:
            failed[name] = str(error)
        progress("prepare", len(paths) + len(failed), len(graph_set.graphs))
    return EngineFiles(graph_set, paths, failed)


def _write_form(source: Path, precision: str, parser: lint.Parser, form: Path, own: Path) -> None:
    """Write the rewritten graph to `form`; if it needs no rewriting, write the empty file `own` instead."""
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX, dir=form.parent) as temporary:
        rewritten = Path(temporary) / source.name
        if prepare_graph(source, precision, parser, rewritten):
            rewritten.replace(form)
        else:
            own.touch()


def parser_of(target: Target, version: str | None = None) -> lint.Parser:
    """The parser of the target's library, in its oldest accepted version when `version` is unknown."""
    oldest = version or (target.library_versions or ("",))[0]
    return lint.Parser(target.library, oldest, target.opset, target.compute_capability)


def _job(graph_set: GraphSet, name: str, target: Target, version: str, folder: Path) -> _Job:
    capability = target.compute_capability
    named = None if capability is None else f"SM{capability[0]}{capability[1]}"
    options = BuildOptions(target.library, graph_set.spec(name).precision, named)
    decides = (
        PREPARATION,
        graph_set.spec(name).sha256,
        asdict(options),
        version,
        target.name,
        target.gpu,
        target.opset,
    )
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    return _Job(name, graph_set.path(name), key, options, parser_of(target, version), folder)


def _failed(job: _Job, error: str) -> EngineEntry:
    return EngineEntry(job.graph, job.options.precision, job.key, "", 0, 0.0, (), error)


def _crashed(job: _Job) -> EngineEntry:
    return _failed(job, "the builder crashed, or was killed because it ran out of memory")


def _build(job: _Job) -> EngineEntry:
    """Lint, rewrite, check, build and write one graph, in a process of its own."""
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX, dir=job.folder) as scratch:
            path = Path(scratch) / f"{job.graph}.onnx"
            rewrites = prepare_graph(job.source, job.options.precision, job.parser, path)
            engine = _engine(path, job)
        with files.replaced(job.folder / f"{job.key}.engine") as temporary:
            temporary.write_bytes(engine)
    except MessError as error:
        return _failed(job, str(error))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # raised by a library for a graph that our export did not write
        return _failed(job, one_line(f"{type(error).__name__}: {error}"))
    sha256 = hashlib.sha256(engine).hexdigest()
    seconds = round(time.monotonic() - started, 3)
    return EngineEntry(job.graph, job.options.precision, job.key, sha256, len(engine), seconds, rewrites, None)


def _engine(path: Path, job: _Job) -> bytes:
    """Build with the device's timing cache, which classic TensorRT shares between graphs, and update the cache."""
    cache = job.folder.parent / tensorrt_build.timing_cache_name(job.parser.version)
    known = cache.read_bytes() if job.options.library == "tensorrt" and cache.is_file() else None
    built = tensorrt_build.build_engine(path, job.options, known)
    if built.timing_cache is not None:
        with files.replaced(cache) as temporary:
            temporary.write_bytes(built.timing_cache)
    return built.engine


def prepare_graph(source: Path, precision: str, parser: lint.Parser, path: Path) -> tuple[str, ...]:
    """Write a graph to `path` in a form that the parser accepts, weights included; return the passes that changed it.

    Raises InputError when the parser refuses it, or when the rewritten graph gives other outputs.
    """
    model = store.read_whole_model(source)
    changed, rewrites = rewrite.rewritten(model, parser, precision)
    complaints = lint.lint(changed, source.stem, parser)
    if complaints:
        raise InputError("; ".join(str(complaint) for complaint in complaints[:3]))
    onnx.save(changed, str(path))
    if rewrites:
        _check_equal(source, path)
    return rewrites


def _check_equal(before: Path, after: Path) -> None:
    """Raises InputError when a rewritten graph gives other outputs on random inputs."""
    with closing(open_library("onnxruntime", 1)) as library:
        expected, found = (_computed(library, path) for path in (before, after))
    for name, values in expected.items():
        difference = float(np.abs(values - found[name]).max()) / max(1.0, float(np.abs(values).max()))
        if not difference <= TOLERANCE:  # NaN fails, too
            raise InputError(
                f"the rewritten {before.stem} gives other outputs: {name} differs by {difference:.2g}, at most "
                f"{TOLERANCE:g} is allowed"
            )


def _computed(library: Library, path: Path) -> dict[str, NDArray[np.float64]]:
    """The outputs of a graph for random inputs, the same in every call."""
    rng = np.random.default_rng(0)
    with closing(library.load(path)) as engine:
        feeds = {name: library.upload(_drawn(rng, spec)) for name, spec in engine.inputs.items()}
        return {name: library.download(tensor).astype(np.float64) for name, tensor in engine.run(feeds).items()}


def _drawn(rng: np.random.Generator, spec: TensorSpec) -> NDArray[Any]:
    if spec.dtype == "uint8":
        return rng.integers(0, 256, spec.shape, dtype=np.uint8)
    if spec.dtype != "float32":
        return rng.integers(0, 2, spec.shape).astype(spec.dtype)
    return rng.random(spec.shape, dtype=np.float32)


def _intact(folder: Path, entries: Sequence[EngineEntry]) -> dict[str, EngineEntry]:
    """Key -> entry, for entries whose engine file is complete; failed graphs are left out, to be retried."""
    built = [entry for entry in entries if entry.error is None]
    with ThreadPoolExecutor() as pool:
        good = pool.map(lambda entry: _is_intact(folder / f"{entry.key}.engine", entry), built)
        return {entry.key: entry for entry, intact in zip(built, good, strict=True) if intact}


def _is_intact(path: Path, entry: EngineEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes and files.sha256_of_file(path) == entry.sha256


def _remove_others(folder: Path, keys: set[str]) -> None:
    """Remove engines that no graph uses any more, and temporary folders of killed processes."""
    for leftover in folder.glob(f"{_TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in folder.glob("*.engine"):
        if path.stem not in keys:
            path.unlink(missing_ok=True)


def reusable_engines(graph_set: GraphSet, target: Target, folder: Path) -> tuple[EngineEntry, ...]:
    """The engines that `build_engines` would reuse; writes nothing, and raises as it does."""
    version = library_version(target)
    keys = {_job(graph_set, name, target, version, folder).key for name in graph_set.graphs}
    return tuple(entry for key, entry in _intact(folder, entries_in(folder)).items() if key in keys)


@dataclass(frozen=True)
class _IndexDocument:
    """The content of `index.json`."""

    device: str
    recipe: str
    library: str
    library_version: str
    entries: tuple[EngineEntry, ...]


def _write_index(folder: Path, engines: EngineSet) -> None:
    index = _IndexDocument(engines.device, engines.recipe, engines.library, engines.library_version, engines.entries)
    files.write_json(folder / _INDEX, _FORMAT, _VERSION, {**asdict(index), "entries": list(map(asdict, index.entries))})


def entries_in(folder: Path) -> tuple[EngineEntry, ...]:
    """The engines built by earlier calls; none when the index is missing or damaged, since they can be rebuilt."""
    path = folder / _INDEX
    try:
        content = files.read_json(path, _FORMAT, _VERSION, "")
        index: _IndexDocument = files.decode_document(path, _IndexDocument, content, "")
    except InputError:
        return ()
    sound = all(re.fullmatch(r"[0-9a-f]{64}", entry.key) for entry in index.entries)  # keys become file names
    return index.entries if sound else ()
