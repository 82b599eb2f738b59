"""Engines are built once, for the graphs they belong to; one that fails, or kills its builder, costs no other."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from mess_compile import files
from mess_compile.engines import build as building
from mess_compile.engines.build import build_engines
from mess_compile.graph.cut import cut_network
from mess_compile.nets.export import export_network
from mess_compile.network import Gate, GraphSet, HeadConfig, read_graph_set, write_graph_set
from mess_compile.runtime.base.errors import InputError
from mess_compile.targets import Target, find_target
from tests.commands import printed_json, run
from tests.engines.crashing import BROKEN, dies_at_one
from tests.graph import tiny
from tests.networks import random_network

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install mess-compile[rtx]")

HEADS = ((1, HeadConfig("fcn", 4, 2, rdi=True)), (2, HeadConfig("sep", 8)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = export_network(random_network(HEADS), tmp_path_factory.mktemp("graphs")).parent
    write_graph_set(cut_network(root, Gate(), tiny.nothing))
    return root


@pytest.fixture(scope="module")
def built(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    build(read_graph_set(exported), folder)
    return folder


@pytest.fixture
def graphs(exported: Path, tmp_path: Path) -> GraphSet:
    return read_graph_set(Path(shutil.copytree(exported, tmp_path / "graphs")))


@pytest.fixture
def few(graphs: GraphSet) -> GraphSet:
    """The graph that tests break, and three others."""
    chosen = {BROKEN, *sorted(graphs.graphs.keys() - {BROKEN})[:3]}
    return replace(graphs, graphs={name: spec for name, spec in graphs.graphs.items() if name in chosen})


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "engines"))


def ampere() -> Target:
    return replace(find_target("rtx-4090", Path()), name="ampere", compute_capability=(8, 6))


def build(graphs: GraphSet, folder: Path, jobs: int = 2) -> building.EngineSet:
    return build_engines(graphs, ampere(), folder, jobs, tiny.nothing)


def names(graphs: GraphSet, folder: Path) -> set[str]:
    """The graphs that a call builds anew."""
    before = {entry.key: entry for entry in building.entries_in(folder)}
    counts: list[int] = []
    found = build_engines(graphs, ampere(), folder, 1, lambda label, done, total: counts.append(done))
    assert counts[-1] == len(graphs.graphs)
    for entry in found.entries:
        assert entry.error is not None or files.sha256_of_file(folder / f"{entry.key}.engine") == entry.sha256
    new = {entry.graph for entry in found.entries if before.get(entry.key) != entry}
    assert found.built == len(new)
    return new


def test_every_graph_is_built_once(graphs: GraphSet, folder: Path) -> None:
    kept = building.entries_in(folder)
    assert {entry.graph for entry in kept} == set(graphs.graphs)
    assert [entry.error for entry in kept] == [None] * len(kept)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert names(graphs, folder) == set()
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def changed_bias(graphs: GraphSet, name: str) -> GraphSet:
    """The graph set after one weight of one graph changed, as an export would write it."""
    path = graphs.path(name)
    model = onnx.load(str(path), load_external_data=False)
    weight = next(t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL and t.raw_data)
    weight.raw_data = weight.raw_data[4:] + weight.raw_data[:4]
    onnx.save(model, str(path))
    spec = replace(graphs.spec(name), sha256=files.sha256_of_file(path))
    return replace(graphs, graphs={**graphs.graphs, name: spec})


def test_a_head_with_other_weights_is_the_only_one_built_again(graphs: GraphSet, folder: Path) -> None:
    old = {entry.graph: entry.key for entry in building.entries_in(folder)}[BROKEN]
    assert names(changed_bias(graphs, BROKEN), folder) == {BROKEN}
    assert not (folder / f"{old}.engine").exists(), "engines of graphs that are gone would fill the disk"


@pytest.mark.parametrize("damage", [b"", b"another device's engine", None])
def test_a_damaged_foreign_or_missing_engine_is_built_again(
    graphs: GraphSet, folder: Path, damage: bytes | None
) -> None:
    entry = building.entries_in(folder)[0]
    path = folder / f"{entry.key}.engine"
    path.unlink() if damage is None else path.write_bytes(damage)
    build(graphs, folder)
    assert files.sha256_of_file(path) == entry.sha256


@pytest.mark.parametrize("text", ["", "{", '{"format": "mess-engines", "version": 1, "entries": [{"key": "../../x"}]}'])
def test_a_damaged_index_costs_time_only(few: GraphSet, folder: Path, text: str) -> None:
    (folder / "index.json").write_text(text)
    found = build(few, folder, jobs=1)
    assert found.built == len(few.graphs)
    assert not found.failed


def in_precision(graphs: GraphSet, precision: str) -> GraphSet:
    spec = replace(graphs.spec(BROKEN), precision=precision)
    return replace(graphs, graphs={**graphs.graphs, BROKEN: spec})


def test_another_capability_precision_or_library_version_is_another_engine(graphs: GraphSet) -> None:
    keys = {
        building._job(in_precision(graphs, precision), BROKEN, target, version, Path()).key
        for target in (ampere(), replace(ampere(), compute_capability=(8, 9)), replace(ampere(), name="other"))
        for version in ("1.7.1", "1.7.2")
        for precision in ("fp32", "fp16")
    }
    assert len(keys) == 12


def with_operator(graphs: GraphSet, name: str, old: str, new: str) -> GraphSet:
    model = onnx.load(str(graphs.path(name)), load_external_data=False)
    next(node for node in model.graph.node if node.op_type == old).op_type = new
    onnx.save(model, str(graphs.path(name)))
    spec = replace(graphs.spec(name), sha256=files.sha256_of_file(graphs.path(name)))
    return replace(graphs, graphs={**graphs.graphs, name: spec})


def test_a_graph_that_does_not_build_is_named_and_the_rest_goes_on(few: GraphSet, tmp_path: Path) -> None:
    found = build(with_operator(few, BROKEN, "Relu", "Det"), tmp_path / "new")
    (failed,) = found.failed
    assert failed.graph == BROKEN
    assert failed.error is not None
    assert "Det" in failed.error
    assert found.built == len(few.graphs) - 1
    assert len(list((tmp_path / "new").glob("*.engine"))) == len(few.graphs) - 1


def test_a_weight_that_changed_after_export_is_never_built(graphs: GraphSet, tmp_path: Path) -> None:
    for weight in (graphs.root / "weights").iterdir():
        weight.write_bytes(bytes(weight.stat().st_size))
    found = build(graphs, tmp_path / "new")
    assert any("was changed after export" in str(entry.error) for entry in found.failed)


def test_a_builder_that_crashes_costs_its_graph_alone(
    few: GraphSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "_build", dies_at_one)
    found = build(few, tmp_path / "new")
    assert [(entry.graph, "crashed" in str(entry.error)) for entry in found.failed] == [(BROKEN, True)]
    assert {entry.graph for entry in found.entries} == set(few.graphs)


def begun(workspace: Path) -> subprocess.Popen[str]:
    """A build that has finished its first graph, in a process group of its own."""
    command = [sys.executable, "-m", "mess_compile", "-C", str(workspace), "build", "--device", "rtx-4090"]
    process = subprocess.Popen([*command, "--jobs", "1"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not index_of(workspace).exists() and process.poll() is None:
        time.sleep(0.01)
    return process


def index_of(workspace: Path) -> Path:
    return workspace / "engines" / "rtx-4090" / "fp32" / "index.json"


def ends(group: int) -> bool:
    """Whether a process group is empty within 20 seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("times", [1, 3])
