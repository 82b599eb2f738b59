"""Savings are stated against the better single-exit network: a weak final exit must not flatter a plan.

Weights are random here; of the two single-exit networks the one that drew the labels is right on all of them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from mess_compile import steps
from mess_compile.data import scenes
from mess_compile.nets.checkpoint import load_candidate, save_candidate
from mess_compile.nets.network import normalise
from mess_compile.network import Gate, HeadConfig
from mess_compile.runtime.measure.measure import Effort
from mess_compile.search.requirement import Requirement
from mess_compile.workspace import Workspace
from tests.commands import contents, done, edit, overwrite, printed_json, refused
from tests.networks import random_network

HW = (64, 96)
NAMES = scenes.SCENE_CLASSES.names
EFFORT = Effort(window_s=0.0, window_runs=1, windows=1, max_s=0.001, warm_up_s=0.0)


def quiet(*told: object) -> None:
    pass


def save_random(folder: Path, seed: int, exits: int) -> None:
    """A checkpoint whose heads see several classes: on average over some scenes none has a higher logit."""
    heads = [(number, HeadConfig()) for number in range(1, exits)]
    network = random_network(heads, classes=len(NAMES), seed=seed, exits=exits)
    frames = torch.from_numpy(np.stack([scenes.make_scene(number, HW).frame for number in range(4)]))
    with torch.inference_mode():
        for name, logits in network(normalise(frames))[1].items():
            *_, classifier = (m for m in network.head_module(name).modules() if isinstance(m, torch.nn.Conv2d))
            classifier.bias -= logits.mean(dim=(0, 2, 3))
    save_candidate(network, folder)
    edit(folder / "network.json", lambda content: content.update(classes=NAMES))


def draw_labels(root: Path, teacher: str) -> None:
    """Let every label of the data be what the last exit of the network in folder `teacher` answers."""
    network = load_candidate(root / teacher)
    for path in sorted((root / "data").glob("*/images/*.png")):
        frame = torch.from_numpy(np.asarray(Image.open(path)).copy())
        with torch.inference_mode():
            _, logits = network(normalise(frame[None]))
        pixels = torch.nn.functional.interpolate(list(logits.values())[-1], HW, mode="bilinear")
        target = path.parent.parent / "labels" / path.name
        target.unlink()
        Image.fromarray(pixels.argmax(dim=1)[0].numpy().astype(np.uint8)).save(target)


def chosen(workspace: Workspace) -> Path:
    steps.evaluate(workspace, steps.EvaluateOptions(workspace.root / "data", "val"))
    steps.search(workspace, ("host",), None, Requirement(objective="accuracy"))
    steps.bundle(workspace, None, None)
    return workspace.root


@pytest.fixture(scope="module")
def strong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose network trained alone is right on every image."""
    workspace = Workspace(tmp_path_factory.mktemp("strong") / "workspace")
    scenes.write_scenes(workspace.root / "data", {"val": 6, "test": 3}, HW)
    save_random(workspace.candidate, seed=0, exits=3)
    save_random(workspace.baseline, seed=1, exits=1)
    draw_labels(workspace.root, "baseline")
    steps.export(workspace, None, Gate())
    steps.profile(workspace, "host", steps.ProfileOptions(effort=EFFORT))
    return chosen(workspace)


