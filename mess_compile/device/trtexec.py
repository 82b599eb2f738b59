"""Timing with trtexec, where Python cannot be used on the device: the commands to run there, and what they leave.

Options, their defaults and the layout of `--exportTimes` are those of samples/common/sampleOptions.cpp,
sampleInference.cpp and sampleReporting.cpp in NVIDIA's TensorRT repository, releases 8.5.1 to 11.1. The layout is the
same in all of them; what the figures mean differs by the defaults, which `timing_command` therefore sets one by one.
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
"""Where JetPack and NVIDIA's Debian packages install it."""
PROTOCOL_DIFFERENCE = (
    "measured by trtexec: each graph ran alone and back to back, with no predecessor before it and on the same random "
    "inputs, with nothing uploaded or read back; wall time is from one enqueue to the next, rounded to 0.001 ms, after "
    "a second to 0.01 ms; "
    "upload, download and null stage were not measured; where TensorRT chooses precisions (8.5 to 10), the fp32 part "
    "of an fp16 graph may have run in fp16"
)
WINDOW_S, WARM_UP_MS = 0.75, 200
"""Of one run; time stamps have six digits, and before its first second has passed those reach to microseconds."""
_OLDEST, _BUILD_ONLY_GONE, _FLAGS_GONE = 8, 10, 11
_LONGEST_S = 9.0
_PRECISIONS: dict[str, tuple[str, ...]] = {"fp32": (), "fp16": ("--fp16",), "int8": ("--int8",)}
_STARTED, _COMPUTED, _MOVED = "startEnqMs", "computeMs", ("h2dMs", "d2hMs")
_REMEDY = "run the same command again"
_MESSAGE = re.compile(r"^(?=\[[0-9/:-]+\] \[[A-Z]\] |&&&& )", re.MULTILINE)
_ERROR = re.compile(r"\[[0-9/:-]+\] \[[EF]\] (?P<library>\[TRT\] )?(?P<words>.*)", re.DOTALL)
_NODE = re.compile(r"--- (Begin|End) node ---|^\S+: (input|output|name|op_type): ")
"""How the parser shows the node that it does not take, before it says why."""


