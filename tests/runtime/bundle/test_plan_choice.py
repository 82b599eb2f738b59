"""A bundle for several devices runs its own plan on each: another one's thresholds and deadlines would not hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mess_compile import runtime
from mess_compile.bundle import write as bundles
from mess_compile.network import GraphSet
from mess_compile.runtime.base.errors import EngineError, InputError
from mess_compile.runtime.bundle import plan_choice
from mess_compile.runtime.bundle.manifest import DeviceMatch
from mess_compile.runtime.machine.machine import Gpu, Machine
from tests import small_network

XAVIER, ORIN = DeviceMatch("Xavier", (7, 2), ("AGX Xavier",)), DeviceMatch("Orin", (8, 7), ("AGX Orin",))
ON_XAVIER = Machine((Gpu("Xavier", (7, 2)),), "NVIDIA Jetson AGX Xavier Developer Kit")
ON_ORIN = Machine((Gpu("Orin", (8, 7)),), "NVIDIA Jetson AGX Orin")
ON_RTX = Machine((Gpu("NVIDIA GeForce RTX 4090", (8, 9)),))


def part(
    graphs: GraphSet, name: str, device: DeviceMatch, library: str = "onnxruntime", recipe: str = "fp32"
) -> bundles.Part:
    plan = replace(small_network.plan(), device=name, library=library)
    return replace(small_network.part(graphs, plan, recipe), device=device)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    graphs = small_network.graph_set(folder / "graphs")
    parts = [part(graphs, "host", DeviceMatch()), part(graphs, "xavier", XAVIER), part(graphs, "orin", ORIN)]
    small_network.write_parts(folder / "several.mess", [*parts, part(graphs, "orin", ORIN, recipe="fp16-1f2e3d")])
    return folder / "several.mess"


def on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mess_compile.runtime.machine.machine.this_machine", lambda: machine)


@pytest.mark.parametrize(
    ("machine", "wanted"),
    [
        (ON_XAVIER, "xavier:fp32"),
        (ON_ORIN, "orin:fp32"),
        (ON_RTX, "host:fp32"),
        (Machine(), "host:fp32"),
        (replace(ON_ORIN, gpus=(Gpu("Orin"),)), "orin:fp32"),  # of a capability that nothing told
        (replace(ON_ORIN, gpus=(Gpu("Orin", (8, 6)),)), "host:fp32"),
        (replace(ON_ORIN, gpus=(Gpu("Xavier", (8, 7)),)), "host:fp32"),
        (replace(ON_ORIN, board="another board"), "host:fp32"),
    ],
)
def test_the_plan_is_that_of_the_machine(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine, wanted: str
) -> None:
    on(machine, monkeypatch)
    with runtime.load(bundle, threads=1) as cascade:
        assert cascade.plan.name == wanted


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("xavier", "xavier:fp32"),
        ("orin", "orin:fp32"),
        ("orin:fp32", "orin:fp32"),
        ("orin:fp16", "orin:fp16-1f2e3d"),
        ("orin:fp16-1f2e3d", "orin:fp16-1f2e3d"),
    ],
)
def test_a_target_chooses_whatever_the_machine_is(bundle: Path, target: str, wanted: str) -> None:
    with runtime.load(bundle, target, threads=1) as cascade:
        assert cascade.plan.name == wanted


def test_an_unknown_target_is_refused_with_those_there_are(bundle: Path) -> None:
    with pytest.raises(InputError, match=r"target orin:int8; it has host:fp32 \(onnxruntime\), .*orin:fp16-1f2e3d"):
        runtime.load(bundle, "orin:int8")


def test_a_machine_that_no_plan_is_for_is_told_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = small_network.graph_set(tmp_path / "graphs")
    parts = [part(graphs, "xavier", XAVIER), part(graphs, "orin", ORIN)]
    small_network.write_parts(tmp_path / "jetsons.mess", parts)
    on(ON_RTX, monkeypatch)
    words = (
        r"not xavier: the board is no Jetson, not AGX Xavier, the GPU is NVIDIA GeForce RTX 4090, not Xavier, .*8\.9"
    )
    with pytest.raises(InputError, match=words):
        runtime.load(tmp_path / "jetsons.mess")


def test_one_target_alone_runs_where_its_library_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is as fast there, `verify` tells; the machine is not asked, which takes its time."""

    def unasked() -> Machine:
        raise AssertionError

    monkeypatch.setattr("mess_compile.runtime.machine.machine.this_machine", unasked)
    graphs = small_network.graph_set(tmp_path / "graphs")
    small_network.write_parts(tmp_path / "one.mess", [part(graphs, "xavier", XAVIER)])
    with runtime.load(tmp_path / "one.mess", threads=1) as cascade:
        assert cascade.plan.target == "xavier"


def test_a_library_that_is_not_here_leaves_the_next_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = plan_choice.open_library

    def without_tensorrt(name: str, threads: int | None, cuda_graphs: bool) -> object:
        if name == "tensorrt":
            raise EngineError("TensorRT is not installed")
        return opened(name, threads, cuda_graphs=cuda_graphs)

    monkeypatch.setattr(plan_choice, "open_library", without_tensorrt)
    on(ON_XAVIER, monkeypatch)
    graphs = small_network.graph_set(tmp_path / "graphs")
    parts = [part(graphs, "xavier", XAVIER, "tensorrt"), part(graphs, "host", DeviceMatch())]
    small_network.write_parts(tmp_path / "two.mess", parts)
    with runtime.load(tmp_path / "two.mess", threads=1) as cascade:
        assert cascade.plan.target == "host"
    with pytest.raises(EngineError, match="TensorRT is not installed"):
        runtime.load(tmp_path / "two.mess", "xavier")
