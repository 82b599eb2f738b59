"""From engines to a bundle on a device of TensorRT's: what fails or falls back there must show all the way down.

The device is the stand-in for CUDA and TensorRT 8.5, whose engines ONNX Runtime computes; the builder copies a graph.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mess_compile import runtime, steps
from mess_compile.engines import build as building
from mess_compile.engines import process_pool
from mess_compile.evaluate.statistics import read_statistics
from mess_compile.latency.table import read_latency_table
from mess_compile.runtime.base.errors import EngineError
from mess_compile.runtime.engines import tensorrt_build, tensorrt_engine
from mess_compile.runtime.engines.cuda import Cuda
from mess_compile.runtime.engines.tensorrt_build import BuildOptions, Built
from mess_compile.runtime.machine import machine, power
from mess_compile.runtime.machine.machine import Gpu, InstalledLibrary, Machine
from mess_compile.runtime.measure import measure
from mess_compile.runtime.serve import verify
from mess_compile.search.plan import read_result
from mess_compile.workspace import Workspace
from tests.commands import ANY_SPEED, complaint, done, printed_json, run
from tests.conftest import EFFORT
from tests.runtime.cuda_standin import Driver
from tests.runtime.tensorrt_standin import make_module, write_engine

VERSION = "8.5.2.2"
XAVIER = Machine((Gpu("Xavier", (7, 2), 30.0),), "Jetson-AGX", "35.4.1", (InstalledLibrary("tensorrt", VERSION),))


@dataclasses.dataclass
class Device:
    """The stand-in's builder: graphs in `broken` do not build, `built` counts those that did."""

    folder: Path
    broken: set[str] = dataclasses.field(default_factory=set)
    built: list[str] = dataclasses.field(default_factory=list)

    def build(self, path: Path, options: BuildOptions, timing_cache: bytes | None = None) -> Built:
        if path.stem in self.broken:
            raise EngineError(f"{path.name} does not build: no kernel for it")
        self.built.append(path.stem)
        kept = Path(shutil.copy(path, self.folder / f"{len(self.built)}-{path.name}"))
        if (path.parent / "weights").is_dir():
            shutil.copytree(path.parent / "weights", self.folder / "weights", dirs_exist_ok=True)
        engine = write_engine(self.folder / "engine", kept, VERSION).read_bytes()
        return Built(engine, 0.1, (timing_cache or b"") + b"t")


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """This machine becomes a Xavier."""
    driver, place = Driver(), Device(tmp_path / "device")
    place.folder.mkdir()
    monkeypatch.setattr(machine, "this_machine", lambda: XAVIER)
    monkeypatch.setattr(tensorrt_engine, "open_cuda", lambda: Cuda(driver))
    monkeypatch.setitem(sys.modules, "tensorrt", make_module(VERSION, driver))
    monkeypatch.setattr(tensorrt_build, "build_engine", place.build)
    monkeypatch.setattr(process_pool, "results", in_process)
    monkeypatch.setattr(measure, "Effort", lambda: EFFORT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield place
    assert driver.faults == []


def in_process(work: Callable[[Any], Any], jobs: Sequence[Any], processes: int, crashed: object) -> Iterator[Any]:
    assert processes == 1, "classic TensorRT builds one engine at a time"
    return map(work, jobs)


def plan_of(workspace: Path) -> Any:
    return read_result(Workspace(workspace).plan("xavier")).plan


def test_a_graph_that_does_not_build_is_in_no_plan_and_the_rest_goes_on(workspace: Path, device: Device) -> None:
    device.broken = {"head-exit1.fcn-crm1-b0", "segment-1-2"}
    shown = done("-C", workspace, "profile", "--device", "xavier")
    assert "FAILED  segment-1-2 (fp32), in no plan: segment-1-2.onnx does not build: no kernel for it" in shown
    table = read_latency_table(workspace / "latency" / "xavier.json")
    assert {graph for graph, _ in table.failed} == device.broken
    assert not {graph for graph, _ in table.entries} & device.broken
    content = printed_json("-C", workspace, "search", "--optimise", "accuracy")
    for plan in (content["plan"], *content["front"]):
        assert not {graph["name"] for graph in plan["graphs"]} & device.broken
    assert "exit2" in str(content["front"]), "exit 2 is reached without the segment from exit 1"
    assert "segment-1-2 in fp32 is in no plan" in done("-C", workspace, "inspect", "latency")


def test_the_bundle_computes_on_the_device_what_was_evaluated(
    workspace: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = building.prepare_graph
    monkeypatch.setattr(building, "prepare_graph", lambda *graph: prepare(*graph) or ("as if it were rewritten",))
    done("-C", workspace, "profile", "--device", "xavier")
    assert "(onnxruntime on host)" in done("-C", workspace, "search", "--optimise", "accuracy", "-v")
    done("-C", workspace, "bundle")
    bundle = workspace / "xavier.mess"
    assert weights_inside(bundle) == []
    before = len(device.built)
    assert done("verify", bundle, "-v", *ANY_SPEED).count("ok  ") == 7
    graphs = len(plan_of(workspace).graphs)
    assert len(device.built) == before + graphs, "a bundle's engines are built where it runs"
    done("verify", bundle, *ANY_SPEED)
    assert len(device.built) == before + graphs, "once"
    result = printed_json("-C", workspace, "bench", bundle, "--passes", "1")
    assert result["replayed"]["exit_rates"] == result["measured"]["exit_rates"]
    assert result["disagreements"] == []
    engine = next((workspace.parent / "cache" / "mess-compile" / "engines").glob("*.engine"))
    engine.write_bytes(b"an engine from elsewhere")
    done("verify", bundle, *ANY_SPEED)
    assert len(device.built) == before + graphs + 1, "what is not ours is built again, never loaded"


def weights_inside(bundle: Path) -> list[str]:
    """Weights that lie in a graph's own file, where those of a large head would make it too large to be loaded."""
    with zipfile.ZipFile(bundle) as content:
        graphs = [onnx.load_from_string(content.read(name)) for name in content.namelist() if name.endswith(".onnx")]
    return [tensor.name for graph in graphs for tensor in graph.graph.initializer if len(tensor.raw_data) >= 1024]


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="there is no ssh-keygen")
def test_engines_in_a_bundle_are_used_where_it_is_signed_by_somebody_known(workspace: Path, device: Device) -> None:
    done("-C", workspace, "profile", "--device", "xavier")
    done("-C", workspace, "search")
    key, allowed = workspace.parent / "key", workspace.parent / "allowed"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    allowed.write_text(f"maker {key.with_suffix('.pub').read_text()}")
    before = len(device.built)
    done("-C", workspace, "bundle", "--engines", "--sign", key)
    assert len(device.built) == before, "they were built to be profiled"
    bundle = workspace / "xavier.mess"
    assert "signature: by maker" in done("verify", bundle, "-v", "--allowed-signers", allowed, *ANY_SPEED)
    assert len(device.built) == before, "no build: the signer is known"
    shutil.rmtree(workspace.parent / "cache")
    done("verify", bundle, *ANY_SPEED)
    assert len(device.built) == before + len(plan_of(workspace).graphs), "engines of who knows whom are built anew"


def test_an_engine_folder_that_others_can_write_is_refused(workspace: Path, device: Device) -> None:
    done("-C", workspace, "profile", "--device", "xavier")
    done("-C", workspace, "search")
    done("-C", workspace, "bundle")
    folder = workspace.parent / "cache" / "mess-compile" / "engines"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "others can write to" in complaint("verify", workspace / "xavier.mess")
    assert not list(folder.iterdir())


def test_statistics_of_the_device_itself_come_first(workspace: Path, device: Device) -> None:
    done("-C", workspace, "profile", "--device", "xavier")
    shown = done("-C", workspace, "evaluate", "--device", "xavier", "--split", "val[:8]")
    assert "8 images of val[:8], tensorrt fp32 on xavier" in shown
    here = done("-C", workspace, "evaluate", "--split", "val[:8]")
    assert "onnxruntime fp32 on host" in here
    there, ours = (
        read_statistics(Workspace(workspace).statistics("val[:8]", "fp32", name)) for name in ("xavier", "host")
    )
    np.testing.assert_array_equal(there.counts, ours.counts)
    assert "(tensorrt on xavier)" in done("-C", workspace, "search", "-v")


def test_heads_without_engines_have_no_statistics(workspace: Path, device: Device) -> None:
    device.broken = {"head-exit1.fcn-crm1-b0", "segment-1-2"}
    done("-C", workspace, "profile", "--device", "xavier")
    done("-C", workspace, "evaluate", "--device", "xavier")
    found = read_statistics(Workspace(workspace).statistics("val", "fp32", "xavier"))
    assert "exit1.fcn-crm1-b0" not in found.heads
    assert any(head.startswith("exit2.") for head in found.heads), "a longer segment leads there"
    done("-C", workspace, "search")


def test_recipes_share_one_search_and_the_fallbacks_are_told(workspace: Path, device: Device) -> None:
    shown = done("-C", workspace, "profile", "--device", "xavier", "--precision", "fp32,fp16")
    assert " ms in fp16" in shown
    content = printed_json("-C", workspace, "search", "--max-err", "100%")
    assert {point["precision"] for point in content["front"]} <= {"fp32", "fp16"}
    smallest = ("search", "--optimise", "memory", "--precision", "fp16")  # whatever the times of the next profile
    only = printed_json("-C", workspace, *smallest)
    assert only["plan"]["precision"] == "fp16"
    assert {graph["precision"] for graph in only["plan"]["graphs"]} == {"fp16", "fp32"}, "output graphs are fp32"
    index = workspace / "recipes" / "fp16" / "index.json"
    lowered = json.loads(index.read_text())
    name = only["plan"]["graphs"][0]["name"]
    next(spec for spec in lowered["graphs"] if spec["name"] == name).update(precision="fp32")
    index.unlink()
    index.write_text(json.dumps(lowered))
    done("-C", workspace, "profile", "--precision", "fp32,fp16")
    shown = done("-C", workspace, *smallest, "-v")
    assert f"{name} runs in fp32: in fp16 it lost too much" in shown
    done("-C", workspace, "bundle")
    assert f"graphs/{name}.onnx runs in fp32: in fp16 it lost too much" in done("inspect", workspace / "xavier.mess")
    assert done("verify", workspace / "xavier.mess", "-v", *ANY_SPEED).count("ok  ") == 7


def test_a_bundle_in_two_precisions_falls_back_from_one_to_the_other(workspace: Path, device: Device) -> None:
    done("-C", workspace, "profile", "--device", "xavier", "--precision", "fp32,fp16")
    plans = []
    for precision in ("fp16", "fp32"):
        done("-C", workspace, "search", "--optimise", "memory", "--precision", precision)
        plans.append(workspace / "plans" / f"{precision}.json")
        plans[-1].write_bytes((workspace / "plans" / "xavier.json").read_bytes())
    path = workspace / "both.mess"
    assert " for xavier:fp16, xavier:fp32\n" in done("-C", workspace, "bundle", *plans, "-o", path)
    with runtime.load(path, on_failure="fallback") as cascade:
        assert cascade.plan.name == "xavier:fp16"
        assert [executor.name for executor in cascade._chain._executors[:2]] == [
            "xavier:fp16 on tensorrt",
            "xavier:fp32 on tensorrt",
        ]
        assert cascade.refusals == ()
    image = next((workspace / "data" / "val" / "images").iterdir())
    for name in ("xavier:fp16", "xavier:fp32"):
        assert "FAILED" not in done("verify", path, "--target", name, *ANY_SPEED)
        done("run", path, image, "-o", workspace / "pictures", "--target", name)
    assert "no plan for the target xavier:int8; it has" in complaint("verify", path, "--target", "xavier:int8")
    assert "two of the plans are for xavier in fp16" in complaint("-C", workspace, "bundle", plans[0], plans[0])


@pytest.mark.parametrize(
    ("measured", "asked"), [("fp16", "fp32"), pytest.param("fp32", "fp16", marks=pytest.mark.slow)]
)
def test_an_estimate_in_one_precision_forgets_nothing_measured_in_another(
    workspace: Path, device: Device, measured: str, asked: str
) -> None:
    path = workspace / "latency" / "xavier.json"
    done("-C", workspace, "profile", "--device", "xavier", "--precision", measured)
    before = read_latency_table(path)
    done("-C", workspace, "profile", "--device", "xavier", "--estimate", "--precision", asked)
    after = read_latency_table(path)
    assert before.entries.items() <= after.entries.items()
    assert set(after.recipes) == {"fp32", "fp16"}
    assert after.entries["baseline", asked].source == "estimated"
    assert printed_json("-C", workspace, "search", "--precision", measured)["source"] == "measured"
    done("-C", workspace, "search", "--max-err", "100%")
    (workspace / "recipes" / "fp16" / "recipe.json").unlink(missing_ok=True)
    done("-C", workspace, "profile", "--device", "xavier", "--estimate")
    assert set(read_latency_table(path).recipes) == {"fp32"}, "a recipe that is gone cannot be searched"


@pytest.mark.slow
def test_a_sparse_profile_here_builds_only_what_it_measures(workspace: Path, device: Device) -> None:
    result = run("-C", workspace, "profile", "--device", "xavier", "--requirement", "--max-err 100%")
    assert result.exit_code == 0, result.stderr
    told = re.search(r"measured (\d+) of (\d+) graphs", result.stdout)
    assert told is not None
    table = read_latency_table(workspace / "latency" / "xavier.json")
    measured = {graph for (graph, _), entry in table.entries.items() if entry.source == "measured" and entry.runs}
    assert {graph for graph in measured if (workspace / "graphs" / f"{graph}.onnx").exists()} <= set(device.built)
    assert len(device.built) < int(told[2]), "engines take most of the time"
    assert printed_json("-C", workspace, "search", "--max-err", "100%")["source"] == "measured"
    built = len(device.built)
    done("-C", workspace, "profile", "--device", "xavier", "--all")
    assert len(device.built) == int(told[2]) > built, "what was built is taken again"
    assert read_latency_table(workspace / "latency" / "xavier.json").source == "measured"


@pytest.mark.slow
def test_a_sparse_profile_over_recipes_answers_as_a_whole_one_does(workspace: Path, device: Device) -> None:
    both, wish = ("--precision", "fp32,fp16"), ("--max-err", "100%", "--max-latency", "3x", "--optimise", "accuracy")
    done("-C", workspace, "profile", "--device", "xavier", *both, "--requirement", " ".join(wish))
    sparse = printed_json("-C", workspace, "search", *wish)
    assert sparse["source"] == "measured"
    table = read_latency_table(workspace / "latency" / "xavier.json")
    assert set(table.recipes) == {"fp32", "fp16"}
    for precision in table.recipes:
        assert table.entries["baseline", precision].source == "measured", "what both are held against"


@pytest.mark.slow
def test_a_sparse_profile_goes_around_what_does_not_build(workspace: Path, device: Device) -> None:
    device.broken = {"segment-1-2", "head-exit1.fcn-crm1-b0"}
    done("-C", workspace, "profile", "--device", "xavier", "--requirement", "--max-err 100%")
    table = read_latency_table(workspace / "latency" / "xavier.json")
    assert {graph for graph, _ in table.failed} <= device.broken
    plan = printed_json("-C", workspace, "search", "--max-err", "100%")
    assert plan["source"] == "measured"
    assert not {graph["name"] for graph in plan["plan"]["graphs"]} & device.broken


def test_a_recipe_that_was_not_profiled_is_named(workspace: Path, device: Device) -> None:
    done("-C", workspace, "profile", "--device", "xavier")
    assert (
        "xavier was profiled in fp32, not in 'int8': run `mess-compile profile --device xavier --precision fp32,int8`"
        in complaint("-C", workspace, "search", "--precision", "int8")
    )


def test_another_power_mode_is_another_device(workspace: Path, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def mode(name: str) -> None:
        monkeypatch.setattr(power, "read_state", lambda: power.DeviceState(power_mode=name))
        monkeypatch.setattr(verify, "read_state", power.read_state)

    mode("MODE_30W_ALL")
    done("-C", workspace, "profile", "--device", "xavier")
    done("-C", workspace, "search")
    done("-C", workspace, "bundle")
    assert "ok      power mode: MODE_30W_ALL" in done("verify", workspace / "xavier.mess", "-v", *ANY_SPEED)
    mode("MODE_10W")
    message = complaint("-C", workspace, "search")
    assert "was measured in power mode MODE_30W_ALL, and the mode is now MODE_10W: set it back, or run" in message
    result = run("verify", workspace / "xavier.mess")
    assert result.exit_code == 1
    assert "FAILED  power mode: MODE_10W; the plan's latencies were measured in MODE_30W_ALL" in result.stdout


def test_without_a_baseline_there_is_nothing_to_compare_with(workspace: Path, device: Device) -> None:
    device.broken = {"baseline"}
    done("-C", workspace, "profile", "--device", "xavier")
    message = complaint("-C", workspace, "search")
    assert "no baseline in fp32 runs on xavier" in message


def test_a_network_of_which_nothing_builds_is_refused(workspace: Path, device: Device) -> None:
    device.broken = {path.stem for path in (workspace / "graphs").glob("*.onnx")}
    assert "no head runs in fp32" in complaint("-C", workspace, "profile", "--device", "xavier")


def test_the_search_over_recipes_holds_plans_against_the_best_baseline(workspace: Path, device: Device) -> None:
    """A plan near a baseline that lost much would satisfy the figure and nobody."""
    done("-C", workspace, "profile", "--device", "xavier", "--precision", "fp32,fp16")
    (result,) = steps.search(Workspace(workspace), ("xavier",), None, steps.Requirement(max_err_pp=0.5))
    baselines = [
        max(100 * np.mean(ious(found, head)) for head in (found.heads[-1],))
        for found in (
            read_statistics(Workspace(workspace).statistics("val", recipe, "host")) for recipe in ("fp32", "fp16")
        )
    ]
    assert result.plan.reference_miou == pytest.approx(max(baselines))
    assert result.plan.predicted.miou >= max(baselines) - 0.5


def ious(found: Any, head: str) -> list[float]:
    index = found.heads.index(head)
    right, guessed = found.intersection[:, index].sum(axis=0), found.predicted[:, index].sum(axis=0)
    labelled = found.labelled.sum(axis=0)
    return [float(right[k] / (guessed[k] + labelled[k] - right[k])) for k in range(len(labelled)) if labelled[k]]
