"""Statistics from the real engine equal those counted pixel by pixel from a numpy version of the same network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mess_compile import steps
from mess_compile.data import scenes
from mess_compile.engines.files import EngineFiles, plain_files
from mess_compile.evaluate import record
from mess_compile.evaluate.record import LabelledImage, evaluate
from mess_compile.evaluate.statistics import check_statistics_current, head_miou, merge
from mess_compile.network import GraphSet
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import Library, open_library
from mess_compile.runtime.images.frames import resize
from mess_compile.workspace import Workspace
from tests import skips, small_network
from tests.commands import contents

IGNORED = frozenset({11, 255})

VAL = steps.EvaluateOptions(split="val")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> GraphSet:
    return small_network.graph_set(tmp_path_factory.mktemp("graphs"))


@pytest.fixture
def library() -> Iterator[Library]:
    opened = open_library("onnxruntime", threads=1)
    yield opened
    opened.close()


def labelled_image(seed: int, hw: tuple[int, int] = small_network.HW) -> LabelledImage:
    labels = np.random.default_rng(seed).choice(np.array([0, 1, 2, 11, 255], np.uint8), hw)
    return f"image{seed}", "drive", small_network.frame(seed, hw), labels


def scored_by_hand(guess: NDArray[np.uint8], labels: NDArray[np.uint8]) -> tuple[list[int], list[int], list[int]]:
    intersection, predicted, labelled = [0, 0, 0], [0, 0, 0], [0, 0, 0]
    for y, row in enumerate(labels.tolist()):
        for x, truth in enumerate(row):
            if truth not in IGNORED:
                predicted[guess[y, x]] += 1
                labelled[truth] += 1
                intersection[truth] += int(guess[y, x] == truth)
    return intersection, predicted, labelled


def test_counts_and_pixels_of_every_head_and_image(graphs: GraphSet, library: Library) -> None:
    images = [labelled_image(seed) for seed in range(3)]
    told: list[int] = []
    found = evaluate(
        plain_files(graphs),
        library,
        images,
        device="host",
        split="val",
        ignore=IGNORED,
        progress=lambda done: told.append(done),
    )
    check_statistics_current(found, graphs)
    for i, (_, _, frame, labels) in enumerate(images):
        for h, (counts, guess) in enumerate(small_network.expected(frame)):
            assert found.counts[i, h].tolist() == counts.tolist()
            intersection, predicted, labelled = scored_by_hand(guess, labels)
            assert found.intersection[i, h].tolist() == intersection
            assert found.predicted[i, h].tolist() == predicted
            assert found.labelled[i].tolist() == labelled
    assert found.counts.dtype == np.int32
    assert found.intersection.dtype == found.predicted.dtype == found.labelled.dtype == np.int64
    assert (found.image_id, found.group) == (("image0", "image1", "image2"), ("drive",) * 3)
    assert (found.cells, found.library, found.split) == ((24, 24), "onnxruntime", "val")
    assert told == [1, 2, 3]


@pytest.mark.parametrize("lost", [None, "segment-1-2"])
def test_heads_of_a_network_with_skips_are_scored_by_what_it_gives_run_whole(
    tmp_path: Path, library: Library, lost: str | None
) -> None:
    """Also where a longer segment replaces one that has no engine: each exit reads what its own path computed."""
    graph_set = skips.imported(tmp_path)
    engines = plain_files(graph_set)
    engines = EngineFiles(graph_set, {name: path for name, path in engines.paths.items() if name != lost})
    images = [(f"image{i}", "drive", skips.frame(i), labelled_image(i, skips.HW)[3]) for i in range(3)]
    found = evaluate(engines, library, images, device="host", split="val", ignore=IGNORED)
    assert (found.heads, found.cells) == (skips.HEADS, (96, 24, 24))
    for i, (_, _, frame, labels) in enumerate(images):
        known = ~np.isin(labels, list(IGNORED))
        for h, (counts, guess) in enumerate(skips.expected(frame)):
            assert found.counts[i, h].tolist() == counts.tolist()
            assert found.predicted[i, h].tolist() == np.bincount(guess[known], minlength=4).tolist()
            hits = guess[known & (guess == labels)]
            assert found.intersection[i, h].tolist() == np.bincount(hits, minlength=4).tolist()


def test_frames_of_another_size_are_scored_at_their_own_size(graphs: GraphSet, library: Library) -> None:
    _, _, frame, labels = labelled_image(9, (20, 30))
    found = evaluate(
        plain_files(graphs), library, [("x", "g", frame, labels)], device="host", split="val", ignore=IGNORED
    )
    height, width = small_network.HW
    for h, (_, guess) in enumerate(small_network.expected(resize(frame, small_network.HW))):
        rows = [int((i + 0.5) * height / 20) for i in range(20)]
        columns = [int((j + 0.5) * width / 30) for j in range(30)]
        intersection, predicted, _ = scored_by_hand(guess[np.ix_(rows, columns)], labels)
        assert found.intersection[0, h].tolist() == intersection
        assert found.predicted[0, h].tolist() == predicted


def test_the_baseline_trained_alone_is_scored_like_a_head(tmp_path: Path, library: Library) -> None:
    graphs = small_network.graph_set(tmp_path, baseline_alone="a" * 64)
    images = [labelled_image(seed) for seed in range(3)]
    found = evaluate(plain_files(graphs), library, images, device="host", split="val", ignore=IGNORED)
    check_statistics_current(found, graphs)
    assert (found.baseline_alone, found.counts.shape) == ("a" * 64, (3, 2, 4))
    right, guessed, pixels = np.zeros(3), np.zeros(3), np.zeros(3)
    for i, (_, _, frame, labels) in enumerate(images):
        intersection, predicted, labelled = scored_by_hand(small_network.expected_alone(frame), labels)
        assert found.intersection[i, 2].tolist() == intersection
        assert found.predicted[i, 2].tolist() == predicted
        right, guessed, pixels = right + intersection, guessed + predicted, pixels + labelled
    assert head_miou(found, "baseline-alone") == pytest.approx(100 * np.mean(right / (guessed + pixels - right)))


def test_shards_equal_one_run(graphs: GraphSet, library: Library) -> None:
    images = [labelled_image(seed) for seed in range(4)]
    whole = evaluate(plain_files(graphs), library, images, device="host", split="val", ignore=IGNORED)
    shards = [
        evaluate(plain_files(graphs), library, part, device="host", split="val", ignore=IGNORED)
        for part in (images[:1], images[1:])
    ]
    merged = merge(shards)
    for name in ("counts", "intersection", "predicted", "labelled"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))


def test_a_label_out_of_range_is_named_with_its_image(graphs: GraphSet, library: Library) -> None:
    image = labelled_image(0)
    with pytest.raises(
        InputError, match=r"image image0: label 11 is out of range: the network has 3 classes \(0 to 2\)"
    ):
        evaluate(plain_files(graphs), library, [image], device="host", split="val")


def test_labels_of_another_size_are_named_with_their_image(graphs: GraphSet, library: Library) -> None:
    name, group, frame, labels = labelled_image(0)
    with pytest.raises(InputError, match=r"image image0: labels of shape \(4, 12\) do not fit a frame of \(8, 12\)"):
        evaluate(
            plain_files(graphs), library, [(name, group, frame, labels[:4])], device="host", split="val", ignore=IGNORED
        )


def test_no_images_are_refused(graphs: GraphSet, library: Library) -> None:
    with pytest.raises(InputError, match="no images"):
        evaluate(plain_files(graphs), library, [], device="host", split="val")


def test_an_image_without_countable_pixels_counts_nothing(graphs: GraphSet, library: Library) -> None:
    name, group, frame, labels = labelled_image(0)
    empty = np.full_like(labels, 255)
    found = evaluate(plain_files(graphs), library, [(name, group, frame, empty)], device="host", split="val")
    assert found.labelled.sum() == found.predicted.sum() == found.intersection.sum() == 0


class Killed(BaseException):
    pass


def told(counts: list[int], at: int | None = None) -> Callable[[str, int, int], None]:
    """Notes how many images are done, and kills the evaluation at one of them."""

    def progress(label: str, done: int, total: int) -> None:
        counts.append(done)
        if done == at:
            raise Killed

    return progress


def test_a_killed_evaluation_continues_with_the_images_it_lacks(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "BLOCK", 4)
    place = Workspace(workspace)
    expected = contents(place.statistics("val"))
    with pytest.raises(Killed):
        steps.evaluate(place, VAL, steps.Reporter(told([], at=10)))
    assert contents(place.statistics("val")) == expected, "what was there stays until all is done"
    counts: list[int] = []
    steps.evaluate(place, VAL, steps.Reporter(told(counts)))
    assert counts == [9, 10, 11, 12], "the first two blocks of four were finished"
    assert contents(place.statistics("val")) == expected
    assert [path.name for path in (workspace / "statistics").iterdir()] == ["val"]


def test_blocks_of_images_that_changed_are_not_taken_up_again(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "BLOCK", 4)
    place = Workspace(workspace)
    with pytest.raises(Killed):
        steps.evaluate(place, VAL, steps.Reporter(told([], at=10)))
    first = min((workspace / "data" / "val" / "labels").iterdir())
    changed = np.asarray(Image.open(first)).copy()
    changed[0] = 255
    first.unlink()
    Image.fromarray(changed).save(first)
    counts: list[int] = []
    steps.evaluate(place, VAL, steps.Reporter(told(counts)))
    assert counts == list(range(1, 13))


def test_two_processes_write_the_statistics_of_one(workspace: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    scenes.write_scenes(data, {"train": 2, "val": 70}, (64, 96))
    steps.evaluate(Workspace(workspace), steps.EvaluateOptions(data, "val"))
    alone = contents(workspace / "statistics" / "val")
    command = [sys.executable, "-m", "mess_compile", "-C", str(workspace), "evaluate", "--data", str(data)]
    done = subprocess.run([*command, "--devices", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("hint: ") == 1, "only one process speaks"
    assert contents(workspace / "statistics" / "val") == alone


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the other process in /proc")
@pytest.mark.slow
def test_a_process_that_is_killed_costs_its_block_of_images_only(workspace: Path, tmp_path: Path) -> None:
    data, place = tmp_path / "data", workspace / "statistics"
    scenes.write_scenes(data, {"train": 2, "val": 200}, (64, 96))
    command = [sys.executable, "-m", "mess_compile", "-C", str(workspace), "evaluate", "--data", str(data)]
    process = subprocess.Popen([*command, "--devices", "2"], stderr=subprocess.PIPE, text=True)
    while not list(place.glob(".val.parts-*/*/*")) and process.poll() is None:
        time.sleep(0.01)
    (other,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(other), signal.SIGKILL)
    errors = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 1
    assert errors[-1].startswith(
        "error: one of the processes that share the work has ended: run the same command again"
    )
    assert len([line for line in errors if "error" in line]) == 1, errors
    assert list(place.glob(".val.parts-*/*")), "finished blocks are kept"
    assert subprocess.run([*command, "--devices", "2"], capture_output=True).returncode == 0
    shared = contents(place / "val")
    steps.evaluate(Workspace(workspace), steps.EvaluateOptions(data, "val"))
    assert contents(place / "val") == shared
