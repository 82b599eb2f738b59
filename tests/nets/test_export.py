"""Export: what torch trained is what the device runs, every exit of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from mess_compile.backbone_names import BACKBONES
from mess_compile.graph.cut import candidate_from_metadata, cut_network
from mess_compile.graph.recompose_check import check_baseline_alone, check_stages
from mess_compile.nets.checkpoint import load_candidate, save_candidate
from mess_compile.nets.export import export_checkpoint, export_network, torch_reference
from mess_compile.nets.network import OverprovisionedNetwork
from mess_compile.network import Gate, GraphSet, HeadConfig, read_graph_set
from mess_compile.runtime.base.errors import InputError
from tests.commands import contents
from tests.graph import tiny
from tests.networks import random_network

HEADS = (
    (1, HeadConfig("fcn", 4, 2, rdi=True)),
    (1, HeadConfig("fcn", 1, 1)),
    (2, HeadConfig("dlb", 8)),
    (3, HeadConfig("dlb", 4, 1)),
)


@pytest.fixture(scope="module")
def network() -> OverprovisionedNetwork:
    return random_network(HEADS)


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    return [generator.integers(0, 256, (64, 96, 3), dtype=np.uint8) for _ in range(2)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, network: OverprovisionedNetwork) -> GraphSet:
    """The network as ONNX, and its graphs. Look only."""
    folder = tmp_path_factory.mktemp("exported")
    export_network(network, folder)
    return cut_network(folder, Gate(), tiny.nothing)


def torch_logits(network: OverprovisionedNetwork, frame: np.ndarray) -> dict[str, np.ndarray]:
    """ImageNet normalisation written out, BatchNorm not folded."""
    x = (frame / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    with torch.inference_mode():
        _, logits = network(torch.from_numpy(x.transpose(2, 0, 1)[None].astype(np.float32)))
    return {name: values.numpy() for name, values in logits.items()}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_onnx_and_torch_agree_on_every_exit(tmp_path: Path, backbone: str, frames: list[np.ndarray]) -> None:
    network = random_network(HEADS, backbone, seed=1)
    path = export_network(network, tmp_path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {"image": frames[0][None]}), strict=True))
    expected = torch_logits(network, frames[0])
    assert set(names) == {"exit1", "exit2", "exit3"} | {f"logits:{name}" for name in expected}
    for name, logits in expected.items():
        assert np.abs(found[f"logits:{name}"] - logits).max() <= 1e-4 * max(1, np.abs(logits).max())


def test_the_file_is_opset_17_and_describes_itself(exported: GraphSet, network: OverprovisionedNetwork) -> None:
    path = exported.root / "network.onnx"
    model = onnx.load(str(path), load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert candidate_from_metadata(model, path) == network.candidate
    kinds = {node.op_type for node in model.graph.node}
    assert kinds == {"Cast", "Transpose", "Sub", "Div", "Conv", "Clip", "Relu", "Add", "ReduceMean", "Expand", "Concat"}
    assert [node.op_type for node in model.graph.node][:2] == ["Cast", "Transpose"]  # TensorRT: no Transpose of uint8


def test_tensorflows_padding_is_part_of_the_convolutions(tmp_path: Path) -> None:
    """A Pad node would copy the largest maps in every run."""
    model = onnx.load(str(export_network(random_network(HEADS, "efficientnet-lite0"), tmp_path)))
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    attributes = [
        {a.name: list(a.ints) for a in node.attribute if a.name in ("pads", "strides")} for node in convolutions
    ]
    assert "Pad" not in {node.op_type for node in model.graph.node}
    assert [a["pads"] for a in attributes if a["strides"] == [2, 2]] == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 2, 2]]


def test_the_same_network_gives_the_same_bytes(
    tmp_path: Path, exported: GraphSet, network: OverprovisionedNetwork
) -> None:
    export_network(network, tmp_path)
    cut_network(tmp_path, Gate(), tiny.nothing)
    assert contents(tmp_path) == contents(exported.root)


def test_a_checkpoint_becomes_checked_graphs(
    tmp_path: Path, network: OverprovisionedNetwork, frames: list[np.ndarray]
) -> None:
    save_candidate(network, tmp_path / "candidate")
    steps: list[str] = []
    graph_set = export_checkpoint(
        tmp_path / "candidate", tmp_path / "graphs", Gate("entropy"), frames, lambda name, *_: steps.append(name)
    )
    loaded = load_candidate(tmp_path / "candidate").candidate
    assert graph_set == read_graph_set(tmp_path / "graphs")
    assert graph_set.candidate == loaded
    assert graph_set.candidate.identity != ""
    assert graph_set.graphs["segment-1-3"].macs == loaded.exit_points[2].macs - loaded.exit_points[0].macs
    assert graph_set.graphs["baseline"].macs == loaded.exit_points[2].macs + loaded.head("exit3.fcn-crm1-b0").macs
    assert {"network.onnx", "segment-1-3", "checked segment-1-3", "checked head-exit2.dlb-crm8-b0"} <= set(steps)


@pytest.fixture(scope="module")
def alone() -> OverprovisionedNetwork:
    return random_network((), seed=1, exits=1)


def saved(folder: Path, network: OverprovisionedNetwork, **changes: Any) -> Path:
    """A checkpoint whose description differs from the network's by `changes`."""
    save_candidate(network, folder)
    path = folder / "network.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture(scope="module")
