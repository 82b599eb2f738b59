"""Counts the defects that a bundle misses, beside the full network: `python missed.py host.mess --data TILES`.

A defect is a connected region of one class in the labels. It is missed where no pixel of it is predicted as its class,
and unseen where none is predicted as any defect.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mess_compile import runtime
from mess_compile.data.dataset import open_dataset, samples
from mess_compile.data_folder import DataFolder
from mess_compile.runtime.base.errors import MessError
from mess_compile.runtime.images import frames

Places = tuple[NDArray[np.intp], NDArray[np.intp]]
Key = tuple[int | str, ...]


def regions(mask: NDArray[np.bool_]) -> Iterator[Places]:
    """The rows and columns of each connected region; pixels that touch at a corner are connected."""
    left = set(zip(*(places.tolist() for places in np.nonzero(mask)), strict=True))
    while left:
        found, new = [], [left.pop()]
        while new:
            y, x = new.pop()
            found.append((y, x))
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            new += near
        rows, columns = np.array(found).T
        yield rows, columns


def count(labels: NDArray[np.uint8], predictions: dict[str, NDArray[np.uint8]], classes: int) -> Counter[Key]:
    """How many (class, "defects") there are in an image, and of those (class, name, "missed") and "unseen"."""
    found: Counter[Key] = Counter()
    for number in range(1, classes):
        for region in regions(labels == number):
            found[number, "defects"] += 1
            for name, predicted in predictions.items():
                found[number, name, "missed"] += bool((predicted[region] != number).all())
                found[number, name, "unseen"] += bool((predicted[region] == 0).all())
    return found


def counted(bundle: str, graph: Path, data: str, split: str) -> tuple[Counter[Key], Counter[Key], list[str]]:
    """Defects by class, and images by what is in them, over a split: (kind, "images"), (kind, exit), false alarms."""
    defects: Counter[Key] = Counter()
    images: Counter[Key] = Counter()
    dataset = open_dataset(DataFolder(Path(data)), split)
    with runtime.load(bundle) as cascade, closing(cascade.library.load(graph)) as engine:
        network = cascade.manifest.network
        for sample in samples(dataset):
            image = cascade.library.upload(frames.to_input(sample.frame, network.input_hw, network.resize)[None])
            whole = cascade.library.download(engine.run({"image": image})["labels"])[0]
            prediction = cascade(sample.frame)
            size = sample.frame.shape[0], sample.frame.shape[1]
            predictions = {"plan": prediction.labels, "full network": frames.from_input(whole, size, network.resize)}
            defects += count(sample.labels, predictions, len(network.classes))
            present = [number for number in range(1, len(network.classes)) if (sample.labels == number).any()]
            kind = present[0] if present else 0
            images[kind, "images"] += 1
            images[kind, prediction.exit] += 1
            for name, labels in predictions.items():
                images[kind, name, "alarms"] += bool((labels > 0).any())
        return defects, images, list(network.classes)


def main(arguments: argparse.Namespace) -> None:
    defects, images, classes = counted(arguments.bundle, arguments.full_network, arguments.data, arguments.split)
    exits = sorted({key[1] for key in images if isinstance(key[1], int)})
    print(
        "images      count  " + "  ".join(f"exit {number}" for number in exits) + "  with an alarm: plan, full network"
    )
    for number, name in enumerate(classes):
        shares = "  ".join(f"{images[number, at]:6d}" for at in exits)
        alarms = [images[number, who, "alarms"] for who in ("plan", "full network")]
        print(f"{name:10} {images[number, 'images']:6d}  {shares}  {alarms[0]:20d} {alarms[1]:13d}")
    print("\ndefects     count  missed: plan, full network  unseen: plan, full network")
    for number, name in enumerate(classes[1:], start=1):
        row = [defects[number, who, what] for what in ("missed", "unseen") for who in ("plan", "full network")]
        print(f"{name:10} {defects[number, 'defects']:6d} {row[0]:13d} {row[1]:13d} {row[2]:13d} {row[3]:13d}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("bundle", help="what `mess-compile bundle` wrote, such as host.mess")
    parser.add_argument("--data", required=True, help="folder of the tiles, as for `mess-compile evaluate`")
    parser.add_argument("--split", default="val", help="split of the data, val by default")
    parser.add_argument("--full-network", type=Path, default=Path("graphs/baseline.onnx"), help="its graph")
    try:
        main(parser.parse_args())
    except MessError as error:
        raise SystemExit(f"error: {error}") from error
