"""Segmentation heads: CRM -> extra blocks with RDI -> FCN or DeepLabV3 head."""

from __future__ import annotations

import torch
from torch import nn

from mess_compile.candidates import HeadConfig

ASPP_RATES = (12, 24, 36)
ASPP_WIDTH = 256


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class ImagePooling(nn.Module):
    """The image-level branch of ASPP: mean over the map, 1x1 convolution, spread over the map again."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv = _conv_bn_relu(inputs, ASPP_WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.conv(x.mean((2, 3), keepdim=True))
        return pooled.expand(-1, -1, x.shape[2], x.shape[3])


class DeepLabV3Head(nn.Module):
    """torchvision's DeepLabHead: ASPP (1x1; 3x3 at rates 12, 24, 36; image pooling) -> 1x1 -> 3x3 -> 1x1."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [_conv_bn_relu(inputs, ASPP_WIDTH, 1)]
            + [_conv_bn_relu(inputs, ASPP_WIDTH, 3, rate) for rate in ASPP_RATES]
            + [ImagePooling(inputs)]
        )
        self.project = nn.Sequential(_conv_bn_relu(5 * ASPP_WIDTH, ASPP_WIDTH, 1), nn.Dropout(0.5))
        self.classify = nn.Sequential(_conv_bn_relu(ASPP_WIDTH, ASPP_WIDTH, 3), nn.Conv2d(ASPP_WIDTH, classes, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.classify(self.project(torch.cat([branch(x) for branch in self.branches], dim=1)))
        return y


def _fcn_head(inputs: int, classes: int) -> nn.Sequential:
    width = max(8, inputs // 4)
    return nn.Sequential(_conv_bn_relu(inputs, width, 3), nn.Dropout(0.1), nn.Conv2d(width, classes, 1))


def build_head(config: HeadConfig, inputs: int, classes: int) -> nn.Sequential:
    """A head on a map of `inputs` channels: (n, inputs, h, w) -> logits (n, classes, h, w).

    Block i has dilation 2^i with RDI, else 1 (DESIGN.md, Head blocks, with d = 1).
    """
    channels = max(1, inputs // config.crm)
    layers: list[nn.Module] = [_conv_bn_relu(inputs, channels, 1)] if config.crm > 1 else []
    layers += [_conv_bn_relu(channels, channels, 3, 2**i if config.rdi else 1) for i in range(config.blocks)]
    layers.append(DeepLabV3Head(channels, classes) if config.kind == "dlb" else _fcn_head(channels, classes))
    return nn.Sequential(*layers)
