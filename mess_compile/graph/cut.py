"""Cuts the whole network into segments, gated heads and output graphs.

One ONNX file of the whole network is written first, then cut: any framework's multi-exit ONNX can come in here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from mess_compile import files
from mess_compile.graph.constant_fold import has_subgraph
from mess_compile.graph.gate import append_gate, append_sound
from mess_compile.graph.output_graph import append_output, output_graph
from mess_compile.graph.store import read_model, write_graph
from mess_compile.graph.workload import activations, count_macs
from mess_compile.network import (
    BASELINE,
    BASELINE_ALONE,
    IMAGE,
    OUTPUT_OWN,
    CandidateNetwork,
    ExitPoint,
    Gate,
    GraphSet,
    GraphSpec,
    Head,
    check_candidate,
    head_graph_name,
    output_name,
    segment_name,
    write_graph_set,
)
from mess_compile.reporter import Progress
from mess_compile.runtime.base.errors import InputError

NETWORK = "network.onnx"
METADATA_KEY = "mess"
_REMEDY = (
    "`mess-compile attach MODEL.onnx --images DIR` gives a network with one exit early ones; name the tensors of one "
    f"with several by --exits exits.toml, or see docs/own-network.md for the content of {METADATA_KEY!r}"
)


def logits_name(head: str) -> str:
    """The whole network's output of one head."""
    return f"logits:{head}"


def import_network(model: onnx.ModelProto) -> gs.Graph:
    """The network with known shapes, ready to be cut; external weights stay references.

    Raises InputError for dynamic shapes and for control flow, through which tensors cannot be followed.
    """
    activations(model)
    for node in model.graph.node:
        if has_subgraph(node):
            raise InputError(f"node {node.name or node.op_type!r} holds a subgraph: export without control flow")
    return gs.import_onnx(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))


