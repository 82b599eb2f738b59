"""A model of a few hundred bytes must not fill the memory of whoever looks at it."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from mess_compile.graph.constant_fold import fold_constants


@pytest.mark.parametrize(
    ("operator", "inputs"),
    [
        ("ConstantOfShape", ["huge"]),
        ("Expand", ["one", "huge"]),
        ("Tile", ["one", "huge"]),
        ("Range", ["zero", "limit", "one_scalar"]),
    ],
)
def test_a_size_that_no_array_has_is_not_computed(operator: str, inputs: list[str]) -> None:
    values = {
        "huge": np.array([1 << 33], np.int64),
        "one": np.array([1], np.int64),
        "zero": np.array(0, np.int64),
        "limit": np.array(1 << 33, np.int64),
        "one_scalar": np.array(1, np.int64),
    }
    node = helper.make_node(operator, inputs, ["y"])
    weights = [numpy_helper.from_array(values[name], name) for name in inputs]
    output = helper.make_tensor_value_info("y", TensorProto.INT64, None)
    model = helper.make_model(helper.make_graph([node], "g", [], [output], weights))
    fold_constants(model)
    assert [node.op_type for node in model.graph.node] == [operator]


def test_sizes_are_computed() -> None:
    weights = [numpy_helper.from_array(np.array([3], np.int64), "three")]
    node = helper.make_node(
        "ConstantOfShape", ["three"], ["y"], value=helper.make_tensor("", TensorProto.INT64, [1], [7])
    )
    output = helper.make_tensor_value_info("y", TensorProto.INT64, [3])
    model = helper.make_model(helper.make_graph([node], "g", [], [output], weights))
    fold_constants(model)
    found = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in model.graph.initializer}
    assert not model.graph.node
    assert found["y"] == [7, 7, 7]
