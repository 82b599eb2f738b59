"""Converts COCO's instance annotations to label maps of the PASCAL VOC classes.

Categories, merging and the choice of training images follow torchvision's segmentation reference (pytorch/vision,
references/segmentation/coco_utils.py).
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from mess_compile import files
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.base.lfs_pointers import refuse_pointer

# COCO's categories that are VOC's classes 0 to 20, in that order
CATEGORIES = {
    0: "background",
    5: "airplane",
    2: "bicycle",
    16: "bird",
    9: "boat",
    44: "bottle",
    6: "bus",
    3: "car",
    17: "cat",
    62: "chair",
    21: "cow",
    67: "dining table",
    18: "dog",
    19: "horse",
    4: "motorcycle",
    1: "person",
    64: "potted plant",
    20: "sheep",
    63: "couch",
    7: "train",
    72: "tv",
}
# the rest of COCO's, whose objects are background
OTHERS = {
    8: "truck",
    10: "traffic light",
    11: "fire hydrant",
    13: "stop sign",
    14: "parking meter",
    15: "bench",
    22: "elephant",
    23: "bear",
    24: "zebra",
    25: "giraffe",
    27: "backpack",
    28: "umbrella",
    31: "handbag",
    32: "tie",
    33: "suitcase",
    34: "frisbee",
    35: "skis",
    36: "snowboard",
    37: "sports ball",
    38: "kite",
    39: "baseball bat",
    40: "baseball glove",
    41: "skateboard",
    42: "surfboard",
    43: "tennis racket",
    46: "wine glass",
    47: "cup",
    48: "fork",
    49: "knife",
    50: "spoon",
    51: "bowl",
    52: "banana",
    53: "apple",
    54: "sandwich",
    55: "orange",
    56: "broccoli",
    57: "carrot",
    58: "hot dog",
    59: "pizza",
    60: "donut",
    61: "cake",
    65: "bed",
    70: "toilet",
    73: "laptop",
    74: "mouse",
    75: "remote",
    76: "keyboard",
    77: "cell phone",
    78: "microwave",
    79: "oven",
    80: "toaster",
    81: "sink",
    82: "refrigerator",
    84: "book",
    85: "clock",
    86: "vase",
    87: "scissors",
    88: "teddy bear",
    89: "hair drier",
    90: "toothbrush",
}
VOID = 255
TRAINED_AREA = 1000  # pixels; an image with less is left out of train
_CLASS_OF = {category: number for number, category in enumerate(CATEGORIES)}
_MOST_PIXELS = 1 << 26
_LONGEST_OUTLINE = 1 << 20  # pixels; the drawing needs 80 bytes for each
_REMEDY = "unpack COCO's annotations_trainval2017.zip again, or correct it"


@dataclass(frozen=True)
class Instance:
    """One object: its VOC class, and polygons (float64 x, y, x, y, ...) or run lengths (uint32, down the columns, the
    first one outside). Packed as bytes: COCO train has tens of millions of numbers.
    """

    label: int
    polygons: tuple[bytes, ...] = field(repr=False, default=())
    runs: bytes = field(repr=False, default=b"")


@dataclass(frozen=True)
class Outlines:
    """All objects of an image of height and width `hw`; pixels outside of them are background."""

    hw: tuple[int, int]
    instances: tuple[Instance, ...]


def drawing_library() -> Any:
    """pycocotools' mask module. Raises InputError with the `pip install` line if it is missing."""
    try:
        return importlib.import_module("pycocotools.mask")
    except ImportError as error:
        raise InputError(f"COCO's masks cannot be drawn ({error}): run `pip install 'mess-compile[coco]'`") from error


def draw_labels(outlines: Outlines) -> NDArray[np.uint8]:
    """Labels (H, W) of the VOC classes; a pixel that more than one object claims is void (255)."""
    labels = np.zeros(outlines.hw, np.uint8)
    claimed, disputed = np.zeros(outlines.hw, bool), np.zeros(outlines.hw, bool)
    for instance in outlines.instances:
        inside = _inside(instance, outlines.hw)
        disputed |= claimed & inside
        claimed |= inside
        labels[inside] = instance.label
    labels[disputed] = VOID
    return labels


def _inside(instance: Instance, hw: tuple[int, int]) -> NDArray[np.bool_]:
    library = drawing_library()
    if instance.runs:
        runs = {"size": list(hw), "counts": np.frombuffer(instance.runs, np.uint32)}
        return np.asarray(library.decode(library.frPyObjects(runs, *hw)), bool)
    polygons = [np.frombuffer(polygon, np.float64) for polygon in instance.polygons]
    drawn: NDArray[np.uint8] = library.decode(library.frPyObjects(polygons, *hw))  # (H, W, polygons)
    inside: NDArray[np.bool_] = drawn.max(axis=2) > 0
    return inside


def read_outlines(path: Path, only_trained: bool) -> tuple[tuple[str, Outlines], ...]:
    """File name and objects of each image of an annotation file, by file name.

    `only_trained` selects the images whose objects of VOC's classes have more than 1000 pixels in total. Raises
    InputError for missing or malformed entries, for objects outside of the image, and when no image is left.
    """
    content = _read_json(path)
    _check_categories(path, content)
    found: tuple[tuple[str, Outlines], ...] = files.decoded(path, _REMEDY, lambda: _decoded(content, only_trained))
    if not found:
        condition = (
            f" with more than {TRAINED_AREA} pixels of VOC's classes, which train asks for" if only_trained else ""
        )
        raise InputError(f"{path} has no images{condition}: choose another split")
    return found


