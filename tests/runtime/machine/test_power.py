"""Causes of changed latencies, and the energy of a run, on every board and card that reports them."""

from __future__ import annotations

import gc
import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mess_compile.runtime.base.decode import DecodeError
from mess_compile.runtime.machine import power
from mess_compile.runtime.machine.power import (
    DeviceState,
    likely_cause,
    power_meter,
    read_state,
    share_of_others,
    state_from_json,
    state_to_json,
)

NVML = r"""
static int ready;
int nvmlInit_v2(void) { ready = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **card) { *card = (void *)(long)(1 + index); return index > 1; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **card) { *card = (void *)2; return uuid[0] != 'G'; }
int nvmlDeviceGetClockInfo(void *card, unsigned kind, unsigned *mhz) {
    *mhz = kind == 1 ? 1200 : kind == 2 ? 9501 : 0; return !ready || !card; }
int nvmlDeviceGetMaxClockInfo(void *card, unsigned kind, unsigned *mhz) { *mhz = kind == 1 ? 1980 : 9501; return 0; }
int nvmlDeviceGetTemperature(void *card, unsigned sensor, unsigned *degrees) { *degrees = 84; return sensor != 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *card, unsigned long long *bits) { *bits = 0x25; return 0; }
int nvmlDeviceGetPowerManagementLimit(void *card, unsigned *milliwatts) { *milliwatts = 450000; return 0; }
int nvmlDeviceGetPowerUsage(void *card, unsigned *milliwatts) { *milliwatts = (long)card * 100000; return STATUS; }
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def write_xavier(root: Path) -> None:
    """What JetPack 5 shows of an AGX Xavier in the power mode of 30 W."""
    gpu = root / "sys/class/devfreq/17000000.gv11b"
    write(gpu / "cur_freq", "318750000")
    write(gpu / "max_freq", "905250000")
    write(root / "sys/class/devfreq/15340000.vic/cur_freq", "115200000")
    write(root / power.EMC / "rate", "1331200000")
    write(root / power.EMC / "max_rate", "1600000000")
    for core in (0, 2, 10):
        write(root / f"sys/devices/system/cpu/cpufreq/policy{core}/scaling_cur_freq", "1190400")
        write(root / f"sys/devices/system/cpu/cpufreq/policy{core}/scaling_max_freq", "1420800")
    for number, (zone, temperature) in enumerate(
        (("CPU-therm", "41500"), ("GPU-therm", "39000"), ("PMIC-Die", "100000"), ("AO-therm", "nonsense"))
    ):
        write(root / f"sys/class/thermal/thermal_zone{number}/type", zone)
        write(root / f"sys/class/thermal/thermal_zone{number}/temp", temperature)
    for number, (device, state) in enumerate((("pwm-fan", "3"), ("gpu-balanced", "0"), ("cpu-balanced", "2"))):
        write(root / f"sys/class/thermal/cooling_device{number}/type", device)
        write(root / f"sys/class/thermal/cooling_device{number}/cur_state", state)
    write(root / "proc/loadavg", "1.25 0.90 0.50 2/345 6789")
    write(root / "proc/stat", "cpu  100 0 100 800 0 0 0 0 0 0")


def write_hwmon(root: Path, number: int, rails: dict[str, tuple[int, int]], name: str = "ina3221") -> None:
    """The kernel's own driver: millivolts and milliamperes of up to three channels."""
    folder = root / f"sys/class/hwmon/hwmon{number}"
    write(folder / "name", name)
    for channel, (label, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
        write(folder / f"in{channel}_label", label)
        write(folder / f"in{channel}_input", str(millivolts))
        write(folder / f"curr{channel}_input", str(milliamperes))
    write(folder / "in7_label", "sum of shunt voltages")
    write(folder / "in7_input", "760")


def write_iio(root: Path, device: str, number: int, rails: dict[str, int]) -> None:
    """JetPack 4's driver: milliwatts."""
    folder = root / f"sys/bus/i2c/drivers/ina3221x/{device}/iio:device{number}"
    for channel, (rail, milliwatts) in enumerate(rails.items()):
        write(folder / f"rail_name_{channel}", rail)
        write(folder / f"in_power{channel}_input", str(milliwatts))


@pytest.fixture(autouse=True)
def _no_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither NVML nor any program, whatever the machine that the tests run on has; no waiting."""
    monkeypatch.setattr(power, "_NVML", str(tmp_path / "no-library"))
    monkeypatch.setattr(power, "SYSTEM_FOLDERS", str(tmp_path / "bin"))
    monkeypatch.setattr(power, "_LOAD_WINDOW_S", 0.0)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def install(tmp_path: Path, name: str, script: str) -> None:
    (tmp_path / "bin").mkdir(exist_ok=True)
    tool = tmp_path / "bin" / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def install_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> None:
    """A library with the calls of the real one, by their names and signatures in NVIDIA's reference."""
    compiler = shutil.which("cc", path="/usr/bin:/usr/local/bin:/bin")
    if compiler is None:
        pytest.skip("no C compiler to make a driver with")
    (tmp_path / "nvml.c").write_text(NVML.replace("STATUS", str(status)))
    path = {**os.environ, "PATH": "/usr/bin:/usr/local/bin:/bin"}
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True, env=path)
    monkeypatch.setattr(power, "_NVML", str(library))


