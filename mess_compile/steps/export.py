"""The step `export`: the candidate network as checked graphs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mess_compile import extras
from mess_compile.data import scenes
from mess_compile.data.dataset import open_dataset, read_frame
from mess_compile.network import Gate, GraphSet
from mess_compile.reporter import SILENT, Reporter
from mess_compile.runtime.base.errors import InputError, did_you_mean
from mess_compile.runtime.images import frames
from mess_compile.workspace import Workspace

CHECKED_FRAMES = 3
NETWORK, ORIGINAL = "network.onnx", "original.onnx"
_GATE = Gate()


def export(
    workspace: Workspace,
    source: Path | None = None,
    gate: Gate = _GATE,
    exits: Path | None = None,
    reporter: Reporter = SILENT,
) -> GraphSet:
    """Cut a checkpoint folder or a whole-network ONNX into `graphs/`, checked on frames of the workspace's data.

    `exits` is the TOML that names the tensors of an ONNX which does not describe itself. Without data, or when they
    cannot be read, the frames are generated scenes. The network in `baseline/` becomes a graph beside a checkpoint's.
    """
    if exits is not None and source is None:
        raise InputError(f"{exits} names tensors of a model: `mess-compile export MODEL.onnx --exits {exits}`")
    if source is not None and not source.exists():
        near = did_you_mean(source.name, sorted(path.name for path in source.parent.glob("*")))
        raise InputError(
            f"{source} does not exist{near}: name an ONNX file, or the folder of a trained multi-exit network"
        )
    source = source or workspace.candidate
    original = source / ORIGINAL
    if (source / NETWORK).is_file():
        source = source / NETWORK
    baseline = workspace.baseline if (workspace.baseline / "network.json").is_file() else None
    if source.is_file():
        if baseline is not None:
            raise InputError(
                f"{baseline} holds a baseline for a checkpoint of `mess-compile train`, which cannot stand beside "
                f"{source}: export in a workspace of its own (-C DIR), or remove {baseline}"
            )
        from mess_compile.graph import cut, import_onnx, store

        if exits is not None:
            frames_of = partial(_checked_frames, workspace)
            return import_onnx.import_with_exits(source, exits, workspace.graphs, gate, frames_of, reporter.progress)
        hw = cut.candidate_from_metadata(store.read_model(source), source).input_hw
        return import_onnx.import_onnx(
            source,
            workspace.graphs,
            gate,
            _checked_frames(workspace, hw),
            reporter.progress,
            original if original.is_file() else None,
        )
    if exits is not None:
        raise InputError(f"{source} is no ONNX file, which --exits {exits} asks for")
    module, checkpoint = extras.torch_module("nets.export"), extras.torch_module("nets.checkpoint")
    hw = checkpoint.read_architecture(source).input_hw
    graph_set: GraphSet = module.export_checkpoint(
        source, workspace.graphs, gate, _checked_frames(workspace, hw), reporter.progress, baseline
    )
    return graph_set


def _checked_frames(workspace: Workspace, hw: tuple[int, int]) -> list[NDArray[np.uint8]]:
    if workspace.memory().data is not None:
        try:
            data = open_dataset(workspace.data_folder(None), "val")
            chosen = data.items[:: max(1, len(data.items) // CHECKED_FRAMES)][:CHECKED_FRAMES]
            return [frames.resize(read_frame(item.image), hw) for item in chosen]
        except InputError:
            pass  # the data may have moved since; generated frames check the same arithmetic
    return _scene_frames(hw, CHECKED_FRAMES)


def _scene_frames(hw: tuple[int, int], count: int) -> list[NDArray[np.uint8]]:
    return [scene.frame for scene in scenes.by_difficulty(hw, count)]
