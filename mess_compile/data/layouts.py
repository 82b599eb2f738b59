"""Recognises data sets by their files: their class lists, and the items of a split.

Reads names and COCO's annotations only; `dataset` decodes images and labels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mess_compile import files
from mess_compile.data import coco
from mess_compile.data.class_list import ALWAYS_IGNORED, ClassList, default_colour
from mess_compile.data_folder import IMAGES, LABELS
from mess_compile.runtime.base.errors import InputError, did_you_mean

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
LABEL_SUFFIXES = (".png",)
VALIDATION_SHARE = 0.2
PLAIN = "plain folders"
_UNSAID = ("thumbs.db", "desktop.ini")
PICTURES = (*IMAGE_SUFFIXES, ".tif", ".tiff", ".gif", ".jp2", ".heic", ".avif", ".ppm", ".npy")
_CAMVID_NAME = re.compile(r"(0001TP|0006R0|0016E5|Seq05VD)_f?\d+")
_CITYSCAPES_IMAGE = "_leftImg8bit.png"
_CITYSCAPES_IDS = range(34)  # -1, the licence plate, is 255 in a PNG


@dataclass(frozen=True)
class LabelFile:
    """A label PNG of a data set that defines its values: `classes` holds the class of each of the 256 values, 255 for
    void, -1 for a value that it does not use.
    """

    path: Path
    classes: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class Item:
    """One labelled image. `group` is its video sequence; an image without one is its own group. `label` is the source
    of the labels: a PNG (a bare path if the class list defines its values) or outlines to draw.
    """

    id: str
    group: str
    image: Path
    label: Path | LabelFile | coco.Outlines

    @property
    def label_path(self) -> Path | None:
        """The label PNG; None if the labels are drawn."""
        if isinstance(self.label, coco.Outlines):
            return None
        return self.label.path if isinstance(self.label, LabelFile) else self.label


@dataclass(frozen=True)
class FoundItems:
    """The items of a split, and sentences about files there that are not read."""

    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """One way to arrange a data set on disk. A folder that has one of `marks` (glob patterns) has this layout;
    `expected` tells the user which files it needs. `classes` is None if the folder defines them itself.
    """

    name: str
    marks: tuple[str, ...]
    expected: str
    classes: ClassList | None
    find_items: Callable[[Path, str], FoundItems]


@dataclass(frozen=True)
class Listing:
    """The files of a folder that are read, by name, and sentences about those that are not."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...]


