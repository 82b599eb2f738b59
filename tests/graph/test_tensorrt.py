"""Every kind of graph parses and builds with a real TensorRT parser and builder, without a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

from mess_compile.graph.cut import cut_network
from mess_compile.graph.rewrite import count_by_products
from mess_compile.graph.store import read_whole_model
from mess_compile.nets.export import export_network
from mess_compile.network import CONFIDENCES, Gate, GraphSet, HeadConfig
from tests.graph import tiny
from tests.networks import random_network

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install mess-compile[rtx]")

HEADS = ((1, HeadConfig("fcn", 4, 2, rdi=True)), (2, HeadConfig("dlb", 8)))


CAPABILITIES = ("SM75", "SM86")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_network(random_network(HEADS), tmp_path_factory.mktemp("graphs")).parent


@pytest.fixture(scope="module")
def graph_set(network: Path) -> GraphSet:
    return cut_network(network, Gate(), tiny.nothing)


def build(path: Path, capability: str) -> int:
    """Size of the engine in bytes. The logger is global to the process, so errors are read from the parser."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [parser.get_error(index).desc() for index in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None, f"{path.name} does not build for {capability}"
    return int(engine.nbytes)


def for_target(path: Path, capability: str, folder: Path) -> Path:
    """The graph without matrix products in fp32, which SM75 does not take."""
    if capability != "SM75":
        return path
    onnx.save(count_by_products(read_whole_model(path)), str(folder / "products.onnx"))
    return folder / "products.onnx"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_graph_builds(graph_set: GraphSet, capability: str, tmp_path: Path) -> None:
    heads = {"head-exit1.fcn-crm4-b2-rdi", "head-exit2.dlb-crm8-b0", "head-exit3.fcn-crm1-b0"}
    assert heads | {"segment-0-1", "segment-1-3", "output-8x12", "baseline"} <= set(graph_set.graphs)
    for name in graph_set.graphs:
        assert build(for_target(graph_set.path(name), capability, tmp_path), capability) > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_convolutions_with_tensorflows_padding_build(tmp_path: Path, capability: str) -> None:
    export_network(random_network(HEADS, "efficientnet-lite0"), tmp_path)
    graph_set = cut_network(tmp_path, Gate(), tiny.nothing)
    for name in ("segment-0-1", "segment-1-2", "baseline"):
        assert build(graph_set.path(name), capability) > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("edge_aware", [True, False])
def test_every_gate_builds(network: Path, tmp_path: Path, confidence: str, edge_aware: bool, capability: str) -> None:
    shutil.copytree(network, tmp_path, dirs_exist_ok=True)
    graph_set = cut_network(tmp_path, Gate(confidence, edge_aware), tiny.nothing)
    assert build(for_target(graph_set.path("head-exit3.fcn-crm1-b0"), capability, tmp_path), capability) > 0
