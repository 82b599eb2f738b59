"""The state of the device during a measurement: power mode, clocks, temperatures, other load, and power draw.

Read from the kernel's files, the driver and `nvpmodel`; whatever is missing is left out, and nothing here raises.
Sources: the Linux kernel's Documentation on hwmon/ina3221, sysfs-class-devfreq and cpufreq; NVIDIA's Jetson Linux
Developer Guide, "Jetson Xavier NX Series and Jetson AGX Xavier Series" and "Jetson Orin Nano Series, Jetson Orin NX
Series and Jetson AGX Orin Series" (clocks, software-based power consumption modeling); the NVML API reference.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
import shutil
import subprocess
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from mess_compile.runtime.base import decode

GPU_DEVFREQ = re.compile(r"[0-9a-f]+[.](gv11b|ga10b|gp10b|gm20b|gpu)")
"""A Jetson's GPU in /sys/class/devfreq: 17000000.gv11b on Xavier, .ga10b on Orin (.gpu from JetPack 6)."""
EMC = "sys/kernel/debug/bpmp/debug/clk/emc"
"""The memory's clock; only root can read it."""
CPU_POLICIES = "sys/devices/system/cpu/cpufreq"
SYSTEM_FOLDERS = "/usr/sbin:/usr/bin:/sbin:/bin"
"""Searched after PATH, which often lacks /usr/sbin in a session over SSH."""

_NVML = "libnvidia-ml.so.1"
_PATIENCE_S = 10
_LOAD_WINDOW_S = 0.2
_UNREAL_ZONES = ("PMIC-Die",)  # a constant on Jetson, 50 or 100 degrees
_NO_BRAKES = ("fan", "alert", "backlight", "tcc", "wifi", "charger")  # cooling devices that do not slow computing
_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
_TOTALS: Tuple[Tuple[str, ...], ...] = (
    ("VDD_IN",),  # Xavier NX, Orin NX, Orin Nano, TX2: the whole module
    ("POM_5V_IN",),  # Nano: the whole module
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier has no rail for the whole
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin; VDDQ_VDD2_1V8AO is part of VIN_SYS_5V0
)
_HOT_C, _MOVED, _BUSY = 80.0, 0.9, 0.1


@dataclass(frozen=True)
class DeviceState:
    """The device at one moment; names are `GPU`, `EMC`, `CPU0` (the policy of core 0), `memory`, and the zones' types.

    `limits_mhz` are the highest clocks that the power mode allows now. `load_average` is over one minute, in processes;
    `other_load` the share of all cores' time, 0 to 1, that other processes took just now.
    """

    power_mode: Optional[str] = None
    clocks_mhz: Tuple[Tuple[str, float], ...] = ()
    limits_mhz: Tuple[Tuple[str, float], ...] = ()
    temperatures_c: Tuple[Tuple[str, float], ...] = ()
    throttled: Tuple[str, ...] = ()
    load_average: Optional[float] = None
    other_load: Optional[float] = None


def read_state(root: Path = Path("/")) -> DeviceState:
    """Read the state of the device with files under `root`; takes 0.25 s, so not while anything is timed."""
    ask = _card()
    sources = _clock_files(root)
    clocks = {**_of_card(ask, "nvmlDeviceGetClockInfo"), **_megahertz(sources, 0)}
    limits = {**_of_card(ask, "nvmlDeviceGetMaxClockInfo"), **_megahertz(sources, 1)}
    average = _number_in(_read(root / "proc" / "loadavg").split(" ")[0])
    return DeviceState(
        power_mode=_power_mode(ask),
        clocks_mhz=tuple(clocks.items()),
        limits_mhz=tuple(limits.items()),
        temperatures_c=tuple({**_zones(root), **_card_temperature(ask)}.items()),
        throttled=(*_active_coolers(root), *_throttled(ask)),
        load_average=average,
        other_load=_other_load(root),
    )


def state_to_json(state: DeviceState) -> Dict[str, Any]:
    """Plain values; clocks and temperatures become objects by name."""
    return {
        "power_mode": state.power_mode,
        "clocks_mhz": dict(state.clocks_mhz),
        "limits_mhz": dict(state.limits_mhz),
        "temperatures_c": dict(state.temperatures_c),
        "throttled": list(state.throttled),
        "load_average": state.load_average,
        "other_load": state.other_load,
    }


