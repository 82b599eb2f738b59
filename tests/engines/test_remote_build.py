"""`build --host`, and several devices of one kind: a real sshd each, TensorRT 8.5's stand-in, nothing else made up."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mess_compile import steps
from mess_compile.device.remote import RemoteError
from mess_compile.files import sha256_of_file
from mess_compile.latency.table import read_latency_table
from mess_compile.network import read_graph_set
from mess_compile.runtime.measure import measure
from mess_compile.runtime.measure.job_pool import PSEUDO_GRAPHS
from mess_compile.workspace import Workspace
from tests.commands import complaint, done, printed_json
from tests.conftest import EFFORT, quiet
from tests.remote_device import remote_device
from tests.tensorrt_device import Xavier, as_xavier


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Xavier]:
    with remote_device(tmp_path_factory.mktemp("device")) as device:
        yield as_xavier(device, "one")


@pytest.fixture
def xavier(running: Xavier, monkeypatch: pytest.MonkeyPatch) -> Xavier:
    running.restore()
    monkeypatch.setenv("PATH", f"{running.device.path_folder()}:{os.environ['PATH']}")
    monkeypatch.setattr(measure, "Effort", lambda: EFFORT)
    return running


def form_of(workspace: Path, graph: str, xavier: Xavier) -> str:
    """The hash of a graph as TensorRT 8.5 takes it."""
    from mess_compile import targets
    from mess_compile.engines import build as building

    target = targets.find_target("xavier", workspace)
    forms = building.target_forms(
        read_graph_set(workspace / "graphs"), target, Workspace(workspace).forms("xavier"), quiet
    )
    return sha256_of_file(forms.paths[graph])


def test_engines_are_built_on_the_device_once_and_the_host_is_remembered(workspace: Path, xavier: Xavier) -> None:
    graphs = read_graph_set(workspace / "graphs").graphs
    (first,) = printed_json("-C", workspace, "build", "--device", "xavier", "--host", xavier.host)["builds"]
    assert first["engines"]["library_version"] == "8.5.2.2"
    assert first["engines"]["built"] == len(xavier.built) == len(graphs)
    assert {entry["graph"]: entry["error"] for entry in first["engines"]["entries"]} == dict.fromkeys(graphs)
    engines = {path.stem: path.stat().st_size for path in xavier.device.home.glob(".mess-compile/engines/*.engine")}
    assert {entry["key"]: entry["bytes"] for entry in first["engines"]["entries"]} == engines
    shown = done("-C", workspace, "build", "--device", "xavier")
    assert f"{len(graphs)} engines of {len(graphs)} graphs in fp32 for xavier, 0 built now, " in shown
    assert f"in {xavier.host}, ~/" in shown
    assert shown.endswith("profile --device xavier\n")
    assert Workspace(workspace).memory().device == "host", "nothing was profiled"
    assert not (workspace / "engines").exists()


@pytest.mark.slow
def test_profile_takes_the_engines_that_build_made(workspace: Path, xavier: Xavier) -> None:
    done("-C", workspace, "build", "--device", "xavier", "--host", xavier.host)
    built = xavier.built
    done("-C", workspace, "profile", "--device", "xavier", "--all")
    assert xavier.built == built


@pytest.mark.slow
def test_a_build_that_is_cut_is_continued_by_the_same_command(workspace: Path, xavier: Xavier) -> None:
    xavier.wish("slow")
    seen: list[int] = []

    def watch(label: str, finished: int, total: int) -> None:
        if label == "build there":
            seen.append(finished)
            if finished == 4:
                xavier.device.cut()

    def build(progress: object) -> int:
        (built,) = steps.build(
            Workspace(workspace),
            "xavier",
            steps.EngineOptions(host=xavier.host),
            steps.Reporter(progress),  # type: ignore[arg-type]
        )
        return built.engines.built

    with pytest.raises(RemoteError, match="connection was lost"):
        build(watch)
    assert seen[:4] == [1, 2, 3, 4], "one after the other, as they are done"
    xavier.wish("")
    begun = len(xavier.built)
    graphs = read_graph_set(workspace / "graphs").graphs
    assert build(quiet) <= len(graphs) - 4
    assert 4 <= begun < len(graphs)
    assert len(xavier.built) <= len(graphs) + 1, "but for the one that was under way nothing is built twice"


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "words"), [("break", "no kernel for it"), ("crash", "builder crashed on the device")])
def test_a_graph_that_does_not_build_there_is_named(workspace: Path, xavier: Xavier, verb: str, words: str) -> None:
    name = "head-exit1.fcn-crm1-b0"
    xavier.wish(verb, form_of(workspace, name, xavier))
    shown = done("-C", workspace, "build", "--device", "xavier", "--host", xavier.host)
    total = len(read_graph_set(workspace / "graphs").graphs)
    assert f"{total - 1} engines of {total} graphs" in shown
    assert re.search(rf"FAILED  {re.escape(name)} \(fp32\): .*{words}", shown)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "host"), "host needs no engines: ONNX Runtime compiles each graph when it loads it"),
        (("--device", "xavier", "--jobs", "2"), "engines are built one at a time"),
        pytest.param(("--device", "orin"), "is not 'orin'", marks=pytest.mark.slow),
        (("--device", "xavier", "--precision", "fp8"), "xavier computes in fp32, fp16, int8, not in 'fp8'"),
    ],
    ids=["host", "jobs", "orin", "fp8"],
)
def test_what_cannot_be_built_there_is_one_line(
    workspace: Path, xavier: Xavier, options: tuple[str, ...], words: str
) -> None:
    assert words in complaint("-C", workspace, "build", *options, "--host", xavier.host)
    assert not xavier.built


@pytest.fixture
def second(
    tmp_path_factory: pytest.TempPathFactory, xavier: Xavier, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Xavier]:
    """Another Xavier, and an `ssh` on PATH that lets in to both."""
    with remote_device(tmp_path_factory.mktemp("second")) as device:
        other = as_xavier(device, "two")
        folder = tmp_path_factory.mktemp("both")
        text = "".join(
            f'Match originalhost 127.0.0.1 exec "test %p = {each.port}"\n'
            f"IdentityFile {each.folder / 'key'}\nUserKnownHostsFile {each.folder / 'known'}\n"
            for each in (xavier.device, device)
        )
        (folder / "config").write_text(text)
        system = (xavier.device.folder / "ssh-on-path" / "ssh").read_text().split()[2]
        common = "-o GlobalKnownHostsFile=/dev/null -o IdentitiesOnly=yes -o IdentityAgent=none"
        (folder / "ssh").write_text(f'#!/bin/sh\nexec {system} -F {folder / "config"} {common} "$@"\n')
        (folder / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        yield other


@pytest.mark.slow
def test_two_devices_of_one_kind_share_the_work(workspace: Path, xavier: Xavier, second: Xavier) -> None:
    both = ("--host", xavier.host, "--host", second.host)
    shown = done("-C", workspace, "profile", "--device", "xavier", *both, "--all", "-v")
    graphs = read_graph_set(workspace / "graphs").graphs
    tables = [read_latency_table(path) for path in sorted((workspace / "latency").glob("xavier*.json"))]
    assert len(tables) == 2
    first, other = sorted(tables, key=lambda table: table.environment["host"] != xavier.host)
    assert first.environment["identity"] != other.environment["identity"]
    measured = [{k[0] for k, e in t.entries.items() if e.source == "measured"} for t in (first, other)]
    assert measured[0] | measured[1] == {*graphs, *PSEUDO_GRAPHS}
    assert measured[0] & measured[1] >= {"baseline", *PSEUDO_GRAPHS}
    assert all(not each >= graphs.keys() for each in measured), "neither has done it all"
    assert {k[0] for k in first.entries} == {k[0] for k in other.entries} == {*graphs, *PSEUDO_GRAPHS}
    assert re.search(rf"{re.escape(second.host)} \(\w{{12}}, tensorrt 8.5.2.2\) takes \d.\d\dx as long", shown)
    assert Workspace(workspace).memory().hosts["xavier"] == xavier.host
    assert not list((workspace / "latency").glob("*.samples.jsonl"))
    done("-C", workspace, "profile", "--device", "xavier", *both, "--requirement", "--max-err 100%")
    assert printed_json("-C", workspace, "search", "--max-err", "100%")["source"] == "measured"


def test_one_device_is_not_named_twice(workspace: Path, xavier: Xavier) -> None:
    message = complaint("-C", workspace, "profile", "--device", "xavier", "--host", xavier.host, "--host", xavier.host)
    assert f"--host {xavier.host} is named twice: name each device once" in message
