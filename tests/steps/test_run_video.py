"""`run` on folders, clips and cameras: a film that lies about exits or ends broken is worse than none."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mess_compile.runtime.base.errors import EngineError
from mess_compile.runtime.cascade import cascade as runtime_cascade
from mess_compile.runtime.cascade.cascade import Cascade
from mess_compile.steps.run import RunOptions, _panels
from tests import small_network
from tests.commands import complaint, done, printed_json, run

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: `pip install 'mess-compile[video]'`")
BLOCK, FPS, FRAMES = 12, 10.0, 12
"""Pixels of a film for each of the network's, which then sees what each block shows in the mean."""
SIZE = (small_network.HW[1] * BLOCK, small_network.HW[0] * BLOCK)
AMBER = np.array([255, 196, 0])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "tiny.mess"
    small_network.write_bundle(path)
    return path


def film(path: Path, seeds: range, codec: str = "mp4v") -> list[NDArray[np.uint8]]:
    """Write a clip of random blocks, and give its frames as a player decodes them."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), FPS, SIZE)
    for seed in seeds:
        blocks = small_network.frame(seed).repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)
        writer.write(np.ascontiguousarray(blocks[..., ::-1]))
    writer.release()
    return frames_of(path)


def frames_of(path: Path) -> list[NDArray[np.uint8]]:
    capture, found = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        found.append(np.ascontiguousarray(read[1][..., ::-1]))
    capture.release()
    return found


def expected(frame: NDArray[np.uint8]) -> tuple[int, NDArray[np.uint8]]:
    """The exit that the frame leaves at, and its labels, by Pillow and matrix products."""
    height, width = small_network.HW
    shorter = Image.fromarray(frame).resize((SIZE[0], height), Image.Resampling.BILINEAR)
    small = np.asarray(shorter.resize((width, height), Image.Resampling.BILINEAR))
    (counts, first), (_, second) = small_network.expected(small)
    exit_, labels = (1, first) if counts[2] >= 18 else (2, second)
    return exit_, labels.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)


class TestFilm:
    @pytest.fixture(scope="class")
    @staticmethod
    def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[NDArray[np.uint8]]]:
        path = tmp_path_factory.mktemp("clip") / "street.mp4"
        return path, film(path, range(FRAMES))

    def test_every_frame_is_there_in_order_with_its_exit_drawn_on_it(
        self, bundle: Path, clip: tuple[Path, list[NDArray[np.uint8]]], tmp_path: Path
    ) -> None:
        path, frames = clip
        exits = [expected(frame)[0] for frame in frames]
        assert {1, 2} == {*exits}, "the film shows nothing if all of it leaves at one exit"
        (told,) = printed_json("run", bundle, path, "-o", tmp_path)["videos"]
        assert (told["frames"], told["unread"], told["stopped"], told["labels"]) == (FRAMES, 0, False, None)
        assert told["exits"] == [exits.count(1), exits.count(2)]
        shown = frames_of(tmp_path / "street.overlay.mp4")
        capture = cv2.VideoCapture(str(tmp_path / "street.overlay.mp4"))
        assert capture.get(cv2.CAP_PROP_FPS) == FPS
        assert [picture.shape for picture in shown] == [frame.shape for frame in frames]
        for number, (picture, exit_) in enumerate(zip(shown, exits, strict=True)):
            apart = [np.abs(picture[20:].astype(int) - frame[20:]).mean() for frame in frames]
            assert int(np.argmin(apart)) == number
            amber = (np.abs(picture[:12].astype(int) - AMBER).max(axis=2) < 100).sum()
            assert amber == pytest.approx(exit_ * 36, abs=15), "a box of 6 x 6 for each exit that was reached"

    def test_label_pictures_of_every_second_frame(
        self, bundle: Path, clip: tuple[Path, list[NDArray[np.uint8]]], tmp_path: Path
    ) -> None:
        path, frames = clip
        given = ("run", bundle, path, "-o", tmp_path, "--labels", "--every", "2", "--limit", "4")
        for _ in range(2):  # what an earlier run wrote there is no reason to refuse
            (told,) = printed_json(*given)["videos"]
        assert told["frames"] == len(frames_of(tmp_path / "street.overlay.mp4")) == 4
        pictures = sorted((tmp_path / "street.labels").iterdir())
        assert [picture.name for picture in pictures] == [f"{number:06}.png" for number in (0, 2, 4, 6)]
        for picture in pictures:
            labels = Image.open(picture)
            assert labels.mode == "P"
            np.testing.assert_array_equal(np.asarray(labels), expected(frames[int(picture.stem)])[1])
        (tmp_path / "street.labels" / "mine.txt").write_text("of many years")
        assert "street.labels exists and holds other files than label pictures" in complaint(*given)

    def test_under_a_deadline_every_frame_is_refined(
        self, bundle: Path, clip: tuple[Path, list[NDArray[np.uint8]]], tmp_path: Path
    ) -> None:
        (told,) = printed_json("run", bundle, clip[0], "-o", tmp_path, "--deadline", "60000ms")["videos"]
        assert told["exits"] == [0, FRAMES]

    def test_what_does_not_fit_in_is_refused(
        self, bundle: Path, clip: tuple[Path, list[NDArray[np.uint8]]], tmp_path: Path
    ) -> None:
        assert run("run", bundle, clip[0], "-o", tmp_path, "--progressive").exit_code == 2
        assert run("run", bundle, clip[0], "-o", tmp_path, "--every", "0").exit_code == 2
        assert "two sources are named street" in complaint("run", bundle, clip[0], clip[0], "-o", tmp_path)
        assert not list(tmp_path.iterdir())


def test_what_is_no_film_is_told_in_one_line(bundle: Path, tmp_path: Path) -> None:
    text, empty = tmp_path / "notes.mp4", tmp_path / "empty.mkv"
    text.write_text("of many years" * 100)
    empty.touch()
    out = tmp_path / "out"
    for path in (text, empty):
        assert "is not a video that OpenCV can read" in complaint("run", bundle, path, "-o", out)
    assert "gone.mp4 does not exist" in complaint("run", bundle, tmp_path / "gone.mp4", "-o", out)
    assert "write camera:0" in complaint("run", bundle, "camera:front", "-o", out)
    assert "camera:97 cannot be opened" in complaint("run", bundle, "camera:97", "-o", out)
    assert not out.exists()


def test_a_film_that_breaks_off_is_shown_as_far_as_it_goes(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.avi"
    film(path, range(FRAMES), "MJPG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    readable = len(frames_of(path))
    assert 0 < readable < FRAMES
    ended = run("run", bundle, path, "-o", tmp_path)
    numbers = ", ".join(map(str, range(readable, FRAMES)))
    assert ended.exit_code == 1
    assert f"failed: {path}: frames {numbers} (from 0) are missing at its end\n" in ended.stderr
    assert (
        f"error: {FRAMES - readable} frames of {path} failed; the results of the others are in {tmp_path}"
        in ended.stderr
    )
    assert len(frames_of(tmp_path / "cut.overlay.mp4")) == readable


@pytest.mark.parametrize("every", [1, 2])
def test_a_damaged_frame_in_a_film_is_named_and_those_behind_it_are_shown(
    bundle: Path, tmp_path: Path, every: int
) -> None:
    path, out = tmp_path / "scratched.avi", tmp_path / "out"
    frames = film(path, range(FRAMES), "MJPG")
    content = bytearray(path.read_bytes())
    starts = [place.start() for place in re.finditer(rb"00dc....\xff\xd8", content, re.DOTALL)][:FRAMES]
    content[starts[6] + 8 : starts[7] - 40] = bytes(starts[7] - 40 - starts[6] - 8)
    path.write_bytes(content)
    ended = run("run", bundle, path, "-o", out, "--labels", "--every", str(every), "--json")
    assert ended.exit_code == 1
    told = json.loads(ended.stdout)
    assert [(each["source"], each["frames"]) for each in told["failed"]] == [(str(path), [6])]
    assert f"1 frame of {path} failed" in ended.stderr
    good = [number for number in range(0, FRAMES, every) if number != 6]
    assert [picture.name for picture in sorted((out / "scratched.labels").iterdir())] == [f"{n:06}.png" for n in good]
    for number in good:
        labels = Image.open(out / "scratched.labels" / f"{number:06}.png")
        np.testing.assert_array_equal(np.asarray(labels), expected(frames[number])[1])
    assert len(frames_of(out / "scratched.overlay.mp4")) == FRAMES // every, "it keeps the pace of the film"


def test_a_frame_that_no_engine_computes_is_named_and_those_behind_it_are_shown(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, count = Cascade._segmented, iter(range(FRAMES))

    def broken(*arguments: Any) -> Any:
        if next(count) == 3:
            raise EngineError("logits are not finite")
        return computed(*arguments)

    film(tmp_path / "street.mp4", range(FRAMES))
    film(tmp_path / "second.mp4", range(2))
    monkeypatch.setattr(Cascade, "_segmented", broken)
    ended = run("run", bundle, tmp_path / "street.mp4", tmp_path / "gone.mp4", "-o", tmp_path / "out")
    assert ended.exit_code == 1
    assert "gone.mp4 does not exist" in ended.stderr
    assert "logits are not finite" in ended.stderr
    assert f"error: 1 of 2 videos, 1 frame of {tmp_path / 'street.mp4'} failed" in ended.stderr
    assert len(frames_of(tmp_path / "out" / "street.overlay.mp4")) == FRAMES


class Camera:
    """One that goes on until Ctrl-C is pressed, as its seventh frame is taken."""

    def __init__(self, *name: Any) -> None:
        self.taken = 0

    def isOpened(self) -> bool:
        return True

    def get(self, key: int) -> float:
        return {cv2.CAP_PROP_FPS: 30.0}.get(key, -1.0)

    def grab(self) -> bool:
        self.taken += 1
        if self.taken == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return True

    def retrieve(self) -> tuple[bool, NDArray[np.uint8]]:
        return True, np.full((96, 144, 3), self.taken, np.uint8)

    def release(self) -> None:
        pass


def test_ctrl_c_ends_the_film_of_a_camera_whole(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mess_compile.data import video

    real = cv2.VideoCapture
    monkeypatch.setattr(video.cv2, "VideoCapture", lambda name: Camera() if name == 0 else real(name))
    shown = done("run", bundle, "camera:0", "-o", tmp_path)
    assert "stopped by Ctrl-C; what is written is whole" in shown
    monkeypatch.undo()
    assert len(frames_of(tmp_path / "camera0.overlay.mp4")) >= 2
    assert [path.name for path in tmp_path.iterdir()] == ["camera0.overlay.mp4"]


def test_a_full_disk_leaves_no_film_that_ends_early(bundle: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "long.mp4", tmp_path / "out"
    film(path, range(120))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
    command = [sys.executable, "-m", "mess_compile", "run", bundle, path, "-o", out]
    ended = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1), ended.stderr
    assert "check that the disk is not full" in ended.stderr
    assert not list(out.iterdir())


def test_without_opencv_the_install_line_is_named(bundle: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['cv2'] = None\nfrom mess_compile.cli import main\nmain(sys.argv[1:])"
    command = [sys.executable, "-c", code, "run", bundle, tmp_path / "a.mp4", "-o", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (
        1,
        "error: cv2 is not installed: run `pip install 'mess-compile[video]'`\n",
    )


class TestFolder:
    @pytest.fixture
    @staticmethod
    def folder(tmp_path: Path) -> Path:
        folder = tmp_path / "images"
        (folder / "deeper").mkdir(parents=True)
        for place, seed in (("b.png", 0), ("a.bmp", 1), ("c.png", 2), ("deeper/d.png", 3)):
            Image.fromarray(small_network.frame(seed)).save(folder / place)
        (folder / "notes.txt").write_text("of many years")
        return folder

    def test_its_images_are_run_in_the_order_of_their_names(self, bundle: Path, folder: Path, tmp_path: Path) -> None:
        for options, names in ((), ["a.bmp", "b.png", "c.png"]), (("--every", "2"), ["a.bmp", "c.png"]):
            told = printed_json("run", bundle, folder, "-o", tmp_path / "out", *options)
            assert [Path(image["image"]).name for image in told["images"]] == names
            assert told["videos"] == []

    def test_one_without_images_says_what_is_looked_for(self, bundle: Path, tmp_path: Path) -> None:
        assert "has no .jpg, .jpeg, .png" in complaint("run", bundle, tmp_path, "-o", tmp_path / "out")


def test_the_truth_of_labels_that_begin_at_1_is_not_shifted(bundle: Path, tmp_path: Path) -> None:
    frame = small_network.frame(0)
    labels = np.arange(frame[..., 0].size, dtype=np.uint8).reshape(frame.shape[:2]) % 2
    shown = []
    with runtime_cascade.load(bundle) as cascade:
        for offset in (0, 1):
            folder = tmp_path / str(offset)
            folder.mkdir()
            Image.fromarray(labels + np.uint8(offset)).save(folder / "a.png")
            options = RunOptions(progressive=True, truth=folder, label_offset=offset)
            shown.append(_panels(cascade, frame, 1, Path("a.png"), options)[-1][1])
    np.testing.assert_array_equal(shown[0], shown[1])
    assert len(np.unique(shown[0].reshape(-1, 3), axis=0)) > 1
    image = tmp_path / "0" / "a.png"
    assert "--truth" in run("run", bundle, image, "--label-offset", "1").stderr
