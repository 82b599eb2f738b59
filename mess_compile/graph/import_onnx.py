"""Imports a multi-exit ONNX from any framework, and cuts the same graphs from it as from our own networks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from mess_compile import files
from mess_compile.array_types import Array
from mess_compile.graph.constant_fold import fold_constants
from mess_compile.graph.cut import (
    METADATA_KEY,
    NETWORK,
    add_baseline_alone,
    candidate_from_metadata,
    cut_network,
    logits_name,
)
from mess_compile.graph.cut_points import Places, find_places
from mess_compile.graph.exits_toml import GREY, ExitsFile, InputRule, read_exits
from mess_compile.graph.import_check import original_logits, write_original
from mess_compile.graph.node_builder import OPSET, add, constant, empty_model, keep
from mess_compile.graph.normalise import (
    at_our_opset,
    check_standard,
    check_valid,
    fixed_input,
    inline_functions,
    name_outputs,
    prune,
    share_weights,
)
from mess_compile.graph.opset_context import EXPORT_AT
from mess_compile.graph.recompose_check import Reference, check_baseline_alone, check_stages
from mess_compile.graph.store import drop_unread_weights, externalise, read_model, widen_weights, write_model
from mess_compile.network import CandidateNetwork, ExitPoint, Gate, GraphSet, Head, read_graph_set
from mess_compile.reporter import Progress
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines import engine
from mess_compile.runtime.engines.engine import TensorSpec

_OURS = re.compile(
    r"image|skip\d+|exit\d+(/.*)?|logits|labels|counts|thresholds|(logits:|labels:|heads:|gate/|input/|output/).*",
    re.DOTALL,
)
"""Names that the whole-network form and the cuts give to their own tensors."""

FramesOf = Callable[[tuple[int, int]], Sequence[Array]]
"""Input size (H, W) -> frames uint8 (H, W, 3) of that size."""


def import_onnx(
    source: Path,
    graphs: Path,
    gate: Gate,
    frames: Sequence[Array],
    progress: Progress,
    original: Path | None = None,
) -> GraphSet:
    """Cut a whole-network ONNX of opset 17 into the folder `graphs`, checked on `frames` uint8 (H, W, 3).

    Its metadata entry `mess` describes exit points and heads (CandidateNetwork as JSON; workloads may be omitted), its
    tensors are named `image`, `exitN` and `logits:HEAD`; its identity is the hash of the network as written, whatever
    the entry says. `original` is the network as it came, in the same form with one head, if its weights were trained
    further since: it becomes a baseline, uncut. The folder is replaced when everything has passed.

    Raises InputError or EngineError.
    """
    model = read_model(source)
    check_valid(model, source)
    inline_functions(model)
    check_standard(model)
    fold_constants(model)
    _drop_identity(model)
    with files.replaced_folder(graphs) as folder:
        externalise(model, folder, source.parent)
        write_model(model, folder / NETWORK)
        graph_set = cut_network(folder, gate, progress)
        with closing(engine.open_library("onnxruntime")) as library:
            whole = _onnx_reference(library, source, graph_set.candidate)
            check_stages(graph_set, whole, frames, progress)
            if original is not None:
                add_original(graph_set, original, library, frames)
    return read_graph_set(graphs)


def add_original(graph_set: GraphSet, original: Path, library: engine.Library, frames: Sequence[Array]) -> None:
    """Add the graph of the network as it came, image to labels, and check it. Raises InputError."""
    model, whole = read_model(original), graph_set.root / original.name
    externalise(model, graph_set.root, original.parent)
    write_model(model, whole)
    candidate = candidate_from_metadata(model, original)
    reference, own = _onnx_reference(library, original, candidate), str(candidate.heads[-1].labels)
    with closing(library.load(original)) as engine_:
        labels = [
            np.array(library.download(engine_.run({"image": library.upload(frame[None])})[own])) for frame in frames
        ]
    check_baseline_alone(add_baseline_alone(graph_set, whole), reference, frames, labels)


def import_with_exits(
    source: Path, toml: Path, graphs: Path, gate: Gate, frames_of: FramesOf, progress: Progress
) -> GraphSet:
    """Cut another framework's ONNX at the tensors that the file `toml` names, into the folder `graphs`.

    The model has one image input, (1, 3, H, W) or (1, H, W, 3), float32 or uint8; nodes that no exit needs are dropped.
    All graphs are checked against the original model, whose input numpy computes. The folder is replaced when
    everything has passed. Raises InputError or EngineError.
    """
    exits, model = read_exits(toml), read_model(source)
    check_valid(model, source)
    inline_functions(model)
    name_outputs(model, exits)
    check_standard(model)
    image = fixed_input(model, exits.input)
    with files.replaced_folder(graphs) as folder:
        externalise(model, folder, source.parent)
        places, names = _write_both(model, image, exits, source.stem, folder)
        frames = frames_of(exits.input.hw(image.shape))
        inputs = [
            {image.name: frame[None] if image.dtype == "uint8" else exits.input.of_frame(frame)} for frame in frames
        ]
        with closing(engine.open_library("onnxruntime")) as library:
            logits = original_logits(library, folder, places, names, inputs, frames)
        graph_set = cut_network(folder, gate, progress)
        known = {id(frame): values for frame, values in zip(frames, logits, strict=True)}
        check_stages(graph_set, lambda frame: known[id(frame)], frames, progress)
        drop_unread_weights(folder)
    return read_graph_set(graphs)


def _write_both(
    model: onnx.ModelProto, image: TensorSpec, exits: ExitsFile, name: str, folder: Path
) -> tuple[Places, dict[str, str]]:
    """Write the original model, ending in all logits, and its whole-network form; returns the tensors' new names."""
    original = onnx.ModelProto.FromString(model.SerializeToString())
    at_our_opset(model)
    widen_weights(model, folder)
    share_weights(model)
    hw = exits.input.hw(image.shape)
    places = find_places(model, image.name, hw, exits)
    write_original(original, {spec.name: spec.shape for spec in places.logits.values()}, folder)
    names = _new_names(model, image, places)
    rename_tensors(model, names)
    for head, spec in places.logits.items():
        if spec.shape[1] == 1:
            _append_background(model.graph, names.get(spec.name, spec.name), logits_name(head))
    prepend_input(model, image, exits.input)
    _describe(model, _candidate(exits, places, hw, name), places)
    _write_network(model, folder)
    return places, names