def _read_json(path: Path) -> Any:
    try:
        refuse_pointer(path)
        return json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): {_REMEDY}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _decoded(content: Any, only_trained: bool) -> tuple[tuple[str, Outlines], ...]:
    images = _images(content)
    objects: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
    for entry in _entries(content, "annotations"):
        if _value(entry, "category_id", int) in _CLASS_OF:
            number = _value(entry, "image_id", int)
            if number not in objects:
                raise InputError(f"annotation {_id(entry)} is for image {number}, which is not listed")
            objects[number].append(entry)
    return tuple(
        (name, Outlines(hw, tuple(_instance(entry, hw) for entry in objects[number])))
        for number, (name, hw) in sorted(images.items(), key=lambda image: image[1])
        if not only_trained or sum(_value(entry, "area", int, float) for entry in objects[number]) > TRAINED_AREA
    )


def _check_categories(path: Path, content: Any) -> None:
    """Raises InputError for another data set in COCO's format, which has categories of its own."""

    def read() -> list[tuple[int, str]]:
        return [(_value(entry, "id", int), _value(entry, "name", str)) for entry in _entries(content, "categories")]

    known = CATEGORIES | OTHERS
    for number, name in files.decoded(path, _REMEDY, read):
        if name != known.get(number):
            instead = f", which is {known[number]!r} in COCO" if number in known else ", which COCO does not have"
            raise InputError(
                f"{path} has the category {number} {name!r:.40}{instead}: in this format only COCO's own categories "
                "are read; for others write label PNGs, with a classes.txt (docs/own-images.md)"
            )


def _images(content: Any) -> dict[int, tuple[str, tuple[int, int]]]:
    images = {}
    for entry in _entries(content, "images"):
        number, name = _value(entry, "id", int), _value(entry, "file_name", str)
        if name in ("", "..") or PurePath(name).name != name:
            raise InputError(f"image {number} has the file_name {name!r:.80}, which is not the bare name of a file")
        hw = _value(entry, "height", int), _value(entry, "width", int)
        if min(hw) < 1 or hw[0] * hw[1] > _MOST_PIXELS:
            raise InputError(f"image {number} is {hw[0]} x {hw[1]}: 1 to {_MOST_PIXELS} pixels are supported")
        if number in images:
            raise InputError(f"image {number} is listed twice")
        images[number] = name, hw
    if len({name for name, _ in images.values()}) < len(images):
        raise InputError("two images have the same file_name")
    return images


def _entries(content: Any, name: str) -> list[dict[str, Any]]:
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"it has no list of objects named {name}")
    return entries


def _value(entry: dict[str, Any], name: str, *kinds: type) -> Any:
    value = entry.get(name)
    if type(value) not in kinds:  # JSON's true is not a number
        raise InputError(f"{name} of {_id(entry)} is {value!r:.40}, not {kinds[-1].__name__}")
    return value


def _id(entry: dict[str, Any]) -> str:
    return f"{entry.get('id', 'an entry without id')!r:.40}"


def _instance(entry: dict[str, Any], hw: tuple[int, int]) -> Instance:
    label, outline = _CLASS_OF[entry["category_id"]], entry.get("segmentation")
    try:
        if isinstance(outline, dict):
            return Instance(label, runs=_runs(outline, hw))
        if isinstance(outline, list) and outline:
            return Instance(label, tuple(_polygon(polygon, hw) for polygon in outline))
        raise InputError(f"its segmentation is {outline!r:.40}, neither polygons nor run lengths")
    except (InputError, ValueError) as error:
        raise InputError(f"annotation {_id(entry)}: {error}") from error


def _polygon(polygon: Any, hw: tuple[int, int]) -> bytes:
    values = np.array(polygon)
    if values.ndim != 1 or values.dtype.kind not in "if" or values.size < 6 or values.size % 2:
        raise InputError(f"polygon {polygon!r:.40} is not x, y of three points or more")
    points = values.astype(np.float64).reshape(-1, 2)  # (points, xy)
    size = np.array([hw[1], hw[0]])
    low, high = points.min(axis=0), points.max(axis=0)
    # the library clips what reaches over the border; COCO's own polygons may do so by a little
    if not ((low >= -size) & (low <= size) & (high >= 0) & (high <= 2 * size)).all():
        raise InputError(
            f"a polygon from ({low[0]:g}, {low[1]:g}) to ({high[0]:g}, {high[1]:g}) lies out of the image, "
            f"which is {hw[1]} wide and {hw[0]} high"
        )
    length = np.abs(np.diff(points, axis=0, append=points[:1])).max(axis=1).sum()
    if length > _LONGEST_OUTLINE:
        raise InputError(f"a polygon is {length:.0f} pixels long: at most {_LONGEST_OUTLINE} are supported")
    return points.tobytes()


def _counts_of_text(text: str) -> list[int]:
    """Decode run lengths from COCO's textual form: 5 bits per character, the sixth says that more follow; from the
    fourth number on each is the difference to the last but one.

    Does not use pycocotools, which reads beyond the end of a truncated text.
    """
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise InputError(f"run lengths {text!r:.40} are not in COCO's textual form")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift or not counts:
        raise InputError(f"run lengths {text!r:.40} end in the middle of a number")
    return counts


def _runs(outline: dict[str, Any], hw: tuple[int, int]) -> bytes:
    counts = outline.get("counts")
    counts = np.array(_counts_of_text(counts) if isinstance(counts, str) else counts)
    if counts.ndim != 1 or counts.dtype.kind != "i":
        raise InputError(f"run lengths {outline.get('counts')!r:.40} are not a list of numbers")
    pixels = hw[0] * hw[1]
    if outline.get("size") != list(hw) or counts.min() < 0 or counts.max() > pixels or counts.sum() != pixels:
        raise InputError(f"run lengths of size {outline.get('size')!r:.40} do not fill the image of {hw[0]} x {hw[1]}")
    return counts.astype(np.uint32).tobytes()
