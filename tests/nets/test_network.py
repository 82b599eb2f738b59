"""Workloads decide plans: they must be the published ones, and heads must be what their names say."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from mess_compile.backbone_names import BACKBONES
from mess_compile.nets import network
from mess_compile.nets.heads import build_head
from mess_compile.network import HeadConfig, head_config_from_name, head_grid
from mess_compile.runtime.base.errors import InputError


def candidate(backbone: str, heads: tuple[str, ...] = ()) -> network.CandidateNetwork:
    blocks = network.place_exits(network.block_workloads(backbone, (512, 512)), 6)
    architecture = network.Architecture(
        backbone=backbone,
        classes=tuple(f"c{i}" for i in range(21)),
        colours=((0, 0, 0),) * 21,
        input_hw=(512, 512),
        exit_blocks=blocks,
        heads=network.with_final_head(network.heads_from_names(heads, 6), 6),
    )
    return network.described(architecture)


@pytest.mark.parametrize(("backbone", "gmacs"), [("resnet50", 138.63), ("mobilenetv2", 8.78)])
def test_the_baselines_have_the_papers_workload(backbone: str, gmacs: float) -> None:
    assert math.floor(candidate(backbone).baseline_macs / 1e9 * 100) / 100 == gmacs


def test_resnet50_blocks_have_the_cumulative_workload_derived_from_the_paper() -> None:
    blocks = network.block_workloads("resnet50", (512, 512))
    percent = [round(100 * block.macs / blocks[-1].macs, 1) for block in blocks]
    published = [1.8, 3.0, 4.1, 6.1, 7.2, 8.4, 9.5, 15.7, 20.3, 24.9, 29.4, 34.0, 38.6, 63.4, 81.7, 100.0]
    assert percent == pytest.approx(published, abs=0.11)


def test_segments_add_up() -> None:
    found = candidate("mobilenetv2")
    assert len(found.segments()) == 21
    whole = sum(found.segment_macs(a, a + 1) for a in range(6))
    assert whole == found.segment_macs(0, 6) == found.exit_points[-1].macs


def test_workload_of_an_fcn_head_by_hand() -> None:
    channels, height, width, classes = 64, 23, 30, 11
    config = head_config_from_name("fcn-crm2-b2-rdi")
    macs = network.count_macs(lambda: build_head(config, channels, classes), channels, (height, width))
    cells, half, fcn = height * width, 32, 8
    crm = cells * (64 * half + 2 * half)
    blocks = 2 * cells * (half * half * 9 + 2 * half)
    head = cells * (half * fcn * 9 + 2 * fcn + fcn * classes)
    assert macs == crm + blocks + head


def test_workload_of_a_deeplab_head_by_hand() -> None:
    channels, cells = 96, 20 * 30
    macs = network.count_macs(lambda: build_head(HeadConfig("dlb"), channels, 21), channels, (20, 30))
    aspp = cells * 256 * (channels * (1 + 3 * 9) + 4 * 2) + (channels * 256 + 2 * 256)
    rest = cells * (5 * 256 * 256 + 2 * 256 + 256 * 256 * 9 + 2 * 256 + 256 * 21)
    assert macs == aspp + rest


def test_rdi_doubles_the_dilation_of_each_further_block() -> None:
    def dilations(name: str) -> list[int]:
        layers = build_head(head_config_from_name(name), 16, 3).modules()
        return [m.dilation[0] for m in layers if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]

    assert dilations("fcn-crm1-b3-rdi") == [1, 2, 4, 1]
    assert dilations("fcn-crm1-b3") == [1, 1, 1, 1]
    assert dilations("dlb-crm1-b0") == [12, 24, 36, 1]


def test_the_papers_head_space() -> None:
    grid = head_grid()
    assert len(grid) == len({config.name for config in grid}) == 56
    assert all(head_config_from_name(config.name) == config for config in grid)


def test_exits_are_about_equidistant_in_workload() -> None:
    for backbone in BACKBONES:
        points = candidate(backbone).exit_points
        blocks = network.block_workloads(backbone, (512, 512))
        step = max(b.macs - a.macs for a, b in pairwise(blocks))
        for number, point in enumerate(points, start=1):
            assert abs(point.macs - points[-1].macs * number / 6) <= step


def test_heads_are_named_for_all_exits_or_one() -> None:
    found = candidate("mobilenetv2", ("fcn-crm1-b0", "exit2.dlb-crm4-b0"))
    assert len(found.heads_at(2)) == 2
    assert [len(found.heads_at(n)) for n in (1, 3, 4, 5, 6)] == [1] * 5
    assert len(candidate("mobilenetv2", ("exit3.grid",)).heads_at(3)) == 56


@pytest.mark.parametrize("name", ["fcn", "fcn-crm3-b0", "fcn-crm1-b0-rdi", "exit6.fcn-crm1-b0", "exit9.fcn-crm1-b0"])
def test_impossible_heads_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=name.split(".")[0]):
        candidate("mobilenetv2", (name,))


@pytest.mark.parametrize(
    "blocks", [("features.99", "features.17"), ("features.6",), ("features.9", "features.3", "features.17")]
)
def test_impossible_exit_blocks_are_refused(blocks: tuple[str, ...]) -> None:
    architecture = network.Architecture(
        "mobilenetv2", ("a", "b"), ((0, 0, 0),) * 2, (64, 64), blocks, network.with_final_head((), len(blocks))
    )
    with pytest.raises(InputError, match="features"):
        network.described(architecture)


def test_every_exit_gives_logits_of_its_map() -> None:
    heads = network.with_final_head(network.heads_from_names(("dlb-crm8-b1", "fcn-crm4-b0"), 3), 3)
    blocks = ("features.3", "features.6", "features.17")
    net = network.OverprovisionedNetwork(
        network.Architecture("mobilenetv2", ("a", "b", "c"), ((0, 0, 0),) * 3, (64, 96), blocks, heads, width=0.25)
    ).eval()
    frames = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    features, logits = net(network.normalise(frames))
    for point, found in zip(net.candidate.exit_points, features, strict=True):
        assert found.shape == (2, point.channels, *point.hw)
    for head in net.candidate.heads:
        assert logits[head.name].shape == (2, 3, *net.candidate.exit_point(head.exit_point).hw)


def test_normalisation_is_imagenets() -> None:
    pixel = torch.tensor([124, 116, 104], dtype=torch.uint8).view(1, 1, 1, 3)
    expected = [(124 / 255 - 0.485) / 0.229, (116 / 255 - 0.456) / 0.224, (104 / 255 - 0.406) / 0.225]
    assert network.normalise(pixel).flatten().tolist() == pytest.approx(expected, abs=1e-5)
