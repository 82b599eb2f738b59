"""Builds dilated backbones as chains of blocks; ResNet-50 and MobileNetV2, here, have torchvision's parameter names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import nn

from mess_compile.backbone_names import EFFICIENTNET_LITE0
from mess_compile.nets.efficientnet import EfficientNetLite0, own_names, take_input_of
from mess_compile.runtime.base.errors import InputError

OUTPUT_STRIDES = (8, 16)
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""The input of every backbone: pixels of 0 to 1, without the mean and deviation of ImageNet."""
_CLASSIFIERS = {
    "mobilenetv2": ("features.18.", "classifier."),
    "resnet50": ("fc.",),
    EFFICIENTNET_LITE0: ("conv_head.", "bn1.", "fc."),
}


class Bottleneck(nn.Module):
    """ResNet v1.5 bottleneck: 1x1, 3x3 (stride and dilation here), 1x1 with expansion 4."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, width * 4, 1, stride, bias=False), nn.BatchNorm2d(width * 4))
            if project
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (n, inputs, h, w) -> (n, 4 * width, h / stride, w / stride)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        total: torch.Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return total


class ResNet50(nn.Module):
    """Stride becomes dilation in the last two stages at output stride 8, in the last at 16."""

    def __init__(self, output_stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs, dilation, current_stride = 64, 1, 4
        for stage, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
            stride, first_dilation = (1 if stage == 1 else 2), dilation
            if current_stride * stride > output_stride:
                stride, dilation = 1, dilation * 2
            blocks = [Bottleneck(inputs, width, stride, first_dilation, project=True)]
            blocks += [Bottleneck(width * 4, width, 1, dilation, project=False) for _ in range(count - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            inputs, current_stride = width * 4, current_stride * stride

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return y

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        for stage in range(1, 5):
            for index, block in enumerate(getattr(self, f"layer{stage}")):
                yield f"layer{stage}.{index}", block


class InvertedResidual(nn.Module):
    """MobileNetV2 block: expansion 1x1, depthwise 3x3, linear 1x1."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int, dilation: int) -> None:
        super().__init__()
        width = inputs * expand
        layers: list[nn.Module] = [_conv_bn_relu6(inputs, width, 1)] if expand != 1 else []
        layers.append(_conv_bn_relu6(width, width, 3, stride, dilation, groups=width))
        layers += [nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (n, inputs, h, w) -> (n, outputs, h / stride, w / stride)
        y: torch.Tensor = self.conv(x)
        return x + y if self.residual else y


def _conv_bn_relu6(
    inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class MobileNetV2(nn.Module):
    """Without the 1280-channel last convolution; channels scaled by `width` and rounded to multiples of 8."""

    SETTING = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, output_stride: int, width: float) -> None:
        super().__init__()
        inputs = _round_to_8(32 * width)
        features: list[nn.Module] = [_conv_bn_relu6(3, inputs, 3, 2)]
        dilation, current_stride = 1, 2
        for expand, channels, count, stride in self.SETTING:
            outputs, first_dilation = _round_to_8(channels * width), dilation
            if current_stride * stride > output_stride:
                stride, dilation = 1, dilation * 2
            for index in range(count):
                first = index == 0
                block_dilation = first_dilation if first else dilation
                features.append(InvertedResidual(inputs, outputs, stride if first else 1, expand, block_dilation))
                inputs = outputs
            current_stride *= stride
        self.features = nn.Sequential(*features)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.features[0](x)
        return y

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        for index, block in enumerate(list(self.features)[1:], start=1):
            yield f"features.{index}", block


def _round_to_8(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


Backbone: TypeAlias = ResNet50 | MobileNetV2 | EfficientNetLite0


def build_backbone(name: str, output_stride: int = 8, width: float = 1.0) -> Backbone:
    """A backbone with random weights. Raises InputError for an unknown name, stride or width."""
    if output_stride not in OUTPUT_STRIDES:
        raise InputError(f"output stride {output_stride} is not supported: choose one of {OUTPUT_STRIDES}")
    if name == "mobilenetv2":
        if not 0.1 <= width <= 4:
            raise InputError(f"width {width} of mobilenetv2 is not between 0.1 and 4")
        return MobileNetV2(output_stride, width)
    if name not in _CLASSIFIERS:
        raise InputError(f"unknown backbone {name!r}: choose one of {', '.join(_CLASSIFIERS)}")
    if width != 1.0:
        raise InputError(f"{name} has no width {width}: only mobilenetv2 takes one")
    return ResNet50(output_stride) if name == "resnet50" else EfficientNetLite0(output_stride)


def load_imagenet(backbone: Backbone, name: str, state: dict[str, torch.Tensor]) -> None:
    """Load an ImageNet state dict of torchvision, or for EfficientNet-Lite0 of efficientnet_lite_pytorch; its
    classifier and a 1280-channel layer before it are ignored.

    Raises InputError naming every parameter that is missing, extra or of another shape.
    """
    wanted, state = backbone.state_dict(), own_names(state) if name == EFFICIENTNET_LITE0 else state
    given = {key: value for key, value in state.items() if not key.startswith(_CLASSIFIERS[name])}
    missing = [key for key in wanted if key not in given and not key.endswith("num_batches_tracked")]
    extra = [key for key in given if key not in wanted]
    shapes = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    if missing or extra or shapes:
        raise InputError(
            f"these are not ImageNet weights of {name}: missing {_few(missing)}; extra {_few(extra)}; "
            f"other shape {_few(shapes)}"
        )
    backbone.load_state_dict(given, strict=False)
    if isinstance(backbone, EfficientNetLite0):
        take_input_of(backbone, MEAN, STD)


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
