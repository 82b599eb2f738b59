"""Commands for trtexec, and readers of its output and files, for devices whose Python cannot be used.

Options, their defaults and the layout of `--exportTimes` are those of samples/common/sampleOptions.cpp,
sampleInference.cpp and sampleReporting.cpp in NVIDIA's TensorRT repository, releases 8.5.1 to 11.1. The layout is the
same in all of them; the meaning of the figures depends on the defaults, so `timing_command` sets each option.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mess_compile.runtime.base.errors import InputError, one_line
from mess_compile.runtime.machine.machine import Gpu

PROGRAM = "/usr/src/tensorrt/bin/trtexec"
"""Where JetPack and NVIDIA's Debian packages install trtexec."""
PROTOCOL_DIFFERENCE = (
    "measured by trtexec: each graph ran alone and back to back, with no predecessor before it and on the same random "
    "inputs, with nothing uploaded or read back; wall time is from one enqueue to the next, rounded to 0.001 ms, after "
    "a second to 0.01 ms; "
    "upload, download and null stage were not measured; where TensorRT chooses precisions (8.5 to 10), the fp32 part "
    "of an fp16 graph may have run in fp16"
)
WINDOW_S, WARM_UP_MS = 0.75, 200
"""Of one run; time stamps have six digits, which are microseconds during the first second."""
_OLDEST, _BUILD_ONLY_GONE, _FLAGS_GONE = 8, 10, 11
_LONGEST_S = 9.0
_PRECISIONS: dict[str, tuple[str, ...]] = {"fp32": (), "fp16": ("--fp16",), "int8": ("--int8",)}
_STARTED, _COMPUTED, _MOVED = "startEnqMs", "computeMs", ("h2dMs", "d2hMs")
_REMEDY = "run the same command again"
_MESSAGE = re.compile(r"^(?=\[[0-9/:-]+\] \[[A-Z]\] |&&&& )", re.MULTILINE)
_ERROR = re.compile(r"\[[0-9/:-]+\] \[[EF]\] (?P<library>\[TRT\] )?(?P<words>.*)", re.DOTALL)
_NODE = re.compile(r"--- (Begin|End) node ---|^\S+: (input|output|name|op_type): ")
"""How the parser prints the node that it rejects, before the reason."""


@dataclass(frozen=True)
class TrtexecTimes:
    """For each run but the last: `wall_ms` from its enqueue to the next one, `device_ms` between events around it."""

    wall_ms: tuple[float, ...]
    device_ms: tuple[float, ...]


def build_command(
    graph: str,
    precision: str,
    version_major: int,
    engine: str,
    *,
    timing_cache: str | None = None,
    workspace_mib: int = 1024,
    program: str = PROGRAM,
) -> tuple[str, ...]:
    """The command that builds the ONNX file `graph` and saves it as `engine`, without timing. Paths are the device's.

    Raises InputError for a precision or version that is not supported.
    """
    _check_version(version_major)
    if precision not in _PRECISIONS:
        raise InputError(f"precision {precision!r} is not one of {', '.join(_PRECISIONS)}")
    return (
        program,
        f"--onnx={graph}",
        *(_PRECISIONS[precision] if version_major < _FLAGS_GONE else ()),  # from 11 on, precision is only in the graph
        f"--memPoolSize=workspace:{workspace_mib}",
        *([] if timing_cache is None else [f"--timingCacheFile={timing_cache}"]),
        f"--saveEngine={engine}",
        "--buildOnly" if version_major < _BUILD_ONLY_GONE else "--skipInference",
    )


def timing_command(
    engine: str,
    version_major: int,
    times: str,
    *,
    duration_s: float = WINDOW_S,
    warm_up_ms: int = WARM_UP_MS,
    spin_wait: bool = False,
    program: str = PROGRAM,
) -> tuple[str, ...]:
    """The command that times `engine`, run by run, and writes the file `times`; as close to our protocol as possible.

    `spin_wait` polls for the end of a run; by default the thread sleeps, as on a Jetson. Raises InputError for a
    version or duration that is not supported: beyond ten seconds the time stamps are too coarse.
    """
    _check_version(version_major)
    if not 0 < duration_s <= _LONGEST_S:
        raise InputError(
            f"a duration of {duration_s} s is not between 0 and {_LONGEST_S:g} s, the range of precise time stamps"
        )
    return (
        program,
        f"--loadEngine={engine}",
        f"--warmUp={warm_up_ms}",
        f"--duration={duration_s:g}",
        "--exposeDMA",  # despite its name: without it, two runs overlap at any time
        *_waiting(version_major, spin_wait),
        f"--exportTimes={times}",
    )


