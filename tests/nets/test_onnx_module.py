"""A brought network computes the same as a torch module as in ONNX Runtime, for any batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mess_compile.nets import onnx_module
from mess_compile.nets.onnx_module import OnnxModule
from mess_compile.runtime.base.errors import InputError

HW = (12, 16)
RANDOM = np.random.default_rng(4)
RESIZES = [
    {"mode": mode, "coordinate_transformation_mode": centres, "nearest_mode": "floor"}
    for mode in ("linear", "nearest")
    for centres in ("half_pixel", "align_corners", "asymmetric")
]


def weight(*shape: int) -> NDArray[np.float32]:
    return (RANDOM.standard_normal(shape) / np.prod(shape[1:]) ** 0.5).astype(np.float32)


CASES: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("Conv", [weight(8, 6, 3, 3), weight(8)], {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ("Conv", [weight(8, 6, 3, 3)], {"pads": [0, 0, 1, 1], "strides": [2, 2]}),
    ("Conv", [weight(8, 6, 5, 5)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", [weight(8, 6, 3, 3)], {"auto_pad": "SAME_LOWER"}),
    ("Conv", [weight(6, 1, 3, 3)], {"pads": [2, 2, 2, 2], "dilations": [2, 2], "group": 6}),
    ("Conv", [weight(6, 1, 3, 3), weight(6)], {"pads": [5, 5, 5, 5], "dilations": [5, 5], "group": 6}),
    ("ConvTranspose", [weight(6, 4, 2, 2)], {"strides": [2, 2]}),
    ("ConvTranspose", [weight(6, 4, 3, 3)], {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    ("ConvTranspose", [weight(6, 4, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ("BatchNormalization", [weight(6), weight(6), weight(6), np.abs(weight(6))], {"epsilon": 1e-3}),
    ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("AveragePool", [], {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1, 1, 1, 1]}),
    ("AveragePool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("Clip", [np.float32(-0.2), np.float32(0.6)], {}),
    ("PRelu", [weight(6, 1, 1)], {}),
    ("HardSigmoid", [], {"alpha": 1 / 6, "beta": 0.5}),
    ("HardSwish", [], {}),
    ("LeakyRelu", [], {"alpha": 0.1}),
    ("Softmax", [], {"axis": 1}),
    ("Reshape", [np.array([1, 2, 3, -1, 16])], {}),
    ("Transpose", [], {"perm": [0, 2, 3, 1]}),
    ("Slice", [np.array([1]), np.array([9]), np.array([2]), np.array([3])], {}),
    ("Slice", [np.array([-1]), np.array([-(1 << 62)]), np.array([1]), np.array([-1])], {}),
    ("Pad", [np.array([0, 0, 1, 2, 0, 0, 3, 0]), np.float32(0.5)], {}),
    ("Pad", [np.array([0, 0, 1, 2, 0, 0, 3, 1])], {"mode": "reflect"}),
    ("ReduceMean", [], {"axes": [2, 3], "keepdims": 1}),
    ("ReduceSum", [np.array([1])], {"keepdims": 0}),
    ("MatMul", [weight(16, 5)], {}),
    ("LayerNormalization", [weight(16), weight(16)], {"axis": -1}),
    ("InstanceNormalization", [weight(6), weight(6)], {}),
    ("Gather", [np.array([2, 0])], {"axis": 1}),
    ("Concat", ["x"], {"axis": 1}),
    ("Add", [weight(6, 1, 1)], {}),
    ("Pow", [np.float32(2)], {}),
    ("GlobalAveragePool", [], {}),
    ("Flatten", [], {}),
    *[("Resize", [None, None, np.array([1, 6, 19, 24])], how) for how in RESIZES],
    ("Resize", [None, np.array([1, 1, 2, 2], np.float32)], {"mode": "linear"}),
]


def model(op: str, more: list[Any], attributes: dict[str, Any]) -> onnx.ModelProto:
    """Frames as floats of 6 channels, then the operator."""
    initial = {"mix": weight(6, 3, 1, 1) / 64}
    names = []
    for number, value in enumerate(more):
        names.append("" if value is None else value if isinstance(value, str) else f"v{number}")
        if isinstance(value, np.ndarray | np.generic):
            initial[f"v{number}"] = np.asarray(value)
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "mix"], ["x"]),
        helper.make_node(op, ["x", *names], ["y"], "the-node", **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, (1, *HW, 3))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, name) for name, values in initial.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(("op", "more", "attributes"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_an_operator_computes_what_onnx_runtime_does(op: str, more: list[Any], attributes: dict[str, Any]) -> None:
    made = model(op, more, attributes)
    frames = RANDOM.integers(0, 256, (2, *HW, 3), np.uint8)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        (found,) = OnnxModule(made, ["y"])(torch.from_numpy(frames))
    for index, frame in enumerate(frames):
        (wanted,) = session.run(["y"], {"image": frame[None]})
        assert found[index : index + 1].shape == wanted.shape
        assert np.abs(found[index].numpy() - wanted[0]).max() < 1e-5


def test_an_operator_that_cannot_be_trained_is_named() -> None:
    made = model("Relu", [], {})
    made.graph.node[-1].op_type = "Det"
    with pytest.raises(InputError, match=r"node 'the-node' \(Det\) cannot be trained.*--epochs 0 N"):
        OnnxModule(made, ["y"])


def test_each_node_runs_once_however_many_outputs_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def counted(inputs: list[Any], attributes: dict[str, Any]) -> Any:
        runs.append("Relu")
        return inputs[0].relu()

    made = model("Relu", [], {})
    made.graph.node.append(helper.make_node("Relu", ["y"], ["z"]))
    monkeypatch.setitem(onnx_module._OPERATORS, "Relu", counted)
    y, z = OnnxModule(made, ["y", "z"])(torch.zeros((1, *HW, 3), dtype=torch.uint8))
    assert (len(runs), y.shape) == (2, z.shape)


def test_a_weight_of_two_nodes_is_one_parameter() -> None:
    made = model("Conv", [weight(6, 6, 1, 1)], {})
    made.graph.node.append(helper.make_node("Conv", ["y", "v0"], ["z"]))
    module = OnnxModule(made, ["z"])
    assert sorted(module.weights()) == ["mix", "v0"]
    assert len(list(module.parameters())) == 2


def test_statistics_of_batch_norm_are_not_trained() -> None:
    made = model("BatchNormalization", [weight(6), weight(6), weight(6), np.abs(weight(6))], {})
    assert sorted(OnnxModule(made, ["y"]).weights()) == ["mix", "v0", "v1"], "scale and bias are, mean and variance not"
