"""A training that takes half as long must be the same training: same results, gradients, names of the state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mess_compile.nets.backbones import build_backbone
from mess_compile.nets.export import module_as_onnx
from mess_compile.training.convolutions import DilatedDepthwiseConv2d, use_fast_convolutions


def convolution(channels: int, kernel: int, dilation: int) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(channels, channels, kernel, 1, padding, dilation, groups=channels, bias=False)
    return nn.Sequential(layer).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def by_definition(x: np.ndarray, weight: np.ndarray, dilation: int) -> np.ndarray:
    (h, w), k = x.shape[2:], weight.shape[2]
    sides = (dilation * (k // 2),) * 2
    padded = np.pad(x, ((0, 0), (0, 0), sides, sides))
    return sum(
        weight[:, 0, i, j, None, None] * padded[:, :, i * dilation : i * dilation + h, j * dilation : j * dilation + w]
        for i in range(k)
        for j in range(k)
    )


@pytest.mark.parametrize("hw", [(8, 12), (7, 10), (3, 2)])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 2), (3, 4), (3, 5), (3, 12), (5, 2), (5, 5)])
def test_a_fast_convolution_is_the_convolution_by_its_definition(
    kernel: int, dilation: int, hw: tuple[int, int]
) -> None:
    module = convolution(4, kernel, dilation)
    use_fast_convolutions(module)
    assert isinstance(module[0], DilatedDepthwiseConv2d)
    x = torch.randn(2, 4, *hw)
    weight = module[0].weight.detach().double().numpy()
    assert np.allclose(module(x).detach().numpy(), by_definition(x.double().numpy(), weight, dilation), atol=1e-5)


@pytest.mark.parametrize("hw", [(8, 12), (7, 10), (3, 2)])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 2), (3, 3), (3, 5), (3, 12), (5, 2), (5, 5)])
def test_fast_gradients_are_those_of_pytorch(kernel: int, dilation: int, hw: tuple[int, int]) -> None:
    module, x = convolution(4, kernel, dilation), torch.randn(2, 4, *hw, requires_grad=True)
    upstream = torch.randn(2, 4, *hw)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(module(x), (x, module[0].weight), upstream)

    expected = gradients()
    use_fast_convolutions(module)
    for found, wanted in zip(gradients(), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False),
        lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
        lambda: nn.Conv2d(4, 4, 3, stride=2, padding=2, dilation=2, groups=4, bias=False),
        lambda: nn.Conv2d(4, 4, 5, padding=2, dilation=2, groups=4, bias=False),
        lambda: nn.Conv2d(4, 4, 3, padding=1, dilation=2, groups=4, bias=False),
    ],
)
def test_other_convolutions_stay_as_they_are(other: Callable[[], nn.Module]) -> None:
    module = nn.Sequential(other())
    use_fast_convolutions(module)
    assert type(module[0]) is nn.Conv2d


def test_a_fast_backbone_computes_the_same_and_keeps_the_names_of_its_state() -> None:
    backbone = build_backbone("mobilenetv2", 8, 0.25)
    names, images = list(backbone.state_dict()), torch.randn(2, 3, 64, 64)

    def last_map() -> torch.Tensor:
        x = backbone.stem(images)
        for _, block in backbone.blocks():
            x = block(x)
        return x

    expected = last_map()
    use_fast_convolutions(backbone)
    assert list(backbone.state_dict()) == names
    assert (
        sum(isinstance(layer, DilatedDepthwiseConv2d) for layer in backbone.modules()) == 10
    )  # all of strides 16 and 32, which dilation replaced, but one
    assert torch.allclose(last_map(), expected, atol=1e-4)


def test_a_module_that_was_trained_is_exported_with_plain_convolutions(tmp_path: Path) -> None:
    """`attach` exports the heads that it trained; BatchNorm is folded into the convolution before it."""
    module = nn.Sequential(*convolution(4, 3, 12), nn.BatchNorm2d(4), *convolution(4, 3, 2))
    use_fast_convolutions(module)
    exported = module_as_onnx(module, {"x": torch.zeros(1, 4, 8, 12)}, ["y"], tmp_path / "module.onnx")
    assert [node.op_type for node in exported.graph.node] == ["Conv", "Conv"]