def _write_network(model: onnx.ModelProto, folder: Path) -> None:
    """Write the whole-network form. The original model was checked, so what is invalid now is our fault."""
    try:
        write_model(model, folder / NETWORK)
    except InputError as error:
        raise InputError(
            f"converting the model to opset {OPSET} gave no valid ONNX ({error}): this is a bug of mess-compile, not "
            f"of the model (please report it); until it is fixed, {EXPORT_AT}"
        ) from error


def _new_names(model: onnx.ModelProto, image: TensorSpec, places: Places) -> dict[str, str]:
    """Names of tensors in the whole-network form; other tensors of such a name are renamed."""
    names = reserved_names(model, image)
    names |= {spec.name: where for where, spec in places.exits.items()}
    return names | {spec.name: logits_name(head) for head, spec in places.logits.items() if spec.shape[1] > 1}


def reserved_names(model: onnx.ModelProto, image: TensorSpec) -> dict[str, str]:
    """New names of a model's tensors that have names of ours; a uint8 input becomes `image`."""
    taken = dict.fromkeys(name for node in model.graph.node for name in (*node.input, *node.output))
    names = {}
    for name in filter(_OURS.fullmatch, list(taken)):
        names[name] = f"model/{name}"
        while names[name] in taken:
            names[name] += "_"
        taken[names[name]] = None
    return names | ({image.name: "image"} if image.dtype == "uint8" else {})


def rename_tensors(model: onnx.ModelProto, names: dict[str, str]) -> None:
    graph = model.graph
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
    for value in (*graph.initializer, *graph.input):
        value.name = names.get(value.name, value.name)


def _append_background(graph: onnx.GraphProto, channel: str, logits: str) -> None:
    """Logits [0, x] of a map x (1, 1, h, w): their argmax is 1 where sigmoid(x) > 0.5."""
    pads = constant(graph, f"{logits}/pads", [0, 1, 0, 0, 0, 0, 0, 0], "int64")
    zero = constant(graph, f"{logits}/zero", 0.0, "float32")
    add(graph, "Pad", [channel, pads, zero], logits)


