"""Holds what the rules of an opset conversion know of the model, and the constants that they add to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from mess_compile.graph.node_builder import OPSET
from mess_compile.graph.shapes import known_shapes
from mess_compile.runtime.base.errors import InputError

EXPORT_AT = f"export the model at opset {OPSET} (PyTorch: torch.onnx.export(..., opset_version={OPSET}, dynamo=False))"


class Conversion:
    """The original model, and the initializers that its nodes need at opset 17."""

    def __init__(self, model: onnx.ModelProto, version: int) -> None:
        self.version = version
        self._shapes = known_shapes(model)
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._taken = {name for node in model.graph.node for name in (*node.input, *node.output)} | set(self._weights)
        self.added: list[onnx.TensorProto] = []

    def refused(self, node: onnx.NodeProto, reason: str) -> InputError:
        name = node.name or next(iter(node.output), "")
        return InputError(f"node {name!r} ({node.op_type}, opset {self.version}) {reason}: {EXPORT_AT}")

    def name(self, stem: str) -> str:
        """A name that no tensor has yet."""
        name, number = stem, 0
        while name in self._taken:
            number += 1
            name = f"{stem}_{number}"
        self._taken.add(name)
        return name

    def constant(self, stem: str, values: Any, dtype: str) -> str:
        name = self.name(stem)
        self.added.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def known(self, node: onnx.NodeProto, index: int, what: str) -> Any:
        """The values of an input that opset 17, or this rule, needs as a constant; None if it is omitted."""
        name = node.input[index] if index < len(node.input) else ""
        if not name:
            return None
        if name not in self._weights or uses_external_data(self._weights[name]):
            raise self.refused(node, f"computes its {what} ({name!r}) from the image")
        return numpy_helper.to_array(self._weights[name])

    def shape(self, node: onnx.NodeProto, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise self.refused(node, f"reads {name!r}, whose shape does not follow from the model")
        return self._shapes[name]
