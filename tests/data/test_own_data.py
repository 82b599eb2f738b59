"""A user's own folders through the commands: how data are read is said once, remembered, and never guessed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mess_compile.data_folder import DataFolder
from mess_compile.runtime.base.errors import InputError
from mess_compile.workspace import Workspace
from tests.commands import TRAIN, complaint, contents, done, refused, run


def relabelled(workspace: Path, name: str, images: str = "images", labels: str = "labels", offset: int = 0) -> Path:
    """The workspace's data again, its folders called otherwise and its labels beginning elsewhere."""
    root = workspace.parent / name
    for split in ("train", "val"):
        shutil.copytree(workspace / "data" / split / "images", root / split / images)
        (root / split / labels).mkdir()
        for path in (workspace / "data" / split / "labels").iterdir():
            values = np.array(Image.open(path)).astype(int) + offset
            Image.fromarray(values.astype(np.uint8)).save(root / split / labels / path.name)
    shutil.copy(workspace / "data" / "classes.txt", root)
    return root


def test_how_data_are_read_is_remembered_with_the_folder(workspace: Path) -> None:
    place = Workspace(workspace).statistics("val")
    expected = contents(place)
    other = relabelled(workspace, "other", "frames", "masks", 1)
    options = ("--images", "frames", "--labels", "masks", "--label-offset", "1")
    done("-C", workspace, "evaluate", "--data", other, *options, "--split", "val")
    assert contents(place) == expected
    shutil.rmtree(place)
    done("-C", workspace, "evaluate")
    assert contents(place) == expected, "the same folder, remembered"
    shutil.rmtree(place)
    done("-C", workspace, "search", "--max-err", "100%")
    assert contents(place) == expected, "search reads the labels as evaluate did"
    assert Workspace(workspace).data_folder(other) == DataFolder(other, "frames", "masks", 1)
    shown = done("-C", workspace, "bench", workspace / "host.mess", "--passes", "1")
    assert "12 images of val" in shown
    message = refused(workspace, "evaluate", "--data", workspace / "data")
    assert "begin at 1: give --label-offset 1 or --label-offset 0 for those of" in message
    assert "--label-offset 0" in message
    done("-C", workspace, "evaluate", "--data", workspace / "data", "--label-offset", "0")
    assert contents(place) == expected


def test_an_offset_that_was_forgotten_is_explained(workspace: Path) -> None:
    other = relabelled(workspace, "other", offset=1)
    for command in (("evaluate",), ("bench", workspace / "host.mess", "--passes", "1"), TRAIN):
        message = refused(workspace, *command, "--data", other)
        assert "the 8 classes are 0 to 7" in message
        assert "labels begin at 1 here, so add --label-offset 1, with which sky is 1" in message


def test_what_is_left_out_of_the_data_is_told(workspace: Path) -> None:
    other = relabelled(workspace, "other")
    first = min((other / "val" / "images").iterdir())
    shutil.copy(first, first.with_suffix(".tif"))
    for path in (other / "val" / "labels").iterdir():
        values = np.array(Image.open(path))
        values[values == 7] = 255
        Image.fromarray(values).save(path)
    for command in (("bench", workspace / "host.mess", "--passes", "1"), ("evaluate",)):
        result = run("-C", workspace, *command, "--data", other)
        assert result.exit_code == 0, result.stderr
        assert "of the pixels of val are void" in result.stdout
        warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
        for words in ("not read (1 .tif)", "sign never occurs in the labels of val"):
            assert sum(words in line for line in warnings) == 1, result.stderr
            assert words not in result.stdout
        as_json = run("-C", workspace, *command, "--data", other, "--json")
        assert as_json.stdout.startswith("{")
        assert "sign never occurs" in as_json.stderr


def test_hidden_files_of_a_folder_are_no_pictures(workspace: Path) -> None:
    frames = workspace.parent / "frames"
    shutil.copytree(workspace / "data" / "test" / "images", frames)
    (frames / "._scene.png").write_bytes(b"Mac OS X")
    result = run("-C", workspace, "run", workspace / "host.mess", frames, "-o", workspace.parent / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("warning: 1 hidden file of") == 1
    assert len(list((workspace.parent / "out").glob("*.labels.png"))) == 6


def test_run_labels_a_picture_as_it_is_shown(workspace: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(min((workspace / "data" / "test" / "images").iterdir()))
    upright, turned = workspace.parent / "upright.png", workspace.parent / "turned.png"
    image.save(upright)
    image.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    out = workspace.parent / "out"
    done("-C", workspace, "run", workspace / "host.mess", upright, turned, "-o", out)
    first, second = (np.array(Image.open(out / f"{name}.labels.png")) for name in ("upright", "turned"))
    np.testing.assert_array_equal(first, second)


def test_a_folder_that_is_no_data_set_is_refused_before_pytorch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "data" / "frames").mkdir(parents=True)
    code = (
        "import sys; from mess_compile.cli import main\n"
        f"try: main(['-C', {str(tmp_path)!r}, 'train', '--data', {str(tmp_path / 'data')!r}])\n"
        "except SystemExit as ended: print(ended.code, 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "1 False"
    assert "no data set in a known layout" in shown.stderr


def test_a_decimal_comma_in_an_option_is_named(workspace: Path) -> None:
    assert "has a decimal comma: write 0.5%" in complaint("-C", workspace, "search", "--max-err", "0,5%")
    wrong = run("-C", workspace, "train", "--data", "data", "--learning-rate", "0,002")
    assert wrong.exit_code == 2
    assert "numbers have a decimal point, 0.002" in " ".join(wrong.stderr.split())


def test_a_workspace_file_with_nonsense_about_data_is_refused(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.remember(data=DataFolder(tmp_path, "frames", "masks", 1))
    assert workspace.data_folder(None) == DataFolder(tmp_path / ".", "frames", "masks", 1)
    text = workspace.file.read_text()
    for old, new in (('"frames"', "3"), ('"label_offset": 1', '"label_offset": true'), ("label_offset", "label")):
        workspace.file.write_text(text.replace(old, new))
        with pytest.raises(InputError, match="is damaged"):
            workspace.data_folder(None)
    workspace.file.write_text(text.replace('"frames"', '"../frames"'))
    with pytest.raises(InputError, match="not the name of a folder"):
        workspace.data_folder(None)
