"""Training takes hours: a killed one must continue, and stage 2 must leave the backbone alone."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mess_compile.data import scenes
from mess_compile.data.dataset import DataSet, Sample, open_dataset
from mess_compile.nets import network
from mess_compile.nets.checkpoint import load_candidate
from mess_compile.reporter import Reporter
from mess_compile.runtime.base.errors import InputError
from mess_compile.training import backbone, loop
from mess_compile.training import heads as distilling
from mess_compile.training import train as stages
from mess_compile.training.augment import Batches, Shard, augmented
from mess_compile.training.backbone import trained_exits
from mess_compile.training.heads import head_groups
from mess_compile.training.progress import read_progress
from mess_compile.training.recipe import Distillation, Recipe
from mess_compile.training.train import TrainingJob, train
from tests.networks import random_network

HW = (48, 64)
RECIPE = Recipe(epochs=(2, 2), batch=4, learning_rate=4e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "data"
    scenes.write_scenes(root, {"train": 8, "val": 2}, HW)
    return root


def architecture(data: DataSet) -> network.Architecture:
    return network.Architecture(
        backbone="mobilenetv2",
        classes=data.classes.names,
        colours=data.classes.colours,
        input_hw=HW,
        exit_blocks=("features.3", "features.6", "features.17"),
        heads=network.with_final_head(network.heads_from_names(("fcn-crm1-b0", "fcn-crm2-b1"), 3), 3),
        width=0.25,
    )


def run(data: Path, folder: Path, recipe: Recipe = RECIPE, report: Callable[[str], None] = lambda line: None) -> None:
    images = open_dataset(data, "train")
    train(TrainingJob(architecture(images), images, open_dataset(data, "val"), folder, recipe), Reporter(note=report))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("line", [3, 4, 5, 6])
def test_a_killed_training_continues_and_redoes_one_epoch_at_most(data: Path, tmp_path: Path, line: int) -> None:
    lines: list[str] = []

    def kill(text: str) -> None:
        lines.append(text)
        if len(lines) == line:
            raise Killed

    with pytest.raises(Killed):
        run(data, tmp_path / "candidate", report=kill)
    first = [text for text in lines if "epoch" in text and "stage" in text]
    lines.clear()
    run(data, tmp_path / "candidate", report=lines.append)
    epochs = [text for text in lines if text.startswith("stage")]
    assert len(first) + len(epochs) <= sum(RECIPE.epochs) + 1
    assert load_candidate(tmp_path / "candidate").candidate.heads
    assert not (tmp_path / "candidate" / "training").exists()


def test_what_a_killed_save_left_behind_does_not_spoil_the_end(data: Path, tmp_path: Path) -> None:
    place = tmp_path / "candidate" / "training"
    place.mkdir(parents=True)
    for name in (".stage1-group0-epoch1.safetensors.x1", ".progress.json.x2", "stage1-group0-epoch9.safetensors"):
        (place / name).write_bytes(b"half")
    run(data, tmp_path / "candidate")
    assert load_candidate(tmp_path / "candidate")
    assert not place.exists()


def test_other_images_or_weights_are_another_training(data: Path, tmp_path: Path) -> None:
    def kill(text: str) -> None:
        if "epoch 2" in text:
            raise Killed

    with pytest.raises(Killed):
        run(data, tmp_path / "candidate", report=kill)
    scenes.write_scenes(tmp_path / "data", {"train": 8, "val": 2}, HW, seed=100)
    with pytest.raises(InputError, match="image_ids"):
        run(tmp_path / "data", tmp_path / "candidate")


def killed_in_epoch_2(data: Path, folder: Path) -> None:
    def kill(text: str) -> None:
        if "epoch 2" in text:
            raise Killed

    with pytest.raises(Killed):
        run(data, folder, report=kill)


@pytest.mark.parametrize(("kind", "words"), [("labels", "the labels, which were changed"), ("images", "the images")])
def test_labels_or_images_that_were_changed_are_another_training(tmp_path: Path, kind: str, words: str) -> None:
    root = tmp_path / "data"
    scenes.write_scenes(root, {"train": 8, "val": 2}, HW)
    killed_in_epoch_2(root, tmp_path / "candidate")
    path = min((root / "train" / kind).iterdir())
    pixels = np.array(Image.open(path))
    pixels[0] = pixels[-1] = 1
    Image.fromarray(pixels).save(path)
    with pytest.raises(InputError, match=f"differs in {words}"):
        run(root, tmp_path / "candidate")


def test_a_training_that_an_older_release_left_goes_on(data: Path, tmp_path: Path) -> None:
    killed_in_epoch_2(data, tmp_path / "candidate")
    path = tmp_path / "candidate" / "training" / "progress.json"
    content = json.loads(path.read_text())
    del content["training"]["labels_sha256"], content["training"]["images_sha256"]
    path.write_text(json.dumps(content))
    lines: list[str] = []
    run(data, tmp_path / "candidate", report=lines.append)
    assert not any(line.startswith("stage 1, epoch 1 ") for line in lines)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epoch": "one"}, "epoch is 'one', not an integer"),
        ({"tensors": "../weights.safetensors"}, "tensors is '../weights.safetensors', not the name of a file of"),
        ({"training": []}, "training is [], not an object"),
        ({"ephoc": 1}, "ephoc is not a known entry (did you mean 'epoch'?)"),
    ],
)
def test_a_wrong_entry_of_the_progress_is_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = tmp_path / "training" / "progress.json"
    path.parent.mkdir()
    content = {"format": "mess-training", "version": 1, "stage": 1, "group": 0, "epoch": 1}
    content |= {"tensors": "stage1-group0-epoch1.safetensors", "training": {}}
    path.write_text(json.dumps(content | changed))
    with pytest.raises(InputError, match=re.escape(f"progress.json is damaged ({message}")):
        read_progress(tmp_path, {})


def test_a_second_training_in_the_same_place_is_refused_and_leaves_the_first_alone(data: Path, tmp_path: Path) -> None:
    def second(text: str) -> None:
        if "epoch 2" in text:
            with pytest.raises(InputError, match=r"candidate is in use: another training is running there"):
                run(data, tmp_path / "candidate")
            raise Killed

    with pytest.raises(Killed):
        run(data, tmp_path / "candidate", report=second)
    assert (tmp_path / "candidate" / "training" / "progress.json").is_file()


def test_a_training_that_is_refused_leaves_no_folder(data: Path, tmp_path: Path) -> None:
    few = open_dataset(data, "train[:1]")
    with pytest.raises(InputError):
        train(
            TrainingJob(architecture(few), few, open_dataset(data, "val"), tmp_path / "candidate", RECIPE),
        )
    assert not (tmp_path / "candidate").exists()


def test_another_training_in_the_folder_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    def kill(text: str) -> None:
        if "epoch 2" in text:  # an epoch is reported, then saved: the first one is kept
            raise Killed

    with pytest.raises(Killed):
        run(data, tmp_path / "candidate", report=kill)
    with pytest.raises(InputError, match="learning_rate"):
        run(data, tmp_path / "candidate", replace(RECIPE, learning_rate=1e-3))


def test_stage_two_leaves_backbone_and_final_exit_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[dict[str, torch.Tensor]] = []
    original = stages.train_heads

    def spied(net: network.OverprovisionedNetwork, *rest: object) -> None:
        kept.append({key: value.clone() for key, value in net.state_dict().items()})
        original(net, *rest)  # type: ignore[arg-type]
        kept.append(net.state_dict())

    monkeypatch.setattr(stages, "train_heads", spied)
    run(data, tmp_path / "candidate")
    before, after = kept
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(key.startswith(("heads.exit1/", "heads.exit2/")) for key in changed)
    assert {key.split(".")[1] for key in changed} >= {"exit1/fcn-crm2-b1", "exit2/fcn-crm2-b1"}


def test_training_learns(data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    run(data, tmp_path / "candidate", Recipe(epochs=(20, 1), batch=4, learning_rate=4e-3), lines.append)
    losses = [float(line.split("exit ")[1].split()[2]) for line in lines if line.startswith("stage 1")]
    assert losses[-1] < 0.8 * losses[0]


def test_heads_train_in_groups_that_fit_the_memory() -> None:
    heads = network.heads_from_names(("fcn-crm1-b0", "fcn-crm1-b3", "fcn-crm2-b1"), 3)
    net = random_network(heads, width=1.0)
    sizes = {
        h.name: sum(p.numel() for p in net.head_module(h.name).parameters()) * 16 / 2**20 for h in net.candidate.heads
    }
    memory = 4
    groups = head_groups(net, memory)
    assert [name for group in groups for name in group] == [h.name for h in net.candidate.heads[:-1]]
    assert len(groups) > 1
    assert all(len(group) == 1 or sum(sizes[name] for name in group) <= memory for group in groups)


def test_crops_keep_frame_and_labels_together() -> None:
    rows, columns = np.mgrid[: HW[0], : HW[1]]
    labels = (2 * (rows >= 20) + (columns >= 30)).astype(np.uint8)
    coded = Sample("coded", "coded", np.repeat(labels[:, :, None] * 40 + 40, 3, axis=2), labels)
    for seed, hw in itertools.product(range(20), (HW, (24, 40))):
        frame, cropped = augmented(coded, HW, hw, np.random.default_rng(seed))
        assert frame.shape == (*hw, 3)
        assert cropped.shape == hw
        grey = {label: frame[cropped == label].astype(float).mean(axis=1) for label in range(4)}
        middles = [np.median(values) for values in grey.values() if len(values)]
        assert middles == sorted(middles)
        for values in grey.values():  # one grey per label, but where two regions mix
            assert len(values) < 400 or (np.abs(values - np.median(values)) > 3).mean() < 0.25


def test_a_crop_shows_objects_at_the_size_that_the_network_will_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mess_compile.training.augment.SCALE_RANGE", (1.0, 1.0))
    labels = np.zeros((96, 128), np.uint8)
    labels[40:60, 50:80] = 1  # 20 x 30 pixels of a frame twice the input size: 10 x 15 for the network
    sample = Sample("one", "one", np.zeros((96, 128, 3), np.uint8), labels)
    areas = [(augmented(sample, HW, HW, np.random.default_rng(seed))[1] == 1).sum() for seed in range(8)]
    assert areas == [150] * 8


def batches(data: Path, batch: int = 4, shard: Shard | None = None, augment: bool = True) -> Batches:
    recipe = Recipe(batch=batch, seed=3, augment=augment)
    return Batches(open_dataset(data, "train"), HW, recipe, shard or Shard())


def test_an_epoch_can_be_repeated(data: Path) -> None:
    made = batches(data)
    first, again, other = (list(made.epoch(number, HW)) for number in (1, 1, 2))
    assert len(first) == len(made) == 2
    assert all(
        torch.equal(a[0][0], b[0][0]) and torch.equal(a[0][1], b[0][1]) for a, b in zip(first, again, strict=True)
    )
    assert not torch.equal(first[0][0][0], other[0][0][0])


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_processes_and_pieces_together_see_the_images_of_one(data: Path, world: int, accumulate: int) -> None:
    whole = [frames for pieces in batches(data, 8).epoch(0, HW) for frames, _ in pieces]
    parts = [
        frames
        for rank in range(world)
        for pieces in batches(data, 8, Shard(rank, world, accumulate)).epoch(0, HW)
        for frames, _ in pieces
    ]
    images = sorted(frame.numpy().tobytes() for frames in parts for frame in frames)
    assert images == sorted(frame.numpy().tobytes() for frames in whole for frame in frames)


def test_a_batch_that_cannot_be_shared_is_refused(data: Path) -> None:
    with pytest.raises(InputError, match="multiple of 3 from 6"):
        batches(data, 8, Shard(0, 3, 1))


def test_the_names_of_a_batch_are_those_of_its_images(data: Path) -> None:
    made = batches(data, augment=False)
    by_name = {item.id: np.asarray(Image.open(item.image)) for item in open_dataset(data, "train").items}
    for index, pieces in enumerate(made.epoch(0, HW)):
        expected = [by_name[name] for name in made.names(0, index)]
        assert all(np.array_equal(frame, wanted) for frame, wanted in zip(pieces[0][0].numpy(), expected, strict=True))


def test_each_order_trains_its_exits() -> None:
    assert [trained_exits("round-robin", step, 3) for step in range(3)] == [[0, 2], [1, 2], [0, 2]]
    assert trained_exits("joint", 5, 3) == [0, 1, 2]
    assert trained_exits("final", 5, 3) == [2]
    assert trained_exits("round-robin", 5, 1) == [0]


def test_the_last_epochs_see_the_input_size() -> None:
    recipe = Recipe(epochs=(5, 2), crop_hw=(24, 32), full_size_epochs=2)
    assert [recipe.crop(epoch, HW) for epoch in range(5)] == [(24, 32)] * 3 + [HW] * 2
    assert recipe.head_crop(HW) == (24, 32)


@pytest.mark.parametrize(
    "other",
    [
        {"order": "joint", "stage1_head": "sep8-crm1-b0", "lovasz": 0.5},
        {"order": "final", "ema": 0.9, "crop_hw": (32, 48), "full_size_epochs": 1},
        {"augment": False, "loss_resolution": "cells", "class_power": 0.0},
    ],
)
def test_every_way_of_training_is_continued_to_the_same_network(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, object]
) -> None:
    monkeypatch.setattr(distilling, "_BYTES_PER_PARAMETER", 1e9)  # every head is a group of its own
    recipe = replace(RECIPE, **other)  # type: ignore[arg-type]
    run(data, tmp_path / "unbroken", recipe)
    for place in ("stage 1 epoch 2", "stage 2 group 1/4 epoch 2", "stage 2 group 3/4 epoch 2"):
        with pytest.raises(Killed):
            run(data, tmp_path / "broken", recipe, killed_at(place))
    run(data, tmp_path / "broken", recipe)
    states = [load_candidate(tmp_path / name).state_dict() for name in ("unbroken", "broken")]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def killed_at(words: str) -> Callable[[str], None]:
    def report(line: str) -> None:
        if words in line:
            raise Killed

    return report


def test_a_network_of_one_exit_is_the_baseline_trained_alone(data: Path, tmp_path: Path) -> None:
    images = open_dataset(data, "train")
    alone = replace(architecture(images), exit_blocks=("features.17",), heads=network.with_final_head((), 1))
    lines: list[str] = []
    train(
        TrainingJob(alone, images, images, tmp_path / "baseline", replace(RECIPE, epochs=(2, 0))),
        Reporter(note=lines.append),
    )
    assert [h.name for h in load_candidate(tmp_path / "baseline").candidate.heads] == ["exit1.fcn-crm1-b0"]
    assert not any("stage 2" in line for line in lines)


def test_heads_are_added_to_a_backbone_that_stays(data: Path, tmp_path: Path) -> None:
    images = open_dataset(data, "train")
    bare = replace(
        architecture(images), heads=network.with_final_head(network.heads_from_names(("fcn-crm1-b0",), 3), 3)
    )
    train(TrainingJob(bare, images, images, tmp_path / "bare", replace(RECIPE, epochs=(2, 0))), Reporter(note=print))
    recipe = replace(RECIPE, epochs=(0, 2))
    train(
        TrainingJob(architecture(images), images, images, tmp_path / "grown", recipe, source=tmp_path / "bare"),
        Reporter(note=print),
    )
    before, after = (load_candidate(tmp_path / name) for name in ("bare", "grown"))
    assert len(after.candidate.heads) > len(before.candidate.heads)
    old, new = before.backbone.state_dict(), after.backbone.state_dict()
    assert all(torch.equal(new[key], value) for key, value in old.items())
    final = before.candidate.baseline
    states = [net.head_module(final).state_dict() for net in (before, after)]
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


@pytest.mark.parametrize(
    ("epochs", "given", "words"),
    [
        ((0, 2), False, "0 requires --from"),
        ((1, 1), True, "0 requires --from"),
        ((1, 0), False, "nothing would train exit1.fcn-crm2-b1"),
    ],
)
def test_nothing_stays_untrained(
    data: Path, tmp_path: Path, epochs: tuple[int, int], given: bool, words: str, finished: Path
) -> None:
    images = open_dataset(data, "train")
    source = finished / "candidate" if given else None
    with pytest.raises(InputError, match=words):
        train(
            TrainingJob(architecture(images), images, images, tmp_path, replace(RECIPE, epochs=epochs), source=source),
            Reporter(note=print),
        )


def test_the_final_exit_alone_leaves_no_untrained_heads_behind(data: Path, tmp_path: Path) -> None:
    images = open_dataset(data, "train")
    bare = replace(
        architecture(images), heads=network.with_final_head(network.heads_from_names(("fcn-crm1-b0",), 3), 3)
    )
    with pytest.raises(InputError, match="nothing would train exit1"):
        train(
            TrainingJob(bare, images, images, tmp_path, replace(RECIPE, epochs=(1, 0), order="final")),
            Reporter(note=print),
        )


def test_another_network_teaches(data: Path, tmp_path: Path, finished: Path) -> None:
    """With alpha 1 the labels do not matter: other teachers make other heads."""
    images = open_dataset(data, "train")
    recipe = replace(RECIPE, epochs=(1, 1), distillation=Distillation("kd", alpha=1.0))
    run(data, tmp_path / "own", recipe)
    train(
        TrainingJob(architecture(images), images, images, tmp_path / "taught", recipe, teacher=finished / "candidate"),
        Reporter(note=print),
    )
    own, taught = (load_candidate(tmp_path / name).state_dict() for name in ("own", "taught"))
    changed = {key.split(".")[0] for key in own if not torch.equal(own[key], taught[key])}
    assert changed == {"heads"}


def test_a_teacher_of_other_classes_is_refused(data: Path, tmp_path: Path, finished: Path) -> None:
    images = open_dataset(data, "train")
    other = replace(architecture(images), classes=("a", "b"), colours=((0, 0, 0), (1, 1, 1)))
    with pytest.raises(InputError, match="same classes"):
        train(
            TrainingJob(other, images, images, tmp_path, RECIPE, teacher=finished / "candidate"), Reporter(note=print)
        )


def test_weights_that_a_last_step_spoiled_are_not_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.take_step
    steps: list[int] = []

    def spoil(optimiser: torch.optim.Optimizer, *rest: object) -> None:
        original(optimiser, *rest)  # type: ignore[arg-type]
        steps.append(1)
        if len(steps) == 4:  # the last of the second epoch
            optimiser.param_groups[0]["params"][0].data[0] = float("nan")

    monkeypatch.setattr(loop, "take_step", spoil)
    with pytest.raises(InputError, match="not numbers after stage 1 epoch 2/2"):
        run(data, tmp_path / "candidate")
    monkeypatch.undo()
    lines: list[str] = []
    run(data, tmp_path / "candidate", report=lines.append)
    assert "continuing stage 1 after epoch 1" in lines


def test_a_backbone_of_another_architecture_is_named(data: Path, tmp_path: Path, finished: Path) -> None:
    images = open_dataset(data, "train")
    recipe = replace(RECIPE, epochs=(0, 2))
    with pytest.raises(InputError, match=r"--from names a network whose (input_hw|exit_blocks) is .* asked for"):
        train(
            TrainingJob(architecture(images), images, images, tmp_path, recipe, source=finished / "candidate"),
            Reporter(note=print),
        )


def test_a_loss_that_is_not_a_number_names_the_batch_and_keeps_the_last_epoch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = backbone.losses.loss_of, []

    def poisoned(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        found = original(*arguments)  # type: ignore[arg-type]
        return found * float("nan") if len(calls) > 2 * 2 else found  # the first batch of the second epoch

    monkeypatch.setattr(backbone.losses, "loss_of", poisoned)
    with pytest.raises(InputError, match=r"stage 1, epoch 2, batch 1 \(scene.*learning-rate"):
        run(data, tmp_path / "candidate")
    monkeypatch.undo()
    lines: list[str] = []
    run(data, tmp_path / "candidate", report=lines.append)
    assert "continuing stage 1 after epoch 1" in lines


@pytest.mark.parametrize(("room", "words"), [(2, "2 fit, continue with --accumulate 2"), (1, "not even 2 fit")])
def test_memory_that_runs_out_says_which_batch_fits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, words: str
) -> None:
    original = network.OverprovisionedNetwork.maps

    def hungry(net: network.OverprovisionedNetwork, frames: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if len(frames) > room:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return original(net, frames)

    monkeypatch.setattr(network.OverprovisionedNetwork, "maps", hungry)
    with pytest.raises(InputError, match=f"out of memory.*batch 1, with 4 images.*{words}"):
        run(data, tmp_path / "candidate")


def test_other_failures_of_a_step_are_not_called_memory() -> None:
    assert not loop._is_exhaustion(RuntimeError("shapes differ"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": (0, 0)},
        {"epochs": (-1, 2)},
        {"batch": 1},
        {"learning_rate": 0.0},
        {"head_memory_mib": 0},
        {"order": "random"},
        {"loss_resolution": "half"},
        {"ema": 1.0},
        {"lovasz": -1.0},
        {"stage1_head": "fcn"},
        {"full_size_epochs": -1},
    ],
)
def test_impossible_recipes_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Recipe(**wrong)  # type: ignore[arg-type]


def test_two_images_are_the_least_and_few_are_called_few(data: Path, tmp_path: Path) -> None:
    def trained(images: str, folder: str) -> str:
        lines: list[str] = []
        chosen = open_dataset(data, images)
        train(
            TrainingJob(architecture(chosen), chosen, open_dataset(data, "val"), tmp_path / folder, RECIPE),
            Reporter(note=lines.append),
        )
        return next(line for line in lines if line.startswith("training on"))

    with pytest.raises(InputError, match="has 1 image, but training takes at least 2 at a time: add images"):
        trained("train[:1]", "one")
    assert trained("train[:2]", "two").endswith("too few to learn from")
    assert "too few" not in trained("train", "all")


def test_progress_names_stage_and_epoch_and_counts_images(data: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    images = open_dataset(data, "train")
    job = TrainingJob(architecture(images), images, open_dataset(data, "val"), tmp_path, replace(RECIPE, epochs=(2, 1)))
    train(job, Reporter(progress=lambda *call: calls.append(call)))
    stages = [call for call in calls if call[2]]
    assert stages == [
        ("stage 1 epoch 1/2, images", 0, 16),
        ("stage 1 epoch 1/2, images", 4, 16),
        ("stage 1 epoch 1/2, images", 8, 16),
        ("stage 1 epoch 2/2, images", 8, 16),
        ("stage 1 epoch 2/2, images", 12, 16),
        ("stage 1 epoch 2/2, images", 16, 16),
        ("stage 2 group 1/1 epoch 1/1, images", 0, 8),
        ("stage 2 group 1/1 epoch 1/1, images", 4, 8),
        ("stage 2 group 1/1 epoch 1/1, images", 8, 8),
    ]
