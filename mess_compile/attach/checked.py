"""Checks that a network in the whole-network form computes what it computed as it came."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mess_compile.attach.opened import OpenedNetwork
from mess_compile.attach.whole_form import WholeForm
from mess_compile.graph.cut import NETWORK
from mess_compile.graph.import_check import original_outputs, write_original
from mess_compile.graph.normalise import prune
from mess_compile.graph.store import write_model
from mess_compile.runtime.engines.engine import open_library


def check_whole_form(opened: OpenedNetwork, form: WholeForm, folder: Path, frames: Sequence[NDArray[np.uint8]]) -> None:
    """Compare the network as it came with its whole-network form on `frames` (H, W, 3) of its input size.

    `folder` has the weights of both, and no `network.onnx`. Raises InputError naming the node that was changed by the
    conversion, and by how much.
    """
    output = opened.end.output if opened.end.output.dtype == "float32" else opened.end.logits
    name = form.names.get(output.name, output.name)
    probe = onnx.ModelProto.FromString(form.model.SerializeToString())
    prune(probe, [helper.make_tensor_value_info(name, TensorProto.FLOAT, output.shape)])
    del probe.metadata_props[:]
    write_original(opened.original, {output.name: output.shape}, folder)
    write_model(probe, folder / NETWORK)
    rule: Any = opened.rule
    inputs = [{opened.image.name: _input(frame, opened, rule)} for frame in frames]
    try:
        with closing(open_library("onnxruntime")) as library:
            original_outputs(library, folder, {output.name: name}, form.names, inputs, frames)
    finally:
        (folder / NETWORK).unlink()


def _input(frame: NDArray[np.uint8], opened: OpenedNetwork, rule: Any) -> NDArray[Any]:
    values: NDArray[Any] = frame[None] if opened.image.dtype == "uint8" else rule.of_frame(frame)
    return values
