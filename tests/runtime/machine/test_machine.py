"""The machine is described without a traceback, even with a driver that is missing, old or broken."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mess_compile.runtime.machine import machine
from mess_compile.runtime.machine.machine import Gpu, InstalledLibrary, Machine, this_machine

DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int cuInit(unsigned flags) { BEGIN return 0; }
int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = index + 40; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    snprintf(name, size, "%s", device == 40 ? "NVIDIA GeForce RTX 4090" : "NVIDIA GeForce GTX 1080 Ti"); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)(device == 40 ? 24 : 11) << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int known = attribute == 75 ? (device == 40 ? 8 : 6) : attribute == 76 ? (device == 40 ? 9 : 1) : -1;
    *value = known; return known < 0; }
"""
TWO = (Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24.0), Gpu("NVIDIA GeForce GTX 1080 Ti", (6, 1), 11.0))
SMI = "NVIDIA H200, 9.0, 143771"


def install_driver(folder: Path, monkeypatch: pytest.MonkeyPatch, begin: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a driver with")
    (folder / "driver.c").write_text(DRIVER.replace("BEGIN", begin))
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(folder / "driver.c")]
    subprocess.run(command, check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))


def install_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str, code: int = 0) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(content)


@pytest.fixture
def no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither CUDA nor nvidia-smi can be asked, whatever the machine that the test runs on has."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    monkeypatch.setenv("PATH", str(tmp_path))


class TestDriver:
    def test_gpus_are_in_the_order_of_cuda(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install_driver(tmp_path, monkeypatch, "")
        assert this_machine(tmp_path).gpus == TWO

    def test_a_gpu_hidden_from_cuda_is_not_listed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """CUDA_VISIBLE_DEVICES='' hides a card from CUDA and not from nvidia-smi; an engine would not find it."""
        install_driver(tmp_path, monkeypatch, "return 100;")
        install_smi(tmp_path, monkeypatch, SMI)
        assert this_machine(tmp_path).gpus == ()

    @pytest.mark.parametrize("ill", ["abort();", "return 803;", "sleep(60);", "_exit(0);", "*(volatile int *)0 = 1;"])
    def test_a_driver_that_crashes_or_hangs_is_survived(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ill: str
    ) -> None:
        monkeypatch.setattr(machine, "_PATIENCE_S", 2)
        install_driver(tmp_path, monkeypatch, ill)
        install_smi(tmp_path, monkeypatch, SMI)
        assert this_machine(tmp_path).gpus == (Gpu("NVIDIA H200", (9, 0), 143771 / 1024),)

    def test_a_library_that_is_not_a_driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "libcuda.so.1").write_bytes(b"no library")
        monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
        install_smi(tmp_path, monkeypatch)
        assert this_machine(tmp_path).gpus == ()


