"""Opens a trained single-exit ONNX of any framework: normalised, with the places where exits can attach."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from mess_compile.graph.exits_toml import InputRule
from mess_compile.graph.frontiers import Frontiers, find_frontiers
from mess_compile.graph.normalise import (
    at_our_opset,
    check_standard,
    check_valid,
    fix_size,
    fixed_input,
    inline_functions,
    lift_to_float32,
    prune,
    share_weights,
)
from mess_compile.graph.own_end import OwnEnd, find_own_end, name_output
from mess_compile.graph.store import externalise, read_model, widen_weights
from mess_compile.runtime.engines.engine import TensorSpec


@dataclass(frozen=True)
class OpenedNetwork:
    """A single-exit network of opset 17 with static shapes, whose weights are in the store of a folder.

    `image` is its input, which `rule` makes of a frame of size `hw`; `original` the model as it came, but for its
    weights in the store and the fixed size of its input.
    """

    name: str
    model: onnx.ModelProto
    original: onnx.ModelProto
    image: TensorSpec
    rule: InputRule
    hw: tuple[int, int]
    end: OwnEnd
    frontiers: Frontiers

    def fitted(self, rule: InputRule) -> InputRule:
        """Another rule for this network's input: in its layout, and grey where it has one channel."""
        channels = "GREY" if self.rule.channels == "GREY" else rule.channels
        return replace(rule, tensor=self.rule.tensor, layout=self.rule.layout, channels=channels)


def open_network(
    source: Path, rule: InputRule, folder: Path, output: str | None = None, input_hw: tuple[int, int] | None = None
) -> OpenedNetwork:
    """Read and normalise `source`; its weights go into the store in `folder`.

    `output` names the tensor that labels come from where there are several outputs; `input_hw` fixes an input of
    dynamic size. Raises InputError naming what cannot be taken.
    """
    model = read_model(source)
    check_valid(model, source)
    inline_functions(model)
    wanted = name_output(model, output)
    prune(model, [value for value in model.graph.output if value.name == wanted] or [onnx.ValueInfoProto(name=wanted)])
    check_standard(model)
    fix_size(model, input_hw)
    lift_to_float32(model, source.parent)
    rule = _fitted(model, rule)
    image = fixed_input(model, rule)
    externalise(model, folder, source.parent)
    original = onnx.ModelProto.FromString(model.SerializeToString())
    model.graph.output[0].CopyFrom(onnx.ValueInfoProto(name=wanted))  # its shape follows from the input's
    at_our_opset(model)
    widen_weights(model, folder)
    share_weights(model)
    hw = rule.hw(image.shape)
    end = find_own_end(model, wanted, hw)
    return OpenedNetwork(
        source.stem, model, original, image, rule, hw, end, find_frontiers(model, image.name, hw, end.logits.name)
    )


def _fitted(model: onnx.ModelProto, rule: InputRule) -> InputRule:
    """The rule with the layout that the input's shape shows, and grey where it has one channel."""
    dims = model.graph.input[0].type.tensor_type.shape.dim if model.graph.input else []
    sizes = [dim.dim_value for dim in dims]
    if len(sizes) != 4:
        return rule
    if (sizes[1] in (1, 3)) != (sizes[3] in (1, 3)):
        rule = replace(rule, layout="NCHW" if sizes[1] in (1, 3) else "NHWC")
    return replace(rule, channels="GREY") if sizes[rule.layout.index("C")] == 1 else rule