class TestState:
    def test_mode_clocks_limits_and_temperatures_of_a_jetson_are_read(self, tmp_path: Path) -> None:
        write_xavier(tmp_path)
        install(tmp_path, "nvpmodel", "echo 'NV Power Mode: MODE_30W_ALL'; echo 3")
        assert read_state(tmp_path) == DeviceState(
            power_mode="MODE_30W_ALL",
            clocks_mhz=(("GPU", 318.75), ("EMC", 1331.2), ("CPU0", 1190.4), ("CPU2", 1190.4), ("CPU10", 1190.4)),
            limits_mhz=(("GPU", 905.25), ("EMC", 1600.0), ("CPU0", 1420.8), ("CPU2", 1420.8), ("CPU10", 1420.8)),
            temperatures_c=(("CPU-therm", 41.5), ("GPU-therm", 39.0)),
            throttled=("cpu-balanced",),
            load_average=1.25,
            other_load=None,
        )

    @pytest.mark.parametrize("name", ["17000000.ga10b", "17000000.gpu", "57000000.gpu", "17000000.gp10b"])
    def test_the_gpu_is_found_on_every_jetson(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / "sys/class/devfreq" / name / "cur_freq", "306000000")
        write(tmp_path / "sys/class/devfreq/15480000.nvdec/cur_freq", "1")
        assert read_state(tmp_path).clocks_mhz == (("GPU", 306.0),)

    def test_a_card_is_read_by_its_driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install_nvml(tmp_path, monkeypatch)
        state = read_state(tmp_path)
        assert state.power_mode == "power limit 450 W"
        assert state.clocks_mhz == (("GPU", 1200.0), ("memory", 9501.0))
        assert state.limits_mhz == (("GPU", 1980.0), ("memory", 9501.0))
        assert state.temperatures_c == (("GPU", 84.0),)
        assert state.throttled == ("power cap", "software thermal slowdown")

    def test_without_sources_the_state_is_empty(self, tmp_path: Path) -> None:
        assert read_state(tmp_path) == DeviceState()
        assert read_state(tmp_path / "nowhere") == DeviceState()
        assert power_meter(tmp_path) is None

    @pytest.mark.parametrize("script", ["exit 1", "echo nonsense", "printf '\\377\\000'", "kill -9 $$"])
    def test_a_failing_tool_never_crashes(self, tmp_path: Path, script: str) -> None:
        install(tmp_path, "nvpmodel", script)
        assert read_state(tmp_path).power_mode is None

    def test_a_tool_that_hangs_is_not_waited_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(power, "_PATIENCE_S", 0.2)
        install(tmp_path, "nvpmodel", "exec /bin/sleep 30")
        assert read_state(tmp_path).power_mode is None

    @pytest.mark.parametrize("content", [b"", b"\0", b"\xff\xfe", b"-", b"nan", b"inf", b"1e400", b"x" * 100_000])
    def test_files_with_something_else_are_left_out(self, tmp_path: Path, content: bytes) -> None:
        write_xavier(tmp_path)
        write_hwmon(tmp_path, 0, {"VDD_IN": (5000, 1000)})
        for path in sorted(tmp_path.rglob("*")):
            if path.is_file() and path.name not in ("type", "name") and "label" not in path.name:
                path.write_bytes(content)
        assert replace(read_state(tmp_path), throttled=()) == DeviceState()
        meter = power_meter(tmp_path)
        assert meter is not None
        assert meter() is None

    def test_folders_where_files_should_be_are_left_out(self, tmp_path: Path) -> None:
        write_xavier(tmp_path)
        for path in sorted(tmp_path.rglob("*")):
            if path.is_file():
                path.unlink()
                path.mkdir()
        assert read_state(tmp_path) == DeviceState()
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "sys").write_text("no folder")
        assert read_state(tmp_path / "a") == DeviceState()

    def test_zones_of_one_type_are_listed_separately(self, tmp_path: Path) -> None:
        for number in (0, 1):
            write(tmp_path / f"sys/class/thermal/thermal_zone{number}/type", "acpitz")
            write(tmp_path / f"sys/class/thermal/thermal_zone{number}/temp", str(20_000 + number * 1000))
        expected = (("acpitz", 20.0), ("acpitz (thermal_zone1)", 21.0))
        assert read_state(tmp_path).temperatures_c == expected

    def test_the_real_machine_never_crashes(self) -> None:
        state = read_state()
        assert state_from_json(state_to_json(state)) == state


