"""Converts a graph to fp16 or int8.

Inputs and outputs keep their types, fp32 between stages, so that graphs of different precisions can follow each other
in any order. A cast to fp32 and back between two fp16 graphs loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mess_compile.array_types import Array
from mess_compile.graph.node_builder import keep
from mess_compile.graph.workload import activations
from mess_compile.runtime.base.errors import EngineError, InputError

Feed = Mapping[str, Array]

MIN_CALIBRATION_FRAMES = 16
LARGEST_FP16 = 65504.0

CONVERTED = {"int8": ("Conv",), "fp16": ("Conv", "ConvTranspose"), "fp32": ()}
"""A graph is converted only if it contains one of these operators."""
_FP16_OPS = {
    *CONVERTED["fp16"], "BatchNormalization", "Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid",
    "HardSwish", "Tanh", "Add", "Sub", "Mul", "Div", "Max", "Min", "MaxPool", "Concat", "Split", "Slice", "Pad",
    "Expand", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity",
}  # fmt: skip
"""Operators that run in fp16 after a convolution. Sums over a map, interpolation and unknown operators stay fp32."""


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with its convolutions, and what follows them, in fp16; `model` contains its weights.

    Inputs and outputs, the image's normalisation and everything after `logits` (gate, interpolation, argmax) stay fp32.
    A graph without convolutions is returned unchanged. Raises InputError naming a weight beyond the range of fp16.
    """
    result = _copied(model)
    graph = result.graph
    chosen = _convolution_work(graph)
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    floats = {name for name, tensor in activations(model).items() if tensor.dtype == "float32"} | set(weights)
    read_as_float = {value.name for value in graph.output}
    read_as_float |= {name for index, node in enumerate(graph.node) if index not in chosen for name in node.input}
    nodes: list[onnx.NodeProto] = []
    narrow: set[str] = set()
    for index, node in enumerate(graph.node):
        if index not in chosen:
            nodes.append(node)
            continue
        for name in sorted(floats.intersection(node.input) - narrow):
            if name in weights:
                graph.initializer.append(_fp16_weight(weights[name]))
            else:
                nodes.append(_cast(name, _cast_name(name), TensorProto.FLOAT16))
        made = [name for name in node.output if name in floats]
        narrow |= {*floats.intersection(node.input), *made}
        for names in (node.input, node.output):
            names[:] = [_cast_name(name) if name in floats else name for name in names]
        nodes.append(node)
        nodes += [_cast(_cast_name(name), name, TensorProto.FLOAT) for name in made if name in read_as_float]
    _set_nodes(graph, nodes)
    return result


def is_fp16(model: onnx.ModelProto) -> bool:
    """Whether a graph was converted to fp16."""
    return any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)


