"""Normalises a model of any exporter so that it can be cut: standard nodes, opset 17, static shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from mess_compile.graph.constant_fold import has_subgraph
from mess_compile.graph.exits_toml import ExitsFile, InputRule, nearest
from mess_compile.graph.node_builder import IR_VERSION, keep
from mess_compile.graph.opset import to_our_opset
from mess_compile.graph.opset_context import EXPORT_AT
from mess_compile.graph.shapes import fold_shapes
from mess_compile.graph.workload import tensor_spec
from mess_compile.network import MAX_SIDE
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import TensorSpec

_STANDARD = ("", "ai.onnx")


def check_valid(model: onnx.ModelProto, path: Path) -> None:
    """Raises InputError when the model at `path` is not valid ONNX, or its external data are outside its folder."""
    newest = onnx.defs.onnx_opset_version()
    opset = max((entry.version for entry in model.opset_import if entry.domain in _STANDARD), default=1)
    if opset > newest:
        raise InputError(
            f"{path} has opset {opset}, but the installed onnx ({onnx.__version__}) knows {newest} at most: run `pip "
            f"install -U onnx`, or {EXPORT_AT}"
        )
    try:
        onnx.checker.check_model(str(path) if model.ir_version <= onnx.IR_VERSION else _of_known_ir(model))
    except (onnx.checker.ValidationError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid ONNX: {error}") from error
    graph = model.graph
    texts = [text for node in graph.node for text in (node.name, *node.input, *node.output)]
    texts += [value.name for value in (*graph.initializer, *graph.input, *graph.output)]
    texts += [dim.dim_param for value in graph.input for dim in value.type.tensor_type.shape.dim]
    for text in texts:
        if isinstance(text, bytes):  # protobuf returns bytes for text that is not UTF-8
            raise InputError(f"{path} is not valid ONNX: the name {text!r} is not UTF-8")


def _of_known_ir(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for the checker, which refuses newer IR versions; their additions are not read here. Weights in other
    files are inputs in it.
    """
    copy: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    copy.ir_version = onnx.IR_VERSION
    external = [tensor for tensor in copy.graph.initializer if uses_external_data(tensor)]
    known = {value.name for value in copy.graph.input}
    copy.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in external
        if tensor.name not in known
    )
    keep(copy.graph.initializer, [tensor for tensor in copy.graph.initializer if not uses_external_data(tensor)])
    return copy


def inline_functions(model: onnx.ModelProto) -> None:
    """Replace calls to functions that the model defines with the nodes of their bodies."""
    if model.functions:
        model.CopyFrom(onnx.inliner.inline_local_functions(model))


def check_standard(model: onnx.ModelProto) -> None:
    """Raises InputError for what other engines and the cut do not support."""
    if model.graph.sparse_initializer:
        raise InputError("the model has sparse weights: export dense ones")
    for node in model.graph.node:
        name = node.name or (node.output[0] if node.output else node.op_type)
        if node.domain not in _STANDARD:
            raise InputError(
                f"node {name!r} is {node.domain}.{node.op_type}, outside the standard ONNX operators: export without "
                "custom or quantised operators"
            )
        if has_subgraph(node):
            raise InputError(f"node {name!r} ({node.op_type}) holds a subgraph: export without control flow")
        if any(uses_external_data(attribute.t) for attribute in node.attribute):
            raise InputError(f"node {name!r} keeps its constant in another file: only weights (initializers) may")


def name_outputs(model: onnx.ModelProto, exits: ExitsFile) -> None:
    """Make the tensors that `exits` names the outputs, and drop what none of them needs."""
    named = {f"[[exit]] {number}": point.tensor for number, point in enumerate(exits.points, start=1)}
    named |= {f"head {name}": head.logits for name, head in exits.heads.items()}
    made = [name for node in model.graph.node for name in node.output if name]
    for where, name in named.items():
        if name not in made and name not in [value.name for value in model.graph.input]:
            raise InputError(f"{where}: the model has no tensor {name!r}: {nearest(name, made)}")
    prune(model, [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(named.values()) if name in made])


