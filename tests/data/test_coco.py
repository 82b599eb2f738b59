"""COCO's objects become the labels that others train on; a hostile annotation file does no more than a message."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mess_compile.data import coco
from mess_compile.data.dataset import open_dataset, read_sample, samples
from mess_compile.runtime.base.errors import InputError

pytest.importorskip("pycocotools", reason="pip install 'mess-compile[coco]'")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools 2.0.11
HEIGHT, WIDTH = 40, 60
PERSON, CAR, TABLE, TRUCK = 1, 3, 67, 8  # a truck is no class of VOC


def box(x: int, y: int, width: int, height: int) -> list[int]:
    """The polygon around whole pixels."""
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def annotation(number: int, image: int, category: int, segmentation: Any, area: float) -> dict[str, Any]:
    kind = int(isinstance(segmentation, dict))
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "area": area,
        "iscrowd": kind,
        "bbox": [0, 0, 1, 1],
    }


def content() -> dict[str, Any]:
    """Image 2 has a person over a car, image 1 little, image 3 a crowd, image 4 only a truck."""
    crowd = {"size": [HEIGHT, WIDTH], "counts": [5, 2, HEIGHT * WIDTH - 7]}
    return {
        "images": [
            {"id": number, "file_name": f"{number:012}.jpg", "height": HEIGHT, "width": WIDTH}
            for number in (2, 1, 4, 3)
        ],
        "categories": [
            *({"id": PERSON, "name": "person"}, {"id": CAR, "name": "car"}, {"id": TABLE, "name": "dining table"}),
            {"id": TRUCK, "name": "truck"},
        ],
        "annotations": [
            annotation(10, 2, CAR, [box(0, 0, 30, 30)], 900),
            annotation(11, 2, PERSON, [box(20, 10, 20, 10), box(50, 30, 10, 10)], 300.5),
            annotation(12, 2, TRUCK, [box(0, 0, 60, 40)], 2400),
            annotation(13, 1, TABLE, [box(0, 0, 40, 25)], 1000),
            annotation(14, 3, PERSON, crowd, 5000),
            annotation(15, 4, TRUCK, [box(0, 0, 60, 40)], 2400),
        ],
    }


def write(root: Path, written: Any, split: str = "val") -> Path:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    text = written if isinstance(written, str) else json.dumps(written)
    (root / "annotations" / f"instances_{split}2017.json").write_text(text)
    (root / f"{split}2017").mkdir(exist_ok=True)
    for number in (1, 2, 3, 4):
        path = root / f"{split}2017" / f"{number:012}.jpg"
        if not path.exists():
            Image.new("RGB", (WIDTH, HEIGHT), (9, 9, 9)).save(path)
    return root


def labels_by_id(root: Path) -> dict[str, np.ndarray]:
    return {sample.id: sample.labels for sample in samples(open_dataset(root, "val"))}


def refusal(root: Path, split: str = "val") -> str:
    with pytest.raises(InputError) as caught:
        open_dataset(root, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_objects_are_voc_s_classes_and_what_two_claim_is_void(tmp_path: Path) -> None:
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[0:30, 0:30] = 7  # car
    expected[10:20, 20:40] = 15  # person
    expected[30:40, 50:60] = 15
    expected[10:20, 20:30] = 255
    np.testing.assert_array_equal(labels_by_id(write(tmp_path, content()))["000000000002"], expected)


def test_a_crowd_is_read_down_the_columns(tmp_path: Path) -> None:
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[5:7, 0] = 15
    np.testing.assert_array_equal(labels_by_id(write(tmp_path, content()))["000000000003"], expected)


def test_an_image_without_such_objects_is_background(tmp_path: Path) -> None:
    found = labels_by_id(write(tmp_path, content()))
    assert sorted(found) == [f"{number:012}" for number in (1, 2, 3, 4)]
    assert not found["000000000004"].any()
    assert set(np.unique(found["000000000001"])) == {0, 11}  # dining table


def test_two_polygons_of_one_object_do_not_dispute(tmp_path: Path) -> None:
    written = content()
    written["annotations"] = [annotation(1, 1, CAR, [box(0, 0, 9, 9), box(5, 5, 9, 9)], 200)]
    found = labels_by_id(write(tmp_path, written))["000000000001"]
    assert (found == 7).sum() == 81 + 81 - 16
    assert not (found == 255).any()


def test_train_keeps_images_with_more_than_1000_pixels_of_voc_s_classes(tmp_path: Path) -> None:
    data = open_dataset(write(tmp_path, content(), "train"), "train")
    assert [item.id for item in data.items] == ["000000000002", "000000000003"]  # 1200.5 and 5000, not 1000
    assert [item.group for item in data.items] == ["000000000002", "000000000003"]
    assert data.classes.names[11] == "diningtable"
    assert "(found: train)" in refusal(tmp_path)
    written = content() | {"annotations": content()["annotations"][3:4]}
    assert "no images with more than 1000 pixels" in refusal(write(tmp_path, written, "train"), "train")


def test_categories_are_numbered_as_in_torchvision() -> None:
    order = [0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72]
    assert list(coco.CATEGORIES) == order


def test_an_item_says_how_its_labels_come_about(tmp_path: Path) -> None:
    first, again = (open_dataset(write(tmp_path, content()), "val").items for _ in range(2))
    assert first == again
    assert len({*first, *again}) == 4
    assert first[0].label_path is None


def test_labels_are_the_same_from_several_threads(tmp_path: Path) -> None:
    data = open_dataset(write(tmp_path, content()), "val")
    alone = [sample.labels for sample in samples(data)] * 8
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda item: read_sample(item, data.classes).labels, data.items * 8))
    np.testing.assert_array_equal(together, alone)


def test_a_missing_extra_is_named_before_an_hour_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    assert "pip install 'mess-compile[coco]'" in refusal(write(tmp_path, content()))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    root = write(tmp_path, content())
    assert "(found: val): expected" in refusal(root, "train")
    (root / "val2017" / "000000000004.jpg").unlink()
    assert "1 images that do not exist" in refusal(root)
    (root / "annotations" / "instances_val2017.json").unlink()
    assert f"expected {root / 'annotations' / 'instances_val2017.json'}" in refusal(root)
    write(root, content())
    (root / "val2017").rename(root / "images")
    assert "val2017.zip" in refusal(root)


def test_an_image_of_another_size_than_annotated_is_named(tmp_path: Path) -> None:
    root = write(tmp_path, content())
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(root / "val2017" / "000000000001.jpg")
    data = open_dataset(root, "val")
    with pytest.raises(InputError, match=r"000000000001\.jpg is 41 x 60, but by its annotations 40 x 60"):
        read_sample(data.items[0], data.classes)


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        (("images", 0, "file_name"), "../000000000002.jpg", "'../000000000002.jpg', which is not the bare name"),
        (("images", 0, "file_name"), "/etc/passwd", "'/etc/passwd', which is not the bare name"),
        (("images", 0, "file_name"), "..", "not the bare name"),
        (("images", 0, "file_name"), "000000000001.jpg", "same file_name"),
        (("images", 0, "file_name"), None, "file_name of 2 is None, not str"),
        (("images", 0, "id"), 1, "image 1 is listed twice"),
        (("images", 0, "height"), 0, "0 x 60"),
        (("images", 0, "height"), 10**9, "1000000000 x 60"),
        (("images", 0, "width"), 60.5, "width of 2 is 60.5, not int"),
        (("images", 0, "width"), True, "width of 2 is True, not int"),
        (("images",), {"id": 1}, "no list of objects named images"),
        (("annotations",), [1], "no list of objects named annotations"),
        (("annotations", 0, "image_id"), 7, "annotation 10 is for image 7"),
        (("annotations", 0, "image_id"), [], "image_id of 10 is []"),
        (("annotations", 0, "category_id"), "3", "category_id of 10 is '3'"),
        (("annotations", 0, "segmentation"), None, "annotation 10: its segmentation is None"),
        (("annotations", 0, "segmentation"), [], "annotation 10: its segmentation is []"),
        (("annotations", 0, "segmentation"), [0, 0, 9, 9, 0, 9], "polygon 0 is not x, y"),
        (("annotations", 0, "segmentation"), [[0, 0, 9, 9]], "[0, 0, 9, 9] is not x, y of three points"),
        (("annotations", 0, "segmentation"), [[0, 0, 9, 9, 0, 9, 3]], "is not x, y of three points"),
        (("annotations", 0, "segmentation"), [["0", 0, 9, 9, 0, 9]], "is not x, y of three points"),
        (("annotations", 0, "segmentation"), [[[0, 0], [9, 9], [0, 9]]], "is not x, y of three points"),
        (("annotations", 0, "segmentation"), [[0, [0], 9, 9, 0, 9]], "annotation 10: "),
        (("annotations", 0, "segmentation"), [[0, 10**400, 9, 9, 0, 9]], "is not x, y of three points"),
        (("annotations", 0, "segmentation"), [box(61, 0, 9, 9)], "(61, 0) to (70, 9) lies out of the image"),
        (("annotations", 0, "segmentation"), [box(0, 0, 9, 10**9)], "lies out of the image"),
        (("annotations", 0, "segmentation"), [[0, 0, 60, 40] * 20000], "pixels long"),
        (("annotations", 4, "segmentation", "size"), [60, 40], "annotation 14: run lengths of size [60, 40]"),
        (("annotations", 4, "segmentation", "counts"), [5], "do not fill the image"),
        (("annotations", 4, "segmentation", "counts"), [-5, 2405], "do not fill the image"),
        (("annotations", 4, "segmentation", "counts"), [2**63 - 1, 2**63 - 1, 2402], "do not fill the image"),
        (("annotations", 4, "segmentation", "counts"), "PPYo1", "do not fill the image"),
        (("annotations", 4, "segmentation", "counts"), "P", "run lengths 'P' end in the middle"),
        (("annotations", 4, "segmentation", "counts"), "", "end in the middle"),
        (("annotations", 4, "segmentation", "counts"), "P" * 99 + "1", "not in COCO's textual form"),
        (("annotations", 4, "segmentation", "counts"), "1 2", "not in COCO's textual form"),
        (("annotations", 4, "segmentation", "counts"), {"a": 1}, "are not a list of numbers"),
    ],
)
def test_a_hostile_annotation_is_named(tmp_path: Path, place: tuple[Any, ...], value: Any, complaint: str) -> None:
    written = content()
    spot = written
    for step in place[:-1]:
        spot = spot[step]
    spot[place[-1]] = value
    message = refusal(write(tmp_path, written))
    assert "instances_val2017.json is damaged" in message
    assert complaint in message
    assert len(message) < 500 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("category", "words"),
    [
        ({"id": PERSON, "name": "dog"}, "category 1 'dog', which is 'person' in COCO"),
        ({"id": TRUCK, "name": "pothole"}, "category 8 'pothole', which is 'truck' in COCO"),
        ({"id": 200, "name": "pothole"}, "category 200 'pothole', which COCO does not have"),
    ],
)
def test_a_data_set_with_categories_of_its_own_is_told_to_write_label_pngs(
    tmp_path: Path, category: dict[str, Any], words: str
) -> None:
    written = content()
    written["categories"] = [category]
    message = refusal(write(tmp_path, written))
    assert words in message
    assert "write label PNGs, with a classes.txt" in message
    assert "damaged" not in message


def textual(mask: np.ndarray) -> str:
    """The text that pycocotools, which most tools use, makes of a mask."""
    from pycocotools import mask as library

    return str(library.encode(np.asfortranarray(mask))["counts"].decode())


def test_run_lengths_as_text_are_the_mask_that_was_encoded(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    mask = (random.random((HEIGHT, WIDTH)) < 0.3).astype(np.uint8)
    mask[:, 20:] = 0
    written = content()
    written["annotations"] = [
        annotation(1, 2, CAR, {"size": [HEIGHT, WIDTH], "counts": textual(mask)}, 500),
        annotation(2, 3, PERSON, {"size": [HEIGHT, WIDTH], "counts": textual(np.ones_like(mask))}, 2400),
        annotation(3, 1, PERSON, {"size": [HEIGHT, WIDTH], "counts": textual(np.zeros_like(mask))}, 0),
    ]
    found = labels_by_id(write(tmp_path, written))
    np.testing.assert_array_equal(found["000000000002"], np.where(mask, 7, 0))
    assert (found["000000000003"] == 15).all()
    assert (found["000000000001"] == 0).all()


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[" * 100_000, '{"images": NaN}', "\ufffe", "null", "[]", "3", '{"a": 1e999}', "9" * 5000),
        json.dumps(content()).replace("900", "1e999").replace("[0, 0, 30", "[1e999, 0, 30"),
    ],
)
def test_a_file_that_is_no_annotation_file_is_named(tmp_path: Path, text: str) -> None:
    assert "instances_val2017.json" in refusal(write(tmp_path, text))


def test_an_area_that_is_no_number_is_named_where_it_decides(tmp_path: Path) -> None:
    for value in ("900", None, True, [900]):
        written = content()
        written["annotations"][0]["area"] = value
        assert "area of 10" in refusal(write(tmp_path, written, "train"), "train")
    written["annotations"][0]["area"] = 10**400
    written["annotations"][1]["area"] = 0.5
    assert "is damaged" in refusal(write(tmp_path, written, "train"), "train")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for step, inner in steps for place in places(inner, (*path, step)))][1 if not path else 0 :]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(places(content())), JSON)
def test_no_annotation_file_costs_the_user_a_crash(tmp_path: Path, place: tuple[Any, ...], value: Any) -> None:
    written = content()
    spot: Any = written
    for step in place[:-1]:
        spot = spot[step]
    spot[place[-1]] = value
    write(tmp_path, written)
    try:
        for sample in samples(open_dataset(tmp_path, "val")):
            assert set(np.unique(sample.labels)) <= {*range(21), 255}
    except InputError:
        pass


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 19), st.integers(-5, 14), *[st.integers(1, 15)] * 2), max_size=5))
def test_boxes_cover_their_pixels_and_what_reaches_over_the_border_is_cut_off(
    boxes: list[tuple[int, int, int, int]],
) -> None:
    height, width = 15, 20
    image = {"id": 1, "file_name": "a.jpg", "height": height, "width": width}
    kept = [rect for rect in boxes if rect[0] + rect[2] >= 0 and rect[1] + rect[3] >= 0]
    objects = [annotation(number, 1, CAR, [box(*rect)], 1) for number, rect in enumerate(kept)]
    written = {"images": [image], "categories": [], "annotations": objects}
    claims = np.zeros((height, width), int)
    for x, y, box_width, box_height in kept:
        claims[max(0, y) : max(0, y + box_height), max(0, x) : max(0, x + box_width)] += 1
    expected = np.where(claims > 1, 255, np.where(claims == 1, 7, 0))
    ((_, outlines),) = coco._decoded(written, only_trained=False)
    np.testing.assert_array_equal(coco.draw_labels(outlines), expected)