def listed_files(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Listing:
    """The files of a folder that end in one of `suffixes`, in small or capital letters; hidden ones are skipped."""
    read: list[Path] = []
    hidden: list[str] = []
    folders: list[str] = []
    others: Counter[str] = Counter()
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith("."):
            hidden += [path.name] if suffix in PICTURES else []
        elif path.is_dir():
            folders.append(path.name)
        elif suffix in suffixes:
            read.append(path)
        elif path.name.lower() not in _UNSAID:
            others[path.suffix or "without suffix"] += 1
    notes = []
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
        notes.append(f"{_of(others.total(), 'file', folder)} not read ({kinds}): {_one_of(suffixes)} are")
    if hidden:
        notes.append(f"{_of(len(hidden), 'hidden file', folder)} skipped (first {hidden[0]})")
    if folders:
        notes.append(f"{_of(len(folders), 'folder', folder)} not searched (first {folders[0]})")
    return Listing(tuple(read), tuple(notes))


def _of(count: int, what: str, folder: Path) -> str:
    return f"1 {what} of {folder} is" if count == 1 else f"{count} {what}s of {folder} are"


def _one_of(suffixes: tuple[str, ...]) -> str:
    return suffixes[0] if len(suffixes) == 1 else f"{', '.join(suffixes[:-1])} and {suffixes[-1]}"


def by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """Files by their name without suffix. Raises InputError when two have the same."""
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise InputError(
                f"{found[path.stem].name} and {path.name} of {path.parent} differ in the suffix only, and images and "
                "labels are matched by name without suffix: keep one of them, or rename it"
            )
        found[path.stem] = path
    return found


def _class_values(stored: Iterable[int], used: Iterable[int]) -> tuple[int, ...]:
    """A `LabelFile.classes`: class k is stored as the k-th of `stored`; the rest of `used` is void, as is 255."""
    classes = dict.fromkeys([*used, ALWAYS_IGNORED], ALWAYS_IGNORED)
    classes.update((value, number) for number, value in enumerate(stored))
    return tuple(classes.get(value, -1) for value in range(256))


CAMVID = ClassList(
    names=("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),
    colours=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (0, 0, 192),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
    ignored=frozenset({11, ALWAYS_IGNORED}),
    is_coloured=True,
    void_colours=((0, 0, 0),),
)

_CITYSCAPES = (  # labelId, name, colour; in the order of trainIds
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
CITYSCAPES = ClassList(
    tuple(name for _, name, _ in _CITYSCAPES), tuple(colour for _, _, colour in _CITYSCAPES), is_coloured=True
)
_LABEL_IDS = _class_values((value for value, _, _ in _CITYSCAPES), _CITYSCAPES_IDS)
_TRAIN_IDS = _class_values(range(len(_CITYSCAPES)), ())

_VOC_NAMES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
# a plain class list has no background: its first default colour is VOC's second
VOC = ClassList(_VOC_NAMES, tuple(default_colour(value - 1) for value in range(len(_VOC_NAMES))), is_coloured=True)
_VOC_VALUES = _class_values(range(len(_VOC_NAMES)), ())


def is_camvid(items: Iterable[Item]) -> bool:
    """Whether the items have the names of CamVid's four drives."""
    return all(is_camvid_name(item.id) for item in items)


def is_camvid_name(name: str) -> bool:
    return _CAMVID_NAME.fullmatch(name) is not None


class AstrayError(InputError):
    """A folder without a data set, or with another one than expected; `brief` omits what is expected."""

    def __init__(self, message: str, brief: str | None = None) -> None:
        super().__init__(message)
        self.brief = brief or message


class NoLayoutError(AstrayError):
    """A folder in which no layout is recognised."""


def plain_layout(images: str, labels: str) -> Layout:
    """Folders of images and labels with these names: in a folder for each split, or with one for each split in them."""

    def find(root: Path, split: str) -> FoundItems:
        return _find_plain(root, split, images, labels)

    expected = f"SPLIT/{images}/* and SPLIT/{labels}/*.png, or {images}/* and {labels}/*.png, with a classes.txt"
    return Layout(PLAIN, (images, f"*/{images}"), expected, None, find)


def _find_plain(root: Path, split: str, images: str, labels: str) -> FoundItems:
    if (root / split / images).is_dir():
        return _paired(root / split / images, root / split / labels)
    if (root / images / split).is_dir():
        return _paired(root / images / split, root / labels / split)
    splits = {path.relative_to(root).parts[0] for path in root.glob(f"*/{images}")}
    splits |= {path.name for path in root.glob(f"{labels}/*") if path.is_dir() and (root / images / path.name).is_dir()}
    if splits or not (root / images).is_dir() or split not in ("train", "val"):
        raise _no_split(root, split, splits, root / split / images)
    found = _paired(root / images, root / labels)
    items = found.items
    if len(items) == 1:
        raise InputError(
            f"{root} has 1 image, but without splits the last fifth is for validation: add images, to train on at "
            "least 2 and validate on 1"
        )
    border = len(items) - max(1, round(len(items) * VALIDATION_SHARE))
    return replace(found, items=items[border:] if split == "val" else items[:border])


def _find_segnet(root: Path, split: str) -> FoundItems:
    if not (root / split).is_dir():
        found = (path.name.removesuffix("annot") for path in root.glob("*annot"))
        raise _no_split(root, split, found, root / split)
    return _paired(root / split, root / f"{split}annot")


def _paired(images: Path, labels: Path) -> FoundItems:
    if not labels.is_dir():
        raise InputError(f"{labels} does not exist: every image needs a label PNG of the same name there")
    pictures, masks = listed_files(images), listed_files(labels, LABEL_SUFFIXES)
    if not pictures.paths and pictures.notes:
        raise InputError(f"{images} has no image that is read: {'; '.join(pictures.notes)}; convert them")
    labelled, wanted = by_stem(masks.paths), by_stem(pictures.paths)
    items = [
        Item(stem, sequence_of(stem), path, labelled.get(stem, labels / f"{stem}.png")) for stem, path in wanted.items()
    ]
    notes, alone = [*pictures.notes, *masks.notes], sorted(labelled.keys() - wanted.keys())
    if alone:
        notes.append(f"{_of(len(alone), 'label', labels)} without an image (first {labelled[alone[0]].name})")
    return FoundItems(tuple(_labelled(items)), tuple(notes))


def sequence_of(stem: str) -> str:
    """The name of the video sequence that an image's name belongs to: the name without its last number."""
    return re.sub(r"[_-]?[a-z]?\d+$", "", stem) or "all"


def _find_cityscapes(root: Path, split: str) -> FoundItems:
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    if not images.is_dir():
        raise _no_split(root, split, (path.parent.name for path in root.glob("leftImg8bit/*/*")), images)
    if not labels.is_dir():
        raise InputError(f"{labels} does not exist: unpack Cityscapes' gtFine_trainvaltest.zip beside leftImg8bit")
    there = sorted(path for path in images.glob("*/*") if not path.name.startswith("."))
    paths = [path for path in there if path.name.endswith(_CITYSCAPES_IMAGE)]
    others = [path for path in there if not path.name.endswith(_CITYSCAPES_IMAGE)]
    notes = []
    if others:
        notes.append(f"{_of(len(others), 'file', images)} not read (first {others[0].name}): *{_CITYSCAPES_IMAGE} are")
    return FoundItems(tuple(_labelled([_cityscapes_item(path, labels) for path in paths])), tuple(notes))


def _cityscapes_item(image: Path, labels: Path) -> Item:
    name = image.name.removesuffix(_CITYSCAPES_IMAGE)
    sequence = name.rpartition("_")[0] or name
    return Item(name, sequence, image, _cityscapes_label(labels / image.parent.name, name))


def _cityscapes_label(folder: Path, name: str) -> LabelFile:
    ids, train_ids = folder / f"{name}_gtFine_labelIds.png", folder / f"{name}_gtFine_labelTrainIds.png"
    if train_ids.is_file() and not ids.is_file():
        return LabelFile(train_ids, _TRAIN_IDS)
    return LabelFile(ids, _LABEL_IDS)


def _find_voc(root: Path, split: str) -> FoundItems:
    places = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    year = next((place for place in places if (place / "JPEGImages").is_dir()), None)
    if year is None:
        raise InputError(f"{root} has no JPEGImages: unpack PASCAL VOC's VOCtrainval_11-May-2012.tar there")
    images, labels, lists = year / "JPEGImages", year / "SegmentationClass", year / "ImageSets" / "Segmentation"
    if not labels.is_dir():
        raise InputError(f"{labels} does not exist: PASCAL VOC's label PNGs lie there")
    names = _listed(root, lists, split)
    pictures, masks = by_stem(listed_files(images).paths), by_stem(listed_files(labels, LABEL_SUFFIXES).paths)
    _check_present(lists / f"{split}.txt", names, pictures, images)
    where = [masks.get(name, labels / f"{name}.png") for name in names]
    items = [Item(n, n, pictures[n], LabelFile(path, _VOC_VALUES)) for n, path in zip(names, where, strict=True)]
    return FoundItems(tuple(_labelled(items)))


def _listed(root: Path, lists: Path, split: str) -> list[str]:
    path = lists / f"{split}.txt"
    if not path.is_file():
        raise _no_split(root, split, (found.stem for found in lists.glob("*.txt")), path)
    names = [line.strip() for line in files.read_lines(path) if line.strip()]
    twice = len(names) - len(set(names))
    if twice:
        raise InputError(f"{path} names {twice} images more than once: keep one line for each")
    return names


def _find_coco(root: Path, split: str) -> FoundItems:
    coco.drawing_library()  # a missing extra is reported now, not in the middle of a training
    path, images = root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"
    if not path.is_file():
        found = (path.stem[len("instances_") : -len("2017")] for path in root.glob("annotations/instances_*2017.json"))
        raise _no_split(root, split, found, path)
    if not images.is_dir():
        raise InputError(f"{images} does not exist: unpack COCO's {split}2017.zip there")
    outlines = coco.read_outlines(path, only_trained=split == "train")
    _check_present(path, [name for name, _ in outlines], {each.name for each in images.iterdir()}, images)
    return FoundItems(tuple(Item(Path(name).stem, Path(name).stem, images / name, label) for name, label in outlines))


def _check_present(source: Path, names: Iterable[str], here: Container[str], folder: Path) -> None:
    """Compares names with those of existing files, so that none can lead out of the folder."""
    missing = [name for name in names if name not in here]
    if missing:
        raise InputError(
            f"{source} names {len(missing)} images that do not exist in {folder}, first {missing[0]!r:.80}: put them "
            "there or correct the list"
        )


def _labelled(items: list[Item]) -> list[Item]:
    missing = [item for item in items if item.label_path and not item.label_path.is_file()]
    if missing:
        wanted = missing[0].label_path
        assert wanted is not None, "drawn labels are never missing"
        raise InputError(
            f"{len(missing)} of {len(items)} images have no label, first {missing[0].image}: put it at "
            f"{wanted}{_instead(wanted)}"
        )
    return items


def _instead(wanted: Path) -> str:
    """A file beside a missing label that may be meant as that label."""
    there = sorted(wanted.parent.iterdir()) if wanted.parent.is_dir() else []
    near = [path for path in there if path.name.startswith(wanted.stem)]
    if not near:
        return ""
    remedy = f"rename it to {wanted.name}" if near[0].suffix.lower() == wanted.suffix else "labels are PNG files"
    return f" ({near[0].name} is there: {remedy})"


def _no_split(root: Path, split: str, found: Iterable[str], expected: Path) -> AstrayError:
    known = sorted(set(found))
    missing = f"{root} has no split {split!r}{did_you_mean(split, known)} (found: {', '.join(known) or 'none'})"
    return AstrayError(f"{missing}: expected {expected}", missing)


LAYOUTS = (
    Layout(
        "Cityscapes",
        ("leftImg8bit", "gtFine"),
        "leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelIds.png (or _labelTrainIds.png)",
        CITYSCAPES,
        _find_cityscapes,
    ),
    Layout(
        "PASCAL VOC",
        ("JPEGImages", "SegmentationClass", "VOC2012", "VOCdevkit"),
        "JPEGImages/*.jpg, SegmentationClass/*.png and ImageSets/Segmentation/SPLIT.txt, here or in VOCdevkit/VOC2012",
        VOC,
        _find_voc,
    ),
    Layout(
        "COCO",
        ("annotations/instances_*2017.json", "train2017/*.jpg", "val2017/*.jpg"),
        "annotations/instances_SPLIT2017.json and SPLIT2017/*.jpg",
        VOC,
        _find_coco,
    ),
    Layout(
        "CamVid of the SegNet tutorial",
        ("trainannot", "valannot", "testannot"),
        "SPLIT/*.png and SPLITannot/*.png",
        None,
        _find_segnet,
    ),
    plain_layout(IMAGES, LABELS),
)


def find_layout(root: Path, names: tuple[str, str] = (IMAGES, LABELS)) -> Layout:
    """The layout of a folder, recognised from its files; `names` are the names of the folders of images and labels.

    Raises NoLayoutError when nothing is recognised.
    """
    layouts = LAYOUTS if names == (IMAGES, LABELS) else (plain_layout(*names),)
    for layout in layouts:
        if any(any(root.glob(mark)) for mark in layout.marks):
            return layout
    if names != (IMAGES, LABELS):
        raise InputError(f"{root} has no folder {names[0]}: expected {layouts[0].expected}")
    raise NoLayoutError(f"{root} has no data set in a known layout")