class TestLoad:
    def test_other_load_excludes_idle_time_and_our_own(self) -> None:
        """Between the readings: 400 ticks, of which 200 idle, 40 waiting for a disk, and half a second (50) is ours."""
        assert os.sysconf("SC_CLK_TCK") == 100
        before = "cpu  1000 5 300 8000 100 1 2 3 900 0\ncpu0 1 2 3\n"
        after = "cpu  1100 5 340 8200 140 1 2 23 900 0\ncpu0 1 2 3\n"
        assert share_of_others(before, after, 0.5) == pytest.approx((400 - 200 - 40 - 50) / 400)

    def test_a_guest_is_not_counted_twice(self) -> None:
        """/proc/stat has a guest's time in user's as well (proc(5))."""
        before, after = "cpu  0 0 0 0 0 0 0 0 0 0", "cpu  50 0 0 50 0 0 0 0 50 0"
        assert share_of_others(before, after, 0.0) == 0.5

    @pytest.mark.parametrize("second", ["", "cpu", "cpu  1 2 3", "cpu  0 0 0 0 0 0 0 0 0 0", "cpu  a b c d e f g h"])
    def test_an_unreadable_value_is_left_out(self, second: str) -> None:
        assert share_of_others("cpu  1 1 1 1 1 1 1 1 0 0", second, 0.0) is None

    def test_it_is_a_share_even_when_the_clocks_disagree(self) -> None:
        before, after = "cpu  0 0 0 0 0 0 0 0 0 0", "cpu  10 0 0 0 0 0 0 0 0 0"
        assert share_of_others(before, after, 9.0) == 0.0
        assert share_of_others(before, after, -9.0) == 1.0