def test_an_interrupted_build_ends_at_once_and_continues(workspace: Path, times: int) -> None:
    process = begun(workspace)
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process gets it
        time.sleep(0.02)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert ends(process.pid)
    if times == 1:
        assert errors.splitlines()[-1].startswith("stopped: finished engines are kept")
        assert "Traceback" not in errors
    kept = len(building.entries_in(index_of(workspace).parent))
    (found,) = (each["engines"] for each in printed_json("-C", workspace, "build", "--device", "rtx-4090")["builds"])
    assert not [entry["error"] for entry in found["entries"] if entry["error"]]
    assert found["built"] == len(found["entries"]) - kept > 0
    left = [path.name for path in index_of(workspace).parent.iterdir() if path.suffix not in (".engine", ".json")]
    assert not left, "half-made graphs are gone"


def test_builders_do_not_outlive_a_killed_build(workspace: Path) -> None:
    process = begun(workspace)
    process.kill()
    process.communicate(timeout=60)
    assert ends(process.pid)


def test_two_builds_of_one_target_do_not_share_a_folder(graphs: GraphSet, folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(InputError, match="another process builds in"):
            build(graphs, folder)
    finally:
        os.close(descriptor)


def test_graphs_that_are_gone_leave_no_engines(graphs: GraphSet, folder: Path) -> None:
    less = replace(graphs, graphs={name: spec for name, spec in graphs.graphs.items() if name != BROKEN})
    assert build(less, folder).built == 0
    assert {entry.graph for entry in building.entries_in(folder)} == set(less.graphs)
    assert len(list(folder.glob("*.engine"))) == len({entry.key for entry in building.entries_in(folder)})


def test_a_graph_that_upsets_a_library_is_a_failure_of_its_own(few: GraphSet, tmp_path: Path) -> None:
    path = few.path(BROKEN)
    model = onnx.load(str(path), load_external_data=False)
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    del conv.input[1:]
    onnx.save(model, str(path))
    spec = replace(few.spec(BROKEN), sha256=files.sha256_of_file(path))
    turing = replace(ampere(), compute_capability=(7, 5))
    wrong = replace(few, graphs={**few.graphs, BROKEN: spec})
    found = build_engines(wrong, turing, tmp_path / "new", 2, tiny.nothing)
    assert [entry.graph for entry in found.failed] == [BROKEN]
    assert found.built == len(few.graphs) - 1


def test_what_builds_no_engines_says_so(workspace: Path) -> None:
    result = run("-C", workspace, "build", "--device", "host")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: host needs no engines: ONNX Runtime compiles each graph when it loads it")


def test_graphs_that_were_changed_are_refused(workspace: Path) -> None:
    path = next((workspace / "graphs").glob("head-*.onnx"))
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content + b" ")
    result = run("-C", workspace, "build", "--device", "rtx-4090")
    assert result.exit_code == 1
    assert "was changed after export" in result.stderr
    assert InputError.__name__ not in result.stderr