@dataclass(frozen=True)
class TrtexecTimes:
    """Of each run but the last, `wall_ms` from its enqueue to the next one, `device_ms` between events around it."""

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
    """Build the ONNX file `graph` and save it as `engine`, without timing it. All paths are the device's.

    Raises InputError for a precision or version that trtexec cannot serve.
    """
    _check_version(version_major)
    if precision not in _PRECISIONS:
        raise InputError(f"precision {precision!r} is none of {', '.join(_PRECISIONS)}")
    return (
        program,
        f"--onnx={graph}",
        *(_PRECISIONS[precision] if version_major < _FLAGS_GONE else ()),  # from 11 precision is in the graph alone
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
    """Time `engine` one run after the other into the file `times`, as near to our own protocol as trtexec comes.

    `spin_wait` polls for a run's end where otherwise the thread sleeps, as a Jetson's default does. Raises InputError
    for a version or duration that trtexec cannot serve: beyond ten seconds its time stamps are too coarse.
    """
    _check_version(version_major)
    if not 0 < duration_s <= _LONGEST_S:
        raise InputError(
            f"a duration of {duration_s} s is not within 0 and {_LONGEST_S:g} s, where time stamps suffice"
        )
    return (
        program,
        f"--loadEngine={engine}",
        f"--warmUp={warm_up_ms}",
        f"--duration={duration_s:g}",
        "--exposeDMA",  # by its name about transfers; without it two runs are in flight at any time
        *_waiting(version_major, spin_wait),
        f"--exportTimes={times}",
    )


def _check_version(major: int) -> None:
    if major < _OLDEST:
        raise InputError(f"TensorRT {major} is older than 8.5: update it on the device")


def _waiting(version_major: int, spin_wait: bool) -> list[str]:
    """No CUDA graph and no transfers: asked for where 11 has turned the defaults round."""
    if version_major < _FLAGS_GONE:
        return ["--noDataTransfers", *(["--useSpinWait"] if spin_wait else [])]
    return ["--noCudaGraph", *([] if spin_wait else ["--noSpinWait"])]


def samples_from_json(text: str) -> TrtexecTimes:
    """Read what `--exportTimes` wrote, one row per run without the warm-up.

    Raises InputError for a text that is cut, damaged or from a run with transfers.
    """
    try:
        rows = json.loads(text, parse_constant=_refuse)
        if not isinstance(rows, list) or len(rows) < 2:
            raise ValueError("there are no two rows")
        started = [_milliseconds(row, _STARTED) for row in rows]
        computed = [_milliseconds(row, _COMPUTED) for row in rows]
        moved = any(_milliseconds(row, key) > 0 for row in rows for key in _MOVED)
        wall = tuple(later - earlier for earlier, later in pairwise(started))
        if min(wall) < 0:
            raise ValueError(f"{_STARTED} goes back in time")
    except (ValueError, RecursionError) as error:
        raise InputError(f"the times that trtexec exported are damaged ({_short(error)}): {_REMEDY}") from error
    if moved:
        raise InputError(f"the times that trtexec exported include transfers: {_REMEDY} with --noDataTransfers")
    return TrtexecTimes(wall, tuple(computed[:-1]))


def version_from_output(text: str) -> str:
    """The library's version, such as 8.5.2, from what trtexec prints. Raises InputError when it is not there."""
    told = re.search(r"TensorRT version: ([0-9]{1,3})[.]([0-9]{1,3})[.]([0-9]{1,3})(?![0-9])", text, re.ASCII)
    if told:
        return ".".join(str(int(number)) for number in told.groups())
    packed = re.search(r"TensorRT v([0-9]{4}|[0-9]{6})(?![0-9])", text, re.ASCII)  # 8502 to 9, 100300 from 10
    if packed:
        major, rest = divmod(int(packed[1]), 1000 if len(packed[1]) == 4 else 10000)
        return f"{major}.{rest // 100}.{rest % 100}"
    raise InputError(f"trtexec names no version of TensorRT in {_short(text)!r}: check that {PROGRAM} runs there")


def gpu_from_output(text: str) -> Gpu | None:
    """The GPU that trtexec chose, from what it prints before it builds or loads anything; None without one."""
    name = re.search(r"Selected Device: (\S.*)", text)
    capability = re.search(r"Compute Capability: ([0-9]{1,2})[.]([0-9])", text)
    memory = re.search(r"Device Global Memory: ([0-9]{1,9}) MiB", text)
    if name is None or capability is None:
        return None
    memory_gib = int(memory[1]) / 1024 if memory else None
    return Gpu(name[1].strip(), (int(capability[1]), int(capability[2])), memory_gib)


def load_ms_from_output(text: str) -> float:
    """How long the engine took to load, from 10 on in two parts; 0 where trtexec does not tell."""
    told = re.findall(r"Engine (?:loaded|deserialized) in ([0-9]{1,6}(?:[.][0-9]+)?(?:e-[0-9]+)?) sec", text)
    return sum(map(float, told)) * 1e3


def error_from_output(text: str) -> str:
    """Why trtexec failed, in one line: the last errors of the library, else of trtexec, else what was said last."""
    found = [error for error in map(_ERROR.match, _MESSAGE.split(text)) if error and not _NODE.search(error["words"])]
    of_library = [error for error in found if error["library"]]
    words = [error["words"].strip().rstrip(":") for error in of_library or found[:1]]
    said = [line for line in text.splitlines() if line.strip() and not line.startswith("&&&&")]
    return one_line("; ".join(words[-2:]) or " ".join(said[-1:])) or "it said nothing"


def _milliseconds(row: Any, key: str) -> float:
    if not isinstance(row, dict) or key not in row:
        raise ValueError(f"a row has no {key}")
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is {_short(value)}")
    if not 0 <= value < math.inf or value > 1e9:
        raise ValueError(f"{key} is {_short(value)}")
    return float(value)


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _short(value: object) -> str:
    return " ".join(str(value).split())[:80]
