"""Forged bundles by the thousand: each is refused in one line or runs, and touches nothing but itself.

    PYTHONPATH=. python benchmarks/fuzz_bundle.py [--cases 20000] [--seed 0] [--only NUMBER]

Each case is a bundle changed blindly, or changed in a way that keeps hashes and seal right, so that what lies behind
them is reached; a fifth of them unpacked, some with links and pipes in it. It is loaded and segments a frame, half of
the cases in ONNX Runtime, half in a stand-in of a library that builds engines. A case fails by

- an exception other than the runtime's own, or a message of more than one line;
- the end of the process, more than 20 s, or more than 2 GiB of memory beside what it began with;
- a bundle that runs although a byte of the file was changed;
- a graph that came to an engine library although it holds what parsers read differently;
- a file opened, made, moved or removed, a program started or a connection made outside of the bundle and the scratch
  folder (as Python's audit hook tells; what ONNX Runtime itself opens, it does not see);
- an engine loaded that was not built here.

Exits 1 when any case failed. A case depends on seed and number alone: `--only` runs one again, in this process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mess_compile import runtime
from mess_compile.runtime.base.errors import EngineError, MessError
from mess_compile.runtime.engines import tensorrt_build
from mess_compile.runtime.engines.engine import Engine, open_library
from mess_compile.runtime.engines.tensorrt_build import BuildOptions, Built
from tests import mutations, small_network

LIMIT_S, KILL_S = 10.0, 20.0
MORE_BYTES = 2 << 30
BUILT_HERE = b"built here of "
BY_ENGINE = "refused by the engine"
WATCHED = ("open", "os.", "shutil.", "subprocess.", "socket.", "ctypes.dlopen", "tempfile.")
HARMLESS = (
    *("os.putenv", "os.unsetenv", "os.listdir", "os.scandir", "tempfile.mkdtemp", "tempfile.mkstemp", "shutil.rmtree"),
)
"""Those of `tempfile` and `shutil` call what is watched."""


@dataclass
class Watch:
    """What was touched outside of the places that a case may touch."""

    places: tuple[str, ...]
    reads: tuple[str, ...]
    active: bool = False
    faults: list[str] = field(default_factory=list)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active or not event.startswith(WATCHED) or event in HARMLESS:
            return
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if isinstance(path, int) or self._inside(path, self.places + (() if writes else self.reads)):
                return
        elif event.startswith("os.") and self._os_call_is_inside(arguments):
            return
        self.faults.append(f"{event} {arguments!r:.200}")

    def _os_call_is_inside(self, arguments: tuple[Any, ...]) -> bool:
        """Its paths are relative to the folder whose descriptor comes last, if there is one."""
        last = arguments[-1] if arguments else -1
        beside = isinstance(last, int) and last >= 0 and os.path.isdir(f"/proc/self/fd/{last}")
        base = os.readlink(f"/proc/self/fd/{last}") if beside else ""
        paths = [os.path.join(base, os.fsdecode(each)) for each in arguments if isinstance(each, str | bytes)]
        return all(self._inside(path, self.places) for path in paths)

    @staticmethod
    def _inside(path: Any, places: tuple[str, ...]) -> bool:
        resolved = os.path.realpath(os.fsdecode(path)) + "/"
        return any(resolved.startswith(place) for place in places)


class Builder:
    """A library that builds engines, and loads those alone that were built here; ONNX Runtime computes."""

    name, version, builds_for, concurrent = "tensorrt", "10.0", ("GPU", (8, 9)), True

    def __init__(self, watch: Watch) -> None:
        self._inner, self._watch = open_library("onnxruntime", threads=1), watch

    def load(self, path: Path) -> Engine:
        content = path.read_bytes()
        if not content.startswith(BUILT_HERE):
            self._watch.faults.append(f"an engine was loaded that was not built here: {content[:40]!r}")
            raise EngineError("foreign engine")
        return self._inner.load(Path(os.fsdecode(content[len(BUILT_HERE) :])))

    def upload(self, array: Any) -> Any:
        return self._inner.upload(array)

    def download(self, tensor: Any) -> Any:
        return self._inner.download(tensor)

    def synchronise(self) -> None:
        self._inner.synchronise()

    def close(self) -> None:
        self._inner.close()


def built(path: Path, options: BuildOptions, timing_cache: bytes | None = None) -> Built:
    return Built(BUILT_HERE + os.fsencode(path), 0.0, None)


def base_parts(folder: Path) -> mutations.Parts:
    """A sound bundle's content, without most of the runtime, which is read like any other file."""
    small_network.write_bundle(folder / "base.mess")
    with zipfile.ZipFile(folder / "base.mess") as content:
        parts = {name: content.read(name) for name in content.namelist() if not name.startswith("mess_compile/")}
    return mutations.listed(parts, json.loads(parts[mutations.MANIFEST]))


