"""Converts a model of any opset from 7 on to ours, node by node; names of nodes and tensors stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
from onnx import defs, helper, inliner, version_converter

from mess_compile.graph.constant_fold import fold_constants
from mess_compile.graph.node_builder import OPSET, keep
from mess_compile.graph.opset_context import EXPORT_AT, Conversion
from mess_compile.graph.opset_rules import RULES, as_text
from mess_compile.graph.shapes import fold_shapes
from mess_compile.runtime.base.errors import InputError, one_line

_OLDEST = 7
"""ONNX Runtime guarantees nothing below, and broadcasting had other rules."""
_OF_OURS = ("GroupNormalization",)
"""Newer operators that our own rules convert better than their definitions do."""


def to_our_opset(model: onnx.ModelProto) -> None:
    """Rewrite `model`, all of the one standard domain and with static shapes, for opset 17.

    What an operator lacked then is expressed by other operators, or dropped if it has no effect. Raises InputError
    naming a node that opset 17 cannot express.
    """
    if model.opset_import[0].version < _OLDEST:
        _raise_to_oldest(model)
    version = model.opset_import[0].version
    if version == OPSET:
        return
    _expand_newer(model)
    fold_shapes(model)
    change = Conversion(model, version)
    keep(model.graph.node, [new for node in model.graph.node for new in _converted(change, node)])
    model.graph.initializer.extend(change.added)
    _drop_unread(model)
    model.graph.ClearField("value_info")  # shapes of the earlier nodes
    model.opset_import[0].version = OPSET


def _raise_to_oldest(model: onnx.ModelProto) -> None:
    """Uses ONNX's own converter, which knows how broadcasting was written."""
    version = model.opset_import[0].version
    try:
        model.CopyFrom(version_converter.convert_version(model, _OLDEST))
    except Exception as error:  # the converter raises whatever its parts raise
        raise InputError(
            f"ONNX's own converter cannot convert the model from opset {version} to {_OLDEST} ({one_line(error)}): "
            f"{EXPORT_AT}"
        ) from error


def _expand_newer(model: onnx.ModelProto) -> None:
    """Replace operators that came after opset 17 with those of their definition, if ONNX has one."""
    defined = set(_defined(model.opset_import[0].version))
    while newer := sorted({node.op_type for node in model.graph.node} & defined):
        outputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in model.graph.output]
        shaped = onnx.shape_inference.infer_shapes(model, data_prop=True)
        shaped.graph.value_info.extend(  # a definition may depend on the types of weights
            helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
            for weight in shaped.graph.initializer
        )
        wanted = [("", name) for name in newer]
        model.CopyFrom(inliner.inline_selected_functions(shaped, wanted, inline_schema_functions=True))
        keep(model.graph.output, outputs)
        model.graph.ClearField("value_info")
        del model.functions[:]
        if newer == sorted({node.op_type for node in model.graph.node} & defined):
            return
        fold_constants(model, floats=True)


def _defined(version: int) -> Iterator[str]:
    """The operators of opset `version` that ours lacks and that others define."""
    for name in {schema.name for schema in defs.get_all_schemas() if not schema.domain}:
        if name not in _OF_OURS and not defs.has(name, OPSET, "") and defs.has(name, version, ""):
            schema: Any = defs.get_schema(name, version, "")
            if schema.has_function or schema.has_context_dependent_function:
                yield name


def _converted(change: Conversion, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Nodes that compute at opset 17 what `node` does."""
    if not defs.has(node.op_type, change.version, ""):
        raise change.refused(node, f"is not an operator of opset {change.version}, which the model claims to have")
    theirs = defs.get_schema(node.op_type, change.version, "")
    rules = [
        rule for names, first, last, rule in RULES if node.op_type in names and first <= theirs.since_version <= last
    ]
    made = rules[0](change, node) if rules else [node]
    for each in made:
        _fit(change, each, theirs)
    return made


def _fit(change: Conversion, made: onnx.NodeProto, theirs: Any) -> None:
    """Restrict attributes and inputs to those of opset 17; drop what has no effect."""
    if not defs.has(made.op_type, OPSET, ""):
        raise change.refused(made, f"came after opset {OPSET}, and ONNX does not define it by older operators")
    ours = defs.get_schema(made.op_type, OPSET, "")
    for attribute in [each for each in made.attribute if each.name not in ours.attributes]:
        if not _says_nothing(attribute, theirs):
            value = as_text(helper.get_attribute_value(attribute))
            raise change.refused(made, f"has {attribute.name} = {value}, which opset {OPSET} lacks")
        made.attribute.remove(attribute)
    while made.input and not made.input[-1]:
        del made.input[-1]
    if len(made.input) > ours.max_input:
        raise change.refused(made, f"has {len(made.input)} inputs, but at opset {OPSET} it takes {ours.max_input}")


def _says_nothing(attribute: onnx.AttributeProto, schema: Any) -> bool:
    """Whether an attribute has the value that it would have by default."""
    value = helper.get_attribute_value(attribute)
    if attribute.name == "dilations":  # has no default in the schema
        return all(each == 1 for each in value)
    if attribute.name == "spatial":  # of BatchNormalization, before opset 9
        return bool(value == 1)
    default = schema.attributes[attribute.name].default_value if attribute.name in schema.attributes else None
    if default is None or not default.type:
        return False
    return bool(helper.get_attribute_value(default) == value)


def _drop_unread(model: onnx.ModelProto) -> None:
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    for index in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[index].name not in read:
            del model.graph.initializer[index]
