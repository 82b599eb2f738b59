"""A user compiles for the device they named: its figures hold, its file is checked, and another machine is refused."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mess_compile import targets
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.machine import machine
from mess_compile.runtime.machine.machine import Gpu, InstalledLibrary, Machine
from mess_compile.targets import Peak, Target, differences, find_target, known_targets, refuse_unless_here
from tests.commands import complaint, done, printed_json

SHIPPED = known_targets()

# Of the chip's architecture, not of the card's data sheet: multiprocessors; fp32 lanes and fp16 multiply-adds of one of
# them per clock; MHz of the lanes and of the tensor cores; memory bus in bits and Gbit/s of a line. Pascal: half the
# multiply-adds of the int8 dot products.
CHIPS = {
    "xavier": (8, 64, 8 * 64, 1377, 1377, 256, 4.266),
    "orin": (16, 128, 4 * 256, 1300, 1300, 256, 6.4),
    "gtx-1080ti": (28, 128, 2 * 128, 1582, 1582, 352, 11),
    "rtx-2080": (46, 64, 8 * 64, 1710, 1710, 256, 14),
    "rtx-4090": (128, 128, 4 * 128, 2520, 2520, 384, 21),
    "h200": (132, 128, 4 * 512, 1980, 1830, 6144, 6.25),
}
MACHINES = {
    "xavier": Machine(
        (Gpu("Xavier", (7, 2), 31.0),), "Jetson-AGX", "35.4.1", (InstalledLibrary("tensorrt", "8.5.2.2"),)
    ),
    "orin": Machine(
        (Gpu("Orin", (8, 7), 61.4),),
        "NVIDIA Jetson AGX Orin Developer Kit",
        "36.4.3",
        (InstalledLibrary("tensorrt", "10.3.0"),),
    ),
    "gtx-1080ti": Machine((Gpu("GeForce GTX 1080 Ti", (6, 1), 10.9),)),
    "rtx-2080": Machine((Gpu("NVIDIA GeForce RTX 2080", (7, 5), 7.8),)),
    "rtx-4090": Machine((Gpu("NVIDIA GeForce RTX 4090", (8, 9), 23.6),)),
    "h200": Machine((Gpu("NVIDIA H200", (9, 0), 139.8),)),
    "host": Machine(),
}


def toml(content: dict[str, Any]) -> str:
    """Written by hand: JSON's texts, numbers and lists are TOML's too."""
    tables = {name: value for name, value in content.items() if isinstance(value, dict)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in content.items() if name not in tables]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines)


FIELDS: dict[str, Any] = {
    "name": "mine",
    "description": "my own",
    "library": "tensorrt",
    "library_versions": ["10"],
    "precisions": ["fp32", "fp16"],
    "compute_capability": "8.6",
    "gpu": "RTX A2000",
    "opset": 17,
    "memory_bandwidth_gb_per_s": 288,
    "memory_gib": 6,
    "peak": {"fp32_tflops": 8, "fp16_tflops": 63.9},
    "sources": {"memory_gib": "data sheet"},
}


def write(workspace: Path, text: str | bytes, name: str = "mine") -> Path:
    path = workspace / "profiles" / f"{name}.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(workspace: Path) -> str:
    with pytest.raises(InputError) as caught:
        known_targets(workspace)
    message = str(caught.value)
    assert "mine.toml" in message
    assert "xavier.toml" in message, "the remedy names an example"
    assert "\n" not in message
    assert len(message) < 700
    return message


class TestShipped:
    def test_every_device_of_the_promise_is_there(self) -> None:
        assert set(SHIPPED) == {*CHIPS, "host"}

    @pytest.mark.parametrize("name", CHIPS)
    def test_peak_arithmetic_is_what_the_chip_can_do(self, name: str) -> None:
        """2 operations per multiply-add; int8 at twice the rate of fp16."""
        processors, lanes, halves, mhz, tensor_mhz, _, _ = CHIPS[name]
        peak = SHIPPED[name].peak
        assert peak is not None
        assert peak.fp32_tflops == pytest.approx(processors * lanes * 2 * mhz / 1e6, rel=0.01)
        tensor = processors * halves * 2 * tensor_mhz / 1e6
        assert peak.int8_tops == pytest.approx(2 * tensor, rel=0.01)
        assert peak.fp16_tflops == (None if name == "gtx-1080ti" else pytest.approx(tensor, rel=0.01))

    @pytest.mark.parametrize("name", CHIPS)
    def test_memory_bandwidth_is_the_bus_times_its_rate(self, name: str) -> None:
        *_, bits, gigabits = CHIPS[name]
        assert SHIPPED[name].memory_bandwidth_gb_per_s == pytest.approx(bits / 8 * gigabits, rel=0.01)

    @pytest.mark.parametrize("name", CHIPS)
    def test_every_figure_has_its_source(self, name: str) -> None:
        named = {source.field for source in SHIPPED[name].sources}
        assert named >= {"library_versions", "opset", "peak", "memory_bandwidth_gb_per_s", "memory_gib"}
        assert ("power_modes" in named) == bool(SHIPPED[name].power_modes) == (name in ("xavier", "orin"))

    def test_jetsons_and_old_cards_take_opset_17(self) -> None:
        assert {SHIPPED[name].opset for name in ("xavier", "orin", "gtx-1080ti")} == {17}
        assert SHIPPED["xavier"].compute_capability == (7, 2)
        assert SHIPPED["gtx-1080ti"].precisions == ("fp32", "int8")

    def test_rtx_targets_are_those_that_the_real_library_builds_for(self) -> None:
        trt = pytest.importorskip("tensorrt_rtx")
        names = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")]
        assert set(targets.RTX_CAPABILITIES) == {(int(name[2:-1]), int(name[-1])) for name in names}


class TestOwnProfile:
    def test_a_full_one_is_read(self, tmp_path: Path) -> None:
        write(tmp_path, toml(FIELDS))
        found = find_target("mine", tmp_path)
        assert (found.compute_capability, found.peak) == ((8, 6), Peak(8.0, 63.9))
        assert type(found.memory_gib) is float
        assert found.sources == (targets.FieldSource("memory_gib", "data sheet"),)
        assert hash(found) == hash(replace(found)), "a target can be a key"

    def test_a_cpu_needs_four_lines(self, tmp_path: Path) -> None:
        needed = {"name": "mine", "description": "a CPU", "library": "onnxruntime", "precisions": ["fp32"]}
        write(tmp_path, toml(needed))
        assert find_target("mine", tmp_path) == Target("mine", "a CPU", "onnxruntime", ("fp32",))

    def test_cpu_is_this_machine_unless_the_workspace_has_a_device_of_that_name(self, tmp_path: Path) -> None:
        assert find_target("cpu", tmp_path) == find_target("host", tmp_path)
        write(tmp_path, toml({**FIELDS, "name": "cpu"}), "cpu")
        assert find_target("cpu", tmp_path).description != find_target("host", tmp_path).description

    def test_it_replaces_ours(self, tmp_path: Path) -> None:
        write(tmp_path, toml({**FIELDS, "name": "orin"}), "orin")
        assert find_target("orin", tmp_path).description == "my own"

    @pytest.mark.parametrize(
        "field", ["name", "description", "library", "precisions", "compute_capability", "gpu", "opset"]
    )
    def test_a_missing_field_is_named(self, tmp_path: Path, field: str) -> None:
        write(tmp_path, toml({name: value for name, value in FIELDS.items() if name != field}))
        assert f"{field} is missing" in refusal(tmp_path)

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"libary": "tensorrt"}, "libary is not a known entry (did you mean 'library'?)"),
            ({"zzz": 1}, "zzz is not a known entry; known are boards, "),
            ({"name": "theirs"}, "name is 'theirs', but the file is named 'mine'"),
            ({"name": "../mine"}, "name is '../mine'"),
            ({"description": "two\nlines"}, "description is 'two\\nlines', not one line of text"),
            ({"description": "\u001b[2J"}, "description is"),
            ({"library": "openvino"}, "library is 'openvino', not one of onnxruntime, "),
            ({"precisions": []}, "precisions is []"),
            ({"precisions": ["fp16"]}, "precisions is ['fp16'], not a list of fp32, fp16, int8 with fp32"),
            ({"precisions": ["fp32", "fp32"]}, "precisions is"),
            ({"precisions": ["fp32", ["fp16"]]}, "precisions is"),
            ({"library_versions": ["8.x"]}, "library_versions[1] is '8.x', not a version"),
            ({"compute_capability": 8.6}, "compute_capability is 8.6, not text such as '8.7'"),
            ({"compute_capability": "٨.٦"}, "compute_capability is"),
            (
                {"compute_capability": "8.7", "library": "tensorrt_rtx"},
                "compute_capability is 8.7, but tensorrt_rtx builds for",
            ),
            ({"gpu": ""}, "gpu is ''"),
            ({"boards": "Jetson"}, "boards is 'Jetson', not a list of texts"),
            ({"opset": True}, "opset is True, not an integer from 1 to 99"),
            ({"opset": 17.0}, "opset is 17.0"),
            ({"memory_gib": 0}, "memory_gib is 0, not a number above 0"),
            ({"memory_gib": "6"}, "memory_gib is '6'"),
            ({"memory_bandwidth_gb_per_s": 1e300}, "memory_bandwidth_gb_per_s is 1e+300"),
            ({"peak": {}}, "peak.fp32_tflops is missing"),
            ({"peak": {"fp32_tflops": 8}}, "peak has no figure for fp16"),
            ({"peak": {"fp32_tflops": -8}}, "peak.fp32_tflops is -8"),
            ({"peak": {"fp32_tops": 8}}, "peak.fp32_tops is not a known entry (did you mean 'fp32_tflops'?)"),
            ({"peak": 8}, "peak is 8, not a table"),
            ({"sources": {"price": "a shop"}}, "sources.'price' is not a known entry"),
            ({"sources": {"peak": 3}}, "sources.peak is 3, not one line of text"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_a_wrong_field_is_named_with_its_value(self, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
        write(tmp_path, toml({**FIELDS, **changed}))
        assert said in refusal(tmp_path)

    def test_a_gpu_without_its_capability(self, tmp_path: Path) -> None:
        write(tmp_path, 'name = "mine"\ndescription = "a"\nlibrary = "onnxruntime"\nprecisions = ["fp32"]\ngpu = "A"')
        assert "gpu and compute_capability go together" in refusal(tmp_path)

    @pytest.mark.parametrize("number", ["inf", "nan", "-inf", "0x" + "f" * 20000, "1979-05-27", "9" * 5000])
    def test_numbers_that_are_none(self, tmp_path: Path, number: str) -> None:
        write(tmp_path, toml(FIELDS).replace("memory_gib = 6", f"memory_gib = {number}"))
        refusal(tmp_path)

    @pytest.mark.parametrize(
        "text", [b"", b"name = ", b"\xff\xfe", b"a = " + b"[" * 20000, b"#" * 70000, b"a.b = 1\na = 2"]
    )
    def test_a_damaged_file(self, tmp_path: Path, text: bytes) -> None:
        write(tmp_path, text)
        refusal(tmp_path)

    @pytest.mark.parametrize("kind", ["folder", "pipe", "endless", "dangling"])
    def test_what_is_not_a_file(self, tmp_path: Path, kind: str) -> None:
        path = write(tmp_path, "")
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero" if kind == "endless" else tmp_path / "nothing")
        assert "it is not a file" in refusal(tmp_path)


VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=30),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from([*FIELDS, "x"]), st.text(max_size=5)),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@given(field=st.sampled_from([*FIELDS, "boards", "power_modes"]), value=VALUES)
def test_any_value_of_any_field_is_taken_or_refused_in_one_line(folder: Path, field: str, value: Any) -> None:
    write(folder, toml({**FIELDS, field: value}).replace("\x7f", "\\u007f"))
    try:
        found = known_targets(folder)["mine"]
    except InputError:
        assert any(word in refusal(folder) for word in (field, "peak", "not TOML"))
    else:
        assert isinstance(found, Target)
        assert json.dumps(asdict(found))


@given(st.binary(max_size=60).filter(lambda content: not content.startswith(b"version https://")))  # LFS pointers
def test_any_bytes_are_refused_in_one_line(folder: Path, content: bytes) -> None:
    write(folder, content)
    refusal(folder)


class TestDifferences:
    @pytest.mark.parametrize("name", MACHINES)
    def test_a_device_is_itself_and_no_other_one(self, name: str) -> None:
        here = {target.name for target in targets.targets_here(SHIPPED.values(), MACHINES[name])}
        assert here == {name, "host"}

    @pytest.mark.parametrize(
        ("name", "machine", "said"),
        [
            ("orin", Machine(), "no NVIDIA GPU is visible, not Orin (compute capability 8.7)"),
            ("rtx-2080", Machine((Gpu("NVIDIA GeForce RTX 2080 Ti", (7, 5)),)), "RTX 2080 Ti, not GeForce RTX 2080"),
            ("rtx-4090", Machine((Gpu("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9)),)), "4090 Laptop GPU, not GeForce"),
            ("h200", Machine((Gpu("NVIDIA H200", (9, 0), 16.5),)), "memory is 16.5 GiB, not 140.4 GiB"),
            ("h200", Machine((Gpu("NVIDIA H200", (8, 0)),)), "the compute capability is 8.0, not 9.0"),
            (
                "xavier",
                replace(MACHINES["xavier"], board="NVIDIA Jetson Xavier NX Developer Kit"),
                "the board is NVIDIA Jetson Xavier NX Developer Kit, not Jetson-AGX or Jetson AGX Xavier",
            ),
            ("xavier", replace(MACHINES["xavier"], board=None), "the board is no Jetson, not Jetson-AGX"),
            (
                "xavier",
                replace(MACHINES["xavier"], libraries=(InstalledLibrary("tensorrt", "8.50"),)),
                "tensorrt is 8.50, not 8.5",
            ),
        ],
    )
    def test_what_differs_is_said_with_both_values(self, name: str, machine: Machine, said: str) -> None:
        assert said in "; ".join(differences(SHIPPED[name], machine))

    def test_what_the_machine_does_not_tell_is_no_difference(self) -> None:
        assert differences(SHIPPED["h200"], Machine((Gpu("NVIDIA H200"),))) == ()


class TestRefusal:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "this_machine", lambda: MACHINES["h200"])

    def test_the_named_device_is_let_through(self) -> None:
        refuse_unless_here(SHIPPED["h200"])
        refuse_unless_here(SHIPPED["host"])

    def test_another_is_refused_with_the_name_of_this_one(self) -> None:
        with pytest.raises(
            InputError, match=r"not 'rtx-4090': the GPU is NVIDIA H200, .*: name the device that it is \(--device h200"
        ):
            refuse_unless_here(SHIPPED["rtx-4090"])

    def test_a_users_own_name_for_this_machine_is_found(self, tmp_path: Path) -> None:
        own = {**FIELDS, "gpu": "H200", "compute_capability": "9.0", "memory_gib": 141}
        write(tmp_path, toml({**own, "name": "a-server"}), "a-server")
        with pytest.raises(InputError, match="--device h200 or a-server or host"):
            refuse_unless_here(SHIPPED["orin"], tmp_path)

    def test_a_second_gpu_is_pointed_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        both = Machine((*MACHINES["rtx-4090"].gpus, *MACHINES["gtx-1080ti"].gpus))
        monkeypatch.setattr(machine, "this_machine", lambda: both)
        with pytest.raises(
            InputError, match="another GPU of this machine matches; put it first with CUDA_VISIBLE_DEVICES"
        ):
            refuse_unless_here(SHIPPED["gtx-1080ti"])


class TestDevices:
    @pytest.mark.parametrize("name", MACHINES)
    def test_this_machine_is_marked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setattr(machine, "this_machine", lambda: MACHINES[name])
        content = printed_json("-C", tmp_path, "devices")
        assert {device["name"] for device in content["devices"] if device["here"]} == {name, "host"}
        assert all(bool(device["differences"]) != device["here"] for device in content["devices"])
        lines = done("-C", tmp_path, "devices").splitlines()
        assert {line.split()[0] for line in lines if " yes " in line} == {name, "host"}
        assert f"profile --device {'cpu' if name == 'host' else name}" in lines[-1]

    def test_figures_are_listed(self, tmp_path: Path) -> None:
        lines = done("-C", tmp_path, "devices").splitlines()
        xavier = next(line for line in lines if line.startswith("xavier"))
        figures = ["tensorrt", "fp32,fp16,int8", "7.2", "1.41,11.28,22.56", "136.5"]
        assert [word for word in xavier.split() if word in figures] == figures

    def test_a_damaged_profile_is_one_line(self, tmp_path: Path) -> None:
        write(tmp_path, "name = 3")
        assert "mine.toml: name is 3, not letters" in complaint("-C", tmp_path, "devices")