def _check_version(major: int) -> None:
    if major < _OLDEST:
        raise InputError(f"TensorRT {major} is older than 8.5: update it on the device")


def _waiting(version_major: int, spin_wait: bool) -> list[str]:
    """Options for no CUDA graph and no transfers; 11 has other defaults than earlier versions."""
    if version_major < _FLAGS_GONE:
        return ["--noDataTransfers", *(["--useSpinWait"] if spin_wait else [])]
    return ["--noCudaGraph", *([] if spin_wait else ["--noSpinWait"])]


def samples_from_json(text: str) -> TrtexecTimes:
    """Read what `--exportTimes` wrote: an entry for each run after the warm-up.

    Raises InputError for a text that is truncated, damaged or from a run with transfers.
    """
    try:
        runs = json.loads(text, parse_constant=_refuse)
        if not isinstance(runs, list) or len(runs) < 2:
            raise ValueError("there are fewer than two runs")
        started = [_milliseconds(run, _STARTED) for run in runs]
        computed = [_milliseconds(run, _COMPUTED) for run in runs]
        moved = any(_milliseconds(run, key) > 0 for run in runs for key in _MOVED)
        wall = tuple(later - earlier for earlier, later in pairwise(started))
        if min(wall) < 0:
            raise ValueError(f"{_STARTED} goes back in time")
    except (ValueError, RecursionError) as error:
        raise InputError(f"the times that trtexec exported are damaged ({_short(error)}): {_REMEDY}") from error
    if moved:
        raise InputError(f"the times that trtexec exported include transfers: {_REMEDY} with --noDataTransfers")
    return TrtexecTimes(wall, tuple(computed[:-1]))


def version_from_output(text: str) -> str:
    """The library's version, such as 8.5.2, from the output of trtexec. Raises InputError when it is missing."""
    plain = re.search(r"TensorRT version: ([0-9]{1,3})[.]([0-9]{1,3})[.]([0-9]{1,3})(?![0-9])", text, re.ASCII)
    if plain:
        return ".".join(str(int(number)) for number in plain.groups())
    packed = re.search(r"TensorRT v([0-9]{4}|[0-9]{6})(?![0-9])", text, re.ASCII)  # 8502 to 9, 100300 from 10
    if packed:
        major, rest = divmod(int(packed[1]), 1000 if len(packed[1]) == 4 else 10000)
        return f"{major}.{rest // 100}.{rest % 100}"
    raise InputError(f"trtexec names no version of TensorRT in {_short(text)!r}: check that {PROGRAM} runs there")


def gpu_from_output(text: str) -> Gpu | None:
    """The GPU that trtexec chose, from its output before it builds or loads anything; None without one."""
    name = re.search(r"Selected Device: (\S.*)", text)
    capability = re.search(r"Compute Capability: ([0-9]{1,2})[.]([0-9])", text)
    memory = re.search(r"Device Global Memory: ([0-9]{1,9}) MiB", text)
    if name is None or capability is None:
        return None
    memory_gib = int(memory[1]) / 1024 if memory else None
    return Gpu(name[1].strip(), (int(capability[1]), int(capability[2])), memory_gib)


def load_ms_from_output(text: str) -> float:
    """How long the engine took to load, from 10 on in two parts; 0 where trtexec does not print it."""
    seconds = re.findall(r"Engine (?:loaded|deserialized) in ([0-9]{1,6}(?:[.][0-9]+)?(?:e-[0-9]+)?) sec", text)
    return sum(map(float, seconds)) * 1e3


def error_from_output(text: str) -> str:
    """Why trtexec failed, in one line: the library's last errors, or else the first of trtexec, or the last output."""
    found = [error for error in map(_ERROR.match, _MESSAGE.split(text)) if error and not _NODE.search(error["words"])]
    of_library = [error for error in found if error["library"]]
    words = [error["words"].strip().rstrip(":") for error in of_library or found[:1]]
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("&&&&")]
    return one_line("; ".join(words[-2:]) or " ".join(lines[-1:])) or "no output"


def _milliseconds(run: Any, key: str) -> float:
    if not isinstance(run, dict) or key not in run:
        raise ValueError(f"a run has no {key}")
    value = run[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is {_short(value)}")
    if not 0 <= value < math.inf or value > 1e9:
        raise ValueError(f"{key} is {_short(value)}")
    return float(value)


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _short(value: object) -> str:
    return " ".join(str(value).split())[:80]
