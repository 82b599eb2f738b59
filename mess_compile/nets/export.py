"""Exports a torch network to the whole-network ONNX, and cuts the checked graphs from it.

torch ends at ONNX: everything after it works on ONNX and numpy.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from mess_compile import files
from mess_compile.array_types import Array
from mess_compile.graph.constant_fold import fold_constants
from mess_compile.graph.cut import METADATA_KEY, NETWORK, add_baseline_alone, cut_network, logits_name
from mess_compile.graph.node_builder import OPSET, keep
from mess_compile.graph.recompose_check import Reference, check_baseline_alone, check_stages
from mess_compile.graph.shapes import fold_shapes
from mess_compile.graph.store import read_model, store_weight, write_model
from mess_compile.nets.backbones import MEAN, STD
from mess_compile.nets.checkpoint import load_candidate
from mess_compile.nets.network import Architecture, OverprovisionedNetwork, normalise
from mess_compile.network import BASELINE_ALONE, Gate, GraphSet, read_graph_set
from mess_compile.reporter import Progress
from mess_compile.runtime.base.errors import InputError


def export_checkpoint(
    checkpoint: Path,
    graphs: Path,
    gate: Gate,
    frames: Sequence[Array],
    progress: Progress,
    baseline: Path | None = None,
) -> GraphSet:
    """Export the candidate network in folder `checkpoint`, cut it into the folder `graphs`, and check every graph.

    `frames` are uint8 (H, W, 3) at the network's input size, on which torch and the graphs must agree; `baseline` is
    the folder of a single-exit network trained alone, which becomes one more graph. The folder `graphs` is replaced
    when everything has passed. Raises InputError.
    """
    network = load_candidate(checkpoint)
    alone = None if baseline is None else _load_baseline(baseline, network.architecture)
    with files.replaced_folder(graphs) as folder:
        export_network(network, folder)
        progress(NETWORK, 1, 1)
        graph_set = cut_network(folder, gate, progress)
        check_stages(graph_set, torch_reference(network), frames, progress)
        if alone is not None:
            graph_set = add_baseline_alone(graph_set, export_network(alone, folder, "alone.onnx"))
            check_baseline_alone(graph_set, torch_reference(alone), frames)
            progress(f"checked {BASELINE_ALONE}", 1, 1)
    return read_graph_set(graphs)


def _load_baseline(folder: Path, candidate: Architecture) -> OverprovisionedNetwork:
    """The network in `folder`. Raises InputError unless it is the candidate network with the final exit alone."""
    network = load_candidate(folder)
    found, wanted = _decisive(network.architecture), _decisive(candidate)
    differences = [f"{what} {found[what]}, not {wanted[what]}" for what in found if found[what] != wanted[what]]
    if len(network.candidate.heads) > 1:
        differences.append(f"{len(network.candidate.heads)} heads, not 1")
    if differences:
        raise InputError(
            f"the baseline in {folder} does not fit the multi-exit network: it has {' and '.join(differences)}: train "
            f"it with the same options (`mess-compile train --baseline`), or remove {folder}"
        )
    return network


def _decisive(architecture: Architecture) -> dict[str, str | float]:
    """What a baseline must share with the candidate network, to solve the same task with the same workload."""
    return {
        "backbone": architecture.backbone,
        "width": architecture.width,
        "output stride": architecture.output_stride,
        "input size": "{}x{}".format(*architecture.input_hw),
        "classes": ", ".join(architecture.classes),
    }


def export_network(network: OverprovisionedNetwork, folder: Path, name: str = NETWORK) -> Path:
    """Write `folder/NAME`, opset 17, its weights in the store, BatchNorm folded into the convolutions.

    Input `image` uint8 (1, H, W, 3); outputs `exit1`.. and `logits:HEAD`, described in the metadata entry `mess`.
    Weights go from the network to the store one at a time; the network is left in eval mode.
    """
    network.eval()
    candidate = network.candidate
    names = [point.name for point in candidate.exit_points] + [logits_name(head.name) for head in candidate.heads]
    path = folder / name
    image = torch.zeros(1, *candidate.input_hw, 3, dtype=torch.uint8)
    model = module_as_onnx(_FromFrame(network), {"image": image}, names, path)
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(candidate.to_json()))
    write_model(model, path)
    return path


def torch_reference(network: OverprovisionedNetwork) -> Reference:
    """The reference for the graphs: a frame's logits by head name, computed by torch."""

    def logits(frame: Array) -> dict[str, Array]:
        with torch.inference_mode():
            _, found = network.eval()(normalise(torch.tensor(frame)[None]))
        return {name: values.numpy() for name, values in found.items()}

    return logits