@dataclass(frozen=True)
class _StateJson:
    """The content that `state_to_json` gives."""

    power_mode: Optional[str]
    clocks_mhz: Dict[str, float]
    limits_mhz: Dict[str, float]
    temperatures_c: Dict[str, float]
    throttled: Tuple[str, ...]
    load_average: Optional[float]
    other_load: Optional[float]


def state_from_json(content: Any) -> DeviceState:
    """The inverse of `state_to_json`. Raises DecodeError naming the key that is wrong, missing or unknown."""
    state: _StateJson = decode.decode(_StateJson, content, "state")
    return DeviceState(
        power_mode=state.power_mode,
        clocks_mhz=_pairs("clocks_mhz", state.clocks_mhz),
        limits_mhz=_pairs("limits_mhz", state.limits_mhz),
        temperatures_c=_pairs("temperatures_c", state.temperatures_c),
        throttled=state.throttled,
        load_average=_figure("load_average", state.load_average),
        other_load=_figure("other_load", state.other_load),
    )


def _pairs(key: str, values: Mapping[str, float]) -> Tuple[Tuple[str, float], ...]:
    for name, value in values.items():
        _figure(f"{key}[{name}]", value)
    return tuple(values.items())


def _figure(key: str, value: Optional[float]) -> Optional[float]:
    """Raises DecodeError for a number that no device has."""
    if value is not None and abs(value) >= 1e12:
        raise decode.DecodeError(f"state.{key} is {value:g}, which is out of range")
    return value


def likely_cause(before: DeviceState, after: DeviceState) -> str:
    """A phrase on why latencies changed between two states, the most certain cause first; "" when none is visible.

    The device is idle in both states: a clock below its limit then means that it was not locked, and nothing worse.
    """
    causes = [
        *_throttling(before, after),
        *_dropped("limit", before.limits_mhz, after.limits_mhz),
        *_dropped("clock", _at_limit(before), after.clocks_mhz),
        *_hot(before, after),
        *_others(before, after),
    ]
    return ", ".join(causes[:2] or _unlocked(after))


def _throttling(before: DeviceState, after: DeviceState) -> List[str]:
    reasons = sorted({*before.throttled, *after.throttled})
    return [f"throttled by {' and '.join(reasons)}"] if reasons else []


def _dropped(what: str, before: Sequence[Tuple[str, float]], after: Sequence[Tuple[str, float]]) -> List[str]:
    now = dict(after)
    fell = [(name, mhz, now[name]) for name, mhz in before if name in now and now[name] < _MOVED * mhz]
    return [f"the {what} of {name} fell from {old:.0f} to {new:.0f} MHz" for name, old, new in fell[:1]]


def _hot(before: DeviceState, after: DeviceState) -> List[str]:
    if not after.temperatures_c:
        return []
    zone, now = max(after.temperatures_c, key=lambda pair: pair[1])
    if now < _HOT_C:
        return []
    earlier = dict(before.temperatures_c).get(zone)
    return [f"hot ({zone} at {now:.0f} °C" + (")" if earlier is None else f", from {earlier:.0f} °C)")]


def _others(before: DeviceState, after: DeviceState) -> List[str]:
    busiest = max(before.other_load or 0.0, after.other_load or 0.0)
    return [f"other processes use {busiest:.0%} of the CPU"] if busiest >= _BUSY else []


def _unlocked(after: DeviceState) -> List[str]:
    return [
        f"the clock of {name} is not locked (at {mhz:.0f} of {limit:.0f} MHz)"
        for name, mhz, limit in _with_limit(after)
        if mhz < _MOVED * limit
    ][:1]


def _at_limit(state: DeviceState) -> List[Tuple[str, float]]:
    return [(name, mhz) for name, mhz, limit in _with_limit(state) if mhz >= _MOVED * limit]


def _with_limit(state: DeviceState) -> List[Tuple[str, float, float]]:
    limits = dict(state.limits_mhz)
    return [(name, mhz, limits[name]) for name, mhz in state.clocks_mhz if name in limits]


def power_meter(root: Path = Path("/")) -> Optional[Callable[[], Optional[float]]]:
    """A function that reads the present power draw of the module or card in milliwatts, or None without a sensor.

    On a Jetson it reads the INA3221 monitors' rail of the module's input, or the sum of the rails that make it up; the
    files stay open. On AGX Orin a reading takes about half a millisecond, and each rail needs two (voltage and current,
    since JetPack 5). On cards since Ampere, except GA100, the driver gives a mean over the last second. The function
    returns None when a value cannot be read.
    """
    rails = _rails(root)
    for names in _TOTALS:
        if all(name in rails for name in names):
            return _sum([rails[name] for name in names])
    ask = _card()
    if ask is None or ask("nvmlDeviceGetPowerUsage") is None:
        return None
    card = ask

    def milliwatts() -> Optional[float]:
        value = card("nvmlDeviceGetPowerUsage")
        return None if value is None else float(value)

    return milliwatts


