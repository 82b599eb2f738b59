"""Builds segmentation heads: CRM -> extra blocks with RDI -> FCN, DeepLabV3, separable ASPP or LR-ASPP head."""

from __future__ import annotations

import torch
from torch import nn

from mess_compile.network import HeadConfig

ASPP_RATES = (12, 24, 36)
SEPARABLE_RATES = (3, 6, 12)
"""Smaller than DeepLabV3's: an early exit's receptive field is small, and gaps between taps cost more than reach."""


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _separable(inputs: int, outputs: int, dilation: int = 1) -> nn.Sequential:
    """Depthwise 3x3, then 1x1, each with BatchNorm and ReLU (Xception, DeepLabV3+)."""
    return nn.Sequential(*_conv_bn_relu(inputs, inputs, 3, dilation, groups=inputs), *_conv_bn_relu(inputs, outputs, 1))


class ImagePooling(nn.Module):
    """The image-level branch of ASPP: mean over the map, 1x1 convolution, spread over the map again."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv = _conv_bn_relu(inputs, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.conv(x.mean((2, 3), keepdim=True))
        spread = pooled.expand(-1, -1, x.shape[2], x.shape[3])
        return spread.contiguous(memory_format=torch.channels_last) if self.training else spread  # for a fast concat


class AsppHead(nn.Module):
    """ASPP (1x1; 3x3 at three rates; image pooling) -> 1x1 -> 3x3 -> 1x1, `width` channels throughout.

    Dense with width 256 it is torchvision's DeepLabHead; separable, every 3x3 is a depthwise and a 1x1.
    """

    def __init__(self, inputs: int, classes: int, width: int, separable: bool) -> None:
        super().__init__()
        rates, conv = (SEPARABLE_RATES, _separable) if separable else (ASPP_RATES, _dense)
        self.branches = nn.ModuleList(
            [_conv_bn_relu(inputs, width, 1)]
            + [conv(inputs, width, rate) for rate in rates]
            + [ImagePooling(inputs, width)]
        )
        dropout = 0.1 if separable else 0.5
        self.project = nn.Sequential(_conv_bn_relu(5 * width, width, 1), nn.Dropout(dropout))
        self.classify = nn.Sequential(conv(width, width, 1), nn.Conv2d(width, classes, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.classify(self.project(torch.cat([branch(x) for branch in self.branches], dim=1)))
        return y


def _dense(inputs: int, outputs: int, dilation: int) -> nn.Sequential:
    return _conv_bn_relu(inputs, outputs, 3, dilation)


class LiteAsppHead(nn.Module):
    """LR-ASPP of MobileNetV3 without its skip: a 1x1 branch, weighted by a sigmoid of the pooled map -> 1x1."""

    def __init__(self, inputs: int, classes: int, width: int) -> None:
        super().__init__()
        self.branch = _conv_bn_relu(inputs, width, 1)
        self.scale = nn.Conv2d(inputs, width, 1)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.scale(x.mean((2, 3), keepdim=True)).sigmoid()
        y: torch.Tensor = self.classify(self.branch(x) * weight)
        return y


def _fcn_head(inputs: int, classes: int) -> nn.Sequential:
    width = max(8, inputs // 4)
    return nn.Sequential(_conv_bn_relu(inputs, width, 3), nn.Dropout(0.1), nn.Conv2d(width, classes, 1))


def build_head(config: HeadConfig, inputs: int, classes: int) -> nn.Sequential:
    """A head on a map of `inputs` channels: (n, inputs, h, w) -> logits (n, classes, h, w).

    Block i has dilation 2^i with RDI, else 1 (docs/definitions.md, Head blocks, with d = 1).
    """
    channels = max(1, inputs // config.crm)
    layers: list[nn.Module] = [_conv_bn_relu(inputs, channels, 1)] if config.crm > 1 else []
    layers += [_conv_bn_relu(channels, channels, 3, 2**i if config.rdi else 1) for i in range(config.blocks)]
    layers.append(_final_part(config, channels, classes))
    return nn.Sequential(*layers)


def _final_part(config: HeadConfig, channels: int, classes: int) -> nn.Module:
    if config.kind == "fcn":
        return _fcn_head(channels, classes)
    if config.kind == "lra":
        return LiteAsppHead(channels, classes, config.channels)
    return AsppHead(channels, classes, config.channels, separable=config.kind == "sep")