def write_out_roundings(model: onnx.ModelProto) -> None:
    """Let an fp16 graph compute in fp32, with a Cast wherever fp16 would round: so a CPU can reproduce fp16."""
    graph = model.graph
    narrow = {name for name, tensor in activations(model).items() if tensor.dtype == "float16"}
    narrow |= {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Cast":
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            if name in narrow:
                node.input[place] = f"{node.output[0]}/input{place}"
                nodes.append(_cast(name, node.input[place], TensorProto.FLOAT))
        made = [name for name in node.output if name in narrow]
        node.output[:] = [f"{name}/exact" if name in narrow else name for name in node.output]
        nodes.append(node)
        nodes += [_cast(f"{name}/exact", name, TensorProto.FLOAT16) for name in made]
    _set_nodes(graph, nodes)


def _copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _convolution_work(graph: onnx.GraphProto) -> set[int]:
    """Positions of the nodes to convert to fp16: convolutions and what follows them, up to `logits`."""
    chosen: set[int] = set()
    after_convolution: set[str] = set()
    after_logits = {"logits"}
    for index, node in enumerate(graph.node):
        if after_logits.intersection(node.input):
            after_logits.update(node.output)
        elif node.op_type in CONVERTED["fp16"] or after_convolution.intersection(node.input):
            after_convolution.update(node.output)
            if node.op_type in _FP16_OPS and node.domain in ("", "ai.onnx"):
                chosen.add(index)
    return chosen


def _fp16_weight(tensor: onnx.TensorProto) -> onnx.TensorProto:
    values = numpy_helper.to_array(tensor)
    worst = values.flat[np.argmax(np.abs(values))] if values.size else 0.0  # NaN counts as the largest
    if not abs(worst) <= LARGEST_FP16:
        raise InputError(
            f"weight {tensor.name!r} contains {worst:.6g}, but fp16 ends at {LARGEST_FP16:.0f}: keep it in fp32"
        )
    return numpy_helper.from_array(values.astype(np.float16), _cast_name(tensor.name))


def _cast_name(name: str) -> str:
    return f"{name}/fp16"


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{source} to {target}", to=to)


def _set_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Let the graph consist of `nodes`, drop the weights that none of them reads, and clear inferred types."""
    keep(graph.node, nodes)
    read = {name for node in graph.node for name in node.input}
    keep(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in read])
    graph.ClearField("value_info")


def to_int8(model: onnx.ModelProto, calibration: Iterable[Feed]) -> onnx.ModelProto:
    """The graph with quantise-dequantise pairs at the inputs and weights of its convolutions; the rest is fp32.

    Depthwise convolutions stay fp32: eight bits cost them the most labels for the fewest multiplications, and
    TensorRT-RTX builds engines from quantised ones that are up to seven times larger. `model` contains its weights;
    `calibration` are inputs of this graph as they come from real images, one feed per frame, of which
    MIN_CALIBRATION_FRAMES are in memory. Ranges are the extremes seen. A graph without other convolutions is returned
    unchanged. Raises InputError for fewer frames than that, EngineError when the quantiser is not installed or refuses
    the graph.
    """
    named = _copied(model)
    depthwise = _depthwise_convolutions(model.graph)
    positions = [place for place, node in enumerate(model.graph.node) if node.op_type in CONVERTED["int8"]]
    if depthwise.issuperset(positions):
        return named
    feeds = iter(calibration)
    first = list(islice(feeds, MIN_CALIBRATION_FRAMES))
    check_calibration(len(first))
    for index, node in enumerate(named.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"  # the quantiser identifies nodes by name
    excluded = [named.graph.node[place].name for place in sorted(depthwise)]
    quantised = _quantised(named, chain(first, feeds), excluded)
    keep(quantised.metadata_props, model.metadata_props)
    return quantised


def _depthwise_convolutions(graph: onnx.GraphProto) -> set[int]:
    """Positions of the convolutions in which every group reads one channel of several."""
    narrow = {tensor.name for tensor in graph.initializer if tensor.dims[1:2] == [1]}
    return {
        place
        for place, node in enumerate(graph.node)
        if node.op_type == "Conv"
        and node.input[1] in narrow
        and any(a.name == "group" and a.i > 1 for a in node.attribute)
    }


def check_calibration(frames: int) -> None:
    """Raises InputError for too few frames."""
    if frames < MIN_CALIBRATION_FRAMES:
        raise InputError(
            f"int8 needs at least {MIN_CALIBRATION_FRAMES} frames to calibrate on, there are {frames}: take more from "
            "the training images"
        )


def quantiser() -> Any:
    """ONNX Runtime's quantiser. Raises EngineError when it is not installed."""
    try:
        from onnxruntime import quantization
    except ImportError as error:
        raise EngineError(f"ONNX Runtime cannot be imported ({error}): run `pip install onnxruntime`") from error
    return quantization


def _quantised(model: onnx.ModelProto, feeds: Iterator[Feed], excluded: list[str]) -> onnx.ModelProto:
    quantization = quantiser()
    # Tells the quantiser that its own preparation is done: it would rewrite the gate, and shapes are static already.
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "quantised.onnx"
        try:
            quantization.quantize_static(
                model,
                path,
                SimpleNamespace(get_next=partial(next, feeds, None)),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(CONVERTED["int8"]),
                nodes_to_exclude=excluded,
                per_channel=True,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.MinMax,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,  # TensorRT does not parse int32 biases
                    "QDQDisableWeightAdjustForInt32Bias": True,  # so there is no reason to coarsen weights for them
                    "OpTypesToExcludeOutputQuantization": list(CONVERTED["int8"]),
                },
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise EngineError(f"the quantiser of ONNX Runtime refuses the graph: {reason}") from error
        return onnx.load(str(path))
