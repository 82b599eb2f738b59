"""Builds dilated EfficientNet-Lite0 as a chain of blocks: MBConv without squeeze-and-excitation, ReLU6, TF padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn import functional

EPSILON = 1e-3
MEAN, STD = 127 / 255, 128 / 255
"""The input that the published weights were trained with: (pixel - 127) / 128 in every channel."""


class StridedConv(nn.Conv2d):
    """Convolution without bias, padded as TensorFlow's "SAME" does: ceil(side / stride) outputs, and where the padding
    is odd, the larger part at the bottom and right.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (n, inputs, h, w) -> (n, outputs, h / stride, w / stride)
        rows, columns = (_same_padding(int(side), self.stride[0], self.kernel_size[0] - 1) for side in x.shape[2:])
        return super().forward(functional.pad(x, (*columns, *rows)))


def same_conv(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution with "SAME" padding; without stride it is symmetric."""
    if stride > 1:
        return StridedConv(inputs, outputs, kernel, stride, groups)
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(inputs, outputs, kernel, 1, padding, dilation, groups, bias=False)


def _same_padding(side: int, stride: int, reach: int) -> tuple[int, int]:
    total = max(0, (-(-side // stride) - 1) * stride + reach + 1 - side)
    return total // 2, total - total // 2


class MBConv(nn.Module):
    """Expansion 1x1, depthwise convolution (stride and dilation here), linear 1x1."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, expand: int = 6, dilation: int = 1
    ) -> None:
        super().__init__()
        width = inputs * expand
        self.expand_conv = same_conv(inputs, width, 1) if expand != 1 else None
        self.bn0 = nn.BatchNorm2d(width, EPSILON) if expand != 1 else None
        self.depthwise_conv = same_conv(width, width, kernel, stride, dilation, groups=width)
        self.bn1 = nn.BatchNorm2d(width, EPSILON)
        self.project_conv = same_conv(width, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs, EPSILON)
        self.relu = nn.ReLU6(inplace=True)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (n, inputs, h, w) -> (n, outputs, h / stride, w / stride)
        y: torch.Tensor = x
        if self.expand_conv is not None and self.bn0 is not None:
            y = self.relu(self.bn0(self.expand_conv(x)))
        y = self.relu(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Without the 1280-channel last convolution. Blocks are numbered from 0, as in the published weights."""

    SETTING = (
        (3, 1, 16, 1, 1),
        (3, 6, 24, 2, 2),
        (5, 6, 40, 2, 2),
        (3, 6, 80, 3, 2),
        (5, 6, 112, 3, 1),
        (5, 6, 192, 4, 2),
        (3, 6, 320, 1, 1),
    )
    """Kernel, expansion, channels, number of blocks, stride."""

    def __init__(self, output_stride: int) -> None:
        super().__init__()
        self.conv_stem = same_conv(3, 32, 3, 2)
        self.bn0 = nn.BatchNorm2d(32, EPSILON)
        self.relu = nn.ReLU6(inplace=True)
        features: list[nn.Module] = []
        inputs, dilation, current_stride = 32, 1, 2
        for kernel, expand, outputs, count, stride in self.SETTING:
            first_dilation = dilation
            if current_stride * stride > output_stride:
                stride, dilation = 1, dilation * 2
            features.append(MBConv(inputs, outputs, kernel, stride, expand, first_dilation))
            features += [MBConv(outputs, outputs, kernel, 1, expand, dilation) for _ in range(count - 1)]
            inputs, current_stride = outputs, current_stride * stride
        self.features = nn.Sequential(*features)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.relu(self.bn0(self.conv_stem(x)))
        return y

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        for index, block in enumerate(self.features):
            yield f"features.{index}", block


def own_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of efficientnet_lite_pytorch under this backbone's names, `_blocks.3._bn1.bias` as
    `features.3.bn1.bias`.
    """
    names = {key: key.removeprefix("_").replace("._", ".") for key in state}
    return {
        f"features.{name.removeprefix('blocks.')}" if name.startswith("blocks.") else name: state[key]
        for key, name in names.items()
    }


def take_input_of(backbone: EfficientNetLite0, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Change the stem, whose weights were trained on (pixel - 127) / 128, to take pixels that were normalised by `mean`
    and `std` instead.

    The same in exact arithmetic but for the padded border, whose zeros are another grey.
    """
    shift = torch.tensor([(own - MEAN) / STD for own in mean]).view(1, -1, 1, 1)
    scale = torch.tensor([own / STD for own in std]).view(1, -1, 1, 1)
    with torch.no_grad():
        weight, norm = backbone.conv_stem.weight, backbone.bn0
        assert norm.running_mean is not None, "BatchNorm tracks its mean"
        norm.running_mean -= (weight * shift).sum((1, 2, 3))
        weight *= scale