class TestJson:
    @given(
        st.builds(
            DeviceState,
            power_mode=st.none() | st.text(max_size=20),
            **{
                name: st.dictionaries(st.text(max_size=9), st.floats(-1e6, 1e6)).map(lambda d: tuple(d.items()))
                for name in ("clocks_mhz", "limits_mhz", "temperatures_c")
            },
            throttled=st.lists(st.text(max_size=9)).map(tuple),
            load_average=st.none() | st.floats(0, 1e6),
            other_load=st.none() | st.floats(0, 1),
        )
    )
    def test_a_state_survives_the_table(self, state: DeviceState) -> None:
        assert state_from_json(state_to_json(state)) == state

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("power_mode", 3),
            ("clocks_mhz", []),
            ("clocks_mhz", {"GPU": None}),
            ("clocks_mhz", {"GPU": "1377"}),
            ("limits_mhz", {"GPU": True}),
            ("limits_mhz", {"GPU": math.nan}),
            ("temperatures_c", {"GPU": math.inf}),
            ("temperatures_c", {"GPU": 10**400}),
            ("throttled", "hot"),
            ("throttled", [1]),
            ("load_average", "1"),
            ("other_load", []),
        ],
    )
    def test_a_damaged_one_is_refused_with_its_key(self, key: str, value: Any) -> None:
        with pytest.raises(DecodeError, match=key):
            state_from_json({**state_to_json(DeviceState()), key: value})

    @pytest.mark.parametrize("content", [None, [], "x", {}, {**state_to_json(DeviceState()), "more": 1}])
    def test_something_else_is_refused(self, content: Any) -> None:
        with pytest.raises(DecodeError, match=r"^state[ .]"):
            state_from_json(content)


class TestCause:
    calm = DeviceState(
        power_mode="MAXN",
        clocks_mhz=(("GPU", 1377.0), ("CPU0", 2265.6)),
        limits_mhz=(("GPU", 1377.0), ("CPU0", 2265.6)),
        temperatures_c=(("GPU-therm", 52.0),),
        load_average=0.5,
        other_load=0.02,
    )

    @pytest.mark.parametrize(
        ("before", "after", "cause"),
        [
            ({}, {}, ""),
            ({}, {"clocks_mhz": (("GPU", 905.25),)}, "the clock of GPU fell from 1377 to 905 MHz"),
            ({}, {"limits_mhz": (("GPU", 905.25),)}, "the limit of GPU fell from 1377 to 905 MHz"),
            ({}, {"temperatures_c": (("GPU-therm", 88.5),)}, "hot (GPU-therm at 88 °C, from 52 °C)"),
            ({}, {"temperatures_c": (("CPU-therm", 91.0),)}, "hot (CPU-therm at 91 °C)"),
            ({}, {"throttled": ("power cap",)}, "throttled by power cap"),
            ({"other_load": 0.35}, {}, "other processes use 35% of the CPU"),
            (
                {"clocks_mhz": (("GPU", 318.75),)},
                {"clocks_mhz": (("GPU", 114.75),)},
                "the clock of GPU is not locked (at 115 of 1377 MHz)",
            ),
            (
                {},
                {"clocks_mhz": (("GPU", 905.25),), "temperatures_c": (("GPU-therm", 90.0),), "other_load": 0.5},
                "the clock of GPU fell from 1377 to 905 MHz, hot (GPU-therm at 90 °C, from 52 °C)",
            ),
        ],
    )
    def test_it_names_the_values(self, before: dict[str, Any], after: dict[str, Any], cause: str) -> None:
        assert likely_cause(replace(self.calm, **before), replace(self.calm, **after)) == cause

    def test_without_a_state_there_is_no_cause(self) -> None:
        assert likely_cause(DeviceState(), DeviceState()) == ""
        assert likely_cause(self.calm, DeviceState()) == ""