@pytest.mark.usefixtures("no_driver")
class TestWithoutCuda:
    def test_a_machine_without_a_gpu(self, tmp_path: Path) -> None:
        found = this_machine(tmp_path)
        assert (found.gpus, found.board, found.l4t) == ((), None, None)

    @pytest.mark.parametrize(
        ("line", "gpu"),
        [
            ("NVIDIA GeForce RTX 2080, 7.5, 8192", Gpu("NVIDIA GeForce RTX 2080", (7, 5), 8.0)),
            ("NVIDIA GB10, 12.1, [N/A]", Gpu("NVIDIA GB10", (12, 1))),
            ("Orin (nvgpu), [N/A], [N/A]", Gpu("Orin")),
        ],
    )
    def test_nvidia_smi_is_queried(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, gpu: Gpu) -> None:
        install_smi(tmp_path, monkeypatch, line)
        assert this_machine(tmp_path).gpus == (gpu,)

    @pytest.mark.parametrize(
        ("line", "code"), [("No devices were found", 0), ("Field compute_cap is not valid", 2), (SMI, 9), ("a, b", 0)]
    )
    def test_without_an_answer_of_nvidia_smi_the_kernel_modules_files_are_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: int
    ) -> None:
        install_smi(tmp_path, monkeypatch, line, code=code)
        folder = tmp_path / "proc" / "driver" / "nvidia" / "gpus"
        write(folder / "0000:02:00.0" / "information", b"Model: \t\t NVIDIA GeForce RTX 4090\nIRQ:   \t\t 74\n")
        write(folder / "0000:01:00.0" / "information", b"Model: \t\t NVIDIA GeForce GTX 1080 Ti\n")
        write(folder / "0000:03:00.0" / "information", b"IRQ:   \t\t 75\n")
        assert this_machine(tmp_path).gpus == (Gpu("NVIDIA GeForce GTX 1080 Ti"), Gpu("NVIDIA GeForce RTX 4090"))

    def test_a_jetson_is_recognised_by_its_files(self, tmp_path: Path) -> None:
        write(tmp_path / "proc" / "device-tree" / "model", b"NVIDIA Jetson AGX Orin Developer Kit\0")
        release = (
            b"# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"
        )
        write(tmp_path / "etc" / "nv_tegra_release", release)
        found = this_machine(tmp_path)
        assert (found.board, found.l4t) == ("NVIDIA Jetson AGX Orin Developer Kit", "36.4.3")

    @pytest.mark.parametrize("name", ["proc/device-tree/model", "etc/nv_tegra_release"])
    def test_a_folder_where_a_file_should_be(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).mkdir(parents=True)
        assert this_machine(tmp_path).board is None

    @pytest.mark.parametrize("content", [b"", b"\0", b"\xff\xfe", b"\x1b[2J", b"R35 (release)", b"x" * 100_000])
    def test_files_of_another_kind(self, tmp_path: Path, content: bytes) -> None:
        write(tmp_path / "proc" / "device-tree" / "model", content)
        write(tmp_path / "etc" / "nv_tegra_release", content)
        write(tmp_path / "proc" / "driver" / "nvidia" / "gpus" / "0" / "information", content)
        found = this_machine(tmp_path)
        assert (found.gpus, found.l4t) == ((), None)
        assert machine.describe(found).isprintable()


@given(st.lists(st.text(max_size=60), max_size=4))
def test_arbitrary_output_of_nvidia_smi_never_crashes(lines: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "_output", lambda *command: "\n".join(lines))
        assert all(isinstance(gpu, Gpu) for gpu in machine._gpus_of_smi())
        told = machine._cuda_report()
        assert machine._gpus_of_cuda(told) is None
        assert machine._newest_cuda(told) is None or "CUDA" in "".join(lines)
        assert machine._driver(Path("/nothing")) is None or any(line[:1].isdecimal() for line in lines)


def test_libraries_are_found_without_importing_them() -> None:
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
    assert this_machine().version("tensorrt_rtx") == tensorrt_rtx.__version__
    assert this_machine().version("no_such_library") is None


def test_a_machine_is_described_in_one_line() -> None:
    xavier = Machine(
        (Gpu("Xavier", (7, 2), 30.98),), "Jetson-AGX", "35.4.1", (InstalledLibrary("tensorrt", "8.5.2.2"),)
    )
    expected = "Jetson-AGX, Jetson Linux 35.4.1, Xavier (compute capability 7.2, 31.0 GiB), tensorrt 8.5.2.2"
    assert machine.describe(xavier) == expected
    assert machine.describe(Machine()) == "no NVIDIA GPU, no engine library"


KERNEL_MODULES = {
    "550.54.15": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC",
    "565.57.01": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  565.57.01  Release Build  (dvs@U16)",
    "540.4.0": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (buildbrain@mobile)",
}
"""As the kernel modules of a server, of a server with the open ones and of JetPack 6 report it."""


