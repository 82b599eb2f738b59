"""Caches the engines that a device builds from ONNX files, in a folder of the user.

An engine is code: it is loaded from that folder only, and only if its hash is the one recorded when it was written.
Engines from a bundle get there only if the user named trusted signers and one of them signed the bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Optional, Sequence, Tuple

from mess_compile.runtime.base import user_dirs
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines import tensorrt_build
from mess_compile.runtime.engines.engine import Library
from mess_compile.runtime.engines.tensorrt_build import BuildOptions

_Gpu = Tuple[str, Tuple[int, int]]
_PROFILED = Path(".mess-compile", "engines")


def default_folder() -> Path:
    """The folder of engines by default; `XDG_CACHE_HOME` moves it. Raises InputError without a home."""
    cache = user_dirs.cache()
    if cache is None:
        raise InputError("no home folder is known for the cache of engines: set XDG_CACHE_HOME to a folder of your own")
    return cache / "mess-compile" / "engines"


def profiled_folder() -> Optional[Path]:
    """The folder of the engines that `profile` and `build` build on this machine; None if no home is known."""
    own = user_dirs.home()
    return None if own is None else own / _PROFILED


def loadable(library: Library, graph: Path, precision: str, folder: Optional[Path] = None) -> Path:
    """The file that `library` loads for an ONNX file: the file itself, or an engine built from it for the present
    device.

    The graph is in the form that the library's parser accepts, with its weights inside or named by their hashes. An
    engine is built once (minutes, on a Jetson) and cached in `folder`. Raises InputError when others can write there,
    EngineError with the builder's message; if nothing can be written, InputError for the default folder and OSError for
    another.
    """
    gpu = library.builds_for
    if gpu is None:
        return graph
    if folder is not None:
        return _loadable(library, gpu, graph, precision, folder)
    folder = default_folder()
    with _writable(folder):
        return _loadable(library, gpu, graph, precision, folder)


def _loadable(library: Library, gpu: _Gpu, graph: Path, precision: str, folder: Path) -> Path:
    _own(folder)
    path = _place(library, gpu, folder, _sha256(graph), precision)
    if not _is_intact(path):
        _build(graph, path, _options(library, gpu, precision), _timing(folder, library))
    return path


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"engines cannot be written to {folder} ({error.strerror or error}): free space there, or set "
            "XDG_CACHE_HOME to a writable folder"
        ) from error


def is_built(library: Library, sha256: str, precision: str, folder: Optional[Path] = None) -> bool:
    """Whether `loadable` has an engine for the graph with this hash, or needs none."""
    gpu = library.builds_for
    return gpu is None or _is_intact(_place(library, gpu, folder or default_folder(), sha256, precision))


def borrow(library: Library, sha256: str, precision: str) -> bool:
    """Take the engine that this user's `profile` or `build` built here for the graph, if there is one."""
    gpu, place = library.builds_for, profiled_folder()
    if gpu is None or place is None or not place.is_dir():
        return False
    _own(place)
    path = _place(library, gpu, place, sha256, precision)
    if not _is_intact(path):
        return False
    folder = default_folder()
    with _writable(folder):
        _own(folder)
        _store(folder / path.name, path.read_bytes())
    return True


def _options(library: Library, gpu: _Gpu, precision: str) -> BuildOptions:
    _, (major, minor) = gpu
    capability = f"SM{major}{minor}" if library.name == "tensorrt_rtx" else None
    return BuildOptions(library.name, precision, capability)


def _sha256(graph: Path) -> str:
    return hashlib.sha256(graph.read_bytes()).hexdigest()


def _place(library: Library, gpu: _Gpu, folder: Path, sha256: str, precision: str) -> Path:
    """The path in `folder` of the engine that `library` builds from a graph for this GPU."""
    name, (major, minor) = gpu
    decides = (sha256, repr(_options(library, gpu, precision)), library.version, name, major, minor)
    return folder / f"{hashlib.sha256(json.dumps(decides).encode()).hexdigest()}.engine"


def _timing(folder: Path, library: Library) -> Path:
    return folder / tensorrt_build.timing_cache_name(library.version)


def adopt(library: Library, engines: Sequence[Tuple[str, str, Path]], timing: Optional[Path]) -> None:
    """Cache engines built elsewhere for exactly this library and GPU, unless the cache has its own.

    `engines`: the SHA-256 of each graph, its precision and the engine's file; `timing`: a builder's timing cache.
    Engines are code: call this only for files whose signature was checked. Raises InputError.
    """
    gpu = library.builds_for
    assert gpu is not None, f"{library.name} builds no engines, so it cannot adopt any"
    folder = default_folder()
    with _writable(folder):
        _own(folder)
        if timing is not None and not _timing(folder, library).exists():
            _write(_timing(folder, library), timing.read_bytes())
        for sha256, precision, source in engines:
            path = _place(library, gpu, folder, sha256, precision)
            if not _is_intact(path):
                _store(path, source.read_bytes())


def _own(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InputError(
            f"others can write to {folder}, and engines are code: run `chmod go-w` on it, or set XDG_CACHE_HOME to a "
            "folder of your own"
        )


def _is_intact(path: Path) -> bool:
    try:
        known = path.with_suffix(".sha256").read_text(encoding="ascii")
        return hashlib.sha256(path.read_bytes()).hexdigest() == known
    except (OSError, ValueError):
        return False


def _build(graph: Path, path: Path, options: BuildOptions, timing: Path) -> None:
    """Classic TensorRT stores its timings for later builds; it rejects a cache from another device."""
    known = timing.read_bytes() if options.library == "tensorrt" and timing.is_file() else None
    built = tensorrt_build.build_engine(graph, options, known)
    _store(path, built.engine)
    if built.timing_cache is not None:
        _write(timing, built.timing_cache)


def _store(path: Path, engine: bytes) -> None:
    _write(path, engine)
    _write(path.with_suffix(".sha256"), hashlib.sha256(engine).hexdigest().encode("ascii"))


def _write(path: Path, content: bytes) -> None:
    """Write all of it or nothing, even when two processes build at the same time."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".making-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
