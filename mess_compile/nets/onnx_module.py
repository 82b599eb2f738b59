"""Turns an ONNX of opset 17 into a torch module whose parameters keep the names of its weights.

A converter of our own, since weights have to find their way back into the file by name, and tied ones once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

from mess_compile.graph.normalise import nodes_to
from mess_compile.graph.store import read_whole_model
from mess_compile.runtime.base.errors import InputError

Tensor = torch.Tensor
Attributes = dict[str, Any]
_LEARN = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "MatMul": (0, 1),
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "PRelu": (1,),
}
"""Operators whose weights are trained, and which of their inputs these are. Statistics of BatchNorm stay."""


class OnnxModule(nn.Module):
    """Computes `outputs` of the model from `image` uint8 (n, H, W, 3); the model's batch is 1, that of the module any.

    `weight_names` maps each parameter to the initializer that it came from. Raises InputError naming a node whose
    operator is not known here.
    """

    def __init__(self, model: onnx.ModelProto, outputs: Sequence[str]) -> None:
        super().__init__()
        self.outputs = tuple(outputs)
        self._nodes = nodes_to(model, outputs)
        unknown = [node for node in self._nodes if node.op_type not in _OPERATORS]
        if unknown:
            raise InputError(
                f"node {unknown[0].name or unknown[0].output[0]!r} ({unknown[0].op_type}) cannot be trained by "
                "mess-compile: attach with frozen weights (--epochs 0 N)"
            )
        self._attributes = [
            {each.name: helper.get_attribute_value(each) for each in node.attribute} for node in self._nodes
        ]
        self.weight_names: dict[str, str] = {}
        self._sizes: dict[str, Any] = {}
        self._places: dict[str, str] = {}
        self._store(model)
        self._last_use = {name: step for step, node in enumerate(self._nodes) for name in node.input}

    def _store(self, model: onnx.ModelProto) -> None:
        """Keep weights as parameters, other floats as buffers, and integers as Python numbers."""
        read = {name for node in self._nodes for name in node.input}
        learn = {
            node.input[place]
            for node in self._nodes
            for place in _LEARN.get(node.op_type, ())
            if place < len(node.input)
        } | _biases(self._nodes)
        for number, tensor in enumerate(model.graph.initializer):
            if tensor.name not in read:
                continue
            values = numpy_helper.to_array(tensor)
            if values.dtype.kind != "f":
                self._sizes[tensor.name] = values
                continue
            place = f"w{number}"
            self._places[tensor.name] = place
            stored = torch.from_numpy(values.astype(np.float32))
            if tensor.name in learn:
                self.register_parameter(place, nn.Parameter(stored))
                self.weight_names[place] = tensor.name
            else:
                self.register_buffer(place, stored, persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        made = self.tensors(image)
        return tuple(made[name] for name in self.outputs)

    def tensors(self, image: Tensor) -> dict[str, Tensor]:
        """The outputs by name; other tensors are let go when nobody needs them any more."""
        known: dict[str, Any] = {"image": image}
        for step, (node, attributes) in enumerate(zip(self._nodes, self._attributes, strict=True)):
            inputs = [self._value(name, known) for name in node.input]
            made = _OPERATORS[node.op_type](inputs, attributes)
            for name, value in zip(node.output, made if isinstance(made, tuple | list) else (made,), strict=False):
                known[name] = value
            for name in node.input:
                if self._last_use[name] == step and name not in self.outputs:
                    known.pop(name, None)
        return {name: known[name] for name in self.outputs}

    def _value(self, name: str, known: dict[str, Any]) -> Any:
        if name in known:
            return known[name]
        if name in self._places:
            return getattr(self, self._places[name])
        return self._sizes.get(name)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """The trained weights by the names of their initializers, each once."""
        return {
            name: self.get_parameter(place).detach().cpu().numpy().astype(np.float32)
            for place, name in self.weight_names.items()
        }


def open_module(path: Path, outputs: Sequence[str]) -> OnnxModule:
    """The module of an ONNX file whose weights are in the store beside it."""
    return OnnxModule(read_whole_model(path), outputs)


def _biases(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    """Vectors that are added to the result of a MatMul."""
    products = {node.output[0] for node in nodes if node.op_type == "MatMul"}
    return {
        other
        for node in nodes
        if node.op_type == "Add"
        for one, other in (node.input[:2], node.input[1::-1])
        if one in products
    }


def _text(value: Any, default: str) -> str:
    return default if value is None else value.decode() if isinstance(value, bytes) else str(value)


def _numbers(values: Any) -> list[int]:
    return [int(value) for value in np.asarray(values).ravel()]


def _padded(x: Tensor, attributes: Attributes, kernel: Sequence[int], value: float = 0.0) -> Tensor:
    """`x` (n, C, h, w) with the pads of a convolution or pooling."""
    auto = _text(attributes.get("auto_pad"), "NOTSET")
    pads = list(attributes.get("pads", [0, 0, 0, 0]))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        strides, dilations = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
        pads = [0, 0, 0, 0]
        for axis in range(2):
            size = x.shape[2 + axis]
            need = (-(-size // strides[axis]) - 1) * strides[axis] + (kernel[axis] - 1) * dilations[axis] + 1 - size
            less, more = max(0, need) // 2, max(0, need) - max(0, need) // 2
            pads[axis], pads[2 + axis] = (less, more) if auto == "SAME_UPPER" else (more, less)
    if not any(pads):
        return x
    return functional.pad(x, (pads[1], pads[3], pads[0], pads[2]), value=value)


def _conv(inputs: list[Any], attributes: Attributes) -> Any:
    x, weight, *bias = inputs
    symmetric = _text(attributes.get("auto_pad"), "NOTSET") in ("NOTSET", "VALID")
    pads = list(attributes.get("pads", [0, 0, 0, 0]))
    dilation = _dilation_of_depthwise(x, weight, attributes)
    if dilation > 1 and symmetric and pads == [dilation] * 4:
        return _dilated_depthwise(x, weight, bias[0] if bias else None, dilation)
    padding: Any = 0
    if symmetric and pads[:2] == pads[2:]:
        padding = tuple(pads[:2])
    else:
        x = _padded(x, attributes, weight.shape[2:])
    return functional.conv2d(
        x,
        weight,
        bias[0] if bias else None,
        attributes.get("strides", 1),
        padding,
        attributes.get("dilations", 1),
        attributes.get("group", 1),
    )


def _dilation_of_depthwise(x: Tensor, weight: Tensor, attributes: Attributes) -> int:
    """The dilation of a 3 x 3 depthwise convolution of stride 1; 1 for every other."""
    dilations, strides = attributes.get("dilations", [1, 1]), attributes.get("strides", [1, 1])
    depthwise = weight.shape[1:] == (1, 3, 3) and attributes.get("group", 1) == x.shape[1] == weight.shape[0]
    return dilations[0] if depthwise and dilations[0] == dilations[1] and list(strides) == [1, 1] else 1


def _dilated_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """As dilation^2 convolutions without dilation, of every dilation-th row and column: on CPUs the gradients of
    torch's dilated one take several times longer.
    """
    n, channels, height, width = x.shape
    rows, columns = -(-height // dilation), -(-width // dilation)
    x = functional.pad(x, (0, columns * dilation - width, 0, rows * dilation - height))
    parts = x.reshape(n, channels, rows, dilation, columns, dilation).permute(0, 3, 5, 1, 2, 4)
    parts = parts.reshape(n * dilation**2, channels, rows, columns)
    made = functional.conv2d(parts, weight, bias, padding=1, groups=channels)
    made = made.reshape(n, dilation, dilation, channels, rows, columns).permute(0, 3, 4, 1, 5, 2)
    return made.reshape(n, channels, rows * dilation, columns * dilation)[:, :, :height, :width]


def _conv_transpose(inputs: list[Any], attributes: Attributes) -> Any:
    x, weight, *bias = inputs
    pads = list(attributes.get("pads", [0, 0, 0, 0]))
    strides = list(attributes.get("strides", [1, 1]))
    extra = list(attributes.get("output_padding", [0, 0]))
    dilations = list(attributes.get("dilations", [1, 1]))
    auto = _text(attributes.get("auto_pad"), "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        spare = [(weight.shape[2 + axis] - 1) * dilations[axis] + 1 - strides[axis] for axis in range(2)]
        pads = [max(0, each) // 2 for each in spare] + [max(0, each) - max(0, each) // 2 for each in spare]
        extra = [max(0, -each) for each in spare]
        if auto == "SAME_LOWER":
            pads = pads[2:] + pads[:2]
    made = functional.conv_transpose2d(
        x, weight, bias[0] if bias else None, strides, 0, 0, attributes.get("group", 1), dilations
    )
    made = functional.pad(made, (0, extra[1], 0, extra[0]))
    height, width = made.shape[2] - pads[2], made.shape[3] - pads[3]
    return made[:, :, pads[0] : height, pads[1] : width]


def _pool(kind: str) -> Callable[[list[Any], Attributes], Any]:
    def pooled(inputs: list[Any], attributes: Attributes) -> Any:
        x, kernel = inputs[0], list(attributes["kernel_shape"])
        strides = list(attributes.get("strides", [1, 1]))
        ceil = bool(attributes.get("ceil_mode", 0))
        if kind == "max":
            padded = _padded(x, attributes, kernel, float("-inf"))
            return functional.max_pool2d(padded, kernel, strides, 0, list(attributes.get("dilations", [1, 1])), ceil)
        padded = _padded(x, attributes, kernel)
        means = functional.avg_pool2d(padded, kernel, strides, 0, ceil)
        if attributes.get("count_include_pad", 0) or padded.shape == x.shape:
            return means
        ones = _padded(torch.ones_like(x[:1, :1]), attributes, kernel)
        return means / functional.avg_pool2d(ones, kernel, strides, 0, ceil)

    return pooled


def _resize(inputs: list[Any], attributes: Attributes) -> Any:
    """Linear and nearest, by sizes or scales, of the last two axes, or the two before the channels."""
    x = inputs[0]
    if len(inputs) > 3 and inputs[3] is not None:
        target = _numbers(inputs[3])
    else:
        target = [int(side * float(scale)) for side, scale in zip(x.shape, inputs[2], strict=True)]
    last = target[1] != x.shape[1] and len(x.shape) == 4 and target[3] == x.shape[3]  # channels are innermost
    planes = x.permute(0, 3, 1, 2) if last else x
    hw = target[1:3] if last else target[2:]
    mode = _text(attributes.get("mode"), "nearest")
    centres = _text(attributes.get("coordinate_transformation_mode"), "half_pixel")
    made = _linear(planes, hw, centres) if mode == "linear" else _nearest(planes, hw, centres, attributes)
    return made.permute(0, 2, 3, 1) if last else made


def _linear(x: Tensor, hw: Sequence[int], centres: str) -> Tensor:
    if centres in ("half_pixel", "pytorch_half_pixel"):
        return functional.interpolate(x, tuple(hw), mode="bilinear", align_corners=False)
    if centres == "align_corners":
        return functional.interpolate(x, tuple(hw), mode="bilinear", align_corners=True)
    for axis, size in zip((2, 3), hw, strict=True):
        position = (torch.arange(size, device=x.device) * (x.shape[axis] / size)).clamp(max=x.shape[axis] - 1)
        low = position.floor().long()
        high = (low + 1).clamp(max=x.shape[axis] - 1)
        share = (position - low).view(-1, 1) if axis == 2 else position - low
        x = x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share
    return x


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round_prefer_floor": lambda value: (value - 0.5).ceil(),
    "round_prefer_ceil": lambda value: (value + 0.5).floor(),
}


def _nearest(x: Tensor, hw: Sequence[int], centres: str, attributes: Attributes) -> Tensor:
    rounding = _text(attributes.get("nearest_mode"), "round_prefer_floor")
    for axis, size in zip((2, 3), hw, strict=True):
        index = torch.arange(size, device=x.device, dtype=torch.float64)
        length = x.shape[axis]
        if centres == "align_corners":
            position = index * ((length - 1) / max(1, size - 1))
        elif centres == "asymmetric":
            position = index * (length / size)
        else:
            position = (index + 0.5) * (length / size) - 0.5
        x = x.index_select(axis, _ROUNDINGS[rounding](position).clamp(0, length - 1).long())
    return x


def _reshape(inputs: list[Any], attributes: Attributes) -> Any:
    x, shape = inputs[0], _numbers(inputs[1])
    shape = [x.shape[i] if size == 0 and not attributes.get("allowzero", 0) else size for i, size in enumerate(shape)]
    if x.shape[0] > 1 and shape[0] == 1:  # the model's batch is 1
        shape[0] = x.shape[0]
    return x.reshape(shape)


def _expand(inputs: list[Any], attributes: Attributes) -> Any:
    x, shape = inputs[0], _numbers(inputs[1])
    return x * torch.ones(shape, dtype=x.dtype, device=x.device)


def _slice(inputs: list[Any], attributes: Attributes) -> Any:
    x, starts, ends = inputs[0], _numbers(inputs[1]), _numbers(inputs[2])
    axes = _numbers(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
    steps = _numbers(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index = range(x.shape[axis])[slice(start, end if abs(end) < 1 << 60 else None, step)]
        x = x.index_select(axis, torch.tensor(list(index), device=x.device))
    return x


def _split(inputs: list[Any], attributes: Attributes) -> Any:
    axis = attributes.get("axis", 0)
    if len(inputs) > 1 and inputs[1] is not None:
        return inputs[0].split(_numbers(inputs[1]), axis)
    return inputs[0].chunk(int(attributes.get("num_outputs", 2)), axis)


def _pad(inputs: list[Any], attributes: Attributes) -> Any:
    pads, rank = _numbers(inputs[1]), inputs[0].ndim
    value = float(inputs[2]) if len(inputs) > 2 and inputs[2] is not None else 0.0
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}[
        _text(attributes.get("mode"), "constant")
    ]
    flat = [pads[end * rank + axis] for axis in reversed(range(rank)) for end in (0, 1)]
    if mode == "constant":
        return functional.pad(inputs[0], flat, value=value)
    return functional.pad(inputs[0], flat[: 2 * (rank - 2)], mode=mode)


def _norm(inputs: list[Any], attributes: Attributes) -> Any:
    x, scale, bias, mean, variance = inputs
    return functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, attributes.get("epsilon", 1e-5))


def _layer_norm(inputs: list[Any], attributes: Attributes) -> Any:
    x, scale = inputs[:2]
    bias = inputs[2] if len(inputs) > 2 else None
    axis = attributes.get("axis", -1)
    return functional.layer_norm(x, x.shape[axis:], scale, bias, attributes.get("epsilon", 1e-5))


def _gemm(inputs: list[Any], attributes: Attributes) -> Any:
    a, b = inputs[0], inputs[1]
    a = a.transpose(0, 1) if attributes.get("transA") else a
    b = b.transpose(0, 1) if attributes.get("transB") else b
    made = attributes.get("alpha", 1.0) * (a @ b)
    return made + attributes.get("beta", 1.0) * inputs[2] if len(inputs) > 2 else made


def _axes(inputs: list[Any], attributes: Attributes) -> Any:
    if len(inputs) > 1 and inputs[1] is not None:
        return _numbers(inputs[1])
    return list(attributes.get("axes", range(inputs[0].ndim)))


def _reduce(function: Callable[..., Tensor]) -> Callable[[list[Any], Attributes], Any]:
    def reduced(inputs: list[Any], attributes: Attributes) -> Any:
        return function(inputs[0], _axes(inputs, attributes), bool(attributes.get("keepdims", 1)))

    return reduced


def _squeeze(inputs: list[Any], attributes: Attributes) -> Any:
    axes = _numbers(inputs[1]) if len(inputs) > 1 else [i for i, side in enumerate(inputs[0].shape) if side == 1]
    return inputs[0].squeeze(tuple(axes))


def _unsqueeze(inputs: list[Any], attributes: Attributes) -> Any:
    x, axes = inputs[0], _numbers(inputs[1])
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _cast(inputs: list[Any], attributes: Attributes) -> Any:
    kinds = {TensorProto.FLOAT: torch.float32, TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32,
             TensorProto.BOOL: torch.bool, TensorProto.UINT8: torch.uint8}  # fmt: skip
    return inputs[0].to(kinds[attributes["to"]])


def _gather(inputs: list[Any], attributes: Attributes) -> Any:
    x, axis = inputs[0], attributes.get("axis", 0)
    index = torch.as_tensor(inputs[1], device=x.device).long()
    made = x.index_select(axis, index.reshape(-1) % x.shape[axis])
    return made.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _clip(inputs: list[Any], attributes: Attributes) -> Any:
    low, high = (None if len(inputs) <= i or inputs[i] is None else float(inputs[i]) for i in (1, 2))
    if low is not None and high is not None:
        return functional.hardtanh(inputs[0], low, high)  # its gradient is three times faster than clamp's
    return torch.clamp(inputs[0], low, high)


def _prelu(inputs: list[Any], attributes: Attributes) -> Any:
    x, slope = inputs
    return torch.where(x >= 0, x, x * slope)


def _shuffle(inputs: list[Any], attributes: Attributes) -> Any:
    x, size = inputs[0], attributes["blocksize"]
    if _text(attributes.get("mode"), "DCR") == "CRD":
        return functional.pixel_shuffle(x, size)
    n, channels, height, width = x.shape
    parts = x.reshape(n, size, size, channels // size**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, channels // size**2, height * size, width * size)


def _space_to_depth(inputs: list[Any], attributes: Attributes) -> Any:
    x, size = inputs[0], attributes["blocksize"]
    n, channels, height, width = x.shape
    parts = x.reshape(n, channels, height // size, size, width // size, size).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, channels * size**2, height // size, width // size)


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[list[Any], Attributes], Any]:
    def folded(inputs: list[Any], attributes: Attributes) -> Any:
        total = inputs[0]
        for other in inputs[1:]:
            total = function(total, other)
        return total

    return folded


def _tensors(function: Callable[..., Any]) -> Callable[[list[Any], Attributes], Any]:
    """A function of tensors alone; integers, which are kept as numbers, become tensors."""

    def of_tensors(inputs: list[Any], attributes: Attributes) -> Any:
        device = next((each.device for each in inputs if isinstance(each, torch.Tensor)), None)
        return function(*(torch.as_tensor(each, device=device) for each in inputs))

    return of_tensors


_OPERATORS: dict[str, Callable[[list[Any], Attributes], Any]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _pool("max"),
    "AveragePool": _pool("average"),
    "GlobalAveragePool": lambda x, a: x[0].mean((2, 3), keepdim=True),
    "GlobalMaxPool": lambda x, a: x[0].amax((2, 3), keepdim=True),
    "BatchNormalization": _norm,
    "InstanceNormalization": lambda x, a: functional.instance_norm(
        x[0], weight=x[1], bias=x[2], eps=a.get("epsilon", 1e-5)
    ),
    "LayerNormalization": _layer_norm,
    "Resize": _resize,
    "Relu": lambda x, a: functional.relu(x[0]),
    "LeakyRelu": lambda x, a: functional.leaky_relu(x[0], a.get("alpha", 0.01)),
    "PRelu": _prelu,
    "Clip": _clip,
    "Sigmoid": lambda x, a: x[0].sigmoid(),
    "HardSigmoid": lambda x, a: (x[0] * a.get("alpha", 0.2) + a.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda x, a: functional.hardswish(x[0]),
    "Tanh": lambda x, a: x[0].tanh(),
    "Elu": lambda x, a: functional.elu(x[0], a.get("alpha", 1.0)),
    "Selu": lambda x, a: functional.selu(x[0]),
    "Softplus": lambda x, a: functional.softplus(x[0]),
    "Erf": lambda x, a: x[0].erf(),
    "Softmax": lambda x, a: x[0].softmax(a.get("axis", -1)),
    "LogSoftmax": lambda x, a: x[0].log_softmax(a.get("axis", -1)),
    "Add": _tensors(lambda x, y: x + y),
    "Sub": _tensors(lambda x, y: x - y),
    "Mul": _tensors(lambda x, y: x * y),
    "Div": _tensors(lambda x, y: x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")),
    "Pow": _tensors(lambda x, y: x**y),
    "Sqrt": lambda x, a: x[0].sqrt(),
    "Exp": lambda x, a: x[0].exp(),
    "Log": lambda x, a: x[0].log(),
    "Neg": lambda x, a: -x[0],
    "Abs": lambda x, a: x[0].abs(),
    "Reciprocal": lambda x, a: 1 / x[0],
    "Floor": lambda x, a: x[0].floor(),
    "Ceil": lambda x, a: x[0].ceil(),
    "Sin": lambda x, a: x[0].sin(),
    "Cos": lambda x, a: x[0].cos(),
    "Min": _variadic(torch.minimum),
    "Max": _variadic(torch.maximum),
    "Sum": _variadic(torch.add),
    "Greater": _tensors(torch.gt),
    "GreaterOrEqual": _tensors(torch.ge),
    "Less": _tensors(torch.lt),
    "LessOrEqual": _tensors(torch.le),
    "Equal": _tensors(torch.eq),
    "Where": _tensors(torch.where),
    "MatMul": _tensors(torch.matmul),
    "Gemm": _gemm,
    "Concat": lambda x, a: torch.cat(x, a["axis"]),
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Reshape": _reshape,
    "Flatten": lambda x, a: x[0].flatten(a.get("axis", 1)),
    "Transpose": lambda x, a: x[0].permute(*a.get("perm", range(x[0].ndim)[::-1])),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Tile": lambda x, a: x[0].repeat(*_numbers(x[1])),
    "Pad": _pad,
    "Identity": lambda x, a: x[0],
    "Dropout": lambda x, a: x[0],
    "Cast": _cast,
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "DepthToSpace": _shuffle,
    "SpaceToDepth": _space_to_depth,
    "ArgMax": lambda x, a: x[0].argmax(a.get("axis", 0), bool(a.get("keepdims", 1))),
}