class TestVersions:
    @pytest.mark.parametrize("version", KERNEL_MODULES)
    def test_the_driver_version_is_read_from_its_kernel_module(
        self, tmp_path: Path, no_driver: None, version: str
    ) -> None:
        write(tmp_path / "proc" / "driver" / "nvidia" / "version", KERNEL_MODULES[version].encode())
        found = this_machine(tmp_path)
        assert (found.driver, found.cuda) == (version, None)
        assert f"driver {version}" in machine.describe(found)

    @pytest.mark.parametrize("begin", ["", "return 100;", "return 803;"])
    def test_the_newest_cuda_is_found_without_a_working_gpu(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str
    ) -> None:
        install_driver(tmp_path, monkeypatch, begin)
        install_smi(tmp_path, monkeypatch)
        assert this_machine(tmp_path).cuda == "12.4"

    def test_nvidia_smi_is_queried_when_the_driver_does_not_answer(
        self, tmp_path: Path, no_driver: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install_smi(tmp_path, monkeypatch, "535.183.01", "| NVIDIA-SMI 535.183.01    CUDA Version: 12.2     |")
        found = this_machine(tmp_path)
        assert (found.driver, found.cuda) == ("535.183.01", "12.2")

    @pytest.mark.parametrize(
        ("name", "content", "version"),
        [
            ("version.json", b'{\n "cuda" : {\n  "name" : "CUDA SDK",\n  "version" : "12.6.68"\n }', "12.6.68"),
            ("version.txt", b"CUDA Version 10.2.300\n", "10.2.300"),
        ],
    )
    def test_the_toolkit_version_is_read_from_its_file(
        self, tmp_path: Path, no_driver: None, name: str, content: bytes, version: str
    ) -> None:
        write(tmp_path / "usr" / "local" / "cuda" / name, content)
        assert machine.toolkit(tmp_path) == f"{version} in {tmp_path}/usr/local/cuda"

    def test_the_toolkit_version_is_read_from_its_compiler(
        self, tmp_path: Path, no_driver: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert machine.toolkit(tmp_path) is None
        (tmp_path / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.4, V11.4.315'\n")
        (tmp_path / "nvcc").chmod(0o755)
        assert machine.toolkit(tmp_path) == f"11.4 at {tmp_path}/nvcc"

    def test_trtexec_is_found_where_jetpack_installs_it(self, tmp_path: Path, no_driver: None) -> None:
        assert machine.trtexec(tmp_path) is None
        (tmp_path / "trtexec").touch(0o755)
        assert machine.trtexec(tmp_path) == str(tmp_path / "trtexec")
        place = tmp_path / "usr" / "src" / "tensorrt" / "bin" / "trtexec"
        write(place, b"")
        assert machine.trtexec(tmp_path) == str(place)

    @pytest.mark.parametrize(
        ("names", "version"),
        [((), None), (("libnvinfer.so.8", "libnvinfer.so.8.5.2"), "8.5.2"), (("libnvinfer.so.10",), None)],
    )
    def test_the_systems_tensorrt_version_is_read_from_its_library(
        self, tmp_path: Path, names: tuple[str, ...], version: str | None
    ) -> None:
        folder = tmp_path / "usr" / "lib" / "aarch64-linux-gnu"
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).touch()
        assert machine.system_tensorrt(tmp_path) == version


class TestPower:
    def test_clocks_and_power_mode_come_from_any_source_that_has_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install_smi(tmp_path, monkeypatch, "1200, 1980, 450.00")
        (tmp_path / "nvpmodel").write_text("#!/bin/sh\necho 'NV Power Mode: MAXN'\necho 0\n")
        (tmp_path / "nvpmodel").chmod(0o755)
        place = tmp_path / "sys" / "devices" / "system" / "cpu" / "cpu0" / "cpufreq"
        write(place / "scaling_cur_freq", b"2265600\n")
        (place / "scaling_governor").write_text("schedutil\n")
        assert machine.describe_power(tmp_path) == (
            "power mode MAXN; GPU at 1200 of 1980 MHz, power limit 450.00 W; CPU at 2265 MHz, governor schedutil"
        )

    @pytest.mark.parametrize("line", ["", "nonsense", "1, 2, 3, 4, 5"])
    def test_nonsense_never_crashes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, no_driver: None
    ) -> None:
        assert machine.describe_power(tmp_path / "nothing") == "not reported by board, driver or kernel"
        install_smi(tmp_path, monkeypatch, line)
        assert "\n" not in machine.describe_power(tmp_path / "nothing")
