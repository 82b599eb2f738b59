"""What this machine is: its NVIDIA GPUs, its board, its engine libraries. Whatever cannot be found out is left out.

Imports the standard library alone. Run as a script, this file queries the CUDA driver and prints the answer: a driver
that crashes or hangs then affects only that process, and CUDA is not open in this one when it forks.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

_PATIENCE_S = 20
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_SMI = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits")
_SMI_POWER = ("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader,nounits")
_SMI_DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
_DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU by its driver's name; `compute_capability` such as (8, 7). None where unknown."""

    name: str
    compute_capability: Optional[Tuple[int, int]] = None
    memory_gib: Optional[float] = None


@dataclass(frozen=True)
class InstalledLibrary:
    name: str
    version: str


@dataclass(frozen=True)
class Machine:
    """GPUs in the order of the CUDA driver, the first one being used; `board` and `l4t` (Jetson Linux) of a Jetson.

    `driver` is NVIDIA's, such as 550.54.15, and `cuda` the newest CUDA that it runs, such as 12.4.
    """

    gpus: Tuple[Gpu, ...] = ()
    board: Optional[str] = None
    l4t: Optional[str] = None
    libraries: Tuple[InstalledLibrary, ...] = ()
    driver: Optional[str] = None
    cuda: Optional[str] = None

    def version(self, library: str) -> Optional[str]:
        """The installed version of an engine library, None without one."""
        return next((found.version for found in self.libraries if found.name == library), None)


def this_machine(root: Path = Path("/")) -> Machine:
    """Query the driver and the files under `root`; never raises."""
    report = _cuda_report()
    gpus = _gpus_of_cuda(report)
    if gpus is None:
        gpus = _gpus_of_smi() or _gpus_of_proc(root)
    release = re.search(r"R([0-9]+) \(release\), REVISION: ([0-9.]+)", _read(root / "etc" / "nv_tegra_release"))
    board = _read(root / "proc" / "device-tree" / "model").strip()
    return Machine(
        gpus=gpus,
        board=board or None,
        l4t=".".join(release.groups()) if release else None,
        libraries=_libraries(),
        driver=_driver(root),
        cuda=_newest_cuda(report),
    )


def describe(machine: Machine) -> str:
    """The machine in one line, for people."""
    system = f"{machine.board or 'a Jetson'}, Jetson Linux {machine.l4t}" if machine.l4t else machine.board
    gpus = [_describe_gpu(gpu) for gpu in machine.gpus] or ["no NVIDIA GPU"]
    driver = [f"driver {machine.driver}"] if machine.driver else []
    libraries = [f"{library.name} {library.version}" for library in machine.libraries] or ["no engine library"]
    return ", ".join([*([system] if system else []), *gpus, *driver, *libraries])


def describe_power(root: Path = Path("/")) -> str:
    """Power mode and clocks, as far as board, driver and kernel report them."""
    facts = [f"power mode {mode}" for mode in re.findall(r"NV Power Mode: *(\S+)", _output("nvpmodel", "-q"))]
    for line in _output(*_SMI_POWER).splitlines():
        facts.append("GPU at {} of {} MHz, power limit {} W".format(*(line.split(", ") + ["?"] * 3)[:3]))
    cpu = root / "sys" / "devices" / "system" / "cpu" / "cpu0" / "cpufreq"
    kilohertz, governor = _read(cpu / "scaling_cur_freq").strip(), _read(cpu / "scaling_governor").strip()
    if kilohertz.isdecimal():
        facts.append(f"CPU at {int(kilohertz) // 1000} MHz, governor {governor or 'unknown'}")
    return "; ".join(facts) or "not reported by board, driver or kernel"


