"""A user's own folder: what is wrong with it is said by name, before an hour of training."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mess_compile.data import scenes
from mess_compile.data.dataset import (
    CAMVID,
    ClassList,
    check_trainable,
    default_colour,
    open_dataset,
    read_class_list,
    read_frame,
    read_labels,
    read_sample,
    samples,
    survey_labels,
)
from mess_compile.runtime.base.errors import InputError

CAMVID_FOLDER = Path(os.environ.get("MESS_CAMVID", Path(__file__).parents[3] / "shared" / "data" / "camvid"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for index in range(10):
        Image.fromarray(np.full((6, 8, 3), index, np.uint8)).save(root / "images" / f"drive_{index:03d}.png")
        Image.fromarray(np.full((6, 8), index % 2, np.uint8)).save(root / "labels" / f"drive_{index:03d}.png")
    (root / "classes.txt").write_text("road 128 64 128\ncar # anything with wheels\nignore 7\n")
    return root


def ids(root: Path, split: str) -> list[str]:
    return [item.id for item in open_dataset(root, split).items]


def test_without_splits_the_last_fifth_is_val_so_that_neighbouring_frames_stay_together(folder: Path) -> None:
    assert ids(folder, "train") == [f"drive_{index:03d}" for index in range(8)]
    assert ids(folder, "val") == ["drive_008", "drive_009"]


def test_a_slice_of_a_split_counts_files_in_order(folder: Path) -> None:
    assert ids(folder, "train[2:4]") == ["drive_002", "drive_003"]
    assert ids(folder, "train[:1]") == ["drive_000"]
    assert len(ids(folder, "train[6:]")) == 2


BORDER = st.none() | st.integers(0, 12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BORDER, BORDER)
def test_two_slices_that_meet_share_no_image_and_lose_none(folder: Path, start: int | None, stop: int | None) -> None:
    names = [f"drive_{index:03d}" for index in range(8)]
    wanted = names[start:stop]
    split = f"train[{'' if start is None else start}:{'' if stop is None else stop}]"
    if wanted:
        assert ids(folder, split) == wanted
    else:
        with pytest.raises(InputError, match="selects none of 8"):
            ids(folder, split)


def test_groups_are_sequences(folder: Path) -> None:
    assert {item.group for item in open_dataset(folder, "train").items} == {"drive"}


def test_class_lists_hold_colours_comments_and_void(folder: Path) -> None:
    classes = read_class_list(folder / "classes.txt")
    assert classes.names == ("road", "car")
    assert classes.colours[0] == (128, 64, 128)
    assert classes.ignored == {7, 255}


@pytest.mark.parametrize("line", ["road 1 2", "road 300 0 0", "ignore", "ignore x", "one,two", "r 1 2 " + "3" * 5000])
def test_a_wrong_line_of_the_class_list_is_named(folder: Path, line: str) -> None:
    (folder / "classes.txt").write_text(f"sky\n{line}\n")
    with pytest.raises(InputError, match=r"classes\.txt, line 2"):
        read_class_list(folder / "classes.txt")


def test_a_missing_class_list_says_how_to_write_one(folder: Path) -> None:
    (folder / "classes.txt").unlink()
    with pytest.raises(InputError, match="one class per line"):
        open_dataset(folder, "train")


def test_void_becomes_255_and_a_value_out_of_range_is_named(folder: Path) -> None:
    data = open_dataset(folder, "train")
    labels = np.full((6, 8), 7, np.uint8)
    Image.fromarray(labels).save(data.items[0].label)
    assert (read_sample(data.items[0], data.classes).labels == 255).all()
    labels[2, 3] = 5
    Image.fromarray(labels).save(data.items[0].label)
    with pytest.raises(InputError, match=r"value 5.*2 classes"):
        read_sample(data.items[0], data.classes)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 255), st.sets(st.integers(0, 255)), st.lists(st.integers(0, 255), min_size=1, max_size=30))
def test_every_label_value_is_its_class_or_void_or_named(
    tmp_path: Path, classes: int, ignored: set[int], values: list[int]
) -> None:
    Image.fromarray(np.array([values], np.uint8)).save(tmp_path / "label.png")
    listed = ClassList(tuple(map(str, range(classes))), ((0, 0, 0),) * classes, frozenset(ignored))
    void = ignored | {255}
    wrong = sorted(value for value in values if value >= classes and value not in void)
    if wrong:
        remedy = "--label-offset 1" if 0 in ignored and wrong[0] == classes else f"`ignore {wrong[0]}`"
        with pytest.raises(InputError, match=rf"label\.png has the value {wrong[0]}, .* {remedy}"):
            read_labels(tmp_path / "label.png", listed)
    else:
        found = read_labels(tmp_path / "label.png", listed)
        assert found.dtype == np.uint8
        assert found.tolist() == [[255 if value in void else value for value in values]]


def test_labelled_pixels_are_counted_over_the_whole_split(folder: Path) -> None:
    labels = np.full((6, 8), 7, np.uint8)
    labels[0, :3] = 1
    Image.fromarray(labels).save(folder / "labels" / "drive_000.png")
    counts = check_trainable(open_dataset(folder, "train"))
    assert counts.tolist() == [3 * 48, 3 + 4 * 48]  # drives 0, 2, 4 and 6 were all road
    assert counts.dtype == np.int64


def test_a_split_in_which_one_class_is_labelled_is_refused_before_training(folder: Path) -> None:
    for path in (folder / "labels").iterdir():
        Image.fromarray(np.array([[1] * 4, [7] * 4], np.uint8)).save(path)
    with pytest.raises(InputError, match=r"'train' of .* labelled pixels of car alone in its 8 images"):
        check_trainable(open_dataset(folder, "train"))
    for path in (folder / "labels").iterdir():
        Image.fromarray(np.full((6, 8), 255, np.uint8)).save(path)
    with pytest.raises(InputError, match="of no class"):
        check_trainable(open_dataset(folder, "train"))


def test_sizes_that_differ_are_named(folder: Path) -> None:
    data = open_dataset(folder, "train")
    Image.fromarray(np.zeros((6, 9), np.uint8)).save(data.items[0].label)
    with pytest.raises(InputError, match=r"6 x 8.*6 x 9"):
        read_sample(data.items[0], data.classes)


@pytest.mark.parametrize("mode", ["I;16", "CMYK", "F"])
def test_images_that_are_not_8_bit_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "frame.tiff"
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(InputError, match="mode"):
        read_frame(path)


def test_colour_labels_without_colours_in_the_class_list_are_refused(folder: Path) -> None:
    data = open_dataset(folder, "train")
    Image.new("RGB", (8, 6), (128, 64, 128)).save(data.items[0].label)
    with pytest.raises(InputError, match=r"RGB mask \(colour \(128, 64, 128\) at row 0, column 0\): give the colours"):
        read_sample(data.items[0], data.classes)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n truncated"])
def test_a_damaged_image_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "frame.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"frame\.png"):
        read_frame(path)


def test_a_missing_label_a_missing_folder_and_a_missing_split_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "labels" / "drive_003.png").unlink()
    with pytest.raises(InputError, match="drive_003"):
        open_dataset(folder, "train")
    with pytest.raises(InputError, match="nowhere"):
        open_dataset(tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match="no split 'test'"):
        open_dataset(folder, "test")
    for split in ("val[", "../val", "val[:" + "9" * 5000 + "]"):
        with pytest.raises(InputError, match="does not have the form"):
            open_dataset(folder, split)


def test_scenes_are_repeatable_and_their_folder_is_a_data_set(tmp_path: Path) -> None:
    first, again = (scenes.make_scene(3, (48, 64)) for _ in range(2))
    assert (first.frame == again.frame).all()
    assert (first.labels == again.labels).all()
    scenes.write_scenes(tmp_path / "scenes", {"train": 2, "val": 1}, (48, 64))
    found = list(samples(open_dataset(tmp_path / "scenes", "train")))
    assert [s.id for s in found] == ["scene_000000", "scene_000001"]
    assert (found[0].frame == scenes.make_scene(0, (48, 64)).frame).all()
    assert open_dataset(tmp_path / "scenes", "val").classes == scenes.SCENE_CLASSES


def test_hard_scenes_are_noisier_than_easy_ones() -> None:
    def roughness(difficulty: float) -> float:
        frames = [scenes.make_scene(seed, (96, 128), difficulty).frame.astype(float) for seed in range(8)]
        return float(np.mean([np.abs(np.diff(frame, axis=1)).mean() for frame in frames]))

    assert roughness(1.0) > 2 * roughness(0.0)


@pytest.mark.skipif(not CAMVID_FOLDER.is_dir(), reason="CamVid is not here; MESS_CAMVID names another place")
def test_camvid_is_recognised_as_it_lies() -> None:
    data = open_dataset(CAMVID_FOLDER, "val[:50]")
    assert data.classes == CAMVID
    assert len(data.items) == 50
    assert len(open_dataset(CAMVID_FOLDER, "val[60:]").items) == 41
    sample = read_sample(data.items[0], data.classes)
    assert sample.frame.shape == (360, 480, 3)
    assert set(np.unique(sample.labels)) <= {*range(11), 255}


def test_default_colours_are_distinct() -> None:
    assert len({default_colour(index) for index in range(255)}) == 255
    assert default_colour(0) == (128, 0, 0)  # PASCAL VOC's aeroplane
    assert ClassList(("a", "b"), ((0, 0, 0),) * 2).ignored == {255}


class TestAnotherFolder:
    """Off by one folder is how most first commands fail: the message names the one that was meant."""

    @pytest.fixture
    @staticmethod
    def shelf(tmp_path: Path, folder: Path) -> Path:
        """A folder of data sets: one plain with splits, one flat (`folder`), CamVid's, Cityscapes'."""
        shelf = tmp_path / "disk" / "shelf"
        for split in ("train", "val"):
            for kind in ("images", "labels"):
                shutil.copytree(folder / kind, shelf / "street" / split / kind)
                (shelf / "camvid" / split / kind).mkdir(parents=True)
            (shelf / "camvid" / split / "images" / "0001TP_006690.png").touch()
        shutil.copy(folder / "classes.txt", shelf / "street")
        shutil.copytree(folder, shelf / "flat")
        (shelf / "towns" / "leftImg8bit" / "val" / "ulm").mkdir(parents=True)
        return shelf

    @pytest.mark.parametrize(
        ("named", "meant"),
        [
            ("street/val/images", "street"),
            ("street/val", "street"),
            ("street/train/labels", "street"),
            ("flat/images", "flat"),
            ("camvid/train/images", "camvid"),
            ("towns/leftImg8bit", "towns"),
            ("towns/leftImg8bit/val/ulm", "towns"),
        ],
    )
    def test_a_folder_inside_names_the_one_around_it(self, shelf: Path, named: str, meant: str) -> None:
        with pytest.raises(InputError) as refused:
            open_dataset(shelf / named, "val")
        assert str(refused.value).endswith(f": did you mean --data {shelf / meant}?")
        assert "these are known" not in str(refused.value), "what helps is not lost in what does not"

    def test_a_folder_of_data_sets_names_them(self, shelf: Path) -> None:
        named = " or ".join(str(shelf / name) for name in ("camvid", "flat", "street", "towns"))
        for root in (shelf, shelf.parent):
            with pytest.raises(InputError, match=re.escape(f"name one of the data sets in it, --data {named}")):
                open_dataset(root, "val")

    def test_where_the_user_stands_the_way_is_as_he_would_type_it(
        self, shelf: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(shelf / "street" / "val" / "images")
        with pytest.raises(InputError, match=re.escape("did you mean --data ../..?")):
            open_dataset(Path(), "val")

    def test_a_data_set_without_the_split_is_no_other_data_set(self, shelf: Path) -> None:
        for name in ("street", "camvid"):
            with pytest.raises(InputError, match=r"no split 'test'.* expected") as refused:
                open_dataset(shelf / name, "test")
            assert "--data" not in str(refused.value)


def test_one_image_alone_is_too_few_and_that_is_what_is_said(folder: Path) -> None:
    for path in sorted((folder / "images").iterdir())[1:]:
        path.unlink()
    with pytest.raises(InputError, match=r"has 1 image, .*train on at least 2 and validate on 1"):
        open_dataset(folder, "train")


def test_void_and_classes_that_never_occur_are_told(folder: Path) -> None:
    for path in (folder / "labels").iterdir():
        Image.fromarray(np.array([[0, 255, 255, 255]] * 6, np.uint8)).save(path)
    survey = survey_labels(open_dataset(folder, "val"))
    assert (survey.pixels.tolist(), survey.void) == ([2 * 6, 0], 2 * 18)
    assert survey.notes() == ("75.0% of the pixels of val are void and are not counted",)
    assert survey.warnings() == (
        "car never occurs in the labels of val, and is left out of its mIoU",
        (
            "these labels carry little information: 255 is void; in masks of 0 and 255, car has to be stored as 1 "
            "instead of 255"
        ),
    )


def test_labels_of_which_all_is_well_are_not_talked_about(folder: Path) -> None:
    survey = survey_labels(open_dataset(folder, "train"))
    assert (survey.notes(), survey.warnings()) == ((), ())


def test_the_digest_of_labels_is_that_of_their_meaning(folder: Path) -> None:
    before = survey_labels(open_dataset(folder, "train")).sha256
    label = folder / "labels" / "drive_000.png"
    Image.open(label).save(label, compress_level=0)
    assert survey_labels(open_dataset(folder, "train")).sha256 == before
    Image.fromarray(np.full((6, 8), 1, np.uint8)).save(label)
    assert survey_labels(open_dataset(folder, "train")).sha256 != before


def test_masks_of_0_and_255_are_explained_before_training(folder: Path) -> None:
    for path in (folder / "labels").iterdir():
        Image.fromarray(np.array([[0] * 4 + [255] * 4] * 6, np.uint8)).save(path)
    with pytest.raises(InputError, match=r"of road alone .*50% of the pixels are void.*car has to be stored as 1"):
        check_trainable(open_dataset(folder, "train"))


@pytest.mark.parametrize(
    ("values", "listed", "told", "untold"),
    [
        ((0, 1, 2), "", ["the labels have 0, 1, 2", "--label-offset 1 if labels begin at 1"], "here, so"),
        ((1, 2), "", ["no label holds 0: labels begin at 1 here, so add --label-offset 1"], "ignore 2"),
        ((0, 1, 2), "ignore 0\n", ["0 is void: labels begin at 1 here, so add --label-offset 1"], "ignore 2"),
        ((0, 2, 9), "", ["the labels have 0, 2, 9", "list every class in classes.txt"], "--label-offset"),
    ],
)
def test_all_labels_together_say_where_they_begin(
    folder: Path, values: tuple[int, ...], listed: str, told: list[str], untold: str
) -> None:
    (folder / "classes.txt").write_text(f"road\ncar\n{listed}")
    for number, path in enumerate(sorted((folder / "labels").iterdir())):
        Image.fromarray(np.full((6, 8), values[number % len(values)], np.uint8)).save(path)
    with pytest.raises(InputError) as refused:
        survey_labels(open_dataset(folder, "train"))
    assert all(text in str(refused.value) for text in told), refused.value
    assert untold not in str(refused.value)


def test_a_photograph_that_is_turned_by_exif_data_meets_its_label_as_shown(folder: Path) -> None:
    shown = np.zeros((6, 8, 3), np.uint8)
    shown[:, :3] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "images" / "drive_000.png").unlink()
    stored = Image.fromarray(shown).transpose(Image.Transpose.ROTATE_90)
    stored.save(folder / "images" / "drive_000.jpg", quality=95, exif=exif)
    data = open_dataset(folder, "train")
    np.testing.assert_array_equal(read_sample(data.items[0], data.classes).frame[..., 0] > 127, shown[..., 0] > 127)


def test_a_label_of_the_photograph_as_it_is_stored_is_said_to_be_turned(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "images" / "drive_000.png").unlink()
    Image.new("RGB", (8, 6)).save(folder / "images" / "drive_000.jpg", exif=exif)
    data = open_dataset(folder, "train")
    with pytest.raises(InputError, match=r"is 8 x 6, as EXIF data turn it, but its label .* is 6 x 8"):
        read_sample(data.items[0], data.classes)