class _FromFrame(nn.Module):
    """The network with its normalisation in front, in the order that TensorRT parses: cast, then transpose."""

    def __init__(self, network: OverprovisionedNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:  # (1, H, W, 3) uint8
        x = image.float().permute(0, 3, 1, 2)  # (1, 3, H, W)
        mean, std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        features, logits = self.network((x - mean) / std)
        return (*features, *logits.values())


def module_as_onnx(
    module: nn.Module, inputs: Mapping[str, torch.Tensor], outputs: Sequence[str], path: Path
) -> onnx.ModelProto:
    """The module in eval mode as ONNX of opset 17, BatchNorm folded into the convolutions, weights in the store beside
    `path`, a file that is written on the way.
    """
    _write_structure(module.eval(), inputs, outputs, path)
    model = read_model(path)
    fold_constants(model)
    if _join_pads(model.graph):
        del model.graph.value_info[:]  # the tracer knows no sizes after a Pad
        fold_shapes(model)
    _attach_weights(model, module.state_dict(), path.parent)
    keep(model.graph.input, [value for value in model.graph.input if value.name in inputs])
    return model


def _write_structure(module: nn.Module, inputs: Mapping[str, torch.Tensor], outputs: Sequence[str], path: Path) -> None:
    """Write the traced graph without weights: every parameter is a graph input under its name in the state dict."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation; the newer exporter always writes opset 18
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            dynamo=False,
            export_params=False,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )


def _join_pads(graph: onnx.GraphProto) -> bool:
    """Make every Pad of zeros, in height and width alone, part of the convolution that reads it: no map is copied.

    Returns whether there was one.
    """
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pads = {node.output[0]: node for node in graph.node if node.op_type == "Pad" and not any(node.input[2:])}
    for conv in graph.node:
        pad = pads.get(conv.input[0]) if conv.op_type == "Conv" else None
        added = values[pad.input[1]].tolist() if pad is not None else []
        if pad is None or added[:2] != [0, 0] or added[4:6] != [0, 0]:
            continue
        own = next(attribute for attribute in conv.attribute if attribute.name == "pads")
        own.ints[:] = [a + b for a, b in zip(own.ints, (*added[2:4], *added[6:]), strict=True)]
        conv.input[0] = pad.input[0]
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    keep(graph.node, [node for node in graph.node if node.op_type != "Pad" or node.output[0] in read])
    used = {name for node in graph.node for name in node.input}
    keep(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])
    return bool(pads)


def _attach_weights(model: onnx.ModelProto, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Turn parameters that are graph inputs into stored initializers, each BatchNorm folded into its convolution."""
    graph = model.graph
    norms = {node.input[0]: node for node in graph.node if node.op_type == "BatchNormalization"}
    for conv in graph.node:
        if conv.op_type != "Conv":
            continue
        weight, bias = _parameters(conv, norms.get(conv.output[0]), state)
        if conv.output[0] in norms:
            conv.output[0] = norms.pop(conv.output[0]).output[0]
        names = (conv.input[1], conv.input[1].removesuffix("weight") + "bias")
        conv.input[:] = [conv.input[0], *names]
        for name, values in zip(names, (weight, bias), strict=True):
            tensor = numpy_helper.from_array(values.astype(np.float32), name)
            store_weight(tensor, folder)
            graph.initializer.append(tensor)
    assert not norms, f"BatchNorm without a convolution in front: {', '.join(norms)}"
    # The tracer merged parameters of equal value; an Identity restores the name of each.
    nodes = [node for node in graph.node if node.op_type != "BatchNormalization" and node.output[0] not in state]
    keep(graph.node, nodes)


def _parameters(
    conv: onnx.NodeProto, norm: onnx.NodeProto | None, state: Mapping[str, torch.Tensor]
) -> tuple[Array, Array]:
    """Weight and bias in float64 of a convolution, with the BatchNorm after it folded in, if there is one."""
    weight, *rest = (state[name].double().numpy() for name in conv.input[1:])
    bias = rest[0] if rest else np.zeros(len(weight))
    if norm is None:
        return weight, bias
    gamma, beta, mean, variance = (state[name].double().numpy() for name in norm.input[1:])
    epsilon = next(attribute.f for attribute in norm.attribute if attribute.name == "epsilon")
    scale = gamma / np.sqrt(variance + epsilon)
    return weight * scale[:, None, None, None], beta + (bias - mean) * scale