def toolkit(root: Path = Path("/")) -> Optional[str]:
    """Version and place of the CUDA toolkit, which compiles pycuda; mess-compile itself does not need it."""
    folder = root / "usr" / "local" / "cuda"
    found = re.search(r'"cuda"\s*:\s*\{[^}]*"version"\s*:\s*"([0-9.]+)"', _read(folder / "version.json"))
    found = found or re.search(r"CUDA Version ([0-9.]+)", _read(folder / "version.txt"))
    if found:
        return f"{found[1]} in {folder}"
    released = re.search(r"release ([0-9.]+)", _output("nvcc", "--version"))
    return f"{released[1]} at {shutil.which('nvcc')}" if released else None


def trtexec(root: Path = Path("/")) -> Optional[str]:
    """Path of trtexec, TensorRT's program for building and timing engines; JetPack installs it outside PATH."""
    place = root / "usr" / "src" / "tensorrt" / "bin" / "trtexec"
    return str(place) if place.is_file() else shutil.which("trtexec")


def system_tensorrt(root: Path = Path("/")) -> Optional[str]:
    """Version of the system's TensorRT library, even where this Python cannot import its module."""
    names = [path.name for path in (root / "usr" / "lib").glob("*-linux-gnu*/libnvinfer.so.*")]
    versions = [re.fullmatch(r"libnvinfer\.so\.([0-9]+(?:\.[0-9]+)+)", name) for name in sorted(names)]
    return next((version[1] for version in versions if version), None)


def cuda_of(library: str) -> Optional[int]:
    """The CUDA major version of an engine library's installed package, where its name has one."""
    names = [name for name in _DISTRIBUTIONS[library] if re.search("-cu[0-9]+$", name) and _version((name,))]
    return int(names[0].rpartition("-cu")[2]) if names else None


def dotted(capability: Tuple[int, int]) -> str:
    """A compute capability as data sheets write it."""
    return f"{capability[0]}.{capability[1]}"


def _describe_gpu(gpu: Gpu) -> str:
    capability = gpu.compute_capability and f"compute capability {dotted(gpu.compute_capability)}"
    memory = gpu.memory_gib and f"{gpu.memory_gib:.1f} GiB"
    facts = ", ".join(fact for fact in (capability, memory) if fact)
    return f"{gpu.name} ({facts})" if facts else gpu.name


@dataclass(frozen=True)
class _CudaReport:
    """What the CUDA driver reports: its version (12040 is CUDA 12.4), and name, capability and bytes of each GPU."""

    cuda: Optional[int] = None
    gpus: Optional[Tuple[Tuple[str, int, int, int], ...]] = None


def _cuda_report() -> _CudaReport:
    """Query the driver in a process of its own; an empty report when that failed."""
    from mess_compile.runtime.base import decode  # not at the top, which the process runs without this package

    try:
        source = __loader__.get_source(__name__)  # type: ignore[name-defined]  # it may be in a zip file
        report: _CudaReport = decode.decode(
            _CudaReport, json.loads(_output(sys.executable, "-I", "-c", source)), "CUDA"
        )
    except (ValueError, RecursionError, decode.DecodeError):
        return _CudaReport()
    return report


def _gpus_of_cuda(report: _CudaReport) -> Optional[Tuple[Gpu, ...]]:
    """The GPUs that programs with CUDA see, or None when the driver does not answer."""
    if report.gpus is None:
        return None
    return tuple(Gpu(name, (major, minor), size / 2**30) for name, major, minor, size in report.gpus)


def _newest_cuda(report: _CudaReport) -> Optional[str]:
    if report.cuda is not None and report.cuda >= 1000:
        return f"{report.cuda // 1000}.{report.cuda % 1000 // 10}"
    found = re.search(r"CUDA (?:UMD )?Version: *([0-9]{1,3}[.][0-9]{1,2})", _output("nvidia-smi"))
    return found[1] if found else None


def _driver(root: Path) -> Optional[str]:
    text = _read(root / "proc" / "driver" / "nvidia" / "version")
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([0-9]+(?:[.][0-9]+)+)", text)
    if found is None:
        found = re.match(r"([0-9]+(?:[.][0-9]+)+)$", _output(*_SMI_DRIVER), re.MULTILINE)
    return found[1] if found else None