def nodes_to(model: onnx.ModelProto, outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that the tensors `outputs` need, in running order."""
    wanted, nodes = set(outputs), []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            nodes.append(node)
            wanted.update(name for name in node.input if name)
    return nodes[::-1]


def prune(model: onnx.ModelProto, outputs: Sequence[onnx.ValueInfoProto]) -> None:
    """Let the model end in `outputs`, and drop nodes, weights and inputs that none of them needs."""
    graph, needed = model.graph, nodes_to(model, [value.name for value in outputs])
    wanted = {value.name for value in outputs} | {name for node in needed for name in node.input if name}
    keep(graph.node, needed)
    keep(graph.output, outputs)
    for field in (graph.initializer, graph.input):  # in place: weights may fill half the memory
        for index in reversed(range(len(field))):
            if field[index].name not in wanted:
                del field[index]


def fix_size(model: onnx.ModelProto, hw: tuple[int, int] | None) -> None:
    """Give an image input of dynamic height and width the size `hw`.

    Raises InputError when a dynamic one gets no size, or a fixed one another.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in [each for each in model.graph.input if each.name not in weights]:
        dims = value.type.tensor_type.shape.dim
        if len(dims) != 4:
            continue
        channel = 3 if dims[3].dim_value in (1, 3) and dims[1].dim_value not in (1, 3) else 1
        sides = [dims[place] for place in (1, 2, 3) if place != channel]
        if dims[channel].dim_value < 1:
            dims[channel].dim_value = 3
        if hw is None and any(side.dim_value < 1 for side in sides):
            raise InputError(
                f"input {value.name!r} has a dynamic height or width: fix its size with --input HxW, such as 512x512"
            )
        for side, wanted in zip(sides, hw or (), strict=False):
            if side.dim_value not in (0, wanted):
                raise InputError(
                    f"--input {hw[0]}x{hw[1]}: input {value.name!r} has the fixed size "  # type: ignore[index]
                    f"{sides[0].dim_value}x{sides[1].dim_value}: drop --input, or export the model at that size"
                )
            side.dim_value = wanted


def lift_to_float32(model: onnx.ModelProto, folder: Path) -> None:
    """Let a model that computes in float16, bfloat16 or float64 compute in float32; `folder` has its external data."""
    others = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in others:
            break
    else:
        return
    for tensor in model.graph.initializer:
        if tensor.data_type in others:
            values = numpy_helper.to_array(tensor, str(folder)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in others:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in others:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in others:
                values = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
    model.graph.ClearField("value_info")


def fixed_input(model: onnx.ModelProto, rule: InputRule) -> TensorSpec:
    """The model's image input, with batch set to 1. Raises InputError when there is another input, or another shape."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    names = ", ".join(repr(value.name) for value in inputs) or "none"
    if rule.tensor is not None and rule.tensor not in [value.name for value in inputs]:
        raise InputError(f"tensor of [input] is {rule.tensor!r}, but the exits need the inputs {names}")
    if len(inputs) != 1:
        raise InputError(f"the exits need {len(inputs)} inputs ({names}), not one image")
    keep(model.graph.input, inputs)
    model.graph.ClearField("value_info")  # shapes for a batch of another size
    value = model.graph.input[0]
    kind = value.type.tensor_type.elem_type
    if kind not in (TensorProto.FLOAT, TensorProto.UINT8):
        known = {number: name.lower() for name, number in TensorProto.DataType.items()}
        raise InputError(f"input {value.name!r} is {known.get(kind, kind)}: export with a float32 or uint8 input")
    dims = value.type.tensor_type.shape.dim
    if len(dims) == 4 and dims[0].dim_value < 1:
        dims[0].dim_value = 1
    spec = tensor_spec(value)
    _check_input(spec, rule)
    return spec


def _check_input(spec: TensorSpec, rule: InputRule) -> None:
    channels, wanted = rule.layout.index("C"), 1 if rule.channels == "GREY" else 3
    if len(spec.shape) != 4 or (spec.shape[0], spec.shape[channels]) != (1, wanted):
        raise InputError(
            f"input {spec.name!r} is {spec.shape}, not batch 1 and {wanted} channel{'s' * (wanted > 1)} in the layout "
            f"{rule.layout}: export with batch 1, or correct layout or channels of [input]"
        )
    if max(spec.shape) > MAX_SIDE:
        raise InputError(f"input {spec.name!r} is {spec.shape}: sides of more than {MAX_SIDE} are not supported")
    if spec.dtype == "uint8" and not rule.neutral:
        raise InputError(
            f"input {spec.name!r} is uint8, which requires scale '0-255', layout 'NHWC', channels 'RGB' and neither "
            "mean nor std; export a model with another input as float32"
        )


def at_our_opset(model: onnx.ModelProto) -> None:
    """Convert the model to opset 17, of the one standard domain. Raises InputError naming a node that cannot be
    converted.
    """
    versions = [entry.version for entry in model.opset_import if entry.domain in _STANDARD]
    for node in model.graph.node:
        node.ClearField("domain")
    del model.opset_import[:], model.functions[:]
    model.opset_import.append(helper.make_opsetid("", max(versions, default=1)))
    to_our_opset(model)
    fold_shapes(model)
    model.ir_version = IR_VERSION


def share_weights(model: onnx.ModelProto) -> None:
    """Let nodes read weights themselves instead of an Identity of them; a convolution's are then initializers."""
    weights = {tensor.name for tensor in model.graph.initializer}
    same: dict[str, str] = {}
    rest = []
    for node in model.graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type == "Identity" and node.input[0] in weights:
            same[node.output[0]] = node.input[0]
            continue
        if node.op_type in ("Conv", "ConvTranspose") and node.input[1] not in weights:
            raise InputError(
                f"node {node.name or node.output[0]!r} ({node.op_type}) computes its weights: export a float32 model, "
                "not a quantised one, with constant folding"
            )
        rest.append(node)
    keep(model.graph.node, rest)
