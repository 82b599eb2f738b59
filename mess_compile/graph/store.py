"""Reads and writes ONNX files that share one store of weights, each weight a file named by the SHA-256 of its bytes."""

from __future__ import annotations

import hashlib
import re
from math import prod
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from mess_compile import files
from mess_compile.graph.node_builder import IR_VERSION, OPSET, keep
from mess_compile.graph.workload import count_macs, tensor_spec, workspace_bytes
from mess_compile.network import GraphSpec
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.base.lfs_pointers import refuse_pointer

_OTHER_FLOATS = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
INLINE_BYTES = 1024
"""Smaller tensors stay in the ONNX file: shape inference reads some of them."""
WEIGHTS = "weights"
_WEIGHT = re.compile(rf"{WEIGHTS}/[0-9a-f]{{64}}")
_EXPORT = "run `mess-compile export`"


def read_model(path: Path) -> onnx.ModelProto:
    """An ONNX model without its external weights. Raises InputError for anything else."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    refuse_pointer(path)
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise InputError(
            f"{path} is not an ONNX model, or is truncated: export the network again, or copy the whole file"
        ) from error
    if not model.graph.node:
        raise InputError(f"{path} is not an ONNX model, or has no nodes")
    return model


def stored_weights(path: Path) -> list[Path]:
    """The weight files in the store beside an ONNX model that it names, each once. Raises InputError for others."""
    tensors = [each for each in read_model(path).graph.initializer if external_data_helper.uses_external_data(each)]
    locations = {_location(each): each.name for each in tensors}
    for location, name in locations.items():
        if not _WEIGHT.fullmatch(location):
            raise InputError(f"{path} has {name} in {location!r}, outside its weight store: {_EXPORT}")
    return [path.parent / location for location in locations]


def _location(tensor: onnx.TensorProto) -> str:
    return next((str(entry.value) for entry in tensor.external_data if entry.key == "location"), "")


def read_whole_model(path: Path) -> onnx.ModelProto:
    """A graph with its weights from the store beside it. Raises InputError when one is missing or was changed."""
    model = read_model(path)
    for tensor in model.graph.initializer:
        if external_data_helper.uses_external_data(tensor):
            _take(tensor, _stored(path.parent, _location(tensor)))
    return model


def _stored(folder: Path, location: str) -> bytes:
    """The bytes of a weight in the store; checks them against its name."""
    if not _WEIGHT.fullmatch(location):
        raise InputError(f"{location!r} is not a weight of the store in {folder}: {_EXPORT}")
    try:
        data = (folder / location).read_bytes()
    except OSError as error:
        raise InputError(f"{folder / location} cannot be read ({error.strerror}): {_EXPORT}") from error
    refuse_pointer(folder / location, data)
    if hashlib.sha256(data).hexdigest() != Path(location).name:
        raise InputError(f"{folder / location} was changed after export: {_EXPORT}")
    return data


def _take(tensor: onnx.TensorProto, data: bytes) -> None:
    tensor.raw_data = data
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.DEFAULT


def store_weight(tensor: onnx.TensorProto, folder: Path) -> None:
    """Move a tensor's bytes to `folder/weights/SHA256` and leave a reference, if it has at least 1024 bytes."""
    data = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
    if len(data) < INLINE_BYTES:
        return
    location = f"{WEIGHTS}/{hashlib.sha256(data).hexdigest()}"
    if not (folder / location).exists():
        with files.replaced(folder / location) as temporary:
            temporary.write_bytes(data)
    reference = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    reference.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(data)))):
        reference.external_data.add(key=key, value=value)
    tensor.CopyFrom(reference)


def externalise(model: onnx.ModelProto, folder: Path, source: Path | None = None) -> None:
    """Move all weights of `model` into the store in `folder`; `source` is the folder of its own external data.

    One weight is in memory at a time. Without `source`, references are not changed: they point into the store. Raises
    InputError when external data is missing, short or outside `source`.
    """
    for tensor in model.graph.initializer:
        if external_data_helper.uses_external_data(tensor):
            if source is None:
                continue
            _load(tensor, source)
        store_weight(tensor, folder)