def _gpus_of_smi() -> Tuple[Gpu, ...]:
    entries = [line.split(", ") for line in _output(*_SMI).splitlines()]
    return tuple(_gpu_of_smi(*entry) for entry in entries if len(entry) == 3)


def _gpu_of_smi(name: str, capability: str, mebibytes: str) -> Gpu:
    """A Jetson's nvidia-smi prints `[N/A]` for the memory, and `Orin (nvgpu)` where CUDA has `Orin`."""
    numbers = re.fullmatch("([0-9]{1,2})[.]([0-9])", capability)
    memory_gib = int(mebibytes) / 1024 if re.fullmatch("[0-9]{1,9}", mebibytes.strip()) else None
    return Gpu(name.replace(" (nvgpu)", ""), (int(numbers[1]), int(numbers[2])) if numbers else None, memory_gib)


def _gpus_of_proc(root: Path) -> Tuple[Gpu, ...]:
    texts = [_read(path) for path in sorted((root / "proc" / "driver" / "nvidia" / "gpus").glob("*/information"))]
    models = [re.search(r"^Model:\s*(\S.*?)\s*$", text, re.MULTILINE) for text in texts]
    return tuple(Gpu(model[1]) for model in models if model)


def _libraries() -> Tuple[InstalledLibrary, ...]:
    """Versions from the package metadata: importing an engine library takes seconds, and may start CUDA."""
    found = {name: _version(distributions) for name, distributions in _DISTRIBUTIONS.items()}
    return tuple(InstalledLibrary(name, version) for name, version in found.items() if version)


def _version(distributions: Tuple[str, ...]) -> Optional[str]:
    from importlib import metadata  # slower to import than the rest of this file

    for distribution in distributions:
        try:
            version = metadata.version(distribution)
        except (metadata.PackageNotFoundError, OSError, ValueError, KeyError):
            continue
        if version:  # None for a damaged installation
            return version
    return None


def _read(path: Path) -> str:
    """The first 4 KiB, without unprintable characters (texts in the device tree end with a NUL)."""
    try:
        with path.open("rb") as stream:
            text = stream.read(4096).decode("utf-8", "replace")
    except OSError:
        return ""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_PATIENCE_S, text=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _ask_cuda() -> Dict[str, object]:
    """The content of a `_CudaReport`."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"cuda": None, "gpus": None}
    return {"cuda": _ask_version(cuda), "gpus": _ask_gpus(cuda)}


def _ask_version(cuda: ctypes.CDLL) -> Optional[int]:
    version = ctypes.c_int()
    try:
        _succeed(cuda.cuDriverGetVersion(ctypes.byref(version)))
    except (OSError, AttributeError):
        return None
    return version.value


def _ask_gpus(cuda: ctypes.CDLL) -> Optional[List[Tuple[str, int, int, int]]]:
    """Name, compute capability in two numbers and bytes of each GPU."""
    try:
        status = cuda.cuInit(0)
        if status != 0:
            return [] if status == _NO_DEVICE else None
        count = ctypes.c_int()
        _succeed(cuda.cuDeviceGetCount(ctypes.byref(count)))
        return [_ask_gpu(cuda, index) for index in range(count.value)]
    except (OSError, AttributeError):
        return None


def _ask_gpu(cuda: ctypes.CDLL, index: int) -> Tuple[str, int, int, int]:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    size, name = ctypes.c_size_t(), ctypes.create_string_buffer(256)
    _succeed(cuda.cuDeviceGet(ctypes.byref(device), index))
    _succeed(cuda.cuDeviceGetName(name, len(name), device))
    _succeed(cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device))
    _succeed(cuda.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device))
    _succeed(cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device))
    return name.value.decode("utf-8", "replace"), major.value, minor.value, size.value


def _succeed(status: int) -> None:
    if status != 0:
        raise OSError(f"the CUDA driver returned {status}")


if __name__ == "__main__":
    print(json.dumps(_ask_cuda()))
