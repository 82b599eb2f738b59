"""Builds ONNX graphs in small steps: one node or one constant at a time, named after what it makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPSET = 17
"""The newest opset that TensorRT 8.5 parses."""
IR_VERSION = 8
"""The IR version that belongs to opset 17."""


def add(graph: onnx.GraphProto, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
    """Append one node; returns the name of its output, which is also the node's name."""
    graph.node.append(helper.make_node(op, inputs, [output], name=output, **attributes))
    return output


def constant(graph: onnx.GraphProto, name: str, values: Any, dtype: str) -> str:
    """Append an initializer; TensorRT 8.5 needs initializers where ONNX allows computed tensors."""
    graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))
    return name


def empty_model(inputs: Sequence[onnx.ValueInfoProto]) -> onnx.ModelProto:
    """A model of opset 17 without nodes and outputs."""
    graph = helper.make_graph([], "graph", inputs, [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def keep(field: Any, messages: Sequence[Any]) -> None:
    """Let a repeated field contain only `messages`, which may be some of its own."""
    copies = [type(message).FromString(message.SerializeToString()) for message in messages]
    del field[:]
    field.extend(copies)