def widen_weights(model: onnx.ModelProto, folder: Path) -> None:
    """Fold casts of weights from fp16, bf16 or fp64 to fp32; weights of 1024 bytes and more are in the store in
    `folder`.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type in _OTHER_FLOATS}
    remaining, widened = [], []
    for node in model.graph.node:
        weight = weights.get(node.input[0]) if node.op_type == "Cast" else None
        if weight is None or helper.get_node_attr_value(node, "to") != TensorProto.FLOAT:
            remaining.append(node)
            continue
        whole = TensorProto.FromString(weight.SerializeToString())
        if external_data_helper.uses_external_data(whole):
            _take(whole, _stored(folder, _location(whole)))
        wide = numpy_helper.from_array(numpy_helper.to_array(whole).astype(np.float32), node.output[0])
        store_weight(wide, folder)
        widened.append(wide)
    keep(model.graph.node, remaining)
    model.graph.initializer.extend(widened)


def drop_unread_weights(folder: Path) -> None:
    """Remove from the store what no graph in `folder` names."""
    read = {path for graph in folder.glob("*.onnx") for path in stored_weights(graph)}
    for path in (folder / WEIGHTS).glob("*"):
        if path not in read:
            path.unlink()


def move_weights_out(path: Path) -> None:
    """Move the weights inside an ONNX file to the store beside it."""
    model = read_model(path)
    externalise(model, path.parent)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _load(tensor: onnx.TensorProto, source: Path) -> None:
    location = _location(tensor)
    if location and Path(location).name == location:
        refuse_pointer(source / location)
    try:
        external_data_helper.load_external_data_for_tensor(tensor, str(source))
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        raise InputError(f"weight {tensor.name!r}: its external data in {source} cannot be read: {error}") from error
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.DEFAULT
    found, expected = len(tensor.raw_data), _weight_bytes(tensor)
    if found != expected:
        raise InputError(
            f"weight {tensor.name!r} has {found} of {expected} bytes in {source}: check whether a file is truncated"
        )


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Check and write a model whose weights are in the store beside it; equal models give equal bytes.

    Raises InputError when the model is not valid ONNX of opset 17.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset != OPSET:
        raise InputError(
            f"graph {path.stem} has opset {opset}, but TensorRT 8.5 supports {OPSET}: export at opset {OPSET}"
        )
    _strip(model, path.stem)
    path.write_bytes(model.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise InputError(f"graph {path.stem} is not valid ONNX: {error}") from error


def write_graph(model: onnx.ModelProto, folder: Path, name: str, macs: int | None = None) -> GraphSpec:
    """Write `folder/NAME.onnx`, its weights into the store, and describe it; counts MACs unless given."""
    externalise(model, folder)
    path = folder / f"{name}.onnx"
    write_model(model, path)
    return GraphSpec(
        name=name,
        path=path.name,
        sha256=files.sha256_of_file(path),
        inputs=tuple(tensor_spec(value) for value in model.graph.input),
        outputs=tuple(tensor_spec(value) for value in model.graph.output),
        macs=count_macs(model) if macs is None else macs,
        bytes=sum(_weight_bytes(tensor) for tensor in model.graph.initializer),
        workspace_bytes=workspace_bytes(model),
    )


def _weight_bytes(tensor: onnx.TensorProto) -> int:
    return int(prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _strip(model: onnx.ModelProto, name: str) -> None:
    """Remove what names a producer or changes from run to run."""
    for field in ("producer_name", "producer_version", "doc_string", "model_version", "domain"):
        model.ClearField(field)
    model.ir_version = IR_VERSION
    model.graph.name = name
    model.graph.ClearField("doc_string")
    model.graph.ClearField("value_info")
    for part in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        part.ClearField("doc_string")
        if hasattr(part, "metadata_props"):  # the stack trace of an exporter, with its machine's paths
            part.ClearField("metadata_props")
