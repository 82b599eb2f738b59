"""Compares the usual preparations of an input on labelled images: a wrong one shows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mess_compile.attach.opened import OpenedNetwork
from mess_compile.data.dataset import DataSet, samples
from mess_compile.evaluate.statistics import label_counts, miou
from mess_compile.graph.exits_toml import PREPROCESSING
from mess_compile.graph.normalise import prune
from mess_compile.graph.store import write_model
from mess_compile.runtime.engines.engine import open_library
from mess_compile.runtime.images import frames

CLEARLY_PP = 5.0
"""A preparation whose mIoU is this much higher on a few images is likely the right one."""
_IMAGES = 16


def prepared_miou(opened: OpenedNetwork, folder: Path, data: DataSet) -> Mapping[str, float]:
    """The network's mIoU in percent, on some images by the name of the preparation.

    `folder` has the network's weights.
    """
    logits, path, hw = opened.end.logits, folder / "prepared.onnx", opened.hw
    model = onnx.ModelProto.FromString(opened.model.SerializeToString())
    prune(model, [helper.make_tensor_value_info(logits.name, TensorProto.FLOAT, logits.shape)])
    write_model(model, path)
    step = max(1, len(data.items) // _IMAGES)
    images = list(samples(replace(data, items=data.items[::step][:_IMAGES])))
    found = {}
    try:
        with closing(open_library("onnxruntime")) as library, closing(library.load(path)) as engine:
            for name, rule in PREPROCESSING.items():
                fitted = opened.fitted(rule)
                confusion = np.zeros((3, opened.end.classes), np.int64)
                for image in images:
                    values = fitted.of_frame(frames.resize(image.frame, hw))
                    outputs = engine.run({opened.image.name: library.upload(values)})
                    guess = _labels(np.asarray(library.download(outputs[logits.name]))[0], opened)
                    confusion += label_counts(guess, image.labels, opened.end.classes)
                found[name] = miou(*confusion)
    finally:
        path.unlink(missing_ok=True)
    return found


def _labels(scores: NDArray[np.float32], opened: OpenedNetwork) -> NDArray[np.uint8]:
    """Labels (h, w) of the scores of an image, in the layout of the network's end."""
    planes = scores if opened.end.layout == "NCHW" else scores.transpose(2, 0, 1)
    found: NDArray[np.uint8] = (planes.argmax(axis=0) if len(planes) > 1 else planes[0] > 0).astype(np.uint8)
    return found