def beside_alone(
    tmp_path_factory: pytest.TempPathFactory,
    network: OverprovisionedNetwork,
    alone: OverprovisionedNetwork,
    frames: list[np.ndarray],
) -> tuple[GraphSet, OverprovisionedNetwork]:
    """Graphs of the network and of one trained alone, and the latter as its checkpoint has it. Look only."""
    root = tmp_path_factory.mktemp("beside alone")
    folders = saved(root / "candidate", network), saved(root / "baseline", alone)
    graph_set = export_checkpoint(folders[0], root / "graphs", Gate(), frames, tiny.nothing, folders[1])
    return graph_set, load_candidate(folders[1])


def test_the_baseline_trained_alone_becomes_one_graph_that_agrees_with_torch(
    beside_alone: tuple[GraphSet, OverprovisionedNetwork], frames: list[np.ndarray]
) -> None:
    graph_set, rounded = beside_alone
    assert graph_set == read_graph_set(graph_set.root)
    assert graph_set.baselines == ("baseline", "baseline-alone")
    assert graph_set.baseline_alone == rounded.candidate.identity
    assert graph_set.graphs["baseline-alone"].macs == graph_set.graphs["baseline"].macs
    session = onnxruntime.InferenceSession(str(graph_set.path("baseline-alone")), providers=["CPUExecutionProvider"])
    for frame in frames:
        (logits,) = torch_logits(rounded, frame).values()
        pixels = torch.nn.functional.interpolate(torch.from_numpy(logits), (64, 96), mode="bilinear").numpy()[0]
        labels = session.run(["labels"], {"image": frame[None]})[0]
        chosen = np.take_along_axis(pixels, labels.astype(np.int64), axis=0)[0]
        assert (pixels.max(axis=0) - chosen).max() <= 2e-4 * np.abs(logits).max()
    assert {path.suffix for path in graph_set.root.iterdir()} == {".onnx", ".json", ""}
    assert not (graph_set.root / "alone.onnx").exists()


def test_another_networks_labels_from_the_baseline_are_seen(
    beside_alone: tuple[GraphSet, OverprovisionedNetwork], frames: list[np.ndarray]
) -> None:
    graph_set, rounded = beside_alone
    check_baseline_alone(graph_set, torch_reference(rounded), frames)
    with pytest.raises(InputError, match=r"baseline-alone: \d+ labels of frame 0 are not those of the network"):
        check_baseline_alone(graph_set, torch_reference(random_network((), seed=2, exits=1)), frames)


@pytest.mark.parametrize(
    ("options", "changes", "difference"),
    [
        ({"backbone": "resnet50"}, {}, "backbone resnet50, not mobilenetv2 and width 1.0, not 0.25"),
        ({"width": 0.5}, {}, "width 0.5, not 0.25"),
        ({"input_hw": (64, 64)}, {}, "input size 64x64, not 64x96"),
        ({"classes": 3}, {}, "classes class 0, class 1, class 2, not class 0, class 1, class 2, class 3"),
        ({}, {"output_stride": 16}, "output stride 16, not 8"),
        ({"heads": [(1, HeadConfig("dlb"))]}, {}, "2 heads, not 1"),
    ],
)
def test_a_baseline_of_another_architecture_is_refused_by_name(
    tmp_path: Path,
    network: OverprovisionedNetwork,
    frames: list[np.ndarray],
    options: dict[str, Any],
    changes: dict[str, Any],
    difference: str,
) -> None:
    unlike = random_network(**({"heads": (), "exits": 1} | options))
    folders = saved(tmp_path / "candidate", network), saved(tmp_path / "baseline", unlike, **changes)
    with pytest.raises(InputError) as refusal:
        export_checkpoint(folders[0], tmp_path / "graphs", Gate(), frames, tiny.nothing, folders[1])
    assert f"{folders[1]} does not fit the multi-exit network: it has {difference}: train" in str(refusal.value)
    assert f"(`mess-compile train --baseline`), or remove {folders[1]}" in str(refusal.value)
    assert not (tmp_path / "graphs").exists()


def test_swapped_heads_are_seen(exported: GraphSet, network: OverprovisionedNetwork, frames: list[np.ndarray]) -> None:
    graph_set = replace(exported, graphs=dict(exported.graphs))
    check_stages(graph_set, torch_reference(network), frames, tiny.nothing)
    one, other = (graph_set.graphs[f"head-exit1.{name}"] for name in ("fcn-crm4-b2-rdi", "fcn-crm1-b1"))
    graph_set.graphs[one.name] = replace(one, path=other.path)
    graph_set.graphs[other.name] = replace(other, path=one.path)
    with pytest.raises(InputError, match=r"head-exit1\.fcn-crm4-b2-rdi deviates"):
        check_stages(graph_set, torch_reference(network), frames, tiny.nothing)


def test_frames_of_another_size_leave_no_half_made_folder(tmp_path: Path, network: OverprovisionedNetwork) -> None:
    save_candidate(network, tmp_path / "candidate")
    frames = [np.zeros((64, 64, 3), np.uint8)]
    with pytest.raises(InputError, match=r"\(64, 96, 3\)"):
        export_checkpoint(tmp_path / "candidate", tmp_path / "graphs", Gate(), frames, tiny.nothing)
    assert [path.name for path in tmp_path.iterdir()] == ["candidate"]
