"""Holds open engines by job, and the tensors that feed them; the least recently used engine is closed for the next."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Set, Tuple

import numpy as np

from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import Engine, Library, Tensor, TensorSpec

UPLOAD, DOWNLOAD, NULL = "upload", "download", "null"
PSEUDO_GRAPHS = (UPLOAD, DOWNLOAD, NULL)
FEWEST_OPEN = 3
"""A job's own engine, its predecessor's, and one that runs before and after."""
_SCARCE_SHARE = 1 / 8


@dataclass(frozen=True)
class Job:
    """One thing to time: the graph at `path`, or a pseudo graph if there is no path.

    `upload` moves a frame to the device, `download` the labels back; `null` is the cost of a decision: reading the
    counts and comparing one. `predecessor` names the job that runs just before; it must produce this job's inputs,
    directly or through its own predecessors.
    """

    name: str
    path: Optional[Path]
    predecessor: Optional[str] = None


@dataclass(frozen=True)
class Opened:
    """A graph that was opened for the first time. `file_bytes` excludes weights in other files."""

    job: str
    load_ms: float
    file_bytes: int
    scratch_bytes: Optional[int]


class Pool:
    """Open engines, and the tensors that feed them by name and shape."""

    def __init__(self, library: Library, jobs: Mapping[str, Job], most_open: int, clock_ns: Callable[[], int]) -> None:
        self._library, self._jobs, self._clock_ns = library, jobs, clock_ns
        self._most_open = max(most_open, FEWEST_OPEN)
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        self._opened: Dict[str, Opened] = {}
        self._reported: Set[str] = set()
        self._tensors: Dict[Tuple[str, Tuple[int, ...]], Tensor] = {}
        self._primed: Set[str] = set()

    def offer(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add copies of the arrays to the pool's tensors: an engine's outputs last only until its next run."""
        for name, array in arrays.items():
            self._tensors.setdefault((name, array.shape), self._library.upload(array))

    def newly_opened(self) -> List[Opened]:
        """The graphs opened for the first time since the last call."""
        found = [opened for name, opened in self._opened.items() if name not in self._reported]
        self._reported.update(self._opened)
        return found

    def unrelated_job(self, job: Job) -> Optional[str]:
        """The first job with a graph that is neither this one nor its predecessor; None if no more engine fits."""
        if self._most_open <= FEWEST_OPEN or _memory_is_scarce():
            return None
        names = (each.name for each in self._jobs.values() if each.path is not None)
        return next((name for name in names if name not in (job.name, job.predecessor)), None)

    def make_room(self) -> bool:
        """Close all engines and allow fewer open ones from now on; whether any was open."""
        some = bool(self._engines)
        self._most_open = max(len(self._engines) // 2, FEWEST_OPEN)
        self.close()
        return some

    def prime(self, name: str) -> None:
        """Run a job once, after the jobs that feed it; its outputs go into the pool.

        Predecessors may form a circle, as frames do in a cascade: only a job that lacks an input runs its predecessor.
        """
        job = self.job(name)
        if name in self._primed or job.path is None:
            return
        self._primed.add(name)
        self._prime_producers(job)
        engine = self.engine(name)  # opening the others may have closed it, for lack of memory
        outputs = engine.run(self.feeds(name, engine))
        self.offer({key: self._library.download(tensor) for key, tensor in outputs.items()})

    def _prime_producers(self, job: Job) -> None:
        """Prime the predecessor, its predecessor and so on, until all inputs are there: a segment may read tensors
        that one several jobs before it has given.
        """
        passed: Set[str] = set()
        before = job.predecessor
        while before is not None and before not in passed and self._missing(self.engine(job.name)):
            passed.add(before)
            self.prime(before)
            before = self.job(before).predecessor

    def _missing(self, engine: Engine) -> List[TensorSpec]:
        return [spec for spec in engine.inputs.values() if (spec.name, spec.shape) not in self._tensors]

    def feeds(self, name: str, engine: Engine) -> Dict[str, Tensor]:
        missing = self._missing(engine)
        if missing:
            raise InputError(
                f"job {name}: nothing produces {missing[0].name} {missing[0].shape}; give it a predecessor that does"
            )
        return {spec.name: self._tensors[spec.name, spec.shape] for spec in engine.inputs.values()}

    def engine(self, name: str) -> Engine:
        if name not in self._engines:
            path = self.job(name).path
            if path is None:
                raise InputError(f"job {name} is not a graph, so it cannot be a predecessor")
            self._close_oldest()
            self._open(name, path)
        self._engines.move_to_end(name)
        return self._engines[name]

    def _close_oldest(self) -> None:
        """Close the least recently used engine if too many are open, or memory is scarce; at most one per call."""
        crowded = len(self._engines) >= self._most_open
        if crowded or (len(self._engines) >= FEWEST_OPEN and _memory_is_scarce()):
            _, engine = self._engines.popitem(last=False)
            engine.close()

    def _open(self, name: str, path: Path) -> None:
        start = self._clock_ns()
        engine = self._engines[name] = self._library.load(path)
        load_ms = (self._clock_ns() - start) / 1e6
        self._opened.setdefault(name, Opened(name, load_ms, path.stat().st_size, engine.scratch_bytes))

    def job(self, name: str) -> Job:
        job = self._jobs.get(name)
        if job is None or (job.path is None and name not in PSEUDO_GRAPHS):
            raise InputError(f"there is no job {name!r} with a graph")
        return job

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self._primed.clear()


def _memory_is_scarce(meminfo: Path = Path("/proc/meminfo")) -> bool:
    """Whether less than an eighth of the machine's memory is available, by Linux; a Jetson's GPU shares it."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        left, total = (int(lines[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    except (OSError, ValueError, KeyError, IndexError):
        return False
    return left < _SCARCE_SHARE * total
