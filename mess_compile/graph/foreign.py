"""A multi-exit ONNX from any framework -> the same graphs as from our own networks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import onnx

from mess_compile import files
from mess_compile.candidates import CandidateNetwork, Gate, GraphSet, read_graph_set
from mess_compile.graph.check import Array, Reference, check_stages
from mess_compile.graph.cut import METADATA_KEY, NETWORK, Progress, cut_network, logits_name
from mess_compile.graph.fold import fold_constants
from mess_compile.graph.store import externalise, read_model, write_model
from mess_compile.runtime import engine


def import_onnx(source: Path, graphs: Path, gate: Gate, frames: Sequence[Array], progress: Progress) -> GraphSet:
    """Cut a whole-network ONNX of opset 17 into the folder `graphs`, checked on `frames` uint8 (H, W, 3).

    Its metadata entry `mess` describes exit points and heads (CandidateNetwork as JSON; workloads may be left
    out), its tensors are named `image`, `exitN` and `logits:HEAD`; its identity is the hash of the network as written,
    whatever the entry says. The folder is replaced when all is well.
    Raises InputError or EngineError.
    """
    model = read_model(source)
    fold_constants(model)
    _drop_identity(model)
    with files.replaced_folder(graphs) as folder:
        externalise(model, folder, source.parent)
        write_model(model, folder / NETWORK)
        graph_set = cut_network(folder, gate, progress)
        with closing(engine.open_library("onnxruntime")) as library:
            whole = _onnx_reference(library, source, graph_set.candidate)
            check_stages(graph_set, whole, frames, progress)
    return read_graph_set(graphs)


def _drop_identity(model: onnx.ModelProto) -> None:
    """Forget the identity in the metadata: an edited copy would still claim to be the network that it was."""
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            with suppress(ValueError, RecursionError):  # the cut says what is wrong with it
                content = json.loads(entry.value)
                if isinstance(content, dict) and "identity" in content:
                    del content["identity"]
                    entry.value = json.dumps(content)


def _onnx_reference(library: engine.Library, path: Path, candidate: CandidateNetwork) -> Reference:
    """The untouched model, run whole."""
    whole = library.load(path)

    def logits(frame: Array) -> dict[str, Array]:
        outputs = whole.run({"image": library.upload(frame[None])})
        return {head.name: np.array(library.download(outputs[logits_name(head.name)])) for head in candidate.heads}

    return logits