def cut(network: gs.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """The part of `network` between tensors, by name; weights stay references.

    Raises InputError naming a tensor that does not exist, that the outputs need although `inputs` do not bound it, or
    that the outputs do not depend on.
    """
    nodes, reached = _made_by(network, inputs, outputs)
    for name in inputs:
        if name not in reached:
            raise InputError(f"{', '.join(outputs)} does not depend on {name!r}")
    tensors = network.tensors()
    part = gs.Graph(
        nodes=[node for node in network.nodes if id(node) in nodes],
        inputs=[tensors[name] for name in inputs],
        outputs=[tensors[name] for name in outputs],
        opset=network.opset,
        import_domains=network.import_domains,
    )
    model: onnx.ModelProto = gs.export_onnx(part)
    return model


def cut_from(network: gs.Graph, live: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """Like `cut`, from those of the tensors `live` that the outputs depend on, in their order.

    Raises what `cut` does, and InputError when the outputs depend on none of them.
    """
    _, reached = _made_by(network, live, outputs)
    if not reached:
        raise InputError(f"{', '.join(outputs)} does not depend on {', '.join(map(repr, live))}")
    return cut(network, [name for name in live if name in reached], outputs)


def _made_by(network: gs.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> tuple[set[int], set[str]]:
    """The ids of the nodes that make `outputs` from `inputs`, and the inputs that they depend on.

    Raises InputError naming a tensor that does not exist, or that the outputs need although `inputs` do not bound it.
    """
    tensors = network.tensors()
    for name in (*inputs, *outputs):
        if name not in tensors:
            raise InputError(f"the network has no tensor {name!r}: the whole-network ONNX must name it")
    wanted, reached, nodes = [tensors[name] for name in outputs], set(), set()
    while wanted:
        tensor = wanted.pop()
        if tensor.name in inputs:
            reached.add(tensor.name)
        elif tensor.inputs:
            if id(tensor.inputs[0]) not in nodes:
                nodes.add(id(tensor.inputs[0]))
                wanted.extend(tensor.inputs[0].inputs)
        elif not isinstance(tensor, gs.Constant) and tensor.name:
            raise InputError(
                f"{', '.join(outputs)} is not bounded by {', '.join(inputs)}: it also needs {tensor.name!r}; "
                "does a connection pass around the exit point?"
            )
    return nodes, reached


def candidate_from_metadata(model: onnx.ModelProto, path: Path) -> CandidateNetwork:
    """The candidate network that a whole-network ONNX describes; missing workloads are 0, the identity is "".

    Raises InputError naming what is missing or wrong.
    """
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)
    if text is None:
        raise InputError(f"{path} has no metadata entry {METADATA_KEY!r}, which names exit points and heads: {_REMEDY}")

    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the metadata entry {METADATA_KEY!r} of {path} is not JSON ({error}): {_REMEDY}") from error
    if not isinstance(content, dict):
        raise InputError(f"the metadata entry {METADATA_KEY!r} of {path} is not a JSON object: {_REMEDY}")
    for name in ("exit_points", "heads"):
        parts = content.get(name)
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict):
                part.setdefault("macs", 0)
    content.setdefault("identity", "")
    candidate: CandidateNetwork = files.decode_document(path, CandidateNetwork, content, _REMEDY, check_candidate)
    return candidate


def cut_network(folder: Path, gate: Gate, progress: Progress) -> GraphSet:
    """Cut `folder/network.onnx` into every graph that a plan can need, beside it, and write `index.json`.

    Segments a-b for all 0 <= a < b <= N, every head with its gate, an output graph per size of feature map, and the
    baseline. Raises InputError when the network differs from its metadata.
    """
    model = read_model(folder / NETWORK)
    network = import_network(model)
    candidate = candidate_from_metadata(model, folder / NETWORK)
    _check_tensors(candidate, network)
    _check_carried(candidate, network)
    if not candidate.identity:
        candidate = replace(candidate, identity=files.sha256_of_file(folder / NETWORK))
    if 0 in [point.macs for point in candidate.exit_points] + [head.macs for head in candidate.heads]:
        candidate = _with_counted_macs(candidate, network)
    gate = replace(gate, by_class=True)
    jobs = _jobs(network, candidate, gate)
    specs: dict[str, GraphSpec] = {}
    for done, (name, macs, make) in enumerate(jobs, start=1):
        specs[name] = write_graph(make(), folder, name, macs)
        progress(name, done, len(jobs))
    graph_set = GraphSet(folder, candidate, gate, specs)
    write_graph_set(graph_set)
    return graph_set


def add_baseline_alone(graph_set: GraphSet, whole: Path) -> GraphSet:
    """Cut the single-exit network that was trained alone, and list its graph in `index.json`.

    `whole` is that network's ONNX, beside the other graphs; it is removed. Raises InputError.
    """
    model = read_model(whole)
    candidate = candidate_from_metadata(model, whole)
    graph = _baseline(import_network(model), candidate)
    spec = write_graph(graph, graph_set.root, BASELINE_ALONE, candidate.baseline_macs)
    whole.unlink()
    graphs = {**graph_set.graphs, BASELINE_ALONE: spec}
    complete = replace(graph_set, graphs=graphs, baseline_alone=candidate.identity)
    write_graph_set(complete)
    return complete


_Job = tuple[str, int, Callable[[], onnx.ModelProto]]


def _jobs(network: gs.Graph, candidate: CandidateNetwork, gate: Gate) -> list[_Job]:
    """Name, workload and maker of every graph."""
    classes, hw = len(candidate.classes), candidate.input_hw
    jobs: list[_Job] = []
    for a, b in candidate.segments():
        make = partial(cut_from, network, candidate.live(a), _made_between(candidate, a, b))
        jobs.append((segment_name(a, b), candidate.segment_macs(a, b), make))
    for head in candidate.heads:
        jobs.append((head_graph_name(head.name), head.macs, partial(_gated_head, network, candidate, head, gate)))
    for feature_hw in sorted({candidate.logits_hw(head) for head in candidate.heads if head.labels is None}):
        jobs.append((output_name(feature_hw), 0, partial(output_graph, classes, feature_hw, hw)))
    own_ends = [(logits_name(head.name), head.labels) for head in candidate.heads if head.labels is not None]
    jobs += [(OUTPUT_OWN, 0, partial(_own_output, network, logits, labels)) for logits, labels in own_ends]
    jobs.append((BASELINE, candidate.baseline_macs, partial(_baseline, network, candidate)))
    return jobs


def _made_between(candidate: CandidateNetwork, a: int, b: int) -> list[str]:
    """The outputs of segment a-b: what is alive at b and was not alive at a."""
    before = candidate.live(a)
    return [name for name in candidate.live(b) if name not in before]


def _gated_head(network: gs.Graph, candidate: CandidateNetwork, head: Head, gate: Gate) -> onnx.ModelProto:
    model = cut_from(network, candidate.live(head.exit_point), [logits_name(head.name)])
    _rename(model, logits_name(head.name), "logits")
    pooled = None if head.gate_hw is None else (candidate.logits_hw(head), head.gate_hw)
    append_gate(model, gate, len(candidate.classes), pooled)
    return model


def _own_output(network: gs.Graph, logits: str, labels: str) -> onnx.ModelProto:
    """The network's own nodes from logits to labels."""
    model = cut(network, [logits], [labels])
    _rename(model, logits, "logits")
    _rename(model, labels, "labels")
    return model


def _baseline(network: gs.Graph, candidate: CandidateNetwork) -> onnx.ModelProto:
    head = candidate.head(candidate.baseline)
    logits = logits_name(head.name)
    model = cut(network, [IMAGE], [logits if head.labels is None else head.labels])
    _rename(model, logits, "logits")
    if head.labels is None:
        append_output(model, len(candidate.classes), candidate.logits_hw(head), candidate.input_hw)
    else:
        _rename(model, head.labels, "labels")
    append_sound(model)
    return model


def _rename(model: onnx.ModelProto, old: str, new: str) -> None:
    """Rename a tensor wherever it is written or read. Raises InputError when there is another of the new name."""
    graph = model.graph
    written = {name for node in graph.node for name in node.output} | {value.name for value in graph.input}
    if old != new and new in written:
        raise InputError(f"the network has a tensor {new!r} before {old!r}: rename it, the cut graphs use that name")
    for value in (*graph.input, *graph.output):
        value.name = new if value.name == old else value.name
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new if item == old else item for item in names]


