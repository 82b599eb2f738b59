"""Programs are written by docs/json.md: what it says is there, and nothing is there that it does not say."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mess_compile.data import scenes
from tests.attach import brought
from tests.commands import printed_json
from tests.json_docs import differences


@pytest.mark.parametrize(
    ("section", "arguments"),
    [
        ("search", ("search", "--max-err", "50%", "--explain")),
        ("bench --deadline", ("bench", "host.mess", "--split", "test", "--passes", "1", "--deadline", "20ms")),
        ("build --dry-run, profile --dry-run", ("profile", "--dry-run")),
        ("profile", ("inspect", "latency")),
        ("search", ("inspect", "plan")),
        ("evaluate", ("inspect", "statistics")),
        ("profile", ("profile", "--device", "xavier", "--estimate")),
    ],
)
def test_what_options_add_is_documented_too(
    workspace: Path, section: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    assert differences(section, printed_json(*arguments)) == []


def test_what_attach_and_inspect_print_of_a_model_is_documented(tmp_path: Path) -> None:
    model = brought.saved(brought.unet(), tmp_path)
    (tmp_path / "images").mkdir()
    for number, scene in enumerate(scenes.by_difficulty(brought.HW, 10)):
        Image.fromarray(scene.frame).save(tmp_path / "images" / f"{number}.png")
    assert differences("inspect MODEL.onnx", printed_json("inspect", model)) == []
    options = ("--preprocess", "-1-1", "--exits", "3", "--heads", "fcn-crm1-b0", "--epochs", "0", "1")
    attached = printed_json("-C", tmp_path, "attach", model, "--images", tmp_path / "images", *options)
    assert differences("attach", attached) == []
    assert [point["carried"] == [] for point in attached["exit_points"]] == [False, False, True]


def test_the_check_sees_what_is_new_gone_or_of_another_kind() -> None:
    good = {"passed": True, "checks": [{"name": "hashes", "passed": True, "detail": "as written"}]}
    assert differences("verify", good) == []
    assert differences("verify", {**good, "more": 1}) == ["verify.more is not documented"]
    assert differences("verify", {"passed": True}) == ["verify.checks is not printed"]
    assert differences("verify", {**good, "passed": 1}) == ["verify.passed is 1, not true/false"]
    assert differences("verify", {**good, "checks": [{**good["checks"][0], "name": None}]}) == [
        "verify.checks[].name is null"
    ]
    assert len(differences("verify", {**good, "checks": [{}]})) == 3
