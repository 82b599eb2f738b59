"""Artefacts that are stale, damaged or edited are refused by name: a plan from mixed parts would ship wrong numbers."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mess_compile.runtime.bundle.archive import file_of, open_archive, write_archive
from tests.commands import ANY_SPEED, complaint, contents, done, edit, first, overwrite, refused, run

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "brief_profile")


@pytest.fixture(scope="module")
def other_graphs(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(shutil.copytree(finished, tmp_path_factory.mktemp("other") / "workspace"))
    done("-C", root, "export", "--confidence", "entropy")
    return root


class TestStale:
    """After another export nothing old may be mixed with the new graphs."""

    @pytest.fixture
    def exported_again(self, other_graphs: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(other_graphs, tmp_path / "workspace", copy_function=os.link))

    def test_a_profile_of_other_graphs(self, exported_again: Path) -> None:
        message = refused(exported_again, "search")
        assert "latency table of host was made from other graphs" in message
        assert "mess-compile profile --device host" in message

    def test_a_plan_for_other_graphs(self, exported_again: Path) -> None:
        assert "run `mess-compile search`" in refused(exported_again, "bundle")

    def test_statistics_of_another_gate_without_data_to_renew_them(self, exported_again: Path) -> None:
        done("-C", exported_again, "profile")
        edit(exported_again / "workspace.json", lambda content: content.update(data=None))
        message = refused(exported_again, "search")
        assert "the evaluation is of another gate" in message
        assert "mess-compile evaluate" in message

    def test_statistics_are_renewed_when_the_data_are_known(self, exported_again: Path) -> None:
        old = contents(exported_again / "statistics")
        done("-C", exported_again, "profile")
        done("-C", exported_again, "search")
        assert contents(exported_again / "statistics") != old

    def test_a_bundle_of_another_network(self, workspace: Path, finished: Path) -> None:
        edit(
            workspace / "graphs" / "index.json",
            lambda content: content["candidate"].update(identity="1" * 64),
        )
        edit(
            workspace / "latency" / "host.json",
            lambda content: content.update(network="1" * 64, recipes={"fp32": "1" * 64}),
        )
        assert "holds another network" in refused(workspace, "bench", finished / "host.mess")

    @pytest.mark.parametrize("command", ["evaluate", "profile", "bundle"])
    def test_a_graph_that_was_edited_or_is_missing(self, workspace: Path, command: str) -> None:
        for path in (workspace / "graphs").glob("head-*.onnx"):
            overwrite(path, path.read_bytes()[:200])
        message = complaint("-C", workspace, command)
        assert "head-exit" in message
        for path in (workspace / "graphs").glob("*.onnx"):
            path.unlink()
        assert ".onnx" in complaint("-C", workspace, command)


class TestBundle:
    @pytest.mark.parametrize("command", ["run", "bench", "verify", "inspect"])
    @pytest.mark.parametrize("damage", ["truncated", "edited", "appended", "empty", "missing", "another file"])
    def test_a_damaged_one_is_refused_before_it_runs(self, workspace: Path, command: str, damage: str) -> None:
        bundle = workspace / "host.mess"
        content = bytearray(bundle.read_bytes())
        if damage == "edited":
            content[len(content) // 2] ^= 1
        bundle.unlink()
        if damage == "another file":
            bundle.write_bytes((workspace / "data" / "classes.txt").read_bytes())
        elif damage != "missing":
            length = {"truncated": len(content) // 2, "empty": 0}.get(damage, len(content))
            bundle.write_bytes(bytes(content[:length]) + (b"x" if damage == "appended" else b""))
        image = first(workspace / "data" / "test" / "images")
        extra = {"run": (image, "-o", workspace / "predictions"), "bench": ("--split", "test")}.get(command, ())
        assert "host.mess" in refused(workspace, command, bundle, *extra)

    def test_one_that_computes_something_else_fails_its_golden_frames(self, workspace: Path) -> None:
        bundle = workspace / "host.mess"
        archive = open_archive(bundle)
        sources = {name: (archive.folder / name).read_bytes() for name in archive.manifest.files}
        manifest = archive.manifest
        archive.close()
        labels = bytearray(sources["golden/0.labels.npy"])
        labels[-100:] = bytes(7 for _ in range(100))
        sources["golden/0.labels.npy"] = bytes(labels)
        files = {name: file_of(content) for name, content in sources.items()}
        bundle.unlink()
        write_archive(bundle, replace(manifest, files=files), sources)
        result = run("verify", bundle, "--json", *ANY_SPEED)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert "golden/0.npy" in result.stderr
        content = json.loads(result.stdout)
        assert [check["passed"] for check in content["checks"]] == [True, True, False, True, True, True, True]


JSON = {
    "workspace.json": [("inspect", "statistics"), ("search",), ("profile",)],
    "candidate/network.json": [("export",)],
    "graphs/index.json": [("inspect", "graphs"), ("evaluate",), ("profile",), ("search",), ("bundle",)],
    "latency/host.json": [("inspect", "latency"), ("search",)],
    "statistics/val/statistics.json": [("inspect", "statistics")],
    "plans/host.json": [("inspect", "plan"), ("bundle",)],
}


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "[" * 20000, '{"format": 1, "version": 1}', "\x00", "9" * 5000],
    ids=["empty", "truncated", "a list", "null", "deep", "format", "binary", "a long number"],
)
def test_an_artefact_that_is_not_what_it_was(workspace: Path, name: str, text: str) -> None:
    overwrite(workspace / name, text.encode())
    for command in JSON[name]:
        assert name in refused(workspace, *command)


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("workspace.json", ("device",), ["host"]),
        ("candidate/network.json", ("width",), "wide"),
        ("candidate/network.json", ("input_hw",), [0, 96]),
        ("candidate/network.json", ("exit_blocks",), []),
        ("candidate/network.json", ("heads", 0), "exit9.fcn-crm1-b0"),
        ("graphs/index.json", ("candidate", "input_hw", 0), 10**12),
        ("graphs/index.json", ("candidate", "heads"), []),
        ("graphs/index.json", ("candidate", "baseline"), "exit1.fcn-crm1-b0"),
        ("graphs/index.json", ("gate", "confidence"), "luck"),
        ("graphs/index.json", ("baseline_alone",), "a" * 64),
        ("graphs/index.json", ("graphs", 0, "path"), "../../etc/passwd"),
        ("graphs/index.json", ("graphs", 0, "inputs", 0, "dtype"), "object"),
        ("latency/host.json", ("entries", 0, "mean_ms"), -1),
        ("latency/host.json", ("entries", 0, "runs"), float("inf")),
        ("latency/host.json", ("entries", 0, "source"), "guessed"),
        ("latency/host.json", ("entries", 0), None),
        ("statistics/val/statistics.json", ("cells", 0), 0),
        ("statistics/val/statistics.json", ("image_id",), []),
        ("statistics/val/statistics.json", ("sha256", "counts"), ""),
        ("statistics/val/statistics.json", ("gate",), None),
        ("statistics/val/statistics.json", ("baseline_alone",), "a" * 64),
        ("plans/host.json", ("plan", "stages"), []),
        ("plans/host.json", ("plan", "setting"), "sometimes"),
        ("plans/host.json", ("certificate", "space"), "all"),
    ],
)
def test_a_value_out_of_place(workspace: Path, name: str, keys: tuple[Any, ...], value: Any) -> None:
    def put(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    edit(workspace / name, put)
    for command in JSON[name]:
        refused(workspace, *command)


@pytest.mark.parametrize(
    ("field", "value"),
    [("row", 99), ("row", -1), ("exit_point", 3), ("head", "exit1.dlb-crm8-b3"), ("cut", 10**6), ("cut", -1)],
)
def test_a_plan_whose_stages_do_not_fit_the_graphs(workspace: Path, field: str, value: Any) -> None:
    edit(workspace / "plans" / "host.json", lambda content: content["plan"]["stages"][0].update({field: value}))
    refused(workspace, "bundle")


def test_a_plan_for_an_unknown_device_does_not_write_elsewhere(workspace: Path) -> None:
    edit(workspace / "plans" / "host.json", lambda content: content["plan"].update(device="../../escaped"))
    assert "escaped" in refused(workspace, "bundle")


def test_an_array_of_the_statistics_that_was_changed(workspace: Path) -> None:
    path = workspace / "statistics" / "val" / "counts.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    overwrite(path, bytes(content))
    edit(workspace / "workspace.json", lambda content: content.update(data=None))
    assert "counts.npy is damaged" in refused(workspace, "search")