class Bench:
    """One process's scratch folder and watch; `run` runs a case."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.parts = base_parts(folder)
        self.sound = mutations.packed(mutations.plain(self.parts))
        self.outside = folder.parent / f"outside-{folder.name}" / "secret"
        self.outside.parent.mkdir()
        self.outside.write_bytes(b"not to be read")
        self.scratch = folder / "scratch"
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        tensorrt_build.build_engine = built
        libraries = tuple({sysconfig.get_path(name) + "/" for name in ("stdlib", "platstdlib", "purelib", "platlib")})
        here = str(Path(__file__).resolve().parent.parent) + "/"
        self.watch = Watch((str(folder.resolve()) + "/", "/dev/null/"), (*libraries, here, "/proc/", "/sys/"))
        sys.addaudithook(self.watch.hook)
        os.chdir(folder)
        self._case(self._written(random.Random(0), self.sound), False)
        assert not self.watch.faults, self.watch.faults

    def _written(self, random_: random.Random, packed: bytes) -> Path:
        shutil.rmtree(self.scratch, ignore_errors=True)
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        self.scratch.mkdir()
        path = self.scratch / "forged.mess"
        path.write_bytes(packed)
        unpacked = self.scratch / "forged"
        if random_.random() < 0.2 and mutations.as_folder(random_, packed, unpacked, self.outside):
            return unpacked
        return path

    def run(self, number: int) -> tuple[str, str]:
        """How the case was made and how it ended: "refused", `BY_ENGINE`, "ran", or the fault."""
        random_ = random.Random(f"{self.seed} {number}")
        way = random_.choice(mutations.WAYS)
        forged = way(random_, self.parts)
        path = self._written(random_, forged)
        builds = way is mutations.with_engines or random_.random() < 0.5
        self.watch.faults.clear()
        end = self._case(path, builds)
        if end == "ran" and way is mutations.any_bytes and path.is_file() and forged != self.sound:
            end = "ran although a byte of it was changed"
        if way is mutations.hidden_field and end in ("ran", BY_ENGINE):
            end = f"{end}: the engine library saw what was hidden from the check"
        return way.__name__, end

    def _case(self, path: Path, builds: bool) -> str:
        temporary = self.scratch / "temporary"
        temporary.mkdir()
        tempfile.tempdir = str(temporary)
        started = time.monotonic()
        self.watch.active = True
        try:
            ended = self._loaded(path, builds)
        except Exception:
            ended = "raised " + traceback.format_exc(limit=-3).replace("\n", " | ")
        finally:
            self.watch.active = False
        if time.monotonic() - started > LIMIT_S:
            ended = f"took {time.monotonic() - started:.0f} s"
        if list(temporary.iterdir()):
            ended = f"left {list(temporary.iterdir())[:3]} behind"
        return f"touched {self.watch.faults[:3]}" if self.watch.faults else ended

    def _loaded(self, path: Path, builds: bool) -> str:
        library = Builder(self.watch) if builds else open_library("onnxruntime", threads=1)
        try:
            target = "host" if builds else None
            with runtime.load(path, target, library) as cascade:
                for golden in cascade.manifest.golden[:1]:
                    cascade(cascade.archive.array(golden.frame))
                cascade(np.zeros((8, 12, 3), np.uint8))
            return "ran"
        except MessError as error:
            if "\n" in str(error) or not str(error).strip():
                return f"said {str(error)!r:.200}"
            return BY_ENGINE if isinstance(error, EngineError) else "refused"


def worker(folder: str, seed: int, tasks: Any, results: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", "Duplicate name")
    bench = Bench(Path(folder), seed)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES,) * 2)
    results.send(("ready", "", ""))
    while (number := tasks.recv()) is not None:
        results.send((number, *bench.run(number)))


@dataclass
class Tally:
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, number: int, way: str, end: str) -> None:
        good = end in ("refused", BY_ENGINE, "ran")
        self.ends[way, end if good else "FAILED"] += 1
        if not good:
            self.faults.append(f"case {number} ({way}) {end}")
            print(f"FAILED: {self.faults[-1]}", flush=True)


def drive(numbers: Any, lock: threading.Lock, seed: int, root: Path, name: str, tally: Tally) -> None:
    """Feed one process after the other; one that dies or hangs costs its case."""
    context = multiprocessing.get_context("spawn")
    generation = 0
    while True:
        generation += 1
        folder = root / f"{name}-{generation}"
        folder.mkdir()
        (task_out, tasks), (results, result_in) = context.Pipe(False), context.Pipe(False)
        process = context.Process(target=worker, args=(str(folder), seed, task_out, result_in), daemon=True)
        process.start()
        task_out.close()
        result_in.close()
        assert results.poll(120), "the process did not start"
        results.recv()
        while True:
            with lock:
                number = next(numbers, None)
            tasks.send(number)
            if number is None:
                process.join()
                return
            if not answered(results, process, number, tally):
                break


def answered(results: Any, process: Any, number: int, tally: Tally) -> bool:
    try:
        if results.poll(KILL_S):
            tally.add(*results.recv())
            return True
        tally.add(number, "?", f"did not end within {KILL_S:g} s")
    except (EOFError, ConnectionError):
        process.join()
        tally.add(number, "?", f"ended the process with {process.exitcode}")
    process.kill()
    process.join()
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", type=int, metavar="NUMBER")
    options = parser.parse_args()
    started, tally, lock = time.monotonic(), Tally(), threading.Lock()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        if options.only is not None:
            (Path(root) / "only").mkdir()
            print(*Bench(Path(root) / "only", options.seed).run(options.only))
            return 0
        numbers = iter(range(options.cases))
        drivers = [
            threading.Thread(target=drive, args=(numbers, lock, options.seed, Path(root), str(job), tally))
            for job in range(options.jobs)
        ]
        for driver in drivers:
            driver.start()
        for driver in drivers:
            driver.join()
    for (way, end), count in sorted(tally.ends.items()):
        print(f"{way:18} {end:21} {count}")
    done = sum(tally.ends.values())
    print(f"{done} of {options.cases} cases, {len(tally.faults)} failed, {time.monotonic() - started:.0f} s")
    return 0 if done == options.cases and not tally.faults else 1


if __name__ == "__main__":
    sys.exit(main())
