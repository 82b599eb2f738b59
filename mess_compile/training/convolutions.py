"""Computes dilated depthwise convolutions fast on a CPU: PyTorch's own take several times as long to train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

_MOST_DIRECT = 4
"""Largest dilation whose forward pass oneDNN computes fast; it has no fast gradient of any dilation above 1."""


def use_fast_convolutions(module: nn.Module) -> None:
    """Turn every dilated depthwise convolution below `module` into one that trains fast on a CPU.

    The state's names and the results stay the same, up to the order in which sums round.
    """
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _is_dilated_depthwise(layer):
            layer.__class__ = DilatedDepthwiseConv2d


def _is_dilated_depthwise(layer: nn.Conv2d) -> bool:
    """Whether it has a square kernel, stride 1, no bias, and a map of the same size as its input."""
    d, k = layer.dilation[0], layer.kernel_size[0]
    square = layer.dilation == (d, d) and layer.kernel_size == (k, k) and k % 2 == 1
    same_size = square and layer.stride == (1, 1) and layer.padding == (d * (k // 2), d * (k // 2))
    depthwise = layer.groups == layer.in_channels == layer.out_channels
    return depthwise and same_size and d > 1 and layer.bias is None and layer.padding_mode == "zeros"


class DilatedDepthwiseConv2d(nn.Conv2d):
    """A convolution as `_is_dilated_depthwise` describes it, computed by other operations where that is faster."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        if other or torch.onnx.is_in_onnx_export():
            return super().forward(x)
        y: torch.Tensor = _DilatedDepthwise.apply(x, self.weight, self.dilation[0])  # type: ignore[no-untyped-call]
        return y


class _DilatedDepthwise(torch.autograd.Function):
    """(n, C, h, w), (C, 1, k, k), dilation -> (n, C, h, w)."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, weight: torch.Tensor, dilation: int) -> torch.Tensor:
        context.save_for_backward(x, weight)
        context.dilation = dilation
        return _convolved(x, weight, dilation)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = context.saved_tensors
        of_x = _convolved(gradient, weight.flip(2, 3), context.dilation) if context.needs_input_grad[0] else None
        of_weight = _weight_gradient(x, gradient, weight, context.dilation) if context.needs_input_grad[1] else None
        return of_x, of_weight, None


def _convolved(x: torch.Tensor, weight: torch.Tensor, dilation: int) -> torch.Tensor:
    channels, reach = weight.shape[0], weight.shape[2] // 2
    if dilation <= _MOST_DIRECT:
        return functional.conv2d(x, weight, None, 1, dilation * reach, dilation, channels)
    n, _, h, w = x.shape
    apart = functional.conv2d(_apart(x, dilation), weight, None, 1, reach, 1, channels)
    return _together(apart, dilation, (n, h, w))


def _apart(x: torch.Tensor, dilation: int) -> torch.Tensor:
    """Every d-th row and column as an image of its own, (n d d, C, h / d, w / d), padded with zeros: there the dilated
    convolution is one without dilation."""
    n, c, h, w = x.shape
    rows, columns = -(-h // dilation), -(-w // dilation)
    padded = functional.pad(x, (0, columns * dilation - w, 0, rows * dilation - h)).permute(0, 2, 3, 1)
    parts = padded.reshape(n, rows, dilation, columns, dilation, c).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(n * dilation**2, rows, columns, c).permute(0, 3, 1, 2)


def _together(apart: torch.Tensor, dilation: int, nhw: tuple[int, int, int]) -> torch.Tensor:
    """The inverse of `_apart`, channels last."""
    (_, c, rows, columns), (n, h, w) = apart.shape, nhw
    parts = apart.permute(0, 2, 3, 1).reshape(n, dilation, dilation, rows, columns, c).permute(0, 3, 1, 4, 2, 5)
    whole = parts.reshape(n, rows * dilation, columns * dilation, c)[:, :h, :w]
    return whole.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _weight_gradient(x: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor, dilation: int) -> torch.Tensor:
    if dilation > _MOST_DIRECT:
        return _summed_taps(x, gradient, weight, dilation)
    parts = _apart(gradient, dilation), _apart(x, dilation)
    one, channels, reach = [1, 1], weight.shape[0], [weight.shape[2] // 2] * 2
    wanted = [False, True, False]  # of the input, the weight, the bias
    found = torch.ops.aten.convolution_backward(*parts, weight, None, one, reach, one, False, [0, 0], channels, wanted)
    return found[1]  # type: ignore[no-any-return]


def _summed_taps(x: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor, dilation: int) -> torch.Tensor:
    """(C, 1, k, k): for each tap, the sum of the products of a shifted input and the gradient.

    `_apart` would make many images of a few pixels, for which oneDNN is slow.
    """
    h, w = x.shape[2:]
    found, taps = torch.zeros_like(weight), weight.shape[2]
    for row in range(taps):
        for column in range(taps):
            down, right = (row - taps // 2) * dilation, (column - taps // 2) * dilation
            if abs(down) < h and abs(right) < w:
                seen = x[:, :, _overlap(h, down), _overlap(w, right)]
                met = gradient[:, :, _overlap(h, -down), _overlap(w, -right)]
                found[:, 0, row, column] = (seen * met).sum((0, 2, 3))
    return found


def _overlap(length: int, shift: int) -> slice:
    """The part of a side that still has a neighbour when the side is shifted."""
    return slice(max(0, shift), length + min(0, shift))