def _with_counted_macs(candidate: CandidateNetwork, network: gs.Graph) -> CandidateNetwork:
    points: list[ExitPoint] = []
    made: dict[str, None] = {}
    for number, point in enumerate(candidate.exit_points, start=1):
        made |= dict.fromkeys(_made_between(candidate, 0, number))
        points.append(replace(point, macs=count_macs(cut(network, [IMAGE], list(made)))))
    heads = tuple(
        replace(head, macs=count_macs(cut_from(network, candidate.live(head.exit_point), [logits_name(head.name)])))
        for head in candidate.heads
    )
    return replace(candidate, exit_points=tuple(points), heads=heads)


def _check_tensors(candidate: CandidateNetwork, network: gs.Graph) -> None:
    """Check the metadata's shapes against the graph's, and names against what a file name may contain."""
    numbers = range(len(candidate.exit_points) + 1)
    expected = {t.name: (t.dtype, t.shape) for number in numbers for t in candidate.frontier(number)}
    for head in candidate.heads:
        if not re.fullmatch(r"[\w.-]+", head.config):
            raise InputError(f"head {head.name!r}: a head's name may contain only letters, digits, '_', '-' and '.'")
        hw = candidate.logits_hw(head)
        expected[logits_name(head.name)] = ("float32", (1, len(candidate.classes), *hw))
        if head.labels is not None:
            expected[head.labels] = ("uint8", (1, *candidate.input_hw))
    tensors = network.tensors()
    for name, (dtype, shape) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise InputError(f"the network has no tensor {name!r}: the whole-network ONNX must name it")
        if (np.dtype(tensor.dtype).name, tuple(tensor.shape)) != (dtype, shape):
            found = f"{np.dtype(tensor.dtype).name} {tuple(tensor.shape)}"
            raise InputError(f"tensor {name!r} is {found}, but the metadata say {dtype} {shape}")


_HEAVY = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def _check_carried(candidate: CandidateNetwork, network: gs.Graph) -> None:
    """Check that nothing after an exit point repeats convolutions or products before it.

    It could where the image is carried; its workload would not be the difference of the exit points' workloads. Raises
    InputError naming the node.
    """
    if not any(point.carried for point in candidate.exit_points):
        return
    heavy = {id(node): node.name or node.outputs[0].name for node in network.nodes if node.op in _HEAVY}
    ends = [(a, f"exit{b}", _made_between(candidate, a, b)) for a, b in candidate.segments() if a]
    ends += [(head.exit_point, head.name, [logits_name(head.name)]) for head in candidate.heads]
    for number in range(1, len(candidate.exit_points) + 1):
        before, _ = _made_by(network, [IMAGE], _made_between(candidate, 0, number))
        for end, outputs in ((end, outputs) for a, end, outputs in ends if a == number):
            after, _ = _made_by(network, candidate.live(number), outputs)
            again = [heavy[node] for node in before & after if node in heavy]
            if again:
                raise InputError(
                    f"{end} computes node {min(again)!r} again, which is before exit{number}: carry what it computes"
                )
