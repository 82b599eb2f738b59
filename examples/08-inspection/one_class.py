"""Makes one class `defect` of all but the first: `python one_class.py graphs/network.onnx defect.onnx`.

A cell's logit of `defect` is the greatest of the merged ones, so that exactly the pixels are `good` that were before.
With `--data TILES FOLDER` it writes the split val of a data set with the labels merged in the same way.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from PIL import Image

CLASSES, COLOURS = ["good", "defect"], [[60, 60, 60], [220, 60, 60]]


def merge_outputs(source: Path, target: Path) -> None:
    """Write the network with two classes, its weights inside the file."""
    model = onnx.load(str(source))
    graph = model.graph
    sizes = numpy_helper.from_array(np.array([1, len(json.loads(_entry(model).value)["classes"]) - 1]), "merge/sizes")
    graph.initializer.append(sizes)
    for output in graph.output:
        if not output.name.startswith("logits:"):
            continue
        name, parts = output.name, [f"{output.name}/{part}" for part in ("all", "good", "defects", "defect")]
        for node in graph.node:
            node.output[:] = [parts[0] if value == name else value for value in node.output]
        graph.node.append(helper.make_node("Split", [parts[0], "merge/sizes"], parts[1:3], axis=1))
        graph.node.append(helper.make_node("ReduceMax", [parts[2]], [parts[3]], axes=[1], keepdims=1))
        graph.node.append(helper.make_node("Concat", [parts[1], parts[3]], [name], axis=1))
        output.type.tensor_type.shape.dim[1].dim_value = len(CLASSES)
    entry = _entry(model)
    entry.value = json.dumps(json.loads(entry.value) | {"classes": CLASSES, "colours": COLOURS})
    onnx.save(model, str(target))


def _entry(model: onnx.ModelProto) -> onnx.StringStringEntryProto:
    entry: onnx.StringStringEntryProto = next(entry for entry in model.metadata_props if entry.key == "mess")
    return entry


def merge_labels(tiles: Path, folder: Path) -> None:
    """Write a data set with the images of val, and 1 where a label is a defect."""
    shutil.copytree(tiles / "val" / "images", folder / "val" / "images")
    (folder / "val" / "labels").mkdir()
    for path in sorted((tiles / "val" / "labels").glob("*.png")):
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels == 255, 255, labels > 0).astype(np.uint8)).save(
            folder / "val" / "labels" / path.name
        )
    lines = [f"{name} {' '.join(map(str, colour))}\n" for name, colour in zip(CLASSES, COLOURS, strict=True)]
    (folder / "classes.txt").write_text("".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--data", action="store_true", help="merge the labels of a data set, not a network's outputs")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    (merge_labels if given.data else merge_outputs)(given.source, given.target)
