"""A model of another opset computes at ours what it did: what changed in silence would only show as poor labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mess_compile.graph.node_builder import OPSET
from mess_compile.graph.opset import to_our_opset
from mess_compile.runtime.base.errors import InputError

SHAPE = (1, 8, 6, 10)
F, INT = np.float32, np.int64
WAY = "coordinate_transformation_mode"
FIRST = np.zeros((1, 8, 6, 1), np.int64), np.ones((1, 8, 6, 1), np.float32)
MOMENTS = tuple(F([value] * 8) for value in (2, 1, 0.5, 3))


def model_of(
    opset: int,
    op: str,
    constants: tuple[Any, ...] = (),
    outputs: int = 1,
    shape: tuple[int, ...] = SHAPE,
    **attributes: Any,
) -> onnx.ModelProto:
    """One operator on an image-dependent `x`, between two that leave numbers alone; constants None are left out."""
    names = ["" if value is None else f"c{index}" for index, value in enumerate(constants)]
    weights = [numpy_helper.from_array(np.asarray(v), n) for v, n in zip(constants, names, strict=True) if n]
    ys = [f"y{index}" for index in range(outputs)]
    nodes = [
        helper.make_node("Abs", ["image"], ["x"], "before"),
        helper.make_node(op, ["x", *names], ys, "middle", **attributes),
        *(helper.make_node("Cast", [y], [f"out{i}"], f"after{i}", to=TensorProto.FLOAT) for i, y in enumerate(ys)),
    ]
    given = [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)]
    wanted = [helper.make_tensor_value_info(f"out{index}", TensorProto.FLOAT, None) for index in range(outputs)]
    graph = helper.make_graph(nodes, "one", given, wanted, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def outputs_of(model: onnx.ModelProto) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    image = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    return [np.asarray(values) for values in session.run(None, {"image": image})]


REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare", "Sum")
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    **{f"{name} 11": (11, f"Reduce{name}", {"axes": [2, 3]}) for name in REDUCTIONS},
    **{
        f"{name} 18": (18, f"Reduce{name}", {"constants": (INT([2, -1]),), "noop_with_empty_axes": 0})
        for name in REDUCTIONS
    },
    **{f"{name} 20 of all": (20, f"Reduce{name}", {"keepdims": 0, "noop_with_empty_axes": 0}) for name in REDUCTIONS},
    "ReduceMean without axes to reduce": (18, "ReduceMean", {"constants": (INT([]),), "noop_with_empty_axes": 1}),
    "Split 7": (7, "Split", {"axis": 1, "split": [3, 5], "outputs": 2}),
    "Split 18 in equal parts": (18, "Split", {"axis": 1, "num_outputs": 4, "outputs": 4}),
    "Split 18 in unequal parts": (18, "Split", {"axis": 1, "num_outputs": 3, "outputs": 3}),
    "Split 20 by sizes": (20, "Split", {"constants": (INT([1, 7]),), "axis": 1, "outputs": 2}),
    "Squeeze 11": (11, "Squeeze", {"axes": [0]}),
    "Unsqueeze 11": (11, "Unsqueeze", {"axes": [0, 5]}),
    "Softmax 11 over many axes": (11, "Softmax", {"axis": 1}),
    "Softmax 11 by default": (11, "Softmax", {}),
    "Softmax 11 over the last": (11, "Softmax", {"axis": 3}),
    "LogSoftmax 9": (9, "LogSoftmax", {"axis": 2}),
    "Hardmax 11": (11, "Hardmax", {}),
    "Softmax 13": (13, "Softmax", {"axis": 1}),
    "Clip 7": (7, "Clip", {"min": 0.2, "max": 0.9}),
    "Clip 8 from below": (8, "Clip", {"min": 0.5}),
    "Pad 7": (7, "Pad", {"pads": [0, 0, 1, 2, 0, 0, 3, 0], "value": 0.5}),
    "Pad 9 by reflection": (9, "Pad", {"pads": [0, 0, 1, 2, 0, 0, 3, 0], "mode": "reflect"}),
    "Pad 18 with axes": (18, "Pad", {"constants": (INT([1, 2, 3, 0]), F(0.5), INT([2, -1])), "mode": "constant"}),
    "Pad 19 with axes": (19, "Pad", {"constants": (INT([1, 3]), None, INT([3])), "mode": "edge"}),
    "Slice 7": (7, "Slice", {"starts": [1, 0], "ends": [5, 1000], "axes": [1, 2]}),
    "Slice 9 of the first axes": (9, "Slice", {"starts": [0, 2], "ends": [1, 4]}),
    "TopK 9": (9, "TopK", {"k": 3, "axis": 1, "outputs": 2}),
    "Dropout 7": (7, "Dropout", {"ratio": 0.4}),
    "Dropout 10": (10, "Dropout", {}),
    "Dropout 13": (13, "Dropout", {"constants": (F(0.5),)}),
    "BatchNormalization 7": (7, "BatchNormalization", {"constants": MOMENTS, "spatial": 1}),
    "BatchNormalization 9": (9, "BatchNormalization", {"constants": MOMENTS}),
    "Upsample 7": (7, "Upsample", {"scales": [1.0, 1.0, 2.0, 3.0], "mode": "nearest"}),
    "Upsample 8, linear": (8, "Upsample", {"scales": [1.0, 1.0, 2.0, 2.0], "mode": "linear"}),
    "Upsample 9": (9, "Upsample", {"constants": (F([1, 1, 2, 2.5]),), "mode": "nearest"}),
    "Upsample 9, linear": (9, "Upsample", {"constants": (F([1, 1, 2, 2]),), "mode": "linear"}),
    "Resize 10": (10, "Resize", {"constants": (F([1, 1, 2, 2]),), "mode": "linear"}),
    "Resize 10, nearest and smaller": (10, "Resize", {"constants": (F([1, 1, 0.5, 1.5]),), "mode": "nearest"}),
    "Resize 11, empty inputs": (11, "Resize", {"constants": (F([]), F([]), INT([1, 8, 12, 15])), "mode": "linear"}),
    "Resize 11 by scales": (11, "Resize", {"constants": (F([]), F([1, 1, 1.7, 2])), "mode": "nearest"}),
    "Resize 11, cropped": (
        11, "Resize",
        {"constants": (F([0, 0, 0.2, 0.1, 1, 1, 0.8, 0.7]), F([1, 1, 2, 2])), "mode": "linear",
         WAY: "tf_crop_and_resize"},
    ),
    "Resize 13, corners": (
        13, "Resize",
        {"constants": (None, None, INT([1, 8, 12, 20])), "mode": "linear", WAY: "align_corners"},
    ),
    "Resize 18 with axes": (18, "Resize", {"constants": (None, None, INT([12, 20])), "axes": [2, 3], "mode": "linear"}),
    "Resize 18, axes reversed": (18, "Resize", {"constants": (None, F([2, 3])), "axes": [3, 2], "mode": "linear"}),
    "Resize 18, larger with antialias": (
        18, "Resize", {"constants": (None, None, INT([1, 8, 12, 20])), "mode": "linear", "antialias": 1},
    ),
    "Resize 18 of one aspect": (
        18, "Resize",
        {"constants": (None, None, INT([12, 40])), "axes": [2, 3], "mode": "linear",
         "keep_aspect_ratio_policy": "not_larger"},
    ),
    "Resize 19, symmetric": (
        19, "Resize",
        {"constants": (None, F([1, 1, 2, 2])), "mode": "linear", WAY: "half_pixel_symmetric"},
    ),
    "Resize 19, cubic": (
        19, "Resize", {"constants": (None, None, INT([1, 8, 9, 20])), "mode": "cubic", "cubic_coeff_a": -0.5},
    ),
    "AveragePool 19": (19, "AveragePool", {"kernel_shape": [3, 3], "dilations": [1, 1], "pads": [1, 1, 1, 1]}),
    "AveragePool 7": (7, "AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
    "LpPool 18": (18, "LpPool", {"kernel_shape": [2, 2], "dilations": [1, 1], "ceil_mode": 0}),
    "MaxPool 8": (8, "MaxPool", {"kernel_shape": [3, 3], "storage_order": 0}),
    "Cast 19": (19, "Cast", {"to": TensorProto.FLOAT, "saturate": 1}),
    "GroupNormalization 18": (18, "GroupNormalization", {"constants": (F([1, 2]), F([0.5, 1])), "num_groups": 2}),
    "GroupNormalization 21": (
        21, "GroupNormalization",
        {"constants": (F(np.arange(8)), F(np.arange(8) / 3)), "num_groups": 4, "epsilon": 0.1, "stash_type": 1},
    ),
    "Gelu 20": (20, "Gelu", {}),
    "Gelu 20, tanh": (20, "Gelu", {"approximate": "tanh"}),
    "Mish 18": (18, "Mish", {}),
    "HardSwish 22": (22, "HardSwish", {}),
    "Swish 24": (24, "Swish", {"alpha": 1.5}),
    "LayerNormalization 17": (17, "LayerNormalization", {"constants": (F(np.arange(10)),), "axis": -1}),
    "RMSNormalization 23": (23, "RMSNormalization", {"constants": (F(np.arange(10)),), "axis": -1}),
    "GridSample 20": (
        20, "GridSample",
        {"constants": (F(np.random.default_rng(1).uniform(-1, 1, (1, 4, 5, 2))),), "mode": "linear",
         "align_corners": 0},
    ),
    "DepthToSpace 7": (7, "DepthToSpace", {"blocksize": 2}),
    "Flatten 21": (21, "Flatten", {"axis": 2}),
    "Reshape 21": (21, "Reshape", {"constants": (INT([1, 4, 2, -1]),)}),
    "Transpose 23": (23, "Transpose", {"perm": [0, 2, 3, 1]}),
    "ScatterElements 18": (18, "ScatterElements", {"constants": FIRST, "axis": 3}),
    "Scatter 9": (9, "Scatter", {"constants": FIRST, "axis": 3}),
    "Conv 22": (22, "Conv", {"constants": (F(np.ones((2, 8, 3, 3))),), "dilations": [2, 2]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_it_did(case: str) -> None:
    opset, op, details = CASES[case]
    model = model_of(opset, op, **details)
    expected = outputs_of(model)
    to_our_opset(model)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, strict_mode=True))
    found = outputs_of(model)
    assert [values.shape for values in found] == [values.shape for values in expected]
    for values, wanted in zip(found, expected, strict=True):
        assert np.abs(values - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())
    names = [name for node in model.graph.node for name in node.output]
    assert {"x", "y0", "out0"} <= set(names), "tensors are found by the names that the user knows"


def test_two_group_normalizations_one_after_the_other() -> None:
    """ONNX does not infer the shape of the first, which the second needs."""
    model = model_of(21, "GroupNormalization", (F(np.arange(8)), F(np.ones(8))), num_groups=2)
    again = helper.make_node("GroupNormalization", ["y0", "c0", "c1"], ["z"], "again", num_groups=4)
    model.graph.node.insert(2, again)
    model.graph.node[3].input[0] = "z"
    del model.graph.value_info[:]
    expected = outputs_of(model)
    to_our_opset(model)
    assert "GroupNormalization" not in {node.op_type for node in model.graph.node}
    assert np.abs(outputs_of(model)[0] - expected[0]).max() < 1e-5


@pytest.mark.parametrize(
    ("opset", "op", "details", "message"),
    [
        (19, "Pad", {"constants": (INT([0, 0, 1, 1, 0, 0, 1, 1]),), "mode": "wrap"}, "pads by wrapping around"),
        (18, "Resize", {"constants": (None, F([1, 1, 0.5, 0.5])), "mode": "linear", "antialias": 1}, "antialias = 1"),
        (19, "AveragePool", {"kernel_shape": [2, 2], "dilations": [2, 2]}, r"dilations = \[2, 2\]"),
        (18, "Col2Im", {"constants": (INT([4, 5]), INT([2, 4]))}, r"\(Col2Im, opset 18\) came after opset 17"),
        (
            18, "ScatterElements",
            {"constants": FIRST, "reduction": "max"}, "scatters by max",
        ),
        (9, "BatchNormalization", {"constants": MOMENTS, "outputs": 2}, "as in training"),
    ],
)  # fmt: skip
def test_what_ours_cannot_say_is_named_with_a_remedy(
    opset: int, op: str, details: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=rf"node 'middle' .*{message}.*export the model at opset 17"):
        to_our_opset(model_of(opset, op, **details))