class TestMeter:
    def read(self, root: Path) -> float | None:
        meter = power_meter(root)
        assert meter is not None
        return meter()

    def test_xavier_nx_and_orin_nx_have_a_rail_for_the_module(self, tmp_path: Path) -> None:
        write_hwmon(tmp_path, 3, {"VDD_IN": (4960, 1250), "VDD_CPU_GPU_CV": (4960, 300), "VDD_SOC": (4952, 200)})
        write_hwmon(tmp_path, 0, {"VDD_IN": (1, 1)}, name="tmp451")
        assert self.read(tmp_path) == pytest.approx(6200)

    def test_agx_xavier_is_the_sum_of_its_six_rails(self, tmp_path: Path) -> None:
        write_hwmon(tmp_path, 4, {"GPU": (19000, 100), "CPU": (19000, 50), "SOC": (19000, 80)})
        write_hwmon(tmp_path, 5, {"CV": (19000, 10), "VDDRQ": (19000, 20), "SYS5V": (19000, 140)})
        assert self.read(tmp_path) == pytest.approx(19 * 400)

    def test_agx_orin_does_not_count_its_memory_twice(self, tmp_path: Path) -> None:
        """VIN_SYS_5V0 contains VDDQ_VDD2_1V8AO (Jetson Linux Developer Guide)."""
        write_hwmon(tmp_path, 3, {"VDD_GPU_SOC": (843, 6000), "VDD_CPU_CV": (780, 3000), "VIN_SYS_5V0": (5000, 900)})
        write_hwmon(tmp_path, 4, {"NC": (0, 0), "VDDQ_VDD2_1V8AO": (1800, 341)})
        assert self.read(tmp_path) == pytest.approx(843 * 6 + 780 * 3 + 5 * 900)

    def test_jetpack_4_gives_power_itself(self, tmp_path: Path) -> None:
        write_iio(tmp_path, "1-0040", 0, {"GPU": 2000, "CPU": 900, "SOC": 1500})
        write_iio(tmp_path, "1-0041", 1, {"CV": 100, "VDDRQ": 400, "SYS5V": 2600})
        assert self.read(tmp_path) == 7500

    def test_a_nano_counts_its_input_alone(self, tmp_path: Path) -> None:
        write_iio(tmp_path, "6-0040", 0, {"POM_5V_IN": 3000, "POM_5V_GPU": 500, "POM_5V_CPU": 700})
        assert self.read(tmp_path) == 3000

    def test_a_part_of_the_rails_is_not_taken_for_the_whole(self, tmp_path: Path) -> None:
        write_hwmon(tmp_path, 4, {"GPU": (19000, 100), "CPU": (19000, 50), "SOC": (19000, 80)})
        assert power_meter(tmp_path) is None

    def test_it_follows_the_sensor_and_opens_no_file_again(self, tmp_path: Path) -> None:
        write_hwmon(tmp_path, 0, {"VDD_IN": (5000, 1000)})
        meter = power_meter(tmp_path)
        assert meter is not None
        before = len(os.listdir("/proc/self/fd"))
        assert meter() == 5000
        write(tmp_path / "sys/class/hwmon/hwmon0/curr1_input", "2000")
        assert meter() == 10_000
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_sensor_that_fails_gives_no_number(self, tmp_path: Path) -> None:
        write_hwmon(tmp_path, 0, {"VDD_IN": (5000, 1000)})
        meter = power_meter(tmp_path)
        assert meter is not None
        (tmp_path / "sys/class/hwmon/hwmon0/curr1_input").write_text("")
        assert meter() is None

    def test_files_are_closed_with_the_meter(self, tmp_path: Path) -> None:
        write_hwmon(tmp_path, 0, {"VDD_IN": (5000, 1000)})
        before = len(os.listdir("/proc/self/fd"))
        assert self.read(tmp_path) == 5000
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before

    @pytest.mark.parametrize(("visible", "milliwatts"), [("0", 100_000), ("1,0", 200_000), ("GPU-5f1", 200_000)])
    def test_a_card_is_read_by_its_driver(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, milliwatts: int
    ) -> None:
        install_nvml(tmp_path, monkeypatch)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert self.read(tmp_path) == milliwatts

    def test_a_driver_that_does_not_measure_power_gives_no_meter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a Jetson NVML answers NVML_ERROR_NOT_SUPPORTED (3)."""
        install_nvml(tmp_path, monkeypatch, status=3)
        assert power_meter(tmp_path) is None

    @pytest.mark.parametrize("visible", ["", "7", "none", "-1", "9" * 30])
    def test_without_a_card_there_is_no_meter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str
    ) -> None:
        install_nvml(tmp_path, monkeypatch)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert power_meter(tmp_path) is None
        assert read_state(tmp_path) == DeviceState()
