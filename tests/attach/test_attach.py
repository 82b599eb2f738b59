"""A trained network gets early exits from the command line, with and without labels, and runs from a bundle."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from mess_compile import steps
from mess_compile.attach import own_labels
from mess_compile.data import scenes
from mess_compile.data.dataset import open_dataset
from mess_compile.network import read_graph_set
from mess_compile.runtime import load
from mess_compile.runtime.base.errors import InputError
from mess_compile.search.requirement import Requirement
from mess_compile.training.recipe import Distillation, Recipe
from mess_compile.workspace import Workspace
from tests.attach import brought
from tests.commands import done, run

EXITS = steps.AttachOptions(preprocess="-1-1", exits=3, heads=("fcn-crm1-b0",))


def recipe(first: int, second: int) -> Recipe:
    return Recipe(
        epochs=(first, second),
        batch=4,
        learning_rate=1e-3,
        order="joint",
        loss_resolution="cells",
        distillation=Distillation("kd"),
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number, scene in enumerate(scenes.by_difficulty(brought.HW, 15)):
        Image.fromarray(scene.frame).save(root / f"{'abcde'[number % 5]}_{number:03}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return brought.saved(brought.unet("corners"), tmp_path_factory.mktemp("model"))


def test_without_labels_the_network_itself_is_the_truth(
    tmp_path: Path, model: Path, images: Path, brief_profile: None
) -> None:
    workspace = Workspace(tmp_path)
    found = steps.attach(workspace, model, recipe(1, 1), steps.AttachOptions(**vars(EXITS) | {"images": images}))
    assert [head.name for head in found.candidate.heads][-1] == "exit3.own"
    assert found.truth == "the network's own output"
    taught = json.loads((workspace.candidate / "attached.json").read_text())
    held = {item.id for item in open_dataset(workspace.own_labels, "val").items}
    assert len(held) == 3, "a fifth of 15 images"
    assert len({name[0] for name in held}) == 1, "of one whole sequence"
    assert not held & set(taught["image_ids"])
    steps.export(workspace)
    steps.evaluate(workspace, steps.EvaluateOptions(split="val"))
    steps.profile(workspace, "host")
    steps.search(workspace, (), None, Requirement(max_err_pp=100.0))
    steps.bundle(workspace, None, None)
    graph_set, frame = read_graph_set(workspace.graphs), brought.frame(5)
    assert graph_set.baseline_alone is not None or found.changed == 0
    with load(workspace.bundle("host")) as cascade:
        assert cascade(frame).labels.shape == brought.HW


def test_frozen_weights_stay_as_they_came(tmp_path: Path, model: Path, images: Path) -> None:
    workspace, frame = Workspace(tmp_path), brought.frame(6)
    found = steps.attach(workspace, model, recipe(0, 1), steps.AttachOptions(**vars(EXITS) | {"images": images}))
    assert found.changed == 0
    assert found.miou["exit3.own"] == 100.0
    assert steps.export(workspace).baselines == ("baseline",)
    labels = own_labels_of(workspace, frame)
    assert np.array_equal(labels, brought.own_labels(onnx.load(str(model)), frame))


def test_weights_in_constant_nodes_are_taken(tmp_path: Path, images: Path) -> None:
    source = brought.saved(brought.with_weights_in_nodes(brought.unet("corners")), tmp_path)
    workspace, frame = Workspace(tmp_path / "w"), brought.frame(6)
    steps.attach(workspace, source, recipe(0, 1), steps.AttachOptions(**vars(EXITS) | {"images": images}))
    steps.export(workspace)
    assert np.array_equal(own_labels_of(workspace, frame), brought.own_labels(onnx.load(str(source)), frame))


def test_the_command_prints_each_head_and_what_to_do_next(tmp_path: Path, model: Path, images: Path) -> None:
    options = ("--images", images, "--preprocess=-1-1", "--exits", "3", "--heads", "fcn-crm1-b0", "--epochs", "0", "1")
    shown = done("-C", tmp_path / "new", "attach", model, *options, "--batch", "4", "--hold-back", "^a")
    assert "held back, never taught on: 3 of 15 images, a_000.png, a_005.png, a_010.png (--hold-back ^a)" in shown
    taught = json.loads((tmp_path / "new" / "candidate" / "attached.json").read_text())
    assert (taught["held_back"], taught["hold_back"]) == (["a_000", "a_005", "a_010"], "^a")
    assert "mIoU against the network's own output, 3 images not taught on" in shown
    assert "exit3.own" in shown
    assert shown.endswith(f"hint: mess-compile -C {tmp_path / 'new'} export\n")


def test_fewer_exits_than_asked_are_warned_of(tmp_path: Path, model: Path, images: Path) -> None:
    warnings: list[str] = []
    options = steps.AttachOptions(**vars(EXITS) | {"images": images, "exits": 60})
    found = steps.attach(Workspace(tmp_path), model, recipe(0, 1), options, steps.Reporter(warning=warnings.append))
    assert f"{len(found.candidate.exit_points)} exits instead of 60: no map lies near" in warnings[0]


def exported(workspace: Workspace) -> Workspace:
    steps.export(workspace)
    return workspace


def own_labels_of(workspace: Workspace, frame: np.ndarray) -> np.ndarray:
    import onnxruntime

    path = workspace.graphs / "baseline.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["labels"], {"image": frame[None]})[0][0])


def labelled_by(labels_of: Callable[[np.ndarray], np.ndarray], images: Path, data: Path) -> Path:
    """A data set of 12 training and 3 validation images with labels by a function of the frame."""
    for split, start in (("train", 0), ("val", 12)):
        for kind in ("images", "labels"):
            (data / split / kind).mkdir(parents=True)
        for path in sorted(images.iterdir())[start : start + 12]:
            frame = np.asarray(Image.open(path))
            (data / split / "images" / path.name).write_bytes(path.read_bytes())
            Image.fromarray(labels_of(frame).astype(np.uint8)).save(data / split / "labels" / path.name)
    (data / "classes.txt").write_text("sky\nroad\ncar\n")
    return data


def test_a_grey_network_is_taught_by_labels(tmp_path: Path, images: Path) -> None:
    data = labelled_by(lambda frame: (frame[..., 0] > 128).astype(int), images, tmp_path / "data")
    source = brought.saved(brought.grey(brought.unet("corners")), tmp_path)
    options = steps.AttachOptions(**vars(EXITS) | {"data": data, "preprocess": None})
    found = steps.attach(Workspace(tmp_path / "w"), source, recipe(0, 1), options)
    assert len(found.candidate.exit_points) == 3
    assert steps.export(Workspace(tmp_path / "w")).baselines == ("baseline",)


def test_with_labels_the_better_preparation_is_found(tmp_path: Path, images: Path) -> None:
    """Labels made with one preparation of the input tell it from the others."""
    model = brought.unet("corners", seed=8)
    data = labelled_by(lambda frame: brought.own_labels(model, frame), images, tmp_path / "data")
    notes: list[str] = []
    options = steps.AttachOptions(**vars(EXITS) | {"data": data, "preprocess": None})
    source, reporter = brought.saved(model, tmp_path), steps.Reporter(note=notes.append)
    found = steps.attach(Workspace(tmp_path / "w"), source, recipe(0, 1), options, reporter)
    assert found.truth == "the user's labels"
    assert any(note.startswith("--preprocess -1-1 gives the best mIoU") for note in notes)
    warnings: list[str] = []
    steps.attach(
        Workspace(tmp_path / "v"),
        source,
        recipe(0, 1),
        steps.AttachOptions(**vars(EXITS) | {"data": data, "preprocess": "0-255"}),
        steps.Reporter(warning=warnings.append),
    )
    assert any("--preprocess 0-255 is likely wrong" in line and line.endswith("try -1-1") for line in warnings)


def test_a_killed_attach_continues(tmp_path: Path, model: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mess_compile.attach import teaching

    workspace, options = Workspace(tmp_path), steps.AttachOptions(**vars(EXITS) | {"images": images})

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(teaching, "pretrain", killed)
    with pytest.raises(KeyboardInterrupt):
        steps.attach(workspace, model, recipe(1, 1), options)
    monkeypatch.undo()

    def never(*arguments: object) -> None:
        raise AssertionError("the heads were taught")

    monkeypatch.setattr(teaching, "train_heads", never)
    found = steps.attach(workspace, model, recipe(1, 1), options)
    assert (workspace.candidate / "network.onnx").exists()
    assert found.miou["exit3.own"] > 90
    assert not workspace.attaching.exists()


def test_the_network_learns_only_where_that_pays(tmp_path: Path, model: Path, images: Path) -> None:
    """Its own weights stay as they came unless an epoch makes early exits better and leaves its end as it was."""
    notes: list[str] = []
    options = steps.AttachOptions(**vars(EXITS) | {"images": images})
    wild = replace(recipe(1, 1), learning_rate=10.0)
    found = steps.attach(Workspace(tmp_path), model, wild, options, steps.Reporter(note=notes.append))
    assert found.changed == 0
    assert any(note.startswith("no epoch made the early exits better and kept the network's own end") for note in notes)
    assert np.array_equal(
        own_labels_of(exported(Workspace(tmp_path)), brought.frame(6)),
        brought.own_labels(onnx.load(str(model)), brought.frame(6)),
    )


def test_sequences_stay_together_and_a_single_one_is_cut_at_its_last_fifth() -> None:
    paths = [Path(f"drive{drive}_{number:02}.png") for drive in range(10) for number in range(4)]
    split = own_labels.split_images(paths)
    assert len(split["val"]) == 8
    assert not {path.stem[:6] for path in split["val"]} & {path.stem[:6] for path in split["train"]}
    one = [Path(f"frame_{number:02}.png") for number in range(20)]
    assert own_labels.split_images(one)["val"] == tuple(one[16:])


def test_a_user_chooses_which_images_are_held_back_and_reads_which_they_are() -> None:
    paths = [Path(f"{place}_{number:02}.png") for place in ("mill", "yard", "dock") for number in range(6)]
    split = own_labels.split_images(paths, "^dock")
    assert [path.name for path in split["val"]] == [f"dock_{number:02}.png" for number in range(6)]
    assert len(split["train"]) == 12
    text = "held back, never taught on: 6 of 18 images, dock_00.png, dock_01.png, dock_02.png, dock_03.png and 2 more"
    assert own_labels.held_back_text(split, "^dock") == f"{text} (--hold-back ^dock)"
    many = [Path(f"drive{drive}_{number:02}.png") for drive in range(10) for number in range(4)]
    by_default = own_labels.held_back_text(own_labels.split_images(many))
    assert by_default == (
        "held back, never taught on: 8 of 40 images, the sequences drive0, drive5 (--hold-back REGEX chooses others)"
    )


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(", "is not a regular expression"),
        ("nowhere", "matches no file name of --images, such as mill_00.png"),
        ("", "matches no file name"),
        ("mill|yard", "leaves 6 of 18 images to teach on"),
    ],
)
def test_a_pattern_that_holds_back_none_or_too_many_is_named(pattern: str, says: str) -> None:
    paths = [Path(f"{place}_{number:02}.png") for place in ("mill", "yard", "dock") for number in range(6)]
    with pytest.raises(InputError, match=says):
        own_labels.split_images(paths, pattern)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--exits-at", ""), "one of these is empty"),
        (("--epochs", "0", "0"), "--epochs 0 0 teaches nothing"),
        (("--batch", "0"), "0 is not in the range x>=2"),
        (("--learning-rate", "nan"), "--learning-rate is not a number"),
    ],
)
def test_each_option_that_cannot_be_has_a_sentence_of_its_own(
    model: Path, images: Path, options: tuple[str, ...], says: str
) -> None:
    found = run("attach", model, "--images", images, "--preprocess=-1-1", *options)
    assert found.exit_code == 2
    assert says in found.stderr


def test_rare_classes_are_void_and_named(tmp_path: Path, images: Path) -> None:
    """A class of a few pixels would swing mIoU by its whole weight."""

    def labels(frame: np.ndarray) -> np.ndarray:
        found = np.zeros(brought.HW, np.uint8)
        found[16:] = 1
        found[0, 0] = 2  # 1 of 1,536
        return found

    paths, _ = own_labels.find_images(images)
    splits = own_labels.split_images(paths)
    left_out = own_labels.write_own_labels(tmp_path / "own", splits, ("a", "b", "c"), labels, steps.Reporter())
    assert left_out == ("c",)
    assert values(tmp_path / "own" / "val") == [0, 1, 255]
    assert values(tmp_path / "own" / "train") == [0, 1, 2]


def values(split: Path) -> list[int]:
    first = min((split / "labels").iterdir())
    found: list[int] = np.unique(np.asarray(Image.open(first))).tolist()
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --images DIR, or --data DIR with labels"),
        ({"images": Path("nowhere")}, "--images nowhere does not exist"),
        ({"images": Path("."), "preprocess": "imagnet"}, r"--preprocess 'imagnet' is not one of imagenet, 0-1"),
        ({"images": Path("."), "preprocess": None}, "--preprocess is missing: how does the network want its input"),
        ({"images": Path("."), "exits_at": ("nothing", "deep", "no")}, "--exits-at nothing, no: no exit can be there"),
        ({"images": Path("."), "output": "nope"}, "--output nope: .*; its outputs are pixels"),
        ({"images": Path("."), "classes": Path("c.txt")}, r"c.txt has 2 classes, but output 'pixels' has 3"),
    ],
)
def test_wrong_options_are_named(
    tmp_path: Path,
    model: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    message: str,
) -> None:
    monkeypatch.chdir(images)
    (tmp_path / "c.txt").write_text("a\nb\n")
    if "classes" in options:
        options = options | {"classes": tmp_path / "c.txt"}
    with pytest.raises(InputError, match=message):
        steps.attach(Workspace(tmp_path / "w"), model, recipe(0, 1), steps.AttachOptions(**vars(EXITS) | options))
    assert not (tmp_path / "w" / "candidate").exists()


MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(16, 24, 3, 1, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, 1, 1), nn.ReLU())
        self.end = nn.Conv2d(24, 3, 1)

    def forward(self, x):
        scores = self.end(self.deep(self.down(x)))
        return {"out": nn.functional.interpolate(scores, x.shape[2:], mode="bilinear", align_corners=True)}

def made():
    torch.manual_seed(1)
    return Net()

def wrong():
    return 3
"""


