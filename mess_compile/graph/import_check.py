"""Checks the whole-network form against the original model, and names the node that the conversion changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from mess_compile.array_types import Array
from mess_compile.graph.compare import run
from mess_compile.graph.cut import NETWORK, logits_name
from mess_compile.graph.cut_points import Places
from mess_compile.graph.node_builder import IR_VERSION, OPSET, keep
from mess_compile.graph.opset_context import EXPORT_AT
from mess_compile.graph.recompose_check import check_finite, shares_of_allowed, what_is_not_finite
from mess_compile.graph.store import read_model
from mess_compile.graph.workload import activations
from mess_compile.runtime.base.errors import EngineError, InputError, one_line
from mess_compile.runtime.engines.engine import Library

_ORIGINAL = "original.onnx"
_PROBE = "probe.onnx"
Inputs = dict[str, Array]


def write_original(model: onnx.ModelProto, outputs: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Write the original model, at its own opset, ending in `outputs`, float32 tensors of these shapes; its weights are
    in the store in `folder`.
    """
    model.ir_version = IR_VERSION  # ONNX Runtime refuses newer ones than it knows; nothing new of them is used here
    _write(model, folder / _ORIGINAL, outputs)


def original_logits(
    library: Library,
    folder: Path,
    places: Places,
    names: Mapping[str, str],
    inputs: Sequence[Inputs],
    frames: Sequence[Array],
) -> list[Inputs]:
    """The logits f32 (1, K, h, w) of the original model, by head, for each of `inputs`; see `original_outputs`."""
    pairs = {spec.name: logits_name(head) for head, spec in places.logits.items()}
    found = original_outputs(library, folder, pairs, names, inputs, frames, _with_background)
    return [{head: outputs[spec.name] for head, spec in places.logits.items()} for outputs in found]


def original_outputs(
    library: Library,
    folder: Path,
    pairs: Mapping[str, str],
    names: Mapping[str, str],
    inputs: Sequence[Inputs],
    frames: Sequence[Array],
    form: Callable[[Array], Array] = np.asarray,
) -> list[Inputs]:
    """The outputs of the original model, in the given form, by their names, for each of `inputs`.

    `folder/network.onnx` gives the same for `frames`, by the names in `pairs`; there the tensors of the model have the
    `names` given, or their own. The original model is removed. Raises InputError when it does not run or gives NaN or
    infinity, and when the conversion changed what it computes, naming the node.
    """
    expected = [
        {name: form(outputs[name]) for name in pairs} for outputs in _outputs(library, folder / _ORIGINAL, inputs)
    ]
    found = _outputs(library, folder / NETWORK, [{"image": frame[None]} for frame in frames])
    for index, (wanted, ours) in enumerate(zip(expected, found, strict=True)):
        try:
            check_finite({_head_of(pairs[name]): values for name, values in wanted.items()}, index)
        except InputError as error:
            raise InputError(f"{error}{_first_broken(library, folder, names, inputs[index])}") from error
        if any(shares_of_allowed(ours[pairs[name]], values) > 1 for name, values in wanted.items()):
            raise InputError(_changed(library, folder, names, inputs[index], frames[index]))
    (folder / _ORIGINAL).unlink()
    return expected


def _head_of(name: str) -> str:
    """The head of a logits' name; another name as it is."""
    return name.removeprefix(logits_name(""))


def _with_background(values: Array) -> Array:
    """Logits (1, K, h, w); one channel x becomes [0, x]."""
    return np.concatenate([np.zeros_like(values), values], axis=1) if values.shape[1] == 1 else values


def _write(model: onnx.ModelProto, path: Path, outputs: Mapping[str, tuple[int, ...]]) -> None:
    keep(
        model.graph.output, [helper.make_tensor_value_info(name, TensorProto.FLOAT, outputs[name]) for name in outputs]
    )
    path.write_bytes(model.SerializeToString())


def _outputs(library: Library, path: Path, feeds: Sequence[Inputs]) -> list[Inputs]:
    """Computed by ONNX Runtime, or if it lacks an operator by ONNX's reference implementation. Raises InputError."""
    try:
        with closing(library.load(path)) as loaded:
            return [dict(run(library, loaded, feed)) for feed in feeds]
    except EngineError as error:
        try:
            evaluator: Any = ReferenceEvaluator(str(path))
            return [dict(zip(evaluator.output_names, evaluator.run(None, feed), strict=True)) for feed in feeds]
        except Exception as second:  # whatever its operators raise
            raise InputError(
                f"the model does not run, so the conversion cannot be checked: {one_line(error)}; ONNX's reference "
                f"implementation: {one_line(second)}; {EXPORT_AT}"
            ) from error


def _first_broken(library: Library, folder: Path, names: Mapping[str, str], feed: Inputs) -> str:
    """Where NaN or infinity first occurs, as the end of a message."""
    found = _probed(library, folder, _ORIGINAL, _common(folder, names), feed)
    for name, values in found.items():
        if what_is_not_finite(values) is not None:
            return f"; the first tensor with {what_is_not_finite(values)} is {name!r}"
    return ""


def _changed(library: Library, folder: Path, names: Mapping[str, str], feed: Inputs, frame: Array) -> str:
    """The node whose result the conversion changed."""
    common, original = _common(folder, names), read_model(folder / _ORIGINAL)
    wanted = _probed(library, folder, _ORIGINAL, common, feed)
    ours = {names.get(name, name): shape for name, shape in common.items()}
    found = _probed(library, folder, NETWORK, ours, {"image": frame[None]})
    makers = {name: node for node in original.graph.node for name in node.output}
    what, more = "the model", ""
    for name, values in wanted.items():
        same = found[names.get(name, name)]
        if shares_of_allowed(same, values) > 1:
            what = f"node {makers[name].name or name!r} ({makers[name].op_type})"
            more = f" by {np.abs(same - values).max():.3g}" if same.shape == values.shape else " in shape"
            break
    opset = max(entry.version for entry in original.opset_import)
    return (
        f"converting the model from opset {opset} to {OPSET} changed what {what} computes{more}: this is a bug of "
        f"mess-compile, not of the model (please report it); until it is fixed, {EXPORT_AT}"
    )


def _common(folder: Path, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The float32 tensors that the original model and the whole-network form both compute, in running order."""
    ours = activations(read_model(folder / NETWORK))
    made = [name for node in read_model(folder / _ORIGINAL).graph.node for name in node.output if name]
    both = {name: ours[names.get(name, name)] for name in made if names.get(name, name) in ours}
    return {name: spec.shape for name, spec in both.items() if spec.dtype == "float32"}


def _probed(library: Library, folder: Path, file: str, outputs: Mapping[str, tuple[int, ...]], feed: Inputs) -> Inputs:
    """The values of these tensors of a model in `folder`."""
    _write(read_model(folder / file), folder / _PROBE, outputs)
    return _outputs(library, folder / _PROBE, [feed])[0]
