"""fp16 and int8 engines: settled once on the user's own images, and never something else than was asked in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mess_compile.data import scenes
from mess_compile.engines import recipes
from mess_compile.engines.recipes import recipe_name
from mess_compile.graph import precision_progress
from mess_compile.network import read_graph_set
from mess_compile.runtime.engines.engine import PRECISIONS
from tests.commands import done, printed_json, run
from tests.conftest import HW, Engines

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install mess-compile[rtx]")


def build(workspace: Path, precision: str) -> list[dict[str, object]]:
    content = printed_json("-C", workspace, "build", "--device", "rtx-4090", "--precision", precision)
    return [each["engines"] for each in content["builds"]]


def test_each_precision_has_its_engines_and_is_settled_once(workspace: Path, engines: Engines) -> None:
    engines.add_to(workspace)
    names = set(read_graph_set(workspace / "graphs").graphs)
    plain, half, whole = build(workspace, "fp32,fp16,int8")
    for each, recipe in ((plain, "fp32"), (half, "fp16"), (whole, "int8")):
        assert each["recipe"] == recipe
        entries = each["entries"]
        assert isinstance(entries, list)
        assert {entry["graph"] for entry in entries} == names
        assert not [entry["error"] for entry in entries if entry["error"]]
        folder = workspace / "engines" / "rtx-4090" / recipe
        assert all((folder / f"{entry['key']}.engine").is_file() for entry in entries)
    settled = json.loads((workspace / "recipes" / "fp16" / "recipe.json").read_text())
    specs = read_graph_set(workspace / "recipes" / "fp16").graphs
    assert {spec.precision for spec in specs.values()} == {"fp16", "fp32"}, "output graphs have nothing to convert"
    assert (settled["judged_frames"], settled["calibration_frames"]) == (12, 0)
    before = (workspace / "recipes" / "fp16" / "recipe.json").stat().st_mtime_ns
    assert [each["built"] for each in build(workspace, "fp32,fp16")] == [0, 0]
    assert (workspace / "recipes" / "fp16" / "recipe.json").stat().st_mtime_ns == before
    damaged = workspace / "recipes" / "fp16" / "index.json"
    damaged.write_text(damaged.read_text().replace("fp16", "fp8", 3))
    assert build(workspace, "fp16")[0]["built"] == 0, "settled again, into the same graphs"
    assert "fp8" not in damaged.read_text()


def test_an_interrupted_choice_of_precisions_is_resumed_by_the_same_command(workspace: Path, monkeypatch: Any) -> None:
    """Ctrl-C here; a kill in the middle is among the tests of settling itself."""
    graphs, seen = read_graph_set(workspace / "graphs"), scene_images(12)
    written: list[str] = []
    store = precision_progress.TriedGraphs.store

    def store_and_note(self: precision_progress.TriedGraphs, key: str, tried: Any, source: Any) -> None:
        written.append(key)
        store(self, key, tried, source)

    monkeypatch.setattr(precision_progress.TriedGraphs, "store", store_and_note)

    def settled(progress: Callable[[str, int, int], None]) -> None:
        folder = workspace / "recipes"
        request = recipes.RecipeRequest("fp16", PRECISIONS, "val")
        recipes.make_recipe(graphs, request, folder, lambda split: seen, progress)

    def stop(name: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settled(stop)
    first = len(written)
    settled(lambda *told: None)
    assert first >= 5
    assert len(set(written)) == len(written) > first, "no graph is tried twice"
    assert [path.name for path in (workspace / "recipes").iterdir()] == ["fp16"], "nothing is left of the way there"


def scene_images(count: int) -> list[np.ndarray]:
    return [scenes.make_scene(seed, HW).frame for seed in range(count)]


def test_precisions_are_judged_on_real_images_only(workspace: Path) -> None:
    memory = workspace / "workspace.json"
    content = json.loads(memory.read_text())
    memory.unlink()
    memory.write_text(json.dumps({**content, "data": None}))
    result = run("-C", workspace, "build", "--device", "rtx-4090", "--precision", "fp16")
    assert result.exit_code == 1
    assert "fp16 and int8 are checked on real images: name a data folder with --data DIR" in result.stderr
    assert not (workspace / "recipes").exists()
    done("-C", workspace, "build", "--device", "rtx-4090", "--precision", "fp16", "--data", workspace / "data")


@pytest.mark.parametrize("precision", ["fp64", "", "fp32,fp64", "FP16"])
def test_a_precision_that_the_device_lacks_is_refused_before_anything_is_built(workspace: Path, precision: str) -> None:
    result = run("-C", workspace, "build", "--device", "rtx-4090", "--precision", precision)
    assert result.exit_code == 1
    assert "rtx-4090 computes in fp32, fp16, int8, not in" in result.stderr
    assert not (workspace / "engines").exists()


@pytest.mark.parametrize(
    ("wanted", "allowed", "name"),
    [
        ("fp16", ("fp32", "fp16", "int8"), "fp16"),
        ("int8", ("fp32", "fp16", "int8"), "int8"),
        ("int8", ("fp32", "int8"), "int8-fp32"),
    ],
)
def test_targets_that_fall_back_to_other_precisions_share_no_recipe(
    wanted: str, allowed: tuple[str, ...], name: str
) -> None:
    assert recipe_name(wanted, allowed) == name


def test_classic_tensorrt_is_built_on_its_device_alone(workspace: Path) -> None:
    result = run("-C", workspace, "build", "--device", "xavier")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: this machine is not 'xavier': ")


def test_a_device_that_this_machine_is_not_is_not_measured_here(workspace: Path) -> None:
    result = run("-C", workspace, "profile", "--device", "rtx-4090")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: this machine is not 'rtx-4090': ")