@pytest.fixture(scope="module")
def weak(strong: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same networks, where the final exit is right on every image."""
    root = Path(shutil.copytree(strong, tmp_path_factory.mktemp("weak") / "workspace"))
    draw_labels(root, "candidate")
    return chosen(Workspace(root))


@pytest.fixture
def workspace(strong: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(strong, tmp_path / "workspace", copy_function=os.link))


def bench(root: Path) -> dict[str, Any]:
    return printed_json("-C", root, "bench", root / "host.mess", "--split", "test", "--passes", "1")


def miou_of_graph(root: Path, name: str) -> float:
    """On the images of test, from the graph itself and sets of pixels."""
    session = onnxruntime.InferenceSession(str(root / "graphs" / f"{name}.onnx"))
    images = sorted((root / "data" / "test" / "images").iterdir())
    guess = np.stack([session.run(["labels"], {"image": np.asarray(Image.open(path))[None]})[0][0] for path in images])
    truth = np.stack([np.asarray(Image.open(path.parent.parent / "labels" / path.name)) for path in images])
    shares = [((guess == k) & (truth == k)).sum() / ((guess == k) | (truth == k)).sum() for k in np.unique(truth)]
    return 100 * float(np.mean(shares))


class TestStronger:
    def test_search_asks_for_more_than_the_final_exit_has(self, strong: Path) -> None:
        plan = printed_json("-C", strong, "inspect", "plan")["plan"]
        assert plan["baseline_name"] == "baseline-alone"
        assert plan["baseline"]["miou"] > 98
        asked = printed_json("-C", strong, "search", "--max-err", "1%", "-o", strong / "asked.json")["plan"]
        assert [stage["head"] for stage in asked["stages"]] == ["baseline-alone"], "no exit comes near it"
        table = {
            entry["graph"]: entry["mean_ms"] for entry in printed_json("-C", strong, "inspect", "latency")["entries"]
        }
        single = (table["baseline"] + table["baseline-alone"]) / 2  # of equal work, so they share their latency
        expected = table["upload"] + single + table["download"]
        assert plan["baseline"]["latency_ms"] == pytest.approx(expected)

    def test_a_stated_miou_is_what_the_error_counts_from_and_its_own_stays(self, workspace: Path) -> None:
        own = printed_json("-C", workspace, "search", "--max-err", "100%")["plan"]["baseline"]["miou"]
        shown = done("-C", workspace, "search", "--max-err", "1%", "--baseline", "1.5%")
        assert "baseline (separate single-exit network)  " in shown
        assert " pp vs. --baseline 1.50 %" in shown
        plan = printed_json("-C", workspace, "inspect", "plan")["plan"]
        assert (plan["baseline"]["miou"], plan["reference_miou"]) == (own, 1.5)

    def test_bench_measures_it_and_reports_the_final_exit_beside(self, strong: Path) -> None:
        found = bench(strong)
        assert found["baseline_name"] == "baseline-alone"
        assert found["baseline"]["miou"] == pytest.approx(miou_of_graph(strong, "baseline-alone"))
        assert found["baseline"]["miou"] > 98
        final = pytest.approx(miou_of_graph(strong, "baseline"))
        assert found["other_baselines"] == [{"name": "baseline", "miou": final}]
        assert found["miou_difference"] == pytest.approx(found["measured"]["miou"] - found["baseline"]["miou"])
        assert found["latency_ratio"] == pytest.approx(
            found["baseline"]["latency_ms"] / found["measured"]["latency_ms"]
        )

    def test_the_reader_is_told_which_one_it_is(self, strong: Path) -> None:
        shown = done("-C", strong, "bench", strong / "host.mess", "--split", "test", "--passes", "1", "-v")
        assert "\nbaseline (separate single-exit network)  " in shown
        assert "the full network has " in shown
        assert "less than the baseline: the separate single-exit network" in shown
        assert shown.startswith("host.mess against the separate single-exit network on ")
        assert "separate single-exit network" in done("-C", strong, "inspect", strong / "host.mess")
        assert printed_json("inspect", strong / "host.mess")["plans"][0]["baseline_name"] == "baseline-alone"

    def test_inspect_shows_it(self, strong: Path) -> None:
        identity = load_candidate(strong / "baseline").candidate.identity
        assert "separate single-exit network: 100.00 % mIoU" in done("-C", strong, "inspect", "statistics")
        scored = printed_json("-C", strong, "inspect", "statistics")["baseline_alone"]
        assert (scored["identity"], scored["miou"] > 98) == (identity, True)
        graphs = printed_json("-C", strong, "inspect", "graphs")
        assert graphs["baseline_alone"] == {"identity": identity, "gmacs": graphs["baseline"]["gmacs"]}
        assert "baseline-alone" in done("-C", strong, "inspect", "graphs")


class TestWeaker:
    def test_the_final_exit_stays_what_plans_are_held_against(self, weak: Path) -> None:
        plan = printed_json("-C", weak, "inspect", "plan")["plan"]
        assert (plan["baseline_name"], plan["baseline"]["miou"] > 98) == ("baseline", True)
        found = bench(weak)
        assert (found["baseline_name"], found["baseline"]["miou"] > 98) == ("baseline", True)
        alone = pytest.approx(miou_of_graph(weak, "baseline-alone"))
        assert found["other_baselines"] == [{"name": "baseline-alone", "miou": alone}]


class TestAnother:
    """What was made with one baseline is never mixed with another, or with none."""

    def test_without_an_export_nothing_changes(self, workspace: Path) -> None:
        before = printed_json("-C", workspace, "search")
        shutil.rmtree(workspace / "baseline")
        assert printed_json("-C", workspace, "search") == before

    def test_another_network_makes_table_statistics_and_plan_stale(self, workspace: Path) -> None:
        shutil.rmtree(workspace / "baseline")
        save_random(workspace / "baseline", seed=2, exits=1)
        shown = done("-C", workspace, "export")
        both = "full network and separate single-exit network"
        assert f"search compares plans with the more accurate of {both}" in shown
        assert "made from other graphs than these (baseline-alone)" in refused(workspace, "search")
        assert "another baseline" in refused(workspace, "bundle")
        steps.profile(Workspace(workspace), "host", steps.ProfileOptions(effort=EFFORT))
        edit(workspace / "workspace.json", lambda content: content.update(data=None))
        assert "the evaluation is of another baseline" in refused(workspace, "search")

    def test_none_leaves_the_final_exit_alone(self, workspace: Path) -> None:
        shutil.rmtree(workspace / "baseline")
        done("-C", workspace, "export")
        assert "another baseline" in refused(workspace, "bundle")
        old = contents(workspace / "statistics")
        done("-C", workspace, "search", "--max-err", "100%")
        assert contents(workspace / "statistics") != old
        done("-C", workspace, "bundle")
        found = bench(workspace)
        assert (found["baseline_name"], found["other_baselines"]) == ("baseline", [])


def test_a_damaged_baseline_is_named(workspace: Path) -> None:
    overwrite(workspace / "baseline" / "network.json", b"{")
    assert "baseline/network.json is not JSON" in refused(workspace, "export")


def test_an_unfinished_training_is_no_baseline(workspace: Path) -> None:
    (workspace / "baseline" / "network.json").unlink()
    graphs = printed_json("-C", workspace, "export")
    assert graphs["baseline_alone"] is None


def test_a_foreign_network_has_no_baseline_of_ours(workspace: Path) -> None:
    message = refused(workspace, "export", workspace / "graphs" / "network.onnx")
    assert f"or remove {workspace / 'baseline'}" in message