_Reader = Callable[[], Optional[float]]


def _sum(readers: Sequence[_Reader]) -> _Reader:
    def total() -> Optional[float]:
        values = [reader() for reader in readers]
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    return total


def _rails(root: Path) -> Dict[str, _Reader]:
    """Readers in milliwatts by rail. JetPack 4's driver gives power; since JetPack 5, volts and amperes."""
    found: Dict[str, _Reader] = {}
    for label in sorted((root / "sys" / "bus" / "i2c" / "drivers" / "ina3221x").glob("*/iio:device*/rail_name_*")):
        power = _Sensor.opened(label.with_name(f"in_power{label.name[-1]}_input"))
        if power is not None:
            found.setdefault(_read(label).strip(), power)
    for monitor in sorted((root / "sys" / "class" / "hwmon").glob("hwmon*")):
        if _read(monitor / "name").strip() == "ina3221":
            for channel in "123":
                volts = _Sensor.opened(monitor / f"in{channel}_input")
                amperes = _Sensor.opened(monitor / f"curr{channel}_input")
                if volts is not None and amperes is not None:
                    found.setdefault(_read(monitor / f"in{channel}_label").strip(), _product(volts, amperes))
    return found


def _product(millivolts: _Reader, milliamperes: _Reader) -> _Reader:
    def milliwatts() -> Optional[float]:
        voltage, current = millivolts(), milliamperes()
        return None if voltage is None or current is None else voltage * current / 1000

    return milliwatts


class _Sensor:
    """A file with one number, which stays open: each read from its start gets the present value."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    @staticmethod
    def opened(path: Path) -> Optional[_Sensor]:
        try:
            return _Sensor(os.open(path, os.O_RDONLY))
        except OSError:
            return None

    def __call__(self) -> Optional[float]:
        try:
            return _number_in(os.pread(self._descriptor, 64, 0).decode("ascii", "replace"))
        except OSError:
            return None


def _power_mode(ask: Optional[_Ask]) -> Optional[str]:
    mode = re.search(r"NV Power Mode: *(\S+)", output("nvpmodel", "-q"))
    if mode:
        return mode[1]
    milliwatts = ask("nvmlDeviceGetPowerManagementLimit") if ask else None
    return None if milliwatts is None else f"power limit {milliwatts / 1000:g} W"


def _clock_files(root: Path) -> Dict[str, Tuple[Path, Path, float]]:
    """For each clock the file with its value, the file with its limit, and how many of their units are one MHz."""
    found = {}
    for folder in gpu_folders(root)[:1]:
        found["GPU"] = (folder / "cur_freq", folder / "max_freq", 1e6)
    found["EMC"] = (root / EMC / "rate", root / EMC / "max_rate", 1e6)
    for folder in cpu_folders(root):
        found[f"CPU{folder.name[len('policy') :]}"] = (folder / "scaling_cur_freq", folder / "scaling_max_freq", 1e3)
    return found


def _megahertz(files: Mapping[str, Tuple[Path, Path, float]], which: int) -> Dict[str, float]:
    read = {name: (_number_in(_read(sources[:2][which])), sources[2]) for name, sources in files.items()}
    return {name: value / unit for name, (value, unit) in read.items() if value is not None}


def gpu_folders(root: Path) -> List[Path]:
    """The devfreq folder of a Jetson's GPU, in a list; empty on other machines."""
    folders = sorted((root / "sys" / "class" / "devfreq").glob("*"))
    return [folder for folder in folders if GPU_DEVFREQ.fullmatch(folder.name)]


def cpu_folders(root: Path) -> List[Path]:
    """One folder per group of cores that share a clock, by the number of its first core."""
    folders = [path for path in (root / CPU_POLICIES).glob("policy*") if path.name[len("policy") :].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[len("policy") :]))


def _zones(root: Path) -> Dict[str, float]:
    found: Dict[str, float] = {}
    for zone in sorted((root / "sys" / "class" / "thermal").glob("thermal_zone*")):
        name, value = _read(zone / "type").strip(), _number_in(_read(zone / "temp"))
        if name and name not in _UNREAL_ZONES and value is not None and -60_000 < value < 200_000:
            found[name if name not in found else f"{name} ({zone.name})"] = value / 1000
    return found


