"""Times of trtexec are used only when the runs are comparable with ours and the file is complete."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mess_compile.device import trtexec
from mess_compile.device.trtexec import (
    TrtexecTimes,
    build_command,
    error_from_output,
    gpu_from_output,
    load_ms_from_output,
    samples_from_json,
    timing_command,
    version_from_output,
)
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.machine.machine import Gpu

KEYS = (
    *("startEnqMs", "endEnqMs", "startH2dMs", "endH2dMs", "startComputeMs", "endComputeMs", "startD2hMs", "endD2hMs"),
    *("h2dMs", "computeMs", "d2hMs", "latencyMs"),
)
ALWAYS = {"onnx", "saveEngine", "loadEngine", "memPoolSize", "timingCacheFile", "warmUp", "duration", "exposeDMA"}
OPTIONS_8_5 = ALWAYS | {"exportTimes", "fp16", "int8", "noDataTransfers", "useSpinWait", "buildOnly"}
"""The options that we use and sampleOptions.cpp of 8.5.2 parses, as do 8.6.1 and 9.3."""
OPTIONS_10 = OPTIONS_8_5 - {"buildOnly"} | {"skipInference"}
"""Those of 10.0 to 10.16."""
OPTIONS_11 = ALWAYS | {"exportTimes", "noCudaGraph", "noSpinWait", "skipInference"}
"""Those of 11.0 and 11.1, which refuse unknown options such as --fp16."""


def row(**changed: Any) -> dict[str, Any]:
    values = dict.fromkeys(KEYS, 0.0) | {"startEnqMs": 200.0, "computeMs": 1.0}
    return values | changed


def exported(*started_and_computed: tuple[float, float]) -> str:
    """As exportJSONTrace writes it in every release from 8.5.1 to 11.1: C++ streams, six significant digits."""
    lines, separator = [], "  "
    for started, computed in started_and_computed:
        values = row(startEnqMs=started, computeMs=computed, latencyMs=computed)
        lines.append(separator + "{ " + ", ".join(f'"{key}" : {values[key]:.6g}' for key in KEYS) + " }")
        separator = ", "
    return "[\n" + "\n".join(lines) + "\n]\n"


class TestCommand:
    def test_the_timing_command_on_a_xavier(self) -> None:
        expected = (
            "/usr/src/tensorrt/bin/trtexec --loadEngine=head.engine --warmUp=200 --duration=0.75 --exposeDMA "
            "--noDataTransfers --exportTimes=times.json"
        )
        assert timing_command("head.engine", 8, "times.json") == tuple(expected.split())

    def test_the_build_command_on_a_xavier_has_a_timing_cache(self) -> None:
        expected = (
            "/usr/src/tensorrt/bin/trtexec --onnx=head.onnx --fp16 --memPoolSize=workspace:1024 "
            "--timingCacheFile=timing.cache --saveEngine=head.engine --buildOnly"
        )
        assert build_command("head.onnx", "fp16", 8, "head.engine", timing_cache="timing.cache") == tuple(
            expected.split()
        )

    def test_from_11_on_the_changed_defaults_are_reversed(self) -> None:
        chosen = timing_command("head.engine", 11, "t")
        assert {"--noCudaGraph", "--noSpinWait"} <= set(chosen)
        assert not {"--noDataTransfers", "--useSpinWait"} & set(chosen)
        assert "--noSpinWait" not in timing_command("head.engine", 11, "t", spin_wait=True)

    @pytest.mark.parametrize(
        ("major", "known"), [(8, OPTIONS_8_5), (9, OPTIONS_8_5), (10, OPTIONS_10), (11, OPTIONS_11)]
    )
    @pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
    @pytest.mark.parametrize("spin_wait", [False, True])
    def test_each_release_parses_the_options_it_gets(
        self, major: int, known: set[str], precision: str, spin_wait: bool
    ) -> None:
        built = build_command("a.onnx", precision, major, "a.engine", timing_cache="t")
        timed = timing_command("a.engine", major, "times", spin_wait=spin_wait)
        for option in (*built[1:], *timed[1:]):
            assert re.fullmatch("--([A-Za-z0-9]+)(=.*)?", option)[1] in known  # type: ignore[index]

    def test_time_stamps_of_a_run_stay_within_the_second_in_which_they_are_exact(self) -> None:
        chosen = dict(option.partition("=")[::2] for option in timing_command("a.engine", 8, "t"))
        assert float(chosen["--warmUp"]) + 1000 * float(chosen["--duration"]) < 1000

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"version_major": 7}, "TensorRT 7 is older than 8.5"),
            ({"duration_s": 60.0}, "60.0 s is not between"),
            ({"duration_s": 0.0}, "0.0 s is not between"),
            ({"duration_s": math.nan}, "nan s is not between"),
        ],
    )
    def test_unsupported_timing_arguments_are_refused(self, arguments: dict[str, Any], words: str) -> None:
        with pytest.raises(InputError, match=words):
            timing_command(**{"engine": "a.engine", "version_major": 8, "times": "t", **arguments})

    def test_unsupported_build_arguments_are_refused(self) -> None:
        with pytest.raises(InputError, match="'bf16' is not one of fp32, fp16, int8"):
            build_command("a.onnx", "bf16", 8, "a.engine")
        with pytest.raises(InputError, match=r"TensorRT 7 is older than 8\.5"):
            build_command("a.onnx", "fp32", 7, "a.engine")


class TestSamples:
    def test_wall_time_is_from_one_enqueue_to_the_next(self) -> None:
        text = exported((200.125, 1.5), (202.25, 1.625), (204.75, 1.75))
        assert samples_from_json(text) == TrtexecTimes(wall_ms=(2.125, 2.5), device_ms=(1.5, 1.625))

    def test_rounded_time_stamps_leave_the_mean_right(self) -> None:
        """Late in a run six digits are 0.01 ms: each interval is off, their mean is not."""
        started = [5000 + 0.1234 * number for number in range(1001)]
        samples = samples_from_json(exported(*((moment, 0.1) for moment in started)))
        assert len(samples.wall_ms) == len(samples.device_ms) == 1000
        assert sum(samples.wall_ms) / 1000 == pytest.approx(0.1234, abs=1e-5)

    def test_columns_are_read_by_name(self) -> None:
        rows = [{key: row(startEnqMs=at)[key] for key in reversed(KEYS)} | {"new": "key"} for at in (1, 3)]
        assert samples_from_json(json.dumps(rows)).wall_ms == (2.0,)

    @pytest.mark.parametrize("key", ["h2dMs", "d2hMs"])
    def test_a_run_with_transfers_is_refused(self, key: str) -> None:
        with pytest.raises(InputError, match=r"include transfers: .* with --noDataTransfers"):
            samples_from_json(json.dumps([row(), row(**{key: 0.25})]))

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{}",
            "null",
            "[1, 2]",
            "[" * 100_000,
            exported((1, 1), (2, 1))[:-20],
            exported((1, 1)),
            json.dumps([row(), row(computeMs=None)]),
            json.dumps([row(), row(computeMs="1")]),
            json.dumps([row(), row(computeMs=True)]),
            json.dumps([row(), row(computeMs=-0.1)]),
            json.dumps([row(), row(computeMs=math.nan)]),
            json.dumps([row(), row(computeMs=math.inf)]),
            json.dumps([row(), row()]).replace("200.0", "1e999"),
            json.dumps([row(), row()]).replace("200.0", "9" * 400),
            json.dumps([row(), row()]).replace("200.0", "nan"),
            json.dumps([row(startEnqMs=5.0), row(startEnqMs=4.0)]),
            json.dumps([row(), {"startEnqMs": 201.0}]),
            "\0" * 50,
        ],
        ids=range(20),
    )
    def test_damaged_times_are_refused_in_one_line(self, text: str) -> None:
        with pytest.raises(InputError) as refused:
            samples_from_json(text)
        assert str(refused.value).startswith("the times that trtexec exported are damaged (")
        assert str(refused.value).endswith("): run the same command again")
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 250

    @given(st.text(max_size=300) | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(json.dumps))
    def test_arbitrary_text_never_crashes(self, text: str) -> None:
        with pytest.raises(InputError):
            samples_from_json(text)

    @given(st.lists(st.tuples(st.floats(0.001, 100), st.floats(0, 100)), min_size=2, max_size=20))
    def test_whatever_a_run_takes_is_read_back(self, runs: list[tuple[float, float]]) -> None:
        moment, rows = 200.0, []
        for interval, computed in runs:
            rows.append(row(startEnqMs=moment, computeMs=computed))
            moment += interval
        samples = samples_from_json(json.dumps(rows))
        assert samples.wall_ms == pytest.approx([interval for interval, _ in runs[:-1]], abs=1e-9)
        assert samples.device_ms == tuple(computed for _, computed in runs[:-1])


class TestVersion:
    @pytest.mark.parametrize(
        ("text", "version"),
        [
            ("&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec --onnx=a.onnx", "8.5.2"),
            ("&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec", "8.6.1"),
            ("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec", "10.3.0"),
            ("&&&& RUNNING TensorRT.trtexec [TensorRT v101601] [b11] # trtexec", "10.16.1"),
            ("&&&& PASSED TensorRT.trtexec [TensorRT v110100] [b42] # trtexec", "11.1.0"),
            ("[01/02/2025-10:11:12] [I] TensorRT version: 8.5.2\n[I] x", "8.5.2"),
            ("[TensorRT v8502] # a\n[I] TensorRT version: 8.5.2", "8.5.2"),
        ],
    )
    def test_it_is_read_off_what_trtexec_prints(self, text: str, version: str) -> None:
        assert version_from_output(text) == version

    @pytest.mark.parametrize(
        "text", ["", "trtexec: not found", "TensorRT v85", "TensorRT v12345", "TensorRT v１２３４"]
    )
    def test_another_program_is_not_taken_for_trtexec(self, text: str) -> None:
        with pytest.raises(InputError, match="names no version of TensorRT"):
            version_from_output(text)


XAVIER = """[11/21/2026-10:11:12] [I] === Device Information ===
[11/21/2026-10:11:12] [I] Selected Device: Xavier
[11/21/2026-10:11:12] [I] Compute Capability: 7.2
[11/21/2026-10:11:12] [I] SMs: 8
[11/21/2026-10:11:12] [I] Device Global Memory: 31010 MiB
"""
"""As setCudaDevice of 8.5.2 prints it on an AGX Xavier of 32 GB."""


class TestGpu:
    def test_it_is_read_off_what_trtexec_prints(self) -> None:
        assert gpu_from_output(XAVIER) == Gpu("Xavier", (7, 2), 31010 / 1024)

    def test_from_10_on_there_are_identifiers_beside_it(self) -> None:
        text = XAVIER.replace("[I] Compute", "[I] Selected Device ID: 0\n[I] Selected Device UUID: GPU-1\n[I] Compute")
        assert gpu_from_output(text) == Gpu("Xavier", (7, 2), 31010 / 1024)

    @pytest.mark.parametrize("text", ["", "Cannot find any available devices (GPUs)!", "Selected Device: \n"])
    def test_without_a_gpu_the_result_is_none(self, text: str) -> None:
        assert gpu_from_output(text) is None


STAMP = "[11/21/2026-10:11:12]"


class TestError:
    def test_the_last_errors_of_the_library_are_joined_across_lines(self) -> None:
        text = (
            f"{STAMP} [I] Start parsing network model\n"
            f'{STAMP} [E] [TRT] ModelImporter.cpp:726: While parsing node number 3 [TopK -> "x"]:\n'
            f"{STAMP} [E] [TRT] ModelImporter.cpp:727: --- Begin node ---\n"
            f'{STAMP} [E] [TRT] ModelImporter.cpp:728: input: "features"\ninput: "k"\nop_type: "TopK"\n\n'
            f"{STAMP} [E] [TRT] ModelImporter.cpp:729: --- End node ---\n"
            f"{STAMP} [E] [TRT] ModelImporter.cpp:732: ERROR: a.cpp:4951 In function importTopK:\n"
            "[8] Assertion failed: inputs.at(1).is_weights()\n"
            f"{STAMP} [E] Failed to parse onnx file\n{STAMP} [I] Finish parsing network model\n"
            f"{STAMP} [E] Engine set up failed\n&&&& FAILED TensorRT.trtexec [TensorRT v8502] # trtexec\n"
        )
        assert error_from_output(text) == (
            'ModelImporter.cpp:726: While parsing node number 3 [TopK -> "x"]; ModelImporter.cpp:732: ERROR: '
            "a.cpp:4951 In function importTopK: [8] Assertion failed: inputs.at(1).is_weights()"
        )

    def test_of_trtexec_s_own_errors_the_first_is_the_cause(self) -> None:
        text = f"{STAMP} [E] Error opening engine file: x\n{STAMP} [E] Engine set up failed\n&&&& FAILED\n"
        assert error_from_output(text) == "Error opening engine file: x"

    @pytest.mark.parametrize(
        ("text", "words"),
        [("", "no output"), ("&&&& FAILED x\n", "no output"), ("a\nb\n\n&&&& FAILED x\n", "b")],
    )
    def test_without_an_error_the_last_output_is_reported(self, text: str, words: str) -> None:
        assert error_from_output(text) == words

    @given(st.text(max_size=300))
    def test_arbitrary_output_becomes_one_line(self, text: str) -> None:
        assert 0 < len(error_from_output(text)) <= 300
        assert len(error_from_output(text).splitlines()) == 1


def test_the_load_time_is_read_from_the_output() -> None:
    assert load_ms_from_output(f"{STAMP} [I] Engine loaded in 0.0253 sec.\n") == pytest.approx(25.3)
    parts = f"{STAMP} [I] Engine loaded in 0.004 sec.\n{STAMP} [I] Engine deserialized in 9e-05 sec.\n"
    assert load_ms_from_output(parts) == pytest.approx(4.09)
    assert load_ms_from_output("") == 0


def test_the_difference_of_the_protocol_is_one_line() -> None:
    assert "\n" not in trtexec.PROTOCOL_DIFFERENCE
    assert all(word in trtexec.PROTOCOL_DIFFERENCE for word in ("back to back", "no predecessor", "uploaded"))