def test_a_torch_module_is_attached_at_its_submodules(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_network.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *sys.path])
    options = steps.AttachOptions(**vars(EXITS) | {"images": images, "exits_at": ("down",)})
    workspace = Workspace(tmp_path / "w")
    with pytest.raises(InputError, match="--input is missing: a torch module needs the size of its input"):
        steps.attach(workspace, "my_network:made", recipe(0, 1), options)
    sized = steps.AttachOptions(**vars(options) | {"input_hw": brought.HW})
    found = steps.attach(workspace, "my_network:made", recipe(0, 1), sized)
    assert found.candidate.exit_points[0].block == "down"
    assert found.candidate.backbone == "made"
    steps.export(workspace)
    for source, message in (
        ("my_network:wrong", r"my_network:wrong returns int, not a torch.nn.Module"),
        ("my_network:nothing", "my_network:nothing gives no module: "),
        ("no.such:made", "no.such:made gives no module: "),
    ):
        with pytest.raises(InputError, match=message):
            steps.attach(workspace, source, recipe(0, 1), sized)
    other = steps.AttachOptions(**vars(sized) | {"exits_at": ("dwn",)})
    with pytest.raises(InputError, match=r"--exits-at dwn: the module has no such submodule \(did you mean 'down'\?\)"):
        steps.attach(workspace, "my_network:made", recipe(0, 1), other)