def _active_coolers(root: Path) -> List[str]:
    """Cooling devices that slow the device down at present."""
    active = []
    for device in sorted((root / "sys" / "class" / "thermal").glob("cooling_device*")):
        name = _read(device / "type").strip()
        if (_number_in(_read(device / "cur_state")) or 0) > 0 and not any(word in name.lower() for word in _NO_BRAKES):
            active.append(name or device.name)
    return active


def _other_load(root: Path) -> Optional[float]:
    """The share of the cores' time that other processes use, over a moment in which this one sleeps."""
    first, own = _read(root / "proc" / "stat"), time.process_time()
    if not first:
        return None
    time.sleep(_LOAD_WINDOW_S)
    return share_of_others(first, _read(root / "proc" / "stat"), time.process_time() - own)


def share_of_others(first: str, second: str, own_s: float) -> Optional[float]:
    """From two readings of /proc/stat, between which this process used `own_s` seconds of CPU time."""
    earlier, later = _ticks(first), _ticks(second)
    if earlier is None or later is None or sum(later) <= sum(earlier):
        return None
    total = sum(later) - sum(earlier)
    idle = (later[3] + later[4]) - (earlier[3] + earlier[4])
    return min(1.0, max(0.0, (total - idle - own_s * os.sysconf("SC_CLK_TCK")) / total))


def _ticks(stat: str) -> Optional[List[int]]:
    """user, nice, system, idle, iowait, irq, softirq, steal; guests' time is in the first two already."""
    line = re.match(r"cpu +((?:[0-9]{1,18} ){7}[0-9]{1,18})", stat)
    return [int(value) for value in line[1].split()] if line else None


_Ask = Callable[..., Optional[int]]


def _card() -> Optional[_Ask]:
    """A function that queries NVML about the first card in CUDA_VISIBLE_DEVICES; None without a driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return _opened_card(_NVML, visible)


@functools.lru_cache(maxsize=None)
def _opened_card(library: str, visible: str) -> Optional[_Ask]:
    """Calls are `ask(name, arguments...)`: the number that NVML returns, or None where the card has none."""
    try:
        nvml = ctypes.CDLL(library)
        card = ctypes.c_void_p()
        if nvml.nvmlInit_v2() != 0:
            return None
        if visible.isdecimal():
            status = nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(visible)), ctypes.byref(card))
        else:
            status = nvml.nvmlDeviceGetHandleByUUID(visible.encode(), ctypes.byref(card))
    except (OSError, AttributeError, ValueError):
        return None
    if status != 0:
        return None

    def ask(name: str, *arguments: int) -> Optional[int]:
        value = ctypes.c_ulonglong()
        call = getattr(nvml, name, None)
        if call is None or call(card, *map(ctypes.c_uint, arguments), ctypes.byref(value)) != 0:
            return None
        return value.value  # little endian: right for a call that writes 32 bits as well

    return ask


def _of_card(ask: Optional[_Ask], call: str) -> Dict[str, float]:
    found = {name: ask(call, kind) if ask else None for name, kind in (("GPU", 1), ("memory", 2))}
    return {name: float(mhz) for name, mhz in found.items() if mhz is not None}


def _card_temperature(ask: Optional[_Ask]) -> Dict[str, float]:
    degrees = ask("nvmlDeviceGetTemperature", 0) if ask else None
    return {} if degrees is None else {"GPU": float(degrees)}


def _throttled(ask: Optional[_Ask]) -> List[str]:
    bits = (ask("nvmlDeviceGetCurrentClocksThrottleReasons") if ask else None) or 0
    return [name for bit, name in _REASONS.items() if bits & bit]


def output(*command: str) -> str:
    """The output of a system tool, "" when it is missing, fails or hangs."""
    tool = find_tool(command[0])
    if tool is None:
        return ""
    try:
        done = subprocess.run(
            [tool, *command[1:]], stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def find_tool(name: str) -> Optional[str]:
    """The path of a system program, which need not be on PATH."""
    return shutil.which(name) or shutil.which(name, path=SYSTEM_FOLDERS)


def _read(path: Path) -> str:
    """The first 4 KiB of a file, "" when it is missing or cannot be read."""
    try:
        with open(str(path), "rb") as stream:
            text = stream.read(4096).decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def _number_in(text: str) -> Optional[float]:
    try:
        value = float(text.strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None
