"""A user's Cityscapes, PASCAL VOC or CamVid is read as it was unpacked; what is wrong with it is said by name."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mess_compile.data import layouts
from mess_compile.data.dataset import DataSet, open_dataset, read_sample
from mess_compile.data_folder import DataFolder
from mess_compile.runtime.base.errors import InputError

TRAIN_IDS = {  # labelId: trainId, from the table on the data set's web page
    7: 0,
    8: 1,
    11: 2,
    12: 3,
    13: 4,
    17: 5,
    19: 6,
    20: 7,
    21: 8,
    22: 9,
    23: 10,
    24: 11,
    25: 12,
    26: 13,
    27: 14,
    28: 15,
    31: 16,
    32: 17,
    33: 18,
}


def write_image(path: Path, hw: tuple[int, int] = (2, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (hw[1], hw[0]), (10, 20, 30)).save(path)


def write_labels(path: Path, values: Sequence[Sequence[int]], palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(values, np.uint8))
    if palette:
        image.putpalette([number % 251 for number in range(768)])
    image.save(path)


def cityscapes(root: Path) -> Path:
    for name in ("train/bremen/bremen_000002_000019", "train/aachen/aachen_000000_000019", "val/ulm/ulm_000001_000019"):
        write_image(root / "leftImg8bit" / f"{name}_leftImg8bit.png")
        write_labels(root / "gtFine" / f"{name}_gtFine_labelIds.png", [[0, 7, 33], [29, 26, 255]])
    return root


def voc(root: Path) -> Path:
    lists = {"train": "2007_000032\n2007_000039\n", "val": "2007_000033\n", "trainval": "2007_000032\n2007_000033\n"}
    for name in ("2007_000032", "2007_000033", "2007_000039"):
        write_image(root / "JPEGImages" / f"{name}.jpg")
        write_labels(root / "SegmentationClass" / f"{name}.png", [[0, 1, 20], [255, 15, 0]], palette=True)
    for split, names in lists.items():
        (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(names)
    return root


def segnet(root: Path) -> Path:
    splits = {"train": ("0006R0_f00930", "0001TP_006690"), "val": ("0016E5_07959",), "test": ("Seq05VD_f00000",)}
    for split, names in splits.items():
        for name in names:
            write_image(root / split / f"{name}.png")
            write_labels(root / f"{split}annot" / f"{name}.png", [[0, 8, 11], [10, 3, 3]])
    return root


def plain(root: Path) -> Path:
    for split in ("train", "val"):
        write_image(root / split / "images" / "drive_001.png")
        write_labels(root / split / "labels" / "drive_001.png", [[0, 1, 7], [0, 1, 0]])
    (root / "classes.txt").write_text("road\ncar\nignore 7\n")
    return root


def first_labels(data: DataSet) -> list[list[int]]:
    labels: list[list[int]] = read_sample(data.items[0], data.classes).labels.tolist()
    return labels


def refusal(root: Path, split: str = "train") -> str:
    with pytest.raises(InputError) as caught:
        open_dataset(root, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestCityscapes:
    def test_label_ids_become_the_classes_that_results_are_published_for(self, tmp_path: Path) -> None:
        data = open_dataset(cityscapes(tmp_path), "train")
        assert first_labels(data) == [[255, 0, 18], [255, 13, 255]]
        assert len(data.classes.names) == 19
        assert data.classes.names[6:9] == ("traffic light", "traffic sign", "vegetation")
        assert data.classes.colours[0] == (128, 64, 128)
        assert data.classes.colours[18] == (119, 11, 32)

    def test_every_label_id_has_its_class_or_is_ignored(self, tmp_path: Path) -> None:
        root = cityscapes(tmp_path)
        write_image(root / "leftImg8bit/val/ulm/ulm_000001_000019_leftImg8bit.png", (1, 35))
        values = [*range(34), 255]
        write_labels(root / "gtFine/val/ulm/ulm_000001_000019_gtFine_labelIds.png", [values])
        assert first_labels(open_dataset(root, "val")) == [[TRAIN_IDS.get(value, 255) for value in values]]

    def test_train_ids_are_read_where_there_are_no_label_ids(self, tmp_path: Path) -> None:
        root = cityscapes(tmp_path)
        folder = root / "gtFine/val/ulm"
        write_labels(folder / "ulm_000001_000019_gtFine_labelTrainIds.png", [[18, 0, 1], [255, 2, 3]])
        assert first_labels(open_dataset(root, "val")) == [[255, 0, 18], [255, 13, 255]]
        (folder / "ulm_000001_000019_gtFine_labelIds.png").unlink()
        assert first_labels(open_dataset(root, "val")) == [[18, 0, 1], [255, 2, 3]]

    def test_frames_of_one_recorded_sequence_are_one_group(self, tmp_path: Path) -> None:
        items = open_dataset(cityscapes(tmp_path), "train").items
        assert [item.id for item in items] == ["aachen_000000_000019", "bremen_000002_000019"]
        assert [item.group for item in items] == ["aachen_000000", "bremen_000002"]

    @pytest.mark.parametrize(("kind", "value"), [("labelIds", 34), ("labelTrainIds", 19)])
    def test_a_value_that_is_no_label_is_named(self, tmp_path: Path, kind: str, value: int) -> None:
        root = cityscapes(tmp_path)
        shutil.rmtree(root / "gtFine/val/ulm")
        write_labels(root / f"gtFine/val/ulm/ulm_000001_000019_gtFine_{kind}.png", [[0, 1, 2], [3, value, 0]])
        data = open_dataset(root, "val")
        with pytest.raises(InputError, match=rf"{kind}\.png has the value {value}, but .* 0 to {value - 1} and 255"):
            read_sample(data.items[0], data.classes)

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        root = cityscapes(tmp_path)
        assert "(found: train, val)" in refusal(root, "test")
        label = root / "gtFine/train/bremen/bremen_000002_000019_gtFine_labelIds.png"
        label.unlink()
        message = refusal(root)
        assert "1 of 2 images have no label" in message
        assert str(label) in message
        shutil.rmtree(root / "gtFine")
        assert "gtFine_trainvaltest.zip" in refusal(root)
        (root / "leftImg8bit").rename(root / "gtFine")
        assert str(root / "leftImg8bit" / "train") in refusal(root)

    def test_an_empty_split_is_refused(self, tmp_path: Path) -> None:
        root = cityscapes(tmp_path)
        shutil.rmtree(root / "leftImg8bit/val/ulm")
        assert "has no images: expected leftImg8bit/SPLIT/CITY/" in refusal(root, "val")


class TestVoc:
    @pytest.mark.parametrize("place", [".", "VOC2012", "VOCdevkit/VOC2012"])
    def test_the_palette_image_holds_the_classes(self, tmp_path: Path, place: str) -> None:
        voc(tmp_path / place)
        data = open_dataset(tmp_path, "train")
        assert first_labels(data) == [[0, 1, 20], [255, 15, 0]]
        assert len(data.classes.names) == 21
        assert [data.classes.names[value] for value in (0, 1, 15, 20)] == [
            *("background", "aeroplane", "person", "tvmonitor")
        ]
        assert [data.classes.colours[value] for value in (0, 1, 15, 20)] == [
            *((0, 0, 0), (128, 0, 0), (192, 128, 128), (0, 64, 128))
        ]

    def test_splits_are_the_lists_and_pictures_are_no_video(self, tmp_path: Path) -> None:
        voc(tmp_path)
        lists = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"], "train[1:]": ["2007_000039"]}
        for split, names in lists.items():
            items = open_dataset(tmp_path, split).items
            assert [item.id for item in items] == names
            assert [item.group for item in items] == names
        assert "(found: train, trainval, val)" in refusal(tmp_path, "test")

    def test_a_value_beyond_the_classes_is_named(self, tmp_path: Path) -> None:
        write_labels(voc(tmp_path) / "SegmentationClass" / "2007_000033.png", [[21, 0, 0], [0, 0, 0]])
        data = open_dataset(tmp_path, "val")
        with pytest.raises(InputError, match=r"2007_000033\.png has the value 21, but .* 0 to 20 and 255"):
            read_sample(data.items[0], data.classes)

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        root = voc(tmp_path / "VOC2012")
        (root / "SegmentationClass" / "2007_000039.png").unlink()
        assert "1 of 2 images have no label" in refusal(tmp_path)
        shutil.rmtree(root / "ImageSets")
        assert str(Path("ImageSets") / "Segmentation" / "train.txt") in refusal(tmp_path)
        shutil.rmtree(root / "SegmentationClass")
        assert "SegmentationClass does not exist" in refusal(tmp_path)
        shutil.rmtree(root / "JPEGImages")
        assert "VOCtrainval_11-May-2012.tar" in refusal(tmp_path)

    @pytest.mark.parametrize(
        "name", ["2007_999999", "../2007_000032", "/etc/passwd", "2007_000032 1", "\0", "x" * 5000]
    )
    def test_a_list_cannot_name_what_is_not_in_its_folder(self, tmp_path: Path, name: str) -> None:
        (voc(tmp_path) / "ImageSets" / "Segmentation" / "val.txt").write_text(f"2007_000033\n{name}\n")
        message = refusal(tmp_path, "val")
        assert "val.txt names 1 images that do not exist" in message
        assert repr(name)[:-1][:60] in message
        assert len(message) < 500 + 2 * len(str(tmp_path))

    @pytest.mark.parametrize(("text", "expected"), [("", "has no images"), ("2007_000033\n" * 3, "2 images more than")])
    def test_a_list_that_is_empty_or_repeats_itself_is_refused(self, tmp_path: Path, text: str, expected: str) -> None:
        (voc(tmp_path) / "ImageSets" / "Segmentation" / "val.txt").write_text(text)
        assert expected in refusal(tmp_path, "val")


class TestSegnet:
    def test_camvid_of_the_tutorial_is_camvid(self, tmp_path: Path) -> None:
        data = open_dataset(segnet(tmp_path), "train")
        assert data.classes == layouts.CAMVID
        assert [(item.id, item.group) for item in data.items] == [
            ("0001TP_006690", "0001TP"),
            ("0006R0_f00930", "0006R0"),
        ]
        assert first_labels(data) == [[0, 8, 255], [10, 3, 3]]
        assert [item.id for item in open_dataset(tmp_path, "test").items] == ["Seq05VD_f00000"]

    def test_other_frames_laid_out_so_have_their_own_class_list(self, tmp_path: Path) -> None:
        shutil.rmtree(segnet(tmp_path) / "val")
        write_image(tmp_path / "val" / "night_01.png")
        write_labels(tmp_path / "valannot" / "night_01.png", [[0, 1, 1], [1, 1, 1]])
        assert "classes.txt does not exist" in refusal(tmp_path, "val")
        (tmp_path / "classes.txt").write_text("dark\nlight\n")
        assert open_dataset(tmp_path, "val").classes.names == ("dark", "light")

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        root = segnet(tmp_path)
        (root / "trainannot" / "0001TP_006690.png").unlink()
        assert "1 of 2 images have no label" in refusal(root)
        shutil.rmtree(root / "trainannot")
        assert "trainannot does not exist" in refusal(root)
        shutil.rmtree(root / "val")
        assert f"(found: test, val): expected {root / 'val'}" in refusal(root, "val")


LAYOUTS: dict[str, Callable[[Path], Path]] = {"Cityscapes": cityscapes, "PASCAL VOC": voc, "plain folders": plain}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised_beside_other_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "README").write_text("read me")
    assert layouts.find_layout(LAYOUTS[name](tmp_path)).name == name


def test_where_nothing_is_recognised_the_message_fits_three_lines_and_says_what_is_expected(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert len(message.replace(str(tmp_path), "data")) < 240
    for text in ("images/", "labels/", "classes.txt", "CamVid, Cityscapes, PASCAL VOC and COCO"):
        assert text in message


def test_a_class_list_that_is_not_the_data_set_s_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not sky, building"):
        open_dataset(voc(tmp_path), "val", layouts.CAMVID)


@given(st.lists(st.integers(0, 254), min_size=1, max_size=60, unique=True), st.sets(st.integers(0, 254)))
def test_what_is_written_with_a_data_set_s_values_is_read_as_its_classes(stored: list[int], used: set[int]) -> None:
    classes = layouts._class_values(stored, used)
    assert [classes[value] for value in stored] == list(range(len(stored)))
    assert all(classes[value] == 255 for value in [*used - {*stored}, 255])
    assert all(classes[value] == -1 for value in {*range(255)} - used - {*stored})


class TestPlainFolders:
    """What lies beside images and labels is counted and named; nothing is left out in silence."""

    def test_what_is_not_read_is_counted_and_named(self, tmp_path: Path) -> None:
        root = plain(tmp_path)
        images, labels = root / "train" / "images", root / "train" / "labels"
        for name in ("a.tif", "b.tif", "notes.txt", "._drive_001.png", "Thumbs.db", ".DS_Store"):
            (images / name).write_bytes(b"\0")
        (images / "more").mkdir()
        (labels / "old.jpg").write_bytes(b"\0")
        write_labels(labels / "alone.png", [[0, 1, 0], [0, 1, 0]])
        data = open_dataset(root, "train")
        assert [item.id for item in data.items] == ["drive_001"]
        assert data.notes == (
            f"3 files of {images} are not read (2 .tif, 1 .txt): .jpg, .jpeg, .png, .bmp and .webp are",
            f"1 hidden file of {images} is skipped (first ._drive_001.png)",
            f"1 folder of {images} is not searched (first more)",
            f"1 file of {labels} is not read (1 .jpg): .png are",
            f"1 label of {labels} is without an image (first alone.png)",
        )
        assert open_dataset(root, "val").notes == ()

    def test_images_of_which_none_is_read_are_said_to_be(self, tmp_path: Path) -> None:
        root = plain(tmp_path)
        image = root / "train" / "images" / "drive_001.png"
        image.rename(image.with_suffix(".tif"))
        assert "has no image that is read: 1 file of" in refusal(root)

    def test_suffixes_in_capitals_are_read(self, tmp_path: Path) -> None:
        root = plain(tmp_path)
        for kind in ("images", "labels"):
            path = root / "train" / kind / "drive_001.png"
            path.rename(path.with_suffix(".PNG"))
        assert first_labels(open_dataset(root, "train")) == [[0, 1, 255], [0, 1, 0]]

    @pytest.mark.parametrize("kind", ["images", "labels"])
    def test_equal_names_are_refused_before_anything_is_read(self, tmp_path: Path, kind: str) -> None:
        root = plain(tmp_path)
        other = ".jpg" if kind == "images" else ".PNG"
        (root / "train" / kind / f"drive_001{other}").write_bytes(b"never looked at")
        message = refusal(root)
        assert "drive_001.png" in message
        assert f"drive_001{other}" in message
        assert "keep one of them" in message

    @pytest.mark.parametrize("form", ["{split}/{kind}", "{kind}/{split}"])
    @pytest.mark.parametrize("names", [("images", "labels"), ("frames", "masks"), ("rgb/left", "gt")])
    def test_folders_are_found_by_the_names_that_are_given(
        self, tmp_path: Path, form: str, names: tuple[str, str]
    ) -> None:
        for split in ("train", "val"):
            write_image(tmp_path / form.format(split=split, kind=names[0]) / "drive_001.png")
            write_labels(tmp_path / form.format(split=split, kind=names[1]) / "drive_001.png", [[0, 1, 7], [0, 1, 0]])
        (tmp_path / "classes.txt").write_text("road\ncar\nignore 7\n")
        folder = DataFolder(tmp_path, *names)
        assert first_labels(open_dataset(folder, "val")) == [[0, 1, 255], [0, 1, 0]]
        with pytest.raises(InputError, match=r"no split 'test'.*found: train, val"):
            open_dataset(folder, "test")

    def test_one_name_alone_leaves_the_other_as_it_is(self, tmp_path: Path) -> None:
        root = plain(tmp_path)
        for split in ("train", "val"):
            (root / split / "labels").rename(root / split / "masks")
        assert first_labels(open_dataset(DataFolder(root, labels="masks"), "train")) == [[0, 1, 255], [0, 1, 0]]

    @pytest.mark.parametrize(
        ("images", "labels", "words"),
        [
            ("../frames", None, "--images '../frames' is not the name of a folder"),
            (None, "/etc", "--labels '/etc' is not the name of a folder"),
            ("", None, "--images '' is not"),
            ("a", "a", "both name 'a'"),
        ],
    )
    def test_names_that_lead_elsewhere_are_refused(self, images: str | None, labels: str | None, words: str) -> None:
        with pytest.raises(InputError, match=re.escape(words)):
            DataFolder(Path(), images, labels)

    def test_an_offset_is_for_label_values_that_the_user_chose(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="drop --label-offset"):
            open_dataset(DataFolder(voc(tmp_path), label_offset=1), "val")


class TestNearest:
    """Where a folder is no data set, the message says what lies there and what would make it one, in three lines."""

    @pytest.mark.parametrize("form", ["{kind}", "{split}/{kind}", "{kind}/{split}"])
    def test_folders_that_are_called_otherwise_give_the_options(self, tmp_path: Path, form: str) -> None:
        for split in ("train", "val"):
            write_image(tmp_path / form.format(split=split, kind="frames") / "a.png")
            write_labels(tmp_path / form.format(split=split, kind="masks") / "a.png", [[0]])
        message = refusal(tmp_path)
        assert message.endswith("add --images frames --labels masks")
        assert len(message.replace(str(tmp_path), "data")) < 260

    def test_a_heap_of_pictures_is_told_where_they_belong(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.tif")
        message = refusal(tmp_path)
        assert "(1 .tif)" in message
        assert "put images into images/" in message

    def test_a_label_under_another_name_is_pointed_at(self, tmp_path: Path) -> None:
        root = plain(tmp_path)
        label = root / "train" / "labels" / "drive_001.png"
        label.rename(label.with_name("drive_001_mask.png"))
        assert "drive_001_mask.png is there: rename it to drive_001.png" in refusal(root)


def test_a_list_with_a_byte_order_mark_names_the_same_images(tmp_path: Path) -> None:
    (voc(tmp_path) / "ImageSets" / "Segmentation" / "val.txt").write_bytes(b"\xef\xbb\xbf2007_000033\r\n")
    assert [item.id for item in open_dataset(tmp_path, "val").items] == ["2007_000033"]