def prepend_input(model: onnx.ModelProto, image: TensorSpec, rule: InputRule) -> None:
    """Prepend the conversion from `image` uint8 (1, H, W, 3) to the model's own input, if the model takes float32."""
    if image.dtype == "uint8":
        return
    frame = helper.make_tensor_value_info("image", TensorProto.UINT8, (1, *rule.hw(image.shape), 3))
    front = empty_model([frame]).graph
    _normalise(front, rule, model.graph.input[0].name)
    keep(model.graph.node, [*front.node, *model.graph.node])
    model.graph.initializer.extend(front.initializer)
    keep(model.graph.input, [frame])


def _normalise(graph: onnx.GraphProto, rule: InputRule, target: str) -> None:
    """(x - mean) / std of bytes x, in the order that TensorRT parses: cast, then transpose."""
    values = add(graph, "Cast", ["image"], "input/float", to=TensorProto.FLOAT)  # (1, H, W, 3)
    if rule.layout == "NCHW":
        values = add(graph, "Transpose", [values], "input/planes", perm=[0, 3, 1, 2])  # (1, 3, H, W)
    if rule.channels == "BGR":
        order = constant(graph, "input/order", [2, 1, 0], "int64")
        values = add(graph, "Gather", [values, order], "input/bgr", axis=rule.layout.index("C"))
    elif rule.channels == "GREY":
        axis = rule.layout.index("C")
        shares = np.array(GREY).reshape([3 if place == axis else 1 for place in range(4)])
        parts = add(graph, "Mul", [values, constant(graph, "input/shares", shares, "float32")], "input/parts")
        values = add(
            graph, "ReduceSum", [parts, constant(graph, "input/axis", [axis], "int64")], "input/grey", keepdims=1
        )
    count = 1 if rule.channels == "GREY" else 3
    shape = (1, count, 1, 1) if rule.layout == "NCHW" else (1, 1, 1, count)
    for op, every, neutral in zip(("Sub", "Div"), rule.of_bytes, (0, 1), strict=True):
        numbers = every[:count]
        if np.any(numbers != neutral):
            factor = constant(graph, f"input/{op}.values", numbers.reshape(shape), "float32")
            values = add(graph, op, [values, factor], f"input/{op}")
    graph.node[-1].output[0] = target


def _candidate(exits: ExitsFile, places: Places, hw: tuple[int, int], backbone: str) -> CandidateNetwork:
    """Workloads are counted and the identity is computed when the network is cut."""
    points = tuple(
        ExitPoint(name, rule.tensor, spec.shape[1], (spec.shape[2], spec.shape[3]), 0)
        for (name, spec), rule in zip(places.exits.items(), exits.points, strict=True)
    )
    heads = tuple(_head(name, places) for name in exits.heads)
    return CandidateNetwork(backbone, exits.classes, exits.colours, hw, points, heads, exits.baseline, "")


def _head(name: str, places: Places) -> Head:
    point, _, config = name.partition(".")
    hw, (_, _, height, width) = places.exits[point].shape[2:], places.logits[name].shape
    return Head(int(point.removeprefix("exit")), config, 0, None if hw == (height, width) else (height, width))


def _describe(model: onnx.ModelProto, candidate: CandidateNetwork, places: Places) -> None:
    """Outputs and metadata as `cut_network` expects them."""
    outputs = {name: spec.shape for name, spec in places.exits.items()}
    outputs |= {logits_name(head): (1, max(2, spec.shape[1]), *spec.shape[2:]) for head, spec in places.logits.items()}
    prune(model, [_float_output(name, shape) for name, shape in outputs.items()])
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(candidate.to_json()))


def _float_output(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _drop_identity(model: onnx.ModelProto) -> None:
    """Remove the identity from the metadata: an edited copy would still claim to be the original network."""
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            with suppress(ValueError, RecursionError):  # the cut reports what is wrong with it
                content = json.loads(entry.value)
                if isinstance(content, dict) and "identity" in content:
                    del content["identity"]
                    entry.value = json.dumps(content)


def _onnx_reference(library: engine.Library, path: Path, candidate: CandidateNetwork) -> Reference:
    """The unchanged model, run as a whole."""
    whole = library.load(path)

    def logits(frame: Array) -> dict[str, Array]:
        outputs = whole.run({"image": library.upload(frame[None])})
        return {head.name: np.array(library.download(outputs[logits_name(head.name)])) for head in candidate.heads}

    return logits
