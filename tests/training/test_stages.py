"""Training takes hours: a killed one must continue, and stage 2 must leave the backbone alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mess_compile import scenes
from mess_compile.dataset import DataSet, Sample, open_dataset
from mess_compile.nets import network
from mess_compile.nets.checkpoint import load_candidate
from mess_compile.runtime.errors import InputError
from mess_compile.training import stages
from mess_compile.training.augment import Batches, augmented
from mess_compile.training.stages import Recipe, head_groups, train
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
    train(architecture(images), images, open_dataset(data, "val"), folder, recipe, report)


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
    original = stages._train_heads

    def spied(net: network.OverprovisionedNetwork, *rest: object) -> None:
        kept.append({key: value.clone() for key, value in net.state_dict().items()})
        original(net, *rest)  # type: ignore[arg-type]
        kept.append(net.state_dict())

    monkeypatch.setattr(stages, "_train_heads", spied)
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
    for seed in range(20):
        frame, cropped = augmented(coded, HW, np.random.default_rng(seed))
        assert frame.shape == (*HW, 3)
        assert cropped.shape == HW
        grey = {label: frame[cropped == label].astype(float).mean(axis=1) for label in range(4)}
        middles = [np.median(values) for values in grey.values() if len(values)]
        assert middles == sorted(middles)
        for values in grey.values():  # one grey per label, but where two regions mix
            assert not len(values) or (np.abs(values - np.median(values)) > 3).mean() < 0.25


def test_an_epoch_can_be_repeated(data: Path) -> None:
    batches = Batches(open_dataset(data, "train"), HW, 4, seed=3)
    first, again, other = (list(batches.epoch(number)) for number in (1, 1, 2))
    assert len(first) == len(batches) == 2
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])


@pytest.mark.parametrize("wrong", [{"epochs": (0, 1)}, {"batch": 1}, {"learning_rate": 0.0}, {"head_memory_mib": 0}])
def test_impossible_recipes_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Recipe(**wrong)  # type: ignore[arg-type]
